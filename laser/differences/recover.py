"""The rank and the formula of a merge, found by whether the stored bits come out.

The edge of the rounding (difference.py) is a lower bound of the rank: small directions hide under it. Too low a rank
leaves percents of the bits wrong, the right one next to none, and so does one that is too high. So the lowest rank that
gives the bits is the answer. All matrices of an adapter have one rank as a rule, so what is most common is tried early.

Bits prove something only where they are many (`evidence`): full fine-tunes so faint that few entries move are explained
by any adapter of some size. A rank is proven where its r (m + n - r) unknowns explain four times as many entries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

from laser.choices import ROUNDS
from laser.differences.difference import MOST_TOLD, PROVEN, Change, Verdict, evidence
from laser.differences.formats import format_of
from laser.differences.formulas import TWICE, Formula
from laser.differences.solver import Solution, polish, solve
from laser.spectral.devices import HOST, Device

# Share of wrong bits up to which a rank is believed. Of 16 bits: the right rank leaves 0 to 1e-4, one too few 1e-2 and
# more (docs/log). A product in float32 has errors of its own, near the size of float32's rounding, which no rank
# explains: the right rank leaves 1 to 20 % there, one too few nearly all.
BELIEVED = {torch.bfloat16: 2e-3, torch.float16: 2e-3, torch.float32: 0.5}
USUAL = (Formula("once"), Formula("delta-first"))


FLAT = 2.55
SURE = 8.0  # evidence that a rank needs whose sum was rounded twice: such cells say half as much
PLAUSIBLE = 1.0  # evidence that a rank needs which other matrices or the spectrum have proven


def is_believed(solution: Solution, dtype: torch.dtype) -> bool:
    """Whether so few bits are wrong that these are base and adapter."""
    return solution.share_wrong <= BELIEVED[dtype]


def is_rounded_twice(W: torch.Tensor, q: torch.Tensor, solution: Solution) -> bool:
    """Whether what X leaves of the difference is as of two roundings, and not of one and a change in all directions.

    The sum of two uniform errors has kurtosis 2.4; of one, and as much that is spread as a normal law, it is 2.7.
    """
    x, w = q.double(), W.double()
    left = (x - w - solution.adapter.rows(0, len(q))) / format_of(q.dtype).spacing(torch.maximum(x.abs(), w.abs()))
    squares = left**2
    return float((squares**2).mean() / squares.mean() ** 2) < FLAT


def vote(changes: Iterable[Change]) -> tuple[int | None, bool]:
    """The rank that most matrices of low rank have, which their spectra prove; else most of the faint ones, and False.

    None where there are neither. Of ranks that are equally common the higher: the edge may miss directions and invents
    next to none.
    """
    changes = list(changes)
    for kind in (Verdict.LOW_RANK, Verdict.FAINT):
        counts = Counter(c.rank for c in changes if c.kind is kind and c.rank)
        if counts:
            return max(counts, key=lambda rank: (counts[rank], rank)), kind is Verdict.LOW_RANK
    return None, False


def recover(
    W: torch.Tensor,
    q: torch.Tensor,
    change: Change,
    voted: int | None = None,
    proven: bool = False,
    formulas: tuple[Formula, ...] = USUAL,
    device: Device = HOST,
    rounds: int = ROUNDS,
    most: int | None = None,
) -> Solution | None:
    """Base W and tuned q (m, n), of one format or two, as base and adapter; None where that is not what they are.

    change: what difference.py says of them. voted: the rank of most others; proven: by their spectra. most: the
    highest rank to try. Of the formulas the one that leaves the fewest bits wrong is taken; if one leaves none, no
    other is tried.
    """
    shape, moved = (q.shape[0], q.shape[1]), change.moved or 0.0
    if change.rank is None:
        return None
    if change.roundings > 1:  # there the edge is that of the rounding as well, and wider cells tell less of a rank
        formulas, most = (Formula(TWICE),), change.rank + 1
    tried: dict[int, Solution] = {}

    def at(rank: int) -> Solution:
        if rank not in tried:
            found = None
            for formula in formulas:
                one = solve(W, q, rank, formula, device, rounds)
                found = one if found is None or one.wrong < found.wrong else found
                if not found.wrong:
                    break
            assert found is not None, "there is at least one formula"
            tried[rank] = found
        return tried[rank]

    def right(rank: int) -> bool:
        return is_believed(at(rank), q.dtype)

    least = max(change.rank, 1)
    least = least - 1 if voted == least - 1 else least
    for rank in _ranks_to_try(least, voted, change.kind is Verdict.FAINT):
        told = (rank == voted and proven) or change.kind is Verdict.LOW_RANK
        needed = SURE if change.roundings > 1 else PLAUSIBLE if told else PROVEN
        if rank > (MOST_TOLD * min(shape) if most is None else most) or evidence(rank, shape, moved) < needed:
            continue
        if right(rank):
            break
    else:
        return None
    low = max((r for r in tried if r < rank), default=least - 1)
    while rank - low > 1 and rank != voted:  # the lowest that gives the bits
        middle = (low + rank) // 2
        if right(middle):
            rank = middle
        else:
            low = middle
    while rank > 1 and rank != voted and right(rank - 1):  # pure noise passes the bare edge in one of five draws
        rank -= 1
    if change.roundings > 1 and not is_rounded_twice(W, q, tried[rank]):
        return None
    return polish(W, q, tried[rank], device)


def _ranks_to_try(least: int, voted: int | None, faint: bool) -> list[int]:
    """Ranks to try: the edge's, or first the others' where the edge sees little; and ever higher ones."""
    others = [voted] if voted is not None and voted >= least else []
    first = [*others, least] if faint else [least, *others]
    return list(dict.fromkeys([*first, *(least + 2**k for k in range(9))]))
