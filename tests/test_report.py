"""The references of the table against brute force and a hand-computed case."""

import json
import math

import conftest
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import report
import report_page
from data import load_data
from utils import UserError


def test_popularity_ranks_equal_a_sorted_list_per_user(toy):
    data = load_data(str(toy), "Toy")
    train = [item for items in data.inters.values() for item in items[:-2]]
    order = sorted(range(6), key=lambda item: (-train.count(item), item))
    for unseen in (False, True):
        expected = []
        for items in data.inters.values():
            ranked = [item for item in order if not (unseen and item in items[:-1])]
            expected.append(ranked.index(items[-1]))
        assert report.popularity_ranks(data, unseen).tolist() == expected


def test_random_expectation_is_the_mean_over_all_ranks():
    found = report.random_expectation(20, "hit@5,ndcg@5")
    assert found["hit@5"] == pytest.approx(5 / 20)
    assert report.random_expectation(3, "hit@5")["hit@5"] == 1
    assert found["ndcg@5"] == pytest.approx(sum(1 / math.log2(rank + 2) for rank in range(5)) / 20)


def test_values_and_intervals():
    ranks = np.array([0, 3, -1, 9, 10])
    values = report.values(ranks, "hit@1,hit@10,ndcg@10")
    assert values["hit@1"].tolist() == [1, 0, 0, 0, 0]
    assert values["hit@10"].tolist() == [1, 1, 0, 1, 0]
    assert values["ndcg@10"].tolist() == pytest.approx([1, 1 / math.log2(5), 0, 1 / math.log2(11), 0])
    many = np.random.default_rng(1).random(4000) < 0.3
    low, high = report.interval(many.astype(float))
    spread = 1.96 * math.sqrt(0.3 * 0.7 / 4000)  # the normal approximation
    assert (high - low) / 2 == pytest.approx(spread, rel=0.1)
    assert low < many.mean() < high


def parts_of(page):
    """Every start tag and every text of a page, as a browser would see them."""
    from html.parser import HTMLParser

    class Reader(HTMLParser):
        tags, texts = [], []

        def handle_starttag(self, tag, attributes):
            self.tags.append((tag, dict(attributes)))

        def handle_data(self, text):
            self.texts.append(text)

    reader = Reader()
    reader.feed(page)
    return reader.tags, reader.texts


def test_the_page_shows_a_run_and_no_title_becomes_markup(tmp_path):
    evil = "<script>alert(1)</script><img src=x>"
    items = {**conftest.ITEMS, "4": {"title": evil, "description": "a pen"}}
    data_path = conftest.write_dataset(tmp_path / "data", item=items)
    checkpoint = tmp_path / "ckpt" / "checkpoint-20"
    checkpoint.mkdir(parents=True)
    log = [{"step": 10, "loss": 2.0, "loss_seqrec": 1.9}, {"step": 20, "eval_loss": 1.5, "eval_hit@10": 0.2}]
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    write_run(tmp_path, {"task": "seqrec", "arguments": {"ckpt_path": str(tmp_path / "ckpt"), "note": evil}})
    flags = ["--results_file", str(tmp_path / "result.json"), "--data_path", str(data_path), "--dataset", "Toy"]
    report.main([*flags, "--metrics", "hit@1,hit@2"])
    page = (tmp_path / "result.html").read_text()
    tags, texts = parts_of(page)
    assert evil in texts  # as text
    assert not {tag for tag, _ in tags} & {"script", "img", "link", "iframe"}
    for tag, attributes in tags:  # nothing is loaded from elsewhere
        assert all(
            not value.startswith("http") for name, value in attributes.items() if name in ("src", "href") and value
        )
        assert tag != "image" or attributes["xlink:href"].startswith("data:")
    assert sum(tag == "svg" for tag, _ in tags) == 3  # by k, for whom, training
    for heading in ("For whom", "Training", "Item index", "Examples", "Settings"):
        assert heading in texts
    assert texts.count("1. in the list") == 1 and texts.count("not among 4") == 1  # users 0 and 3


def test_a_page_without_training_files_and_with_some_users_only(toy, tmp_path):
    write_run(tmp_path, {}, users=2)
    report.main(["--results_file", str(tmp_path / "result.json"), "--data_path", str(toy), "--dataset", "Toy"])
    tags, texts = parts_of((tmp_path / "result.html").read_text())
    assert sum(tag == "svg" for tag, _ in tags) == 1 and "Training" not in texts


def test_predictions_of_other_data_are_refused(toy, tmp_path):
    write_run(tmp_path, {})
    path = tmp_path / "result.predictions.jsonl"
    path.write_text(path.read_text().replace("[4, 1", "[6, 1"))
    with pytest.raises(UserError, match="the item 6, which is not in Toy"):
        report.main(["--results_file", str(tmp_path / "result.json"), "--data_path", str(toy), "--dataset", "Toy"])


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60))
def test_groups_of_users_are_a_partition(numbers):
    found = report_page.groups(np.array(numbers))
    assert np.sum([members for _, members in found], axis=0).tolist() == [1] * len(numbers)
    for name, members in found:
        low, _, high = name.partition("–")
        own = np.array(numbers)[members]
        assert own.min() >= int(low) and own.max() <= int(high or low)


def write_run(folder, config, users=4):
    """The files of a run of `users` users."""
    (folder / "result.json").write_text(json.dumps({"config": config}))
    lists = {0: [4, 1, 2, 3], 1: [0, 3, 1, 2], 2: [0, 2, 3, 4], 3: [1, 2, 4, 0]}
    targets = {0: 4, 1: 3, 2: 1, 3: 4}
    with open(folder / "result.predictions.jsonl", "w") as file:
        for sample, items in list(lists.items())[:users]:
            record = {"prompt_id": 0, "sample": sample, "user": str(sample), "target": targets[sample]}
            file.write(json.dumps(record | {"items": items, "scores": [0.0] * 4}) + "\n")


def test_table_from_the_files_of_a_run(toy, tmp_path, capsys):
    results = tmp_path / "result.json"
    write_run(tmp_path, {"task": "seqrec"})
    flags = ["--results_file", str(results), "--data_path", str(toy), "--dataset", "Toy", "--metrics", "hit@1,hit@2"]
    report.main(flags)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| LC-Rec")]
    assert [cell.split()[0] for cell in rows[0].split("|")[2:4]] == ["0.2500", "0.5000"]
    # without what they have seen the lists are [4], [0, 3, 1, 2], [3, 4] and [4]
    assert rows[1].startswith("| LC-Rec, unseen |")
    assert [cell.split()[0] for cell in rows[1].split("|")[2:4]] == ["0.5000", "0.7500"]
    assert all(row in (tmp_path / "result.table.md").read_text() for row in rows)
