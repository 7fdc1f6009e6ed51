"""How tools merge an adapter into stored weights: formulas by name, and which updates each of them allows.

One more is known that no X alone undoes: `twice`, R(R(W + X1) + X2), two adapters merged one after the other. Of their
sum X every bit says something, as it lies within half a step more on either side; `merge` gives R(W + X), a step off in
three of ten entries.

With W the base's stored weights, X = s B A the update, R rounding to the storage format:

    once          R(W + X)             the sum in a wider format, cast once: mergekit, most scripts, and PEFT where A
                                       and B are in float32, as it keeps them unless told otherwise
    delta-first   R(W + R(X))          the update is cast before it is added: PEFT where A and B are in 16 bits, and
                                       always for embeddings and for parameters of experts
    scaled-after  R(W + R(s R(X / s))) the product is cast, then scaled: an adapter that is itself in 16 bits; for s a
                                       power of two that is delta-first

`merge` computes a formula, with elementwise operations alone: the same bits on every device. `cell` inverts it: every
formula is monotone in each entry of X, so the entries that give the stored bits lie in an interval. Where base and
tuned are of different formats the base may have been cast first, as a model is that is loaded in another format.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from laser.differences.formats import Cell, Float, cell_of, format_of, same_bits
from laser.errors import UsageError

FORMULA_NAMES = ("once", "delta-first", "scaled-after")
TWICE = "twice"


@dataclass(frozen=True)
class Formula:
    """One row of the table above. scale: s, which only scaled-after uses; cast: W to the stored format first."""

    name: str
    scale: float = 1.0
    cast: bool = False

    def __post_init__(self) -> None:
        if self.name not in (*FORMULA_NAMES, TWICE):
            raise UsageError(f"no formula is called {self.name!r}; try one of {', '.join(FORMULA_NAMES)}")
        if not (0 < self.scale < float("inf")):
            raise UsageError(f"formula {self.name} with scale {self.scale:g}, expected a positive number")

    def start(self, W: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """W as the update is added to it."""
        return W.to(dtype) if self.cast else W

    def merge(self, W: torch.Tensor, X: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What W (m, n) of any format becomes by the update X (m, n), float64, stored as `dtype`."""
        wide = format_of(dtype).wide
        if self.name == "scaled-after":
            product = (X / self.scale).to(wide).to(dtype).to(wide)
            X = (product * self.scale).to(dtype).to(wide)
        elif self.name == "delta-first":
            X = X.to(wide).to(dtype).to(wide)
        return (self.start(W, dtype).to(wide) + X.to(wide)).to(dtype)

    def explains(self, W: torch.Tensor, X: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """Which stored q (m, n) the update X makes, or may have made, where it was rounded twice."""
        if self.name != TWICE:
            return same_bits(self.merge(W, X, q.dtype), q)
        low, high = self.cell(W, q)
        return (low <= X) & (X <= high)

    def cell(self, W: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The interval [low, high] (float64, (m, n)) of updates X that make the stored q of W.

        Where a formula cannot reach q at all, as where W + R(X) cancels to fewer digits than X has, it is the
        interval of the sum alone: that entry will stay wrong, and should not pull at the others.
        """
        known, x = format_of(q.dtype), self.start(W, q.dtype).double()
        sums = cell_of(q)
        plain = Cell(sums.low - x, sums.high - x, sums.closed)
        if self.name == TWICE:
            more = known.spacing(torch.maximum(q.double().abs(), x.abs())) / 2  # of what was rounded first
            return plain.low - more, plain.high + more
        if self.name == "once":
            return plain.low, plain.high
        reach = _rounding_into(plain, known)
        if self.name == "scaled-after":
            reach = _rounding_into(Cell(reach.low / self.scale, reach.high / self.scale, reach.closed), known)
            reach = Cell(reach.low * self.scale, reach.high * self.scale, reach.closed)
        nowhere = ~(reach.low <= reach.high)
        return torch.where(nowhere, plain.low, reach.low), torch.where(nowhere, plain.high, reach.high)


def _rounding_into(cell: Cell, known: Float) -> Cell:
    """All x for which R(x) lies in `cell`; low > high where no number of the format does."""
    low, high = known.up(cell.low), known.down(cell.high)
    open_ends = ~cell.closed
    low = torch.where(open_ends & (low == cell.low), _next(low, known), low)
    high = torch.where(open_ends & (high == cell.high), -_next(-high, known), high)
    empty = ~(low <= high)
    first, last = -_half_up(-low, known), _half_up(high, known)
    # Whether the ends belong to it differs from end to end; a solver stays inside anyway.
    closed = torch.zeros_like(cell.closed)
    nan = torch.full_like(low, float("nan"))
    return Cell(torch.where(empty, nan, first), torch.where(empty, nan, last), closed)


def _next(x: torch.Tensor, known: Float) -> torch.Tensor:
    """The next number of the format above x, a number of it, in float64."""
    return x + _gap_above(x, known)


def _half_up(x: torch.Tensor, known: Float) -> torch.Tensor:
    """The middle between x, a number of the format, and the next above it."""
    return x + _gap_above(x, known) / 2


def _gap_above(x: torch.Tensor, known: Float) -> torch.Tensor:
    """From x, a number of the format in float64, to the next above: of a negative power of two half its own step."""
    step = known.spacing(x)
    inner = known.spacing(x + step / 2)  # a little nearer to 0, for a negative x
    return torch.where(x < 0, inner, step)
