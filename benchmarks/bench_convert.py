"""Merging a delta against copying the same bytes with their hashes: time and memory, in turn in one call.

    python benchmarks/bench_convert.py                              # base, delta and target of about 0.5 GB each
    python benchmarks/bench_convert.py --hidden 4096 --layers 32 --shard 5GB --rounds 1      # the real size, 13 GB each

Copying: base, delta and target are read and hashed (SHA-256), the target is written again and brought to the disk.
Merging does that too, adds, and checks. Each runs in a process of its own; what its imports take is not counted, neither
seconds nor memory. The best of the rounds: what others do on the machine only adds.
"""

from __future__ import annotations

import argparse
import hashlib
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
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "tests"))

from convert.folder import find_model, parse_size, skeleton
from convert.merge_delta import merge_delta
from convert.weights import write_weights
from utils import run_main


def make_inputs(folder: Path, hidden: int, layers: int, shard: int) -> None:
    """Write `folder`/base and `folder`/delta in float16, random, with 1,024 item tokens more in the delta."""
    from convert_parts import save_word_tokenizer
    from transformers import LlamaConfig

    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 43 // 16, "num_hidden_layers": layers}
    tokens = [f"<{level}_{code}>" for level in "abcd" for code in range(256)]
    for side, rows in (("base", 32_000), ("delta", 32_000 + len(tokens))):
        config = LlamaConfig(vocab_size=rows, num_attention_heads=hidden // 64, dtype=torch.float16, **sizes)
        config.save_pretrained(folder / side)
        save_word_tokenizer(folder / side, 32_000, tokens if side == "delta" else [])
        specs = {name: (shape, torch.float16) for name, shape in skeleton(config)[0].items()}
        write_weights(folder / side, specs, lambda name, specs=specs: torch.randn(specs[name][0]).half() / 50, shard)


def merge(folder: Path, shard: int) -> None:
    """`folder`/base + `folder`/delta."""
    base, delta = find_model(folder / "base"), find_model(folder / "delta")
    merge_delta(base, delta, folder / "out", torch.float16, shard, any_base=True)


def copy_hashed(folder: Path, shard: int) -> None:
    """Read and hash base, delta and target; write the target again."""
    (folder / "out").mkdir()
    for path in sorted(folder.glob("[bdt]*/model*.safetensors")):
        with open(path, "rb") as file:
            hashlib.file_digest(file, "sha256")
        if path.parent.name == "target":
            shutil.copyfile(path, folder / "out" / path.name)
            with open(folder / "out" / path.name, "rb") as file:
                os.fsync(file.fileno())


def measure(work, folder: Path, shard: int) -> tuple[float, int]:  # noqa: ANN001
    """The seconds that `work` takes, and the bytes of memory that it needs beyond what is there before."""
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    before, start = peak_memory(), time.perf_counter()
    work(folder, shard)
    return time.perf_counter() - start, peak_memory() - before


def peak_memory() -> int:
    """Bytes that this process had in memory at most."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def main(argv: list[str] | None = None) -> None:
    """Make the inputs, merge and copy in turn, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size (default: 1024)")
    parser.add_argument("--layers", type=int, default=16, help="number of layers (default: 16)")
    parser.add_argument("--shard", type=parse_size, default="200MB", help="largest file (default: 200MB)")
    parser.add_argument("--rounds", type=int, default=3, help="times each is run (default: 3)")
    args = parser.parse_args(argv)
    found: dict[str, list[tuple[float, int]]] = {"merge": [], "copy": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, args.hidden, args.layers, args.shard)
        merge(folder, args.shard)
        (folder / "out").rename(folder / "target")
        files = [path.stat().st_size for path in folder.glob("target/model*.safetensors")]
        for way, work in [("merge", merge), ("copy", copy_hashed)] * args.rounds:
            os.sync()
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found[way].append(pool.submit(measure, work, folder, args.shard).result())
            shutil.rmtree(folder / "out")
    for way, runs in found.items():
        print(f"{way}: " + ", ".join(f"{took:.2f} s and {memory / 1e6:.0f} MB" for took, memory in runs))
    seconds = {way: min(took for took, _ in runs) for way, runs in found.items()}
    peak = max(memory for _, memory in found["merge"])
    print(
        f"{sum(files) / 1e9:.2f} GB in {len(files)} files: merging takes {seconds['merge'] / seconds['copy']:.2f} × the"
    )
    print(f"time of copying with hashes, and {peak / max(files):.2f} × the memory of the largest file")


if __name__ == "__main__":
    run_main(main)
