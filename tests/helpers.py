"""What several test files use: folders as they lie on disk, and devices that are there or stand in for others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from laser.checkpoint import swap
from laser.spectral.devices import Device, Here


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its name relative to it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with suppress(FileNotFoundError):  # somebody may be at work there
                found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the safetensors files in a folder."""
    return {name: W for file in sorted(folder.glob("*.safetensors")) for name, W in load_file(file).items()}


# --- devices ----------------------------------------------------------------------------------------------------------


class Accelerator(Device):
    """An accelerator on CPU tensors: it has memory that can run out, and steps of its own before the host's."""

    @property
    def host_blas(self) -> bool:
        return False


class LikeMPS(Accelerator):
    """One without float64, as Apple's."""

    @property
    def has_float64(self) -> bool:
        return False


LIKE_MPS = LikeMPS("cpu", torch.float32, True, "an accelerator without LAPACK and float64, on CPU tensors")


def truncated(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x (float64) cut to a mantissa of so many bits, towards zero."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.trunc(mantissa * 2.0**bits), exponent - bits)


def tensor_cores(bits: int = 24) -> Callable[..., torch.Tensor]:
    """`torch.mm` of 16 bits into float32 as a tensor core does it: exact products, 16 at a time added to a sum that is
    cut off, not rounded."""

    def mm(A: torch.Tensor, B: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
        assert A.dtype == B.dtype and A.dtype.itemsize == 2 and out_dtype == torch.float32
        A, B = A.double(), B.double()
        total = torch.zeros(A.shape[0], B.shape[1], dtype=torch.float64)
        for start in range(0, A.shape[1], 16):
            total = truncated(total + A[:, start : start + 16] @ B[start : start + 16], bits)
        return total.float()

    return mm


def names_of(there: Mapping[str, Here]) -> list[str]:
    """The devices that are there, by what `devices.available` says of each that laser knows."""
    return [name for name, here in there.items() if here.usable]


def digits(device: Device, double: float, single: float) -> float:
    """A tolerance: `double` where the device computes in float64, `single` where in float32."""
    return double if device.dtype == torch.float64 else single


@contextmanager
def killed_before_the_new_one(new: Path) -> Iterator[None]:
    """On a system that cannot exchange two names: a kill when the earlier output is away and `new` has not its name."""
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self == new:
            raise KeyboardInterrupt
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patch:
        # A system that cannot exchange two names.
        patch.setattr(swap, "exchange", lambda *_: False)
        patch.setattr(Path, "rename", killed)
        yield
