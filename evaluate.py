"""HR@k, NDCG@k and MRR@k of ranked recommendations; recomputes every number of a results file from its predictions.

    python evaluate.py --predictions results/Games/result.predictions.jsonl
    python evaluate.py --predictions F --metrics hit@20,ndcg@20 --results_file new.json

For the same metrics within Hugging Face's `evaluate` package see metrics/metrics.py.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from metrics.ranking import means, parse, rank_of
from utils import UserError, run_main, write_json

DEFAULT_METRICS = "hit@1,hit@5,hit@10,ndcg@5,ndcg@10"


def check_metrics(names: str) -> str:
    """`names` if they are all metrics.

    Raises:
        UserError: an unknown metric, or a k that is no positive number.
    """
    try:
        parse(names)
    except ValueError as error:
        raise UserError(f"--metrics: {error}") from None
    return names


def too_long(names: str, num_items: int) -> list[str]:
    """Those of `names` whose k exceeds lists of `num_items` items: they cannot tell more than k = `num_items`."""
    return [name for name, _, k in parse(names) if k > num_items]


def summarise(ranks: dict[int, list[int]], metrics: str) -> dict[str, Any]:
    """The metric block of a results file.

    Args:
        ranks: prompt id → the target's rank in each sample's list (from 0; -1: not in it).
        metrics: comma list such as `hit@1,ndcg@10`.

    Returns:
        `mean_results`, `min_results`, `max_results` (over the prompts) and `all_prompt_results` (in the order of `ranks`).
    """
    every = [means(ranks[prompt], metrics) for prompt in ranks]
    names = list(every[0])
    return {
        "mean_results": {name: sum(result[name] for result in every) / len(every) for name in names},
        "min_results": {name: min(result[name] for result in every) for name in names},
        "max_results": {name: max(result[name] for result in every) for name in names},
        "all_prompt_results": every,
    }


def read_predictions(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a predictions file, checked, one after the other.

    Raises:
        UserError: the file is missing, or a line is not a record with `prompt_id`, `sample`, `target` and `items`.
    """
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line)
                    for key in ("prompt_id", "sample", "target"):
                        if not isinstance(record[key], int):
                            raise ValueError(f"{key} is not an integer")
                    if not isinstance(record["items"], list):
                        raise ValueError("items is not a list")
                except (ValueError, KeyError, TypeError) as error:
                    reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
                    raise UserError(f"{path}, line {number}: no prediction ({reason})") from None
                yield record
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def ranks_of(records: Iterable[dict[str, Any]]) -> dict[int, list[int]]:
    """prompt id → the target's rank in each record's items.

    Raises:
        UserError: a sample occurs twice for a prompt, or a list names an item twice.
    """
    ranks: dict[int, list[int]] = {}
    seen = set()
    for record in records:
        key = (record["prompt_id"], record["sample"])
        if key in seen:
            raise UserError(f"sample {key[1]} of prompt {key[0]} occurs twice in the predictions")
        if len(set(record["items"])) < len(record["items"]):
            raise UserError(f"sample {key[1]} of prompt {key[0]} names an item twice")
        seen.add(key)
        ranks.setdefault(record["prompt_id"], []).append(rank_of(record["target"], record["items"]))
    return ranks


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", required=True, metavar="F", help="a *.predictions.jsonl of test.py")
    parser.add_argument(
        "--metrics", default=DEFAULT_METRICS, help="comma list of hit@k, ndcg@k, mrr@k (default: %(default)s)"
    )
    parser.add_argument("--results_file", metavar="F", help="also write the results there as JSON; must not exist yet")
    args = parser.parse_args(argv)
    if args.results_file and Path(args.results_file).exists():
        raise UserError(f"--results_file {args.results_file} exists; name another file or remove it")
    check_metrics(args.metrics)
    shortest = math.inf

    def records() -> Iterator[dict[str, Any]]:
        nonlocal shortest
        for record in read_predictions(args.predictions):
            shortest = min(shortest, len(record["items"]))
            yield record

    ranks = ranks_of(records())
    if not ranks:
        raise UserError(f"{args.predictions}: holds no predictions")
    for name in too_long(args.metrics, shortest):
        print(f"note: {name} of lists with {shortest} items only (--num_beams when they were made)", file=sys.stderr)
    results = {"test_prompt_ids": ",".join(map(str, ranks)), **summarise(ranks, args.metrics)}
    print(json.dumps(results, indent=2))
    if args.results_file:
        write_json(args.results_file, results)


if __name__ == "__main__":
    run_main(main)
