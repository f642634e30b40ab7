"""A run's table and page: HR and NDCG of the model beside references on the same split, with bootstrap intervals over users.

    python report.py --results_file ./results/ml-100k/result.json --data_path ./data --dataset ml-100k
    python report.py --results_file results/a.json results/b.json …        # several seeds, one row each

Reads `<stem>.predictions.jsonl` beside each results file; the metrics are computed anew from it. References are computed
here: `random` (its expectation) and `popularity` (how often an item occurs in the training parts). The rows `…, unseen`
leave out what the user has interacted with before: from the whole ranking of popularity, and from the model's beams.
Writes `<first stem>.table.md` (or `--table_file`), and beside it `<first stem>.html`: the table, figures (lists of every length,
users by history and target, learning curves, the index), examples and all settings, in one file that loads nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from arguments import add_data, make_parser
from data import RecData, load_data
from evaluate import check_metrics, ranks_of, read_predictions
from metrics.ranking import METRICS, parse
from report_page import Scored, page, some_records
from utils import UserError, atomic_path, read_json, run_main, say

METRIC_NAMES = "hit@1,hit@5,hit@10,ndcg@5,ndcg@10"
RESAMPLES = 2000


def values(ranks: np.ndarray, names: str) -> dict[str, np.ndarray]:
    """Each metric of each user.

    Args:
        ranks: int (users,) or (prompts, users): the target's rank from 0, or -1.

    Returns:
        metric → float64 (users,), the mean over prompts.
    """
    ranks = np.atleast_2d(ranks)
    found = {}
    for name, kind, k in parse(names):
        of_rank = {int(rank): METRICS[kind](int(rank), k) for rank in np.unique(ranks)}
        found[name] = np.vectorize(of_rank.get, otypes=[float])(ranks).mean(axis=0)
    return found


def interval(user_values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean over users (float64 (users,))."""
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(user_values), size=(RESAMPLES, len(user_values)))
    low, high = np.percentile(user_values[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def popularity_ranks(data: RecData, leave_out_seen: bool) -> np.ndarray:
    """The rank (from 0) of every user's test target when all items are ranked by popularity; ties by item id.

    Popularity is counted on the training parts (`items[:-2]`). int64 (users,).
    """
    counts = np.zeros(len(data.titles), dtype=np.int64)
    for items in data.inters.values():
        np.add.at(counts, items[:-2], 1)
    order = np.argsort(-counts, kind="stable")
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
        for name, kind, k in parse(names)
    }


def references(data: RecData, names: str) -> dict[str, dict[str, np.ndarray | float]]:
    """The reference rows: metric values per user, or an expectation."""
    return {
        "random (expected)": random_expectation(len(data.titles), names),
        "popularity": values(popularity_ranks(data, False), names),
        "popularity, unseen": values(popularity_ranks(data, True), names),
    }


def without_seen(records: Iterable[dict[str, Any]], data: RecData) -> Iterator[dict[str, Any]]:
    """The records without the items that their users have met before the target: the lists get shorter."""
    seen = {
        user: {data.canonical[item] for item in items[:-1]} - {data.canonical[items[-1]]}
        for user, items in data.inters.items()
    }
    for record in records:
        if record.get("user") not in seen:
            raise UserError(f"the predictions name the user {record.get('user')!r}, who is not in {data.name}")
        yield {**record, "items": [item for item in record["items"] if item not in seen[record["user"]]]}


def model_ranks(records: Iterable[dict[str, Any]], path: Path) -> np.ndarray:
    """The target's rank by prompt and sample, from the records of a predictions file: int (prompts, samples).

    Raises:
        UserError: the prompts do not have the same number of samples.
    """
    ranks = ranks_of(records)
    if len({len(row) for row in ranks.values()}) != 1:
        raise UserError(f"{path}: the prompts have different numbers of samples; score them all with one command")
    return np.array(list(ranks.values()))


def cell(user_values: np.ndarray | float) -> str:
    """A mean and its interval."""
    if isinstance(user_values, float):
        return f"{user_values:.4f}"
    low, high = interval(user_values)
    return f"{user_values.mean():.4f} [{low:.4f}, {high:.4f}]"


def table(rows: dict[str, dict[str, np.ndarray | float]], names: str) -> str:
    """A Markdown table; brackets hold 95 % bootstrap intervals over users."""
    heads = [name.replace("hit", "HR").replace("ndcg", "NDCG") for name, _, _ in parse(names)]
    lines = [f"| model | {' | '.join(heads)} |", f"| --- |{' --- |' * len(heads)}"]
    lines += [
        f"| {label} | {' | '.join(cell(row[name]) for name, _, _ in parse(names))} |" for label, row in rows.items()
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add_data(parser)
    parser.add_argument("--results_file", nargs="+", required=True, type=Path, help="results of test.py or test_ddp.py")
    parser.add_argument(
        "--table_file", type=Path, help="where the table goes; default: <first stem>.table.md beside it"
    )
    parser.add_argument("--metrics", default=METRIC_NAMES, help="hit@k and ndcg@k, by commas")
    args = parser.parse_args(argv)
    check_metrics(args.metrics)
    data = load_data(args.data_path, args.dataset, args.index_file)
    rows, runs = references(data, args.metrics), []
    for path in args.results_file:
        run = read_run(path, "LC-Rec" if len(args.results_file) == 1 else f"LC-Rec ({path.parent.name})", data)
        unseen = model_ranks(without_seen(read_predictions(run.predictions), data), run.predictions)
        rows[run.label] = values(run.ranks, args.metrics)
        rows[f"{run.label}, unseen"] = values(unseen, args.metrics)
        runs.append(run)
    text = table(rows, args.metrics)
    note = f"{data.name}: {len(data.inters):,} users, all {len(data.titles):,} items ranked; brackets: 95 % bootstrap over users."
    target = args.table_file or args.results_file[0].with_name(f"{args.results_file[0].stem}.table.md")
    with atomic_path(target) as temporary:
        temporary.write_text(f"{text}\n\n{note}\n", encoding="utf-8")
    html = target.with_name(target.name.removesuffix(".md").removesuffix(".table") + ".html")
    popular = {"popularity": popularity_ranks(data, False), "popularity, unseen": popularity_ranks(data, True)}
    with atomic_path(html) as temporary:
        temporary.write_text(page(data, runs, popular, text, note), encoding="utf-8")
    say(f"{text}\n\n{note}\n{target}: this table\n{html}: the same with figures and examples")


def read_run(path: Path, label: str, data: RecData) -> Scored:
    """A results file of test.py, and the predictions beside it.

    Raises:
        UserError: it is of another task than seqrec, or no results file.
    """
    results = read_json(path)
    if not isinstance(results, dict):
        raise UserError(f"{path}: is not a results file of test.py")
    task = results.get("config", {}).get("task", "seqrec")
    if task != "seqrec":
        raise UserError(f"{path}: is of the task {task}; the references are for seqrec")
    predictions = path.with_name(f"{path.stem}.predictions.jsonl")
    ranks = model_ranks(read_predictions(predictions), predictions)
    if ranks.shape[1] != len(data.inters):
        say(f"note: {path} has {ranks.shape[1]} of the {len(data.inters)} users; the references have all")
    return Scored(label, path, results, some_records(read_predictions(predictions), ranks.shape[1], data), ranks)


if __name__ == "__main__":
    run_main(main)
