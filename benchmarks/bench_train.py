"""Fine-tuning speed and memory: (a) plain Trainer, batches padded to the longest; (b) finetune.py --packing. `--compare`: others.

    python benchmarks/bench_train.py                        # Office if ../shared/data/Office is there, else ml-100k
    python benchmarks/bench_train.py --processes 1,2 --seeds 3 --samples 512
    python benchmarks/bench_train.py --model smollm2 --processes 1 --samples 24
    python benchmarks/bench_train.py --data_path ./data --dataset ml-100k     # a dataset with index and user texts
    python benchmarks/bench_train.py --compare dealing --model medium --processes 4     # (a) rows as drawn; (b) dealt by length
    python benchmarks/bench_train.py --compare memory --model smollm2 --processes 1     # (b) with keep_memory of scripts/env.sh

Both train the same model (a tiny LLaMA of the embedded default's size, or SmolLM2-135M) on the same samples in the same order,
with the same optimiser, precision and activation checkpointing, in turn and each in processes of its own; with two processes
under DeepSpeed ZeRO-3. Printed: samples and useful (not padding) tokens a second; the peak of the first process's resident
memory and what of it training added to that of the loaded model; the loss after equal samples on others of the mixture. CPU
seconds, of the slowest process in each step, are printed beside the wall clock, since other programs disturb the latter.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import finetune
import training
from arguments import make_parser
from flag_values import whole
from processes import leave
from utils import UserError, is_main, read_json, run_main, write_json

ROOT = Path(__file__).resolve().parent.parent
LEARNING_RATES = {"tiny": "1e-3", "medium": "1e-3", "smollm2": "5e-5"}
MEDIUM = ["--hidden_size", "384", "--layers", "6", "--heads", "6"]
NAMES = {
    "packing": ("plain Trainer", "--packing"),
    "dealing": ("rows as drawn", "rows dealt"),
    "memory": ("as it is", "keep_memory"),
}
OFFICE = ROOT.parent / "shared" / "data" / "Office"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The benchmark's flags."""
    parser = make_parser(__doc__)
    parser.add_argument("--data_path", help="folder that holds <dataset>/ (default: made from ../shared/data/Office)")
    parser.add_argument("--dataset", default="Office")
    parser.add_argument("--processes", default="1,2", help="numbers of processes, by commas")
    parser.add_argument("--model", default="tiny", choices=tuple(LEARNING_RATES), help="base model")
    parser.add_argument("--compare", default="packing", choices=tuple(NAMES), help="what (b) has and (a) has not")
    parser.add_argument("--samples", type=whole(1), default=512, help="training samples of each run")
    parser.add_argument("--loss_samples", type=whole(1), default=200, help="samples whose loss is compared at the end")
    parser.add_argument("--batch_size", type=whole(1), default=8, help="samples per process and step")
    parser.add_argument("--seeds", type=whole(1), default=1, help="runs of each kind")
    parser.add_argument("--no_checkpointing", action="store_true", help="keep activations, in both kinds")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def make_office(folder: Path) -> None:
    """Office with user texts by rule and, as only the number of tokens matters here, a random index of 4 × 256 codes."""
    from data_process.user_texts import user_texts

    target = folder / "Office"
    target.mkdir(parents=True)
    for name in ("Office.inter.json", "Office.item.json"):
        (target / name).symlink_to(OFFICE / name)
    inters, items = read_json(OFFICE / "Office.inter.json"), read_json(OFFICE / "Office.item.json")
    write_json(
        target / "Office.user.json", user_texts(inters, [items[str(i)] for i in range(len(items))], 42), indent=None
    )
    draw = random.Random(0)
    write_json(
        target / "Office.index.json", {i: [f"<{level}_{draw.randrange(256)}>" for level in "abcd"] for i in items}
    )


def make_data_and_base(options: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """The data path that `--data_path` names, or Office in `folder`, and the base model `--model`, made in `folder`."""
    from data_process.base_model import main as make_base

    data_path, base = Path(options.data_path or folder / "data").resolve(), folder / "base"
    if not options.data_path:
        if not OFFICE.is_dir():
            raise UserError(f"{OFFICE} is not there; name a dataset with --data_path and --dataset")
        make_office(data_path)
    kind = ["tiny", *MEDIUM] if options.model == "medium" else [options.model]
    make_base([*kind, "--target", str(base), "--data_path", str(data_path), "--dataset", options.dataset])
    return data_path, base


def worker(job: dict) -> None:
    """One run, inside a process of its own (or torchrun's): trains and prints its figures as JSON."""
    flags = ["--base_model", job["base"], "--output_dir", job["out"], "--dataset", job["dataset"]]
    flags += ["--data_path", job["data_path"], "--seed", str(job["seed"]), "--learning_rate", job["learning_rate"]]
    flags += ["--only_train_response", "--bf16"]
    flags += ["--per_device_batch_size", str(job["batch_size"]), "--gradient_accumulation_steps", "1"]
    flags += ["--max_steps", str(job["steps"]), "--report_to", "none", "--valid_prompt_sample_num", "1"]
    flags += ["--logging_step", "1000000", "--save_and_eval_strategy", "steps", "--save_and_eval_steps", "1000000"]
    flags += ["--deepspeed", str(ROOT / "config/ds_z3_bf16.json") if job["zero3"] else "none"]
    flags += ["--loss_average", "token"]  # as the plain Trainer of today
    plain = job["kind"] == "a" and job["compare"] == "packing"
    flags += [] if plain else ["--packing"]
    flags += ["--no-gradient_checkpointing"] if job["no_checkpointing"] else []
    if job["kind"] == "a" and job["compare"] == "dealing":
        training.MOST_DEALT = 0
    run = finetune.prepare(finetune.parse(flags), plain_trainer if plain else None)
    trainer = run.trainer
    run.training.load_best_model_at_end = False
    run.training.save_strategy = "no"
    tokens, clock = useful_tokens(run), make_clock()
    before = forget_peak()
    trainer.add_callback(clock)
    trainer.train()
    peak = resident("VmHWM")
    figures = {"seconds": clock.wall, "cpu": slowest(clock.cpu), "tokens": tokens, "peak": peak, "added": peak - before}
    figures["loss"] = final_loss(run, trainer.model_wrapped, job["loss_samples"])
    if is_main():
        print("FIGURES " + json.dumps(figures), flush=True)
    leave()


def resident(line: str) -> float:
    """`VmRSS` (resident memory now) or `VmHWM` (its peak) of this process in MB, as Linux counts them."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) for row in status if row.startswith(line + ":")) / 2**10


def forget_peak() -> float:
    """Let `VmHWM` begin anew, so that it is training's and not loading's; the resident memory now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def plain_trainer(run: finetune.Run) -> object:
    """transformers' own Trainer on padded batches: every logit of every position."""
    from transformers import PrinterCallback, ProgressCallback, Trainer

    from collator import TrainCollator

    run.model.set_attn_implementation("sdpa")
    trainer = Trainer(
        model=run.model,
        args=run.training,
        train_dataset=run.train_set,
        eval_dataset=run.valid_set,
        data_collator=TrainCollator(run.tokenizer, run.args.model_max_length, True),
        processing_class=run.tokenizer,
    )
    for chatty in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(chatty)
    return trainer


class Clock:
    """Wall clock from the end of the first step to that of the last, and CPU seconds of each between. Made a callback below."""

    def __init__(self) -> None:
        self.ticks: list[tuple[float, float]] = []

    def tick(self) -> None:
        """Called after every step."""
        self.ticks.append((time.perf_counter(), time.process_time()))

    @property
    def wall(self) -> float:
        """Seconds."""
        return self.ticks[-1][0] - self.ticks[0][0]

    @property
    def cpu(self) -> list[float]:
        """Seconds of this process for each step."""
        return [later[1] - before[1] for before, later in itertools.pairwise(self.ticks)]


def slowest(seconds: list[float]) -> float:
    """The steps' seconds of the process that has the most in each, summed: what they take if each process has its core."""
    import torch.distributed as dist

    every = [seconds]
    if dist.is_initialized():
        every = [seconds] * dist.get_world_size()
        dist.all_gather_object(every, seconds)
    return sum(map(max, zip(*every, strict=True)))


def make_clock() -> object:
    """A `Clock` as a callback of the trainer."""
    from transformers import TrainerCallback

    class Ticker(TrainerCallback, Clock):
        def on_step_end(self, *_: object, **__: object) -> None:
            self.tick()

    return Ticker()


def useful_tokens(run: finetune.Run) -> float:
    """Tokens of a mean training sample, padding aside, from 500 of them."""
    from collator import encode_samples

    draw = random.Random(0)
    samples = [run.train_set[draw.randrange(len(run.train_set))] for _ in range(500)]
    rows, _ = encode_samples(run.tokenizer, [s["prompt"] for s in samples], [s["response"] for s in samples], 2048)
    return sum(map(len, rows)) / len(rows)


def final_loss(run: finetune.Run, model: object, count: int) -> float:
    """Mean loss over the labelled tokens of `count` samples of the mixture, computed the plain way in both kinds.

    They are drawn from all samples, of which a run has seen a few at most, and are the same for all runs.
    """
    import torch

    from collator import TrainCollator

    collator = TrainCollator(run.tokenizer, run.args.model_max_length, True)
    numbers = random.Random(1).sample(range(len(run.train_set)), count)
    total = labelled = 0.0
    model.eval()
    for start in range(0, count, 8):
        batch = collator([run.train_set[i] for i in numbers[start : start + 8]])
        here = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += model(**batch, use_cache=False).loss.item() * here
        labelled += here
    return total / labelled


def launch(options: argparse.Namespace, job: dict, processes: int) -> dict:
    """Run a worker on `processes` processes and return its figures."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    if job["compare"] == "memory" and job["kind"] == "b":
        start = ["bash", "-c", 'set -e; source scripts/env.sh; GPUS=0 keep_memory; exec "$@"', "-", *start]
    command = [*start, str(Path(__file__).resolve()), "--worker", json.dumps(job)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if done.returncode or not lines:
        raise RuntimeError(f"the worker failed:\n{done.stdout[-2000:]}\n{done.stderr[-9000:]}")
    return json.loads(lines[0][8:])


def compare(options: argparse.Namespace, base: Path, data_path: Path, folder: Path) -> list[dict]:
    """All runs, (a) and (b) in turn; prints a line for each number of processes."""
    rows = []
    for processes in map(int, options.processes.split(",")):
        runs: dict[str, list[dict]] = {"a": [], "b": []}
        for seed in range(1, options.seeds + 1):
            for kind in "ab":
                steps = max(2, options.samples // (options.batch_size * processes))
                job = {"kind": kind, "seed": seed, "steps": steps, "base": str(base), "compare": options.compare}
                job["zero3"] = processes > 1 and options.compare != "dealing"
                job |= {"out": str(folder / f"out-{kind}-{processes}-{seed}"), "dataset": options.dataset}
                job |= {"data_path": str(data_path), "batch_size": options.batch_size}
                job |= {"no_checkpointing": options.no_checkpointing, "loss_samples": options.loss_samples}
                job |= {"learning_rate": LEARNING_RATES[options.model]}
                figures = launch(options, job, processes)
                figures["samples"] = (steps - 1) * options.batch_size * processes
                runs[kind].append(figures)
        rows.append(summary(processes, runs))
        print(table_lines(rows[-1], options.compare), flush=True)
    return rows


def summary(processes: int, runs: dict[str, list[dict]]) -> dict:
    """Means over the seeds, and (b) against (a)."""
    row: dict = {"processes": processes, "runs": runs}
    for kind, figures in runs.items():
        mean = {key: sum(f[key] for f in figures) / len(figures) for key in figures[0]}
        mean["samples_per_second"] = mean["samples"] / mean["seconds"]
        mean["tokens_per_second"] = mean["samples_per_second"] * mean["tokens"]
        mean["samples_per_cpu_second"] = mean["samples"] / processes / mean["cpu"]
        mean["losses"] = [f["loss"] for f in figures]
        row[kind] = mean
    names = ("samples_per_second", "samples_per_cpu_second", "peak", "added")
    row["ratio"] = {name: row["b"][name] / row["a"][name] for name in names}
    return row


def table_lines(row: dict, compared: str) -> str:
    """One comparison in words."""
    zero3 = row["processes"] > 1 and compared != "dealing"
    lines = [f"{row['processes']} process(es){', ZeRO-3' if zero3 else ''}"]
    for kind, name in zip("ab", NAMES[compared], strict=True):
        mean = row[kind]
        losses = ", ".join(f"{loss:.4f}" for loss in mean["losses"])
        lines.append(
            f"  ({kind}) {name:13s} {mean['samples_per_second']:6.2f} samples/s  "
            f"{mean['tokens_per_second']:6,.0f} useful tokens/s  peak {mean['peak']:5,.0f} MB, "
            f"of which training added {mean['added']:5,.0f}  loss {losses}"
        )
    ratio = row["ratio"]
    lines.append(
        f"  (b)/(a)           speed {ratio['samples_per_second']:.2f} (by CPU time {ratio['samples_per_cpu_second']:.2f})  "
        f"peak memory {ratio['peak']:.2f}, added by training {ratio['added']:.2f}"
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Make data and base model, then compare."""
    options = parse(argv)
    if options.worker:
        worker(json.loads(options.worker))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data_path, base = make_data_and_base(options, folder)
        rows = compare(options, base, data_path, folder)
        if options.output:
            write_json(options.output, rows)


if __name__ == "__main__":
    run_main(main)
