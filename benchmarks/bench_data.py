"""Raw reviews to a dataset: data_process/from_amazon.py against the plain way, dicts and lists in a Python loop.

    python benchmarks/bench_data.py                              # 200,000 reviews, a minute
    nice python benchmarks/bench_data.py --interactions 10000000 --folder /somewhere/with/20GB

Makes Amazon 2018 files out of nothing (reviews with texts and metadata, gzipped), then runs both ways on them one after the
other, each in a process of its own, and compares what they write. Seconds are wall clock, memory is the process's peak.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from itertools import zip_longest
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser
from data_process.item_texts import clean_text
from flag_values import whole
from utils import UserError, run_main

ROOT = Path(__file__).resolve().parent.parent
WORDS = "a the it works well as described fits my desk and ships fast but one arrived broken not what I hoped".split()


def raw_files(folder: Path, interactions: int, seed: int = 0) -> tuple[Path, Path]:
    """Write `reviews.json.gz` and `meta.json.gz`: users of 8 reviews on average, items of 40, popularity like 1/rank^0.8."""
    rng = np.random.default_rng(seed)
    n_users, n_items = max(20, interactions // 8), max(10, interactions // 40)
    popularity = np.cumsum(np.arange(1, n_items + 1) ** -0.8)
    reviews, metadata = folder / "reviews.json.gz", folder / "meta.json.gz"
    texts = [" ".join(rng.choice(WORDS, size)) for size in rng.integers(10, 140, size=1000)]
    texts[::5] = [text.replace(" and ", " &amp;<br />") for text in texts[::5]]
    with gzip.open(reviews, "wt", compresslevel=1, encoding="utf-8") as file:
        for start in range(0, interactions, 100_000):
            size = min(100_000, interactions - start)
            users = rng.integers(0, n_users, size)
            items = np.searchsorted(popularity, rng.random(size) * popularity[-1])
            times = rng.integers(1_300_000_000, 1_540_000_000, size) // 86_400 * 86_400
            chosen = rng.integers(0, len(texts), size)
            file.writelines(
                f'{{"overall": {5 - u % 3}.0, "verified": true, "reviewerID": "A{u:013d}", "asin": "B{i:09d}", "reviewText": '
                f'"{texts[c]}", "summary": "{texts[c][:30]}", "unixReviewTime": {t}}}\n'
                for u, i, t, c in zip(users.tolist(), items.tolist(), times.tolist(), chosen.tolist(), strict=True)
            )
    with gzip.open(metadata, "wt", compresslevel=1, encoding="utf-8") as file:
        for item in range(n_items):
            entry = {"asin": f"B{item:09d}", "title": f"<b>Thing</b> number {item}", "brand": f"Brand {item % 97}"}
            entry |= {
                "description": [texts[item % 1000], texts[item * 7 % 1000]],
                "category": ["Things", f"Kind {item % 31}"],
            }
            entry["also_buy"] = [f"B{(item * k) % n_items:09d}" for k in range(1, 30)]
            file.write(json.dumps(entry) + "\n")
    return reviews, metadata


def plain(reviews: Path, metadata: Path, folder: Path, dataset: str, k: int = 5) -> None:
    """The same dataset by dicts and lists: every line parsed, everything kept in memory."""
    items = {}
    with gzip.open(metadata, "rt", encoding="utf-8") as file:
        for line in file:
            entry = json.loads(line)
            texts = entry.get("title", ""), " ".join(entry.get("description", [])), entry.get("brand", "")
            items.setdefault(entry["asin"], [*texts, ", ".join(entry.get("category", []))])
    first: dict[str, dict[str, tuple]] = defaultdict(dict)
    with gzip.open(reviews, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file):
            entry = json.loads(line)
            user, item = entry["reviewerID"], entry["asin"]
            if item not in items:
                continue
            texts = entry.get("reviewText", ""), entry.get("summary", "")
            row = (entry["unixReviewTime"], item, number, *texts, entry["overall"])
            if item not in first[user] or row[:3] < first[user][item][:3]:
                first[user][item] = row
    while True:
        counts = Counter(item for rows in first.values() for item in rows)
        kept = {u: {i: row for i, row in rows.items() if counts[i] >= k} for u, rows in first.items()}
        kept = {u: rows for u, rows in kept.items() if len(rows) >= k}
        if sum(map(len, kept.values())) == sum(map(len, first.values())):
            break
        first = kept
    users = {name: number for number, name in enumerate(sorted(kept, key=lambda name: (len(name), name)))}
    names = sorted({item for rows in kept.values() for item in rows}, key=lambda name: (len(name), name))
    numbers = {name: number for number, name in enumerate(names)}
    rows = {str(n): sorted(kept[user].values(), key=lambda row: row[:3]) for user, n in users.items()}
    keys = ("title", "description", "brand", "categories")
    (folder / dataset).mkdir(parents=True)
    stem = folder / dataset / dataset
    with open(f"{stem}.inter.json", "w", encoding="utf-8") as file:
        json.dump({user: [numbers[row[1]] for row in found] for user, found in rows.items()}, file)
    with open(f"{stem}.item.json", "w", encoding="utf-8") as file:
        entries = {str(n): dict(zip(keys, map(clean_text, items[name]), strict=True)) for n, name in enumerate(names)}
        json.dump(entries, file, ensure_ascii=False, indent=1)
    with open(f"{stem}.review.json", "w", encoding="utf-8") as file:
        for user, found in rows.items():  # a user a line: all texts twice would not fit
            texts = [
                {
                    "item": numbers[item],
                    "text": clean_text(text),
                    "rating": rating,
                    "time": when,
                    "summary": clean_text(summary),
                }
                for when, item, _, text, summary, rating in found
            ]
            file.write(f"{{\n {json.dumps(user)}: " if user == "0" else f",\n {json.dumps(user)}: ")
            json.dump(texts, file, ensure_ascii=False)
        file.write("\n}\n")


def measured(command: list[str]) -> tuple[float, float, float]:
    """Seconds, processor seconds and peak memory in GiB of a command. Raises UserError if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"status {process.returncode} from: {' '.join(command)}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def same(left: Path, right: Path) -> bool:
    """Whether two JSON files have one content, compared line by line."""
    with open(left, "rb") as file, open(right, "rb") as other:
        for pair in zip_longest(file, other, fillvalue=b""):
            one, two = (line.strip().removesuffix(b",") for line in pair)
            if one != two and json.loads(b"{%b}" % one) != json.loads(b"{%b}" % two):
                return False
    return True


def run(folder: Path, interactions: int) -> None:
    """Make the files, run both ways, print the table."""
    start = time.perf_counter()
    reviews, metadata = raw_files(folder, interactions)
    size = sum(path.stat().st_size for path in (reviews, metadata)) / 2**30
    print(f"{interactions:,} reviews and metadata: {size:.2f} GiB gzipped, made in {time.perf_counter() - start:.0f} s")
    new = [sys.executable, "data_process/from_amazon.py", "--reviews", str(reviews), "--metadata", str(metadata)]
    new += ["--data_path", str(folder / "new"), "--dataset", "Bench"]
    old = [sys.executable, "benchmarks/bench_data.py", "--plain", str(reviews), str(metadata), str(folder / "old")]
    print("| | seconds | processor seconds | peak memory, GiB |\n| --- | --- | --- | --- |")
    rows = []
    for name, command in (("from_amazon.py", new), ("dicts and lists", old)):
        rows.append(measured(command))
        print(f"| {name} | {rows[-1][0]:.1f} | {rows[-1][1]:.1f} | {rows[-1][2]:.2f} |", flush=True)
    print("| ratio | " + " | ".join(f"{plain / ours:.1f}" for ours, plain in zip(*rows, strict=True)) + " |")
    for kind in ("inter", "item", "review"):
        left, right = (folder / way / f"Bench/Bench.{kind}.json" for way in ("new", "old"))
        print(f"{kind}.json: {'the same' if same(left, right) else 'DIFFERENT'}")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--interactions", type=whole(1), default=200_000, help="reviews in the raw file")
    parser.add_argument("--folder", help="where to put the files (removed afterwards): 2 GB for every million reviews")
    parser.add_argument("--plain", nargs=3, metavar=("REVIEWS", "METADATA", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.plain:
        plain(*map(Path, options.plain), "Bench")
        return
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-data-") as folder:
        run(Path(folder), options.interactions)


if __name__ == "__main__":
    run_main(main)
