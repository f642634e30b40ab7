"""What a person wants to see of an index: titles under a prefix, items that share an index, and one picture."""

from __future__ import annotations

import logging
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from commands import InputError
from figures import collision_groups, index_keys
from input_files import load_json
from output_files import written_whole

FIRST_CODES, SECOND_CODES, TITLES, GROUPS = 6, 3, 5, 20
SHOWN_FIRST, SHOWN_SECOND = 4, 3  # of those, in the picture


def item_titles(path: Path, count: int) -> list[str]:
    """The titles of the first `count` items of `<D>.item.json`; "" where there is none.

    Raises:
        InputError: not readable, an item is missing, a title is no text or has lone surrogates.
    """
    content = load_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected an object of items")
    titles = []
    for item in range(count):
        own = content.get(str(item))
        if not isinstance(own, dict):
            raise InputError(f'{path}: has no item "{item}", but the embeddings have {count} rows')
        title = own.get("title") or ""
        if not isinstance(title, str) or re.search("[\ud800-\udfff]", title):
            raise InputError(f'{path}: item "{item}": title is no text that UTF-8 can write')
        titles.append(title.replace("\x00", " "))
    return titles


def title_examples(codes: np.ndarray, titles: Sequence[str]) -> list[dict[str, Any]]:
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
    """One picture: items of each code by level, items of each prefix, collision groups, neighbours, titles as examples.

    Args:
        path: PNG file to write.
        codes: int64 (items, levels).
        report: what the report file holds: `levels`, `neighbours` and, where there are titles, `examples`.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # its remarks on font caches
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    shown, purity = report.get("examples", []), report["neighbours"]
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
    for name in ("share", "chance") if purity else ():
        words = {"share": "share that has the item's prefix", "chance": "by chance"}[name]
        x, y = [row["prefix_levels"] for row in purity], [row[name] for row in purity]
        alike.plot(x, y, "o-" if name == "share" else "--", label=words)
    alike.set(title="10 nearest neighbours of an item", xlabel="levels of the prefix", ylabel="share", ylim=(0, 1))
    alike.xaxis.set_major_locator(MaxNLocator(integer=True))
    if purity:
        alike.legend()
    if shown:
        axes["e"].set_title("Titles under the largest codes")
        axes["e"].axis("off")
        axes["e"].text(0, 1, _lines(shown), va="top", family="monospace", fontsize=8, parse_math=False)
    with written_whole(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # titles in scripts that the font lacks
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)
