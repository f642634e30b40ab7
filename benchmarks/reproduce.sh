#!/usr/bin/env bash
# The paper's kind of table with a real language model: SmolLM2-135M on Amazon Office, at most three hours on two CPU cores.
#
#   bash benchmarks/reproduce.sh                            all rows, then the table; the same command goes on where it was cut off
#   SHARE=0.02 bash benchmarks/reproduce.sh                 a fiftieth of the steps and users, in a folder of its own: does it work?
#   ROWS="SEQ +PER random:+PER" STEPS=600 bash benchmarks/reproduce.sh      fewer rows, each trained for longer
#
# Rows add tasks one by one: SEQ seqrec | +MUT item2index, index2item | +ASY fusionseqrec | +ITE itemsearch | +PER preferenceobtain;
# random:ROW is the same architecture and tokenizer from random weights. All rows take the same number of optimiser steps of
# 16 samples, on Office half of them or more sequences, share data (descriptions cut at 240 characters, since a token takes 5 ms),
# RQ-VAE indices (two levels of 256 codes), the instruction frame and every setting, and are tested on the same users. Nothing is
# chosen by results: the last weights count.
# Settings: STEPS 120 | USERS 1000 (tested) | SHARE 1 | ROWS | SEED 42 | WORK ./ckpt/reproduce
#   DATASET Office | SOURCE ../shared/data/$DATASET
#   FINETUNE_FLAGS: appended to finetune.py's, so they win (a change needs another WORK)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh
ROWS="${ROWS:-SEQ +MUT +ASY +ITE +PER random:SEQ random:+PER}"
tasks=(seqrec item2index,index2item fusionseqrec itemsearch preferenceobtain)
samples=(0 400,400 700 700 700)
copies=(1 1,1 1 1 1)
names=(SEQ +MUT +ASY +ITE +PER)

# mixture ROW: the flags of the tasks up to ROW
mixture() {
  local all="" number="" copy="" i
  for i in "${!names[@]}"; do
    all="${all:+$all,}${tasks[$i]}" number="${number:+$number,}${samples[$i]}" copy="${copy:+$copy,}${copies[$i]}"
    if [ "${names[$i]}" = "$1" ]; then
      echo "--tasks $all --train_data_sample_num $number --train_prompt_sample_num $copy"
      return
    fi
  done
  echo "error: no row $1; rows: ${names[*]}, each also as random:ROW" >&2
  return 2
}

for row in $ROWS; do mixture "${row#random:}" > /dev/null; done

setup_env requirements.txt
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"
DATASET="${DATASET:-Office}"
SOURCE="${SOURCE:-../shared/data/$DATASET}"
SEED="${SEED:-42}"
SHARE="${SHARE:-1}"
part() { python -c "print(max($2, round($1 * $SHARE)))"; }
STEPS="$(part "${STEPS:-120}" 2)"
USERS="$(part "${USERS:-1000}" 10)"
work="${WORK:-./ckpt/reproduce}/$DATASET"
runs="$work/seed$SEED-$STEPS-steps"
stem="$work/$DATASET/$DATASET"
for kind in inter item; do
  [ -e "$SOURCE/$DATASET.$kind.json" ] || { echo "error: $SOURCE/$DATASET.$kind.json is missing (SOURCE, DATASET)" >&2; exit 2; }
done
mkdir -p "$work/$DATASET"
ln -sfn "$(realpath "$SOURCE/$DATASET.inter.json")" "$stem.inter.json"
if [ ! -e "$stem.item.json" ]; then python benchmarks/short_texts.py "$SOURCE/$DATASET.item.json" "$stem.item.json" --length 240; fi
if [ ! -e "$stem.user.json" ]; then python data_process/user_texts.py --data_path "$work" --dataset "$DATASET"; fi
if [ ! -e "$stem.emb-minilm-td.npy" ]; then
  python data_process/embed.py --data_path "$work" --dataset "$DATASET" --plm_name minilm --model_path "$(python data_process/fetch.py minilm)"
fi
if [ ! -e "$stem.index.json" ]; then
  python index/main.py --data_path "$stem.emb-minilm-td.npy" --ckpt_dir "$work/index" --preset fast --num_emb_list 256 256 \
    --sk_epsilons 0 0.003 --layers 512 256 128
  python index/generate_indices.py --ckpt_path "$work/index" --output_file "$stem.index.json"
fi
results=()
for row in $ROWS; do
  base="$work/smollm2" run="$runs/$row" random=""
  case "$row" in random:*) base="$work/smollm2-random" random=--random_weights ;; esac
  if [ ! -e "$base/config.json" ]; then python data_process/base_model.py smollm2 --target "$base" --seed "$SEED" $random; fi
  if [ ! -e "$run/model/config.json" ]; then
    echo "== $row: $STEPS steps"
    # shellcheck disable=SC2046,SC2086
    python finetune.py --base_model "$base" --output_dir "$run/model" --resume_from_checkpoint auto --seed "$SEED" \
      --data_path "$work" --dataset "$DATASET" --deepspeed none --bf16 --packing --no-gradient_checkpointing \
      $(mixture "${row#random:}") --longest_history_only --his_sep= --no_eos --init_item_tokens words \
      --per_device_batch_size 16 --gradient_accumulation_steps 1 --max_steps "$STEPS" --learning_rate 3e-4 \
      --new_rows_learning_rate 1e-2 --warmup_ratio 0.05 --model_max_length 384 --logging_step 5 \
      --save_and_eval_strategy steps --save_and_eval_steps 30 --save_total_limit 1 --valid_prompt_sample_num 1 ${FINETUNE_FLAGS:-}
    rm -rf "$run"/model/checkpoint-*
  fi
  python test.py --ckpt_path "$run/model" --results_file "$run/result-$USERS.json" --data_path "$work" --dataset "$DATASET" \
    --sample_num "$USERS" --num_beams 20 --test_batch_size auto --seed "$SEED"
  results+=("$row=$run/result-$USERS.json")
done
echo "$DATASET, $STEPS steps of 16 samples, $USERS test users (of HR@10 near .1 the 95 % interval is about ±$(python -c "print(round(1.96 * (.09 / $USERS) ** .5, 3))"))"
python benchmarks/task_table.py "${results[@]}"
if [ -e "$SOURCE/SOURCE.md" ]; then grep '^| SASRec' "$SOURCE/SOURCE.md" | sed 's/^| SASRec/| SASRec, all users, recorded in SOURCE.md/'; fi
