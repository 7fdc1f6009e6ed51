"""The verb search: parse, call and print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laser.checkpoint.matrices import Matrix, list_matrices
from laser.checkpoint.packed import require_unpacked
from laser.checkpoint.reader import Checkpoint
from laser.choices import OF_DIFFERENCES
from laser.cli import common, memory, options
from laser.cli.common import say
from laser.cli.estimates import print_dry_run, search_measuring
from laser.cli.measure import digits, fewer
from laser.cli.progress import Bar, Progress
from laser.differences.difference import RULE
from laser.differences.opened import open_model
from laser.engine.crew import Crew
from laser.errors import UsageError
from laser.evaluation.evaluate import check_vocabulary
from laser.evaluation.objective import Loss, Objective, read_task
from laser.evaluation.placement import Placement
from laser.evaluation.streaming import LayeredModel, require_dtype
from laser.evaluation.text import Text, check_cut, cut_windows, load_tokenizer
from laser.files import real
from laser.pipeline import scan_into, tidy_spectra
from laser.searching.candidates import candidates_of
from laser.searching.passes import possible_candidates
from laser.searching.search import (
    Report,
    SearchRecord,
    SearchResult,
    Trial,
    check_objectives,
    check_request,
    require_journal,
    search_plan,
)
from laser.selection import Selection
from laser.spectra import Spectra
from laser.spectral.devices import Device
from laser.spectral.rules import BY_DATA, draws_needed


def search_verb(
    model: str,
    *,
    output: Path,
    spectra: Path | None,
    base: options.FromBase,
    rules: str | None,
    moments: options.Inputs,
    lowest: options.Lowest,
    shortlist: str | None,
    grid: str | None,
    trials: options.Trials,
    objective: str,
    task: Path | None,
    text: options.SearchText,
    dataset: options.Dataset,
    which: options.Matrices,
    stream: bool | None,
    dtype: str,
    on: options.Precise,
    journal: Path | None,
    work: options.WorkOptions,
) -> None:
    """`laser search`, whose arguments and help are in verbs.py."""
    # Before the model, which may have to be downloaded: what is asked for.
    of_difference = base.base is not None
    if grid is not None and rules is not None:
        raise UsageError("--grid names its own rules; leave out --rules, or name them as --grid RULE,RULE")
    rules = rules if rules is not None else default_rules(of_difference, searching=True)
    wanted = _grid(grid) if grid else [rule for rule in rules.split(",") if rule]
    if of_difference and moments.moments is not None:
        raise UsageError(NO_DATA)
    asked: dict[str, Any] = {
        "lowest_snr": lowest.count(None if grid or shortlist or of_difference else 15),
        "shortlist": shortlist_of(shortlist),
        "grid": grid is not None,
        "accept": trials.accept,
        "order": trials.order,
    }
    check_request(wanted, **asked, calibrated=moments.moments is not None, of_difference=of_difference)
    asked["racing"] = trials.racing
    check_objective(objective, task, text)
    require_dtype(dtype)
    chosen, where = which.selection(), on.choose()
    work.claim(output, "plan")
    journal, beside = journal or output.with_name("search.jsonl"), spectra is None
    spectra = spectra or output.with_name("spectra.safetensors")
    measured = Spectra.load(spectra) if spectra.exists() else None
    if len({real(path) for path in (output, journal, spectra)}) < 3:
        raise UsageError(f"the plan, its journal and the spectra are three files, found {output}, {journal}, {spectra}")
    for path in (journal, *([spectra] if measured is None else [])):
        common.keep_file(path)
    if measured is not None and not work.dry_run:
        tidy_spectra(spectra)
    texts, known = text.read(dataset.dataset), moments.load()
    # Before the scan: what cannot be measured is not worth one.
    checkpoint = open_model(model, "files" if work.dry_run else "weights")
    require_unpacked(checkpoint)
    compared = base.of(checkpoint)
    tokenizer, crew = load_tokenizer(checkpoint.path), Crew((where,))
    calibration, reported = objectives_of(checkpoint, tokenizer, task, *texts, text)
    check_objectives(calibration, reported, trials.accept, asked["shortlist"], trials.racing)
    if measured is None:  # one that is there is used as it is: it may hold more than this search asks for
        chosen.check(list_matrices(checkpoint))
    elif compared is not None:
        compared.require(measured.source, "spectra")
    else:
        measured.source.require(checkpoint, "spectra")
    lacking = chosen.left_out(measured.matrices, measured.skipped) if measured is not None else []
    if lacking and not beside and not work.as_json:
        say(f"{len(lacking)} selected matrices have no values in {spectra}, such as {lacking[0]}; they are not tried")
    if lacking and beside:
        raise UsageError(
            f"{spectra} has no values of {lacking[0]}, which its scan left out; try --spectra with another file, or "
            "select what was scanned"
        )
    matrices = [m for m in list_matrices(checkpoint) if chosen.why_not(m) is None]
    searched = searched_of(checkpoint, chosen, of_difference)
    layered, placed = layered_model(
        checkpoint, calibration, reported, matrices, crew, where, dtype, stream,
        variants=most_variants(searched, wanted, asked["shortlist"] or asked["lowest_snr"], asked["grid"],
            of_difference),
        rules=1 if grid else len(wanted), backward=shortlist is not None,
    )  # fmt: skip
    draws = max((draws_needed(rule, of_difference) for rule in wanted), default=0)
    if work.dry_run:
        if not work.force:
            require_journal(journal, layered, wanted, calibration, chosen, where, known, asked, compared)
        tried = asked["shortlist"]
        if measured is not None:  # then it is known which
            found = candidates_of(measured, layered, wanted, chosen, asked["lowest_snr"], asked["grid"])[1]
        else:
            found = possible_candidates(searched, layered, wanted, asked["grid"], of_difference)
            tried = tried or asked["lowest_snr"]
        estimate = search_measuring(
            layered, placed, calibration, reported, matrices, found, where,
            tried=tried, order=trials.order, grid=asked["grid"], shortlisted=shortlist is not None,
        )  # fmt: skip
        return print_dry_run(checkpoint, chosen, crew, work.as_json, draws, known is not None, [estimate])
    if measured is None:
        with Progress("scan", matrices) as bar:
            measured = scan_into(
                spectra, checkpoint, chosen, crew, "gram", bar, null_draws=draws, moments=known, base=compared,
                rules=wanted,
            )  # fmt: skip
    result = search_with_bar(
        layered,
        measured,
        wanted,
        calibration,
        reported,
        selection=chosen,
        **asked,
        device=where,
        journal=journal,
        moments=known,
        base=compared,
        anew=work.force,
    )
    result.plan.save(output)
    if work.as_json:
        return common.print_json(SearchRecord.of(result).document() | {"output": str(output), "journal": str(journal)})
    print_search(result)
    say(f"written to {output}; every trial is in {journal}")


def layered_model(
    checkpoint: Checkpoint,
    calibration: Objective,
    reported: Sequence[Objective],
    matrices: Sequence[Matrix],
    crew: Crew,
    device: Device,
    dtype: str,
    stream: bool | None,
    **how: Any,
) -> tuple[LayeredModel, Placement]:
    """The model that a search measures, with what memory holds of it, and why; no weight is read.

    Raises UsageError for windows that it cannot run, OutOfMemory where it does not fit.
    """
    others = [window for each in reported for window in each.windows]
    placed = memory.for_search(checkpoint, calibration.windows, others, matrices, crew, device, dtype, stream, **how)
    store = memory.said(placed).store(device.torch_device)
    layered = LayeredModel(
        checkpoint, dtype=dtype, device=device.torch_device, resident=placed.resident, store=store,
        ahead=bool(placed.resident),
    )  # fmt: skip
    for each in (calibration, *reported):
        layered.check(each.windows)
    return layered, placed


NO_DATA = "the metric of the data is of a model's own matrices, not of differences; try --base without --moments"


def default_rules(of_difference: bool, searching: bool) -> str:
    """What is asked where nothing is named."""
    if not of_difference:
        return "laser-rmt"
    return ",".join(OF_DIFFERENCES) if searching else RULE


def searched_of(checkpoint: Checkpoint, chosen: Selection, of_difference: bool) -> list[Matrix]:
    """What a search may edit: a scale is for tensors of any shape."""
    why_not = chosen.why_not_tensor if of_difference else chosen.why_not
    return [m for m in list_matrices(checkpoint) if why_not(m) is None]


def most_variants(
    matrices: Sequence[Matrix], rules: Sequence[str], tried: int | None, grid: bool = False, by_role: bool = False
) -> int:
    """How many variants there can be, before a spectrum is known. tried: of how many candidates, None: of all."""

    def candidate(m: Matrix) -> object:
        return (m.layer, m.role) if grid else (m.stack, m.role) if by_role else m.name

    candidates = {candidate(m) for m in matrices if m.is_matrix or by_role}
    return len(rules) * min(len(candidates), tried or len(candidates))


def search_with_bar(*arguments: Any, **how: Any) -> SearchResult:
    """`search_plan` of these arguments, its trials shown on a bar."""
    kept: list[bool] = []
    with Bar("search", unit="trials") as bar:

        def so_far() -> str:
            return f"{sum(kept)} kept, {len(kept) - sum(kept)} rejected"

        def tick(trial: Trial, to_come: int) -> None:
            kept.append(trial.accepted)
            decided = f"{trial.label} {trial.stated()} {'kept' if trial.accepted else 'rejected'}"
            bar.update(now=f"{so_far()}; {decided}", to_come=to_come)

        def told(piece: int, last: int, alive: int) -> None:
            bar.update(0, f"{so_far()}; piece {piece} of {last}, {alive} at a time")

        try:
            return search_plan(*arguments, tick=tick, told=told, **how)
        finally:
            arguments[0].unload()  # what comes next needs the memory


def check_objective(objective: str, task: Path | None, text: options.SearchText) -> None:
    """What can be refused of an objective without the model's tokenizer. Raises UsageError."""
    if objective not in ("loss", "accuracy") or (objective == "accuracy") != (task is not None):
        raise UsageError(
            f"found --objective {objective} and --task {task}; try --objective accuracy --task FILE.jsonl, or neither"
        )
    if text.windows == 0 and text.held_out is None and task is None:
        raise UsageError(
            "--windows 0 calibrates on the whole text and leaves nothing of it to report on; try --held-out FILE, or a "
            "count of --windows"
        )
    for limit in (text.windows, text.held_out_windows):
        check_cut(text.window, limit or None)


def objectives_of(
    checkpoint: Checkpoint,
    tokenizer: Any,
    task: Path | None,
    text: Text,
    held_out: Text | None,
    asked: options.SearchText,
) -> tuple[Objective, list[Objective]]:
    """What is minimised, and what is reported: other text, and for a task its later questions too. A count of 0
    windows is all that there are."""
    windows, most = asked.windows, asked.held_out_windows or None
    calibration = cut_windows(text, tokenizer, length=asked.window, limit=windows or None)
    check_vocabulary(checkpoint, calibration)
    other = text if held_out is None else held_out
    skip = windows if held_out is None else 0
    reported = cut_windows(other, tokenizer, length=asked.window, limit=most, skip=skip)
    check_vocabulary(checkpoint, reported)
    if task is None:
        return Loss(calibration), [Loss(reported)]
    minimised = read_task(task, tokenizer, limit=windows or None)
    if windows == 0:  # every question is calibrated on, and none is left
        return minimised, [Loss(reported)]
    return minimised, [read_task(task, tokenizer, limit=most, skip=windows), Loss(reported)]


def _grid(text: str) -> list[str]:
    """`fraction:0.9,0.6` or `data:fraction:0.9,0.6` to its rules. Raises UsageError without arguments; rules check the
    rest."""
    metric = BY_DATA if text.startswith(BY_DATA) else ""
    name, _, arguments = text.removeprefix(metric).partition(":")
    found = [f"{metric}{name}:{argument}" for argument in arguments.split(",") if argument]
    if not found:
        raise UsageError(f"the grid {text!r} has no cells; try --grid fraction:0.9,0.6,0.2,0.1,0.05,0.01")
    return found


def shortlist_of(text: str | None) -> int | None:
    if text is None:
        return None
    name, _, count = text.partition(":")
    if name != "gradient" or not (count or "15").isdecimal():
        raise UsageError(f"no shortlist is called {text!r}; try --shortlist gradient:15")
    return int(count or 15)  # as many as LaserRMT takes by SNR


def print_search(result: SearchResult) -> None:
    """The decisions, one row per trial, then what the whole plan did to seen and unseen text."""
    rows = []
    for t in result.trials:
        kept = all(t.made(result.plan.reductions.get(name)) for name in t.ranks)
        decision = "rejected" if not t.accepted else "kept" if kept and not t.alone else "accepted"
        rank = next(iter(t.ranks.values()))
        change = "not finite" if t.d is None else f"{t.d:+.5f}"
        change += "" if t.raced is None else f" after {t.raced} units"
        rows.append((t.label, t.rule, rank, change, digits(t.se), decision, f"{t.seconds:.1f}"))
    common.print_table(("candidate", "rule", "rank", "change", "±", "decision", "s"), rows)
    for what, report in (("calibration", result.calibration), *(("held out", r) for r in result.held_out)):
        # What was selected on a text is no news of that text.
        verdict = f": {report.verdict}" if what == "held out" and report.verdict else ""
        say(f"{what}: {_report_line(report)}{verdict}")
        if short := fewer(report.text, report.units, report.asked, report.unit_name):
            say(short)
    if result.rank_correlation is not None:
        say(f"gradient's order against the measured one: Spearman {result.rank_correlation:+.2f}")
    families = result.families()
    if len(families) > 1:
        for name, count in families.items():
            say(f"metric {name}: {count['best']} candidates' best, {count['kept']} kept, of {count['trials']} trials")
    if not result.plan.reductions:
        say("nothing was kept: no reduction that was tried makes this model better")


# Objective -> what its numbers are.
STATED = {"loss": "loss", "accuracy": "wrong answers"}


def _report_line(report: Report) -> str:
    before, after, d = (digits(x) if x is not None else "not finite" for x in (report.before, report.after, report.d))
    return (
        f"{STATED[report.objective]} on {report.text}, {report.units} units: {before} ± {digits(report.before_se)} "
        f"before, {after} ± {digits(report.after_se)} after, change {d} ± {digits(report.se)} {report.unit}"
    )
