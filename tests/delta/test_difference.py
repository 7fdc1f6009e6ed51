"""What became of a tensor: each kind made on purpose, and none taken for another."""

import pytest
import torch
from merges import BF16, F16, F32, full, merged, update, weights

from laser.differences.difference import Change, Verdict, compare_tensors, judge_difference, whitened
from laser.spectral.devices import HOST


def change(W: torch.Tensor, q: torch.Tensor) -> Change:
    found = compare_tensors(W, q)
    if found.kind is not Verdict.CHANGED or q.ndim != 2:
        return found
    s = torch.linalg.svdvals(whitened(W, q, HOST)).numpy()
    return judge_difference(found, s, (q.shape[0], q.shape[1]))


def test_identical() -> None:
    W = weights(20, 30)
    assert change(W, W.clone()) == Change(Verdict.SAME, moved=0.0)
    assert change(torch.arange(5), torch.arange(5)).kind is Verdict.SAME
    assert change(torch.arange(5), torch.arange(5) + 1).kind is Verdict.CHANGED
    zero = torch.zeros(3, 4, dtype=BF16)
    assert change(zero, zero).kind is Verdict.SAME
    assert change(zero, -zero).kind is Verdict.CHANGED  # not the same bytes


@pytest.mark.parametrize("dtype", [F16, F32])
def test_another_format_alone(dtype: torch.dtype) -> None:
    W = weights(20, 30)
    assert change(W, W.to(dtype)).kind is Verdict.CAST
    assert change(W.float() * (1 + 1e-3), (W.float() * (1 + 1e-3)).to(dtype)).kind in (Verdict.CAST, Verdict.SAME)


@pytest.mark.parametrize("scale", [0.97, 0.5, 1.03, 1.009])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_scaled(scale: float, dtype: torch.dtype) -> None:
    W = weights(64, 48, dtype=dtype)
    found = change(W, (W.float() * scale).to(dtype))
    assert found.kind is Verdict.SCALED and found.scale == pytest.approx(scale, rel=1e-4)
    W[:22] = 0  # over a thousand entries that say nothing
    assert change(W, (W.float() * scale).to(dtype)).kind is Verdict.SCALED
    q = (W.float() * scale).to(dtype)
    q[-1, -1] *= 1.5  # one entry that is another one, the last
    assert change(W, q).kind is not Verdict.SCALED


@pytest.mark.parametrize("share", [0.01, 0.03])
@pytest.mark.parametrize("rank", [4, 8])
def test_low_rank(share: float, rank: int) -> None:
    W = weights(256, 192)
    found = change(W, merged(W, update(W, rank, share), "delta-first"))
    assert found.kind is Verdict.LOW_RANK and found.rank in (rank, rank + 1)
    assert found.share == pytest.approx(share, rel=0.3) and found.rest == pytest.approx(1, abs=0.06)
    assert found.energy and found.moved and found.cosine and found.cosine > 0.99


@pytest.mark.parametrize("power", [0.0, 0.3, 0.7])
def test_full(power: float) -> None:
    W = weights(256, 192)
    found = change(W, merged(W, full(W, 0.01, power)))
    assert found.kind is Verdict.FULL and found.rank and found.rank > 40


def test_faint() -> None:
    """Nearly nothing moved: no law holds, so nothing is claimed, of an adapter or of another change."""
    W = weights(256, 192)
    for X in (update(W, 4, 1e-3), full(W, 1e-3)):
        found = change(W, merged(W, X))
        assert found.kind is Verdict.FAINT and found.moved and found.moved < 0.5 and found.rest and found.rest < 0.8


def test_unrelated() -> None:
    assert change(weights(96, 64), weights(96, 64, seed=9)).kind is Verdict.OTHER


def test_not_finite() -> None:
    W = weights(8, 8)
    for bad in (torch.nan, torch.inf):
        q = W.clone()
        q[2, 3] = bad
        assert change(W, q).kind is Verdict.NOT_FINITE and change(q, W).kind is Verdict.NOT_FINITE


def test_vectors_and_other_formats_are_only_compared() -> None:
    v = torch.linspace(0.5, 2, 64).to(BF16)
    assert compare_tensors(v, v + 0.1).kind is Verdict.CHANGED
    W = weights(8, 8, dtype=torch.float64)
    assert compare_tensors(W, W + 1e-3).kind is Verdict.CHANGED and compare_tensors(W, W.clone()).kind is Verdict.SAME
