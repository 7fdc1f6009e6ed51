"""run: the whole flow in one call, every record kept beside the weights that it describes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laser.checkpoint.matrices import Matrix
from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.swap import writing
from laser.checkpoint.writer import OnCheck, is_settled, require_run
from laser.differences.base import Base
from laser.engine.crew import Crew
from laser.files import unfinished
from laser.journal import Journal
from laser.moments import Moments
from laser.outcome import Outcome, plan_as_measured
from laser.pipeline import (
    of_another_run,
    records_of,
    reduce,
    reduce_in_one_pass,
    require_base_apart,
    run_of_pass,
    run_of_plan,
    run_of_scan,
    scan_into,
    spectra_there,
    tidy_spectra,
)
from laser.plan import Plan, Treatment
from laser.report.publish import write_card
from laser.selection import Selection
from laser.spectra import ENTRY, OF_DIFFERENCE, Spectra


@dataclass(frozen=True)
class Result:
    """What `run_flow` made; the records lie in OUT/laser and OUT/laser.json."""

    spectra: Spectra
    plan: Plan
    outcome: Outcome


def run_flow(
    checkpoint: Checkpoint,
    out: Path,
    selection: Selection,
    choose: Callable[[Spectra], Plan],
    *,
    crew: Crew,
    method: str = "gram",
    null_draws: int = 0,
    moments: Moments | None = None,
    base: Base | None = None,
    treatment: Treatment | None = None,
    rules: Sequence[str] = (),
    resume: bool = False,
    force: bool = False,
    command: str | None = None,
    name: str | None = None,
    on_scan: Callable[[Matrix], None] = lambda _: None,
    on_reduce: Callable[[Matrix, float], None] = lambda *_: None,
    on_check: OnCheck = lambda *_: None,
) -> Result:
    """scan, choose, reduce, card. Killed and called again with `resume`, it goes on where it was.

    `choose` makes the plan from the spectra: `make_plan` under a rule, or a search; it may keep its own records in
    OUT/laser, which `records_of` names. `null_draws` permutations are scanned as well, for rules that ask, and with
    `moments` the spectra in the metric of the data. `rules` are those that `choose` asks, see `scan`.
    With `treatment`, under which `choose` judges each matrix by itself, both are done in one visit to each matrix;
    FP8 matrices, written with scales of their own, and all of them with `moments`, are visited twice. With `base` what
    is measured and cut is the difference from it.
    `command` stands in the card, and `name`, by default that of `out`. The callbacks are called per scanned matrix,
    per reduced matrix with its seconds, and with how many bytes of an earlier run were read again, of how many.
    """
    name = name or out.resolve().name
    require_base_apart(base, out)
    with writing(checkpoint, out, resume=resume, force=force) as place:
        made = _run_in(
            place, checkpoint, selection, choose, crew, method, null_draws, moments, base, treatment, rules, on_scan,
            on_reduce, on_check,
        )  # fmt: skip
        compared = None if base is None else base.checkpoint
        write_card(place, checkpoint, name=name, base=compared, commands=(command,) if command else ())
    return made


def _run_in(
    out: Path,
    checkpoint: Checkpoint,
    selection: Selection,
    choose: Callable[[Spectra], Plan],
    crew: Crew,
    method: str,
    null_draws: int,
    moments: Moments | None,
    base: Base | None,
    treatment: Treatment | None,
    rules: Sequence[str],
    on_scan: Callable[[Matrix], None],
    on_reduce: Callable[[Matrix, float], None],
    on_check: OnCheck,
) -> Result:
    """All but the card, in the directory `out`."""
    path = records_of(out) / "spectra.safetensors"
    if treatment is not None and _in_one_pass(checkpoint, out, moments):

        def tick(matrix: Matrix, seconds: float) -> None:
            on_scan(matrix)
            on_reduce(matrix, seconds)

        spectra, plan, outcome = reduce_in_one_pass(
            checkpoint, out, selection, treatment, choose, crew=crew, method=method, null_draws=null_draws, base=base,
            tick=tick, on_check=on_check,
        )  # fmt: skip
        return Result(spectra, plan, outcome)
    # Of a finished output nothing is touched before it is known to be of this very run.
    outcome, spectra = _found_spectra(out, checkpoint, selection, crew, method, null_draws, moments, base)
    if spectra is None:
        spectra = scan_into(path, checkpoint, selection, crew, method, on_scan, null_draws, moments, base, rules=rules)
    else:
        tidy_spectra(path)
    plan = choose(spectra)
    _require_plan(out, plan, outcome)
    del outcome  # it is read again, and of very many matrices two take more than all else
    plan.save(records_of(out) / "plan.json")
    options: dict[str, Any] = {"crew": crew, "method": method, "moments": moments, "base": base}
    outcome = reduce(checkpoint, plan, out, **options, resume=True, tick=on_reduce, on_check=on_check)
    return Result(spectra, plan, outcome)


def require_same_run(
    out: Path,
    checkpoint: Checkpoint,
    selection: Selection,
    choose: Callable[[Spectra], Plan] | None,
    *,
    crew: Crew,
    method: str,
    null_draws: int = 0,
    moments: Moments | None = None,
    base: Base | None = None,
    treatment: Treatment | None = None,
    rules: Sequence[str] = (),
) -> None:
    """Raises as `run` where what lies in `out` is of another run; changes nothing.

    choose: None where that takes a search, whose journal is compared by itself.
    """
    if treatment is not None and _in_one_pass(checkpoint, out, moments):
        asked = run_of_pass(checkpoint, selection, treatment, crew, method, null_draws, base)
        return require_run(checkpoint, out, asked)
    outcome, spectra = _found_spectra(out, checkpoint, selection, crew, method, null_draws, moments, base)
    if spectra is None:
        journal = unfinished(records_of(out) / "spectra.safetensors")
        asked = run_of_scan(checkpoint, selection, crew, method, null_draws, moments, rules, base)
        Journal.require(journal, asked, (ENTRY, OF_DIFFERENCE))
    elif choose is not None:
        plan = choose(spectra)
        _require_plan(out, plan, outcome)
        require_run(checkpoint, out, run_of_plan(plan, method, crew))


def _in_one_pass(checkpoint: Checkpoint, out: Path, moments: Moments | None) -> bool:
    """Not FP8, where a matrix and its scales, perhaps in two shards, are written together; nor what is finished."""
    return moments is None and checkpoint.fp8 is None and not is_settled(checkpoint, out)


def _found_spectra(
    out: Path,
    checkpoint: Checkpoint,
    selection: Selection,
    crew: Crew,
    method: str,
    null_draws: int,
    moments: Moments | None,
    base: Base | None,
) -> tuple[Outcome | None, Spectra | None]:
    """The outcome in `out`, if all is done there, and its spectra, if they are of this scan.

    Raises OutputError or RecordError for the finished output of another run.
    """
    path = records_of(out) / "spectra.safetensors"
    outcome = Outcome.load(out) if is_settled(checkpoint, out) else None
    if outcome is not None:
        outcome.plan.require_source(checkpoint, base, "output")
    how = (crew, method, null_draws, moments, base)
    spectra = spectra_there(path, checkpoint, selection, *how) if path.exists() else None
    if outcome is not None and spectra is None and path.exists():
        raise of_another_run(out)
    return outcome, spectra


def _require_plan(out: Path, plan: Plan, outcome: Outcome | None) -> None:
    """Raises OutputError for the finished output of another plan."""
    if outcome is not None and plan_as_measured(plan, outcome.matrices) != outcome.plan:
        raise of_another_run(out)
