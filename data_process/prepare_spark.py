"""The preparation of prepare.py as a Spark job, for logs that do not fit one machine: Parquet in, Parquet and the files out.

    python data_process/prepare_spark.py --interactions log/ --items catalogue/ --data_path ./data --dataset Mine
    spark-submit --master yarn data_process/prepare_spark.py --interactions hdfs:///log --items hdfs:///catalogue \\
        --parquet hdfs:///mine --data_path ./data --dataset Mine

The same rules, flags and results as from_table.py, with one difference: a Parquet log has no order of lines, so equal times
always go by item. `--parquet` (a place that all workers see) gets `interactions` (user, item, place), `users` and `items`
(number, name, texts); the dataset's files are then written by this process. Needs `pip install pyspark==4.3.0` and Java 17.
From which size on it is worth it: docs/scale.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import polars as pl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser
from data_process.dataset_files import DATASET_KINDS, Chosen, write_dataset
from data_process.from_table import add_event_flags, add_item_flags, event_columns, item_columns, text_columns
from data_process.item_texts import clean_text
from data_process.prepare import ITEM_TEXTS, SHORTEST, Rules, add_preparation_flags, check_name, rules_of, staging
from data_process.raw_files import table_files
from provenance import note_made, record_path
from utils import UserError, run_main, say


def session(master: str | None) -> Any:
    """A Spark session. Raises UserError if pyspark or Java is missing."""
    try:
        from pyspark.errors import PySparkException
        from pyspark.sql import SparkSession
    except ImportError:
        raise UserError("pyspark is not installed; pip install pyspark==4.3.0 (and Java 17)") from None
    builder = SparkSession.builder.appName("lc-rec preparation").config("spark.sql.session.timeZone", "UTC")
    if master:
        builder = builder.master(master)
    try:
        return builder.getOrCreate()
    except (PySparkException, OSError) as error:
        raise UserError(f"Spark does not start ({str(error).splitlines()[0]}); is Java 17 there (JAVA_HOME)?") from None


def read(spark: Any, paths: list[str], columns: dict[str, str], texts: list[str]) -> Any:
    """Our columns of Parquet files; `texts` are joined to the description. Raises UserError for what is not there."""
    from pyspark.errors import AnalysisException
    from pyspark.sql import functions as F

    try:
        frame = spark.read.parquet(*paths)
    except AnalysisException as error:
        raise UserError(f"{paths[0]}: cannot be read as Parquet ({str(error).splitlines()[0]})") from None
    if missing := [name for name in [*columns.values(), *texts] if name not in frame.columns]:
        raise UserError(f"{paths[0]}: has no field {missing[0]!r}; it has {', '.join(frame.columns)}")
    ours = [F.col(f"`{column}`").alias(name) for name, column in columns.items()]
    if texts:
        parts = [F.trim(F.col(f"`{name}`").cast("string")) for name in texts]
        ours.append(F.concat_ws(" ", *[F.when(part != "", part) for part in parts]).alias("description"))
    return frame.select(*ours)


def complete_rows(frame: Any, names: tuple[str, ...], where: str, skip_bad: bool) -> Any:
    """Without rows that lack one of `names` or have a control character in an id.

    Raises:
        UserError: there are such rows, and they are not to be skipped.
    """
    from functools import reduce
    from operator import and_

    from pyspark.sql import functions as F

    frame = frame.select(
        *[F.trim(F.col(n).cast("string")).alias(n) if n in ("user", "item") else F.col(n) for n in frame.columns]
    )
    good = reduce(and_, [F.coalesce(F.col(n).cast("string"), F.lit("")) != "" for n in names])
    for name in {"user", "item"} & set(names):
        good &= ~F.col(name).rlike("[\\x00-\\x1f]")
    if bad := frame.filter(~good).count():
        if not skip_bad:
            what = f"rows lack one of {', '.join(names)}, or an id has a control character"
            raise UserError(f"{where}: {bad:,} {what} (--skip_bad leaves them out)")
        say(f"note: {bad:,} rows of {where} left out")
    return frame.filter(good)


def moment(events: Any) -> Any:
    """The time as a number; timestamps and ISO dates as seconds since 1970; null for what is neither."""
    from pyspark.sql import functions as F

    column, kind = F.col("time"), dict(events.dtypes)["time"]
    if kind in ("date", "timestamp", "timestamp_ntz"):
        number = column.cast("timestamp").cast("double")
    else:
        number = column.try_cast("double")
        if kind == "string":
            number = F.coalesce(number, column.try_cast("timestamp").cast("double"))
    return F.when(F.abs(number) < float("inf"), number)  # NaN sorts above infinity


def with_texts(items: Any) -> Any:
    """The items that have a text, each once, texts cleaned. Of an item that is there twice the entry that sorts first counts."""
    from pyspark.sql import functions as F
    from pyspark.sql.window import Window

    clean = F.udf(lambda text: clean_text(text or ""), "string")
    columns = [clean(F.col(n).cast("string")) if n in items.columns else F.lit("") for n in ITEM_TEXTS]
    items = items.select("item", *[column.alias(name) for column, name in zip(columns, ITEM_TEXTS, strict=True)])
    items = items.filter((F.col("title") != "") | (F.col("description") != ""))
    first = F.row_number().over(Window.partitionBy("item").orderBy(*ITEM_TEXTS))
    return items.withColumn("row", first).filter("row = 1").drop("row")


def chosen_events(events: Any, items: Any, rules: Rules) -> Any:
    """user, item, time after the filters, the first interactions and the k-core."""
    from pyspark.sql import functions as F

    seconds = F.col("time") / F.when(F.abs("time") > 1e14, 1e6).when(F.abs("time") > 1e11, 1e3).otherwise(1.0)
    if rules.start is not None:
        events = events.filter(seconds >= rules.start)
    if rules.end is not None:
        events = events.filter(seconds < rules.end)
    if rules.min_rating is not None:
        events = events.filter(F.col("rating") >= rules.min_rating)
    events = (
        events.join(items.select("item"), "item", "left_semi").groupBy("user", "item").agg(F.min("time").alias("time"))
    )
    left = None
    while left != (left := (events := events.localCheckpoint()).count()):
        for name, least in (("user", max(rules.user_k, SHORTEST)), ("item", rules.item_k)):
            kept = events.groupBy(name).count().filter(F.col("count") >= least).select(name)
            events = events.join(kept, name, "left_semi")
    return events


def numbered(spark: Any, frame: Any, name: str) -> Any:
    """The distinct names with their numbers, shorter names first."""
    from pyspark.sql import functions as F

    names = frame.select(name).distinct().orderBy(F.octet_length(name), name)
    rows = names.rdd.zipWithIndex().map(lambda pair: (pair[0][0], pair[1]))
    return spark.createDataFrame(rows, f"{name} string, {name}_number long")


def run(spark: Any, options: argparse.Namespace, rules: Rules, parquet: str) -> None:
    """Read, choose, number; write `interactions`, `users` and `items` below `parquet`."""
    from pyspark.sql import functions as F
    from pyspark.sql.window import Window

    events = read(spark, options.interactions, event_columns(options), [])
    rating = [F.col("rating").try_cast("double").alias("rating")] if rules.min_rating is not None else []
    events = events.select("user", "item", moment(events).alias("time"), *rating)
    events = complete_rows(events, tuple(events.columns), options.interactions[0], options.skip_bad)
    items = read(spark, options.items, item_columns(options), text_columns(options))
    items = with_texts(complete_rows(items, ("item",), options.items[0], options.skip_bad)).localCheckpoint()
    events = chosen_events(events, items, rules)
    if not events.count():
        raise UserError(f"{options.interactions[0]}: nothing is left. Lower --user_k and --item_k, or give more data")
    users, goods = (numbered(spark, events, name).localCheckpoint() for name in ("user", "item"))
    place = F.row_number().over(Window.partitionBy("user_number").orderBy("time", "item_number")) - 1
    table = events.join(users, "user").join(goods, "item")
    table = table.select(F.col("user_number").alias("user"), F.col("item_number").alias("item"), place.alias("place"))
    mode = "overwrite" if options.overwrite else "error"
    table.write.mode(mode).parquet(f"{parquet}/interactions")
    users.withColumnRenamed("user_number", "number").write.mode(mode).parquet(f"{parquet}/users")
    goods.withColumnRenamed("item_number", "number").join(items, "item").write.mode(mode).parquet(f"{parquet}/items")


def write_files(folder: Path, dataset: str, parquet: str, place: Path) -> list[Path]:
    """The dataset's files from what Spark wrote."""
    table = pl.read_parquet(f"{parquet}/interactions/*.parquet").sort("user", "place")
    table = table.select(pl.col("user", "item").cast(pl.UInt32)).with_row_index("order")
    users = pl.read_parquet(f"{parquet}/users/*.parquet").sort("number")["user"]
    items = pl.scan_parquet(f"{parquet}/items/*.parquet").drop("number")
    names = pl.read_parquet(f"{parquet}/items/*.parquet", columns=["item", "number"]).sort("number")["item"]
    return write_dataset(folder, dataset, Chosen(table, users, names), pl.LazyFrame({"order": []}), items, place)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add_event_flags(parser)
    add_item_flags(parser)
    add_preparation_flags(parser)
    parser.add_argument("--parquet", help="where the Parquet goes; default: <data_path>/<D>/<D>.parquet")
    parser.add_argument("--master", help="Spark's master, such as local[4]; default: spark-submit's or Spark's own")
    options = parser.parse_args(argv)
    dataset, rules = check_name(options.dataset), rules_of(options)
    if rules.by_line:
        raise UserError("--equal_times line: a Parquet log has no order of lines; leave the flag out")
    folder = Path(options.data_path) / dataset
    there = [path for kind in DATASET_KINDS if (path := folder / f"{dataset}.{kind}").exists()]
    if there and not options.overwrite:
        raise UserError(f"{there[0]} is there already; --overwrite replaces it")
    record = record_path(options.data_path, dataset)
    parquet = options.parquet or str(folder.resolve() / f"{dataset}.parquet")
    spark = session(options.master)
    try:
        run(spark, options, rules, parquet)
    finally:
        spark.stop()
    with staging(folder) as place:
        written = write_files(folder, dataset, parquet, place)
    sources = [*options.interactions, *options.items]
    local = [file for source in sources if Path(source).exists() for file in table_files(source)]
    note_made(record, "data_process/prepare_spark.py", written, local, ("pyspark", "polars"))


if __name__ == "__main__":
    run_main(main)
