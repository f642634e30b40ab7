"""Raw Amazon reviews (2018 or 2023) to the dataset files of this repository.

    python data_process/from_amazon.py --reviews Video_Games_5.json.gz --metadata meta_Video_Games.json.gz \\
        --data_path ./data --dataset Games --user_k 5 --item_k 5
    python data_process/from_amazon.py --input_path ./raw --output_path ./data --dataset Games --st_year 2016 --st_month 10

The edition is told by the files themselves: 2018 comes as ratings CSV (item,user,rating,timestamp, no header) or review JSON
lines, 2023 as JSON lines or CSV with a header; all may be gzipped. With review files the texts are kept in `<D>.review.json`.
`--input_path` looks for the files below a folder by the dataset's Amazon name. What is kept, and in which order:
data_process/prepare.py.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import polars as pl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser
from data_process.prepare import Frames, add_flags, check_name, prepare
from data_process.raw_files import TEXT, TEXTS, BadLines, Layout, first_line, json_lines, kind_of, separated
from utils import UserError, run_main, say

# ours → Amazon's, by edition; `parent_asin` joins the variants of a product, and the 2023 metadata have one entry for them
EVENT = ("user", "item", "time", "rating", "review", "summary")
REVIEWS = {
    "2018": dict(zip(EVENT, "reviewerID asin unixReviewTime overall reviewText summary".split(), strict=True)),
    "2023": dict(zip(EVENT, "user_id parent_asin timestamp rating text title".split(), strict=True)),
}
RATING = ("item", "user", "rating", "time")
RATINGS = {
    "2018": dict(zip(RATING, RATING, strict=True)),  # no header
    "2023": dict(zip(RATING, "parent_asin user_id rating timestamp".split(), strict=True)),
}
ITEM = ("item", "title", "description", "features", "brand", "categories")
METADATA = {
    "2018": dict(zip(ITEM, "asin title description feature brand category".split(), strict=True)),
    "2023": dict(zip(ITEM, "parent_asin title description features store categories".split(), strict=True)),
}
LISTS = ("description", "features", "categories")
SCRIPT = "getTime"  # titles of some 2018 entries are the page's script: no title
FULL_NAMES = {
    "Games": "Video_Games",
    "Arts": "Arts_Crafts_and_Sewing",
    "Instruments": "Musical_Instruments",
    "Office": "Office_Products",
    "Beauty": "All_Beauty",
    "Toys": "Toys_and_Games",
    "Sports": "Sports_and_Outdoors",
    "Pet": "Pet_Supplies",
    "Scientific": "Industrial_and_Scientific",
    "Pantry": "Prime_Pantry",
}


def edition(path: Path, fields: dict[str, dict[str, str]]) -> str:
    """2018 or 2023, by the fields of the first 100 objects of a JSON file. Raises UserError if it is neither."""
    names = {year: (columns["item"], columns.get("user", columns["item"])) for year, columns in fields.items()}
    schema = {name: TEXT for pair in names.values() for name in pair}
    head = next(json_lines(path, schema, BadLines()), pl.DataFrame(schema=schema)).head(100)
    for year in ("2023", "2018"):  # 2023 has an asin too
        if head.height and all(head[name].null_count() < head.height for name in names[year]):
            return year
    wanted = " nor ".join(f"{' and '.join(dict.fromkeys(pair))} ({year})" for year, pair in names.items())
    raise UserError(f"{path}: neither {wanted} stands in its first lines; is it Amazon's JSON, one object a line?")


def is_json(path: Path) -> bool:
    """Whether the file starts as JSON does. Raises UserError for an empty file."""
    start = first_line(path).lstrip()
    if not start:
        raise UserError(f"{path}: line 1 is empty")
    return start.startswith((b"{", b"["))


def review_frames(paths: list[Path], with_texts: bool, bad: BadLines) -> Frames:
    """user, item, time, rating and, with texts, review and summary of review or rating files of either edition."""
    for path in paths:
        if is_json(path):
            year = edition(path, REVIEWS)
            say(f"{path}: Amazon {year}, reviews")
            ours = {
                name: field for name, field in REVIEWS[year].items() if with_texts or name not in ("review", "summary")
            }
            frames = json_lines(path, dict.fromkeys(ours.values(), TEXT), bad)
            for frame in frames:
                yield path, frame.select("line", **{name: pl.col(field) for name, field in ours.items()})
        else:
            yield from rating_frames(path, bad)


def rating_frames(path: Path, bad: BadLines) -> Frames:
    """user, item, time and rating of a ratings CSV of either edition."""
    head = next(csv.reader([first_line(path).decode("utf-8", errors="replace")]))
    year = "2023" if "user_id" in head else "2018"
    if year == "2018" and len(head) != 4:
        raise UserError(f"{path}: line 1 has {len(head)} fields; Amazon's ratings have item,user,rating,timestamp")
    say(f"{path}: Amazon {year}, ratings")
    layout = Layout(names=RATING if year == "2018" else None)
    for frame in separated(path, list(RATINGS[year].values()), layout, bad):
        yield path, frame.select("line", **{name: pl.col(field) for name, field in RATINGS[year].items()})


def metadata_frames(paths: list[Path], bad: BadLines) -> Frames:
    """item, title, description (or else the features), brand and categories of metadata of either edition."""
    for path in paths:
        year = edition(path, METADATA)
        say(f"{path}: Amazon {year}, metadata")
        names = METADATA[year]
        fields = {field: TEXTS if name in LISTS else TEXT for name, field in names.items()}
        for frame in json_lines(path, fields, bad):
            column = {name: pl.col(field) for name, field in names.items()}
            description, features = (_joined(column[name], " ") for name in ("description", "features"))
            yield (
                path,
                frame.select(
                    "line",
                    item=column["item"],
                    title=pl.when(~column["title"].str.contains(SCRIPT)).then(column["title"]),
                    description=pl.when(description.str.strip_chars() != "").then(description).otherwise(features),
                    brand=column["brand"],
                    categories=_joined(column["categories"], ", "),
                ),
            )


def _joined(texts: pl.Expr, separator: str) -> pl.Expr:
    return texts.list.join(separator, ignore_nulls=True)


def find_files(folder: Path, dataset: str) -> tuple[list[Path], Path]:
    """Reviews and metadata of a dataset below a folder, by its Amazon name: review texts rather than ratings alone.

    Raises:
        UserError: none, or more than one, is there.
    """
    name = FULL_NAMES.get(dataset, dataset)
    stems = {f"meta_{name}": "metadata", f"{name}_5": "reviews", name: "reviews"}
    found: dict[str, list[Path]] = {stem: [] for stem in stems}
    for path in sorted(folder.rglob(f"*{name}*")):
        stem = path.name.partition(".")[0]
        if stem in stems and kind_of(path) in ("jsonl", "csv"):
            found[stem].append(path)
    metadata = found[f"meta_{name}"]
    reviews = found[f"{name}_5"] or found[name]
    reviews = [path for path in reviews if kind_of(path) == "jsonl"] or reviews
    for what, paths, flag in (("reviews", reviews, "--reviews"), ("metadata", metadata, "--metadata")):
        if len(paths) != 1:
            shown = (
                f": {', '.join(map(str, paths))}"
                if paths
                else f" such as {'meta_' * (what == 'metadata')}{name}.json.gz"
            )
            raise UserError(f"{folder}: has {len(paths) or 'no'} files of {what}{shown}; name one with {flag}")
    return reviews, metadata[0]


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--reviews", nargs="+", metavar="FILE", type=Path, help="review or rating files, of one edition"
    )
    parser.add_argument("--metadata", nargs="+", metavar="FILE", type=Path, help="metadata files")
    parser.add_argument("--input_path", type=Path, help="folder to look for both in, by the dataset's name")
    add_flags(parser, "the dataset's name; with --input_path Amazon's (Video_Games) or a short one (Games)")
    options = parser.parse_args(argv)
    reviews, metadata = options.reviews, options.metadata
    if (not reviews or not metadata) and options.input_path:
        found = find_files(options.input_path, check_name(options.dataset))
        reviews, metadata = reviews or found[0], metadata or [found[1]]
    if not reviews or not metadata:
        raise UserError("name the files with --reviews and --metadata, or their folder with --input_path")
    texts = [is_json(path) for path in reviews]
    if any(texts) != all(texts):
        raise UserError("--reviews: give review files or rating files, not both: an interaction would come twice")
    bad = BadLines()
    prepare(
        interactions=review_frames(reviews, all(texts), bad),
        items=metadata_frames(metadata, bad),
        inputs=[*reviews, *metadata],
        step="data_process/from_amazon.py",
        options=options,
        bad=bad,
    )


if __name__ == "__main__":
    run_main(main)
