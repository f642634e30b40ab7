"""Item embeddings as the training uses them: where new tokens start, and which items are alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from reading import read_array
from utils import UserError

CHUNK = 1024  # items whose likeness to all others is held at once
NEIGHBOURS, SHARPNESS = 10, 10.0  # items that may stand for another, weighed by exp(sharpness * cosine)


def read_item_vectors(path: Path, n_items: int, flag: str = "--init_item_tokens") -> np.ndarray:
    """The embeddings in a `.npy` of (items, dim), centred and scaled to length 1: float32 (items, dim).

    Args:
        flag: who named the file, for errors.

    Raises:
        UserError: the file is no finite array with a row for each item.
    """
    try:
        vectors = read_array(path)
    except UserError as error:
        raise UserError(f"{flag} {error}") from None
    if vectors.ndim != 2 or len(vectors) != n_items or not vectors.shape[1] or not np.isfinite(vectors).all():
        raise UserError(
            f"{flag} {path}: shape {vectors.shape}; needed: a row of finite numbers for each of the {n_items} items"
        )
    vectors -= vectors.mean(axis=0)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)


def neighbours(vectors: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The items of `known` that are likest to each item, and their weights, exp(sharpness * cosine).

    Args:
        vectors: rows of length 1 (items, dim).
        known: items that may be found, ascending: int (n,).

    Returns:
        int (items, at most 10), the likest first and never the item itself, and the weights in the same shape.
    """
    nearest, weights, count = [], [], min(NEIGHBOURS, len(known) - 1)
    for start in range(0, len(vectors), CHUNK):
        likeness = vectors[start : start + CHUNK] @ vectors[known].T
        likeness[np.arange(start, start + len(likeness))[:, None] == known] = -np.inf
        places = np.argsort(-likeness, axis=1)[:, :count]
        nearest.append(known[places])
        weights.append(np.exp(SHARPNESS * np.take_along_axis(likeness, places, axis=1)))
    return np.concatenate(nearest), np.concatenate(weights)


class ItemSwap:
    """Puts items that are alike in each other's place now and then.

    A model that learns indices of two levels and up knows the pairs of codes that it has met; so it meets others, those of
    new items among them, where items like them occur.

    Args:
        vectors: rows of length 1 (items, dim), as `read_item_vectors` gives them.
        share: of the items that are replaced.
    """

    def __init__(self, vectors: np.ndarray, share: float):
        self.share = share
        self.nearest, weights = neighbours(vectors, np.arange(len(vectors)))
        self.ends = np.cumsum(weights, axis=1)

    def __call__(self, items: list[int], rng: np.random.Generator) -> list[int]:
        """`items`, a share of them replaced."""
        places = np.flatnonzero(rng.random(len(items)) < self.share)
        swapped, draws = list(items), rng.random(len(places))
        for place, draw in zip(places, draws, strict=True):
            ends = self.ends[items[place]]
            swapped[place] = int(self.nearest[items[place], np.searchsorted(ends, draw * ends[-1])])
        return swapped
