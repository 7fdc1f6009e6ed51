"""The rank and the formula of a merge, found by whether the stored bits come out.

The edge of the rounding (difference.py) is a lower bound of the rank: small directions hide under it. Too low a rank
leaves percents of the bits wrong, the right one next to none, and one that is too high none either. So the lowest rank
that gives the bits is the answer, and a matrix that no rank up to a quarter of its smaller side explains is no base
plus an adapter. All matrices of an adapter have one rank as a rule, so what is most common among them is tried early.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import torch

from laser.delta.difference import MOST, Change, Kind
from laser.delta.formulas import Formula
from laser.delta.solver import ROUNDS, Solution, solve
from laser.spectral.devices import HOST, Device

# Share of wrong bits up to which a rank is believed. Of 16 bits: the right rank leaves 0 to 1e-4, one too few 1e-2 and
# more (LOG.md). A product in float32 has errors of its own, of the size of float32's rounding, which no rank explains.
BELIEVED = {torch.bfloat16: 2e-3, torch.float16: 2e-3, torch.float32: 0.1}
USUAL = (Formula("once"), Formula("delta-first"))


def is_believed(solution: Solution, dtype: torch.dtype) -> bool:
    """Whether so few bits are wrong that these are base and adapter."""
    return solution.share_wrong <= BELIEVED[dtype]


def vote(changes: Iterable[Change]) -> int | None:
    """The rank that is most common among the matrices of low rank, else among the faint ones; None where there are none.

    Of ranks that are equally common the higher: the edge may miss directions and invents next to none.
    """
    changes = list(changes)
    for kind in (Kind.LOW_RANK, Kind.FAINT):
        counts = Counter(c.rank for c in changes if c.kind is kind and c.rank)
        if counts:
            return max(counts, key=lambda rank: (counts[rank], rank))
    return None


def recover(
    W: torch.Tensor,
    q: torch.Tensor,
    change: Change,
    voted: int | None = None,
    formulas: tuple[Formula, ...] = USUAL,
    device: Device = HOST,
    rounds: int = ROUNDS,
) -> Solution | None:
    """Base W and tuned q (m, n) of one format or two as base and adapter; None where they are not.

    change: what difference.py says of them, for the edge's rank. voted: the rank of other matrices. Of the formulas the
    one that leaves the fewest bits wrong is taken; if it leaves none, no other is tried.
    """
    most = int(MOST * min(q.shape))
    if change.rank is None or change.rank > most:
        return None
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

    least = max(change.rank, 1)
    order = _order(least, voted if change.kind is Kind.FAINT or change.rank == 0 else None, voted, most)
    for rank in order:
        if is_believed(at(rank), q.dtype):
            break
    else:
        return None
    low = max((r for r in tried if r < rank and not is_believed(tried[r], q.dtype)), default=least - 1)
    while rank - low > 1 and rank != voted:  # the lowest that gives the bits, unless others have this one, too
        middle = (low + rank) // 2
        if is_believed(at(middle), q.dtype):
            rank = middle
        else:
            low = middle
    return tried[rank]


def _order(least: int, first: int | None, then: int | None, most: int) -> Iterator[int]:
    """Ranks to try, up to `most`: those of others where they are not under the edge's, the edge's, and ever higher."""
    seen: set[int] = set()
    steps = [least + step for step in (0, 1, 2, 4, 8, 16, 32, 64, 128)]
    named = [*([first] if first else []), least, *([then] if then else []), *steps, most]
    for rank in named:
        if least <= rank <= most and rank not in seen:
            seen.add(rank)
            yield rank
