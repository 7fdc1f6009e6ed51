"""Spectra in the metric of the data: what scan measures beside the plain values where it is given moments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from laser.checkpoint.records import decode, require_keys, value_of
from laser.errors import RecordError, UsageError
from laser.reasons import Kind, Why
from laser.spectral.rules import energy_share, signal_to_noise

if TYPE_CHECKING:
    from laser.measured import Measured
    from laser.moments import Moments
    from laser.plan import PlanLine
    from laser.spectra import Spectra

DATA = "laser.data."  # before a tensor's name in the spectra file

Vectors = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Calibration:
    """What was calibrated on which text: told by every record that rests on it."""

    identity: str  # sha256 over the moments and all of the below
    text: str
    text_sha256: str
    windows_sha256: str
    window: int
    windows: int
    tokens: int  # inputs of the whole model; an expert sees those that are routed to it
    dtype: str
    shrink: bool
    diagonal: bool

    @staticmethod
    def decoded(found: Any, where: str, remedy: str) -> Calibration:
        """From a record's JSON. Raises RecordError, which begins with `where` and ends with `remedy`."""
        calibration = decode(Calibration, found, where, remedy)
        for key in ("window", "windows", "tokens"):
            if getattr(calibration, key) < 1:
                raise RecordError(f"{where}: {key} is {getattr(calibration, key)}, expected 1 or more; {remedy}")
        return calibration


@dataclass(frozen=True)
class InData:
    """By name: how many inputs a matrix met, for those that were calibrated; singular values (p,) of W C^(1/2),
    descending; and why there are none. `calibration` says on which text (moments.Calibration)."""

    calibration: Mapping[str, Any]
    seen: Mapping[str, int]
    values: Vectors = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)

    def vectors(self) -> dict[str, NDArray[np.float64]]:
        """Everything under the names that the file has."""
        return {DATA + n: v for n, v in self.values.items()}

    def header(self) -> dict[str, Any]:
        return {"calibration": dict(self.calibration), "seen": dict(self.seen), "failed": dict(self.failed)}

    def wrong(self, sides: Mapping[str, int]) -> str | None:
        """What in it contradicts the rest of a file whose matrices have these smaller sides."""
        for name in (*self.values, *self.failed):
            if name not in self.seen:
                return f"{name} is measured in the metric of the data, and its data do not say how many inputs it met"
        for name, tokens in self.seen.items():
            if not sides.get(name) or tokens < 0:
                return f"{name} met {tokens} inputs, expected 0 or more of a matrix of it"
        return None

    @staticmethod
    def of(moments: Moments | None, names: Iterable[str], found: Mapping[str, Measured]) -> InData | None:
        """What was measured of `names`, in their order; a matrix without tokens has no values. None without moments."""
        if moments is None:
            return None
        seen = {name: moments.sites[name].tokens for name in names if name in moments.sites}
        values = {n: found[n].data for n in seen if len(found[n].data)}
        failed = {n: why for n in seen if (why := found[n].data_failed)}
        return InData(asdict(moments.calibration), seen, values, failed)

    @staticmethod
    def from_file(header: Any, vectors: Vectors, where: str, remedy: str) -> InData | None:
        """What `header` and `vectors` wrote, taken from all of a file's vectors; None where there is none.

        Raises RecordError, which begins with `where` and ends with `remedy`.
        """
        if header is None:
            return None
        header = value_of(Mapping[str, Any], header, "data", where, remedy)
        require_keys(header, ("calibration", "seen"), ("failed",), where, remedy)
        kinds = {"calibration": Mapping[str, Any], "seen": Mapping[str, int], "failed": Mapping[str, str]}
        for key in header:
            value_of(kinds[key], header[key], key, where, remedy)
        Calibration.decoded(header["calibration"], f"{where}: its calibration", remedy)
        values = {n.removeprefix(DATA): v for n, v in vectors.items() if n.startswith(DATA)}
        return InData(header["calibration"], header["seen"], values, header.get("failed", {}))


def in_data_metric(spectra: Spectra, fewest: int | None = None) -> Spectra:
    """`spectra` with the data's values in the place of the plain ones, for planning.

    A matrix that met fewer than `fewest` tokens (default: than it has dimensions p) has no values, and the reason why.
    Raises UsageError where no moments were scanned.
    """
    data = spectra.data
    if data is None:
        raise UsageError("these spectra know no data; try laser calibrate, then laser scan --moments FILE")
    skipped, values = dict(spectra.skipped), {}
    for matrix in spectra.matrices:
        name, p = matrix.name, min(matrix.shape, default=0)
        if name in data.values and data.seen[name] >= (p if fewest is None else fewest):
            values[name] = data.values[name]
        elif name in data.failed:
            skipped[name] = Why(Kind.FAILED, f"skipped: {data.failed[name]}")
        elif name in data.seen:
            skipped[name] = Why(Kind.UNSEEN, f"not seen enough: {met_by(data.seen[name], p)}")
        elif name in spectra.values:
            skipped[name] = Why(Kind.NOT_CALIBRATED, "not calibrated")
    return replace(spectra, values=values, nulls={}, skipped=skipped, kurtosis={})


def met_by(tokens: int, p: int) -> str:
    """How many inputs a matrix met, and how many it should have met at the least."""
    return f"met {tokens} tokens of the calibration, and it has {p} dimensions"


def line_in_data(line: PlanLine, s: NDArray[np.float64], rank: int, tokens: int) -> PlanLine:
    """A plan's line for a matrix of data values `s` (p,) that a rule cuts at `rank`.

    No law of noise holds in the data's metric, so there is no fit to tell of. A rank over the number of directions that
    show in the data becomes that number: nothing else makes a difference to these inputs.
    """
    shown = int(np.count_nonzero(s))
    rank = min(rank, shown)
    line = replace(line, rank=rank, metric="data", tokens=tokens)
    if rank == len(s):
        return replace(line, why=Why(Kind.ALL_KEPT, f"the rule keeps all {rank} values"))
    directions = f", which show {shown} directions" if rank == shown else ""
    why = line.why.also(f"in the metric of {tokens} tokens{directions}")
    snr, energy = signal_to_noise(s, rank), energy_share(s, np.arange(len(s)) < rank)
    return replace(line, action="reduce", snr=snr, energy_kept=energy, why=why)
