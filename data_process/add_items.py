"""New items for a running catalogue: a dataset with the old items' numbers, and the new ones after them.

    python data_process/add_items.py --items new.csv --data_path ./data --dataset Mine --new_dataset Mine2

Preparing all data anew would number the items anew, and a trained model would no longer fit. Here histories and user texts stay
as they are; what `--items` holds (any table of from_table.py, with its flags) is appended. What the dataset has already, by its
raw name in `<D>.item2id`, is left out. Then embed the new dataset and extend the index: docs/your-data.md.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path

import polars as pl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser
from data import read_items
from data_process.from_table import add_item_flags, frames, item_columns, text_columns
from data_process.prepare import ITEM_TEXTS, check_name, checked_items
from data_process.raw_files import BadLines, table_files
from flag_values import plain_name
from provenance import note_made, record_path, refuse_input
from utils import UserError, atomic_path, read_json, regular_file, run_main, say


def read_names(path: Path, count: int) -> list[str]:
    """The raw names of `<D>.item2id`, row = item. Raises UserError unless it numbers `count` items from 0."""
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    pairs = [line.rpartition("\t") for line in lines]
    if [number for _, _, number in pairs] != [str(n) for n in range(count)]:
        raise UserError(f"{path}: must number the {count} items of the item file from 0")
    return [name for name, _, _ in pairs]


def new_items(files: list[Path], known: list[str], options: object) -> pl.DataFrame:
    """The items that are not known, with a text, each once, in the order of the files. Raises UserError if there is none."""
    bad = BadLines()
    parts = list(checked_items(frames(files, item_columns(options), text_columns(options), bad), bad))
    bad.settle(options.skip_bad)
    found = pl.concat(parts) if parts else pl.DataFrame(schema={"item": pl.String})
    fresh = found.filter(~pl.col("item").is_in(known)).unique("item", keep="first", maintain_order=True)
    with_text = fresh.filter((pl.col("title") != "") | (pl.col("description") != "")) if fresh.height else fresh
    say(f"items: {found.height:,} read; {fresh.height:,} new; {with_text.height:,} with a text")
    if not with_text.height:
        raise UserError(f"{files[0]}: no new item with a text in it")
    return with_text


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data_path", default="./data", help="folder that holds <dataset>/")
    parser.add_argument("--dataset", type=plain_name, required=True, help="the running catalogue")
    parser.add_argument("--new_dataset", type=plain_name, required=True, help="name of the one with the new items")
    add_item_flags(parser)
    parser.add_argument("--skip_bad", action="store_true", help="leave out bad lines instead of ending with an error")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    options = parser.parse_args(argv)
    old_name, new_name = check_name(options.dataset), check_name(options.new_dataset)
    old, new = (Path(options.data_path) / name / name for name in (old_name, new_name))
    if old == new:
        raise UserError(f"--new_dataset {new_name}: is the old one's name")
    copied = [kind for kind in ("user2id", "user.json", "review.json", "inter.json") if Path(f"{old}.{kind}").exists()]
    written = ["item.json", "item2id", *copied]
    outputs = [Path(f"{new}.{kind}") for kind in written]
    files = [file for pattern in options.items for file in table_files(pattern)]
    inputs = [*files, *(regular_file(f"{old}.{kind}") for kind in written)]
    there = [path for path in outputs if path.exists()]
    if there and not options.overwrite:
        raise UserError(f"{there[0]} is there already; --overwrite replaces it")
    refuse_input(there, inputs)
    record = record_path(options.data_path, new_name)
    read_items(Path(f"{old}.item.json"))  # checks it
    items = read_json(f"{old}.item.json")
    names = read_names(Path(f"{old}.item2id"), len(items))
    added = new_items(files, names, options)
    for number, (name, *texts) in enumerate(added.select("item", *ITEM_TEXTS).iter_rows(), len(items)):
        items[str(number)] = dict(zip(ITEM_TEXTS, texts, strict=True))
        names.append(name)
    with contextlib.ExitStack() as stack:
        paths = {kind: stack.enter_context(atomic_path(f"{new}.{kind}")) for kind in written}
        paths["item.json"].write_text(json.dumps(items, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        paths["item2id"].write_text("".join(f"{name}\t{n}\n" for n, name in enumerate(names)), encoding="utf-8")
        for kind in copied:
            shutil.copyfile(f"{old}.{kind}", paths[kind])
    note_made(record, "data_process/add_items.py", outputs, inputs, ("polars",))
    say(f"{new.parent}: {len(items):,} items, {added.height:,} of them new")


if __name__ == "__main__":
    run_main(main)
