"""A small made-up dataset with an untrained LLaMA for it: what the tests of scoring and recommending run on."""

from pathlib import Path

from toy_data import write_colliding_dataset

import data_process.base_model
from data import load_data
from modeling import prepare_base


def make_world(folder: Path, items: int = 60, users: int = 23) -> Path:
    """Write `<folder>/toy/toy.*.json` and a checkpoint `<folder>/ckpt`; returns `folder`."""
    write_colliding_dataset(folder, items, users)
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
