"""Where hidden states wait between layers: in memory up to a limit, then in temporary files, memory-mapped."""

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
    """Allocates Activations and counts them: over `limit` bytes in memory the next one is a file in `directory`.

    A file is deleted as soon as it is mapped, so that it is gone with the process, however that ends.
    """

    def __init__(self, limit: int = MEMORY_LIMIT, directory: Path | None = None) -> None:
        self.limit, self.directory, self.used = limit, directory, 0
        self._in_memory: set[int] = set()

    def allocate(self, lengths: Sequence[int], width: int, dtype: torch.dtype) -> Activations:
        """Room for windows of `lengths` tokens, (sum, width). Raises OutputError where the disk is full."""
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        shape = (starts[-1], width)
        size = math.prod(shape) * dtype.itemsize
        if self.used + size <= self.limit:
            hidden = torch.empty(shape, dtype=dtype)
            self.used += size
            self._in_memory.add(hidden.data_ptr())
        else:
            hidden = self._mapped(shape, dtype, size)
        return Activations(hidden, tuple(starts))

    def room(self, lengths: Sequence[int], width: int, dtype: torch.dtype) -> int:
        """How many more Activations of these `lengths` fit in memory, before the next one is a file."""
        size = sum(lengths) * width * dtype.itemsize
        return max(self.limit - self.used, 0) // max(size, 1)

    def _mapped(self, shape: tuple[int, int], dtype: torch.dtype, size: int) -> torch.Tensor:
        directory = self.directory or _on_disk()
        with disk_errors(directory), tempfile.NamedTemporaryFile(dir=directory, prefix="laser-activations-") as file:
            # Blocks are reserved now: a sparse file that meets a full disk later kills the process with SIGBUS.
            _reserve(file.fileno(), size)
            return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).reshape(shape)

    def keep(self, W: torch.Tensor) -> torch.Tensor:
        """W (m, n) to be kept for as long as the process lasts: itself, or a copy in a file where memory is short."""
        if self.used + W.nbytes <= self.limit:
            self.used += W.nbytes
            return W
        kept = self._mapped((W.shape[0], W.shape[1]), W.dtype, W.nbytes)
        return kept.copy_(W)

    def free(self, activations: Activations) -> None:
        """Give back what `activations` counted; the memory itself goes with the last reference."""
        if activations.hidden.data_ptr() in self._in_memory:
            self._in_memory.remove(activations.hidden.data_ptr())
            self.used -= activations.hidden.nbytes


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
