"""A small made-up dataset with an untrained LLaMA for it: what the tests of scoring and recommending run on."""

import json
from pathlib import Path

import numpy as np

import data_process.base_model
from data import load_data
from modeling import prepare_base


def make_world(folder: Path, items: int = 60, users: int = 23) -> Path:
    """Write `<folder>/toy/toy.*.json` and a checkpoint `<folder>/ckpt`; returns `folder`."""
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
    (folder / "toy").mkdir()
    files = {
        "inter": inters,
        "item": {str(i): {"title": title, "description": f"A {title}."} for i, title in enumerate(titles)},
        "index": index,
        "user": texts,
    }
    for name, content in files.items():
        (folder / f"toy/toy.{name}.json").write_text(json.dumps(content), encoding="utf-8")
    flags = [
        "--data_path",
        str(folder),
        "--dataset",
        "toy",
        "--vocab_size",
        "400",
        "--hidden_size",
        "32",
        "--layers",
        "2",
    ]
    data_process.base_model.main(["tiny", *flags, "--target", str(folder / "base")])
    tokens = load_data(str(folder), "toy").item_tokens
    prepare_base(str(folder / "base"), folder / "ckpt", tokens, seed=1)
    return folder
