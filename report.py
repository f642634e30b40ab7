"""A run's table and page: HR and NDCG of the model beside references on the same split, with bootstrap intervals over users.

    python report.py --results_file ./results/ml-100k/result.json           # of the data that the results name
    python report.py --results_file ./results/ml-100k/result.json --data_path ./data --dataset ml-100k
    python report.py --results_file results/a.json results/b.json …        # several seeds, one row each

Reads `<stem>.predictions.jsonl` beside each results file; the metrics are computed anew from it. References are computed
here: `random` (its expectation) and `popularity` (how often an item occurs in the training parts). `--references F` adds
figures that were recorded earlier, marked as such, with their source. `--unseen` adds rows that leave out what the user has
interacted with before: from the whole ranking of popularity, and from the model's beams.
Writes `<first stem>.table.md` (or `--table_file`), and beside it `<first stem>.html`: the table, figures (lists of every length,
users by history and target, learning curves, the index), examples and all settings, in one file that loads nothing else.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from arguments import DATASET, add_dataset, make_parser
from data import RecData, load_data
from evaluate import check_metrics, too_long
from flag_values import file_name
from metrics.ranking import METRICS, parse_metrics
from report_page import MARK, page
from results import read_results
from scored_runs import read_run
from utils import UserError, atomic_path, read_json, regular_file, run_main, say

METRIC_NAMES = "hit@1,hit@5,hit@10,ndcg@5,ndcg@10"
RESAMPLES = 2000
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]"
)  # what HTML and terminals forbid


def values(ranks: np.ndarray, names: str) -> dict[str, np.ndarray]:
    """Each metric of each user.

    Args:
        ranks: int (users,) or (prompts, users): the target's rank from 0, or -1.

    Returns:
        metric → float64 (users,), the mean over prompts.
    """
    ranks = np.atleast_2d(ranks)
    found = {}
    for name, kind, k in parse_metrics(names):
        of_rank = {int(rank): METRICS[kind](int(rank), k) for rank in np.unique(ranks)}
        found[name] = np.vectorize(of_rank.get, otypes=[float])(ranks).mean(axis=0)
    return found


def intervals(user_values: np.ndarray, seed: int = 0) -> np.ndarray:
    """The 95 % percentile bootstrap intervals of the means over users, the same draws for all columns.

    Args:
        user_values: float64 (users, columns).

    Returns:
        float64 (columns, 2): the lower and the upper end.
    """
    rng, users = np.random.default_rng(seed), len(user_values)
    means = np.empty((RESAMPLES, user_values.shape[1]))
    for resample in range(RESAMPLES):
        times = np.bincount(rng.integers(users, size=users), minlength=users)  # how often each user is drawn
        means[resample] = times @ user_values / users
    return np.percentile(means, [2.5, 97.5], axis=0).T


def popularity_ranks(data: RecData, leave_out_seen: bool) -> np.ndarray:
    """The rank (from 0) of every user's test target when all items are ranked by popularity; ties by item id.

    Popularity is counted on the training parts (`RecData.train_counts`). int64 (users,).
    """
    order = np.argsort(-data.train_counts, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    ranks = []
    for items in data.inters.values():
        rank = place[items[-1]]
        if leave_out_seen:
            rank -= (place[list(set(items[:-1]) - {items[-1]})] < rank).sum()
        ranks.append(rank)
    return np.array(ranks)


def random_expectation(n_items: int, names: str) -> dict[str, float]:
    """The expected metrics of a random order of all items: every rank is as likely."""
    return {
        name: math.fsum(METRICS[kind](rank, k) for rank in range(min(k, n_items))) / n_items
        for name, kind, k in parse_metrics(names)
    }


def cells(rows: dict[str, Mapping[str, np.ndarray | float]], names: str) -> list[list[str]]:
    """The table's rows as text: label, and each metric's mean with its 95 % bootstrap interval over users."""
    metrics = [name for name, _, _ in parse_metrics(names)]
    found = [["model", *(name.replace("hit", "HR").replace("ndcg", "NDCG") for name in metrics)]]
    present = {(label, name): row[name] for label, row in rows.items() for name in metrics if name in row}
    columns = {key: column for key, column in present.items() if isinstance(column, np.ndarray)}
    ends: dict[tuple[str, str], np.ndarray] = {}
    for size in {len(column) for column in columns.values()}:  # all rows of as many users at once
        same = {key: column for key, column in columns.items() if len(column) == size}
        ends.update(zip(same, intervals(np.stack(list(same.values()), axis=1)), strict=True))
    for label, row in rows.items():
        texts = [f"{np.mean(row[name]):.4f}" if name in row else "–" for name in metrics]
        for place, name in enumerate(metrics):
            if (label, name) in ends:
                texts[place] += " [{:.4f}, {:.4f}]".format(*ends[label, name])
        found.append([label, *texts])
    return found


def recorded(path: Path | None, dataset: str) -> tuple[dict[str, dict[str, float]], str]:
    """The rows of `path` for `dataset`, `{label: {metric: value}}`, and a sentence for each about where it comes from.

    The file is `{dataset: [{"model", "metrics": {name: value}, "source", "command"}, …]}`; a dataset that it lacks has none, and
    an entry may lack its command.

    Raises:
        UserError: the file has another form.
    """
    content = read_json(path) if path else {}
    entries = content.get(dataset, []) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UserError(f"{path}: must be an object with a list of references for each dataset")
    rows, note = {}, ""
    for entry in entries:
        try:
            label, metrics = f"{entry['model']} (recorded)", {k: float(v) for k, v in entry["metrics"].items()}
            if not all(map(math.isfinite, metrics.values())):
                raise ValueError("not finite")
            command = f": `{entry['command']}`" if "command" in entry else ""
            note += f" {label}: not run here; {entry['source']}{command}."
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise UserError(
                f"{path}: {dataset!r} has an entry without texts 'model', 'source' and numbers 'metrics'"
            ) from None
        rows[label] = metrics
    return rows, note


def markdown(rows: list[list[str]]) -> str:
    """`cells` as a Markdown table."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], f"| --- |{' --- |' * (len(rows[0]) - 1)}", *lines[1:]])


def labels(paths: list[Path]) -> list[str]:
    """A name for each results file: `LC-Rec`, and of several files what tells them apart.

    Raises:
        UserError: a file is named twice.
    """
    if len({Path(os.path.realpath(path)) for path in paths}) < len(paths):
        raise UserError("--results_file names a file twice")
    if len(paths) == 1:
        return ["LC-Rec"]
    whole = [Path(os.path.realpath(path)) for path in paths]
    for name in (lambda path: path.parent.name, lambda path: f"{path.parent.name}/{path.stem}", str):
        found = [name(path) for path in whole]
        if len(set(found)) == len(found):
            break
    return [f"LC-Rec ({name})" for name in found]


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add_dataset(parser.add_argument_group("data"))
    parser.add_argument(
        "--results_file", nargs="+", required=True, type=file_name, help="results of test.py or test_ddp.py"
    )
    parser.add_argument(
        "--table_file", type=file_name, help="where the table goes (*.md); default: <first stem>.table.md beside it"
    )
    parser.add_argument("--metrics", default=METRIC_NAMES, help="hit@k and ndcg@k, by commas")
    parser.add_argument(
        "--references", type=file_name, metavar="F", help="recorded rows, such as benchmarks/references.json"
    )
    parser.add_argument("--unseen", action="store_true", help="rows without what the user has met before, too")
    args = parser.parse_args(argv)
    check_metrics(args.metrics)
    results = [Path(path) for path in args.results_file]
    target = Path(args.table_file) if args.table_file else results[0].with_name(f"{results[0].stem}.table.md")
    html = page_file(target)
    tested = read_results(results[0])["config"]["arguments"] if not args.data_path else {}
    given = {flag: getattr(args, flag.name) for flag in DATASET}
    where = (tested.get(flag.name, value) if value == flag.default else value for flag, value in given.items())
    data = load_data(*map(str, where))
    popular = {"popularity": popularity_ranks(data, False), "popularity, unseen": popularity_ranks(data, True)}
    rows: dict[str, Mapping[str, np.ndarray | float]] = {
        "random (expected)": random_expectation(len(data.titles), args.metrics)
    }
    rows |= {
        name: values(ranks, args.metrics) for name, ranks in popular.items() if args.unseen or "unseen" not in name
    }
    references, sources = recorded(Path(args.references) if args.references else None, data.name)
    rows |= references
    runs = [read_run(path, label, data) for path, label in zip(results, labels(results), strict=True)]
    for run in runs:
        rows[run.label] = values(run.ranks, args.metrics)
        if args.unseen:
            rows[f"{run.label}, unseen"] = values(run.unseen, args.metrics)
        for name in too_long(args.metrics, run.longest):
            say(f"note: {name} of {run.path} is taken from lists of {run.longest} items only")
    found = cells(rows, args.metrics)
    note = f"{data.name}: {len(data.inters):,} users, all {len(data.titles):,} items ranked; brackets: 95 % bootstrap over users."
    note += sources
    for run in runs:
        if run.ranks.shape[1] != len(data.inters):
            note += f" {run.label} has {run.ranks.shape[1]:,} of the users, the references have all."
    table = f"{markdown(found)}\n\n{note}\n"
    written = {target: table, html: page(data, runs, popular, found, note)}
    with contextlib.ExitStack() as both:  # both or none
        for path, content in written.items():
            temporary = both.enter_context(atomic_path(path))
            temporary.write_bytes(UNPRINTABLE.sub("\ufffd", content).encode("utf-8", "replace"))
    say(f"{UNPRINTABLE.sub(' ', table)}{target}: this table\n{html}: the same with figures and examples")


def page_file(table_file: Path) -> Path:
    """Where the page goes: beside the table.

    Raises:
        UserError: the table's name does not end in `.md`, or a table or page of other origin is in the way.
    """
    if table_file.suffix != ".md":
        raise UserError(f"--table_file {table_file}: the name must end in .md")
    if os.path.lexists(table_file) and not regular_file(table_file).read_bytes().startswith(b"| model |"):
        raise UserError(f"{table_file}: exists and is no table of this script; choose another --table_file")
    path = table_file.with_name(table_file.name.removesuffix(".md").removesuffix(".table") + ".html")
    if os.path.lexists(path) and MARK.encode() not in regular_file(path).read_bytes()[:4096]:
        raise UserError(f"{path}: exists and is no page of this script; choose another --table_file")
    return path


if __name__ == "__main__":
    run_main(main)
