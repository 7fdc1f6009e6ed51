"""search: keep an edit only if the model gets no worse by it, measured. The result is a plan and every trial.

Candidates are tried one at a time on top of what has been kept. With d the mean paired change of the calibration
objective and se its standard error over windows, `better` (default) keeps an edit if d <= -se, `no-worse` if d <= se,
`any-drop` if d < 0 (what LaserRMT does). A loss that is not finite rejects. What was chosen on the calibration text is
reported on held-out text that the search never saw.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from scipy import stats

from laser.checkpoint.source import Source, require_unchanged
from laser.choices import ACCEPT
from laser.differences.base import Base
from laser.engine.crew import Crew
from laser.errors import NumericalError, RecordError, UsageError, not_finite
from laser.evaluation.objective import Objective
from laser.evaluation.perplexity import weighted_mean
from laser.evaluation.streaming import LayeredModel, Scores
from laser.evaluation.text import Window
from laser.evaluation.verdict import LIBRARIES, judge
from laser.journal import Journal, spoiling
from laser.moments import Moments
from laser.notebook import FrameRows, Shown, drawn
from laser.plan import Plan, Treatment, check_lowest_snr
from laser.reasons import Kind, Why
from laser.records import Record, under
from laser.searching.candidates import ORDERS, Candidate, candidates_of, cut_of, in_order, predict
from laser.searching.runner import QUARTER, TRIAL_SHAPES, Runner, SearchLog, Trial
from laser.searching.trials import Bench, change
from laser.selection import Selection
from laser.spectra import Spectra
from laser.spectral.devices import Device, choose_device
from laser.spectral.rules import draws_needed, metric_in

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REMOVE = "remove it, or search again"


@dataclass(frozen=True)
class Report:
    """An objective before and after the whole plan; means and standard errors in `unit`."""

    objective: str
    unit: str
    text: str
    units: int
    tokens: int  # scored
    before: float | None  # None: not finite
    before_se: float | None
    after: float | None
    after_se: float | None
    d: float | None
    se: float | None
    asked: int | None = None  # units that were asked for, None for all; a shorter text gave fewer

    def wrong(self) -> str | None:
        return under(self, 0, "units", "tokens", "before_se", "after_se", "se")

    @property
    def verdict(self) -> str | None:
        """What the change says, in the words of every other comparison; None where it is not finite."""
        return None if self.d is None else judge(self.d, self.se, lower_is_better=True, units=self.unit_name)

    @property
    def unit_name(self) -> str:
        """What a value is of, in the plural."""
        return "windows" if self.objective == "loss" else "questions"


@dataclass(frozen=True, repr=False)
class SearchResult(Shown):
    """What a search chose, every trial, and what it reports of the text that it went by and of held-out text."""

    plan: Plan
    trials: tuple[Trial, ...]
    calibration: Report
    held_out: tuple[Report, ...]
    rank_correlation: float | None  # Spearman, predicted against measured change, with --shortlist gradient

    def headline(self) -> str:
        kept = sum(trial.accepted for trial in self.trials)
        told = "; ".join(f"{each.text} {each.d:+.5f}" for each in self.held_out if each.d is not None)
        return f"Search of {self.plan.source.name}: {kept} of {len(self.trials)} trials accepted" + (
            f"; {told} {self.held_out[0].unit}" if told else ""
        )

    def frame_rows(self) -> FrameRows:
        keys = ("label", "rule", "d", "se", "accepted", "alone", "predicted", "layer_forwards", "seconds", "raced")
        return [{key: getattr(trial, key) for key in keys} for trial in self.trials]

    def glance(self) -> tuple[FrameRows, Sequence[float]]:
        """The trials that were accepted, and every trial's change in order."""
        return [r for r in self.frame_rows() if r["accepted"]], [t.d for t in self.trials if t.d is not None]

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """Draw the change that each trial measured with its standard error, in their order; on `ax` if there is one."""
        return drawn("plot_search", self, ax=ax)

    def families(self) -> dict[str, dict[str, int]]:
        """Counts per metric, plain and data: which of them wins.

        They are trials, accepted ones, matrices that the plan reduces, and candidates on which it had the best trial.
        """
        best: dict[str, Trial] = {}
        for trial in self.trials:
            if (
                trial.raced is None
                and trial.d is not None
                and trial.d < (best[trial.label].d or 0.0 if trial.label in best else math.inf)
            ):
                best[trial.label] = trial
        kept = [line.metric for line in self.plan.reductions.values()]

        def count(family: str) -> dict[str, int]:
            these = [t for t in self.trials if metric_in(t.rule) == family]
            won = sum(metric_in(t.rule) == family for t in best.values())
            accepted = sum(t.accepted for t in these)
            return {"trials": len(these), "accepted": accepted, "kept": kept.count(family), "best": won}

        return {family: count(family) for family in dict.fromkeys(metric_in(t.rule) for t in self.trials)}


@dataclass(frozen=True)
class SearchRecord(Record, kind="search", version=2, made_by="laser run MODEL -o OUT --search", mend=REMOVE):
    """The result without its plan: search.json, and what `--json` prints. families: see SearchResult.families."""

    source: Source
    trials: tuple[Trial, ...]
    calibration: Report
    held_out: tuple[Report, ...]
    rank_correlation: float | None
    families: Mapping[str, Any]

    @staticmethod
    def of(result: SearchResult) -> SearchRecord:
        return SearchRecord(
            result.plan.source,
            result.trials,
            result.calibration,
            result.held_out,
            result.rank_correlation,
            result.families(),
        )


def search_plan(
    model: LayeredModel,
    spectra: Spectra,
    rules: Sequence[str],
    calibration: Objective,
    held_out: Sequence[Objective],
    *,
    selection: Selection | None = None,
    lowest_snr: int | None = None,
    shortlist: int | None = None,
    grid: bool = False,
    accept: str = "better",
    order: str = "layers",
    device: Device | None = None,
    journal: Path | None = None,
    moments: Moments | None = None,
    base: Base | None = None,
    anew: bool = False,
    racing: bool = False,
    tick: Callable[[Trial, int], None] = lambda *_: None,
    told: Callable[[int, int, int], None] = lambda *_: None,
) -> SearchResult:
    """Try candidates of `spectra` under `rules` on `model` and plan those that `accept` keeps.

    Candidates are the matrices that the first rule reduces, the `lowest_snr` K of them. With `shortlist` K they are
    those with the lowest first-order change of the loss. Each is tried at each rule's rank, mildest first, and its best
    accepted one is kept. With `grid` they are LASER's cells (layer, role, rule), each tried alone and the accepted ones
    then composed greedily. With `journal` every trial is a line of that file and a search that was killed repeats none;
    `anew` drops the trials of another search.
    With `base`, of which `spectra` are the differences, a candidate is a role, all its tensors at once, and an edit is
    what a rule makes of their differences: a cut, or `scale:C`.
    A rule `data:NAME` goes by the data (see `data_metric`) and needs the `moments` that `spectra` were scanned with.
    Kept edits stay in memory in storage dtype (117 MB for a matrix of Mixtral-8x7B), also when streaming.
    With `racing` a trial ends after a quarter of the units if it is worse by 2.5 standard errors by then. That is a
    rejection for every way to accept, on fewer units than otherwise, so that decisions may differ from those without.
    `tick` is called with each trial and how many are still to come at most; `told` before each piece of a walk with
    its number, the last one's and how many variants are measured together.
    Raises UsageError for a request that makes no sense (one calibration window, held-out text that is calibration
    text), RecordError for spectra or a journal of another run, NumericalError if the model itself is not finite.
    """
    selection, device = selection or Selection(), device or choose_device()
    checkpoint = model.checkpoint
    if base is None:
        spectra.source.require(checkpoint, "spectra")
    else:
        base.require(spectra.source, "spectra")
    check_request(
        rules,
        accept=accept,
        order=order,
        shortlist=shortlist,
        grid=grid,
        lowest_snr=lowest_snr,
        calibrated=moments is not None,
        of_difference=base is not None,
    )
    check_objectives(calibration, held_out, accept, shortlist, racing)
    plans, found = candidates_of(spectra, model, rules, selection, lowest_snr, grid)
    for plan in plans.values():
        plan.require_moments(moments)
    options = {"lowest_snr": lowest_snr, "shortlist": shortlist, "grid": grid, "accept": accept, "order": order}
    options["racing"] = racing
    asked = _as_asked(model, calibration, selection, device, moments, options)
    log = SearchLog(journal, _search_run(model, rules, asked, base), anew)

    def cut(name: str, rule: str, rank: int) -> torch.Tensor:
        return cut_of(checkpoint, rule, {name: rank}, device, moments, base)[name]

    try:
        whole = bench = Bench(model, calibration, cut, told)
        heat = None
        if racing:
            share = len(calibration.weights) // QUARTER
            heat = Bench(model, calibration.part(0, share), cut, told)
            bench = Bench(model, calibration.part(share, len(calibration.weights)), cut, told)
        benches = (bench, *([heat] if heat else ()))
        runner = Runner(bench, calibration, accept, log, tick, heat)
        before = _Together.missing("before", held_out, log)
        if shortlist is None:
            found = in_order(found, order)
            for each in benches:
                each.wanted, each.branches = _wanted(found, model)
            untouched, values = runner.baseline(found, grid, before)
        else:
            whole.wanted = set(range(max(min(c.piece for c in found), 1), model.layers + 2))
            untouched, values = runner.baseline((), along=before)
        if before and values is not None:
            before.report("before", values, log)
        if not all(map(math.isfinite, untouched)):
            raise NumericalError(
                f"{checkpoint.name}: the {calibration.name} of the untouched model is not finite on "
                f"{calibration.text}; {not_finite(model.dtype, 'laser search with --dtype float32 and --force')}"
            )
        if shortlist is not None:
            found = in_order(_shortlisted(found, shortlist, whole, device, log, moments), order)
            for each in benches:
                each.wanted, each.branches = _wanted(found, model)
            whole.forget(b for b in tuple(whole.boundaries) if whole is not bench or b[0] not in whole.wanted)
        runner.grid(found) if grid else runner.one_by_one(found)
        for each in benches:  # what comes now needs the memory
            each.forget(tuple(each.boundaries))
        reports = _reports(model, held_out, log, told)
        with spoiling(log.journal):
            require_unchanged(checkpoint)
            if base is not None:
                base.require_unchanged()
    finally:
        log.close()
    plan = _plan(plans, asked, runner.trials, runner.kept, calibration)
    summary = _summary(calibration, untouched, runner.now)
    return SearchResult(plan, tuple(runner.trials), summary, reports, _correlation(runner.trials))


def _wanted(candidates: Sequence[Candidate], model: LayeredModel) -> tuple[set[int], set[int]]:
    """Before which pieces the model's own states are worth keeping, and before which those of variants.

    Its own: at the lowest, where every walk can begin, and where no layer is read from there on. A variant's: where an
    edit may be kept, since that leaves what lies below it as it was.
    """
    pieces = {max(c.piece, 1) for c in candidates}
    return {p for p in pieces if p == min(pieces) or model.in_memory(p)}, {p for p in pieces if not model.in_memory(p)}


def require_journal(
    path: Path,
    model: LayeredModel,
    rules: Sequence[str],
    calibration: Objective,
    selection: Selection,
    device: Device,
    moments: Moments | None,
    options: Mapping[str, Any],
    base: Base | None = None,
) -> None:
    """Raises as `search` where the journal at `path`, if there is one, is of another search. options: lowest_snr,
    shortlist, grid, accept, order and racing, each as `search` takes it."""
    asked = _as_asked(model, calibration, selection, device, moments, options)
    Journal.require(path, _search_run(model, rules, asked, base), TRIAL_SHAPES)


def _as_asked(
    model: LayeredModel,
    calibration: Objective,
    selection: Selection,
    device: Device,
    moments: Moments | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What its plan says of a search."""
    asked = selection.describe() | {key: options.get(key) for key in ("lowest_snr", "shortlist")}
    asked |= {"grid": options.get("grid", False), "accept": options["accept"], "order": options["order"]}
    asked |= {"racing": True} if options.get("racing") else {}
    asked |= {"objective": calibration.name, "calibration": calibration.text}
    label = Crew((device,)).label if device.routes else device.label  # on which last digits depend
    asked |= {"calibration_sha256": calibration.sha256, "dtype": str(model.dtype), "device": label}
    return asked | ({"moments": moments.calibration.identity} if moments else {})


def _search_run(
    model: LayeredModel, rules: Sequence[str], asked: Mapping[str, Any], base: Base | None
) -> dict[str, Any]:
    """What a search's journal belongs to."""
    # Before and after are compared, so all of a journal is measured alike: also where it is gone on with tomorrow.
    alike = {"evaluated on": model.device.type, "libraries": {name: version(name) for name in LIBRARIES}}
    stated = Source.of(model.checkpoint).stated()
    stated = {"kind": "search journal", "version": SearchRecord.version, **stated, "rules": list(rules)}
    return stated | (base.stated() if base else {}) | {**asked, **alike}


def check_request(
    rules: Sequence[str],
    *,
    accept: str = "better",
    order: str = "layers",
    shortlist: int | None = None,
    grid: bool = False,
    lowest_snr: int | None = None,
    calibrated: bool = True,
    of_difference: bool = False,
) -> None:
    """What can be refused of a search before its model is opened; `calibrated`: with moments, `of_difference`: with a
    base. Raises UsageError."""
    if not rules:
        raise UsageError(
            "a search needs at least one rule; try laser search --rules laser-rmt, or laser run --rule laser-rmt"
        )
    for rule in rules:
        Treatment(rule).check(calibrated)
        draws_needed(rule, of_difference)
    check_lowest_snr(lowest_snr)
    if of_difference and (lowest_snr is not None or shortlist is not None):
        raise UsageError(
            "--lowest-snr and --shortlist are of single matrices, and differences are tried by role; leave them out"
        )
    if of_difference and order != "layers":
        raise UsageError(f"--order {order} is of single matrices, and differences are tried by role; leave it out")
    if accept not in ACCEPT:
        raise UsageError(f"no way to accept is called {accept!r}; try --accept {'|'.join(ACCEPT)}")
    if order not in ORDERS:
        raise UsageError(f"no order is called {order!r}; try --order {'|'.join(ORDERS)}")
    if shortlist is not None and (shortlist < 1 or grid):
        raise _no_shortlist(shortlist)


def check_objectives(
    calibration: Objective,
    held_out: Sequence[Objective],
    accept: str,
    shortlist: int | None = None,
    racing: bool = False,
) -> None:
    """What can be refused of a search before the first pass through its model. Raises UsageError."""
    if shortlist is not None and calibration.name != "loss":
        raise _no_shortlist(shortlist)
    if len(calibration.weights) < 2 and accept != "any-drop":
        raise UsageError(
            f"{calibration.text} gives one unit to calibrate on, so a change has no standard error; "
            "try a longer text or a shorter --window"
        )
    if racing and len(calibration.weights) < 2 * QUARTER:
        raise UsageError(
            f"{calibration.text} gives {len(calibration.weights)} units, and a race wants {2 * QUARTER} at the least; "
            "try a longer text, a shorter --window, or no --racing"
        )
    seen = {w.tokens.tobytes() for w in calibration.windows}
    for objective in held_out:
        if shared := sum(w.tokens.tobytes() in seen for w in objective.windows):
            raise UsageError(
                f"{shared} windows of the held-out {objective.text} are also calibration windows; "
                "try another --held-out text"
            )


def _no_shortlist(count: int) -> UsageError:
    return UsageError(
        f"--shortlist gradient:{count} needs a count of 1 or more, single matrices (no --grid) and the loss as "
        "objective; try --shortlist gradient:15 alone"
    )


def _shortlisted(
    found: list[Candidate], count: int, bench: Bench, device: Device, log: SearchLog, moments: Moments | None
) -> list[Candidate]:
    """The `count` candidates with the lowest first-order change; one backward pass, journalled."""
    labels = [c.label for c in found]
    entry = log.entry(
        {"entry": "gradient", "labels": labels},
        lambda: {"predicted": [c.predicted for c in predict(found, bench, device, moments)]},
    )
    if len(entry["predicted"]) != len(found):
        raise RecordError(
            f"the journal of the search predicts {len(entry['predicted'])} changes, expected {len(found)}; start "
            "afresh with --force"
        )
    predicted = [replace(c, predicted=p) for c, p in zip(found, entry["predicted"], strict=True)]
    return sorted(predicted, key=lambda c: c.predicted or 0.0)[:count]


@dataclass(frozen=True)
class _Together:
    """Objectives that one walk measures: their windows one behind the other, and their values likewise."""

    objectives: Sequence[Objective]

    @staticmethod
    def missing(when: str, objectives: Sequence[Objective], log: SearchLog) -> _Together | None:
        """Those that the journal does not report yet, None where it reports all."""
        left = [each for each in objectives if not log.has(_named(when, each))]
        return _Together(left) if left else None

    def report(self, when: str, values: list[float], log: SearchLog) -> None:
        """Write down the values of each objective."""
        ends = list(itertools.accumulate(len(objective.weights) for objective in self.objectives))
        for objective, start, end in zip(self.objectives, [0, *ends], ends, strict=False):
            log.report(_named(when, objective), values[start:end])

    @property
    def windows(self) -> list[Window]:
        return [window for objective in self.objectives for window in objective.windows]

    def values(self, scores: Scores) -> list[float]:
        found, at = list[float](), 0
        for objective in self.objectives:
            end = at + len(objective.windows)
            found += objective.values(Scores(scores.sums[at:end], scores.greedy[at:end]))
            at = end
        return found


def _reports(
    model: LayeredModel, held_out: Sequence[Objective], log: SearchLog, told: Callable[[int, int, int], None]
) -> tuple[Report, ...]:
    """Before and after on texts that the search never saw. After takes one walk, if an edit was kept."""
    if missing := _Together.missing("after", held_out, log):
        if model.edits:
            after = Bench(model, missing, _nothing_to_cut, told).walk((), base=True).own
            assert after is not None, "it was asked for"
            missing.report("after", after.values, log)
        else:
            missing.report("after", [v for o in missing.objectives for v in log.reported(_named("before", o), o)], log)
    return tuple(
        _summary(o, log.reported(_named("before", o), o), log.reported(_named("after", o), o)) for o in held_out
    )


def _nothing_to_cut(name: str, rule: str, rank: int) -> torch.Tensor:
    raise AssertionError(f"{name} was cut for a report")


def _named(when: str, objective: Objective) -> str:
    return f"{when} {objective.sha256[:16]}"


def _summary(objective: Objective, before: list[float], after: list[float]) -> Report:
    numbers = [*weighted_mean(before, objective.weights), *weighted_mean(after, objective.weights)]
    numbers += change(objective, before, after)
    finite = [x if x is not None and math.isfinite(x) else None for x in numbers]
    tokens = sum(w.scored for w in objective.windows)
    units = len(objective.weights)
    return Report(objective.name, objective.unit, objective.text, units, tokens, *finite, asked=objective.asked)


def _plan(
    plans: Mapping[str, Plan],
    asked: dict[str, Any],
    trials: Sequence[Trial],
    kept: Mapping[str, Trial],
    objective: Objective,
) -> Plan:
    first = next(iter(plans.values()))
    stated: dict[str, list[str]] = {}
    for trial in trials:
        for name in trial.ranks:
            stated.setdefault(name, []).append(trial.stated())
    data = [line for plan in plans.values() if plan.calibration for line in plan.lines]
    unseen = {line.name: line for line in data if line.why.kind is Kind.UNSEEN}
    lines = []
    for line in first.lines:
        name = line.name
        if name in kept:
            trial = kept[name]
            chosen = plans[trial.rule].reductions[name]
            lines.append(replace(chosen, why=Why(Kind.ACCEPTED, f"accepted, {objective.unit} {trial.stated()}")))
            continue
        if name in stated:
            why = Why(Kind.REJECTED, f"rejected, {objective.unit} " + "; ".join(stated[name]))
            line = replace(line, action="keep", scale=None, why=why)
        elif line.action == "reduce":
            line = replace(line, action="keep", scale=None, why=Why(Kind.NOT_TRIED, "not tried: not on the shortlist"))
        if name in unseen and not line.unseen:
            line = replace(line, why=line.why.also(unseen[name].why.text), unseen=unseen[name].unseen)
        lines.append(line)
    calibration = next((plan.calibration for plan in plans.values() if plan.calibration), None)
    return Plan(first.source, ",".join(plans), asked, tuple(lines), calibration, pair=first.pair)


def _correlation(trials: Sequence[Trial]) -> float | None:
    pairs = [(t.predicted, t.d) for t in trials if t.raced is None and t.predicted is not None and t.d is not None]
    if len(pairs) < 3 or len({p for p, _ in pairs}) < 2 or len({d for _, d in pairs}) < 2:
        return None
    found: Any = stats.spearmanr([p for p, _ in pairs], [d for _, d in pairs])
    return float(found.statistic)
