#!/usr/bin/env bash
# Item search on Amazon Office: a model that finds an item by a query, beside BM25 and nearest MiniLM embeddings, in two tables.
#
#   bash benchmarks/search.sh                               the tiny LLaMA, minutes on two CPU cores
#   SMOLLM2_STEPS=400 bash benchmarks/search.sh             and SmolLM2-135M, so many steps of 16 samples (about 4 s each on one core)
#
# Models learn itemsearch and item2index, so they see the titles and descriptions that the references search (these uncut; for the
# models descriptions end after 240 characters). Unless the dataset brings its own user texts, the queries are made by rule from the
# item's own description, brand and title words (data_process/user_texts.py), which is what BM25 looks for; the second table has
# harder ones, without any word of the title (benchmarks/hard_queries.py).
# Settings (paths count from the repository): EPOCHS 5 | SMOLLM2_STEPS 0 | SEED 42 | DATASET Office | SOURCE ../shared/data/$DATASET | WORK ./ckpt/search
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh
usage "$@"
source scripts/recipes.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"
DATASET="${DATASET:-Office}"
SOURCE="${SOURCE:-../shared/data/$DATASET}"
SEED="${SEED:-42}"
EPOCHS="${EPOCHS:-5}"
SMOLLM2_STEPS="${SMOLLM2_STEPS:-0}"
for name in EPOCHS SMOLLM2_STEPS SEED; do
  case "${!name}" in "" | *[!0-9]*) echo "error: $name='${!name}' must be a whole number" >&2; exit 2 ;; esac
done
work="${WORK:-./ckpt/search}/$DATASET"
full="$work/full" short="$work/short" hard="$work/hard"
stem="$full/$DATASET/$DATASET"
made_of "$work" "$SOURCE" "$DATASET"
setup_env benchmarks/requirements.txt
keep_memory
mkdir -p "$full/$DATASET"
for kind in inter item; do ln -sfn "$(realpath "$SOURCE/$DATASET.$kind.json")" "$stem.$kind.json"; done
if [ -e "$SOURCE/$DATASET.user.json" ]; then ln -sfn "$(realpath "$SOURCE/$DATASET.user.json")" "$stem.user.json"; fi
if [ ! -e "$stem.user.json" ]; then python data_process/user_texts.py --data_path "$full" --dataset "$DATASET"; fi
if [ ! -e "$stem.emb-minilm-td.npy" ]; then embed "$full" "$DATASET"; fi
if [ ! -e "$stem.index.json" ]; then
  two_levels "$stem.emb-minilm-td.npy" "$stem.item.json" 13 "$work/index" "$stem.index.json"
fi
if [ ! -e "$short/$DATASET/$DATASET.item.json" ]; then
  mkdir -p "$short/$DATASET"
  for kind in inter user index; do ln -sfn "$(realpath "$stem.$kind.json")" "$short/$DATASET/$DATASET.$kind.json"; done
  python benchmarks/short_texts.py "$SOURCE/$DATASET.item.json" "$short/$DATASET/$DATASET.item.json" --length 240
fi
if [ ! -e "$hard/$DATASET/$DATASET.user.json" ]; then
  python benchmarks/hard_queries.py --data_path "$full" --dataset "$DATASET" --target_path "$hard"
fi

# model NAME BASE FLAGS…: train and test; adds to the lists of results
plain=() harder=()
model() {
  local name="$1" base="$2" run="$work/${1//[, ]/-}-seed$SEED"
  shift 2
  made_of "$run" "$SOURCE" "$DATASET" "${*//$work\//}"
  if [ ! -e "$run/model/config.json" ]; then
    python finetune.py --base_model "$base" --output_dir "$run/model" --resume_from_checkpoint auto --seed "$SEED" \
      --data_path "$short" --dataset "$DATASET" --deepspeed none --packing --no-gradient_checkpointing \
      --tasks itemsearch,item2index --train_prompt_sample_num 1,1 --train_data_sample_num 0,0 --only_train_response \
      --prompt_file config/search_prompts.json --his_sep= --no_eos --gradient_accumulation_steps 1 --warmup_ratio 0.05 \
      --logging_step 20 --save_and_eval_strategy steps --save_and_eval_steps 100 --save_total_limit 1 --valid_prompt_sample_num 1 "$@"
    rm -rf "$run"/model/checkpoint-*
  fi
  local prompt words=("query alone" "query and history")
  for prompt in 0 1; do
    python test.py --ckpt_path "$run/model" --test_task ItemSearch --test_prompt_ids "$prompt" --dataset "$DATASET" --seed "$SEED" \
      --test_batch_size auto --data_path "$full" --results_file "$run/plain-$prompt.json"
    python test.py --ckpt_path "$run/model" --test_task ItemSearch --test_prompt_ids "$prompt" --dataset "$DATASET" --seed "$SEED" \
      --test_batch_size auto --data_path "$hard" --results_file "$run/hard-$prompt.json"
    plain+=("$name, ${words[$prompt]}=$run/plain-$prompt.json")
    harder+=("$name, ${words[$prompt]}=$run/hard-$prompt.json")
  done
}

tiny="$work/tiny-seed$SEED"
if [ ! -e "$tiny/config.json" ]; then
  python data_process/base_model.py tiny --data_path "$short" --dataset "$DATASET" --target "$tiny" --layers 2 --seed "$SEED"
fi
model "tiny, $EPOCHS epochs" "$tiny" --init_item_tokens "$stem.emb-minilm-td.npy" --per_device_batch_size 64 --epochs "$EPOCHS" --learning_rate 3e-3
if [ "$SMOLLM2_STEPS" != 0 ]; then
  if [ ! -e "$work/smollm2/config.json" ]; then python data_process/base_model.py smollm2 --target "$work/smollm2"; fi
  model "SmolLM2, $SMOLLM2_STEPS steps" "$work/smollm2" --init_item_tokens words --per_device_batch_size 16 --max_steps "$SMOLLM2_STEPS" \
    --bf16 --learning_rate 3e-4 --new_rows_learning_rate 1e-2
fi
python benchmarks/search.py --data_path "$full" --dataset "$DATASET" --seed "$SEED" --results "${plain[@]}"
python benchmarks/search.py --data_path "$hard" --dataset "$DATASET" --seed "$SEED" --results "${harder[@]}"
