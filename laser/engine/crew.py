"""Who computes: the workers of a command, what each does with a matrix, and the memory that they need.

A worker on the host has one BLAS thread, however many workers there are. An eigensolver's last bits depend on how many
threads it has, and a result must not depend on the number of workers. Two matrices at a time with a thread each are
also faster than one at a time with two, as most of an eigenproblem is bound by memory and runs on one core anyway.

Memory: in storage dtype, two matrices ahead, two results behind, and per worker its matrix and its result; and per
worker what a factorisation needs (`worker_bytes`). Neither the checkpoint's size nor the number of matrices matters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from threadpoolctl import ThreadpoolController

from laser.checkpoint.matrices import Matrix
from laser.checkpoint.reader import BITS
from laser.spectral.devices import Device, free_bytes, full_precision
from laser.spectral.factorise import device_bytes
from laser.spectral.gram import BLOCK_ROWS

T = TypeVar("T")
# What is done with one matrix: (matrix, its weights (m, n) on the host, the device to use) -> a result.
Work = Callable[[Matrix, torch.Tensor, Device], T]
Visits = Generator[tuple[Matrix, T, float], None, None]
# On CUDA, each with a stream of its own: one copies, rounds and judges while the other's kernels run. A matrix with p
# up to SMALL leaves most of the chip idle: where some are so small there are more workers, and most where all are. With
# p = 4096 more than two gain 9 % at the most (measured on an H100), and each has its part of the memory.
PER_GPU, WITH_SMALL, ALL_SMALL = 2, 4, 8
SMALL = 1024


@dataclass(frozen=True)
class Crew:
    """Two to eight workers per GPU, see `per_gpu`; on the host as many as `workers`, or, if that is None, as cores and
    memory allow.

    engine: "threads" of this process, or "ray", "ray://HOST:PORT": the same work as tasks of a Ray cluster, which says
    by itself on which of its devices of that kind.
    """

    devices: tuple[Device, ...]
    workers: int | None = None
    engine: str = "threads"

    @property
    def label(self) -> str:
        """The kind of device, not how many there are: records must not depend on that. And the host's routes, on which
        last digits depend, where they are not the default ones."""
        first = self.devices[0]
        return first.kind + (f" {first.routes.stated()}" if first.routes else "")

    def pool(self, matrices: Sequence[Matrix]) -> tuple[Device, ...]:
        """A device per worker for these matrices. On the host never more workers than matrices."""
        first = self.devices[0]
        if not first.host_blas:
            return self.devices * (per_gpu(matrices, self.devices) if first.torch_device.type == "cuda" else 1)
        if self.workers is not None:
            return (first,) * max(1, min(self.workers, len(matrices)))
        free, room = free_bytes(first), torch.get_num_threads()
        if free is not None:  # half of it: others live here too
            room = min(room, free // 2 // max(worker_bytes(matrices, first), 1))
        return (first,) * max(1, min(room, len(matrices)))


def per_gpu(matrices: Sequence[Matrix], devices: Sequence[Device]) -> int:
    """How many workers share a GPU for these matrices: more for small ones, where each still has room for the largest.

    Not one batch of several: that takes another routine, whose bits depend on what else is in the batch.
    """
    sides = [min(m.shape) for m in matrices if m.is_matrix]
    wanted = PER_GPU if not sides or min(sides) > SMALL else WITH_SMALL if max(sides) > SMALL else ALL_SMALL
    if wanted == PER_GPU or not torch.cuda.is_available():  # of a cluster, whose memory is not ours to ask
        return PER_GPU
    p, q = max(sides), max(max(m.shape) for m in matrices if m.is_matrix)
    whole = torch.empty(q, p, dtype=torch.float32, device="meta")  # in no wider storage than most
    free = [free_bytes(device) for device in devices]
    room = min(
        (each // (2 * whole.nbytes + device_bytes(whole, "gram", devices[0])) for each in free if each), default=0
    )
    return max(PER_GPU, min(wanted, room))


def most_expensive_first(matrices: Sequence[Matrix]) -> list[Matrix]:
    """Most expensive first, by m * n * min(m, n), so that no large matrix is left to one worker at the end."""
    return sorted(matrices, key=lambda m: -m.cost)


def do(work: Work[T], matrix: Matrix, W: torch.Tensor, device: Device) -> tuple[Matrix, T, float]:
    """One visit, timed."""
    start = time.perf_counter()
    result = work(matrix, W, device)
    return matrix, result, time.perf_counter() - start


def own_stream(device: Device) -> AbstractContextManager[object]:
    """On CUDA a stream for this thread, whose work then overlaps with that of others; elsewhere nothing."""
    if device.torch_device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device.torch_device))


@contextmanager
def quiet(device: Device) -> Iterator[None]:
    """One BLAS thread per worker, and IEEE products, set once around all workers: each sets and restores both for
    itself as well, which among threads is safe only where there is nothing left to change. On CUDA, too, whose workers
    go on on the host when a step fails there; but on MPS one worker has the host's eigensolver to itself."""
    before = torch.get_num_threads()
    several = device.host_blas or not device.host_eigensolver
    pool = ThreadpoolController().limit(limits=1, user_api="blas") if several else nullcontext()
    with full_precision(), pool:
        if device.host_blas:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


# --- memory -----------------------------------------------------------------------------------------------------------


def storage_bytes(matrices: Sequence[Matrix]) -> int:
    """Of the largest of them, in its storage dtype."""
    return max((m.shape[0] * m.shape[1] * BITS[m.dtype] // 8 for m in matrices if m.is_matrix), default=0)


def worker_bytes(matrices: Sequence[Matrix], device: Device) -> int:
    """What one worker holds at the most: its matrix and result, the Gram matrix, its vectors and LAPACK's two work
    arrays, and three blocks of rows in the precision of the arithmetic."""
    p = max((min(m.shape) for m in matrices if m.is_matrix), default=0)
    q = max((max(m.shape) for m in matrices if m.is_matrix), default=0)
    width = torch.finfo(device.dtype).bits // 8
    return 2 * storage_bytes(matrices) + 5 * p * p * width + 3 * min(BLOCK_ROWS, q) * p * width


def peak_bytes(matrices: Sequence[Matrix], crew: Crew) -> int:
    """The bound of a scan or reduction on the host, besides the libraries: every worker, two ahead and two behind."""
    return len(crew.pool(matrices)) * worker_bytes(matrices, crew.devices[0]) + 4 * storage_bytes(matrices)
