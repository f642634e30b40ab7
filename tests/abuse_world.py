"""One tiny world for the table of abuses: data, base model, trained run, adapter, results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scoring_world import make_world

import evaluate
import finetune
import recommend
import report
import test as test_script

SMALL = ["--train_data_sample_num", "8,4,4,4,4,4", "--per_device_batch_size", "8", "--gradient_accumulation_steps", "1"]
SMALL += ["--deepspeed", "none", "--epochs", "2", "--valid_prompt_sample_num", "1", "--report_to", "none"]
SMALL += ["--eval_task_samples", "2", "--learning_rate", "1e-3", "--max_his_len", "4"]


def data_flags(world: Path) -> list[str]:
    return ["--data_path", str(world), "--dataset", "toy"]


def finetune_flags(world: Path, out: str = "out") -> list[str]:
    return ["--base_model", str(world / "base"), "--output_dir", str(world / out), *data_flags(world), *SMALL]


def test_flags(world: Path, model: str = "run") -> list[str]:
    own = ["--ckpt_path", str(world / model), "--results_file", str(world / "new/r.json"), "--sample_num", "3"]
    return [*own, *data_flags(world), "--metrics", "hit@5", "--num_beams", "5"]


def ask(world: Path) -> list[str]:
    return ["--ckpt_path", str(world / "run"), "--num_beams", "3", "--top_k", "2", "--format", "json"]


# name → (the script's main, its flags in a world); flags of a row come after these and win
COMMANDS: dict[str, tuple[Callable[[list[str]], Any], Callable[[Path], list[str]]]] = {
    "finetune": (finetune.main, finetune_flags),
    "resume": (finetune.main, lambda w: [*finetune_flags(w, "run"), "--resume_from_checkpoint", "auto"]),
    "replace": (finetune.main, lambda w: [*finetune_flags(w, "run"), "--overwrite_output_dir"]),
    "test": (test_script.main, test_flags),
    "test again": (
        test_script.main,
        lambda w: [*test_flags(w), "--results_file", str(w / "results/r.json"), "--sample_num", "-1"],
    ),
    "test --lora": (
        test_script.main,
        lambda w: [*test_flags(w, "adapter"), "--lora", "--base_model", str(w / "base")],
    ),
    "recommend": (recommend.main, lambda w: [*ask(w), "--history", "1", "2"]),
    "requests": (recommend.main, lambda w: [*ask(w), "--requests", str(w / "requests.jsonl")]),
    "evaluate": (evaluate.main, lambda w: ["--predictions", str(w / "results/r.predictions.jsonl")]),
    "report": (
        report.main,
        lambda w: ["--results_file", str(w / "results/r.json"), *data_flags(w), "--metrics", "hit@5"],
    ),
}


def make_abuse_world(folder: Path) -> Path:
    """Build everything that the commands read: about half a minute."""
    make_world(folder, items=30, users=12)
    shutil.rmtree(folder / "ckpt")
    finetune.main(finetune_flags(folder, "run"))
    finetune.main([*finetune_flags(folder, "adapter"), "--lora", "--lora_r", "2"])
    for checkpoint in (folder / "adapter").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    results = ["--results_file", str(folder / "results/r.json"), "--sample_num", "-1"]
    test_script.main([*test_flags(folder), *results])
    (folder / "requests.jsonl").write_text('{"history": [1, 2]}\n')
    (folder / "prompts.json").write_text(json.dumps(prompts()))
    (folder / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    np.save(folder / "items.npy", np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32))
    return folder


def prompts() -> dict[str, Any]:
    """A prompt file with the repository's own templates."""
    from prompt import load_prompts

    return load_prompts().as_json()
