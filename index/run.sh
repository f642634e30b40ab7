#!/usr/bin/env bash
# Item indices for one dataset: train the RQ-VAE, then write <D>.index.json with its report and picture.
#   DATASET=Games PLM=llama bash index/run.sh                          what the paper's run had
#   DATASET=Games PLM=minilm PRESET=fast bash index/run.sh             minutes on a CPU, see docs/index.md
#   DATASET=Games bash index/run.sh --epochs 500 --device cuda:1       more flags go to main.py
#   DATASET=Games NPROC=8 bash index/run.sh --bn False                 several processes (without batch norm)
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
DATASET="${DATASET:-Games}"
PLM="${PLM:-llama}"
PRESET="${PRESET:-paper}"
DATA_PATH="${DATA_PATH:-./data}"
CKPT_DIR="${CKPT_DIR:-./ckpt/index/$DATASET}"
NPROC="${NPROC:-1}"
PYTHON="${PYTHON:-python}"

launch=("$PYTHON")
if [ "$NPROC" -gt 1 ]; then
  launch=("$PYTHON" -m torch.distributed.run "--nproc_per_node=$NPROC" "--master_port=${MASTER_PORT:-23324}")
fi
echo "index of $DATASET: preset $PRESET, embeddings $DATA_PATH/$DATASET/$DATASET.emb-$PLM-td.npy, checkpoints in $CKPT_DIR"
"${launch[@]}" "$here/main.py" --preset "$PRESET" --ckpt_dir "$CKPT_DIR" \
  --data_path "$DATA_PATH/$DATASET/$DATASET.emb-$PLM-td.npy" "$@"
"$PYTHON" "$here/generate_indices.py" --ckpt_path "$CKPT_DIR" --overwrite \
  --output_file "$DATA_PATH/$DATASET/$DATASET.index.json"
