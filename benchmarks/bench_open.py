"""How long a large log takes to open for training, and how much memory a training process needs for it.

    python benchmarks/bench_open.py                                 # a million interactions
    python benchmarks/bench_open.py --interactions 10000000

A made-up log with ten interactions a user and a tenth as many items as users is written, read as finetune.py reads it
(`data.read_inters`, checked), and its training samples are listed (`tasks.prefix_rows`). Samples become texts one by one,
when they are asked for. Printed are processor seconds and memory beyond what the imports take.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import tasks
from arguments import make_parser
from flag_values import whole
from utils import run_main


def write_log(path: Path, users: int, items: int) -> None:
    """An interaction file of `users` users with ten interactions each."""
    rng = np.random.default_rng(0)
    with open(path, "w", encoding="utf-8") as file:
        for user in range(users):
            file.write(f'{", " if user else "{"}"{user}": {json.dumps(rng.integers(items, size=10).tolist())}')
        file.write("}")


def resident() -> float:
    """The memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--interactions", type=whole(100), default=1_000_000, help="of the made-up log")
    args = parser.parse_args(argv)
    users = args.interactions // 10
    items = max(10, users // 10)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "Big.inter.json"
        write_log(path, users, items)
        before, began = resident(), time.process_time()
        inters = data.read_inters(path, items)
        rows = tasks.prefix_rows(SimpleNamespace(inters=inters))
        seconds, after = time.process_time() - began, resident()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"{10 * users:,} interactions, {len(rows):,} training samples: {seconds:.1f} processor seconds")
    print(f"memory: {after - before:,.0f} MiB kept, {peak - before:,.0f} MiB at the most while reading")


if __name__ == "__main__":
    run_main(main)
