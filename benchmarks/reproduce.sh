#!/usr/bin/env bash
# The paper's kind of table with a real language model: SmolLM2-135M on Amazon Office, about three hours on two CPU cores.
#
#   bash benchmarks/reproduce.sh                            all rows, then the table; the same command goes on where it was cut off
#   BASELINES= SHARE=0.02 bash benchmarks/reproduce.sh      a fiftieth of samples, epochs and users, in a folder of its own: does it work?
#   ROWS="SEQ +PER random:+PER" bash benchmarks/reproduce.sh        fewer rows
#
# Two phases, the paper's language tasks in its frame first. Alignment: one epoch of the row's language tasks, as instructions, with
# the loss on responses; every row has the samples of the rows before it, and its own:
#   SEQ none | +MUT item2index, index2item | +ASY fusionseqrec | +ITE itemsearch | +PER preferenceobtain
# Histories: then EPOCHS epochs of seqrec, the same for every row, without instructions (config/history_prompts.json): a history is 13
# tokens and not 57, all of its items are predicted, and a token takes milliseconds. random:ROW is the same architecture and tokenizer
# from random weights. All rows share data (descriptions cut at 240 characters), RQ-VAE indices (text and behaviour, two levels),
# settings, and, for one SEED, test users; none has --dropout, which costs much here (docs/results-llm.md). Nothing is chosen
# by results: the last weights count. User texts are the dataset's own if it has some, else made by rule.
# compare.py trains SASRec and prints the table, with paired intervals of the differences from it and from the first row. Its column
# "training" is the histories' time alone; rows with more tasks are trained for longer, since the alignment is longer.
# Settings (paths count from the repository): EPOCHS 5 | USERS (tested) all | SHARE 1 (of samples, epochs and users) | ROWS | SEED 42 | WORK ./ckpt/reproduce
#   BASELINES SASRec (or more of compare.py's models; empty: none)
#   JOBS 2: rows at a time, each on its share of the cores (4.5 GiB of memory each; of disk 0.6 GB a row, in training 2) | DATASET Office | SOURCE ../shared/data/$DATASET
#   FINETUNE_FLAGS: appended to finetune.py's in both phases, so they win, a rate of new rows too (a change of them or of this script needs another WORK)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh
usage "$@"
ROWS="${ROWS:-SEQ +MUT +ASY +ITE +PER random:+PER}"
names=(SEQ +MUT +ASY +ITE +PER)
tasks=("" item2index,index2item fusionseqrec itemsearch preferenceobtain)
samples=("" "2000 300" 600 600 400)

# mixture ROW: the flags of the language tasks up to ROW; none for SEQ
mixture() {
  local all="" number="" copy="" i n
  for i in "${!names[@]}"; do
    all="$all${all:+${tasks[$i]:+,}}${tasks[$i]}"
    for n in ${samples[$i]}; do number="$number${number:+,}$(part "$n" 2)" copy="$copy${copy:+,}1"; done
    if [ "${names[$i]}" = "$1" ]; then
      echo "${all:+--tasks $all --train_data_sample_num $number --train_prompt_sample_num $copy}"
      return
    fi
  done
}

for row in $ROWS; do
  case " ${names[*]} " in *" ${row#random:} "*) ;; *)
    echo "error: no row $row; rows: ${names[*]}, each also as random:ROW" >&2
    exit 2 ;;
  esac
done

source scripts/recipes.sh
DATASET="${DATASET:-Office}"
SOURCE="${SOURCE:-../shared/data/$DATASET}"
SEED="${SEED:-42}"
SHARE="${SHARE:-1}"
EPOCHS="${EPOCHS:-5}"
JOBS="${JOBS:-2}"
case "$JOBS" in "" | *[!0-9]* | 0*) echo "error: JOBS='$JOBS' must be a whole number from 1" >&2; exit 2 ;; esac
case "$SEED" in *[!0-9]* | 0?*) echo "error: SEED='$SEED' must be a whole number" >&2; exit 2 ;; esac
for name in SHARE EPOCHS USERS; do
  case "${!name:-1}" in *[!0-9.]* | *.*.* | .) echo "error: $name='${!name}' must be a number" >&2; exit 2 ;; esac
done
work="${WORK:-./ckpt/reproduce}/$DATASET"
stem="$work/$DATASET/$DATASET"
made_of "$work" "$SOURCE" "$DATASET" "recipe $(cat benchmarks/reproduce.sh scripts/recipes.sh | grep -v '^ *#' | cksum) ${FINETUNE_FLAGS:-}"
setup_env requirements.txt
keep_memory
# RecBole's environment now: it needs the network, and hours later would be late to say so
if [ -n "${BASELINES-SASRec}" ]; then python benchmarks/baselines.py; fi
part() { python -c 'import sys; number, least, share = map(float, sys.argv[1:]); print(round(max(least, number * share)))' "$1" "$2" "$SHARE"; }
product() { python -c 'import sys; print(f"{float(sys.argv[1]) * float(sys.argv[2]):g}")' "$1" "$2"; }
SHARE="$(product "$SHARE" 1)" EPOCHS="$(product "$EPOCHS" "$SHARE")"
mkdir -p "$work/$DATASET"
ln -sfn "$(realpath "$SOURCE/$DATASET.inter.json")" "$stem.inter.json"
if [ -e "$SOURCE/$DATASET.user.json" ]; then ln -sfn "$(realpath "$SOURCE/$DATASET.user.json")" "$stem.user.json"; fi
if [ ! -e "$stem.item.json" ]; then python benchmarks/short_texts.py "$SOURCE/$DATASET.item.json" "$stem.item.json" --length 240; fi
if [ ! -e "$stem.user.json" ]; then python data_process/user_texts.py --data_path "$work" --dataset "$DATASET"; fi
if [ ! -e "$stem.emb-minilm-td.npy" ]; then embed "$work" "$DATASET"; fi
if [ ! -e "$stem.emb-behaviour.npy" ]; then behaviour "$work" "$DATASET"; fi
USERS="$(part "${USERS:-$(python -c 'import json, sys; print(len(json.load(open(sys.argv[1]))))' "$SOURCE/$DATASET.inter.json")}" 10)"
if [ ! -e "$stem.index.json" ]; then
  two_levels "$stem.emb-behaviour.npy" "$stem.item.json" 6.5 "$work/index" "$stem.index.json"
fi

swap="$(swap_share "$stem.inter.json" "$stem.item.json")"
if [ "$swap" = 0 ]; then swap=(); else swap=(--swap_items "$swap" --swap_by "$stem.emb-minilm-td.npy"); fi

# train BASE RUN FLAGS…: fine-tune, if that is not done
train() {
  local base="$1" run="$2"
  shift 2
  if [ -e "$run/model/config.json" ]; then rm -rf "$run"/model/checkpoint-*; return; fi
  # shellcheck disable=SC2086
  python finetune.py --base_model "$base" --output_dir "$run/model" --resume_from_checkpoint auto --seed "$SEED" \
    --data_path "$work" --dataset "$DATASET" --deepspeed none --bf16 --packing --no-gradient_checkpointing \
    --his_sep= --no_eos --gradient_accumulation_steps 1 --warmup_ratio 0.05 --optim adamw_torch_fused \
    --learning_rate 3e-4 --last_code_weight 3 --logging_step 10 --save_total_limit 1 \
    --valid_prompt_sample_num 1 "$@" ${FINETUNE_FLAGS:-}
  rm -rf "$run"/model/checkpoint-*
}

runs="$work/seed$SEED-$EPOCHS-epochs"
if [ "$SHARE" != 1 ]; then runs="$runs-share$SHARE"; fi

# one [random:]ROW: both phases and the test. Rows of item tokens have a high rate where a step asks for 200 items, a low one where it
# asks for sixteen (docs/results-llm.md)
one() {
  local base="$work/smollm2" alignment start=(--init_item_tokens words)
  case "$1" in random:*) base="$work/smollm2-random-seed$SEED" ;; esac
  alignment="$(mixture "${1#random:}")"
  if [ -n "$alignment" ]; then
    # shellcheck disable=SC2086
    train "$base" "$runs/$1/aligned" $alignment "${start[@]}" --new_rows_learning_rate 1e-3 --only_train_response --model_max_length 384 \
      --epochs 1 --per_device_batch_size 16 --save_and_eval_strategy steps --save_and_eval_steps 40 --eval_delay 1000000
    base="$runs/$1/aligned/model" start=()
  fi
  train "$base" "$runs/$1" --tasks seqrec --longest_history_only --prompt_file config/history_prompts.json ${start[@]+"${start[@]}"} \
    ${swap[@]+"${swap[@]}"} --new_rows_learning_rate 1e-2 --per_device_batch_size 32 --epochs "$EPOCHS" \
    --eval_delay "$EPOCHS" --eval_ranking "$(part 300 10)"
  rm -f "$runs/$1"/aligned/model/*.safetensors
  python test.py --ckpt_path "$runs/$1/model" --results_file "$runs/$1/result-$USERS.json" --data_path "$work" \
    --dataset "$DATASET" --sample_num "$USERS" --num_beams 20 --test_batch_size auto --seed "$SEED"
}

for row in $ROWS; do
  case "$row" in random:*) base="$work/smollm2-random-seed$SEED" random=--random_weights ;; *) base="$work/smollm2" random="" ;; esac
  # shellcheck disable=SC2086
  if [ ! -e "$base/config.json" ]; then python data_process/base_model.py smollm2 --target "$base" --seed "$SEED" $random; fi
done

# JOBS rows at a time; what they print goes to $runs/logs
pids=() failed=0
stop() {
  trap '' INT TERM HUP QUIT
  for pid in ${pids[@]+"${pids[@]}"}; do kill -- "-$pid" 2> /dev/null || true; done
  exit 130
}
trap stop INT TERM HUP QUIT
threads="${OMP_NUM_THREADS:-$(($(nproc) > JOBS ? $(nproc) / JOBS : 1))}"
mkdir -p "$runs/logs"
for row in $ROWS; do
  while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do sleep 1; done
  log="$runs/logs/$row.txt"
  echo "== $(date +%H:%M) $row (tail -f $log)"
  set -m  # a process group of its own, so that all of it can be stopped
  {
    set +e
    (set -e; export OMP_NUM_THREADS="$threads"; one "$row") >> "$log" 2>&1
    status=$?
    if [ "$status" != 0 ]; then echo "error: $row failed; the end of $log:" >&2; tail -n 3 "$log" >&2; fi
    exit "$status"
  } < /dev/null &
  pids+=($!)
  set +m
done
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
if [ "$failed" = 1 ]; then echo "error: not all rows were done; the same command goes on from here" >&2; exit 1; fi
results=()
for row in $ROWS; do results+=("$row=$runs/$row/result-$USERS.json"); done
echo "$DATASET, one epoch of the row's language tasks, then $EPOCHS of histories; $USERS test users:"
# shellcheck disable=SC2086
python benchmarks/compare.py --data_path "$work" --dataset "$DATASET" --models ${BASELINES-SASRec} --seeds "$SEED" \
  --work "$work/compare" --results "${results[@]}"
cp "$work/compare/$DATASET/compare.md" "$runs/table.md"
