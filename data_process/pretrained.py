"""Load a pretrained model and its tokenizer from a folder or the hub, without ever running code that came with them."""

from __future__ import annotations

from typing import Any

from convert.hub import local_or_hub
from reading import check_model_folder, faults_said, load_model
from utils import UserError


def load_pretrained(name: str, flag: str, model_class: Any, device: Any, dtype: str) -> tuple[Any, Any]:
    """Tokenizer and model (evaluation mode, on `device`).

    Args:
        name: a folder or hub id.
        flag: the option that it came from, for messages.
        model_class: `AutoModel` or another class with `from_pretrained`.
        dtype: of the weights: float32, bfloat16, float16.

    Raises:
        UserError: nothing loadable there, or it needs code of its own (`auto_map`).
    """
    import torch
    from transformers import AutoTokenizer, PreTrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    path = local_or_hub(name, flag)
    try:
        check_model_folder(path)
        with faults_said(path, "model"):
            settings = {
                "config.json": PreTrainedConfig.get_config_dict(path)[0],
                "tokenizer_config.json": get_tokenizer_config(path),
            }
            for file, content in settings.items():
                if "auto_map" in content:
                    raise UserError(
                        f"{name}: its {file} asks for code of its own (auto_map), which is not run; "
                        "use a model that transformers knows"
                    )
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = load_model(path, getattr(torch, dtype), model_class)
    except UserError as error:
        raise UserError(f"{flag} {error}") from None
    if tokenizer.pad_token is None:  # LLaMA and most decoders; the attention mask keeps padding out
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer, model.eval().to(device)
