#!/usr/bin/env bash
# What each group of tasks adds: SEQ, then +MUT, +ASY, +ITE, +PER, as in the paper's ablation, on the embedded default.
#
#   bash benchmarks/ablation.sh                             MovieLens-100k, the tiny model; prints a table, test split
#   SEEDS="42 43 44" bash benchmarks/ablation.sh            mean and standard deviation over seeds
#   STEPS=500 bash benchmarks/ablation.sh                   a fixed number of optimiser steps for every row
#
# SEQ seqrec | MUT item2index, index2item | ASY fusionseqrec | ITE itemsearch | PER preferenceobtain.
# All rows share data, index and base model (made first if missing). Every other setting of run.sh applies too.
set -euo pipefail
cd "$(dirname "$0")/.."
export DATASET="${DATASET:-ml-100k}"
SEQ_SAMPLES="${SEQ_SAMPLES:-12000}"
ASY_SAMPLES="${ASY_SAMPLES:-1000}"
names=(SEQ +MUT +ASY +ITE +PER)
tasks=(seqrec item2index,index2item fusionseqrec itemsearch preferenceobtain)
samples=("$SEQ_SAMPLES" 0,0 "$ASY_SAMPLES" 0 0)
copies=(1 1,1 1 1 1)

bash run.sh data embed index base
rows=()
for seed in ${SEEDS:-42}; do
  all="" number="" copy=""
  for i in "${!names[@]}"; do
    all="${all:+$all,}${tasks[$i]}" number="${number:+$number,}${samples[$i]}" copy="${copy:+$copy,}${copies[$i]}"
    out="ablation/$DATASET/${names[$i]#+}-$seed"
    SEED=42 OUTPUT_DIR="./ckpt/$out" RESULTS_DIR="./results/$out" FINETUNE_FLAGS="--seed $seed --tasks $all \
      --train_data_sample_num $number --train_prompt_sample_num $copy ${STEPS:+--max_steps $STEPS} \
      ${FINETUNE_FLAGS:-}" \
      bash run.sh finetune test
    rows+=("${names[$i]}=./results/$out/result.json")
  done
done
python benchmarks/task_table.py "${rows[@]}"
