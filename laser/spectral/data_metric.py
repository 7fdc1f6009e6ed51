"""Singular values and truncations by the data: in the metric E||W x||^2, x the calibration inputs.

With x the inputs of W (m, n) and C = E[x x^T] (n, n) their second moment (not centred: a layer sees the mean, too),

    E ||(W - B) x||^2 = ||(W - B) C^(1/2)||_F^2 = tr((W - B) C (W - B)^T)

is the error that the next layer sees. Its least value over matrices B of rank r is the tail of the squared singular
values of W C^(1/2) (Eckart and Young 1936 in the metric of C; as SVD-LLM, arXiv 2403.07378, whitens). It is reached by
B = U U^T W, where U (m, r) are the top eigenvectors of W C W^T = E[y y^T], the second moment of the *outputs* y = W x.

W C^(1/2) V V^T C^(-1/2) is the same matrix where C is regular. It is not used, so nothing here inverts C. A C without
full rank needs no pseudo-inverse and no floor. On inputs that the calibration has not seen B still is a projection of
what W answers, and not zero.

The p x p eigenproblem, p = min(m, n), is on the smaller side: W C W^T, or C^(1/2) W^T W C^(1/2) and then U from
W C^(1/2) V. It is solved on the host in float64 on every device, because a few channels of massive activations give C a
condition that squared float32 cannot hold. Values under sqrt(p * eps) * s_1, and beyond the number of tokens seen,
count as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray

from laser.errors import NumericalError, UsageError
from laser.spectral.certificate import Certificate, Truncation
from laser.spectral.devices import HOST, Device, full_precision, host_threads, on_device_or_host
from laser.spectral.factorise import Factorised, Spectrum, Values, check_storage, singular_values
from laser.spectral.rules import energy_share
from laser.spectral.shrinkage import Gains
from laser.spectral.unit import in_unit, largest_entry

METHOD = "data"  # what a certificate calls it
STORED = 1e-6  # share of the outputs that the float32 of stored correlations can hide, where tokens are few
INNER = 8192  # of a product at most: Apple MPS sums 32767 and more wrongly (pytorch issue 193487)


@dataclass(frozen=True)
class ByData:
    """What is known of the inputs of one W (m, n). Moments are float64 means over `tokens` inputs.

    form: what `moment` is: "full" C (n, n); "diagonal" its diagonal (n,); "outputs" W C W^T (m, m), for inputs so wide
        that C is never formed
    fourth: mean of ||x||^4 ("outputs": of ||y||^4), what Ledoit-Wolf shrinkage goes by
    shrink: whether to shrink `moment`, see `shrinkage`
    """

    form: str
    moment: torch.Tensor
    tokens: int
    fourth: float = 0.0
    shrink: bool = False

    def check(self, W: torch.Tensor) -> None:
        """Raises UsageError where this is the metric of a matrix of another shape."""
        m, n = W.shape
        wanted = {"full": (n, n), "diagonal": (n,), "outputs": (m, m)}[self.form]
        if tuple(self.moment.shape) != wanted:
            raise UsageError(
                f"the {self.form} moment has shape {list(self.moment.shape)}, expected {list(wanted)} for a matrix of "
                f"{m} x {n}; calibrate this model again"
            )

    def values(self, W: torch.Tensor, device: Device, method: str = "gram") -> Values:
        return Values(data_values(W, self, device), METHOD)

    def visit(
        self, W: torch.Tensor, decide: Callable[[Spectrum], Gains | None], device: Device, method: str = "gram"
    ) -> Factorised:
        def rank(s: Spectrum) -> int | None:
            gains = decide(s)
            return None if gains is None else gains.above

        return visit_in_metric(W, rank, self, device)

    def problems(
        self, name: str, W: torch.Tensor, B: torch.Tensor, half: torch.Tensor, gains: Gains, device: Device
    ) -> list[str]:
        """B must be a projection of W, and lose no more of the outputs than W itself says that this rank must."""
        problems, rank = projection_problems(name, W, B, half, gains.above, device), gains.above
        if not W.any():
            return problems
        s, narrow, E = data_values(W, self, device), B.double(), half.double()
        lost = energy_share(s, np.arange(len(s)) >= rank) if s.any() else 0.0
        found = relative_error(W, narrow, rank, self, device)
        slack = 3 * math.sqrt(rounding_error(W, narrow, E, rank, self, device)) + 1e-5
        if not (abs(math.sqrt(found) - math.sqrt(lost)) <= slack or abs(found - lost) <= STORED):
            problems.append(f"{name}: {found:.4e} of the outputs' mean square is lost, expected {lost:.4e}")
        return problems


def projection_problems(
    name: str, W: torch.Tensor, B: torch.Tensor, half: torch.Tensor, rank: int, device: Device
) -> list[str]:
    """What is wrong with B as some projection U U^T W of this rank, up to rounding to the storage dtype.

    half (m, n) is half a unit in the last place of each entry of B. Being such a projection is the same as: no singular
    value beyond the rank, and B^T (W - B) = 0.
    """
    W, u = in_unit(W)
    narrow, E = B.double() / u, half.double() / u
    wide = W.double()
    rounding, norm = float(E.norm()), float(wide.norm())
    if not norm:
        return [] if not narrow.any() else [f"{name}: found values, expected zero, as the source's matrix is"]
    problems = []
    beyond = float(np.linalg.norm(singular_values(narrow, device)[0][rank:]))
    if not beyond <= rounding + 1e-5 * norm:
        problems.append(f"{name}: {beyond / norm:.3e} of the norm lies beyond rank {rank}")
    # With B = U U^T W + E the product is at most ||E|| (||B|| + ||W - B|| + ||E||).
    left = float((narrow.T @ (wide - narrow)).norm())
    most = (rounding + 1e-5 * norm) * (float(narrow.norm()) + float((wide - narrow).norm()) + rounding)
    if not left <= most:
        problems.append(f"{name}: ||B^T (W - B)|| is {left:.3e}, expected {most:.1e} at most for a projection of W")
    return problems


def root(C: torch.Tensor) -> torch.Tensor:
    """C^(1/2) (n, n), symmetric; eigenvalues that rounding made negative count as 0."""
    values, vectors = _eigh(C)
    return (vectors * torch.from_numpy(np.sqrt(np.maximum(values, 0.0)))) @ vectors.T


def data_values(W: torch.Tensor, metric: ByData, device: Device) -> NDArray[np.float64]:
    """Singular values (p,) of W C^(1/2), float64, descending: the root mean square of the outputs along each direction.

    Raises NumericalError for NaN or Inf in W, UsageError for the metric of another matrix.
    """
    W, metric, u = _in_unit(W, metric)
    with full_precision():
        G = _gram(W, metric, device)[0]
        with host_threads(G.shape[0]):
            values = np.linalg.eigvalsh(G.numpy())
    return _to_values(values, metric) * u


def truncate_in_metric(W: torch.Tensor, rank: int, metric: ByData, device: Device) -> Truncation:
    """The matrix of rank `rank` with the least mean squared error of the outputs, U U^T W, certified.

    For scripts and tests: laser itself calls `visit_in_metric`, and chooses the rank by the values. Raises as that.
    """
    found = visit_in_metric(W, lambda _: rank, metric, device).truncation
    assert found is not None
    return found


def visit_in_metric(
    W: torch.Tensor, decide: Callable[[NDArray[np.float64]], int | None], metric: ByData, device: Device
) -> Factorised:
    """One factorisation of W (m, n): `decide` gets the data's values (p,) and answers with a rank, or None to leave W.

    The certificate is in the metric: energy_kept is the share of E||y||^2 that is left, residual the difference of
    measured and predicted root of the share that is lost. Raises UsageError for a rank over the number of directions
    that the data show, NumericalError where the certificate is missed.
    """
    storage = W.dtype
    W, metric, u = _in_unit(W, metric)
    with full_precision():
        G, half, C_half = _gram(W, metric, device)
        with host_threads(G.shape[0]):
            eigenvalues, V = _eigh(G)
        s = _to_values(eigenvalues, metric)
        values, seen = Values(s * u, METHOD), int(np.count_nonzero(s))
        rank = decide(values.singular_values)
        if rank is None:
            return Factorised(values, None)
        if not 0 <= rank <= seen:
            raise UsageError(
                f"rank {rank} does not fit: {seen} of {len(s)} directions show in the {metric.tokens} inputs of the "
                "calibration; calibrate on more text, or plan a lower rank"
            )
        total = float(np.sum(eigenvalues))
        if total <= 0:  # a zero matrix, or inputs that are all zero
            certificate = Certificate(1.0, 0.0, 0.0, 0.0, METHOD)
            return Factorised(values, Truncation((W * u).to(storage), values.singular_values, certificate))
        wide = W.double()
        U = V[:, len(s) - rank :]
        if half is not None:
            U = _orthonormal((half @ U) / torch.from_numpy(s[:rank][::-1].copy()))
        orthogonality = float((U.T @ U - torch.eye(rank, dtype=U.dtype)).abs().max()) if rank else 0.0
        B = _product(U, _product(U.T, wide, device), device)
        if metric.form == "outputs":  # C is not known, but B is a projection
            measured = _beyond(U, G)
        elif C_half is not None:  # the root that G was made with: negative eigenvalues, all rounding, are cut off
            measured = _squares(_product(wide - B, C_half, device))
        else:
            measured = _mean_square(wide - B, metric, device)
    lost = max(float(np.sum(eigenvalues[: len(s) - rank])), 0.0) / total
    residual = abs(math.sqrt(measured / total) - math.sqrt(lost))
    delta = 8 * len(s) * torch.finfo(device.dtype).eps
    tolerance = min(math.sqrt(delta), delta / (2 * math.sqrt(lost)) if lost > 0 else math.inf)
    if not (residual <= tolerance and orthogonality <= delta):
        raise NumericalError(
            f"certificate in the data's metric missed: residual {residual:.2e} (allowed {tolerance:.2e}), "
            f"orthogonality {orthogonality:.2e} (allowed {delta:.2e}); try --precision float64",
            residual,
        )
    result = (B * u).to(storage)
    if not math.isfinite(largest_entry(result)):
        raise NumericalError(f"the result leaves the range of {storage}; try --exclude this matrix")
    certificate = Certificate(1 - lost, residual, orthogonality, tolerance, METHOD)
    return Factorised(values, Truncation(result, values.singular_values, certificate))


def relative_error(W: torch.Tensor, B: torch.Tensor, rank: int, metric: ByData, device: Device = HOST) -> float:
    """E||(W - B) x||^2 / E||W x||^2 on the inputs of any metric; 0 for a W that answers nothing.

    In the form "outputs" B must be a projection of W's outputs of rank `rank`, see `truncate_in_metric`: C is not
    known, and E||y||^2 - E||U^T y||^2 is.
    """
    W, metric, u = _in_unit(W, metric)
    wide, narrow = W.double(), B.double() / u
    if metric.form == "outputs":
        G = _gram(wide, metric, device)[0]
        lost, total = _beyond(_leading(narrow, rank, device), G), float(torch.trace(G))
    else:
        lost, total = (_mean_square(x, metric, device) for x in (wide - narrow, wide))
    return lost / total if total > 0 else 0.0


def rounding_error(
    W: torch.Tensor, B: torch.Tensor, E: torch.Tensor, rank: int, metric: ByData, device: Device = HOST
) -> float:
    """By how much E||B x||^2, relative to E||W x||^2, may be off where B (m, n) was rounded with errors up to E (m, n).

    Drawn: such errors are independent of one another. In the form "outputs" they turn the projection of rank `rank`.
    """
    W, metric, u = _in_unit(W, metric)
    wide, narrow, E = W.double(), B.double() / u, E.double() / u
    drawn = E * torch.randn(E.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if metric.form == "outputs":
        G = _gram(wide, metric, device)[0]
        one, other = (_leading(x, rank, device) for x in (narrow, narrow + drawn))
        total, both = float(torch.trace(G)), float(((one.T @ G @ other) * (one.T @ other)).sum())
        error = 2 * total - _beyond(one, G) - _beyond(other, G) - 2 * both  # tr (P - Q) G (P - Q)
    else:
        error, total = (_mean_square(x, metric, device) for x in (drawn, wide))
    return max(error, 0.0) / total if total > 0 else 0.0


# --- the gram matrix in the metric ------------------------------------------------------------------------------------


def _in_unit(W: torch.Tensor, metric: ByData) -> tuple[torch.Tensor, ByData, float]:
    """W in its unit (unit.py), the metric of that, and the unit. Raises as `data_values`."""
    check_storage(W.dtype)
    metric.check(W)
    W, u = in_unit(W)
    if metric.form == "outputs" and u != 1.0:  # its moment is of W's own outputs
        metric = replace(metric, moment=metric.moment / u / u, fourth=metric.fourth / u / u / u / u)
    return W, metric, u


def shrinkage(S: torch.Tensor, fourth: float, tokens: int, target: torch.Tensor) -> tuple[float, float]:
    """(1 - a, a mu) of (1 - a) S + a mu T: Ledoit and Wolf (2004), section 3.2, for a second moment S and T (k, k).

    mu = <S, T> / <T, T>; a = min(1, b / d) with b = (E||z||^4 - ||S||^2) / tokens, the variance of S, and
    d = ||S - mu T||^2, its distance from the target. T = I is theirs; for outputs y = W x, T = W W^T is what inputs
    without any structure would give. A zero S stays as it is.
    """
    mu = float((S * target).sum() / (target * target).sum().clamp_min(1e-300))
    distance = float(((S - mu * target) ** 2).sum())
    variance = max(fourth - float((S * S).sum()), 0.0) / max(tokens, 1)
    a = min(1.0, variance / distance) if distance > 0 else 0.0
    return 1 - a, a * mu


def _shrinkage_of(W: torch.Tensor, metric: ByData, device: Device) -> tuple[float, float]:
    """(keep, add): the second moment of the inputs that counts is keep * C + add * I."""
    if not metric.shrink or metric.form == "diagonal":
        return 1.0, 0.0
    if metric.form == "outputs":
        wide = W.double()
        target = _product(wide, wide.T, device)
    else:
        target = torch.eye(len(metric.moment), dtype=torch.float64)
    return shrinkage(metric.moment, metric.fourth, metric.tokens, target)


def _inputs(W: torch.Tensor, metric: ByData, device: Device) -> torch.Tensor:
    keep, add = _shrinkage_of(W, metric, device)
    if add == 0:
        return metric.moment
    return (keep * metric.moment).add_(torch.eye(len(metric.moment), dtype=torch.float64), alpha=add)


def _mean_square(R: torch.Tensor, metric: ByData, device: Device) -> float:
    """E||R x||^2 of R (m, n), float64, at least 0, where the inputs are known."""
    RC = R * metric.moment if metric.form == "diagonal" else _product(R, _inputs(R, metric, device), device)
    return max(float((RC * R).sum()), 0.0)


def _beyond(U: torch.Tensor, M: torch.Tensor) -> float:
    """E||y - U U^T y||^2 of outputs y of second moment M (m, m), U (m, r) orthonormal."""
    return max(float(torch.trace(M) - (U * (M @ U)).sum()), 0.0)


def _gram(
    W: torch.Tensor, metric: ByData, device: Device
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(p, p) with the squared data values as eigenvalues, float64 on the host; where W is tall also W C^(1/2), and
    C^(1/2) where it had to be made."""
    m, n = W.shape
    wide, C_half = W.double(), None
    if metric.form == "outputs":
        keep, add = _shrinkage_of(wide, metric, device)
        return metric.moment if add == 0 else keep * metric.moment + add * _product(wide, wide.T, device), None, None
    if metric.form == "diagonal":
        half = wide * metric.moment.clamp_min(0).sqrt()
    elif m <= n:
        return _symmetric(_product(_product(wide, _inputs(wide, metric, device), device), wide.T, device)), None, None
    else:
        C_half = root(_inputs(wide, metric, device))
        half = _product(wide, C_half, device)
    if m <= n:
        return _symmetric(_product(half, half.T, device)), None, None
    return _symmetric(_product(half.T, half, device)), half, C_half


def _squares(A: torch.Tensor) -> float:
    return float((A * A).sum())


def _leading(B: torch.Tensor, rank: int, device: Device) -> torch.Tensor:
    """(m, rank) the directions of a B (m, n) of that rank."""
    return _eigh(_product(B, B.T, device))[1][:, len(B) - rank :]


def _product(A: torch.Tensor, B: torch.Tensor, device: Device) -> torch.Tensor:
    """A @ B in the device's precision, given and returned on the host in float64."""

    def product(at: Device) -> torch.Tensor:
        if at.host_blas:
            return A @ B
        total = torch.zeros(A.shape[0], B.shape[1], dtype=at.dtype, device=at.torch_device)
        (left, a), (right, b) = in_unit(A), in_unit(B)
        for start in range(0, A.shape[1], INNER):
            stop = start + INNER
            total.addmm_(*(x.to(at.dtype).to(at.torch_device) for x in (left[:, start:stop], right[start:stop])))
        return total.cpu().double() * a * b

    return on_device_or_host(product, device)


def _symmetric(G: torch.Tensor) -> torch.Tensor:
    return (G + G.T) / 2


def _eigh(G: torch.Tensor) -> tuple[NDArray[np.float64], torch.Tensor]:
    values, vectors = np.linalg.eigh(G.numpy())
    return values, torch.from_numpy(vectors)


def _orthonormal(U: torch.Tensor) -> torch.Tensor:
    """The columns of a nearly orthonormal U (m, r) made so (Cholesky QR): small s_i lost digits to the squaring."""
    if not U.shape[1]:
        return U
    R = scipy.linalg.cholesky((U.T @ U).numpy(), lower=False)
    return torch.from_numpy(scipy.linalg.solve_triangular(R, U.T.numpy(), trans=1).T.copy())


def _to_values(eigenvalues: NDArray[np.float64], metric: ByData) -> NDArray[np.float64]:
    if not np.isfinite(eigenvalues).all():
        raise NumericalError("the eigensolver returned NaN or Inf; are the moments finite? calibrate again")
    squares = np.maximum(eigenvalues[::-1], 0.0)
    squares[squares <= len(squares) * np.finfo(np.float64).eps * squares[0]] = 0.0
    if not metric.shrink and metric.form != "diagonal":  # C has no more rank than it has inputs; the rest is rounding
        squares[metric.tokens :] = 0.0
    return np.sqrt(squares)
