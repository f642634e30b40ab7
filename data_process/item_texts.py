"""The items' texts as an encoder gets them: fields chosen and weighted, markup removed, equal texts once."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils import UserError

COMMENT_OR_SCRIPT = re.compile(r"<!--.*?-->|<(script|style)\b.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
TAG = re.compile(r"</?[a-zA-Z][^<>]*>")  # not "<3", not "a < b"
ORIGINAL_TAG = re.compile(r"</?\w[^>]*>")
ORIGINAL_LIMIT = 2000  # characters


@dataclass(frozen=True)
class ItemTexts:
    """Distinct texts, and which of them make up an item.

    `fields`: int64 (items, fields), a number into `texts` or -1 where the item lacks the field; `weights`: float32 of the
    same shape, each row's sum 1, 0 where the field is lacking.
    """

    texts: list[str]
    fields: np.ndarray
    weights: np.ndarray


def clean_text(text: str) -> str:
    """`text` as one plain line: entities resolved (twice: catalogues hold `&amp;quot;`), markup and blanks removed."""
    text = html.unescape(html.unescape(text))
    text = TAG.sub(" ", COMMENT_OR_SCRIPT.sub(" ", text))
    return " ".join(text.replace("\x00", " ").split())


def original_text(text: str) -> str:
    """`text` as the original has it: without tags, quotation marks and line breaks, with one full stop at its end.

    A missing text becomes ".", one that then has 2,000 characters or more becomes empty (and is encoded so).
    """
    text = ORIGINAL_TAG.sub("", html.unescape(text.strip()))
    text = re.sub(r'["\n\r]', "", text).rstrip(".") + "."
    return "" if len(text) >= ORIGINAL_LIMIT else text


CLEANERS: dict[str, Callable[[str], str]] = {"clean": clean_text, "original": original_text}


def parse_fields(text: str) -> dict[str, float]:
    """`title:2,description` → `{"title": 2.0, "description": 1.0}`.

    Raises:
        UserError: a name is empty or twice there, or a weight is not a number above 0.
    """
    fields: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition(":")
        try:
            value = float(weight or 1)
        except ValueError:
            value = math.nan
        if not re.match(r"\w", name) or name in fields or not 0 < value < math.inf:
            raise UserError(f"--fields {text}: {part!r} is not a new name with a weight above 0, such as title:2")
        fields[name] = value
    return fields


def item_texts(
    items: Any, source: Path, fields: dict[str, float], mode: str = "clean", missing_text: str | None = None
) -> ItemTexts:
    """The texts of all items, row = item id.

    Args:
        items: the parsed content of `<D>.item.json`.
        source: where it came from, for messages.
        fields: names and weights.
        mode: a key of `CLEANERS`; with "original" no field is ever lacking.
        missing_text: stands in for an item without any text; None makes such an item an error.

    Raises:
        UserError: keys are not "0" … "n-1", an item is no object, a field is no text or no item has it, an item has no text.
    """
    if not isinstance(items, dict) or not items:
        raise UserError(f'{source}: expected a non-empty object {{"0": {{"title": …, "description": …}}, …}}')
    numbers: dict[str, int] = {}
    rows = np.full((len(items), len(fields)), -1, dtype=np.int64)
    for number in range(len(items)):
        for column, text in enumerate(_texts_of(items, number, source, fields)):
            text = CLEANERS[mode](text).encode("utf-8", "replace").decode()  # no tokenizer takes half a surrogate pair
            if text or mode == "original":
                rows[number, column] = numbers.setdefault(text, len(numbers))
        if (rows[number] < 0).all():
            if not missing_text:
                names = " nor ".join(fields)
                raise UserError(f'{source}: item "{number}" has neither {names}; add one or give --missing_text')
            rows[number, 0] = numbers.setdefault(missing_text, len(numbers))
    for field in fields:
        if field not in ("title", "description") and not any(field in item for item in items.values()):
            raise UserError(
                f"{source}: no item has the field {field!r} of --fields; item 0 has {', '.join(items['0'])}"
            )
    weights = np.where(rows >= 0, np.array(list(fields.values())), 0.0)
    return ItemTexts(list(numbers), rows, (weights / weights.sum(1, keepdims=True)).astype(np.float32))


def _texts_of(items: dict, number: int, source: Path, fields: dict[str, float]) -> list[str]:
    item = items.get(str(number))
    if item is None:
        raise UserError(f'{source}: has {len(items)} items but no key "{number}"; keys must run from "0"')
    if not isinstance(item, dict):
        raise UserError(f'{source}: item "{number}" is not an object with title and description')
    texts = []
    for field in fields:
        value = item.get(field) or ""
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            value = " ".join(value)  # raw Amazon metadata keeps descriptions as lists
        if not isinstance(value, str):
            raise UserError(f'{source}: item "{number}": {field} is {type(value).__name__}, expected text')
        texts.append(value)
    return texts
