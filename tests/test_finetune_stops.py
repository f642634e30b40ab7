"""Runs that must not go on, or must go on exactly as they were: no number, no label, a checkpoint without a part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from record_batches import record
from safetensors.torch import load_file
from tiny_models import make_model
from toy_data import write_drawn_dataset

import finetune
from resume import find_resume, missing_part
from utils import UserError


def flags(folder: Path, *more: str, out: str = "out") -> list[str]:
    own = ["--base_model", str(folder / "base"), "--output_dir", str(folder / out), "--dataset", "Toy"]
    own += ["--data_path", str(folder / "data"), "--deepspeed", "none", "--report_to", "none", "--only_train_response"]
    own += ["--per_device_batch_size", "4", "--gradient_accumulation_steps", "1", "--learning_rate", "1e-3"]
    own += ["--logging_step", "1", "--tasks", "seqrec", "--train_prompt_sample_num", "1", "--epochs", "2"]
    return [*own, "--train_data_sample_num", "16", "--valid_prompt_sample_num", "1", *more]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stops")
    make_model("llama", folder / "base")
    write_drawn_dataset(folder / "data")
    return folder


@pytest.fixture(scope="module")
def whole(world) -> Path:
    """Two epochs of 4 steps each, a checkpoint after each."""
    finetune.main(flags(world, out="whole"))
    return world / "whole"


def cut_off(whole: Path, target: Path) -> Path:
    """`whole` as it was when its last model was being written."""
    shutil.copytree(whole, target)
    for name in ("config.json", "model.safetensors"):
        (target / name).unlink()
    return target


def check_same_weights(one: Path, other: Path) -> None:
    weights, others = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert all(torch.equal(weights[key], others[key]) for key in weights)


# ---- what is no number ----


@pytest.mark.parametrize("packing", [[], ["--packing"]])
def test_training_stops_at_the_first_loss_that_is_no_number_and_keeps_what_was(world, tmp_path, packing):
    more = [*packing, "--save_and_eval_strategy", "steps", "--save_and_eval_steps", "1", "--warmup_ratio", "0"]
    with pytest.raises(UserError, match=r"^step \d+: the .* is (nan|inf), so that .* The last checkpoint is .*-\d+$"):
        finetune.main([*flags(world, "--learning_rate", "1e9", *more), "--output_dir", str(tmp_path / "out")])
    assert (tmp_path / "out/checkpoint-1/model.safetensors").is_file()
    assert not (tmp_path / "out/config.json").exists() and not list((tmp_path / "out").glob("*.safetensors"))


def test_a_base_with_a_weight_that_is_no_number_is_said_at_the_first_step(tmp_path):
    model = make_model("llama", tmp_path / "base")
    write_drawn_dataset(tmp_path / "data")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"^step 1: the loss is nan, .* There is no checkpoint yet$"):
        finetune.main(flags(tmp_path))
    assert not list((tmp_path / "out").glob("*.safetensors")) and not list((tmp_path / "out").glob("checkpoint*"))


def test_weights_that_the_last_step_spoiled_are_no_trained_model(world, tmp_path):
    args = finetune.parse(
        [*flags(world, "--max_steps", "1", "--save_and_eval_strategy", "steps"), "--output_dir", str(tmp_path)]
    )
    run = finetune.prepare(args)
    run.trainer.train()
    with torch.no_grad():
        run.model.lm_head.weight[3, 3] = torch.inf
    with pytest.raises(UserError, match=r"^lm_head.weight is not finite after the last step"):
        finetune.save_final(run)
    assert not (tmp_path / "config.json").exists()


# ---- what has no label ----


def test_a_length_that_cuts_every_label_is_refused_before_training(world, tmp_path):
    more = ["--output_dir", str(tmp_path / "out"), "--model_max_length", "40"]
    with pytest.raises(UserError, match=r"^--model_max_length 40 cuts seqrec before the response begins in each of 16"):
        finetune.main([*flags(world), *more])
    assert not (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize("average", ["batch", "token"])
@pytest.mark.parametrize("packing", [[], ["--packing"]], ids=["padded", "packed"])
def test_a_batch_without_a_label_weighs_nothing_and_is_counted(world, tmp_path, capsys, packing, average):
    more = ["--output_dir", str(tmp_path / "out"), "--loss_average", average, "--per_device_batch_size", "1", *packing]
    more += ["--save_and_eval_strategy", "steps", "--epochs", "1", "--max_his_len", "0"]
    run = finetune.prepare(finetune.parse([*flags(world), *more]))
    lengths = sorted(len(run.tokenizer(run.train_set[i]["prompt"])["input_ids"]) for i in range(16))
    shutil.rmtree(tmp_path / "out")
    more += ["--model_max_length", str((lengths[0] + lengths[-1]) // 2)]
    run = finetune.prepare(finetune.parse([*flags(world), *more]))
    batches = record(run)
    run.trainer.train()
    losses = [row["loss"] for row in run.trainer.state.log_history if "loss" in row]
    shown = [len(run.tokenizer(prompt)["input_ids"]) for ((prompt, _, _),) in batches]
    empty = [length >= run.args.model_max_length for length in shown]
    assert [loss == 0 for loss in losses] == empty and 0 < sum(empty) < 16
    assert f"leaves no label in {sum(empty)} of 16 of seqrec" in capsys.readouterr().out


# ---- going on ----


@pytest.mark.parametrize("more", [["--epochs", "0.4"], ["--max_steps", "6"], ["--lr_scheduler_type", "constant"]])
def test_a_run_cut_off_in_its_last_save_makes_no_further_step(world, tmp_path, more):
    constant = ["--lr_scheduler_type", "constant", *more]
    finetune.main([*flags(world, *constant), "--output_dir", str(tmp_path / "whole")])
    cut = cut_off(tmp_path / "whole", tmp_path / "cut")
    finetune.main([*flags(world, *constant), "--output_dir", str(cut), "--resume_from_checkpoint", "auto"])
    check_same_weights(tmp_path / "whole", cut)
    states = [max(out.glob("checkpoint-*/trainer_state.json")).read_text() for out in (tmp_path / "whole", cut)]
    assert json.loads(states[0])["global_step"] == json.loads(states[1])["global_step"]


def spoil(path: Path) -> None:
    """Half of the file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


SPOILED = {
    "optimizer.pt": (Path.unlink, "no optimizer.pt"),
    "scheduler.pt": (Path.unlink, "no scheduler.pt"),
    "rng_state.pth": (Path.unlink, "no rng_state.pth"),
    "model.safetensors": (Path.unlink, "no model.safetensors"),
    "cut optimizer.pt": (spoil, "optimizer.pt is cut off"),
    "cut model.safetensors": (spoil, "model.safetensors is missing or cut off"),
    "cut trainer_state.json": (spoil, "its trainer_state.json is broken"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_checkpoint_without_a_part_is_named_and_the_one_before_taken(whole, tmp_path, capsys, name):
    change, message = SPOILED[name]
    cut = cut_off(whole, tmp_path / "cut")
    assert missing_part(cut / "checkpoint-8") is None
    assert find_resume("auto", False, cut) == (cut / "checkpoint-8", None)
    capsys.readouterr()
    change(cut / "checkpoint-8" / name.removeprefix("cut "))
    assert find_resume("auto", False, cut) == (cut / "checkpoint-4", None)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"note: {cut / 'checkpoint-8'} is not complete ({message}); going back to the one before",
        f"resuming from {cut / 'checkpoint-4'}",
    ]
    with pytest.raises(UserError, match=f"checkpoint-8: is not complete .{message}"):
        find_resume(str(cut / "checkpoint-8"), False, cut)


def test_going_back_ends_with_the_weights_of_the_whole_run(world, whole, tmp_path):
    cut = cut_off(whole, tmp_path / "cut")
    (cut / "checkpoint-8" / "optimizer.pt").unlink()
    finetune.main([*flags(world), "--output_dir", str(cut), "--resume_from_checkpoint", "auto"])
    check_same_weights(whole, cut)
    assert missing_part(cut / "checkpoint-8") is None


def test_without_the_best_checkpoint_a_later_one_is_not_complete(whole, tmp_path):
    cut = cut_off(whole, tmp_path / "cut")
    path = cut / "checkpoint-8" / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"best_global_step": 4}))
    assert missing_part(cut / "checkpoint-8") is None
    (cut / "checkpoint-4" / "model.safetensors").unlink()
    assert missing_part(cut / "checkpoint-8") == "the best so far, checkpoint-4: no model.safetensors"
    assert find_resume("auto", False, cut) == (None, None)
