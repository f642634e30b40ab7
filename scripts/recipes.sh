# Sourced by run.sh: the settings of each dataset.

# recipe DATASET BASE_MODEL GPUS: sets NPROC, TEST_NPROC and INDEX_, BASE_, FINETUNE_ and TEST_RECIPE.
# Fine-tuning: the paper's for Games, Arts, Instruments and whenever a base model is named; else that of a tiny model. Indices:
# the paper's for its three datasets, of the same size but by the fast preset for others.
recipe() {
  local fusion=100000 processes=$(($3 > 0 ? $3 : 2))
  case "$1" in Arts) fusion=30000 ;; Instruments) fusion=20000 ;; esac
  INDEX_RECIPE="--preset fast"
  BASE_RECIPE=""
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
  # 16 samples a step, on one process or two
  if [ "$processes" -gt 2 ] && [ "$NPROC" = "$processes" ]; then NPROC=2; fi
  # A model that starts from nothing learns from every token, not from the responses alone. Every sample then has about as many
  # labels, and --loss_average hardly matters (each task's share of the gradient is the same to 0.001): the default stays.
  # Without a separator (--his_sep=) a history takes 3 tokens an item instead of 5.
  INDEX_RECIPE="--preset fast --num_emb_list 64 64 64 --sk_epsilons 0 0 0.003 --layers 512 256 128"
  BASE_RECIPE="--hidden_size 128 --layers 4 --heads 4 --vocab_size 2000"
  FINETUNE_RECIPE="--per_device_batch_size 8 --gradient_accumulation_steps $((NPROC == 1 ? 2 : 1)) --learning_rate 4e-3 --epochs 1
    --weight_decay 0.01 --warmup_ratio 0.05 --logging_step 100 --no-gradient_checkpointing --packing
    --tasks seqrec,item2index,index2item,fusionseqrec,itemsearch,preferenceobtain
    --train_prompt_sample_num 1,1,1,1,1,1 --train_data_sample_num 32000,0,0,1000,0,0 --his_sep= --eval_ranking 300"
  TEST_RECIPE="--num_beams 20 --test_batch_size auto --test_prompt_ids 0 --his_sep="
  TEST_NPROC=1
}
