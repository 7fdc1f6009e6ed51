"""--dry-run: time, memory and disk foretold from headers, and from one small probe of this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from laser.checkpoint.families import Matrix
from laser.checkpoint.reader import Checkpoint
from laser.spectral.decomposition import singular_values, truncate
from laser.workers import Crew, peak_bytes

PROBE = 768  # side of the probe: a quarter of a second, large enough to run at nearly full speed


@dataclass(frozen=True)
class Estimate:
    """Foretold, not measured: seconds of computation, bytes of memory at the peak, bytes written to disk."""

    matrices: int
    scan_seconds: float
    reduce_seconds: float
    peak_bytes: int
    disk_bytes: int


def estimate(checkpoint: Checkpoint, matrices: Sequence[Matrix], crew: Crew) -> Estimate:
    """What it would take to scan and to reduce `matrices`. Work grows as m * n * p for the products and p^3 for the
    eigenproblem; both rates are measured with one square probe, so expect the right size rather than the digits."""
    device, staff = crew.devices[0], len(crew.staff(matrices))
    probe = torch.randn(PROBE, PROBE, generator=torch.Generator().manual_seed(0))
    singular_values(probe, device)  # the first call loads libraries
    start = time.perf_counter()
    singular_values(probe, device)
    middle = time.perf_counter()
    truncate(probe, PROBE // 4, device)
    end = time.perf_counter()
    work = sum(m.cost + 2 * min(m.shape) ** 3 for m in matrices) / (3 * PROBE**3)
    disk = sum(s.size for s in checkpoint.shards)
    return Estimate(
        len(matrices), work * (middle - start) / staff, work * (end - middle) / staff, peak_bytes(matrices, crew), disk
    )
