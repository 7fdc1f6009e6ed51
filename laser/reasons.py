"""Why a tensor is reduced, kept or skipped: a kind for programs, and a text for people."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What programs go by; the words of a reason may change, these are in files."""

    RULE = "rule"  # what the rule says of it
    NOT_A_MATRIX = "not a matrix"
    PROTECTED = "protected"  # its role or stack is kept unless asked for
    NOT_SELECTED = "not selected"
    NOT_SCANNED = "not scanned"
    FAILED = "failed"  # selected, and nothing could be measured: not finite, no scales, no method succeeded
    ALL_KEPT = "all kept"  # the rule removes nothing of it
    NOT_NOISE = "not noise"  # its bulk, at the level that was asked for
    NOT_LOWEST = "not lowest"  # not among the K of lowest signal-to-noise ratio
    UNSEEN = "unseen"  # by the calibration: it has seen fewer inputs than it has dimensions
    NOT_CALIBRATED = "not calibrated"
    NO_DIFFERENCE = "no difference"  # from the base, or none that could be scaled
    UNUSED = "unused"  # the model that is run does not use it
    ACCEPTED = "accepted"  # by a search
    REJECTED = "rejected"
    NOT_TRIED = "not tried"
    MEASURED = "measured"  # cut by its line, whose figures were others
    EMPTY = "empty plan"
    UNINDEXED = "unindexed"  # in a shard, but not in the index; of no line, in the coverage alone
    OTHER = "other"  # in the words of an earlier version, or of somebody who edited the plan


@dataclass(frozen=True, slots=True)
class Why:
    kind: Kind
    text: str

    def also(self, more: str) -> Why:
        """The same reason, and in its text what else there is to say, if anything."""
        return Why(self.kind, f"{self.text}; {more}") if more else self


# How the reasons of earlier versions begin, which had no kind: of plans up to version 2, and of spectra up to 2.
EARLIER = {
    "not a matrix: ": Kind.NOT_A_MATRIX,
    "not seen enough: ": Kind.UNSEEN,
    "skipped: ": Kind.FAILED,
    "not scanned": Kind.NOT_SCANNED,
    "not calibrated": Kind.NOT_CALIBRATED,
    "not included by the expression": Kind.NOT_SELECTED,
    "excluded by the expression": Kind.NOT_SELECTED,
    "the rule keeps all ": Kind.ALL_KEPT,
    "the bulk is not noise at level ": Kind.NOT_NOISE,
    "the model that transformers runs does not use it": Kind.UNUSED,
    "accepted, ": Kind.ACCEPTED,
    "rejected, ": Kind.REJECTED,
    "not tried: ": Kind.NOT_TRIED,
    "empty plan": Kind.EMPTY,
}
# And what else tells them, where they began with a name or a number.
EARLIER_INSIDE = {
    " is kept unless asked for": Kind.PROTECTED,
    " not selected": Kind.NOT_SELECTED,
    " lowest": Kind.NOT_LOWEST,
    "under the cut are 0: nothing to remove": Kind.ALL_KEPT,
    " by its line and not by the rule; figures as measured": Kind.MEASURED,
}
UNSEEN_BEFORE = "not seen enough: "


def earlier_reason(text: str, reduced: bool = False) -> Why:
    """A reason of an earlier version, which was a text alone. The only place where such a text is read."""
    begins = next((kind for start, kind in EARLIER.items() if text.startswith(start)), None)
    inside = next((kind for part, kind in EARLIER_INSIDE.items() if part in text), None)
    if reduced and begins is not Kind.ACCEPTED and inside is not Kind.MEASURED:
        return Why(Kind.RULE, text)
    return Why(begins or inside or Kind.OTHER, text)


def earlier_unseen(text: str) -> str:
    """What such a reason says of a matrix that saw too few inputs; "" for one that did not."""
    return text.rpartition(UNSEEN_BEFORE)[2] if UNSEEN_BEFORE in text else ""
