"""How soon an RQ-VAE is good: a plain training loop against index/ with `--preset fast`, in turn in one call; and scale.

    python benchmarks/bench_index.py --data_path ./data/Games/Games.emb-llama-td.npy            # plain, then ours
    python benchmarks/bench_index.py --data_path F --threads 1     # then processor time is the clock to trust
    python benchmarks/bench_index.py --data_path F --epochs 20 --no-equal_time                  # a shorter look
    python benchmarks/bench_index.py --items 1000000                  # memory and time of main.py, generate_indices.py

The plain loop is the paper's recipe (4 levels of 256 codes, epsilon 0.003 on the last, batches of 1,024, AdamW with
1e-3 and weight decay 1e-4, linear schedule) over a DataLoader that stacks rows, with Sinkhorn on the whole plan and one
optimiser step a batch. Both are measured with nearest codes on all items; the clock stands still meanwhile. Quality is
reached where reconstruction and collision rate are both at or below the plain loop's at its end. Then both models, and
the methods that train none, make their indices: conflicts, error and purity side by side.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

INDEX = Path(__file__).resolve().parent.parent / "index"
sys.path.insert(0, str(INDEX))

import main as index_main  # noqa: E402
from embeddings import Embeddings  # noqa: E402
from figures import collision_groups, index_figures  # noqa: E402
from index_report import LABEL_FIELDS, labels_of, read_items  # noqa: E402
from methods import METHODS, Index, Options, index_of  # noqa: E402
from models.quantiser import VectorQuantizer, squared_distances  # noqa: E402
from models.rqvae import RQVAE, RQVAEConfig  # noqa: E402
from parallel import Processes  # noqa: E402
from purity import label_purity, neighbour_purity  # noqa: E402
from start import balance, start  # noqa: E402
from trainer import Trainer  # noqa: E402

PAPER = {"num_emb_list": [256] * 4, "sk_epsilons": [0.0, 0.0, 0.0, 0.003]}


@dataclass
class Point:
    """A moment of a run: seconds and processor seconds of training so far, and quality with nearest codes."""

    seconds: float
    cpu_seconds: float
    epoch: int
    reconstruction: float
    figures: dict[str, Any]

    def reaches(self, other: Point) -> bool:
        """Both reconstruction and collision rate at least as good."""
        better = self.figures["collision_rate"] <= other.figures["collision_rate"]
        return better and self.reconstruction <= other.reconstruction


class Clock:
    """Seconds of work; `measure` stops it while quality is measured."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.seconds, self.cpu_seconds, self.points = x, 0.0, 0.0, []
        self.since = time.perf_counter(), time.process_time()

    @torch.no_grad()
    def measure(self, model: RQVAE, epoch: int, finish: Callable[[RQVAE], None] | None = None) -> Point:
        """Quality now; with `finish`, of a copy that was finished as at the end of a run, its time included."""
        self.seconds += time.perf_counter() - self.since[0]
        self.cpu_seconds += time.process_time() - self.since[1]
        extra = 0.0, 0.0
        if finish:
            before = time.perf_counter(), time.process_time()
            model = copy.deepcopy(model)
            finish(model)
            extra = time.perf_counter() - before[0], time.process_time() - before[1]
        model.eval()
        output, _, codes = model(self.x, use_sk=False)
        figures = index_figures(codes.numpy(), model.config.num_emb_list)
        error = float(functional.mse_loss(output, self.x))
        self.points.append(Point(self.seconds + extra[0], self.cpu_seconds + extra[1], epoch, error, figures))
        model.train()
        self.since = time.perf_counter(), time.process_time()
        return self.points[-1]


class PlainQuantizer(VectorQuantizer):
    """Sinkhorn as the algorithm is worded: every round divides the whole plan, in float64."""

    @torch.no_grad()
    def assign(self, rows: torch.Tensor, use_sk: bool) -> torch.Tensor:
        distances = squared_distances(rows, self.embedding.weight)
        if not use_sk or self.sk_epsilon <= 0:
            return distances.argmin(-1)
        high, low = distances.max(), distances.min()
        plan = torch.exp(-((distances - (high + low) / 2) / ((high - low) / 2 + 1e-5)).double() / self.sk_epsilon)
        plan /= plan.sum()
        for _ in range(self.sk_iters):
            plan /= plan.sum(1, keepdim=True)
            plan /= len(rows)
            plan /= plan.sum(0, keepdim=True)
            plan /= plan.shape[1]
        return plan.argmax(-1)


def plain_loop(x: torch.Tensor, epochs: int, warmup_epochs: int, seed: int) -> tuple[list[Point], RQVAE]:
    """The paper's recipe without tricks; measured at the end and at every tenth of the way."""
    torch.manual_seed(seed)
    model = RQVAE(x.shape[1], RQVAEConfig(**PAPER, seed=seed))
    for level in model.rq.vq_layers:
        level.__class__ = PlainQuantizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4, foreach=False)
    loader = DataLoader(TensorDataset(x), batch_size=1024, shuffle=True)
    warmup, total = warmup_epochs * len(loader), epochs * len(loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: step / warmup if step < warmup else (total - step) / (total - warmup)
    )
    clock = Clock(x)
    for epoch in range(1, epochs + 1):
        loss_sum = 0.0
        for (batch,) in loader:
            optimizer.zero_grad()
            output, rq_loss, _ = model(batch)
            loss = functional.mse_loss(output, batch) + rq_loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            loss_sum += loss.item()
        assert math.isfinite(loss_sum)
        if epoch % max(1, epochs // 10) == 0 or epoch == epochs:
            show("plain", clock.measure(model, epoch))
    return clock.points, model.eval()


def fast_preset(path: str, x: torch.Tensor, seed: int, epochs: int | None, folder: str) -> tuple[list[Point], RQVAE]:
    """index/ with `--preset fast` (or for `epochs`), its start included in the time.

    Measured after the start and at tenths of the way, each time as if the run ended there.
    """
    flags = ["--preset", "fast", "--data_path", path, "--ckpt_dir", folder, "--device", "cpu", "--seed", str(seed)]
    args, _ = index_main.parse(flags + (["--epochs", str(epochs)] if epochs else []))
    index_main.set_seed(seed)
    device = torch.device("cpu")
    processes, embeddings = Processes(device), Embeddings(path, device)

    def finish(model: RQVAE) -> None:
        balance(model, embeddings, processes, args.balance_rounds)

    clock = Clock(x)
    model = RQVAE(embeddings.dim, RQVAEConfig.from_args(args))
    start(model, embeddings, processes, components=True, all_rows=True, balance_rounds=args.balance_rounds)
    show("fast", clock.measure(model, 0))
    trainer = Trainer(model, embeddings, args, Path(folder), processes)
    for epoch in range(args.epochs):
        trainer.train_epoch(epoch)
        if (epoch + 1) % max(1, args.epochs // 10) == 0 or epoch + 1 == args.epochs:
            show("fast", clock.measure(model, epoch + 1, finish))
    finish(model)
    return clock.points, model.eval()


def show(name: str, point: Point) -> None:
    """A line for one moment."""
    levels = ", ".join(f"{level['used']}/{level['entropy_bits']:.2f}" for level in point.figures["levels"])
    print(
        f"  {name:5} {point.seconds:7.1f} s ({point.cpu_seconds:.1f} CPU), epoch {point.epoch:3}: "
        f"reconstruction {point.reconstruction:.6f}, collision rate {point.figures['collision_rate']:.4f}, "
        f"codes used / entropy (bits) of each level {levels}",
        flush=True,
    )


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Run both, print the ratios, and make the indices of both."""
    x = torch.from_numpy(np.load(args.data_path).astype(np.float32))
    print(
        f"{args.data_path}: {len(x)} items × {x.shape[1]}, CPU, {torch.get_num_threads()} threads; "
        "s: wall clock, CPU: processor seconds of the process",
        flush=True,
    )
    plain, plain_model = plain_loop(x, args.epochs, args.warmup_epochs, args.seed)
    goal = plain[-1]
    with tempfile.TemporaryDirectory() as folder:
        fast, fast_model = fast_preset(args.data_path, x, args.seed, None, folder)
        result = ratios(goal, fast)
        if args.equal_time:
            per_epoch = (fast[-1].cpu_seconds - fast[0].cpu_seconds) / fast[-1].epoch
            epochs = max(1, round((goal.cpu_seconds - fast[0].cpu_seconds) / per_epoch))
            last = fast_preset(args.data_path, x, args.seed, epochs, folder)[0][-1]
            result["equal_time"] = {"plain": goal.reconstruction, "fast": last.reconstruction, "epochs": epochs}
            print(
                f"after equal time ({last.cpu_seconds:.0f} CPU against {goal.cpu_seconds:.0f}, the preset with --epochs "
                f"{epochs}): reconstruction {last.reconstruction:.6f} against {goal.reconstruction:.6f}, "
                f"{last.reconstruction / goal.reconstruction:.2f} of it; collision rate "
                f"{last.figures['collision_rate']:.4f} against {goal.figures['collision_rate']:.4f}"
            )
    result["indices"] = indices(args, {f"plain, {args.epochs} epochs": plain_model, "--preset fast": fast_model})
    return result


def ratios(goal: Point, fast: list[Point]) -> dict[str, Any]:
    """How much sooner the preset is as good as the plain loop's end, and what the whole preset costs."""
    result: dict[str, Any] = {"plain_seconds": goal.seconds, "plain_cpu_seconds": goal.cpu_seconds}
    wanted: dict[str, Callable[[Point], bool]] = {
        "reconstruction": lambda point: point.reconstruction <= goal.reconstruction,
        "collision rate": lambda point: point.figures["collision_rate"] <= goal.figures["collision_rate"],
        "both": lambda point: point.reaches(goal),
    }
    for name, reached in wanted.items():
        first = next((point for point in fast if reached(point)), None)
        result[f"fast_cpu_seconds_to_{name.replace(' ', '_')}"] = first.cpu_seconds if first else None
        words = f"ended after {first.epoch} epochs: {_times(first, goal)}" if first else "not reached"
        print(f"the plain loop's {name}: {words}")
    last = fast[-1]
    result |= {"fast_cpu_seconds_whole_preset": last.cpu_seconds, "whole_preset_reaches": last.reaches(goal)}
    print(
        f"whole preset: {_times(last, goal)}; reconstruction {last.reconstruction / goal.reconstruction:.2f} of the plain "
        f"loop's, collision rate {last.figures['collision_rate']:.4f} against {goal.figures['collision_rate']:.4f}"
    )
    return result


def _times(point: Point, goal: Point) -> str:
    return (
        f"{point.seconds:.1f} s against {goal.seconds:.1f} s, {goal.seconds / point.seconds:.1f}×; "
        f"{point.cpu_seconds:.1f} CPU against {goal.cpu_seconds:.1f}, {goal.cpu_seconds / point.cpu_seconds:.1f}×"
    )


def indices(args: argparse.Namespace, models: dict[str, RQVAE]) -> dict[str, Any]:
    """Make the index of each model, and of the methods that train none; print conflicts, error and purity."""
    embeddings = Embeddings(args.data_path, torch.device("cpu"))
    beside = Path(args.data_path.split(".emb-")[0] + ".item.json")
    items = read_items(beside, len(embeddings)) if beside.exists() else []
    rows: dict[str, Any] = {}
    for allow in (True, False):
        options = Options(allow_conflicts=allow)
        made = {name: index_of(model, embeddings, options) for name, model in models.items()}
        if not allow:
            made |= {f"--method {name}": METHODS[name](embeddings, options) for name in ("rqkmeans", "random")}
        for name, index in made.items():
            rows[f"{name}{', --allow_conflicts' if allow else ''}"] = _row(index, embeddings, items)
    for name, row in rows.items():
        print(f"{name}:\n    {row['conflicts']}, reconstruction {row['reconstruction']}")
        for kind, purity in row["purity"].items():
            words = ", ".join(
                f"{depth['prefix_levels']}: {depth['share']:.1%} ({depth['chance']:.2%})" for depth in purity
            )
            print(f"    {kind} under the same first n codes (by chance): {words}")
    return rows


def _row(index: Index, embeddings: Embeddings, items: list[dict[str, Any]]) -> dict[str, Any]:
    codes, resolution = index.resolution.codes, index.resolution
    left = sum(len(group) - 1 for group in collision_groups(codes))
    purity = {"10 nearest neighbours": neighbour_purity(codes, embeddings)}
    purity |= {f"same {field}": label_purity(codes, labels_of(items, field)) for field in LABEL_FIELDS if items}
    return {
        "conflicts": f"colliding items at first and after the rounds {resolution.colliding[0]}, {resolution.colliding[-1]}; "
        f"conflicts (items - indices) in the end {left}",
        "reconstruction": index.reconstruction_mse and round(index.reconstruction_mse, 6),
        "purity": {kind: depths for kind, depths in purity.items() if depths},
    }


def clustered_rows(path: Path, items: int, dim: int, seed: int = 0) -> None:
    """A `.npy` of float16 rows around 4,096 centres, written piece by piece."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((4096, dim), dtype=np.float32)
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(items, dim))
    for first in range(0, items, 50_000):
        count = min(50_000, items - first)
        noise = rng.standard_normal((count, dim), dtype=np.float32)
        rows[first : first + count] = centres[rng.integers(4096, size=count)] + 0.5 * noise
    rows.flush()


def measured(name: str, command: list[str]) -> dict[str, float]:
    """Run `command`; its seconds and its largest resident memory.

    Memory is the sum over the process and its children (workers that read ahead), sampled ten times a second, and counts
    the pages of the mapped file too, in each process that has read them.
    """
    before, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stdout=log, stderr=log, text=True) as process:
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                peak = max(peak, sum(_resident(one) for one in (tree, *tree.children(recursive=True))))
            time.sleep(0.1)
        log.seek(0)
        output = log.read()
    seconds = time.perf_counter() - before
    if process.returncode:
        raise SystemExit(f"{name} failed: {output[-2000:]}")
    print(f"{name}: {seconds:.0f} s, {peak / 2**30:.2f} GiB at most", flush=True)
    return {"seconds": seconds, "peak_gib": peak / 2**30}


def _resident(process: psutil.Process) -> int:
    """Bytes in memory; 0 where the process has just ended."""
    with contextlib.suppress(psutil.Error):
        return process.memory_info().rss
    return 0


def scale(args: argparse.Namespace) -> dict[str, Any]:
    """Train and generate for `args.items` random clustered items, each in a process of its own."""
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        clustered_rows(folder / "x.npy", args.items, args.dim)
        size = (folder / "x.npy").stat().st_size / 2**30
        print(
            f"{args.items} items × {args.dim} float16 around 4,096 centres: {size:.2f} GiB; hidden layers {args.layers}, "
            f"{args.scale_epochs} epochs, batches of {args.scale_batch}, one worker, CPU, {torch.get_num_threads()} threads",
            flush=True,
        )
        common = ["--data_path", str(folder / "x.npy"), "--device", "cpu"]
        train = ["--preset", "fast", "--epochs", str(args.scale_epochs), "--batch_size", str(args.scale_batch)]
        train += ["--num_workers", "1", "--layers", *map(str, args.layers), "--ckpt_dir", str(folder / "ckpt")]
        result = {"train": measured("train", [sys.executable, str(INDEX / "main.py"), *common, *train])}
        out = ["--ckpt_path", str(folder / "ckpt"), "--output_file", str(folder / "x.index.json")]
        result["generate"] = measured("generate", [sys.executable, str(INDEX / "generate_indices.py"), *common, *out])
        report = json.loads((folder / "x.index.report.json").read_text())
        written = json.loads((folder / "x.index.json").read_text())
        result["conflicts"] = len(written) - len({tuple(tokens) for tokens in written.values()})
        print(
            f"colliding at first and after each round {report['colliding_by_round']}; moved to free indices "
            f"{report['moved_on_last_level']} on the last level, {report['moved_to_other_prefix']} to another prefix "
            f"({report['moved_greedily']} one by one); in the file: {len(written)} items, {result['conflicts']} conflicts"
        )
        worst = max(result["train"]["peak_gib"], result["generate"]["peak_gib"])
        print(f"most memory of either: {worst:.2f} GiB")
    return result


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_path", help="embeddings of a real catalogue, .npy")
    add("--epochs", type=int, default=100, help="of the plain loop (100)")
    add("--warmup_epochs", type=int, default=5, help="of the plain loop (5)")
    add("--seed", type=int, default=2024, help="of both (2024)")
    equal = "also train the preset for as long as the plain loop took (yes)"
    add("--equal_time", action=argparse.BooleanOptionalAction, default=True, help=equal)
    add("--threads", type=int, help="processor threads (PyTorch's choice)")
    add("--items", type=int, help="measure scale instead: so many random clustered items")
    add("--dim", type=int, default=768, help="with --items: width (768)")
    add("--scale_epochs", type=int, default=3, help="with --items: epochs (3)")
    add("--scale_batch", type=int, default=4096, help="with --items: batch (4096)")
    add("--layers", type=int, nargs="+", default=[256, 128, 64], help="with --items: hidden widths (256 128 64)")
    add("--folder", help="with --items: where the temporary files go, 4 GB for a million items (the system's)")
    args = parser.parse_args(argv)
    if not args.items and not args.data_path:
        parser.error("give --data_path, or --items for scale")
    if args.threads:
        torch.set_num_threads(args.threads)
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the processes that --items starts
    run: Callable[[argparse.Namespace], dict[str, Any]] = scale if args.items else compare
    return run(args)


if __name__ == "__main__":
    main()
