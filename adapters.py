"""LoRA adapters that somebody hands over: read, checked against their base, and merged into it by peft.

What peft leaves as it was drawn, or passes over, is refused here: tensors that the adapter lacks or has too many, and rows
of item tokens that neither side brings.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from convert.folder import TOKENIZERS, ModelFolder, read_tokenizer
from convert.hub import reason
from convert.weights import Weights, all_finite
from utils import UserError, time_limit

PREFIX = "base_model.model."
INITIAL = (True, False, "gaussian")  # others change the base's own weights
# of LoraConfig, what can be merged; the others must be empty or as they are by default
SETTINGS_OF = frozenset(
    (
        "r lora_alpha lora_dropout target_modules exclude_modules modules_to_save bias lora_bias use_rslora use_dora "
        "fan_in_fan_out rank_pattern alpha_pattern trainable_token_indices layers_to_transform layers_pattern "
        "init_lora_weights ensure_weight_tying peft_type task_type inference_mode base_model_name_or_path revision "
        "peft_version auto_mapping"
    ).split()
)


def merge_adapter(model: PreTrainedModel, base: ModelFolder, adapter: ModelFolder, tokenizer: Any) -> PreTrainedModel:
    """The model of `base` with `adapter` merged into it, in the model's own type; `model` itself is used up.

    Args:
        model: loaded from `base`; its vocabulary is grown as the adapter needs it.
        tokenizer: the adapter's. The rows of tokens that the base's does not know must come from the adapter.

    Raises:
        UserError: the adapter is damaged or of another kind or base, lacks tensors, or has some that nothing takes.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    weights, config = Weights(adapter.path, adapter.allowed, ("adapter_model",)), read_lora_config(adapter)
    vocab = tokenizer.get_vocab()
    known = read_tokenizer(base).get_vocab() if any(base.has(name) for name in TOKENIZERS) else vocab
    lacking = {number for token, number in vocab.items() if token not in known}
    dtype, new_ids, ends = model.dtype, *_grow(model, weights, len(tokenizer), lacking)
    place = adapter.path / "adapter_config.json"
    try:
        with time_limit(f"{place}: its patterns of modules take for ever to look for"):
            peft_model = get_peft_model(model, config, low_cpu_mem_usage=True)
            wanted = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  (peft checks few of its settings, each in its own way)
        raise UserError(f"{place}: does not fit the base, or is damaged ({reason(error)})") from None
    also = {name: tensor for name, tensor in peft_model.state_dict().items() if name in ends}
    state = _checked_tensors(weights, _shapes(wanted), _shapes(also))
    del wanted, also
    set_peft_model_state_dict(peft_model, state, low_cpu_mem_usage=True)
    merged = peft_model.merge_and_unload().to(dtype)
    for weight in _embeddings(merged):
        bad = [number for number in new_ids if not weight[number].isfinite().all()]
        if bad:
            token = tokenizer.convert_ids_to_tokens(bad[0])
            raise UserError(
                f"{adapter.path}: brings no embedding for {token} and {len(bad) - 1} more tokens, which the base lacks; "
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
        config = LoraConfig(**{key: settings[key] for key in SETTINGS_OF & set(settings) - {"auto_mapping"}})
    except Exception as error:  # noqa: BLE001  (peft checks few of its settings, each in its own way)
        raise UserError(f"{place}: {reason(error)}") from None
    config.inference_mode = True
    return config


def _embeddings(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """The weights of the input embedding and of the output layer, (tokens, width) each; the same one twice if tied."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [module.weight for module in ends if module is not None]


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _grow(model: PreTrainedModel, weights: Weights, tokens: int, lacking: set[int]) -> tuple[list[int], set[str]]:
    """Give the model a row for each of `tokens`, and make NaN of those that the adapter must bring: new and `lacking` ones.

    Returns:
        The numbers of these rows, and the names under which peft may save the embeddings themselves.
    """
    ids = {id(weight) for weight in _embeddings(model)}
    names = {name.removesuffix("weight") for name, weight in model.named_parameters() if id(weight) in ids}
    saved = {f"{PREFIX}{name}{ending}" for name in names for ending in ("weight", "base_layer.weight")}
    before = model.get_input_embeddings().weight.shape[0]
    stored = [weights.entries[name].shape for name in saved if name in weights]
    rows = max([tokens, *(shape[0] for shape in stored if shape)])
    if rows > before:
        model.resize_token_embeddings(rows, mean_resizing=False)
    new_ids = sorted(lacking | set(range(before, tokens)))
    with torch.no_grad():
        for weight in _embeddings(model):
            weight[new_ids] = float("nan")
    return new_ids, saved


def _checked_tensors(
    weights: Weights, wanted: dict[str, tuple[int, ...]], also: dict[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """The adapter's tensors, in their shapes: all that are `wanted`, some of `also` (name → shape), and nothing else."""
    place = weights.folder
    names = {name.replace(".modules_to_save.", "."): name for name in weights if ".original_module." not in name}
    for name in wanted:
        if name not in names:
            raise UserError(f"{place}: lacks {name}, which its adapter_config.json promises")
    for name, stored in names.items():
        found, shape = weights.entries[stored].shape, wanted.get(name, also.get(name))
        if shape is None:
            raise UserError(f"{place}: has {name}, which its adapter_config.json or the base knows nothing of")
        if found != shape:
            raise UserError(
                f"{place}: {name} is {list(found)}, its adapter_config.json and the base make it {list(shape)}"
            )
        if not all_finite(weights.read(stored)):
            raise UserError(f"{place}: {name} holds NaN or inf; the run diverged, take an earlier checkpoint")
    return {name: weights.read(stored) for name, stored in names.items()}
