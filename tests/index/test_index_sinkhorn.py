"""Sinkhorn against an independent float64 log-domain reference; the marginals that it promises; inputs that break naive forms."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

sys.path.append(str(Path(__file__).resolve().parents[2] / "index"))

from models import sinkhorn


def reference_log_plan(distances: np.ndarray, epsilon: float, rounds: int) -> np.ndarray:
    """log of the plan, (B, K): the rounds applied to the whole matrix, in float64 logarithms, by SciPy."""
    log_plan = -distances / epsilon
    log_plan = log_plan - logsumexp(log_plan)
    for _ in range(rounds):
        log_plan = log_plan - logsumexp(log_plan, axis=1, keepdims=True) - np.log(len(log_plan))
        log_plan = log_plan - logsumexp(log_plan, axis=0, keepdims=True) - np.log(log_plan.shape[1])
    return log_plan


def naive_plan(distances: torch.Tensor, epsilon: float, rounds: int) -> torch.Tensor:
    """The rounds as DESIGN.md words them, on the plan itself."""
    plan = torch.exp(-distances / epsilon)
    plan = plan / plan.sum()
    for _ in range(rounds):
        plan = plan / plan.sum(1, keepdim=True) / len(plan)
        plan = plan / plan.sum(0, keepdim=True) / plan.shape[1]
    return plan


def centred(rows: int, codes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return sinkhorn.center_distances(torch.rand(rows, codes, generator=generator, dtype=torch.float64))


def check_plan(distances: torch.Tensor, epsilon: float, rounds: int = 50) -> torch.Tensor:
    """Finite, equal to the reference, code totals 1/K; returns the plan."""
    found = sinkhorn.log_plan(distances, epsilon, rounds)
    assert torch.isfinite(found).all()
    rounding = 1e-7 + 2e-15 / epsilon  # numbers as large as 2 / epsilon are added
    wanted = reference_log_plan(distances.numpy(), epsilon, rounds)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9, atol=rounding)
    totals = found.exp().sum(0)
    torch.testing.assert_close(totals, torch.full_like(totals, 1 / len(totals)), rtol=rounding, atol=0)
    return found.exp()


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 256, 1000])
@pytest.mark.parametrize("epsilon", [0.003, 0.05, 1.0])
def test_any_batch_size_equals_the_reference(rows: int, epsilon: float) -> None:
    check_plan(centred(rows, 16), epsilon)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    codes=st.integers(1, 40),
    rounds=st.integers(1, 60),
    epsilon=st.floats(1e-6, 10.0),
    seed=st.integers(0, 2**20),
)
def test_any_shape_and_epsilon(rows: int, codes: int, rounds: int, epsilon: float, seed: int) -> None:
    check_plan(centred(rows, codes, seed), epsilon, rounds)


def test_rows_approach_their_share() -> None:
    plan = check_plan(centred(64, 16), 0.5, rounds=200)
    torch.testing.assert_close(plan.sum(1), torch.full((64,), 1 / 64, dtype=torch.float64), rtol=1e-6, atol=0)


def test_far_outlier() -> None:
    rows, codes = torch.randn(50, 8), torch.randn(16, 8)
    rows[3] = 1e6
    distances = ((rows[:, None] - codes) ** 2).sum(-1).double()
    check_plan(sinkhorn.center_distances(distances), 0.003)
    assert sinkhorn.sinkhorn_codes(distances, 0.003, 50).shape == (50,)


def test_identical_rows_get_one_code() -> None:
    distances = centred(1, 16).expand(12, 16)
    plan = check_plan(distances, 0.003)
    assert (plan == plan[0]).all()
    assert len(sinkhorn.sinkhorn_codes(distances, 0.003, 50).unique()) == 1


def test_equal_distances_give_the_even_plan() -> None:
    plan = check_plan(sinkhorn.center_distances(torch.full((6, 4), 3.0, dtype=torch.float64)), 0.003)
    torch.testing.assert_close(plan, torch.full((6, 4), 1 / 24, dtype=torch.float64))


@pytest.mark.parametrize("epsilon", [1e-3, 1e-5, 1e-12])
def test_epsilon_at_which_the_naive_form_breaks(epsilon: float) -> None:
    distances = centred(40, 16)
    assert not torch.isfinite(naive_plan(distances, epsilon, 50)).all()
    check_plan(distances, epsilon)


def test_kernel_products_equal_the_words_of_the_algorithm() -> None:
    """At the paper's epsilon the naive form is exact, and the fast one must be used and agree with it."""
    distances = centred(300, 64)
    assert sinkhorn.scaled_potentials(distances / -0.003, 50)[2]
    plan = naive_plan(distances, 0.003, 50)
    torch.testing.assert_close(sinkhorn.log_plan(distances, 0.003, 50).exp(), plan, rtol=1e-8, atol=1e-300)
    assert torch.equal(sinkhorn.sinkhorn_codes(distances, 0.003, 50), plan.argmax(1))


@pytest.mark.parametrize("rows", [1, 2, 5, 40])
def test_of_equal_entries_the_nearest_code(rows: int) -> None:
    """Fewer rows than codes: a row holds several codes wholly; rounding errors must not choose between them."""
    distances = torch.rand(rows, 16, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    plan = naive_plan(sinkhorn.center_distances(distances), 0.003, 50)
    codes = sinkhorn.sinkhorn_codes(distances, 0.003, 50)
    for row, code in enumerate(codes.tolist()):
        equals = (plan[row] >= plan[row].max() * (1 - 1e-9)).nonzero().flatten()
        assert code == equals[distances[row, equals].argmin()]
    if rows == 1:
        assert codes[0] == distances[0].argmin()


def test_batches_are_independent() -> None:
    distances = torch.rand(5, 7, 16, dtype=torch.float64)
    together = sinkhorn.sinkhorn_codes(distances, 0.003, 50)
    assert torch.equal(together, torch.stack([sinkhorn.sinkhorn_codes(part, 0.003, 50) for part in distances]))


def test_one_batch_that_underflows_does_not_slow_down_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many groups only those that need logarithms take them, and all equal the reference."""
    generator = torch.Generator().manual_seed(3)
    groups = torch.rand(2, 9, 4, 16, generator=generator, dtype=torch.float64)
    groups[:, ::2] = groups[:, ::2, :1] + 1e-3 * groups[:, ::2]  # nearly equal rows, as of colliding items
    groups = sinkhorn.center_distances(groups)
    slow = []
    original = sinkhorn.log_potentials
    monkeypatch.setattr(
        sinkhorn, "log_potentials", lambda kernel, rounds: slow.append(len(kernel)) or original(kernel, rounds)
    )
    for epsilon, expected in ((0.5, 0), (0.003, 0), (0.0015, 8), (1e-7, 18)):
        slow.clear()
        found = sinkhorn.log_plan(groups, epsilon, 50)
        assert torch.isfinite(found).all()
        for plan, distances in zip(found.flatten(0, 1), groups.flatten(0, 1), strict=True):
            wanted = reference_log_plan(distances.numpy(), epsilon, 50)
            np.testing.assert_allclose(plan.numpy(), wanted, rtol=1e-9, atol=1e-7 + 2e-15 / epsilon)
        assert sum(slow) == expected, epsilon


def test_centring_maps_to_minus_one_and_one() -> None:
    distances = sinkhorn.center_distances(torch.rand(3, 9, 5) * 100 + 7)
    assert torch.allclose(distances.flatten(1).amax(1), torch.ones(3), atol=1e-5)
    assert torch.allclose(distances.flatten(1).amin(1), -torch.ones(3), atol=1e-5)


def test_balance_is_better_than_with_nearest_codes() -> None:
    """Clumped rows: nearest codes leave most codes unused, Sinkhorn's hard assignment spreads over nearly all."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(1024, 8, generator=generator) * 0.3
    codes = torch.randn(64, 8, generator=generator)
    distances = ((rows[:, None] - codes) ** 2).sum(-1)
    nearest = torch.bincount(distances.argmin(1), minlength=64)
    balanced = torch.bincount(sinkhorn.sinkhorn_codes(distances, 0.003, 50), minlength=64)
    assert balanced.max() <= 2 * 1024 / 64 < nearest.max()
    assert (balanced > 0).sum() == 64 > (nearest > 0).sum()
