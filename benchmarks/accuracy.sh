#!/usr/bin/env bash
# A small model against SASRec on Amazon Office (leave one out, all items ranked): minutes on two CPU cores.
#
#   bash benchmarks/accuracy.sh                         flat indices (one token an item), seeds 42 43 44; prints a table
#   METHOD=rqvae bash benchmarks/accuracy.sh            three levels of 64 codes from the texts
#   METHOD=x INDEX_FLAGS="--preset paper" bash benchmarks/accuracy.sh      an RQ-VAE with these flags, its index called x
#   NAME=x FINETUNE_FLAGS="--epochs 20" bash benchmarks/accuracy.sh        another recipe, in folders of its own
#   DATASET=Mine SOURCE=./data/Mine bash benchmarks/accuracy.sh
#
# SOURCE (../shared/data/Office) holds <DATASET>.inter.json and <DATASET>.item.json. A LLaMA of 1 to 2 million parameters with two
# layers learns whole histories (the last 20 items), without instructions and without an end token (config/short_prompts.json): every item of a
# history is predicted once an epoch. The epoch is chosen by NDCG@10 on the validation targets; the test targets are used once.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh
setup_env requirements.txt
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
DATASET="${DATASET:-Office}"
SOURCE="${SOURCE:-../shared/data/$DATASET}"
METHOD="${METHOD:-flat}"
NAME="${NAME:-$METHOD}"
EPOCHS="${EPOCHS:-$([ "$METHOD" = flat ] && echo 8 || echo 20)}"
LEARNING_RATE="${LEARNING_RATE:-$([ "$METHOD" = flat ] && echo 2e-3 || echo 3e-3)}"
work="./ckpt/accuracy/$DATASET"
stem="$work/$DATASET/$DATASET"
for kind in inter item; do
  [ -e "$SOURCE/$DATASET.$kind.json" ] || { echo "error: $SOURCE/$DATASET.$kind.json is missing (SOURCE, DATASET)" >&2; exit 2; }
  mkdir -p "$work/$DATASET"
  ln -sfn "$(realpath "$SOURCE/$DATASET.$kind.json")" "$stem.$kind.json"
done
if [ ! -e "$stem.emb-minilm-td.npy" ]; then
  python data_process/embed.py --data_path "$work" --dataset "$DATASET" --plm_name minilm --model_path "$(python data_process/fetch.py minilm)"
fi
if [ ! -e "$stem.$METHOD.json" ]; then
  if [ "$METHOD" = rqvae ]; then
    INDEX_FLAGS="${INDEX_FLAGS:---preset fast --num_emb_list 64 64 64 --sk_epsilons 0 0 0.003 --layers 512 256 128}"
  fi
  if [ -n "${INDEX_FLAGS:-}" ]; then
    # shellcheck disable=SC2086
    python index/main.py --data_path "$stem.emb-minilm-td.npy" --ckpt_dir "$work/index-$METHOD" $INDEX_FLAGS
    python index/generate_indices.py --ckpt_path "$work/index-$METHOD" --output_file "$stem.$METHOD.json"
  else
    python index/generate_indices.py --method "$METHOD" --data_path "$stem.emb-minilm-td.npy" --output_file "$stem.$METHOD.json"
  fi
fi
results=()
form=(--data_path "$work" --dataset "$DATASET" --index_file ".$METHOD.json" --prompt_file config/short_prompts.json --his_sep= --no_eos)
for seed in ${SEEDS:-42 43 44}; do
  run="$work/$NAME-seed$seed"
  if [ ! -e "$run/base/config.json" ]; then
    python data_process/base_model.py tiny --data_path "$work" --dataset "$DATASET" --target "$run/base" --layers 2 --seed "$seed"
  fi
  if [ ! -e "$run/model/config.json" ]; then
    # shellcheck disable=SC2086
    python finetune.py --base_model "$run/base" --output_dir "$run/model" --overwrite_output_dir "${form[@]}" --seed "$seed" \
      --deepspeed none --packing --no-gradient_checkpointing --tasks seqrec --train_prompt_sample_num 1 --train_data_sample_num 0 \
      --longest_history_only --init_item_tokens "$stem.emb-minilm-td.npy" --per_device_batch_size 64 --gradient_accumulation_steps 1 --epochs "$EPOCHS" \
      --learning_rate "$LEARNING_RATE" --warmup_ratio 0.05 --logging_step 50 --valid_prompt_sample_num 1 --eval_ranking 1000000 \
      --select_by ndcg@10 --save_total_limit 1 ${FINETUNE_FLAGS:-}
  fi
  python test.py --ckpt_path "$run/model" --results_file "$run/result.json" "${form[@]}" --seed "$seed" --num_beams 20 \
    --test_batch_size auto
  results+=("$run/result.json")
done
python report.py --results_file "${results[@]}" --data_path "$work" --dataset "$DATASET" --index_file ".$METHOD.json" \
  --table_file "$work/$NAME.table.md"
if [ -e "$SOURCE/SOURCE.md" ]; then echo "references of $SOURCE/SOURCE.md:"; grep '^|' "$SOURCE/SOURCE.md"; fi
