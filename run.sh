#!/usr/bin/env bash
# The main job, end to end: data → embeddings → item indices → base model → fine-tuning → test → table.
#
#   bash run.sh                                        the embedded default, MovieLens-100k with a tiny LLaMA, on the CPU
#   DATASET=Games BASE_MODEL=huggyllama/llama-7b NPROC=8 bash run.sh        the paper's recipe (Games, Arts, Instruments)
#   DATASET=Mine DATA_PATH=./data bash run.sh          your data: Mine.inter.json and Mine.item.json in ./data/Mine/
#   bash run.sh index finetune                         these stages alone; stages: data embed index base finetune test table
#   FORCE=1 bash run.sh finetune                       do it again although its output is there
#
# A stage whose output is there is skipped. Settings (environment variables, with their defaults):
#   DATASET ml-100k | DATA_PATH ./data | BASE_MODEL (a tiny LLaMA, made on the spot) | SEED 42
#   NPROC (as many as there are GPUs, at most 2 for a tiny model; 2 on the CPU) | DEEPSPEED ./config/ds_z3_bf16.json (none: plain DDP)
#   OUTPUT_DIR ./ckpt/$DATASET | RESULTS_DIR ./results/$DATASET (both with -seed$SEED behind them unless SEED is 42) | MODELS_DIR ./models
#   PORT 23324 | DATA_FLAGS, INDEX_FLAGS, BASE_FLAGS (the tiny model's), FINETUNE_FLAGS, TEST_FLAGS: appended to the stage's command, so they win
#   BEHAVIOUR 1 (0: a tiny model's indices from texts alone, so that new items can be added later)
#   VENV .venv | PYTHON python3 | FORCE 0
set -euo pipefail
caller="$PWD"
cd "$(dirname "$0")"
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then sed -n '2,/^set /p' run.sh | sed '$d;s/^# \{0,1\}//'; exit 0; fi
source scripts/env.sh
source scripts/recipes.sh
STAGES="data embed index base finetune test table"
# shellcheck disable=SC2086
if [ $# -eq 0 ]; then set -- $STAGES; fi
for stage in "$@"; do
  case " $STAGES " in *" $stage "*) ;; *) echo "error: no stage $stage; stages: $STAGES" >&2; exit 2 ;; esac
done

# the caller's relative paths stay the caller's
if [ "$caller" != "$PWD" ]; then
  for name in DATA_PATH OUTPUT_DIR RESULTS_DIR MODELS_DIR DEEPSPEED; do
    value="${!name:-}"
    case "$value" in "" | /* | none) ;; *) printf -v "$name" '%s' "$caller/$value" ;; esac
  done
fi
DATASET="${DATASET:-ml-100k}"
DATA_PATH="${DATA_PATH:-./data}"
SEED="${SEED:-42}"
suffix=""; [ "$SEED" = 42 ] || suffix="-seed$SEED"
OUTPUT_DIR="${OUTPUT_DIR:-./ckpt/$DATASET$suffix}"
OUTPUT_DIR="${OUTPUT_DIR%/}"
RESULTS_DIR="${RESULTS_DIR:-./results/$DATASET$suffix}"
RESULTS_DIR="${RESULTS_DIR%/}"
DEEPSPEED="${DEEPSPEED:-./config/ds_z3_bf16.json}"
PORT="${PORT:-23324}"
stem="$DATA_PATH/$DATASET/$DATASET"

setup_env requirements.txt
GPUS="$(count_gpus)"
if [ "$GPUS" = 0 ]; then export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" DS_ACCELERATOR=cpu; fi  # DeepSpeed would guess and say so
keep_memory
TINY="${MODELS_DIR:-./models}/tiny-$DATASET$suffix"
BASE="${BASE_MODEL:-$TINY}"
recipe "$DATASET" "${BASE_MODEL:-}" "$GPUS"

# begin STAGE OUTPUT [INPUT]: true if the stage is to be run
begin() {
  if [ -e "$2" ] && [ "${FORCE:-0}" != 1 ]; then
    echo "== $1: $2 is there, skipped (FORCE=1 redoes it)"
    if [ -n "${3:-}" ] && [ "$3" -nt "$2" ]; then echo "   note: $3 is newer than $2: FORCE=1 bash run.sh $1"; fi
    return 1
  fi
  echo "== $1"
}

stage_data() {
  if [ "$DATASET" = ml-100k ]; then
    if begin data "$stem.inter.json"; then
      local source
      source="$(python data_process/fetch.py ml-100k)"
      # shellcheck disable=SC2086
      python data_process/from_recbole.py --source "$source" --data_path "$DATA_PATH" \
        --dataset ml-100k --k_core 1 --item_kind movie --overwrite ${DATA_FLAGS:-}
    fi
  elif [ ! -e "$stem.inter.json" ] || [ ! -e "$stem.item.json" ]; then
    echo "error: $stem.inter.json and $stem.item.json must be there (docs/formats.md): download the dataset," \
      "or make them with data_process/from_table.py, from_amazon.py or from_recbole.py (docs/your-data.md)" >&2
    exit 2
  fi
  if [ -e "$stem.user.json" ] && ! grep -q '"made_by"' "$stem.user.json"; then
    echo "== user_texts: $stem.user.json came with the dataset, kept"
  elif begin user_texts "$stem.user.json"; then
    python data_process/user_texts.py --data_path "$DATA_PATH" --dataset "$DATASET" --overwrite
  fi
}

stage_embed() {
  local needed=0
  case "$FINETUNE_RECIPE" in *--init_item_tokens*) needed=1 ;; esac
  if [ "$needed" = 0 ] && [ -e "$stem.index.json" ] && [ "${FORCE:-0}" != 1 ]; then echo "== embed: $stem.index.json is there, not needed"; return; fi
  if begin embed "$stem.emb-minilm-td.npy"; then
    embed "$DATA_PATH" "$DATASET" --overwrite
  fi
  if [ "$BEHAVIOUR" = 1 ] && begin behaviour "$stem.emb-behaviour.npy"; then
    behaviour "$DATA_PATH" "$DATASET" --overwrite
  fi
}

stage_index() {
  local embeddings="$stem.emb-minilm-td.npy"
  if [ "$BEHAVIOUR" = 1 ]; then embeddings="$stem.emb-behaviour.npy"; fi
  if [ -e "$stem.index.json" ] && [ ! -e "$stem.index.report.json" ] && [ ! -d "$OUTPUT_DIR-index" ]; then
    echo "== index: $stem.index.json came with the dataset, kept"
  elif begin index "$stem.index.json"; then
    INDEX_RECIPE="${INDEX_RECIPE//CODES/$(codes_of "$stem.item.json" 6.5)}"
    echo "   ($INDEX_RECIPE)"
    # shellcheck disable=SC2086
    python index/main.py --data_path "$embeddings" --ckpt_dir "$OUTPUT_DIR-index" $INDEX_RECIPE ${INDEX_FLAGS:-}
    python index/generate_indices.py --ckpt_path "$OUTPUT_DIR-index" --output_file "$stem.index.json" --overwrite
  fi
}

stage_base() {
  if [ -n "${BASE_MODEL:-}" ]; then echo "== base: $BASE_MODEL"; return; fi
  if begin base "$TINY/model.safetensors"; then
    rm -rf "$TINY"
    # shellcheck disable=SC2086
    python data_process/base_model.py tiny --data_path "$DATA_PATH" --dataset "$DATASET" --target "$TINY" --seed "$SEED" $BASE_RECIPE ${BASE_FLAGS:-}
  fi
}

stage_finetune() {
  local trained="$OUTPUT_DIR/config.json" more=""
  if [ -e "$OUTPUT_DIR/adapter_config.json" ]; then trained="$OUTPUT_DIR/adapter_config.json"; fi
  if begin finetune "$trained" "$stem.index.json"; then
    if [ "${FORCE:-0}" = 1 ]; then more=--overwrite_output_dir
    elif compgen -G "$OUTPUT_DIR/checkpoint-*" > /dev/null; then more="--resume_from_checkpoint auto"; fi
    FINETUNE_RECIPE="${FINETUNE_RECIPE//NO_REPEATS/$(unlikelihood "$stem.inter.json")}"
    # shellcheck disable=SC2086
    torchrun --nproc_per_node="$NPROC" --master_port="$PORT" finetune.py --base_model "$BASE" --output_dir "$OUTPUT_DIR" \
      --dataset "$DATASET" --data_path "$DATA_PATH" --seed "$SEED" --deepspeed "$DEEPSPEED" --bf16 --index_file .index.json \
      $FINETUNE_RECIPE $more ${FINETUNE_FLAGS:-}
  fi
}

stage_test() {
  local trained="$OUTPUT_DIR/config.json" more=() restart=""
  if [ -e "$OUTPUT_DIR/adapter_config.json" ]; then
    trained="$OUTPUT_DIR/adapter_config.json"
    more=(--lora --base_model "$BASE")
  fi
  if begin test "$RESULTS_DIR/result.json" "$trained"; then
    if [ "${FORCE:-0}" = 1 ]; then restart=--restart; fi
    # shellcheck disable=SC2086
    DATASET="$DATASET" DATA_PATH="$DATA_PATH" CKPT_PATH="$OUTPUT_DIR" RESULTS_FILE="$RESULTS_DIR/result.json" PORT="$PORT" \
      NPROC="$TEST_NPROC" bash test.sh --seed "$SEED" $TEST_RECIPE $restart ${more[@]+"${more[@]}"} ${TEST_FLAGS:-}
  fi
}

stage_table() {
  echo "== table"
  # shellcheck disable=SC2086
  python report.py --results_file "$RESULTS_DIR/result.json" --data_path "$DATA_PATH" --dataset "$DATASET" \
    --references benchmarks/references.json
  cat <<EOF
data      $DATA_PATH/$DATASET/
index     $stem.index.json, $stem.index.report.json
model     $OUTPUT_DIR/ (loads with AutoModelForCausalLM), its log and settings: train.log, run.json
results   $RESULTS_DIR/result.json, result.predictions.jsonl, result.table.md, result.html (open it in a browser)
EOF
}

for stage in "$@"; do "stage_$stage"; done
