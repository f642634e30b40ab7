"""A RecBole atomic folder (`<name>.inter`, `<name>.item`) to the dataset files of this repository.

    python data_process/from_recbole.py --source FOLDER --data_path ./data --dataset ml-100k --k_core 5

Keeps interactions in order of time (equal times: by item, so that the split does not depend on the order of the file's
lines), only the first of a user with an item, and users and items with at least `--k_core` interactions. Writes
`<D>.inter.json`, `<D>.item.json`, `<D>.user2id` and `<D>.item2id`. The fields are found by their RecBole names (`user_id`,
`item_id`, `timestamp`, `rating`; the first field that ends in `title` or `name`), or as you name them. The description is
a text field `description` as it is, or else a sentence from the year and category fields.
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser  # noqa: E402
from utils import UserError, atomic_path, run_main, say, write_json  # noqa: E402

Table = dict[str, list[str]]


def read_atomic(path: Path) -> tuple[Table, dict[str, str]]:
    """Columns and types of an atomic file: tab-separated, its first line `name:type` for each field.

    Raises:
        UserError: the file is missing, has no such header, or a line with another number of fields.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file (--source must be a RecBole atomic folder)")
    csv.field_size_limit(2**31 - 1)  # a long description is no error
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = next(rows, [])
        if not header or not all(":" in field for field in header):
            raise UserError(f"{path}: line 1 must name the fields as name:type")
        names, types = zip(*(field.rsplit(":", 1) for field in header), strict=True)
        columns: list[list[str]] = [[] for _ in names]
        for row in rows:
            if len(row) != len(names):
                raise UserError(f"{path}: line {rows.line_num} has {len(row)} fields instead of {len(names)}")
            for column, value in zip(columns, row, strict=True):
                column.append(value)
    return dict(zip(names, columns, strict=True)), dict(zip(names, types, strict=True))


def column(table: Table, path: Path, name: str) -> list[str]:
    """A column by name. Raises UserError if the file has none."""
    if name not in table:
        raise UserError(f"{path}: has no field {name!r}; it has {', '.join(table)}")
    return table[name]


def k_core(users: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
    """Which interactions are left when users and items with fewer than `k` are taken out again and again: bool (n,)."""
    keep = np.ones(len(users), dtype=bool)
    while True:
        before = keep.sum()
        for ids in (users, items):
            counts = np.bincount(ids[keep], minlength=ids.max() + 1)
            keep &= counts[ids] >= k
        if keep.sum() == before:
            return keep


def natural(name: str) -> tuple:
    """A sorting key that puts 2 before 10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part)


def sequences(
    users: list[str], items: list[str], times: list[str], k: int, by_line: bool = False
) -> dict[str, list[str]]:
    """Every user's items, oldest first, each item once, after the k-core filter."""
    try:
        moments = np.array(times, dtype=np.float64)
    except ValueError as error:
        raise UserError(f"a time is not a number: {error}") from None
    if not np.isfinite(moments).all():
        raise UserError(f"interaction {int(np.flatnonzero(~np.isfinite(moments))[0]) + 1} has no finite time")
    user_names, user_ids = np.unique(np.array(users), return_inverse=True)
    item_names = sorted(set(items), key=natural)
    numbers = {name: number for number, name in enumerate(item_names)}
    item_ids = np.array([numbers[item] for item in items])
    order = np.argsort(moments, kind="stable") if by_line else np.lexsort((item_ids, moments))
    pairs = user_ids[order].astype(np.int64) * len(item_names) + item_ids[order]
    first = np.sort(np.unique(pairs, return_index=True)[1])
    order = order[first]
    order = order[k_core(user_ids[order], item_ids[order], k)]
    found: dict[str, list[str]] = {}
    for user, item in zip(user_ids[order], item_ids[order], strict=True):
        found.setdefault(str(user_names[user]), []).append(item_names[item])
    return found


def title_field(table: Table, path: Path, wanted: str | None) -> str:
    """The field with the items' titles."""
    if wanted:
        column(table, path, wanted)
        return wanted
    for name in table:
        if name.endswith(("title", "name")):
            return name
    raise UserError(f"{path}: no field ends in title or name; say which with --title_field (it has {', '.join(table)})")


def split_categories(row: dict[str, str], field: str) -> list[str]:
    """The categories of an item, separated by bars or commas, or else by blanks."""
    text = row.get(field, "")
    parts = re.split(r"[|,]", text) if re.search(r"[|,]", text) else text.split()
    return [part.strip() for part in parts if part.strip() and part.strip().lower() != "unknown"]


def describe(row: dict[str, str], categories: str, kind: str = "") -> str:
    """A description: the item's own, or a sentence from its year and its categories."""
    if row.get("description", "").strip():
        return row["description"].strip()
    year = next((row[name] for name in row if "year" in name and row[name].strip()), "")
    words = " ".join(part for part in (year, ", ".join(split_categories(row, categories))) if part)
    return f"{words} {kind}".strip() + "." if words else ""


def item_entries(table: Table, path: Path, title: str, categories: str, kind: str) -> dict[str, dict[str, str]]:
    """Item name → title, description, categories."""
    names = column(table, path, "item_id")
    rows = (dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True))
    return {
        name: {
            "title": row[title].strip(),
            "description": describe({key: value for key, value in row.items() if key != title}, categories, kind),
            "brand": row.get("brand", "").strip(),
            "categories": ", ".join(split_categories(row, categories)),
        }
        for name, row in zip(names, rows, strict=True)
    }


def convert(source: Path, folder: Path, dataset: str, options: object) -> None:
    """Read `source`, write the files of `dataset` to `folder`, say what there is."""
    name = options.name or source.name
    inter, _ = read_atomic(source / f"{name}.inter")
    table, _ = read_atomic(source / f"{name}.item")
    inter_path, item_path = source / f"{name}.inter", source / f"{name}.item"
    users, items, times = (column(inter, inter_path, field) for field in ("user_id", "item_id", options.time_field))
    if options.min_rating is not None:
        try:
            ratings = np.array(column(inter, inter_path, "rating"), dtype=np.float64)
        except ValueError as error:
            raise UserError(f"{inter_path}: a rating is not a number: {error}") from None
        kept = np.flatnonzero(ratings >= options.min_rating)
        users, items, times = ([values[i] for i in kept] for values in (users, items, times))
    title = title_field(table, item_path, options.title_field)
    entries = item_entries(table, item_path, title, options.category_field, options.item_kind)
    with_text = [
        i
        for i, item in enumerate(items)
        if item in entries and (entries[item]["title"] or entries[item]["description"])
    ]
    if len(with_text) < len(items):
        say(f"note: {len(items) - len(with_text)} interactions with items without text are left out")
        users, items, times = ([values[i] for i in with_text] for values in (users, items, times))
    if not users:
        raise UserError(f"{inter_path}: no interaction is left")
    found = sequences(users, items, times, options.k_core, options.equal_times == "line")
    short = [user for user, history in found.items() if len(history) < 3]  # leave-one-out holds out two of each
    for user in short:
        del found[user]
    if short:
        say(f"note: {len(short)} users with fewer than 3 items are left out")
    if not found:
        raise UserError(f"{inter_path}: no user is left with --k_core {options.k_core}")
    user_names = sorted(found, key=natural)
    item_names = sorted({item for history in found.values() for item in history}, key=natural)
    number = {item: i for i, item in enumerate(item_names)}
    inters = {str(u): [number[item] for item in found[user]] for u, user in enumerate(user_names)}
    write_json(folder / f"{dataset}.item.json", {str(i): entries[item] for i, item in enumerate(item_names)}, indent=1)
    for kind, names in (("user", user_names), ("item", item_names)):
        with atomic_path(folder / f"{dataset}.{kind}2id") as path:
            path.write_text("".join(f"{original}\t{i}\n" for i, original in enumerate(names)), encoding="utf-8")
    write_json(folder / f"{dataset}.inter.json", inters, indent=None)  # last: its being there means that all are
    total = sum(map(len, inters.values()))
    say(
        f"{folder}: {len(inters):,} users, {len(number):,} items, {total:,} interactions ({total / len(inters):.1f} a user)"
    )


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--source", required=True, help="the atomic folder")
    parser.add_argument("--name", help="the files' stem, if not the folder's name")
    parser.add_argument("--data_path", default="./data", help="folder that will hold <dataset>/")
    parser.add_argument("--dataset", help="the dataset's name here; default: the stem")
    parser.add_argument(
        "--k_core", type=int, default=5, help="fewest interactions of a user and of an item (3 or more)"
    )
    parser.add_argument("--min_rating", type=float, help="leave out lower ratings")
    parser.add_argument("--time_field", default="timestamp", help="field of .inter that orders the interactions")
    equal = "order of interactions of one time: by item, or as the file's lines"
    parser.add_argument("--equal_times", choices=("item", "line"), default="item", help=equal)
    parser.add_argument("--title_field", help="field of .item with the title")
    parser.add_argument("--category_field", default="class", help="field of .item with the categories")
    parser.add_argument(
        "--item_kind", default="", help="a word for what the items are (movie), ends the made description"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    options = parser.parse_args(argv)
    source = Path(options.source).resolve()
    dataset = options.dataset or options.name or source.name
    folder = Path(options.data_path) / dataset
    target = folder / f"{dataset}.inter.json"
    if target.exists() and not options.overwrite:
        raise UserError(f"{target} is there already; --overwrite replaces it")
    convert(source, folder, dataset, options)


if __name__ == "__main__":
    run_main(main)
