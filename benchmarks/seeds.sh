#!/usr/bin/env bash
# The embedded default with three seeds (base model, samples and templates depend on them; the item index is shared), in one table.
#
#   bash benchmarks/seeds.sh              SEEDS="42 43 44" by default; what is there is not made again (FORCE=1 redoes it)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh
usage "$@"
unset OUTPUT_DIR RESULTS_DIR  # each seed has its own
setup_env requirements.txt
DATASET="${DATASET:-ml-100k}"
DATA_PATH="${DATA_PATH:-./data}"
results=()
for seed in ${SEEDS:-42 43 44}; do
  SEED="$seed" bash run.sh
  suffix=""; [ "$seed" = 42 ] || suffix="-seed$seed"
  results+=("./results/$DATASET$suffix/result.json")
done
python report.py --results_file "${results[@]}" --data_path "$DATA_PATH" --dataset "$DATASET" \
  --table_file "./results/$DATASET-seeds.md" --references benchmarks/references.json
