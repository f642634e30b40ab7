"""finetune.py killed, resumed, refused, and on a disk that is full: the run ends as if nothing had happened, or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from finetune_world import command, inside, losses, make_world, run
from running import ROOT
from safetensors.torch import load_file

from utils import UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("finetune"))


THREE_EPOCHS = ("--deepspeed", "none", "--save_and_eval_strategy", "epoch", "--epochs", "3")


@pytest.fixture(scope="module")
def whole(world) -> Path:
    """The folder of a run of three epochs in one process, never interrupted: 24 steps."""
    inside(command(world, *THREE_EPOCHS, out="whole"))
    return world / "whole"


def check_equal_runs(one: Path, other: Path) -> None:
    """The same losses and, to the bit, the same weights."""
    last = max(one.glob("checkpoint-*"), key=lambda path: int(path.name[11:])).name
    assert losses(one / last) == losses(other / last)
    weights, others = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert all(torch.equal(weights[key], others[key]) for key in weights)


@pytest.mark.slow
def test_kill_minus_nine_then_resume_equals_the_run_without_interruption(world, whole, capsys):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = world / "cut" / "train.log"
    for step in (3, 12, 18):  # before the first checkpoint, and within each later epoch
        victim = subprocess.Popen(
            command(world, *THREE_EPOCHS, "--resume_from_checkpoint", "auto", out="cut"),
            env=env,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (log.is_file() and f"step {step}/" in log.read_text()):
            time.sleep(0.02)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        assert f"step {step}/" in log.read_text()
        assert not (world / "cut" / "config.json").exists(), "it was killed too late"
    inside(command(world, *THREE_EPOCHS, "--resume_from_checkpoint", "auto", out="cut"))
    text = capsys.readouterr().out
    assert "resuming from" in text and "checkpoint-16" in text
    check_equal_runs(whole, world / "cut")


KILLED_IN_A_SAVE = """
import os, pathlib, signal, sys
import finetune
rename, replace, move = pathlib.Path.rename, pathlib.Path.replace, sys.argv.pop(1)
def die(self, target):
    if str(self).endswith(move):
        os.kill(os.getpid(), signal.SIGKILL)
    return (rename if "checkpoint" in str(self) else replace)(self, target)
pathlib.Path.rename = pathlib.Path.replace = die
finetune.main(sys.argv[2:])
"""


@pytest.mark.slow
def test_a_save_that_is_killed_never_becomes_the_latest(world, whole, capsys):
    moves = (".checkpoint-16.partial", ".final/model.safetensors", ".final/config.json")
    for move, latest in zip(moves, ("checkpoint-8", "checkpoint-24", "checkpoint-24"), strict=True):
        flags = command(world, *THREE_EPOCHS, "--resume_from_checkpoint", "auto", out="saves")
        killed = subprocess.run(
            [sys.executable, "-c", KILLED_IN_A_SAVE, move, *flags[1:]],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            capture_output=True,
        )
        assert killed.returncode == -signal.SIGKILL
        assert (world / "saves" / move).exists()
        assert not (world / "saves" / "config.json").exists()
        found = max((world / "saves").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        assert found.name == latest
    inside(command(world, *THREE_EPOCHS, "--resume_from_checkpoint", "auto", out="saves"))
    assert "checkpoint-24" in capsys.readouterr().out
    assert not list((world / "saves").glob(".*"))
    check_equal_runs(whole, world / "saves")


@pytest.mark.slow
def test_changed_data_and_flags_are_refused_on_resume(world):
    flags = ["--deepspeed", "none", "--epochs", "1", "--tasks", "seqrec", "--train_prompt_sample_num", "1"]
    flags += ["--train_data_sample_num", "8"]
    inside(command(world, *flags, out="once"))
    again = [*flags, "--resume_from_checkpoint", "auto"]
    text = run(command(world, *again, "--max_his_len", "3", out="once"), status=2)
    assert "error: --max_his_len is 3, but the run to go on with had 20" in text and "Traceback" not in text
    items = world / "data" / "Toy" / "Toy.item.json"
    before = items.read_text()
    try:
        items.write_text(before.replace("made to last", "made to break"))
        with pytest.raises(UserError, match="Toy.item.json has changed since the run began"):
            inside(command(world, *again, out="once"))
    finally:
        items.write_text(before)
    with pytest.raises(UserError, match="holds a run already"):
        inside(command(world, *flags, out="once"))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MB: enough for a few of the toy's checkpoints."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(path)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)  # weights of it may still be mapped


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_destroys_nothing(world, small_disk, monkeypatch):
    import training

    flags = ["--deepspeed", "none", "--output_dir", str(small_disk), "--resume_from_checkpoint", "auto"]
    check, filler = training.check_space, small_disk / "filler"

    def fill(folder: Path, needed: int, what: str) -> None:
        """The disk fills up before the second checkpoint."""
        if what.startswith("checkpoint-16"):
            filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - needed // 4))

    def fill_and_check(*args: object) -> None:
        fill(*args)
        check(*args)

    cases = {"the disk is too full: checkpoint-16 needs": fill_and_check, "the disk is full; the checkpoint was": fill}
    for message, looks in cases.items():
        monkeypatch.setattr(training, "check_space", looks)
        with pytest.raises(UserError, match=message):
            inside(command(world, *flags))
        assert [path.name for path in training.checkpoints(small_disk)] == ["checkpoint-8"]
        assert not list(small_disk.glob(".checkpoint*"))
        load_file(small_disk / "checkpoint-8" / "model.safetensors")
        filler.unlink()
    monkeypatch.setattr(training, "check_space", check)
    inside(command(world, *flags))
    steps = [step for step, _ in losses(small_disk / "checkpoint-16")]
    assert steps == list(range(1, 17)) and (small_disk / "model.safetensors").is_file()
