"""Permutations keep what they should, Lanczos finds the largest value, and `parallel` is calibrated by construction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laser.errors import UsageError
from laser.spectral.devices import Device
from laser.spectral.permutation import largest_singular_value, null_largest, permuted
from laser.spectral.rules import apply_rule, fewest_draws


@given(shape=st.tuples(st.integers(1, 12), st.integers(1, 12)), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_permutations_keep_every_entry_and_rows_keep_theirs(shape: tuple[int, int], seed: int) -> None:
    W = torch.arange(shape[0] * shape[1]).reshape(shape).to(torch.bfloat16)
    whole, rows = permuted(W, seed), permuted(W, seed, "rows")
    assert whole.shape == rows.shape == W.shape
    assert sorted(whole.flatten().tolist()) == sorted(W.flatten().tolist())
    for before, after in zip(W.tolist(), rows.tolist(), strict=True):
        assert sorted(before) == sorted(after)
    assert torch.equal(permuted(W, seed), whole)  # the same seed, the same order
    assert torch.equal(W, torch.arange(shape[0] * shape[1]).reshape(shape).to(torch.bfloat16))  # W is left alone


def test_permuting_destroys_a_rank_one_matrix_and_other_seeds_differ() -> None:
    W = torch.outer(torch.arange(1.0, 41.0), torch.arange(1.0, 61.0))
    s = torch.linalg.svdvals(permuted(W, 0))
    assert s[1] > 0.05 * s[0]
    assert not torch.equal(permuted(W, 0), permuted(W, 1))


def test_unknown_permutation_is_answered_with_the_list() -> None:
    with pytest.raises(UsageError, match="entries, rows"):
        permuted(torch.ones(2, 2), 0, "columns")


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (16, 16), (17, 17), (40, 90), (200, 60)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_value_is_that_of_a_full_decomposition(
    device: Device, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    full = float(torch.linalg.svdvals(W.double())[0])
    assert largest_singular_value(W, device) == pytest.approx(full, rel=1e-4)
    assert largest_singular_value(W.T, device) == pytest.approx(full, rel=1e-4)
    assert largest_singular_value(torch.zeros(shape), device) == 0.0


@pytest.mark.parametrize(("alpha", "draws"), [(0.05, 19), (0.1, 9), (0.5, 1), (0.01, 99), (0.3, 3)])
def test_fewest_draws(alpha: float, draws: int) -> None:
    assert fewest_draws(alpha) == draws


def test_threshold_is_the_order_statistic_that_the_level_names() -> None:
    null = np.array([5.0, 1.0, 3.0, 2.0, 4.0, 6.0, 9.0, 8.0, 7.0])  # 9 draws: the level is k / 10
    s = np.array([8.5, 7.5, 1.0])
    for alpha, threshold in ((0.1, 9.0), (0.2, 8.0), (0.29, 8.0), (0.5, 5.0)):
        assert apply_rule(f"parallel:{alpha}", s, (3, 5), null).threshold == threshold
    assert apply_rule("parallel:0.2", s, (3, 5), null).rank == 1
    assert apply_rule("parallel:0.2", np.zeros(3), (3, 5), null).rank == 0


@pytest.mark.parametrize("null", [None, np.ones(5)])
def test_too_few_permutations_name_the_scan_that_is_needed(null: np.ndarray | None) -> None:
    with pytest.raises(UsageError, match="laser scan --null 19"):
        apply_rule("parallel", np.ones(3), (3, 3), null)


@pytest.mark.slow
@pytest.mark.parametrize("entries", ["gaussian", "student"])
def test_noise_of_any_law_is_found_at_most_as_often_as_the_level_says(device: Device, entries: str) -> None:
    random, found, trials = np.random.default_rng(3), 0, 60
    for _ in range(trials):
        W = random.standard_normal((24, 40)) if entries == "gaussian" else random.standard_t(3, (24, 40))
        tensor = torch.from_numpy(W)
        s = torch.linalg.svdvals(tensor).numpy()
        found += apply_rule("parallel:0.2", s, (24, 40), null_largest(tensor, 4, device)).rank > 0
    assert 0 < found / trials < 0.41  # 0.2 within four binomial errors of 0.052


def test_signal_is_found_and_scaling_scales(device: Device) -> None:
    random = np.random.default_rng(2)
    W = torch.from_numpy(random.standard_normal((30, 50)))
    W[:, 0] += 20 * torch.from_numpy(random.standard_normal(30)) / 30**0.5
    s, null = torch.linalg.svdvals(W).numpy(), null_largest(W, 19, device)
    cut = apply_rule("parallel", s, (30, 50), null)
    assert cut.rank == 1
    again = apply_rule("parallel", 8 * s, (50, 30), null_largest(8 * W.T, 19, device))
    assert again.rank == 1
    # Transposed, the same seeds give other permutations: the same law, another sample.
    assert again.threshold == pytest.approx(8 * (cut.threshold or 0), rel=0.1)
