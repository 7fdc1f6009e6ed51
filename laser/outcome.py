"""laser.json: what was done to each matrix, as measured when it was written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from laser.checkpoint.at_rest import wrong_names
from laser.checkpoint.reader import OUTCOME
from laser.errors import RecordError
from laser.notebook import FrameRows, Shown, drawn
from laser.plan import Plan, PlanLine
from laser.reasons import Kind, Why
from laser.records import Misfit, Record, decode, fields_of, under
from laser.spectral.certificate import Truncation
from laser.spectral.rules import signal_to_noise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLOSE = 1e-4  # of a planned figure: a scan in float32 is nearer, and one rank of 4096 is further
NOT_NEGATIVE = ("rank", "full_rank", "snr", "over_threshold", "energy_kept", "residual", "tolerance", "orthogonality")


class _MayBeMissing(TypedDict, total=False):
    """Of an entry: what laser 0.1 did not write yet, or not every method measures."""

    snr: float | None
    over_threshold: int | None
    note: str | None
    tolerance: float
    orthogonality: float
    fresh_output_error: float


class Entry(_MayBeMissing):
    """What was measured of one matrix when it was cut, see `Outcome`."""

    rank: int | None  # None where a tensor was scaled that is no matrix
    full_rank: int | None
    energy_kept: float
    residual: float
    method: str


@dataclass(frozen=True, repr=False)
class Outcome(
    Shown,
    Record,
    kind="outcome",
    version=2,
    made_by="laser reduce MODEL PLAN -o OUT",
    mend="it is damaged: run laser reduce again",
    missing="name a directory that laser reduce or laser run has finished",
    beside={"files": Mapping[str, str]},  # sha256 by name, see checkpoint/at_rest.py
):
    """laser.json: what was done to each matrix, measured. Deterministic: no times, no paths.

    matrices: matrix name -> rank, full_rank, snr, over_threshold (values over the plan's threshold), energy_kept,
        residual, tolerance, orthogonality, method, note: all as measured when it was cut
    shards: file name -> sha256, or None where the file is a byte-for-byte copy of the source's
    """

    plan: Plan
    matrices: Mapping[str, Entry]
    shards: Mapping[str, str | None]
    run: Mapping[str, Any]
    left_out: tuple[str, ...]  # files of the source that were not copied: other copies of weights, adapters, states

    def headline(self) -> str:
        made = f"{len(self.matrices)} matrices reduced, {len(self.shards)} files"
        return f"Outcome of {self.plan.source.name} by {self.plan.rule}: {made}"

    def frame_rows(self) -> FrameRows:
        return [{"matrix": name, **entry} for name, entry in self.matrices.items()]

    def glance(self) -> tuple[FrameRows, Sequence[float]]:
        """A row for each matrix, and the energy that each kept."""
        keys = ("rank", "full_rank", "energy_kept", "residual")
        rows = [{"matrix": name} | {key: entry[key] for key in keys} for name, entry in self.matrices.items()]
        return rows, [entry["energy_kept"] for entry in self.matrices.values()]

    def plot(self, *, experts: bool = True, ax: Axes | None = None) -> Axes:
        """Draw how much of the energy of each matrix is left, as measured, layer by role; on `ax` if there is one."""
        return drawn("plot_outcome", self, experts=experts, ax=ax)

    @classmethod
    def load(cls, path: str | Path, *, as_written: bool = True) -> Outcome:
        """The outcome in the directory `path`, which `reduce` wrote. Raises RecordError as Record.load.

        as_written: whether its checksum has to be right; `verify` tells of that beside all else that it finds.
        """
        return super().load(Path(path) / OUTCOME, as_written=as_written)

    @classmethod
    def current(cls, document: dict[str, Any]) -> Outcome:
        outcome = super().current(document)
        if wrong := wrong_names(document.get("files", {}), outcome.shards):
            raise Misfit(wrong, ": ")
        return outcome

    def wrong(self) -> str | None:
        return wrong_entries(self.matrices)

    def unlike_plan(self) -> list[str]:
        """Where what was written is not what the plan's lines say."""
        lines, found = self.plan.reductions, []
        for name in lines.keys() | self.matrices.keys():
            if name not in self.matrices:
                found.append(f"{name}: the plan's line reduces it, but no record says that it was written")
            elif name not in lines:
                found.append(f"{name}: a record says that it was reduced, but no line of the plan does")
            elif self.matrices[name]["rank"] != lines[name].rank:
                ranks = f"found rank {self.matrices[name]['rank']}, expected {lines[name].rank}"
                found.append(f"{name}: {ranks} by the plan's line")
        return sorted(found)


def wrong_entries(entries: Mapping[str, Entry]) -> str | None:
    """How one of these contradicts itself."""
    for name, entry in entries.items():
        if negative := under(entry, 0, *NOT_NEGATIVE):
            return f"matrix {name}: {negative}"
        if (entry["rank"] or 0) > (entry["full_rank"] or 0) or entry["energy_kept"] > 1 + CLOSE:
            message = f"rank {entry['rank']} of {entry['full_rank']}, energy_kept {entry['energy_kept']}"
            return f"matrix {name}: {message}, expected no more than the whole matrix"
    return None


def check_entries(found: Any, where: str) -> None:
    """Raises RecordError, which begins with `where`, for a journal's entries that `entry_of` does not make."""
    remedy = "start afresh with --force"
    if wrong := wrong_entries(decode(Mapping[str, Entry], found, where, remedy)):
        raise RecordError(f"{where}: {wrong}; {remedy}")


def entry_of(line: PlanLine, result: Truncation) -> dict[str, Any]:
    """A matrix's entry in laser.json: what was measured, whatever the line says."""
    if line.scale is not None:
        found = {"rank": line.rank, "full_rank": line.full_rank, "snr": None, "over_threshold": None}
        return found | asdict(result.certificate)
    s, shape = result.singular_values, (result.matrix.shape[0], result.matrix.shape[1])
    rank = int(np.count_nonzero(line.gains.of(s, shape)))  # a shrinker may take more values to 0 than the line says
    over = None if line.threshold is None else int(np.count_nonzero(s > line.threshold))
    found = {"rank": rank, "full_rank": len(s), "snr": signal_to_noise(s, line.gains.above), "over_threshold": over}
    return found | asdict(result.certificate)


def as_measured(line: PlanLine, record: Mapping[str, Any]) -> PlanLine:
    """The line of a matrix that was cut, with what was measured where it had said something else.

    That happens after an edit by hand: the figures of another rank are not left standing.
    """
    record = {"snr": line.snr, "over_threshold": None} | dict(record)  # journals of before had neither
    above, over = line.gains.above, record["over_threshold"]
    held = over is None or over == above or (line.shrink is not None and over > above)
    same = line.rank == record["rank"] and (line.snr is None) == (record["snr"] is None)
    for stated, found in ((line.energy_kept, record["energy_kept"]), (line.snr, record["snr"])):
        same = (
            same
            and (stated is None) == (found is None)
            and (stated is None or abs(stated - found) <= CLOSE * (1 + found))
        )
    if held and same:
        return line
    found = {"rank": record["rank"], "energy_kept": record["energy_kept"], "snr": record["snr"]}
    why = Why(Kind.MEASURED, f"rank {record['rank']} by its line and not by the rule; figures as measured")
    return replace(line, threshold=line.threshold if held else None, why=why, **found)


def plan_as_measured(plan: Plan, records: Mapping[str, Mapping[str, Any]]) -> Plan:
    """The plan as laser.json has it, from the records by matrix."""
    lines = (as_measured(x, records[x.name]) if x.name in records else x for x in plan.lines)
    return replace(plan, lines=tuple(lines))


def describe_by(plan: Plan) -> Callable[[Mapping[str, dict[str, Any]], dict[str, str | None]], dict[str, Any]]:
    """laser.json from what was measured."""

    def describe(records: Mapping[str, dict[str, Any]], shards: dict[str, str | None]) -> dict[str, Any]:
        records = dict(records)
        check_entries(records, "the journal's entries")
        done = plan_as_measured(plan, records)
        stated = Plan.heading() | fields_of(done)
        return Outcome.heading() | {"plan": stated, "matrices": records, "shards": shards}

    return describe
