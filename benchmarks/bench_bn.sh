#!/usr/bin/env bash
# Batch norm on (what the paper's run had) or off in the index training, side by side: the indices, and a model on each.
#
#   bash benchmarks/bench_bn.sh                             Amazon Office, 150 epochs each instead of 10,000
#   INDEX_EPOCHS=10000 WARMUP_EPOCHS=50 SEEDS="42 43 44" bash benchmarks/bench_bn.sh        the paper's length; three models on each
#
# Indices: `index/main.py --preset paper --bn True|False`. Models: the recipe of benchmarks/accuracy.sh, whose settings apply.
set -euo pipefail
cd "$(dirname "$0")/.."
DATASET="${DATASET:-Office}"
INDEX_EPOCHS="${INDEX_EPOCHS:-150}"
for bn in True False; do
  METHOD="bn-$bn" INDEX_FLAGS="--preset paper --bn $bn --epochs $INDEX_EPOCHS --warmup_epochs ${WARMUP_EPOCHS:-10} --device ${DEVICE:-cuda:0}" \
    bash benchmarks/accuracy.sh
done
python - "./ckpt/accuracy/$DATASET" "$DATASET" ${SEEDS:-42 43 44} <<'EOF'
import json
import sys
from pathlib import Path

work, dataset, *seeds = Path(sys.argv[1]), *sys.argv[2:]


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


print("| batch norm | reconstruction | codes used | colliding at first, after the rounds | seed | validation | test |")
print("| --- | --- | --- | --- | --- | --- | --- |")
for bn in ("True", "False"):
    index = read(work / dataset / f"{dataset}.bn-{bn}.report.json")
    used = ", ".join(str(level["used"]) for level in index["levels"])
    rounds = index["colliding_by_round"]
    for seed in seeds:
        run = work / f"bn-{bn}-seed{seed}"
        states = [read(path) for path in (run / "model").glob("checkpoint-*/trainer_state.json")]
        history = [row for state in states for row in state["log_history"] if "eval_ndcg@10" in row]
        valid = max(history, key=lambda row: row["eval_ndcg@10"])
        test = read(run / "result.json")["mean_results"]
        print(
            f"| {bn} | {index['reconstruction_mse']:.6f} | {used} | {rounds[0]}, {rounds[-1]} | {seed} "
            f"| HR@10 {valid['eval_hit@10']:.4f}, NDCG@10 {valid['eval_ndcg@10']:.4f} "
            f"| HR@10 {test['hit@10']:.4f}, NDCG@10 {test['ndcg@10']:.4f} |"
        )
EOF
