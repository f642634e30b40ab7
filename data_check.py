"""Look at a dataset before training on it: a summary, samples of each task, and every fault with file, key and reason.

    python data.py --check --data_path ./data --dataset Games
    python data.py --check --data_path ./data --dataset Games --tokenizer ./models/llama-7b --show 0
    python data.py --verify --data_path ./data --dataset Games      # were the files made from what lies there now?

The status is 0 for a dataset without faults, else 2. A file that is not there yet (index, user texts) is no fault.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

import provenance
from arguments import DATASET, PROMPT, add_flags, make_parser, style_flags
from data import RecData, UserTexts, check_index, read_inters, read_items, read_users
from flag_values import whole
from prompt_style import PromptStyle
from results import read_results
from run_folder import RECORD, RunFolder, model_fingerprint
from samples import TrainSet
from tasks import TASKS
from utils import UserError, read_json, sha256

SHOWN_FAULTS = 1000


class Faults:
    """What is wrong, in the order found."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def __call__(self, message: str) -> None:
        self.found.append(message)

    def of(self, function: Any, *args: Any) -> Any:
        """What `function` returns, or None where the whole file is wrong."""
        try:
            return function(*args)
        except UserError as error:
            self(str(error))
            return None


def read_all(folder: Path, name: str, index_file: str, faults: Faults) -> RecData | None:
    """What can be read of a dataset: items without an index have (), users without texts are left out."""
    paths = {
        "inter": folder / f"{name}.inter.json",
        "item": folder / f"{name}.item.json",
        "index": folder / f"{name}{index_file}",
        "user": folder / f"{name}.user.json",
    }
    items = faults.of(read_items, paths["item"], faults)
    if items is None:
        return None
    count = len(items[0])
    inters = faults.of(read_inters, paths["inter"], count, faults) or {}
    indices: list[tuple[str, ...]] = [()] * count
    if paths["index"].exists():
        content = faults.of(read_json, paths["index"])
        indices = (content is not None and faults.of(check_index, paths["index"], content, count, faults)) or indices
    users: UserTexts | None = None
    if paths["user"].exists():
        users = faults.of(read_users, paths["user"], inters, count, ("preference", "train", "test"), faults)
    titles, descriptions = items
    return RecData(name, folder, inters, titles, descriptions, indices, users, paths)


def quantiles(values: Any, unit: str = "") -> str:
    """Smallest, quartiles and largest of some numbers."""
    if len(values) == 0:
        return "none"
    names = ("least", "quarter", "median", "three quarters", "most")
    found = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
    return ", ".join(f"{name} {value:g}" for name, value in zip(names, found, strict=True)) + unit


def summary(data: RecData) -> list[tuple[str, str]]:
    """Facts about a dataset: (name, value)."""
    users, items = len(data.inters), len(data.titles)
    lengths = [len(row) for row in data.inters.values()]
    repeats = sum(len(row) > len(set(row)) for row in data.inters.values())
    same = sum(n for title, n in Counter(data.titles).items() if n > 1 and title)
    cold = int((data.train_counts == 0).sum())
    rows = [
        ("users", f"{users:,}"),
        ("items", f"{items:,}"),
        ("interactions", f"{sum(lengths):,}"),
        ("sparsity", f"{1 - sum(lengths) / max(1, users * items):.4%}"),
        ("history lengths", quantiles(lengths)),
        ("histories with a repeated item", f"{repeats:,}"),
        ("cold items (in no training part)", f"{cold:,}"),
        ("items that share a title", f"{same:,}"),
        ("items without a title", f"{sum(not title for title in data.titles):,}"),
        ("items without a description", f"{sum(not text for text in data.descriptions):,}"),
    ]
    if all(data.indices):
        levels = sorted({len(index) for index in data.indices})
        rows.append(("index", f"{len(data.item_tokens):,} tokens, {' or '.join(map(str, levels))} levels"))
        rows.append(("items that share an index", f"{data.shared_items:,}"))
    else:
        rows.append(("index", "none yet (index/main.py, index/generate_indices.py)"))
    if data.users is None:
        rows.append(("user texts", "none yet (data_process/user_texts.py): itemsearch and preferenceobtain need them"))
    return rows


def tasks_that_work(data: RecData) -> list[str]:
    """The tasks whose files are there."""
    if not all(data.indices):
        return []
    parts = set()
    if data.users is not None:
        parts = {"preference"} | {split for split, rows in data.users.intentions.items() if rows}
    return [name for name, task in TASKS.items() if task.splits["train"].user_parts <= parts]


def show_tasks(data: RecData, style: PromptStyle, tokenizer: Any, show: int) -> None:
    """Samples of each task an epoch, their token lengths, and some of them."""
    for name in tasks_that_work(data):
        samples = TrainSet(data, style.prompts, [(name, 1, 0)], style.form)
        line = f"{name}: {len(samples):,} samples an epoch"
        if tokenizer is not None:
            drawn = np.random.default_rng(0).choice(len(samples), min(500, len(samples)), replace=False)
            texts = [samples[int(n)]["prompt"] + samples[int(n)]["response"] for n in drawn]
            line += f"; tokens of {len(texts)}: {quantiles([len(ids) for ids in tokenizer(texts)['input_ids']])}"
        print(f"\n{line}")
        for number in np.linspace(0, len(samples) - 1, show).astype(int):
            print(f"  {samples[int(number)]['prompt']}{samples[int(number)]['response']}".replace("\n", "\n  "))


def check(args: argparse.Namespace) -> None:
    """Print what there is to know. Raises UserError if the dataset has faults."""
    folder, faults = Path(args.data_path) / args.dataset, Faults()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (--data_path and --dataset)")
    data = read_all(folder, args.dataset, args.index_file, faults)
    if data is not None:
        for name, value in summary(data):
            print(f"{name:34} {value}")
        tokenizer = None
        if args.tokenizer:
            from modeling import add_item_tokens, load_tokenizer

            tokenizer = load_tokenizer(args.tokenizer)
            add_item_tokens(tokenizer, data.item_tokens)
        if data.inters and not faults.found:
            show_tasks(data, PromptStyle.of_flags(**style_flags(args)), tokenizer, args.show)
    if faults.found:
        print(f"\n{len(faults.found):,} faults:")
        for message in faults.found[:SHOWN_FAULTS]:
            print(f"  {message}")
        raise UserError(f"{folder}: {len(faults.found):,} faults, listed above")
    print("\nno faults")


def verify_files(folder: Path, name: str, index_file: str, results_file: str | None) -> None:
    """Compare the files with what was noted when they were made, and with what the results were made with.

    Raises:
        UserError: one has changed since, or nobody has noted anything.
    """
    notes = provenance.notes_of(folder, name, index_file)
    faults = provenance.verify(folder, notes)
    if results_file:
        faults += changed_since(Path(results_file), folder, name, index_file)
    elif not notes:
        raise UserError(f"{folder}: nobody has noted how its files were made (no {name}.provenance.json)")
    for fault in faults:
        print(fault)
    if faults:
        raise UserError(f"{folder}: {len(faults)} files are not what they were, listed above")
    print(f"{folder}: every file is as it was when it was made")


def changed_since(results_file: Path, folder: Path, name: str, index_file: str) -> list[str]:
    """A sentence for each data file, and for the checkpoint, that is not the one that the results were made with."""
    config = read_results(results_file)["config"]
    endings = {"inter": ".inter.json", "item": ".item.json", "user": ".user.json", "index": index_file}
    faults, hashes, checkpoint = [], config.get("data_sha256", {}), config["arguments"].get("ckpt_path")
    if not isinstance(hashes, dict) or not isinstance(checkpoint or "", str):
        raise UserError(f"{results_file}: 'data_sha256' must be an object, 'ckpt_path' a text")
    for kind, digest in hashes.items():
        path = folder / f"{name}{endings.get(kind, kind)}"
        if not path.is_file() or sha256(path) != digest:
            faults.append(f"{path}: is not the file that {results_file} was made with")
    if checkpoint and Path(checkpoint).is_dir() and model_fingerprint(checkpoint) != config.get("checkpoint"):
        faults.append(f"{checkpoint}: is not the model that {results_file} was made with")
    if checkpoint and (trained := RunFolder(checkpoint).record()):
        for kind, file in trained.files.items():
            path = folder / f"{name}{endings[kind]}" if kind in endings else Path(file["path"])
            if not path.is_file() or sha256(path) != file["sha256"]:
                faults.append(f"{path}: is not the file that the model was trained with ({Path(checkpoint) / RECORD})")
    return list(dict.fromkeys(faults))


def main(argv: list[str] | None = None) -> None:
    """Check or verify."""
    parser = make_parser(__doc__)
    add_flags(parser, "data", DATASET)
    add_flags(parser, "prompts", PROMPT)
    what = parser.add_argument_group("what to do")
    what.add_argument("--check", action="store_true", help="summary, samples, faults (the default)")
    what.add_argument("--verify", action="store_true", help="compare the files with the record of how they were made")
    what.add_argument("--results_file", metavar="F", help="--verify: also data and checkpoint of these results")
    what.add_argument("--tokenizer", metavar="PATH", help="also count tokens, as this model's tokenizer cuts")
    what.add_argument("--show", type=whole(0, 10**6), default=3, help="samples of each task to print")
    args = parser.parse_args(argv)
    if args.verify:
        verify_files(Path(args.data_path) / args.dataset, args.dataset, args.index_file, args.results_file)
    else:
        check(args)
