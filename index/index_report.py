"""What a person wants to see of an index: examples of items under a prefix, purity, and one picture."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import UserError, atomic_path, read_json
from figures import index_keys

FIRST_CODES, SECOND_CODES, TITLES = 6, 3, 5
LABEL_FIELDS = ("categories", "brand")


def read_items(path: Path, count: int) -> list[dict[str, Any]]:
    """The first `count` items of `<D>.item.json`.

    Raises:
        UserError: no such file, or an item is missing.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object of items")
    items = [content.get(str(item)) for item in range(count)]
    missing = next((item for item, own in enumerate(items) if not isinstance(own, dict)), None)
    if missing is not None:
        raise UserError(f'{path}: has no item "{missing}", but the embeddings have {count} rows')
    return items


def labels_of(items: Sequence[dict[str, Any]], field: str) -> list[frozenset[str]]:
    """Each item's labels in `field` (a list, or text separated by commas or bars), lower case."""
    rows = []
    for item in items:
        value = item.get(field) or ""
        parts = [str(part) for part in value] if isinstance(value, list) else re.split(r"[,|;]", str(value))
        rows.append(frozenset(part.strip().lower() for part in parts if part.strip()))
    return rows


def examples(codes: np.ndarray, titles: Sequence[str]) -> list[dict[str, Any]]:
    """For the largest first-level codes, and the largest second-level codes under them, some titles."""
    rows = []
    for first, size in Counter(codes[:, 0].tolist()).most_common(FIRST_CODES):
        members = np.flatnonzero(codes[:, 0] == first)
        row: dict[str, Any] = {"token": f"<a_{first}>", "items": size}
        if codes.shape[1] == 1:
            row["titles"] = [titles[item] for item in members[:TITLES]]
        else:
            row["under"] = [
                {
                    "token": f"<b_{second}>",
                    "items": number,
                    "titles": [titles[item] for item in members[codes[members, 1] == second][:TITLES]],
                }
                for second, number in Counter(codes[members, 1].tolist()).most_common(SECOND_CODES)
            ]
        rows.append(row)
    return rows


def draw(path: Path, codes: np.ndarray, sizes: Sequence[int], purity: dict[str, list[dict[str, Any]]]) -> None:
    """One picture: items of each code by level, items of each prefix, collision groups, purity beside chance."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, ((usage, prefixes), (groups, alike)) = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    for level, size in enumerate(sizes):
        counts = np.sort(np.bincount(codes[:, level], minlength=size))[::-1]
        usage.plot(np.arange(1, size + 1), counts, label=f"level {level + 1}: {int((counts > 0).sum())} of {size} used")
    usage.set(title="Items of each code, largest first", xlabel="code", ylabel="items", yscale="symlog", ylim=(0, None))
    usage.legend()
    for depth in range(1, codes.shape[1] + 1):
        counts = np.sort(np.unique(index_keys(codes[:, :depth]), return_counts=True)[1])[::-1]
        prefixes.plot(np.arange(1, len(counts) + 1), counts, label=f"first {depth}: {len(counts)} prefixes")
    prefixes.set(title="Items under each prefix", xlabel="prefix", ylabel="items", xscale="log", yscale="log")
    prefixes.legend()
    counts = np.bincount(np.unique(index_keys(codes), return_counts=True)[1], minlength=6)
    groups.bar(range(1, len(counts)), counts[1:])
    groups.set(title="Items that share one index", xlabel="items of an index", ylabel="indices")
    groups.set(yscale="log", ylim=(0.5, None))
    for name, rows in purity.items():
        depths = [row["prefix_levels"] for row in rows]
        line = alike.plot(depths, [row["share"] for row in rows], marker="o", label=name)[0]
        alike.plot(depths, [row["chance"] for row in rows], "--", color=line.get_color(), label=f"{name}, by chance")
    alike.set(title="Items under one prefix that are alike", xlabel="levels of the prefix", ylabel="share", ylim=(0, 1))
    alike.xaxis.set_major_locator(MaxNLocator(integer=True))
    if purity:
        alike.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot.close(figure)
