"""The projector: its polynomials against the published list, its sign against eigenvectors and Newton-Schulz, and its
certificate against values planted on the threshold."""

import math
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import digits
from torch.utils._python_dispatch import TorchDispatchMode

from laser.errors import NumericalError
from laser.spectral import projector
from laser.spectral.devices import Device
from laser.spectral.factorise import factorise, truncate
from laser.spectral.gram import moved, to_host
from laser.spectral.projector import UNRESOLVED, best_quintic, finest, matrix_sign, sign_steps
from laser.spectral.shrinkage import Gains

# Polar Express (arXiv 2505.16932), the list printed for an interval from 1e-3, before the safety factor.
PUBLISHED = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
]


def spectrum(p: int, heavy: bool, seed: int = 0) -> np.ndarray:
    """Singular values (p,), falling: a flat bulk, or one with a heavy tail."""
    random = np.random.default_rng(seed)
    return np.sort(random.pareto(1.5, p) + 0.2 if heavy else np.abs(random.standard_normal(p)) + 0.2)[::-1]


def with_values(s: np.ndarray, q: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """A matrix (q, p) with these singular values, float64, and its right singular vectors (p, p)."""
    random = np.random.default_rng(seed)
    U, _ = np.linalg.qr(random.standard_normal((q, len(s))))
    V, _ = np.linalg.qr(random.standard_normal((len(s), len(s))))
    return torch.from_numpy((U * s) @ V.T), V


def planted(p: int, heavy: bool, offset: float, draw: int) -> tuple[np.ndarray, float]:
    """A Gram matrix (p, p) with an eigenvalue at tau^2 + offset * ||G - tau^2||, exact beyond float64, and tau.

    The eigenvectors are products of three reflections, which long doubles hold to their own precision.
    """
    random, s = np.random.default_rng(draw), spectrum(p, heavy, draw)
    r = int(random.integers(p // 4, 3 * p // 4))
    tau = float((s[r] + s[r - 1]) / 2)
    eigenvalues = s.astype(np.longdouble) ** 2
    threshold = np.longdouble(tau * tau)  # as matrix_sign takes it
    eigenvalues[r] = threshold + offset * np.abs(eigenvalues - threshold).max()
    G = np.diag(eigenvalues)
    for _ in range(3):
        v = random.standard_normal(p).astype(np.longdouble)
        v /= np.sqrt(v @ v)
        G -= 2 * np.outer(v, v @ G)
        G -= 2 * np.outer(G @ v, v)
    return G, tau


def on(device: Device, G: torch.Tensor) -> torch.Tensor:
    return moved(G, device.torch_device, device.dtype)


def composed(steps: tuple[projector.Quintic, ...], x: np.ndarray) -> np.ndarray:
    for a, b, c in steps:
        x = a * x + b * x**3 + c * x**5
    return x


def test_polynomials_are_those_published() -> None:
    steps = sign_steps(1e-3, safety=1.0)
    assert np.allclose(steps[:6], PUBLISHED[:6], rtol=1e-12)
    low = float(composed(steps[:6], np.array([1e-3]))[0])
    assert np.allclose(best_quintic(low, 2 - low), PUBLISHED[6], rtol=1e-9)
    finer = sign_steps(1e-5, safety=1.0)
    assert finer[1] == pytest.approx((4.1602997386, -2.9616151229, 0.5429055668), abs=1e-10)
    assert finer[8] == pytest.approx((1.9218878360, -1.3011662480, 0.3801522869), abs=1e-10)


@pytest.mark.parametrize("low, high", [(0.03, 1.0), (0.4, 1.6), (0.9, 1.1)])
def test_a_best_polynomial_cannot_be_bettered(low: float, high: float) -> None:
    x = np.linspace(low, high, 20001)
    a, b, c = best_quintic(low, high)
    worst = np.abs(a * x + b * x**3 + c * x**5 - 1).max()
    errors = a * x + b * x**3 + c * x**5 - 1
    assert np.count_nonzero(np.abs(errors) > (1 - 1e-6) * worst) >= 4  # equal at four points: Chebyshev's law
    for i in range(3):
        for change in (-1e-4, 1e-4):
            other = [a, b, c]
            other[i] *= 1 + change
            assert np.abs(other[0] * x + other[1] * x**3 + other[2] * x**5 - 1).max() > worst


@pytest.mark.slow
@pytest.mark.parametrize("low", [0.5, 1e-2, 1e-4, 2**-23, 2**-52])
def test_steps_take_the_whole_interval_to_one_and_never_leave_bounds(low: float) -> None:
    x = np.geomspace(low, 1.0, 5001)
    assert np.abs(composed(sign_steps(low), x) - 1).max() < 1e-9
    below = composed(sign_steps(low), np.geomspace(low * 1e-6, low, 501))
    assert (below > 0).all() and (below < 1.3).all()
    newton_schulz = next(n for n in range(99) if np.abs(composed((projector.NEWTON_SCHULZ,) * n, x) - 1).max() < 1e-9)
    assert len(sign_steps(low)) <= newton_schulz + 1
    assert low > 1e-3 or len(sign_steps(low)) < 0.75 * newton_schulz


@pytest.mark.parametrize("heavy", [False, True])
def test_sign_is_that_of_the_eigenvectors_and_of_newton_schulz(device: Device, heavy: bool) -> None:
    s = spectrum(60, heavy)
    W, V = with_values(s, 90)
    G, rank = W.T @ W, 20
    tau = math.sqrt((s[rank - 1] ** 2 + s[rank] ** 2) / 2)
    signs = np.where(np.arange(60) < rank, 1.0, -1.0)
    found = matrix_sign(on(device, G), tau)
    error = np.abs(to_host(found.X) - (V * signs) @ V.T).max()
    assert error < digits(device, 1e-10, 1e-3)
    assert abs(found.unresolved) < 1e-4 and found.positive == pytest.approx(rank, abs=1e-4)
    X = (G - tau**2 * torch.eye(60)) / torch.linalg.matrix_norm(G - tau**2 * torch.eye(60))
    for _ in range(60):  # slow and obvious
        X = 1.5 * X - 0.5 * X @ X @ X
    assert np.abs(to_host(found.X) - X.numpy()).max() < digits(device, 1e-10, 1e-3)
    known = matrix_sign(on(device, G), tau, (s[rank - 1] ** 2 - s[rank] ** 2) / 2)
    assert known.products < found.products and abs(known.unresolved) < 1e-4


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e9])
def test_scale_changes_nothing(device: Device, scale: float) -> None:
    W, _ = with_values(spectrum(30, True), 50)
    plain, scaled = (truncate((c * W).float(), 7, device, "projector") for c in (1.0, scale))
    assert scaled.certificate.method == "projector"
    assert torch.allclose(scaled.matrix, plain.matrix * scale, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("draw", range(40))
def test_a_value_on_the_threshold_is_seen(device: Device, draw: int) -> None:
    p = (16, 24, 40, 64)[draw % 4]
    G, tau = planted(p, draw % 8 < 4, 0.01 * finest(p, device.dtype) * (-1) ** draw, draw)
    found = matrix_sign(on(device, torch.from_numpy(G.astype(np.float64))), tau)
    assert abs(found.unresolved) > UNRESOLVED


@pytest.mark.parametrize("gap", [0.0, 1e-9])
@pytest.mark.parametrize("known", [False, True])
def test_a_pair_too_close_to_part_goes_to_eigenvectors(device: Device, gap: float, known: bool) -> None:
    s = spectrum(30, False).copy()
    s[10] = s[9] * (1 - gap)
    W, _ = with_values(s, 50)
    found = truncate(W.float(), 10, replace(device, dtype=torch.float32), "projector", s if known else None)
    assert found.certificate.method == "gram"
    assert found.certificate.note.startswith("projector: unresolved")
    assert float(torch.linalg.vector_norm(W - found.matrix)) == pytest.approx(np.linalg.norm(s[10:]), rel=1e-5)


def test_wrong_values_are_noticed(device: Device) -> None:
    s = spectrum(30, False)
    W, _ = with_values(s, 50)
    found = truncate(W, 10, device, "projector", s * 1.1)  # the cut falls between other values
    assert found.certificate.method == "gram" and found.certificate.note.startswith("projector: ")


def test_a_decision_is_asked_for_once_and_may_be_to_leave_the_matrix(device: Device) -> None:
    W, _ = with_values(spectrum(30, False), 50)
    asked: list[int] = []

    def decide(s: np.ndarray) -> Gains | None:
        asked.append(len(s))
        return None if len(asked) == 2 else Gains(4)

    first = factorise(W, decide, device)
    assert first.truncation is not None and torch.equal(first.truncation.matrix, truncate(W, 4, device).matrix)
    assert factorise(W, decide, device).truncation is None and asked == [30, 30]


def test_a_matrix_of_zeros_or_nan_is_refused(device: Device) -> None:
    for G in (on(device, torch.zeros(5, 5)), on(device, torch.full((5, 5), math.nan))):
        with pytest.raises(NumericalError, match="no projector"):
            matrix_sign(G, 0.0)


def test_memory_is_four_squares_with_the_gram_matrix() -> None:
    """What the ladder asks the device for."""
    p, (G, tau), most = 64, planted(64, False, 0.1, 0), 0
    squares = [weakref.ref(whole := torch.from_numpy(G.astype(np.float64)))]

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal most
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() == p * p:
                squares.append(weakref.ref(out))
            alive = [square() for square in squares]
            most = max(most, len({square.data_ptr() for square in alive if square is not None}))
            return out

    with Count():
        matrix_sign(whole, tau)
    assert most == 4
