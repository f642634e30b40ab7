"""Harder search queries: the same items, no word of an item's title in its queries, in whatever form.

    python benchmarks/hard_queries.py --data_path ./data --dataset Office --target_path ./data-hard

Writes `<target_path>/<D>/<D>.user.json` with other test queries, and links to the dataset's other files beside it, so that
`test.py --data_path <target_path>` tests on them. A word goes if it and a content word of the title (three letters or more)
have the same stem (`same_stem`). What is left still comes from the item's own description where the texts were made by rule. A
user with a wording of which nothing is left is left out by test.py, which counts them; others may be asked their other wording,
since that is drawn by a sample's number.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser
from data import read_inters, read_items, read_users
from data_process.rule_texts import content_words
from folders import new_folder
from utils import read_json, run_main, say, write_json

PARTS = re.compile(r"[^\W_]{2,}")  # of a word with hyphens each part; digits too: model numbers name an item


def same_stem(word: str, other: str) -> bool:
    """True if the words are equal or forms of one: they share their beginning up to the last three letters, at least three."""
    short, long = sorted((word.lower(), other.lower()), key=len)
    shared = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    return short == long or (shared >= 3 and shared >= len(long) - 3)


def without_title(query: str, title: str) -> str:
    """`query` without the words of `title`; "" if no content word is left."""
    names = PARTS.findall(" ".join(content_words(title)))

    def kept(word: str) -> bool:
        return not any(same_stem(part, name) for part in PARTS.findall(word) for name in names)

    text = " ".join(word for word in query.split() if kept(word))
    return text if content_words(text) else ""


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data_path", default="./data", help="folder that holds <dataset>/")
    parser.add_argument("--dataset", required=True, help="name of the dataset")
    parser.add_argument("--target_path", required=True, type=Path, help="folder to write <dataset>/ to")
    options = parser.parse_args(argv)
    source, target = Path(options.data_path) / options.dataset, options.target_path / options.dataset
    titles, _ = read_items(source / f"{options.dataset}.item.json")
    users = source / f"{options.dataset}.user.json"
    found = read_users(
        users, read_inters(source / f"{options.dataset}.inter.json", len(titles)), len(titles), ("test",)
    )
    content = read_json(users)
    changed = 0
    for user, intention in found.intentions["test"].items():
        harder = [without_title(query, titles[intention.item]) for query in intention.queries]
        changed += harder != list(intention.queries)
        content["user_vague_intention"]["test"][user]["querys"] = harder
    with new_folder(target) as partial:
        for path in sorted(source.glob(f"{options.dataset}.*")):
            if path.name != users.name:
                (partial / path.name).symlink_to(path.resolve())
        write_json(partial / users.name, content, indent=1)
    say(f"{target}: {changed:,} of {len(found.intentions['test']):,} users have other queries")


if __name__ == "__main__":
    run_main(main)
