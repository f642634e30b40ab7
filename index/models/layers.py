"""The multi-layer perceptron of encoder and decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class MLPLayers(nn.Module):
    """Linear layers with ReLU between them and nothing after the last.

    The positions in `mlp_layers` (dropout, linear, [batch-norm], ReLU) are part of the checkpoint format.

    Args:
        sizes: widths from input to output, two at least.
        dropout: probability of dropping an input of a linear layer.
        bn: batch normalisation between a linear layer and its ReLU.
    """

    def __init__(self, sizes: Sequence[int], *, dropout: float = 0.0, bn: bool = False) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        for number, (before, after) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            linear = nn.Linear(before, after)
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
            modules += [nn.Dropout(dropout), linear]
            if number < len(sizes) - 2:
                modules += [nn.BatchNorm1d(after)] if bn else []
                modules.append(nn.ReLU())
        self.mlp_layers = nn.Sequential(*modules)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, sizes[0]) → (batch, sizes[-1])."""
        return self.mlp_layers(x)
