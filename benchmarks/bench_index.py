"""How soon an RQ-VAE is good: a plain training loop against index/ with `--preset fast`, in turn in one call.

    python benchmarks/bench_index.py --data_path ./data/Games/Games.emb-llama-td.npy            # plain, then ours
    python benchmarks/bench_index.py --data_path F --threads 1     # then processor time is the clock to trust

The plain loop is the paper's recipe without batch norm (4 levels of 256 codes, epsilon 0.003 on the last, batches of
1,024, AdamW with 1e-3 and weight decay 1e-4, linear schedule) over a DataLoader that stacks rows, with Sinkhorn on the
whole plan and one optimiser step a batch. Both are measured with nearest codes on all items; the clock stands still
meanwhile. Quality is reached where reconstruction and collision rate are both at or below the plain loop's at its end.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "index"))

import main as index_main
from embeddings import Embeddings
from figures import index_figures
from flag_kinds import SEED, FlagParser, integer
from models.quantiser import VectorQuantizer, squared_distances
from models.rqvae import RQVAE, RQVAEConfig
from parallel import Processes
from start import balance, start
from trainer import Trainer

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


def plain_loop(x: torch.Tensor, epochs: int, warmup_epochs: int, seed: int) -> list[Point]:
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
    return clock.points


def fast_preset(path: str, x: torch.Tensor, seed: int, folder: str) -> list[Point]:
    """index/ with `--preset fast`, its start included in the time.

    Measured after the start and at tenths of the way, each time as if the run ended there.
    """
    flags = ["--preset", "fast", "--data_path", path, "--ckpt_dir", folder, "--device", "cpu", "--seed", str(seed)]
    args, _ = index_main.parse_flags(flags)
    index_main.seed_all(seed)
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
    return clock.points


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
    """Run both and print the ratios."""
    x = torch.from_numpy(np.load(args.data_path).astype(np.float32))
    print(
        f"{args.data_path}: {len(x)} items × {x.shape[1]}, CPU, {torch.get_num_threads()} threads; "
        "s: wall clock, CPU: processor seconds of the process",
        flush=True,
    )
    plain = plain_loop(x, args.epochs, args.warmup_epochs, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        return ratios(plain[-1], fast_preset(args.data_path, x, args.seed, folder))


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


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = FlagParser(__doc__)
    add = parser.add_argument
    add("--data_path", required=True, help="embeddings of a real catalogue, .npy")
    add("--epochs", type=integer(1), default=100, help="of the plain loop (100)")
    add("--warmup_epochs", type=integer(0), default=5, help="of the plain loop (5)")
    add("--seed", type=SEED, default=2024, help="of both (2024)")
    add("--threads", type=integer(1), help="processor threads (PyTorch's choice)")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    return compare(args)


if __name__ == "__main__":
    main()
