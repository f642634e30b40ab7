"""Merging a delta against copying the same bytes with their hashes: time and memory, in turn in one call.

    python benchmarks/bench_convert.py --hidden 1024 --layers 16 --shard 200MB     # about 0.5 GB each; 4096, 32: 13 GB

Copying: base, delta and target are read and hashed (SHA-256), the target is written again and brought to the disk.
Merging does that too, adds, and checks. Each runs in a process of its own; what its imports take is not counted, neither
seconds nor memory. The best of the rounds: what others do on the machine only adds.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, f"{sys.path[0]}/tests")

from arguments import make_parser
from convert.folder import find_model, parse_size, skeleton
from convert.merge_delta import merge_delta
from convert.weights import write_weights
from flag_values import whole
from utils import run_main, sha256


def make_inputs(folder: Path, hidden: int, layers: int, shard: int) -> None:
    """Write `folder`/base and `folder`/delta in float16, random, with 1,024 item tokens more in the delta."""
    from convert_parts import save_word_tokenizer
    from transformers import LlamaConfig

    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    tokens = [f"<{level}_{code}>" for level in "abcd" for code in range(256)]
    for side, rows in (("base", 32_000), ("delta", 32_000 + len(tokens))):
        config = LlamaConfig(vocab_size=rows, num_attention_heads=hidden // 64, dtype=torch.float16, **sizes)
        config.save_pretrained(folder / side)
        save_word_tokenizer(folder / side, 32_000, tokens if side == "delta" else [])
        specs = {name: (shape, torch.float16) for name, shape in skeleton(config)[0].items()}
        write_weights(folder / side, specs, lambda name, specs=specs: torch.randn(specs[name][0]).half() / 50, shard)


def merge(folder: Path, shard: int) -> None:
    """`folder`/base + `folder`/delta."""
    sides = (find_model(folder / side) for side in ("base", "delta"))
    merge_delta(*sides, folder / "out", torch.float16, shard, any_base=True)


def copy_hashed(folder: Path, shard: int) -> None:
    """Read and hash base, delta and target; write the target again."""
    (folder / "out").mkdir()
    for path in sorted(folder.glob("[bdt]*/model*.safetensors")):
        sha256(path)
        if path.parent.name == "target":
            shutil.copyfile(path, folder / "out" / path.name)
            os.fsync(os.open(folder / "out" / path.name, os.O_RDONLY))


def measure(work, folder: Path, shard: int) -> tuple[float, int]:  # noqa: ANN001
    """The seconds that `work` takes, and the bytes of memory that it needs beyond what is there before."""
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    status, start = Path("/proc/self/status"), time.perf_counter()
    before = status.read_text()
    work(folder, shard)
    peaks = [int(text.split("VmHWM:")[1].split()[0]) * 1024 for text in (before, status.read_text())]
    return time.perf_counter() - start, peaks[1] - peaks[0]


def main(argv: list[str] | None = None) -> None:
    """Make the inputs, merge and copy in turn, print the ratios."""
    parser = make_parser(__doc__)
    for flag, default, what in (("hidden", 1024, "width"), ("layers", 16, "depth"), ("rounds", 3, "times each is run")):
        parser.add_argument(f"--{flag}", type=whole(1), default=default, help=f"{what}")
    parser.add_argument("--shard", type=parse_size, default="200MB", help="largest file")
    args = parser.parse_args(argv)
    found: dict[str, list[tuple[float, int]]] = {"merge": [], "copy": []}
    with tempfile.TemporaryDirectory() as name:
        make_inputs(folder := Path(name), args.hidden, args.layers, args.shard)
        merge(folder, args.shard)
        (folder / "out").rename(folder / "target")
        files = [path.stat().st_size for path in folder.glob("target/model*.safetensors")]
        for way, work in [("merge", merge), ("copy", copy_hashed)] * args.rounds:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found[way].append(pool.submit(measure, work, folder, args.shard).result())
            shutil.rmtree(folder / "out")
    print(*(f"{way}: {took:.2f} s, {memory / 1e6:.0f} MB" for way in found for took, memory in found[way]), sep="\n")
    merging, copying = (min(took for took, _ in found[way]) for way in ("merge", "copy"))
    peak = max(memory for _, memory in found["merge"])
    print(f"time of merging {sum(files) / 1e9:.2f} GB ÷ of copying with hashes: {merging / copying:.2f}")
    print(f"peak memory ÷ largest file: {peak / max(files):.2f}")


if __name__ == "__main__":
    run_main(main)
