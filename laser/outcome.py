"""laser.json: what was done to each matrix, as measured when it was written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from laser.checkpoint.at_rest import check_names
from laser.checkpoint.reader import OUTCOME
from laser.errors import RecordError
from laser.plan import VERSION as PLAN_VERSION
from laser.plan import Plan, PlanLine
from laser.reasons import Kind, Why
from laser.records import read_json, require_finite, require_keys, require_sealed, value_of
from laser.spectral.certificate import Truncation
from laser.spectral.rules import signal_to_noise

KIND, VERSION = "outcome", 2
CLOSE = 1e-4  # of a planned figure: a scan in float32 is nearer, and one rank of 4096 is further
AGAIN = "it is damaged: run laser reduce again"
MEASURED: dict[str, Any] = {
    "rank": int,
    "full_rank": int,
    "snr": float | None,
    "over_threshold": int | None,
    "energy_kept": float,
    "residual": float,
    "method": str,
    "note": str | None,
}
MORE: dict[str, Any] = dict.fromkeys(("tolerance", "orthogonality", "fresh_output_error"), float)  # may be wanting
LEAST = ("rank", "full_rank", "snr", "over_threshold", "energy_kept", "residual", "tolerance", "orthogonality")
HEADER = ("kind", "version", "files", "check")  # files: sha256 by name, see checkpoint/at_rest.py
LATER = ("snr", "over_threshold", "note")  # not yet in outcomes of laser 0.1


@dataclass(frozen=True)
class Outcome:
    """laser.json: what was done to each matrix, measured. Deterministic: no times, no paths.

    matrices: matrix name -> rank, full_rank, snr, over_threshold (values over the plan's threshold), energy_kept,
        residual, tolerance, orthogonality, method, note: all as measured when it was cut
    shards: file name -> sha256, or None where the file is a byte-for-byte copy of the source's
    """

    plan: Plan
    matrices: Mapping[str, Mapping[str, Any]]
    shards: Mapping[str, str | None]
    run: Mapping[str, Any]
    left_out: tuple[str, ...]  # files of the source that were not copied: other copies of weights, adapters, states

    @staticmethod
    def load(out: Path, *, as_written: bool = True) -> Outcome:
        """The outcome in a directory that `reduce` wrote. Raises RecordError where there is none, or a damaged one.

        as_written: whether its checksum has to be right; `verify` tells of that beside all else that it finds.
        """
        path = out / OUTCOME
        document = read_json(path, KIND, VERSION)
        outcome = Outcome.from_document(document, path)
        if as_written:
            require_sealed(document, path, KIND)
        return outcome

    @staticmethod
    def from_document(document: Mapping[str, Any], path: Path) -> Outcome:
        """Raises RecordError for a document that is damaged or of another version."""
        require_keys(document, ("plan", "matrices", "shards", "run", "left_out"), HEADER, str(path), AGAIN)
        records = value_of(Mapping[str, dict], document["matrices"], "matrices", str(path), AGAIN)
        check_measured(records, f"{path}: matrices", AGAIN)
        require_finite(document["run"], f"{path}: run", AGAIN)
        check_names(document, str(path), AGAIN)
        shards = document["shards"]
        run = value_of(Mapping[str, Any], document["run"], "run", str(path), AGAIN)
        left_out = value_of(tuple[str, ...], document["left_out"], "left_out", str(path), AGAIN)
        return Outcome(Plan.from_document(document["plan"], path), records, shards, run, left_out)

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


def check_measured(records: Mapping[str, Any], where: str, remedy: str = "start afresh with --force") -> None:
    """Raises RecordError, which begins with `where`, for an entry that `record_of` does not make."""
    for name, record in records.items():
        here = f"{where} {name}"
        value_of(dict, record, "the entry", here, remedy)
        require_keys(record, [key for key in MEASURED if key not in LATER], (*LATER, *MORE), here, remedy)
        for key, found in record.items():
            value_of((MEASURED | MORE)[key], found, key, here, remedy)
        if negative := [key for key in LEAST if (record.get(key) or 0) < 0]:
            raise RecordError(f"{here}: {negative[0]} is {record[negative[0]]}, expected 0 or more; {remedy}")
        if record["rank"] > record["full_rank"] or record["energy_kept"] > 1 + CLOSE:
            told = f"rank {record['rank']} of {record['full_rank']}, energy_kept {record['energy_kept']}"
            raise RecordError(f"{here}: {told}, expected no more than the whole matrix; {remedy}")


def record_of(line: PlanLine, result: Truncation) -> dict[str, Any]:
    """A matrix's entry in laser.json: what was measured, whatever the line says."""
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
    for told, found in ((line.energy_kept, record["energy_kept"]), (line.snr, record["snr"])):
        same = same and (told is None) == (found is None) and (told is None or abs(told - found) <= CLOSE * (1 + found))
    if held and same:
        return line
    found = {"rank": record["rank"], "energy_kept": record["energy_kept"], "snr": record["snr"]}
    why = Why(Kind.MEASURED, f"rank {record['rank']} by its line and not by the rule; figures as measured")
    return replace(line, threshold=line.threshold if held else None, why=why, **found)


def plan_as_measured(plan: Plan, records: Mapping[str, Mapping[str, Any]]) -> Plan:
    """The plan as laser.json has it, from the records by matrix."""
    lines = (as_measured(x, records[x.name]) if x.name in records else x for x in plan.lines)
    return replace(plan, lines=tuple(lines))


def describe_by(plan: Plan) -> Callable[[dict[str, dict[str, Any]], dict[str, str | None]], dict[str, Any]]:
    """laser.json from what was measured."""

    def describe(records: dict[str, dict[str, Any]], shards: dict[str, str | None]) -> dict[str, Any]:
        check_measured(records, "the journal's entry of")
        done = plan_as_measured(plan, records)
        document = {"kind": KIND, "version": VERSION, "plan": {"kind": "plan", "version": PLAN_VERSION} | asdict(done)}
        return document | {"matrices": records, "shards": shards}

    return describe
