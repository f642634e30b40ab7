"""Texts to padded token batches, for training (right-padded, with labels) and for testing (left-padded).

A sample is BOS (where the tokenizer adds one) + prompt + response + EOS (unless there shall be none). What is masked is told
by length, never by the pad id, which may be the EOS id.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

# Packed rows have a multiple of so many tokens: libraries keep a compiled kernel for each shape that they meet.
ROUND = 128
IGNORE = -100  # the label that cross-entropy leaves out


def adds_bos(tokenizer: Any) -> bool:
    """True if the tokenizer puts a BOS token before a text."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def encode_prompts(tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    """Token ids of each prompt, BOS first where the tokenizer adds one, and never an EOS."""
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    return [bos + ids for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]


def encode_samples(
    tokenizer: Any,
    prompts: list[str],
    responses: list[str],
    max_length: int,
    no_eos: bool = False,
) -> tuple[list[list[int]], list[int]]:
    """Token ids of whole samples, cut at `max_length`, and how many of them belong to the prompt.

    Prompt and response are tokenised as one text, since tokens may depend on what precedes them; the prompt's part is what
    its own tokenisation shares with the whole.
    """
    texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    whole = encode_prompts(tokenizer, texts)
    samples, lengths, end = [], [], [] if no_eos else [tokenizer.eos_token_id]
    for ids, prompt in zip(whole, encode_prompts(tokenizer, prompts), strict=True):
        same = len(os.path.commonprefix([ids, prompt]))
        samples.append((ids + end)[:max_length])
        lengths.append(min(same, max_length))
    return samples, lengths


def pack(rows: list[list[int]], labels: list[list[int]], multiple: int = 1) -> dict[str, Any]:
    """Samples end to end as one row of model inputs: `(1, tokens)` ids, labels and positions, and the samples' lengths.

    The first token of a sample loses its label: nothing before it predicts it. The mask is a 4-D dummy, which
    transformers hands through to `packing.packed_attention` as it is.

    Args:
        multiple: fill up, with one more sample that has no labels, to a multiple of so many tokens.
    """
    filler = -sum(map(len, rows)) % multiple
    if filler:
        rows, labels = [*rows, [0] * filler], [*labels, [IGNORE] * filler]
    lengths = [len(row) for row in rows]
    return {
        "input_ids": torch.tensor([sum(rows, [])]),
        "labels": torch.tensor([sum(([IGNORE] + row[1:] for row in labels), [])]),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
        "packed_lengths": lengths,
    }


def pad(rows: list[list[int]], value: int, left: bool = False) -> torch.Tensor:
    """Rows of different length as one int64 tensor (len(rows), longest)."""
    longest = max(map(len, rows))
    filled = [[value] * (longest - len(r)) + r if left else r + [value] * (longest - len(r)) for r in rows]
    return torch.tensor(filled, dtype=torch.long)


@dataclass
class TrainCollator:
    """A list of `{"prompt", "response"}` to `input_ids`, `attention_mask` and `labels`: int64 (batch, longest).

    Args:
        only_train_response: no label on the prompt.
        packing: no padding, the samples end to end in one row (`packing.pack`).
        tasks: task names; adds `tasks`, the position in it of each token's sample's task, in the shape of `labels`, and
            `seen`, how many tokens and samples the batch has; where packed samples say which batch of their step they were
            drawn for (`even_rows.Dealt`), `drawn_for`, its number for each token.
        no_eos: samples end with the response.
    """

    tokenizer: Any
    max_length: int = 2048
    only_train_response: bool = False
    packing: bool = False
    tasks: list[str] | None = None
    no_eos: bool = False

    def __call__(self, samples: list[dict[str, str]]) -> dict[str, Any]:
        prompts, responses = [s["prompt"] for s in samples], [s["response"] for s in samples]
        ids, lengths = encode_samples(self.tokenizer, prompts, responses, self.max_length, self.no_eos)
        if not self.only_train_response:
            lengths = [0] * len(ids)
        labels = [[IGNORE] * n + row[n:] for row, n in zip(ids, lengths, strict=True)]
        if self.packing:
            batch = pack(ids, labels, ROUND)
        else:
            batch = {
                "input_ids": pad(ids, self.tokenizer.pad_token_id),
                "attention_mask": pad([[1] * len(row) for row in ids], 0),
                "labels": pad(labels, IGNORE),
            }
        if self.tasks is not None:
            tasks = torch.tensor([self.tasks.index(s["task"]) for s in samples])
            sizes = torch.tensor([len(row) for row in ids])
            spare = (0, batch["labels"].shape[1] - int(sizes.sum()))  # of a packed row
            each = F.pad(tasks.repeat_interleave(sizes), spare)[None] if self.packing else tasks[:, None]
            batch["tasks"] = each.expand(batch["labels"].shape)
            if samples[0].get("batch") is not None:
                drawn_for = torch.tensor([s["batch"] for s in samples])
                batch["drawn_for"] = F.pad(drawn_for.repeat_interleave(sizes), spare)[None]
            batch["seen"] = [int(sizes.sum()), len(samples)]
        return batch

    def without_label(self, samples: list[dict[str, str]]) -> int:
        """How many of `samples` train nothing, as they are cut before the response begins."""
        return sum(bool((self([sample])["labels"][:, 1:] == IGNORE).all()) for sample in samples)


@dataclass
class TestCollator:
    """A list of prompts to `input_ids` and `attention_mask`, left-padded: int64 (batch, longest)."""

    tokenizer: Any
    __test__ = False  # not a pytest class

    def __call__(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        ids = encode_prompts(self.tokenizer, prompts)
        return {
            "input_ids": pad(ids, self.tokenizer.pad_token_id, left=True),
            "attention_mask": pad([[1] * len(row) for row in ids], 0, left=True),
        }
