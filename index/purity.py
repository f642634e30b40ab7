"""Does an index mean something? How much more than by chance items under one prefix are alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from embeddings import Embeddings
from figures import index_keys

NEIGHBOURS = 10
QUERIES = 1000
PAIRS = 100_000


def nearest_neighbours(embeddings: Embeddings, queries: np.ndarray, count: int) -> np.ndarray:
    """The `count` most similar other items (cosine) of each of `queries`: int64 (queries, count)."""
    unit = torch.nn.functional.normalize
    (wanted,) = embeddings.batches([queries])
    wanted = unit(wanted)
    own = torch.from_numpy(queries).to(wanted.device)
    best = torch.full((len(queries), 0), 0.0, device=wanted.device)
    ids = torch.zeros(len(queries), 0, dtype=torch.int64, device=wanted.device)
    start = 0
    for x in embeddings.in_order(16_384):
        scores = wanted @ unit(x).t()
        here = torch.arange(start, start + len(x), device=wanted.device)
        scores[own[:, None] == here] = -2.0
        best, ids = torch.cat([best, scores], 1), torch.cat([ids, here.expand(len(queries), -1)], 1)
        best, places = best.topk(min(count, best.shape[1]), dim=1)
        ids = ids.gather(1, places)
        start += len(x)
    return ids.cpu().numpy()


def same_prefix_chance(keys: np.ndarray) -> float:
    """The probability that two different random items have the same prefix."""
    counts = np.unique(keys, return_counts=True)[1].astype(np.float64)
    return float((counts * (counts - 1)).sum() / (len(keys) * (len(keys) - 1)))


def pairs_under_prefix(keys: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """`count` random pairs of different items with equal key, every such pair as likely: (count, 2); none: (0, 2)."""
    order = np.argsort(keys, kind="stable")
    _, starts, counts = np.unique(keys[order], return_index=True, return_counts=True)
    weights = counts.astype(np.float64) * (counts - 1)
    if weights.sum() == 0:
        return np.empty((0, 2), dtype=np.int64)
    groups = rng.choice(len(counts), size=count, p=weights / weights.sum())
    first = rng.integers(counts[groups])
    second = rng.integers(counts[groups] - 1)
    second = second + (second >= first)
    return order[np.stack([starts[groups] + first, starts[groups] + second], axis=1)]


def neighbour_purity(codes: np.ndarray, embeddings: Embeddings, seed: int = 0) -> list[dict[str, Any]]:
    """For each depth but the last: the share of an item's 10 nearest neighbours that have its prefix, beside chance."""
    if len(codes) < 2:
        return []
    queries = np.sort(np.random.default_rng(seed).permutation(len(codes))[:QUERIES])
    neighbours = nearest_neighbours(embeddings, queries, min(NEIGHBOURS, len(codes) - 1))
    rows = []
    for depth in range(1, max(2, codes.shape[1])):
        keys = index_keys(codes[:, :depth])
        share = float((keys[neighbours] == keys[queries][:, None]).mean())
        rows.append(_beside_chance(depth, share, same_prefix_chance(keys)))
    return rows


def label_purity(codes: np.ndarray, labels: Sequence[frozenset[str]], seed: int = 0) -> list[dict[str, Any]]:
    """For each depth but the last: the share of pairs under one prefix with a label in common, beside random pairs.

    Only items with labels take part.
    """
    labelled = np.array([item for item, own in enumerate(labels) if own], dtype=np.int64)
    if len(labelled) < 2:
        return []
    rng = np.random.default_rng(seed)

    def share(pairs: np.ndarray) -> float:
        return float(np.mean([not labels[labelled[a]].isdisjoint(labels[labelled[b]]) for a, b in pairs.tolist()]))

    chance = share(pairs_under_prefix(np.zeros(len(labelled), dtype=np.int64), rng, PAIRS))
    rows = []
    for depth in range(1, max(2, codes.shape[1])):
        pairs = pairs_under_prefix(index_keys(codes[labelled, :depth]), rng, PAIRS)
        if len(pairs):
            rows.append(_beside_chance(depth, share(pairs), chance))
    return rows


def _beside_chance(depth: int, share: float, chance: float) -> dict[str, Any]:
    lift = round(share / chance, 2) if chance > 0 else None
    return {"prefix_levels": depth, "share": round(share, 4), "chance": round(chance, 6), "lift": lift}
