"""Write `<D>.user.json`, the preferences and intentions that itemsearch and preferenceobtain need, from the item texts.

    python data_process/user_texts.py --data_path ./data --dataset ml-100k

Made by rule, without a language model: a user's preferences are told from the categories, brands and title words that are
frequent in the history (`items[:-3]`); an intention is worded from the target's own description, brand and categories,
never from its whole title. `made_by` in the file says so. The paper had these texts written by GPT-3.5 (section III-C).
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser  # noqa: E402
from data import read_inters, read_items  # noqa: E402
from utils import UserError, read_json, run_main, say, write_json  # noqa: E402

WORD = re.compile(r"[^\W\d_][\w'-]{2,}")
# words that say nothing of an item
COMMON = frozenset(
    "the and for with from that this are was were has have had not but you your our its his her their all any can will "
    "into out off over per one two new set pack each use used using made make than then them they also more most very "
    "when where which who what how why about inch inches movie".split()
)
MAX_QUERY_WORDS = 12


def content_words(text: str) -> list[str]:
    """The words of a text that say something, lower case, in order, each once."""
    words = (word.lower() for word in WORD.findall(text))
    return list(dict.fromkeys(word for word in words if word not in COMMON))


def categories_of(item: dict) -> list[str]:
    """An item's categories, from a text or a list."""
    value = item.get("categories") or ""
    parts = value if isinstance(value, list) else str(value).split(",")
    return [str(part).strip() for part in parts if str(part).strip()]


def listed(words: list[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def preferences(items: list[dict]) -> list[str]:
    """Up to three texts about what someone with this history likes; at least one."""
    kinds = Counter(kind for item in items for kind in categories_of(item))
    brands = Counter(brand for item in items if (brand := str(item.get("brand") or "").strip()))
    words = Counter(word for item in items for word in content_words(item["title"]))
    texts = []
    if kinds:
        texts.append(f"The user likes {listed([kind for kind, _ in kinds.most_common(3)])}.")
    if brands:
        texts.append(f"The user often chooses items by {listed([brand for brand, _ in brands.most_common(2)])}.")
    if words:
        texts.append(f"The user is interested in {listed([word for word, _ in words.most_common(4)])}.")
    return texts or ["The user has no marked preference yet."]


def item_words(item: dict, rng: np.random.Generator) -> str:
    """What the target is like in its own words, never with its whole title.

    From the description if there is one; else from brand, categories and at most half of the title's words, sorted.
    """
    title = content_words(item["title"])
    words = [word for word in content_words(item.get("description") or "") if word not in title]
    if len(words) < 2:
        words = content_words(" ".join([str(item.get("brand") or ""), *categories_of(item)]))
        half = len(title) // 2
        chosen = rng.choice(len(title), half, replace=False) if half else []
        words = list(dict.fromkeys(words + sorted(title[i] for i in chosen)))
    years = re.findall(r"\b(?:19|20)\d\d\b", item.get("description") or "")[:1]
    text = " ".join(years + words[:MAX_QUERY_WORDS])
    whole = item["title"].lower().strip()
    return text.lower().replace(whole, "").strip() if whole and whole in text.lower() else text


def queries(item: dict, history: list[dict], rng: np.random.Generator) -> list[str]:
    """The two wordings of an intention: one that starts from the user, one from the item."""
    words = item_words(item, rng) or "something new"
    kinds = [kind for kind, _ in Counter(kind for old in history for kind in categories_of(old)).most_common(2)]
    likes = f"As someone who enjoys {listed(kinds)}, I" if kinds else "I"
    short = " ".join(words.split()[:6])
    return [f"{likes} would now like something with {short}.", f"Looking for: {words}."]


def user_texts(inters: dict[str, list[int]], items: list[dict], seed: int) -> dict:
    """The content of `<D>.user.json` (README, "Files")."""
    content: dict = {
        "made_by": {"program": "data_process/user_texts.py", "method": "rule", "seed": seed},
        "user_explicit_preference": {},
        "user_vague_intention": {"train": {}, "test": {}},
    }
    for number, (user, history) in enumerate(inters.items()):
        entries = [items[i] for i in history]
        content["user_explicit_preference"][user] = preferences(entries[:-3])
        for split, position in (("train", len(history) - 3), ("test", len(history) - 1)):
            rng = np.random.default_rng([seed, number, position])
            content["user_vague_intention"][split][user] = {
                "item": history[position],
                "inters": history[:position],
                "querys": queries(entries[position], entries[:position], rng),
            }
    return content


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data_path", default="./data", help="folder that holds <dataset>/")
    parser.add_argument("--dataset", required=True, help="name of the dataset")
    parser.add_argument("--seed", type=int, default=42, help="seed of the choice of title words")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    options = parser.parse_args(argv)
    stem = Path(options.data_path) / options.dataset / options.dataset
    target = Path(f"{stem}.user.json")
    if target.exists() and not options.overwrite:
        raise UserError(f"{target} is there already; --overwrite replaces it")
    titles, _ = read_items(Path(f"{stem}.item.json"))
    inters = read_inters(Path(f"{stem}.inter.json"), len(titles))
    entries = read_json(f"{stem}.item.json")
    content = user_texts(inters, [entries[str(i)] for i in range(len(entries))], options.seed)
    write_json(target, content, indent=1)
    say(f"{target}: preferences and intentions of {len(inters):,} users, made by rule")


if __name__ == "__main__":
    run_main(main)
