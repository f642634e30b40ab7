"""Texts to vectors with a language model: batches of like length, mean or last-token pooling of the last hidden states."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoModel

from data_process.pretrained import load_pretrained
from utils import UserError


def load_encoder(model_path: str, device: Any, dtype: str) -> tuple[Any, Any]:
    """Tokenizer and model (evaluation mode, on `device`) from a folder or hub id; of encoder-decoders the encoder.

    Raises:
        UserError: nothing loadable at `model_path`.
    """
    tokenizer, model = load_pretrained(model_path, "--model_path", AutoModel, device, dtype)
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer, model


def longest_input(model: Any, max_sent_len: int) -> int:
    """`max_sent_len` tokens, or as many as the model has positions for."""
    positions = getattr(model.config, "max_position_embeddings", None) or max_sent_len
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    if getattr(table, "padding_idx", None) is not None:  # RoBERTa and its kin count positions from there
        positions -= table.padding_idx + 1
    return min(max_sent_len, positions)


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Vectors of texts: float32 (texts, hidden).

    Args:
        hidden: last hidden states, (texts, tokens, hidden).
        mask: 1 on tokens, 0 on the padding to their right, (texts, tokens). A text without tokens gives zeros.
        pooling: "mean" of the tokens, or the "last" token.
    """
    hidden, mask = hidden.float(), mask.unsqueeze(-1).float()
    if pooling == "mean":
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)
    last = mask.sum(1, keepdim=True).long().clamp(min=1) - 1
    return hidden.gather(1, last.expand(-1, 1, hidden.shape[-1])).squeeze(1) * mask[:, 0]


@torch.inference_mode()
def encode(
    texts: list[str], tokenizer: Any, model: Any, *, max_len: int, batch_size: int, pooling: str = "mean"
) -> np.ndarray:
    """Vectors of `texts` in their order: float32, (len(texts), hidden). They are batched by their number of tokens.

    Raises:
        UserError: the model gives no hidden states.
    """
    ids = tokenizer(texts, truncation=True, max_length=max_len).input_ids
    order = sorted(range(len(texts)), key=lambda i: (-len(ids[i]), i))
    device, rows = next(model.parameters()).device, []
    for start in range(0, len(order), batch_size):
        batch = [ids[i] or [tokenizer.pad_token_id or 0] for i in order[start : start + batch_size]]
        lengths = torch.tensor([len(ids[i]) for i in order[start : start + batch_size]])
        width = max(map(len, batch))
        tokens = torch.full((len(batch), width), tokenizer.pad_token_id or 0)
        for row, numbers in zip(tokens, batch, strict=True):
            row[: len(numbers)] = torch.tensor(numbers)
        mask = (torch.arange(width) < lengths.unsqueeze(1)).long().to(device)
        output = model(input_ids=tokens.to(device), attention_mask=mask)
        if getattr(output, "last_hidden_state", None) is None:
            raise UserError(f"--model_path: a {type(model).__name__} gives no hidden states of texts")
        rows.append(pool(output.last_hidden_state, mask, pooling).cpu())
    vectors = torch.empty_like(joined := torch.cat(rows))
    vectors[torch.tensor(order)] = joined
    return vectors.numpy()
