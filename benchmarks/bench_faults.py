"""Kill -9 at random moments, then the same command again: how many runs end with the same bytes as one without a fault?

    bash benchmarks/bench_faults.sh                     every job, 30 kills each
    N=3 SEED=7 bash benchmarks/bench_faults.sh merge report

Jobs: train, zero3 (two processes with DeepSpeed), score (two processes), index, merge, report. Each kill takes all processes of
a job at once, between its first file and its end. Python and its libraries start once: the jobs are forks, which have all
imports behind them. Everything is made and run in a temporary folder (TMPDIR).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import deepspeed  # noqa: F401  (what the jobs import, imported once)
import numpy as np
import peft  # noqa: F401
import torch
import transformers.trainer  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, f"{sys.path[0]}/index")

import generate_indices
import main as index_main

import finetune
import report
import test_ddp
from arguments import SEEDS, make_parser, whole
from convert import make_delta, merge_delta
from data_process import base_model
from utils import run_main

ROOT = Path(__file__).resolve().parent.parent
W = Path(tempfile.gettempdir()) / f"faults-{os.getpid()}"
DATA = ["--data_path", str(W), "--dataset", "Toy"]
TRAIN = ["--base_model", f"{W}/base", *DATA, "--tasks", "seqrec,item2index,index2item", "--epochs", "2"]
TRAIN += ["--train_prompt_sample_num", "1,1,1", "--train_data_sample_num", "0,0,0", "--per_device_batch_size", "8"]
TRAIN += ["--gradient_accumulation_steps", "1", "--learning_rate", "1e-3", "--valid_prompt_sample_num", "1"]
TRAIN += ["--report_to", "none", "--resume_from_checkpoint", "auto"]
SCORE = ["--ckpt_path", f"{W}/trained/out", *DATA, "--test_prompt_ids", "all", "--num_beams", "10"]
SCORE += ["--test_batch_size", "2", "--metrics", "hit@10,ndcg@10"]
INDEX = [
    "--data_path",
    f"{W}/emb.npy",
    "--device",
    "cpu",
    "--epochs",
    "100",
    "--eval_step",
    "5",
    "--layers",
    "32",
    "16",
]
INDEX += ["--num_emb_list", "8", "8", "8", "--e_dim", "8", "--batch_size", "100", "--num_workers", "0"]
DELTA = ["--base-model-path", f"{W}/base", "--delta-path", f"{W}/delta", "--target-model-path"]


def make_world() -> None:
    """60 items, 20 users, 300 embeddings, a base model."""
    rng = np.random.default_rng(0)
    (W / "Toy").mkdir(parents=True)
    words = zip(rng.choice(["red", "old", "new"], 60), rng.choice(["pen", "lamp"], 60), strict=True)
    titles = [f"{one} {other} {number}" for number, (one, other) in enumerate(words)]
    files = {
        "inter": {str(user): rng.integers(60, size=6).tolist() for user in range(20)},
        "item": {str(i): {"title": title, "description": f"A {title}."} for i, title in enumerate(titles)},
        "index": {str(i): [f"<a_{i % 5}>", f"<b_{i // 5}>", f"<c_{i % 3}>"] for i in range(60)},
    }
    for kind, content in files.items():
        (W / f"Toy/Toy.{kind}.json").write_text(json.dumps(content))
    np.save(W / "emb.npy", rng.normal(size=(300, 32)).astype(np.float32))
    small = ["--vocab_size", "400", "--hidden_size", "64", "--layers", "2", "--target", f"{W}/base"]
    base_model.main(["tiny", *DATA, *small])


# ---- the jobs: what each does in its folder, and what it leaves there ----


def train(folder: Path) -> None:
    finetune.main([*TRAIN, "--deepspeed", "none", "--output_dir", f"{folder}/out"])


def zero3(folder: Path) -> None:
    finetune.main([*TRAIN, "--deepspeed", f"{ROOT}/config/ds_z3_bf16.json", "--bf16", "--output_dir", f"{folder}/out"])


def score(folder: Path) -> None:
    test_ddp.main([*SCORE, "--results_file", f"{folder}/r.json"])


def index(folder: Path) -> None:
    """Train, or go on training, then write the index."""
    runs = sorted({path.parent for path in folder.glob("*/*.pth")})
    index_main.main(["--resume", str(runs[-1]), "--device", "cpu"] if runs else [*INDEX, "--ckpt_dir", str(folder)])
    best = sorted(folder.glob("*/best_collision_model.pth"))[-1]
    made = ["--output_file", f"{folder}/Toy.index.json", "--overwrite", "--device", "cpu"]
    generate_indices.main(["--ckpt_path", str(best), *made])


def merge(folder: Path) -> None:
    if not (folder / "merged/config.json").exists():
        merge_delta.main([*DELTA, f"{folder}/merged"])


def write_report(folder: Path) -> None:
    results = ["--results_file", f"{W}/scored/r.json", "--table_file", f"{folder}/r.table.md"]
    report.main([*DATA, *results, "--metrics", "hit@10"])


def delta(folder: Path) -> None:
    made = ["--base-model-path", f"{W}/base", "--target-model-path", f"{W}/trained/out", "--delta-path", f"{W}/delta"]
    make_delta.main(made)


@dataclass(frozen=True)
class Job:
    """What runs, in how many processes, which files must be the same, and what must be there before."""

    run: Callable[[Path], None]
    processes: int
    left: tuple[str, ...]
    needs: tuple[str, ...] = ()


MODEL = ("out/model.safetensors", "out/tokenizer.json", "out/prompt_style.json", "out/item_index.json")
JOBS = {
    "train": Job(train, 1, MODEL),
    "zero3": Job(zero3, 2, MODEL),
    "score": Job(score, 2, ("r.predictions.jsonl",), ("trained",)),
    "index": Job(index, 1, ("Toy.index.json",)),
    "merge": Job(
        merge, 1, ("merged/model.safetensors", "merged/tokenizer.json", "merged/config.json"), ("trained", "delta")
    ),
    "report": Job(write_report, 1, ("r.table.md", "r.html"), ("trained", "scored")),
}
BEFORE = {"trained": JOBS["train"], "scored": JOBS["score"], "delta": Job(delta, 1, ())}


def digest(job: Job, folder: Path) -> list[str]:
    """The hashes of what a job leaves; of results the figures too."""
    found = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in job.left if (folder / name).is_file()]
    results = folder / "r.json"
    return [*found, str(json.loads(results.read_text())["mean_results"]) if results.is_file() else ""]


# ---- processes ----


def forked(job: Job, folder: Path) -> list[int]:
    """Fork the job's processes into a process group of their own, named by the first one's id."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    children: list[int] = []
    for number in range(job.processes):
        child = os.fork()
        if child == 0:
            os.setpgid(0, children[0] if children else 0)
            if job.processes > 1:
                alike = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(job.processes)}
                os.environ |= alike | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            status = 1
            try:
                run_main(lambda: job.run(folder))
                status = 0
            except SystemExit as end:
                status = int(end.code or 0)
            finally:
                sys.stdout.flush()
                os._exit(status)
        children.append(child)
    return children


def first_file(folder: Path, children: list[int]) -> None:
    """Wait until there is a file, or the job has ended."""
    while not any(folder.iterdir()) and os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.005)


def ended(children: list[int]) -> bool:
    """Wait for all processes; whether all ended well."""
    statuses = [os.waitpid(child, 0)[1] for child in children]
    return not any(statuses)


def undisturbed(job: Job, folder: Path) -> float:
    """Run a job without a fault; the seconds from its first file to its end."""
    folder.mkdir()
    children = forked(job, folder)
    first_file(folder, children)
    began = time.monotonic()
    if not ended(children):
        raise SystemExit(folder.with_suffix(".log").read_text()[-2000:])
    return time.monotonic() - began


def cut_off(job: Job, folder: Path, seconds: float) -> bool:
    """Kill a run so long after its first file; whether it was still running."""
    folder.mkdir()
    children = forked(job, folder)
    first_file(folder, children)
    time.sleep(seconds)
    running = os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    for child in children:
        os.kill(child, signal.SIGKILL)
    ended(children)
    return running


def measure(name: str, kills: int, draw: random.Random) -> None:
    """Print how many runs of a job were equal."""
    job = JOBS[name]
    for place in job.needs:
        if not (W / place).exists():
            undisturbed(BEFORE[place], W / place) if place != "delta" else undisturbed(BEFORE[place], W / "made")
    seconds = undisturbed(job, W / f"{name}-whole")
    wanted, equal, cut = digest(job, W / f"{name}-whole"), 0, 0
    for number in range(kills):
        folder, at = W / f"{name}-{number}", seconds * draw.random()
        running = cut_off(job, folder, at)
        cut += running
        seconds *= 1 if running else 0.75  # the machine has got faster
        if ended(forked(job, folder)) and digest(job, folder) == wanted:
            equal += 1
            shutil.rmtree(folder)
        else:
            last = folder.with_suffix(".log").read_text(errors="replace").splitlines()[-1:]
            print(f"{name}, kill {number}, {at:.2f} s after the first file: {str(last)[:300]}", flush=True)
    print(
        f"{name}: {equal} of {kills} runs bit-equal after kill -9 ({cut} while it ran, {seconds:.1f} s long)",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    """Make the world, then each job."""
    parser = make_parser(__doc__)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=", ".join(JOBS))
    parser.add_argument("--kills", type=whole(1), default=30, help="of each job")
    parser.add_argument("--seed", type=SEEDS, default=42, help="of the moments")
    options = parser.parse_args(argv)
    for name in options.jobs:
        if name not in JOBS:
            parser.error(f"no job {name}; jobs: {', '.join(JOBS)}")
    torch.set_num_threads(1)
    try:
        W.mkdir()
        undisturbed(Job(lambda _: make_world(), 1, ()), W / "world")
        for name in options.jobs or JOBS:
            measure(name, options.kills, random.Random(options.seed))
    finally:
        shutil.rmtree(W, ignore_errors=True)


if __name__ == "__main__":
    run_main(main)
