"""The six tasks (LC-Rec, section III-C), a row each: which samples a split has, and which texts a sample offers to a template.

Splits are leave-one-out: every prefix of `items[:-2]` predicts its next item in training, `items[-2]` is the validation
target, `items[-1]` the test target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data import RecData, UserTexts
from utils import UserError


@dataclass(frozen=True)
class HistoryFormat:
    """How a history becomes text."""

    max_his_len: int = 20
    add_prefix: bool = False
    his_sep: str = ", "

    def cut(self, items: list[int]) -> list[int]:
        """The newest `max_his_len` items; all for 0 and below."""
        return items[-self.max_his_len :] if self.max_his_len > 0 else items

    def join(self, texts: list[str]) -> str:
        """The texts, numbered if asked for, in one line."""
        if self.add_prefix:
            texts = [f"{number}. {text}" for number, text in enumerate(texts, 1)]
        return self.his_sep.join(texts)


@dataclass(frozen=True)
class Sample:
    """One sample before a template is chosen: whose it is, what comes before, what is asked for, and the slots' texts."""

    user: str
    history: list[int]
    target: int
    slots: dict[str, str]


def prefix_rows(data: RecData) -> np.ndarray:
    """(user number, position of the target) for every prefix of every training part: int32 (n, 2)."""
    targets = np.array([max(0, len(items) - 3) for items in data.inters.values()])
    users = np.repeat(np.arange(len(targets)), targets)
    starts = np.repeat(np.cumsum(targets) - targets, targets)
    return np.stack([users, np.arange(len(users)) - starts + 1], axis=1).astype(np.int32)


def longest_rows(rows: np.ndarray) -> np.ndarray:
    """Of `prefix_rows` each user's last one."""
    return rows[np.diff(rows[:, 0], append=-1) != 0]


def window_rows(data: RecData, size: int, rng: np.random.Generator) -> np.ndarray:
    """(user number, position of the target, first position of the history): training parts cut into pieces of `size` items.

    A longer part is cut at places that `rng` draws, where every item but a piece's first is the target of what stands
    before it in its piece. As many rows for every draw: int32 (n, 3); the row of an empty piece is the user's newest `size`.
    """
    rows = []
    for user, items in enumerate(data.inters.values()):
        length = len(items) - 2
        pieces = 1 if length <= size else -(-length // size) + 1
        end = length if pieces == 1 else int(rng.integers(1, size + 1))
        for piece in range(pieces):
            start, stop = max(0, end + (piece - 1) * size), min(length, end + piece * size)
            if stop - start < 2:
                start, stop = max(0, length - size), length
            if stop - start >= 2:
                rows.append((user, stop - 1, start))
    return np.array(rows, dtype=np.int32).reshape(-1, 3)


def _last_rows(back: int) -> Callable[[RecData], np.ndarray]:
    """(user number, position of the target) with the target `back` items from the end."""

    def rows(data: RecData) -> np.ndarray:
        return np.array([[user, len(items) - back] for user, items in enumerate(data.inters.values())], dtype=np.int32)

    return rows


def _item_rows(data: RecData) -> np.ndarray:
    return np.arange(len(data.titles), dtype=np.int32)[:, None]


def _search_rows(split: str) -> Callable[[RecData], np.ndarray]:
    """Every user with preferences and an intention of `split`. Raises UserError if there is none."""

    def rows(data: RecData) -> np.ndarray:
        users = _users(data)
        found = [number for number, user in enumerate(users.user_ids) if user in users.intentions.get(split, {})]
        if not found:
            raise UserError(
                f"{data.files.get('user')}: user_vague_intention has nothing in {split!r}, which itemsearch needs"
            )
        return np.array(found, dtype=np.int32)[:, None]

    return rows


def _preference_rows(held_out: int) -> Callable[[RecData], np.ndarray]:
    """The users with preferences who have a history before their `held_out` last items."""

    def rows(data: RecData) -> np.ndarray:
        users = _users(data).user_ids
        found = [number for number, user in enumerate(users) if len(data.inters[user]) > held_out]
        return np.array(found, dtype=np.int32).reshape(-1, 1)

    return rows


def _users(data: RecData) -> UserTexts:
    if data.users is None:
        raise UserError(f"{data.folder}: this task needs {data.name}.user.json; data_process/user_texts.py makes it")
    return data.users


def _item_slots(data: RecData, item: int) -> dict[str, str]:
    return {"item": data.index_text(item), "title": data.titles[item], "description": data.descriptions[item]}


def _history_slots(data: RecData, form: HistoryFormat, history: list[int]) -> dict[str, str]:
    return {
        "inters": form.join([data.index_text(item) for item in history]),
        "inter_titles": form.join([f'"{data.titles[item]}"' for item in history]),
    }


def _sequence_sample(data: RecData, row: np.ndarray, form: HistoryFormat, rng: np.random.Generator) -> Sample:
    user, position = data.user_ids[row[0]], int(row[1])
    items, first = data.inters[user], int(row[2]) if len(row) > 2 else 0
    history, target = form.cut(items[first:position]), items[position]
    return Sample(user, history, target, _history_slots(data, form, history) | _item_slots(data, target))


def _item_sample(data: RecData, row: np.ndarray, form: HistoryFormat, rng: np.random.Generator) -> Sample:
    return Sample("", [], int(row[0]), _item_slots(data, int(row[0])))


def _search_sample(split: str) -> Callable[..., Sample]:
    def sample(data: RecData, row: np.ndarray, form: HistoryFormat, rng: np.random.Generator) -> Sample:
        users = _users(data)
        user = users.user_ids[row[0]]
        intention = users.intentions[split][user]
        history = form.cut(intention.inters)
        preferences = users.preferences[user]
        slots = _history_slots(data, form, history) | {
            "item": data.index_text(intention.item),
            "explicit_preference": preferences[rng.integers(len(preferences))],
            "query": intention.queries[rng.integers(2)],
            "user_related_intention": intention.queries[0],
            "item_related_intention": intention.queries[1],
        }
        return Sample(user, history, intention.item, slots)

    return sample


def _preference_sample(held_out: int) -> Callable[..., Sample]:
    """The history leaves the user's `held_out` last items out."""

    def sample(data: RecData, row: np.ndarray, form: HistoryFormat, rng: np.random.Generator) -> Sample:
        users = _users(data)
        user = users.user_ids[row[0]]
        history = form.cut(data.inters[user][:-held_out])
        preferences = users.preferences[user]
        preference = preferences[rng.integers(len(preferences))]
        slots = _history_slots(data, form, history) | {"explicit_preference": preference}
        return Sample(user, history, -1, slots)

    return sample


@dataclass(frozen=True)
class Split:
    """The samples of a split of a task.

    Args:
        rows: the data → a row of integers for each sample, int32 (n, 1 to 3).
        sample: (data, row, history format, generator) → the sample.
        user_parts: what of `<D>.user.json` it needs (`data.USER_PARTS`).
    """

    rows: Callable[[RecData], np.ndarray]
    sample: Callable[[RecData, np.ndarray, HistoryFormat, np.random.Generator], Sample]
    user_parts: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        asks: the slots that an instruction may have; those of the answer are not among them, or they would betray it.
        answers: the slots that a response may have.
        splits: "train", and "valid" and "test" where the task has some. A task with "test" can be tested.
        drawn: how many training samples are drawn unless `--train_data_sample_num` says it; 0: all.
    """

    asks: frozenset[str]
    answers: frozenset[str]
    splits: dict[str, Split]
    drawn: int = 0


_ITEMS = {"train": Split(_item_rows, _item_sample)}
_SEQUENCES = {
    "train": Split(prefix_rows, _sequence_sample),
    "valid": Split(_last_rows(2), _sequence_sample),
    "test": Split(_last_rows(1), _sequence_sample),
}
_SEARCHES = {
    split: Split(_search_rows(split), _search_sample(split), frozenset({"preference", split}))
    for split in ("train", "test")
}
_PREFERENCES = {
    split: Split(_preference_rows(held_out), _preference_sample(held_out), frozenset({"preference"}))
    for split, held_out in (("train", 3), ("valid", 2))
}
_ITEM, _TEXT = frozenset({"item"}), frozenset({"title", "description"})
_INTENTION = frozenset({"query", "user_related_intention", "item_related_intention", "explicit_preference", "inters"})

TASKS: dict[str, Task] = {
    "seqrec": Task(frozenset({"inters"}), _ITEM, _SEQUENCES),
    "item2index": Task(_TEXT, _ITEM, _ITEMS),
    "index2item": Task(_ITEM, _TEXT, _ITEMS),
    "fusionseqrec": Task(frozenset({"inters", "inter_titles"}), _ITEM | _TEXT, _SEQUENCES, drawn=100_000),
    "itemsearch": Task(_INTENTION, _ITEM, _SEARCHES),
    "preferenceobtain": Task(frozenset({"inters"}), frozenset({"explicit_preference"}), _PREFERENCES),
}
TEST_TASKS = tuple(name for name, task in TASKS.items() if "test" in task.splits)
