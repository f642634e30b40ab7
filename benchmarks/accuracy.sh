#!/usr/bin/env bash
# A small model against SASRec on Amazon Office (leave one out, all items ranked): minutes on two CPU cores.
#
#   bash benchmarks/accuracy.sh                         RQ-VAE indices, seeds 42 43 44, then flat ones (one token an item); a table each
#   METHOD=rqvae bash benchmarks/accuracy.sh            one of the two alone
#   METHOD=x INDEX_FLAGS="--preset paper" bash benchmarks/accuracy.sh      an RQ-VAE of the texts with these flags, its index called x
#   TRIAL=x METHOD=rqvae FINETUNE_FLAGS="--epochs 12 --eval_delay 10" bash benchmarks/accuracy.sh        another recipe, in folders of its own
#   DATASET=Mine SOURCE=./data/Mine bash benchmarks/accuracy.sh
#
# SOURCE (../shared/data/Office, from the repository) holds <DATASET>.inter.json and <DATASET>.item.json. RQ-VAE indices are
# learned from text and behaviour (data_process/behaviour.py): two levels, about 6 items to each code. A LLaMA of 1 to 2 million
# parameters with two layers learns whole histories without instructions and without an end token (config/short_prompts.json):
# every item of a history is predicted once an epoch. Where items are rare a fifth of them is swapped for like ones (swap_share in
# scripts/recipes.sh). The epoch is chosen by NDCG@10 on the validation targets; the test targets are used once. The same command
# goes on where it was cut off. What was made by another recipe is kept, and refused: name a TRIAL.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh
usage "$@"
source scripts/recipes.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
DATASET="${DATASET:-Office}"
SOURCE="${SOURCE:-../shared/data/$DATASET}"
METHOD="${METHOD:-rqvae flat}"
case " $METHOD " in *" rqvae "* | *" flat "*)
  if [ -n "${INDEX_FLAGS:-}" ]; then echo "error: INDEX_FLAGS make an index of another METHOD than rqvae and flat" >&2; exit 2; fi ;;
esac
work="./ckpt/accuracy/$DATASET"
stem="$work/$DATASET/$DATASET"
made_of "$work" "$SOURCE" "$DATASET"
setup_env requirements.txt
keep_memory
mkdir -p "$work/$DATASET"
for kind in inter item; do ln -sfn "$(realpath "$SOURCE/$DATASET.$kind.json")" "$stem.$kind.json"; done
if [ ! -e "$stem.emb-minilm-td.npy" ]; then embed "$work" "$DATASET"; fi
if [ ! -e "$stem.emb-behaviour.npy" ]; then behaviour "$work" "$DATASET"; fi

swap="$(swap_share "$stem.inter.json" "$stem.item.json")"
unlikely="$(unlikelihood "$stem.inter.json")"

# make_index METHOD
make_index() {
  if [ -e "$stem.$1.json" ]; then return; fi
  if [ "$1" = rqvae ]; then
    two_levels "$stem.emb-behaviour.npy" "$stem.item.json" 6.5 "$work/index-$1" "$stem.$1.json"
  elif [ "$1" != flat ] && [ -n "${INDEX_FLAGS:-}" ]; then
    # shellcheck disable=SC2086
    python index/main.py --data_path "$stem.emb-minilm-td.npy" --ckpt_dir "$work/index-$1" $INDEX_FLAGS
    python index/generate_indices.py --ckpt_path "$work/index-$1" --output_file "$stem.$1.json"
  else
    python index/generate_indices.py --method "$1" --data_path "$stem.emb-minilm-td.npy" --output_file "$stem.$1.json"
  fi
}

# one METHOD SEED: fine-tune and test, if that is not done
one() {
  local run="$work/${TRIAL:+$TRIAL-}$1-seed$2" recipe="--epochs 16 --eval_delay 14 --learning_rate 3e-3 --dropout 0.2 --last_code_weight 3 --swap_items $swap --unlikelihood $unlikely"
  local form=(--data_path "$work" --dataset "$DATASET" --index_file ".$1.json" --prompt_file config/short_prompts.json --his_sep= --no_eos)
  if [ "$1" = flat ]; then recipe="--epochs 12 --eval_delay 9 --learning_rate 2e-3 --dropout 0.3"; fi
  recipe="$recipe ${FINETUNE_FLAGS:-}"
  made_of "$run" "$SOURCE" "$DATASET" "$recipe${INDEX_FLAGS:+, index $INDEX_FLAGS}"
  if [ ! -e "$run/base/config.json" ]; then
    python data_process/base_model.py tiny --data_path "$work" --dataset "$DATASET" --target "$run/base" --layers 2 --seed "$2"
  fi
  if [ ! -e "$run/model/config.json" ]; then
    # shellcheck disable=SC2086
    python finetune.py --base_model "$run/base" --output_dir "$run/model" --resume_from_checkpoint auto "${form[@]}" --seed "$2" \
      --deepspeed none --packing --no-gradient_checkpointing --tasks seqrec --train_prompt_sample_num 1 --train_data_sample_num 0 \
      --history_windows --init_item_tokens "$stem.emb-minilm-td.npy" --per_device_batch_size 64 --gradient_accumulation_steps 1 \
      --warmup_ratio 0.05 --logging_step 50 --valid_prompt_sample_num 1 --eval_ranking 1000000 --select_by ndcg@10 \
      --save_total_limit 1 $recipe
  fi
  python test.py --ckpt_path "$run/model" --results_file "$run/result.json" "${form[@]}" --seed "$2" --num_beams 20 \
    --test_batch_size auto
}

for method in $METHOD; do
  make_index "$method"
  results=()
  for seed in ${SEEDS:-42 43 44}; do
    one "$method" "$seed"
    results+=("$work/${TRIAL:+$TRIAL-}$method-seed$seed/result.json")
  done
  python report.py --results_file "${results[@]}" --data_path "$work" --dataset "$DATASET" --index_file ".$method.json" \
    --table_file "$work/${TRIAL:+$TRIAL-}$method.table.md" --references benchmarks/references.json
done
