"""Load a base model or a checkpoint, add the item tokens, save: any causal LM of transformers.

The vocabulary grows before any ZeRO-3 context exists: `prepare_base` does it once, on the CPU, and writes a folder from which
every process then loads its part.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from adapters import merge_adapter
from convert.folder import find_model
from convert.hub import local_or_hub
from data import RecData
from item_rows import start_rows
from reading import ADAPTER, load_model
from tokenising import add_item_tokens, cut_as_in_2023, is_llamas, item_token_ids, load_tokenizer
from trie import ItemTrie
from utils import UserError, is_main, read_json, say

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def item_trie(tokenizer: Any, data: RecData, no_eos: bool = False) -> ItemTrie:
    """The items' indices as a tree of token ids, each ended by the end-of-sequence token unless `no_eos`.

    Raises:
        UserError: the tokenizer lacks item tokens, or, with `no_eos`, an index is the beginning of another.
    """
    rows = item_token_ids(tokenizer, data)
    try:
        return ItemTrie(rows, None if no_eos else tokenizer.eos_token_id)
    except ValueError as error:
        raise UserError(f"{data.files.get('index', data.name)}: {error}{' (--no_eos)' if no_eos else ''}") from error


def grow_vocabulary(
    model: PreTrainedModel,
    tokenizer: Any,
    new_ids: list[int],
    rows_of: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Give the model a row for every token, never taking one away, and initialise the rows of `new_ids`.

    Rows are drawn as the model draws embeddings: normal with `initializer_range`. Some models have more rows than their
    tokenizer has tokens; an item token that falls on such a spare row is drawn anew too.

    Args:
        rows_of: makes the rows instead, (len(new_ids), width), from embeddings or head (at least the tokens, width).
    """
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    matrices = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m}
    with torch.no_grad():
        for weight in matrices.values():
            if rows_of is None:
                rows = torch.empty(len(new_ids), weight.shape[1]).normal_(std=initializer_range(model))
            else:
                rows = rows_of(weight)
            weight[new_ids] = rows.to(weight)


def initializer_range(model: PreTrainedModel) -> float:
    """The standard deviation with which the model's configuration draws embeddings."""
    return getattr(model.config.get_text_config(), "initializer_range", 0.02)


def prepare_base(
    base_model: str,
    target: Path,
    tokens: list[str],
    seed: int,
    model_max_length: int = 2048,
    packing: bool = False,
    start: tuple[str, RecData] | None = None,
    tokenisation: str = "base",
) -> None:
    """Write to `target` the base model with the item tokens added, in the base's own dtype.

    The new rows depend on `seed` alone, or on `start`. Run this on one process, before any ZeRO-3 context.

    Args:
        start: what the new rows start from (`--init_item_tokens`: a file of item embeddings, or "words"), and the items.
        packing: make sure that the model keeps packed samples apart (`packing.check_packing`).
        tokenisation: "base", "2023" (`tokenising.cut_as_in_2023`), or "paper": 2023 where that is possible.
    """
    base_model = local_or_hub(base_model, "--base_model")
    tokenizer = load_tokenizer(base_model, model_max_length)
    model = load_model(base_model)
    new_ids = add_item_tokens(tokenizer, tokens)
    if tokenisation == "2023" or (tokenisation == "paper" and is_llamas(tokenizer)):
        tokenizer = cut_as_in_2023(tokenizer)
    torch.manual_seed(seed)
    rows_of = None
    if start is not None and new_ids:
        source, data = start
        width = model.get_input_embeddings().weight.shape[1]
        rows_of = start_rows(source, data, tokenizer, new_ids, width, initializer_range(model))
    grow_vocabulary(model, tokenizer, new_ids, rows_of)
    model.config.pad_token_id = tokenizer.pad_token_id
    if packing:
        from packing import check_packing

        check_packing(model)
    shutil.rmtree(target, ignore_errors=True)  # of a run that was killed; each run makes its own
    save_model(model, tokenizer, target)


def save_model(
    model: PreTrainedModel, tokenizer: Any, folder: Path, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Write model and tokenizer as a Hugging Face folder (safetensors).

    Args:
        state: the weights, if the model holds them in partitions.
    """
    # generate() would take sampling settings of the base model for its own; decoding here is beam search
    model.generation_config = type(model.generation_config).from_model_config(model.config)
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def find_checkpoint(ckpt_path: str, lora: bool = False) -> str:
    """The folder of a fine-tuned model, or with `lora` of an adapter; a hub id is downloaded.

    Raises:
        UserError: there is no such folder, or what it holds is something else.
    """
    ckpt_path = _checkpoint_folder(ckpt_path)
    if not lora and os.path.lexists(Path(ckpt_path) / ADAPTER) and not (Path(ckpt_path) / "config.json").is_file():
        raise UserError(f"{ckpt_path}: is a LoRA adapter; add --lora and --base_model")
    if lora and not os.path.lexists(Path(ckpt_path) / ADAPTER):
        raise UserError(f"{ckpt_path}: holds no LoRA adapter (no adapter_config.json); leave --lora out")
    return ckpt_path


def _checkpoint_folder(ckpt_path: str) -> str:
    if "/" not in ckpt_path and not Path(ckpt_path).is_dir():  # what is fine-tuned has an owner on the hub
        raise UserError(f"{ckpt_path}: no such folder (--ckpt_path)")
    ckpt_path = local_or_hub(ckpt_path, "--ckpt_path")
    if not Path(ckpt_path).is_dir():  # whole, so that what follows can tell a model from an adapter
        from convert.folder import download

        ckpt_path = download(ckpt_path)
    if not any(Path(ckpt_path).glob("*config.json")):
        raise UserError(f"{ckpt_path}: holds no model (no config.json)")
    return ckpt_path


def find_with_base(ckpt_path: str, lora: bool, base_model: str, given: frozenset[str]) -> tuple[str, bool, str]:
    """`find_checkpoint`, whether it is an adapter, and its base: the one that the adapter names if the user gave none.

    Args:
        given: the flags that the user gave (`arguments.parse_given`).
    """
    if "base_model" in given:
        return find_checkpoint(ckpt_path, lora), lora, base_model
    folder = Path(_checkpoint_folder(ckpt_path))
    if os.path.lexists(folder / ADAPTER) and (lora or not (folder / "config.json").is_file()):
        content = read_json(folder / ADAPTER)
        named = content.get("base_model_name_or_path") if isinstance(content, dict) else None
        with contextlib.suppress(UserError):  # the base is not there: refused as if it were not named
            if isinstance(named, str) and named and "\0" not in named:
                local_or_hub(named)
                say(f"note: --lora --base_model {named}, as {folder / ADAPTER} says")
                return str(folder), True, named
    return find_checkpoint(str(folder), lora), lora, base_model


def load_for_test(
    ckpt_path: str | Path,
    base_model: str | None = None,
    lora: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[PreTrainedModel, Any]:
    """A fine-tuned model in eval mode, and its tokenizer.

    Args:
        ckpt_path: the checkpoint's folder, or the adapter's with `lora` (`find_checkpoint`).
        base_model: the adapter's base.
        dtype: default bfloat16 on a GPU and float32 on the CPU.

    Raises:
        UserError: the folder has no model, or an adapter without a base.
    """
    device = torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    tokenizer = load_tokenizer(ckpt_path)
    if not lora:
        model = load_model(ckpt_path, dtype)
        if len(tokenizer) > (rows := model.get_input_embeddings().weight.shape[0]):
            raise UserError(f"{ckpt_path}: the tokenizer has {len(tokenizer)} tokens, the model {rows} rows for them")
        return model.to(device).eval(), tokenizer
    if base_model is None:
        raise UserError(f"{ckpt_path}: is an adapter; give its base with --base_model")
    return load_adapter_model(ckpt_path, base_model, tokenizer, dtype).to(device).eval(), tokenizer


def load_adapter_model(adapter: str | Path, base_model: str, tokenizer: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The base model in `dtype` with the adapter merged into it; `tokenizer` is the adapter's.

    Raises:
        UserError: see `adapters.merge_adapter`.
    """
    base_model = local_or_hub(base_model, "--base_model")
    return merge_adapter(load_model(base_model, dtype), find_model(base_model), find_model(adapter), tokenizer)


def full_state(model: Any, only_trained: bool = False) -> dict[str, torch.Tensor] | None:
    """The weights on the CPU of the main process (None elsewhere), gathered one by one where ZeRO-3 partitions them.

    Every process must call this.

    Args:
        only_trained: leave frozen parameters and buffers out.
    """
    state: dict[str, torch.Tensor] = {}
    tied = getattr(model, "_tied_weights_keys", None) or {}
    parameters = list(model.named_parameters(remove_duplicate=True)) + list(model.named_buffers())
    persistent = set(model.state_dict().keys())
    for name, tensor in parameters:
        if only_trained and not tensor.requires_grad:
            continue
        if name not in persistent or (name in tied and model.config.get_text_config().tie_word_embeddings):
            continue
        with gathered(tensor):
            if is_main():
                state[name] = tensor.detach().to("cpu", copy=True)
    return state if is_main() else None


def gathered(*tensors: torch.Tensor, writes: bool = False) -> contextlib.AbstractContextManager:
    """Whole tensors within the block where ZeRO-3 partitions them; with `writes` the main process's changes are kept."""
    partitioned = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not partitioned:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if writes else None)
