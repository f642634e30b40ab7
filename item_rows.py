"""Where the rows of new item tokens start: among the rows of the words of their items, or from item embeddings.

A pretrained model's rows are far from centred: those of SmolLM2-135M have a length of 3.2 and share a mean of length 2.2, which
alone lifts every logit by about 12 through the tied head. Rows drawn around 0 are unlike anything it knows (docs/results-llm.md).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import RecData
from item_vectors import read_item_vectors

WORDS = "words"  # `--init_item_tokens words`


def start_rows(
    source: str, data: RecData, tokenizer: Any, ids: list[int], width: int, spread: float
) -> Callable[[Tensor], Tensor]:
    """What makes the first rows of the tokens `ids` out of a matrix (tokens, `width`): embeddings, or an untied head.

    Args:
        source: "words", or a `.npy` of item embeddings, whose rows get the root mean square `spread`.
        ids: they follow those of the text tokens.
    """
    tokens = tokenizer.convert_ids_to_tokens(ids)
    if source == WORDS:
        return lambda weight: rows_from_words(weight[: min(ids)], tokenizer, data, tokens)
    rows = spread * rows_from_embeddings(Path(source), data, tokens, width)
    return lambda weight: rows


def rows_from_words(own: Tensor, tokenizer: Any, data: RecData, tokens: list[str]) -> Tensor:
    """A start for the rows of `tokens` among a language model's `own`: what its items' titles have in common, and its level.

    An item is the mean of its title's rows, less the mean over all items; a token is the mean over its items. As much again is a
    direction drawn for its level, so that one level can be told from the next: with it SmolLM2 knows which comes after 20 steps
    of 8 histories, without it not after 30. The sum lies as far from the mean of the model's own rows as they do (median).

    Args:
        own: the model's rows of text tokens, float (tokens, width).

    Returns:
        float32 (len(tokens), width).
    """
    own = own.detach().float()
    centre = own.mean(dim=0)
    texts = [title or description for title, description in zip(data.titles, data.descriptions, strict=True)]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    ids = [[i for i in row if i < len(own)] for row in ids]
    items = torch.stack([own[row].mean(dim=0) if row else centre for row in ids])
    names = _unit(_means_of_items(items - items.mean(dim=0), data, tokens))
    letters = [token.strip("<").partition("_")[0] for token in tokens]
    levels = {letter: torch.randn(own.shape[1]) for letter in sorted(set(letters))}
    level = _unit(torch.stack([levels[letter] for letter in letters]))
    return centre + (own - centre).norm(dim=1).median() * _unit(names + level)


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1; those of length 0 stay."""
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)


def rows_from_embeddings(path: Path, data: RecData, tokens: list[str], width: int) -> Tensor:
    """A start for the rows of `tokens`: what the embeddings of the items that have a token have in common.

    Embeddings are centred, scaled to length 1 and turned to their principal components; a token's row is the mean over its
    items. Components beyond `width` are left out, and where there are fewer the rest is 0.

    Args:
        path: a `.npy` of (items, dim), such as `<D>.emb-minilm-td.npy`.

    Returns:
        float32 (len(tokens), width), each row with root mean square 1.

    Raises:
        UserError: the file is no finite array with a row for each item.
    """
    vectors = read_item_vectors(path, len(data.titles))
    left, scale, _ = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    parts = torch.from_numpy((left * scale)[:, :width])
    items = torch.zeros(len(vectors), width)
    items[:, : parts.shape[1]] = parts
    rows = _means_of_items(items, data, tokens)
    return rows / rows.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-12)


def _means_of_items(items: Tensor, data: RecData, tokens: list[str]) -> Tensor:
    """The mean of the rows `items` over the items that have a token, for each of `tokens`; 0 where none has."""
    number = {token: place for place, token in enumerate(tokens)}
    pairs = [(number[token], item) for item, index in enumerate(data.indices) for token in index if token in number]
    places, owners = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    counts = torch.bincount(places, minlength=len(tokens)).clamp(min=1)
    return torch.zeros(len(tokens), items.shape[1]).index_add_(0, places, items[owners]) / counts[:, None]
