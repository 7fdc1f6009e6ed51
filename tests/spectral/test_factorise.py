"""Singular values and truncations against numpy.linalg.svd in float64 on every device that there is, and the ladder
under injected failures."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import digits
from hypothesis import given, settings
from hypothesis import strategies as st

from laser.errors import NumericalError, UsageError
from laser.spectral import factorise, gram, projector
from laser.spectral.devices import Device, choose_device
from laser.spectral.factorise import singular_values, truncate

CPU = choose_device("cpu")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
methods = pytest.mark.parametrize("method", factorise.METHODS)


def weights(m: int, n: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spikes = torch.randn(m, 4, generator=generator) @ torch.randn(4, n, generator=generator)
    return (0.02 * torch.randn(m, n, generator=generator) + 0.02 * spikes).to(dtype)


def reference(W: torch.Tensor, rank: int) -> np.ndarray:
    U, s, Vh = np.linalg.svd(W.double().numpy(), full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vh[:rank]


@pytest.mark.slow
@methods
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 40), (96, 32), (32, 96), (1, 7), (7, 1), (1, 1)])
def test_values_and_truncation_equal_the_reference(
    device: Device, method: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    W = weights(*shape, dtype)
    s = np.linalg.svd(W.double().numpy(), compute_uv=False)
    found, used = singular_values(W, device, method)
    assert used == ("svd" if method == "svd" else "gram")  # a projector has no values of its own
    assert found == pytest.approx(s, abs=digits(device, 1e-7, 1e-3) * s[0])
    p = min(shape)
    for rank in sorted({0, 1, p // 3, p // 2, 2 * p // 3, p}):
        result = truncate(W, rank, device, method)
        truth = reference(W, rank)
        room = torch.finfo(dtype).eps * np.abs(truth) + digits(device, 1e-5, 2e-3) * np.abs(truth).max() + 1e-12
        assert (np.abs(result.matrix.double().numpy() - truth) <= room).all()
        assert result.matrix.dtype == dtype and result.matrix.shape == W.shape
        energy = (s[:rank] ** 2).sum() / (s**2).sum()
        assert result.certificate.energy_kept == pytest.approx(energy, abs=digits(device, 1e-12, 1e-6))
        assert result.certificate.residual <= result.certificate.tolerance


def test_rows_beyond_one_block(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    # A limit: real blocks need matrices of thousands of rows.
    for module in (gram, projector):
        monkeypatch.setattr(module, "BLOCK_ROWS", 10)
    for W in (weights(45, 12), weights(12, 45)):
        assert np.abs(truncate(W, 5, device).matrix.double().numpy() - reference(W, 5)).max() <= 2**-7 * W.abs().max()
        s = np.linalg.svd(W.double().numpy(), compute_uv=False)
        assert singular_values(W, device)[0] == pytest.approx(s, abs=digits(device, 1e-8, 1e-4))


def test_non_contiguous_input(device: Device) -> None:
    W = weights(30, 50).T
    expected = singular_values(W.contiguous(), device)[0]
    assert singular_values(W, device)[0] == pytest.approx(expected, rel=digits(device, 1e-12, 1e-4))


@pytest.mark.slow
@given(m=st.integers(1, 20), n=st.integers(1, 20), seed=st.integers(0, 50), data=st.data())
@settings(max_examples=50, deadline=None)
def test_residual_is_the_discarded_tail(device: Device, m: int, n: int, seed: int, data: st.DataObject) -> None:
    W = weights(m, n, torch.float64, seed)
    rank = data.draw(st.integers(0, min(m, n)))
    result = truncate(W, rank, device)
    s = np.linalg.svd(W.numpy(), compute_uv=False)
    tail, room = np.linalg.norm(s[rank:]), digits(device, 1e-7, 1e-3 * s[0])
    assert float(torch.linalg.vector_norm(W - result.matrix)) == pytest.approx(tail, rel=1e-6, abs=room)


def test_zero_and_rank_deficient_matrices(device: Device) -> None:
    zero = torch.zeros(8, 5, dtype=torch.bfloat16)
    assert (singular_values(zero, device)[0] == 0).all()
    assert (truncate(zero, 0, device).matrix == 0).all()
    generator = torch.Generator().manual_seed(3)
    low = torch.randn(30, 2, generator=generator, dtype=torch.float64)
    low = low @ torch.randn(2, 20, generator=generator, dtype=torch.float64)
    s, _ = singular_values(low, device)
    # What a Gram matrix cannot resolve is 0 in float64, and not noise.
    assert (s[2:] <= digits(device, 0, 1e-2)).all() and s[1] > 1
    assert torch.allclose(truncate(low, 2, device).matrix, low, atol=digits(device, 1e-8, 1e-4))


def test_float32_agrees_with_float64() -> None:
    W = weights(120, 80)
    low, high = choose_device("cpu", "float32"), CPU
    assert singular_values(W, low)[0] == pytest.approx(singular_values(W, high)[0], rel=1e-4)
    result = truncate(W, 20, low)
    assert np.abs(result.matrix.double().numpy() - reference(W, 20)).max() <= 2**-7 * W.abs().max()
    assert 1e-12 < result.certificate.tolerance < 1e-2


@methods
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_named(device: Device, method: str, bad: float) -> None:
    W = weights(9, 9)
    W[4, 4] = bad
    with pytest.raises(NumericalError, match="NaN or Inf"):
        truncate(W, 3, device, method)


@pytest.mark.parametrize("method", factorise.METHODS)
@pytest.mark.parametrize("rank", [0, 3, 9])
def test_not_finite_is_noticed_at_any_rank_and_with_known_values(device: Device, method: str, rank: int) -> None:
    W = weights(9, 9)
    W[4, 4] = float("inf")
    with pytest.raises(NumericalError, match="NaN or Inf"):
        truncate(W, rank, device, method, np.linspace(2, 1, 9))


def test_squares_that_would_leave_float32_stay_in_it(device: Device) -> None:
    W = weights(30, 20, torch.float32) * 1e25
    found = truncate(W, 5, replace(device, dtype=torch.float32))
    assert found.certificate.method == "gram" and not found.certificate.note
    assert torch.allclose(found.matrix, truncate(W, 5, CPU, "svd").matrix, rtol=1e-4, atol=1e18)


def test_eight_bit_floats_without_scales_are_refused() -> None:
    with pytest.raises(UsageError, match="no scales"):
        singular_values(weights(8, 8, torch.float32).to(torch.float8_e4m3fn), CPU)


@pytest.mark.parametrize("rank", [-1, 9])
def test_impossible_ranks(device: Device, rank: int) -> None:
    with pytest.raises(UsageError, match="does not fit"):
        truncate(weights(8, 12), rank, device)


def test_ladder_takes_the_svd_when_the_eigensolver_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise np.linalg.LinAlgError("injected")

    for solver in ("eigh", "eigvalsh"):
        monkeypatch.setattr(np.linalg, solver, fail)
    W = weights(20, 30)
    assert singular_values(W, CPU)[1] == "svd"
    result = truncate(W, 4, CPU)
    assert result.certificate.method == "svd"
    assert np.abs(result.matrix.double().numpy() - reference(W, 4)).max() <= 2**-7 * W.abs().max()


@pytest.mark.parametrize("fault", ["not orthogonal", "wrong vectors", "nan"])
def test_ladder_takes_the_svd_when_the_certificate_fails(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    true_eigh = np.linalg.eigh

    def wrong(*args: object, **kwargs: object) -> object:
        values, vectors = true_eigh(*args, **kwargs)  # pyright: ignore[reportCallIssue, reportArgumentType]
        if fault == "not orthogonal":
            vectors = vectors * 1.001
        elif fault == "wrong vectors":
            vectors = np.eye(len(vectors))
        else:
            values = values * np.nan
        return values, vectors

    monkeypatch.setattr(np.linalg, "eigh", wrong)
    W = weights(20, 30)
    result = truncate(W, 4, CPU)
    assert result.certificate.method == "svd"
    assert np.abs(result.matrix.double().numpy() - reference(W, 4)).max() <= 2**-7 * W.abs().max()


def test_end_of_the_ladder_tells_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    true_eigh, true_svd = np.linalg.eigh, torch.linalg.svd
    monkeypatch.setattr(np.linalg, "eigh", lambda *a, **k: (true_eigh(*a, **k)[0], np.eye(20)))

    def wrong(*args: object, **kwargs: object) -> object:
        U, s, Vh = true_svd(*args, **kwargs)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return U, s, Vh * 1.5

    monkeypatch.setattr(torch.linalg, "svd", wrong)
    with pytest.raises(NumericalError, match=r"gram: certificate missed: residual .* svd: certificate missed") as error:
        truncate(weights(20, 30), 4, CPU)
    assert error.value.residual is not None and error.value.residual > 1e-3
