"""Singular values and truncations of one matrix, each with a certificate.

Methods: `gram` (gram.py, the default), `projector` (projector.py, products alone, for devices without LAPACK) and `svd`
(plain `torch.linalg.svd` in float64 on the host: slow, independent of every other method, and so the reference).

Where a step fails the next one is tried, from the untouched matrix, and the record says which failed and why:

    the method asked for  ->  float64 on the same device  ->  the host  ->  plain SVD in float64 on the host

A projector goes to eigenvectors first. A step that does not exist (float64 on Apple MPS, another host on the host) is
left out. A step fails with NaN in its result, a missed certificate, an eigensolver that does not converge, or too
little memory on the device. One in float32 also fails where the caller cannot decide by its values (`Doubt`), as where
one lies at the threshold of a rule; then the next step in float64 is tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from laser.errors import NumericalError, UsageError, first_line, is_out_of_memory
from laser.spectral.certificate import Factors, Raw, Truncation, certified
from laser.spectral.devices import (
    HOST,
    Device,
    failed_there,
    free_bytes,
    full_precision,
    host_threads,
    in_float64,
    on_device_or_host,
    release,
    sent,
)
from laser.spectral.gram import BLOCK_ROWS, eigenvalues, factors_by_gram, values_by_gram
from laser.spectral.projector import factors_by_projector
from laser.spectral.shrinkage import Gains
from laser.spectral.unit import Spectrum, in_unit, largest_entry

F = TypeVar("F")
T = TypeVar("T")


# --- the reference ----------------------------------------------------------------------------------------------------


def values_by_svd(W: torch.Tensor, device: Device) -> Spectrum:
    return torch.linalg.svdvals(W.double()).numpy()


def factors_by_svd(W: torch.Tensor, device: Device, values: Spectrum | None = None) -> Factors:
    full = W.double()
    U, s, Vh = torch.linalg.svd(full, full_matrices=False)

    def cut(wanted: Gains) -> Raw:
        gains = wanted.of(s.numpy(), (W.shape[0], W.shape[1]))
        result = (U * (s * torch.from_numpy(gains))) @ Vh
        basis = Vh[torch.from_numpy(gains > 0)]
        eye = torch.eye(len(basis), dtype=torch.float64)
        orthogonality = float((basis @ basis.T - eye).abs().max()) if len(basis) else 0.0
        distance = float(torch.linalg.vector_norm(full - result))
        return Raw(result.to(W.dtype), s.numpy(), gains, distance, orthogonality, torch.float64)

    return Factors(s.numpy(), cut)


# --- methods ----------------------------------------------------------------------------------------------------------


_VALUES: dict[str, Callable[[torch.Tensor, Device], Spectrum]] = {"gram": values_by_gram, "svd": values_by_svd}
_FACTORS: dict[str, Callable[[torch.Tensor, Device, Spectrum | None], Factors]] = {
    "gram": factors_by_gram,
    "projector": factors_by_projector,
    "svd": factors_by_svd,
}
METHODS = tuple(_FACTORS)
SLACK_SIDE = 1024
# Why a decision by singular values (p,) is not sure where their arithmetic has this eps; "" where it is.
Doubt = Callable[[Spectrum, float], str]


@dataclass(frozen=True)
class Values:
    """Singular values (p,), float64, descending; the step of the ladder that gave them; the steps that failed."""

    singular_values: Spectrum
    method: str
    note: str = ""

    @property
    def stated(self) -> str:
        """How the values came about, for people: nothing where the first step held."""
        return f"by {self.method}, as {self.note}" if self.note else ""

    @property
    def step(self) -> str:
        """The same for programs: the step that gave them, nothing where it was the first."""
        return self.method if self.note else ""


@dataclass(frozen=True)
class Factorised:
    """One factorisation of a matrix, and what was made with it: None where the decision was to leave it alone."""

    values: Values
    truncation: Truncation | None


def check_storage(dtype: torch.dtype) -> None:
    """Raises UsageError unless the dtype is bf16, fp16, fp32 or fp64: eight-bit floats need their scales."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise UsageError(
            f"a matrix stored as {dtype} cannot be reduced: found no scales for it, and without them its values are "
            "not the weights; try the bf16 release of the model, or --exclude these matrices"
        )


def measure(W: torch.Tensor, device: Device, method: str = "gram", doubt: Doubt | None = None) -> Values:
    """Singular values of W (m, n). The projector has none of its own: its values are those of the Gram matrix.

    In float64 where `doubt` finds those in float32 not sure enough. Raises NumericalError for a NaN or Inf in W or when
    every step of the ladder fails.
    """
    check_storage(W.dtype)
    W, u = in_unit(W)
    ladder = steps("gram" if method == "projector" else method, device)

    def use(found: Spectrum, step: Step) -> Spectrum:
        s = _scaled(found, u)
        _require_sure(doubt, s, step)
        return s

    return Values(*climb(W, ladder, _VALUES, use))


def singular_values(W: torch.Tensor, device: Device, method: str = "gram") -> tuple[Spectrum, str]:
    """Singular values (p,) of W (m, n), float64, descending, and the method that gave them. Raises as `measure`."""
    found = measure(W, device, method)
    return found.singular_values, found.method


def truncate(
    W: torch.Tensor, rank: int | Gains, device: Device, method: str = "gram", values: Spectrum | None = None
) -> Truncation:
    """The best approximation of W (m, n) of rank `rank` in Frobenius norm, certified (Eckart and Young 1936).

    With Gains instead of a rank, W with its singular values multiplied by them. `values`: W's singular values (p,)
    where they are known, which spares the projector its eigenvalues; the other methods find them on their way. Raises
    UsageError for a rank outside [0, p], NumericalError when no method meets the tolerance.
    """
    gains = Gains(rank) if isinstance(rank, int) else rank
    _check_rank(W, gains)
    found = factorise(W, lambda _: gains, device, method, values).truncation
    assert found is not None
    return found


def factorise(
    W: torch.Tensor,
    decide: Callable[[Spectrum], Gains | None],
    device: Device,
    method: str = "gram",
    values: Spectrum | None = None,
    doubt: Doubt | None = None,
) -> Factorised:
    """Factorise W (m, n) once: `decide` gets its singular values (p,) and answers with gains, or None to leave it.

    What a scan and a reduction need together, for one pair of eigenvalues and eigenvectors instead of two. `decide` is
    asked again by each step of the ladder, in float32 only where `doubt` has none. Raises as `truncate`.
    """
    check_storage(W.dtype)
    storage = W.dtype
    W, u = in_unit(W)

    def use(factors: Factors, step: Step) -> tuple[Spectrum, Truncation | None]:
        s = _scaled(factors.singular_values, u)
        _require_sure(doubt, s, step)
        gains = decide(s)
        if gains is None:
            return s, None
        _check_rank(W, gains)
        return s, certified(factors.cut(gains.in_unit(u)), step.name)

    known = None if values is None else values / u
    (s, found), step, note = climb(W, steps(method, device), _FACTORS, use, known)
    if found:
        result = found.matrix if u == 1.0 else (found.matrix * u).to(storage)
        if not math.isfinite(largest_entry(result)):
            raise NumericalError(f"the result leaves the range of {storage}; try --exclude this matrix")
        found = Truncation(result, s, replace(found.certificate, note=note))
    return Factorised(Values(s, step, note), found)


def _scaled(s: Spectrum, u: float) -> Spectrum:
    """s * u. Raises NumericalError where that is no number."""
    with np.errstate(over="ignore"):
        s = s * u
    if not np.isfinite(s).all():
        raise NumericalError("the largest singular value leaves the range of float64; try --exclude this matrix")
    return s


class _Unsure(NumericalError):
    """The values are as good as their precision, and that is not enough for the decision."""


def _require_sure(doubt: Doubt | None, s: Spectrum, step: Step) -> None:
    """Raises _Unsure for values of a step in float32 by which nobody can decide. Those in float64 are the last word."""
    if doubt is None or not step.single:
        return
    slack = 1.0 if step.device.host_eigensolver else eigensolver_slack(replace(step.device, share=None))
    if why := doubt(s, slack * torch.finfo(torch.float32).eps):
        raise _Unsure(why)


@lru_cache(maxsize=16)
def eigensolver_slack(device: Device) -> float:
    """1, or the power of two by which float32 loses more in this device's eigenvalues than the stated error allows for.

    That error (spectrum.py) was measured of the host's LAPACK, and libraries differ: MKL's in float32 is off by 1.6
    sqrt(p) eps of the largest one at p = 1024, where OpenBLAS's is by 0.1, and cuSOLVER's nobody has stated. So it is
    asked once per process: a Gram matrix of noise, the least favourable kind, in float32 and in float64.
    """
    A = torch.randn(SLACK_SIDE, SLACK_SIDE, generator=torch.Generator().manual_seed(0)).to(device.torch_device).double()
    G = A.T @ A
    exact, found = eigenvalues(G, in_float64(device)), eigenvalues(G.float(), device)
    unit = math.sqrt(SLACK_SIDE) * torch.finfo(torch.float32).eps * float(exact[-1])
    worst = float(np.abs(found - exact).max()) / unit
    return 2.0 ** math.ceil(math.log2(worst)) if worst > 1 else 1.0  # 1 of the 2 that are stated; the other is reserve


def _check_rank(W: torch.Tensor, gains: Gains) -> None:
    p = min(W.shape)
    if not (0 <= gains.above and 0 <= gains.below and gains.above + gains.below <= p):
        raise UsageError(f"rank {gains.above + gains.below} does not fit shape {tuple(W.shape)}; try 0 to {p}")


# --- which step after which -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step: `name` is what a certificate calls it, `method` a row of the tables below."""

    name: str
    method: str
    device: Device

    @property
    def single(self) -> bool:
        return self.device.dtype == torch.float32


# What the steps in float64 are called that come after those in float32.
DOUBLE, ON_HOST, PLAIN_SVD = IN_FLOAT64 = ("gram float64", "gram on the host", "svd")


def steps(method: str, device: Device) -> tuple[Step, ...]:
    """The steps for `method` on `device`, in order."""
    host = replace(HOST, reason="the ladder")
    if method == "svd":
        return (Step(PLAIN_SVD, "svd", host),)
    found = [Step(name, name, device) for name in dict.fromkeys((method, "gram"))]
    if device.dtype == torch.float32 and device.has_float64:
        found.append(Step(DOUBLE, "gram", replace(device, dtype=torch.float64)))
    if not device.host_blas:
        found.append(Step(ON_HOST, "gram", host))
    return (*found, Step(PLAIN_SVD, "svd", host))


def climb(
    W: torch.Tensor,
    ladder: tuple[Step, ...],
    methods: Mapping[str, Callable[..., F]],
    use: Callable[[F, Step], T],
    *known: Spectrum | None,
) -> tuple[T, str, str]:
    """What `use` makes of the first step that holds, that step's name, and which steps failed before it and why.

    A method gets W, the step's device and what is `known`. A step of the host's gets W on the host: what it makes
    beside W would else be made on the device that has just run out of memory. Raises NumericalError with every step's
    reason when none is left.
    """
    failures: list[str] = []
    residual, unsure = None, False
    for step in ladder:
        if unsure and step.single:
            continue
        W = W.cpu() if step.device.host_blas else W
        on_host = step.device.host_blas and step.method != "svd"
        try:
            with full_precision(), host_threads(min(W.shape)) if on_host else nullcontext():
                _require_memory(W, step)
                return use(methods[step.method](W, step.device, *known), step), step.name, "; ".join(failures)
        except NumericalError as error:
            failures.append(f"{step.name}: {error}")
            unsure = unsure or isinstance(error, _Unsure)
            residual = error.residual if residual is None else residual
        except MemoryError as error:
            if step.device.host_blas:  # no other step needs less, and a matrix is not skipped for want of memory
                raise
            failures.append(f"{step.name}: {first_line(error)}")
        except (LinAlgError, np.linalg.LinAlgError) as error:
            failures.append(f"{step.name}: {first_line(error)}")
        except RuntimeError as error:
            if not failed_there(error, step.device):
                raise
            # Without the numbers in torch's message: they differ from run to run, and records do not.
            memory = is_out_of_memory(error)
            failures.append(f"{step.name}: {'out of memory on the device' if memory else first_line(error)}")
        release(step.device)  # outside `except`: until it is left, the traceback holds the step's tensors
    raise NumericalError(
        f"no method gave a certified result ({'; '.join(failures)}); try --exclude this matrix", residual
    )


def to_device_if_it_fits(W: torch.Tensor, device: Device) -> torch.Tensor:
    """W (m, n) copied once to a GPU that has room for it, the result and the factorisation's workspace.

    The checks for NaN and the kurtosis then need no second copy. Otherwise W as it is, which the ladder streams in
    blocks of rows; always so where the host has the eigensolver.
    """
    if device.host_eigensolver:
        return W
    free = free_bytes(device)
    if free is not None and 2 * W.nbytes + device_bytes(W, "gram", device) > free:
        return W
    return on_device_or_host(lambda where: sent(W, where.torch_device), device)


def eigh_squares(version: str = torch.__version__) -> int:
    """How many matrices (p, p) an eigenproblem on CUDA holds at the most, G among them, by the routine of this torch.

    torch copies G, since the eigenvectors take the place of what cuSOLVER is given; the rest is cuSOLVER's work space.
    NVIDIA does not state that, so these are bounds. Up to torch 2.11 it is `Xsyevd`: two matrices, as LAPACK's dsyevd
    states for divide and conquer, and panels of some hundred columns, counted as a third. (In float32 with p from 32 to
    512 it is Jacobi's `syevj`, which takes less.) From 2.12 on it is `XsyevBatched` even for one matrix (pytorch pull
    request 175403), which may not work in the matrix that it is given: one more. benchmarks/on_device.py measures both.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    return 6 if (major, minor) >= (2, 12) else 5


# Work spaces of the libraries that do not depend on p: 32 MiB for a handle of cuBLAS on Hopper, and as much again.
LIBRARY_SPACE = 64 << 20


def device_bytes(W: torch.Tensor, method: str, device: Device) -> int:
    """Memory that a step needs on its device at the peak, in bytes; W and the result count where W lies there.

    With eigenvalues on the device what `eigh_squares` says, and the libraries' own; else G and V, or for the projector
    G, X and two of its powers. And four blocks of rows in the precision of the arithmetic.
    """
    p, q = min(W.shape), max(W.shape)
    there = 2 * W.nbytes if W.device.type == device.torch_device.type else 0
    if not device.host_eigensolver:
        squares, there = eigh_squares(), there + LIBRARY_SPACE
    else:
        squares = 4 if method == "projector" else 2
    return there + (squares * p * p + 4 * min(BLOCK_ROWS, q) * p) * torch.finfo(device.dtype).bits // 8


def _require_memory(W: torch.Tensor, step: Step) -> None:
    """Raises NumericalError where the device lacks room for a step, before a matrix is sent.

    The host is not asked: there is nowhere else to go, and it can swap.
    """
    free = None if step.device.host_blas else free_bytes(step.device)
    needed = device_bytes(W, step.method, step.device)
    if free is not None and needed > free:
        raise NumericalError(f"needs {needed / 2**30:.2f} GiB of memory on the device, more than is free")
