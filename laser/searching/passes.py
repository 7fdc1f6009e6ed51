"""Estimate what a search runs at the most, before it runs.

Counted by the candidates that it makes, or could make, and by what `trials.py` and `runner.py` do with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from laser.checkpoint.matrices import Matrix
from laser.evaluation.objective import Objective
from laser.evaluation.streaming import LayeredModel
from laser.searching.candidates import Candidate


@dataclass(frozen=True)
class Passes:
    """How much work a search does at the most.

    cuts: matrices that are truncated
    trials: edits that are measured
    windows, tokens: texts whose predictions are scored, and tokens in them
    layer_forwards: decoder layers times windows, as `LayeredModel` counts them
    layer_tokens: tokens in them, a step backwards counted as three: once more forwards, the gradients of the states,
        and those of the weights
    walks: times through the model's pieces, reports and the proof of the pieces too, if every guess is right
    loads: decoder layers read meanwhile, where they do not stay in memory
    """

    candidates: int
    cuts: int
    trials: int
    windows: int
    tokens: int
    layer_forwards: int
    layer_tokens: int
    walks: int
    loads: int


def possible_candidates(
    matrices: Sequence[Matrix], model: LayeredModel, rules: Sequence[str], grid: bool, by_role: bool = False
) -> list[Candidate]:
    """The candidates that there can be, before the spectra are known.

    As though every rule reduced every matrix that the model runs, each to another rank. by_role: of differences.
    """
    running = [m for m in matrices if (m.is_matrix or by_role) and model.runs(m.name)]
    if by_role and not grid:
        roles: dict[str, dict[str, int]] = {}
        for m in running:
            roles.setdefault(f"{m.stack} {m.role}".strip(), {})[m.name] = 0
        return [
            Candidate(role, min(map(model.first_piece, names)), None, tuple((rule, names) for rule in rules))
            for role, names in roles.items()
        ]
    if not grid:
        options = {m.name: tuple((rule, {m.name: 0}) for rule in rules) for m in running}
        return [Candidate(m.name, model.first_piece(m.name), None, options[m.name]) for m in running]
    cells: dict[tuple[int, str], dict[str, int]] = {}
    for m in running:
        cells.setdefault((model.first_piece(m.name), m.role), {})[m.name] = 0
    return [
        Candidate(f"layer {piece - 1} {role}", piece, None, ((rule, names),))
        for (piece, role), names in cells.items()
        for rule in rules
    ]


def count_passes(
    candidates: Sequence[Candidate],
    layers: int,
    calibration: Objective,
    reported: Sequence[Objective],
    *,
    tried: int | None = None,
    order: str = "layers",
    grid: bool = False,
    shortlisted: bool = False,
    together: int | None = None,
) -> Passes:
    """Of a search for `candidates`. tried: how many of them, where that is not yet known which: those that cost most.

    A trial runs the layers from its candidate's first on. What was kept below makes states stale, which are then made
    again; from the last layer to the first this never happens. A search begins with the untouched model, and ends with
    every reported text before and after.

    together: how many variants a walk measures where it reads layers; None: as many as there are. Each edit that is
    kept against a guess adds a walk to what is counted here, and what it measures again.
    """
    most_expensive = sorted(candidates, key=lambda c: (max(c.piece, 1), -len(c.options)))
    chosen = most_expensive if tried is None else most_expensive[:tried]
    above = [layers + 1 - max(c.piece, 1) for c in chosen]
    runs = layers  # decoder layers over all windows of the calibration
    if grid:  # each cell alone, then the accepted ones on top of one another
        trials, runs = 2 * len(chosen), runs + sum(above) + layers * len(chosen)
        cuts = sum(3 * len(c.options[0][1]) for c in chosen)
    else:
        trials = sum(len(c.options) for c in chosen)
        again = 0 if order == "layers" else sum(layers - high for high in above)
        runs += again + sum(len(c.options) * high for c, high in zip(chosen, above, strict=True))
        cuts = trials + len(chosen)  # and once more to keep it
    back = 0
    if shortlisted:
        back = layers + 1 - min((max(c.piece, 1) for c in candidates), default=layers + 1)
        cuts += len(candidates)
    windows = (1 + trials) * len(calibration.windows) + 2 * sum(len(each.windows) for each in reported)
    scored = (1 + trials) * _tokens(calibration) + 2 * sum(map(_tokens, reported))
    forwards = runs * len(calibration.windows) + 2 * layers * sum(len(each.windows) for each in reported)
    through = (runs + 3 * back) * _tokens(calibration) + 2 * layers * sum(map(_tokens, reported))
    waves = max(math.ceil(trials / (together or max(trials, 1))), 1)
    loads = layers * (3 if reported else 2) + back + (waves - 1) * max(above, default=0)
    walks = waves + (2 if reported else 1)
    forwards += back * len(calibration.windows)
    return Passes(len(chosen), cuts, trials, windows, scored, forwards, through, walks, loads)


def _tokens(objective: Objective) -> int:
    """Inputs: the last token of a window is only predicted."""
    return sum(len(w.tokens) - 1 for w in objective.windows)
