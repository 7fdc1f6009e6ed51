"""Before and after, side by side with their errors, and a plain word for each line: better, worse, or not known.

A difference counts when it is larger than one standard error, paired over the same windows or rows; the evaluation uses
the same measure. One standard error is a low bar: it is meant to bring harm to light, not to prove a gain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypedDict

from laser.evaluation.leaderboard import Leaderboard, TaskScore, comparable, difference
from laser.evaluation.lm_tasks import TASKS

UNDECIDED = "no difference beyond one standard error"
NOT_PAIRED = "not measured on the same rows"
ALONE = "measured on one model only"


class Loss(TypedDict):
    """A loss, or a difference of two, in nats per token, with its standard error over windows."""

    nll: float
    se: float | None
    tokens: int
    windows: int
    text: str  # what was read, for people


class Losses(TypedDict):
    """The same text under both models; difference = result - source, paired by window."""

    source: Loss
    result: Loss
    difference: Loss


class Measured(Protocol):
    """A loss as the evaluation records it, for one model or as a difference of two."""

    @property
    def nll(self) -> float: ...
    @property
    def standard_error(self) -> float | None: ...
    @property
    def tokens(self) -> int: ...
    @property
    def windows(self) -> int: ...


def losses_of(source: Measured, result: Measured, difference: Measured, text: str) -> Losses:
    """The evaluation's records of two models on `text`, and their paired difference, as the card takes them."""

    def loss(of: Measured) -> Loss:
        return {"nll": of.nll, "se": of.standard_error, "tokens": of.tokens, "windows": of.windows, "text": text}

    return {"source": loss(source), "result": loss(result), "difference": loss(difference)}


@dataclass(frozen=True)
class Row:
    """One line of the first table, ready to print."""

    what: str
    before: str
    after: str
    change: str
    verdict: str

    @property
    def worse(self) -> bool:
        return self.verdict.startswith("worse")

    @property
    def better(self) -> bool:
        return self.verdict.startswith("better")

    @property
    def compared(self) -> bool:
        return self.verdict not in (NOT_PAIRED, ALONE)


def judge(change: float, se: float | None, *, lower_is_better: bool) -> str:
    """better, worse or undecided; where no error is known, the direction and that it proves nothing."""
    gain = -change if lower_is_better else change
    if change == 0:
        return "no difference"
    if se is None:
        return ("better" if gain > 0 else "worse") + ", by an unknown error (too few rows)"
    if abs(change) <= se:
        return UNDECIDED
    return "better" if gain > 0 else "worse"


def loss_rows(losses: Losses) -> list[Row]:
    """The loss, and the perplexity that follows from it."""
    before, after, change = losses["source"], losses["result"], losses["difference"]
    verdict = judge(change["nll"], change["se"], lower_is_better=True)
    of = f"{before['text']} ({before['tokens']} tokens in {before['windows']} windows)"
    loss = Row(
        f"loss on {of}, nats per token",
        _value(before["nll"], before["se"], 4),
        _value(after["nll"], after["se"], 4),
        _value(change["nll"], change["se"], 4, sign=True),
        verdict,
    )
    return [loss, Row(f"perplexity on {before['text']}", _perplexity(before), _perplexity(after), "", verdict)]


def leaderboard_rows(before: Leaderboard | None, after: Leaderboard | None) -> list[Row]:
    """A row per task that either was measured on, in percent, and their averages where the tasks are the same."""
    old = before.by_task if before else {}
    new = after.by_task if after else {}
    rows, steps = [], []
    for name, task in TASKS.items():
        a, b = old.get(name), new.get(name)
        if a is None and b is None:
            continue
        n = a.n if a and b is None else b.n if b else 0
        what = f"{task.title}, {task.metric}, {n} rows"
        change, verdict = "", ALONE
        if a and b and before and after:
            step = difference(a, b) if comparable(before, after) else None
            change, verdict = "", NOT_PAIRED
            if step:
                steps.append(step)
                change = _percent(step.mean, step.stderr, sign=True)
                verdict = judge(step.mean, step.stderr, lower_is_better=False)
        rows.append(Row(what, _score(a), _score(b), change, verdict))
    if before and after and old.keys() == new.keys() and len(old) > 1:
        change, verdict = "", NOT_PAIRED
        if len(steps) == len(old):
            errors = [s.stderr for s in steps if s.stderr is not None]
            mean = sum(s.mean for s in steps) / len(steps)
            se = math.hypot(*errors) / len(steps) if len(errors) == len(steps) else None
            change, verdict = _percent(mean, se, sign=True), judge(mean, se, lower_is_better=False)
        first = _percent(before.average, before.average_stderr)
        second = _percent(after.average, after.average_stderr)
        rows.append(Row(f"average of the {len(old)} tasks", first, second, change, verdict))
    return rows


def compare(losses: Losses | None, before: Leaderboard | None, after: Leaderboard | None) -> list[Row]:
    """Everything that was measured, loss first."""
    return (loss_rows(losses) if losses else []) + leaderboard_rows(before, after)


def _score(score: TaskScore | None) -> str:
    return _percent(score.value, score.stderr) if score else "not measured"


def _percent(value: float, se: float | None, *, sign: bool = False) -> str:
    return f"{_value(100 * value, None if se is None else 100 * se, 2, sign=sign)} %"


def _value(value: float, se: float | None, digits: int, *, sign: bool = False) -> str:
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text if se is None else f"{text} ± {se:.{digits}f}"


def _perplexity(loss: Mapping[str, float | None] | Loss) -> str:
    nll, se = loss["nll"], loss["se"]
    assert nll is not None
    if nll > 50:  # exp(50) = 5e21: not a number that anyone compares
        return "above 5e21"
    return _value(math.exp(nll), None if se is None else math.exp(nll) * se, 2)
