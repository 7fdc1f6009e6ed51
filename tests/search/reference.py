"""The search as it reads: one edit after the other, each a whole pass. The slow reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from laser.checkpoint.reader import Checkpoint
from laser.evaluation.objective import Objective
from laser.evaluation.streaming import LayeredModel
from laser.searching.candidates import Candidate, cut_of, in_order
from laser.searching.trials import accepted, change
from laser.spectral.devices import Device

Row = tuple[str, str, dict[str, int], bool, float | None, float | None, bool]  # as `rows` makes it of a trial
Edits = dict[str, torch.Tensor]


def naive_search(
    checkpoint: Checkpoint,
    candidates: Sequence[Candidate],
    objective: Objective,
    accept: str,
    order: str,
    device: Device,
    *,
    grid: bool = False,
    cut: Callable[..., Edits] = cut_of,
    moments: object = None,
    raced: int | None = None,
) -> tuple[list[Row], dict[str, int], list[float]]:
    """Every trial, the ranks that were kept, and the values with all of them in."""

    model = LayeredModel(checkpoint, resident=None)

    def measure(edits: Edits) -> list[float]:
        for name in {*model.edits, *edits}:
            model.edit(name, edits.get(name))
        return objective.values(model.losses(objective.windows))

    rows: list[Row] = []
    kept: Edits = {}
    ranks_kept: dict[str, int] = {}
    now = measure({})

    def trial(candidate: Candidate, option: int, alone: bool) -> tuple[float | None, bool, list[float], Edits]:
        rule, ranks = candidate.options[option]
        edits = cut(checkpoint, rule, ranks, device, moments)
        values = measure(kept | edits)
        if raced is not None:  # is it worse by 2.5 standard errors after so many units?
            d, se = change(objective, now, values[:raced])
            values = values[:raced] if not math.isfinite(d) or d > 2.5 * (se or 0.0) else values
        d, se = change(objective, now, values)
        good, stated = accepted(accept, d, se), d if d == d else None
        rows.append((candidate.label, rule, dict(ranks), alone, stated, se, good))
        return stated, good, values, edits

    queue = in_order(candidates, order)
    if grid:
        alone = [(trial(c, 0, True), c) for c in queue]
        queue = [c for _, c in sorted((pair for pair in alone if pair[0][1]), key=lambda pair: pair[0][0] or 0.0)]
    for candidate in queue:
        if kept.keys() & candidate.options[0][1].keys():
            continue
        tried = [(*trial(candidate, i, False), candidate.options[i][1]) for i in range(len(candidate.options))]
        if good := [t for t in tried if t[1]]:
            _, _, now, edits, ranks = min(good, key=lambda t: t[0] or 0.0)
            kept, ranks_kept = kept | edits, ranks_kept | dict(ranks)
    return rows, ranks_kept, now
