"""New items reach users without retraining: extend an index, then test.py and recommend.py serve the new items."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scoring_world import make_world

import recommend
import test as test_script
import utils

sys.path.append(str(Path(__file__).resolve().parents[2] / "index"))

import commands
import generate_indices

OLD, NEW = 60, 7


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def extended(folder: Path, old: Path, *flags: str) -> dict:
    """The index that `--extend` makes of `old` for the rows of emb.npy."""
    out = folder / "grown/grown.index.json"
    flags = ("--data_path", str(folder / "emb.npy"), "--output_file", str(out), "--device", "cpu", *flags)
    generate_indices.main(["--extend", str(old), "--overwrite", *flags])
    return read(out)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalogue of 60 items and a checkpoint that knows its tokens alone; `grown`: seven more, each user's last."""
    folder = make_world(tmp_path_factory.mktemp("world"), items=OLD)
    rng = np.random.default_rng(1)
    codes = np.array([[int(token[3:-1]) for token in row] for row in read(folder / "toy/toy.index.json").values()])
    books = [rng.normal(size=(6, 8)) * 0.4**level for level in range(3)]
    rows = sum(book[codes[:, level]] for level, book in enumerate(books)) + 0.01 * rng.normal(size=(OLD, 8))
    np.save(folder / "emb.npy", np.concatenate([rows, rows[:NEW] + 0.01]).astype(np.float32))
    (folder / "grown").mkdir()
    items = read(folder / "toy/toy.item.json")
    items |= {str(OLD + n): {"title": f"new thing {n}", "description": ""} for n in range(NEW)}
    inters = {user: [*row, OLD + int(user) % NEW] for user, row in read(folder / "toy/toy.inter.json").items()}
    for kind, content in {"item": items, "inter": inters, "user": read(folder / "toy/toy.user.json")}.items():
        (folder / f"grown/grown.{kind}.json").write_text(json.dumps(content), encoding="utf-8")
    extended(folder, folder / "toy/toy.index.json")
    return folder


def flags(world: Path, dataset: str = "grown") -> list[str]:
    return ["--ckpt_path", str(world / "ckpt"), "--data_path", str(world), "--dataset", dataset]


def score(world: Path, results: Path) -> list[dict]:
    """test.py with so many beams that the whole catalogue is ranked: the lines of predictions."""
    beams = ["--num_beams", str(OLD + NEW), "--metrics", f"hit@{OLD + NEW}", "--results_file", str(results)]
    test_script.main([*flags(world), *beams])
    return [json.loads(line) for line in results.with_suffix(".predictions.jsonl").read_text().splitlines()]


def test_the_index_grows_by_combinations_of_old_tokens(world: Path) -> None:
    old, new = read(world / "toy/toy.index.json"), read(world / "grown/grown.index.json")
    assert len(new) == OLD + NEW and all(new[item] == tokens for item, tokens in old.items())
    added = {tuple(new[str(item)]) for item in range(OLD, OLD + NEW)}
    assert len(added) == NEW and not added & {tuple(tokens) for tokens in old.values()}
    assert {token for row in added for token in row} <= {token for row in old.values() for token in row}


def test_test_py_returns_new_items(world: Path, tmp_path: Path) -> None:
    """Every new item is a target, ranked among all others; the checkpoint is the old one, untouched."""
    before = {path.name: path.read_bytes() for path in (world / "ckpt").iterdir() if path.is_file()}
    lines = score(world, tmp_path / "r.json")
    index = read(world / "grown/grown.index.json")
    everything = {tuple(tokens) for tokens in index.values()}
    for line in lines:
        assert line["target_item"] >= OLD and line["target"] == line["target_item"]
        assert {tuple(index[str(item)]) for item in line["items"]} == everything
        assert len(line["items"]) == len(everything) and line["scores"] == sorted(line["scores"], reverse=True)
    assert {line["target"] for line in lines} == set(range(OLD, OLD + NEW))
    assert read(tmp_path / "r.json")["mean_results"] == {f"hit@{OLD + NEW}": 1.0}
    assert before == {path.name: path.read_bytes() for path in (world / "ckpt").iterdir() if path.is_file()}


def test_recommend_py_returns_new_items_and_old_scores_stay(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = {}
    for dataset in ("toy", "grown"):
        capsys.readouterr()
        recommend.main([*flags(world, dataset), "--history", "3", "5", "--top_k", str(OLD + NEW)])
        answers[dataset] = {row["item"]: row for row in json.loads(capsys.readouterr().out)["items"]}
    new = {item: row for item, row in answers["grown"].items() if item not in answers["toy"]}
    assert {row["title"] for row in new.values()} == {f"new thing {n}" for n in range(NEW)}
    assert new.keys() == set(range(OLD, OLD + NEW))
    for item, row in answers["toy"].items():
        assert answers["grown"][item]["score"] == pytest.approx(row["score"], abs=1e-4)
    capsys.readouterr()
    recommend.main([*flags(world), "--history", str(OLD + 1), "3", "--top_k", "3"])  # a new item as history
    assert len(json.loads(capsys.readouterr().out)["items"]) == 3


def test_flat_and_unknown_tokens_are_refused(world: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat.index.json"
    flat.write_text(json.dumps({str(item): [f"<a_{item}>"] for item in range(OLD)}))
    with pytest.raises(commands.InputError, match="flat"):
        extended(world, flat)
    index = read(world / "grown/grown.index.json")
    index[str(OLD)] = ["<a_77>", *index[str(OLD)][1:]]
    (world / "grown/grown.strange.json").write_text(json.dumps(index))
    with pytest.raises(utils.UserError, match="<a_77>"):
        recommend.main([*flags(world), "--index_file", ".strange.json", "--history", "3"])
