#!/usr/bin/env bash
# Item indices for one dataset: train the RQ-VAE, then write <D>.index.json. The paper's settings.
#   DATASET=Games PLM=llama bash index/run.sh
#   DATASET=Games DATA_PATH=./data CKPT_DIR=./ckpt/index/Games bash index/run.sh --epochs 500     (more flags for main.py)
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
DATASET="${DATASET:-Games}"
PLM="${PLM:-llama}"
DATA_PATH="${DATA_PATH:-./data}"
CKPT_DIR="${CKPT_DIR:-./ckpt/index/$DATASET}"
PYTHON="${PYTHON:-python}"

"$PYTHON" "$here/main.py" --data_path "$DATA_PATH/$DATASET/$DATASET.emb-$PLM-td.npy" --ckpt_dir "$CKPT_DIR" \
  --num_emb_list 256 256 256 256 --sk_epsilons 0.0 0.0 0.0 0.003 --batch_size 1024 --epochs 10000 \
  --weight_decay 1e-4 --lr_scheduler_type linear "$@"
"$PYTHON" "$here/generate_indices.py" --ckpt_path "$CKPT_DIR" --overwrite \
  --output_file "$DATA_PATH/$DATASET/$DATASET.index.json"
