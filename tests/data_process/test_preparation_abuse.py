"""The table of abuses of data_process/ and convert/: files and flags that are wrong, outputs that would bury an input."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from abuse_check import Abuse, check, said_of
from convert_parts import delta_parts
from preparation_rows import CLICKS, FILES, FLAGS, META
from tiny_models import make_model
from toy_data import INTERS, write_dataset

import data_check
from convert import convert_fp16, make_delta, merge_delta, push, scan
from data_process import (
    add_items,
    base_model,
    behaviour,
    embed,
    from_amazon,
    from_recbole,
    from_table,
    to_recbole,
    user_texts,
)
from folders import locked


def _data(w: Path) -> list[str]:
    return ["--data_path", str(w), "--dataset", "Toy"]


def _delta(w: Path) -> list[str]:
    return ["--base-model-path", f"{w}/base", "--delta-path", f"{w}/delta", "--target-model-path", f"{w}/merged"]


def _tables(w: Path) -> list[str]:
    return ["--interactions", f"{w}/clicks.csv", "--items", f"{w}/products.csv", "--k_core", "1"]


COMMANDS = {
    "table": (from_table.main, lambda w: [*_tables(w), "--data_path", str(w), "--dataset", "Mine"]),
    "amazon": (
        from_amazon.main,
        lambda w: (
            ["--reviews", f"{w}/r.json.gz", "--metadata", f"{w}/m.json", "--dataset", "Mine", "--k_core", "1"]
            + ["--data_path", str(w)]
        ),
    ),
    "recbole": (from_recbole.main, lambda w: ["--source", f"{w}/ml", "--data_path", f"{w}/new", "--k_core", "1"]),
    "to recbole": (to_recbole.main, lambda w: [*_data(w), "--target", f"{w}/out"]),
    "add": (add_items.main, lambda w: [*_data(w), "--new_dataset", "Toy2", "--items", f"{w}/more.csv"]),
    "embed": (
        embed.main,
        lambda w: [*_data(w), "--model_path", f"{w}/model", "--device", "cpu", "--output_file", f"{w}/new.npy"],
    ),
    "behaviour": (
        behaviour.main,
        lambda w: [*_data(w), "--text", f"{w}/e.npy", "--output_file", f"{w}/b.npy", "--width", "2"],
    ),
    "texts": (user_texts.main, lambda w: [*_data(w), "--overwrite"]),
    "local texts": (
        user_texts.main,
        lambda w: [*_data(w), "--overwrite", "--local_model", f"{w}/model", "--max_tokens", "2", "--tries", "1"],
    ),
    "base": (
        base_model.main,
        lambda w: ["tiny", *_data(w), "--target", f"{w}/tiny", "--hidden_size", "8", "--heads", "1", "--layers", "1"],
    ),
    "check": (data_check.main, _data),
    "merge": (merge_delta.main, _delta),
    "make delta": (
        make_delta.main,
        lambda w: ["--base-model-path", f"{w}/base", "--target-model-path", f"{w}/base", "--delta-path", f"{w}/new"],
    ),
    "fp16": (convert_fp16.main, lambda w: ["--in-checkpoint", f"{w}/base", "--out-checkpoint", f"{w}/half"]),
    "scan": (scan.main, lambda w: []),
    "push": (
        push.main,
        lambda w: ["--model-path", f"{w}/base", "--repo-id", "a/b", "--dry-run", "--results", f"{w}/r.json"],
    ),
}

PRODUCTS = "item,title,description\n" + "".join(f"i{i},Thing {i},A thing.\n" for i in range(5))
REVIEWS = [{"reviewerID": f"u{u}", "asin": f"i{i}", "unixReviewTime": u + i} for u in range(4) for i in range(4)]
RESULTS = {"mean_results": {"hit@1": 0.5}, "config": {"arguments": {"dataset": "Toy"}}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    w = write_dataset(tmp_path_factory.mktemp("world"))
    (w / "Toy/Toy.item2id").write_text("".join(f"raw{i}\t{i}\n" for i in range(6)))
    reviews = {user: [{"item": item, "text": "", "rating": 1} for item in items] for user, items in INTERS.items()}
    (w / "Toy/Toy.review.json").write_text(json.dumps(reviews))
    (w / "clicks.csv").write_text(CLICKS)
    (w / "products.csv").write_text(PRODUCTS)
    (w / "more.csv").write_text("item,title,description\nnew,A new pen,It writes.\n")
    (w / "r.json.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in REVIEWS).encode()))
    (w / "m.json").write_text(META)
    (w / "ml").mkdir()
    rows = CLICKS.replace(",", "\t").splitlines()[1:]
    head = "user_id:token\titem_id:token\ttimestamp:float"
    (w / "ml/ml.inter").write_text("\n".join([head, *rows]) + "\n")
    items = [f"i{i}\tThing {i}\tgood" for i in range(4)]
    (w / "ml/ml.item").write_text("\n".join(["item_id:token\ttitle:token_seq\tclass:token_seq", *items]) + "\n")
    (w / "r.json").write_text(json.dumps(RESULTS))
    np.save(w / "e.npy", np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32))
    make_model("llama", w / "model")
    delta_parts(w)
    return w


ROWS = [*FLAGS, *FILES]


@pytest.mark.parametrize("abuse", ROWS, ids=str)
def test_it_is_one_line_and_nothing_is_lost(world, tmp_path, clock, capsys, abuse: Abuse) -> None:
    check(abuse, *COMMANDS[abuse.command], world, tmp_path / "w", capsys)


@pytest.mark.parametrize("command, target", [("embed", "new.npy"), ("texts", "Toy/Toy.user.json"), ("base", "tiny")])
def test_two_at_once(world, tmp_path, clock, capsys, command, target) -> None:
    """The second is refused in one line; what is by rule needs no lock, a model's texts do."""
    own = COMMANDS["local texts" if command == "texts" else command]
    w = Path(shutil.copytree(world, tmp_path / "w"))
    with locked(w / target):
        said = said_of(Abuse("", command, ""), own[0], own[1](w), capsys)
    assert said is not None and len(said) == 1 and "another process is writing it now" in said[0]


def test_no_row_is_there_twice() -> None:
    assert len(set(map(str, ROWS))) == len(ROWS)


@pytest.mark.parametrize("room", [0, 4096, 20_000])
@pytest.mark.parametrize("command", ["table", "to recbole", "embed", "base", "merge", "fp16"])
def test_a_full_disk_is_one_line_and_leaves_nothing(world, tmp_path, clock, capsys, full_disk, command, room) -> None:
    main, own = COMMANDS[command]
    where = {"table": "data_path", "to recbole": "target", "embed": "output_file", "base": "target"}
    flag = {"merge": "target-model-path", "fp16": "out-checkpoint"}.get(command) or where[command]
    disk = full_disk(room)
    place = disk if command in ("table", "to recbole") else disk / ("x.npy" if command == "embed" else "x")
    said = said_of(Abuse("", command, ""), main, [*own(world), f"--{flag}", str(place)], capsys)
    assert said is not None or room, "no room at all, and nothing said"
    if said is not None:
        assert len(said) == 1 and said[0].startswith(f"error: {disk}") and "No space left" in said[0], said
        assert [path.name for path in disk.iterdir()] == ["fill"]
