"""The correction of a copy in the metric of the data: optimal, nested in its rank, and told as it is stored."""

import pytest
import torch

from laser.errors import NumericalError, UsageError
from laser.spectral.correction import FACTOR_DTYPE, Correction, correct, inputs_alike
from laser.spectral.data_metric import ByData
from laser.spectral.devices import HOST

F64 = torch.float64


def copied(m: int, n: int, seed: int = 0, share: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """W (m, n) and a copy of it that is off by `share`, both as a checkpoint stores them."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(m, n, generator=generator)
    Q = W + share * torch.randn(m, n, generator=generator)
    return W.bfloat16(), Q.bfloat16()


def inputs(n: int, count: int = 400, seed: int = 1) -> ByData:
    """Inputs of very different size along their directions."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(count, n, generator=generator, dtype=F64) * torch.logspace(0, -2, n, dtype=F64)
    X = X @ torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64))[0]
    return ByData("full", X.T @ X / count, count, float((X**2).sum(1).square().mean()))


def error(W: torch.Tensor, Q: torch.Tensor, found: Correction, C: torch.Tensor, rank: int) -> float:
    """By the definition."""
    W, Q, B, A = (x.double() for x in (W, Q, found.B[:, :rank], found.A[:rank]))
    R = W - Q - B @ A
    return float(torch.trace(R @ C @ R.T) / torch.trace(W @ C @ W.T))


def reference(W: torch.Tensor, Q: torch.Tensor, C: torch.Tensor, rank: int) -> float:
    """The least error of that rank, by an SVD of D C^(1/2), whatever root of C is taken."""
    s = torch.linalg.svdvals((W.double() - Q.double()) @ torch.linalg.cholesky(C))
    return float((s[rank:] ** 2).sum() / torch.trace(W.double() @ C @ W.double().T))


@pytest.mark.parametrize("m, n", [(24, 40), (40, 24), (32, 32)])
def test_it_is_the_least_error_of_every_rank(m: int, n: int) -> None:
    W, Q = copied(m, n)
    metric = inputs(n)
    found = correct(W, Q, 6, metric, HOST)
    assert found.B.dtype == found.A.dtype == FACTOR_DTYPE and found.rank == 6
    for rank in range(7):
        least = reference(W, Q, metric.moment, rank)
        assert found.predicted[rank] == pytest.approx(least, rel=1e-9)
        assert found.measured[rank] == pytest.approx(error(W, Q, found, metric.moment, rank), rel=1e-9)
        assert least * (1 - 1e-9) <= found.measured[rank] <= least * 1.001 + 1e-6  # 16 bits cost next to nothing
    assert found.predicted[6] < 0.9 * found.predicted[0]  # there was something to gain


def test_the_plain_norm_is_the_truncated_svd_and_loses_in_the_data() -> None:
    W, Q = copied(30, 30)
    metric, rank = inputs(30), 4
    plain, ours = (correct(W, Q, rank, each, HOST) for each in (inputs_alike(30), metric))
    s = torch.linalg.svdvals(W.double() - Q.double())
    assert plain.predicted[rank] == pytest.approx(float((s[rank:] ** 2).sum() / W.double().square().sum()), rel=1e-9)
    assert error(W, Q, plain, metric.moment, rank) > 1.2 * error(W, Q, ours, metric.moment, rank)


def test_a_copy_that_is_off_by_low_rank_is_given_back_whole() -> None:
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(20, 30, generator=generator)
    Q = W - torch.randn(20, 3, generator=generator) @ torch.randn(3, 30, generator=generator)
    found = correct(W, Q, 8, inputs(30), HOST)
    assert found.measured[3] < 1e-4 * found.measured[0]


@pytest.mark.parametrize("exponent", [-40, 40])
def test_it_does_not_depend_on_the_scale_of_the_weights(exponent: int) -> None:
    W, Q = (x.float() for x in copied(16, 24))
    metric = inputs(24)
    one, other = correct(W, Q, 4, metric, HOST), correct(W * 2.0**exponent, Q * 2.0**exponent, 4, metric, HOST)
    assert other.measured == pytest.approx(one.measured, rel=1e-6)
    scaled = other.B.double() @ other.A.double() * 2.0**-exponent
    assert torch.allclose(scaled, one.B.double() @ one.A.double(), rtol=0, atol=0.02 * float(scaled.abs().max()))


def test_no_more_rank_than_inputs_were_met_and_none_for_the_same() -> None:
    W, Q = copied(16, 24)
    assert correct(W, Q, 12, inputs(24, count=5), HOST).rank == 5
    assert correct(W, W, 12, inputs(24), HOST).rank == 0


def test_what_is_refused() -> None:
    W, Q = copied(8, 12)
    with pytest.raises(UsageError, match="moments are of its outputs"):
        correct(W, Q, 2, ByData("outputs", torch.eye(8, dtype=F64), 100), HOST)
    with pytest.raises(UsageError, match="calibrate this model again"):
        correct(W, Q, 2, inputs(8), HOST)
    Q[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="NaN or Inf"):
        correct(W, Q, 2, inputs(12), HOST)
