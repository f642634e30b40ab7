"""User texts by rule, by hand-made examples: parts and targets, words, and titles that never stand in their own query."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_process import user_texts
from data_process.rule_texts import preferences, queries, title_pattern, title_phrase, wish, without_title

ITEMS = [
    {"title": f"Thing {word}", "description": f"Some {word} text here.", "brand": brand, "categories": kind}
    for word, brand, kind in [
        ("apple", "Acme", "Fruit"),
        ("banana", "Acme", "Fruit"),
        ("carrot", "Root", "Vegetable"),
        ("potato", "Root", "Vegetable"),
        ("quince", "Tree", "Rare"),
    ]
]


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_parts_targets_and_histories():
    content = user_texts.user_texts({"7": [0, 1, 2, 3, 4]}, ITEMS, seed=1)
    assert content["user_explicit_preference"]["7"] == [
        "The user likes Fruit.",
        "The user often chooses Acme.",
    ]
    rows = content["user_vague_intention"]
    assert (rows["train"]["7"]["item"], rows["train"]["7"]["inters"]) == (2, [0, 1])
    assert (rows["test"]["7"]["item"], rows["test"]["7"]["inters"]) == (4, [0, 1, 2, 3])
    assert rows["test"]["7"]["querys"] == [
        "I usually go for Fruit and Vegetable; now I would like something new: Some quince text here.",
        "Please find something like this: Some quince text here.",
    ]
    assert content == user_texts.user_texts({"7": [0, 1, 2, 3, 4]}, ITEMS, seed=1)


@pytest.mark.parametrize(
    ("title", "brand", "phrase"),
    [
        ("HP 65 Black Ink Cartridge, 2 Pack", "HP", "black ink cartridge"),
        ("AmazonBasics 6-Sheet Cross-Cut Paper and Credit Card Shredder", "AmazonBasics", "credit card shredder"),
        ("Wilson Jones Basic View Binder, Round Ring", "Wilson Jones", "basic view binder"),
        ("Heat, The", "", "heat"),
        ("Stapler - Red", "", "stapler"),
        ("Ink Refill Pack of 6", "", "ink refill"),
        ("2010", "", ""),
    ],
)
def test_what_kind_of_thing_a_title_names(title, brand, phrase):
    assert title_phrase({"title": title, "brand": brand}) == phrase


def test_a_wish_tells_half_of_a_title_at_most():
    bare = {"title": "Heavy Duty Steel Stapler", "description": "", "brand": "", "categories": ""}
    told = wish(bare, rng())
    assert told.startswith("to do with ") and sum(w in told for w in ("heavy", "duty", "steel", "stapler")) == 2
    repeated = bare | {"description": "Heavy Duty Steel Stapler. It binds forty sheets at a time. Made to last."}
    assert wish(repeated, rng()) == "It binds forty sheets at a time"
    assert wish(bare | {"brand": "Acme", "categories": "Office, Desk"}, rng()).startswith(
        "Office and Desk, made by Acme"
    )
    long = wish(bare | {"description": " ".join(f"word{i}" for i in range(40))}, rng())
    assert long.split()[-2:] == ["word24", "…"]


def test_preferences_tell_what_is_new_lately():
    assert preferences([*ITEMS[:2] * 4, *ITEMS[2:4] * 3]) == [
        "The user likes Fruit and Vegetable.",
        "Lately the user has chosen Vegetable.",
        "The user often chooses Acme and Root.",
    ]
    bare = [{"title": "Red Gel Pens, 12 Pack"}, {"title": "Paper Clips"}]
    assert preferences(bare) == ["The user has been interested in things such as paper clips and red gel pens."]


def test_nothing_to_tell_is_still_a_sentence():
    empty = {"title": "X", "description": ""}
    assert queries(empty, [], rng()) == [
        "I am looking around; now I would like something new.",
        "Please find something that suits me.",
    ]
    assert preferences([]) == ["The user has no marked preference yet."]


@pytest.mark.parametrize(
    ("text", "title", "mended"),
    [
        ("I want a red pen now.", "Red Pen", "I want a something now."),
        ("I want the red-pen: RED  PEN!", " Red Pen. ", "I want the something: something!"),
        ("Interested in it", "Ed", "Interested in it"),
        ("Something else", "Something", "such a thing else"),
        ("我要红笔谢谢", "红笔", "我要something谢谢"),
        ("a a b b c", "a b", "a something b c"),
        ("what?!", "?!", "whatsomething"),
        ("free", "", "free"),
    ],
)
def test_a_title_is_taken_out(text, title, mended):
    assert without_title(text, title) == mended


@given(st.text(alphabet="ab .!é笔", max_size=30), st.text(alphabet="ab .!é笔", min_size=1, max_size=6))
def test_no_title_is_left(text, title):
    pattern = title_pattern(title)
    assert pattern is None or not pattern.search(without_title(text, title))


def test_no_query_by_rule_holds_its_title():
    """Also where the description is the title, and where the user had the same item before."""
    items = [
        {"title": "Blue Pen", "description": "Blue Pen writes in blue, and the Blue Pen is cheap and it is reliable."},
        {"title": "Red Pen", "description": "Red pen", "brand": "Red Pen", "categories": ["Red Pen", "Pens"]},
    ]
    content = user_texts.user_texts({"u": [0, 1, 0, 1, 0, 1], "v": [1, 0, 0, 0]}, items, seed=3)
    for part in content["user_vague_intention"].values():
        for row in part.values():
            assert items[row["item"]]["title"].lower() not in json.dumps(row["querys"]).lower()
