"""Merge a LoRA adapter into its base model: W + (alpha / r) B A, and the retrained embeddings whole.

    python convert/merge_lora.py --adapter-path ./ckpt/Games-lora --target-model-path ./ckpt/Games-merged
    … --base-model-path llama-7b         # if the base is not where the adapter's settings say

The result is a plain model that `test.py` reads without `--lora`. It is written tensor by tensor; adapters trained on
a 4-bit base are merged into the base in full precision.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the root instead of this folder, whose names would shadow others
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402

from convert.folder import (  # noqa: E402
    TOKENIZER_FILES,
    ModelFolder,
    add_target,
    check_item_tokens,
    copy_files,
    embedding_names,
    find_model,
    load_config,
    new_folder,
    skeleton,
    write_settings,
)
from convert.weights import (  # noqa: E402
    DTYPES,
    InputHashes,
    Weights,
    all_finite,
    is_old_buffer,
    row_blocks,
    write_weights,
)
from utils import UserError, run_main, say, versions, write_json  # noqa: E402

PREFIX = "base_model.model."
UNSUPPORTED = (
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
)


@dataclass
class Adapter:
    """A LoRA adapter: the tensor it changes → names of its factors, and the tensors it replaces."""

    weights: Weights
    settings: dict[str, Any]
    factors: dict[str, tuple[str, str]]
    whole: dict[str, str]

    def scale(self, name: str) -> float:
        """alpha / r (rank-stabilised: alpha / √r) of the module of tensor `name`, its own patterns first."""
        module = name.removesuffix(".weight")
        rank = _pattern(self.settings.get("rank_pattern"), module, self.settings["r"])
        alpha = _pattern(self.settings.get("alpha_pattern"), module, self.settings["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)


def _pattern(patterns: dict[str, float] | None, module: str, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def read_adapter(folder: ModelFolder) -> Adapter:
    """The adapter of a folder with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).

    Raises:
        UserError: not a LoRA adapter, a variant that is not supported, or names that do not fit together.
    """
    place = folder.path / "adapter_config.json"
    settings = folder.json("adapter_config.json")
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{place}: peft_type is {settings.get('peft_type')!r}, only LORA can be merged")
    used = next((key for key in UNSUPPORTED if settings.get(key)), None)
    if used:
        raise UserError(f"{place}: {used} is not supported here; merge it with peft's merge_and_unload")
    for key in ("r", "lora_alpha"):
        if not isinstance(settings.get(key), int | float) or settings[key] <= 0:
            raise UserError(f"{place}: {key} is {settings.get(key)!r}, not a positive number")
    weights = Weights(folder.path, folder.allowed, ("adapter_model",))
    adapter = Adapter(weights, settings, {}, {})
    for name in weights:
        plain = name.removeprefix(PREFIX)
        if plain.endswith(".lora_A.weight"):
            other = name.replace(".lora_A.", ".lora_B.")
            if other not in weights:
                raise UserError(f"{folder.path}: has {name} but not {other}")
            adapter.factors[plain.replace(".lora_A.weight", ".weight")] = (name, other)
        elif ".original_module." in plain:
            continue  # peft saves the untrained layer too when it saves resized embeddings
        elif ".lora_" not in plain:
            adapter.whole[plain.replace(".modules_to_save", "")] = name
        elif not plain.endswith(".lora_B.weight"):
            raise UserError(f"{folder.path}: {name} is not supported here; merge it with peft's merge_and_unload")
    if not adapter.factors and not adapter.whole:
        raise UserError(f"{folder.path}: its adapter file holds no tensors")
    return adapter


def check_adapter(adapter: Adapter, base: Weights, ties: dict[str, str], grown: tuple[str, str | None]) -> None:
    """Refuse an adapter that does not fit the base.

    Raises:
        UserError: it changes a tensor that the base lacks, or in another shape.
    """
    place = adapter.weights.folder
    for name, (first, second) in adapter.factors.items():
        if name not in base:
            raise UserError(f"{base.folder}: lacks {name}, which the adapter changes; it belongs to another base")
        shape = (adapter.weights.entries[second].shape[0], adapter.weights.entries[first].shape[1])
        if base.entries[name].shape != shape:
            raise UserError(f"{name}: {list(base.entries[name].shape)} in the base, {list(shape)} in {place}")
    for name, stored in adapter.whole.items():
        source = base.entries.get(name) or base.entries.get(ties.get(name, ""))
        shape = adapter.weights.entries[stored].shape
        if source is None:
            raise UserError(f"{base.folder}: lacks {name}, which the adapter replaces; it belongs to another base")
        if source.shape != shape and not (
            name in grown and source.shape[1:] == shape[1:] and shape[0] > source.shape[0]
        ):
            raise UserError(f"{name}: {list(source.shape)} in the base, {list(shape)} in {place}")


def lora_blocks(name: str, adapter: Adapter, base: Weights, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Blocks of rows of the merged tensor `name`: the product is taken in float32, then rounded to `dtype` once."""
    if name in adapter.whole:
        blocks = adapter.weights.blocks(adapter.whole[name])
    elif name in adapter.factors:
        blocks = _added(name, adapter, base)
    else:
        blocks = base.blocks(name)
    for block in blocks:
        result = block.to(dtype) if block.is_floating_point() else block
        if result.is_floating_point() and not all_finite(result):
            raise UserError(f"{name}: NaN or inf in {str(dtype).removeprefix('torch.')}; check the adapter, or --dtype")
        yield result


def _added(name: str, adapter: Adapter, base: Weights) -> Iterator[torch.Tensor]:
    first, second = (adapter.weights.read(part).float() for part in adapter.factors[name])
    scale = adapter.scale(name)
    for (start, stop), block in zip(row_blocks(base.entries[name].shape), base.blocks(name), strict=True):
        yield block.float() + scale * (second[start:stop] @ first)


def merge_lora(
    base: ModelFolder,
    source: ModelFolder,
    target: Path,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    overwrite: bool,
) -> dict[str, Any]:
    """Write the base with the adapter merged into it to `target`; the report, as in `merge_report.json`."""
    adapter, weights, config = read_adapter(source), base.weights(), load_config(base)
    embedding, head = embedding_names(config)
    ties = skeleton(config)[1]
    check_adapter(adapter, weights, ties, (embedding, head))
    base_rows = weights.entries[embedding].shape[0]
    rows = adapter.weights.entries[adapter.whole[embedding]].shape[0] if embedding in adapter.whole else base_rows
    tokens = check_item_tokens(source, base, rows, base_rows)
    config.vocab_size = rows
    if any(_is_untied(adapter, alias, name) for alias, name in ties.items()):
        config.tie_word_embeddings = False
        weights.entries |= {alias: weights.entries[name] for alias, name in ties.items() if alias not in weights}
    wanted, ties = skeleton(config)
    dtype = dtype or weights.entries[embedding].dtype
    names = [name for name in wanted if name not in ties]
    for name in names:
        side, stored = (adapter.weights, adapter.whole[name]) if name in adapter.whole else (weights, name)
        if stored not in side or side.entries[stored].shape != wanted[name]:
            raise UserError(f"{side.folder}: lacks {name} in the shape {list(wanted[name])} that the merged model has")
    with new_folder(target, overwrite) as partial, InputHashes(base=weights, adapter=adapter.weights) as inputs:
        copy_files(source, partial, (*TOKENIZER_FILES, "generation_config.json", "run.json"))
        specs = {name: (wanted[name], dtype) for name in names}
        outputs = write_weights(
            partial, specs, lambda name: lora_blocks(name, adapter, weights, dtype), max_shard_bytes
        )
        report = _report(adapter, weights, specs, {**inputs.result(), "target": outputs}, tokens)
        write_json(partial / "merge_report.json", report)
        config.dtype = dtype
        write_settings(partial, config.to_diff_dict())
    return report


def _is_untied(adapter: Adapter, alias: str, name: str) -> bool:
    """True if the adapter trained the two tied tensors of a base apart."""
    whole = adapter.whole
    if alias in whole and name in whole:
        pairs = zip(*(adapter.weights.blocks(whole[key]) for key in (alias, name)), strict=True)
        return not all(torch.equal(one, other) for one, other in pairs)
    if name in whole:
        return not adapter.settings.get("ensure_weight_tying")
    return alias in whole


def _report(
    adapter: Adapter, base: Weights, specs: dict[str, tuple[tuple[int, ...], torch.dtype]], hashes: dict, tokens: int
) -> dict[str, Any]:
    done = {
        name: "replaced" if name in adapter.whole else "summed" if name in adapter.factors else "copied"
        for name in specs
    }
    tensors = {
        name: {"done": done[name], "shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
        for name, (shape, dtype) in specs.items()
    }
    dropped = [name for name in base if is_old_buffer(name)]
    return {
        "base": str(base.folder),
        "adapter": str(adapter.weights.folder),
        "item_tokens": tokens,
        "dropped": dropped,
        "tensors": tensors,
        "sha256": hashes,
        "versions": versions("torch", "transformers", "peft", "safetensors"),
    }


def main(argv: list[str] | None = None) -> None:
    """Merge one adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter-path", required=True, help="adapter: folder or hub id")
    add_target(parser, "--target-model-path")
    parser.add_argument("--base-model-path", help="base model: folder or hub id (default: what the adapter names)")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the result (default: the base's)")
    args = parser.parse_args(argv)
    adapter = find_model(args.adapter_path)
    named = args.base_model_path or adapter.json("adapter_config.json").get("base_model_name_or_path")
    if not named:
        raise UserError(f"{adapter.path}: does not name its base; give --base-model-path")
    dtype = DTYPES[args.dtype] if args.dtype else None
    target = args.target_model_path
    report = merge_lora(find_model(named), adapter, target, dtype, args.max_shard_size, args.overwrite)
    done = [entry["done"] for entry in report["tensors"].values()]
    say(
        f"{target}: {done.count('summed')} tensors changed, {done.count('replaced')} replaced, "
        f"{done.count('copied')} copied; {report['item_tokens']} item tokens"
    )


if __name__ == "__main__":
    run_main(main)
