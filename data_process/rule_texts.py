"""User texts by rule, without a language model: short sentences from categories, brands, descriptions and titles."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from data_process.item_texts import clean_text

WORD = re.compile(r"[^\W\d_][\w'-]{2,}")
# words that say nothing of an item
COMMON = frozenset(
    "the and for with from that this are was were has have had not but you your our its his her their all any can will "
    "into out off over per one two new set pack each use used using made make than then them they also more most very "
    "when where which who what how why about inch inches movie".split()
)
TITLE_END = re.compile(r"\s[-–—|/]+\s|[,;:(\[|]")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\"'(])")
MAX_QUERY_WORDS = 25
STAND_INS = ("something", "such a thing")  # for a title: at least one of them does not hold it


def content_words(text: str) -> list[str]:
    """The words of a text that say something, lower case, in order, each once."""
    words = (word.lower() for word in WORD.findall(text))
    return list(dict.fromkeys(word for word in words if word not in COMMON))


def categories_of(item: dict) -> list[str]:
    """An item's categories, from a text or a list."""
    value = item.get("categories") or ""
    parts = value if isinstance(value, list) else str(value).split(",")
    return [str(part).strip() for part in parts if str(part).strip()]


def brand_of(item: dict) -> str:
    """An item's brand, or nothing."""
    return str(item.get("brand") or "").strip()


def listed(words: list[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def most_common(names: list[str], count: int) -> list[str]:
    """The `count` most frequent names, at equal numbers the first."""
    return [name for name, _ in Counter(names).most_common(count)]


def title_phrase(item: dict) -> str:
    """What kind of thing a title names: the end of its first part, without the brand and numbers; lower case, 4 words at most.

    `HP 65 Black Ink Cartridge, 2 Pack` → `black ink cartridge`.
    """
    brand = {word.lower() for word in brand_of(item).split()}
    words = [word for word in TITLE_END.split(item["title"].strip())[0].split() if not re.search(r"\d", word)]
    words = [word.lower().strip(".!?'\"`®™*") for word in words if word.lower() not in brand]
    words = [word for word in words if len(word) > 1][-4:]
    while words and (words[0] in COMMON or not re.match(r"\w", words[0])):
        words.pop(0)
    while words and (words[-1] in COMMON or len(words[-1]) < 3):
        words.pop()
    return " ".join(words) if len(words) > 1 or words and len(words[0]) > 3 else ""


def preferences(items: list[dict]) -> list[str]:
    """One to three sentences about what someone with this history likes; titles play a part where categories are lacking."""
    kinds = most_common([kind for item in items for kind in categories_of(item)], 3)
    lately = most_common([kind for item in items[-5:] for kind in categories_of(item)], 2)
    brands = most_common([brand for item in items if (brand := brand_of(item))], 2)
    things = most_common([phrase for item in reversed(items) if (phrase := title_phrase(item))], 3)
    texts = []
    if kinds:
        texts.append(f"The user likes {listed(kinds)}.")
    if lately != kinds[: len(lately)]:
        texts.append(f"Lately the user has chosen {listed(lately)}.")
    if brands:
        texts.append(f"The user often chooses {listed(brands)}.")
    if things and not kinds:
        texts.append(f"The user has been interested in things such as {listed(things)}.")
    return texts or ["The user has no marked preference yet."]


def wish(item: dict, rng: np.random.Generator) -> str:
    """What the target is like, in a few words, at most half of its title's among them.

    The first sentence of its description that keeps to this; else brand, categories and half of the title's words.
    """
    title = content_words(item["title"])
    for sentence in SENTENCE_END.split(clean_text(str(item.get("description") or ""))):
        said = {word.lower() for word in re.findall(r"[\w'-]{3,}", sentence)}
        if "://" not in sentence and len(said) > 2 and len(said.intersection(title)) <= len(title) / 2:
            words = sentence.split()
            return " ".join(words[:MAX_QUERY_WORDS]).rstrip(".,;:") + (" …" if len(words) > MAX_QUERY_WORDS else "")
    half = sorted(rng.choice(len(title), len(title) // 2, replace=False)) if len(title) > 1 else []
    parts = [
        listed(categories_of(item)[:3]),
        f"made by {brand_of(item)}" if brand_of(item) else "",
        f"to do with {listed([title[i] for i in half])}" if half else "",
    ]
    return ", ".join(part for part in parts if part)


def queries(item: dict, history: list[dict], rng: np.random.Generator) -> list[str]:
    """The two wordings of an intention, without the target's title: one starts from the user, one from the item."""
    wanted = wish(item, rng)
    kinds = most_common([kind for old in history for kind in categories_of(old)], 2)
    things = most_common([phrase for old in reversed(history) if (phrase := title_phrase(old))], 2)
    if kinds:
        start = f"I usually go for {listed(kinds)}"
    else:
        start = f"I have been looking at things such as {listed(things)}" if things else "I am looking around"
    texts = [
        f"{start}; now I would like something new" + (f": {wanted}." if wanted else "."),
        f"Please find something like this: {wanted}." if wanted else "Please find something that suits me.",
    ]
    return [without_title(text.replace(" ….", " …"), item["title"]) for text in texts]


def title_pattern(title: str) -> re.Pattern | None:
    """Finds a title in a text, whatever the case and the punctuation between its words; None for a blank one."""
    words = re.findall(r"\w+", title)
    if not words:
        return re.compile(re.escape(title.strip())) if title.strip() else None
    edges = [r"\b" if edge.isascii() else "" for edge in (words[0][0], words[-1][-1])]
    return re.compile(edges[0] + r"[\W_]+".join(map(re.escape, words)) + edges[1], re.IGNORECASE)


def without_title(text: str, title: str) -> str:
    """`text` with a word in place of `title` wherever it stands."""
    pattern = title_pattern(title)
    if pattern is None or not pattern.search(text):
        return text
    stand_in = next(word for word in STAND_INS if not pattern.search(word))
    while pattern.search(text):  # taking one out may put another together
        text = pattern.sub(stand_in, text)
    return text
