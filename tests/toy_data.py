"""Small datasets that the tests share: one made by hand, one drawn with every file of the six tasks, one whose items collide."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np


def write_files(root: Path, name: str, files: dict[str, object]) -> Path:
    """Write `root/name/name.<kind>.json` for each kind of `files`: a text as it is, None not at all; returns `root`."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    for kind, content in files.items():
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / f"{name}.{kind}.json").write_text(text, encoding="utf-8")
    return root


# ---- by hand: 4 users, 6 items, 3 levels ----

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
    return write_files(root, name, {"inter": INTERS, "item": ITEMS, "index": INDEX, "user": USERS, **changes})


# ---- drawn ----


def title(item: int) -> str:
    """The title of an item of `write_dataset`."""
    words = ("red", "blue", "small", "steel", "paper", "desk", "lamp", "pen", "box", "chair")
    return f"{words[item % 10]} {words[(item * 7 + 3) % 10]} no {item}"


def write_drawn_dataset(folder: Path, name: str = "Toy", users: int = 24, items: int = 30, seed: int = 0) -> Path:
    """A dataset with every file of the six tasks in `folder/name/`; returns `folder`."""
    draw = random.Random(seed)
    inters = {str(u): draw.sample(range(items), draw.randint(4, 9)) for u in range(users)}
    intention = {
        u: {"item": row[-3], "inters": row[:-3], "querys": [f"something {row[-3]}", "a good thing"]}
        for u, row in inters.items()
    }
    test = {
        u: {"item": row[-1], "inters": row[:-1], "querys": [f"something {row[-1]}", "a good thing"]}
        for u, row in inters.items()
    }
    files = {
        "inter": inters,
        "item": {
            str(i): {"title": title(i), "description": f"This is the {title(i)}, made to last."} for i in range(items)
        },
        "index": {str(i): [f"<a_{i % 5}>", f"<b_{i // 5}>", f"<c_{i % 3}>"] for i in range(items)},
        "user": {
            "user_explicit_preference": {u: ["likes red things", "wants it small"] for u in inters},
            "user_vague_intention": {"train": intention, "test": test},
        },
    }
    return write_files(folder, name, files)


def write_colliding_dataset(folder: Path, items: int = 60, users: int = 23) -> Path:
    """The dataset `toy`, in which four of the items share their indices; returns `folder`."""
    rng = np.random.default_rng(0)
    words = ["red", "blue", "old", "new", "small", "large", "lamp", "desk", "pen", "chair", "book", "clip"]
    titles = [" ".join(rng.choice(words, 3)) + f" {item}" for item in range(items)]
    indices = rng.integers(6, size=(items, 3))
    indices[-2:] = indices[:2]  # four items share their indices
    index = {str(i): [f"<{'abc'[level]}_{code}>" for level, code in enumerate(row)] for i, row in enumerate(indices)}
    inters = {str(user): rng.integers(items, size=rng.integers(4, 20)).tolist() for user in range(users)}
    inters["1"][-1] = items - 1  # a target that shares its index
    texts = {
        "user_explicit_preference": {user: [f"likes {word}" for word in rng.choice(words, 3)] for user in inters},
        "user_vague_intention": {
            split: {
                user: {"item": row[at], "inters": row[:at], "querys": [f"wants {titles[row[at]]}", f"a {words[at]}"]}
                for user, row in inters.items()
            }
            for split, at in (("train", -3), ("test", -1))
        },
    }
    files = {
        "inter": inters,
        "item": {str(i): {"title": title, "description": f"A {title}."} for i, title in enumerate(titles)},
        "index": index,
        "user": texts,
    }
    return write_files(folder, "toy", files)
