"""HR@k, NDCG@k and MRR@k of ranked recommendations; recomputes every number of a results file from its predictions.

    python evaluate.py --predictions results/Games/result.predictions.jsonl
    python evaluate.py --predictions F --metrics hit@20,ndcg@20 --results_file new.json

For the same metrics within Hugging Face's `evaluate` package see metrics/metrics.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arguments import make_parser
from flag_values import file_name
from results import check_metrics, ranks_of, read_predictions, summarise, too_long
from utils import UserError, run_main, write_json

DEFAULT_METRICS = "hit@1,hit@5,hit@10,ndcg@5,ndcg@10"


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--predictions", type=file_name, required=True, metavar="F", help="a *.predictions.jsonl of test.py"
    )
    parser.add_argument("--metrics", default=DEFAULT_METRICS, help="comma list of hit@k, ndcg@k, mrr@k")
    parser.add_argument(
        "--results_file", type=file_name, metavar="F", help="also write the results there as JSON; must not exist yet"
    )
    args = parser.parse_args(argv)
    if args.results_file and Path(args.results_file).exists():
        raise UserError(f"--results_file {args.results_file} exists; name another file or remove it")
    check_metrics(args.metrics)
    shortest = sys.maxsize

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
