"""What this machine can do: the constants behind --dry-run. `laser devices --probe` measures and keeps them.

One JSON document in the user's cache directory holds a Probe per device label ("cpu float64", "cuda:0 float64"). The
cost model is that of a Gram matrix: products grow as m * n * p and the eigenproblem as p^3, and a rate measured at one
p serves its neighbours. Times are of one matrix alone on the device.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from laser.errors import RecordError

KIND, VERSION = "devices", 1


@dataclass(frozen=True)
class Probe:
    """Constants of one device; None where it was not measured.

    device: the label of devices.Device; name: the chip, in words; torch: its version; threads: of BLAS on the host
    product: floating-point operations a second of A^T A, 2 m n p counted though symmetry may save half of them
    projection: the same of the two products of a truncation; None: as `product`
    eigenvalues, eigenvectors, projector: p -> seconds for one symmetric matrix of side p
    to_device, to_host: bytes a second of a copy; None on the host, where there is no copy
    disk_read, disk_write: bytes a second, the read from a cold cache
    exact_products: whether a product in float32 carries all of its 24 bits
    null: entries of a matrix -> seconds for one permutation of it and its largest singular value
    routes: "values" or "vectors" -> a route of eigen.py -> p -> seconds for one matrix, with `busy` workers at work
    """

    device: str
    name: str
    torch: str
    threads: int
    product: float
    eigenvalues: Mapping[int, float]
    eigenvectors: Mapping[int, float]
    projector: Mapping[int, float] = field(default_factory=dict)
    to_device: float | None = None
    to_host: float | None = None
    disk_read: float | None = None
    disk_write: float | None = None
    exact_products: bool = True
    projection: float | None = None
    null: Mapping[int, float] = field(default_factory=dict)
    measured: str = ""  # the day, as 2026-01-31
    routes: Mapping[str, Mapping[str, Mapping[int, float]]] = field(default_factory=dict)
    busy: int = 1

    def values_seconds(self, m: int, n: int) -> float:
        """Estimated seconds of the singular values of a matrix (m, n) that lies on the device."""
        return 2 * m * n * min(m, n) / self.product + interpolate(self.eigenvalues, min(m, n))

    def data_seconds(self, m: int, n: int) -> float:
        """Estimated seconds of the singular values of (m, n) in the metric of a moment (n, n)."""
        root = interpolate(self.eigenvectors, n) if m > n else 0.0
        return root + 2 * m * n * n / self.product + self.values_seconds(m, n)

    def null_seconds(self, m: int, n: int) -> float:
        """Estimated seconds of one permutation."""
        return interpolate(self.null, m * n, beyond=1)

    def truncate_seconds(self, m: int, n: int, rank: int | None = None) -> float:
        """Estimated seconds of a truncation of (m, n) to `rank`, by default the most expensive one, p / 2.

        Two products with the smaller of the two complementary bases after the Gram matrix and its eigenvectors.
        """
        p = min(m, n)
        side = p // 2 if rank is None else min(rank, p - rank)
        products = 2 * m * n * p / self.product + 4 * m * n * side / (self.projection or self.product)
        return products + interpolate(self.eigenvectors, p)

    def save(self, path: Path | None = None) -> Path:
        """Keep it beside the probes of other devices; returns the file. Default path: `cache_path()`."""
        path = path or cache_path()
        try:
            there = _read_probe(path)
        except RecordError:
            there = {}  # measured again in a minute: a damaged file is no reason to fail
        document = {"kind": KIND, "version": VERSION, "probes": there | {self.device: asdict(self)}}
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_probes(path)
        aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            aside.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        return path

    def _require(self) -> None:
        """Raises TypeError or ValueError for what is no measurement: rates are finite and above 0, times may be 0."""
        routes = (table for tables in self.routes.values() for table in tables.values())
        tables = (self.eigenvalues, self.eigenvectors, self.projector, self.null, *routes)
        rates = (self.product, self.to_device, self.to_host, self.disk_read, self.disk_write, self.projection)
        times = [seconds for table in tables for seconds in table.values()]
        numbers = [side for table in tables for side in table] + [
            self.threads,
            self.busy,
            *(x for x in rates if x is not None),
        ]
        if any(type(x) not in (int, float) for x in numbers):
            raise TypeError("a measurement is no number")
        if not all(0 < x < math.inf for x in numbers) or not all(0 <= x < math.inf for x in times):
            raise ValueError("a measurement is below 0, or has no end")
        if not all(isinstance(x, str) for x in (self.device, self.name, self.torch, self.measured)):
            raise TypeError("a name is no text")
        if type(self.exact_products) is not bool:
            raise TypeError("exact_products is neither true nor false")

    @staticmethod
    def load(device: str, path: Path | None = None) -> Probe | None:
        """The probe of the device with this label, or None if none was measured.

        Raises RecordError for a file that is damaged or of another version.
        """
        path = path or cache_path()
        probes = _read_probe(path)
        if device not in probes:
            return None
        try:
            found = dict(probes[device])
            for table in ("eigenvalues", "eigenvectors", "projector", "null"):
                found[table] = _by_side(found.get(table, {}))
            found["routes"] = {
                what: {route: _by_side(table) for route, table in tables.items()}
                for what, tables in found.get("routes", {}).items()
            }
            probe = Probe(**found)
            probe._require()
            return probe
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise RecordError(f"{path}: the probe of {device} is not whole ({error}); {_AGAIN}") from error


def _by_side(table: Mapping[str, float]) -> dict[int, float]:
    """A table of a Probe as it was before JSON, whose keys are texts."""
    return {int(p): float(seconds) for p, seconds in table.items()}


_AGAIN = "try `laser devices --probe`"


def cache_path() -> Path:
    """$XDG_CACHE_HOME/laser/devices.json, by default under ~/.cache (the XDG base directory specification)."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    try:
        root = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"  # a relative one is to be ignored
    except RuntimeError:  # nobody's home: nothing is kept
        root = Path(os.devnull)
    return root / "laser" / "devices.json"


def _sweep_probes(path: Path) -> None:
    """Remove what processes that were killed while they wrote `path` left beside it."""
    for left in path.parent.glob(f"{path.name}.*.partial"):
        number = left.name.removeprefix(f"{path.name}.").removesuffix(".partial")
        if number.isdecimal():
            try:
                os.kill(int(number), 0)
            except ProcessLookupError:
                left.unlink(missing_ok=True)
            except (OSError, OverflowError):  # it lives, and is another's; or no process has such a number
                continue


def _read_probe(path: Path) -> dict[str, Any]:
    try:
        if not path.exists():
            return {}
        if not path.is_file():  # a FIFO would be waited for
            raise RecordError(f"{path} is no regular file; remove it, and {_AGAIN}")
        document = json.loads(path.read_text())
        if (document["kind"], document["version"]) != (KIND, VERSION):
            raise RecordError(
                f"{path}: found {document['kind']} version {document['version']}, expected {KIND} {VERSION}; {_AGAIN}"
            )
        return dict(document["probes"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecordError(f"{path} is not a readable record of devices ({error}); {_AGAIN}") from error


def interpolate(table: Mapping[int, float], p: int, beyond: int = 3) -> float:
    """Seconds at side `p` from seconds at a few sides: a power law between neighbours, p^`beyond` after the last one.

    Below the first one it falls as that power as well, which flatters small matrices whose cost is that of the call.
    """
    if not table:
        return 0.0
    sides = sorted(table)
    if p <= sides[0] or p >= sides[-1] or p in table:
        near = p if p in table else sides[0] if p < sides[0] else sides[-1]
        return table[near] * (p / near) ** beyond
    low = max(side for side in sides if side < p)
    high = min(side for side in sides if side > p)
    if not table[low] or not table[high]:
        return table[high]
    power = math.log(table[high] / table[low]) / math.log(high / low)
    return table[low] * (p / low) ** power
