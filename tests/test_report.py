"""The references of the table against brute force and a hand-computed case."""

import json
import math

import numpy as np
import pytest

import report
from data import load_data


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


def test_table_from_the_files_of_a_run(toy, tmp_path, capsys):
    results = tmp_path / "result.json"
    results.write_text(json.dumps({"config": {"task": "seqrec"}}))
    lists = {0: [4, 1, 2, 3], 1: [0, 3, 1, 2], 2: [0, 2, 3, 4], 3: [1, 2, 4, 0]}
    targets = {0: 4, 1: 3, 2: 1, 3: 4}
    with open(tmp_path / "result.predictions.jsonl", "w") as file:
        for sample, items in lists.items():
            record = {"prompt_id": 0, "sample": sample, "user": str(sample), "target": targets[sample]}
            file.write(json.dumps(record | {"items": items, "scores": [0.0] * 4}) + "\n")
    flags = ["--results_file", str(results), "--data_path", str(toy), "--dataset", "Toy", "--metrics", "hit@1,hit@2"]
    report.main(flags)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| LC-Rec")]
    assert [cell.split()[0] for cell in rows[0].split("|")[2:4]] == ["0.2500", "0.5000"]
    # without what they have seen the lists are [4], [0, 3, 1, 2], [3, 4] and [4]
    assert rows[1].startswith("| LC-Rec, unseen |")
    assert [cell.split()[0] for cell in rows[1].split("|")[2:4]] == ["0.5000", "0.7500"]
    assert all(row in (tmp_path / "result.table.md").read_text() for row in rows)
