"""Does an index mean something? How many more of an item's neighbours have its prefix than by chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from embeddings import Embeddings
from figures import index_keys

_NEIGHBOURS = 10
QUERIES = 1000


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


def neighbour_purity(codes: np.ndarray, embeddings: Embeddings, seed: int = 0) -> list[dict[str, Any]]:
    """For each depth but the last: the share of an item's 10 nearest neighbours that have its prefix, beside chance."""
    if len(codes) < 2:
        return []
    queries = np.sort(np.random.default_rng(seed).permutation(len(codes))[:QUERIES])
    neighbours = nearest_neighbours(embeddings, queries, min(_NEIGHBOURS, len(codes) - 1))
    rows = []
    for depth in range(1, max(2, codes.shape[1])):
        keys = index_keys(codes[:, :depth])
        share, chance = float((keys[neighbours] == keys[queries][:, None]).mean()), same_prefix_chance(keys)
        lift = round(share / chance, 2) if chance > 0 else None
        rows.append({"prefix_levels": depth, "share": round(share, 4), "chance": round(chance, 6), "lift": lift})
    return rows
