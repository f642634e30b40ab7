"""From raw interactions and items to a dataset: the rules that from_amazon.py, from_recbole.py and from_table.py share.

A reader hands over frames of text (raw_files.py); what happens then is the same for all of them:

1. bad lines (no user, no item, no time) are counted and end the run, or are left out (`--skip_bad`); texts lose their markup
2. interactions outside the time window, below `--min_rating` or with an item without text go
3. of a user's interactions with one item the first stays
4. users and items with fewer than `--user_k` and `--item_k` interactions go, again and again (k-core)
5. users and items are numbered by their names, the shorter first, so numbers tell nothing of what comes next; a user's items
   stand in order of time, equal times by item (or, with `--equal_times line`, as in the file)

Frames are staged as Parquet beside the dataset, so memory holds numbers, names and a block of texts, never all texts.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_process.cleaning import cleaned
from data_process.dataset_files import DATASET_KINDS, Chosen, write_dataset
from data_process.raw_files import BadLines
from flag_values import real, whole
from provenance import note_made, record_path, refuse_input
from utils import UserError, is_disk_full, say

SHORTEST = 3  # leave-one-out: one item to learn from, one to validate, one to test
ITEM_TEXTS = ("title", "description", "brand", "categories")
DATES = ("%F", "%F %T%.f", "%F %T%.f%z")

Frames = Iterable[tuple[Path, pl.DataFrame]]


@dataclass(frozen=True)
class Rules:
    """What is kept. `start` and `end` are seconds since 1970, UTC; `end` itself is outside."""

    user_k: int = 5
    item_k: int = 5
    start: float | None = None
    end: float | None = None
    min_rating: float | None = None
    by_line: bool = False


# ---- flags ----


def add_preparation_flags(parser: argparse.ArgumentParser, dataset_help: str = "the dataset's name") -> None:
    """The flags that all readers have; the original's names are aliases."""
    add = parser.add_argument
    add("--data_path", "--output_path", default="./data", help="folder that will hold <dataset>/")
    add("--dataset", help=dataset_help)
    add("--user_k", type=whole(1), default=5, help="fewest interactions of a user; at least 3 are needed")
    add("--item_k", type=whole(1), default=5, help="fewest interactions of an item")
    add("--k_core", type=whole(1), help="sets --user_k and --item_k")
    add("--min_rating", type=real(-1e9, below=1e9), help="leave out lower ratings")
    add("--st_year", type=whole(1, 9999), help="leave out what is older than the start of this year")
    add("--st_month", type=whole(1, 12), default=1, help="… of this month of --st_year (UTC)")
    add("--ed_year", type=whole(1, 9999), help="leave out what is from this year on")
    add("--ed_month", type=whole(1, 12), default=1, help="… from this month of --ed_year on (UTC)")
    equal = "order of interactions of one time: by item, or as the file's lines"
    add("--equal_times", choices=("item", "line"), default="item", help=equal)
    add("--skip_bad", action="store_true", help="leave out bad lines instead of ending with an error")
    add("--overwrite", action="store_true", help="replace files that are there")
    add("--gpu_id", help=argparse.SUPPRESS)  # in old notes; nothing here runs on a GPU


def rules_of(options: argparse.Namespace) -> Rules:
    """The flags' values, checked. Raises UserError."""
    if options.k_core is not None:
        options.user_k = options.item_k = options.k_core
    start, end = (_month(options, edge) for edge in ("st", "ed"))
    if start is not None and end is not None and start >= end:
        raise UserError("the time window is empty: --st_year and --st_month must come before --ed_year and --ed_month")
    return Rules(options.user_k, options.item_k, start, end, options.min_rating, options.equal_times == "line")


def _month(options: argparse.Namespace, edge: str) -> float | None:
    year, month = getattr(options, f"{edge}_year"), getattr(options, f"{edge}_month")
    return None if year is None else datetime.datetime(year, month, 1, tzinfo=datetime.UTC).timestamp()


def check_name(dataset: str | None) -> str:
    """The dataset's name, if it can name a folder of its own. Raises UserError for a path, a hidden or an empty name."""
    name = dataset or ""
    if (
        not name
        or name.startswith((".", "-"))
        or not name.isprintable()
        or set(name) & set('/\\:*?"<>|')
        or len(name) > 100
    ):
        raise UserError(f"--dataset {name!r}: must be a plain name such as Games, not a path")
    return name


# ---- checking and cleaning ----


def moments(texts: pl.Series) -> pl.Series:
    """Times as numbers: digits as they are, ISO dates as seconds since 1970 (UTC where no zone is named); else null."""
    texts = texts.str.strip_chars()
    numbers = texts.cast(pl.Float64, strict=False)
    unread = numbers.is_null() & texts.is_not_null()
    if unread.any():
        iso = texts.str.replace("T", " ", literal=True).str.replace("Z$", "+00:00")
        dates = [iso.str.to_datetime(form, strict=False, time_unit="us").dt.timestamp("us") / 1e6 for form in DATES]
        numbers = pl.select(pl.coalesce(numbers, *dates)).to_series()
    return numbers.set(~numbers.is_finite().fill_null(False), None)


def checked_interactions(frames: Frames, bad: BadLines, rated: bool) -> Iterator[pl.DataFrame]:
    """user, item, time (float64), order (the running number of the row) and whatever else the frames have."""
    rows = 0
    for path, frame in frames:
        frame = frame.with_columns(pl.col("user", "item").str.strip_chars(), time=moments(frame["time"]))
        faults = _id_faults("user", "item")
        faults = faults.when(pl.col("time").is_null()).then(pl.lit("has no time that is a number or a date"))
        if "rating" in frame.columns:
            rating = pl.col("rating").str.strip_chars().cast(pl.Float64, strict=False)
            frame = frame.with_columns(rating=pl.when(rating.is_finite()).then(rating))
        if rated:
            faults = faults.when(pl.col("rating").is_null()).then(pl.lit("has no rating that is a number"))
        frame = _without_faults(path, frame, faults, bad)
        yield frame.drop("line").with_columns(order=pl.int_range(rows, rows + frame.height, dtype=pl.UInt32))
        rows += frame.height


def checked_items(frames: Frames, bad: BadLines) -> Iterator[pl.DataFrame]:
    """item, title, description, brand, categories: clean texts, empty where there is none."""
    for path, frame in frames:
        frame = frame.with_columns(pl.col("item").str.strip_chars())
        frame = _without_faults(path, frame, _id_faults("item"), bad)
        absent = [pl.lit(None, pl.String).alias(name) for name in ITEM_TEXTS if name not in frame.columns]
        frame = frame.with_columns(absent)
        yield frame.select("item", *[cleaned(frame[name]).alias(name) for name in ITEM_TEXTS])


def _id_faults(*names: str) -> pl.Expr:
    faults = pl.when(False).then(None)
    for name in names:
        faults = faults.when(pl.col(name).fill_null("") == "").then(pl.lit(f"has no {name}"))
        strange = pl.col(name).str.contains(r"[\x00-\x1f]")
        faults = faults.when(strange).then(pl.lit(f"has a control character in its {name}"))
    return faults


def _without_faults(path: Path, frame: pl.DataFrame, faults: pl.Expr, bad: BadLines) -> pl.DataFrame:
    marked = frame.with_columns(fault=faults.otherwise(None))
    faulty = marked.filter(pl.col("fault").is_not_null())
    for (reason,), rows in faulty.group_by("fault", maintain_order=True):
        bad.add_all(path, rows["line"], reason)
    return marked.filter(pl.col("fault").is_null()).drop("fault") if faulty.height else frame


def stage(frames: Iterable[pl.DataFrame], folder: Path, what: str) -> pl.LazyFrame | None:
    """Write the frames to `folder` as Parquet, a file each, and return their scan; None if there was no row."""
    folder.mkdir(parents=True)
    parts = 0
    with tqdm(unit=" rows", disable=None, desc=what, unit_scale=True) as bar:
        for frame in frames:
            if frame.height:
                frame.write_parquet(folder / f"{parts:06}.parquet", compression="zstd", compression_level=1)
                parts += 1
                bar.update(frame.height)
    return pl.scan_parquet(folder / "*.parquet") if parts else None


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder` for what is too big for memory; gone afterwards. A killed run's is taken over.

    Raises:
        UserError: another run prepares the same dataset now.
    """
    made = not folder.parent.exists()
    place = folder.parent / f".{folder.name}.staging"
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: another run prepares this dataset now") from None
        try:
            for left in place.iterdir():
                if left.is_dir():
                    shutil.rmtree(left)
            yield place
        except pl.exceptions.PolarsError as error:
            if not is_disk_full(error):
                raise
            raise UserError(f"{folder}: cannot be written (No space left on device)") from None
        finally:
            shutil.rmtree(place)
            with contextlib.suppress(OSError):
                if made:
                    folder.parent.rmdir()  # refused, and kept, if something is in it


# ---- choosing ----


def k_core(users: np.ndarray, items: np.ndarray, user_k: int, item_k: int) -> np.ndarray:
    """Which interactions are left when users and items with fewer than their `k` go, again and again: bool (n,)."""
    keep = np.ones(len(users), dtype=bool)
    while True:
        before = keep.sum()
        for ids, k in ((users, user_k), (items, item_k)):
            counts = np.bincount(ids[keep], minlength=int(ids.max(initial=0)) + 1)
            keep &= counts[ids] >= k
        if keep.sum() == before:
            return keep


def _numbered(names: pl.DataFrame, name: str) -> pl.DataFrame:
    """The distinct names in order, the shorter first (so 2 comes before 10), with their row numbers as `<name>_id`."""
    return names.sort(pl.col(name).str.len_bytes(), name).with_row_index(f"{name}_id")


def _filters(rules: Rules) -> list[tuple[str, pl.Expr]]:
    """The conditions on a single interaction, and what they are called."""
    size = pl.col("time").abs()  # beyond 1e11 seconds (the year 5138) a time must be in milli- or microseconds
    seconds = pl.col("time") / pl.when(size > 1e14).then(1e6).when(size > 1e11).then(1e3).otherwise(1.0)
    found = []
    if rules.start is not None or rules.end is not None:
        inside = seconds >= (rules.start if rules.start is not None else -np.inf)
        found.append(("in the time window", inside & (seconds < (rules.end if rules.end is not None else np.inf))))
    if rules.min_rating is not None:
        found.append((f"rated {rules.min_rating:g} or better", pl.col("rating") >= rules.min_rating))
    return found


def choose(interactions: pl.LazyFrame, items: pl.LazyFrame, rules: Rules, where: str) -> Chosen:
    """Steps 2 to 5 of the module's story, on numbers instead of names.

    Args:
        interactions: user, item, time, order (and rating, if there is a rule for it).
        items: the items that have a text.
        where: the input's name, for the message if nothing is left.

    Raises:
        UserError: no interaction is left; the message says after which step.
    """
    steps = [("read", interactions.select(pl.len()).collect().item())]
    for what, condition in _filters(rules):
        interactions = interactions.filter(condition)
        steps.append((what, interactions.select(pl.len()).collect(engine="streaming").item()))
    names = {
        "user": interactions.select("user").unique().collect(engine="streaming"),
        "item": items.select("item").unique().collect(engine="streaming"),
    }
    names = {name: _numbered(frame, name) for name, frame in names.items()}
    table = interactions.select("user", "item", "time", "order")
    for name in ("item", "user"):
        table = table.join(names[name].lazy(), on=name).drop(name)
    table = table.collect(engine="streaming")
    steps.append(("with an item that has a text", table.height))
    ties = ["order"] if rules.by_line else ["item_id", "order"]
    table = table.sort("time", *ties).unique(["user_id", "item_id"], keep="first", maintain_order=True).drop("time")
    steps.append(("first of a user with an item", table.height))
    user_k = max(rules.user_k, SHORTEST)
    table = table.filter(k_core(table["user_id"].to_numpy(), table["item_id"].to_numpy(), user_k, rules.item_k))
    steps.append((f"of users with {user_k} and items with {rules.item_k} or more", table.height))
    story = "; ".join(f"{count:,} {what}" for what, count in steps)
    if not table.height:
        raise UserError(
            f"{where}: nothing is left. Interactions: {story}. Lower --user_k and --item_k, or give more data"
        )
    say(f"interactions: {story}")
    return _renumbered(table, names)


def _renumbered(table: pl.DataFrame, names: dict[str, pl.DataFrame]) -> Chosen:
    """Numbers without gaps, in the order of the names; rows by user, each user's as they are."""
    kept = {}
    for name in ("user", "item"):
        old, new = np.unique(table[f"{name}_id"].to_numpy(), return_inverse=True)
        kept[name] = names[name][name].gather(old)
        table = table.with_columns(pl.Series(name, new.astype(np.uint32)))
    return Chosen(table.sort("user", maintain_order=True).select("user", "item", "order"), kept["user"], kept["item"])


# ---- the whole way ----


def prepare_dataset(
    *,
    interactions: Frames,
    items: Frames,
    inputs: list[Path],
    step: str,
    options: argparse.Namespace,
    bad: BadLines | None = None,
) -> Path:
    """Make the dataset `options.dataset` in `options.data_path` and return its folder.

    Args:
        interactions: (file, frame) pairs: user, item, time as texts, the line's number, perhaps rating, review, summary.
        items: (file, frame) pairs: item, title as texts, the line's number, perhaps description, brand, categories.
        inputs: the raw files, for the record of provenance.
        step: the script's path in the repository, for that record.
        bad: where the reader has counted bad lines.

    Raises:
        UserError: bad flags or lines, nothing left, files there already. Nothing is written then.
    """
    dataset = check_name(options.dataset)
    rules, bad = rules_of(options), bad if bad is not None else BadLines()
    folder = Path(options.data_path) / dataset
    there = [folder / f"{dataset}.{kind}" for kind in DATASET_KINDS if (folder / f"{dataset}.{kind}").exists()]
    if there and not options.overwrite:
        raise UserError(f"{there[0]} is there already; --overwrite replaces it")
    refuse_input(there, inputs)
    record = record_path(options.data_path, dataset)
    with staging(folder) as place:
        staged = stage(
            checked_interactions(interactions, bad, rules.min_rating is not None),
            place / "interactions",
            "interactions",
        )
        texts = stage(checked_items(items, bad), place / "items", "items")
        bad.settle(options.skip_bad)
        if staged is None or texts is None:
            raise UserError(
                f"{inputs[0] if staged is None else inputs[-1]}: no {'interaction' if staged is None else 'item'} in it"
            )
        with_text = texts.filter((pl.col("title") != "") | (pl.col("description") != ""))
        chosen = choose(staged, with_text, rules, str(inputs[0]))
        written = write_dataset(folder, dataset, chosen, staged, with_text, place)
    note_made(record, step, written, inputs, ("polars", "numpy"))
    return folder
