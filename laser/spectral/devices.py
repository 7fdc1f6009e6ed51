"""Which device computes, in which precision, and why. The only file that says "mps".

Facts behind the choices: float64 does not exist on Apple MPS, and no LAPACK routine is native there at the sizes of a
language model, so an MPS device multiplies matrices in float32 and leaves the p x p eigenproblem to the host.
CUDA and the host have both; there float64 is the default.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from threadpoolctl import ThreadpoolController

from laser.errors import UsageError

NAMES = ("auto", "cuda", "mps", "cpu")
PRECISIONS = ("auto", "float64", "float32")
SMALL = 768  # side up to which a second BLAS thread gains less than a fifth


@dataclass(frozen=True)
class Device:
    """Where matrices are multiplied (`torch_device`), in which `dtype`, who solves the eigenproblem, and why."""

    name: str
    dtype: torch.dtype
    host_eigensolver: bool
    reason: str

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.name)

    @property
    def host_blas(self) -> bool:
        """Whether products, too, are the host's: then SciPy's BLAS does them and not torch's."""
        return self.torch_device.type == "cpu"

    @property
    def label(self) -> str:
        """Short text for records: "cpu float64"."""
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}"


def available() -> dict[str, str]:
    """Device name -> what it is, or why it cannot be used here. `cpu` is always usable."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "not available: no CUDA device found by torch"
    mps = "Apple GPU" if torch.backends.mps.is_available() else "not available: torch finds no Apple GPU here"
    return {"cuda": cuda, "mps": mps, "cpu": f"{torch.get_num_threads()} threads"}


def choose_device(name: str = "auto", precision: str = "auto") -> Device:
    """The device to compute on, with the reason. `name`: auto, cuda, mps or cpu; auto takes them in that order.

    Raises UsageError for a device that is not there or a precision that it lacks.
    """
    base = name.partition(":")[0]
    if base not in NAMES or precision not in PRECISIONS:
        raise UsageError(f"unknown device or precision {name!r}, {precision!r}; try --device {'|'.join(NAMES)}")
    here = available()
    if base == "auto":
        base = name = next(n for n in ("cuda", "mps", "cpu") if not here[n].startswith("not available"))
        why = f"first of cuda, mps, cpu that is there ({here[base]})"
    elif here[base].startswith("not available"):
        raise UsageError(f"device {name!r} is {here[base]}; try --device auto")
    else:
        why = f"asked for ({here[base]})"
    if base == "mps":
        if precision == "float64":
            raise UsageError("Apple MPS has no float64; try --device cpu, or --precision float32")
        return Device(name, torch.float32, True, f"{why}; float32, since MPS has no float64; eigenvalues on the host")
    dtype = torch.float32 if precision == "float32" else torch.float64
    note = "float32 asked for" if precision == "float32" else "float64, exact to the last digit of the source"
    return Device(name, dtype, base == "cpu", f"{why}; {note}")


@contextmanager
def full_precision() -> Iterator[None]:
    """Products in IEEE float32 while inside: TF32 would cost three digits. Uses torch's new switch only, and puts
    back what it found; mixing it with the older flags makes torch raise."""
    if not torch.cuda.is_available():
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@lru_cache(maxsize=1)
def _pools() -> ThreadpoolController:
    """The BLAS libraries that are loaded; found once, since looking for them takes longer than a small matrix."""
    return ThreadpoolController()


@contextmanager
def host_threads(p: int) -> Iterator[None]:
    """Inside, torch has one thread, so that SciPy's BLAS has the cores to itself, and BLAS has one for a small matrix.

    Pools of threads that spin while they wait cost more than they bring where others want the same cores: with a
    second busy process on 2 cores, a matrix of 1536 x 576 took 0.25 s and more with two BLAS threads and 0.07 s with
    one, which on quiet cores is a fifth slower (LOG.md). What torch does on the host besides is copying.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _pools().limit(limits=1, user_api="blas") if p <= SMALL else nullcontext():
            yield
    finally:
        torch.set_num_threads(before)
