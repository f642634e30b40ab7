"""Merge a LoRA adapter into its base model: W + (alpha / r) B A, and the retrained embeddings, or rows of them, whole.

    python convert/merge_lora.py --adapter-path ./ckpt/Games-lora --target-model-path ./ckpt/Games-merged
    … --base-model-path llama-7b         # if the base is not where the adapter's settings say

The result is a plain model that `test.py` reads without `--lora`. peft merges, in float32 and in memory (4 bytes a
parameter); adapters trained on a 4-bit base are merged into the base in full precision.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from adapters import PREFIX
from arguments import make_parser
from convert.folder import (
    FLOATS,
    RUN_FILES,
    TOKENIZER_FILES,
    ModelFolder,
    add_target,
    check_item_tokens,
    check_names,
    copy_files,
    embedding_names,
    find_model,
    load_config,
    read_tokenizer,
    skeleton,
)
from convert.weights import Weights, all_finite, is_old_buffer
from folders import new_folder
from quiet import silence_libraries
from utils import UserError, run_main, say, versions, write_json


def merge_lora(
    base: ModelFolder,
    adapter: ModelFolder,
    target: Path,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    overwrite: bool,
) -> dict[str, Any]:
    """Write the base with the adapter merged into it to `target`; the report, as in `merge_report.json`.

    Args:
        dtype: of the result; None for that of the base's embeddings.
    """
    from modeling import load_adapter_model

    with new_folder(target, overwrite, [base.path, adapter.path]) as partial:
        weights, config = base.weights(), load_config(base)
        stored = Weights(adapter.path, adapter.allowed, ("adapter_model",))
        check_names(weights.specs(), *skeleton(config), base.path, may_convert=True)
        embedding = weights.entries.get(embedding_names(config)[0])
        model = load_adapter_model(adapter.path, str(base.path), read_tokenizer(adapter), torch.float32)
        rows = model.get_input_embeddings().weight.shape[0]
        tokens = check_item_tokens(adapter, base, rows, embedding.shape[0] if embedding else rows)
        dtype = dtype or (embedding.dtype if embedding else torch.float32)
        model.to(dtype)
        kind = str(dtype).removeprefix("torch.")
        for name, tensor in model.named_parameters():
            if not all_finite(tensor):
                raise UserError(f"{name}: NaN or inf in {kind}; check the adapter, or --dtype")
        copy_files(adapter, partial, (*TOKENIZER_FILES, *RUN_FILES))
        model.config.dtype = dtype
        model.save_pretrained(partial, max_shard_size=max_shard_bytes)
        written = Weights(partial)
        report = {
            "base": str(base.path),
            "adapter": str(adapter.path),
            "item_tokens": tokens,
            "dropped": [name for name in weights if is_old_buffer(name)],
            "tensors": {
                name: {"done": _what_was_done(name, stored), "shape": list(entry.shape), "dtype": kind}
                for name, entry in written.entries.items()
            },
            "sha256": {"base": weights.sha256(), "adapter": stored.sha256(), "target": written.sha256()},
            "versions": versions("torch", "transformers", "peft", "safetensors"),
        }
        write_json(partial / "merge_report.json", report)
    return report


def _what_was_done(name: str, adapter: Weights) -> str:
    """`replaced`, `rows replaced`, `summed` or `copied`."""
    module = PREFIX + name.removesuffix("weight")
    own = [part.removeprefix(module) for part in adapter if part.startswith(module)]
    if any(part.endswith("weight") and ".lora_" not in f".{part}" for part in own):
        return "replaced"
    if any("trainable_tokens" in part for part in own):
        return "rows replaced"
    return "summed" if own else "copied"


def main(argv: list[str] | None = None) -> None:
    """Merge one adapter."""
    parser = make_parser(__doc__)
    parser.add_argument("--adapter-path", required=True, help="adapter: folder or hub id")
    add_target(parser, "--target-model-path")
    parser.add_argument("--base-model-path", help="base model: folder or hub id; if absent, what the adapter names")
    parser.add_argument("--dtype", choices=FLOATS, help="type of the result; if absent, the base's")
    args = parser.parse_args(argv)
    silence_libraries()
    adapter = find_model(args.adapter_path)
    named = args.base_model_path or adapter.json("adapter_config.json").get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise UserError(f"{adapter.path}: does not name its base; give --base-model-path")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    target = args.target_model_path
    report = merge_lora(find_model(named), adapter, target, dtype, args.max_shard_size, args.overwrite)
    done = [entry["done"] for entry in report["tensors"].values()]
    say(
        f"{target}: {done.count('summed')} tensors changed, {sum('replaced' in word for word in done)} replaced, "
        f"{done.count('copied')} copied; {report['item_tokens']} item tokens"
    )


if __name__ == "__main__":
    run_main(main)
