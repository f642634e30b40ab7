"""How much each task weighs in the gradient: the mean of each batch (--loss_average batch) against all tokens of a step (token).

    python benchmarks/bench_loss_shares.py                     # Office if ../shared/data/Office is there
    python benchmarks/bench_loss_shares.py --fusion 20000 --model smollm2 --data_path ./data --dataset Mine

A task's share is the weight of its labelled tokens in the loss of an optimiser's step, averaged over steps drawn at random from
the paper's mixture, with the loss on responses alone. No model is trained.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import finetune
from arguments import make_parser, style_flags
from benchmarks.bench_train import make_data_and_base
from collator import encode_samples
from flag_values import SEEDS, whole
from prompt_style import PromptStyle
from tokenising import add_item_tokens, load_tokenizer
from utils import run_main


def lengths(options: argparse.Namespace, folder: Path) -> tuple[list[str], np.ndarray]:
    """The tasks, and for `--samples` random samples of the mixture: task, labelled tokens, all tokens; int64 (samples, 3)."""
    data_path, base = make_data_and_base(options, folder)
    flags = [
        "--data_path",
        str(data_path),
        "--dataset",
        options.dataset,
        "--deepspeed",
        "none",
        "--seed",
        str(options.seed),
    ]
    args = finetune.parse([*flags, "--train_data_sample_num", f"0,0,0,{options.fusion},0,0"])
    data, train_set, _ = finetune.load_datasets(args, PromptStyle.of_flags(**style_flags(args)))
    tokenizer = load_tokenizer(base)
    add_item_tokens(tokenizer, data.item_tokens)
    numbers = np.random.default_rng(options.seed).integers(len(train_set), size=options.samples)
    samples = [train_set[int(number)] for number in numbers]
    rows, shown = encode_samples(tokenizer, [s["prompt"] for s in samples], [s["response"] for s in samples], 2048)
    tasks = [train_set.names.index(sample["task"]) for sample in samples]
    return train_set.names, np.array(
        [[t, len(row) - n, len(row)] for t, row, n in zip(tasks, rows, shown, strict=True)]
    )


def shares(table: np.ndarray, batches: np.ndarray, n_tasks: int) -> np.ndarray:
    """Each task's share if every row of `batches`, samples' numbers (n, samples), has the mean of its own tokens as its loss."""
    weight = np.stack([np.where(table[batches, 0] == t, table[batches, 1], 0).sum(1) for t in range(n_tasks)], axis=1)
    return (weight / weight.sum(1, keepdims=True)).mean(0)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data_path", help="folder that holds <dataset>/ (default: made from ../shared/data/Office)")
    parser.add_argument("--dataset", default="Office")
    parser.add_argument("--model", default="tiny", choices=("tiny", "smollm2"), help="whose tokenizer counts")
    parser.add_argument("--fusion", type=whole(0), default=100_000, help="samples of fusionseqrec an epoch; 0: all")
    parser.add_argument("--batch_size", type=whole(1), default=8, help="samples per process and batch")
    parser.add_argument("--batches", type=whole(1), default=2, help="batches of a step: accumulation times processes")
    parser.add_argument("--samples", type=whole(1), default=64_000, help="samples drawn")
    parser.add_argument("--seed", type=SEEDS, default=42)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        names, table = lengths(options, Path(folder))
    steps = np.arange(len(table) // (options.batch_size * options.batches) * options.batch_size * options.batches)
    steps = steps.reshape(-1, options.batch_size * options.batches)
    batch = shares(table, steps.reshape(-1, options.batch_size), len(names))
    token = shares(table, steps, len(names))
    print("| task | samples | labelled tokens a sample | batch | token |\n| --- | --- | --- | --- | --- |")
    for number, name in enumerate(names):
        own = table[table[:, 0] == number]
        print(
            f"| {name} | {len(own) / len(table):.1%} | {own[:, 1].mean():.1f} | {batch[number]:.3f} | {token[number]:.3f} |"
        )


if __name__ == "__main__":
    run_main(main)
