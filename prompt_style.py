"""How a trained model wants to be asked: its templates, the form of a history, its end token and its items, beside its weights.

`finetune.py` saves two files with every model, `test.py` and `recommend.py` read them:

- `prompt_style.json`: `{"sft_prompt", "all_prompt", "max_his_len", "add_prefix", "his_sep", "no_eos", "dataset"}`;
- `item_index.json`: `{"0": {"title": str, "index": ["<a_12>", …]}, …}`, the items that the model was trained on.

A released checkpoint has neither; then the flags say all, as in the original.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data import RecData, check_index
from prompt import Prompts, checked_prompts, load_prompts
from tasks import HistoryFormat
from utils import UserError, is_plain_name, read_json, say, write_json

STYLE, ITEMS = "prompt_style.json", "item_index.json"


@dataclass(frozen=True)
class PromptStyle:
    """What a prompt is made of. `dataset` is what the model was trained on ("" if nobody says)."""

    prompts: Prompts
    form: HistoryFormat
    no_eos: bool = False
    dataset: str = ""

    @classmethod
    def of_flags(
        cls, max_his_len: int, add_prefix: bool, his_sep: str, no_eos: bool, prompt_file: str | None, dataset: str
    ) -> PromptStyle:
        """The style that the values of `arguments.style_flags` describe."""
        return cls(load_prompts(prompt_file), HistoryFormat(max_his_len, add_prefix, his_sep), no_eos, dataset)

    def save(self, folder: Path, data: RecData) -> None:
        """Write both files to `folder`."""
        items = zip(data.titles, data.indices, strict=True)
        rows = {str(item): {"title": title, "index": list(index)} for item, (title, index) in enumerate(items)}
        write_json(folder / ITEMS, rows, indent=None)
        settings = {**vars(self.form), "no_eos": self.no_eos, "dataset": self.dataset}
        write_json(folder / STYLE, {**self.prompts.as_json(), **settings})


def saved_style(folder: Path) -> PromptStyle | None:
    """The style beside the weights in `folder`; None if there is none.

    Raises:
        UserError: the file is broken.
    """
    path = folder / STYLE
    if not os.path.lexists(path):
        return None
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be an object")
    kinds = {"max_his_len": int, "add_prefix": bool, "his_sep": str, "no_eos": bool, "dataset": str}
    for key, kind in kinds.items():
        if type(content.get(key)) is not kind:
            raise UserError(f"{path}: {key!r} must be of the type {kind.__name__}")
    if content["max_his_len"] < -1:
        raise UserError(f"{path}: 'max_his_len' is {str(content['max_his_len'])[:40]}; it must be -1 or more")
    if content["dataset"] and not is_plain_name(content["dataset"]):
        raise UserError(f"{path}: 'dataset' must be the name of a folder")
    prompts = checked_prompts(str(path), content.get("sft_prompt"), content.get("all_prompt"))
    form = HistoryFormat(content["max_his_len"], content["add_prefix"], content["his_sep"])
    return PromptStyle(prompts, form, content["no_eos"], content["dataset"])


def choose_style(folder: Path, flags: dict[str, Any], given: frozenset[str]) -> tuple[PromptStyle, dict[str, Any]]:
    """The model's own style, with what the user gave on the command line instead; and `flags`, brought up to date.

    Args:
        folder: the checkpoint's.
        flags: `arguments.style_flags`.
        given: those of them that the user gave (`arguments.parse_given`).
    """
    own = saved_style(folder)
    if own is None:
        say(f"note: {folder} does not say how it wants to be asked; using the flags")
        return PromptStyle.of_flags(**flags), flags
    chosen = dict(flags)
    if "dataset" not in given and own.dataset not in ("", flags["dataset"]):
        say(f"note: --dataset {own.dataset}, as {folder / STYLE} says")
        chosen["dataset"] = own.dataset
    for flag, value in {**vars(own.form), "no_eos": own.no_eos}.items():
        if flag not in given:
            chosen[flag] = value
        elif flags[flag] != value:
            say(f"note: --{flag} {flags[flag]!r} instead of {value!r}, which {folder / STYLE} says")
    style = PromptStyle.of_flags(**{**chosen, "dataset": own.dataset})
    if "prompt_file" not in given:
        style = replace(style, prompts=own.prompts)
    elif style.prompts != own.prompts:
        say(f"note: --prompt_file {flags['prompt_file']} instead of the templates in {folder / STYLE}")
    return style, chosen


def saved_items(folder: Path) -> RecData | None:
    """Titles and indices of the items that the model in `folder` was trained on, without users; None if it has no list.

    Raises:
        UserError: the file is broken.
    """
    path = folder / ITEMS
    if not os.path.lexists(path):
        return None
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: must be an object that is not empty")
    titles, rows = [], {}
    for number in range(len(content)):
        entry = content.get(str(number))
        if not isinstance(entry, dict) or not isinstance(entry.get("title"), str):
            raise UserError(f"{path}: item {str(number)!r} must have a title and an index")
        titles.append(entry["title"])
        rows[str(number)] = entry.get("index")
    indices = check_index(path, rows, len(titles))
    return RecData(folder.name, folder, {}, titles, [""] * len(titles), indices, None, {"index": path})


def check_same_items(folder: Path, data: RecData, insist: bool = False) -> None:
    """Refuse an index file that gives items of the training another index. New items at its end are welcome and said.

    Args:
        insist: only say so (`--allow_other_index`).

    Raises:
        UserError: names the first item that differs.
    """
    trained = saved_items(folder)
    if trained is None:
        return
    old, new = trained.indices, data.indices
    if old == new:
        return
    if len(new) > len(old) and new[: len(old)] == old:
        say(f"note: {len(new) - len(old)} items of {data.files['index']} are new since {folder} was trained")
        return
    item = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    now = "".join(new[item]) if item < len(new) else "missing"
    was = "".join(old[item]) if item < len(old) else "missing"
    told = f"{data.files['index']}: item {item} is {now}, but {folder / ITEMS} says that the model learned {was}"
    if not insist:
        raise UserError(f"{told}; give the index file of the training, or insist with --allow_other_index")
    say(f"warning: {told}")
