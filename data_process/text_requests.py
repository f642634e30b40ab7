"""What a language model is asked for user texts, and how its answers are read: prompts, checks, reviews."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_process.item_texts import clean_text
from data_process.rule_texts import brand_of, categories_of, content_words, without_title
from utils import UserError, read_json

TEXT_KINDS = ("preference", "train", "test")
HELD_OUT = {"preference": 3, "train": 3, "test": 1}  # items at the end that a text of this kind does not look at
NEWEST = 20  # items of a history in a prompt
LONGEST_IN_HISTORY, LONGEST_OF_TARGET, LONGEST_ANSWER = 300, 500, 400  # characters
SYSTEM = "You describe what shoppers want. You answer with one JSON object and nothing else."
PREFERENCES = """These are the items that a user chose, the oldest first:
{history}

What does this user like in general? Write two or three short sentences in the third person, each about one preference.
Answer with JSON: {{"preferences": ["The user …", "The user …"]}}"""
INTENTION = """A user chose this item:
{target}

Write the wish that the user may have had before finding it, in two ways and in the first person:
"user_intention": one or two sentences that start from the user's own situation or need;
"item_intention": one or two sentences that describe the features which the item must have.
Do not write the item's title.
Answer with JSON: {{"user_intention": "…", "item_intention": "…"}}"""


@dataclass(frozen=True)
class Review:
    """What a user wrote about an item; `rating` is None where there is none."""

    text: str
    rating: float | None


@dataclass(frozen=True)
class Sources:
    """What requests are made from: histories, items, and reviews by user in the order of the history."""

    inters: dict[str, list[int]]
    items: list[dict]
    reviews: dict[str, list[Review]]


@dataclass(frozen=True)
class TextRequest:
    """One text to be made: of `user`, one of `TEXT_KINDS`; `key` names model and prompt."""

    user: str
    kind: str
    key: str


def read_reviews(path: Path, inters: dict[str, list[int]]) -> dict[str, list[Review]]:
    """`<D>.review.json`: `{"user": [{"item": int, "text": str, "rating": float or null, "time": int}, …]}`.

    A user's reviews stand in the order of the history, one for each item (an empty text where none was written); a
    "summary", if there is one, comes before the text. Users without reviews may be missing.

    Raises:
        UserError: with file and user, where something else stands there.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f'{path}: must be an object {{"user": [{{"item", "text", "rating", "time"}}, …]}}')
    found = {}
    for user, rows in content.items():
        where = f"{path}: user {user!r}"
        if user not in inters:
            raise UserError(f"{where} is not a user of the interaction file")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{where} must have a list of objects")
        if [row.get("item") for row in rows] != inters[user]:
            raise UserError(f"{where}: the reviews' items must be those of the interaction file, in its order")
        for place, row in enumerate(rows):
            rating = row.get("rating")
            for name in ("text", "summary"):
                if not isinstance(row.get(name) or "", str):
                    raise UserError(f"{where}: {name!r} of review {place} is no text")
            if rating is not None and not (type(rating) in (int, float) and abs(rating) < 1e9):  # nor NaN
                raise UserError(f"{where}: 'rating' of review {place} is neither a number nor null")
        found[user] = [Review(_whole_text(row), row.get("rating")) for row in rows]
    return found


def _whole_text(row: dict) -> str:
    parts = (clean_text(row.get(name) or "") for name in ("summary", "text"))
    return ": ".join(part for part in parts if part)


def requests_of(sources: Sources, model: str) -> Iterator[TextRequest]:
    """Every text that the model is asked for. A user without history before the held-out items gets no preference."""
    for user, items in sources.inters.items():
        for kind in TEXT_KINDS:
            if kind != "preference" or len(items) > HELD_OUT[kind]:
                prompt = f"{model}\0{SYSTEM}\0{prompt_of(sources, user, kind)}"
                yield TextRequest(user, kind, hashlib.sha256(prompt.encode("utf-8", "replace")).hexdigest())


def prompt_of(sources: Sources, user: str, kind: str) -> str:
    """The question for a text: of the history before the held-out items, or of the target alone."""
    items, reviews = sources.inters[user], sources.reviews.get(user)
    end = len(items) - HELD_OUT[kind]
    if kind == "preference":
        places = range(max(0, end - NEWEST), end)
        lines = [_item_line(sources.items[items[place]], reviews[place] if reviews else None) for place in places]
        return PREFERENCES.format(history="\n".join(lines))
    return INTENTION.format(target=_item_block(sources.items[items[end]], reviews[end] if reviews else None))


def _item_line(item: dict, review: Review | None) -> str:
    line = f"- {clean_text(item['title'])}"
    kinds = ", ".join(categories_of(item)[:3])
    line += f" ({kinds})" if kinds else ""
    line += f", rated {review.rating:g}" if review and review.rating is not None else ""
    return line + (f"; the user wrote: {review.text[:LONGEST_IN_HISTORY]}" if review and review.text else "")


def _item_block(item: dict, review: Review | None) -> str:
    facts = {
        "Title": clean_text(item["title"]),
        "Brand": brand_of(item),
        "Categories": ", ".join(categories_of(item)[:5]),
        "Description": clean_text(str(item.get("description") or ""))[:LONGEST_OF_TARGET],
        "The user's rating": f"{review.rating:g}" if review and review.rating is not None else "",
        "The user's review": review.text[:LONGEST_OF_TARGET] if review else "",
    }
    return "\n".join(f"{name}: {fact}" for name, fact in facts.items() if fact)


def parse_answer(answer: str, kind: str, title: str) -> list[str] | None:
    """The texts of an answer, or None where it is malformed.

    The first JSON object counts, whatever stands around it. Preferences: one to five texts; intentions: two. Texts are
    one line, say something and are not endless. In intentions `title`, the target's, is replaced by another word.
    """
    content = _first_object(answer)
    if content is None:
        return None
    if kind == "preference":
        texts = content.get("preferences")
        if not isinstance(texts, list) or not 1 <= len(texts) <= 5:
            return None
    else:
        texts = [content.get("user_intention"), content.get("item_intention")]
    if not all(isinstance(text, str) for text in texts):
        return None
    texts = [clean_text(text).encode("utf-8", "replace").decode() for text in texts]
    if kind != "preference":
        texts = [without_title(text, title) for text in texts]
    good = all(len(content_words(text)) > 1 and len(text) <= LONGEST_ANSWER for text in texts)
    return texts if good else None


def _first_object(answer: str) -> dict[str, Any] | None:
    decoder, start = json.JSONDecoder(), answer.find("{")
    while start >= 0:
        try:
            content, _ = decoder.raw_decode(answer, start)
        except (ValueError, RecursionError):  # no JSON, or a number of thousands of digits
            start = answer.find("{", start + 1)
            continue
        return content
    return None
