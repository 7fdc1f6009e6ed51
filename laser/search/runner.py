"""Go through candidates, one at a time or as a grid. A journal remembers every finished trial."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laser.errors import RecordError
from laser.evaluation.objective import Objective
from laser.journal import Journal
from laser.moments import Moments
from laser.records import under
from laser.search.candidates import Candidate, cut_of
from laser.search.trials import Bench, accepted, change
from laser.spectral.devices import Device

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

    def wrong(self) -> str | None:
        return under(self, 0, "se")

    def stated(self) -> str:
        if self.d is None:
            return f"{self.rule}: not finite"
        return f"{self.rule}: {self.d:+.5f}" + ("" if self.se is None else f" ± {self.se:.5f}")


class SearchLog:
    """The journal, read from the front while it lasts and written behind that. Without a path nothing is kept.

    Trials build on one another and come in their order. What is reported at the end, on one held-out text or another,
    changes none of them and is found by its name.
    """

    def __init__(self, path: Path | None, run: dict[str, Any], anew: bool = False) -> None:
        self.anew = anew
        self.journal = Journal(path, run, shapes=TRIAL_SHAPES, anew=anew) if path else None
        entries = tuple(self.journal.entries) if self.journal else ()
        self._old = iter([entry for entry in entries if "report" not in entry])
        self._reports = {entry["report"]: entry["values"] for entry in entries if "report" in entry}

    def entry(self, what: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The finished entry that `what` identifies, or the one that `measure` gives now."""
        old = next(self._old, None)
        if old is not None:
            different = [key for key, value in what.items() if old.get(key) != value]
            if different and self.anew and self.journal:
                self._old = iter(())
                self.journal.forget(from_=old)
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

    def values(self, entry: str, objective: Objective, measure: Callable[[], list[float]]) -> list[float]:
        """What `measure` gives, one value per unit of `objective`."""
        found = self.entry({"entry": entry}, lambda: {"values": to_numbers(measure())}).get("values", ())
        return from_numbers(found, objective)

    def report(self, name: str, objective: Objective, measure: Callable[[], list[float]]) -> list[float]:
        """The values reported under this name, measured now if they never were."""
        if name not in self._reports:
            self._reports[name] = to_numbers(measure())
            if self.journal:
                self.journal.append({"report": name, "values": self._reports[name]})
        return from_numbers(self._reports[name], objective)

    def close(self) -> None:
        if self.journal:
            self.journal.close()


def to_numbers(values: Sequence[float]) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values]  # strict JSON has no NaN


def from_numbers(values: Sequence[float | None], objective: Objective) -> list[float]:
    """Raises RecordError where they are not one per unit of `objective`."""
    if len(values) != len(objective.weights):
        raise RecordError(
            f"the journal of the search holds {len(values)} values of {objective.text}, expected "
            f"{len(objective.weights)}; start afresh with --force"
        )
    return [math.nan if v is None else v for v in values]


class Runner:
    """The two ways to go through candidates; collects the trials."""

    def __init__(
        self,
        bench: Bench,
        objective: Objective,
        accept: str,
        device: Device,
        log: SearchLog,
        tick: Callable[[Trial, int], None],
        moments: Moments | None = None,
    ) -> None:
        self.bench, self.objective, self.accept, self.device = bench, objective, accept, device
        self.log, self.tick, self.moments = log, tick, moments
        self.trials: list[Trial] = []
        self.to_come = 0

    def try_option(
        self, candidate: Candidate, option: int, now: list[float], *, alone: bool = False
    ) -> tuple[Trial, list[float]]:
        rule, ranks = candidate.options[option]
        what = {"entry": "alone" if alone else "trial", "label": candidate.label, "rule": rule, "ranks": dict(ranks)}

        def measure() -> dict[str, Any]:
            start, before = time.perf_counter(), self.bench.model.layer_forwards
            values = self.bench.measure(self._cut(rule, ranks))
            d, se = change(self.objective, now, values)
            return {
                "d": d if math.isfinite(d) else None,
                "se": se,
                "accepted": accepted(self.accept, d, se),
                "layer_forwards": self.bench.model.layer_forwards - before,
                "seconds": round(time.perf_counter() - start, 3),
                "values": to_numbers(values),
            }

        entry = self.log.entry(what, measure)
        values = from_numbers(entry["values"], self.objective)
        d, se = change(self.objective, now, values)  # by the values, also where the journal has them
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
        )
        self.trials.append(trial)
        self.to_come -= 1
        self.tick(trial, self.to_come)
        return trial, values

    def _cut(self, rule: str, ranks: Mapping[str, int]) -> dict[str, torch.Tensor]:
        checkpoint = self.bench.model.checkpoint
        return cut_of(checkpoint, rule, ranks, self.device, self.moments)

    def keep(self, trial: Trial) -> None:
        self.bench.keep(self._cut(trial.rule, trial.ranks))

    def one_by_one(self, candidates: Sequence[Candidate], now: list[float]) -> tuple[dict[str, Trial], list[float]]:
        kept: dict[str, Trial] = {}
        self.to_come = sum(len(c.options) for c in candidates)
        for candidate in candidates:
            best: tuple[Trial, list[float]] | None = None
            for option in range(len(candidate.options)):
                trial, values = self.try_option(candidate, option, now)
                if trial.accepted and (best is None or (trial.d or 0.0) < (best[0].d or 0.0)):
                    best = trial, values
            if best:
                self.keep(best[0])
                kept |= dict.fromkeys(best[0].ranks, best[0])
                now = best[1]
        return kept, now

    def grid(self, candidates: Sequence[Candidate], now: list[float]) -> tuple[dict[str, Trial], list[float]]:
        """Each cell alone; then the accepted ones, best first, each kept if it is still accepted on top of the rest."""
        self.to_come = 2 * len(candidates)
        alone = [(self.try_option(c, 0, now, alone=True)[0], c) for c in candidates]
        promising = sorted((pair for pair in alone if pair[0].accepted), key=lambda pair: pair[0].d or 0.0)
        kept: dict[str, Trial] = {}
        self.to_come = len(promising)
        for _, candidate in promising:
            if kept.keys() & candidate.options[0][1].keys():  # this layer and role were cut at a better fraction
                self.to_come -= 1
                continue
            trial, values = self.try_option(candidate, 0, now)
            if trial.accepted:
                self.keep(trial)
                kept |= dict.fromkeys(trial.ranks, trial)
                now = values
        return kept, now
