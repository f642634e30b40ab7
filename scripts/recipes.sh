# Sourced by run.sh and benchmarks/*.sh: the settings of each dataset, and steps that they share.

# embed DATA_PATH DATASET [FLAGS…]: MiniLM's embeddings of the items' texts
embed() {
  local minilm
  minilm="$(python data_process/fetch.py minilm)"
  python data_process/embed.py --data_path "$1" --dataset "$2" --plm_name minilm --model_path "$minilm" "${@:3}"
}

# behaviour DATA_PATH DATASET [FLAGS…]: item vectors of text and behaviour, from the above
behaviour() {
  local stem="$1/$2/$2"
  python data_process/behaviour.py --data_path "$1" --dataset "$2" --text "$stem.emb-minilm-td.npy" \
    --output_file "$stem.emb-behaviour.npy" "${@:3}"
}

# two_levels EMBEDDINGS ITEM_FILE N CKPT_DIR OUTPUT: RQ-VAE indices of two levels, about N items to each code
two_levels() {
  local codes
  codes="$(codes_of "$2" "$3")"
  python index/main.py --data_path "$1" --ckpt_dir "$4" --preset fast --num_emb_list "$codes" "$codes" \
    --sk_epsilons 0 0.003 --layers 512 256 128
  python index/generate_indices.py --ckpt_path "$4" --output_file "$5"
}

# made_of WORK SOURCE DATASET [SETTINGS]: stops if SOURCE lacks the dataset, or WORK was made of other data, settings or scripts
made_of() {
  local kind of
  for kind in inter item; do
    [ -e "$2/$3.$kind.json" ] || { echo "error: $2/$3.$kind.json is missing; SOURCE and DATASET name your data (docs/formats.md; Office: docs/results.md)" >&2; exit 2; }
  done
  of="$(cat "$2/$3".{inter,item}.json | cksum) ${4:-}"
  if [ -e "$2/$3.user.json" ]; then of="$of, user texts $(cksum < "$2/$3.user.json")"; fi
  mkdir -p "$1"
  if [ ! -e "$1/made-of.txt" ] && [ -e "$1/model" ]; then
    echo "error: $1 was made without a record of its data and settings; remove it or name another" >&2
    exit 2
  elif [ ! -e "$1/made-of.txt" ]; then
    echo "$of" > "$1/made-of.txt"
  elif [ "$(cat "$1/made-of.txt")" != "$of" ]; then
    echo "error: $1 was made of other data, settings or scripts ($1/made-of.txt, now: $of); remove it or name another" >&2
    exit 2
  fi
}

# codes_of ITEM_FILE N: the codes of an index level for a dataset: a power of two with about N items to each code.
codes_of() {
  python -c 'import json, math, sys; print(2 ** max(4, round(math.log2(len(json.load(open(sys.argv[1], encoding="utf-8"))) / float(sys.argv[2])))))' "$1" "$2"
}

# swap_share INTER_FILE ITEM_FILE: for --swap_items: 0.2 where items are rare, fewer than 16 training interactions each, else 0.
# Measured on two datasets alone: it helps on Office (4 an item) and harms on MovieLens (58); docs/results.md.
swap_share() {
  python -c '
import json, sys
inters, items = (json.load(open(path, encoding="utf-8")) for path in sys.argv[1:])
print(0.2 if sum(len(history) - 2 for history in inters.values()) < 16 * len(items) else 0)' "$1" "$2"
}

# unlikelihood INTER_FILE: for --unlikelihood: 3 where training parts hardly ever have an item twice (under 1 % of interactions), else 0.
unlikelihood() {
  python -c '
import json, sys
parts = [history[:-2] for history in json.load(open(sys.argv[1], encoding="utf-8")).values()]
print(3 if sum(len(part) - len(set(part)) for part in parts) < 0.01 * max(1, sum(map(len, parts))) else 0)' "$1"
}

# recipe DATASET BASE_MODEL GPUS: sets NPROC, TEST_NPROC, INDEX_, BASE_, FINETUNE_ and TEST_RECIPE, and BEHAVIOUR (1: indices
# of text and behaviour). Needs stem. CODES in INDEX_RECIPE stands for what codes_of gives, NO_REPEATS for what unlikelihood gives.
# Fine-tuning: the paper's for Games, Arts, Instruments and whenever a base model is named; else that of a tiny model. Indices:
# the paper's for its three datasets, of the same size but by the fast preset for others.
recipe() {
  local fusion=100000 processes=$(($3 > 0 ? $3 : 2))
  case "$1" in Arts) fusion=30000 ;; Instruments) fusion=20000 ;; esac
  INDEX_RECIPE="--preset fast"
  BASE_RECIPE=""
  local behaviour="${BEHAVIOUR:-1}" start=minilm-td
  BEHAVIOUR=0
  FINETUNE_RECIPE="--per_device_batch_size 8 --gradient_accumulation_steps 2 --learning_rate 5e-5 --epochs 4
    --weight_decay 0.01 --save_and_eval_strategy epoch --only_train_response
    --tasks seqrec,item2index,index2item,fusionseqrec,itemsearch,preferenceobtain
    --train_prompt_sample_num 1,1,1,1,1,1 --train_data_sample_num 0,0,0,$fusion,0,0"
  TEST_RECIPE="--num_beams 20 --test_batch_size auto --test_prompt_ids all"
  NPROC="${NPROC:-$processes}"
  TEST_NPROC="$NPROC"
  case "$1" in Games | Arts | Instruments)
    FINETUNE_RECIPE="$FINETUNE_RECIPE --tokenisation paper"
    INDEX_RECIPE="--preset paper"
    return ;;
  esac
  if [ -n "$2" ]; then return; fi
  # 64 samples a step, on one process or two
  if [ "$processes" -gt 2 ] && [ "$NPROC" = "$processes" ]; then NPROC=2; fi
  # A model that starts from nothing learns from every token, not from the responses alone, and wording teaches it nothing
  # (config/short_prompts.json). Its indices know behaviour too (unless BEHAVIOUR=0), its item tokens start from the same embeddings.
  BEHAVIOUR="$behaviour"
  if [ "$BEHAVIOUR" = 1 ]; then start=behaviour; fi
  INDEX_RECIPE="--preset fast --num_emb_list CODES CODES --sk_epsilons 0 0.003 --layers 512 256 128"
  BASE_RECIPE="--hidden_size 128 --layers 2 --heads 4 --vocab_size 2000"
  FINETUNE_RECIPE="--per_device_batch_size $((NPROC == 1 ? 64 : 32)) --gradient_accumulation_steps 1 --learning_rate 3e-3 --epochs 8
    --weight_decay 0.01 --warmup_ratio 0.05 --dropout 0.2 --last_code_weight 3 --unlikelihood NO_REPEATS --logging_step 100
    --no-gradient_checkpointing --packing
    --prompt_file config/short_prompts.json --his_sep= --max_his_len 50 --no_eos --init_item_tokens $stem.emb-$start.npy
    --tasks seqrec,item2index,index2item,fusionseqrec,itemsearch,preferenceobtain --history_windows --valid_prompt_sample_num 1
    --train_prompt_sample_num 1,1,1,1,1,1 --train_data_sample_num 0,0,0,300,0,0 --eval_ranking 300 --save_total_limit 1"
  TEST_RECIPE="--num_beams 20 --test_batch_size auto --test_prompt_ids 0"
  TEST_NPROC=1
}
