#!/usr/bin/env bash
# Score a checkpoint: HR@k and NDCG@k on the test split. One process runs test.py, several run test_ddp.py under torchrun.
#
#   bash test.sh                                       the embedded default's checkpoint
#   DATASET=Games CKPT_PATH=./ckpt/Games NPROC=8 bash test.sh --test_prompt_ids all --test_batch_size auto
#
# Settings: DATASET ml-100k | DATA_PATH ./data | CKPT_PATH ./ckpt/$DATASET | NPROC 1 | GPU 0 | PORT 23324
#   RESULTS_FILE ./results/$DATASET/result.json; all arguments go to the Python script (python test.py --help).
set -euo pipefail
cd "$(dirname "$0")"
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then sed -n '2,/^set /p' test.sh | sed '$d;s/^# \{0,1\}//'; exit 0; fi
source scripts/env.sh
setup_env requirements.txt
DATASET="${DATASET:-ml-100k}"
common=(--ckpt_path "${CKPT_PATH:-./ckpt/$DATASET}" --dataset "$DATASET" --data_path "${DATA_PATH:-./data}"
  --results_file "${RESULTS_FILE:-./results/$DATASET/result.json}" "$@")
if [ "${NPROC:-1}" = 1 ]; then
  exec python test.py --gpu_id "${GPU:-0}" "${common[@]}"
fi
exec torchrun --nproc_per_node="$NPROC" --master_port="${PORT:-23324}" test_ddp.py "${common[@]}"
