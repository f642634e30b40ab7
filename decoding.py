"""Item trie and prefix-constrained beam search: exact top-k items from any causal language model.

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

import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

__all__ = ["ItemTrie", "PrefixCache", "beam_search", "pack_linears"]

# Below this many common tokens a forward pass of their own costs more than it saves.
SHORTEST_PREFIX = 8


class ItemTrie:
    """All item indices as one prefix tree of flat tensors; its memory is linear in the number of items.

    Nodes are numbered level by level, siblings by token, the root is 0; so the children of node `n` are the nodes
    `first_child[n] … first_child[n + 1] - 1`.

    Attributes:
        token: int32 `(nodes,)`, the token that leads into the node (-1 for the root).
        first_child: int32 (int64 from 2³¹ nodes on) `(nodes + 1,)`.
        item: int32 `(nodes,)`, the item whose index ends at the node, -1 where none does. Of items that share an index
            it is the one with the lowest id.
        widths: by depth, the most children that a node there has; `widths[0]` is the root's.
        counts: by depth, the number of nodes there; `counts[0]` is 1.
        size: the number of distinct indices.
        eos: the token that ends an index; None: an index ends by itself, and nothing is added to its score.
    """

    def __init__(self, sequences: Sequence[Sequence[int]] | np.ndarray | Tensor, eos: int | None):
        """Build the tree.

        Args:
            sequences: item id → its token ids: a list of tuples (any lengths from 1) or an integer array `(items, levels)`.
            eos: the id of the end-of-sequence token, which may not occur within a sequence; None for none.

        Raises:
            ValueError: there are no items, or a sequence is empty or has a negative token or `eos` in it; without `eos`,
                also if one sequence is the beginning of another.
        """
        rows, lengths = _as_rows(sequences)
        if rows.size == 0:
            raise ValueError("an item trie needs at least one item with at least one token")
        inside = np.arange(rows.shape[1]) < lengths[:, None] if lengths is not None else None
        for what, token in (("a negative token", None), ("the end-of-sequence token", eos)):
            wrong = rows < 0 if token is None else rows == token
            wrong = wrong if inside is None else wrong & inside
            if wrong.any():
                raise ValueError(f"item {int(wrong.any(1).argmax())} has {what} in its index")
        if lengths is not None and (lengths == 0).any():
            raise ValueError(f"item {int((lengths == 0).argmax())} has an empty index")
        self.eos = None if eos is None else int(eos)
        self._build(rows, lengths)
        if eos is None and bool(((self.item >= 0) & (self.first_child[1:] > self.first_child[:-1])).any()):
            raise ValueError("without an end-of-sequence token no index may be the beginning of another")

    def _build(self, rows: np.ndarray, lengths: np.ndarray | None) -> None:
        order = _sorted_order(rows)
        tokens, degrees, items = [np.array([-1], np.int32)], [], [np.array([-1], np.int32)]
        self.widths, self.counts = [], [1]
        parent = np.zeros(len(rows), np.int32)  # by sorted row: its node at the depth above, counted within that depth
        for depth in range(rows.shape[1]):
            if lengths is not None:  # indices that are complete end here
                alive = lengths[order] > depth
                order, parent = order[alive], parent[alive]
            column = rows[order, depth]
            new = np.empty(len(column), bool)
            new[0] = True
            np.not_equal(column[1:], column[:-1], out=new[1:])
            new[1:] |= parent[1:] != parent[:-1]
            starts = np.flatnonzero(new)
            degree = np.bincount(parent[starts], minlength=self.counts[-1]).astype(np.int32)
            parent = np.cumsum(new, dtype=np.int32) - 1
            ends = slice(None) if lengths is None else lengths[order] == depth + 1
            item = np.full(len(starts), -1, np.int32)
            if lengths is not None or depth == rows.shape[1] - 1:
                # the order is stable, so of equal indices the lowest id comes first: write it last
                item[parent[ends][::-1]] = order[ends][::-1]
            tokens.append(column[starts].astype(np.int32))
            degrees.append(degree)
            items.append(item)
            self.widths.append(int(degree.max()))
            self.counts.append(len(starts))
        nodes = sum(self.counts)
        first = np.empty(nodes + 1, np.int32 if nodes < 2**31 else np.int64)
        first[0] = 1
        degrees.append(np.zeros(self.counts[-1], np.int32))
        np.cumsum(np.concatenate(degrees), out=first[1:])
        first[1:] += 1
        self.token = torch.from_numpy(np.concatenate(tokens))
        self.item = torch.from_numpy(np.concatenate(items))
        self.first_child = torch.from_numpy(first)
        self.widths.append(0)
        self.size = int((self.item >= 0).sum())
        self.has_early_ends = bool((self.item[: nodes - self.counts[-1]] >= 0).any())

    @property
    def levels(self) -> int:
        """The length of the longest index."""
        return len(self.counts) - 1

    @property
    def nbytes(self) -> int:
        """The memory of the tensors in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.token, self.first_child, self.item))

    def to(self, device: torch.device | str) -> ItemTrie:
        """Move the tensors to `device` (in place); returns the trie."""
        self.token, self.first_child = self.token.to(device), self.first_child.to(device)
        self.item = self.item.to(device)
        return self

    def children(self, nodes: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """The children of `nodes`, which all lie at `depth`.

        Args:
            nodes: int64 `(…,)`.

        Returns:
            int64 `(…, widths[depth])`: the children's node numbers (padding: 0), and bool of the same shape: real ones.
        """
        first = self.first_child[nodes].long()
        degree = self.first_child[nodes + 1].long() - first
        offset = torch.arange(self.widths[depth], device=nodes.device)
        real = offset < degree[..., None]
        return torch.where(real, first[..., None] + offset, 0), real


def _as_rows(sequences: Sequence[Sequence[int]] | np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray | None]:
    """Sequences as an integer array `(items, levels)`, and their lengths where they differ (rows padded with -1)."""
    if isinstance(sequences, Tensor):
        sequences = sequences.cpu().numpy()
    if isinstance(sequences, np.ndarray):
        if sequences.ndim != 2:
            raise ValueError(f"indices must be an array (items, levels), not one of {sequences.ndim} dimensions")
        return sequences, None
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
    if len(lengths) == 0:
        return np.empty((0, 1), np.int64), None
    if lengths.min() == lengths.max():
        return np.array(sequences, np.int64), None
    rows = np.full((len(lengths), int(lengths.max())), -1, np.int64)
    rows[np.arange(rows.shape[1]) < lengths[:, None]] = np.concatenate([np.asarray(row, np.int64) for row in sequences])
    return rows, lengths


def _sorted_order(rows: np.ndarray) -> np.ndarray:
    """Item numbers in lexicographic order of their rows, equal rows by item number."""
    lowest, highest = rows.min(axis=0), rows.max(axis=0)
    bits = [int(high - low).bit_length() for low, high in zip(lowest, highest, strict=True)]
    if sum(bits) > 63:
        return np.lexsort(rows.T[::-1])
    key = np.zeros(len(rows), np.int64)  # the whole row in one number: one sort instead of one per level
    for level, width in enumerate(bits):
        key <<= width
        key += rows[:, level] - lowest[level]
    return torch.sort(torch.from_numpy(key), stable=True).indices.numpy()


class PrefixCache:
    """Keys and values of a beginning that prompts share, computed once and used by any number of `beam_search` calls.

    It belongs to one model and its weights: after these have changed, make a new one.
    """

    def __init__(self, model: PreTrainedModel, tokens: Sequence[int] | Tensor):
        """Read `tokens` (at least one) with `model`; a model that cannot use the result reads nothing."""
        model = _unwrapped(model)
        self.tokens = torch.as_tensor(tokens, dtype=torch.long, device=model.device)
        self.layers: list[tuple[Tensor, Tensor]] = []  # by layer: keys and values (1, heads, length, size)
        if _session(model, len(self.tokens)) is _SharedRows:
            self._read(model)

    @torch.inference_mode()
    def _read(self, model: PreTrainedModel) -> None:
        cache = DynamicCache()
        ones = torch.ones(1, len(self.tokens), dtype=torch.long, device=self.tokens.device)
        _forward(model, self.tokens[None], ones, ones.cumsum(1) - 1, cache)
        self.layers = [(layer.keys, layer.values) for layer in cache.layers]

    def shared_with(self, tokens: Tensor) -> int:
        """How many of the leading `tokens` (int64 `(length,)`) it holds."""
        length = min(len(self.tokens), len(tokens)) if self.layers else 0
        return int((self.tokens[:length] == tokens[:length]).long().cumprod(0).sum())

    def start(self, length: int, batch: int) -> DynamicCache:
        """A cache that holds the first `length` positions for `batch` rows."""
        return DynamicCache(
            ddp_cache_data=[
                (keys[:, :, :length].expand(batch, -1, -1, -1), values[:, :, :length].expand(batch, -1, -1, -1))
                for keys, values in self.layers
            ]
        )


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
    model = _unwrapped(model)
    mask = attention_mask.bool()
    if not bool(mask[:, -1].all()) or bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ValueError("prompts must be padded on the left and have at least one token")
    columns = int(mask.sum(1).max())
    input_ids, mask = input_ids[:, -columns:], mask[:, -columns:]
    state = _session(model, columns + trie.levels)(model, input_ids, mask, prefix)
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


# ---- the model's side: logits for the beams of every level ----


class _SharedRows:
    """Beams as further query positions in their prompt's row (tree attention): one cache row per prompt.

    The cache holds the prompt, then a block of one position per beam for every level. A beam sees the prompt, the
    positions of its own earlier tokens, and itself.
    """

    def __init__(self, model: PreTrainedModel, input_ids: Tensor, mask: Tensor, prefix: PrefixCache | None):
        batch, columns = input_ids.shape
        self.model = model
        self.lengths = mask.sum(1)
        known = self._common(input_ids, mask) if batch > 1 or prefix else 0
        if prefix:
            known = prefix.shared_with(input_ids[0, -int(self.lengths[0]) :][:known])
        elif known >= SHORTEST_PREFIX:
            prefix = PrefixCache(model, input_ids[0, -int(self.lengths[0]) :][:known])
        if known < SHORTEST_PREFIX:
            known = 0
        self.cache = prefix.start(known, batch) if known else DynamicCache()
        rest = columns - known  # the prompts without their common beginning
        mask = torch.arange(rest, device=mask.device) >= rest - (self.lengths - known)[:, None]
        positions = known + (mask.cumsum(1) - 1).clamp(min=0)
        mask = torch.cat([mask.new_ones(batch, known), mask], 1)
        self._prompt_logits = _forward(model, input_ids[:, -rest:], mask.long(), positions, self.cache)
        self.visible = mask[:, None]  # bool (batch, beams, positions so far): what each beam sees
        self.depth = 0

    @staticmethod
    def _common(input_ids: Tensor, mask: Tensor) -> int:
        """How many leading tokens all prompts share, leaving each at least one of its own."""
        shortest = int(mask.sum(1).min()) - 1
        starts = mask.shape[1] - mask.sum(1)
        heads = input_ids.gather(1, starts[:, None] + torch.arange(shortest, device=mask.device))
        return int((heads == heads[:1]).all(0).long().cumprod(0).sum())

    def prompt_logits(self) -> Tensor:
        """Logits after the prompt, `(batch, 1, vocabulary)`."""
        return self._prompt_logits

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Logits after one more token per beam: `tokens`, `parents` int64 `(batch, beams)` → `(batch, beams, vocabulary)`."""
        batch, beams = tokens.shape
        seen = self.visible.gather(1, parents[..., None].expand(-1, -1, self.visible.shape[-1]))
        itself = torch.eye(beams, dtype=torch.bool, device=tokens.device).expand(batch, -1, -1)
        self.visible = torch.cat([seen, itself], -1)
        positions = (self.lengths + self.depth)[:, None].expand(-1, beams)
        self.depth += 1
        return _forward(self.model, tokens, _as_4d(self.model, self.visible), positions, self.cache, keep=beams)


class _ExpandedRows:
    """One cache row per beam, as in `generate`, but expanded only after the prompts have been read."""

    def __init__(self, model: PreTrainedModel, input_ids: Tensor, mask: Tensor, prefix: PrefixCache | None):
        self.model, self.mask = model, mask.long()
        self.cache = DynamicCache(config=model.config)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self._prompt_logits = _forward(model, input_ids, self.mask, positions, self.cache)
        self.beams = 1

    def prompt_logits(self) -> Tensor:
        """Logits after the prompt, `(batch, 1, vocabulary)`."""
        return self._prompt_logits

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Logits after one more token per beam: `tokens`, `parents` int64 `(batch, beams)` → `(batch, beams, vocabulary)`."""
        batch, beams = tokens.shape
        rows = (torch.arange(batch, device=tokens.device)[:, None] * self.beams + parents).flatten()
        self.cache.reorder_cache(rows)
        self.mask = torch.cat([self.mask[rows], self.mask.new_ones(len(rows), 1)], 1)
        positions = self.mask.sum(1, keepdim=True) - 1
        self.beams = beams
        return _forward(self.model, tokens.reshape(-1, 1), self.mask, positions, self.cache).view(batch, beams, -1)


class _WholeRows:
    """No cache at all: every level reads prompt and tokens anew. Slow, but right for any causal language model."""

    def __init__(self, model: PreTrainedModel, input_ids: Tensor, mask: Tensor, prefix: PrefixCache | None):
        self.model, self.ids, self.mask = model, input_ids, mask.long()
        self.beams = 1

    def prompt_logits(self) -> Tensor:
        """Logits after the prompt, `(batch, 1, vocabulary)`."""
        return self.model(input_ids=self.ids, attention_mask=self.mask).logits[:, -1:]

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Logits after one more token per beam: `tokens`, `parents` int64 `(batch, beams)` → `(batch, beams, vocabulary)`."""
        batch, beams = tokens.shape
        rows = (torch.arange(batch, device=tokens.device)[:, None] * self.beams + parents).flatten()
        self.ids = torch.cat([self.ids[rows], tokens.reshape(-1, 1)], 1)
        self.mask = torch.cat([self.mask[rows], self.mask.new_ones(len(rows), 1)], 1)
        self.beams = beams
        return self.prompt_logits().view(batch, beams, -1)


def _forward(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache, keep: int = 1
) -> Tensor:
    """One pass that adds `tokens` `(rows, n)` to `cache`; logits `(rows, keep, vocabulary)` of the last `keep` positions."""
    known = _parameters(type(model))
    extra = {}
    if "position_ids" in known:  # others (ALiBi) derive positions from the mask
        extra["position_ids"] = positions
    if "logits_to_keep" in known:
        extra["logits_to_keep"] = keep
    output = model(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
    return output.logits[:, -keep:]


_signatures: dict[type, frozenset[str]] = {}


def _parameters(kind: type) -> frozenset[str]:
    """The names of the parameters that a model class's `forward` takes."""
    if kind not in _signatures:
        _signatures[kind] = frozenset(inspect.signature(kind.forward).parameters)
    return _signatures[kind]


def _as_4d(model: PreTrainedModel, visible: Tensor) -> Tensor:
    """A mask `(rows, queries, positions)` as the model's attention wants it: bool for SDPA, else added to the scores."""
    visible = visible[:, None]
    if model.config._attn_implementation == "sdpa":
        return visible
    return torch.zeros(visible.shape, dtype=model.dtype, device=visible.device).masked_fill(
        ~visible, torch.finfo(model.dtype).min
    )


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


# ---- which models take beams as query positions ----

_verdicts: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()


def _unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """The model inside PEFT's wrapper, which hides the signature; the adapter's layers are within."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _session(model: PreTrainedModel, length: int) -> type[_SharedRows] | type[_ExpandedRows] | type[_WholeRows]:
    """The fastest way through the model that is right for it."""
    if "past_key_values" not in _parameters(type(model)):
        return _WholeRows
    return _SharedRows if _takes_shared_rows(model, length) else _ExpandedRows


def _takes_shared_rows(model: PreTrainedModel, length: int) -> bool:
    """Whether `_SharedRows` is right for this model and sequences of `length` tokens.

    A sliding window counts cache positions, so beams side by side are right only while everything fits the window. The
    rest is found out by a trial on a few tokens, once per model: positions and mask must be honoured.
    """
    config = model.config.get_text_config(decoder=True)
    for name in ("sliding_window", "attention_chunk_size"):
        window = getattr(config, name, None)
        if window is not None and getattr(config, "use_sliding_window", True) and length > window:
            return False
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return False
    if model not in _verdicts:
        _verdicts[model] = True  # so that the trial itself goes this way
        _verdicts[model] = _trial(model)
    return _verdicts[model]


def _trial(model: PreTrainedModel) -> bool:
    """Compare two levels of beams in one row with plain passes over the sequences that they stand for.

    Two prompts with a common beginning, one of them padded; three beams, some of which continue the same one.
    """
    # not the embedding's shape: under ZeRO-3 the weight may be away until a pass gathers it
    device, count = model.device, model.config.get_text_config(decoder=True).vocab_size
    long, short = 2 * SHORTEST_PREFIX, 2 * SHORTEST_PREFIX - 3
    prompts = (torch.arange(long, device=device) * 7 + 1).expand(2, -1) % count
    prompts = torch.cat([prompts[:1], prompts[1:].roll(long - short, 1)])
    mask = torch.arange(long, device=device) >= torch.tensor([[0], [long - short]], device=device)
    tokens = (torch.arange(6, device=device) * 5 + 3).view(2, 1, 3).expand(
        -1, 2, -1
    ) % count  # (levels, prompts, beams)
    parents = torch.tensor([[1, 2, 1]], device=device).expand(2, -1)
    try:
        state = _SharedRows(model, prompts, mask, None)
        state.step(tokens[0], torch.zeros_like(parents))
        found = state.step(tokens[1], parents).float()
        wanted = []
        for row, length in enumerate((long, short)):
            paths = torch.stack([tokens[0, row, parents[row]], tokens[1, row]], 1)
            whole = torch.cat([prompts[row, long - length :].expand(3, -1), paths], 1)
            ones = torch.ones_like(whole)
            wanted.append(model(input_ids=whole, attention_mask=ones, use_cache=False).logits[:, -1].float())
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False
    wanted = torch.stack(wanted)
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1e-3))
