"""Users' own tables, small and by hand, in every format."""

import json

import polars as pl
import pytest

from data_process import from_table
from utils import UserError

EVENTS = {"user": ["u", "u", "u", "v"], "item": ["x", "z", "y", "x"], "time": [1, 2, 3, 4]}
ITEMS = {
    "item": ["x", "y", "z"],
    "title": ["X, the first", "Y", "Z"],
    "description": ["The <b>x</b>.", "", 'A "z"\nthing.'],
}


def convert(tmp_path, *flags):
    common = ["--data_path", str(tmp_path / "out"), "--dataset", "Mine", "--k_core", "1", "--overwrite"]
    from_table.main([*common, *map(str, flags)])
    return [json.loads((tmp_path / f"out/Mine/Mine.{kind}.json").read_text()) for kind in ("inter", "item")]


WRITERS = {
    "csv": lambda frame, path: frame.write_csv(path),
    "tsv": lambda frame, path: frame.write_csv(path, separator="\t"),
    "jsonl": lambda frame, path: frame.write_ndjson(path),
    "parquet": lambda frame, path: frame.write_parquet(path),
}


@pytest.mark.parametrize("ending", WRITERS)
def test_default_columns_in_every_format(tmp_path, ending):
    for name, columns in (("events", EVENTS), ("items", ITEMS)):
        WRITERS[ending](pl.DataFrame(columns), tmp_path / f"{name}.{ending}")
    inters, items = convert(
        tmp_path, "--interactions", tmp_path / f"events.{ending}", "--items", tmp_path / f"items.{ending}"
    )
    assert inters == {"0": [0, 2, 1]}
    assert items["0"] == {"title": "X, the first", "description": "The x .", "brand": "", "categories": ""}
    assert [items[i]["description"] for i in "12"] == ["", 'A "z" thing.']


def test_named_columns_and_joined_texts(tmp_path):
    times = ["2024-05-03", "2024-05-01T08:00:00", "2024-05-01 07:59:59"]
    events = pl.DataFrame(
        {"who": ["7"] * 3, "sku": ["a", "b", "c"], "at": times, "stars": [5, 4, 1], "said": ["", "good", "bad"]}
    )
    items = pl.DataFrame(
        {
            "sku": ["a", "b", "c"],
            "name": ["A", "B", "C"],
            "long": ["Long a.", None, ""],
            "colour": [" red ", "blue", None],
            "maker": ["M"] * 3,
            "kinds": ["k, l"] * 3,
        }
    )
    events.write_csv(tmp_path / "e.csv")
    items.write_csv(tmp_path / "i.csv")
    columns = (
        "--user_column who --item_column sku --time_column at --title_column name --description_column long".split()
    )
    more = "--text_columns colour,maker --brand_column maker --category_column kinds --review_column said".split()
    flags = ["--interactions", tmp_path / "e.csv", "--items", tmp_path / "i.csv", *columns, *more]
    inters, entries = convert(tmp_path, *flags)
    assert inters == {"0": [2, 1, 0]}
    assert [entries[i]["description"] for i in "012"] == ["Long a. red M", "blue M", "M"]
    assert entries["0"] | {"title": "A", "brand": "M", "categories": "k, l"} == entries["0"]
    reviews = json.loads((tmp_path / "out/Mine/Mine.review.json").read_text())
    assert reviews["0"][1] == {"item": 1, "text": "good", "rating": None, "time": 1714550400}
    with pytest.raises(UserError, match="1 rated 5 or better"):
        convert(tmp_path, *flags, "--min_rating", "5", "--rating_column", "stars")


def test_parquet_folders_and_patterns(tmp_path):
    for part in range(4):
        folder = tmp_path / f"log/day={part}"
        folder.mkdir(parents=True)
        pl.DataFrame({name: [column[part]] for name, column in EVENTS.items()}).write_parquet(folder / "0.parquet")
    for part in range(3):
        pl.DataFrame({name: [column[part]] for name, column in ITEMS.items()}).write_parquet(
            tmp_path / f"i{part}.parquet"
        )
    inters, items = convert(tmp_path, "--interactions", tmp_path / "log", "--items", tmp_path / "i?.parquet")
    assert inters == {"0": [0, 2, 1]} and len(items) == 3


def test_missing_columns_are_named(tmp_path):
    pl.DataFrame(EVENTS).write_csv(tmp_path / "e.csv")
    pl.DataFrame(ITEMS).write_csv(tmp_path / "i.csv")
    flags = ["--interactions", tmp_path / "e.csv", "--items", tmp_path / "i.csv"]
    with pytest.raises(UserError, match=r"e\.csv: has no field 'when'; it has user, item, time"):
        convert(tmp_path, *flags, "--time_column", "when")
    with pytest.raises(UserError, match=r"i\.csv: has no field 'colour'"):
        convert(tmp_path, *flags, "--text_columns", "colour")
    with pytest.raises(UserError, match="no such file"):
        convert(tmp_path, *flags[:3], tmp_path / "none.csv")
    assert not (tmp_path / "out").exists()


def test_a_bad_row_is_named(tmp_path):
    (tmp_path / "e.csv").write_text("user,item,time\nu,x,1\nu,z,2\nu,y,3\nu,x\nu,y,later\n")
    pl.DataFrame(ITEMS).write_csv(tmp_path / "i.csv")
    flags = ["--interactions", tmp_path / "e.csv", "--items", tmp_path / "i.csv"]
    with pytest.raises(
        UserError, match=r"e\.csv: line 5 has 2 fields instead of 3; .*e\.csv: line 6 has no time .*2 bad lines"
    ):
        convert(tmp_path, *flags)
    assert convert(tmp_path, *flags, "--skip_bad")[0] == {"0": [0, 2, 1]}
