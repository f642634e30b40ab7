#!/usr/bin/env bash
# Time and memory of index/ for a large catalogue: random rows around 4,096 centres, trained and indexed on one thread.
#
#   bash benchmarks/bench_index_scale.sh                     1,000,000 items × 768 float16 (1.5 GB of disk, 20 minutes)
#   ITEMS=10000 DIM=64 bash benchmarks/bench_index_scale.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python - "$work/x.npy" "${ITEMS:-1000000}" "${DIM:-768}" <<'EOF'
import sys

import numpy as np

path, items, dim = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(0)
centres = rng.standard_normal((4096, dim), dtype=np.float32)
rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(items, dim))
for first in range(0, items, 50_000):
    count = min(50_000, items - first)
    noise = rng.standard_normal((count, dim), dtype=np.float32)
    rows[first : first + count] = centres[rng.integers(4096, size=count)] + 0.5 * noise
EOF
# measured COMMAND …: run it, then its seconds and the most memory it held (mapped pages included).
measured() {
  python - "$@" <<'EOF'
import resource
import subprocess
import sys
import time

start = time.perf_counter()
subprocess.run([sys.executable, *sys.argv[1:]], check=True)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
print(f"{sys.argv[1]}: {time.perf_counter() - start:.0f} s, {peak:.2f} GiB at most", flush=True)
EOF
}
measured index/main.py --data_path "$work/x.npy" --ckpt_dir "$work/ckpt" --device cpu --preset fast --epochs 3 --batch_size 4096 \
  --num_workers 0 --layers 256 128 64
measured index/generate_indices.py --ckpt_path "$work/ckpt" --output_file "$work/x.index.json" --device cpu
