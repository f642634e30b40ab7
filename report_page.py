"""One self-contained HTML page about a run: the table, its figures, the index, examples, and the settings.

Everything is taken from the run's files. Texts of the data are escaped: a title cannot become markup. The page loads nothing.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data import RecData
from metrics.ranking import METRICS
from utils import UserError, read_json

EXAMPLES, SHOWN_HISTORY, SHOWN_ITEMS, BINS = 8, 6, 5, 5
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem } svg, img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } td, th { padding: .25rem .75rem; text-align: left;
border-bottom: 1px solid #ddd; vertical-align: top } .wide { overflow-x: auto } pre { overflow-x: auto; font-size: .8rem }
.hit { font-weight: 600; color: #0a6b2d } .small { color: #666; font-size: .9rem } ol { margin: 0; padding-left: 1.2rem }
"""


@dataclass(frozen=True)
class Scored:
    """One results file.

    Args:
        label: its name in the table.
        results: what the file holds.
        shown: the records of a few users (`some_records`).
        ranks: the target's rank, int (prompts, samples), -1 if it is not in the list.
    """

    label: str
    path: Path
    results: dict[str, Any]
    shown: list[dict[str, Any]]
    ranks: np.ndarray

    @property
    def predictions(self) -> Path:
        """The file with the ranked lists."""
        return self.path.with_name(f"{self.path.stem}.predictions.jsonl")

    @property
    def arguments(self) -> dict[str, Any]:
        """The flags of test.py."""
        return self.results.get("config", {}).get("arguments", {})


def page(data: RecData, runs: list[Scored], references: dict[str, np.ndarray], table: str, note: str) -> str:
    """The page's HTML.

    Args:
        references: ranks (users,) of what needs no model, by name.
        table: the Markdown table of all rows, shown as it is.
    """
    title = f"{data.name}: {', '.join(run.label for run in runs)}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<div class="wide">{markdown_table(table)}</div><p class="small">{html.escape(note)}</p>',
        "<h2>Lists of every length</h2>",
        figure(curves_by_k, runs, references),
        "<h2>For whom</h2>",
        figure(by_group, data, runs, references),
        training_part(runs),
        index_part(data),
        f"<h2>Examples</h2><p class='small'>Users drawn at random, first template, of {html.escape(runs[0].label)}; "
        "the item that came next is marked where it was found.</p>",
        examples(data, runs[0]),
        settings_part(runs),
    ]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def markdown_table(text: str) -> str:
    """A Markdown table as HTML."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if not line.startswith("| ---")]
    rows = [
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) + "</tr>"
        for tag, line in zip(["th"] + ["td"] * len(lines), lines, strict=False)
    ]
    return f"<table>{''.join(rows)}</table>"


# ---- figures ----


def figure(draw: Any, *args: Any) -> str:
    """An SVG of what `draw(figure, *args)` draws; empty if it says that there is nothing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(
        {"svg.hashsalt": "lc-rec", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    ):
        canvas = pyplot.figure(figsize=(9, 3.4), layout="constrained")
        try:
            if draw(canvas, *args) is False:
                return ""
            text = io.StringIO()
            canvas.savefig(text, format="svg", metadata={"Date": None})
        finally:
            pyplot.close(canvas)
    return re.sub(r"^.*?(?=<svg)", "", text.getvalue(), flags=re.DOTALL)


def _named(runs: list[Scored], references: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray, str]]:
    """Name, ranks (…, users) and line style of everything that is compared."""
    return [(run.label, run.ranks, "-") for run in runs] + [(name, ranks, "--") for name, ranks in references.items()]


def curves_by_k(canvas: Any, runs: list[Scored], references: dict[str, np.ndarray]) -> None:
    """HR@k and NDCG@k for k from 1 to the lists' length."""
    longest = min(len(record["items"]) for run in runs for record in run.shown[:1])
    places = np.arange(1, max(2, longest) + 1)
    for axes, kind, name in zip(canvas.subplots(1, 2), ("hit", "ndcg"), ("HR@k", "NDCG@k"), strict=True):
        for label, ranks, style in _named(runs, references):
            gains = np.array([(ranks == rank).mean() * METRICS[kind](rank, rank + 1) for rank in range(len(places))])
            axes.plot(places, gains.cumsum(), style, label=label)
        axes.set(xlabel="k", ylabel=name, ylim=(0, None), xlim=(0, len(places) + 1))
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)


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


def by_group(canvas: Any, data: RecData, runs: list[Scored], references: dict[str, np.ndarray]) -> bool | None:
    """HR@10 by the length of the history, and by how often the target occurs in training."""
    if any(run.ranks.shape[1] != len(data.inters) for run in runs):
        return False  # a sample of the users
    counts = np.zeros(len(data.titles), dtype=np.int64)
    for items in data.inters.values():
        np.add.at(counts, items[:-2], 1)
    histories = list(data.inters.values())
    lengths = np.array([len(items) - 1 for items in histories])
    targets = np.array([counts[items[-1]] for items in histories])
    names = {"items in the history": lengths, "occurrences of the target in training": targets}
    for axes, (name, values) in zip(canvas.subplots(1, 2, sharey=True), names.items(), strict=True):
        parts, compared = groups(values), _named(runs, references)
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
    return None


# ---- training, index, settings ----


def log_history(checkpoint: Path) -> list[dict[str, float]]:
    """What was logged in the training of the model in `checkpoint`: from the newest `trainer_state.json` there."""
    found = [path for path in checkpoint.glob("checkpoint-*/trainer_state.json") if path.parent.name[11:].isdigit()]
    own = checkpoint / "trainer_state.json"
    newest = own if own.is_file() else max(found, key=lambda path: int(path.parent.name[11:]), default=None)
    if newest is None:
        return []
    try:
        return [row for row in read_json(newest)["log_history"] if isinstance(row.get("step"), int)]
    except (UserError, KeyError, TypeError, AttributeError):
        return []


def learning_curves(canvas: Any, history: list[dict[str, float]]) -> None:
    """The loss of each task, and what was measured on the validation split."""
    train, valid = canvas.subplots(1, 2)
    names = sorted({name for row in history for name in row if name.startswith("loss")})
    for name in names:
        points = [(row["step"], row[name]) for row in history if name in row]
        train.plot(*zip(*points, strict=True), label=name.removeprefix("loss_"), linewidth=2 if name == "loss" else 1)
    train.set(xlabel="step", ylabel="training loss")
    train.legend(frameon=False, fontsize=8)
    second = valid.twinx()
    for name, axes, style in (("loss", valid, "o-"), ("hit@10", second, "s--"), ("ndcg@10", second, "^--")):
        points = [(row["step"], row[f"eval_{name}"]) for row in history if f"eval_{name}" in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name, color="C0" if axes is valid else None)
    valid.set(xlabel="step", ylabel="validation loss", xlim=train.get_xlim())
    second.set(ylabel="validation HR, NDCG", ylim=(0, None))
    if second.lines:
        second.legend(frameon=False, fontsize=8)
    else:
        second.set_axis_off()


def training_part(runs: list[Scored]) -> str:
    """The learning curves of every run that has some."""
    parts = []
    for run in runs:
        folder = run.arguments.get("ckpt_path")
        history = log_history(Path(folder)) if isinstance(folder, str) else []
        if history:
            parts.append(f"<p>{html.escape(run.label)}</p>{figure(learning_curves, history)}")
    return f"<h2>Training</h2>{''.join(parts)}" if parts else ""


def index_part(data: RecData) -> str:
    """Levels of the item index, and the picture that index/generate_indices.py has made of it."""
    levels = max(map(len, data.indices))
    rows = []
    for level in range(levels):
        tokens = [index[level] for index in data.indices if len(index) > level]
        _, counts = np.unique(tokens, return_counts=True)
        shares = counts / counts.sum()
        entropy = float(-(shares * np.log2(shares)).sum()) + 0.0
        rows.append(f"| {level + 1} | {len(counts)} | {entropy:.2f} | {shares.max():.2%} |")
    head = "| level | codes in use | entropy, bits | items of the largest code |\n| --- |"
    parts = [
        "<h2>Item index</h2>",
        f"<p>{len(data.titles):,} items; {data.shared_items:,} of them share their index with another.</p>",
        markdown_table("\n".join([head, *rows])),
    ]
    picture = data.files.get("index", Path("none")).with_suffix(".report.png")
    if picture.is_file():
        code = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<p><img alt="the index as a picture" src="data:image/png;base64,{code}"></p>')
    return "".join(parts)


def settings_part(runs: list[Scored]) -> str:
    """All settings of every run, folded."""
    parts = [
        f"<details><summary>{html.escape(str(run.path))}</summary>"
        f"<pre>{html.escape(json.dumps(run.results.get('config', {}), indent=2, ensure_ascii=False))}</pre></details>"
        for run in runs
    ]
    return f"<h2>Settings</h2>{''.join(parts)}"


# ---- examples ----


def some_records(records: Iterable[dict[str, Any]], samples: int, data: RecData, seed: int = 0) -> list[dict[str, Any]]:
    """A few of the first `samples` records, those of the first prompt, drawn at random.

    Raises:
        UserError: one of them names an item that the data lack.
    """
    chosen = set(np.random.default_rng(seed).permutation(samples)[:EXAMPLES].tolist())
    found = [record for number, record in enumerate(islice(records, samples)) if number in chosen]
    for record in found:
        for item in (*record["items"], record["target"], record.get("target_item", record["target"])):
            if not isinstance(item, int) or not 0 <= item < len(data.titles):
                raise UserError(f"the predictions name the item {item!r}, which is not in {data.name}")
    return found


def examples(data: RecData, run: Scored) -> str:
    """A few users: the end of their history, what came next, and the first items of their list."""
    rows = ["<tr><th>history (the last items)</th><th>came next</th><th>first in the list</th></tr>"]
    for record in run.shown:
        history = data.inters.get(record.get("user"), [])[:-1][-SHOWN_HISTORY:]
        target = record["target"]
        listed = [
            f"<li{' class=hit' * (item == target)}>{title(data, item)}</li>" for item in record["items"][:SHOWN_ITEMS]
        ]
        place = record["items"].index(target) + 1 if target in record["items"] else None
        said = f"{place}. in the list" if place else f"not among {len(record['items'])}"
        rows.append(
            f"<tr><td>{'; '.join(title(data, item) for item in history)}</td>"
            f'<td>{title(data, record.get("target_item", target))}<br><span class="small">{said}</span></td>'
            f"<td><ol>{''.join(listed)}</ol></td></tr>"
        )
    return f"<table>{''.join(rows)}</table>"


def title(data: RecData, item: int) -> str:
    """An item's title, escaped and cut, with its index."""
    text = data.titles[item] or data.descriptions[item]
    text = text if len(text) <= 60 else text[:59] + "…"
    return f'<span title="{html.escape(data.index_text(item))}">{html.escape(text)}</span>'
