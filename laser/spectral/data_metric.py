"""Noise that sees the data: singular values and truncations of W in the metric of the inputs that it meets.

With x the inputs of W (m, n) and C = E[x x^T] (n, n) their second moment (not centred: a layer meets the mean, too),

    E ||(W - B) x||^2 = ||(W - B) C^(1/2)||_F^2 = tr((W - B) C (W - B)^T)

is the error that the next layer sees. Its least value over matrices B of rank r is the tail of the squared singular
values of W C^(1/2), and is reached by B = U U^T W, U (m, r) the top eigenvectors of W C W^T = E[y y^T], the second
moment of the *outputs* y = W x (Eckart and Young 1936 in the metric of C; as SVD-LLM, arXiv 2403.07378, whitens).
W C^(1/2) V V^T C^(-1/2) is the same matrix where C is regular. It is not used: nothing here inverts C, so a C without
full rank needs no pseudo-inverse and no floor, and on inputs that the calibration never met B still is a projection of
what W answers, and not zero.

The p x p eigenproblem, p = min(m, n), is on the smaller side: W C W^T, or C^(1/2) W^T W C^(1/2) and then U from
W C^(1/2) V. It is solved on the host in float64 on every device: a few channels of massive activations give C a
condition that squared float32 cannot hold. Values under sqrt(p * eps) * s_1, and beyond the number of tokens seen,
count as 0.

The null: W with its entries permuted meets the same inputs (permutation.py), and only its largest value is asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray

from laser.errors import NumericalError, UsageError
from laser.spectral.decomposition import Certificate, Truncation, check_storage
from laser.spectral.devices import Device, choose_device, full_precision, host_threads, on_device_or_host
from laser.spectral.gram import to_host
from laser.spectral.permutation import DENSE, Product, largest_eigenvalue, permuted
from laser.spectral.second_moments import shrunk

FORMS = ("full", "diagonal", "outputs")


@dataclass(frozen=True)
class Metric:
    """What is known of the inputs of one W (m, n). Moments are float64 means over `tokens` inputs.

    form: what `moment` is: "full" C (n, n); "diagonal" its diagonal (n,); "outputs" W C W^T (m, m), for inputs so wide
        that C is never formed; then C itself is known, for the null, as sketch sketch^T + diag(rest)
    fourth: mean of ||x||^4 ("outputs": of ||y||^4), what Ledoit-Wolf shrinkage goes by
    shrink: whether to shrink `moment` (second_moments.py)
    """

    form: str
    moment: torch.Tensor
    tokens: int
    fourth: float = 0.0
    shrink: bool = False
    sketch: torch.Tensor | None = None  # (n, k)
    rest: torch.Tensor | None = None  # (n,)

    def check(self, W: torch.Tensor) -> None:
        """Raises UsageError where this is the metric of a matrix of another shape."""
        m, n = W.shape
        wanted = {"full": (n, n), "diagonal": (n,), "outputs": (m, m)}[self.form]
        if tuple(self.moment.shape) != wanted:
            raise UsageError(
                f"the {self.form} moment has shape {list(self.moment.shape)}, expected {list(wanted)} for a matrix of "
                f"{m} x {n}; calibrate this model again"
            )


def root(C: torch.Tensor) -> torch.Tensor:
    """C^(1/2) (n, n), symmetric; eigenvalues that rounding made negative count as 0."""
    values, vectors = _eigh(C)
    return (vectors * torch.from_numpy(np.sqrt(np.maximum(values, 0.0)))) @ vectors.T


def data_values(W: torch.Tensor, metric: Metric, device: Device) -> NDArray[np.float64]:
    """Singular values (p,) of W C^(1/2), float64, descending: the root mean square of the outputs along each direction.

    Raises NumericalError for NaN or Inf in W, UsageError for the metric of another matrix.
    """
    _check(W, metric)
    with full_precision():
        G = _gram(W, metric, device)[0]
        with host_threads(G.shape[0]):
            values = np.linalg.eigvalsh(G.numpy())
    return _to_values(values, metric)


def truncate_in_metric(W: torch.Tensor, rank: int, metric: Metric, device: Device) -> Truncation:
    """The matrix of rank `rank` with the least mean squared error of the outputs, U U^T W, certified.

    The certificate is in the metric: energy_kept is the share of E||y||^2 that is left, residual the difference of
    measured and predicted root of the share that is lost. Raises UsageError for a rank over the number of directions
    that the data show, NumericalError where the certificate is missed.
    """
    _check(W, metric)
    with full_precision():
        G, half, C_half = _gram(W, metric, device)
        with host_threads(G.shape[0]):
            eigenvalues, V = _eigh(G)
        s = _to_values(eigenvalues, metric)
        seen = int(np.count_nonzero(s))
        if not 0 <= rank <= seen:
            raise UsageError(
                f"rank {rank} does not fit: {seen} of {len(s)} directions show in the {metric.tokens} inputs of the "
                "calibration; calibrate on more text, or plan a lower rank"
            )
        total = float(np.sum(eigenvalues))
        if total <= 0:  # a zero matrix, or inputs that are all zero
            return Truncation(W.clone(), s, Certificate(1.0, 0.0, 0.0, 0.0, "data"))
        wide = W.double()
        U = V[:, len(s) - rank :]
        if half is not None:
            U = _orthonormal((half @ U) / torch.from_numpy(s[:rank][::-1].copy()))
        orthogonality = float((U.T @ U - torch.eye(rank, dtype=U.dtype)).abs().max()) if rank else 0.0
        B = _product(U, _product(U.T, wide, device), device)
        # By the root that G was made with where there is one: its negative eigenvalues, all rounding, are cut off.
        R = wide - B
        measured = error_in_metric(R, metric, device, U) if C_half is None else _squares(_product(R, C_half, device))
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
    return Truncation(B.to(W.dtype), s, Certificate(1 - lost, residual, orthogonality, tolerance, "data"))


def error_in_metric(R: torch.Tensor, metric: Metric, device: Device, U: torch.Tensor | None = None) -> float:
    """E ||R x||^2 of a difference R (m, n) of matrices, at least 0.

    In the form "outputs" only R = (I - U U^T) W can be told, by U (m, r): E||y||^2 - E||U^T y||^2.
    """
    if metric.form == "outputs":
        if U is None:
            raise UsageError("these moments are of outputs and cannot measure another matrix; calibrate that one")
        M = _outputs(metric, None)
        return max(float(torch.trace(M) - (U * (M @ U)).sum()), 0.0)
    R = R.double()
    RC = R * metric.moment if metric.form == "diagonal" else _product(R, _inputs(metric), device)
    return max(float((RC * R).sum()), 0.0)


def relative_error(W: torch.Tensor, B: torch.Tensor, rank: int, metric: Metric) -> float:
    """E||(W - B) x||^2 / E||W x||^2 on the inputs of any metric; 0 for a W that answers nothing.

    In the form "outputs" B must be a projection of W's outputs of rank `rank`, see `truncate_in_metric`.
    """
    host, wide, U = choose_device("cpu"), W.double(), None
    if metric.form == "outputs":
        total = float(torch.trace(metric.moment))
        narrow = B.double()
        U = _eigh(narrow @ narrow.T)[1][:, W.shape[0] - rank :]
    else:
        total = error_in_metric(wide, metric, host)
    return error_in_metric(wide - B.double(), metric, host, U) / total if total > 0 else 0.0


def null_in_metric(W: torch.Tensor, metric: Metric, draws: int, device: Device) -> NDArray[np.float64]:
    """(draws,) largest singular values of permuted W (m, n) times C^(1/2), one per seed 0, 1, ...: what noise of this
    size would do to these inputs. Lanczos iteration on W C W^T, which is never formed."""
    _check(W, metric)
    return on_device_or_host(lambda where: _null(W, metric, draws, where), device)


def _null(W: torch.Tensor, metric: Metric, draws: int, device: Device) -> NDArray[np.float64]:
    tops = np.zeros(draws)
    C = None if metric.form != "full" else _inputs(metric).float().to(device.torch_device)
    d = None if metric.form != "diagonal" else metric.moment.float().to(device.torch_device)
    B, rest = (None if x is None else x.float().to(device.torch_device) for x in (metric.sketch, metric.rest))
    for seed in range(draws):
        P = permuted(W, seed).to(device.torch_device)

        def product(x: NDArray[np.float64], P: torch.Tensor = P) -> NDArray[np.float64]:
            column = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32).reshape(-1)).to(P.device)
            with full_precision():
                z = P.T @ column  # (n,)
                if C is not None:
                    z = C @ z
                elif d is not None:
                    z = d * z
                elif B is not None and rest is not None:
                    z = B @ (B.T @ z) + rest * z
                return to_host(P @ z)

        tops[seed] = _largest(product, W.shape[0])
    return np.sqrt(np.maximum(tops, 0.0))


def _largest(product: Product, side: int) -> float:
    """As `largest_eigenvalue`, for zero and for tiny matrices as well, which an iteration cannot do."""
    if side <= DENSE:
        dense = np.stack([product(row) for row in np.eye(side)])
        return float(np.linalg.eigvalsh((dense + dense.T) / 2)[-1])
    return largest_eigenvalue(product, side) if np.any(product(np.ones(side))) else 0.0


# --- the gram matrix in the metric ------------------------------------------------------------------------------------


def _check(W: torch.Tensor, metric: Metric) -> None:
    check_storage(W.dtype)
    metric.check(W)
    if not torch.isfinite(W).all():
        raise NumericalError("the matrix holds NaN or Inf; nothing can be said of its spectrum")


def _inputs(metric: Metric) -> torch.Tensor:
    if not metric.shrink:
        return metric.moment
    eye = torch.eye(len(metric.moment), dtype=torch.float64)
    return shrunk(metric.moment, metric.fourth, metric.tokens, eye)[0]


def _outputs(metric: Metric, WW: torch.Tensor | None) -> torch.Tensor:
    if not metric.shrink or WW is None:
        return metric.moment
    return shrunk(metric.moment, metric.fourth, metric.tokens, WW)[0]


def _gram(
    W: torch.Tensor, metric: Metric, device: Device
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(p, p) with the squared data values as eigenvalues, float64 on the host; where W is tall also W C^(1/2), and
    C^(1/2) where it had to be made."""
    m, n = W.shape
    wide, C_half = W.double(), None
    if metric.form == "outputs":
        return _outputs(metric, _product(wide, wide.T, device) if metric.shrink else None), None, None
    if metric.form == "diagonal":
        half = wide * metric.moment.clamp_min(0).sqrt()
    elif m <= n:
        return _symmetric(_product(_product(wide, _inputs(metric), device), wide.T, device)), None, None
    else:
        C_half = root(_inputs(metric))
        half = _product(wide, C_half, device)
    if m <= n:
        return _symmetric(_product(half, half.T, device)), None, None
    return _symmetric(_product(half.T, half, device)), half, C_half


def _squares(A: torch.Tensor) -> float:
    return float((A * A).sum())


def _product(A: torch.Tensor, B: torch.Tensor, device: Device) -> torch.Tensor:
    """A @ B in the device's precision, given and returned on the host in float64."""

    def product(at: Device) -> torch.Tensor:
        if at.host_blas:
            return A @ B
        where, dtype = at.torch_device, at.dtype
        return (A.to(dtype).to(where) @ B.to(dtype).to(where)).cpu().double()

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


def _to_values(eigenvalues: NDArray[np.float64], metric: Metric) -> NDArray[np.float64]:
    if not np.isfinite(eigenvalues).all():
        raise NumericalError("the eigensolver returned NaN or Inf; are the moments finite? calibrate again")
    squares = np.maximum(eigenvalues[::-1], 0.0)
    squares[squares <= len(squares) * np.finfo(np.float64).eps * squares[0]] = 0.0
    if not metric.shrink and metric.form != "diagonal":  # C has no more rank than it has inputs; the rest is rounding
        squares[metric.tokens :] = 0.0
    return np.sqrt(squares)
