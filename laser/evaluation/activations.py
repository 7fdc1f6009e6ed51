"""Where hidden states wait between layers: on the device, in memory, or in temporary files, memory-mapped."""

from __future__ import annotations

import ctypes
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from laser.files import disk_errors

# 2 GiB hold 128 windows of 512 tokens at hidden size 4096 in float32, and leave a 16 GB machine its room for a layer.
MEMORY_LIMIT = 2 << 30
HERE = torch.device("cpu")


@dataclass(frozen=True)
class Activations:
    """Hidden states of every window, one after the other. `hidden` is (sum of lengths, H); written in place."""

    hidden: torch.Tensor
    starts: tuple[int, ...]  # where each window begins, and the end

    def window(self, number: int) -> torch.Tensor:
        """A view (T, H) of one window's states."""
        return self.hidden[self.starts[number] : self.starts[number + 1]]

    def copy_from(self, other: Activations) -> None:
        self.hidden.copy_(other.hidden)


class Store:
    """Allocates Activations and counts them, in the first place that has room: on `device` up to `device_limit` bytes,
    in memory up to `limit`, else in a file in `directory`.

    A file is deleted as soon as it is mapped, so that it is gone with the process, however that ends. Memory that CUDA
    copies from is pinned, which is twice as fast.
    """

    def __init__(
        self,
        limit: int = MEMORY_LIMIT,
        directory: Path | None = None,
        *,
        device: torch.device = HERE,
        device_limit: int = 0,
    ) -> None:
        self.limit, self.directory, self.used = limit, directory, 0
        self.device, self.device_limit, self.device_used = device, device_limit, 0
        self._pinned = device.type == "cuda"
        self._here: set[int] = set()
        self._there: set[int] = set()

    def allocate(self, lengths: Sequence[int], width: int, dtype: torch.dtype) -> Activations:
        """Room for windows of `lengths` tokens, (sum, width). Raises OutputError where the disk is full."""
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        shape = (starts[-1], width)
        size = math.prod(shape) * dtype.itemsize
        if self.device_used + size <= self.device_limit:
            hidden = torch.empty(shape, dtype=dtype, device=self.device)
            self.device_used += size
            self._there.add(hidden.data_ptr())
        elif self.used + self._counted(size) <= self.limit:
            hidden = torch.empty(shape, dtype=dtype, pin_memory=self._pinned)
            self.used += self._counted(size)
            self._here.add(hidden.data_ptr())
        else:
            hidden = self._mapped(shape, dtype, size)
        return Activations(hidden, tuple(starts))

    def room(self, lengths: Sequence[int], width: int, dtype: torch.dtype) -> int:
        """How many more Activations of these `lengths` fit in memory, before the next one is a file."""
        size = max(sum(lengths) * width * dtype.itemsize, 1)
        there = max(self.device_limit - self.device_used, 0) // size
        return there + max(self.limit - self.used, 0) // self._counted(size)

    def _counted(self, size: int) -> int:
        """Bytes of the host's memory that so many take."""
        return pinned_bytes(size) if self._pinned else size

    def _mapped(self, shape: tuple[int, ...], dtype: torch.dtype, size: int) -> torch.Tensor:
        directory = self.directory or _on_disk()
        with disk_errors(directory), tempfile.NamedTemporaryFile(dir=directory, prefix="laser-activations-") as file:
            # Blocks are reserved now: a sparse file that meets a full disk later kills the process with SIGBUS.
            _reserve(file.fileno(), size)
            return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).reshape(shape)

    def keep(self, W: torch.Tensor) -> torch.Tensor:
        """W, of any shape, kept for as long as the process lasts: itself, or a copy in a file where memory is short."""
        if self.used + W.nbytes <= self.limit:
            self.used += W.nbytes
            return W
        kept = self._mapped(tuple(W.shape), W.dtype, W.nbytes)
        return kept.copy_(W)

    def free(self, activations: Activations) -> None:
        """Give back what `activations` counted; the memory itself goes with the last reference."""
        place, size = activations.hidden.data_ptr(), activations.hidden.nbytes
        if place in self._there:
            self._there.remove(place)
            self.device_used -= size
        elif place in self._here:
            self._here.remove(place)
            self.used -= self._counted(size)


def pinned_bytes(size: int) -> int:
    """What torch takes where pinned memory of `size` bytes is asked for: the next power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def _on_disk() -> Path:
    """TMPDIR, or /var/tmp, since /tmp is kept in memory on many systems."""
    asked, lasting = Path(tempfile.gettempdir()), Path("/var/tmp")
    return asked if os.environ.get("TMPDIR") or not os.access(lasting, os.W_OK) else lasting


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS has no such call
        os.ftruncate(descriptor, size)


def keep_heap_flat() -> None:
    """Have the C library give every block of 128 KiB or more its own mapping, returned to the system when freed.

    glibc raises that limit to the size of the blocks it has seen (up to 32 MiB). Read buffers of a few megabytes then
    come from the heap, where small lasting objects pin them: 10 MB more resident with each layer of 110 MB, measured.
    Setting M_MMAP_THRESHOLD (-3) to its initial value stops that, for the whole process. Elsewhere nothing happens.
    """
    try:
        ctypes.CDLL(None).mallopt(-3, 128 << 10)
    except (AttributeError, OSError, TypeError):  # macOS, musl and Windows have no mallopt
        return
