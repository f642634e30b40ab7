"""Abuses that need more than a broken file: two runs at once, a run that ends while it replaces another, code in a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from abuse_check import weights
from abuse_world import COMMANDS, ask, finetune_flags, test_flags
from tiny_models import make_model

import finetune
import test as test_script
import training
import utils
from folders import locked
from reading import load_model
from results import Store
from run_folder import REPLACED, RunFolder
from utils import UserError, checkpoints

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def world(abuse_world, tmp_path) -> Path:
    shutil.copytree(abuse_world, tmp_path / "w")
    return tmp_path / "w"


def script(*words: str | Path, stdin: str = "") -> subprocess.CompletedProcess:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=env, input=stdin, capture_output=True, text=True, timeout=240)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- the run that is replaced ----


def test_two_trainings_at_once(world):
    with RunFolder(world / "out").held(), pytest.raises(UserError, match="another process is writing it now"):
        finetune.main(finetune_flags(world))
    assert not (world / "out").exists()


@pytest.mark.parametrize("failing", ["_save_checkpoint", "training_step"])
def test_the_old_run_is_back_when_the_new_one_fails_before_its_first_checkpoint(world, monkeypatch, failing):
    before = files(world / "run")

    def fail(*_: object, **__: object) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(training.RecTrainer, failing, fail)
    with pytest.raises(UserError, match="the disk is full"):
        COMMANDS["replace"][0]([*COMMANDS["replace"][1](world), "--seed", "7"])
    assert files(world / "run") == before


KILLED = """
import os, signal, sys
import finetune, training
training.RecTrainer.{place} = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
finetune.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["_save_checkpoint", "training_step"])
def test_the_old_run_is_back_after_a_kill(world, place):
    before = files(world / "run")
    done = script("-c", KILLED.format(place=place), *COMMANDS["replace"][1](world), "--seed", "7")
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert (world / "run" / REPLACED).is_dir()
    with pytest.raises(UserError, match="holds a run already"):  # whatever comes next brings it back first
        finetune.main(finetune_flags(world, "run"))
    assert files(world / "run") == before


def test_the_old_run_goes_with_the_first_checkpoint_and_files_of_others_stay(world):
    (world / "run/README.md").write_text("mine")
    (world / "run/merges.txt").write_text("mine too")
    COMMANDS["replace"][0]([*COMMANDS["replace"][1](world), "--seed", "7"])
    assert (world / "run/README.md").read_text() == "mine" and (world / "run/merges.txt").read_text() == "mine too"
    assert json.loads((world / "run/run.json").read_text())["arguments"]["seed"] == 7
    assert not (world / "run" / REPLACED).exists() and checkpoints(world / "run")


def test_a_folder_that_was_moved_goes_on_with_its_best_checkpoint(world):
    """`trainer_state.json` holds the path that the best checkpoint had; the run may lie elsewhere now, or name another's."""
    before = files(world / "run")
    for name in ("config.json", "model.safetensors"):
        (world / "run" / name).unlink()
    for path in (world / "run").glob("checkpoint-*/trainer_state.json"):
        state = json.loads(path.read_text()) | {"best_model_checkpoint": str(world / "adapter")}
        path.write_text(json.dumps(state))
    (world / "run").rename(world / "moved")
    finetune.main([*finetune_flags(world, "moved"), "--resume_from_checkpoint", "auto"])
    assert (world / "moved/model.safetensors").read_bytes() == before["model.safetensors"]


# ---- results that are replaced ----


def test_two_tests_at_once(world):
    with locked(world / "new/r.json"), pytest.raises(UserError, match="another process is writing it now"):
        test_script.main(test_flags(world))
    assert not (world / "new").exists()


def test_earlier_results_stay_until_the_new_ones_are_there(world, monkeypatch):
    flags = [*COMMANDS["test again"][1](world), "--num_beams", "7"]  # another number of beams: other results
    before = files(world / "results")
    append = Store.append

    def stop_after_one(store: Store, records: list) -> None:
        append(store, records)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Store, "append", stop_after_one)
        test_script.main([*flags, "--restart"])
    left = files(world / "results")
    assert before.items() <= left.items()
    test_script.main(flags)  # goes on with the new ones
    found = [json.loads(line) for line in (world / "results/r.predictions.jsonl").read_text().splitlines()]
    assert {len(record["items"]) for record in found} == {7} and len(found) == 12
    assert not (world / "results/r.partial").exists()


# ---- code ----


@pytest.mark.slow
def test_a_request_does_not_answer_whether_code_may_run(world):
    (world / "run/evil.py").write_text(f"open({str(world / 'ran')!r}, 'w')\nclass C: pass\n")
    for name, key in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        content = json.loads((world / "run" / name).read_text())
        code = (
            {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}
            if key == "AutoConfig"
            else {key: ["evil.C", None]}
        )
        (world / "run" / name).write_text(json.dumps(content | {"auto_map": code, "model_type": "evil"}))
    done = script("recommend.py", *ask(world), "--requests", "-", stdin='y\n{"history": [1]}\n' * 3)
    assert done.returncode == 2 and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "needs code of its own, which is not run" in lines[0], done.stderr
    assert "Traceback" not in done.stderr and not (world / "ran").exists()


@pytest.mark.slow
def test_a_script_says_one_line(world):
    (world / "toy/toy.index.json").write_text("[" * 200_000)
    done = script("test.py", *test_flags(world))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: {world}/toy/toy.index.json: broken JSON (nested too deep)"
    assert "Traceback" not in done.stderr


def test_a_pattern_of_modules_that_takes_for_ever(world, monkeypatch):
    monkeypatch.setattr(utils, "PATIENCE", 1)
    for key in ("target_modules", "exclude_modules"):
        content = json.loads((world / "adapter/adapter_config.json").read_text()) | {key: "(([a-z_.0-9])+)+!"}
        (world / "adapter/adapter_config.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="adapter_config.json: its patterns of modules take for ever"):
            test_script.main([*test_flags(world, "adapter"), "--lora", "--base_model", str(world / "base")])


def test_what_a_killed_writer_left_goes_with_the_next_one(tmp_path):
    code = "import os, sys, utils\nwith utils.atomic_path(sys.argv[1]): os.kill(os.getpid(), 9)"
    assert script("-c", code, tmp_path / "x.json").returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / ".x.json.note").write_text("mine")
    with utils.atomic_path(tmp_path / "x.json") as living:  # of a process that lives nothing is taken
        utils.write_json(tmp_path / "x.json", 1)
        assert living.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.json.note", "x.json"]


def test_memory_that_is_not_there_is_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        utils.run_main(lambda: torch.empty(10**15))
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: out of memory (")
    with pytest.raises(RuntimeError, match="a bug"):
        utils.run_main(lambda: exec("raise RuntimeError('a bug')"))


# ---- weights ----


@pytest.mark.parametrize("name", ["smollm", "gemma", "gpt2", "qwen2"])
def test_models_with_tied_embeddings_are_complete(tmp_path, name):
    make_model(name, tmp_path / name)
    assert load_model(tmp_path / name).get_output_embeddings().weight.isfinite().all()


@pytest.mark.slow
def test_missing_tensors_are_refused_under_zero3_too(world):
    weights("base/model.safetensors", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))(world)
    flags = [*finetune_flags(world), "--deepspeed", "config/ds_z3_bf16.json", "--bf16"]
    done = script("finetune.py", *flags)
    assert done.returncode == 2 and "lack model.layers.1.mlp.up_proj.weight" in done.stderr, done.stderr[-2000:]
    assert not (world / "out").exists()
