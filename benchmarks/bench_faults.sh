#!/usr/bin/env bash
# Kill -9 at random moments of each job, then the same command again (bench_faults.py says how):
#
#   bash benchmarks/bench_faults.sh                     every job, 30 kills each
#   N=3 SEED=7 bash benchmarks/bench_faults.sh merge report
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu
exec python benchmarks/bench_faults.py --kills "${N:-30}" --seed "${SEED:-42}" "$@"
