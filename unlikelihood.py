"""No item twice: a second term of the loss, for data in which nobody takes an item again (`--unlikelihood`).

A model of several codes an item learns soon which first code comes next, and that no item comes twice it does not learn at all:
it would have to look up which codes followed that first code before (docs/results.md). So it is told: the probability that a code
completes an item of the same sample's past costs −log(1 − p), as tokens in the past do in Welleck et al. (2020), "Neural text
generation with unlikelihood training", section 5.1; here what is unlikely is an item and not a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from collator import IGNORE


class Unlikelihood:
    """The term for each labelled token of a batch.

    Args:
        indices: token ids of every item's index.
        weight: of the term beside cross-entropy.
    """

    def __init__(self, indices: list[tuple[int, ...]], weight: float):
        self.weight = weight
        self.lengths = sorted({len(index) for index in indices})
        self.last = [torch.tensor(sorted({i[-1] for i in indices if len(i) == n})) for n in self.lengths]

    def __call__(self, batch: dict[str, Any], logits: Tensor, losses: Tensor) -> Tensor:
        """`weight` × −log(1 − p), p being the probability of all codes that complete an earlier item of the sample.

        Args:
            batch: `input_ids` and `labels` (rows, length), and `packed_lengths` if the row is packed.
            logits: (n, vocabulary) of the n labelled tokens, in their order (more may follow).
            losses: their cross-entropy, float32 (n,).

        Returns:
            float32 (n,); 0 for tokens that complete no item. An item that does come again is not counted against itself.
        """
        ids, labels = batch["input_ids"], batch["labels"]
        labelled = labels != IGNORE
        labelled[:, 0] = False
        row = labelled.flatten().cumsum(0) - 1  # of `logits`
        place, code = self.seen_codes(ids, batch.get("packed_lengths")).T
        known = labelled.flatten()[place]
        row, target, code = row[place[known]], ids.flatten()[place[known]], code[known]
        read = logits[torch.cat([row, row]), torch.cat([target, code])].float()  # at once: one gradient of that size
        own, other = read.chunk(2)
        whole = own + losses[row]  # log of the softmax's denominator
        mass = torch.zeros_like(losses).index_add(0, row, (other - whole).exp())
        below_one = (mass * (1 - 1e-5)).clamp(max=1 - 1e-6)  # finite and with a gradient at p = 1
        return -self.weight * torch.log1p(-below_one)

    def seen_codes(self, ids: Tensor, packed_lengths: list[int] | None = None) -> Tensor:
        """Which code would complete an earlier item of the sample, and where: int64 (pairs, 2), each pair once.

        A place counts through the rows of `ids`; it is that of an item's last token, which is never its own pair.
        """
        if packed_lengths is None:
            sample = torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])
        else:
            sizes = torch.tensor(packed_lengths, device=ids.device)
            sample = torch.arange(len(sizes), device=ids.device).repeat_interleave(sizes)
        ids, found = ids.flatten(), []
        for length, last in zip(self.lengths, self.last, strict=True):
            ends = torch.isin(ids, last.to(ids.device)).nonzero()[:, 0]
            ends = ends[ends >= length - 1]
            ends = ends[sample[ends - length + 1] == sample[ends]]
            before = ends[:, None] + torch.arange(1 - length, 0, device=ids.device)
            prefix = torch.cat([sample[ends, None], ids[before]], dim=1)
            kind = torch.unique(prefix, dim=0, return_inverse=True)[1]
            later, earlier = earlier_alike(kind)
            pairs = torch.stack([ends[later], ids[ends[earlier]]], dim=1)
            found.append(pairs[pairs[:, 1] != ids[pairs[:, 0]]])
        return torch.unique(torch.cat(found), dim=0)


def earlier_alike(kinds: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of places, the later and the earlier one, with the same of `kinds` (int64 from 0), as two int64 (pairs,)."""
    order = kinds.argsort(stable=True)
    sizes = torch.bincount(kinds)
    first = (sizes.cumsum(0) - sizes)[kinds[order]]
    number = torch.arange(len(order), device=kinds.device) - first  # of those alike before it
    which = torch.arange(int(number.sum()), device=kinds.device) - (number.cumsum(0) - number).repeat_interleave(number)
    return order.repeat_interleave(number), order[first.repeat_interleave(number) + which]
