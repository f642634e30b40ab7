"""HR and NDCG on validation users while a model trains (`--eval_ranking`)."""

from __future__ import annotations

import os
import random
from typing import Any

import torch

from beam_rows import PrefixCache
from collator import TestCollator, encode_prompts
from decoding import beam_search
from metrics.ranking import hit, ndcg, rank_of
from modeling import item_trie
from packing import PACKED
from processes import sum_over_processes
from utils import rank, world_size


class Ranking:
    """HR and NDCG of a sample of validation users: constrained beam search over all items, as test.py does it.

    Args:
        valid_set: the validation samples; each user's first template is used.
        count: how many users, drawn by `seed`; more than there are: all.
        batch_size: users per process and call.
    """

    def __init__(
        self,
        valid_set: Any,
        tokenizer: Any,
        count: int,
        batch_size: int,
        seed: int,
        num_beams: int = 20,
        no_eos: bool = False,
    ):
        rows = len(valid_set) // valid_set.prompt_num
        self.users = sorted(random.Random(seed).sample(range(rows), min(count, rows)))
        self.valid_set, self.tokenizer, self.num_beams, self.batch_size = valid_set, tokenizer, num_beams, batch_size
        self.trie = item_trie(tokenizer, valid_set.data, no_eos)

    def __call__(self, model: Any) -> dict[str, float]:
        """`{"hit@10": …, "ndcg@10": …}` over the users of all processes, which must all call this."""
        attention = model.config._attn_implementation
        model.set_attn_implementation("sdpa" if attention == PACKED else attention)
        sums = torch.zeros(3, dtype=torch.float64, device=model.device)
        prefix = self._prefix(model)
        # as many calls on every process, and as many passes in each: ZeRO-3 gathers weights together
        for start in range(rank(), len(self.users) + rank(), self.batch_size * world_size()):
            users = [self.users[i] for i in range(start, len(self.users), world_size())[: self.batch_size]]
            for place in self._places(model, users or self.users[:1], prefix)[: len(users)]:
                sums += torch.tensor([hit(place, 10), ndcg(place, 10), 1.0], dtype=torch.float64, device=model.device)
        model.set_attn_implementation(attention)
        hits, gains, count = sum_over_processes(sums).tolist()
        return {"hit@10": hits / count, "ndcg@10": gains / count}

    def _prompts(self, users: list[int]) -> list[str]:
        return [self.valid_set[user * self.valid_set.prompt_num]["prompt"] for user in users]

    def _prefix(self, model: Any) -> PrefixCache:
        """What the prompts begin with, read once: `beam_search` alone has a pass more for two prompts than for one."""
        ids = encode_prompts(self.tokenizer, self._prompts(self.users[:32]))
        return PrefixCache(model, os.path.commonprefix(ids) or ids[0][:1])

    @torch.no_grad()
    def _places(self, model: Any, users: list[int], prefix: PrefixCache) -> list[int]:
        """The rank of each user's validation item, from 0; -1 if it is not among the beams."""
        data = self.valid_set.data
        batch = TestCollator(self.tokenizer)(self._prompts(users))
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        items, _ = beam_search(model, self.trie.to(model.device), ids, mask, self.num_beams, prefix, stop_early=False)
        targets = [data.canonical[self.valid_set.sample(user).target] for user in users]
        return [rank_of(target, row) for target, row in zip(targets, items.tolist(), strict=True)]
