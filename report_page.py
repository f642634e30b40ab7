"""One self-contained HTML page about a run: the table, its figures, the index, examples, and the settings.

Everything is taken from the run's files. Texts of the data are escaped: a title cannot become markup. The page loads nothing.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from data import RecData
from index.figures import level_usage
from metrics.ranking import METRICS
from run_folder import RunFolder, log_history
from scored_runs import Scored
from utils import UserError

Compared = tuple[str, np.ndarray, str]  # name, ranks (…, users), line style
MARK = '<meta name="generator" content="LC-Rec report.py">'
SHOWN_HISTORY, SHOWN_ITEMS, BINS = 6, 5, 5
CSS = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem } svg, img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } td, th { padding: .25rem .75rem; text-align: left;
border-bottom: 1px solid #ddd; vertical-align: top } .wide { overflow-x: auto } pre { overflow-x: auto; font-size: .8rem }
.hit { font-weight: 600; color: #0a6b2d } .small { color: #666; font-size: .9rem } ol { margin: 0; padding-left: 1.2rem }
"""


def page(data: RecData, runs: list[Scored], references: dict[str, np.ndarray], rows: list[list[str]], note: str) -> str:
    """The page's HTML.

    Args:
        references: ranks (users,) of what needs no model, by name.
        rows: the table, its head first.
    """
    title = f"{data.name}: {', '.join(run.label for run in runs)}"
    compared = [(run.label, run.ranks, "-") for run in runs] + [
        (f"{run.label}, unseen", run.unseen, "-.") for run in runs
    ]
    compared += [(name, ranks, "--") for name, ranks in references.items()]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<div class="wide">{html_table(rows)}</div><p class="small">{html.escape(note)} Rows and lines "unseen" leave out what '
        "the user has met before; a model's lists get shorter by that.</p>",
        "<h2>Lists of every length</h2>",
        figure(curves_by_k, compared, max(run.longest for run in runs)),
        "<h2>For whom</h2>",
        for_whom(data, runs, compared),
        training_part(runs),
        index_part(data),
        f"<h2>Examples</h2><p class='small'>Users drawn at random, first template, of {html.escape(runs[0].label)}; "
        "the item that came next is marked where it was found.</p>",
        examples(data, runs[0]),
        settings_part(runs),
    ]
    head = f'<meta charset="utf-8">{MARK}<title>{html.escape(title)}</title><style>{CSS}</style>'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{distinct_ids("".join(parts))}</body></html>\n'


def distinct_ids(body: str) -> str:
    """`body` with the names within each SVG made its own: ids that nothing refers to go, the others get its number."""
    numbers = itertools.count(1)

    def rename(match: re.Match[str]) -> str:
        svg, mark = match[0], f"f{next(numbers)}-"
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
        svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{mark}{found[1]}"' if found[1] in used else "", svg)
        return re.sub(r'(href="#|url\(#)', rf"\g<1>{mark}", svg)

    return re.sub(r"<svg.*?</svg>", rename, body, flags=re.DOTALL)


def html_table(rows: list[list[str]]) -> str:
    """Rows of plain text as HTML, the head first."""
    lines = [
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in zip(["th"] + ["td"] * (len(rows) - 1), rows, strict=True)
    ]
    return f"<table>{''.join(lines)}</table>"


# ---- figures ----


def figure(draw: Any, *args: Any) -> str:
    """An SVG of what `draw(figure, *args)` draws."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"svg.hashsalt": "lc-rec", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    style |= {"text.parse_math": False}  # a name with $ is no formula
    with pyplot.rc_context(style), warnings.catch_warnings(action="ignore"):  # letters that the font lacks
        canvas = pyplot.figure(figsize=(9, 3.4), layout="constrained")
        try:
            draw(canvas, *args)
            text = io.StringIO()
            canvas.savefig(text, format="svg", metadata={"Date": None})
        finally:
            pyplot.close(canvas)
    return re.sub(r"^.*?(?=<svg)", "", text.getvalue(), flags=re.DOTALL)


def curves_by_k(canvas: Any, compared: list[Compared], longest: int) -> None:
    """HR@k and NDCG@k for k up to `longest`."""
    places = np.arange(1, max(2, longest) + 1)
    for axes, kind, name in zip(canvas.subplots(1, 2), ("hit", "ndcg"), ("HR@k", "NDCG@k"), strict=True):
        for label, ranks, style in compared:
            gains = np.array([(ranks == rank).mean() * METRICS[kind](rank, rank + 1) for rank in range(len(places))])
            axes.plot(places, gains.cumsum(), style, label=label)
        axes.set(xlabel="k", ylabel=name, ylim=(0, None), xlim=(0, len(places) + 1))
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=8)


def groups(values: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Up to `BINS` groups of users of about the same size by `values` (users,): a name, and who is in it."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, BINS + 1), method="nearest"))
    found = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        last = high == edges[-1]
        members = (values >= low) & ((values <= high) if last else (values < high))
        top = int(high) if last else int(high) - 1
        if members.any():
            found.append((f"{int(low)}" if top <= low else f"{int(low)}–{top}", members))
    return found or [(f"{int(values[0])}", np.ones(len(values), bool))]


def for_whom(data: RecData, runs: list[Scored], compared: list[Compared]) -> str:
    """The figure by groups of users, which needs all of them."""
    if any(len(run.users) != len(data.inters) for run in runs):
        return '<p class="small">Only some of the users were tested.</p>'
    return figure(by_group, data, compared)


def by_group(canvas: Any, data: RecData, compared: list[Compared]) -> None:
    """HR@10 by the length of the history, and by how often the target occurs in training."""
    histories = list(data.inters.values())
    lengths = np.array([len(items) - 1 for items in histories])
    targets = np.array([data.train_counts[items[-1]] for items in histories])
    names = {"items in the history": lengths, "occurrences of the target in training": targets}
    for axes, (name, values) in zip(canvas.subplots(1, 2, sharey=True), names.items(), strict=True):
        parts = groups(values)
        for number, (label, ranks, _) in enumerate(compared):
            hits = ((np.atleast_2d(ranks) >= 0) & (np.atleast_2d(ranks) < 10)).mean(axis=0)
            places = np.arange(len(parts)) + 0.8 * ((number + 0.5) / len(compared) - 0.5)
            axes.bar(places, [hits[members].mean() for _, members in parts], 0.8 / len(compared), label=label)
        axes.set_xticks(
            range(len(parts)), [f"{part}\n{int(members.sum())} users" for part, members in parts], fontsize=8
        )
        axes.set_xlabel(name)
    canvas.axes[0].set_ylabel("HR@10")
    axes.legend(frameon=False, fontsize=8)


# ---- training, index, settings ----


def learning_curves(canvas: Any, history: list[dict[str, float]]) -> None:
    """The loss of each task, and what was measured on the validation split."""
    train, valid = canvas.subplots(1, 2)
    for name in sorted({name for row in history for name in row if name.startswith("loss")}):
        points = [(row["step"], row[name]) for row in history if name in row]
        train.plot(*zip(*points, strict=True), label=name.removeprefix("loss_"), linewidth=2 if name == "loss" else 1)
    train.set(xlabel="step", ylabel="training loss")
    second = valid.twinx()
    drawn = []
    for number, (name, axes) in enumerate((("loss", valid), ("hit@10", second), ("ndcg@10", second))):
        points = [(row["step"], row[f"eval_{name}"]) for row in history if f"eval_{name}" in row]
        if points:
            drawn += axes.plot(
                *zip(*points, strict=True), "o-" if axes is valid else "s--", label=name, color=f"C{number}"
            )
    valid.set(xlabel="step", ylabel="validation loss")
    second.set(ylabel="validation HR, NDCG", ylim=(0, None))
    for axes in (train, valid):
        axes.set_xlim(0, 1.05 * max(row["step"] for row in history) + 1)
    if not second.lines:
        second.set_axis_off()
    if train.lines:
        train.legend(frameon=False, fontsize=8)
    if drawn:
        valid.legend(handles=drawn, frameon=False, fontsize=8)


def training_part(runs: list[Scored]) -> str:
    """The learning curves of every run."""
    parts = ["<h2>Training</h2>"]
    for run in runs:
        history = log_history(run.checkpoint) if run.checkpoint else []
        said = run.label if history else f"{run.label}: no log of the training in {str(run.checkpoint)[:200]}"
        parts.append(f"<p>{html.escape(said)}</p>{figure(learning_curves, history) if history else ''}")
    return "".join(parts)


def index_part(data: RecData) -> str:
    """Levels of the item index, and the picture that index/generate_indices.py has made of it."""
    levels = max(map(len, data.indices))
    rows = []
    for level in range(levels):
        tokens = [index[level] for index in data.indices if len(index) > level]
        codes = np.unique(tokens, return_inverse=True)[1]
        usage = level_usage(codes, int(codes.max()) + 1)
        rows.append(
            [f"{level + 1}", f"{usage['used']}", f"{usage['entropy_bits']:.2f}", f"{usage['largest_share']:.2%}"]
        )
    head = ["level", "codes in use", "entropy, bits", "items of the largest code"]
    parts = [
        "<h2>Item index</h2>",
        f"<p>{len(data.titles):,} items; {data.shared_items:,} of them share their index with another.</p>",
        html_table([head, *rows]),
    ]
    picture = data.files.get("index", Path("none")).with_suffix(".report.png")
    if picture.is_file():
        code = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<p><img alt="the index as a picture" src="data:image/png;base64,{code}"></p>')
    return "".join(parts)


def settings_part(runs: list[Scored]) -> str:
    """All settings of every test and of the training before it, folded."""
    parts = ["<h2>Settings</h2>"]
    for run in runs:
        found = {f"test: {run.path}": run.config}
        if run.checkpoint and (trained := RunFolder(run.checkpoint).record(insist=False)):
            found[f"training: {run.checkpoint}"] = vars(trained)
        for name, settings in found.items():
            try:
                text = html.escape(json.dumps(settings, indent=2, ensure_ascii=False))
            except RecursionError:
                raise UserError(f"{name}: nested too deep") from None
            parts.append(f"<details><summary>{html.escape(name)}</summary><pre>{text}</pre></details>")
    return "".join(parts)


# ---- examples ----


def examples(data: RecData, run: Scored) -> str:
    """A few users: the end of their history, what came next, and the first items of their list."""
    rows = ["<tr><th>history (the last items)</th><th>came next</th><th>first in the list</th></tr>"]
    for record in run.shown:
        history = data.inters[record["user"]][:-1][-SHOWN_HISTORY:]
        target, came = record["target"], data.inters[record["user"]][-1]
        listed = [
            f"<li{' class=hit' * (item == target)}>{title(data, item)}</li>" for item in record["items"][:SHOWN_ITEMS]
        ]
        place = record["items"].index(target) + 1 if target in record["items"] else None
        said = f"{place}. in the list" if place else f"not among {len(record['items'])}"
        rows.append(
            f"<tr><td>{'; '.join(title(data, item) for item in history)}</td>"
            f'<td>{title(data, came)}<br><span class="small">{said}</span></td>'
            f"<td><ol>{''.join(listed)}</ol></td></tr>"
        )
    return f"<table>{''.join(rows)}</table>"


def title(data: RecData, item: int) -> str:
    """An item's title, escaped and cut, with its index."""
    text = data.titles[item] or data.descriptions[item]
    text = text if len(text) <= 60 else text[:59] + "…"
    return f'<span title="{html.escape(data.index_text(item))}">{html.escape(text)}</span>'
