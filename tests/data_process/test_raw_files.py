"""Raw files by blocks: the fast readers agree with Python's own, bad lines are found by number, whatever the block size."""

import csv
import gzip
import io
import json

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_process import raw_files
from data_process.raw_files import TEXT, TEXTS, BadLines, Layout
from utils import UserError

TEXT_VALUES = st.text(st.characters(codec="utf-8"), max_size=8)
RECORDS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "a": st.none() | TEXT_VALUES | st.integers(-(2**60), 2**60) | st.booleans(),
            "b": st.none() | st.lists(TEXT_VALUES, max_size=3),
            "other": st.recursive(st.none() | st.integers(), lambda kids: st.lists(kids, max_size=2), max_leaves=4),
        },
    ),
    min_size=1,
    max_size=8,
)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read_json_lines(path, bad=None):
    frames = list(raw_files.json_lines(path, {"a": TEXT, "b": TEXTS}, bad or BadLines()))
    return pl.concat(frames).rows() if frames else []


@settings(max_examples=150, deadline=None)
@given(RECORDS, st.sampled_from([40, 1 << 20]))
def test_json_lines_hold_what_was_written(tmp_path_factory, records, block):
    path = tmp_path_factory.mktemp("j") / "x.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_files, "BLOCK", block)
        rows = read_json_lines(path)

    def text(value):
        return value if value is None or isinstance(value, str) else json.dumps(value)

    assert rows == [(text(r.get("a")), r.get("b"), n) for n, r in enumerate(records, 1)]


@settings(max_examples=150, deadline=None)
@given(RECORDS)
def test_both_ways_to_read_json_agree(tmp_path_factory, records):
    block = "".join(json.dumps(record) + "\n" for record in records).encode()
    path = write(tmp_path_factory.mktemp("j") / "x.jsonl", block)
    slow = raw_files._json_one_by_one(path, 1, block, {"a": TEXT, "b": TEXTS}, BadLines())
    assert read_json_lines(path) == slow.rows()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": "x"', "is not JSON"),
        (b"[1]", "is not an object"),
        (b'"x"', "is not an object"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        (b'{"a": NaN}', "is not JSON"),
        (b'{"a": 1} {"a": 2}', "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"\x00\x01", "is not JSON"),
    ],
)
@pytest.mark.parametrize("block", [8, 1 << 20])
def test_a_bad_json_line_is_found_by_its_number(tmp_path, monkeypatch, line, reason, block):
    monkeypatch.setattr(raw_files, "BLOCK", block)
    path = write(tmp_path / "x.jsonl", b'{"a": "one"}\n\n{"a": 2}\n' + line + b'\n{"b": "alone"}')
    bad = BadLines()
    assert read_json_lines(path, bad) == [("one", None, 1), ("2", None, 3), (None, ["alone"], 5)]
    assert bad.count == 1 and bad.examples[0].startswith(f"{path}: line 4 {reason}")


def test_bad_lines_end_the_run_or_are_said(capsys, tmp_path):
    bad = BadLines()
    bad.settle(skip_bad=False)
    bad.add_all(tmp_path / "f", pl.Series(range(3, 12)), "has no user")
    assert bad.count == 9
    with pytest.raises(UserError, match=r"f: line 3 has no user; .*line 7 has no user; … \(9 bad lines; --skip_bad"):
        bad.settle(skip_bad=False)
    bad.settle(skip_bad=True)
    assert capsys.readouterr().out.startswith("note: 9 bad lines left out: ")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(*[st.text(st.sampled_from('ab",\n\r é'), max_size=6)] * 2), min_size=1, max_size=8),
    st.sampled_from([16, 1 << 20]),
)
def test_csv_holds_what_was_written(tmp_path_factory, rows, block):
    """Quotes, separators and line breaks within fields, cut into small blocks or not."""
    text = io.StringIO()
    csv.writer(text).writerows([("x", "y"), *rows])
    path = write(tmp_path_factory.mktemp("c") / "x.csv", text.getvalue())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_files, "BLOCK", block)
        frames = list(raw_files.separated(path, ["y", "x"], Layout(), BadLines()))
    found = [row[:2] for frame in frames for row in frame.rows()]
    assert found == [(y or None, x or None) for x, y in rows]


def test_csv_line_numbers_follow_line_breaks_in_quotes(tmp_path):
    path = write(tmp_path / "x.csv", '\ufeff"us er",item\r\n"a\nb",1\r\nc,2,3\r\n\r\nd,4\r\ne\r\n')
    bad = BadLines()
    frame = pl.concat(raw_files.separated(path, ["us er", "item"], Layout(), bad))
    assert frame.rows() == [("a\nb", "1", 2), ("d", "4", 6)]
    assert bad.examples == [f"{path}: line 4 has 3 fields instead of 2", f"{path}: line 7 has 1 fields instead of 2"]


@pytest.mark.parametrize("tail", ["p,q\n", "p,q", 'p,"q"\r\n'])
def test_plain_csv_is_read_by_polars_to_the_same_rows(tmp_path, tail):
    path = write(tmp_path / "x.csv", "u,i\na,1\r\n,\n" + tail)
    rows = pl.concat(raw_files.separated(path, ["u", "i"], Layout(), BadLines())).rows()
    assert rows == [("a", "1", 2), (None, None, 3), ("p", "q", 4)]


def test_fields_are_named_in_errors(tmp_path):
    path = write(tmp_path / "x.csv", "user,item\n")
    with pytest.raises(UserError, match="has no field 'time'; it has user, item"):
        list(raw_files.separated(path, ["time"], Layout(), BadLines()))
    with pytest.raises(UserError, match="names the field 'a' twice"):
        raw_files.header(write(tmp_path / "y.csv", "a,b,a\n"), Layout())
    with pytest.raises(UserError, match="a quote stays open"):
        raw_files.header(write(tmp_path / "y.csv", 'a,"b\nc"\n'), Layout())
    with pytest.raises(UserError, match="no line has the field 'time'"):
        list(raw_files.table(write(tmp_path / "z.jsonl", '{"user": "a"}\n'), ["user", "time"], BadLines()))
    with pytest.raises(UserError, match="the ending must be"):
        list(raw_files.table(write(tmp_path / "z.txt", "a"), ["user"], BadLines()))


def test_a_packed_file_that_is_cut_off_is_an_error(tmp_path):
    whole = gzip.compress(b'{"a": "x"}\n' * 50_000)
    assert len(read_json_lines(write(tmp_path / "x.jsonl.gz", whole))) == 50_000
    for broken in (whole[:-20], whole[:200] + b"\0" * 50 + whole[250:]):
        with pytest.raises(UserError, match=r"x\.jsonl\.gz: cannot be unpacked after line"):
            read_json_lines(write(tmp_path / "x.jsonl.gz", broken))


def test_only_regular_files_and_lines_of_bearable_length(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such file"):
        read_json_lines(tmp_path / "none")
    with pytest.raises(UserError, match="not a regular file"):
        read_json_lines(tmp_path)
    monkeypatch.setattr(raw_files, "BLOCK", 10)
    monkeypatch.setattr(raw_files, "LONGEST_LINE", 30)
    with pytest.raises(UserError, match="line 2 is longer than"):
        read_json_lines(write(tmp_path / "x", '{"a": "x"}\n{"a": "' + "x" * 90 + '"}\n'))
    with pytest.raises(UserError, match="or a quote stays open"):
        list(raw_files.separated(write(tmp_path / "y.csv", 'a\n"x\n' + "y\n" * 90), ["a"], Layout(), BadLines()))


def test_parquet_columns_become_text(tmp_path):
    from datetime import UTC, datetime

    times = [datetime(2024, 1, 1, tzinfo=UTC), None]
    frame = pl.DataFrame({"n": [7, None], "t": times, "words": [["a", "b"], []], "x": ["é", "y"]})
    frame.write_parquet(tmp_path / "x.parquet")
    found = pl.concat(raw_files.parquet(tmp_path / "x.parquet", ["n", "t", "words", "x"]))
    assert found.rows() == [("7", "1704067200.0", "a b", "é", 1), (None, None, "", "y", 2)]
    with pytest.raises(UserError, match="has no field 'z'; it has n, t, words, x"):
        list(raw_files.parquet(tmp_path / "x.parquet", ["z"]))
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        list(raw_files.parquet(write(tmp_path / "y.parquet", "PAR1 nonsense"), ["z"]))


def test_folders_and_patterns_stand_for_their_files(tmp_path):
    for name in ("b/2.parquet", "b/1.parquet", "b/_SUCCESS", "b/.hidden.csv", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "")
    wanted = [tmp_path / "b/1.parquet", tmp_path / "b/2.parquet"]
    assert raw_files.table_files(str(tmp_path / "b")) == wanted
    assert raw_files.table_files(str(tmp_path / "*/*.parquet")) == wanted
    with pytest.raises(UserError, match="no such file, or no table"):
        raw_files.table_files(str(tmp_path / "c*"))
