#!/bin/bash
# Score a checkpoint on one GPU: ./run_test.sh [DATASET] [GPU] [more flags of test.py]
set -euo pipefail
cd "$(dirname "$0")"
DATASET=${1:-Games}
GPU=${2:-0}
shift $(($# < 2 ? $# : 2))

python test.py --gpu_id "$GPU" --ckpt_path "./ckpt/$DATASET/" --dataset "$DATASET" --data_path ./data \
    --results_file "./results/$DATASET/result.json" --test_batch_size auto --num_beams 20 --test_prompt_ids all \
    --index_file .index.json "$@"
