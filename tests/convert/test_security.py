"""Handing over a checkpoint runs no code: a bomb in every place where a file is read, and what the user is told.

A bomb is a pickle that makes a folder when it is unpickled; each test ends by looking for that folder.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from convert_parts import (
    ITEM_TOKENS,
    ROOT,
    Bomb,
    delta_parts,
    half,
    run_script,
    save_bin,
    save_model,
    save_tokenizer,
    tiny_llama,
)

from convert import convert, make_delta, merge_delta, merge_lora, scan
from convert.scan import check_checkpoint, pickle_globals, scan_checkpoint, scan_file
from convert.weights import Weights
from utils import UserError

FORMS = ("zip", "legacy", "bare", "protocol 4")


def write_bomb(path: Path, witness: Path, form: str = "zip", content: dict | None = None) -> None:
    """`torch.save` of `content` with a bomb in it, in one of the `FORMS` that `torch.load` accepts."""
    bomb = (content or {}) | {"bomb": Bomb(witness)}
    if form == "zip":
        torch.save(bomb, path)
    elif form == "legacy":
        torch.save(bomb, path, _use_new_zipfile_serialization=False)
    elif form == "bare":
        path.write_bytes(pickle.dumps(bomb, protocol=2))
    else:
        torch.save(bomb, path, pickle_protocol=4)


@pytest.fixture
def witness(tmp_path):
    """The folder that a bomb would make; it must never be there at the end of a test."""
    path = tmp_path / "code-was-run"
    yield path
    assert not path.exists()


def test_the_bomb_works(tmp_path):
    """Otherwise nothing here proves anything."""
    for form in FORMS:
        write_bomb(tmp_path / "bomb.bin", tmp_path / "run", form)
        torch.load(tmp_path / "bomb.bin", weights_only=False) if form != "bare" else pickle.loads(
            (tmp_path / "bomb.bin").read_bytes()
        )
        (tmp_path / "run").rmdir()


# ---- weights: base, delta, adapter ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", ["base", "delta"])
def test_merge_delta(tmp_path, witness, side, form):
    delta_parts(tmp_path)
    for path in (tmp_path / side).glob("*model*"):
        if path.name != "tokenizer.model":
            path.unlink()
    write_bomb(tmp_path / side / "pytorch_model.bin", witness, form, half(tiny_llama()))
    words = ["--base-model-path", f"{tmp_path}/base", "--delta-path", f"{tmp_path}/delta"]
    with pytest.raises(UserError, match=rf"{side}/pytorch_model.bin: (holds more than tensors|not a readable)"):
        merge_delta.main([*words, "--target-model-path", f"{tmp_path}/target"])
    assert not (tmp_path / "target").exists()


def test_the_message_names_what_would_have_run(tmp_path, witness):
    write_bomb(tmp_path / "pytorch_model.bin", witness)
    with pytest.raises(UserError, match=r"holds more than tensors \((posix|os)\.mkdir\)"):
        Weights(tmp_path)


def test_make_delta_and_convert_fp16_read_the_same_way(tmp_path, witness):
    delta_parts(tmp_path)
    shutil.copytree(tmp_path / "delta", tmp_path / "tuned")
    for path in (tmp_path / "tuned").glob("pytorch_model*"):
        path.unlink()
    write_bomb(tmp_path / "tuned/pytorch_model.bin", witness)
    words = ["--base-model-path", f"{tmp_path}/base", "--target-model-path", f"{tmp_path}/tuned"]
    with pytest.raises(UserError, match="holds more than tensors"):
        make_delta.main([*words, "--delta-path", f"{tmp_path}/new"])
    with pytest.raises(UserError, match="holds more than tensors"):
        convert.main(["-s", f"{tmp_path}/tuned", "-t", f"{tmp_path}/new"])
    assert not (tmp_path / "new").exists()


def write_adapter(folder: Path, witness: Path) -> None:
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    write_bomb(folder / "adapter_model.bin", witness)


def test_merge_lora(tmp_path, witness):
    save_model(tiny_llama(), tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    save_tokenizer(tmp_path / "adapter", ITEM_TOKENS)
    write_adapter(tmp_path / "adapter", witness)
    words = ["--adapter-path", f"{tmp_path}/adapter", "--base-model-path", f"{tmp_path}/base"]
    with pytest.raises(UserError, match="adapter_model.bin: holds more than tensors"):
        merge_lora.main([*words, "--target-model-path", f"{tmp_path}/target"])


# ---- models and adapters that test.py reads ----


def test_a_model_for_testing(tmp_path, witness):
    from modeling import load_for_test

    save_model(tiny_llama(), tmp_path / "model", "bin")
    save_tokenizer(tmp_path / "model")
    write_bomb(tmp_path / "model/pytorch_model.bin", witness, content=half(tiny_llama()))
    with pytest.raises(UserError, match="code.*not run"):
        load_for_test(str(tmp_path / "model"))


def test_an_adapter_for_testing(tmp_path, witness):
    from modeling import load_for_test

    save_model(tiny_llama(), tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    save_tokenizer(tmp_path / "adapter", ITEM_TOKENS)
    write_adapter(tmp_path / "adapter", witness)
    with pytest.raises(UserError, match="could run code, so it was not read"):
        load_for_test(str(tmp_path / "adapter"), base_model=str(tmp_path / "base"), lora=True)


# ---- the RQ-VAE ----


@pytest.mark.slow
def test_rqvae_checkpoint(tmp_path, witness):
    content = {"args": argparse.Namespace(), "epoch": 1, "best_loss": 1.0, "state_dict": {}}
    write_bomb(tmp_path / "bomb.pth", witness, content=content)
    words = ["--ckpt_path", tmp_path / "bomb.pth", "--output_file", tmp_path / "x.index.json", "--device", "cpu"]
    result = run_script("index/generate_indices.py", *words)
    assert result.returncode == 2, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "bomb.pth: refused, it carries a foreign object" in last
    assert "Traceback" not in result.stderr


# ---- DeepSpeed shards and the trainer's files ----

SHARDS = {
    "optimizer state": "global_step2/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "model state": "global_step2/mp_rank_00_model_states.pt",
    "training arguments": "training_args.bin",
    "random state": "rng_state_0.pth",
    "scheduler": "scheduler.pt",
    "optimizer": "optimizer.pt",
    "any other name": "global_step2/notes.txt",
}


@pytest.fixture
def checkpoint(tmp_path):
    """The layout of a DeepSpeed checkpoint with harmless content."""
    folder = tmp_path / "ckpt/checkpoint-2"
    save_model(tiny_llama(), folder)
    (folder / "model.safetensors").unlink()
    (folder / "global_step2").mkdir()
    (folder / "latest").write_text("global_step2")
    for name in SHARDS.values():
        if not name.endswith(".txt"):
            torch.save({"step": torch.ones(2), "shape": torch.Size([2])}, folder / name)
    assert scan_checkpoint(folder) == {}
    return folder


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", SHARDS)
def test_checkpoint_is_scanned_before_deepspeed_or_the_trainer_unpickles(checkpoint, witness, place, form):
    write_bomb(checkpoint / SHARDS[place], witness, form)
    assert [path.name for path in scan_checkpoint(checkpoint)] == [Path(SHARDS[place]).name]
    with pytest.raises(UserError, match="would run foreign code when loaded.*nothing was run"):
        check_checkpoint(checkpoint)
    with pytest.raises(UserError, match=Path(SHARDS[place]).name):
        convert.main(["-s", str(checkpoint), "-t", str(checkpoint.parent / "final-checkpoint-2")])
    assert not (checkpoint.parent / "final-checkpoint-2").exists()


@pytest.mark.parametrize("place", ["optimizer state", "training arguments", "random state"])
def test_resuming_a_run(checkpoint, witness, place):
    from resume import find_resume

    state = {"global_step": 2, "best_global_step": None, "log_history": []}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    assert find_resume(str(checkpoint), False, checkpoint.parent)[0] == checkpoint
    write_bomb(checkpoint / SHARDS[place], witness)
    with pytest.raises(UserError, match="would run foreign code when loaded"):
        find_resume(str(checkpoint), False, checkpoint.parent)


def test_going_on_from_an_adapter(tmp_path, witness):
    from resume import find_resume
    from trainable import load_adapter

    write_adapter(tmp_path, witness)
    with pytest.raises(UserError, match="adapter_model.bin: would run foreign code when loaded"):
        find_resume(str(tmp_path), True, tmp_path / "run")
    with pytest.raises(UserError, match="carries code, which was not run"):
        load_adapter(None, tmp_path)
    torch.save({}, tmp_path / "adapter_model.bin")
    assert find_resume(str(tmp_path), True, tmp_path / "run") == (None, tmp_path)


@pytest.mark.slow
def test_convert_sh_goes_on_and_reports(checkpoint, witness):
    (checkpoint / "trainer_state.json").write_text("{}")
    write_bomb(checkpoint / SHARDS["optimizer state"], witness)
    result = run_script(
        "-c", f"import subprocess; subprocess.run(['bash', 'convert/convert.sh', {str(checkpoint.parent)!r}])"
    )
    assert "would run foreign code when loaded (posix.mkdir)" in result.stderr
    with pytest.raises(UserError, match="posix.mkdir"):
        scan.main([str(checkpoint)])


def test_an_archive_after_a_bare_pickle_does_not_hide_it(checkpoint, witness):
    """torch.load judges a file by its first bytes; a scanner that looks for a zip anywhere would see the wrong part."""
    path = checkpoint / SHARDS["scheduler"]
    innocent = path.read_bytes()
    path.write_bytes(pickle.dumps({"bomb": Bomb(witness)}, protocol=2) + innocent)
    assert zipfile.is_zipfile(path)
    assert scan_file(path) == ["<not a torch archive>"]


@pytest.mark.parametrize("left", [0, 3, 300])
def test_a_file_cut_short_is_not_called_foreign(checkpoint, left):
    os.truncate(checkpoint / SHARDS["optimizer"], left)
    with pytest.raises(UserError, match="optimizer.pt: cut short or damaged, not a whole file of torch.save"):
        check_checkpoint(checkpoint)


def test_foreign_code_is_said_before_what_is_damaged(checkpoint, witness):
    os.truncate(checkpoint / SHARDS["model state"], 3)
    write_bomb(checkpoint / SHARDS["scheduler"], witness)
    with pytest.raises(UserError, match="scheduler.pt: would run foreign code"):
        check_checkpoint(checkpoint)


def test_a_pipe_in_place_of_a_file_is_refused(checkpoint):
    (checkpoint / SHARDS["optimizer"]).unlink()
    os.mkfifo(checkpoint / SHARDS["optimizer"])
    with pytest.raises(UserError, match="optimizer.pt: not a regular file"):
        check_checkpoint(checkpoint)


def test_torchscript_and_hidden_opcodes_are_foreign(tmp_path, witness):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    assert scan_file(tmp_path / "script.pt") == ["<TorchScript>"]
    assert pickle_globals(pickle.dumps(Bomb(witness), protocol=4)) == {"<STACK_GLOBAL>"}
    assert pickle_globals(b"(S'ls'\nios\nsystem\n.") == {"<INST>"}
    assert pickle_globals(pickle.dumps(Bomb(witness), protocol=0)) == {"posix.mkdir"}


def test_allowed_names_are_only_those_needed():
    """`torch.load`, `getattr`, `eval` and the like would turn the list into a door."""
    from convert.scan import ALLOWED

    callables = {name for name in ALLOWED if name.split(".")[0] in ("builtins", "__builtin__", "os", "posix", "sys")}
    assert callables == {"builtins.set", "__builtin__.set"}
    assert not {"torch.load", "torch.jit.load", "torch.hub.load", "numpy.load", "copyreg._reconstructor"} & ALLOWED


def test_the_trainers_classes_are_allowed_in_its_own_file_only(tmp_path):
    from transformers import TrainingArguments

    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    for name, wanted in (("training_args.bin", 0), ("scheduler.pt", 1)):
        torch.save(arguments, tmp_path / name)
        assert ("transformers.training_args.TrainingArguments" in scan_file(tmp_path / name)) == bool(wanted)


def test_latest_cannot_point_out_of_the_checkpoint(checkpoint):
    outside = checkpoint.parent / "outside"
    shutil.move(checkpoint / "global_step2", outside)
    (checkpoint / "latest").write_text("../outside")
    assert scan_checkpoint(checkpoint) == {checkpoint / "latest": ["<a path out of the folder>"]}
    with pytest.raises(UserError, match="not a folder beside it"):
        convert.main(["-s", str(checkpoint), "-t", str(checkpoint.parent / "final")])
    (checkpoint / "latest").write_text("global_step2")
    (checkpoint / "global_step2").symlink_to(outside)
    with pytest.raises(UserError, match="a link out of the folder"):
        convert.main(["-s", str(checkpoint), "-t", str(checkpoint.parent / "final")])


@pytest.mark.slow
def test_the_script_that_a_checkpoint_brings_along_is_not_run(checkpoint, witness):
    """DeepSpeed copies zero_to_fp32.py into checkpoints; ours comes from the installed package."""
    for name in ("zero_to_fp32.py", "global_step2/torch.py", "deepspeed.py"):
        (checkpoint / name).write_text(f"import os; os.mkdir({str(witness)!r})")
    result = run_script(ROOT / "convert/convert.py", "-s", ".", "-t", "../final", cwd=checkpoint)
    assert result.returncode == 2
    assert "DeepSpeed cannot put its shards together" in result.stderr


# ---- paths ----


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/passwd", "a/../../secret.bin"])
def test_an_index_cannot_leave_its_folder(tmp_path, name):
    delta_parts(tmp_path)
    save_bin(half(tiny_llama()), tmp_path)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "secret.bin")
    index = tmp_path / "delta/pytorch_model.bin.index.json"
    weight_map = json.loads(index.read_text())["weight_map"] | {"model.norm.weight": name}
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="leaves the folder, refused"):
        Weights(tmp_path / "delta")


def test_links_out_of_a_folder_are_not_followed(tmp_path):
    delta_parts(tmp_path)
    shutil.move(tmp_path / "base/model.safetensors", tmp_path / "elsewhere.safetensors")
    (tmp_path / "base/model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    words = ["--base-model-path", f"{tmp_path}/base", "--delta-path", f"{tmp_path}/delta"]
    with pytest.raises(UserError, match="leads out of the folder, refused"):
        merge_delta.main([*words, "--target-model-path", f"{tmp_path}/target"])
    shutil.move(tmp_path / "elsewhere.safetensors", tmp_path / "base/real.safetensors")
    (tmp_path / "base/model.safetensors").unlink()
    (tmp_path / "base/model.safetensors").symlink_to("real.safetensors")
    merge_delta.main([*words, "--target-model-path", f"{tmp_path}/target"])
    shutil.move(tmp_path / "delta/tokenizer.model", tmp_path / "elsewhere.model")
    (tmp_path / "delta/tokenizer.model").symlink_to(tmp_path / "elsewhere.model")
    with pytest.raises(UserError, match="leads out of the folder, refused"):
        merge_delta.main([*words, "--target-model-path", f"{tmp_path}/other"])


# ---- code beside a model ----


def test_code_in_a_model_folder_is_not_run(tmp_path, witness):
    delta_parts(tmp_path)
    (tmp_path / "delta/evil.py").write_text(f"import os\nos.mkdir({str(witness)!r})\nclass C: pass\n")
    words = ["--base-model-path", f"{tmp_path}/base", "--delta-path", f"{tmp_path}/delta"]
    words += ["--target-model-path", f"{tmp_path}/target"]
    settings = json.loads((tmp_path / "delta/config.json").read_text())
    spoilt = settings | {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}}
    (tmp_path / "delta/config.json").write_text(json.dumps(spoilt))
    with pytest.raises(UserError, match="needs code of its own"):
        merge_delta.main(words)
    (tmp_path / "delta/config.json").write_text(json.dumps(settings))
    tokenizer = json.loads((tmp_path / "delta/tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "C", "auto_map": {"AutoTokenizer": ["evil.C", None]}}
    (tmp_path / "delta/tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="tokenizer"):
        merge_delta.main(words)
    assert "evil" not in sys.modules
