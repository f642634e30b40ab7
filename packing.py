"""Train without padding and without logits nobody asked for: samples end to end in one row, and a head for labelled positions.

Both change what is computed, never the result: `packed_attention` shows every token the tokens of its own sample only, and
`LabelledHead` hands the vocabulary projection those positions alone that have a label.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from collator import ROUND, pack
from utils import UserError

PACKED = "packed_sdpa"  # the name of the attention in transformers' registry


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_lengths: list[int] | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sample of a packed row; without `packed_lengths`, torch's attention as usual.

    Args:
        query: `(1, heads, tokens, dim)`; `key` and `value` the same, perhaps with fewer heads.
        packed_lengths: the tokens of each sample, in the row's order.
        sliding_window: how many tokens back a token sees, if the layer limits that.

    Returns:
        `(1, tokens, heads, dim)`, and None for the weights.
    """
    if packed_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    more = {**more, "is_causal": True}
    if (dtype := _flash_type(query)) is not None and not more.get("dropout"):
        q, k, v = (t.to(dtype) for t in (query, key, value))
        return _varlen_attention(q, k, v, packed_lengths, sliding_window, more.get("scaling")), None
    if query.device.type != "cpu":
        return _padded_attention(module, query, key, value, packed_lengths, sliding_window, more), None
    parts = []  # a call for each sample: no padding, no mask, and split() has a cheap backward
    # torch's attention on the CPU is several times as slow in bfloat16 as in float32, conversions included; autocast would
    # take it back to bfloat16
    split = [t.float().split(packed_lengths, dim=2) for t in (query, key, value)]
    with torch.autocast("cpu", enabled=False):
        for q, k, v in zip(*split, strict=True):
            parts.append(_causal(module, q, k, v, sliding_window, more))
    return torch.cat(parts, dim=1).to(query.dtype), None


def _causal(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, window: int | None, more: dict[str, Any]) -> Tensor:
    length, mask = q.shape[2], None
    if window is not None and length > window:
        back = torch.arange(length, device=q.device)
        back = back[:, None] - back[None, :]
        mask = ((back >= 0) & (back < window))[None, None]
    return sdpa_attention_forward(module, q, k, v, mask, **more)[0]


def _flash_type(query: Tensor) -> torch.dtype | None:
    """The 16-bit type in which torch's FlashAttention can be used here, if it can: GPUs from Ampere on, usual heads."""
    if query.device.type != "cuda" or torch.cuda.get_device_capability(query.device)[0] < 8:
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    usual = query.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    return dtype if usual and dtype in (torch.float16, torch.bfloat16) else None


def _varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int | None, scale: float | None
) -> Tensor:
    """As `packed_attention`, by torch's FlashAttention for samples of different lengths (`_flash_type`)."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(q.device)
    back = -1 if window is None else window - 1  # how many tokens before it a token sees
    rows = (t[0].transpose(0, 1) for t in (q, k, v))  # (tokens, heads, dim)
    longest = max(lengths)
    shape = {"scale": scale, "window_size": (back, 0), "enable_gqa": True}
    return varlen_attn(*rows, ends, ends, longest, longest, **shape)[None]


def _padded_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int | None, more: dict[str, Any]
) -> Tensor:
    """As `packed_attention`, in one call: samples side by side, padded on the right, where no token looks."""
    longest, device = max(lengths), q.device
    sizes = torch.tensor(lengths, device=device)
    column = torch.arange(longest, device=device)[None, :]
    real = column < sizes[:, None]
    index = ((sizes.cumsum(0) - sizes)[:, None] + column).where(real, 0)
    q, k, v = (t[0][:, index].transpose(0, 1) for t in (q, k, v))  # (samples, heads, longest, dim)
    return _causal(module, q, k, v, window, more)[real][None]


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)  # for batches that are not packed


class LabelledHead:
    """Lets a model's output projection see, inside `only(...)`, the chosen positions and no others.

    Args:
        model: any causal LM (or PEFT's wrapper); its output embeddings are a module of their own, tied or not.
    """

    def __init__(self, model: PreTrainedModel):
        self._keep: Tensor | None = None
        head = model.get_output_embeddings()
        if head is None:
            raise UserError(
                f"{type(model).__name__} has no output embeddings: it is no causal LM that can be trained here"
            )
        head.register_forward_pre_hook(self._select)

    def _select(self, head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._keep is None:
            return None
        hidden = args[0]
        chosen = self._keep.flatten().nonzero()[:, 0]
        filler = chosen.new_zeros(-len(chosen) % ROUND)
        return (hidden.reshape(-1, hidden.shape[-1])[torch.cat([chosen, filler])][None], *args[1:])

    @contextmanager
    def only(self, keep: Tensor) -> Iterator[None]:
        """Within the block logits are `(1, n, vocabulary)`: first those where the bool `keep` (batch, length) is true.

        Rows of no meaning follow, up to a multiple of `collator.ROUND`.
        """
        self._keep = keep
        try:
            yield
        finally:
            self._keep = None


@contextmanager
def float32(model: nn.Module) -> Iterator[None]:
    """Within the block `model` computes in float32, whatever its weights are kept in: a module's are converted while it runs."""
    kept: dict[nn.Parameter, Tensor] = {}

    def widen(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        for parameter in module.parameters(recurse=False):
            kept.setdefault(parameter, parameter.data)
            parameter.data = parameter.data.float()
        return tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)

    def restore(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = kept.pop(parameter, parameter.data)

    own = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    hooks = [module.register_forward_pre_hook(widen) for module in own]
    hooks += [module.register_forward_hook(restore, always_call=True) for module in own]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_packing(model: PreTrainedModel) -> None:
    """Make sure that two packed samples have the logits they have alone, to the rounding of float32.

    Raises:
        UserError: the architecture does not hand the samples' lengths to its attention, or mixes tokens elsewhere.
    """
    training, before = model.training, model.config._attn_implementation
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in (5, 7)]
    batch = pack(rows, rows)
    batch.pop("labels")
    model.eval()
    try:
        with torch.no_grad(), float32(model):
            alone = torch.cat([model(torch.tensor([row]), use_cache=False).logits for row in rows], dim=1)
            model.set_attn_implementation(PACKED)
            packed = model(**batch, use_cache=False).logits
        same = bool((packed - alone).norm() <= 1e-4 * alone.norm())
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError):
        same = False
    finally:
        model.set_attn_implementation(before)
        model.train(training)
    if not same:
        raise UserError(f"--packing: {type(model).__name__} does not keep packed samples apart; leave the flag out")
