"""What became of one tensor of a base: the same, scaled, of low rank beside the rounding, or changed in all directions.

With W of the base and q of the tuned one, D = q - W is exact in float64. If q = R(W + X) then D = X + N, where N is the
rounding, whose variances are known entry by entry (formats.py). Biwhitened, N's largest singular value lies at
sqrt(m) + sqrt(n), and what lies over that edge is X's. Beyond that rank r the squares should sum to the rounding's
(m - r)(n - r): to about as much for an X of low rank, to more where X has further directions. They sum to less where
X is so small that most entries did not move: then the law of the noise fails, the edge is no more than a hint, and the
bits alone decide (solver.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
import torch

from laser.differences.formats import STORED_FLOATS, cell_of, format_of, same_bits
from laser.differences.whitening import Scales, biwhiten
from laser.errors import NumericalError
from laser.records import SPARSE
from laser.spectral.devices import Device, in_float64, on_device_or_host
from laser.spectral.rules import apply_rule, energy_share
from laser.spectral.unit import Spectrum

RULE = "rounding"
SIGMA = 1.0  # of the rounding in a biwhitened difference
# Of the squares beyond the rank to the rounding's. Simulated and trained LoRAs lie within 0.98 and 1.08 where entries
# move, full fine-tunes at 2 to 6 (docs/log).
FAINT, FULL = 0.9, 1.2
MOST_TOLD = 1 / 4  # of the smaller side: a rank over that is none of an adapter's
MOVED = 0.7  # share of moved entries over which the rounding is uniform on its cells, and the law of its sum holds
PROVEN = 4.0  # moved entries per unknown, see `evidence`
SCALE_SAMPLE = 1024  # entries that are asked first for a common scale
# The error of a grid with even steps is uniform: its kurtosis is 1.8, and what was learnt on top adds a little. Grids
# of 3 to 6 bits, a scale per row or per 32 to 128 entries, give 1.8 to 2.1; noise and full fine-tunes 2.8 and more.
GRID, COARSE = (1.6, 2.3), 5e-3
GRID_GROUP = 64  # entries: the scales of most grids hold for 32 to 128
AGREE = 0.7  # cosine between base and tuned under which nothing of the base is left; fine-tunes have over 0.98


class Verdict(StrEnum):
    """What became of a tensor. The first five hold for any shape, the next four for matrices."""

    SAME = "identical"
    CAST = "cast"  # identical but for the format
    SCALED = "scaled"
    CHANGED = "changed"  # no matrix, or of numbers whose rounding is not known
    NOT_FINITE = "not finite"
    LOW_RANK = "low rank"
    FULL = "full"
    FAINT = "faint"  # too few entries moved for the spectrum to tell
    OTHER = "unrelated"  # nothing of the base is left in it
    SHAPE = "other shape"
    MISSING = "missing"  # from the tuned one
    ADDED = "added"


@dataclass(frozen=True)
class Change:
    """What became of one tensor, and the evidence. None where it was not asked or does not apply.

    moved: share of the entries whose value differs
    share: ||D|| / ||W||; cosine: of W and q
    scale: c, where q is R(c W)
    rank: values over the edge; energy: their share of the squared biwhitened values
    rest: squares beyond the rank, over the expected (m - r)(n - r) of so many roundings
    roundings: how often the sum was rounded: 2 where two adapters were merged one after the other
    kurtosis: of D within groups of entries of a row, their median: 3 and more for what is learnt, see GRID
    """

    kind: Verdict
    moved: float | None = None
    share: float | None = None
    cosine: float | None = None
    scale: float | None = None
    rank: int | None = None
    energy: float | None = None
    rest: float | None = None
    kurtosis: float | None = field(default=None, metadata=SPARSE)
    roundings: int = field(default=1, metadata=SPARSE)


def compare_tensors(W: torch.Tensor, q: torch.Tensor) -> Change:
    """What the entries of W and q, of one shape, say without a factorisation; `changed` where they leave it open."""
    if W.dtype == q.dtype and W.dtype in _BITS and bool(same_bits(W, q).all()):
        return Change(Verdict.SAME, moved=0.0)
    if not (W.is_floating_point() and q.is_floating_point()):
        same = W.dtype == q.dtype and torch.equal(W, q)
        return Change(Verdict.SAME if same else Verdict.CHANGED, moved=None if not same else 0.0)
    w, x = W.double(), q.double()
    if not bool(torch.isfinite(w).all() and torch.isfinite(x).all()):
        return Change(Verdict.NOT_FINITE)
    moved = float((w != x).double().mean()) if w.numel() else 0.0
    if W.dtype == q.dtype and not moved:
        return Change(Verdict.SAME if torch.equal(w.signbit(), x.signbit()) else Verdict.CHANGED, moved=0.0, share=0.0)
    if W.dtype != q.dtype and torch.equal(W.to(q.dtype), q):
        return Change(Verdict.CAST, moved=moved)
    size, other, dot = float(w.norm()), float(x.norm()), float((w * x).sum())
    share = float((x - w).norm()) / size if size else None
    cosine = dot / size / other if size and other else None
    found = Change(Verdict.CHANGED, moved, share, cosine, kurtosis=kurtosis_of(x - w) if w.ndim == 2 else None)
    if cosine is not None and cosine > AGREE and q.dtype in _BITS and (scale := common_scale(w, q)) is not None:
        return Change(Verdict.SCALED, moved, share, cosine, scale)
    return found


def common_scale(w: torch.Tensor, q: torch.Tensor) -> float | None:
    """The c for which every stored q is c w rounded, w in float64; None where there is none.

    Each entry confines c to an interval, and c is the middle of what is common to all of them. A few entries nearly
    always show that there is nothing.
    """
    few, of = w.reshape(-1)[:SCALE_SAMPLE], q.reshape(-1)[:SCALE_SAMPLE]
    if w.numel() > SCALE_SAMPLE and bool(few.any()) and common_scale(few, of) is None:
        return None
    cell, there = cell_of(q), w != 0
    if not bool((q[~there] == 0).all()) or not bool(there.any()):
        return None
    one, other = cell.low[there] / w[there], cell.high[there] / w[there]
    low, high = float(torch.minimum(one, other).max()), float(torch.maximum(one, other).min())
    # The product may have been rounded to float32 before it was rounded to q's format.
    return (low + high) / 2 if low <= high * (1 + 2**-23) else None


_BITS = {known.dtype for known in STORED_FLOATS.values()}


def as_merged(W: torch.Tensor, q: torch.Tensor, device: Device) -> torch.Tensor:
    """W, or W cast to the format of q if that leaves less of the biwhitened difference.

    So it is where a model was loaded in another format before something was merged into it: its own rounding would
    stand beside that of the sum."""
    if W.dtype == q.dtype or W.dtype not in _BITS or q.dtype not in _BITS or q.ndim != 2 or not q.numel():
        return W
    cast = W.to(q.dtype)
    left = [float(whitened(each, q, device).norm()) for each in (cast, W)]
    return cast if left[0] < left[1] else W


def whitening(W: torch.Tensor, q: torch.Tensor, device: Device) -> tuple[Scales, torch.Tensor]:
    """The scales by which q - W (m, n) is biwhitened, and the result; float64, on the device if that has float64, else
    on the host.

    Its noise has sigma = 1. Raises UsageError for a format whose rounding is not known, NumericalError for NaN or Inf.
    """

    def compute(where: Device) -> tuple[Scales, torch.Tensor]:
        w, x = (t.to(where.torch_device) for t in (W, q))
        D = x.double() - w.double()
        if not bool(torch.isfinite(D).all()):
            raise NumericalError("base or tuned hold NaN or Inf; nothing can be said of their difference")
        scales = biwhiten(format_of(q.dtype).variance(x))
        return scales, scales.of(D)

    return on_device_or_host(compute, in_float64(device))


def whitened(W: torch.Tensor, q: torch.Tensor, device: Device) -> torch.Tensor:
    """The biwhitened difference q - W (m, n), as `whitening` has it."""
    return whitening(W, q, device)[1]


def judge_difference(found: Change, s: Spectrum, shape: tuple[int, int]) -> Change:
    """What `compare_tensors` left open, by the singular values `s` (p,) of the biwhitened difference."""
    if found.kind is not Verdict.CHANGED or not found.moved:  # signs of zeros alone are in no spectrum
        return found
    rank = apply_rule(RULE, s, shape, sigma=SIGMA).rank
    energy = energy_share(s, np.arange(len(s)) < rank) if s.any() else 0.0
    left = (shape[0] - rank) * (shape[1] - rank)
    rest = float(np.sum(s[rank:] ** 2)) / left if left else 0.0
    told = found.moved > MOVED or evidence(rank, shape, found.moved) >= PROVEN
    kind = Verdict.LOW_RANK
    if found.cosine is None or found.cosine < AGREE:
        kind = Verdict.OTHER
    elif rank > MOST_TOLD * len(s) or rest > FULL:
        return _twice(found, s, shape) or replace(found, kind=Verdict.FULL, rank=rank, energy=energy, rest=rest)
    elif rest < FAINT or not rank or not told:
        kind = Verdict.FAINT
    return replace(found, kind=kind, rank=rank, energy=energy, rest=rest)


def _twice(found: Change, s: Spectrum, shape: tuple[int, int]) -> Change | None:
    """Of low rank, if the rest is as much as two roundings leave; None if it is not. The entries have to prove it."""
    rank = apply_rule(RULE, s, shape, sigma=2**0.5).rank
    left = 2 * (shape[0] - rank) * (shape[1] - rank)
    rest = float(np.sum(s[rank:] ** 2)) / left if left else 0.0
    if not rank or rank > MOST_TOLD * len(s) or not FAINT < rest < FULL or (found.moved or 0) < MOVED:
        return None
    energy = energy_share(s, np.arange(len(s)) < rank)
    return replace(found, kind=Verdict.LOW_RANK, rank=rank, energy=energy, rest=rest, roundings=2)


def kurtosis_of(D: torch.Tensor) -> float | None:
    """Median over groups of entries of a row of mean d^4 / (mean d^2)^2; None where the rows are too short."""
    size = min(GRID_GROUP, D.shape[1])
    if size < GRID_GROUP // 4:
        return None
    groups = D[:, : D.shape[1] // size * size].reshape(-1, size)
    squares = (groups / groups.abs().amax(1, keepdim=True)) ** 2
    found = (squares**2).mean(1) / squares.mean(1) ** 2
    found = found[torch.isfinite(found)]
    return float(found.median()) if len(found) else None


def looks_quantised(change: Change) -> bool:
    """Whether the difference is as of a base that was quantised to a grid of up to 6 bits before it was tuned."""
    return (
        change.kind is Verdict.FULL
        and (change.share or 0) > COARSE
        and change.kurtosis is not None
        and GRID[0] < change.kurtosis < GRID[1]
    )


def evidence(rank: int, shape: tuple[int, int], moved: float) -> float:
    """Moved entries per unknown of an adapter of this rank; `moved` is their share.

    An entry that did not move needs no adapter, so the others are what it explains, and N unknowns meet 2 N conditions
    by chance (Cover 1965: the capacity of a linear threshold device).
    """
    m, n = shape
    return moved * m * n / (rank * (m + n - rank)) if rank else 0.0
