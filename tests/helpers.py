"""What several test files use: folders as they lie on disk, and devices that are there or stand in for others."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file

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


def names_of(there: Mapping[str, Here]) -> list[str]:
    """The devices that are there, by what `devices.available` says of each that laser knows."""
    return [name for name, here in there.items() if here.usable]


def digits(device: Device, double: float, single: float) -> float:
    """A tolerance: `double` where the device computes in float64, `single` where in float32."""
    return double if device.dtype == torch.float64 else single
