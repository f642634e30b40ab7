#!/usr/bin/env bash
# A recipe of run.sh judged without the test split: on data that ends three items earlier, by what each user took next.
#
#   bash benchmarks/earlier.sh                                                      MovieLens-100k and the recipe as it is
#   TRIAL=deeper BASE_FLAGS="--layers 3" bash benchmarks/earlier.sh                 another one; also INDEX_FLAGS and FINETUNE_FLAGS
#   DATASET=Mine SOURCE=./data/Mine bash benchmarks/earlier.sh                      your data (docs/formats.md)
#
# The test items, and the two before them, are cut off. Of what is left run.sh's stages make everything anew (user texts, behaviour,
# index, also where the dataset has its own), train, and test on the last item, items[-4]. The same model is then tested on items[-3]
# and items[-2], with all that came before as history; items[-1], the test split, is in none of these files. Prints each and their
# mean: users × 3 targets, so a smaller error than validation's, and none of them chose the epoch. Users with fewer than six items
# are left out. The same command goes on where it was cut off; another recipe needs another TRIAL.
# Settings (paths count from the repository): SEED 42 | WORK ./ckpt/earlier | PORT (a free one)
#   NPROC 1, DEEPSPEED none: one core for a tiny model (with BASE_MODEL what run.sh would take)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh
usage "$@"
source scripts/recipes.sh
DATASET="${DATASET:-ml-100k}"
SOURCE="${SOURCE:-./data/$DATASET}"
work="${WORK:-./ckpt/earlier}/$DATASET/${TRIAL:-recipe}-seed${SEED:=42}"
case "$work" in *[[:space:]]*) echo "error: $work: no blanks in WORK, DATASET and TRIAL" >&2; exit 2 ;; esac
if [ "${FORCE:-0}" = 1 ]; then echo "error: FORCE=1 is for run.sh; remove $work or name another TRIAL" >&2; exit 2; fi
if [ -z "${BASE_MODEL:-}" ]; then export NPROC="${NPROC:-1}" DEEPSPEED="${DEEPSPEED:-none}"; fi
if [ "$SOURCE" = ./data/ml-100k ] && [ ! -e "$SOURCE/ml-100k.inter.json" ]; then DATASET=ml-100k DATA_PATH=./data bash run.sh data; fi
made_of "$work" "$SOURCE" "$DATASET" "recipe $(cat run.sh scripts/recipes.sh | cksum) ${BASE_MODEL:-} ${BEHAVIOUR:-1} ${INDEX_FLAGS:-} \
${BASE_FLAGS:-} ${FINETUNE_FLAGS:-} ${TEST_FLAGS:-} ${NPROC:-} ${DEEPSPEED:-}"
setup_env requirements.txt
PORT="${PORT:-$(python -c 'import socket; place = socket.socket(); place.bind(("127.0.0.1", 0)); print(place.getsockname()[1])')}"

# cut N: the dataset without the last N items of each user, in $work/cutN
cut() {
  local folder="$work/cut$1/$DATASET"
  mkdir -p "$folder"
  ln -sfn "$(realpath "$SOURCE/$DATASET.item.json")" "$folder/$DATASET.item.json"
  python -c '
import json, sys
try:
    histories = json.load(open(sys.argv[1], encoding="utf-8"))
    kept = {user: items[: len(items) - int(sys.argv[2])] for user, items in histories.items() if len(items) >= 6}
except (ValueError, TypeError, AttributeError) as fault:
    print(f"error: {sys.argv[1]}: not a file of histories: {fault}", file=sys.stderr)
    sys.exit(2)
print(json.dumps(kept))' \
    "$SOURCE/$DATASET.inter.json" "$1" > "$folder/partial"
  mv "$folder/partial" "$folder/$DATASET.inter.json"
}

# stages N STAGE…: of run.sh, on what is cut by N
stages() {
  local number="$1"
  shift
  DATASET="$DATASET" SEED="$SEED" PORT="$PORT" DATA_PATH="$work/cut$number" RESULTS_DIR="$work/cut$number" \
    OUTPUT_DIR="$work/model" MODELS_DIR="$work/base" bash run.sh "$@"
}

for number in 3 2 1; do cut "$number"; done
if [ ! -e "$work/cut3/$DATASET/$DATASET.user.json" ]; then python data_process/user_texts.py --data_path "$work/cut3" --dataset "$DATASET"; fi
stages 3 embed index base finetune test
for number in 2 1; do
  ln -sfn "../../cut3/$DATASET/$DATASET.index.json" "$work/cut$number/$DATASET/$DATASET.index.json"
  stages "$number" test
done
python -c '
import json, sys
rows = {cut: json.load(open(f"{sys.argv[1]}/cut{cut}/result.json", encoding="utf-8"))["mean_results"] for cut in (3, 2, 1)}
rows["mean"] = {key: sum(row[key] for row in rows.values()) / 3 for key in ("hit@10", "ndcg@10")}
for cut, row in rows.items():
    hit, ndcg = row["hit@10"], row["ndcg@10"]
    target = "mean of the three" if cut == "mean" else f"items[-{cut + 1}]"
    print(f"{target:18} HR@10 {hit:.4f}  NDCG@10 {ndcg:.4f}")' "$work"
