"""Before and after, side by side with their errors, and a verdict on each line: better, worse, not known, or not like
with like. The words are those of `laser.evaluation.verdict`, as everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NotRequired, Protocol, TypedDict

from laser.evaluation.leaderboard import Leaderboard, TaskScore, average, circumstances, comparable, task_difference
from laser.evaluation.lm_tasks import TASKS
from laser.evaluation.verdict import Direction, Unlike, direction, judge

NOT_PAIRED = "not measured on the same rows"
ALONE = "measured on one model only"


class LossDocument(TypedDict):
    """A loss, or a difference of two, in nats per token, with its standard error over windows."""

    nll: float
    se: float | None
    tokens: int
    windows: int
    text: str  # what was read, for people


class Losses(TypedDict):
    """The same text under both models; difference = result - source, paired by window. unlike: what was not the same
    in the two evaluations."""

    source: LossDocument
    result: LossDocument
    difference: LossDocument
    unlike: NotRequired[tuple[Unlike, ...]]


class Comparable(Protocol):
    """A loss as the evaluation records it, for one model or as a difference of two."""

    @property
    def nll(self) -> float: ...
    @property
    def standard_error(self) -> float | None: ...
    @property
    def tokens(self) -> int: ...
    @property
    def windows(self) -> int: ...


def losses_of(
    source: Comparable, result: Comparable, difference: Comparable, text: str, unlike: tuple[Unlike, ...] = ()
) -> Losses:
    """The evaluation's records of two models on `text`, and their paired difference, as the card takes them."""

    def loss(of: Comparable) -> LossDocument:
        return {"nll": of.nll, "se": of.standard_error, "tokens": of.tokens, "windows": of.windows, "text": text}

    losses: Losses = {"source": loss(source), "result": loss(result), "difference": loss(difference)}
    if unlike:
        losses["unlike"] = unlike
    return losses


@dataclass(frozen=True)
class ComparisonRow:
    """One line of the first table, ready to print."""

    what: str
    before: str
    after: str
    change: str
    verdict: str
    direction: Direction
    unlike: tuple[Unlike, ...] = ()


def loss_rows(losses: Losses) -> list[ComparisonRow]:
    """The loss, and the perplexity that follows from it."""
    before, after, change = losses["source"], losses["result"], losses["difference"]
    unlike = losses.get("unlike", ())
    verdict = judge(change["nll"], change["se"], lower_is_better=True, units="windows", differences=unlike)
    way = direction(change["nll"], change["se"], lower_is_better=True, unlike=bool(unlike))
    of = f"{before['text']} ({before['tokens']} tokens in {before['windows']} windows)"
    loss = ComparisonRow(
        f"loss on {of}, nats per token",
        _value(before["nll"], before["se"], 4),
        _value(after["nll"], after["se"], 4),
        _value(change["nll"], change["se"], 4, sign=True),
        verdict,
        way,
        unlike,
    )
    perplexity = f"perplexity on {before['text']}"
    return [loss, ComparisonRow(perplexity, _perplexity(before), _perplexity(after), "", verdict, way, unlike)]


def leaderboard_rows(before: Leaderboard | None, after: Leaderboard | None) -> list[ComparisonRow]:
    """A row per task that either was measured on, in percent, and their averages where the tasks are the same."""
    old = before.by_task if before else {}
    new = after.by_task if after else {}
    unlike = circumstances(before, after) if before and after else ()
    paired = before is not None and after is not None and comparable(before, after)
    rows, steps = [], []
    for name, task in TASKS.items():
        a, b = old.get(name), new.get(name)
        if a is None and b is None:
            continue
        n = a.n if a and b is None else b.n if b else 0
        what = f"{task.title}, {task.metric}, {n} rows"
        step = task_difference(a, b, unlike) if a and b and paired else None
        if step:
            steps.append((step.mean, step.stderr))
            rows.append(_judged(what, _score(a), _score(b), step.mean, step.stderr, unlike))
        else:
            rows.append(
                ComparisonRow(what, _score(a), _score(b), "", NOT_PAIRED if a and b else ALONE, Direction.NOT_COMPARED)
            )
    if before and after and old.keys() == new.keys() and len(old) > 1:
        what = f"average of the {len(old)} tasks"
        first = _percent(before.average, before.average_stderr)
        second = _percent(after.average, after.average_stderr)
        if len(steps) == len(old):
            rows.append(_judged(what, first, second, *average(steps), unlike))
        else:
            rows.append(ComparisonRow(what, first, second, "", NOT_PAIRED, Direction.NOT_COMPARED))
    return rows


def _judged(what: str, a: str, b: str, change: float, se: float | None, unlike: tuple[Unlike, ...]) -> ComparisonRow:
    verdict = judge(change, se, lower_is_better=False, differences=unlike)
    way = direction(change, se, lower_is_better=False, unlike=bool(unlike))
    return ComparisonRow(what, a, b, _percent(change, se, sign=True), verdict, way, unlike)


def compare(losses: Losses | None, before: Leaderboard | None, after: Leaderboard | None) -> list[ComparisonRow]:
    """Everything that was measured, loss first."""
    return (loss_rows(losses) if losses else []) + leaderboard_rows(before, after)


def _score(score: TaskScore | None) -> str:
    return _percent(score.value, score.stderr) if score else "not measured"


def _percent(value: float, se: float | None, *, sign: bool = False) -> str:
    return f"{_value(100 * value, None if se is None else 100 * se, 2, sign=sign)} %"


def _value(value: float, se: float | None, digits: int, *, sign: bool = False) -> str:
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text if se is None else f"{text} ± {se:.{digits}f}"


def _perplexity(loss: Mapping[str, float | None] | LossDocument) -> str:
    nll, se = loss["nll"], loss["se"]
    assert nll is not None
    if nll > 50:  # exp(50) = 5e21: not a number that anyone compares
        return "above 5e21"
    return _value(math.exp(nll), None if se is None else math.exp(nll) * se, 2)
