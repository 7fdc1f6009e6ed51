"""Perplexity, a record with its error bar, and the paired difference of two of them.

Losses are in nats per token. With n_w tokens scored in window w of W, l_w their mean loss and N = sum n_w:

    loss            sum n_w l_w / N
    standard error  sqrt(W/(W-1) sum (n_w (l_w - loss))^2) / N, that of a ratio over windows

Tokens of one window share their context and must not be counted as independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np

from laser.errors import NumericalError, UsageError, not_finite
from laser.evaluation.text import Windows
from laser.evaluation.verdict import LIBRARIES, Unlike, device_class, judge, unlike
from laser.records import Record, near_enough, under

MOST_TOKENS = 2**53  # tokens: whole numbers up to there are numbers of float64
ROUNDING = 1e-3  # how far under 0 arithmetic of few bits may take a loss


@dataclass(frozen=True)
class Perplexity(Record, kind="eval", version=2, made_by="laser eval MODEL -o FILE"):
    """How well one model predicts one text. `nll` and `losses` in nats per token; see `Windows` for the rest."""

    model: str
    identity: str  # of the checkpoint, see Checkpoint.identity
    text: str
    text_sha256: str
    windows_sha256: str  # of every token id and of what is scored
    mode: str
    window: int
    bos: bool
    dtype: str
    device: str
    nll: float
    standard_error: float | None  # None for a single window
    tokens: int
    windows: int
    bytes: int | None
    losses: tuple[float, ...]  # per window
    counts: tuple[int, ...]  # tokens scored per window
    asked: int | None  # windows that were asked for, None for all; a shorter text gave fewer
    versions: Mapping[str, str]  # of the libraries that computed
    weights: Mapping[str, str] = field(default_factory=dict)  # which they were, see Fingerprint.stated

    @property
    def perplexity(self) -> float:
        """exp(nll); infinity where a float cannot hold it."""
        return math.exp(self.nll) if self.nll < 709 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers; None where the tokenizer tells no positions."""
        return self.nll * self.tokens / math.log(2) / self.bytes if self.bytes else None

    def wrong(self) -> str | None:
        if low := under(self, 1, "window") or under(self, 0, "bytes", "asked"):
            return low
        alike = len(self.losses) == len(self.counts) > 0
        if not alike or not 1 <= min(self.counts) <= max(self.counts) <= MOST_TOKENS or min(self.losses) < -ROUNDING:
            return (
                f"it has {len(self.losses)} losses and {len(self.counts)} counts, expected as many of each, losses of "
                "0 or more, and every count 1 or more"
            )
        mean, error = weighted_mean(self.losses, self.counts)
        if not math.isfinite(mean) or not math.isfinite(error or 0.0):
            return "its losses have no finite mean"
        own = {"nll": mean, "standard_error": error, "windows": len(self.losses), "tokens": sum(self.counts)}
        for name, expected in own.items():
            if not near_enough(found := getattr(self, name), expected, 1e-12):
                return f"found {name} {found}, expected {expected} from its own windows: it was changed by hand"
        return None


@dataclass(frozen=True)
class Difference:
    """Loss of B minus loss of A on the same tokens, nats per token; negative means that B predicts better.

    unlike: what was not the same in the two evaluations and moves their numbers, as dtype and kind of device do.
    """

    nll: float
    standard_error: float | None
    tokens: int
    windows: int
    unlike: tuple[Unlike, ...] = ()

    @property
    def verdict(self) -> str:
        """better, worse, no difference beyond one standard error, or what was not like with like."""
        return judge(self.nll, self.standard_error, lower_is_better=True, units="windows", differences=self.unlike)


def weighted_mean(values: Sequence[float], weights: Sequence[int]) -> tuple[float, float | None]:
    """Mean of `values` (W,) weighted by `weights` (W,), and its standard error over windows (None for one window)."""
    v, n = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    total = float(n.sum())
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is said by who asked
        mean = float(n @ v) / total
        squares = float(np.sum((n * (v - mean)) ** 2))
    if len(v) < 2:
        return mean, None
    return mean, math.sqrt(len(v) / (len(v) - 1) * squares) / total


def paired_difference(
    before: Sequence[float], after: Sequence[float], weights: Sequence[int]
) -> tuple[float, float | None]:
    """Weighted mean of after - before (W,) and its standard error over windows."""
    change = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return weighted_mean(change.tolist(), weights)


def record_of_losses(
    windows: Windows,
    sums: Sequence[float],
    *,
    model: str,
    identity: str,
    weights: Mapping[str, str],
    dtype: str,
    device: str,
) -> Perplexity:
    """The record from the summed loss of each window (W,), nats. Raises NumericalError naming a non-finite window."""
    counts = tuple(w.scored for w in windows.windows)
    losses = tuple(float(s) / n for s, n in zip(sums, counts, strict=True))
    for number, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise NumericalError(
                f"{model}: the loss of window {number} of {len(losses)} of {windows.text} is {loss}; the weights or "
                f"activations overflow in {dtype}; {not_finite(dtype, '--dtype float32')}"
            )
    nll, error = weighted_mean(losses, counts)
    return Perplexity(
        model=model,
        identity=identity,
        weights=weights,
        text=windows.text,
        text_sha256=windows.text_sha256,
        windows_sha256=windows.sha256,
        mode=windows.mode,
        window=windows.length,
        bos=windows.bos,
        dtype=dtype,
        device=device,
        nll=nll,
        standard_error=error,
        tokens=sum(counts),
        windows=len(counts),
        bytes=windows.bytes,
        losses=losses,
        counts=counts,
        asked=windows.asked,
        versions={name: version(name) for name in LIBRARIES},
    )


SCORED = ("text_sha256", "window", "mode", "bos", "windows", "tokens", "windows_sha256")


def difference(a: Perplexity, b: Perplexity) -> Difference:
    """B minus A, paired window by window. Raises UsageError unless both scored the very same tokens."""
    require_same_tokens((a.model, asked_of(a)), (b.model, asked_of(b)))
    nll, error = paired_difference(a.losses, b.losses, a.counts)
    return Difference(nll, error, a.tokens, a.windows, unlike(_circumstances(a), _circumstances(b)))


def asked_of(what: Perplexity | Windows) -> dict[str, Any]:
    """Which tokens a record was measured on, or windows ask for."""
    if isinstance(what, Perplexity):
        return {key: getattr(what, key) for key in SCORED}
    known = (what.text_sha256, what.length, what.mode, what.bos, len(what.windows), what.tokens, what.sha256)
    return dict(zip(SCORED, known, strict=True))


def require_same_tokens(a: tuple[str, Mapping[str, Any]], b: tuple[str, Mapping[str, Any]]) -> None:
    """Raises UsageError unless two models, each with what `asked_of` says, are scored on the very same tokens."""
    for what, expected in a[1].items():
        if (found := b[1][what]) != expected:
            raise UsageError(
                f"{a[0]} and {b[0]} are not measured on the same tokens: {what} is {found}, expected {expected}; "
                "evaluate both with the same text, window and tokenizer"
            )


def _circumstances(of: Perplexity) -> dict[str, Any]:
    """What moves a loss without changing what is scored."""
    return {"dtype": of.dtype, "device": device_class(of.device), **of.versions}
