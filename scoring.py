"""Prompts in, ranked items out: batches, memory, progress. What test.py, test_ddp.py and recommend.py have in common.

The prompts are sorted by length and cut into batches before these are dealt out, so the numbers do not depend on how many
processes there are.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from beam_rows import PrefixCache
from collator import encode_prompts, pad
from decoding import beam_search
from metrics.ranking import means, rank_of
from processes import on_main
from trie import ItemTrie
from utils import UserError, is_main, is_out_of_memory, rank, say, world_size

# How many prompts `--test_batch_size auto` takes on the CPU, where more bring no more speed.
CPU_BATCH = 32


@dataclass
class Scorer:
    """A model with the items' trie: prompts in, ranked items out.

    Args:
        trie: the items' indices (`modeling.item_trie`).
        num_beams: beams, and items of a list.
        batch_size: prompts decoded together, or "auto".
    """

    model: Any
    tokenizer: Any
    trie: ItemTrie
    num_beams: int
    batch_size: int | str = 1

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.trie.to(self.device)
        self.prefix: PrefixCache | None = None
        self.largest: int | None = None  # prompts that fit the memory, once too many did not
        self.free = on_main(self._free_memory) if self.batch_size == "auto" else 0

    def score(self, texts: list[str], wanted: set[int]) -> Iterator[tuple[list[int], list[tuple[list, list]]]]:
        """Decode this process's share of `texts`, batch by batch.

        Args:
            wanted: positions in `texts` that still lack a result. A batch is decoded whole if any of its texts does.

        Yields:
            positions in `texts`, and for each its items, best first, and their scores.
        """
        ids = encode_prompts(self.tokenizer, texts)
        self.share(ids)
        check_length(self.model, max(map(len, ids)) + self.trie.levels)
        batches = [batch for batch in self.batches(ids) if not wanted.isdisjoint(batch)]
        for batch in batches[rank() :: world_size()]:
            items, scores = self.decode([ids[n] for n in batch])
            yield batch, list(zip(items, scores, strict=True))

    def batches(self, ids: list[list[int]]) -> list[list[int]]:
        """Positions in `ids`, longest first, in batches of prompts of similar length."""
        order = sorted(range(len(ids)), key=lambda n: (-len(ids[n]), n))
        size = self.auto_size(len(ids[order[0]])) if self.batch_size == "auto" else int(self.batch_size)
        return [order[start : start + size] for start in range(0, len(order), size)]

    def share(self, ids: list[list[int]]) -> None:
        """Read what all of `ids` begin with, once for all of their batches."""
        common = os.path.commonprefix(ids)[: min(map(len, ids)) - 1]
        self.prefix = PrefixCache(self.model, common) if common else None

    def _free_memory(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0

    def auto_size(self, longest: int) -> int:
        """How many prompts of `longest` tokens fit the memory that is free on the main process's GPU."""
        if self.device.type == "cpu":
            return CPU_BATCH
        config = self.model.config.get_text_config()
        width, layers, size = config.hidden_size, config.num_hidden_layers, self.model.dtype.itemsize
        cache = 2 * layers * (longest + self.num_beams * self.trie.levels) * width * size  # as if no heads were shared
        logits = 3 * self.num_beams * config.vocab_size * 4
        activations = 12 * longest * width * size
        return max(1, min(512, int(0.8 * self.free / (2 * cache + logits + activations))))

    def decode(self, ids: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
        """Items and scores of each prompt; what does not fit the memory is decoded in halves, never with fewer beams.

        Raises:
            UserError: a single prompt does not fit, or the model's numbers are not finite.
        """
        if self.largest is not None and len(ids) > self.largest:
            return self._halves(ids)
        try:
            tokens = pad(ids, 0, left=True).to(self.device)
            mask = pad([[1] * len(row) for row in ids], 0, left=True).to(self.device)
            items, scores = beam_search(self.model, self.trie, tokens, mask, self.num_beams, self.prefix)
            items, scores = items.tolist(), scores.tolist()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if len(ids) == 1:
                raise UserError(
                    f"one prompt of {len(ids[0])} tokens with {self.num_beams} beams exceeds memory"
                ) from error
        else:
            if not np.isfinite(scores).all():
                raise UserError("the model's log-probabilities are not finite; try --dtype float32 or bfloat16")
            return items, scores
        self.largest = len(ids) // 2
        print(f"note: out of memory with {len(ids)} prompts; going on with {self.largest}", file=sys.stderr, flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self._halves(ids)

    def _halves(self, ids: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
        half = (len(ids) + 1) // 2
        first, second = self.decode(ids[:half]), self.decode(ids[half:])
        return first[0] + second[0], first[1] + second[1]


def check_length(model: Any, longest: int) -> None:
    """Raise a UserError if sequences of `longest` tokens exceed the model's positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and longest > limit:
        raise UserError(f"a prompt with its answer has {longest} tokens, the model takes {limit}; lower --max_his_len")


class Progress:
    """Users per second, time left and metrics so far: a bar on a terminal, a line a minute elsewhere (main process)."""

    def __init__(self, total: int, metrics: str):
        self.metrics, self.total = metrics, total
        self.ranks: list[int] = []
        self.start = self.told = time.monotonic()
        self.bar = None
        if is_main() and sys.stderr.isatty():
            self.bar = tqdm(total=self.total, unit=" users", smoothing=0.05)

    def add(self, records: list[dict[str, Any]]) -> None:
        """Count `records`, which stand for as many of every process."""
        self.ranks += [rank_of(record["target"], record["items"]) for record in records]
        if not is_main():
            return
        now = time.monotonic()
        done = min(self.total, len(self.ranks) * world_size())
        if self.bar is not None:
            self.bar.set_postfix_str(self._figures(), refresh=False)
            self.bar.update(done - self.bar.n)
        elif now - self.told >= 60:
            self.told = now
            speed = done / (now - self.start)
            left = timedelta(seconds=round((self.total - done) / speed))
            say(f"{done:,} of {self.total:,} predictions, {speed:.1f} a second, {left} left; {self._figures()}")

    def _figures(self) -> str:
        found = means(self.ranks, self.metrics)
        return ", ".join(f"{name} {found[name]:.4f}" for name in list(found)[-3:])

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()
