"""A RecBole atomic folder (`<name>.inter`, `<name>.item`) to the dataset files of this repository.

    python data_process/from_recbole.py --source FOLDER --data_path ./data --dataset ml-100k --k_core 5

What is kept, and in which order: data_process/prepare.py. The fields are found by their RecBole names (`user_id`, `item_id`,
`timestamp`, `rating`; the first field that ends in `title` or `name`), or as you name them. The description is a text field
`description` as it is, or else a sentence from the year and category fields.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import polars as pl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser
from data_process.prepare import Frames, add_flags, prepare
from data_process.raw_files import BadLines, Layout, header, separated
from utils import UserError, run_main

ATOMIC = Layout(separator="\t", quoted=False, typed=True)


def title_field(names: list[str], path: Path, wanted: str | None) -> str:
    """The field with the items' titles."""
    found = wanted or next((name for name in names if name.endswith(("title", "name"))), None)
    if not found:
        raise UserError(
            f"{path}: no field ends in title or name; say which with --title_field (it has {', '.join(names)})"
        )
    return found


def split_categories(row: dict[str, str], field: str) -> list[str]:
    """The categories of an item, separated by bars or commas, or else by blanks."""
    text = row.get(field) or ""
    parts = re.split(r"[|,]", text) if re.search(r"[|,]", text) else text.split()
    return [part.strip() for part in parts if part.strip() and part.strip().lower() != "unknown"]


def describe(row: dict[str, str], categories: list[str], kind: str = "") -> str:
    """A description: the item's own, or a sentence from its year and its categories."""
    if (row.get("description") or "").strip():
        return row["description"]
    year = next((row[name] for name in row if "year" in name and (row[name] or "").strip()), "")
    words = " ".join(part for part in (year, ", ".join(categories)) if part)
    return f"{words} {kind}".strip() + "." if words else ""


def item_frames(path: Path, options: argparse.Namespace, bad: BadLines) -> Iterator[tuple[Path, pl.DataFrame]]:
    """item, title, description, brand, categories of the item file."""
    names = header(path, ATOMIC)
    title = title_field(names, path, options.title_field)
    for frame in separated(path, list(dict.fromkeys([*names, "item_id", title])), ATOMIC, bad):
        texts = []
        for row in frame.drop("line").iter_rows(named=True):
            kinds = split_categories(row, options.category_field)
            own = {name: value for name, value in row.items() if name != title}
            texts.append((describe(own, kinds, options.item_kind), row.get("brand"), ", ".join(kinds)))
        schema = dict.fromkeys(("description", "brand", "categories"), pl.String)
        made = pl.DataFrame(texts, schema=schema, orient="row")
        yield path, frame.select(pl.col("item_id").alias("item"), pl.col(title).alias("title"), "line").hstack(made)


def interaction_frames(path: Path, options: argparse.Namespace, bad: BadLines) -> Frames:
    """user, item, time and, if it is asked for, rating of the interaction file."""
    fields = {"user": "user_id", "item": "item_id", "time": options.time_field}
    if options.min_rating is not None:
        fields["rating"] = "rating"
    for frame in separated(path, list(dict.fromkeys(fields.values())), ATOMIC, bad):
        yield path, frame.select("line", **{name: pl.col(field) for name, field in fields.items()})


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--source", required=True, help="the atomic folder")
    parser.add_argument("--name", help="the files' stem, if not the folder's name")
    add_flags(parser, "the dataset's name here; default: the stem")
    parser.add_argument("--time_field", default="timestamp", help="field of .inter that orders the interactions")
    parser.add_argument("--title_field", help="field of .item with the title")
    parser.add_argument("--category_field", default="class", help="field of .item with the categories")
    parser.add_argument(
        "--item_kind", default="", help="a word for what the items are (movie), ends the made description"
    )
    options = parser.parse_args(argv)
    source = Path(options.source).resolve()
    name = options.name or source.name
    options.dataset = options.dataset or name
    inter, item = (source / f"{name}.{kind}" for kind in ("inter", "item"))
    bad = BadLines()
    prepare(
        interactions=interaction_frames(inter, options, bad),
        items=item_frames(item, options, bad),
        inputs=[inter, item],
        step="data_process/from_recbole.py",
        options=options,
        bad=bad,
    )


if __name__ == "__main__":
    run_main(main)
