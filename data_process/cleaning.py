"""Columns of raw texts as plain lines: `clean_text` of item_texts.py where there is markup, polars for all the others."""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_process.item_texts import clean_text

MARKED = r"[<&\x00\x1c-\x1f]"  # what clean_text does more to than to join blanks

BLANKS = r"\s{2,}|[^\S ]"  # what is not one plain blank


def cleaned(texts: pl.Series) -> pl.Series:
    """Texts as one plain line each, markup and entities resolved (`clean_text`), null as the empty text."""
    texts = texts.fill_null("")
    plain = texts.str.replace_all(BLANKS, " ").str.strip_chars()
    marked = texts.str.contains(MARKED)
    if not marked.any():
        return plain
    return plain.scatter(marked.arg_true(), [clean_text(text) for text in texts.filter(marked)])
