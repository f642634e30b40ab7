"""Item search: a model beside BM25 and nearest sentence embeddings, on the same queries and the same items, in one table.

    python benchmarks/search.py --data_path ./data --dataset Office --results tiny=./results/search.json   (benchmarks/search.sh)

The queries are those of `test.py --test_task ItemSearch` with the same `--seed`: one of a user's two wordings. The references see
the query alone and rank all items: BM25 (bm25s, English stop words) over the words of titles and descriptions, or of titles
alone, and the cosine of mean-pooled MiniLM vectors of query and item (`<D>.emb-minilm-td.npy`). A model's line is computed from
the predictions beside its results file; all lines are of the samples that the first of these has.
"""

from __future__ import annotations

import sys
from pathlib import Path

import bm25s
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import add_dataset, make_parser
from data import RecData, load_data
from data_process.encoder import encode, load_encoder, longest_input
from data_process.fetch import fetch
from data_process.rule_texts import content_words
from flag_values import SEEDS
from metrics.ranking import means, rank_of
from quiet import silence_libraries
from reading import read_array
from results import predictions_of, read_predictions
from samples import TestSet
from tasks import TASKS, HistoryFormat
from utils import UserError, run_main, say

METRIC_NAMES = "hit@1,hit@5,hit@10,ndcg@5,ndcg@10"
DEPTH = 20


def bm25_lists(texts: list[str], queries: list[str]) -> np.ndarray:
    """The `DEPTH` best of `texts` for each query, best first: int (queries, DEPTH)."""
    engine = bm25s.BM25()
    engine.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    words = bm25s.tokenize(queries, stopwords="en", show_progress=False)
    return engine.retrieve(words, k=min(DEPTH, len(texts)), show_progress=False).documents


def nearest_lists(vectors: np.ndarray, queries: list[str]) -> np.ndarray:
    """As `bm25_lists`, by the cosine to the items' MiniLM `vectors`, float (items, dim)."""
    tokenizer, model = load_encoder(str(fetch("minilm")), "cpu", "float32")
    found = encode(queries, tokenizer, model, max_len=longest_input(model, 256), batch_size=32)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.argsort(-(found @ unit.T), axis=1, kind="stable")[:, :DEPTH]


def model_ranks(path: str, targets: dict[int, int]) -> dict[int, int]:
    """The target's rank of each sample, from the predictions beside a results file.

    Raises:
        UserError: they are of other queries, or of several prompts.
    """
    predictions = predictions_of(Path(path))
    ranks: dict[int, int] = {}
    for record in read_predictions(predictions):
        if record["sample"] in ranks:
            raise UserError(f"{predictions}: several prompts; test with a single one of --test_prompt_ids")
        if targets.get(record["sample"]) != record["target_item"]:
            raise UserError(
                f"{predictions}: sample {record['sample']} is of another item; is it of ItemSearch and this data?"
            )
        ranks[record["sample"]] = rank_of(record["target"], record["items"])
    return ranks


def own_words(data: RecData, samples: TestSet, numbers: list[int]) -> str:
    """How much of the queries is in their item's own text."""
    with_title, shares = 0, []
    for number in numbers:
        sample = samples[number]
        query = set(content_words(sample.slots["query"]))
        title = set(content_words(data.titles[sample.target]))
        text = title | set(content_words(data.descriptions[sample.target]))
        with_title += bool(query & title)
        shares.append(len(query & text) / max(1, len(query)))
    alone = sum(share == 0 for share in shares)
    return (
        f"{with_title / len(numbers):.0%} of the queries have a word of their item's title; "
        f"of a query's words {np.mean(shares):.0%} are in title or description; {alone:,} queries have none of their item's words"
    )


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add_dataset(parser)
    parser.add_argument("--seed", type=SEEDS, default=42, help="that of test.py: it draws the wording")
    parser.add_argument(
        "--results", nargs="*", default=[], metavar="NAME=FILE", help="models: a line's name and a results file"
    )
    options = parser.parse_args(argv)
    silence_libraries()
    parts = TASKS["itemsearch"].splits["test"].user_parts
    data = load_data(options.data_path, options.dataset, options.index_file, parts)
    samples = TestSet(data, "itemsearch", HistoryFormat(), seed=options.seed)
    targets = {number: samples[number].target for number in range(len(samples))}
    models = {}
    for row in options.results:
        name, named_so, path = row.partition("=")
        if not (name and named_so) or name in models:
            raise UserError(f"--results {row}: must be NAME=FILE, each with a name of its own")
        models[name] = model_ranks(path, targets)
    numbers = sorted(next(iter(models.values()), targets))
    queries = [samples[number].slots["query"] for number in numbers]
    texts = [f"{title}. {description}" for title, description in zip(data.titles, data.descriptions, strict=True)]
    vectors = read_array(data.folder / f"{data.name}.emb-minilm-td.npy")
    lists = {
        "BM25, titles and descriptions": bm25_lists(texts, queries),
        "BM25, titles alone": bm25_lists(data.titles, queries),
        "nearest MiniLM embedding": nearest_lists(vectors, queries),
    }
    rows = {
        name: [rank_of(targets[number], found.tolist()) for number, found in zip(numbers, table, strict=True)]
        for name, table in lists.items()
    }
    for name, ranks in models.items():
        if missing := [number for number in numbers if number not in ranks]:
            raise UserError(f"{name}: sample {missing[0]} was not tested; test all models on the same samples")
        rows[name] = [ranks[number] for number in numbers]
    say(f"{data.folder}: {len(numbers):,} queries, {len(data.titles):,} items; {own_words(data, samples, numbers)}")
    scores = {name: means(ranks, METRIC_NAMES) for name, ranks in rows.items()}
    say("| | " + " | ".join(METRIC_NAMES.split(",")) + " |\n| --- |" + " --- |" * len(METRIC_NAMES.split(",")))
    for name, values in scores.items():
        say(f"| {name} | " + " | ".join(f"{value:.4f}" for value in values.values()) + " |")


if __name__ == "__main__":
    run_main(main)
