"""convert.py on DeepSpeed shards made by hand from known weights: any number of ranks, both stages, float16 runs too.

The shards are laid out as DeepSpeed's optimizers lay them out; the oracle is the state dict they were cut from.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from convert_parts import ITEM_TOKENS, VOCABULARY, save_model, save_tokenizer, tiny_llama
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from convert import convert, convert_fp16
from utils import UserError

ROWS = VOCABULARY + len(ITEM_TOKENS)


def write_run(folder: Path, model, stage: int, ranks: int, prefix: str = "") -> dict[str, torch.Tensor]:
    """A checkpoint-N of a float16 run with `ranks` processes; the float32 weights in it."""
    save_model(model, folder)
    (folder / "model.safetensors").unlink()
    save_tokenizer(folder, ITEM_TOKENS)
    (folder / "trainer_state.json").write_text("{}")
    shards = folder / "global_step7"
    shards.mkdir()
    (folder / "latest").write_text("global_step7")
    state = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    shapes = {name: tensor.shape for name, tensor in state.items()}
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if model.config.tie_word_embeddings else {}
    for rank in range(ranks):
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        half = {key: tensor.half() for key, tensor in state.items()} if stage == 2 else {}
        content = {"module": half, "buffer_names": [], "param_shapes": [shapes], "shared_params": tied}
        torch.save(content | {"frozen_param_shapes": None, "ds_version": "0.19.8"}, shards / name)
        flat = partition_3(state, rank, ranks) if stage == 3 else partition_2(state, rank, ranks)
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        optimizer = {"zero_stage": ZeroStageEnum(stage), "partition_count": ranks, key: [flat]}
        optimizer["loss_scaler"] = DynamicLossScaler(2**16, 1000, 1, 2, False, dtype=torch.float16)
        torch.save(
            {"optimizer_state_dict": optimizer, "ds_version": "0.19.8"},
            shards / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
    return state


def partition_2(state: dict[str, torch.Tensor], rank: int, ranks: int) -> torch.Tensor:
    """ZeRO-2: all parameters in a row, padded to a multiple of 2 × ranks, then cut."""
    flat = torch.cat([tensor.flatten() for tensor in state.values()])
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % (2 * ranks)))
    return flat.chunk(ranks)[rank].clone()


def partition_3(state: dict[str, torch.Tensor], rank: int, ranks: int) -> torch.Tensor:
    """ZeRO-3: every parameter padded to a multiple of the ranks and cut, the pieces in a row."""
    pieces = []
    for tensor in state.values():
        size = math.ceil(tensor.numel() / ranks)
        padded = torch.nn.functional.pad(tensor.flatten(), (0, size * ranks - tensor.numel()))
        pieces.append(padded[rank * size : (rank + 1) * size])
    return torch.cat(pieces)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("ranks", [1, 3, 8])
@pytest.mark.parametrize("stage", [2, 3])
def test_the_weights_come_back_bit_for_bit(tmp_path, stage, ranks, tied):
    model = tiny_llama(ROWS, tied)
    state = write_run(tmp_path / "checkpoint-7", model, stage, ranks)
    convert.main(["-s", f"{tmp_path}/checkpoint-7", "-t", f"{tmp_path}/final", "--max_shard_size", "60KB"])
    assert len(list((tmp_path / "final").glob("model-*.safetensors"))) > 1
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert converted.dtype == torch.float32
    assert all(torch.equal(converted.get_parameter(name), tensor) for name, tensor in state.items())
    ids = torch.arange(40)[None]
    assert torch.equal(converted(ids).logits, model(ids).logits)


def test_float16_copy(tmp_path):
    model = tiny_llama(ROWS)
    save_model(model, tmp_path / "model", "safetensors-sharded", torch.float32)
    save_tokenizer(tmp_path / "model", ITEM_TOKENS)
    convert_fp16.main(["--in-checkpoint", f"{tmp_path}/model", "--out-checkpoint", f"{tmp_path}/half"])
    assert (tmp_path / "half/added_tokens.json").is_file()
    converted = load_file(tmp_path / "half/model.safetensors")
    assert all(torch.equal(converted[name], tensor.half()) for name, tensor in model.state_dict().items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.float16


def test_a_number_too_large_for_float16_is_refused(tmp_path):
    model = tiny_llama(ROWS)
    with torch.no_grad():
        model.model.norm.weight[3] = 70_000
    save_model(model, tmp_path / "model", dtype=torch.float32)
    with pytest.raises(UserError, match="model.norm.weight: 7e.04 is too large for .*float16"):
        convert_fp16.main(["--in-checkpoint", f"{tmp_path}/model", "--out-checkpoint", f"{tmp_path}/half"])
    assert not (tmp_path / "half").exists()


def lost_rank(checkpoint: Path) -> None:
    (checkpoint / "global_step7/zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()


def lost_shards(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "global_step7")


def cut_shard(checkpoint: Path) -> None:
    path = checkpoint / "global_step7/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_latest(checkpoint: Path) -> None:
    (checkpoint / "latest").unlink()


def other_model(checkpoint: Path) -> None:
    tiny_llama(ROWS + 1).config.save_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lost_rank, r"cannot put its shards together \(Expected 3 of '\*_optim_states.pt'"),
        (lost_shards, "names global_step7, which is not there"),
        (no_latest, "still being saved, or was cut off"),
        (cut_shard, "rank_1_mp_rank_00_optim_states.pt"),
        (other_model, r"is \[316, 32\], config.json makes it \[317, 32\]"),
    ],
    ids=["rank lost", "shards lost", "no latest", "shard cut", "other config"],
)
def test_incomplete_checkpoints_are_refused(tmp_path, spoil, message):
    write_run(tmp_path / "checkpoint-7", tiny_llama(ROWS), 3, 3)
    spoil(tmp_path / "checkpoint-7")
    with pytest.raises(UserError, match=message):
        convert.main(["-s", f"{tmp_path}/checkpoint-7", "-t", f"{tmp_path}/final"])
    assert not (tmp_path / "final").exists()


def test_files_of_the_run_come_along(tmp_path):
    run = tmp_path / "ckpt"
    write_run(run / "checkpoint-7", tiny_llama(ROWS), 3, 2)
    (run / "run.json").write_text('{"dataset": "Games"}')
    (run / "train_log.txt").write_text("log")
    (run / "model.safetensors.index.json").write_text("{}")
    convert.main(["-s", f"{run}/checkpoint-7", "-t", f"{run}/final-checkpoint-7"])
    names = {path.name for path in (run / "final-checkpoint-7").iterdir()}
    assert {"run.json", "train_log.txt", "trainer_state.json", "tokenizer.model", "config.json"} <= names
    assert "model.safetensors.index.json" not in names
