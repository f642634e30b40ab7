"""A hand-made dataset that the tests share: 4 users, 6 items, 3 levels."""

import json
from pathlib import Path

import pytest

INTERS = {"0": [0, 1, 2, 3, 4], "1": [5, 4, 3], "2": [2, 0, 5, 1], "3": [1, 3, 5, 0, 2, 4]}
ITEMS = {
    "0": {"title": " Red Pen. ", "description": "A pen that writes red."},
    "1": {"title": "Blue Pen", "description": "A pen that writes blue."},
    "2": {"title": "Notebook, A5", "description": ""},
    "3": {"title": "`Stapler`", "description": "Staples twenty sheets."},
    "4": {"title": "Paper Clips!", "description": "A box of a hundred."},
    "5": {"title": "Glue", "description": "Sticks paper."},
}
INDEX = {
    "0": ["<a_0>", "<b_1>", "<c_0>"],
    "1": ["<a_0>", "<b_1>", "<c_1>"],
    "2": ["<a_1>", "<b_0>", "<c_0>"],
    "3": ["<a_1>", "<b_10>", "<c_0>"],
    "4": ["<a_2>", "<b_0>", "<c_2>"],
    "5": ["<a_2>", "<b_2>", "<c_0>"],
}


def _intention(items: list[int], position: int, word: str) -> dict:
    item = items[position]
    return {
        "item": item,
        "inters": items[: len(items) + position],
        "querys": [f"I want {word} {item}", f"{word} {item}, please"],
    }


USERS = {
    "user_explicit_preference": {u: [f"User {u} likes pens.", f"User {u} likes paper."] for u in INTERS},
    "user_vague_intention": {
        "train": {u: _intention(items, -3, "trained") for u, items in INTERS.items()},
        "test": {u: _intention(items, -1, "tested") for u, items in INTERS.items()},
    },
}


def write_dataset(root: Path, name: str = "Toy", **changes: object) -> Path:
    """Write the toy dataset to `root/name/`; `changes` replace a file's content (inter, item, index, user), None omits it."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    for kind, content in {"inter": INTERS, "item": ITEMS, "index": INDEX, "user": USERS, **changes}.items():
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / f"{name}.{kind}.json").write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A data path that holds the dataset `Toy`."""
    return write_dataset(tmp_path / "data")
