"""finetune.py on toy data, in this process or others, and what its folder holds afterwards: what its tests share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from running import ROOT, free_port, together
from tiny_models import make_model
from toy_data import write_drawn_dataset


def command(folder: Path, *flags: str, processes: int = 1, out: str = "out") -> list[str]:
    """finetune.py on the toy data; flags given here win over those before them."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    own = ["--base_model", str(folder / "base"), "--output_dir", str(folder / out), "--dataset", "Toy"]
    own += ["--data_path", str(folder / "data"), "--per_device_batch_size", "4", "--gradient_accumulation_steps", "1"]
    own += [
        "--learning_rate",
        "1e-3",
        "--epochs",
        "2",
        "--only_train_response",
        "--train_data_sample_num",
        "12,4,4,6,3,3",
    ]
    own += ["--logging_step", "1", "--valid_prompt_sample_num", "1", "--report_to", "none"]
    return [*start, str(ROOT / "finetune.py"), *own, *flags]


def inside(args: list[str]) -> None:
    """finetune.py in this process: for one process without DeepSpeed, which saves the time that imports take."""
    import finetune

    finetune.main(args[2:])


def in_two(args: list[str], nodes: int = 1) -> str:
    """finetune.py in two processes, on a node each or on one; what it says."""
    import finetune

    return together(finetune.main, args[2:], nodes=nodes)


def run(*args: str, status: int = 0, **more: object) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(*args, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240, **more)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def make_world(folder: Path) -> Path:
    """A base model in `folder/base`, a dataset in `folder/data`; returns `folder`."""
    make_model("llama", folder / "base")
    write_drawn_dataset(folder / "data")
    return folder


def losses(path: Path) -> list[tuple[int, float]]:
    state = json.loads((path / "trainer_state.json").read_text())
    return [(row["step"], row["loss"]) for row in state["log_history"] if "loss" in row]


def evaluations(path: Path) -> dict[int, float]:
    state = json.loads((path / "trainer_state.json").read_text())
    return {row["step"]: row["eval_loss"] for row in state["log_history"] if "eval_loss" in row}


def loss_of(model: torch.nn.Module, tokenizer: object, folder: Path) -> float:
    """The validation loss, sample by sample, without any of the training's code for it."""
    from data import load_data
    from prompt import load_prompts
    from samples import ValidSet
    from tasks import HistoryFormat

    data = load_data(str(folder / "data"), "Toy", ".index.json")
    valid = ValidSet(data, load_prompts(None), HistoryFormat(), 42, prompt_num=1)
    total = count = 0.0
    for number in range(len(valid)):
        sample = valid[number]
        prompt = tokenizer(sample["prompt"])["input_ids"]
        whole = tokenizer(sample["prompt"] + sample["response"])["input_ids"] + [tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + whole[len(prompt) :]
        with torch.no_grad():
            total += model(torch.tensor([whole]), labels=torch.tensor([labels])).loss.item() * (
                len(whole) - len(prompt)
            )
        count += len(whole) - len(prompt)
    return total / count
