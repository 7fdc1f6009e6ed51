"""plan: from spectra to one line for every tensor: reduce to rank r, keep, or skipped, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from laser.checkpoint.files import read_json, to_json, write_atomically
from laser.errors import RecordError, UsageError
from laser.selection import Selection
from laser.spectra import Source, Spectra
from laser.spectral.rules import apply_rule, parse_rule, signal_to_noise

KIND, VERSION = "plan", 1
ACTIONS = ("reduce", "keep", "skip")


@dataclass(frozen=True)
class PlanLine:
    """What happens to one tensor, and why. Numbers are None where no rule was asked or none applies."""

    name: str
    role: str
    layer: int | None
    expert: int | None
    action: str  # reduce, keep or skip
    reason: str
    rank: int | None = None  # of the result
    full_rank: int | None = None  # p
    threshold: float | None = None  # in the unit of the singular values
    sigma: float | None = None  # in the unit of the weights
    snr: float | None = None  # sum(s > t) / sum(s <= t)
    energy_kept: float | None = None  # predicted share of the squared singular values


@dataclass(frozen=True)
class Plan:
    source: Source
    rule: str
    selection: Mapping[str, Any]
    lines: tuple[PlanLine, ...]

    @property
    def reductions(self) -> dict[str, PlanLine]:
        return {line.name: line for line in self.lines if line.action == "reduce"}

    def to_json(self) -> bytes:
        return to_json({"kind": KIND, "version": VERSION} | asdict(self))

    def save(self, path: Path) -> None:
        write_atomically(path, self.to_json())

    @staticmethod
    def load(path: Path) -> Plan:
        """Raises RecordError for a plan that is missing, damaged, of another version, or that contradicts itself."""
        return Plan.from_document(read_json(path, KIND, VERSION), path)

    @staticmethod
    def from_document(document: Mapping[str, Any], path: Path) -> Plan:
        try:
            lines = tuple(PlanLine(**line) for line in document["lines"])
            plan = Plan(Source(**document["source"]), document["rule"], document["selection"], lines)
        except (KeyError, TypeError) as error:
            raise RecordError(f"{path} is not a whole plan ({error}); make it again with `laser plan`") from error
        for line in lines:
            whole = type(line.rank) is int and type(line.full_rank) is int and 0 <= line.rank < line.full_rank
            if line.action not in ACTIONS or (line.action == "reduce" and not whole):
                raise RecordError(
                    f"{path}: {line.name} has action {line.action!r} and rank {line.rank} of {line.full_rank}, "
                    "expected one of reduce, keep, skip and a rank under the full one; mend the line or plan again"
                )
        return plan


def make_plan(
    spectra: Spectra, rule: str, selection: Selection | None = None, *, lowest_snr: int | None = None
) -> Plan:
    """Apply `rule` (`NAME[:ARGUMENT]`, see RULES) to every scanned matrix that the selection names.

    `lowest_snr` K reduces only the K matrices with the lowest signal-to-noise ratio (LaserRMT takes 15); matrices
    without one, because nothing lies at or below the threshold, are kept. A rule that keeps every value keeps the
    matrix. Raises UsageError for an unknown rule or a selection that matches nothing that was scanned.
    """
    parse_rule(rule)
    selection = selection or Selection()
    selection.check(spectra.matrices)
    if lowest_snr is not None and lowest_snr < 1:
        raise UsageError(f"--lowest-snr {lowest_snr} selects nothing; try 15, as LaserRMT does")
    lines = [_line(spectra, i, rule, selection) for i in range(len(spectra.matrices))]
    if not any(line.rank is not None for line in lines):
        raise UsageError("no selected matrix was scanned; try the layers and roles of the scan, or scan again")
    if lowest_snr is not None:
        lines = _keep_all_but_lowest(lines, lowest_snr)
    described = selection.describe() | {"lowest_snr": lowest_snr}
    return Plan(spectra.source, rule, described, tuple(lines))


def empty_plan(spectra: Spectra) -> Plan:
    """The plan that reduces nothing: its output is the source, byte for byte."""
    lines = tuple(PlanLine(m.name, m.role, m.layer, m.expert, "keep", "empty plan") for m in spectra.matrices)
    return Plan(spectra.source, "none", Selection().describe() | {"lowest_snr": None}, lines)


def _line(spectra: Spectra, index: int, rule: str, selection: Selection) -> PlanLine:
    matrix = spectra.matrices[index]
    line = PlanLine(matrix.name, matrix.role, matrix.layer, matrix.expert, "keep", "")
    if why := selection.why_not(matrix):
        return replace(line, reason=why)
    if matrix.name not in spectra.values:
        why = spectra.skipped.get(matrix.name, "not scanned")
        return replace(line, action="skip" if why.startswith("skipped") else "keep", reason=why)
    s = spectra.values[matrix.name]
    m, n = matrix.shape
    cut = apply_rule(rule, s, (m, n))
    total = float(np.sum(s**2))
    energy = float(np.sum(s[: cut.rank] ** 2)) / total if total else 1.0
    reduce = cut.rank < len(s) and total > 0
    reason = cut.reason if reduce or not total else f"the rule keeps all {len(s)} values"
    return replace(
        line,
        action="reduce" if reduce else "keep",
        reason=reason,
        rank=cut.rank,
        full_rank=len(s),
        threshold=cut.threshold,
        sigma=cut.sigma,
        snr=signal_to_noise(s, cut.rank),
        energy_kept=energy,
    )


def _keep_all_but_lowest(lines: list[PlanLine], count: int) -> list[PlanLine]:
    ranked = sorted(
        (line for line in lines if line.action == "reduce" and line.snr is not None),
        key=lambda line: line.snr or 0.0,
    )
    lowest = {line.name: place for place, line in enumerate(ranked[:count], 1)}
    return [
        replace(line, reason=f"{line.reason}; SNR {line.snr:.4g} is number {lowest[line.name]} from below")
        if line.name in lowest
        else replace(line, action="keep", reason=f"SNR {line.snr:.4g} is not among the {count} lowest")
        if line.action == "reduce"
        else line
        for line in lines
    ]
