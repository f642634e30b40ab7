"""RQ-VAE: an autoencoder whose latent vector is a sum of codes, one of each level."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.nn import functional

from models.layers import MLPLayers
from models.quantiser import ResidualVectorQuantizer


@dataclass(frozen=True)
class RQVAEConfig:
    """The architecture and losses of an RQ-VAE; names as in the flags of main.py (and in the original's checkpoints)."""

    num_emb_list: Sequence[int] = (256, 256, 256)
    e_dim: int = 32
    layers: Sequence[int] = (2048, 1024, 512, 256, 128, 64)
    dropout_prob: float = 0.0
    bn: bool = False
    loss_type: str = "mse"
    quant_loss_weight: float = 1.0
    beta: float = 0.25
    kmeans_init: bool = True
    kmeans_iters: int = 100
    sk_epsilons: Sequence[float] = (0.0, 0.0, 0.0)
    sk_iters: int = 50
    seed: int = 2024

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> RQVAEConfig:
        """The configuration in parsed flags or in a checkpoint's `args` (unknown names are left out)."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in vars(args).items() if name in known})


class RQVAE(nn.Module):
    """Encoder, residual quantiser, mirrored decoder.

    Args:
        in_dim: width of an item's embedding.
        config: everything else.
    """

    def __init__(self, in_dim: int, config: RQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.in_dim = in_dim
        sizes = [in_dim, *config.layers, config.e_dim]
        self.encoder = MLPLayers(sizes, dropout=config.dropout_prob, bn=config.bn)
        self.rq = ResidualVectorQuantizer(
            config.num_emb_list,
            config.e_dim,
            sk_epsilons=config.sk_epsilons,
            sk_iters=config.sk_iters,
            beta=config.beta,
            kmeans_init=config.kmeans_init,
            kmeans_iters=config.kmeans_iters,
            seed=config.seed,
        )
        self.decoder = MLPLayers(sizes[::-1], dropout=config.dropout_prob, bn=config.bn)

    def forward(self, x: torch.Tensor, use_sk: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, in_dim) → reconstruction (B, in_dim), quantisation loss (scalar), codes int64 (B, levels)."""
        quantised, rq_loss, codes = self.rq(self.encoder(x), use_sk)
        return self.decoder(quantised), rq_loss, codes

    @torch.no_grad()
    def get_indices(self, x: torch.Tensor, use_sk: bool = False) -> torch.Tensor:
        """Codes of `x` (B, in_dim): int64 (B, levels); nearest ones, or by Sinkhorn over this batch."""
        return self.rq(self.encoder(x), use_sk)[2]

    def losses(self, output: torch.Tensor, rq_loss: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The total loss and the reconstruction loss (mean over all numbers), both scalars."""
        measure = functional.l1_loss if self.config.loss_type == "l1" else functional.mse_loss
        reconstruction = measure(output, x, reduction="sum") / max(x.numel(), 1)
        return reconstruction + self.config.quant_loss_weight * rq_loss, reconstruction
