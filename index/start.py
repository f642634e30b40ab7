"""Where training starts from, if not from random weights and the first batch: principal components, k-means on all items."""

from __future__ import annotations

import numpy as np
import torch

from common import say
from embeddings import Embeddings
from models.kmeans import kmeans_centers
from models.pca import start_at_components
from models.quantiser import VectorQuantizer, squared_distances
from models.rqvae import RQVAE
from models.sinkhorn import center_distances, log_plan
from parallel import Processes

SAMPLE = 131_072  # rows at most for k-means; more change the centres little
BALANCE_ROWS = 16_384  # rows at most for balanced rounds, which need a plan of rows × codes
BALANCE_EPSILON = 0.03


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


def balanced_centers(rows: torch.Tensor, centers: torch.Tensor, rounds: int, epsilon: float) -> torch.Tensor:
    """K-means rounds with Sinkhorn's plan for weights: every code becomes the mean of an equal share of the rows.

    Codes move from outliers to where rows are dense, so that nearly equal rows are told apart.

    Args:
        rows: (n, dim).
        centers: (K, dim), where to start.

    Returns:
        (K, dim).
    """
    for _ in range(rounds):
        plan = log_plan(center_distances(squared_distances(rows, centers)).double(), epsilon, 50).exp()
        centers = ((plan.t() @ rows.double()) / plan.sum(0).unsqueeze(1)).to(centers)
    return centers


@torch.no_grad()
def _start_level(level: VectorQuantizer, rows: torch.Tensor, balance_rounds: int) -> None:
    level.embedding.weight.copy_(
        kmeans_centers(rows, level.embedding.num_embeddings, level.kmeans_iters, level.seed, starts=1)
    )
    if level.sk_epsilon > 0 and balance_rounds:
        sample = rows[:BALANCE_ROWS]
        level.embedding.weight.copy_(balanced_centers(sample, level.embedding.weight, balance_rounds, BALANCE_EPSILON))


@torch.no_grad()
def start(
    model: RQVAE, embeddings: Embeddings, processes: Processes, *, components: bool, all_rows: bool, balance_rounds: int
) -> None:
    """Start `model` (on its device) on the main process and send the outcome to the others.

    Args:
        components: encoder and decoder start at the principal components.
        all_rows: codebooks start at k-means centres of all items' residuals (a sample of 131,072 at most), not of the
            first batch's.
        balance_rounds: rounds of `balanced_centers` after that, on levels with Sinkhorn.
    """
    if processes.is_main:
        if components:
            count = start_at_components(model, *mean_and_covariance(embeddings))
            say(f"starts at {count} principal components")
        if all_rows:
            model.eval()
            picks = np.sort(np.random.default_rng(model.config.seed).permutation(len(embeddings))[:SAMPLE])
            batches = np.array_split(picks, max(1, len(picks) // 4096))
            residual = torch.cat([model.encoder(x) for x in embeddings.batches(batches)])
            residual = residual[torch.randperm(len(residual)).to(residual.device)]
            for level in model.rq.vq_layers:
                _start_level(level, residual, balance_rounds)
                residual = residual - level.embedding.weight[level.assign(residual, use_sk=False)]
    for tensor in model.state_dict().values():
        processes.broadcast_(tensor)
    if all_rows:
        for level in model.rq.vq_layers:
            level.initialised = True
