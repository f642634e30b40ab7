"""One tiny world for the table of abuses: data, base model, trained run, adapter, results; and the ways to break its files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scoring_world import make_world

import evaluate
import finetune
import recommend
import report
import test as test_script

Break = Callable[[Path], None]  # is given the folder of a fresh copy of the world
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


@dataclass(frozen=True)
class Abuse:
    """A row of the table.

    Args:
        name: what is wrong.
        command: one of `COMMANDS`.
        told: a regular expression that the one line must have; None: it must work all the same.
        broken: breaks a copy of the world; None: the flags are the abuse.
        flags: after the command's own; `{w}` is the world's folder.
        room: no file may get longer, as on a disk that is full.
    """

    name: str
    command: str
    told: str | None
    broken: Break | None = None
    flags: tuple[str, ...] = ()
    room: int | None = None

    def __str__(self) -> str:
        return f"{self.command}: {self.name}"


# ---- ways to break a file ----


def write(path: str, content: bytes | str | Any) -> Break:
    """The file has this content: bytes, text, or anything else as JSON."""

    def broken(world: Path) -> None:
        raw = content if isinstance(content, (bytes, str)) else json.dumps(content)
        remove(path)(world)
        (world / path).parent.mkdir(parents=True, exist_ok=True)
        (world / path).write_bytes(raw if isinstance(raw, bytes) else raw.encode())

    return broken


def edit(path: str, change: Callable[[Any], Any], bom: bool = False) -> Break:
    """The JSON file has what `change` made of its content; with `bom` as an editor of another system writes it."""

    def broken(world: Path) -> None:
        content = json.loads((world / path).read_text())
        change(content)
        text = json.dumps(content, indent=1)
        (world / path).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() if bom else text.encode())

    return broken


def put(path: str, *keys: str | int, value: Any) -> Break:
    """The JSON file has `value` at `keys`."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return edit(path, change)


def drop(path: str, *keys: str | int) -> Break:
    """The JSON file lacks what was at `keys`."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return edit(path, change)


def rename(path: str, *keys: str) -> Break:
    """The last of `keys` but one of the JSON file is called like the last."""

    def change(content: Any) -> None:
        for key in keys[:-2]:
            content = content[key]
        content[keys[-1]] = content.pop(keys[-2])

    return edit(path, change)


def copy(path: str, to: str) -> Break:
    """The file is at another place too."""

    def broken(world: Path) -> None:
        (world / to).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(world / path, world / to)

    return broken


def link(path: str, to: str) -> Break:
    """A link to another place in the world."""
    return lambda world: (world / path).symlink_to(world / to)


def remove(path: str) -> Break:
    """File or folder is gone."""

    def broken(world: Path) -> None:
        if (world / path).is_dir() and not (world / path).is_symlink():
            shutil.rmtree(world / path)
        else:
            (world / path).unlink(missing_ok=True)

    return broken


def cut(path: str, share: float = 0.5) -> Break:
    """Only the first part of the file is there."""

    def broken(world: Path) -> None:
        content = (world / path).read_bytes()
        (world / path).write_bytes(content[: int(len(content) * share)])

    return broken


def replaced(path: str, make: Callable[[Path], Any]) -> Break:
    """Something else has the name: `make` is given the path."""

    def broken(world: Path) -> None:
        remove(path)(world)
        (world / path).parent.mkdir(parents=True, exist_ok=True)
        make(world / path)

    return broken


def folder(path: str) -> Break:
    """A folder has the file's name."""
    return replaced(path, Path.mkdir)


def pipe(path: str) -> Break:
    """A pipe that nobody writes to has the file's name."""
    return replaced(path, os.mkfifo)


def device(path: str) -> Break:
    """The file is a link to a device without end."""
    return replaced(path, lambda place: place.symlink_to("/dev/zero"))


def loop(path: str) -> Break:
    """The file is a link to itself."""
    return replaced(path, lambda place: place.symlink_to(place.name))


def both(*breaks: Break) -> Break:
    """One after the other."""

    def broken(world: Path) -> None:
        for each in breaks:
            each(world)

    return broken


def weights(path: str, change: Callable[[dict[str, Any]], Any]) -> Break:
    """The safetensors file has what `change` makes of its tensors."""

    def broken(world: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(world / path)
        change(tensors)
        save_file(tensors, world / path, metadata={"format": "pt"})

    return broken


# kind of break → (what is done to a file that must be a JSON object, what the line says beside the file's name)
JSON_BREAKS: dict[str, tuple[Callable[[str], Break], str]] = {
    "missing": (remove, "no such file"),
    "a folder": (folder, "is a folder"),
    "a pipe": (pipe, "not a regular file"),
    "a device": (device, "not a regular file"),
    "a link to itself": (loop, "cannot be read"),
    "empty": (lambda path: write(path, b""), "broken JSON"),
    "cut": (cut, "broken JSON"),
    "nested 200,000 deep": (lambda path: write(path, b"[" * 200_000), "nested too deep"),
    "a number of 5,000 digits": (lambda path: write(path, b'{"0": ' + b"9" * 5000 + b"}"), "thousands of digits"),
    "a list": (lambda path: write(path, b"[]"), "object|is no"),
    "not UTF-8": (lambda path: write(path, b'{"\xff": 1}'), "not UTF-8"),
    "UTF-16": (lambda path: write(path, '{"0": 1}'.encode("utf-16")), "not UTF-8"),
    "half a character": (lambda path: write(path, rb'{"0": "\ud800"}'), "not valid Unicode"),
    "a key twice": (lambda path: write(path, b'{"0": 1, "0": 2}'), "'0' occurs twice"),
    "NUL bytes": (lambda path: write(path, b"\0" * 100), "broken JSON"),
}


def json_rows(command: str, path: str, *but: str, flags: tuple[str, ...] = (), told: str = "") -> list[Abuse]:
    """A row for each of `JSON_BREAKS` but those named; the line names the file, or says `told`."""
    name = Path(path).name.replace(".", r"\.")
    return [
        Abuse(f"{path} is {kind}", command, rf"{told or name}.*{says}", broken(path), flags)
        for kind, (broken, says) in JSON_BREAKS.items()
        if kind not in but
    ]
