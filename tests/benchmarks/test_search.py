"""Item search beside its references, harder queries, shorter texts, and the recipes' helpers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from toy_data import write_drawn_dataset

from benchmarks import hard_queries, short_texts
from data import load_data
from samples import TestSet
from tasks import HistoryFormat
from utils import UserError, read_json

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("query", "title", "left"),
    [
        ("Looking for: printers with black ink.", "Printer, 2 pack", "Looking for: with black ink."),
        ("a red pen", "Red pens", ""),
        ("heavy-duty steel", "Duty free", "steel"),
        ("a notebook", "", "a notebook"),
        ("an SP24 with TI-84 keys", "SP24 for TI-84", "an with keys"),
    ],
)
def test_no_form_of_a_titles_word_is_left(query, title, left):
    assert hard_queries.without_title(query, title) == left


def test_harder_queries_change_nothing_else(tmp_path, capsys):
    write_drawn_dataset(tmp_path / "data")
    before = read_json(tmp_path / "data" / "Toy" / "Toy.user.json")
    hard_queries.main(
        ["--data_path", str(tmp_path / "data"), "--dataset", "Toy", "--target_path", str(tmp_path / "hard")]
    )
    after = read_json(tmp_path / "hard" / "Toy" / "Toy.user.json")
    titles = load_data(str(tmp_path / "data"), "Toy").titles
    for user, row in after["user_vague_intention"]["test"].items():
        old = before["user_vague_intention"]["test"][user]
        assert row["querys"] == [hard_queries.without_title(query, titles[row["item"]]) for query in old["querys"]]
        row["querys"] = old["querys"]
    assert after == before
    assert load_data(str(tmp_path / "hard"), "Toy").titles == titles
    with pytest.raises(UserError, match="exists; choose another folder"):
        hard_queries.main(
            ["--data_path", str(tmp_path / "data"), "--dataset", "Toy", "--target_path", str(tmp_path / "hard")]
        )


@pytest.mark.parametrize(
    ("text", "length", "wanted"),
    [
        ("one two three", 20, "one two three"),
        ("one two three", 7, "one two"),
        ("one two three", 8, "one two"),
        ("abcdef", 3, "abc"),
    ],
)
def test_texts_are_cut_at_a_blank(text, length, wanted):
    assert short_texts.cut(text, length) == wanted


def test_models_and_references_are_ranked_on_the_same_queries(tmp_path, capsys, monkeypatch):
    pytest.importorskip("bm25s", reason="benchmarks/requirements.txt")
    from benchmarks import search

    write_drawn_dataset(tmp_path)
    data = load_data(str(tmp_path), "Toy", user_parts=("preference", "train", "test"))
    np.save(tmp_path / "Toy" / "Toy.emb-minilm-td.npy", np.eye(len(data.titles), dtype=np.float32))
    samples = TestSet(data, "itemsearch", HistoryFormat())
    found = []

    def nearest(vectors: np.ndarray, queries: list[str]) -> np.ndarray:
        found.extend(queries)
        return np.zeros((len(queries), 1), dtype=int)

    monkeypatch.setattr(search, "nearest_lists", nearest)
    lines = []
    for number in (0, 3, 5):  # a right answer in the first, second and no place
        target = samples[number].target
        other = (target + 1) % len(data.titles)
        items = {0: [target, other], 3: [other, target], 5: [other]}[number]
        record = {
            "prompt_id": 6,
            "sample": number,
            "user": samples[number].user,
            "target": target,
            "target_item": target,
        }
        lines.append(json.dumps({**record, "items": items, "scores": [-1.0] * len(items)}))
    (tmp_path / "r.predictions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    search.main(["--data_path", str(tmp_path), "--dataset", "Toy", "--results", f"ours={tmp_path / 'r.json'}"])
    assert found == [samples[number].slots["query"] for number in (0, 3, 5)]
    assert "| ours | 0.3333 | 0.6667 | 0.6667 | 0.5436 | 0.5436 |" in capsys.readouterr().out
    (tmp_path / "r.predictions.jsonl").write_text("\n".join(lines[:1] * 2) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="several prompts"):
        search.main(["--data_path", str(tmp_path), "--dataset", "Toy", "--results", f"ours={tmp_path / 'r.json'}"])


def test_bm25_finds_the_text_with_the_querys_words():
    pytest.importorskip("bm25s", reason="benchmarks/requirements.txt")
    from benchmarks.search import bm25_lists

    texts = [f"thing number{i} colour{i % 5}" for i in range(30)]
    found = bm25_lists(texts, ["number7", "something colour3 number13"])
    assert found.shape == (2, 20) and found[0, 0] == 7 and found[1, 0] == 13


@pytest.mark.parametrize(("length", "share"), [(17, "0.2"), (18, "0")])
def test_items_are_swapped_where_they_are_rare(tmp_path, length, share):
    """16 training interactions an item are enough, the last two of a history not counted."""
    (tmp_path / "inter.json").write_text(json.dumps({"0": [0] * length}))
    (tmp_path / "item.json").write_text(json.dumps({"0": {}}))
    command = 'source scripts/recipes.sh; swap_share "$1/inter.json" "$1/item.json"'
    assert subprocess.check_output(["bash", "-c", command, "_", tmp_path], cwd=ROOT, text=True).strip() == share


@pytest.mark.parametrize(("again", "weight"), [(1, "0"), (0, "3")])
def test_items_are_unlikely_where_nobody_takes_one_twice(tmp_path, again, weight):
    """Under 1 in 100 interactions of the training parts; the last two of a history may be repeats."""
    history = [*range(99 - again), *[0] * again, 1, 1]
    (tmp_path / "inter.json").write_text(json.dumps({"0": history, "1": [0, 0]}))
    command = 'source scripts/recipes.sh; unlikelihood "$1/inter.json"'
    assert subprocess.check_output(["bash", "-c", command, "_", tmp_path], cwd=ROOT, text=True).strip() == weight


def test_a_folder_made_of_other_data_is_not_gone_on_with(tmp_path):
    write_drawn_dataset(tmp_path)

    def made_of(*settings: str) -> str:
        command = ["bash", "-c", f'source "{ROOT}/scripts/recipes.sh"; made_of "$@"', "_", "w", "Toy", "Toy", *settings]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode in (0, 2) and bool(result.stderr) == bool(result.returncode)
        return result.stderr

    assert made_of() == made_of() == ""
    assert "was made of other data, settings or scripts" in made_of("--epochs 3")
    with open(tmp_path / "Toy" / "Toy.item.json", "a", encoding="utf-8") as file:
        file.write("\n")
    assert "was made of other data, settings or scripts" in made_of()
    (tmp_path / "Toy" / "Toy.inter.json").unlink()
    assert "Toy.inter.json is missing" in made_of()
