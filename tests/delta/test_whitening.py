"""The edge of the rounding: biwhitened differences of merges against the Marchenko-Pastur law with sigma = 1."""

import numpy as np
import pytest
import torch
from merges import BF16, F16, full, merged, update, weights

from laser.differences.difference import SIGMA, whitened
from laser.differences.formats import format_of
from laser.differences.whitening import biwhiten
from laser.errors import NumericalError, UsageError
from laser.spectral.devices import HOST
from laser.spectral.rules import apply_rule, draws_needed
from laser.spectral.unit import Spectrum

SHAPES = [(128, 128), (256, 96), (96, 256)]


def rank_of(W: torch.Tensor, q: torch.Tensor) -> int:
    return apply_rule("rounding", spectrum(W, q), (q.shape[0], q.shape[1]), sigma=SIGMA).rank


def spectrum(W: torch.Tensor, q: torch.Tensor) -> Spectrum:
    return torch.linalg.svdvals(whitened(W, q, HOST)).cpu().numpy()


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_and_columns_have_mean_one(shape: tuple[int, int]) -> None:
    V = format_of(BF16).variance(weights(*shape))
    scales = biwhiten(V)
    white = scales.rows**2 * V * scales.columns**2
    assert torch.allclose(white.mean(0), torch.ones(shape[1], dtype=V.dtype), atol=1e-5)
    assert torch.allclose(white.mean(1), torch.ones(shape[0], dtype=V.dtype), atol=1e-5)
    assert torch.allclose(scales.undo(scales.of(V)), V)


def test_scaling_the_variances_scales_the_scales() -> None:
    """Down to those of float32's subnormals."""
    V = format_of(BF16).variance(weights(40, 30))
    one, other = biwhiten(V), biwhiten(V * 2.0**-260)
    assert torch.allclose(one.of(V), other.of(V) * 2.0**-130)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_pure_rounding_is_under_the_edge(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """A base in float32 and its cast: nothing but rounding. As every calibrated rule, at most two over the edge."""
    for seed in range(6):
        W = weights(*shape, seed=seed, dtype=torch.float32)
        s = spectrum(W, W.to(dtype))
        assert apply_rule("rounding", s, shape, sigma=SIGMA).rank <= 2
        assert float(np.mean(s**2)) * len(s) == pytest.approx(shape[0] * shape[1], rel=0.04)
        assert s[0] == pytest.approx(shape[0] ** 0.5 + shape[1] ** 0.5, rel=0.08)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_planted_low_rank_is_counted(shape: tuple[int, int], rank: int) -> None:
    W = weights(*shape)
    for how in ("once", "delta-first"):
        # One value of pure noise in five draws lies over the bare edge: the law of the other rules, too.
        assert rank_of(W, merged(W, update(W, rank, 0.02), how)) in (rank, rank + 1)


def test_without_biwhitening_rules_count_too_many() -> None:
    """The effect is there: DELTA.md has 30 to 41 for a rank of 8."""
    W = weights(256, 192)
    q = merged(W, update(W, 8, 0.01))
    s = torch.linalg.svdvals(q.double() - W.double()).numpy()
    assert apply_rule("mp-median", s, (256, 192)).rank > 12
    assert rank_of(W, q) == 8


def test_transposing_changes_nothing() -> None:
    W = weights(96, 64)
    q = merged(W, update(W, 3, 0.01))
    assert spectrum(W, q) == pytest.approx(spectrum(W.T.contiguous(), q.T.contiguous()), rel=1e-6)


def test_powers_of_two_change_nothing() -> None:
    """In range of the format the rounding scales along."""
    W = weights(96, 64)
    q = merged(W, update(W, 3, 0.01))
    assert spectrum(W, q) == pytest.approx(spectrum(W * 2.0**-20, q * 2.0**-20), rel=1e-9)


def test_the_rule_asks_for_its_level() -> None:
    s = np.linspace(30, 1, 64)
    with pytest.raises(UsageError, match="for differences of two checkpoints, whose noise is known; try laser delta"):
        apply_rule("rounding", s, (64, 64))
    with pytest.raises(UsageError, match="for differences of two checkpoints"):
        draws_needed("rounding")
    one = apply_rule("rounding", s, (64, 64), sigma=1.0)
    assert one.threshold == 16.0 and one.sigma == 1.0 and one.rank == int((s > 16).sum())
    for c in (2.0**-40, 3.7, 2.0**60):  # the threshold goes with the noise, as every rule's does
        scaled = apply_rule("rounding", s * c, (64, 64), sigma=c)
        assert scaled.rank == one.rank and scaled.threshold == pytest.approx(16 * c, rel=1e-12)
    assert apply_rule("rounding", s, (64, 96), sigma=1.0) == apply_rule("rounding", s, (96, 64), sigma=1.0)
    assert apply_rule("rounding", np.zeros(8), (8, 8), sigma=1.0).rank == 0


def test_a_full_fine_tune_is_over_the_edge_in_many_directions() -> None:
    W = weights(256, 192)
    assert rank_of(W, merged(W, full(W, 0.02))) > 60


def test_nan_is_refused() -> None:
    W = weights(8, 8)
    W[1, 2] = torch.nan
    with pytest.raises(NumericalError, match="NaN or Inf"):
        whitened(weights(8, 8), W, HOST)
    with pytest.raises(UsageError, match="rounding to"):
        whitened(weights(8, 8).double(), weights(8, 8).double(), HOST)
