"""The card's sections on the edits: what was reduced and by how much, and how a search chose it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from laser.reasons import Kind
from laser.report.markdown import cell, code, table

if TYPE_CHECKING:
    from laser.outcome import Outcome
    from laser.plan import Plan, PlanLine
    from laser.report.card import CardRun

UNFOLDED = 40  # rows that a table shows before the rest is folded away


def what_was_done(outcome: Outcome, run: CardRun) -> str:
    """The rule, the selection, how many matrices, and each with its rank before and after and its energy removed."""
    plan = outcome.plan
    reduced = list(plan.reductions.values())
    matrices, tensors = count(plan)
    skipped = [line for line in plan.lines if line.action == "skip"]
    origin = f" ({cell(run.rule_source)})" if run.rule_source else ""
    text = [
        "## What was done",
        f"Rule {code(plan.rule)}{origin}; selection: {_selection(plan.selection)}. Of {tensors} tensors, {matrices} "
        f"are matrices; {len(reduced)} were reduced, {tensors - len(reduced)} were copied byte for byte"
        + (f", among them {len(skipped)} that the plan skips." if skipped else "."),
    ]
    if plan.edited:
        text.append(
            "The plan was edited after the rule had made it: what was reduced, and to which rank, is what the table "
            "says, and not all of it follows from the rule and the selection."
        )
    if outcome.left_out:
        text.append(_left_out(outcome.left_out))
    if not reduced:
        return "\n\n".join(text)
    removed = [_removed(outcome, line) for line in reduced]
    mean = sum(removed) / len(removed)
    text.append(
        f"The part removed held {100 * min(removed):.2f} to {100 * max(removed):.2f} % (mean {100 * mean:.2f} %) of "
        "the squared singular values of its matrix, as measured when it was removed. By role:"
    )
    text.append(_roles(outcome, reduced, plan))
    rows = [
        (code(x.name), cell(x.full_rank), cell(x.rank), f"{100 * e:.2f} %", "" if x.snr is None else f"{x.snr:.3g}")
        for x, e in zip(reduced, removed, strict=True)
    ]
    full = table(("matrix", "rank before", "after", "energy removed", "SNR"), rows, right=(1, 2, 3, 4))
    if len(rows) > UNFOLDED:
        full = f"<details>\n<summary>All {len(rows)} reduced matrices</summary>\n\n{full}\n\n</details>"
    text.append(full)
    text.append(
        "SNR is the sum of the singular values kept over the sum of those removed. Rank before is the smaller side. "
        "The reason for every tensor, reduced or kept, and the residual of every factorisation are in `laser.json`."
    )
    return "\n\n".join(text)


def _left_out(files: Sequence[str]) -> str:
    """Which files of the source the output does not have."""
    more = f" and {len(files) - UNFOLDED} more (all are in `laser.json`)" if len(files) > UNFOLDED else ""
    named = ", ".join(code(file) for file in files[:UNFOLDED])
    return (
        "Not copied from the source, because they hold its weights unreduced, an adapter for them, or a trainer's "
        f"state, or are links: {named}{more}."
    )


def count(plan: Plan) -> tuple[int, int]:
    """(matrices, tensors). A plan line has no shape, but its reason says of a tensor that it is no matrix."""
    return sum(line.why.kind is not Kind.NOT_A_MATRIX for line in plan.lines), len(plan.lines)


def _removed(outcome: Outcome, line: PlanLine) -> float:
    kept = outcome.matrices.get(line.name, {}).get("energy_kept", line.energy_kept)
    return 1 - float(kept)


def _roles(outcome: Outcome, reduced: Sequence[PlanLine], plan: Plan) -> str:
    rows = []
    for stack, role in dict.fromkeys((line.stack, line.role) for line in reduced):
        these = [line for line in reduced if (line.stack, line.role) == (stack, role)]
        energy = [_removed(outcome, line) for line in these]
        ranks = sorted(line.rank or 0 for line in these)
        full = sorted({line.full_rank or 0 for line in these})
        layers = sorted({line.layer for line in these if line.layer is not None})
        rows.append(
            (
                cell(f"{stack}: {role}" if stack else role),
                f"{len(these)} of {sum((line.stack, line.role) == (stack, role) for line in plan.lines)}",
                _span(layers),
                _span(full),
                _span(ranks),
                f"{100 * min(energy):.1f} to {100 * max(energy):.1f} %",
            )
        )
    return table(("role", "reduced", "layers", "rank before", "rank after", "energy removed"), rows, right=(3, 4, 5))


def _span(numbers: Sequence[int]) -> str:
    if not numbers:
        return ""
    return str(numbers[0]) if numbers[0] == numbers[-1] else f"{numbers[0]} to {numbers[-1]}"


def _selection(selection: Mapping[str, Any]) -> str:
    parts = []
    if selection.get("lowest_snr"):
        parts.append(f"the {selection['lowest_snr']} matrices of lowest signal-to-noise ratio")
    if selection.get("layers"):
        parts.append("layers " + ", ".join(map(str, selection["layers"])))
    if selection.get("roles"):
        parts.append("roles " + ", ".join(map(cell, selection["roles"])))
    for key in ("include", "exclude"):
        if selection.get(key):
            parts.append(f"names that {'' if key == 'include' else 'do not '}match {code(selection[key])}")
    if "accept" in selection:
        parts.append(f"of these the edits that a search kept (criterion {code(selection['accept'])})")
    return "; ".join(parts) or "every attention and feed-forward matrix"


def search(trials: Sequence[Mapping[str, Any]]) -> str:
    """Every trial of a search in the order of the search: label, rule, ranks (by tensor), d, se, accepted."""
    accepted = [t for t in trials if t["accepted"]]
    rows = []
    for t in trials:
        ranks = sorted(set(t["ranks"].values()))
        change = "not finite" if t["d"] is None else f"{t['d']:+.5f}"
        if t["d"] is not None and t["se"] is not None:
            change += f" ± {t['se']:.5f}"
        rows.append((cell(t["label"]), code(t["rule"]), _span(ranks), change, "kept" if t["accepted"] else "undone"))
    full = table(("edit", "rule", "rank tried", "change", "decision"), rows, right=(2, 3))
    if len(rows) > UNFOLDED:
        full = f"<details>\n<summary>All {len(rows)} trials</summary>\n\n{full}\n\n</details>"
    return (
        f"## How the edits were chosen\n\n{len(trials)} edits were tried and {len(accepted)} kept. The change is that "
        "of the objective (a loss in nats per token, or an accuracy) on the calibration text, paired, with its "
        "standard error. What was selected on a text says little about that text: the comparison above is worth what "
        f"its own text is.\n\n{full}"
    )
