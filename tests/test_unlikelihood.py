"""The second term of the loss against a plain loop over samples, items and earlier items."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from record_batches import record
from test_loss_average import check_log, flags, train_by_hand, world  # noqa: F401 (a fixture)

import finetune
from collator import IGNORE, pack, pad
from unlikelihood import Unlikelihood

ITEMS = {1: [(i,) for i in range(10, 16)], 2: [(a, b) for a in (10, 11, 12) for b in (20, 21, 22)]}
ITEMS[3] = [(10, 20, 30), (10, 20, 31), (10, 21, 30), (11, 20, 30), (11, 20, 32)]
ITEMS[4] = [(10, 20), (10, 21), (11, 22, 30), (11, 22, 31)]  # of different lengths


def by_hand(ids: list[int], labels: list[int], logits: torch.Tensor, items: list[tuple[int, ...]]) -> torch.Tensor:
    """Of one sample's labelled tokens; `logits` has a row for each of them."""
    terms = [logits.new_zeros(0)]
    for place in range(1, len(ids)):
        if labels[place] == IGNORE:
            continue
        shares = logits[len(terms) - 1].softmax(-1)
        unlikely = set()
        for item in items:
            if len(item) > place + 1 or tuple(ids[place + 1 - len(item) : place + 1]) != item:
                continue
            for end in range(len(item), place + 1):
                earlier = tuple(ids[end - len(item) : end])
                if earlier in items and earlier[:-1] == item[:-1]:
                    unlikely.add(earlier[-1])
        terms.append(-torch.log(1 - shares[sorted(unlikely - {ids[place]})].sum())[None])
    return torch.cat(terms)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", ITEMS)
def test_as_by_hand(kind: int, packed: bool):
    draw, items = random.Random(kind), ITEMS[kind]
    term = Unlikelihood(items, 2.0)
    seen = 0
    for _ in range(20):
        rows: list[list[int]] = []
        for _ in range(draw.randrange(1, 5)):
            words = [[draw.randrange(1, 9)] if draw.random() < 0.2 else [*draw.choice(items)] for _ in range(12)]
            rows.append(sum(words, []))
        labels = [[IGNORE if draw.random() < 0.3 else token for token in row] for row in rows]
        if packed:
            batch: dict[str, Any] = pack(rows, labels, 8)
        else:
            batch = {"input_ids": pad(rows, 0), "labels": pad(labels, IGNORE)}
        targets = batch["labels"][:, 1:][batch["labels"][:, 1:] != IGNORE]
        logits = (3 * torch.randn(len(targets) + 5, 40)).requires_grad_()  # rows of no meaning follow
        losses = F.cross_entropy(logits[: len(targets)], targets, reduction="none")
        mine, wanted = term(batch, logits, losses), []
        for row, label in zip(rows, labels, strict=True):
            wanted += by_hand(row, label, logits[len(wanted) :], items).tolist()
        assert mine.tolist() == pytest.approx([2 * each for each in wanted], rel=1e-3, abs=1e-4)
        seen += sum(each > 0 for each in wanted)
    assert seen > 50


@pytest.mark.parametrize("packing", [[], ["--packing"]], ids=["padded", "packed"])
def test_training(world: Path, packing: list[str]):  # noqa: F811
    index = {str(i): [f"<a_{i % 3}>", f"<b_{i // 3}>"] for i in range(30)}
    (world / "data/Toy/Toy.index.json").write_text(json.dumps(index))
    run = finetune.prepare(finetune.parse(flags(world, 2, *packing, "--unlikelihood", "200")))
    model, batches = copy.deepcopy(run.model), record(run)
    other = copy.deepcopy(model)
    run.trainer.train()
    items = [tuple(run.tokenizer.convert_tokens_to_ids(list(index))) for index in run.data.indices]

    def term(whole: list[int], shown: int, logits: torch.Tensor) -> torch.Tensor:
        return 200 * by_hand(whole, [IGNORE] * shown + whole[shown:], logits, items)

    wanted = train_by_hand(model, run.tokenizer, [batches], 2, "batch", term=term)
    assert wanted[0][0] > 1.001 * train_by_hand(other, run.tokenizer, [batches], 2, "batch")[0][0]
    check_log(run.trainer.state.log_history, wanted)
