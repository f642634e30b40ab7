"""Item texts for the encoder: cleaning by hand-made examples, fields and weights, the original's way, errors."""

from pathlib import Path

import numpy as np
import pytest

from data_process.item_texts import clean_text, item_texts, original_text, parse_fields
from utils import UserError

TD = {"title": 1.0, "description": 1.0}


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  two\n words\t", "two words"),
        ("<b>Bold</b><br/>new &amp; old", "Bold new & old"),
        ("A &amp;quot;quoted&amp;quot; text", 'A "quoted" text'),
        ("x<script type='a'>var y = '<b>';</script>z", "x z"),
        ("a < b and c > d, I <3 it", "a < b and c > d, I <3 it"),
        ("caf&eacute; &#8212; 5&quot;", 'café — 5"'),
        ("<!-- hidden -->shown", "shown"),
        ("<p> </p>", ""),
    ],
)
def test_cleaning(raw: str, clean: str) -> None:
    assert clean_text(raw) == clean


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("A pen", "A pen."),
        ("A pen...", "A pen."),
        ("", "."),
        (".", "."),
        ('5" wide\nand &quot;red&quot;', "5 wideand red."),
        ("<b>Bold</b> pen", "Bold pen."),
        ("x" * 1998, "x" * 1998 + "."),
        ("x" * 1999, ""),  # 2,000 characters with its full stop
    ],
)
def test_the_originals_cleaning(raw: str, text: str) -> None:
    assert original_text(raw) == text


def test_fields_weights_and_equal_texts() -> None:
    items = {
        "1": {"description": ["one", "two"], "brand": "x"},
        "0": {"title": "A", "description": ""},
        "2": {"title": "B", "description": "A"},
    }
    found = item_texts(items, Path("x"), {"title": 3.0, "description": 1.0})
    assert found.texts == ["A", "one two", "B"]
    assert found.fields.tolist() == [[0, -1], [-1, 1], [2, 0]]
    assert found.weights.tolist() == [[1, 0], [0, 1], [0.75, 0.25]] and found.weights.dtype == np.float32
    assert item_texts(items, Path("x"), {"title": 1.0}, missing_text="?").texts == ["A", "?", "B"]


def test_the_originals_way_has_no_gaps() -> None:
    found = item_texts({"0": {"title": "A"}, "1": {"title": "B", "description": "x" * 2000}}, Path("x"), TD, "original")
    assert found.texts == ["A.", ".", "B.", ""]
    assert found.weights.tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_fields_from_the_command_line() -> None:
    assert parse_fields("title:2, description") == {"title": 2.0, "description": 1.0}
    for wrong in ("", "title,", "title:0", "title:x", "title:inf", "title:-1", "title,title"):
        with pytest.raises(UserError, match="--fields"):
            parse_fields(wrong)


@pytest.mark.parametrize(
    ("items", "word"),
    [
        ([], "non-empty object"),
        ({}, "non-empty object"),
        ({"1": {"title": "a"}}, 'no key "0"'),
        ({"0": "text"}, "not an object"),
        ({"0": {"title": 5}}, "title is int"),
        ({"0": {"title": " <p></p>", "description": ""}}, "neither title nor description"),
    ],
)
def test_bad_items_end_with_one_line(items: object, word: str) -> None:
    with pytest.raises(UserError, match=word):
        item_texts(items, Path("x.json"), TD)


def test_a_field_that_no_item_has() -> None:
    items = {"0": {"title": "a", "brand": "b"}}
    with pytest.raises(UserError, match="no item has the field 'colour' of --fields; item 0 has title, brand"):
        item_texts(items, Path("x.json"), {"title": 1.0, "colour": 1.0})
    assert item_texts(items, Path("x.json"), TD).texts == ["a"]


def test_missing_text_stands_in() -> None:
    found = item_texts({"0": {"title": "", "description": ""}}, Path("x"), TD, missing_text="unknown")
    assert found.texts == ["unknown"] and found.weights.tolist() == [[1, 0]]
