"""Your own tables of interactions and items (CSV, TSV, JSON lines or Parquet) to the dataset files of this repository.

    python data_process/from_table.py --interactions clicks.csv --items products.csv --data_path ./data --dataset Mine
    python data_process/from_table.py --interactions logs/ --items 'catalogue/*.parquet' --data_path ./data --dataset Mine \\
        --user_column customer --item_column sku --time_column ts --title_column name --text_columns brand,colour

The format is told by the file's ending (.gz may follow); a folder or a pattern stands for all its files. Times are numbers or
ISO dates. What is kept, and in which order: data_process/prepare.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import polars as pl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser
from data_process.prepare import Frames, add_flags, prepare
from data_process.raw_files import BadLines, table, table_files
from utils import run_main


def frames(paths: list[Path], columns: dict[str, str], texts: list[str], bad: BadLines) -> Frames:
    """The tables' columns under our names; `texts` are joined to the description, a sentence each."""
    for path in paths:
        for frame in table(path, list(dict.fromkeys([*columns.values(), *texts])), bad):
            ours = {name: pl.col(column) for name, column in columns.items()}
            if texts:
                parts = [pl.col(column).str.strip_chars() for column in texts]
                parts = [pl.when(part != "").then(part) for part in parts]  # an empty text adds no blank
                ours["description"] = pl.concat_str(parts, separator=" ", ignore_nulls=True)
            yield path, frame.select("line", **ours)


def add_event_flags(parser: argparse.ArgumentParser) -> None:
    """The files of interactions and the names of their columns."""
    add = parser.add_argument
    add("--interactions", required=True, nargs="+", metavar="FILE", help="files, folders or patterns")
    add("--user_column", default="user", help="column of the user's id")
    add("--time_column", default="time", help="column of the time")
    add("--rating_column", default="rating", help="column of the rating, for --min_rating")
    add("--review_column", default="", help="column of the user's review text, if there is one")


def add_item_flags(parser: argparse.ArgumentParser) -> None:
    """The files of items and the names of their columns."""
    add = parser.add_argument
    add("--items", required=True, nargs="+", metavar="FILE", help="files, folders or patterns")
    add("--item_column", default="item", help="column of the item's id (in the interactions too)")
    add("--title_column", default="title", help="column of the item's title")
    add("--description_column", default="description", help="column of the item's description; '' for none")
    add("--text_columns", default="", help="columns, separated by commas, whose texts are joined to the description")
    add("--brand_column", default="", help="column of the brand, if there is one")
    add("--category_column", default="", help="column of the categories, separated by commas, if there is one")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add_event_flags(parser)
    add_item_flags(parser)
    add_flags(parser)
    options = parser.parse_args(argv)
    bad = BadLines()
    event_files, item_files = (
        [f for p in paths for f in table_files(p)] for paths in (options.interactions, options.items)
    )
    prepare(
        interactions=frames(event_files, event_columns(options), [], bad),
        items=frames(item_files, item_columns(options), text_columns(options), bad),
        inputs=[*event_files, *item_files],
        step="data_process/from_table.py",
        options=options,
        bad=bad,
    )


def event_columns(options: argparse.Namespace) -> dict[str, str]:
    """Our name → the table's, for the interactions."""
    columns = {"user": options.user_column, "item": options.item_column, "time": options.time_column}
    if options.min_rating is not None:
        columns["rating"] = options.rating_column
    return columns | ({"review": options.review_column} if options.review_column else {})


def item_columns(options: argparse.Namespace) -> dict[str, str]:
    """Our name → the table's, for the items; the description is made of `text_columns`."""
    more = {"brand": options.brand_column, "categories": options.category_column}
    columns = {"item": options.item_column, "title": options.title_column}
    return columns | {name: column for name, column in more.items() if column}


def text_columns(options: argparse.Namespace) -> list[str]:
    """The columns that the description is made of."""
    names = [options.description_column, *options.text_columns.split(",")]
    return list(dict.fromkeys(name.strip() for name in names if name.strip()))


if __name__ == "__main__":
    run_main(main)
