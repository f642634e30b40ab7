"""Merging a delta: time and peak memory against copying files and against loading everything.

    python benchmarks/bench_convert.py                 # a LLaMA of about 1 GB in float16, three rounds
    python benchmarks/bench_convert.py --hidden 4096 --layers 32 --rounds 1      # the real size (13 GB + 13 GB + 13 GB)

Baselines, run in turn with ours in every round:

- `cp` of the target, a merged model: it stays in the page cache, the disk has not seen it when `cp` ends;
- `cp, fsync`: the same, and on the disk;
- `cp, fsync, sha256`: and the hashes of base, delta and copy (by OpenSSL, which uses the processor's instructions for
  them; `sha256sum` takes several times as long). What any tool must do that states them;
- `load everything, fsync, hashes`: both state dicts in memory, add, save, flush, hash the files: the work that ours does;
- `load everything`: the plain script, which checks nothing and flushes nothing.

`merge_delta.py` checks names, shapes, tokens and numbers, hashes and flushes. `start` is the same on a model of 1 MB:
imports and checks, which do not grow with the model. Medians; all write to the same disk, from a warm page cache as
long as memory suffices.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

from utils import run_main, versions  # noqa: E402

PLAIN = """
import hashlib, os, sys, torch
from pathlib import Path
from safetensors.torch import save_file
def load(folder):
    state = {}
    for path in sorted(Path(folder).glob("pytorch_model*.bin")):
        state |= torch.load(path, map_location="cpu", weights_only=True)
    return state
base, delta, out, hashes = sys.argv[1:]
summed = load(delta)
for name, tensor in load(base).items():
    if summed[name].shape == tensor.shape:
        summed[name] += tensor.half()
Path(out).mkdir()
save_file(summed, Path(out) / "model.safetensors")
if hashes == "hashes":
    with open(Path(out) / "model.safetensors", "rb") as file:
        os.fsync(file.fileno())
    for folder in (base, delta, out):
        for path in [*Path(folder).glob("*.bin"), *Path(folder).glob("*.safetensors")]:
            with open(path, "rb") as file:
                print(path, hashlib.file_digest(file, "sha256").hexdigest())
"""


HASH = """
import hashlib, sys
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        print(path, hashlib.file_digest(file, "sha256").hexdigest())
"""


def make_inputs(folder: Path, hidden: int, layers: int, shards: int) -> None:
    """Write `folder`/base and `folder`/delta: sharded .bin in float16, random weights, 1,024 item tokens more."""
    import torch
    from convert_parts import save_word_tokenizer
    from transformers import LlamaConfig

    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 43 // 16, "num_hidden_layers": layers}
    tokens = [f"<{level}_{code}>" for level in "abcd" for code in range(256)]
    for side, rows in (("base", 32_000), ("delta", 32_000 + len(tokens))):
        path = folder / side
        config = LlamaConfig(vocab_size=rows, num_attention_heads=hidden // 128, dtype=torch.float16, **sizes)
        path.mkdir()
        config.save_pretrained(path)
        save_word_tokenizer(path, 32_000, tokens if side == "delta" else [])
        _write_shards(path, config, shards)


def _write_shards(path: Path, config: object, shards: int) -> None:
    import torch
    from tqdm import tqdm

    from convert.folder import skeleton

    shapes = list(skeleton(config)[0].items())
    weight_map = {}
    for number in tqdm(range(shards), desc=path.name, disable=None):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        count = -(-len(shapes) // shards)
        part = {name: _random(name, shape) for name, shape in shapes[number * count : (number + 1) * count]}
        torch.save(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _random(name: str, shape: tuple[int, ...]):  # noqa: ANN202
    """The same numbers for the same name: the first rows of base and delta agree, as embeddings do."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    rows = min(shape[0], 32_000)
    first = torch.randn((rows, *shape[1:]), generator=generator)
    return torch.cat([first, torch.randn((shape[0] - rows, *shape[1:]), generator=generator)]).half() * 0.02


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds that `command` takes, begun with nothing left to write to the disk, and its peak resident memory in GB."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    took = time.perf_counter() - start
    if status:
        raise RuntimeError(f"{command[:3]} failed")
    return took, usage.ru_maxrss / 2**20


def merge_command(folder: Path, out: Path) -> list[str]:
    """The merge of `folder`/base and `folder`/delta."""
    words = ["convert/merge_delta.py", "--base-model-path", folder / "base", "--delta-path", folder / "delta"]
    return [sys.executable, *map(str, words), "--target-model-path", str(out)]


def ways(folder: Path) -> dict[str, list[str]]:
    """Name → command; each writes `folder`/out. `folder`/target is a merged model."""
    base, delta, target, out = (str(folder / name) for name in ("base", "delta", "target", "out"))
    copy, flush = f"cp -r {target} {out}", f"sync {out}/*"
    hashes = f"{sys.executable} -c '{HASH}' {base}/*.bin {delta}/*.bin {out}/*.safetensors"
    return {
        "cp": ["sh", "-c", copy],
        "cp, fsync": ["sh", "-c", f"{copy} && {flush}"],
        "cp, fsync, sha256": ["sh", "-c", f"{copy} && {flush} && {hashes}"],
        "load everything": [sys.executable, "-c", PLAIN, base, delta, out, "no"],
        "load everything, fsync, hashes": [sys.executable, "-c", PLAIN, base, delta, out, "hashes"],
        "merge_delta.py": merge_command(folder, folder / "out"),
        "merge_delta.py --low-cpu-mem": [*merge_command(folder, folder / "out"), "--low-cpu-mem"],
        "start of merge_delta.py": merge_command(folder / "small", folder / "out"),
    }


def make_all(folder: Path, hidden: int, layers: int, shards: int) -> None:
    """The inputs, large and small, in a process of its own: a child's peak memory counts from its parent's size."""
    for place, *sizes in ((folder, hidden, layers, shards), (folder / "small", 128, 1, 1)):
        place.mkdir(exist_ok=True)
        worker = multiprocessing.get_context("spawn").Process(target=make_inputs, args=(place, *sizes))
        worker.start()
        worker.join()
    timed(merge_command(folder, folder / "target"))


def main(argv: list[str] | None = None) -> None:
    """Make the inputs, run every way in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1536, help="hidden size (default: 1536)")
    parser.add_argument("--layers", type=int, default=16, help="number of layers (default: 16)")
    parser.add_argument("--shards", type=int, default=4, help="files per side (default: 4)")
    parser.add_argument("--rounds", type=int, default=3, help="times each way is run (default: 3)")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        make_all(folder, args.hidden, args.layers, args.shards)
        size = sum(path.stat().st_size for path in folder.glob("*/*.bin")) / 1e9
        print(
            f"base and delta: {size:.2f} GB in {2 * args.shards} files; {versions('torch', 'safetensors')}", flush=True
        )
        seconds: dict[str, list[float]] = {}
        memory: dict[str, float] = {}
        for _ in range(args.rounds):
            for way, command in ways(folder).items():
                took, peak = timed(command)
                print(f"  {way}: {took:.2f} s", flush=True)
                seconds.setdefault(way, []).append(took)
                memory[way] = max(memory.get(way, 0.0), peak)
                shutil.rmtree(folder / "out")
    show({way: statistics.median(times) for way, times in seconds.items()}, memory)


def show(seconds: dict[str, float], memory: dict[str, float]) -> None:
    """The table: every way's median, and how many times as long ours takes."""
    print(f"{'way':<32}{'median s':>10}{'merge_delta.py takes':>22}{'peak GB':>10}")
    for way, middle in seconds.items():
        ratio = f"{seconds['merge_delta.py'] / middle:.2f} ×"
        print(f"{way:<32}{middle:>10.2f}{ratio:>22}{memory[way]:>10.2f}")


if __name__ == "__main__":
    run_main(main)
