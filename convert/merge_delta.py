"""Rebuild a model from its base and a delta: where shapes agree target = base + delta, else the delta's tensor whole.

    python convert/merge_delta.py --base-model-path llama-7b --target-model-path ckpt/Games --delta-path Games-delta

Base and delta are folders or hub ids, `.bin` or safetensors, whole or in shards. The sum is taken in float16, as for
the released deltas (`--dtype` for others). Memory stays that of one file written (`--max-shard-size`), whatever the size
of the model. Everything is checked; the target folder appears only when it is complete.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser
from convert.folder import (
    FLOATS,
    RUN_FILES,
    ModelFolder,
    add_target,
    check_item_tokens,
    check_names,
    copy_files,
    embedding_names,
    find_model,
    load_config,
    skeleton,
)
from convert.old_tokenizer import save_old_tokenizer
from convert.weights import Specs, Weights, all_finite, is_old_buffer, write_weights
from folders import new_folder
from quiet import silence_libraries
from utils import UserError, run_main, say, versions, write_json

LEAST_COSINE = 0.1
SAME_MODEL = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@dataclass
class Plan:
    """What is done with every tensor of the target, decided and checked before anything is written."""

    config: Any
    dtype: torch.dtype
    base_of: dict[str, str | None]  # tensor → the base's tensor to add; None: copied whole from the delta
    shapes: dict[str, tuple[int, ...]]
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ties: dict[str, str] = field(default_factory=dict)  # alias → the tensor it is tied to
    embedding: str = ""


def plan_merge(base: ModelFolder, delta: ModelFolder, b: Weights, d: Weights, dtype: torch.dtype) -> Plan:
    """Compare the two sides and decide for every tensor.

    Raises:
        UserError: the delta belongs to another base, or names or shapes do not fit.
    """
    base_config = load_config(base)
    config = load_config(delta) if delta.has("config.json") else load_config(base)
    for key in SAME_MODEL:
        ours, theirs = getattr(base_config, key, None), getattr(config, key, None)
        if ours != theirs:
            raise UserError(f"{delta.path}: belongs to another base: its {key} is {theirs}, the base's {ours}")
    embedding, head = embedding_names(config)
    names = [name for name in d if not is_old_buffer(name)]
    dropped = sorted({name for side in (b, d) for name in side if is_old_buffer(name)})
    plan = Plan(config, dtype, {}, {name: d.entries[name].shape for name in names}, dropped, embedding=embedding)
    if embedding not in d:
        raise UserError(f"{delta.path}: lacks {embedding}")
    plan.config.vocab_size = d.entries[embedding].shape[0]
    wanted, plan.ties = skeleton(plan.config)
    for name in names:
        base_ties = {head: embedding} if base_config.tie_word_embeddings else {}
        source = name if name in b else plan.ties.get(name) or base_ties.get(name)
        if source not in b:
            raise UserError(f"{base.path}: lacks {name}, which {delta.path} has: they do not belong together")
        plan.base_of[name] = _same_or_grown(name, b.entries[source].shape, plan.shapes[name], (embedding, head), source)
    for name in b:
        if name not in d and not is_old_buffer(name) and name not in plan.ties:
            raise UserError(
                f"{delta.path}: lacks {name}, which the base has; it is incomplete or belongs to another base"
            )
    specs = {name: (shape, dtype) for name, shape in plan.shapes.items()}
    if not check_names(specs, wanted, plan.ties, delta.path, may_convert=True):
        plan.notes.append("the names are converted when the model is loaded, so they were not compared with its own")
    if dropped:
        plan.notes.append(f"{len(dropped)} buffers that models now compute were dropped ({dropped[0]} …)")
    return plan


def check_related(plan: Plan, b: Weights, d: Weights) -> None:
    """Where the delta holds the embedding whole, its old rows must resemble the base's.

    Two bases of one size (LLaMA and LLaMA-2) cannot be told apart by names and shapes, but their embeddings have
    nothing to do with each other, while fine-tuning moves them little.

    Raises:
        UserError: the cosine of the two is under `LEAST_COSINE`.
    """
    embedding = plan.embedding
    if plan.base_of.get(embedding) is not None:
        return
    ours, theirs = b.read(embedding), d.read(embedding)
    rows = min(len(ours), len(theirs))
    one, other = (side[:rows:8].float().flatten() for side in (ours, theirs))  # an eighth of the rows says as much
    products = torch.stack([one @ other, one @ one, other @ other]).double()
    cosine = float(products[0] / (products[1] * products[2]).sqrt().clamp(min=1e-30))
    if cosine < LEAST_COSINE:
        raise UserError(
            f"{d.folder}: belongs to another base: its embeddings do not resemble those of {b.folder} (cosine "
            f"{cosine:.2f}); add --any-base if you are sure"
        )


def _same_or_grown(
    name: str, base: tuple[int, ...], delta: tuple[int, ...], vocabulary: tuple[str, str | None], source: str
) -> str | None:
    """The base's tensor to add, or None where the vocabulary grew and the delta holds the tensor whole."""
    if base == delta:
        return source
    if name in vocabulary and base[1:] == delta[1:] and delta[0] > base[0]:
        return None
    raise UserError(f"{name}: {list(delta)} on the delta's side, {list(base)} in the base: they do not belong together")


def merged(name: str, plan: Plan, b: Weights, d: Weights) -> torch.Tensor:
    """The target's tensor `name` in `plan.dtype`.

    Raises:
        UserError: the sum, or one of its parts, is NaN or inf.
    """
    source, delta = plan.base_of[name], d.read(name)
    base = None if source is None else b.read(source)
    total = delta.to(plan.dtype) if base is None else base.to(plan.dtype) + delta.to(plan.dtype)
    if all_finite(total):
        return total
    for side, tensor in (("delta", delta), ("base", base)):
        if tensor is not None and not all_finite(tensor):
            raise UserError(f"{name}: the {side} holds NaN or inf; download it again")
    kind = str(plan.dtype).removeprefix("torch.")
    raise UserError(f"{name}: the sum overflows {kind}; use --dtype bfloat16 or float32")


def merge_delta(
    base: ModelFolder,
    delta: ModelFolder,
    target: Path,
    dtype: torch.dtype = torch.float16,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    any_base: bool = False,
) -> dict[str, Any]:
    """Write base + delta to the folder `target`; the report, as in `merge_report.json`."""
    b, d = base.weights(), delta.weights()
    with new_folder(target, overwrite, [base.path, delta.path]) as partial:
        plan = plan_merge(base, delta, b, d, dtype)
        if not any_base:
            check_related(plan, b, d)
        rows = plan.config.vocab_size
        tokens = check_item_tokens(delta, base, rows, b.entries[plan.embedding].shape[0])
        specs = {name: (shape, dtype) for name, shape in plan.shapes.items() if name not in plan.ties}
        copy_files(delta, partial, RUN_FILES)
        plan.notes.append(save_old_tokenizer(delta, partial) or "tokenizer copied")
        outputs = write_weights(partial, specs, lambda name: merged(name, plan, b, d), max_shard_bytes)
        _check_ties(plan, b, d)
        hashes = {"base": b.sha256(), "delta": d.sha256(), "target": outputs}
        report = build_report(plan, specs, b, d, hashes, tokens)
        write_json(partial / "merge_report.json", report)
        plan.config.dtype = dtype
        write_json(partial / "config.json", plan.config.to_diff_dict())
    return report


def _check_ties(plan: Plan, b: Weights, d: Weights) -> None:
    """A tensor that config.json ties to another is not stored again; it must be equal to it."""
    for alias, source in plan.ties.items():
        if alias not in plan.shapes:
            continue
        if not torch.equal(merged(alias, plan, b, d), merged(source, plan, b, d)):
            raise UserError(f"{alias}: differs from {source}, to which config.json ties it (tie_word_embeddings)")
        plan.notes.append(f"{alias} equals {source} and is tied to it: stored once")


def build_report(
    plan: Plan, specs: Specs, b: Weights, d: Weights, hashes: dict[str, dict[str, str]], tokens: int
) -> dict[str, Any]:
    """What was done with each tensor, and the hashes of all weight files."""
    dtype = str(plan.dtype).removeprefix("torch.")
    tensors = {}
    for name, (shape, _) in specs.items():
        source = plan.base_of[name]
        tensors[name] = {
            "done": "copied whole" if source is None else "summed",
            "shape": list(shape),
            "dtype": dtype,
            "delta_dtype": str(d.entries[name].dtype).removeprefix("torch."),
        }
        if source is not None:
            tensors[name]["base_dtype"] = str(b.entries[source].dtype).removeprefix("torch.")
    return {
        "arithmetic": f"{dtype}(base) + {dtype}(delta) in {dtype}",
        "base": str(b.folder),
        "delta": str(d.folder),
        "item_tokens": tokens,
        "notes": plan.notes,
        "dropped": plan.dropped,
        "tensors": tensors,
        "sha256": hashes,
        "versions": versions("torch", "transformers", "safetensors"),
    }


def main(argv: list[str] | None = None) -> None:
    """Merge one delta."""
    parser = make_parser(__doc__)
    parser.add_argument("--base-model-path", required=True, help="base model: folder or hub id")
    add_target(parser, "--target-model-path")
    parser.add_argument("--delta-path", required=True, help="delta: folder or hub id")
    parser.add_argument("--dtype", choices=FLOATS, default="float16", help="arithmetic and result")
    parser.add_argument("--low-cpu-mem", action="store_true", help="for old commands: memory is always kept low")
    parser.add_argument("--any-base", action="store_true", help="skip the test that embeddings resemble the base's")
    args = parser.parse_args(argv)
    silence_libraries()
    base, delta = find_model(args.base_model_path), find_model(args.delta_path)
    target, dtype = args.target_model_path, getattr(torch, args.dtype)
    report = merge_delta(base, delta, target, dtype, args.max_shard_size, args.overwrite, args.any_base)
    done = [entry["done"] for entry in report["tensors"].values()]
    for note in report["notes"]:
        say(f"note: {note}")
    say(
        f"{target}: {done.count('summed')} tensors summed, {done.count('copied whole')} copied whole, "
        f"{report['item_tokens']} item tokens; see {target / 'merge_report.json'}"
    )


if __name__ == "__main__":
    run_main(main)
