#!/usr/bin/env bash
# Kill -9 at random moments, then the same command again: how many runs end with the same bytes as one without a fault?
# The moments lie between the job's first file and its end: while Python starts there is nothing to break.
#
#   bash benchmarks/bench_faults.sh                     every job, 30 kills each: about two hours on two cores
#   N=3 SEED=7 bash benchmarks/bench_faults.sh merge report
#
# Jobs: train, zero3 (two processes), score, index, merge, report. Everything is made and run in a temporary folder (TMPDIR).
set -euo pipefail
cd "$(dirname "$0")/.."
N="${N:-30}"
RANDOM="${SEED:-42}"
JOBS=("$@"); [ $# -gt 0 ] || JOBS=(train zero3 score index merge report)
W="$(mktemp -d)"
trap 'rm -rf "$W"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu

# ---- a small world ----

python - "$W" <<'PY'
import json, sys
import numpy as np
rng, folder = np.random.default_rng(0), sys.argv[1]
import pathlib
(pathlib.Path(folder) / "Toy").mkdir()
titles = [f"{a} {b} {i}" for i, (a, b) in enumerate(zip(rng.choice(["red", "old", "new"], 60), rng.choice(["pen", "lamp"], 60)))]
inters = {str(u): rng.integers(60, size=8).tolist() for u in range(40)}
files = {
    "inter": inters,
    "item": {str(i): {"title": t, "description": f"A {t}."} for i, t in enumerate(titles)},
    "index": {str(i): [f"<a_{i % 5}>", f"<b_{i // 5}>", f"<c_{i % 3}>"] for i in range(60)},
}
for kind, content in files.items():
    (pathlib.Path(folder) / f"Toy/Toy.{kind}.json").write_text(json.dumps(content))
np.save(f"{folder}/emb.npy", rng.normal(size=(300, 32)).astype(np.float32))
PY
DATA=(--data_path "$W" --dataset Toy)
python data_process/base_model.py tiny "${DATA[@]}" --vocab_size 400 --hidden_size 64 --layers 2 --target "$W/base" >"$W/log" 2>&1
TRAIN=(finetune.py --base_model "$W/base" "${DATA[@]}" --tasks seqrec,item2index,index2item --train_prompt_sample_num 1,1,1
  --train_data_sample_num 0,0,0 --per_device_batch_size 8 --gradient_accumulation_steps 1 --learning_rate 1e-3 --epochs 3
  --valid_prompt_sample_num 1 --report_to none --resume_from_checkpoint auto)

# ---- the jobs: what runs in folder $1, and the digest of what it leaves there ----

digest() { (cd "$1" && sha256sum "${@:2}" 2>&1); }
port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
torchrun2() { python -m torch.distributed.run --nproc_per_node=2 --master_port="$(port)" "$@"; }

run_train() { python "${TRAIN[@]}" --deepspeed none --output_dir "$1/out"; }
same_train() { digest "$1/out" model.safetensors tokenizer.json prompt_style.json item_index.json; }

run_zero3() { torchrun2 "${TRAIN[@]}" --deepspeed config/ds_z3_bf16.json --bf16 --output_dir "$1/out"; }
same_zero3() { same_train "$1"; }

run_score() {
  torchrun2 test_ddp.py --ckpt_path "$W/trained/out" "${DATA[@]}" --results_file "$1/r.json" --test_prompt_ids all --num_beams 10 \
    --test_batch_size 2 --metrics hit@10,ndcg@10
}
same_score() { digest "$1" r.predictions.jsonl; python -c "import json; print(json.load(open('$1/r.json'))['mean_results'])"; }

run_index() {
  local before
  before="$(find "$1" -name '*.pth' -printf '%h\n' | sort -u | tail -1)"
  if [ -n "$before" ]; then
    python index/main.py --resume "$before" --device cpu
  else
    python index/main.py --data_path "$W/emb.npy" --ckpt_dir "$1" --device cpu --epochs 300 --eval_step 10 --layers 32 16 \
      --num_emb_list 8 8 8 --e_dim 8 --batch_size 100 --num_workers 0
  fi
  python index/generate_indices.py --ckpt_path "$(find "$1" -name best_collision_model.pth | sort | tail -1)" \
    --output_file "$1/Toy.index.json" --device cpu
}
same_index() { digest "$1" Toy.index.json; }

run_merge() {
  [ -e "$1/merged/config.json" ] || python convert/merge_delta.py --base-model-path "$W/grown" --delta-path "$W/delta" \
    --target-model-path "$1/merged"
}
same_merge() { digest "$1/merged" model.safetensors tokenizer.json config.json; }

run_report() { python report.py "${DATA[@]}" --results_file "$W/scored/r.json" --table_file "$1/r.table.md" --metrics hit@10; }
same_report() { digest "$1" r.table.md r.html; }

# needed JOB: what a job reads that another one makes
needed() {
  case "$1" in
    score | report | merge) [ -e "$W/trained" ] || { mkdir "$W/trained"; run_train "$W/trained"; } ;;
  esac
  case "$1" in
    report) [ -e "$W/scored" ] || { mkdir "$W/scored"; run_score "$W/scored"; } ;;
    merge)
      [ -e "$W/delta" ] || {
        cp -r "$W/base" "$W/grown"
        python convert/make_delta.py --base-model-path "$W/grown" --target-model-path "$W/trained/out" --delta-path "$W/delta"
      } ;;
  esac
}

# ---- faults ----

# kill_all MARK: every process that was started with FAULT=MARK, at once (torchrun's workers have sessions of their own)
kill_all() {
  local found
  found="$(grep -lz "^FAULT=$1\$" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3 | grep -vx "$$" || true)"
  # shellcheck disable=SC2086
  [ -z "$found" ] || kill -9 $found 2>/dev/null || true
}

# first_file FOLDER PID: wait until the process has put something into the folder, or has ended
first_file() {
  local found=()
  shopt -s dotglob nullglob
  while [ ${#found[@]} = 0 ] && kill -0 "$2" 2>/dev/null; do
    sleep 0.03
    found=("$1"/*)
  done
}

now() { echo $(($(date +%s%N) / 1000000)); }

for job in "${JOBS[@]}"; do
  needed "$job" >>"$W/log" 2>&1 || { tail -5 "$W/log" >&2; exit 1; }
  mkdir "$W/$job-whole"
  "run_$job" "$W/$job-whole" >>"$W/log" 2>&1 &
  first_file "$W/$job-whole" $!
  begin="$(now)"
  wait $! || { tail -5 "$W/log" >&2; exit 1; }
  took=$(($(now) - begin))
  wanted="$("same_$job" "$W/$job-whole")"
  equal=0 cut=0
  for number in $(seq "$N"); do
    folder="$W/$job-$number" mark="$BASHPID-$job-$number"
    mkdir "$folder"
    at=$((took * (RANDOM * 32768 + RANDOM) / 1073741824)) # after its first file
    (export FAULT="$mark"; exec bash -c 'source /dev/stdin; "$@"' _ "run_$job" "$folder" < <(declare -p W DATA TRAIN; declare -f)) \
      >"$folder.log" 2>&1 &
    first_file "$folder" $!
    sleep "$(printf '%d.%03d' $((at / 1000)) $((at % 1000)))"
    if kill -0 $! 2>/dev/null; then cut=$((cut + 1)); else took=$((took * 3 / 4)); fi # the machine has got faster
    kill_all "$mark"
    wait $! 2>/dev/null || true
    if "run_$job" "$folder" >>"$folder.log" 2>&1 && [ "$("same_$job" "$folder")" = "$wanted" ]; then
      equal=$((equal + 1))
      rm -rf "$folder"
    else
      echo "$job, kill $number, $at of $took ms after the first file: $(tail -1 "$folder.log" | cut -c1-300)"
    fi
  done
  echo "$job: $equal of $N runs bit-equal after kill -9 ($cut while it ran; about $took ms from the first file to the end)"
done
