"""A learning rate of their own for the rows of new tokens."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback


class RowRate(TrainerCallback):
    """Gives the rows `ids` of embeddings and head a learning rate of their own, `factor` times that of all other weights.

    After each step of the optimiser, what these rows moved is stretched: for AdamW, whose step is its rate times something
    that does not depend on the rate, that is the same as a rate of their own. It keeps no state, so a resumed run goes on.
    """

    def __init__(self, model: Any, ids: list[int], factor: float):
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        self.weights = list({id(end.weight): end.weight for end in ends if end is not None}.values())
        self.ids, self.factor = torch.tensor(ids), factor
        self.before: list[torch.Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **more: Any) -> None:
        """Hook into torch's optimiser, which accelerate wraps."""
        inner = getattr(optimizer, "optimizer", optimizer)
        inner.register_step_pre_hook(self._remember)
        inner.register_step_post_hook(self._stretch)

    def _remember(self, *_: Any) -> None:
        self.ids = self.ids.to(self.weights[0].device)
        self.before = [weight.detach()[self.ids] for weight in self.weights]

    @torch.no_grad()
    def _stretch(self, *_: Any) -> None:
        for weight, before in zip(self.weights, self.before, strict=True):
            weight[self.ids] = before.lerp(weight[self.ids], self.factor)
