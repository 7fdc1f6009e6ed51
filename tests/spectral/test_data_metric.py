"""Laws of the data's metric on every device that there is, beside references that use every input and the plain SVD."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import Accelerator, digits

from laser.errors import NumericalError, UsageError
from laser.spectral import data_metric
from laser.spectral.data_metric import (
    ByData,
    data_bytes,
    data_values,
    relative_error,
    root,
    rounding_error,
    shrinkage,
    truncate_in_metric,
)
from laser.spectral.devices import HOST, Device
from laser.spectral.factorise import singular_values, truncate

SHAPES = ((40, 24), (24, 40), (32, 32), (5, 7))


def drawn(m: int, n: int, tokens: int = 300, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """W (m, n) and inputs X (tokens, n) with a mean and channels whose size runs over two decades."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(m, n, generator=generator)
    X = torch.randn(tokens, n, generator=generator, dtype=torch.float64) + 0.5
    return W, X * torch.logspace(0, 2, n, dtype=torch.float64)


def full(X: torch.Tensor) -> ByData:
    return ByData("full", X.T @ X / len(X), len(X), float(X.square().sum(1).square().mean()))


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_truncation_are_those_of_the_outputs_themselves(device: Device, shape: tuple[int, int]) -> None:
    W, X = drawn(*shape)
    metric, Y = full(X), X @ W.double().T  # (tokens, m)
    s = torch.linalg.svdvals(Y) / math.sqrt(len(X))
    assert data_values(W, metric, device) == pytest.approx(s.numpy()[: min(shape)], rel=1e-6)
    rank = min(shape) // 2
    found = truncate_in_metric(W, rank, metric, device)
    U = torch.linalg.svd(Y.T, full_matrices=False)[0][:, :rank]
    assert torch.allclose(found.matrix.double(), U @ U.T @ W.double(), atol=1e-5)
    lost = float(((Y - X @ found.matrix.double().T) ** 2).sum() / (Y**2).sum())
    assert 1 - found.certificate.energy_kept == pytest.approx(lost, rel=1e-5)
    assert found.certificate.residual <= found.certificate.tolerance
    assert relative_error(W, found.matrix, rank, metric) == pytest.approx(lost, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_other_matrix_of_that_rank_loses_less_and_the_input_side_gives_the_same(
    device: Device, shape: tuple[int, int]
) -> None:
    W, X = drawn(*shape)
    metric, rank = full(X), min(shape) // 2
    best = truncate_in_metric(W, rank, metric, device).matrix
    least = relative_error(W, best, rank, metric)
    assert relative_error(W, truncate(W, rank, device).matrix, rank, metric) > least
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):  # neighbours of the same rank: U (1 + small) , V (1 + small)
        other = (torch.eye(shape[0]) + 0.01 * torch.randn(shape[0], shape[0], generator=generator)) @ best
        assert relative_error(W, other, rank, metric) >= least * (1 - 1e-6)
    C_half = root(metric.moment)
    _, _, Vh = torch.linalg.svd(W.double() @ C_half, full_matrices=False)
    V = Vh[:rank].T
    assert torch.allclose(best.double(), W.double() @ C_half @ V @ V.T @ torch.linalg.inv(C_half), atol=1e-4)


def test_white_inputs_give_the_plain_spectrum_and_truncation(device: Device) -> None:
    W, _ = drawn(40, 24)
    white = ByData("full", torch.eye(24, dtype=torch.float64), 1000)
    assert data_values(W, white, device) == pytest.approx(singular_values(W, device)[0], rel=digits(device, 1e-9, 1e-4))
    assert torch.allclose(truncate_in_metric(W, 6, white, device).matrix, truncate(W, 6, device).matrix, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_scaling_inputs_or_weights_scales_the_values_and_leaves_the_projection(
    device: Device, shape: tuple[int, int]
) -> None:
    W, X = drawn(*shape)
    a, b = data_values(W, full(X), device), data_values(3 * W, full(5 * X), device)
    assert b == pytest.approx(15 * a, rel=1e-6)
    one, other = truncate_in_metric(W, 2, full(X), device).matrix, truncate_in_metric(W, 2, full(5 * X), device).matrix
    assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_three_forms_agree_where_they_know_the_same(device: Device, shape: tuple[int, int]) -> None:
    W, X = drawn(*shape)
    C = X.T @ X / len(X)
    outputs = ByData("outputs", W.double() @ C @ W.double().T, len(X))
    s = data_values(W, full(X), device)
    if shape[0] <= shape[1]:
        assert data_values(W, outputs, device) == pytest.approx(s, rel=1e-6)
        same = truncate_in_metric(W, 2, outputs, device)
        assert torch.allclose(same.matrix, truncate_in_metric(W, 2, full(X), device).matrix, atol=1e-5)
        assert relative_error(W, same.matrix, 2, outputs) == pytest.approx(1 - same.certificate.energy_kept, rel=1e-5)
    d = C.diagonal().clone()
    alone, whole = ByData("diagonal", d, len(X)), ByData("full", torch.diag(d), len(X))
    assert data_values(W, alone, device) == pytest.approx(data_values(W, whole, device), rel=1e-6)
    found = [truncate_in_metric(W, 3, metric, device).matrix for metric in (alone, whole)]
    assert torch.allclose(found[0], found[1], atol=1e-5)


@pytest.mark.parametrize("tokens", [12, 300])
def test_shrunk_moments_of_outputs_are_those_of_shrunk_inputs(device: Device, tokens: int) -> None:
    W, X = drawn(24, 40, tokens)
    wide, C = W.double(), X.T @ X / len(X)
    Y = X @ wide.T
    fourth = float(Y.square().sum(1).square().mean())
    metric = ByData("outputs", Y.T @ Y / len(X), tokens, fourth, True)
    keep, add = shrinkage(metric.moment, fourth, tokens, wide @ wide.T)
    assert 0 < keep < 1
    explicit = ByData("full", keep * C + add * torch.eye(40, dtype=torch.float64), 10**6)
    assert data_values(W, metric, device) == pytest.approx(data_values(W, explicit, device), rel=1e-6)
    found, same = (truncate_in_metric(W, 9, known, device) for known in (metric, explicit))
    assert torch.allclose(found.matrix, same.matrix, atol=1e-5)
    assert found.certificate.energy_kept == pytest.approx(same.certificate.energy_kept)
    assert relative_error(W, found.matrix, 9, metric) == pytest.approx(1 - found.certificate.energy_kept, rel=1e-4)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_what_rounding_to_storage_does_is_estimated(device: Device, shape: tuple[int, int]) -> None:
    W, X = drawn(*shape)
    C = X.T @ X / len(X)
    forms = [ByData("full", C, 300)]
    if shape[0] < shape[1]:
        forms.append(ByData("outputs", W.double() @ C @ W.double().T, 300))
    for metric in forms:
        exact = truncate_in_metric(W, 9, metric, device)
        B = exact.matrix.to(torch.bfloat16)
        off = abs(math.sqrt(relative_error(W, B, 9, metric)) - math.sqrt(1 - exact.certificate.energy_kept))
        slack = math.sqrt(rounding_error(W, B, B.abs().float() * 2**-9, 9, metric))
        assert off < 3 * slack + 1e-5 and slack < 0.02


def test_fewer_tokens_than_dimensions_show_no_more_directions_than_tokens(device: Device) -> None:
    W, X = drawn(40, 24, tokens=10)
    metric = full(X)
    s = data_values(W, metric, device)
    assert np.count_nonzero(s) == 10
    assert truncate_in_metric(W, 10, metric, device).certificate.energy_kept == pytest.approx(1)
    with pytest.raises(UsageError, match=r"rank 11 does not fit: 10 of 24 directions .* calibrate on more text"):
        truncate_in_metric(W, 11, metric, device)
    lenient = ByData("full", metric.moment, metric.tokens, metric.fourth, shrink=True)
    assert np.count_nonzero(data_values(W, lenient, device)) == 24
    assert truncate_in_metric(W, 20, lenient, device).certificate.residual < digits(device, 1e-9, 1e-6)


def test_shrinkage_lowers_the_error_of_few_tokens_and_vanishes_with_many() -> None:
    generator = torch.Generator().manual_seed(0)
    n = 60
    truth = torch.logspace(0, 1, n, dtype=torch.float64)
    better, a, eye = 0, 0.0, torch.eye(n, dtype=torch.float64)
    for _ in range(50):
        X = torch.randn(30, n, generator=generator, dtype=torch.float64) * truth.sqrt()
        S, fourth = X.T @ X / 30, float(X.square().sum(1).square().mean())
        keep, add = shrinkage(S, fourth, 30, eye)
        found, a = keep * S + add * eye, 1 - keep
        better += bool((found - torch.diag(truth)).norm() < (S - torch.diag(truth)).norm())
        assert torch.trace(found) == pytest.approx(float(torch.trace(S)))
    assert better == 50 and 0.3 < a < 1
    X = torch.randn(20000, n, generator=generator, dtype=torch.float64) * truth.sqrt()
    keep, _ = shrinkage(X.T @ X / 20000, float(X.square().sum(1).square().mean()), 20000, eye)
    assert keep > 0.98
    zero = torch.zeros(3, 3, dtype=torch.float64)
    assert shrinkage(zero, 0.0, 5, torch.eye(3, dtype=torch.float64))[1] == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_device_with_lapack_computes_there_what_the_host_does(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, whatever its own precision; by torch's routines, here on CPU tensors."""
    device = Accelerator("cpu", dtype, False, "an accelerator with LAPACK, on CPU tensors")
    W, X = drawn(*shape)
    Y = X @ W.double().T
    forms = [full(X), replace(full(X), shrink=True), ByData("diagonal", full(X).moment.diagonal().clone(), len(X))]
    forms.append(ByData("outputs", Y.T @ Y / len(X), len(X), float(Y.square().sum(1).square().mean()), True))
    for metric in forms:
        if metric.form == "outputs" and shape[0] > shape[1]:
            continue
        exact = truncate_in_metric(W, 3, metric, HOST)
        with monkeypatch.context() as patch:
            # LAPACK on the host is not to be asked.
            patch.setattr(np.linalg, "eigh", lambda *_: pytest.fail("on the host"))
            patch.setattr(np.linalg, "eigvalsh", lambda *_: pytest.fail("on the host"))
            values, found = data_values(W, metric, device), truncate_in_metric(W, 3, metric, device)
            lost = relative_error(W, found.matrix, 3, metric, device)
            noise = rounding_error(W, found.matrix, found.matrix.abs() * 2**-9, 3, metric, device)
        assert values == pytest.approx(data_values(W, metric, HOST), rel=1e-9)
        assert torch.allclose(found.matrix, exact.matrix, atol=1e-6)
        assert found.certificate.tolerance == pytest.approx(exact.certificate.tolerance)
        assert lost == pytest.approx(relative_error(W, exact.matrix, 3, metric, HOST), rel=1e-4, abs=1e-12)
        half = exact.matrix.abs() * 2**-9
        assert noise == pytest.approx(rounding_error(W, exact.matrix, half, 3, metric, HOST), rel=1e-3)


def test_matrices_with_the_same_inputs_share_the_root(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    rooted: list[int] = []
    true = data_metric.root

    def counted(C: torch.Tensor, at: Device) -> torch.Tensor:
        rooted.append(len(C))
        return true(C, at)

    # How often is what this is about.
    monkeypatch.setattr(data_metric, "root", counted)
    data_metric.ROOTS.clear()
    (W, X), (other, _) = drawn(40, 24), drawn(60, 24, seed=1)
    keyed = replace(full(X), key="this text")
    for each in (W, other):
        alone = data_values(each, full(X), device)
        assert np.array_equal(alone, data_values(each, keyed, device))
        truncate_in_metric(each, 3, keyed, device)
    assert len(rooted) == 3  # two that nothing is known of, and one for all the rest
    data_values(W, replace(keyed, shrink=True), device)  # of another C
    data_values(W, replace(keyed, key="another text"), device)
    assert len(rooted) == 5
    data_metric.ROOTS.clear()


def test_what_does_not_fit_on_the_device_is_for_the_host() -> None:
    W, X = drawn(40, 24)
    needed = data_bytes((40, 24), "full")
    for share, place in ((needed - 1, "the host"), (needed, "the device")):
        device = Accelerator("cpu", torch.float64, False, "an accelerator with LAPACK, on CPU tensors", share)
        with pytest.MonkeyPatch.context() as patch:
            # Which of two places is asked is not to be seen from outside.
            patch.setattr(torch.linalg, "eigvalsh", lambda _: pytest.fail("the device"))
            patch.setattr(np.linalg, "eigvalsh", lambda _: pytest.fail("the host"))
            with pytest.raises(pytest.fail.Exception, match=place):
                data_values(W, full(X), device)


def test_bad_input_is_refused(device: Device) -> None:
    W, X = drawn(40, 24)
    with pytest.raises(UsageError, match=r"the full moment has shape \[24, 24\], expected \[40, 40\]"):
        data_values(W.T, full(X), device)
    for bad in (math.nan, math.inf):
        X[0, 0] = bad
        with pytest.raises(UsageError, match="the full moment is not finite; calibrate this model again"):
            data_values(W, full(X), device)
    W, X = drawn(40, 24)
    W[0, 0] = math.nan
    with pytest.raises(NumericalError, match="NaN or Inf"):
        truncate_in_metric(W, 3, full(X), device)
    zero = truncate_in_metric(torch.zeros(4, 6), 0, ByData("full", torch.eye(6, dtype=torch.float64), 9), device)
    assert zero.certificate.energy_kept == 1 and not zero.matrix.any()
