"""K-means centres as the start of a codebook."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning


def kmeans_centers(rows: torch.Tensor, codes: int, iterations: int, seed: int, starts: int = 10) -> torch.Tensor:
    """`codes` centres of `rows` (n, dim): k-means++, the best of `starts`, at most `iterations` rounds each.

    With fewer rows than codes, or fewer distinct ones, the centres left over repeat rows with a small jitter, so that
    they can part later.

    Returns:
        (codes, dim), on the device and in the dtype of `rows`.

    Raises:
        FloatingPointError: a row is not finite.
    """
    if not torch.isfinite(rows).all():
        raise FloatingPointError("k-means meets rows that are not finite")
    points = rows.detach().cpu().float().numpy()
    distinct = np.unique(points, axis=0)
    wanted = min(codes, len(distinct))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = KMeans(wanted, init="k-means++", n_init=starts, max_iter=iterations, random_state=seed).fit(points)
    centers = found.cluster_centers_
    if wanted < codes:
        generator = np.random.default_rng(seed)
        picks = generator.integers(len(points), size=codes - wanted)
        jitter = generator.standard_normal((codes - wanted, points.shape[1])) * (points.std() * 1e-2 + 1e-6)
        centers = np.concatenate([centers, points[picks] + jitter])
    return torch.from_numpy(np.ascontiguousarray(centers)).to(rows)
