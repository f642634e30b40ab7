"""The dataset's files in `<data_path>/<dataset>/` (docs/formats.md), read and checked once: what comes out is plain data.

python data.py --check --data_path ./data --dataset Games      # a summary, and every fault (data_check.py)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from utils import UserError, is_plain_name, read_json, say

ITEM_TOKEN = re.compile(r"<[a-z]+_[0-9]+>")
TITLE_EDGES = " \t\r\n.!?,;:`"
USER_PARTS = ("preference", "train", "test")  # of `<D>.user.json`: preferences, and the intentions of two splits


@dataclass(frozen=True)
class Intention:
    """What a user searched for: two wordings, the item that was meant, and the history before it."""

    item: int
    inters: list[int]
    queries: tuple[str, str]  # user-related, item-related


@dataclass(frozen=True)
class UserTexts:
    """`<D>.user.json`: preferences of every user, and a training and a test intention."""

    preferences: dict[str, list[str]]
    intentions: dict[str, dict[str, Intention]]  # "train" | "test" → user → intention

    @cached_property
    def user_ids(self) -> list[str]:
        """The users with preferences, in the file's order."""
        return list(self.preferences)


@dataclass(frozen=True)
class RecData:
    """One dataset, checked: every item of every history has a text and an index."""

    name: str
    folder: Path
    inters: dict[str, list[int]]
    titles: list[str]
    descriptions: list[str]
    indices: list[tuple[str, ...]]
    users: UserTexts | None
    files: dict[str, Path] = field(default_factory=dict)

    @cached_property
    def user_ids(self) -> list[str]:
        """The users in the file's order."""
        return list(self.inters)

    @cached_property
    def item_tokens(self) -> list[str]:
        """The distinct item tokens, sorted as strings: the order in which they enter the vocabulary."""
        return sorted({token for index in self.indices for token in index})

    @cached_property
    def canonical(self) -> list[int]:
        """For every item the lowest id that has the same index."""
        first: dict[tuple[str, ...], int] = {}
        return [first.setdefault(index, item) for item, index in enumerate(self.indices)]

    @cached_property
    def train_counts(self) -> np.ndarray:
        """How often every item occurs in the training parts (`items[:-2]`): int64 (items,)."""
        counts = np.zeros(len(self.titles), dtype=np.int64)
        for items in self.inters.values():
            np.add.at(counts, items[:-2], 1)
        return counts

    @cached_property
    def shared_items(self) -> int:
        """How many items share their index with another item."""
        _, counts = np.unique(self.canonical, return_counts=True)
        return int(counts[counts > 1].sum())

    def index_text(self, item: int) -> str:
        """The item's index as text, such as `<a_12><b_201><c_7><d_88>`."""
        return "".join(self.indices[item])


def clean_title(title: str) -> str:
    """A title without blanks, `.!?,;:` and back-ticks at its ends."""
    return title.strip(TITLE_EDGES)


# ---- reading and checking ----


def load_data(
    data_path: str, dataset: str, index_file: str = ".index.json", user_parts: Collection[str] = ()
) -> RecData:
    """Read and check the files of a dataset.

    Args:
        data_path: the folder that holds `<dataset>/`.
        index_file: the ending of the index file, such as `.index.json`.
        user_parts: which of `USER_PARTS` to read; nothing else of `<dataset>.user.json` is looked at.

    Raises:
        UserError: a file is missing or broken; the message says file, key and reason.
    """
    if not is_plain_name(dataset):
        raise UserError(f"--dataset {dataset!r}: is not the name of a folder in --data_path")
    folder = Path(data_path) / dataset
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (--data_path and --dataset)")
    files = {
        "inter": folder / f"{dataset}.inter.json",
        "item": folder / f"{dataset}.item.json",
        "index": folder / f"{dataset}{index_file}",
    }
    if user_parts:
        files["user"] = folder / f"{dataset}.user.json"
    titles, descriptions = read_items(files["item"])
    indices = check_index(files["index"], read_json(files["index"]), len(titles))
    inters = read_inters(files["inter"], len(titles))
    users = read_users(files["user"], inters, len(titles), user_parts) if user_parts else None
    data = RecData(dataset, folder, inters, titles, descriptions, indices, users, files)
    if data.shared_items:
        say(
            f"warning: {files['index']}: {data.shared_items} of {len(titles)} items share their index with another item; "
            "a hit on the index counts for each of them"
        )
    return data


def refuse(message: str) -> None:
    """What is done about a fault by default: raise it. `data_check.py` collects them instead."""
    raise UserError(message)


Fault = Callable[[str], None]


def _object(path: Path, content: Any, key: str = "") -> dict:
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}:{f' {key!r}' if key else ''} must be an object that is not empty")
    return content


def read_items(path: Path, fault: Fault = refuse) -> tuple[list[str], list[str]]:
    """Titles and descriptions by item id, stripped.

    Args:
        fault: called with what is wrong, file and key; where it returns, the item's texts are "".

    Raises:
        UserError: by default at the first fault.
    """
    content = _object(path, read_json(path))
    titles, descriptions = [], []
    for number in range(len(content)):
        entry = content.get(str(number))
        texts = ["", ""]
        if not isinstance(entry, dict):
            fault(f"{path}: has no item {str(number)!r}; the {len(content)} keys must count from 0")
        else:
            texts = _item_texts(f"{path}: item {str(number)!r}", entry, fault)
        titles.append(clean_title(texts[0]))
        descriptions.append(texts[1].strip())
    return titles, descriptions


def _item_texts(where: str, entry: dict, fault: Fault) -> list[str]:
    texts = [entry.get("title"), entry.get("description", "")]
    for place, name in enumerate(("title", "description")):
        if not isinstance(texts[place], str):
            fault(f"{where} has no text in {name!r}")
            return ["", ""]
    if not any(text.strip() for text in texts):
        fault(f"{where} has neither a title nor a description")
    return texts


def check_index(path: Path, content: Any, n_items: int, fault: Fault = refuse) -> list[tuple[str, ...]]:
    """The item tokens of the items 0 to `n_items` - 1 from the content of the index file `path`.

    Args:
        fault: as in `read_items`; an item without an index has ().
    """
    content = _object(path, content)
    indices = []
    for number in range(n_items):
        tokens, where = content.get(str(number)), f"{path}: item {str(number)!r}"
        if tokens is None:
            fault(f"{where} has no index, but it is in the item file")
        elif not isinstance(tokens, list) or not tokens:
            fault(f"{where} must have a list of tokens")
        elif wrong := [each for each in tokens if not (isinstance(each, str) and ITEM_TOKEN.fullmatch(each))]:
            fault(f"{where} has {str(wrong[0])[:40]!r}, which is not a token such as <a_12>")
        else:
            indices.append(tuple(tokens))
            continue
        indices.append(())
    for extra in content.keys() - {str(number) for number in range(n_items)}:
        fault(f"{path}: has item {extra!r}, but the item file has {n_items} items, counted from 0")
    return indices


def _check_item_ids(where: str, items: Any, n_items: int, fault: Fault = refuse) -> list[int]:
    if not isinstance(items, list):
        fault(f"{where} must be a list of items")
        return []
    for item in items:
        if type(item) is not int or not 0 <= item < n_items:
            fault(f"{where}: {item!r:.40} is not an item; items are whole numbers from 0 to {n_items - 1}")
            return []
    return items


def read_inters(path: Path, n_items: int, fault: Fault = refuse) -> dict[str, list[int]]:
    """Every user's items, oldest first.

    Args:
        fault: as in `read_items`; a user with a fault is left out.
    """
    content = _object(path, read_json(path))
    found = {}
    for user, items in content.items():
        checked = _check_item_ids(f"{path}: user {user!r}", items, n_items, fault)
        if len(checked) >= 3:
            found[user] = checked
        elif checked == items:
            fault(f"{path}: user {user!r} has {len(items)} interactions; leave-one-out needs 3 or more")
    return found


def read_users(
    path: Path,
    inters: dict[str, list[int]],
    n_items: int,
    parts: Collection[str] = USER_PARTS,
    fault: Fault = refuse,
) -> UserTexts:
    """Those `parts` of the file that are asked for: preferences and intentions.

    Generators leave gaps: blank texts, users without an intention, an empty split. What lacks its text is left out and
    counted in a warning; what is wrong (types, unknown users or items) is refused.

    Args:
        fault: as in `read_items`; what has a fault is left out.

    Raises:
        UserError: with file and key.
    """
    content = _object(path, read_json(path))
    preferences: dict[str, list[str]] = {}
    for user, texts in _object(path, content.get("user_explicit_preference"), "user_explicit_preference").items():
        where = f"{path}: user_explicit_preference {user!r}"
        if user not in inters:
            fault(f"{where} is not a user of the interaction file")
        elif not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            fault(f"{where} must be a list of texts")
        else:
            preferences[user] = [text for text in texts if text.strip()]
    blank = [user for user, texts in preferences.items() if not texts]
    _warn_left_out(path, "user_explicit_preference", "has no preference", blank, len(preferences))
    preferences = {user: texts for user, texts in preferences.items() if texts}
    splits = content.get("user_vague_intention") or {}
    if not isinstance(splits, dict):
        raise UserError(f"{path}: 'user_vague_intention' must be an object")
    wanted = [split for split in ("train", "test") if split in parts]
    intentions = {
        split: _read_intentions(path, split, splits.get(split) or {}, preferences, n_items, fault) for split in wanted
    }
    return UserTexts(preferences, intentions)


def _warn_left_out(path: Path, part: str, why: str, users: list[str], total: int) -> None:
    if users:
        say(f"warning: {path}: {part}: {len(users)} of {total} users left out, the first {users[0]!r} {why}")


def _read_intentions(
    path: Path, split: str, rows: Any, users: dict, n_items: int, fault: Fault
) -> dict[str, Intention]:
    part = f"user_vague_intention {split!r}"
    if not isinstance(rows, dict):
        raise UserError(f"{path}: {part} must be an object")
    intentions, missing = {}, []
    for user in users:
        where = f"{path}: {part} {user!r}"
        row = rows.get(user)
        if row is None:
            missing.append(user)
            continue
        queries = row.get("querys") if isinstance(row, dict) else None
        if not isinstance(queries, list) or len(queries) != 2 or not all(isinstance(q, str) for q in queries):
            fault(f"{where}: 'querys' must be two texts")
            continue
        item = _check_item_ids(f"{where}: 'item'", [row.get("item")], n_items, fault)
        history = _check_item_ids(f"{where}: 'inters'", row.get("inters"), n_items, fault)
        if not all(query.strip() for query in queries):
            missing.append(user)
        elif item and history == row.get("inters"):
            intentions[user] = Intention(item[0], history, tuple(queries))
    _warn_left_out(path, part, "lacks a query", missing, len(users))
    return intentions


if __name__ == "__main__":
    from data_check import main
    from utils import run_main

    run_main(main)
