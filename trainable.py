"""The model that trains: as a whole, or a LoRA adapter on frozen weights, which may be quantised."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from modeling import gathered
from reading import adapter_weights, fill_adapter, load_model
from regularise import add_dropout
from utils import UserError, first_line, is_main


@dataclass(frozen=True)
class LoraShape:
    """What a LoRA adapter is made of.

    Args:
        r, alpha, dropout: rank, scale (alpha / r), dropout before the adapter.
        target_modules: names of the modules that get an adapter.
        modules_to_save: names of the modules that train whole.
        new_rows: train these rows of embeddings and head alone, and `modules_to_save` not at all.
    """

    r: int
    alpha: int
    dropout: float
    target_modules: list[str]
    modules_to_save: list[str]
    new_rows: list[int] | None = None


def attach_lora(model: PreTrainedModel, shape: LoraShape, zero3_bf16: bool = False) -> Any:
    """`model` with a LoRA adapter (bias none)."""
    from peft import LoraConfig, TaskType, get_peft_model

    parts = {part for name, _ in model.named_modules() for part in name.split(".")}
    if unknown := [name for name in shape.modules_to_save if name.split(".")[-1] not in parts]:
        raise UserError(f"--lora_modules_to_save {unknown[0]}: the model has no such module")
    tied = model.config.get_text_config().tie_word_embeddings
    new_rows = shape.new_rows
    whole = list(shape.modules_to_save) if new_rows is None else []
    if tied:  # the head is the embedding: train it once
        whole = [name for name in whole if name != "lm_head"]
    rows = None
    if new_rows is not None:
        modules = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
        ends = [model.get_input_embeddings()] + ([] if tied else [model.get_output_embeddings()])
        rows = {modules[id(module)]: new_rows for module in ends}
    config = LoraConfig(
        r=shape.r,
        lora_alpha=shape.alpha,
        lora_dropout=shape.dropout,
        target_modules=shape.target_modules,
        modules_to_save=whole or None,
        trainable_token_indices=rows,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
        ensure_weight_tying=bool(tied and (whole or rows)),
    )
    try:
        return get_peft_model(model, config, autocast_adapter_dtype=not zero3_bf16)
    except ValueError as error:
        raise UserError(f"--lora_target_modules / --lora_modules_to_save: {first_line(error)}") from error


def load_adapter(model: Any, path: str | Path) -> None:
    """Give a PEFT model the weights of an adapter of the same shape (`adapter_model.safetensors`, or the older `.bin`).

    Every process must call this; partitions of ZeRO-3 are gathered.

    Raises:
        UserError: there is no adapter, or it has other parts or shapes.
    """
    weights = adapter_weights(path)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with gathered(*trained, writes=True):
        if is_main() or not any(hasattr(parameter, "ds_id") for parameter in trained):
            fill_adapter(model, weights, path)


def load_trainable(
    folder: Path,
    shape: LoraShape | None = None,
    adapter: Path | None = None,
    *,
    bits: int | None = None,
    compute_dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    dropout: float = 0.0,
    gradient_checkpointing: bool = True,
    zero3_bf16: bool = False,
) -> Any:
    """The model in `folder` in float32, ready to train.

    Args:
        shape: train such an adapter instead of all weights.
        adapter: begin with the weights of this one.
        bits: 4 or 8: the frozen weights quantised (bitsandbytes); they are multiplied in `compute_dtype`.
        attention: a registered attention function.
        dropout: `regularise.add_dropout`.
    """
    more: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    if bits:
        from transformers import BitsAndBytesConfig

        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=bits == 4,
            load_in_8bit=bits == 8,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    model = load_model(folder, torch.float32, **more)
    model.config.use_cache = False
    if dropout:
        add_dropout(model, dropout)
    if shape is None:
        return model
    if bits:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing)
    elif gradient_checkpointing:
        model.enable_input_require_grads()
    model = attach_lora(model, shape, zero3_bf16)
    if adapter is not None:
        load_adapter(model, adapter)
    return model


def parameter_report(model: Any, n_new: int) -> str:
    """How many parameters train, and whether the rows of the item tokens do. Works on ZeRO-3's partitions too."""

    def size(parameter: torch.nn.Parameter) -> int:
        return getattr(parameter, "ds_numel", parameter.numel())

    parameters = list(model.parameters())
    trained = sum(size(p) for p in parameters if p.requires_grad)
    total = sum(size(p) for p in parameters)
    rows = [
        name
        for name, module in (("embeddings", model.get_input_embeddings()), ("head", model.get_output_embeddings()))
        if any(p.requires_grad for p in module.parameters())
    ]
    where = " and ".join(rows)
    return f"{trained:,} of {total:,} parameters train ({trained / total:.1%}); " + (
        f"the {n_new} item-token rows train, in {where}" if rows else f"the {n_new} item-token rows do NOT train"
    )
