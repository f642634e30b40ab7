"""Turn a checkpoint of a DeepSpeed run (ZeRO-1, 2 or 3, any number of ranks) into a plain model folder in float32.

    python convert/convert.py -s ./ckpt/Games/checkpoint-1000 -t ./ckpt/Games/final-checkpoint-1000

DeepSpeed's own consolidation puts the shards together; the result is checked and written tensor by tensor. A folder
without shards (a plain model) is copied with its weights in the type asked for. `convert.sh` does this for every
checkpoint of a run.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser
from convert.folder import (
    FLOATS,
    TOKENIZER_FILES,
    ModelFolder,
    add_target,
    check_names,
    copy_files,
    find_model,
    load_config,
    skeleton,
)
from convert.hub import reason
from convert.scan import check_checkpoint
from convert.weights import Specs, Weights, all_finite, is_old_buffer, write_weights
from folders import LOADERS, new_folder
from quiet import silence_libraries
from utils import UserError, is_plain_name, run_main, versions, write_json

COPIED = ("*.json", "train*")


def shard_folder(source: Path) -> Path | None:
    """The `global_stepN` folder of a DeepSpeed checkpoint; None for a plain model folder."""
    latest = source / "latest"
    if not latest.is_file():
        if any(source.glob("global_step*")):
            raise UserError(
                f"{source}: has shards but no `latest`; it is still being saved, or was cut off while saving"
            )
        return None
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not is_plain_name(tag):
        raise UserError(f"{latest}: names {tag!r}, which is not a folder beside it")
    if not (source / tag).is_dir():
        raise UserError(f"{latest}: names {tag}, which is not there; the checkpoint is incomplete")
    return source / tag


def consolidate(source: Path, trained_only: bool = False) -> dict[str, torch.Tensor]:
    """The float32 weights of a DeepSpeed checkpoint, as tensors or DeepSpeed's lazily gathered ones (`.contiguous()`).

    Args:
        source: checkpoint-N, with `latest` and the folder of shards that it names.
        trained_only: leave out frozen parameters.

    Raises:
        UserError: its pickles would import foreign code, or shards are missing or damaged.
    """
    check_checkpoint(source)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return get_fp32_state_dict_from_zero_checkpoint(
                str(source), shard_folder(source).name, exclude_frozen_parameters=trained_only, lazy_mode=True
            )
    except (ValueError, KeyError, RuntimeError, EOFError, OSError, NotImplementedError) as error:
        raise UserError(f"{source}: DeepSpeed cannot put its shards together ({reason(error)})") from None


Reader = Callable[[str], torch.Tensor]


def open_source(folder: ModelFolder, trained_only: bool = False) -> tuple[Specs, Reader]:
    """Names with (shape, type), and a reader of tensors, of a DeepSpeed checkpoint or a plain model folder."""
    if shard_folder(folder.path):
        state = consolidate(folder.path, trained_only)
        specs = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
        return specs, lambda name: state[name].contiguous()
    weights = folder.weights()
    return weights.specs(), weights.read


def checked(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` in `dtype` (floats only); refused are numbers that are not finite before or after."""
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    if not all_finite(cast):
        if all_finite(tensor):
            raise UserError(f"{name}: {tensor.abs().max():.3g} is too large for {dtype}; use --dtype bfloat16")
        raise UserError(f"{name}: holds NaN or inf; the run diverged, take an earlier checkpoint")
    return cast


def convert_model(source: ModelFolder, target: Path, dtype: torch.dtype, max_shard_bytes: int, overwrite: bool) -> int:
    """Write the model, or the LoRA adapter, of `source` to `target` in `dtype`; the number of tensors written."""
    with new_folder(target, overwrite, [source.path]) as partial:
        if source.has("adapter_config.json") and not source.has("config.json"):
            specs, read, settings = _adapter(source)
            stem, loader = "adapter_model", "adapter_config.json"
        else:
            specs, read, settings = _model(source, dtype)
            stem, loader = "model", "config.json"
        specs = {name: (shape, dtype if kind.is_floating_point else kind) for name, (shape, kind) in specs.items()}
        copy_run_files(source, partial)
        size = max_shard_bytes if stem == "model" else sys.maxsize  # peft reads one file only

        def make(name: str) -> torch.Tensor:
            return checked(f"{source.path}: {name}", read(name), dtype)

        digests = write_weights(partial, specs, make, size, stem)
        report = {"source": source.path.name, "dtype": str(dtype), "sha256": digests, "versions": versions()}
        write_json(partial / "convert_report.json", report)
        write_json(partial / loader, settings)
    return len(specs)


def copy_run_files(source: ModelFolder, target: Path) -> None:
    """Copy the run's JSON, `tokenizer*` and `train*` files of a checkpoint; what it lacks comes from the run's folder.

    Not the files that say how weights are stored: those are written anew.
    """
    run = ModelFolder(source.path.resolve().parent, source.allowed.parent)
    sides = [run, source] if re.fullmatch(r"checkpoint-\d+", source.path.resolve().name) else [source]
    for side in sides:
        copy_files(side, target, (*TOKENIZER_FILES, *COPIED))
        for path in (*target.glob("*.index.json"), *(target / name for name in LOADERS)):
            path.unlink(missing_ok=True)


def _model(source: ModelFolder, dtype: torch.dtype) -> tuple[Specs, Reader, dict[str, Any]]:
    config = load_config(source)
    specs, read = open_source(source)
    wanted, ties = skeleton(config)
    specs = {name: spec for name, spec in specs.items() if not is_old_buffer(name) and name not in ties}
    check_names(specs, wanted, ties, source.path)
    config.dtype = dtype
    return specs, read, config.to_diff_dict()


def _adapter(source: ModelFolder) -> tuple[Specs, Reader, dict[str, Any]]:
    """The trained parameters of a run with LoRA, under the names in which peft saves them."""
    settings = source.json("adapter_config.json")
    if not shard_folder(source.path):
        weights = Weights(source.path, source.allowed, ("adapter_model",))
        return weights.specs(), weights.read, settings
    state, read = open_source(source, trained_only=True)
    stored = {name.replace(".modules_to_save.default.", ".").replace(".default.", "."): name for name in state}
    if not any(".lora_" in name for name in stored):
        raise UserError(f"{source.path}: has an adapter_config.json, but its shards hold no LoRA weights")
    return {name: state[full] for name, full in stored.items()}, lambda name: read(stored[name]), settings


def main(argv: list[str] | None = None) -> None:
    """Convert one checkpoint."""
    parser = make_parser(__doc__)
    parser.add_argument("-s", "--source", required=True, help="checkpoint folder (checkpoint-N) or model folder")
    add_target(parser, "-t", "--target")
    parser.add_argument("--dtype", choices=FLOATS, default="float32", help="type of the weights")
    args = parser.parse_args(argv)
    silence_libraries()
    source, dtype = find_model(args.source), getattr(torch, args.dtype)
    count = convert_model(source, args.target, dtype, args.max_shard_size, args.overwrite)
    print(f"{args.target}: {count} tensors in {args.dtype}")


if __name__ == "__main__":
    run_main(main)
