"""The model's side of beam search: logits for the beams of every level, by the fastest way that is right for the model.

`SharedRows` lays the beams of a prompt side by side in the prompt's own row, `ExpandedRows` gives each beam a cache row as
`generate` does, `WholeRows` reads everything anew. `way_through` chooses.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

# Below this many common tokens a forward pass of their own costs more than it saves.
SHORTEST_PREFIX = 8


class PrefixCache:
    """Keys and values of a beginning that prompts share, computed once and used by any number of `beam_search` calls.

    It belongs to one model and its weights: after these have changed, make a new one.
    """

    def __init__(self, model: PreTrainedModel, tokens: Sequence[int] | Tensor):
        """Read `tokens` (at least one) with `model`; a model that cannot use the result reads nothing."""
        model = unwrapped(model)
        self.tokens = torch.as_tensor(tokens, dtype=torch.long, device=model.device)
        self.layers: list[tuple[Tensor, Tensor]] = []  # by layer: keys and values (1, heads, length, size)
        if way_through(model, len(self.tokens)) is SharedRows:
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


class SharedRows:
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
        self.cache = prefix.start(known, batch) if prefix and known else DynamicCache()
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


class ExpandedRows:
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


class WholeRows:
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


def _parameters(kind: type[PreTrainedModel]) -> frozenset[str]:
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


# ---- which models take beams as query positions ----

_verdicts: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()


def unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """The model inside PEFT's wrapper, which hides the signature; the adapter's layers are within."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def way_through(model: PreTrainedModel, length: int) -> type[SharedRows] | type[ExpandedRows] | type[WholeRows]:
    """The fastest way through the model that is right for it."""
    if "past_key_values" not in _parameters(type(model)):
        return WholeRows
    return SharedRows if _takes_shared_rows(model, length) else ExpandedRows


def _takes_shared_rows(model: PreTrainedModel, length: int) -> bool:
    """Whether `SharedRows` is right for this model and sequences of `length` tokens.

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
        state = SharedRows(model, prompts, mask, None)
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
