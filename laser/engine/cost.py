"""--dry-run: time, memory and disk, estimated from headers; and afterwards what it took.

The cost model is that of probe.py: products m * n * p, eigenproblems p^3, one worker per device or core, reading and
writing beside the arithmetic, so that the slower of the two decides. The constants are those that `laser devices
--probe` has measured; where it has not been asked, those of another machine, and the answer says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from laser.checkpoint.matrices import Matrix
from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.safetensors import BITS
from laser.engine.crew import Crew, peak_bytes
from laser.errors import RecordError
from laser.spectral.data_metric import SITES_KEPT
from laser.spectral.devices import Device
from laser.spectral.host_memory import resident_bytes
from laser.spectral.probe import Probe

# One core of a shared AMD EPYC server, OpenBLAS 0.3.31, and one H100: docs/log and the measurements that it names.
_CORE = Probe(
    "cpu float64", "one core of an AMD EPYC", "2.13.0", 1, 8.7e10,
    {512: 0.012, 1024: 0.065, 2048: 0.53}, {512: 0.034, 1024: 0.19, 2048: 1.42},
    null={576 * 576: 0.0067, 4096 * 1024: 0.087, 4096 * 4096: 0.67, 14336 * 4096: 3.1},
)  # fmt: skip
_CORE_32 = replace(
    _CORE, device="cpu float32", product=1.75e11, eigenvalues={512: 0.007, 1024: 0.043, 2048: 0.29},
    eigenvectors={512: 0.018, 1024: 0.13, 2048: 0.87},
)  # fmt: skip
_H100 = Probe(
    "cuda float64", "an H100", "2.11", 1, 5.5e13, {1024: 0.011, 4096: 0.118}, {1024: 0.012, 4096: 0.127},
    # The null by the bytes that it moves, not measured.
    to_device=5.5e10, to_host=1e10, null={576 * 576: 0.006, 4096 * 1024: 0.010, 14336 * 4096: 0.030},
)  # fmt: skip
_H100_32 = replace(_H100, device="cuda float32", eigenvalues={1024: 0.010, 4096: 0.087}, eigenvectors={4096: 0.095})
ELSEWHERE = {probe.device: probe for probe in (_CORE, _CORE_32, _H100, _H100_32)}


@dataclass(frozen=True)
class Estimate:
    """Estimated, not measured.

    ..._seconds: from the first read to the last write; visit_seconds: of scan and reduction in one pass
    peak_bytes: of memory, besides the libraries
    disk_bytes: written
    basis: whose constants
    """

    matrices: int
    scan_seconds: float
    reduce_seconds: float
    visit_seconds: float
    peak_bytes: int
    disk_bytes: int
    basis: str


def estimate_cost(
    checkpoint: Checkpoint,
    matrices: Sequence[Matrix],
    crew: Crew,
    ranks: Mapping[str, int] | None = None,
    draws: int = 0,
    in_data: bool = False,
) -> Estimate:
    """What it would take to scan and to reduce `matrices`, to `ranks` where they are known, else to the most expensive.

    draws: permutations that the scan measures. in_data: it measures in the metric of the data, too.

    Copies to a device overlap with its arithmetic only in part, so they are added to it. Tasks of the engine ray are
    taken to run on this machine's workers alone.
    """
    probe, basis = constants(crew)
    host = crew.devices[0].host_blas
    pool = len(crew.pool(matrices)) if host else len(crew.devices)
    factorised = [m for m in matrices if m.is_matrix]
    shapes = [(m, m.shape[0], m.shape[1]) for m in factorised]
    size = {m.name: m.parameters * BITS[m.dtype] / 8 for m in factorised}
    there = {name: b / probe.to_device if probe.to_device else 0.0 for name, b in size.items()}
    back = {name: b / probe.to_host if probe.to_host else 0.0 for name, b in size.items()}
    values = [probe.values_seconds(m, n) + there[x.name] for x, m, n in shapes]
    nulls = [draws * probe.null_seconds(m, n) + (probe.data_seconds(m, n) if in_data else 0.0) for _, m, n in shapes]
    cuts = [
        probe.truncate_seconds(m, n, (ranks or {}).get(x.name)) + there[x.name] + back[x.name] for x, m, n in shapes
    ]
    disk = sum(s.size for s in checkpoint.shards)
    reading = sum(size.values()) / probe.disk_read if probe.disk_read else 0.0
    copying = disk / probe.disk_read + disk / probe.disk_write if probe.disk_read and probe.disk_write else 0.0
    return Estimate(
        len(matrices),
        max(_spread(map(sum, zip(values, nulls, strict=True)), pool), reading),
        max(_spread(cuts, pool), copying),
        max(_spread(map(sum, zip(cuts, nulls, strict=True)), pool), copying),  # the values come with the vectors
        peak_bytes(matrices, crew) + in_data * max((8 * _metric_entries(m, n, pool) for _, m, n in shapes), default=0),
        disk,
        basis,
    )


def constants(crew: Crew) -> tuple[Probe, str]:
    """The probe to estimate by, and where it comes from."""
    probe = None
    first = crew.devices[0]
    for label in dict.fromkeys((first.label, first.kind)):  # "cuda:0 float64", and what was probed as "cuda"
        try:
            probe = probe or Probe.load(label)
        except RecordError:
            pass  # damaged: as if it were missing, since an estimate is no reason to fail
    if probe is not None:
        return probe, f"by the probe of {probe.measured}"
    other = ELSEWHERE.get(first.kind, _CORE_32)
    return other, f"by {other.name}; `laser devices --probe` measures yours"


def _metric_entries(m: int, n: int, pool: int) -> int:
    """What the metric of the data holds in float64: each worker W and W C^(1/2), C or W C W^T with its root and
    eigenvectors; and all together the moments and roots that are kept for the next."""
    inputs = min(n, 4096) ** 2
    return pool * (2 * m * n + 4 * inputs) + 2 * SITES_KEPT * inputs


def _spread(seconds: Iterable[float], pool: int) -> float:
    """Seconds of a queue, most expensive first, that `pool` workers take from."""
    every = list(seconds)
    return max(sum(every) / pool, max(every, default=0.0))


@dataclass(frozen=True)
class Measuring:
    """What a search or a leaderboard takes at the most, as an estimate.

    candidates, trials: of a search, and edits that it measures
    texts, tokens: windows or prompts that the model answers, and tokens in them
    layer_forwards: of a search, decoder layers times windows that are run
    peak_bytes: besides the libraries
    stream: whether layers are read again at each pass
    layers_in_memory: of a search, how many stay there
    variants_at_a_time: of a search that reads layers, how many can be measured in one walk
    placed: what of it stays in memory, and why
    """

    what: str
    on: str  # which texts
    candidates: int
    trials: int
    texts: int
    tokens: int
    layer_forwards: int
    seconds: float
    peak_bytes: int
    stream: bool
    basis: str
    dtype: str
    layers_in_memory: int
    variants_at_a_time: int
    placed: str


def cut_seconds(matrices: Sequence[Matrix], device: Device) -> float:
    """Seconds to truncate each of them once on one device, one after the other."""
    probe, _ = constants(Crew((device,)))
    found = 0.0
    for m in (m for m in matrices if m.is_matrix):
        moved = m.parameters * BITS[m.dtype] / 8
        found += probe.truncate_seconds(m.shape[0], m.shape[1], None)
        found += sum(moved / speed for speed in (probe.to_device, probe.to_host) if speed)
    return found


def forward_seconds(device: Device, products: float, read: float = 0.0) -> tuple[float, str]:
    """Seconds of so many products of a weight and a token's value, and by whose constants.

    Two operations each, in float32. read: bytes that are streamed meanwhile. Attention's own products are left out:
    for windows much shorter than the hidden size is wide they are few.
    """
    probe, basis = constants(Crew((replace(device, dtype=torch.float32),)))
    cores = torch.get_num_threads() / probe.threads if device.host_blas else 1.0
    reading = read / probe.disk_read if probe.disk_read else 0.0
    return 2 * products / (probe.product * cores) + reading, basis


# --- what it took -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Meter:
    """Seconds and memory since it was made."""

    started: float = field(default_factory=time.perf_counter)
    resident: int | None = field(default_factory=resident_bytes)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def peak(self) -> int | None:
        """How far resident memory rose at the most, in bytes; None where the system does not tell."""
        high = resident_bytes(peak=True)
        return None if high is None or self.resident is None else max(high - self.resident, 0)

    def against(self, seconds: float, estimated: Estimate) -> str:
        """One line: estimated and real."""
        peak = self.peak
        memory = "" if peak is None else f" and {peak / 1e9:.2f} GB"
        return (
            f"estimated {seconds:.1f} s and {estimated.peak_bytes / 1e9:.2f} GB ({estimated.basis}), "
            f"took {self.seconds:.1f} s{memory}"
        )
