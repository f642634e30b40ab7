"""Where training starts from, if not from random weights and the first batch: principal components, k-means on all items."""

from __future__ import annotations

import numpy as np
import torch

from commands import tell
from embeddings import Embeddings
from models.kmeans import kmeans_centers
from models.pca import start_at_components
from models.quantiser import squared_distances
from models.rqvae import RQVAE
from models.sinkhorn import center_distances, log_plan
from parallel import Processes

SAMPLE = 32_768  # rows at most for k-means; more change the centres little
BALANCE_ROWS = 16_384  # rows at most for balanced rounds, which need a plan of rows × codes
BALANCE_EPSILON = 0.02


def mean_and_covariance(embeddings: Embeddings, batch_size: int = 8192) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (dim,) and covariance (dim, dim) of all rows, float64, read batch by batch."""
    total = torch.zeros(embeddings.dim, dtype=torch.float64, device=embeddings.device)
    for x in embeddings.in_order(batch_size):
        total += x.double().sum(0)
    mean = total / len(embeddings)
    products = torch.zeros(embeddings.dim, embeddings.dim, dtype=torch.float64, device=embeddings.device)
    for x in embeddings.in_order(batch_size):
        centred = (x - mean.float()).float()
        products += (centred.t() @ centred).double()
    return mean, products / len(embeddings)


def balanced_centers(rows: torch.Tensor, centers: torch.Tensor, rounds: int) -> torch.Tensor:
    """K-means rounds with Sinkhorn's plan for weights: every code becomes the mean of an equal share of the rows.

    Codes move from outliers to where rows are dense, so that nearly equal rows are told apart.

    Args:
        rows: (n, dim).
        centers: (K, dim), where to start.

    Returns:
        (K, dim).
    """
    for _ in range(rounds):
        plan = log_plan(center_distances(squared_distances(rows, centers)).double(), BALANCE_EPSILON, 50).exp()
        centers = ((plan.t() @ rows.double()) / plan.sum(0).unsqueeze(1)).to(centers)
    return centers


def sampled_latents(model: RQVAE, embeddings: Embeddings) -> torch.Tensor:
    """Latent vectors of all items, or of 32,768 of them, in an order drawn from the seed: float32 (n, e_dim)."""
    picks = np.random.default_rng(model.config.seed).permutation(len(embeddings))[:SAMPLE]
    batches = np.array_split(picks, -(-len(picks) // 4096))
    return torch.cat([model.encoder(x) for x in embeddings.batches(batches)])


def first_balanced(levels: int) -> int:
    """The first level that is balanced: the later half is, as the first levels carry the meaning."""
    return levels - max(1, levels // 2)


def _share(model: RQVAE, processes: Processes) -> None:
    """Give every process the main one's model."""
    for tensor in model.state_dict().values():
        processes.broadcast_(tensor)


@torch.no_grad()
def start(
    model: RQVAE, embeddings: Embeddings, processes: Processes, *, components: bool, all_rows: bool, balance_rounds: int
) -> None:
    """Start `model` (on its device) on the main process and send the outcome to the others.

    Args:
        components: encoder and decoder start at the principal components.
        all_rows: codebooks start at k-means centres of all items' residuals (a sample of 32,768 at most), not of the
            first batch's.
        balance_rounds: rounds of `balanced_centers` after that, on the later half of the levels.
    """
    levels = model.rq.vq_layers
    if processes.is_main:
        if components:
            count = start_at_components(model, *mean_and_covariance(embeddings))
            tell(f"starts at {count} principal components")
        if all_rows:
            residual = sampled_latents(model.eval(), embeddings)
            for number, level in enumerate(levels):
                codes, width = level.embedding.weight, level.embedding.num_embeddings
                codes.copy_(kmeans_centers(residual, width, level.kmeans_iters, level.seed, starts=1))
                if number >= first_balanced(len(levels)):
                    codes.copy_(balanced_centers(residual[:BALANCE_ROWS], codes, balance_rounds))
                residual = residual - codes[level.assign(residual, use_sk=False)]
    _share(model, processes)
    if all_rows:
        for level in levels:
            level.initialised = True


@torch.no_grad()
def balance(model: RQVAE, embeddings: Embeddings, processes: Processes, rounds: int) -> None:
    """Balance the later half of the levels of a trained `model` once more: training lets nearly equal items merge."""
    levels = model.rq.vq_layers
    if processes.is_main:
        residual = sampled_latents(model.eval(), embeddings)
        for number, level in enumerate(levels):
            codes = level.embedding.weight
            if number >= first_balanced(len(levels)):
                codes.copy_(balanced_centers(residual[:BALANCE_ROWS], codes, rounds))
            residual = residual - codes[level.assign(residual, use_sk=False)]
    _share(model, processes)
