"""One table of several results files, a line for each name: the mean over files of one name, and its standard deviation.

python benchmarks/task_table.py SEQ=results/seq-42.json SEQ=results/seq-43.json +MUT=results/mut-42.json
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser
from utils import UserError, read_json, run_main, say


def cell(values: list[float]) -> str:
    """The mean, with the standard deviation where there are several values."""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("rows", nargs="+", metavar="NAME=RESULTS", help="a line's name and a results file of test.py")
    scores: dict[str, list[dict[str, float]]] = {}
    metrics: list[str] = []
    for row in parser.parse_args(argv).rows:
        name, _, path = row.partition("=")
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("mean_results"), dict):
            raise UserError(f"{path}: is no results file (no mean_results)")
        scores.setdefault(name, []).append(content["mean_results"])
        metrics = metrics or list(content["mean_results"])
        if list(content["mean_results"]) != metrics:
            raise UserError(f"{path}: has other metrics than the first file ({', '.join(metrics)})")
    say("| tasks | " + " | ".join(metrics) + " |\n| --- |" + " --- |" * len(metrics))
    for name, runs in scores.items():
        say(f"| {name} | " + " | ".join(cell([run[metric] for run in runs]) for metric in metrics) + " |")


if __name__ == "__main__":
    run_main(main)
