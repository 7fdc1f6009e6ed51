"""The card's section on edits in the metric of the data: which text, how many tokens each matrix met, what was lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from laser.report.markdown import cell, code, table

if TYPE_CHECKING:
    from laser.outcome import Outcome
    from laser.plan import PlanLine

UNFOLDED = 40


def metric(outcome: Outcome) -> str | None:
    """The section, or None for a plan that knows only plain spectra."""
    plan = outcome.plan
    told = plan.calibration
    if told is None:
        return None
    lines = [line for line in plan.reductions.values() if line.metric == "data"]
    text = [
        "## By what the outputs lose",
        f"{len(lines) or 'None'} of the reduced matrices were cut in the metric of the inputs that they met on "
        f"{cell(str(told.text))} "
        f"(sha256 {code(str(told.text_sha256))}; {told.tokens} tokens in {told.windows} windows of "
        f"{told.window}, {cell(str(told.dtype))}; moments {code(str(told.identity)[:12])}"
        + (", diagonal only" if told.diagonal else "")
        + (", shrunk as by Ledoit and Wolf" if told.shrink else "")
        + "): each is the projection of its outputs of that rank that changes them least, and for these the energy "
        "removed is the share of the outputs' mean square that is lost.",
    ]
    if lines:
        text.append(_table(outcome, lines))
    if fresh := outcome.run.get("fresh"):
        name, digest = cell(str(fresh["text"])), code(str(fresh["text_sha256"]))
        text.append(f"Fresh text: {name} (sha256 {digest}; {fresh['tokens']} tokens in {fresh['windows']} windows).")
    unseen = [line for line in plan.lines if line.unseen and line.action != "reduce"]
    if unseen:
        text.append(f"**Not seen enough, and kept: {len(unseen)} matrices.** Few tokens say little of a matrix.")
        rows = [(code(line.name), cell(line.unseen)) for line in unseen]
        text.append(_folded(table(("matrix", "why"), rows), len(rows), "matrices that were not seen enough"))
    return "\n\n".join(text)


def _table(outcome: Outcome, lines: Sequence[PlanLine]) -> str:
    rows, fresh = [], False
    for line in lines:
        record = outcome.matrices.get(line.name, {})
        lost = 1 - float(record.get("energy_kept", line.energy_kept))
        elsewhere = record.get("fresh_output_error")
        fresh = fresh or elsewhere is not None
        found = "" if elsewhere is None else f"{100 * elsewhere:.2f} %"
        expert = "" if line.expert is None else str(line.expert)
        rows.append((code(line.name), expert, cell(line.tokens), f"{100 * lost:.2f} %", found))
    headings, width = ("matrix", "expert", "tokens met", "outputs lost", "on fresh text"), 5 if fresh else 4
    full = table(headings[:width], [row[:width] for row in rows], right=(2, 3, 4))
    return _folded(full, len(rows), "matrices cut in that metric")


def _folded(full: str, count: int, what: str) -> str:
    if count <= UNFOLDED:
        return full
    return f"<details>\n<summary>All {count} {what}</summary>\n\n{full}\n\n</details>"
