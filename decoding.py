"""Prefix-constrained beam search over an `ItemTrie`: exact top-k items from any causal language model.

    trie = ItemTrie(item_token_ids, eos_token_id)          # item id → its index as token ids
    items, scores = beam_search(model, trie, input_ids, attention_mask, num_beams=20)

The result is that of `generate(num_beams=…, do_sample=False, length_penalty=0.0, early_stopping=True)` constrained to
the trie, at a fraction of the work:

- every prompt goes through the model once, not once per beam, and what all prompts of a batch have in common (the
  instruction) once per batch, or once for all batches with a `PrefixCache`;
- the beams are extra query positions of the prompt's own row: a mask shows each beam the prompt and its own tokens, so
  keys and values of the prompt are never copied (models that refuse such a mask get a cache that is expanded per beam);
- logits are taken at the positions that are scored and nowhere else: one per prompt, then one per beam and level.

This module knows nothing of datasets or tokenizers: token ids in, item ids and log-probabilities out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from beam_rows import PrefixCache, unwrapped, way_through
from trie import ItemTrie


@dataclass
class _Beams:
    """The live beams of a batch after `depth` tokens; a beam with score -inf is none."""

    node: Tensor  # int64 (batch, beams)
    score: Tensor  # float32 (batch, beams)
    parent: Tensor  # int64 (batch, beams): which beam of the step before it continues


@torch.inference_mode()
def beam_search(
    model: PreTrainedModel,
    trie: ItemTrie,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_beams: int,
    prefix: PrefixCache | None = None,
    stop_early: bool = True,
) -> tuple[Tensor, Tensor]:
    """The best items for each prompt by constrained beam search.

    A score is the sum of the log-probabilities, over the full vocabulary, of the index's tokens and the end token. With
    beams for the whole catalogue the result is exact; with fewer it is what beam search keeps level by level. Equal
    scores are ordered by beam and token, so a call has one result. The generation settings of the model play no part.

    Args:
        model: a causal language model in evaluation mode.
        trie: the items, on the model's device.
        input_ids: int64 `(batch, length)`, prompts padded on the left.
        attention_mask: `(batch, length)`, 1 for prompt tokens and 0 for padding.
        num_beams: how many beams are kept, and how many items come back (fewer if the catalogue is smaller).
        prefix: a beginning that all prompts share (as far as they do), read before; otherwise what the prompts of the
            batch have in common is read once for the batch.
        stop_early: where indices differ in length, leave out the passes after the last that can change a result. With
            `prefix` and without this every call has the same number of passes, as processes that share one model's weights
            (ZeRO-3) must have.

    Returns:
        items: int64 `(batch, min(num_beams, trie.size))`, existing items, best first, none twice; where several items
            share an index, the lowest id.
        scores: float32 of the same shape, descending.

    Raises:
        ValueError: a prompt is empty, padded on the right, or `num_beams` is below 1.
    """
    if num_beams < 1:
        raise ValueError(f"num_beams is {num_beams}; it must be at least 1")
    model = unwrapped(model)
    mask = attention_mask.bool()
    if not bool(mask[:, -1].all()) or bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ValueError("prompts must be padded on the left and have at least one token")
    columns = int(mask.sum(1).max())
    input_ids, mask = input_ids[:, -columns:], mask[:, -columns:]
    state = way_through(model, columns + trie.levels)(model, input_ids, mask, prefix)
    wanted = min(num_beams, trie.size)
    finished = _Finished(len(input_ids), wanted, input_ids.device)
    beams = _Beams(
        node=torch.zeros(len(input_ids), 1, dtype=torch.long, device=input_ids.device),
        score=torch.zeros(len(input_ids), 1, device=input_ids.device),
        parent=torch.zeros(len(input_ids), 1, dtype=torch.long, device=input_ids.device),
    )
    logits = state.prompt_logits()
    for depth in range(trie.levels + 1):
        beams = _advance(trie, beams, logits, depth, num_beams, finished)
        if depth == trie.levels or (stop_early and trie.has_early_ends and finished.full()):
            break
        if trie.eos is not None or depth + 1 < trie.levels:
            logits = state.step(trie.token[beams.node].long().clamp(min=0), beams.parent)
    return finished.items, finished.scores


def _advance(trie: ItemTrie, beams: _Beams, logits: Tensor, depth: int, num_beams: int, finished: _Finished) -> _Beams:
    """One level: end the beams whose index is complete and keep the best continuations of the others.

    Args:
        logits: float `(batch, beams, vocabulary)` after each beam's last token.
    """
    item = trie.item[beams.node].long()
    if trie.eos is None and depth == trie.levels:  # `logits` are those of the level before
        finished.add(item, beams.score)
        return beams
    logits = logits.float()
    base = beams.score - _logsumexp(logits)
    kept = beams
    if trie.widths[depth]:
        child, real = trie.children(beams.node, depth)
        score = base[..., None] + logits.gather(-1, trie.token[child].long().clamp(min=0))
        score = score.masked_fill(~real, -torch.inf).flatten(1)
        keep = min(num_beams, trie.counts[depth + 1], score.shape[1])
        best, position = _best(score, keep)
        kept = _Beams(child.flatten(1).gather(1, position), best, position // trie.widths[depth])
    if depth == trie.levels or trie.has_early_ends:
        ended = (beams.score if trie.eos is None else base + logits[..., trie.eos]).masked_fill(item < 0, -torch.inf)
        if trie.widths[depth]:  # an ending counts only among the best `num_beams` candidates, as in `generate`
            candidates = torch.cat([ended, kept.score], 1)
            place = candidates.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            ended = ended.masked_fill(place[:, : ended.shape[1]] >= num_beams, -torch.inf)
        finished.add(item, ended)
    return kept


def _logsumexp(logits: Tensor) -> Tensor:
    """`logits.logsumexp(-1)`; on the CPU a few rows at a time, which stay in its cache (twice as fast)."""
    if logits.device.type != "cpu":
        return logits.logsumexp(-1)
    rows = logits.flatten(0, -2).split(8)
    return torch.cat([part.logsumexp(-1) for part in rows]).view(logits.shape[:-1])


def _best(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest of each row and their positions, equal ones in their order."""
    best, position = score.sort(dim=1, descending=True, stable=True)
    return best[:, :count], position[:, :count]


class _Finished:
    """The best complete items of each row so far."""

    def __init__(self, batch: int, wanted: int, device: torch.device):
        self.items = torch.full((batch, wanted), -1, dtype=torch.long, device=device)
        self.scores = torch.full((batch, wanted), -torch.inf, device=device)

    def add(self, items: Tensor, scores: Tensor) -> None:
        """Take in `items` with `scores` (both `(batch, n)`; -inf: none); a row that is full takes no more."""
        scores = scores.masked_fill(self._full_rows()[:, None], -torch.inf)
        self.scores, position = _best(torch.cat([self.scores, scores], 1), self.scores.shape[1])
        self.items = torch.cat([self.items, items], 1).gather(1, position)

    def full(self) -> bool:
        """Whether every row has all its items."""
        return bool(self._full_rows().all())

    def _full_rows(self) -> Tensor:
        return self.scores[:, -1] > -torch.inf


# ---- weights laid out for the CPU ----


class _PackedLinear(torch.nn.Module):
    """A linear layer whose float32 weight oneDNN has laid out for its matrix kernels; computes what it replaces."""

    ROWS = 1024  # about how many rows come at once (batch × beams, or batch × prompt): the layout is chosen for it

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), self.ROWS)
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """float32 `(…, in)` → `(…, out)`."""
        return torch.ops.mkldnn._linear_pointwise(inputs, self.packed, self.bias, "none", [], "")


@torch.inference_mode()
def pack_linears(model: PreTrainedModel) -> bool:
    """Lay out the weights of a float32 model on the CPU for oneDNN, in place: about a tenth faster, for decoding only.

    The layers lose their `weight`, so the model can no longer be saved or trained. Where PyTorch has no such kernels, or
    the model's outputs would change by more than rounding, nothing is changed.

    Returns:
        Whether the model is packed.
    """
    if model.device.type != "cpu" or model.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is torch.nn.Linear
    ]
    count = model.get_input_embeddings().weight.shape[0]
    tokens = (torch.arange(16)[None] * 7 + 1) % count
    before = model(input_ids=tokens, use_cache=False).logits
    try:
        for parent, name, child in places:
            setattr(parent, name, _PackedLinear(child))
        after = model(input_ids=tokens, use_cache=False).logits
        if (after - before).abs().max() <= 1e-4 * before.abs().max():
            return True
    except (RuntimeError, AttributeError, TypeError):
        pass
    for parent, name, child in places:
        setattr(parent, name, child)
    return False
