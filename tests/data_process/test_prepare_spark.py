"""The Spark job in local mode: the same files as from_table.py, byte for byte."""

import shutil

import numpy as np
import polars as pl
import pytest

from data_process import from_table, prepare_spark
from utils import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def engine():
    pytest.importorskip("pyspark", reason="pyspark is not installed")
    if not shutil.which("java"):
        pytest.skip("no Java here")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A log in three files with repeated items, equal times, items without text, and rows without a user."""
    folder, rng = tmp_path_factory.mktemp("raw"), np.random.default_rng(0)
    (folder / "log").mkdir()
    users, items, times = (
        rng.integers(0, 60, 1500),
        rng.integers(0, 40, 1500),
        rng.integers(0, 30, 1500) * 86_400 + 1_500_000_000,
    )
    for part in range(3):
        rows = slice(part * 500, part * 500 + 500)
        names = [f"u{u}" if u else None for u in users[rows].tolist()]
        frame = pl.DataFrame({"user": names, "sku": [f"{i:02}" if i % 3 else str(i) for i in items[rows].tolist()]})
        frame = frame.with_columns(ts=pl.from_epoch(pl.Series(times[rows])), stars=pl.Series(rng.integers(1, 6, 500)))
        frame.write_parquet(folder / f"log/{part}.parquet")
    names = [f"{i:02}" if i % 3 else str(i) for i in range(40)]
    titles = [f"<b>Thing</b> &amp; {i}" if i % 7 else None for i in range(40)]
    pl.DataFrame({"sku": names, "name": titles, "colour": ["red", None] * 20, "maker": ["M"] * 40}).filter(
        pl.col("name").is_not_null() | pl.col("colour").is_not_null()
    ).write_parquet(folder / "items.parquet")
    return folder


def flags(raw, out):
    return [
        *[
            "--interactions",
            str(raw / "log"),
            "--items",
            str(raw / "items.parquet"),
            "--data_path",
            str(out),
            "--dataset",
            "D",
        ],
        *"--item_column sku --time_column ts --rating_column stars --title_column name --brand_column maker".split(),
        *["--description_column", "", "--text_columns", "colour", "--user_k", "4", "--min_rating", "2"],
        *"--st_year 2017 --st_month 7 --ed_year 2017 --ed_month 8 --skip_bad".split(),
    ]


def test_the_same_files_as_on_one_machine(raw, tmp_path):
    from_table.main(flags(raw, tmp_path / "one"))
    prepare_spark.main([*flags(raw, tmp_path / "many"), "--master", "local[2]"])
    for kind in ("inter.json", "item.json", "user2id", "item2id"):
        assert (tmp_path / f"many/D/D.{kind}").read_bytes() == (tmp_path / f"one/D/D.{kind}").read_bytes()
    with pytest.raises(UserError, match="--overwrite replaces it"):
        prepare_spark.main(flags(raw, tmp_path / "many"))


def test_refusals(raw, tmp_path):
    common = [*flags(raw, tmp_path)[:-1], "--master", "local[2]"]  # without --skip_bad
    with pytest.raises(UserError, match="rows lack one of user, item, time"):
        prepare_spark.main(common)
    with pytest.raises(UserError, match="has no field 'when'"):
        prepare_spark.main([*common, "--time_column", "when"])
    with pytest.raises(UserError, match="no order of lines"):
        prepare_spark.main([*common, "--equal_times", "line"])
    assert list(tmp_path.iterdir()) == []
