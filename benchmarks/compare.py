"""Popularity and RecBole's sequential models on a dataset, on the same split and candidates as this model, in one table.

    python benchmarks/compare.py --data_path ../shared/data --dataset Office
    python benchmarks/compare.py --data_path ./data --dataset Mine --results "LC-Rec=results/Mine/result.json"

Leave one out, the last 20 items as history (`--max_his_len`), all items ranked, what the user has met included. RecBole 1.2.1
trains in an environment of its own, which the first run makes. Every model has RecBole's own size (64 dimensions; SASRec and
BERT4Rec two layers, GRU4Rec one of 128), cross-entropy over all items, Adam, and stops after ten epochs without a better NDCG@10
on the validation targets. The setting with the best validation NDCG@10 of this grid is tested, with every seed:
{grid}
`--results` adds lists that test.py wrote (several files of one name: seeds), and a table of differences with 95 % intervals by
a paired bootstrap over the users that both have: from each baseline, and from the first NAME. Three more tables tell what
models are good at: HR@10 / NDCG@10 by how often the target came right after the history's last item in training, by how often
it occurs in training at all, and with what the user has met before struck from the lists. All figures come from lists of 20
items by metrics/ranking.py. Popularity counts the training parts. What is trained lies in `<work>/<dataset>/<model>/` with
settings, log and lists; the same command goes on from the last model that was finished. Writes `<work>/<dataset>/compare.md`
and `compare.json`. `--references F` puts the baselines' rows into F for report.py. `--models` without a name trains nothing.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser
from benchmarks.baselines import data_hashes, prepare, train
from data import RecData, read_inters, read_items
from data_process.prepare import check_name
from flag_values import file_name, folder_name, whole
from metrics.ranking import rank_of
from report import METRIC_NAMES, cells, intervals, markdown, popularity_ranks, recorded, values
from results import predictions_of, read_predictions, read_results
from utils import UserError, atomic_path, read_json, run_main, say, versions, write_json

USUAL_LENGTH = 20  # items of history
Ranks = dict[str, list[int]]  # user → the target's rank from 0 (-1: not in the list) for each prompt and seed
Point = tuple[float, float, int]  # learning rate, dropout, batch
DROPOUTS = {
    "SASRec": ("hidden_dropout_prob", "attn_dropout_prob"),
    "GRU4Rec": ("dropout_prob",),
    "BERT4Rec": ("hidden_dropout_prob", "attn_dropout_prob"),
}
GRID: dict[str, list[Point]] = {
    "SASRec": [(1e-3, dropout, 1024) for dropout in (0.2, 0.5)],
    "GRU4Rec": [(rate, 0.3, 256) for rate in (1e-3, 3e-3)],
    "BERT4Rec": [(rate, 0.2, 256) for rate in (1e-3, 3e-3)],
}
RECBOLE = {
    "eval_batch_size": 1024,
    "epochs": 300,
    "stopping_step": 10,
    "metrics": ["NDCG"],
    "topk": [10],
    "valid_metric": "NDCG@10",
    "metric_decimal_place": 6,
}
SOURCE = "RecBole 1.2.1, same split and candidates, setting chosen by validation NDCG@10"


@dataclass
class Row:
    """One model of the table.

    Args:
        ranks: of the test split.
        seeds: the same for each seed, where there are several.
        trained, parameters: what its training took, and its size, as text.
        files: its lists.
    """

    ranks: Ranks
    seeds: dict[str, Ranks] = field(default_factory=dict)
    trained: str = "–"
    parameters: str = "–"
    files: list[Path] = field(default_factory=list)


def point_text(point: Point) -> str:
    """`0.001/0.5/256`."""
    return "/".join(f"{value:g}" for value in point)


def point_words(point: Point) -> str:
    """The same in words."""
    return "learning rate {:g}, dropout {:g}, batches of {}".format(*point)


def grid_point(text: str) -> Point:
    """`0.001/0.5/256` as (learning rate, dropout, batch). Raises ValueError for anything else."""
    rate, dropout, batch = text.split("/")
    if not (0 < float(rate) < 1 and 0 <= float(dropout) < 1 and int(batch) > 0):
        raise ValueError
    return float(rate), float(dropout), int(batch)


def grid_text(grid: dict[str, list[Point]]) -> str:
    """The grid in words, a line for each model."""
    lines = (f"    {name}: {', '.join(map(point_text, points))}" for name, points in grid.items())
    return "\n".join(lines) + "    (learning rate/dropout/batch)"


# ---- ranks by user, and what is counted from them ----


def user_ranks(predictions: Path, targets: dict[str, int]) -> Ranks:
    """The ranks in a predictions file, by user.

    Args:
        targets: each user's item.

    Raises:
        UserError: the file is of other data, a user occurs twice, or the prompts have different users.
    """
    found: dict[int, dict[str, int]] = {}
    for record in read_predictions(predictions):
        user, prompt = record.get("user"), record["prompt_id"]
        if not isinstance(user, str) or targets.get(user) != record.get("target_item", record["target"]):
            raise UserError(f"{predictions}: user {user!r} has another target than in this dataset; is it of seqrec?")
        if user in found.setdefault(prompt, {}):
            raise UserError(f"{predictions}: user {user!r} occurs twice for prompt {prompt}")
        found[prompt][user] = rank_of(record["target"], record["items"])
    prompts = list(found.values())
    if not prompts or any(prompt.keys() != prompts[0].keys() for prompt in prompts):
        raise UserError(f"{predictions}: holds no predictions, or its prompts have different users")
    return {user: [prompt[user] for prompt in prompts] for user in prompts[0]}


def joined(runs: list[Ranks]) -> Ranks:
    """Several seeds as one: the users that all have."""
    users = [user for user in runs[0] if all(user in run for run in runs)]
    return {user: [rank for run in runs for rank in run[user]] for user in users}


def user_values(ranks: Ranks, users: Iterable[str]) -> dict[str, np.ndarray]:
    """Each metric of each of `users`, the mean over prompts and seeds: metric → float64 (users,)."""
    return values(np.array([ranks[user] for user in users]).T, METRIC_NAMES)


def differences(ours: Ranks, theirs: Ranks) -> tuple[int, np.ndarray, np.ndarray]:
    """How much better `ours` is, user by user.

    Returns:
        (users that both have, mean difference of each metric (metrics,), its 95 % paired bootstrap interval (metrics, 2))

    Raises:
        UserError: they have no user in common.
    """
    users = [user for user in theirs if user in ours]
    if not users:
        raise UserError("two models have no user in common")
    first, second = (np.stack(list(user_values(ranks, users).values()), axis=1) for ranks in (ours, theirs))
    return len(users), (first - second).mean(axis=0), intervals(first - second)


def ndcg(ranks: Ranks) -> float:
    """Mean NDCG@10, which decides."""
    return float(user_values(ranks, ranks)["ndcg@10"].mean())


# ---- models ----


def read_dataset(data_path: str, dataset: str) -> RecData:
    """Histories and titles; item indices play no part. Raises UserError for a broken file."""
    folder = Path(data_path) / check_name(dataset)
    titles, descriptions = read_items(folder / f"{dataset}.item.json")
    inters = read_inters(folder / f"{dataset}.inter.json", len(titles))
    return RecData(dataset, folder, inters, titles, descriptions, [], None)


def clock(seconds: float) -> str:
    """Seconds as m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Tuning:
    """Runs of RecBole's models on one dataset.

    Args:
        data: its histories.
        folder: where the runs lie.
        config_file: RecBole's settings file.
        identity: what a run must share to be gone on from.
    """

    def __init__(self, data: RecData, folder: Path, config_file: Path, identity: dict[str, Any]):
        self.data, self.folder, self.config_file, self.identity = data, folder, config_file, identity

    def run(self, model: str, point: Point, seed: int) -> tuple[Path, dict[str, Any]]:
        """Train one model, unless that is done; its folder and `trained.json`."""
        rate, dropout, batch = point
        folder = self.folder / model / f"rate{rate:g}-dropout{dropout:g}-batch{batch}-seed{seed}"
        chosen = {
            "learning_rate": rate,
            **dict.fromkeys(DROPOUTS[model], dropout),
            "train_batch_size": batch,
            "seed": seed,
        }
        settings = {"model": model, "dataset": self.data.name, "recbole": {**RECBOLE, **chosen}, **self.identity}
        return folder, train(folder, self.config_file, settings)

    def ranks(self, folder: Path, split: str) -> Ranks:
        """The ranks of a run on `valid` or `test`. Raises UserError if a user is missing."""
        place = {"valid": -2, "test": -1}[split]
        targets = {user: items[place] for user, items in self.data.inters.items()}
        path = folder / f"{split}.predictions.jsonl"
        found = user_ranks(path, targets)
        if found.keys() != targets.keys():
            raise UserError(f"{path}: has {len(found):,} of {len(targets):,} users")
        return found

    def tune(self, model: str, points: list[Point], seed: int) -> tuple[Point, dict[str, Any]]:
        """The best of `points`, and `{point: {"ndcg@10", "epochs", "best_epoch", "seconds"}}` of all on validation."""
        found: dict[Point, dict[str, Any]] = {}
        for number, point in enumerate(points, 1):
            folder, trained = self.run(model, point, seed)
            score = ndcg(self.ranks(folder, "valid"))
            found[point] = {"ndcg@10": score, **{key: trained[key] for key in ("epochs", "best_epoch", "seconds")}}
            say(
                f"{model} {number}/{len(points)}: {point_words(point)}: validation NDCG@10 {score:.4f}, "
                f"epoch {trained['best_epoch']} of {trained['epochs']}, {clock(trained['seconds'])}"
            )
        best = max(found, key=lambda point: found[point]["ndcg@10"])
        return best, {point_text(point): row for point, row in found.items()}

    def row(self, model: str, point: Point, seeds: list[int]) -> Row:
        """The test figures of a model with its chosen setting."""
        runs = {seed: self.run(model, point, seed) for seed in seeds}
        ranks = {f"seed {seed}": self.ranks(folder, "test") for seed, (folder, _) in runs.items()}
        seconds = statistics.mean(trained["seconds"] for _, trained in runs.values())
        parameters = next(iter(runs.values()))[1]["parameters"]
        files = [folder / "test.predictions.jsonl" for folder, _ in runs.values()]
        seconds_text, size = clock(seconds), f"{parameters:,}"
        return Row(joined(list(ranks.values())), ranks if len(seeds) > 1 else {}, seconds_text, size, files)


def our_rows(named: list[str], data: RecData, max_his_len: int | None) -> tuple[dict[str, Row], int]:
    """The rows of `--results NAME=FILE …`, and how many items of history they saw: `max_his_len` unless that is None.

    Raises:
        UserError: a baseline's name, other data, or other histories.
    """
    targets = {user: items[-1] for user, items in data.inters.items()}
    files: dict[str, list[Path]] = {}
    for text in named:
        name, named_so, path = text.partition("=")
        if name in ("popularity", *GRID):
            raise UserError(f"--results {text}: {name} is a baseline's name")
        files.setdefault(name if named_so else "LC-Rec", []).append(Path(path if named_so else text))
    rows = {}
    for name, paths in files.items():
        for path in paths:
            used = read_results(path)["config"]["arguments"].get("max_his_len", USUAL_LENGTH)
            max_his_len = used if max_his_len is None else max_his_len
            if max(used, 0) != max(max_his_len, 0):
                raise UserError(
                    f"{path}: histories of {used} items; give --max_his_len {used}, so that all see the same"
                )
        lists = [predictions_of(path) for path in paths]
        runs = {str(path): user_ranks(file, targets) for path, file in zip(paths, lists, strict=True)}
        seeds = runs if len(runs) > 1 else {}
        rows[name] = Row(joined(list(runs.values())), seeds, *checkpoint_facts(paths[0]), lists)
    return rows, USUAL_LENGTH if max_his_len is None else max_his_len


def checkpoint_facts(results: Path) -> tuple[str, str]:
    """Training time and parameters of the checkpoint that a results file names, "–" for what is not there any more.

    A training that went on later wrote a clock of its own: their last readings are added.
    """
    folder = Path(str(read_results(results)["config"]["arguments"].get("ckpt_path", "")))
    log, weights = folder / "train.log", sorted(folder.glob("*.safetensors"))
    times = re.findall(r"^\[ *(\d+):(\d+)\]", log.read_text(encoding="utf-8"), re.M) if log.is_file() else []
    clocks = [int(minutes) * 60 + int(seconds) for minutes, seconds in times]
    trained = sum(now for now, after in pairwise([*clocks, -1]) if after < now)
    count = 0
    for path in weights:
        with safe_open(path, "pt") as file:
            count += sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    return clock(trained) if clocks else "–", f"{count:,}" if count else "–"


# ---- tables ----


def result_table(rows: dict[str, Row], everyone: int) -> str:
    """HR and NDCG of every row with intervals over users, training time, parameters; a line for each seed below its model."""
    lines: dict[str, Row] = {}
    for name, row in rows.items():
        lines[name if len(row.ranks) == everyone else f"{name} ({len(row.ranks):,} users)"] = row
        lines |= {f"{name}, {seed}": Row(ranks) for seed, ranks in row.seeds.items()}
    table = cells({name: user_values(row.ranks, row.ranks) for name, row in lines.items()}, METRIC_NAMES)
    extra = [["training", "parameters"], *([row.trained, row.parameters] for row in lines.values())]
    return markdown([[*line, *more] for line, more in zip(table, extra, strict=True)])


def difference_table(ours: dict[str, Row], others: dict[str, Row]) -> str:
    """Each of `ours` minus each of `others`, and minus the first of `ours`."""
    names = [name.replace("hit", "HR").replace("ndcg", "NDCG") for name in METRIC_NAMES.split(",")]
    table = [["difference", "users", *names]]
    for name, row in ours.items():
        for other, reference in {**others, **dict(list(ours.items())[:1])}.items():
            if other == name:
                continue
            users, means, ends = differences(row.ranks, reference.ranks)
            texts = [f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]" for mean, (low, high) in zip(means, ends, strict=True)]
            table.append([f"{name} − {other}", f"{users:,}", *texts])
    return markdown(table)


def grouped_table(rows: dict[str, Row], counted: str, times: dict[str, int], groups: dict[int, str]) -> str:
    """HR@10 / NDCG@10 of the users that all rows have, in groups.

    Args:
        counted: what `times` (user → how often) are counts of.
        groups: the least count of each group → its name; one begins at 0.
    """
    members: dict[str, list[str]] = {groups[least]: [] for least in sorted(groups)}
    for user in set.intersection(*(set(row.ranks) for row in rows.values())):
        members[groups[max(least for least in groups if least <= times[user])]].append(user)
    members = {name: users for name, users in members.items() if users}
    table = [[counted, *(f"{name} ({len(users):,})" for name, users in members.items())]]
    for name, row in rows.items():
        found = [user_values(row.ranks, users) for users in members.values()]
        table.append([name, *(f"{each['hit@10'].mean():.4f} / {each['ndcg@10'].mean():.4f}" for each in found)])
    return markdown(table)


def followed_table(rows: dict[str, Row], data: RecData) -> str:
    """Users in groups by how often the target followed the last item in anybody's training part."""
    steps = Counter(step for items in data.inters.values() for step in pairwise(items[:-2]))
    times = {user: steps[items[-2], items[-1]] for user, items in data.inters.items()}
    groups = {0: "never", 1: "once or twice", 3: "three times or more"}
    return grouped_table(rows, "target after the last item in training", times, groups)


def rarity_table(rows: dict[str, Row], data: RecData) -> str:
    """Users in groups by how many training interactions the target has."""
    counts = Counter(item for items in data.inters.values() for item in items[:-2])
    times = {user: counts[items[-1]] for user, items in data.inters.items()}
    groups = {0: "none", 1: "one or two", 3: "three to ten", 11: "more"}
    return grouped_table(rows, "training interactions of the target", times, groups)


def seen_table(rows: dict[str, Row], data: RecData) -> str:
    """How many of the ten best of a row's lists the user has met before, and HR@10 / NDCG@10 of all its lists without these."""
    past = {user: set(items[:-1]) for user, items in data.inters.items()}
    table = [["", "met before, of the ten best", "HR@10 / NDCG@10 without what was met before"]]
    for name, row in rows.items():
        met, ranks = [], []
        for record in (record for file in row.files for record in read_predictions(file)):
            items, seen = record["items"], past[record["user"]]
            met.append(np.mean([item in seen for item in items[:10]]))
            ranks.append(rank_of(record["target"], [item for item in items if item not in seen]))
        if ranks:
            figures = {key: each.mean() for key, each in values(np.array([ranks]), METRIC_NAMES).items()}
            table.append([name, f"{np.mean(met):.1%}", f"{figures['hit@10']:.4f} / {figures['ndcg@10']:.4f}"])
    return markdown(table)


def notes(data: RecData, grids: dict[str, dict[str, Any]], chosen: dict[str, str], seeds: str) -> str:
    """What was ranked, and a line for each model about its grid."""
    ranked = f"{data.name}: {len(data.inters):,} users, all {len(data.titles):,} items ranked"
    lines = [f"{ranked}; brackets: 95 % bootstrap over users."]
    for model, points in grids.items():
        scores = ", ".join(f"{point} {row['ndcg@10']:.4f}" for point, row in points.items())
        total = clock(sum(row["seconds"] for row in points.values()))
        lines.append(f"{model}: {chosen[model]}, seeds {seeds}; grid, validation NDCG@10: {scores}; all of it {total}.")
    return "\n".join(lines)


def write_references(path: Path, dataset: str, rows: dict[str, Row], command: str, chosen: dict[str, str]) -> None:
    """Replace the rows of these models for `dataset` in a file of recorded references (`report.recorded`)."""
    content = read_json(path) if path.exists() else {}
    recorded(path if content else None, dataset)  # refuses a file of another form
    entries = [entry for entry in content.get(dataset, []) if entry["model"] not in rows]
    for name, row in rows.items():
        metrics = {key: round(float(column.mean()), 4) for key, column in user_values(row.ranks, row.ranks).items()}
        entries.append({"model": name, "metrics": metrics, "source": f"{SOURCE} ({chosen[name]})", "command": command})
    write_json(path, {**content, dataset: entries})


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(str(__doc__).format(grid=grid_text(GRID)))
    parser.add_argument("--data_path", default="./data", help="folder that holds <dataset>/")
    parser.add_argument("--dataset", required=True, help="name of the dataset")
    parser.add_argument("--models", nargs="*", default=list(GRID), choices=list(GRID), help="which of RecBole's models")
    parser.add_argument(
        "--grid",
        nargs="+",
        type=grid_point,
        metavar="RATE/DROPOUT/BATCH",
        help="points for every model instead of the above",
    )
    parser.add_argument("--seeds", nargs="+", type=whole(0, 2**32 - 1), default=[42], help="the first is the grid's")
    parser.add_argument(
        "--max_his_len",
        type=whole(-1),
        help=f"items of history at most; -1: all; default: what --results saw, or {USUAL_LENGTH}",
    )
    parser.add_argument(
        "--results",
        nargs="*",
        default=[],
        metavar="NAME=FILE",
        help="a name, up to the first =, and test.py's results file",
    )
    parser.add_argument("--work", type=folder_name, default="./results/compare", help="folder for runs and tables")
    parser.add_argument("--references", type=file_name, metavar="F", help="write the baselines' rows to this file")
    options = parser.parse_args(argv)
    data = read_dataset(options.data_path, options.dataset)
    ours, max_his_len = our_rows(options.results, data, options.max_his_len)  # their faults first: training takes long
    folder = Path(options.work) / data.name
    places = popularity_ranks(data, leave_out_seen=False).tolist()
    rows = {"popularity": Row({user: [rank] for user, rank in zip(data.inters, places, strict=True)})}
    grids, chosen = {}, {}
    if options.models:
        grid = {model: options.grid or GRID[model] for model in options.models}
        say(f"grid:\n{grid_text(grid)}")
        config_file = prepare(options.data_path, data.name, folder / "recbole", max_his_len)
        identity = {"max_his_len": max_his_len, "data": data_hashes(options.data_path, data.name)}
        tuning = Tuning(data, folder, config_file, identity)
        for model in options.models:
            point, grids[model] = tuning.tune(model, grid[model], options.seeds[0])
            chosen[model] = point_words(point)
            rows[model] = tuning.row(model, point, options.seeds)
    users = set(rows["popularity"].ranks).intersection(*(row.ranks for row in ours.values()))
    fewer = rows if len(users) < len(data.inters) else {}
    same = {f"{name}, the users of all": Row({user: row.ranks[user] for user in users}) for name, row in fewer.items()}
    tables = [result_table(rows | ours | same, len(data.inters))]
    tables += [difference_table(ours, rows)] if ours else []
    tables += [table(rows | ours, data) for table in (followed_table, rarity_table, seen_table)]
    seeds = " ".join(map(str, options.seeds))
    text = "\n\n".join([*tables, notes(data, grids, chosen, seeds)]) + "\n"
    with atomic_path(folder / "compare.md") as path:
        path.write_text(text, encoding="utf-8")
    record = {"arguments": vars(options), "versions": versions(), "grids": grids, "chosen": chosen}
    write_json(folder / "compare.json", record)
    if options.references:
        command = (
            f"python benchmarks/compare.py --data_path {options.data_path} --dataset {data.name} --models "
            f"{' '.join(chosen)} --seeds {seeds} --max_his_len {max_his_len}"
        )
        command += f" --grid {' '.join(map(point_text, options.grid))}" if options.grid else ""
        write_references(Path(options.references), data.name, {name: rows[name] for name in chosen}, command, chosen)
    say(f"{text}\n{folder / 'compare.md'}: these tables")


if __name__ == "__main__":
    run_main(main)
