"""Which rank each weight gets: the same for all, or what a budget of bits buys where it takes most away."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BITS_STORED = 16  # of a stored number
BEYOND = 4  # times the rank that the budget gives to all alike: what is solved for each, so that some can get more


@dataclass(frozen=True)
class Offer:
    """One parameter. gains: (k,) what each further rank takes away, never rising; cost: bits of one rank."""

    gains: NDArray[np.float64]
    cost: int


def spend(offers: Mapping[str, Offer], bits: float) -> dict[str, int]:
    """The rank of each, so that the sum of gains is greatest for `bits` in all, up to the last rank that fits.

    Greedy by gain per bit, which is the optimum of the relaxed problem since gains do not rise.
    """
    ranks = dict.fromkeys(offers, 0)
    queue = [(-o.gains[0] / o.cost, name) for name, o in offers.items() if len(o.gains)]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        offer = offers[name]
        if offer.cost > bits:
            continue
        bits -= offer.cost
        ranks[name] += 1
        if ranks[name] < len(offer.gains):
            heapq.heappush(queue, (-offer.gains[ranks[name]] / offer.cost, name))
    return ranks


def even_rank(shapes: Mapping[str, tuple[int, int]], bits_per_weight: float) -> float:
    """The rank, not rounded, that spends so many bits per weight where all get the same."""
    weights = sum(m * n for m, n in shapes.values())
    return bits_per_weight * weights / (BITS_STORED * sum(m + n for m, n in shapes.values()))
