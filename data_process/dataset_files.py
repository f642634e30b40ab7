"""Write a dataset's files (docs/formats.md) from numbered interactions and staged texts, a slice of memory at a time."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import polars as pl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_process.cleaning import cleaned
from utils import atomic_path, say

DATASET_KINDS = ("inter.json", "item.json", "user2id", "item2id", "review.json")
USERS_AT_ONCE, ITEMS_AT_ONCE, REVIEWS_AT_ONCE = 200_000, 100_000, 200_000


@dataclass(frozen=True)
class Chosen:
    """What is left of the raw data.

    `table`: user, item (uint32, counted from 0) and order (the row in the staged interactions), by user, a user's items oldest
    first; `users`, `items`: the raw names, row = number.
    """

    table: pl.DataFrame
    users: pl.Series
    items: pl.Series


def write_dataset(
    folder: Path, dataset: str, chosen: Chosen, interactions: pl.LazyFrame, items: pl.LazyFrame, place: Path
) -> list[Path]:
    """Write `<D>.item.json`, `<D>.user2id`, `<D>.item2id`, `<D>.review.json` (if there are reviews) and `<D>.inter.json`.

    Each is complete before any takes its name; `<D>.inter.json` comes last. Returns their paths.

    Args:
        interactions: the staged interactions; columns review and summary are looked for.
        items: the staged items with clean texts.
        place: a folder for temporary files.
    """
    ours = {f"{dataset}.{kind}" for kind in (*DATASET_KINDS, "provenance.json", "parquet")}
    old = [path.name for path in sorted(folder.glob(f"{dataset}.*")) if path.name not in ours]
    with_reviews = "review" in interactions.collect_schema()
    targets = {kind: folder / f"{dataset}.{kind}" for kind in DATASET_KINDS if kind != "review.json" or with_reviews}
    with contextlib.ExitStack() as stack:
        paths = {kind: stack.enter_context(atomic_path(path)) for kind, path in targets.items()}
        for kind, names in (("user2id", chosen.users), ("item2id", chosen.items)):
            pairs = pl.DataFrame({"name": names, "id": pl.arange(len(names), eager=True)})
            pairs.write_csv(paths[kind], separator="\t", include_header=False, quote_style="never")
        with open(paths["item.json"], "w", encoding="utf-8") as file:
            _write_object(file, item_entries(chosen.items, items), indent=1)
        if with_reviews:
            with open(paths["review.json"], "w", encoding="utf-8") as file:
                _write_object(file, review_entries(chosen, interactions, place / "reviews"), indent=1)
        with open(paths["inter.json"], "w", encoding="utf-8") as file:
            _write_object(file, histories(chosen), indent=None)
    if not with_reviews:
        (folder / f"{dataset}.review.json").unlink(missing_ok=True)  # of other data
    users, rows = len(chosen.users), chosen.table.height
    say(f"{folder}: {users:,} users, {len(chosen.items):,} items, {rows:,} interactions ({rows / users:.1f} a user)")
    if old:
        say(f"note: made from other data, make them anew: {', '.join(old)}")
    return list(targets.values())


def _write_object(file: TextIO, entries: Iterator[tuple[str, str]], indent: int | None) -> None:
    """A JSON object out of keys and values that are JSON already, an entry a line if `indent` says so."""
    gap = ", " if indent is None else ",\n" + " " * indent
    file.write("{" if indent is None else "{\n" + " " * indent)
    for number, (key, value) in enumerate(entries):
        file.write(f"{gap if number else ''}{json.dumps(key)}: {value}")
    file.write("}\n" if indent is None else "\n}\n")


def histories(chosen: Chosen) -> Iterator[tuple[str, str]]:
    """Each user's number and items, oldest first, as a JSON list."""
    for start in range(0, len(chosen.users), USERS_AT_ONCE):
        part = chosen.table.filter(pl.col("user").is_between(start, start + USERS_AT_ONCE - 1))
        rows = part.group_by("user", maintain_order=True).agg(pl.col("item").cast(pl.String))
        for user, items in rows.select("user", pl.col("item").list.join(", ")).iter_rows():
            yield str(user), f"[{items}]"


def item_entries(names: pl.Series, items: pl.LazyFrame) -> Iterator[tuple[str, str]]:
    """Each item's number and texts as a JSON object. Of an item that is described twice the first entry counts."""
    for start in range(0, len(names), ITEMS_AT_ONCE):
        part = names.slice(start, ITEMS_AT_ONCE).rename("item").to_frame().with_row_index("number", offset=start)
        rows = (
            items.with_row_index("row").join(part.lazy(), on="item").collect(engine="streaming").sort("number", "row")
        )
        rows = rows.unique("number", keep="first", maintain_order=True)
        for number, *texts in rows.select("number", "title", "description", "brand", "categories").iter_rows():
            entry = dict(zip(("title", "description", "brand", "categories"), texts, strict=True))
            yield str(number), json.dumps(entry, ensure_ascii=False, indent=1).replace("\n", "\n ")


def review_entries(chosen: Chosen, interactions: pl.LazyFrame, place: Path) -> Iterator[tuple[str, str]]:
    """Each user's number and `[{"item", "text", "rating", "time"}, …]` in the order of the history, with the summary if known.

    The staged rows come in the raw files' order. One pass sorts them into folders, a range of users each; then each folder
    is read and put in order by itself.
    """
    numbers = chosen.table.with_row_index("position")
    size = max(1, REVIEWS_AT_ONCE * len(chosen.users) // max(1, chosen.table.height))  # users in a folder
    columns = [name for name in ("review", "summary", "rating", "time") if name in interactions.collect_schema()]
    rows = interactions.select("order", *columns).join(numbers.lazy(), on="order")
    for count, frame in enumerate(rows.collect_batches()):
        for (bucket,), part in frame.group_by(pl.col("user") // size):
            (place / str(bucket)).mkdir(parents=True, exist_ok=True)
            part.write_parquet(place / str(bucket) / f"{count:06}.parquet")
    for bucket in sorted(place.iterdir(), key=lambda folder: int(folder.name)):
        frame = pl.read_parquet(bucket / "*.parquet").sort("position")
        fields = {
            "item": pl.col("item"),
            "text": cleaned(frame["review"]),
            "rating": pl.col("rating") if "rating" in columns else pl.lit(None, pl.Float64),
            "time": pl.col("time").cast(pl.Int64),
        }
        if "summary" in columns:
            fields["summary"] = cleaned(frame["summary"])
        rows = frame.select("user", entry=pl.struct(**fields).struct.json_encode())
        for user, entries in rows.group_by("user", maintain_order=True).agg(pl.col("entry").str.join(", ")).iter_rows():
            yield str(user), f"[{entries}]"
