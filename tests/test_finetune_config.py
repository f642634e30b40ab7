"""The DeepSpeed configurations, and what finetune.py does with flags before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import finetune
from run_folder import RunRecord
from utils import UserError

CONFIG = Path(__file__).resolve().parent.parent / "config"
NAMES = sorted(path.name for path in CONFIG.glob("ds_*.json"))


def filled(name: str) -> dict:
    """The configuration as the trainer fills it in."""
    config = json.loads((CONFIG / name).read_text())
    values = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 2}
    config |= values | {"gradient_clipping": 1.0}
    for precision in ("fp16", "bf16"):
        if precision in config:
            config[precision]["enabled"] = True
    for key, value in config["zero_optimization"].items():
        if value == "auto":
            config["zero_optimization"][key] = 10**6
    return config


def test_all_variants_are_there():
    wanted = {f"ds_{z}_{p}{end}.json" for z in ("z2", "z3") for p in ("bf16", "fp16") for end in ("", "_offload")}
    assert set(NAMES) == wanted | {f"ds_z3_{p}_save16bit.json" for p in ("bf16", "fp16")}


@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_itself_accepts_the_configuration(name):
    from deepspeed.runtime.config import DeepSpeedConfig

    class TwoProcesses:
        world_size = property(lambda self: 2)

    config = filled(name)
    config["train_batch_size"] = 16  # one process here
    parsed = DeepSpeedConfig(config)
    assert parsed.zero_optimization_stage == (3 if "z3" in name else 2)
    assert parsed.zero_config.gather_16bit_weights_on_model_save == ("save16bit" in name)
    offload = parsed.zero_config.offload_optimizer
    assert (offload is not None and offload.device == "cpu") == ("offload" in name)
    if "fp16" in name:
        scale = parsed.float16_config
        assert (scale.enabled, scale.loss_scale, scale.initial_scale_power) == (True, 0, 16)
        assert (scale.loss_scale_window, scale.hysteresis, scale.min_loss_scale) == (1000, 2, 1)
    else:
        assert parsed.bfloat16_config.enabled and not parsed.float16_config.enabled


@pytest.mark.parametrize("name", NAMES)
def test_what_the_command_line_decides_is_auto(name):
    config = json.loads((CONFIG / name).read_text())
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert config[key] == "auto"
    assert config["fp16" if "fp16" in name else "bf16"]["enabled"] == "auto"
    assert "optimizer" not in config and "scheduler" not in config
    assert config["zero_force_ds_cpu_optimizer"] is False
    if "z3" in name:
        zero = config["zero_optimization"]
        assert zero["overlap_comm"] and zero["contiguous_gradients"] and zero["sub_group_size"] == 10**9
        assert zero["stage3_max_live_parameters"] == zero["stage3_max_reuse_distance"] == 10**9


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fp16", "--bf16"], "exclude each other"),
        (["--deepspeed", "nowhere.json"], "--deepspeed nowhere.json: no such file"),
        (["--load_in_4bit"], "add --lora"),
        (["--load_in_4bit", "--lora"], "ZeRO-3 cannot part quantised weights; use --deepspeed none or a ds_z2 file"),
        (["--train_new_rows_only"], "add --lora"),
        (["--init_item_tokens", "nowhere.npy"], "--init_item_tokens nowhere.npy: no such file"),
        (["--swap_items", "0.1", "--init_item_tokens", "words"], "needs item embeddings: --swap_by"),
        (["--swap_by", "finetune.py"], "--swap_by does nothing without --swap_items"),
        (["--swap_items", "0.1", "--swap_by", "nowhere.npy"], "--swap_by nowhere.npy: no such file"),
        (["--select_by", "ndcg@10"], "needs --eval_ranking"),
        (["--tasks", "seqrec,nonsense"], "unknown task 'nonsense'"),
        (["--tasks", "seqrec", "--train_prompt_sample_num", "1,1"], "--train_prompt_sample_num has 2 numbers"),
    ],
)
def test_wrong_flags_are_one_sentence(flags, message):
    with pytest.raises(UserError, match=message):
        finetune.parse(["--deepspeed", str(CONFIG / "ds_z3_bf16.json"), *flags])


def test_numbers_that_are_not_given_are_recorded_as_those_of_the_tasks():
    args = finetune.parse(["--deepspeed", "none", "--tasks", "seqrec,fusionseqrec"])
    assert (args.train_prompt_sample_num, args.train_data_sample_num) == ("1,1", "0,100000")


def facts(**changes: object) -> RunRecord:
    return RunRecord(
        **{
            "argv": ["finetune.py"],
            "arguments": {"epochs": 4, "learning_rate": 1e-3, "logging_step": 10},
            "processes": 2,
            "base_model": "abc",
            "samples": {},
            "files": {"item": {"path": "x.item.json", "sha256": "1"}},
            "versions": {},
        }
        | changes
    )


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (facts(arguments={"epochs": 5}), "--epochs is 5, but the run to go on with had 4"),
        (facts(processes=4), "4 processes, but"),
        (facts(base_model="other", arguments={"base_model": "y"}), "--base_model y is not the model"),
        (facts(files={"item": {"path": "x.item.json", "sha256": "2"}}), "x.item.json has changed"),
        (facts(files={}), "only one of the two runs uses item"),
    ],
)
def test_what_changed_is_named(new, message):
    with pytest.raises(UserError, match=message):
        facts().check_same(new, Path("run.json"))


def test_what_may_change_passes():
    new = facts(arguments={"epochs": 4, "learning_rate": 1e-3, "logging_step": 1, "output_dir": "y"})
    facts().check_same(new, Path("r"))


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    import shutil

    import folders

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(UserError, match="the disk is too full: checkpoint-8 needs about 0.00 GB"):
        folders.check_space(tmp_path, 10, "checkpoint-8 needs")
    folder = tmp_path / ".checkpoint-8.partial"
    folder.mkdir()
    older = tmp_path / "checkpoint-4"
    older.mkdir()
    with pytest.raises(UserError, match="what was there before is untouched"), folders.disk_full_is_said(folder):
        raise OSError(28, "No space left on device")
    assert older.is_dir() and not folder.exists()


def test_only_whole_checkpoints_count(tmp_path):
    from utils import checkpoints

    for name in ("checkpoint-20", "checkpoint-100", "checkpoint-3", ".checkpoint-200.partial", "checkpoint-x"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-3":
            (tmp_path / name / "trainer_state.json").write_text("{}")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-100"]
