"""What the report shows of scored runs: results of test.py with their ranked lists, compared with the data they are of.

The lists are read one after the other; kept is a rank for each user and prompt, and the lists of a few users.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data import RecData
from metrics.ranking import rank_of
from results import predictions_of, read_predictions, read_results
from utils import UserError, sha256

SHOWN = 8  # users whose lists are kept


@dataclass(frozen=True)
class Scored:
    """One results file and the lists beside it.

    Args:
        label: its name in the table.
        config: what the results file says of the run, {} if nothing.
        users: the number of each column's user in the interaction file, ascending.
        ranks: the target's rank from 0, or -1 if it is not in the list: int64 (prompts, users).
        unseen: the same in the lists without what the user has met before the target.
        longest: items of the longest list.
        shown: the records of a few users for the first prompt.
    """

    label: str
    path: Path
    config: dict[str, Any]
    users: np.ndarray
    ranks: np.ndarray
    unseen: np.ndarray
    longest: int
    shown: list[dict[str, Any]]

    @property
    def checkpoint(self) -> Path | None:
        """The folder that was tested, as test.py was given it."""
        arguments = self.config.get("arguments")
        folder = arguments.get("ckpt_path") if isinstance(arguments, dict) else None
        return Path(folder) if isinstance(folder, str) and folder else None


def read_run(path: Path, label: str, data: RecData, seed: int = 0) -> Scored:
    """The results file `path` and `<stem>.predictions.jsonl` beside it.

    Args:
        seed: draws the users whose lists are kept.

    Raises:
        UserError: it is of another task than seqrec or of other data, or the lists are incomplete.
    """
    config = read_results(path, insist=False)["config"]
    task = config.get("task", "seqrec")
    if task != "seqrec":
        raise UserError(f"{path}: is of the task {task}; the references are for seqrec")
    check_same_data(path, config, data)
    predictions = predictions_of(path)
    lists = _Lists(predictions, data, seed)
    for record in read_predictions(predictions):
        lists.add(record)
    users, ranks, unseen = lists.arrays()
    return Scored(label, path, config, users, ranks, unseen, lists.longest, lists.shown())


def check_same_data(path: Path, config: dict[str, Any], data: RecData) -> None:
    """Refuse results that were made with other files. Raises UserError."""
    hashes = config.get("data_sha256")
    for name, file in data.files.items():
        before = hashes.get(name) if isinstance(hashes, dict) else None
        if isinstance(before, str) and before != sha256(file):
            raise UserError(
                f"{path}: was made with another {file.name} than {file} (--data_path, --dataset, --index_file)"
            )


class _Lists:
    """Collects the records of a predictions file."""

    def __init__(self, path: Path, data: RecData, seed: int):
        self.path, self.data, self.longest = path, data, 0
        self.number = {user: number for number, user in enumerate(data.user_ids)}
        self.turn = np.random.default_rng(seed).permutation(len(data.user_ids))  # who is shown first
        self.ranks: dict[
            int, np.ndarray
        ] = {}  # prompt → (users, 2): in the list, and without what was seen; -2: no record
        self._shown: list[tuple[int, dict[str, Any]]] = []
        self._first: int | None = None

    def add(self, record: dict[str, Any]) -> None:
        """Check and count one record."""
        data, items, prompt = self.data, record["items"], record["prompt_id"]
        where = f"{self.path}: sample {record['sample']} of prompt {prompt}"
        user = record.get("user")
        number = self.number.get(user) if isinstance(user, str) else None
        if number is None or not isinstance(user, str):
            raise UserError(f"{where}: the user {user!r} is not in {data.name}")
        for item in items:
            if type(item) is not int or not 0 <= item < len(data.titles):
                raise UserError(f"{where}: the item {item!r} is not in {data.name}")
        history = data.inters[user]
        target = data.canonical[history[-1]]
        if record["target"] != target:
            raise UserError(f"{where}: the target is {record['target']}, in {data.name} it is {target}")
        found = self.ranks.setdefault(prompt, np.full((len(self.number), 2), -2, dtype=np.int64))
        if found[number, 0] != -2:
            raise UserError(f"{where}: the user {user!r} occurs twice")
        seen = {data.canonical[item] for item in history[:-1]} - {target}
        found[number] = rank_of(target, items), rank_of(target, [item for item in items if item not in seen])
        self.longest = max(self.longest, len(items))
        self._first = prompt if self._first is None else self._first
        if prompt == self._first:
            self._shown.append((int(self.turn[number]), record))
            if len(self._shown) > 4 * SHOWN:
                self._shown = sorted(self._shown, key=lambda pair: pair[0])[:SHOWN]

    def shown(self) -> list[dict[str, Any]]:
        """The kept records, in the order of the users."""
        kept = [record for _, record in sorted(self._shown, key=lambda pair: pair[0])[:SHOWN]]
        return sorted(kept, key=lambda record: self.number[record["user"]])

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`Scored.users`, `.ranks` and `.unseen`."""
        if not self.ranks:
            raise UserError(f"{self.path}: holds no predictions")
        found = np.stack(list(self.ranks.values()))
        there = found[:, :, 0] != -2
        if (there != there[0]).any():
            raise UserError(f"{self.path}: the prompts have different users; score them all with one command")
        users = np.flatnonzero(there[0])
        return users, found[:, users, 0], found[:, users, 1]
