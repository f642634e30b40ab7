"""The references of the table against brute force and a hand-computed case."""

import json
import math
import re

import numpy as np
import pytest
import toy_data
from hypothesis import given
from hypothesis import strategies as st

import report
import report_page
import run_folder
import scored_runs
from data import load_data
from utils import UserError, sha256


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
    (low, high), (zero, _) = report.intervals(np.stack([many, many * 0.0], axis=1))
    assert zero == 0
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


def test_intervals_equal_plain_resampling():
    values = np.random.default_rng(0).random((40, 3))
    rng = np.random.default_rng(0)
    draws = [values[rng.integers(40, size=40)].mean(axis=0) for _ in range(report.RESAMPLES)]
    np.testing.assert_allclose(report.intervals(values), np.percentile(draws, [2.5, 97.5], axis=0).T, atol=1e-12)


def flags_for(folder, data_path):
    return ["--results_file", str(folder / "result.json"), "--data_path", str(data_path), "--dataset", "Toy"]


def test_the_page_shows_a_run_and_no_title_becomes_markup(tmp_path):
    evil = "<script>alert(1)</script><img src=x>"
    items = {
        **toy_data.ITEMS,
        "4": {"title": evil, "description": "a pen"},
        "3": {"title": "\u0000\u202e", "description": "x"},
    }
    data_path = toy_data.write_dataset(tmp_path / "data", item=items)
    checkpoint = tmp_path / "ckpt" / "checkpoint-20"
    checkpoint.mkdir(parents=True)
    log = [{"step": 10, "loss": 2.0, "loss_$\\foo$": 1.9}, {"step": 20, "eval_loss": 1.5, "eval_hit@10": 0.2}]
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    run_folder.RunRecord([], {"learning_rate": evil}, 1, "", {}, {}, {}).write(tmp_path / "ckpt")
    write_run(tmp_path, {"task": "seqrec", "arguments": {"ckpt_path": str(tmp_path / "ckpt"), "note": evil}})
    report.main([*flags_for(tmp_path, data_path), "--metrics", "hit@1,hit@2"])
    page = (tmp_path / "result.html").read_text()
    tags, texts = parts_of(page)
    assert evil in texts  # as text
    names = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(names) > 30 and len(set(names)) == len(names)
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) == set(names)
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", page)
    assert not {tag for tag, _ in tags} & {"script", "img", "link", "iframe"}
    for tag, attributes in tags:  # nothing is loaded from elsewhere
        assert all(
            not value.startswith("http") for name, value in attributes.items() if name in ("src", "href") and value
        )
        assert tag != "image" or attributes["xlink:href"].startswith("data:")
    assert sum(tag == "svg" for tag, _ in tags) == 3  # by k, for whom, training
    for heading in ("For whom", "Training", "Item index", "Examples", "Settings"):
        assert heading in texts
    assert sum("learning_rate" in text for text in texts) == 1
    # users 0 to 3: first, second, absent, third
    assert [text for text in texts if re.match(r"\d+\. in the list|not among", text)] == [
        "1. in the list",
        "2. in the list",
        "not among 4",
        "3. in the list",
    ]
    hits = re.findall(r'<li class=hit><span title="([^"]*)">([^<]*)<', page)
    assert (
        hits[0] == ("&lt;a_2&gt;&lt;b_0&gt;&lt;c_2&gt;", "&lt;script&gt;alert(1)&lt;/script&gt;&lt;img src=x&gt;")
        and len(hits) == 3
    )


def test_a_page_without_training_files_and_with_some_users_only(toy, tmp_path):
    write_run(tmp_path, {}, users=2)
    report.main(flags_for(tmp_path, toy))
    tags, texts = parts_of((tmp_path / "result.html").read_text())
    assert sum(tag == "svg" for tag, _ in tags) == 1 and any("no log of the training" in text for text in texts)
    assert any("LC-Rec has 2 of the users" in text for text in texts)
    assert "LC-Rec has 2 of the users" in (tmp_path / "result.table.md").read_text()


def test_the_results_name_their_data(toy, tmp_path):
    write_run(tmp_path, {"arguments": {"data_path": str(toy), "dataset": "Toy", "index_file": ".index.json"}})
    report.main(["--results_file", str(tmp_path / "result.json")])
    assert "Toy: 4 users" in (tmp_path / "result.table.md").read_text()
    with pytest.raises(UserError, match=r"Toy\.other\.json"):  # a flag that is given counts
        report.main(["--results_file", str(tmp_path / "result.json"), "--index_file", ".other.json"])


def test_the_order_of_the_lines_plays_no_part(toy, tmp_path):
    write_run(tmp_path, {})
    report.main(flags_for(tmp_path, toy))
    page, path = (tmp_path / "result.html").read_bytes(), tmp_path / "result.predictions.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[::-1]) + "\n")
    report.main(flags_for(tmp_path, toy))
    assert (tmp_path / "result.html").read_bytes() == page


def test_a_target_that_was_met_before_stays_in_the_list(tmp_path):
    data_path = toy_data.write_dataset(tmp_path / "data", inter={**toy_data.INTERS, "1": [0, 3, 5, 4, 3]})
    write_run(tmp_path, {})
    run = scored_runs.read_run(tmp_path / "result.json", "x", load_data(str(data_path), "Toy"))
    assert run.ranks.tolist() == [[0, 1, -1, 2]] and run.unseen.tolist() == [[0, 0, -1, 0]]  # user 1: 0 was met, 3 too


WRONG = {
    "the item 6 is not in Toy": ("[4, 1", "[6, 1"),
    "items is not a list of integers": ("[4, 1", "[true, 1"),
    "names an item twice": ("[4, 1", "[1, 1"),
    "the user '9' is not in Toy": ('"user": "1"', '"user": "9"'),
    "the user [1] is not in Toy": ('"user": "1"', '"user": [1]'),
    "the user '0' occurs twice": ('"user": "3"', '"user": "0"'),
    "the target is 2, in Toy it is 4": ('"target": 4', '"target": 2'),
    "the prompts have different users": ('"prompt_id": 0, "sample": 3', '"prompt_id": 1, "sample": 3'),
    "holds no predictions": (r"(?s).*", ""),
}


@pytest.mark.parametrize("message", WRONG)
def test_predictions_of_other_data_are_refused(toy, tmp_path, message):
    write_run(tmp_path, {})
    path = tmp_path / "result.predictions.jsonl"
    old, new = WRONG[message]
    old = old if old.startswith("(?s)") else re.escape(old)
    path.write_text(re.sub(old, new, path.read_text(), count=1))
    with pytest.raises(UserError, match=re.escape(message)):
        report.main(flags_for(tmp_path, toy))
    assert not list(tmp_path.glob("*.html")) and not list(tmp_path.glob("*.md"))


def test_results_of_another_index_file_are_refused(toy, tmp_path):
    data = load_data(str(toy), "Toy")
    hashes = {name: sha256(path) for name, path in data.files.items()}
    write_run(tmp_path, {"data_sha256": hashes})
    report.main(flags_for(tmp_path, toy))
    write_run(tmp_path, {"data_sha256": hashes | {"index": "0" * 64}})
    with pytest.raises(UserError, match=r"made with another Toy.index.json .*--index_file"):
        report.main(flags_for(tmp_path, toy))


@pytest.mark.parametrize("config", [None, [], "text", {"arguments": None}, {"arguments": {"ckpt_path": "x" * 5000}}])
def test_odd_settings_are_no_obstacle(toy, tmp_path, config):
    write_run(tmp_path, config)
    report.main(flags_for(tmp_path, toy))


def test_files_of_others_are_not_replaced(toy, tmp_path):
    write_run(tmp_path, {})
    (tmp_path / "notes.html").write_text("mine")
    for name, message in (("notes.md", "exists and is no page of this script"), ("result.json", "must end in .md")):
        with pytest.raises(UserError, match=message):
            report.main([*flags_for(tmp_path, toy), "--table_file", str(tmp_path / name)])
    assert (tmp_path / "notes.html").read_text() == "mine" and json.loads((tmp_path / "result.json").read_text())


def test_several_files_have_a_row_each(toy, tmp_path, capsys):
    write_run(tmp_path, {})
    for name in ("a|b", "c"):
        for kind in ("json", "predictions.jsonl"):
            (tmp_path / f"{name}.{kind}").write_bytes((tmp_path / f"result.{kind}").read_bytes())
    files = [str(tmp_path / "a|b.json"), str(tmp_path / "c.json")]
    report.main(["--results_file", *files, *flags_for(tmp_path, toy)[2:], "--unseen"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| LC-Rec")]
    assert [row.split(" | ")[0] for row in rows] == [
        f"| LC-Rec ({tmp_path.name}/{name}){unseen}" for name in ("a\\|b", "c") for unseen in ("", ", unseen")
    ]
    with pytest.raises(UserError, match="names a file twice"):
        report.main(["--results_file", files[1], files[1], *flags_for(tmp_path, toy)[2:]])


# ---- what the figures show ----


def drawn(draw, *args):
    from matplotlib.figure import Figure

    canvas = Figure()
    draw(canvas, *args)
    return canvas.axes


def test_curves_are_the_metrics_of_every_length():
    ranks = np.array([[0, 2, -1, 1, 5], [0, 0, 3, -1, -1]])
    axes = drawn(report_page.curves_by_k, [("x", ranks, "-")], 6)
    for panel, kind in zip(axes, ("hit", "ndcg"), strict=True):
        places, heights = panel.lines[0].get_data()
        assert places.tolist() == [1, 2, 3, 4, 5, 6]
        expected = [report.values(ranks, f"{kind}@{k}")[f"{kind}@{k}"].mean() for k in places]
        assert heights.tolist() == pytest.approx(expected)


def test_bars_are_the_hit_rates_of_groups(toy):
    data = load_data(str(toy), "Toy")  # histories before the target: 4, 2, 3 and 5 items
    ranks = np.array([[9, -1, 10, 0]])
    length, popular = drawn(report_page.by_group, data, [("x", ranks, "-")])
    assert [bar.get_height() for bar in length.containers[0]] == [0, 0, 1]
    assert [text.get_text() for text in length.get_xticklabels()] == ["2\n1 users", "3\n1 users", "4–5\n2 users"]
    # the targets 4, 3, 1, 4 occur 0, 1, 2, 0 times in the training parts
    assert [bar.get_height() for bar in popular.containers[0]] == [1, 0]
    assert [text.get_text() for text in popular.get_xticklabels()] == ["0\n2 users", "1–2\n2 users"]


def test_learning_curves_show_what_was_logged_and_all_of_it():
    history = [{"step": 10.0, "loss": 2.0, "loss_seqrec": 1.9}, {"step": 20.0, "loss": 1.0, "loss_seqrec": 0.9}]
    history += [{"step": 50.0, "eval_loss": 1.5, "eval_hit@10": 0.2}]
    train, valid, second = drawn(report_page.learning_curves, history)
    assert {line.get_label(): line.get_ydata().tolist() for line in train.lines} == {
        "loss": [2, 1],
        "seqrec": [1.9, 0.9],
    }
    assert [line.get_xydata().tolist() for line in valid.lines + second.lines] == [[[50, 1.5]], [[50, 0.2]]]
    assert train.get_xlim()[1] > 50 and valid.get_xlim()[1] > 50
    colours = {line.get_color() for line in valid.lines + second.lines}
    assert len(colours) == 2 and len(valid.get_legend().get_texts()) == 2


def test_the_newest_log_is_taken_and_what_is_broken_is_left_out(tmp_path):
    assert run_folder.log_history(tmp_path) == []
    for step, rows in (
        (9, [{"step": 9}]),
        (10, [{"step": 10, "loss": float("nan"), "x": "y"}, {"loss": 1}, {"step": 10**400}]),
    ):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    assert run_folder.log_history(tmp_path) == []  # a step without end: the whole log is broken
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"step": 10, "x": "y"}]})
    )
    assert run_folder.log_history(tmp_path) == [{"step": 10.0}]
    for text in ("[]", "{", '{"log_history": 3}', "[" * 100_000):
        (tmp_path / "checkpoint-10" / "trainer_state.json").write_text(text)
        assert run_folder.log_history(tmp_path) == []


def test_the_index_table_counts_codes(toy):
    cells = re.findall(r"<td>([^<]*)</td>", report_page.index_part(load_data(str(toy), "Toy")))
    # level 1: <a_0> <a_1> <a_2>, two items each; level 2: <b_1> 2, <b_0> 2, <b_10> 1, <b_2> 1; level 3: <c_0> 4, <c_1> 1, <c_2> 1
    assert cells[:4] == ["1", "3", "1.58", "33.33%"]
    assert cells[4:8] == ["2", "4", "1.92", "33.33%"]
    assert cells[8:] == ["3", "3", "1.25", "66.67%"]


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
    report.main([*flags, "--unseen"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| LC-Rec")]
    assert [cell.split()[0] for cell in rows[0].split("|")[2:4]] == ["0.2500", "0.5000"]
    # without what they have seen the lists are [4], [0, 3, 1, 2], [3, 4] and [4]
    assert rows[1].startswith("| LC-Rec, unseen |")
    assert [cell.split()[0] for cell in rows[1].split("|")[2:4]] == ["0.5000", "0.7500"]
    assert all(row in (tmp_path / "result.table.md").read_text() for row in rows)


def test_recorded_references_are_marked_and_seen_items_stay_a_flag(toy, tmp_path, capsys):
    write_run(tmp_path, {})
    entry = {"model": "SASRec", "metrics": {"hit@10": 0.25}, "source": "elsewhere", "command": "run it"}
    path = tmp_path / "references.json"
    path.write_text(json.dumps({"Toy": [entry], "Other": [{}]}))
    report.main([*flags_for(tmp_path, toy), "--references", str(path), "--metrics", "hit@10,ndcg@10"])
    printed = capsys.readouterr().out
    assert "| SASRec (recorded) | 0.2500 | – |" in printed
    assert "SASRec (recorded): not run here; elsewhere: `run it`." in printed
    assert "unseen" not in printed
    for wrong in ({"Toy": {}}, {"Toy": [{"model": "SASRec"}]}, {"Toy": ["SASRec"]}, []):
        path.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="references.json"):
            report.main([*flags_for(tmp_path, toy), "--references", str(path)])
