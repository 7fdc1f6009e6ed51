"""Which device computes, in which precision, who solves the eigenproblem, and why. The only file that says "mps".

Facts behind the choices. On Apple MPS there is no float64, and no LAPACK routine is native at the sizes of a language
model. So an MPS device multiplies matrices in float32 and leaves the p x p eigenproblem to the host. Nothing of LAPACK
is ever called on an mps tensor, so PYTORCH_ENABLE_MPS_FALLBACK is never needed. CUDA has both, but float64 at half the
speed of float32 only on the chips for data centres; on the others it is 32 to 64 times slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Lock
from typing import NamedTuple, TypeVar

import torch
from threadpoolctl import ThreadpoolController
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from laser.choices import DEVICES
from laser.errors import UsageError, is_out_of_memory
from laser.spectral.eigen import Routes
from laser.spectral.host_memory import host_free_bytes

T = TypeVar("T")
PRECISIONS = ("auto", "float64", "float32")
SMALL_MATRIX = 768  # side up to which a second BLAS thread gains less than a fifth
# Compute capabilities with float64 at half the rate of float32: P100, V100, A100, H100 and H200, B200 (CUDA C++
# Programming Guide, table of arithmetic throughput). All others have 1/32 or 1/64.
FULL_RATE_FLOAT64 = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))
# What an accelerator's failure says in a plain RuntimeError. Any other RuntimeError is a mistake of ours and is shown.
SYMPTOMS = ("out of memory", "invalid buffer size", "cusolver", "cublas", "magma")
FEW_BITS = "carry less than 24 bits (NVIDIA_TF32_OVERRIDE?)"
PROBED = (64, 4096)  # sides of the precision probe: an accelerator picks its kernel by shape


@dataclass(frozen=True)
class Device:
    """Where matrices are multiplied (`torch_device`), in which `dtype`, who solves the eigenproblem, and why.

    share: bytes of its memory that are for this one of several workers; None where there is no other
    routes: of the host's eigenproblems, where they are not the default ones of eigen.py
    """

    name: str
    dtype: torch.dtype
    host_eigensolver: bool
    reason: str
    share: int | None = None
    routes: Routes | None = None

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.name)

    @property
    def host_blas(self) -> bool:
        """Whether products, too, are the host's: then SciPy's BLAS does them and not torch's."""
        return self.torch_device.type == "cpu"

    @property
    def has_float64(self) -> bool:
        return self.torch_device.type != "mps"

    @property
    def label(self) -> str:
        """Which device, in which precision: "cuda:0 float64"."""
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}"

    @property
    def kind(self) -> str:
        """The same without its number: "cuda float64"."""
        return f"{self.name.partition(':')[0]} {str(self.dtype).removeprefix('torch.')}"


def device_of(device: Device | str | None) -> Device:
    """The device of that name, see `choose_device`, by default the first that is there; a Device as it is."""
    return device if isinstance(device, Device) else choose_device(device or "auto")


HOST = Device("cpu", torch.float64, True, "the host")  # always there, and exact: the end of every ladder


def in_float64(device: Device) -> Device:
    """`device` in float64, or the host where it has none."""
    if device.dtype == torch.float64:
        return device
    return replace(device, dtype=torch.float64) if device.has_float64 else HOST


class Here(NamedTuple):
    """Whether a device can be used here, and what it is, or why it cannot."""

    usable: bool
    what: str


def available(cuda_name: str = "cuda") -> dict[str, Here]:
    """Every device that laser knows, by name. `cpu` is always usable. cuda_name: which of the CUDA devices to ask."""
    cuda = Here(False, "not available: no CUDA device found by torch")
    if torch.cuda.is_available():
        cuda = Here(True, torch.cuda.get_device_name(cuda_name))
    mps = Here(False, "not available: torch finds no Apple GPU here")
    if torch.backends.mps.is_available():
        mps = Here(True, "Apple GPU")
    return {"cuda": cuda, "mps": mps, "cpu": Here(True, f"{torch.get_num_threads()} threads")}


def choose_device(name: str = "auto", precision: str = "auto") -> Device:
    """The device to compute on, with the reason. `name`: auto, cuda[:N], mps or cpu; auto takes them in that order.

    Raises UsageError for a device that is not there or a precision that it lacks.
    """
    if name == "all" or "," in name:
        raise UsageError(f"several devices are for scan, reduce and run, found --device {name}; try --device auto")
    base, colon, index = name.partition(":")
    if base not in DEVICES:
        raise UsageError(f"unknown device {name!r}; try --device {'|'.join(DEVICES)}")
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}; try --precision {'|'.join(PRECISIONS)}")
    count = torch.cuda.device_count() if base == "cuda" else 1
    if colon and not (index.isdecimal() and int(index) < max(count, 1)):  # of none at all `available` says why
        raise UsageError(f"there is no device {name!r}: found {count}, counted from 0; try --device {base}")
    here = available(name if base == "cuda" else "cuda")
    if base == "auto":
        base = name = next(n for n in ("cuda", "mps", "cpu") if here[n].usable)
        why = f"first of cuda, mps, cpu that is there ({here[base].what})"
    elif not here[base].usable:
        raise UsageError(f"device {name!r} is {here[base].what}; try --device auto")
    else:
        why = f"asked for ({here[base].what})"
    if base == "mps":
        if precision == "float64":
            raise UsageError("Apple MPS has no float64; try --device cpu, or --precision float32")
        if not exact_products(torch.device(name)):
            inexact = "its products in float32 carry less than 24 bits"
            return Device("cpu", torch.float64, True, f"{why}, but {inexact}: the host computes, in float64")
        return Device(name, torch.float32, True, f"{why}; float32, since MPS has no float64; eigenvalues on the host")
    dtype, note = _precision(name, base, precision)
    solver = "" if base == "cpu" else "; eigenvalues on the device"
    return Device(name, dtype, base == "cpu", f"{why}; {note}{solver}")


def _precision(name: str, base: str, precision: str) -> tuple[torch.dtype, str]:
    """For CUDA and the host, which have both."""
    if precision != "auto":
        asked = torch.float32 if precision == "float32" else torch.float64
        if base == "cuda" and asked == torch.float32 and not exact_products(torch.device(name)):
            raise UsageError(f"products in float32 on {name} {FEW_BITS}; try --precision float64")
        return asked, f"{precision} asked for"
    if base == "cpu":
        return torch.float64, "float64, exact to the last digit of the source"
    capability = torch.cuda.get_device_capability(name)
    chip = "compute capability {}.{}".format(*capability)
    if capability in FULL_RATE_FLOAT64:
        return torch.float64, f"float64, which this chip has at full rate ({chip})"
    if not exact_products(torch.device(name)):
        return torch.float64, f"float64, since its products in float32 {FEW_BITS}"
    return torch.float32, f"float32, since float64 is 32 to 64 times slower on this chip ({chip})"


@lru_cache(maxsize=16)
def exact_products(device: torch.device, sides: tuple[int, ...] = PROBED) -> bool:
    """Whether a product of float32 matrices on `device` carries all 24 bits, measured; once per process.

    1 + 2^-13 times the identity comes back unchanged, or as 1 where operands are cut to the 11 bits of TF32.
    """
    with full_precision():
        for side in sides if device.type != "cpu" else sides[:1]:
            x = torch.full((side, side), 1 + 2**-13, dtype=torch.float32, device=device)
            product = x @ torch.eye(side, dtype=torch.float32, device=device)
            if not bool((product == x).all()):
                return False
    return True


def products_in_float32(device: Device, storage: torch.dtype) -> bool:
    """Whether a device in float32 multiplies matrices in `storage` as they are and gives float32: on tensor cores.

    A product of two numbers of 16 bits is exact in float32, so nothing is lost but in the sums, which are float32's.
    """
    if device.torch_device.type != "cuda" or device.dtype != torch.float32:
        return False
    return storage in (torch.bfloat16, torch.float16) and _sums_in_float32(device.torch_device, storage)


@lru_cache(maxsize=16)
def _sums_in_float32(device: torch.device, storage: torch.dtype, sides: tuple[int, ...] = PROBED) -> bool:
    """Whether a product of `storage` matrices with the result in float32 (torch 2.8) exists, and sums in 24 bits; once
    per process.

    In each column one 1 and 1023 times 2^-9: the sum of squares is 1 + 1023 * 2^-18, whatever the order.
    """
    with full_precision():
        for side in sides:
            A = torch.full((1024, side), 2**-9, dtype=storage, device=device)
            A[:1] = torch.ones(1, side, dtype=storage, device=device)
            try:
                product = torch.mm(A.T, A, out_dtype=torch.float32)
            except (TypeError, RuntimeError) as error:  # no such argument; not on this chip, or not in this dtype
                if isinstance(error, RuntimeError) and is_out_of_memory(error):  # says nothing, and is not kept
                    raise
                return False
            if not bool((product == 1 + 1023 * 2**-18).all()):
                return False
    return True


# --- memory -----------------------------------------------------------------------------------------------------------


def free_bytes(device: Device, mapped: int = 0) -> int | None:
    """Memory that may still be taken on this device now, in bytes; None where that is not known. The only reader.

    mapped: see `host_free_bytes`.
    """
    if device.share is not None:
        return device.share
    where = device.torch_device
    if where.type == "cuda":
        free, _ = torch.cuda.mem_get_info(where)
        return free + torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
    if where.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return host_free_bytes(mapped)


def shared(device: Device, workers: int) -> Device:
    """`device` for one of `workers` on it, before they begin, with an equal part of what is free then.

    What is free later depends on what the others happen to hold, and which matrix falls to the host must not.
    """
    free = None if device.host_blas or workers == 1 else free_bytes(device)
    return device if free is None else replace(device, share=free // workers)


def failed_there(error: RuntimeError, device: Device) -> bool:
    """Whether it is the device that failed, its memory or its libraries; from the host there is nowhere else to go."""
    said = isinstance(error, LinAlgError) or any(symptom in str(error).lower() for symptom in SYMPTOMS)
    return said and not device.host_blas


def on_device_or_host(compute: Callable[[Device], T], device: Device) -> T:
    """`compute` on `device`, or on the host where the device fails: for what is no step of the ladder, nor in a record.

    The host's result, in float64 where the device had float32, may differ from the device's in its last digits.
    """
    try:
        return compute(device)
    except RuntimeError as error:
        if not failed_there(error, device):
            raise
    release(device)  # outside `except`: until it is left, the traceback holds what was made on the device
    return compute(HOST)


def release(device: Device) -> None:
    """Give memory that torch holds in reserve back to the device."""
    if device.torch_device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.torch_device.type == "mps":
        torch.mps.empty_cache()


def synchronise(device: Device) -> None:
    """Wait for the device: its work is queued, and a clock would measure the queueing."""
    if device.torch_device.type == "cuda":
        torch.cuda.synchronize(device.torch_device)
    elif device.torch_device.type == "mps":
        torch.mps.synchronize()


# --- copies -----------------------------------------------------------------------------------------------------------


def staged(W: torch.Tensor, device: Device | torch.device) -> torch.Tensor:
    """W, on the host, for its way to `device`: in page-locked memory where that is CUDA, elsewhere as it is.

    From there a copy takes a fifth of the time and runs beside everything else. So two matrices ahead and a stream per
    worker are the double buffer. torch keeps such memory for the next matrix; where none can be locked, W stays.
    """
    if not torch.cuda.is_available():
        return W
    if (device if isinstance(device, torch.device) else device.torch_device).type != "cuda":
        return W
    try:
        return W.pin_memory()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return W


def sent(x: torch.Tensor, where: torch.device) -> torch.Tensor:
    """x there, in its dtype. From page-locked memory to CUDA nobody waits: what uses it is queued behind it.

    Only where x is contiguous: then torch notes who reads the memory, and does not hand it out again before. Never to
    MPS, where such copies have arrived damaged (pytorch issues 139550 and 189690).
    """
    free = where.type == "cuda" and x.is_contiguous() and x.is_pinned()
    return x.to(where, non_blocking=True) if free else x.to(where)


def whole(x: torch.Tensor, device: Device) -> torch.Tensor:
    """x, made on this thread's stream, when it is all there: others may then use it on theirs."""
    synchronise(device)
    return x


def used_here(x: torch.Tensor) -> torch.Tensor:
    """x, made on another thread's stream: its memory is not handed out again before this thread's stream is done."""
    if x.device.type == "cuda":
        x.record_stream(torch.cuda.current_stream(x.device))
    return x


# --- precision and threads --------------------------------------------------------------------------------------------

_precision_lock = Lock()
_precision_users = 0
_precision_before = "none"


@contextmanager
def full_precision() -> Iterator[None]:
    """Products in IEEE float32 while inside: TF32 would cost three digits. Uses torch's new switch only, and puts
    back what it found; mixing it with the older flags makes torch raise. The switch is the process's, so the last
    thread to leave puts it back."""
    global _precision_users, _precision_before
    if not torch.cuda.is_available():
        yield
        return
    matmul = torch.backends.cuda.matmul
    with _precision_lock:
        if _precision_users == 0:
            _precision_before = matmul.fp32_precision
            matmul.fp32_precision = "ieee"
        _precision_users += 1
    try:
        yield
    finally:
        with _precision_lock:
            _precision_users -= 1
            if _precision_users == 0:
                matmul.fp32_precision = _precision_before


@lru_cache(maxsize=1)
def _pools() -> ThreadpoolController:
    """The BLAS libraries that are loaded; found once, since looking for them takes longer than a small matrix."""
    return ThreadpoolController()


@contextmanager
def host_threads(p: int) -> Iterator[None]:
    """Give NumPy's BLAS the cores to itself: inside, torch has one thread, and BLAS has one for a small matrix.

    Pools of threads that spin while they wait cost more than they bring where others want the same cores. With a second
    busy process on 2 cores, a matrix of 1536 x 576 took 0.25 s and more with two BLAS threads, and 0.07 s with one. On
    quiet cores one thread is a fifth slower (docs/log). What torch does on the host besides is copying.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _pools().limit(limits=1, user_api="blas") if p <= SMALL_MATRIX else nullcontext():
            yield
    finally:
        torch.set_num_threads(before)
