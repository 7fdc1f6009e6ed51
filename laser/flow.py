"""run: the whole flow in one call, every record kept beside the weights that it describes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laser.checkpoint.families import Matrix
from laser.checkpoint.files import Journal, tidy_up, unfinished, was_journal
from laser.checkpoint.locks import claimed, lock_of
from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.swap import writing
from laser.checkpoint.writer import RECORDS, OnCheck, is_settled, require_run
from laser.engine.workers import Crew
from laser.errors import OutputError
from laser.measured import ENTRY
from laser.moments import Moments
from laser.one_pass import reduce_in_one_pass, run_of_pass
from laser.plan import Plan, Treatment
from laser.publication import write_card
from laser.reasons import Kind
from laser.reduction import Outcome, plan_as_measured, reduce, run_of
from laser.selection import Selection
from laser.spectra import Source, Spectra, run_of_scan, scan


@dataclass(frozen=True)
class Result:
    """What `run` made; the records lie in OUT/laser and OUT/laser.json."""

    spectra: Spectra
    plan: Plan
    outcome: Outcome


def run(
    checkpoint: Checkpoint,
    out: Path,
    selection: Selection,
    choose: Callable[[Spectra], Plan],
    *,
    crew: Crew,
    method: str = "gram",
    null_draws: int = 0,
    moments: Moments | None = None,
    treatment: Treatment | None = None,
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
    `moments` the spectra in the metric of the data.
    With `treatment`, under which `choose` judges each matrix by itself, both are done in one visit to each matrix;
    FP8 matrices, written with scales of their own, and all of them with `moments`, are visited twice.
    `command` is told in the card, and `name`, by default that of `out`. The callbacks are called per scanned matrix,
    per reduced matrix with its seconds, and with how many bytes of an earlier run were read again, of how many.
    """
    name = name or out.resolve().name
    with writing(checkpoint, out, resume=resume, force=force) as place:
        made = _run_in(
            place, checkpoint, selection, choose, crew, method, null_draws, moments, treatment, on_scan, on_reduce,
            on_check,
        )  # fmt: skip
        write_card(place, checkpoint, name=name, commands=(command,) if command else ())
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
    treatment: Treatment | None,
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
            checkpoint, out, selection, treatment, choose, crew=crew, method=method, null_draws=null_draws, tick=tick,
            on_check=on_check,
        )  # fmt: skip
        return Result(spectra, plan, outcome)
    # Of a finished output nothing is touched before it is known to be of this very run.
    outcome, _ = _found(out, checkpoint, selection, crew, method, null_draws, moments)
    spectra = scan_into(path, checkpoint, selection, crew, method, on_scan, null_draws, moments)
    plan = choose(spectra)
    _require_plan(out, plan, outcome)
    plan.save(records_of(out) / "plan.json")
    options: dict[str, Any] = {"crew": crew, "method": method, "moments": moments}
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
    treatment: Treatment | None = None,
) -> None:
    """Raises as `run` where what lies in `out` is of another run; changes nothing.

    choose: None where that takes a search, whose journal is compared by itself.
    """
    if treatment is not None and _in_one_pass(checkpoint, out, moments):
        return require_run(checkpoint, out, run_of_pass(checkpoint, selection, treatment, crew, method, null_draws))
    outcome, spectra = _found(out, checkpoint, selection, crew, method, null_draws, moments)
    if spectra is None:
        journal = unfinished(records_of(out) / "spectra.safetensors")
        Journal.require(journal, run_of_scan(checkpoint, selection, crew, method, null_draws, moments), (ENTRY,))
    elif choose is not None:
        plan = choose(spectra)
        _require_plan(out, plan, outcome)
        require_run(checkpoint, out, run_of(checkpoint, plan, method, crew))


def _in_one_pass(checkpoint: Checkpoint, out: Path, moments: Moments | None) -> bool:
    """Not FP8, where a matrix and its scales, perhaps in two shards, are written together; nor what is finished."""
    return moments is None and checkpoint.fp8 is None and not is_settled(checkpoint, out)


def _found(
    out: Path,
    checkpoint: Checkpoint,
    selection: Selection,
    crew: Crew,
    method: str,
    null_draws: int,
    moments: Moments | None,
) -> tuple[Outcome | None, Spectra | None]:
    """The outcome in `out`, if all is done there, and its spectra, if they are of this scan.

    Raises OutputError or RecordError for the finished output of another run.
    """
    path = records_of(out) / "spectra.safetensors"
    outcome = Outcome.load(out) if is_settled(checkpoint, out) else None
    if outcome is not None:
        outcome.plan.source.require(checkpoint, "output")
    spectra = _there(path, checkpoint, selection, crew, method, null_draws, moments) if path.exists() else None
    if outcome is not None and spectra is None and path.exists():
        raise _of_another_run(out)
    return outcome, spectra


def _require_plan(out: Path, plan: Plan, outcome: Outcome | None) -> None:
    """Raises OutputError for the finished output of another plan."""
    if outcome is not None and plan_as_measured(plan, outcome.matrices) != outcome.plan:
        raise _of_another_run(out)


def records_of(out: Path) -> Path:
    """Where `run` keeps the records that it makes on the way: spectra, plan, search."""
    return out / RECORDS


def _there(
    path: Path,
    checkpoint: Checkpoint,
    selection: Selection,
    crew: Crew,
    method: str,
    null_draws: int,
    moments: Moments | None,
) -> Spectra | None:
    """The spectra at `path`, if they are those of this scan."""
    there = Spectra.load(path)
    wanted = {m.name for m in there.matrices if selection.why_not(m) is None}
    tried = {m.name for m in there.matrices if m.no_spectrum is None}
    reasons = ((name, why) for name, why in there.skipped.items() if name in tried)
    done = there.values.keys() | {name for name, why in reasons if why.kind is Kind.FAILED}
    if not there.source.is_of(Source.of(checkpoint)) or (there.method, there.device) != (method, crew.label):
        return None
    drawn = {len(there.nulls.get(name, ())) for name in there.values}
    known = there.data.calibration.get("identity") if there.data else None
    same = moments is None or known == moments.calibration.identity
    return there if wanted == done and drawn <= {null_draws} and same else None


def _of_another_run(out: Path) -> OutputError:
    return OutputError(f"{out} holds the finished output of another run; try another -o, or --force to replace it")


def tidy_spectra(path: Path) -> None:
    """Remove what a process that was killed behind its scan left beside whole spectra, unless somebody is at work."""
    partial = unfinished(path)
    if not partial.exists() and not lock_of(path).exists():
        return
    with suppress(OutputError), claimed(path):
        if was_journal(partial, "scan journal"):
            tidy_up(partial, path)


def scan_into(
    path: Path,
    checkpoint: Checkpoint,
    selection: Selection,
    crew: Crew,
    method: str,
    tick: Callable[[Matrix], None] = lambda _: None,
    null_draws: int = 0,
    moments: Moments | None = None,
    anew: bool = False,
) -> Spectra:
    """The spectra at `path` if they are those of this scan; else scan, keeping the work so far in `path`.partial.

    `anew` measures again whatever is there, and drops the work of another scan.
    """
    partial = unfinished(path)
    with claimed(path):
        if path.exists() and not anew:
            there = _there(path, checkpoint, selection, crew, method, null_draws, moments)
            if there is not None:
                tidy_spectra(path)
                return there
        spectra = scan(
            checkpoint,
            selection,
            crew=crew,
            method=method,
            journal=partial,
            null_draws=null_draws,
            moments=moments,
            tick=tick,
            anew=anew,
        )
        spectra.save(path)
        tidy_up(partial, path)
        return spectra
