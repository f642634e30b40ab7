#!/usr/bin/env bash
# A recipe of run.sh judged without the test split: on data that ends three items earlier, by what each user took next.
#
#   bash benchmarks/earlier.sh                                                      MovieLens-100k and the recipe as it is
#   TRIAL=deeper BASE_FLAGS="--layers 3" bash benchmarks/earlier.sh                 another one; also INDEX_FLAGS and FINETUNE_FLAGS
#   DATASET=Mine SOURCE=./data/Mine bash benchmarks/earlier.sh                      your data (docs/formats.md)
#
# The test items, and the two before them, are cut off: run.sh makes everything (user texts, behaviour, index) anew of what is left,
# trains, and tests on the last item that is left, items[-4]. The same model is then tested on items[-3] and items[-2], with all that
# came before them as history; items[-1], the test split, is never read. Prints each, and their mean: users × 3 targets, so a smaller
# error than validation's, and none of them chose the epoch. Users with fewer than six items are left out.
# Settings: SEED 42 | WORK ./ckpt/earlier | NPROC 1, DEEPSPEED none (one core; run.sh's two processes: NPROC=2 DEEPSPEED=./config/ds_z3_bf16.json)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh
usage "$@"
source scripts/recipes.sh
DATASET="${DATASET:-ml-100k}"
SOURCE="${SOURCE:-./data/$DATASET}"
SEED="${SEED:-42}"
work="${WORK:-./ckpt/earlier}/$DATASET/${TRIAL:-recipe}-seed$SEED"
if [ "$DATASET" = ml-100k ] && [ ! -e "$SOURCE/ml-100k.inter.json" ]; then DATA_PATH="$(dirname "$SOURCE")" bash run.sh data; fi
made_of "$work" "$SOURCE" "$DATASET" "${INDEX_FLAGS:-} ${BASE_FLAGS:-} ${FINETUNE_FLAGS:-} ${NPROC:-1} ${DEEPSPEED:-none}"
setup_env requirements.txt

# cut N: the dataset without the last N items of each user, in $work/cutN
cut() {
  mkdir -p "$work/cut$1/$DATASET"
  ln -sfn "$(realpath "$SOURCE/$DATASET.item.json")" "$work/cut$1/$DATASET/$DATASET.item.json"
  python -c '
import json, sys
source, target, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
histories = json.load(open(source, encoding="utf-8"))
kept = {user: items[: len(items) - number] for user, items in histories.items() if len(items) >= 6}
json.dump(kept, open(target, "w", encoding="utf-8"))' "$SOURCE/$DATASET.inter.json" "$work/cut$1/$DATASET/$DATASET.inter.json" "$1"
}

if [ ! -e "$work/cut3/$DATASET/$DATASET.inter.json" ]; then cut 3; fi
SEED="$SEED" DATASET="$DATASET" DATA_PATH="$work/cut3" OUTPUT_DIR="$work/model" RESULTS_DIR="$work/cut3" MODELS_DIR="$work/base" \
  NPROC="${NPROC:-1}" DEEPSPEED="${DEEPSPEED:-none}" bash run.sh data embed index base finetune test
for number in 2 1; do
  cut "$number"
  ln -sfn "../../cut3/$DATASET/$DATASET.index.json" "$work/cut$number/$DATASET/$DATASET.index.json"
  SEED="$SEED" DATASET="$DATASET" DATA_PATH="$work/cut$number" OUTPUT_DIR="$work/model" RESULTS_DIR="$work/cut$number" \
    bash run.sh test
done
python -c '
import json, sys
rows = {cut: json.load(open(f"{sys.argv[1]}/cut{cut}/result.json", encoding="utf-8"))["mean_results"] for cut in (3, 2, 1)}
rows["mean"] = {key: sum(row[key] for row in rows.values()) / 3 for key in ("hit@10", "ndcg@10")}
for cut, row in rows.items():
    hit, ndcg = row["hit@10"], row["ndcg@10"]
    target = "mean of the three" if cut == "mean" else f"items[-{cut + 1}]"
    print(f"{target:18} HR@10 {hit:.4f}  NDCG@10 {ndcg:.4f}")' "$work"
