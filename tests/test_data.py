"""The dataset's files and the samples of the six tasks, against expectations written by hand."""

import copy
from collections import Counter

import numpy as np
import pytest
from toy_data import INDEX, INTERS, ITEMS, USERS, write_dataset

from data import USER_PARTS, load_data
from prompt import Prompts, Template, load_prompts
from samples import TestSet, TrainSet, ValidSet
from tasks import TASKS, HistoryFormat
from utils import UserError

FRAME = "{instruction}=>{response}"
I0, I1, I2, I3, I4, I5 = ("".join(INDEX[str(i)]) for i in range(6))


def prompts(**templates):
    return Prompts(FRAME, {task: [Template(*row) for row in rows] for task, rows in templates.items()})


def samples(train):
    return [train[i]["prompt"] + train[i]["response"] for i in range(len(train))]


def test_seqrec_predicts_the_next_item_of_every_training_prefix(toy):
    data = load_data(str(toy), "Toy")
    train = TrainSet(data, prompts(seqrec=[("{inters}", "{item}")]), [("seqrec", 1, 0)], HistoryFormat())
    # the training parts are [0,1,2], [5], [2,0], [1,3,5,0]
    assert samples(train) == [
        f"{I0}=>{I1}",
        f"{I0}, {I1}=>{I2}",
        f"{I2}=>{I0}",
        f"{I1}=>{I3}",
        f"{I1}, {I3}=>{I5}",
        f"{I1}, {I3}, {I5}=>{I0}",
    ]


def test_longest_history_only_has_one_training_sample_a_user(toy):
    data = load_data(str(toy), "Toy")
    templates = prompts(seqrec=[("{inters}", "{item}")], item2index=[("{title}", "{item}")])
    tasks = [("seqrec", 1, 0), ("item2index", 1, 0)]
    train = TrainSet(data, templates, tasks, HistoryFormat(), longest_history_only=True)
    assert samples(train)[:3] == [f"{I0}, {I1}=>{I2}", f"{I2}=>{I0}", f"{I1}, {I3}, {I5}=>{I0}"]
    assert train.counts() == {"seqrec": 3, "item2index": 6}  # a user with one training item has no sample


def test_validation_and_test_targets_are_the_last_two_items(toy):
    data = load_data(str(toy), "Toy")
    one = prompts(seqrec=[("{inters}", "{item}")])
    valid = ValidSet(data, one, HistoryFormat(), prompt_id=0)
    assert [valid[i]["prompt"] + valid[i]["response"] for i in range(4)] == [
        f"{I0}, {I1}, {I2}=>{I3}",
        f"{I5}=>{I4}",
        f"{I2}, {I0}=>{I5}",
        f"{I1}, {I3}, {I5}, {I0}=>{I2}",
    ]
    test = TestSet(data, "seqrec", HistoryFormat())
    assert [(test[i].user, test[i].history, test[i].target) for i in range(4)] == [
        ("0", [0, 1, 2, 3], 4),
        ("1", [5, 4], 3),
        ("2", [2, 0, 5], 1),
        ("3", [1, 3, 5, 0, 2], 4),
    ]


def test_histories_are_cut_numbered_and_separated(toy):
    data = load_data(str(toy), "Toy")
    form = HistoryFormat(max_his_len=2, add_prefix=True, his_sep=" | ")
    test = TestSet(data, "seqrec", form)
    assert test[3].slots["inters"] == f"1. {I0} | 2. {I2}"
    assert test[3].slots["inter_titles"] == '1. "Red Pen" | 2. "Notebook, A5"'
    for everything in (0, -1):  # as in the original
        assert TestSet(data, "seqrec", HistoryFormat(max_his_len=everything))[3].history == [1, 3, 5, 0, 2]


def test_item_tasks_take_every_item_and_leave_out_templates_without_text(toy):
    data = load_data(str(toy), "Toy")
    templates = prompts(
        item2index=[("T {title}", "{item}"), ("D {description}", "{item}")],
        index2item=[("{item}", "{title}"), ("{item}", "{description}"), ("{item}", "{title}\n\n{description}")],
    )
    train = TrainSet(data, templates, [("item2index", 2, 0), ("index2item", 3, 0)], HistoryFormat())
    assert train.counts() == {"item2index": 12, "index2item": 18}
    texts = samples(train)
    # two copies of a sample take two different templates; item 2 has no description, so both take the title's
    assert set(texts[0:2]) == {f"T Red Pen=>{I0}", f"D A pen that writes red.=>{I0}"}
    assert set(texts[4:6]) == {f"T Notebook, A5=>{I2}"}
    assert set(texts[12:15]) == {
        f"{I0}=>Red Pen",
        f"{I0}=>A pen that writes red.",
        f"{I0}=>Red Pen\n\nA pen that writes red.",
    }
    assert set(texts[18:21]) == {f"{I2}=>Notebook, A5"}
    assert f"{I3}=>Stapler" in texts  # blanks and .!?,;:` at the ends are gone
    assert f"{I4}=>Paper Clips" in texts


def test_fusionseqrec_mixes_titles_and_indices(toy):
    data = load_data(str(toy), "Toy")
    train = TrainSet(
        data, prompts(fusionseqrec=[("{inter_titles}", "{item}")]), [("fusionseqrec", 1, 0)], HistoryFormat()
    )
    assert samples(train)[1] == f'"Red Pen", "Blue Pen"=>{I2}'
    assert len(train) == 6


def test_itemsearch_and_preferenceobtain_use_the_users_texts(toy):
    data = load_data(str(toy), "Toy", user_parts=USER_PARTS)
    templates = prompts(
        itemsearch=[("{inters}|{query}|{explicit_preference}", "{item}"), ("{query}", "{item}")],
        preferenceobtain=[("{inters}", "{explicit_preference}")],
    )
    train = TrainSet(data, templates, [("itemsearch", 2, 0), ("preferenceobtain", 1, 0)], HistoryFormat())
    texts = samples(train)
    # user 0: target items[-3] = 2 after [0, 1]; two queries, two preferences
    whole, query = sorted(texts[0:2], key=len, reverse=True)
    queries = USERS["user_vague_intention"]["train"]["0"]["querys"]
    assert query in {f"{text}=>{I2}" for text in queries}
    assert whole in {
        f"{I0}, {I1}|{text}|{liked}=>{I2}" for text in queries for liked in USERS["user_explicit_preference"]["0"]
    }
    # user 1 has three items: no history before the target, so only the template that needs none; nor a preference sample
    assert all("|" not in text for text in texts[2:4])
    assert train.counts() == {"itemsearch": 8, "preferenceobtain": 3}
    assert texts[8] in {f"{I0}, {I1}=>{liked}" for liked in USERS["user_explicit_preference"]["0"]}

    test = TestSet(data, "itemsearch", HistoryFormat())
    assert (test[0].history, test[0].target) == ([0, 1, 2, 3], 4)
    assert test[0].slots["query"] in USERS["user_vague_intention"]["test"]["0"]["querys"]


def test_draws_depend_on_seed_epoch_and_sample_alone(toy):
    data = load_data(str(toy), "Toy", user_parts=USER_PARTS)
    tasks = [(name, 1, 0) for name in TASKS]
    one = TrainSet(data, load_prompts(), tasks, HistoryFormat(), seed=1)
    two = TrainSet(data, load_prompts(), tasks, HistoryFormat(), seed=1)
    first = samples(one)
    assert first == samples(two) == [two[i]["prompt"] + two[i]["response"] for i in reversed(range(len(two)))][::-1]
    one.set_epoch(1)
    assert samples(one) != first
    one.set_epoch(0)
    assert samples(one) == first
    assert samples(TrainSet(data, load_prompts(), tasks, HistoryFormat(), seed=2)) != first


def test_templates_are_drawn_uniformly(toy):
    data = load_data(str(toy), "Toy")
    train = TrainSet(
        data, prompts(seqrec=[(f"{n}", "{item}") for n in range(4)]), [("seqrec", 1, 0)], HistoryFormat(), seed=3
    )
    drawn = Counter()
    for epoch in range(500):
        train.set_epoch(epoch)
        drawn.update(text[0] for text in samples(train))
    assert sum(drawn.values()) == 3000
    assert all(650 < n < 850 for n in drawn.values())  # 750 expected, 24 the standard deviation


def test_a_subset_is_drawn_once_without_replacement(toy):
    data = load_data(str(toy), "Toy")
    templates = prompts(seqrec=[("{inters}", "{item}")])
    every = samples(TrainSet(data, templates, [("seqrec", 1, 0)], HistoryFormat()))
    some = TrainSet(data, templates, [("seqrec", 1, 4)], HistoryFormat())
    first = samples(some)
    assert len(set(first)) == 4 and set(first) <= set(every)
    some.set_epoch(1)
    assert samples(some) == first
    for more_than_there_are in (6, 1000):  # the original crashed
        assert samples(TrainSet(data, templates, [("seqrec", 1, more_than_there_are)], HistoryFormat())) == every


def test_valid_templates_are_different_and_drawn_once(toy):
    data = load_data(str(toy), "Toy")
    templates = prompts(seqrec=[(f"{n}", "{item}") for n in range(5)])
    valid = ValidSet(data, templates, HistoryFormat(), prompt_num=3)
    drawn = [valid[i]["prompt"] for i in range(len(valid))]
    assert len(drawn) == 12 and all(len(set(drawn[i : i + 3])) == 3 for i in range(0, 12, 3))
    assert drawn == [valid[i]["prompt"] for i in range(len(valid))]
    with pytest.raises(UserError, match="valid_prompt_sample_num 6"):
        ValidSet(data, templates, HistoryFormat(), prompt_num=6)


def test_items_that_share_an_index_are_counted_and_go_on(tmp_path, capsys):
    index = copy.deepcopy(INDEX)
    index["5"] = index["3"]
    data = load_data(str(write_dataset(tmp_path, index=index)), "Toy")
    assert data.canonical == [0, 1, 2, 3, 4, 3]
    assert data.shared_items == 2
    assert "2 of 6 items share their index" in capsys.readouterr().out


def test_other_index_files_load(tmp_path):
    """Three levels, four levels, ragged ones: whatever the file has."""
    root = write_dataset(tmp_path)
    ragged = {item: tokens[: 1 + int(item) % 3] + [f"<z_{item}>"] for item, tokens in INDEX.items()}
    write_dataset(tmp_path, index=ragged)
    data = load_data(str(root), "Toy")
    assert data.indices[2] == ("<a_1>", "<b_0>", "<c_0>", "<z_2>")
    assert data.item_tokens == sorted(data.item_tokens)


def without(content, *path):
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inter": None}, r"Toy\.inter\.json: no such file"),
        ({"inter": '{"0": [1, 2'}, r"Toy\.inter\.json: broken JSON at line 1, column"),
        ({"inter": {"0": [0, 1, 9]}}, r"Toy\.inter\.json: user '0': 9 is not an item.*0 to 5"),
        ({"inter": {"0": [0, 1]}}, r"user '0' has 2 interactions; leave-one-out needs 3"),
        ({"inter": {"0": [0, 1, True]}}, r"True is not an item"),
        ({"inter": []}, r"Toy\.inter\.json: must be an object"),
        ({"item": without(ITEMS, "3")}, r"Toy\.item\.json: has no item '3'"),
        ({"item": without(ITEMS, "3", "title")}, r"Toy\.item\.json: item '3' has no text in 'title'"),
        (
            {"item": {**ITEMS, "3": {"title": " ", "description": ""}}},
            r"item '3' has neither a title nor a description",
        ),
        ({"index": without(INDEX, "4")}, r"Toy\.index\.json: item '4' has no index"),
        ({"index": {**INDEX, "4": ["a_1"]}}, r"Toy\.index\.json: item '4' has 'a_1', which is not a token"),
        ({"index": {**INDEX, "4": []}}, r"item '4' must have a list of tokens"),
        ({"index": {**INDEX, "6": ["<a_1>"]}}, r"has item '6', but the item file has 6 items"),
        ({"user": None}, r"Toy\.user\.json: no such file"),
        (
            {"user": without(USERS, "user_vague_intention", "train", "1", "querys")},
            r"'train' '1': 'querys' must be two",
        ),
    ],
)
def test_broken_files_are_named_with_key_and_reason(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        load_data(str(write_dataset(tmp_path, **changes)), "Toy", user_parts=USER_PARTS)
    assert "\n" not in str(caught.value)


def test_gaps_of_a_generator_are_left_out_and_counted(tmp_path, capsys):
    users = copy.deepcopy(USERS)
    users["user_explicit_preference"]["0"] = ["", "User 0 likes pens."]
    users["user_explicit_preference"]["1"] = [" "]
    users["user_vague_intention"]["train"]["2"]["querys"][1] = "\t"
    del users["user_vague_intention"]["test"]["3"]
    data = load_data(str(write_dataset(tmp_path, user=users)), "Toy", user_parts=USER_PARTS)
    assert data.users.preferences == {
        "0": ["User 0 likes pens."],
        **{user: USERS["user_explicit_preference"][user] for user in "23"},
    }
    assert {split: list(rows) for split, rows in data.users.intentions.items()} == {
        "train": ["0", "3"],
        "test": ["0", "2"],
    }
    said = capsys.readouterr().out
    assert "user_explicit_preference: 1 of 4 users left out, the first '1' has no preference" in said
    assert "user_vague_intention 'train': 1 of 3 users left out, the first '2' lacks a query" in said
    train = TrainSet(data, load_prompts(), [("itemsearch", 1, 0), ("preferenceobtain", 1, 0)], HistoryFormat())
    assert train.counts() == {"itemsearch": 2, "preferenceobtain": 3}
    assert [TestSet(data, "itemsearch", HistoryFormat())[i].user for i in range(2)] == ["0", "2"]


def test_a_part_that_no_task_needs_is_not_looked_at(tmp_path):
    users = copy.deepcopy(USERS)
    users["user_vague_intention"]["test"] = {"0": {"item": 99}}
    data = load_data(str(write_dataset(tmp_path, user=users)), "Toy", user_parts={"preference", "train"})
    assert list(data.users.intentions) == ["train"]
    with pytest.raises(UserError, match=r"'test' '0': 'querys' must be two texts"):
        load_data(str(write_dataset(tmp_path, user=users)), "Toy", user_parts={"preference", "test"})


def test_an_empty_test_part_stops_only_what_needs_it(tmp_path):
    users = copy.deepcopy(USERS)
    users["user_vague_intention"]["test"] = {}
    data = load_data(str(write_dataset(tmp_path, user=users)), "Toy", user_parts=USER_PARTS)
    assert len(TrainSet(data, load_prompts(), [("itemsearch", 1, 0)], HistoryFormat())) == 4
    with pytest.raises(UserError, match=r"Toy\.user\.json: user_vague_intention has nothing in 'test'"):
        TestSet(data, "itemsearch", HistoryFormat())


def test_prefix_rows_equal_a_plain_loop():
    rng = np.random.default_rng(0)
    inters = {str(u): list(range(rng.integers(3, 30))) for u in range(200)}
    expected = [[u, p] for u, items in enumerate(inters.values()) for p in range(1, len(items) - 2)]

    class Data:
        pass

    data = Data()
    data.inters = inters
    assert TASKS["seqrec"].splits["train"].rows(data).tolist() == expected


def test_toy_inters_are_what_the_expectations_above_say():
    assert [items[:-2] for items in INTERS.values()] == [[0, 1, 2], [5], [2, 0], [1, 3, 5, 0]]


def test_windows_cover_every_training_item_once_and_move_with_the_epoch(tmp_path):
    long, short = [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0], [3, 4, 5]
    items = {"0": long, "1": short, "2": [5, 4, 3, 2]}
    data = load_data(str(write_dataset(tmp_path, inter=items)), "Toy")
    template = prompts(seqrec=[("{inters}", "{item}")])
    train = TrainSet(data, template, [("seqrec", 1, 0)], HistoryFormat(3, his_sep=""), history_windows=True)
    cuts, count = set(), len(train)
    for epoch in range(12):
        train.set_epoch(epoch)
        assert len(train) == count == 5  # 11 training items in up to 4 pieces, none of 1, one of 2
        pieces = [(int(first), int(target)) for user, target, first in train.rows[0] if user == 0]
        assert all(1 <= target - first <= 3 for first, target in pieces)
        covered = {position for first, target in pieces for position in range(first, target + 1)}
        assert len(covered) >= 10 and 10 in covered  # a single item at an end has no history and no target
        cuts.add(tuple(pieces))
        whole = ["".join("".join(INDEX[str(item)]) for item in long[a : b + 1]) for a, b in pieces]
        assert [train[i]["prompt"].replace("=>", "") + train[i]["response"] for i in range(4)] == [
            text[: -len("".join(INDEX[str(long[b])]))] + "".join(INDEX[str(long[b])])
            for text, (_, b) in zip(whole, pieces, strict=True)
        ]
        assert samples(train)[4] == f"{I5}=>{I4}"
    assert len(cuts) == 4
