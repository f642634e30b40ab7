"""Predictions and results on disk: the only module that writes, reads and checks them.

A results file (`--results_file`) has `test_prompt_ids`, `mean_results`, `min_results`, `max_results`, `all_prompt_results`
and `config`. Beside it `<stem>.predictions.jsonl` has a line for each (prompt, sample): `{"prompt_id", "sample", "user",
"target", "target_item", "items", "scores"}`, best first. While a test runs, each process appends to a file of its own in
`<stem>.partial/`; the same command after an interruption goes on from these.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metrics.ranking import means, parse_metrics, rank_of
from processes import barrier, leave, on_main
from utils import (
    UserError,
    atomic_path,
    is_main,
    missing_folders,
    parse_json,
    rank,
    read_json,
    regular_file,
    say,
    write_json,
)

OWN_PARTS = re.compile(
    r"part-\d{5,}\.jsonl|\.?(config\.json|token|anew\.json)(\..*)?"
)  # what lies in the partial folder
ANEW = "anew.json"  # in the partial folder: the earlier predictions are to be replaced (--restart)

# ---- metrics of ranked lists ----


def check_metrics(names: str) -> str:
    """`names` if they are all metrics.

    Raises:
        UserError: an unknown metric, or a k that is no positive number.
    """
    try:
        parse_metrics(names)
    except ValueError as error:
        raise UserError(f"--metrics: {error}") from None
    return names


def too_long(names: str, num_items: int) -> list[str]:
    """Those of `names` whose k exceeds lists of `num_items` items: they cannot tell more than k = `num_items`."""
    return [name for name, _, k in parse_metrics(names) if k > num_items]


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


def ranks_of(records: Iterable[dict[str, Any]]) -> dict[int, list[int]]:
    """prompt id → the target's rank in each record's items.

    Raises:
        UserError: a sample occurs twice for a prompt.
    """
    ranks: dict[int, list[int]] = {}
    seen = set()
    for record in records:
        key = (record["prompt_id"], record["sample"])
        if key in seen:
            raise UserError(f"sample {key[1]} of prompt {key[0]} occurs twice in the predictions")
        seen.add(key)
        ranks.setdefault(record["prompt_id"], []).append(rank_of(record["target"], record["items"]))
    return ranks


# ---- reading ----


def parse_prediction(line: bytes) -> dict[str, Any]:
    """A line of a predictions file. Raises ValueError if it is none."""
    record = parse_json(line)
    if not isinstance(record, dict):
        raise ValueError("not an object")
    for key in ("prompt_id", "sample", "target"):
        if type(record.get(key)) is not int:
            raise ValueError(f"{key} is not an integer")
    items = record.get("items")
    if not isinstance(items, list) or not all(type(item) is int for item in items):
        raise ValueError("items is not a list of integers")
    if len(set(items)) < len(items):
        raise ValueError("names an item twice")
    return record


def read_predictions(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a predictions file, checked, one after the other.

    Raises:
        UserError: the file is missing, or a line is not a record with `prompt_id`, `sample`, `target` and `items`.
    """
    try:
        with open(regular_file(path), "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield parse_prediction(line)
                except ValueError as error:
                    raise UserError(f"{path}, line {number}: no prediction ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_results(path: Path, insist: bool = True) -> dict[str, Any]:
    """The content of a results file, with its `config`.

    Args:
        insist: `config` must have the arguments; else it is {} where it is no object.

    Raises:
        UserError: test.py did not write it.
    """
    content = read_json(path)
    config = content.get("config") if isinstance(content, dict) else None
    whole = isinstance(config, dict) and isinstance(config.get("arguments"), dict)
    if not isinstance(content, dict) or (insist and not whole):
        raise UserError(f"{path}: is not a results file of test.py")
    return {**content, "config": config if isinstance(config, dict) else {}}


def predictions_of(results: Path) -> Path:
    """Where the predictions of a results file are."""
    return results.with_name(f"{results.stem}.predictions.jsonl")


# ---- writing ----


@dataclass(frozen=True)
class Expected:
    """What the predictions of a test must be: a check of lines that an earlier, interrupted run left.

    Args:
        targets: (prompt, sample) → the target's canonical item, in the order of the file.
        items: how many items the dataset has.
        length: items of a list.
    """

    targets: dict[tuple[int, int], int]
    items: int
    length: int

    def fits(self, record: dict[str, Any]) -> bool:
        """Whether `record` can be of this test."""
        target = self.targets.get((record["prompt_id"], record["sample"]))
        inside = all(0 <= item < self.items for item in record["items"])
        return record["target"] == target and inside and len(record["items"]) == self.length


class Store:
    """The predictions of a run on disk: one growing file per process while it runs, one sorted file at its end.

    Args:
        identity: what of a `config` a resumed run must share, as a flat dictionary.
    """

    def __init__(self, results_file: str, expected: Expected, config: dict[str, Any], identity: Any):
        self.results = Path(results_file)
        self.predictions = predictions_of(self.results)
        self.partial = self.results.with_name(f"{self.results.stem}.partial")
        self.expected, self.config, self.identity = expected, json.loads(json.dumps(config)), identity
        self.file: Any = None
        self.new: list[Path] = []  # folders that this run makes

    def open(self, restart: bool) -> set[tuple[int, int]]:
        """Find out what an earlier run left, and be ready to append; the keys (prompt, sample) that are missing.

        Raises:
            UserError: there are results of another run, and no `restart`; or not all processes see the same disk.
        """
        try:
            token = on_main(lambda: self._prepare(restart))
        except UserError:
            self.give_up()
            raise
        mark = self.partial / "token"
        if not mark.is_file() or mark.read_text() != token:
            raise UserError(f"{self.results.parent}: every process must see this folder (a disk that all nodes share)")
        missing = set(self.expected.targets) - set(on_main(lambda: list(self._lines())))
        if not missing:
            say("all predictions are there already (--restart makes them anew)")
        elif len(missing) < (total := len(self.expected.targets)):
            say(f"going on: {total - len(missing):,} of {total:,} predictions are there")
        return missing

    def _prepare(self, restart: bool) -> str:
        self.new = missing_folders(self.partial)
        there = [path for path in (self.results, self.predictions) if os.path.lexists(path)]
        self._check_own(there)
        if restart:
            self._remove_partial()
        made = self.partial / "config.json"
        if made.is_file():
            self._compare(made, read_json(made))
        elif there and not restart:
            if len(there) == 1:
                raise UserError(f"{there[0]} exists; name another --results_file, or replace it with --restart")
            self._compare(self.results, read_results(self.results)["config"])
        token = os.urandom(8).hex()
        try:
            if restart:  # what is there stays until the new results take its place, and is not gone on from
                write_json(self.partial / ANEW, True)
            write_json(made, self.config)
            with atomic_path(self.partial / "token") as path:
                path.write_text(token)
        except UserError as error:
            raise UserError(f"--results_file {error}") from None
        return token

    def _check_own(self, there: list[Path]) -> None:
        """Refuse to go on from, or to remove, what no test wrote."""
        try:
            if self.results in there:
                read_results(self.results)
            if self.predictions in there:
                next(read_predictions(self.predictions), None)
        except UserError as error:
            raise UserError(f"{error}; name another --results_file") from None
        own = [path for path in self._in_partial() if OWN_PARTS.fullmatch(path.name) and path.is_file()]
        foreign = next((path for path in self._in_partial() if path not in own), None)
        if foreign is not None:
            raise UserError(f"{foreign}: was not written by a test; name another --results_file")

    def _compare(self, path: Path, before: Any) -> None:
        try:
            old = self.identity(before)
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path} is no result of this script; name another --results_file, or use --restart"
            ) from None
        new = self.identity(self.config)
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                raise UserError(
                    f"{path} was made with another {key.lstrip('-')} ({shorten(old.get(key))}, now {shorten(new.get(key))}); "
                    "name another --results_file, or throw the earlier predictions away with --restart"
                )

    def _lines(self) -> dict[tuple[int, int], str]:
        """The lines of this test in all files that are there, by (prompt, sample); of repeated ones the first."""
        lines: dict[tuple[int, int], str] = {}
        whole = [] if (self.partial / ANEW).exists() else [self.predictions]
        for path in [*whole, *sorted(self.partial.glob("part-*.jsonl"))]:
            if path.is_file():
                with open(path, "rb") as file:
                    for line in file:
                        self._take(line, lines)
        return lines

    def _take(self, line: bytes, lines: dict[tuple[int, int], str]) -> None:
        if not line.endswith(b"\n"):  # a process that was killed may have left half a line
            return
        try:
            record = parse_prediction(line)
            if self.expected.fits(record):
                lines.setdefault((record["prompt_id"], record["sample"]), line.decode())
        except ValueError:
            return

    def append(self, records: list[dict[str, Any]]) -> None:
        """Add `records` to this process's file and hand them to the operating system."""
        if self.file is None:
            path = self.partial / f"part-{rank():05d}.jsonl"
            drop_half_line(path)
            self.file = open(path, "ab", buffering=0)  # noqa: SIM115  (open for as long as the run)
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        try:
            self.file.write(lines.encode())
        except OSError as error:
            raise UserError(f"{self.partial}: cannot be written ({error.strerror}); the same command goes on") from None

    def give_up(self) -> None:
        """After a failure: folders that this run made and that hold no prediction go."""
        if is_main() and self.partial in self.new and not any(self.partial.glob("part-*.jsonl")):
            self._remove_partial()
            for folder in self.new[1:]:
                if folder.is_dir():
                    folder.rmdir()

    def close(self, metrics: str, prompt_ids: str) -> dict[str, Any]:
        """Put the parts together and write predictions and results; the results on the main process, elsewhere {}."""
        if self.file is not None:
            self.file.close()
        barrier()  # all have written their last line before the main process reads them
        results = self._write(metrics, prompt_ids) if is_main() else {}
        leave()
        if is_main():
            self._remove_partial()
        return results

    def _write(self, metrics: str, prompt_ids: str) -> dict[str, Any]:
        lines = self._lines()
        absent = [key for key in self.expected.targets if key not in lines]
        if absent:
            raise RuntimeError(f"{len(absent)} predictions are missing, the first for prompt and sample {absent[0]}")
        ranks = ranks_of(json.loads(lines[key]) for key in self.expected.targets)
        results = {"test_prompt_ids": prompt_ids, **summarise(ranks, metrics), "config": self.config}
        try:
            with atomic_path(self.predictions) as path, open(path, "w", encoding="utf-8") as file:
                file.writelines(lines[key] for key in self.expected.targets)
            write_json(self.results, results)
        except UserError as error:
            raise UserError(f"{error}; the same command goes on") from None
        return results

    def _remove_partial(self) -> None:
        """Remove what a test writes to the partial folder; its configuration last, as an interrupted removal is no new start."""
        for path in self._in_partial():  # anew.json first: without it what is there is the new result
            path.unlink()
        if self.partial.is_dir():
            self.partial.rmdir()

    def _in_partial(self) -> list[Path]:
        """What lies in the partial folder, in the order in which it is to be removed."""
        found = self.partial.iterdir() if self.partial.is_dir() else ()
        return sorted(found, key=lambda path: (path.name == "config.json", path.name != ANEW, path.name))


def drop_half_line(path: Path) -> None:
    """Cut the file after its last line feed."""
    if path.is_file():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            with open(path, "r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)


def shorten(value: Any) -> str:
    """`value` for a message: digests are cut."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
