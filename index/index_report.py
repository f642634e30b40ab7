"""What a person wants to see of an index: examples of items under a prefix, purity, and one picture."""

from __future__ import annotations

import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import UserError, atomic_path, read_json
from figures import collision_groups, index_keys

FIRST_CODES, SECOND_CODES, TITLES, GROUPS = 6, 3, 5, 20
SHOWN_FIRST, SHOWN_SECOND = 4, 3  # of those, in the picture
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


def groups_of(codes: np.ndarray, titles: Sequence[str] | None) -> list[dict[str, Any]]:
    """The largest groups of items that share an index: its tokens, how many items, the first of them (with titles)."""
    rows = []
    for group in sorted(collision_groups(codes), key=len, reverse=True)[:GROUPS]:
        tokens = [f"<{chr(ord('a') + level)}_{code}>" for level, code in enumerate(codes[group[0]])]
        row: dict[str, Any] = {"index": tokens, "size": len(group), "items": group[:TITLES].tolist()}
        if titles is not None:
            row["titles"] = [titles[item] for item in group[:TITLES]]
        rows.append(row)
    return rows


def _lines(shown: Sequence[dict[str, Any]]) -> str:
    """Examples as text: a line for each first-level code, one for each second-level code under it."""
    lines = []
    for first in shown[:SHOWN_FIRST]:
        lines.append(f"{first['token']}  {first['items']} items")
        for second in first.get("under", [{"token": "", "titles": first.get("titles", [])}])[:SHOWN_SECOND]:
            titles = " | ".join(textwrap.shorten(title, 46, placeholder="…") for title in second["titles"][:3])
            lines.append(f"    {second['token']}  {titles}")
    return "\n".join(lines)


def draw(path: Path, codes: np.ndarray, report: dict[str, Any]) -> None:
    """One picture: items of each code by level, items of each prefix, collision groups, purity, titles as examples.

    Args:
        path: PNG file to write.
        codes: int64 (items, levels).
        report: what the report file holds: `levels`, `purity` and, where there are titles, `examples`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    shown, purity = report.get("examples", []), report["purity"]
    rows = ["ab", "cd"] + (["ee"] if shown else [])
    size = (12, 8 + 3.4 * bool(shown))
    figure, axes = pyplot.subplot_mosaic(
        "\n".join(rows), figsize=size, layout="constrained", height_ratios=[4, 4, 3.4][: len(rows)]
    )
    usage, prefixes, groups, alike = (axes[name] for name in "abcd")
    for level, row in enumerate(report["levels"]):
        counts = np.sort(np.bincount(codes[:, level], minlength=row["codes"]))[::-1]
        words = f"{row['used']} of {row['codes']} used, entropy {row['entropy_bits']:.2f} of {row['max_entropy_bits']:.2f} bits"
        usage.plot(np.arange(1, len(counts) + 1), counts, label=f"level {level + 1}: {words}")
    usage.set(title="Items of each code, largest first", xlabel="code", ylabel="items", yscale="symlog", ylim=(0, None))
    usage.legend(fontsize="small")
    for depth in range(1, codes.shape[1] + 1):
        counts = np.sort(np.unique(index_keys(codes[:, :depth]), return_counts=True)[1])[::-1]
        prefixes.plot(np.arange(1, len(counts) + 1), counts, label=f"first {depth}: {len(counts)} prefixes")
    prefixes.set(title="Items under each prefix", xlabel="prefix", ylabel="items", xscale="log", yscale="log")
    prefixes.legend()
    counts = np.bincount(np.unique(index_keys(codes), return_counts=True)[1], minlength=6)
    groups.bar(range(1, len(counts)), counts[1:])
    groups.set(title="Items that share one index", xlabel="items of an index", ylabel="indices")
    groups.set(yscale="log", ylim=(0.5, None))
    for name, depths in purity.items():
        x = [row["prefix_levels"] for row in depths]
        line = alike.plot(x, [row["share"] for row in depths], marker="o", label=name)[0]
        alike.plot(x, [row["chance"] for row in depths], "--", color=line.get_color(), label=f"{name}, by chance")
    alike.set(title="Items under one prefix that are alike", xlabel="levels of the prefix", ylabel="share", ylim=(0, 1))
    alike.xaxis.set_major_locator(MaxNLocator(integer=True))
    if purity:
        alike.legend()
    if shown:
        axes["e"].set_title("Titles under the largest codes")
        axes["e"].axis("off")
        axes["e"].text(0, 1, _lines(shown), va="top", family="monospace", fontsize=8, parse_math=False)
    with atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # titles in scripts that the font lacks
        figure.savefig(temporary, dpi=110)
    pyplot.close(figure)
