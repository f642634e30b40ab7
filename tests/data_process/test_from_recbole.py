"""RecBole atomic files: small folders written by hand, and the real MovieLens-100k of the wheel."""

import json

import numpy as np
import pytest

from data import USER_PARTS, load_data
from data_process import from_recbole, prepare, user_texts
from data_process.fetch import fetch
from utils import UserError

INTER = """user_id:token\titem_id:token\trating:float\ttimestamp:float
u1\tx\t5\t30
u1\ty\t4\t10
u1\tz\t3\t20
u1\tx\t5\t5
u2\ty\t5\t1
u2\tx\t1\t1
u2\tz\t5\t0
u3\tx\t5\t1
"""
ITEM = """item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq
x\tHeat, The\t1995\tAction Crime
y\tFargo\t1996\tCrime
z\tM*A*S*H\t\tunknown
"""


@pytest.fixture
def atomic(tmp_path):
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "toy.inter").write_text(INTER)
    (folder / "toy.item").write_text(ITEM)
    return folder


def run(atomic, *more):
    from_recbole.main(["--source", str(atomic), "--data_path", str(atomic.parent / "out"), *more])
    folder = atomic.parent / "out" / "toy"
    return {kind: json.loads((folder / f"toy.{kind}.json").read_text()) for kind in ("inter", "item")}, folder


def test_order_first_interaction_and_core(atomic, capsys):
    files, folder = run(atomic, "--k_core", "2", "--item_kind", "movie")
    # u1 met x first at 5; equal times of u2 go by item; u3 has one interaction only
    assert files["inter"] == {"0": [0, 1, 2], "1": [2, 0, 1]}
    assert files["item"]["0"] == {
        "title": "Heat, The",
        "description": "1995 Action, Crime movie.",
        "brand": "",
        "categories": "Action, Crime",
    }
    assert files["item"]["2"]["description"] == ""
    assert (folder / "toy.user2id").read_text() == "u1\t0\nu2\t1\n"
    assert "2 users, 3 items, 6 interactions" in capsys.readouterr().out


def test_equal_times_can_keep_the_order_of_the_lines(atomic):
    files, _ = run(atomic, "--k_core", "2", "--equal_times", "line")
    assert files["inter"]["1"] == [2, 1, 0]


def test_ratings_and_short_users(atomic):
    files, _ = run(atomic, "--k_core", "1", "--min_rating", "3")
    assert files["inter"] == {"0": [0, 1, 2]}  # u2 has two left, u3 one


def test_k_core_equals_taking_out_one_by_one():
    rng = np.random.default_rng(0)
    pairs = np.unique(rng.integers(0, 18, size=(150, 2)), axis=0)
    keep = prepare.k_core(pairs[:, 0], pairs[:, 1], 5, 5)
    left = {tuple(pair) for pair in pairs.tolist()}
    while True:  # the slow way: one interaction at a time
        bad = [
            pair
            for pair in left
            if sum(pair[0] == other[0] for other in left) < 5 or sum(pair[1] == other[1] for other in left) < 5
        ]
        if not bad:
            break
        left.discard(bad[0])
    assert {tuple(pair) for pair in pairs[keep].tolist()} == left
    assert 0 < len(left) < len(pairs)


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (lambda f: (f / "toy.inter").unlink(), [], r"toy\.inter: no such file"),
        (lambda f: (f / "toy.inter").write_text("1\t2\n"), [], r"toy\.inter: line 1 must name the fields"),
        (
            lambda f: (f / "toy.inter").write_text(INTER + "u1\tx\n"),
            [],
            r"toy\.inter: line 10 has 2 fields instead of 4",
        ),
        (lambda f: None, ["--time_field", "when"], r"has no field 'when'; it has user_id"),
        (lambda f: None, ["--title_field", "name"], r"toy\.item: has no field 'name'"),
        (
            lambda f: None,
            ["--k_core", "9"],
            r"toy\.inter: nothing is left\. .* 0 of users with 9 and items with 9 or more",
        ),
    ],
)
def test_wrong_input(atomic, change, flags, message):
    change(atomic)
    with pytest.raises(UserError, match=message):
        run(atomic, *flags)


def test_nothing_is_overwritten_without_asking(atomic):
    run(atomic, "--k_core", "2")
    with pytest.raises(UserError, match="--overwrite replaces it"):
        run(atomic, "--k_core", "2")
    run(atomic, "--k_core", "2", "--overwrite")


@pytest.mark.slow
def test_movielens_from_the_wheel(tmp_path):
    """943 users and 1,682 movies; user texts by rule that load, and never a whole title in an intention."""
    common = ["--data_path", str(tmp_path), "--dataset", "ml-100k"]
    from_recbole.main(["--source", str(fetch("ml-100k")), "--k_core", "1", "--item_kind", "movie", *common])
    user_texts.main(common)
    folder = tmp_path / "ml-100k"
    items = json.loads((folder / "ml-100k.item.json").read_text())
    (folder / "ml-100k.index.json").write_text(json.dumps({item: [f"<a_{item}>"] for item in items}))
    data = load_data(str(tmp_path), "ml-100k", user_parts=USER_PARTS)
    assert (len(data.inters), len(data.titles), sum(map(len, data.inters.values()))) == (943, 1682, 100_000)
    assert items["0"] == {
        "title": "Toy Story",
        "description": "1995 Animation, Children's, Comedy movie.",
        "brand": "",
        "categories": "Animation, Children's, Comedy",
    }
    for split, back in (("train", 3), ("test", 1)):
        for user, intention in data.users.intentions[split].items():
            assert intention.item == data.inters[user][-back]
            assert intention.inters == data.inters[user][:-back]
            title = items[str(intention.item)]["title"].lower()
            assert not any(title in query.lower() for query in intention.queries)
    assert json.loads((folder / "ml-100k.user.json").read_text())["made_by"]["method"] == "rule"
