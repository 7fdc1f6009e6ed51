"""Go through candidates, one after the other or as a grid. A journal remembers every finished trial."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from laser.errors import RecordError
from laser.evaluation.objective import Measure, Objective
from laser.journal import Journal
from laser.plan import PlanLine
from laser.records import SPARSE, under
from laser.searching.candidates import Candidate
from laser.searching.trials import Bench, RuleAndRank, Variant, VariantResult, accepted, change
from laser.spectral.rules import scale_in

# The journal's lines: the untouched model, the order of a shortlist, a trial, what is reported at the end.
VALUES = tuple[float | None, ...]
FINITE_OR_NONE: Any = float | None
TRIAL: dict[str, Any] = {
    "entry": str,
    "label": str,
    "rule": str,
    "ranks": Mapping[str, int],
    "d": FINITE_OR_NONE,
    "se": FINITE_OR_NONE,
}
TRIAL_SHAPES: tuple[dict[str, Any], ...] = (
    {"entry": str, "values": VALUES},
    {"entry": str, "labels": tuple[str, ...], "predicted": tuple[FINITE_OR_NONE, ...]},
    TRIAL | {"accepted": bool, "layer_forwards": int, "seconds": float, "values": VALUES},
    {"report": str, "values": VALUES},
)


@dataclass(frozen=True)
class Trial:
    """One measured edit; d and se in the objective's unit, None where a value was not finite."""

    label: str
    rule: str
    ranks: Mapping[str, int]
    alone: bool  # a grid's cell against the untouched model; otherwise on top of what was kept before
    d: float | None
    se: float | None
    accepted: bool
    predicted: float | None
    layer_forwards: int  # decoder layers times windows that this trial ran
    seconds: float
    # Units after which a race had ended for it; None: it was measured on all.
    raced: int | None = field(default=None, metadata=SPARSE)

    def wrong(self) -> str | None:
        return under(self, 0, "se", "raced")

    def made(self, line: PlanLine | None) -> bool:
        """Whether a plan's line is this edit."""
        if line is None or (line.rank or 0) != self.ranks.get(line.name):
            return False
        return line.scale == scale_in(self.rule)

    def stated(self) -> str:
        if self.d is None:
            return f"{self.rule}: not finite"
        raced = "" if self.raced is None else f" after {self.raced} units"
        return f"{self.rule}: {self.d:+.5f}" + ("" if self.se is None else f" ± {self.se:.5f}") + raced


class SearchLog:
    """The journal, read from the front while it lasts and written behind that. Without a path nothing is kept.

    Trials build on one another and come in their order. What is reported at the end, on one held-out text or another,
    changes none of them and is found by its name.
    """

    def __init__(self, path: Path | None, run: dict[str, Any], anew: bool = False) -> None:
        self.anew = anew
        self.journal = Journal(path, run, shapes=TRIAL_SHAPES, anew=anew) if path else None
        self._old = iter([entry for entry in self._entries() if "report" not in entry])
        self._reports = self._found_reports()

    def _entries(self) -> tuple[dict[str, Any], ...]:
        return tuple(self.journal.entries) if self.journal else ()

    def _found_reports(self) -> dict[str, Any]:
        return {entry["report"]: entry["values"] for entry in self._entries() if "report" in entry}

    def entry(self, what: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The finished entry that `what` identifies, or the one that `measure` gives now."""
        old = next(self._old, None)
        if old is not None:
            different = [key for key, value in what.items() if old.get(key) != value]
            if different and self.anew and self.journal:
                self._old = iter(())
                self.journal.forget(from_=old)
                self._reports = self._found_reports()  # without those of the edits that are forgotten
                return self.entry(what, measure)
            if different:
                path = self.journal.path if self.journal else ""
                raise RecordError(
                    f"{path}: found an entry of {old.get('entry')} {old.get('label', '')}, expected {what['entry']} "
                    f"{what.get('label', '')} ({', '.join(different)} differ); start afresh with --force"
                )
            return old
        new = what | measure()
        if self.journal:
            self.journal.append(new)
        return new

    def has(self, report: str) -> bool:
        """Whether this was reported before."""
        return report in self._reports

    def report(self, name: str, values: list[float]) -> None:
        """Write down what is reported under this name, unless it was before."""
        if name not in self._reports:
            self._reports[name] = to_numbers(values)
            if self.journal:
                self.journal.append({"report": name, "values": self._reports[name]})

    def reported(self, name: str, objective: Objective) -> list[float]:
        """The values reported under this name, one per unit of `objective`."""
        return from_numbers(self._reports[name], objective)

    def close(self) -> None:
        if self.journal:
            self.journal.close()


def to_numbers(values: Sequence[float]) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values]  # strict JSON has no NaN


def from_numbers(values: Sequence[float | None], objective: Objective, raced: int | None = None) -> list[float]:
    """Raises RecordError where they are not one per unit of `objective`, or of its first `raced` ones."""
    if len(values) not in (len(objective.weights), raced):
        raise RecordError(
            f"the journal of the search holds {len(values)} values of {objective.text}, expected "
            f"{len(objective.weights)}; start afresh with --force"
        )
    return [math.nan if v is None else v for v in values]


# What has been kept, in order: a candidate's label and its option. Every state of a search has a name of this kind.
State = tuple[tuple[str, int], ...]
FIRST_AHEAD = 15  # edits that the first walk tries: as many as LaserRMT does
QUARTER, LOST = 4, 2.5  # a race: after this share of the units, who is worse by so many standard errors is out


class Runner:
    """The two ways to go through candidates; collects the trials.

    The decisions are those of trying one candidate after the other, each on top of what was kept before. What is
    measured is more at a time: a walk over the layers takes a candidate together with those behind it, on top of what
    will have been kept by then if each is decided as guessed. A result counts only where that came true; otherwise the
    next walk measures from there on, and knows better what to guess. So the bits are those of one at a time. How many
    are taken together, see `_ahead`, decides how often layers are read, and no result.
    """

    def __init__(
        self,
        bench: Bench,
        objective: Objective,
        accept: str,
        log: SearchLog,
        tick: Callable[[Trial, int], None],
        heat: Bench | None = None,
    ) -> None:
        self.bench, self.objective, self.accept, self.heat = bench, objective, accept, heat
        self.raced = None if heat is None else len(objective.weights) // QUARTER
        self.log, self.tick = log, tick
        self.trials: list[Trial] = []
        self.to_come = 0
        self.measured: dict[State, VariantResult] = {}
        self.kept: dict[str, Trial] = {}
        self.state: State = ()
        self._said: dict[str, int | None] = {}  # each candidate's option by its latest results, on whichever state
        self._guessed: dict[str, int | None] = {}  # what the walk that measured it last took for granted
        self._right, self._wrong = 0, 0  # guesses

    def baseline(
        self, candidates: Sequence[Candidate], alone: bool = False, along: Measure | None = None
    ) -> tuple[list[float], list[float] | None]:
        """The values of the untouched model, and those of `along`; its walk measures the first candidates as well."""
        others: list[float] | None = None

        def measure() -> dict[str, Any]:
            nonlocal others
            others = self._measure_ahead(candidates, 0, alone, along)
            return {"values": to_numbers(self.measured[()].values)}

        entry = self.log.entry({"entry": "baseline"}, measure)
        values = from_numbers(entry.get("values", ()), self.objective)
        self.measured.setdefault((), VariantResult(values, 0, 0.0))
        if along and others is None:
            others = self.bench.walk((), along=along).along
        return values, others

    @property
    def now(self) -> list[float]:
        """The values of what is kept."""
        return self.measured[self.state].values

    def try_option(self, candidates: Sequence[Candidate], at: int, option: int, *, alone: bool = False) -> Trial:
        """The trial of candidate number `at`; those behind it are the ones that may be measured with it."""
        candidate = candidates[at]
        rule, ranks = candidate.options[option]
        what = {"entry": "alone" if alone else "trial", "label": candidate.label, "rule": rule, "ranks": dict(ranks)}
        state = (*self.state, (name_of(candidate), option))

        def measure() -> dict[str, Any]:
            if state not in self.measured:
                self._measure_ahead(candidates, at, alone)
            found = self.measured[state]
            d, se = change(self.objective, self.now, found.values)
            return {
                "d": d if math.isfinite(d) else None,
                "se": se,
                "accepted": accepted(self.accept, d, se),
                "layer_forwards": found.layer_forwards,
                "seconds": found.seconds,
                "values": to_numbers(found.values),
            }

        entry = self.log.entry(what, measure)
        values = from_numbers(entry["values"], self.objective, self.raced)
        self.measured[state] = VariantResult(values, entry["layer_forwards"], entry["seconds"])
        d, se = change(self.objective, self.now, values)  # by the values, also where the journal has them
        trial = Trial(
            candidate.label,
            rule,
            ranks,
            alone,
            d if math.isfinite(d) else None,
            se,
            accepted(self.accept, d, se),
            candidate.predicted if option == 0 else None,
            entry["layer_forwards"],
            entry["seconds"],
            None if len(values) == len(self.objective.weights) else len(values),
        )
        self.trials.append(trial)
        self.to_come -= 1
        self.tick(trial, self.to_come)
        return trial

    def one_by_one(self, candidates: Sequence[Candidate]) -> None:
        """Try each option of each candidate and keep the best accepted one, on top of what was kept before.

        A candidate whose matrices were kept in another candidate is passed over.
        """
        self.to_come = sum(len(c.options) for c in candidates)
        for at, candidate in enumerate(candidates):
            if self._is_cut(candidate, self.kept):
                self.to_come -= len(candidate.options)
                continue
            tried = [self.try_option(candidates, at, option) for option in range(len(candidate.options))]
            best = self._best([(trial.accepted, trial.d) for trial in tried])
            self._said[name_of(candidate)] = best
            if name_of(candidate) in self._guessed:
                right = self._guessed[name_of(candidate)] == best
                self._right, self._wrong = self._right + right, self._wrong + (not right)
            if best is not None:
                self._keep(candidate, best, tried[best])

    def grid(self, candidates: Sequence[Candidate]) -> None:
        """Each cell alone; then the accepted ones, best first, each kept if it is still accepted on top of the rest."""
        self.to_come = 2 * len(candidates)
        alone = [self.try_option(candidates, at, 0, alone=True) for at in range(len(candidates))]
        promising = [pair for pair in zip(alone, candidates, strict=True) if pair[0].accepted]
        self.one_by_one([candidate for _, candidate in sorted(promising, key=lambda pair: pair[0].d or 0.0)])

    def _keep(self, candidate: Candidate, option: int, trial: Trial) -> None:
        rule, ranks = candidate.options[option]
        variant = {name: (rule, rank) for name, rank in ranks.items()}
        self.bench.keep(variant)
        if self.heat:
            self.heat.kept(variant)
        self.kept |= dict.fromkeys(ranks, trial)
        # The states before this one are done with, and what was measured on top of them.
        self.state = (*self.state, (name_of(candidate), option))
        self.measured = {s: m for s, m in self.measured.items() if s[: len(self.state)] == self.state}

    # --- ahead ----------------------------------------------------------------------------------------------------

    def _measure_ahead(
        self, candidates: Sequence[Candidate], at: int, alone: bool, along: Measure | None = None
    ) -> list[float] | None:
        """One walk for candidate number `at` and as many behind it as are worth it, see `_ahead`.

        along: another objective, measured on what is kept in the same walk; returns its values, None where the memory
        for it is wanted by variants.
        """
        room, states, variants = self.bench.room(), list[State](), list[Variant]()
        if along and (beside := self.bench.as_many_as(along)) < room:
            room -= beside
        else:
            along = None
        state, on_top, kept = self.state, dict[str, RuleAndRank](), dict[str, Any](self.kept)
        for candidate in itertools.islice(candidates, at, at + self._ahead(candidates, at)):
            if len(states) >= room:
                break
            if not alone and self._is_cut(candidate, kept):
                continue
            for option, (rule, ranks) in enumerate(candidate.options):
                tried = (*state, (name_of(candidate), option))
                if tried not in self.measured:
                    states.append(tried)
                    variants.append(on_top | {name: (rule, rank) for name, rank in ranks.items()})
            guess = None if alone else self._guess(candidate)
            if not alone:
                self._guessed[name_of(candidate)] = guess
            if guess is not None:
                state = (*state, (name_of(candidate), guess))
                rule, ranks = candidate.options[guess]
                on_top |= {name: (rule, rank) for name, rank in ranks.items()}
                kept |= dict.fromkeys(ranks)
        base = self.state not in self.measured
        found, others = (self._race if self.heat else self._walk)(states[:room], variants[:room], base, along)
        self.measured |= found
        self._hear(found)
        return others

    def _walk(
        self,
        states: Sequence[State],
        variants: Sequence[Variant],
        base: bool,
        along: Measure | None,
        bench: Bench | None = None,
    ) -> tuple[dict[State, VariantResult], list[float] | None]:
        """The variants of these states, each on top of what is kept, and with `base` what is kept itself."""
        found, own, others = (bench or self.bench).walk(variants, base, along)
        return dict(zip(states, found, strict=True)) | ({} if own is None else {self.state: own}), others

    def _race(
        self, states: Sequence[State], variants: Sequence[Variant], base: bool, along: Measure | None
    ) -> tuple[dict[State, VariantResult], list[float] | None]:
        """The same in two walks. The second, over the other units, is for those that the first has not shown worse
        by LOST standard errors, each against the state that it is tried on. What has lost keeps its few values."""
        found, _ = self._walk(states, variants, base, None, self.heat)
        lost, on = set[State](), list[int]()
        for number, state in enumerate(states):
            before = found.get(state[:-1]) or self.measured[state[:-1]]
            d, se = change(self.objective, before.values, found[state].values)
            if state[:-1] in lost or not math.isfinite(d) or (se is not None and d > LOST * se):
                lost.add(state)
            else:
                on.append(number)
        if not on and not base:
            return found, None
        rest, others = self._walk([states[number] for number in on], [variants[number] for number in on], base, along)
        for state, more in rest.items():
            first = found[state]
            forwards, seconds = first.layer_forwards + more.layer_forwards, first.seconds + more.seconds
            found[state] = VariantResult([*first.values, *more.values], forwards, round(seconds, 3))
        return found, others

    def _ahead(self, candidates: Sequence[Candidate], at: int) -> int:
        """As many candidates as a walk should take at the most.

        Where it reads no layer, one: nothing is saved then, and a wrong guess costs what was measured behind it.
        """
        if at >= len(candidates):
            return 0
        if self.bench.model.in_memory(max(candidates[at].piece, 1)):  # and so are all above it
            return 1
        options = len(candidates[at].options)
        return best_together(self._right + self._wrong, self._wrong, self.bench.reading_to_running, options)

    def _guess(self, candidate: Candidate) -> int | None:
        """The option that will be kept, None for none: what its latest results say, measured on another state. Without
        any: `no-worse` keeps most of what it is shown, the other two keep little."""
        return self._said.get(name_of(candidate), 0 if self.accept == "no-worse" else None)

    def _hear(self, news: Mapping[State, VariantResult]) -> None:
        """What a walk's results say of each candidate, if the state they were measured on were the one that counts."""
        options: dict[tuple[State, str], dict[int, VariantResult]] = {}
        for state, found in news.items():
            if state:
                options.setdefault((state[:-1], state[-1][0]), {})[state[-1][1]] = found
        for (state, name), measured in options.items():
            if state in self.measured:
                verdicts = [change(self.objective, self.measured[state].values, measured[o].values) for o in measured]
                best = self._best([(accepted(self.accept, d, se), d) for d, se in verdicts])
                self._said[name] = None if best is None else list(measured)[best]

    @staticmethod
    def _best(verdicts: Sequence[tuple[bool, float | None]]) -> int | None:
        """Which of (accepted, d) is the lowest accepted one; the first of equals."""
        found = [number for number, (good, _) in enumerate(verdicts) if good]
        return min(found, key=lambda number: verdicts[number][1] or 0.0, default=None)

    @staticmethod
    def _is_cut(candidate: Candidate, kept: Mapping[str, Any]) -> bool:
        return any(kept.keys() & ranks.keys() for _, ranks in candidate.options)


def name_of(candidate: Candidate) -> str:
    """Tells a candidate from every other: cells of a grid have one label for several rules."""
    return f"{candidate.label} {candidate.options[0][0]}"


def best_together(decided: int, wrong: int, reading_to_running: Callable[[], float], options: int = 1) -> int:
    """How many candidates of so many options a walk should take; `decided` were, of these `wrong` against the guess.

    While every guess was right, as many as were decided so far: the number doubles, and what one wrong guess makes vain
    stays below what counts. Then let reading a layer take c times as long as running a variant through it, and R
    guesses in a row be right. With W at a time reading is c / W a candidate. Half of them are measured in vain where a
    guess is wrong, and as most lie in the edit's own layer, run again whole: W / 2R. The sum is least at
    W = sqrt(2 c R).
    """
    if not wrong:
        return max(FIRST_AHEAD // options, decided, 1)
    return max(1, round(math.sqrt(2 * reading_to_running() / options * decided / wrong)))
