#!/bin/bash
# Score a checkpoint on several GPUs: ./run_test_ddp.sh [DATASET] [PROCESSES] [more flags of test_ddp.py]
set -euo pipefail
cd "$(dirname "$0")"
DATASET=${1:-Games}
PROCESSES=${2:-8}
shift $(($# < 2 ? $# : 2))

torchrun --nproc_per_node="$PROCESSES" --master_port="${MASTER_PORT:-23324}" test_ddp.py --ckpt_path "./ckpt/$DATASET/" \
    --dataset "$DATASET" --data_path ./data --results_file "./results/$DATASET/result.json" --test_batch_size auto \
    --num_beams 20 --test_prompt_ids all --index_file .index.json "$@"
