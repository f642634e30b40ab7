"""The rules of the preparation, by hand and against a plain implementation on random data."""

import argparse
import datetime
import json
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arguments import make_parser
from data_process.cleaning import cleaned
from data_process.item_texts import clean_text
from data_process.prepare import add_preparation_flags, check_name, k_core, moments, prepare_dataset, rules_of, staging
from provenance import read_provenance, record_path, verify
from utils import UserError


def options(*flags: str) -> argparse.Namespace:
    parser = make_parser("x")
    add_preparation_flags(parser)
    return parser.parse_args(flags)


def run(root: Path, rows, *flags: str, items=None, **more) -> dict:
    """Prepare (user, item, time[, rating]) rows; every item that occurs has a title unless `items` says otherwise."""
    columns = ["user", "item", "time", "rating"][: len(rows[0])] if rows else ["user", "item", "time"]
    frame = pl.DataFrame([tuple(map(str, row)) for row in rows], schema=dict.fromkeys(columns, pl.String), orient="row")
    names = items or {str(row[1]): f"Thing {row[1]}" for row in rows}
    texts = pl.DataFrame({"item": list(names), "title": list(names.values())}, schema_overrides={"title": pl.String})
    source = root / "raw"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(repr(rows))
    numbered = [(source, table.with_row_index("line", offset=1)) for table in (frame, texts)]
    flags = (
        "--data_path",
        str(root / "out"),
        "--dataset",
        "D",
        "--user_k",
        "1",
        "--item_k",
        "1",
        "--overwrite",
        *flags,
    )
    folder = prepare_dataset(
        interactions=numbered[:1], items=numbered[1:], inputs=[source], step="test", options=options(*flags), **more
    )
    names = {kind: (folder / f"D.{kind}2id").read_text().splitlines() for kind in ("user", "item")}
    files = {kind: json.loads((folder / f"D.{kind}.json").read_text()) for kind in ("inter", "item")}
    return files | {f"{kind}_names": [line.split("\t")[0] for line in lines] for kind, lines in names.items()}


def by_name(found: dict) -> dict[str, list[str]]:
    """Raw user name → raw item names."""
    return {
        found["user_names"][int(user)]: [found["item_names"][i] for i in items]
        for user, items in found["inter"].items()
    }


THREE = [("u", "a", 1), ("u", "b", 2), ("u", "c", 3)]


# ---- names ----


@pytest.mark.parametrize(
    "name", ["../../x", "a/b", "", ".hidden", "-x", "a\\b", "a\nb", "..", "C:x", "n" * 101, None, "a*"]
)
def test_a_dataset_name_is_no_path(name):
    with pytest.raises(UserError, match="must be a plain name"):
        check_name(name)


@pytest.mark.parametrize("name", ["Games", "ml-100k", "Büro_2", "a.b"])
def test_plain_names_pass(name):
    assert check_name(name) == name


def test_nothing_outside_the_data_path(tmp_path):
    with pytest.raises(UserError, match="must be a plain name"):
        run(tmp_path / "deep", THREE, "--dataset", "../../x")
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


# ---- order ----


def test_only_the_first_interaction_with_an_item_counts(tmp_path):
    assert by_name(run(tmp_path, [("u", "a", 9), ("u", "b", 2), ("u", "a", 1), ("u", "c", 3)])) == {
        "u": ["a", "b", "c"]
    }


def test_equal_times_go_by_item_or_by_line(tmp_path):
    rows = [("u", "i10", 5), ("u", "i2", 5), ("u", "i1", 7), ("u", "i3", 5)]
    assert by_name(run(tmp_path, rows)) == {"u": ["i2", "i3", "i10", "i1"]}
    assert by_name(run(tmp_path, rows, "--equal_times", "line")) == {"u": ["i10", "i2", "i3", "i1"]}


def test_the_order_of_the_lines_does_not_matter(tmp_path):
    rng = np.random.default_rng(0)
    rows = [(f"u{u}", f"{i}", t) for u, i, t in rng.integers(0, 9, size=(150, 3)).tolist()]
    found = run(tmp_path, rows, "--user_k", "3")
    for _ in range(3):
        rng.shuffle(rows)
        assert run(tmp_path, [tuple(row) for row in rows], "--user_k", "3") == found


def test_names_that_read_as_one_number_stay_two_items_in_one_order(tmp_path):
    rows = [("1", "01", 1), ("1", "1", 1), ("1", "001", 1), ("01", "1", 3), ("01", "01", 2), ("01", "2", 1)]
    found = run(tmp_path, rows)
    assert found["item_names"] == ["1", "2", "01", "001"] and found["user_names"] == ["1", "01"]
    assert found["inter"] == {"0": [0, 2, 3], "1": [1, 2, 0]}


def test_numbers_follow_names_not_what_comes_next(tmp_path):
    """The newest item gets no number that tells: renaming nothing but times changes no number."""
    rows = [(u, i, t) for u in "uvw" for t, i in enumerate("dacbe")]
    turned = [(u, i, -t) for u, i, t in rows]
    assert run(tmp_path, rows)["item_names"] == run(tmp_path, turned)["item_names"] == list("abcde")


# ---- what goes ----


def test_core_by_hand(tmp_path):
    """d has one user; without d user w has two items and goes; without w item c has one user and goes; u and v stay."""
    rows = [(u, i, t) for u in "uv" for t, i in enumerate("abe")] + [("w", i, t) for t, i in enumerate("acd")]
    rows.append(("u", "c", 9))
    assert by_name(run(tmp_path, rows, "--item_k", "2", "--user_k", "3")) == {
        "u": ["a", "b", "e"],
        "v": ["a", "b", "e"],
    }


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=50, unique=True),
    st.integers(1, 5),
    st.integers(1, 5),
)
def test_core_is_what_is_left_when_single_interactions_go(pairs, user_k, item_k):
    keep = k_core(np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs]), user_k, item_k)
    left = set(pairs)
    while bad := [
        p for p in left if sum(q[0] == p[0] for q in left) < user_k or sum(q[1] == p[1] for q in left) < item_k
    ]:
        left.discard(bad[0])
    assert {p for p, kept in zip(pairs, keep, strict=True) if kept} == left


def moment(*when: int) -> int:
    return int(datetime.datetime(*when, tzinfo=datetime.UTC).timestamp())


@pytest.mark.parametrize("unit", [1, 1000, 1_000_000])
def test_window_has_its_start_but_not_its_end(tmp_path, unit):
    times = [moment(2016, 10, 1) - 1, moment(2016, 10, 1), moment(2017, 5, 2), moment(2018, 10, 31, 23, 59, 59)]
    rows = [("u", i, t * unit) for i, t in zip("abcde", [*times, moment(2018, 11, 1)], strict=True)]
    window = ("--st_year", "2016", "--st_month", "10", "--ed_year", "2018", "--ed_month", "11")
    assert by_name(run(tmp_path, rows, *window)) == {"u": ["b", "c", "d"]}
    assert by_name(run(tmp_path, rows, "--st_year", "2017")) == {"u": ["c", "d", "e"]}
    assert by_name(run(tmp_path, rows, *window[4:])) == {"u": ["a", "b", "c", "d"]}


def test_a_window_comes_before_the_first_interaction(tmp_path):
    """What was first met before the window counts by its next time within it."""
    rows = [("u", "a", 1), *(("u", i, moment(2020, 1, d)) for d, i in enumerate("bca", 1))]
    assert by_name(run(tmp_path, rows, "--st_year", "2020")) == {"u": ["b", "c", "a"]}


def test_low_ratings_and_items_without_text_go(tmp_path, capsys):
    rows = [("u", i, t, 5 - (i == "b")) for t, i in enumerate("abcdef")]
    items = {"a": "A", "b": "B", "c": "<br>", "d": "D", "f": "F"}
    found = run(tmp_path, rows, "--min_rating", "5", items=items)
    assert by_name(found) == {"u": ["a", "d", "f"]}
    assert "6 read; 5 rated 5 or better; 3 with an item that has a text; 3 first" in capsys.readouterr().out


def test_users_with_fewer_than_three_items_cannot_be_split(tmp_path):
    assert by_name(run(tmp_path, [*THREE, ("v", "a", 1), ("v", "b", 2)])) == {"u": ["a", "b", "c"]}


ROWS = st.lists(
    st.tuples(st.sampled_from("uvwx"), st.sampled_from(["a", "b", "c", "10", "9"]), st.integers(0, 4)),
    min_size=1,
    max_size=60,
)


@settings(max_examples=40, deadline=None)
@given(ROWS, st.integers(3, 4), st.integers(1, 3), st.booleans())
def test_the_same_as_dicts_and_lists(tmp_path_factory, rows, user_k, item_k, by_line):
    kept: dict[str, dict[str, tuple]] = {}
    for number, (user, item, time) in enumerate(rows):
        key = (time, number) if by_line else (time, len(item), item)
        mine = kept.setdefault(user, {})
        mine[item] = min(key, mine.get(item, key))
    while True:
        counts = Counter(item for mine in kept.values() for item in mine)
        left = {user: {i: key for i, key in mine.items() if counts[i] >= item_k} for user, mine in kept.items()}
        left = {user: mine for user, mine in left.items() if len(mine) >= user_k}
        if left == kept:
            break
        kept = left
    flags = ["--user_k", str(user_k), "--item_k", str(item_k), "--equal_times", "line" if by_line else "item"]
    root = tmp_path_factory.mktemp("p")
    if not kept:
        with pytest.raises(UserError, match="nothing is left"):
            run(root, rows, *flags)
        return
    found = run(root, rows, *flags)
    assert by_name(found) == {user: sorted(mine, key=mine.get) for user, mine in kept.items()}
    assert found["user_names"] == sorted(kept)
    assert found["item_names"] == sorted({i for mine in kept.values() for i in mine}, key=lambda i: (len(i), i))
    assert [entry["title"] for entry in found["item"].values()] == [f"Thing {name}" for name in found["item_names"]]


# ---- texts and times ----


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.none() | st.text(st.sampled_from("a<b>&amp; \t\n\u00a0\u2028\x00\x1f/!-3"), max_size=20), min_size=1)
)
def test_columns_are_cleaned_as_single_texts(texts):
    assert cleaned(pl.Series(texts, dtype=pl.String)).to_list() == [clean_text(text or "") for text in texts]


def test_markup_goes():
    raw = ["<b>Thing</b>&nbsp;one", "Tom &amp;amp; Jerry", "a < b <3", "<script>x()</script>Pen<br/>", None]
    assert cleaned(pl.Series(raw)).to_list() == ["Thing one", "Tom & Jerry", "a < b <3", "Pen", ""]


def test_times_are_numbers_or_dates():
    texts = [
        "5",
        "-1.5",
        " 7 ",
        "2024-05-01",
        "2024-05-01T10:00:00Z",
        "2024-05-01 12:00:00.5+02:00",
        "x",
        "",
        None,
        "nan",
        "inf",
    ]
    day = moment(2024, 5, 1)
    assert moments(pl.Series(texts)).to_list() == [5, -1.5, 7, day, day + 36_000, day + 36_000.5, *[None] * 5]


# ---- what is wrong ----


def test_bad_rows_are_named_and_left_out_only_if_asked(tmp_path):
    rows = [*THREE, ("", "a", 4), ("u", " ", 5), ("u", "d", "soon"), ("a\tb", "c", 1)]
    items = dict.fromkeys("abcd", "T")
    with pytest.raises(UserError) as error:
        run(tmp_path, rows, items=items)
    for part in (
        "raw: line 4 has no user",
        "line 5 has no item",
        "line 6 has no time that",
        "line 7 has a control character in",
    ):
        assert part in str(error.value)
    assert "4 bad lines; --skip_bad leaves them out" in str(error.value)
    assert not (tmp_path / "out").exists()  # nothing half-written, no empty folder
    assert by_name(run(tmp_path, rows, "--skip_bad", items=items)) == {"u": ["a", "b", "c"]}


def test_a_failed_run_leaves_what_was_there(tmp_path):
    run(tmp_path, THREE)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out/D").iterdir()}
    with pytest.raises(UserError, match="0 of users with 9 and items with 9 or more"):
        run(tmp_path, THREE, "--k_core", "9")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out/D").iterdir()}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["D"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--user_k", "0"], "--user_k: '0' is not a whole number from 1"),
        (["--st_year", "2018", "--ed_year", "2018"], "the time window is empty"),
        (["--st_year", "2018", "--st_month", "13"], "--st_month: '13' is not a whole number from 1 to 12"),
        (["--ed_year", "0"], "--ed_year: '0' is not"),
        (["--min_rating", "nan"], "--min_rating: 'nan' is not"),
    ],
)
def test_wrong_flags(flags, message):
    with pytest.raises(UserError, match=message):
        rules_of(options(*flags))


def test_original_names_of_flags_are_aliases():
    found = options("--output_path", "x", "--gpu_id", "0", "--dataset", "Games")
    assert (found.data_path, found.user_k, found.item_k) == ("x", 5, 5)


def test_one_run_at_a_time_and_leftovers_are_taken_over(tmp_path):
    left = tmp_path / ".D.staging/interactions"
    left.mkdir(parents=True)
    with staging(tmp_path / "D") as place:
        assert not left.exists()
        with pytest.raises(UserError, match="another run prepares this dataset now"), staging(tmp_path / "D"):
            pass
        assert place.exists()
    assert list(tmp_path.iterdir()) == []


def test_old_files_of_other_data_are_named(tmp_path, capsys):
    run(tmp_path, THREE)
    (tmp_path / "out/D/D.index.json").write_text("{}")
    run(tmp_path, THREE)
    assert "note: made from other data, make them anew: D.index.json" in capsys.readouterr().out


def test_reviews_are_kept_by_user_and_item(tmp_path, monkeypatch):
    from data_process import dataset_files

    monkeypatch.setattr(dataset_files, "REVIEWS_AT_ONCE", 2)
    rows = [("v", "c", 3, "v c"), *[(u, i, t, f'{u} {i} "<b>{t}</b>" \\ é') for u in "uv" for t, i in enumerate("abc")]]
    columns = dict.fromkeys(["user", "item", "time", "review"], pl.String)
    frame = pl.DataFrame([tuple(map(str, row)) for row in rows], schema=columns, orient="row").with_row_index("line")
    texts = pl.DataFrame({"item": list("abc"), "title": list("ABC")}).with_row_index("line")
    source = tmp_path / "raw"
    source.write_text("")
    prepare_dataset(
        interactions=[(source, frame)],
        items=[(source, texts)],
        inputs=[source],
        step="test",
        options=options("--data_path", str(tmp_path), "--dataset", "D", "--k_core", "1"),
    )
    found = json.loads((tmp_path / "D/D.review.json").read_text())
    for user, name in enumerate("uv"):
        assert found[str(user)] == [
            {"item": i, "text": f'{name} {n} " {i} " \\ é', "rating": None, "time": i} for i, n in enumerate("abc")
        ]


def test_provenance_follows_the_inputs(tmp_path):
    run(tmp_path, THREE)
    path = record_path(tmp_path / "out", "D")
    notes = read_provenance(path)
    assert set(notes) == {"D.inter.json", "D.item.json", "D.user2id", "D.item2id"}
    assert notes["D.inter.json"]["step"] == "test" and "polars" in notes["D.inter.json"]["versions"]
    assert verify(path.parent, read_provenance(path)) == []
    (tmp_path / "raw").write_text("other")
    faults = verify(path.parent, read_provenance(path))
    assert len(faults) == 4 and all("made from another" in fault for fault in faults)
