"""The table of classical recommenders: pairs by user, bootstrap of differences, recorded rows, and RecBole itself."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from toy_data import INTERS, write_dataset, write_drawn_dataset

from benchmarks import baselines, compare
from data import RecData
from report import recorded
from utils import UserError, read_json, write_json

LAST = {user: items[-1] for user, items in INTERS.items()}


def write_predictions(path: Path, ranks: dict[str, list[int]], targets: dict[str, int] = LAST) -> Path:
    """A predictions file in which each user's target has these ranks (-1: not in the list), one for each prompt."""
    lines = []
    for user, of_prompts in ranks.items():
        for prompt, rank in enumerate(of_prompts):
            items = list(range(100, 120))
            if rank >= 0:
                items[rank] = targets[user]
            record = {"prompt_id": prompt, "sample": int(user), "user": user, "target": targets[user], "items": items}
            lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_ranks_are_found_by_user_and_other_data_is_refused(tmp_path):
    ranks = {"2": [0, 3], "0": [-1, 1], "1": [9, 19], "3": [2, -1]}
    path = write_predictions(tmp_path / "a.predictions.jsonl", ranks)
    assert compare.user_ranks(path, LAST) == ranks
    with pytest.raises(UserError, match="user '2' has another target"):
        compare.user_ranks(path, {**LAST, "2": 5})
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match="occurs twice"):
        compare.user_ranks(path, LAST)


def test_differences_pair_by_user_and_not_by_place():
    """By hand: HR@1 differs for user a alone; NDCG@5 for a by 1 - 1/log2(3), for c by 0 - 1/2."""
    ours = {"a": [0], "b": [-1], "c": [-1], "only ours": [0]}
    theirs = {"c": [2], "a": [1], "b": [-1]}
    users, means, ends = compare.differences(ours, theirs)
    assert users == 3
    wanted = [1 / 3, (1 - 1) / 3 - 1 / 3, -1 / 3, (1 - 1 / np.log2(3) - 1 / 2) / 3, (1 - 1 / np.log2(3) - 1 / 2) / 3]
    np.testing.assert_allclose(means, wanted)
    assert (ends[:, 0] <= means).all() and (means <= ends[:, 1]).all()
    with pytest.raises(UserError, match="no user in common"):
        compare.differences({"x": [0]}, {"y": [0]})


def test_the_paired_interval_is_that_of_the_mean_difference():
    """Users who agree give no width; 400 independent differences give the normal interval; the pairing matters."""
    rng = np.random.default_rng(1)
    easy = rng.random(400) < 0.5  # who is easy is easy for both
    theirs = {str(u): [0 if easy[u] else -1] for u in range(400)}
    assert not compare.differences(theirs, theirs)[2].any()
    better = rng.random(400) < 0.1
    ours = {str(u): [0 if easy[u] or better[u] else -1] for u in range(400)}
    _, means, ends = compare.differences(ours, theirs)
    gains = (better & ~easy).astype(float)
    half = 1.96 * gains.std() / np.sqrt(400)
    np.testing.assert_allclose(means[0], gains.mean())
    np.testing.assert_allclose(ends[0], [gains.mean() - half, gains.mean() + half], atol=0.005)
    unpaired = 1.96 * np.sqrt(2 * 0.25 / 400)
    assert ends[0, 1] - ends[0, 0] < unpaired


def test_several_files_of_a_name_are_one_row_and_a_line_each(tmp_path, capsys):
    write_dataset(tmp_path)
    for seed, ranks in ((1, {user: [0] for user in INTERS}), (2, {user: [-1] for user in INTERS})):
        write_predictions(tmp_path / f"s{seed}.predictions.jsonl", ranks)
        write_json(tmp_path / f"s{seed}.json", {"config": {"arguments": {"ckpt_path": "gone"}}})
    flags = ["--data_path", str(tmp_path), "--dataset", "Toy", "--work", str(tmp_path / "w"), "--models"]
    compare.main([*flags, "--results", f"ours={tmp_path / 's1.json'}", f"ours={tmp_path / 's2.json'}"])
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
    found = {line[0].strip(): line[1].split()[0] for line in reversed(lines) if len(line) > 2}
    assert found["ours"] == "0.5000" and found[f"ours, {tmp_path / 's1.json'}"] == "1.0000"
    assert found["ours − popularity"] == "4"  # the users, in the table of differences
    # training parts: 0 1 2, 5, 2 0, 1 3 5 0; ranked by count and then by number: 0 (3), 1, 2, 5 (2 each), 3 (1), 4
    assert found["popularity"] == "0.0000"
    popular = next(line for line in lines if line[0].strip() == "popularity")
    assert popular[2].split()[0] == "0.5000"  # of the targets 4, 3, 1, 4 two are in the first five
    assert (tmp_path / "w/Toy/compare.md").is_file() and read_json(tmp_path / "w/Toy/compare.json")["grids"] == {}


def test_references_are_ranked_on_fewer_users_too_and_with_the_same_histories(tmp_path, capsys):
    write_dataset(tmp_path)
    some = [
        user for user, target in LAST.items() if target in (1, 3)
    ]  # these are among the five most popular, 4 is not
    write_predictions(tmp_path / "s.predictions.jsonl", {user: [0] for user in some})
    write_json(tmp_path / "s.json", {"config": {"arguments": {"ckpt_path": "gone", "max_his_len": 50}}})
    flags = ["--data_path", str(tmp_path), "--dataset", "Toy", "--work", str(tmp_path / "w"), "--models"]
    named = ["--results", f"ours={tmp_path / 's.json'}"]
    with pytest.raises(UserError, match="histories of 50 items; give --max_his_len 50"):
        compare.main([*flags, *named, "--max_his_len", "20"])
    with pytest.raises(UserError, match="popularity is a baseline's name"):
        compare.main([*flags, "--results", f"popularity={tmp_path / 's.json'}"])
    compare.main([*flags, *named, f"more={tmp_path / 's.json'}"])
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
    fifth = {line[0].strip(): line[2].split()[0] for line in reversed(lines) if len(line) > 2}
    assert fifth["popularity"] == "0.5000" and fifth["popularity, the users of all (2 users)"] == "1.0000"
    assert [name for name in reversed(fifth) if "−" in name] == [
        "ours − popularity",
        "more − popularity",
        "more − ours",
    ]


def test_users_are_told_apart_by_what_followed_what_in_training():
    """Training parts: a b a b, a b, b c; a → b occurs three times, b → a and b → c once."""
    a, b, c, d = range(4)
    inters = {"0": [a, b, a, b, c, d], "1": [a, b, a, b], "2": [b, c, a, b], "3": [d, d, b, c], "gone": [a, a, b, a]}
    data = RecData("Toy", Path(), inters, ["t"] * 4, [""] * 4, [], None)
    ours = {"0": [0, 0], "1": [0, -1], "2": [0, 0], "3": [-1, -1]}
    text = compare.followed_table({"ours": compare.Row(ours), "all": compare.Row({**ours, "gone": [0, 0]})}, data)
    assert [line.strip("| ").split(" | ")[1:] for line in text.splitlines()[::2]] == [
        ["never (1)", "once or twice (1)", "three times or more (2)"],
        ["1.0000 / 1.0000", "0.0000 / 0.0000", "0.7500 / 0.7500"],
    ]


def test_users_are_told_apart_by_how_rare_their_targets_are():
    """In training parts item 0 occurs eleven times, 1 three times, 2 twice, 3 never."""
    inters = {"0": [0] * 10 + [1, 1, 0, 3], "1": [0, 1, 3, 2], "2": [2, 2, 3, 1], "3": [1, 0], "4": [3, 0]}
    data = RecData("Toy", Path(), inters, ["t"] * 4, [""] * 4, [], None)
    ranks = {"0": [0, -1], "1": [0, 0], "2": [-1, -1], "3": [0, 0], "4": [-1, -1]}
    text = compare.rarity_table({"ours": compare.Row(ranks)}, data)
    assert [line.strip("| ").split(" | ")[1:] for line in text.splitlines()[::2]] == [
        ["none (1)", "one or two (1)", "three to ten (1)", "more (2)"],
        ["0.5000 / 0.5000", "1.0000 / 1.0000", "0.0000 / 0.0000", "0.5000 / 0.5000"],
    ]


def test_what_was_met_before_is_struck_from_the_lists(tmp_path):
    inters = {"0": [0, 1, 2], "1": [3, 4, 0]}
    data = RecData("Toy", Path(), inters, ["t"] * 5, [""] * 5, [], None)
    lists = [("0", 2, [0, 1, 3, 2]), ("1", 0, [4, 2, 1])]
    lines = [
        json.dumps(
            {
                "prompt_id": 0,
                "sample": int(user),
                "user": user,
                "target": target,
                "items": items,
                "scores": [0] * len(items),
            }
        )
        for user, target, items in lists
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    text = compare.seen_table(
        {"popularity": compare.Row({}), "ours": compare.Row({}, files=[tmp_path / "r.jsonl"])}, data
    )
    assert text.splitlines()[-1] == "| ours | 41.7% | 0.5000 / 0.3155 |" and "popularity" not in text


def test_the_time_of_a_training_that_went_on_is_that_of_all_its_parts(tmp_path):
    write_json(tmp_path / "r.json", {"config": {"arguments": {"ckpt_path": str(tmp_path)}}})
    assert compare.checkpoint_facts(tmp_path / "r.json") == ("–", "–")
    (tmp_path / "train.log").write_text("[ 12:30] step 1\n[112:31] step 2\nnote\n[  0:10] step 2\n[  0:40] step 3\n")
    assert compare.checkpoint_facts(tmp_path / "r.json") == ("113:11", "–")


def test_recorded_rows_are_replaced_and_the_others_stay(tmp_path):
    path = tmp_path / "references.json"
    other = {"model": "TIGER", "metrics": {"hit@10": 0.1}, "source": "s", "command": "c"}
    write_json(path, {"Toy": [{**other, "model": "SASRec"}, other], "Mine": [other]})
    rows = {"SASRec": compare.Row({"a": [0], "b": [-1]})}
    compare.write_references(path, "Toy", rows, "the command", {"SASRec": "learning rate 0.001, dropout 0.2"})
    found, said = recorded(path, "Toy")
    assert found["SASRec (recorded)"]["hit@1"] == 0.5 and found["TIGER (recorded)"] == {"hit@10": 0.1}
    assert "the command" in said and "dropout 0.2" in said and recorded(path, "Mine")[0]
    write_json(path, {"Toy": [{"model": 1}]})
    with pytest.raises(UserError, match="has an entry without"):
        compare.write_references(path, "Toy", rows, "c", {"SASRec": ""})


def test_a_trained_baseline_is_kept_and_other_settings_are_refused(tmp_path, monkeypatch):
    def stands_in(command, cwd, **more):
        (cwd / "trained.json").write_text('{"seconds": 1}')
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(baselines, "recbole_python", lambda: Path("python"))
    monkeypatch.setattr(baselines.subprocess, "run", stands_in)
    settings = {"model": "SASRec", "dataset": "Toy", "recbole": {"seed": 1}}
    assert baselines.train(tmp_path / "run", tmp_path / "Toy.yaml", settings) == {"seconds": 1}
    monkeypatch.setattr(baselines.subprocess, "run", None)  # would fail if it were called
    assert baselines.train(tmp_path / "run", tmp_path / "Toy.yaml", settings) == {"seconds": 1}
    with pytest.raises(UserError, match="other settings or data"):
        baselines.train(tmp_path / "run", tmp_path / "Toy.yaml", {**settings, "dataset": "Mine"})


def test_a_failure_of_recbole_is_one_line(tmp_path, monkeypatch):
    def fails(command, stderr, **more):
        stderr.write(b"Traceback\nValueError: Training loss is nan\n")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(baselines, "recbole_python", lambda: Path("python"))
    monkeypatch.setattr(baselines.subprocess, "run", fails)
    with pytest.raises(UserError, match="SASRec: RecBole stopped: ValueError: Training loss is nan"):
        baselines.train(tmp_path / "run", tmp_path / "Toy.yaml", {"model": "SASRec"})
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_recbole_trains_and_its_lists_have_its_own_score(tmp_path, monkeypatch, capsys):
    """BERT4Rec for two epochs, end to end; NDCG@10 from the lists is what RecBole computed; nothing is trained twice."""
    try:
        baselines.recbole_python()
    except UserError as error:
        pytest.skip(str(error))
    write_drawn_dataset(tmp_path)
    monkeypatch.setitem(compare.RECBOLE, "epochs", 2)
    monkeypatch.setattr(compare, "GRID", {"BERT4Rec": [(1e-3, 0.2, 64)]})
    work = tmp_path / "w"
    flags = ["--data_path", str(tmp_path), "--dataset", "Toy", "--work", str(work), "--models", "BERT4Rec"]
    compare.main(flags)
    trained = read_json(work / "Toy/BERT4Rec/rate0.001-dropout0.2-batch64-seed42/trained.json")
    grid = read_json(work / "Toy/compare.json")["grids"]["BERT4Rec"]
    assert grid["0.001/0.2/64"]["ndcg@10"] == pytest.approx(trained["validation_by_recbole"], abs=1e-5)
    before = capsys.readouterr().out.splitlines()[-9:]
    monkeypatch.setattr(baselines.subprocess, "run", None)
    compare.main(flags)
    assert capsys.readouterr().out.splitlines()[-9:] == before
