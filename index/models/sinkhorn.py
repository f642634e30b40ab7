"""Balanced assignment of rows to codes by Sinkhorn-Knopp: the uniform semantic mapping of LC-Rec (section III-B).

The problem is entropic optimal transport between B rows (mass 1/B each) and K codes (mass 1/K each) with the distances
as cost (Cuturi, 2013). Its plan is `diag(u) · exp(-d/epsilon) · diag(v)`; a round sets u so that rows hold 1/B, then v so
that codes hold 1/K. Scaling a row or a column of the kernel changes u or v and nothing else, so the kernel is kept with
its largest entry in each row and column at 1. Where entries still underflow, the rounds are done on logarithms instead.
"""

from __future__ import annotations

import math

import torch

EQUAL = 1e-9  # entries of a plan that differ by less than this (relatively) do so by rounding only


def center_distances(distances: torch.Tensor) -> torch.Tensor:
    """`distances` mapped linearly to about [-1, 1] over the last two dimensions (B, K); any leading ones are batches."""
    flat = distances.flatten(-2)
    largest, smallest = flat.amax(-1), flat.amin(-1)
    middle = ((largest + smallest) / 2)[..., None, None]
    amplitude = ((largest - smallest) / 2 + 1e-5)[..., None, None]
    return (distances - middle) / amplitude


def log_potentials(log_kernel: torch.Tensor, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """log u (…, B) and log v (…, K) after `rounds` rounds, by log-sum-exp: finite for every finite kernel."""
    rows, codes = log_kernel.shape[-2:]
    log_v = log_kernel.new_zeros(*log_kernel.shape[:-2], codes)
    log_u = log_kernel.new_zeros(*log_kernel.shape[:-2], rows)
    for _ in range(rounds):
        log_u = -math.log(rows) - torch.logsumexp(log_kernel + log_v[..., None, :], dim=-1)
        log_v = -math.log(codes) - torch.logsumexp(log_kernel + log_u[..., :, None], dim=-2)
    return log_u, log_v


def scaled_potentials(log_kernel: torch.Tensor, rounds: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same by matrix-vector products on the kernel itself, much faster, where its numbers cannot underflow.

    The kernel is first divided by the largest entry of each row, then of each column: rows that are nearly equal, as in
    a colliding group, then have entries near 1 however far their codes are.

    Returns:
        log u (…, B), log v (…, K), and bool (…): which batches are sound; the others' numbers mean nothing.
    """
    smallest = -math.log(torch.finfo(log_kernel.dtype).tiny)  # 708 for float64: exp(-708) is the last normal number
    rows, codes = log_kernel.shape[-2:]
    top = log_kernel.amax(-1, keepdim=True)
    scaled = log_kernel - top
    column = scaled.amax(-2, keepdim=True)
    scaled = scaled - column
    sound = scaled.flatten(-2).amin(-1) > -0.98 * smallest
    kernel = scaled.exp_()
    transposed = kernel.transpose(-1, -2)
    v = column.transpose(-1, -2).exp()  # where it underflows it adds nothing: each row's largest term is 1
    u = kernel.new_ones(*kernel.shape[:-2], rows, 1)
    for _ in range(rounds):
        u = (1 / rows) / (kernel @ v)
        v = (1 / codes) / (transposed @ u)
    log_u, log_v = u.squeeze(-1).log(), v.squeeze(-1).log()
    largest = torch.maximum(log_u.abs().amax(-1), log_v.abs().amax(-1))
    sound &= largest < 0.9 * smallest  # false, too, where it is not a number
    return log_u - top.squeeze(-1), log_v - column.squeeze(-2), sound


def log_plan(distances: torch.Tensor, epsilon: float, rounds: int) -> torch.Tensor:
    """The logarithm of the transport plan after `rounds` rounds (rows to 1/B, then codes to 1/K).

    Args:
        distances: (…, B, K), centred as `center_distances` does; computed in its dtype (float64 for the paper's way).
            Leading dimensions are batches of their own; only those whose numbers could underflow take the slow way.
        epsilon: weight of the entropy, above 0; smaller is closer to the exact assignment.
        rounds: how many, 1 at least; the codes' totals are exactly 1/K after the last one, the rows' about 1/B.

    Returns:
        (…, B, K), finite whatever epsilon is (entries of the plan itself may be too small for a float).
    """
    log_kernel = distances / -epsilon
    log_u, log_v, sound = scaled_potentials(log_kernel, rounds)
    if not sound.all():
        log_u[~sound], log_v[~sound] = log_potentials(log_kernel[~sound], rounds)
    return log_kernel + log_u[..., :, None] + log_v[..., None, :]


def sinkhorn_codes(distances: torch.Tensor, epsilon: float, rounds: int) -> torch.Tensor:
    """Each row's code: the largest entry of its row in the plan, computed in float64.

    A batch with fewer rows than codes gives a row several codes wholly, as in the collision rounds: their entries are
    1/K each but for rounding errors, which would decide. Of such equals the nearest code is taken, on any machine.

    Args:
        distances: (…, B, K) squared distances, not centred; leading dimensions are batches of their own.

    Returns:
        int64 (…, B).
    """
    plan = log_plan(center_distances(distances).double(), epsilon, rounds)
    largest = plan >= plan.amax(-1, keepdim=True) - EQUAL
    return torch.where(largest, distances, torch.inf).argmin(-1)
