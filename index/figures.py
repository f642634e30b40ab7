"""Figures of an index: how many items share one, how evenly the codes of each level are used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def index_keys(codes: np.ndarray) -> np.ndarray:
    """One int64 for each row of `codes` (items, levels), equal for equal rows and ordered like them."""
    keys = codes[:, 0].astype(np.int64)
    for level in range(1, codes.shape[1]):
        width = int(codes[:, level].max()) + 1
        if int(keys.max()) >= (2**62) // width:  # long indices: number the prefixes that occur
            keys = np.unique(keys, return_inverse=True)[1].astype(np.int64)
        keys = keys * width + codes[:, level]
    return keys


def collision_groups(codes: np.ndarray) -> list[np.ndarray]:
    """The items (ascending ids) of each index that more than one item has, in order of their first item."""
    keys = index_keys(codes)
    order = np.argsort(keys, kind="stable")
    _, starts, counts = np.unique(keys[order], return_index=True, return_counts=True)
    groups = [order[start : start + count] for start, count in zip(starts, counts, strict=True) if count > 1]
    return sorted(groups, key=lambda group: int(group[0]))


def collision_rate(codes: np.ndarray) -> float:
    """1 - distinct indices / items."""
    return 1.0 - len(np.unique(index_keys(codes))) / len(codes)


def level_usage(codes: np.ndarray, size: int) -> dict[str, Any]:
    """How a level's `size` codes are used by `codes` (items,).

    Returns:
        `codes`, `used`, `entropy_bits`, `max_entropy_bits` (all codes alike), `perplexity` (2^entropy), `largest_share`.
    """
    counts = np.bincount(codes, minlength=size)
    shares = counts[counts > 0] / counts.sum()
    entropy = float(-(shares * np.log2(shares)).sum()) + 0.0
    return {
        "codes": size,
        "used": len(shares),
        "entropy_bits": round(entropy, 4),
        "max_entropy_bits": round(float(np.log2(size)), 4),
        "perplexity": round(2**entropy, 2),
        "largest_share": round(float(shares.max()), 6),
    }


def index_figures(codes: np.ndarray, sizes: Sequence[int]) -> dict[str, Any]:
    """Figures of a whole index: `codes` (items, levels) with `sizes` codes on each level."""
    counts = np.unique(index_keys(codes), return_counts=True)[1]
    shared = counts[counts > 1]
    return {
        "items": len(codes),
        "distinct_indices": len(counts),
        "collision_rate": round(1.0 - len(counts) / len(codes), 6),
        "collision_groups": len(shared),
        "colliding_items": int(shared.sum()),
        "largest_group": int(counts.max()),
        "levels": [level_usage(codes[:, level], size) for level, size in enumerate(sizes)],
    }


def figures_in_words(figures: dict[str, Any]) -> str:
    """The figures as a few lines for a terminal."""
    lines = [
        f"{figures['items']} items, {figures['distinct_indices']} distinct indices, collision rate "
        f"{figures['collision_rate']:.4%} ({figures['colliding_items']} items in {figures['collision_groups']} groups, "
        f"largest {figures['largest_group']})"
    ]
    for level, usage in enumerate(figures["levels"]):
        lines.append(
            f"  level {level + 1}: {usage['used']} of {usage['codes']} codes used, entropy {usage['entropy_bits']:.2f} "
            f"of {usage['max_entropy_bits']:.2f} bits, largest code {usage['largest_share']:.2%} of the items"
        )
    return "\n".join(lines)
