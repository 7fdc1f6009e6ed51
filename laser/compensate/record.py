"""laser.json of an adapter that compensates: what was corrected, by how much, and what it is worth on another text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from laser.checkpoint.source import Source
from laser.evaluation.verdict import Direction
from laser.moments import Calibration
from laser.records import SPARSE, Record, under


@dataclass(frozen=True)
class Corrected:
    """One place. Errors are E||(W - Q) x||^2 relative to E||W x||^2, x the inputs of the calibration.

    before: of the copy; predicted: with the adapter, by the spectrum; after: with the factors as stored
    tokens: inputs that it met; shrunk: fewer than it has dimensions, so their moments were shrunk (Ledoit-Wolf)
    residual, orthogonality, tolerance: of the factorisation, see Correction
    """

    name: str
    shape: tuple[int, int]
    rank: int
    tokens: int
    before: float
    predicted: float
    after: float
    residual: float
    orthogonality: float
    tolerance: float
    shrunk: bool = field(default=False, metadata=SPARSE)

    def wrong(self) -> str | None:
        numbers = ("rank", "tokens", "before", "predicted", "after", "residual", "orthogonality", "tolerance")
        if low := under(self, 0, *numbers):
            return low
        return f"rank {self.rank} of {list(self.shape)}" if self.rank > min(self.shape) else None


@dataclass(frozen=True)
class ErrorsMeasured:
    """A model's loss on the second text, nats per token, and its difference from the original's, paired."""

    model: str
    bytes: int
    nll: float
    standard_error: float | None
    lost: float
    lost_error: float | None


@dataclass(frozen=True)
class HeldOut:
    """What the adapter is worth on a text that the calibration never saw.

    gain, gain_error: loss with the adapter minus the copy's, paired over the windows. direction: what that says
    """

    text: str
    text_sha256: str
    windows_sha256: str
    window: int
    windows: int
    tokens: int
    dtype: str
    original: ErrorsMeasured
    copy: ErrorsMeasured
    adapted: ErrorsMeasured
    gain: float
    gain_error: float | None
    direction: Direction

    @property
    def survives(self) -> bool:
        return self.direction is Direction.BETTER


@dataclass(frozen=True)
class CompensationRecord(
    Record, kind="compensation", version=1, made_by="laser compensate ORIGINAL COPY --moments M -o ADAPTER"
):
    """What ADAPTER/laser.json says.

    calibration: None where the correction goes by the plain norm. asked: rank, or bits per weight
    entries: the corrected places; left: matrix -> why it got no correction
    bits: what the adapter stores per weight of the corrected places. run: what a run is told from others by
    parts: files of the adapter, by sha256
    by_gradients: whether the budget went by the gradients at outputs, not by each output's own size
    """

    original: Source
    copy: Source
    calibration: Calibration | None
    asked: Mapping[str, float]
    bits: float
    entries: tuple[Corrected, ...]
    left: Mapping[str, str]
    held_out: HeldOut | None
    run: Mapping[str, Any]
    parts: Mapping[str, str]
    by_gradients: bool = field(default=False, metadata=SPARSE)

    def wrong(self) -> str | None:
        names = [entry.name for entry in self.entries]
        return "a place is in it twice" if len(set(names)) < len(names) else None
