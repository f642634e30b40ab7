"""Vector quantisation (van den Oord et al., 2017) and its residual form (RQ-VAE: Lee et al., 2022; TIGER; LC-Rec III-B)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from models.kmeans import kmeans_centers
from models.sinkhorn import sinkhorn_codes

Gather = Callable[[torch.Tensor], tuple[torch.Tensor, slice]]


def alone(rows: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """The gather of a single process: its rows are the whole batch."""
    return rows.detach(), slice(0, len(rows))


def mean_square(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean squared difference; 0 for no rows (a process may have none of a small last batch)."""
    return functional.mse_loss(a, b, reduction="sum") / max(a.numel(), 1)


def squared_distances(rows: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances: (…, B, dim) and (K, dim) → (…, B, K)."""
    return (rows**2).sum(-1, keepdim=True) + (codes**2).sum(-1) - 2 * rows @ codes.t()


class VectorQuantizer(nn.Module):
    """One level: a codebook and the rule that gives each row one of its codes.

    Args:
        n_codes: codes K.
        dim: width of a code.
        beta: weight of the commitment loss.
        kmeans_init: start from k-means centres of the first training batch; else uniform in ±1/K.
        kmeans_iters: rounds of k-means at most.
        sk_epsilon: above 0, codes are assigned by Sinkhorn in training.
        sk_iters: Sinkhorn rounds.
        seed: of k-means.
    """

    def __init__(
        self,
        n_codes: int,
        dim: int,
        *,
        beta: float = 0.25,
        kmeans_init: bool = True,
        kmeans_iters: int = 100,
        sk_epsilon: float = 0.0,
        sk_iters: int = 50,
        seed: int = 2024,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.kmeans_iters = kmeans_iters
        self.sk_epsilon = sk_epsilon
        self.sk_iters = sk_iters
        self.seed = seed
        self.embedding = nn.Embedding(n_codes, dim)
        self.gather: Gather = alone  # k-means and Sinkhorn see the batch of all processes
        self.initialised = not kmeans_init
        if kmeans_init:
            nn.init.zeros_(self.embedding.weight)
        else:
            nn.init.uniform_(self.embedding.weight, -1.0 / n_codes, 1.0 / n_codes)
        # A loaded codebook is a learned one: it must not be initialised again when training goes on.
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "initialised", True))

    @torch.no_grad()
    def initialise(self, rows: torch.Tensor) -> None:
        """Set the codes to the k-means centres of `rows` (n, dim), those of all processes."""
        rows, _ = self.gather(rows)
        self.embedding.weight.copy_(kmeans_centers(rows, self.embedding.num_embeddings, self.kmeans_iters, self.seed))
        self.initialised = True

    @torch.no_grad()
    def assign(self, rows: torch.Tensor, use_sk: bool) -> torch.Tensor:
        """Codes of `rows` (B, dim): by Sinkhorn over the batch where `use_sk` and the level's epsilon allow, else nearest."""
        if use_sk and self.sk_epsilon > 0:
            batch, own = self.gather(rows)
            distances = squared_distances(batch, self.embedding.weight)
            return sinkhorn_codes(distances, self.sk_epsilon, self.sk_iters)[own]
        return squared_distances(rows, self.embedding.weight).argmin(-1)

    def forward(self, rows: torch.Tensor, use_sk: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantise `rows` (B, dim).

        Returns:
            the chosen codes' vectors with a straight-through gradient (B, dim), the level's loss (codebook + beta ×
            commitment), the codes int64 (B,).
        """
        if self.training and not self.initialised:
            self.initialise(rows)
        codes = self.assign(rows, use_sk)
        chosen = self.embedding(codes)
        loss = mean_square(chosen, rows.detach()) + self.beta * mean_square(chosen.detach(), rows)
        return rows + (chosen - rows).detach(), loss, codes


class ResidualVectorQuantizer(nn.Module):
    """Levels of codebooks, each on what the levels before left over."""

    def __init__(self, n_codes: Sequence[int], dim: int, *, sk_epsilons: Sequence[float], **options: object) -> None:
        super().__init__()
        self.vq_layers = nn.ModuleList(
            VectorQuantizer(n, dim, sk_epsilon=epsilon, **options)
            for n, epsilon in zip(n_codes, sk_epsilons, strict=True)
        )

    def forward(self, rows: torch.Tensor, use_sk: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantise `rows` (B, dim).

        The residual is reduced by the straight-through output, so later levels send no gradient back through it.

        Returns:
            the sum of the chosen codes (B, dim), the mean of the levels' losses, the codes int64 (B, levels).
        """
        residual, total, losses, codes = rows, torch.zeros_like(rows), [], []
        for level in self.vq_layers:
            chosen, loss, indices = level(residual, use_sk)
            residual = residual - chosen
            total = total + chosen
            losses.append(loss)
            codes.append(indices)
        return total, torch.stack(losses).mean(), torch.stack(codes, -1)
