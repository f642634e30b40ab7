"""LoRA adapters that somebody hands over: read, checked against their base, and merged into it by peft.

What peft leaves as it was drawn, or passes over, is refused here: tensors that the adapter lacks or has too many, and rows
of item tokens that neither side brings.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from convert.folder import ModelFolder, find_model
from convert.hub import reason
from convert.weights import Weights, all_finite
from utils import UserError

PREFIX = "base_model.model."
INITIAL = (True, False, "gaussian")  # others change the base's own weights
SETTINGS_OF = {  # of LoraConfig, what can be merged; the others must be empty or as they are by default
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save", "bias", "lora_bias"),
    *("use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "trainable_token_indices"),
    *("layers_to_transform", "layers_pattern", "init_lora_weights", "ensure_weight_tying"),
    *(
        "peft_type",
        "task_type",
        "inference_mode",
        "base_model_name_or_path",
        "revision",
        "peft_version",
        "auto_mapping",
    ),
}


def merge_adapter(model: PreTrainedModel, folder: Path, tokenizer: Any, base_vocab: Collection[str]) -> PreTrainedModel:
    """`model` with the adapter of `folder` merged into it, in the model's own type; `model` itself is used up.

    Args:
        model: the base; its vocabulary is grown as the adapter needs it.
        tokenizer: the adapter's.
        base_vocab: the tokens of the base's tokenizer; the rows of all others must come from the adapter.

    Raises:
        UserError: the adapter is damaged or of another kind or base, lacks tensors, or has some that nothing takes.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    found = find_model(folder)
    weights, config = Weights(found.path, found.allowed, ("adapter_model",)), read_lora_config(found)
    dtype, new_ids = model.dtype, _grow(model, tokenizer, weights, base_vocab)
    place = found.path / "adapter_config.json"
    try:
        peft_model = get_peft_model(model, config, low_cpu_mem_usage=True)
        wanted = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    except Exception as error:  # noqa: BLE001  (peft checks few of its settings, each in its own way)
        raise UserError(f"{place}: does not fit the base, or is damaged ({reason(error)})") from None
    state = _checked_tensors(weights, {name: tuple(tensor.shape) for name, tensor in wanted.items()}, peft_model)
    del wanted
    set_peft_model_state_dict(peft_model, state, low_cpu_mem_usage=True)
    merged = peft_model.merge_and_unload().to(dtype)
    for module in (merged.get_input_embeddings(), merged.get_output_embeddings()):
        bad = [number for number in new_ids if not module.weight[number].isfinite().all()]
        if bad:
            token = tokenizer.convert_ids_to_tokens(bad[0])
            raise UserError(
                f"{found.path}: brings no embedding for {token} and {len(bad) - 1} more tokens, which the base lacks; "
                "was it trained on another base?"
            )
    return merged


def read_lora_config(folder: ModelFolder) -> Any:
    """The LoraConfig of `adapter_config.json`.

    Raises:
        UserError: it is of another kind, of a variant that cannot be merged, or has values that cannot be.
    """
    from peft import LoraConfig

    place, settings = folder.path / "adapter_config.json", folder.json("adapter_config.json")
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{place}: peft_type is {settings.get('peft_type')!r}, only LORA can be merged")
    plain = LoraConfig()
    for key, value in settings.items():
        if value and key not in SETTINGS_OF and value != getattr(plain, key, None):
            raise UserError(f"{place}: {key} is not supported")
    for key in ("r", "lora_alpha"):
        value = settings.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**16:
            raise UserError(f"{place}: {key} is {value!r}, not a positive number")
    if settings.get("init_lora_weights", True) not in INITIAL:
        raise UserError(f"{place}: init_lora_weights is {settings['init_lora_weights']!r}, which is not supported")
    try:
        rows = settings.get("trainable_token_indices")
        config = LoraConfig(**{key: settings[key] for key in SETTINGS_OF & set(settings) - {"auto_mapping"}})
        config.trainable_token_indices = rows
    except Exception as error:  # noqa: BLE001  (peft checks few of its settings, each in its own way)
        raise UserError(f"{place}: {reason(error)}") from None
    config.inference_mode = True
    return config


def _grow(model: PreTrainedModel, tokenizer: Any, weights: Weights, base_vocab: Collection[str]) -> list[int]:
    """Give the model the rows that the adapter has, and make NaN of those that it must bring; their numbers."""
    ends = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    names = {id(module): f"{PREFIX}{name}.weight" for name, module in model.named_modules()}
    before = ends[0].weight.shape[0]
    stored = [weights.entries[names[id(end)]].shape for end in ends if names[id(end)] in weights]
    rows = max([len(tokenizer), *(shape[0] for shape in stored if shape)])
    if rows > before:
        model.resize_token_embeddings(rows, mean_resizing=False)
    new_ids = sorted(number for token, number in tokenizer.get_vocab().items() if token not in base_vocab)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight[new_ids] = float("nan")
            module.weight[before:] = float("nan")
    return sorted({*new_ids, *range(before, len(tokenizer))})


def _checked_tensors(weights: Weights, wanted: dict[str, tuple[int, ...]], peft_model: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors, which are all that `wanted` names, in its shapes, and nothing else.

    The embeddings themselves, which peft also saves where they were resized, are taken as well.
    """
    place = weights.folder
    base = {PREFIX + name.removeprefix(PREFIX): tuple(tensor.shape) for name, tensor in peft_model.state_dict().items()}
    names = {name.replace(".modules_to_save.", "."): name for name in weights if ".original_module." not in name}
    for name in wanted:
        if name not in names:
            raise UserError(f"{place}: lacks {name}, which its adapter_config.json promises")
    for name, stored in names.items():
        shape = wanted.get(name) or (
            base.get(name) if name.endswith((".embed_tokens.weight", ".lm_head.weight")) else None
        )
        if shape is None:
            raise UserError(f"{place}: has {name}, which its adapter_config.json or the base knows nothing of")
        if weights.entries[stored].shape != shape:
            raise UserError(
                f"{place}: {name} is {list(weights.entries[stored].shape)}, its adapter_config.json and the base make "
                f"it {list(shape)}"
            )
        if not all_finite(weights.read(stored)):
            raise UserError(f"{place}: {name} holds NaN or inf; the run diverged, take an earlier checkpoint")
    return {name: weights.read(stored) for name, stored in names.items()}
