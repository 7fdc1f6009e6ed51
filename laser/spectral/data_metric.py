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
W C^(1/2) V. All of it is in float64, because a few channels of massive activations give C a condition that squared
float32 cannot hold: on the device where that has float64 and LAPACK (CUDA), else on the host. Values under
sqrt(p * eps) * s_1, and beyond the number of tokens seen, count as 0.

Matrices that share their inputs share C, and its root is made once for them (`ROOTS`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray

from laser.errors import NumericalError, UsageError
from laser.spectral.certificate import SAFETY, Certificate, Truncation
from laser.spectral.devices import (
    HOST,
    Device,
    free_bytes,
    host_threads,
    in_float64,
    on_device_or_host,
    used_here,
    whole,
)
from laser.spectral.factorise import Factorised, Spectrum, Values, check_storage, eigh_squares, singular_values
from laser.spectral.gram import eigenvalues, eigenvectors, moved
from laser.spectral.recent import Recent
from laser.spectral.rules import energy_share
from laser.spectral.shrinkage import Gains
from laser.spectral.unit import in_unit, largest_entry

T = TypeVar("T")
METHOD = "data"  # what a certificate calls it
STORED = 1e-6  # share of the outputs that the float32 of stored correlations can hide, where tokens are few
SITES_KEPT = 2  # roots at a time: of the matrix that is measured and of the next
ROOTS: Recent[torch.Tensor] = Recent(SITES_KEPT)


@dataclass(frozen=True)
class ByData:
    """What is known of the inputs of one W (m, n). Moments are float64 means over `tokens` inputs.

    form: what `moment` is: "full" C (n, n); "diagonal" its diagonal (n,); "outputs" W C W^T (m, m), for inputs so wide
        that C is never formed
    fourth: mean of ||x||^4 ("outputs": of ||y||^4), what Ledoit-Wolf shrinkage goes by
    shrink: whether to shrink `moment`, see `shrinkage`
    key: what tells this moment from any other, by its content; "" where its root is not worth keeping
    """

    form: str
    moment: torch.Tensor
    tokens: int
    fourth: float = 0.0
    shrink: bool = False
    key: str = ""

    def check(self, W: torch.Tensor) -> None:
        """Raises UsageError for the metric of a matrix of another shape, or of inputs that were not finite."""
        m, n = W.shape
        if not torch.isfinite(self.moment).all():  # from which LAPACK need not come back
            raise UsageError(f"the {self.form} moment is not finite; calibrate this model again")
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


# --- where it computes ------------------------------------------------------------------------------------------------


def computed(compute: Callable[[Device], T], W: torch.Tensor, metric: ByData, device: Device) -> T:
    """`compute` in float64 where the device has that, LAPACK and the memory; else, or where it fails, on the host."""

    def attempt(at: Device) -> T:
        free = None if at.host_blas else free_bytes(at)
        fits = free is None or data_bytes((W.shape[0], W.shape[1]), metric.form) <= free
        return compute(at if fits else HOST)

    return on_device_or_host(attempt, in_float64(device))


def data_bytes(shape: tuple[int, int], form: str) -> int:
    """What one matrix (m, n) takes at the most while it is measured or cut in this metric, all in float64, in bytes.

    W, B, W - B and two products of W's shape; C, what shrinking makes of it, its root and SITES_KEPT roots of others;
    and twice what an eigenproblem takes.
    """
    (m, n), p = shape, min(shape)
    inputs = n * n if form == "full" else 0
    return 8 * (5 * m * n + (3 + SITES_KEPT) * inputs + 2 * eigh_squares() * max(p * p, inputs if m > n else 0))


# --- values and truncations -------------------------------------------------------------------------------------------


def data_values(W: torch.Tensor, metric: ByData, device: Device) -> NDArray[np.float64]:
    """Singular values (p,) of W C^(1/2), float64, descending: the root mean square of the outputs along each direction.

    Raises NumericalError for NaN or Inf in W, UsageError for the metric of another matrix.
    """
    W, metric, u = _in_unit(W, metric)

    def values(at: Device) -> NDArray[np.float64]:
        G = gram_in_metric(moved(W, at.torch_device, torch.float64), metric, at)[0]
        with threads(at, len(G)):
            return eigenvalues(G, at)

    return to_values(computed(values, W, metric, device), metric) * u


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
    storage, source = W.dtype, W.device
    W, metric, u = _in_unit(W, metric)

    def visit(at: Device) -> Factorised:
        wide = moved(W, at.torch_device, torch.float64)
        G, half, C_half = gram_in_metric(wide, metric, at)
        squares, V = _eigh(G, at)
        s = to_values(squares, metric)
        values, seen = Values(s * u, METHOD), int(np.count_nonzero(s))
        rank = decide(values.singular_values)
        if rank is None:
            return Factorised(values, None)
        if not 0 <= rank <= seen:
            raise UsageError(
                f"rank {rank} does not fit: {seen} of {len(s)} directions show in the {metric.tokens} inputs of the "
                "calibration; calibrate on more text, or plan a lower rank"
            )
        total = float(np.sum(squares))
        if total <= 0:  # a zero matrix, or inputs that are all zero
            certificate = Certificate(1.0, 0.0, 0.0, 0.0, METHOD)
            return Factorised(values, Truncation((W * u).to(storage), values.singular_values, certificate))
        U = V[:, len(s) - rank :]
        if half is not None:
            U = orthonormal((half @ U) / torch.from_numpy(s[:rank][::-1].copy()).to(U.device), at)
        eye = torch.eye(rank, dtype=U.dtype, device=U.device)
        orthogonality = float((U.T @ U - eye).abs().max()) if rank else 0.0
        B = U @ (U.T @ wide)
        if metric.form == "outputs":  # C is not known, but B is a projection
            measured = _beyond(U, G)
        elif C_half is not None:  # the root that G was made with: negative eigenvalues, all rounding, are cut off
            measured = _squares((wide - B) @ C_half)
        else:
            measured = mean_square(wide - B, metric, at)
        lost = max(float(np.sum(squares[: len(s) - rank])), 0.0) / total
        residual = abs(math.sqrt(measured / total) - math.sqrt(lost))
        delta = SAFETY * len(s) * torch.finfo(torch.float64).eps
        tolerance = min(math.sqrt(delta), delta / (2 * math.sqrt(lost)) if lost > 0 else math.inf)
        if not (residual <= tolerance and orthogonality <= delta):
            raise NumericalError(
                f"certificate in the data's metric missed: residual {residual:.2e} (allowed {tolerance:.2e}), "
                f"orthogonality {orthogonality:.2e} (allowed {delta:.2e}); try --device cpu",
                residual,
            )
        result = (B * u).to(storage)
        if not math.isfinite(largest_entry(result)):
            raise NumericalError(f"the result leaves the range of {storage}; try --exclude this matrix")
        certificate = Certificate(1 - lost, residual, orthogonality, tolerance, METHOD)
        return Factorised(values, Truncation(result.to(source), values.singular_values, certificate))

    return computed(visit, W, metric, device)


def relative_error(W: torch.Tensor, B: torch.Tensor, rank: int, metric: ByData, device: Device = HOST) -> float:
    """E||(W - B) x||^2 / E||W x||^2 on the inputs of any metric; 0 for a W that answers nothing.

    In the form "outputs" B must be a projection of W's outputs of rank `rank`, see `truncate_in_metric`: C is not
    known, and E||y||^2 - E||U^T y||^2 is.
    """
    W, metric, u = _in_unit(W, metric)

    def error(at: Device) -> float:
        wide, narrow = (moved(x, at.torch_device, torch.float64) for x in (W, B))
        narrow = narrow / u
        if metric.form == "outputs":
            G = gram_in_metric(wide, metric, at)[0]
            lost, total = _beyond(_leading(narrow, rank, at), G), float(torch.trace(G))
        else:
            lost, total = (mean_square(x, metric, at) for x in (wide - narrow, wide))
        return lost / total if total > 0 else 0.0

    return computed(error, W, metric, device)


def rounding_error(
    W: torch.Tensor, B: torch.Tensor, E: torch.Tensor, rank: int, metric: ByData, device: Device = HOST
) -> float:
    """By how much E||B x||^2, relative to E||W x||^2, may be off where B (m, n) was rounded with errors up to E (m, n).

    Drawn: such errors are independent of one another. In the form "outputs" they turn the projection of rank `rank`.
    """
    W, metric, u = _in_unit(W, metric)
    half = E.double() / u
    noise = half * torch.randn(half.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def error(at: Device) -> float:
        wide, narrow, drawn = (moved(x, at.torch_device, torch.float64) for x in (W, B, noise))
        narrow = narrow / u
        if metric.form == "outputs":
            G = gram_in_metric(wide, metric, at)[0]
            one, other = (_leading(x, rank, at) for x in (narrow, narrow + drawn))
            total, both = float(torch.trace(G)), float(((one.T @ G @ other) * (one.T @ other)).sum())
            error = 2 * total - _beyond(one, G) - _beyond(other, G) - 2 * both  # tr (P - Q) G (P - Q)
        else:
            error, total = (mean_square(x, metric, at) for x in (drawn, wide))
        return max(error, 0.0) / total if total > 0 else 0.0

    return computed(error, W, metric, device)


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


def _shrinkage_of(wide: torch.Tensor, metric: ByData, moment: torch.Tensor) -> tuple[float, float]:
    """(keep, add): the second moment of the inputs that counts is keep * C + add * I."""
    if not metric.shrink or metric.form == "diagonal":
        return 1.0, 0.0
    if metric.form == "outputs":
        target = wide @ wide.T
    else:
        target = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    return shrinkage(moment, metric.fourth, metric.tokens, target)


def inputs_in_metric(wide: torch.Tensor, metric: ByData, at: Device) -> torch.Tensor:
    moment = metric.moment.to(at.torch_device)
    keep, add = _shrinkage_of(wide, metric, moment)
    if add == 0:
        return moment
    return (keep * moment).add_(torch.eye(len(moment), dtype=torch.float64, device=moment.device), alpha=add)


def _root_of_inputs(wide: torch.Tensor, metric: ByData, at: Device) -> torch.Tensor:
    def make() -> torch.Tensor:
        return whole(root(inputs_in_metric(wide, metric, at), at), at)

    if not metric.key:
        return make()
    # The shrinkage of inputs goes by the moment alone, and not by W.
    return used_here(ROOTS.get((metric.key, metric.shrink, metric.tokens, metric.fourth, at.name), make))


def root(C: torch.Tensor, at: Device = HOST) -> torch.Tensor:
    """C^(1/2) (n, n), symmetric; eigenvalues that rounding made negative count as 0."""
    values, vectors = _eigh(C, at)
    return (vectors * torch.from_numpy(np.sqrt(np.maximum(values, 0.0))).to(C.device)) @ vectors.T


def mean_square(R: torch.Tensor, metric: ByData, at: Device) -> float:
    """E||R x||^2 of R (m, n), float64, at least 0, where the inputs are known."""
    RC = R * metric.moment.to(R.device) if metric.form == "diagonal" else R @ inputs_in_metric(R, metric, at)
    return max(float((RC * R).sum()), 0.0)


def _beyond(U: torch.Tensor, M: torch.Tensor) -> float:
    """E||y - U U^T y||^2 of outputs y of second moment M (m, m), U (m, r) orthonormal."""
    return max(float(torch.trace(M) - (U * (M @ U)).sum()), 0.0)


def gram_in_metric(
    wide: torch.Tensor, metric: ByData, at: Device
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(p, p) with the squared data values as eigenvalues; where W is tall also W C^(1/2), and C^(1/2) where it had to
    be made. All float64 and `at` a device, as `wide`, W (m, n), is."""
    m, n = wide.shape
    C_half = None
    if metric.form == "outputs":
        moment = metric.moment.to(at.torch_device)
        keep, add = _shrinkage_of(wide, metric, moment)
        return moment if add == 0 else keep * moment + add * (wide @ wide.T), None, None
    if metric.form == "diagonal":
        half = wide * metric.moment.clamp_min(0).sqrt().to(at.torch_device)
    elif m <= n:
        return _symmetric(wide @ inputs_in_metric(wide, metric, at) @ wide.T), None, None
    else:
        C_half = _root_of_inputs(wide, metric, at)
        half = wide @ C_half
    if m <= n:
        return _symmetric(half @ half.T), None, None
    return _symmetric(half.T @ half), half, C_half


def _squares(A: torch.Tensor) -> float:
    return float((A * A).sum())


def _leading(B: torch.Tensor, rank: int, at: Device) -> torch.Tensor:
    """(m, rank) the directions of a B (m, n) of that rank."""
    return _eigh(B @ B.T, at)[1][:, len(B) - rank :]


def _symmetric(G: torch.Tensor) -> torch.Tensor:
    return (G + G.T) / 2


def threads(at: Device, p: int) -> AbstractContextManager[None]:
    return host_threads(p) if at.host_blas else nullcontext()


def _eigh(G: torch.Tensor, at: Device) -> tuple[NDArray[np.float64], torch.Tensor]:
    """Ascending eigenvalues (p,), on the host, and eigenvectors (p, p), where G is."""
    with threads(at, len(G)):
        values, vectors = eigenvectors(G, at)
        return values, vectors(np.arange(len(G)))


def orthonormal(U: torch.Tensor, at: Device) -> torch.Tensor:
    """The columns of a nearly orthonormal U (m, r) made so (Cholesky QR): small s_i lost digits to the squaring."""
    if not U.shape[1]:
        return U
    if not at.host_blas:
        R = torch.linalg.cholesky(U.T @ U, upper=True)
        return torch.linalg.solve_triangular(R, U, upper=True, left=False)
    R = scipy.linalg.cholesky((U.T @ U).numpy(), lower=False)
    return torch.from_numpy(scipy.linalg.solve_triangular(R, U.T.numpy(), trans=1).T.copy())


def to_values(eigenvalues: NDArray[np.float64], metric: ByData) -> NDArray[np.float64]:
    if not np.isfinite(eigenvalues).all():
        raise NumericalError("the eigensolver returned NaN or Inf; are the moments finite? calibrate again")
    squares = np.maximum(eigenvalues[::-1], 0.0)
    squares[squares <= len(squares) * np.finfo(np.float64).eps * squares[0]] = 0.0
    if not metric.shrink and metric.form != "diagonal":  # C has no more rank than it has inputs; the rest is rounding
        squares[metric.tokens :] = 0.0
    return np.sqrt(squares)
