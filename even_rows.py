"""Packed rows of about the same length on every process, though which samples a step has stays the sampler's choice."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from data import ITEM_TOKEN

MOST_DEALT = 16  # each process looks at the texts of a whole step to deal them evenly: 0.1 ms a sample


def text_size(sample: dict[str, str]) -> float:
    """About how many tokens a sample has, from its text: an item token is one, other text about a token for 4 characters."""
    text = sample["prompt"] + sample["response"]
    rest = ITEM_TOKEN.sub("", text)
    return text.count("<") + len(rest) / 4


class Dealt:
    """A training set whose samples say, as `batch`, which process they were drawn for, where `EvenRows` gives them to another."""

    def __init__(self, train_set: Any):
        self.train_set, self.drawn_for = train_set, dict[int, int]()

    def __len__(self) -> int:
        return len(self.train_set)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self.train_set[number], "batch": self.drawn_for.get(number)}


class EvenRows:
    """A sampler's order with the samples of each step dealt to the processes so that their packed rows are about as long.

    Every process waits for the one with the longest row. Which samples a step has does not change, and `dataset` knows which
    process each was drawn for. Made for a sampler that gives `batch` samples to each of `processes` in turn.
    """

    def __init__(self, sampler: Any, dataset: Dealt, batch: int, processes: int):
        self.sampler, self.dataset, self.batch, self.processes = sampler, dataset, batch, processes

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """As the sampler's."""
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        order = iter(self.sampler)
        while step := list(islice(order, self.batch * self.processes)):
            yield from self.deal(step)

    def deal(self, step: list[int]) -> list[int]:
        """A step's samples: the longest that is left goes to the process that has the least and is not full."""
        if len(step) < self.batch * self.processes:  # it will be filled up from the first step
            self.dataset.drawn_for = {}
            return step
        self.dataset.drawn_for = {number: place // self.batch for place, number in enumerate(step)}
        sizes = {number: text_size(self.dataset[number]) for number in step}
        rows: list[list[int]] = [[] for _ in range(self.processes)]
        for number in sorted(step, key=lambda number: -sizes[number]):
            open_rows = [row for row in rows if len(row) < self.batch]
            min(open_rows, key=lambda row: sum(sizes[i] for i in row)).append(number)
        return [number for row in rows for number in row]
