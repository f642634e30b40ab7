#!/usr/bin/env bash
# The paper's kind of table with a real language model: SmolLM2-135M on Amazon Office, about 100 minutes on two CPU cores.
#
#   bash benchmarks/reproduce.sh                            all rows, then the table; the same command goes on where it was cut off
#   SHARE=0.02 bash benchmarks/reproduce.sh                 a fiftieth of the steps and users, in a folder of its own: does it work?
#   ROWS="SEQ +PER random:+PER" STEPS=300 bash benchmarks/reproduce.sh      fewer rows, each trained for longer
#
# Two phases. First the model learns histories, without instructions (config/history_prompts.json), EPOCHS times: 13 tokens a sample
# instead of 57. All rows begin with these weights. Then come the row's tasks in the paper's frame, with the loss on responses:
#   SEQ seqrec | +MUT item2index, index2item | +ASY fusionseqrec | +ITE itemsearch | +PER preferenceobtain
# each row the tasks of those before it too; random:ROW is the same architecture and tokenizer from random weights, in both phases.
# All rows take the same number of steps of 16 samples; on Office at least half of these are seqrec's. They share data (descriptions
# cut at 240 characters, since a token takes milliseconds), RQ-VAE indices (text and behaviour, two levels), settings, and, for one
# SEED, test users. Nothing is chosen by results: the last weights count. Every row is asked in the frame, and once more without
# instructions; the rows "histories" are the first phase alone. User texts are the dataset's own if it has some, else made by rule.
# Settings: EPOCHS 5 | STEPS 160 | USERS 1000 (tested) | SHARE 1 | ROWS | SEED 42 | WORK ./ckpt/reproduce
#   JOBS 2: rows at a time, each on its share of the cores (4.5 GiB of memory each) | DATASET Office | SOURCE ../shared/data/$DATASET
#   FINETUNE_FLAGS: appended to finetune.py's, so they win (a change needs another WORK)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh
ROWS="${ROWS:-SEQ +MUT +ASY +ITE +PER random:+PER}"
tasks=(seqrec item2index,index2item fusionseqrec itemsearch preferenceobtain)
samples=(2900 400,400 700 700 700)
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
source scripts/recipes.sh
JOBS="${JOBS:-2}"
DATASET="${DATASET:-Office}"
SOURCE="${SOURCE:-../shared/data/$DATASET}"
SEED="${SEED:-42}"
SHARE="${SHARE:-1}"
part() { python -c "print(max($2, round($1 * $SHARE)))"; }
EPOCHS="$(python -c "print(${EPOCHS:-5} * $SHARE)")"
STEPS="$(part "${STEPS:-160}" 2)"
USERS="$(part "${USERS:-1000}" 10)"
work="${WORK:-./ckpt/reproduce}/$DATASET"
stem="$work/$DATASET/$DATASET"
made_of "$work" "$SOURCE" "$DATASET" "${FINETUNE_FLAGS:-}"
mkdir -p "$work/$DATASET"
ln -sfn "$(realpath "$SOURCE/$DATASET.inter.json")" "$stem.inter.json"
if [ -e "$SOURCE/$DATASET.user.json" ]; then ln -sfn "$(realpath "$SOURCE/$DATASET.user.json")" "$stem.user.json"; fi
if [ ! -e "$stem.item.json" ]; then python benchmarks/short_texts.py "$SOURCE/$DATASET.item.json" "$stem.item.json" --length 240; fi
if [ ! -e "$stem.user.json" ]; then python data_process/user_texts.py --data_path "$work" --dataset "$DATASET"; fi
if [ ! -e "$stem.emb-minilm-td.npy" ]; then embed "$work" "$DATASET"; fi
if [ ! -e "$stem.emb-behaviour.npy" ]; then behaviour "$work" "$DATASET"; fi
if [ ! -e "$stem.index.json" ]; then
  two_levels "$stem.emb-behaviour.npy" "$stem.item.json" 6.5 "$work/index" "$stem.index.json"
fi

# train BASE RUN FLAGS…: fine-tune, if that is not done
train() {
  local base="$1" run="$2"
  shift 2
  if [ -e "$run/model/config.json" ]; then return; fi
  # shellcheck disable=SC2086
  python finetune.py --base_model "$base" --output_dir "$run/model" --resume_from_checkpoint auto --seed "$SEED" \
    --data_path "$work" --dataset "$DATASET" --deepspeed none --bf16 --packing --no-gradient_checkpointing \
    --his_sep= --no_eos --gradient_accumulation_steps 1 --warmup_ratio 0.05 --dropout 0.1 --optim adamw_torch_fused \
    --swap_items 0.2 --swap_by "$stem.emb-minilm-td.npy" --last_code_weight 3 --logging_step 10 --save_total_limit 1 \
    --valid_prompt_sample_num 1 "$@" ${FINETUNE_FLAGS:-}
  rm -rf "$run"/model/checkpoint-*
}

# score RUN frame|bare: test, on the same users each time, in the instruction frame or without instructions
score() {
  local prompts=()
  if [ "$2" = bare ]; then prompts=(--prompt_file config/history_prompts.json); fi
  python test.py --ckpt_path "$1/model" --results_file "$1/$2-$USERS.json" --data_path "$work" --dataset "$DATASET" \
    --sample_num "$USERS" --num_beams 20 --test_batch_size auto --seed "$SEED" ${prompts[@]+"${prompts[@]}"}
}

first="$work/seed$SEED-$EPOCHS-epochs" runs="$work/seed$SEED-$EPOCHS-epochs-$STEPS-steps"

# histories [random:]: the first phase
histories() {
  local base="$work/smollm2" random=""
  if [ -n "$1" ]; then base="$work/smollm2-random-seed$SEED" random=--random_weights; fi
  # shellcheck disable=SC2086
  if [ ! -e "$base/config.json" ]; then python data_process/base_model.py smollm2 --target "$base" --seed "$SEED" $random; fi
  train "$base" "$first/$1histories" --tasks seqrec --longest_history_only --prompt_file config/history_prompts.json \
    --init_item_tokens words --per_device_batch_size 32 --epochs "$EPOCHS" --learning_rate 3e-4 --new_rows_learning_rate 1e-2 \
    --eval_delay "$EPOCHS" --eval_ranking 600
  score "$first/$1histories" bare
}

# one [random:]ROW: the second phase
one() {
  local random=""
  case "$1" in random:*) random=random: ;; esac
  # shellcheck disable=SC2046
  train "$first/${random}histories/model" "$runs/$1" $(mixture "${1#random:}") --per_device_batch_size 16 --max_steps "$STEPS" \
    --only_train_response --learning_rate 1e-4 --new_rows_learning_rate 1e-3 --model_max_length 384 \
    --save_and_eval_strategy steps --save_and_eval_steps 40 --eval_delay "$((STEPS + 1))"
  score "$runs/$1" frame
  score "$runs/$1" bare
}

# together FUNCTION NAME…: FUNCTION for each NAME, JOBS at a time; what they print goes to $work/logs
together() {
  local function="$1" name log pids=() logs=() failed=0 i
  shift
  mkdir -p "$work/logs"
  for name in "$@"; do
    while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do sleep 1; done
    log="$work/logs/$function-${name:-pretrained}.txt"
    echo "== $(date +%H:%M) $function ${name:-pretrained} (tail -f $log)"
    (set -e; "$function" "$name") >> "$log" 2>&1 &
    pids+=($!) logs+=("$log")
  done
  for i in "${!pids[@]}"; do
    if ! wait "${pids[$i]}"; then failed=1; echo "${logs[$i]}:" >&2; tail -n 3 "${logs[$i]}" >&2; fi
  done
  if [ "$failed" = 1 ]; then echo "error: not all rows were done; the same command goes on from here" >&2; exit 1; fi
}

trap 'trap - INT TERM HUP; kill 0' INT TERM HUP
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(($(nproc) > JOBS ? $(nproc) / JOBS : 1))}"
starts=() frame=() bare=()
for random in "" random:; do
  for row in $ROWS; do
    if [ "$random" = "${row%"${row#random:}"}" ]; then
      starts+=("$random")
      bare+=("${random}histories=$first/${random}histories/bare-$USERS.json")
      break
    fi
  done
done
for row in $ROWS; do frame+=("$row=$runs/$row/frame-$USERS.json") bare+=("$row=$runs/$row/bare-$USERS.json"); done
together histories "${starts[@]}"
# shellcheck disable=SC2086
together one $ROWS
echo "$DATASET, $EPOCHS epochs of histories, then $STEPS steps of 16 samples; $USERS test users, asked in the instruction frame:"
python benchmarks/task_table.py "${frame[@]}"
echo "and asked without instructions, as in the first phase:"
python benchmarks/task_table.py "${bare[@]}"
if [ -e "$SOURCE/SOURCE.md" ]; then sed -n 's/^| SASRec/| SASRec, all users, recorded in SOURCE.md/p' "$SOURCE/SOURCE.md"; fi
