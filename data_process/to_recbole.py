"""A dataset as RecBole files, so that RecBole's models run on the same leave-one-out split.

    python data_process/to_recbole.py --data_path ./data --dataset Games --target ./recbole
    run_recbole --model SASRec --dataset Games --config_files recbole/Games/Games.yaml        # from the folder of `recbole`

Writes to `<target>/<D>/` the atomic files `<D>.inter` and `<D>.item` (names are our numbers; the time of an interaction is its
place in the history), the benchmark files `<D>.train.inter`, `<D>.valid.inter` and `<D>.test.inter` (one line a target, with the
history before it) and `<D>.yaml`, which makes RecBole's sequential models use them. Other models take the atomic files and
RecBole's own leave-one-out by time, which is the same split.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser
from data import read_inters, read_items
from data_process.prepare import check_name
from flag_values import whole
from utils import UserError, atomic_path, read_json, run_main, say

ITEM_FIELDS = {"title": "title:token_seq", "categories": "categories:token_seq", "brand": "brand:token_seq"}
BENCHMARK = ("train", "valid", "test")
CONFIG = """# RecBole's settings for {dataset}: the split and histories of this repository, all items ranked
data_path: {folder}
USER_ID_FIELD: user_id
ITEM_ID_FIELD: item_id
TIME_FIELD: timestamp
load_col:
  inter: [user_id, item_id, item_id_list]
  item: [item_id]  # those that nobody met are ranked too
benchmark_filename: [train, valid, test]
alias_of_item_id: [item_id_list]
MAX_ITEM_LIST_LENGTH: {longest}
eval_args: {{split: {{LS: valid_and_test}}, order: TO, mode: full}}
train_neg_sample_args: ~
loss_type: CE
"""


def targets(length: int, split: str) -> range:
    """The places of a split's targets in a history of this length (DESIGN, section 5)."""
    return {
        "train": range(1, length - 2),
        "valid": range(length - 2, length - 1),
        "test": range(length - 1, length),
    }[split]


def atomic_lines(inters: dict[str, list[int]]) -> Iterator[str]:
    """`<D>.inter`: every interaction, its place in the history as the time."""
    yield "user_id:token\titem_id:token\ttimestamp:float"
    for user, items in inters.items():
        yield from (f"{user}\t{item}\t{place}" for place, item in enumerate(items))


def benchmark_lines(inters: dict[str, list[int]], split: str, longest: int) -> Iterator[str]:
    """`<D>.<split>.inter`: every target of the split with the `longest` items before it."""
    yield "user_id:token\titem_id_list:token_seq\titem_id:token"
    for user, items in inters.items():
        for place in targets(len(items), split):
            history = items[max(0, place - longest) : place]
            yield f"{user}\t{' '.join(map(str, history))}\t{items[place]}"


def item_lines(items: dict[str, dict]) -> Iterator[str]:
    """`<D>.item`: the words of title, categories and brand."""
    yield "\t".join(["item_id:token", *ITEM_FIELDS.values()])
    for item, entry in items.items():
        values = (entry.get(field) or "" for field in ITEM_FIELDS)
        texts = (" ".join(map(str, value)) if isinstance(value, list) else str(value) for value in values)
        yield "\t".join([item, *(" ".join(text.split()) for text in texts)])


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data_path", default="./data", help="folder that holds <dataset>/")
    parser.add_argument("--dataset", required=True, help="name of the dataset")
    parser.add_argument("--target", default="./recbole", help="folder that will hold <dataset>/ as RecBole's data_path")
    parser.add_argument("--max_his_len", type=whole(-1), default=20, help="items of history at most; -1: all")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    options = parser.parse_args(argv)
    dataset, folder = check_name(options.dataset), Path(options.target) / options.dataset
    source = Path(options.data_path) / dataset / dataset
    titles, _ = read_items(Path(f"{source}.item.json"))
    if folder.exists() and folder.samefile(source.parent):
        raise UserError(f"--target {options.target}: is the dataset's own folder; name another")
    inters = read_inters(Path(f"{source}.inter.json"), len(titles))
    longest = max(map(len, inters.values())) if options.max_his_len < 1 else options.max_his_len
    config = CONFIG.format(dataset=dataset, folder=json.dumps(str(Path(options.target).resolve())), longest=longest)
    files = {
        "yaml": iter(config.splitlines()),
        "inter": atomic_lines(inters),
        "item": item_lines(read_json(f"{source}.item.json")),
        **{f"{split}.inter": benchmark_lines(inters, split, longest) for split in BENCHMARK},
    }
    there = [path for kind in files if (path := folder / f"{dataset}.{kind}").exists()]
    if there and not options.overwrite:
        raise UserError(f"{there[0]} is there already; --overwrite replaces it")
    with contextlib.ExitStack() as stack:  # all files are whole before one takes its name
        for kind, lines in files.items():
            path = stack.enter_context(atomic_path(folder / f"{dataset}.{kind}"))
            with open(path, "w", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)
    say(f"{folder}: {len(inters):,} users, {len(titles):,} items; histories of {longest} items at most")


if __name__ == "__main__":
    run_main(main)
