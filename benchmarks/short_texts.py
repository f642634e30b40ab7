"""Copy an item file with its descriptions cut at a blank: shorter samples for machines on which every token counts.

python benchmarks/short_texts.py ./data/Office/Office.item.json ./data-short/Office/Office.item.json --length 240
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser
from data import read_items
from flag_values import whole
from utils import UserError, read_json, run_main, write_json


def cut(text: str, length: int) -> str:
    """The words of `text` that fit into `length` characters; the first word is cut if it does not fit."""
    if len(text) <= length:
        return text
    return text[: length + 1].rpartition(" ")[0] or text[:length]


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("source", type=Path, help="an item file")
    parser.add_argument("target", type=Path, help="the item file to write")
    parser.add_argument("--length", type=whole(1), default=240, help="characters of a description")
    options = parser.parse_args(argv)
    if options.target.exists():
        raise UserError(f"{options.target} is there already; delete it or choose another file")
    read_items(options.source)
    items = read_json(options.source)
    short = {
        key: {**item, "description": cut(item["description"], options.length)} if item.get("description") else item
        for key, item in items.items()
    }
    write_json(options.target, short)


if __name__ == "__main__":
    run_main(main)
