"""Build time, memory and time per masking step of `ItemTrie` for catalogues of up to ten million items.

    python benchmarks/bench_trie.py                         # 10,000, 1,000,000 and 10,000,000 random items, 4 levels of 256

A masking step takes the beams' logits to the best continuations that exist (log-probabilities over the vocabulary,
children of the beams' nodes, gathering, choosing): what a constrained decoder does besides the model, at every level. Its
time is compared with the smallest catalogue's, and with a dictionary of prefixes and a Python loop over the beams
(`prefix_allowed_tokens_fn`) on that catalogue. Every catalogue is built in a process of its own, so that peak memory is its
own: what the process had at its highest beyond what it had with the items' tokens loaded. Times are processor time.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser
from decoding import _advance, _Beams, _Finished
from flag_values import SEEDS, whole
from trie import ItemTrie
from utils import run_main, versions

TEXT_TOKENS = 32_000  # LLaMA's vocabulary; the item tokens come after it
EOS = 2


def random_items(count: int, options: Any) -> np.ndarray:
    """int32 (count, levels): tokens of random indices."""
    rng = np.random.default_rng(options.seed)
    codes = rng.integers(options.codes, size=(count, options.levels), dtype=np.int32)
    return codes + TEXT_TOKENS + options.codes * np.arange(options.levels, dtype=np.int32)


def random_beams(trie: ItemTrie, depth: int, options: Any, generator: torch.Generator) -> _Beams:
    """Live beams on random nodes at `depth`."""
    first = sum(trie.counts[:depth])
    shape = (options.batch_size, options.num_beams if depth else 1)
    node = torch.randint(first, first + trie.counts[depth], shape, generator=generator)
    return _Beams(node, torch.zeros(shape), torch.zeros(shape, dtype=torch.long))


@torch.inference_mode()
def step_times(trie: ItemTrie, options: Any) -> list[float]:
    """By depth the median milliseconds of a masking step."""
    generator = torch.Generator().manual_seed(options.seed)
    vocabulary = TEXT_TOKENS + options.codes * options.levels
    finished = _Finished(options.batch_size, options.num_beams, torch.device("cpu"))
    times = []
    for depth in range(trie.levels):
        spent = []
        for _ in range(options.repeat):
            beams = random_beams(trie, depth, options, generator)
            logits = torch.randn(*beams.node.shape, vocabulary, generator=generator)
            start = time.process_time()
            _advance(trie, beams, logits, depth, options.num_beams, finished)
            spent.append(time.process_time() - start)
        times.append(1000 * statistics.median(spent))
    return times


def python_step_times(items: np.ndarray, options: Any) -> list[float]:
    """The same with a dictionary of prefixes and a mask that is filled beam by beam, as `generate` does it."""
    follow: dict[tuple[int, ...], set[int]] = {}
    for row in items.tolist():
        for depth in range(options.levels):
            follow.setdefault(tuple(row[:depth]), set()).add(row[depth])
    rng = np.random.default_rng(options.seed)
    vocabulary = TEXT_TOKENS + options.codes * options.levels
    times = []
    for depth in range(options.levels):
        spent = []
        for _ in range(max(1, options.repeat // 4)):
            beams = options.num_beams if depth else 1
            prefixes = items[rng.integers(len(items), size=options.batch_size * beams), :depth].tolist()
            logits = torch.randn(len(prefixes), vocabulary)
            start = time.process_time()
            scores = logits.log_softmax(-1)
            mask = torch.full_like(scores, -torch.inf)
            for number, prefix in enumerate(prefixes):
                mask[number, list(follow[tuple(prefix)])] = 0
            (scores + mask).view(options.batch_size, -1).topk(2 * options.num_beams)
            spent.append(time.process_time() - start)
        times.append(1000 * statistics.median(spent))
    return times


def measure(count: int, options: Any) -> dict[str, Any]:
    """Figures of one catalogue, in this process."""
    items = random_items(count, options)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    trie = ItemTrie(items, EOS)
    build = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    figures = {"items": count, "build": build, "bytes": trie.nbytes, "peak": peak * 1024, "nodes": sum(trie.counts)}
    figures["steps"] = step_times(trie, options)
    if options.python:
        figures["python"] = python_step_times(items, options)
    return figures


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--items", default="10000,1000000,10000000", help="catalogue sizes, the first is the baseline")
    parser.add_argument("--levels", type=whole(1), default=4, help="tokens of an index")
    parser.add_argument("--codes", type=whole(1), default=256, help="codes of a level")
    parser.add_argument("--batch_size", type=whole(1), default=16, help="prompts a step")
    parser.add_argument("--num_beams", type=whole(1), default=20, help="beams a prompt")
    parser.add_argument("--repeat", type=whole(1), default=15, help="steps per depth; the median counts")
    parser.add_argument("--threads", type=whole(1), default=1, help="CPU threads")
    parser.add_argument("--seed", type=SEEDS, default=42, help="of the random indices")
    parser.add_argument("--python", action="store_true", help="measure the Python loop too")
    parser.add_argument("--one", type=whole(1), help="measure one catalogue in this process and print JSON")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    print(f"{versions('torch', 'numpy')}, {options.threads} threads, {options.batch_size} x {options.num_beams} beams")
    print(f"{'items':>12} {'build s':>8} {'tensors MB':>11} {'peak MB':>8} {'ms a step by depth':>32} {'ratio':>6}")
    baseline = None
    for number, count in enumerate(options.items.split(",")):
        flags = sys.argv[1:] if argv is None else argv
        flags = [*flags, "--one", count, *([] if number else ["--python"])]
        done = subprocess.run([sys.executable, __file__, *flags], stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        baseline = baseline or found
        steps = " ".join(f"{value:7.2f}" for value in found["steps"])
        ratio = sum(found["steps"]) / sum(baseline["steps"])
        print(
            f"{found['items']:>12,} {found['build']:8.2f} {found['bytes'] / 1e6:11.1f} {found['peak'] / 1e6:8.1f} "
            f"{steps:>32} {ratio:6.2f}"
        )
    steps = " ".join(f"{value:7.2f}" for value in baseline["python"])
    print(
        f"{'Python loop':>12} {'':>8} {'':>11} {'':>8} {steps:>32} {sum(baseline['python']) / sum(baseline['steps']):6.2f}"
    )


if __name__ == "__main__":
    run_main(main)
