"""Verdicts: what the difference of two measurements says. Eval, search, leaderboard and card use the same words.

A difference counts when it is larger than one standard error, paired over the same windows or rows. One standard error
is a low bar: it is meant to bring harm to light, not to prove a gain. Two measurements that were made in different
ways are not judged at all: what differed is named instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

UNDECIDED = "no difference beyond one standard error"
UNLIKE = "not like with like"
# The libraries that compute: another version of one may give other numbers for the same weights.
LIBRARIES = ("torch", "transformers")


@dataclass(frozen=True)
class Unlike:
    """One thing that moves a measurement and was not the same for the two that are compared."""

    what: str
    before: Any
    after: Any

    def __str__(self) -> str:
        before, after = ("unknown" if value is None else value for value in (self.before, self.after))
        return f"{self.what} {before} against {after}"


def unlike(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Unlike, ...]:
    """What differs between two descriptions of how something was measured; an absent entry is None."""
    names = dict.fromkeys([*before, *after])
    return tuple(Unlike(n, before.get(n), after.get(n)) for n in names if before.get(n) != after.get(n))


def device_class(device: str) -> str:
    """The kind of a device without its number: all cards of a machine compute alike."""
    return device.partition(":")[0]


class Direction(StrEnum):
    """What programs go by; the words of a verdict are for people."""

    BETTER = "better"
    WORSE = "worse"
    SAME = "same"  # or the difference is within its error
    NOT_COMPARED = "not compared"  # not measured in the same way, or on one model only


def direction(change: float, se: float | None, *, lower_is_better: bool, unlike: bool = False) -> Direction:
    """Which way a change goes; `se` is None where its error is not known, and then any change has a direction."""
    if unlike:
        return Direction.NOT_COMPARED
    if change == 0 or (se is not None and abs(change) <= se):
        return Direction.SAME
    return Direction.BETTER if (change < 0) == lower_is_better else Direction.WORSE


def judge(
    change: float,
    se: float | None,
    *,
    lower_is_better: bool,
    units: str = "rows",
    differences: tuple[Unlike, ...] = (),
) -> str:
    """better, worse or undecided; where no error is known, the direction and that it proves nothing.

    se: standard error of `change`, None where a single one of the `units` was measured. differences: what was not the
    same in the two measurements; with any, no direction is stated.
    """
    if differences:
        return f"{UNLIKE}: {', '.join(map(str, differences))}"
    if se is not None and abs(change) <= se:
        return UNDECIDED
    if change == 0:
        return "no difference"
    word = direction(change, se, lower_is_better=lower_is_better)
    return word if se is not None else f"{word}, by an unknown error (too few {units})"
