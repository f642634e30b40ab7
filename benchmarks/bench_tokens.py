"""Tokenising: (a) the tokenizer reads every sample of every epoch; (b) token_store.py puts it together from what it keeps.

    python benchmarks/bench_tokens.py                        # Office if ../shared/data/Office is there
    python benchmarks/bench_tokens.py --model smollm2 --epochs 4
    python benchmarks/bench_tokens.py --data_path ./data --dataset ml-100k     # a dataset with index and user texts

Both make the token ids of the same batches of 8 samples of the six tasks, in turn, batch by batch, on one thread, and must give
the same. Printed for each epoch, which draws templates of its own: the ratio of their CPU times, how many pieces of text (b)
had to tokenise and what share it found in its store; at the end the size of the store on disk and in memory. After the last
epoch the store is opened anew, as a run that is resumed or another with the same data does it, and reads that epoch again.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from arguments import TASKS  # noqa: E402
from benchmarks.bench_train import make_data_and_base  # noqa: E402
from utils import run_main, write_json  # noqa: E402

BATCH = 8


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The benchmark's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", help="folder that holds <dataset>/ (default: made from ../shared/data/Office)")
    parser.add_argument("--dataset", default="Office")
    parser.add_argument("--model", default="tiny", choices=("tiny", "smollm2"), help="whose tokenizer")
    parser.add_argument("--epochs", type=int, default=4, help="epochs before the store is opened anew")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file too")
    return parser.parse_args(argv)


def read_epoch(train: object, order: list[int], tokenizer: object, store: object) -> dict[str, float]:
    """Token ids of all samples in `order`, both ways in turn; CPU seconds of each, and what the store had to tokenise."""
    from collator import encode_samples

    figures = {"texts": 0.0, "a": 0.0, "b": 0.0, "samples": len(order), "tokens": 0}
    tokenised, found = store.tokenised, store.found
    for start in range(0, len(order), BATCH):
        clock = [time.process_time()]
        samples = [train[i] for i in order[start : start + BATCH]]
        texts = [sample["prompt"] for sample in samples], [sample["response"] for sample in samples]
        clock.append(time.process_time())
        anew = encode_samples(tokenizer, *texts, 2048)
        clock.append(time.process_time())
        kept = encode_samples(tokenizer, *texts, 2048, store=store)
        clock.append(time.process_time())
        if anew != kept:
            raise AssertionError(f"the store has other tokens than the tokenizer in one of the samples {samples}")
        figures["tokens"] += sum(map(len, anew[0]))
        for name, before, after in zip(("texts", "a", "b"), clock, clock[1:], strict=False):
            figures[name] += after - before
    figures |= {"tokenised": store.tokenised - tokenised, "found": store.found - found}
    return figures


def line(name: str, figures: dict[str, float]) -> str:
    """An epoch in words."""
    share = figures["found"] / (figures["found"] + figures["tokenised"])
    each = [1e6 * figures[key] / figures["samples"] for key in ("texts", "a", "b")]
    return (
        f"{name}: (a) {each[1]:4.0f} µs a sample, (b) {each[2]:4.0f} µs: {each[1] / each[2]:.2f} x as fast; pieces "
        f"tokenised {figures['tokenised']:7,}, found {share:4.0%}   (making the text: {each[0]:.0f} µs)"
    )


def main(argv: list[str] | None = None) -> None:
    """Make data and tokenizer, then compare."""
    options = parse(argv)
    from data import HistoryFormat, TrainSet, load_data
    from modeling import add_item_tokens, load_tokenizer
    from prompt import load_prompts
    from token_store import TokenStore

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data_path, base = make_data_and_base(options, folder)
        data = load_data(str(data_path), options.dataset, need_users=True)
        tokenizer = load_tokenizer(base)
        add_item_tokens(tokenizer, data.item_tokens)
        train = TrainSet(data, load_prompts(None), [(task, 1, 0) for task in TASKS], HistoryFormat())
        store, rows = TokenStore(tokenizer, folder / "store"), []
        for epoch in range(options.epochs):
            train.set_epoch(epoch)
            order = random.Random(epoch).sample(range(len(train)), len(train))
            rows.append(read_epoch(train, order, tokenizer, store))
            print(line(f"epoch {epoch + 1}", rows[-1]), flush=True)
        places = store._places
        held = sys.getsizeof(places) + sum(sys.getsizeof(key) + sys.getsizeof(place) for key, place in places.items())
        size = sum(path.stat().st_size for path in store.folder.iterdir())
        print(
            f"{rows[0]['samples']:,} samples and {rows[0]['tokens']:,} tokens an epoch; kept: {store.tokenised:,} pieces in "
            f"{size / 1e6:.1f} MB, {held / len(places):.0f} bytes of memory each"
        )
        rows.append(read_epoch(train, order, tokenizer, TokenStore(tokenizer, folder / "store")))
        print(line("opened anew", rows[-1]), flush=True)
        if options.output:
            write_json(options.output, rows)


if __name__ == "__main__":
    run_main(main)
