"""Try an edit: what a model's objective becomes with some matrices replaced. It costs the layers above them alone.

An edit in layer L leaves the states that enter layer L as they were. Those are kept at each boundary where a candidate
begins, so a trial runs layers L.. and the head only. Accepting an edit makes the boundaries above it stale: they are
dropped and made again, from the highest one that still holds, when somebody asks. Going from the last layer to the
first this never happens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from laser.choices import ACCEPT
from laser.evaluation.activations import Activations
from laser.evaluation.objective import Objective
from laser.evaluation.perplexity import paired_difference
from laser.evaluation.streaming import LayeredModel


def accepted(rule: str, d: float, se: float | None) -> bool:
    """Whether a change is kept. Never when it is not finite: NaN compares false, and `not worse` must not mean that."""
    error = 0.0 if se is None else se
    return math.isfinite(d) and math.isfinite(error) and bool(ACCEPT[rule](d, error))


class Bench:
    """A model with its kept edits, and one objective that is measured on it again and again.

    `pieces` are the first pieces of the candidates (see LayeredModel): the boundaries worth keeping. Without `cache`
    every trial is a full pass, the reference that the benchmark compares with.
    """

    def __init__(
        self, model: LayeredModel, objective: Objective, pieces: Iterable[int] = (), *, cache: bool = True
    ) -> None:
        self.model, self.objective, self.cache = model, objective, cache
        self.pieces = {max(piece, 1) for piece in pieces}
        self.boundaries: dict[int, Activations] = {}
        self._working: Activations | None = None

    def measure(self, edits: Mapping[str, torch.Tensor] | None = None) -> list[float]:
        """The objective's values with `edits` on top of what is kept; the model is afterwards as it was before.

        Undo is exact: the matrix before comes from the checkpoint's bytes, or is the edit that was kept.
        """
        edits = edits or {}
        piece = min((self.model.first_piece(name) for name in edits), default=self.model.layers + 1)
        before = {name: self.model.edits.get(name) for name in edits}
        work = None if not self.cache or piece == 0 else self._copy(self._entering(piece))
        try:
            for name, W in edits.items():
                self.model.edit(name, W)
            if work is None:
                work, piece = self._embed(), 1
            for layer in range(piece - 1, self.model.layers):
                self.model.run_layer(layer, work)
            return self.objective.values(self.model.score(work, self.objective.windows))
        finally:
            for name, W in before.items():
                self.model.edit(name, W)

    def keep(self, edits: Mapping[str, torch.Tensor]) -> None:
        """Make `edits` part of the model."""
        lowest = min(self.model.first_piece(name) for name in edits)
        for name, W in edits.items():
            self.model.edit(name, self.model.store.keep(W))
        self.forget(piece for piece in tuple(self.boundaries) if piece > lowest)

    def forget(self, pieces: Iterable[int]) -> None:
        """Free the boundaries of these pieces."""
        for piece in tuple(pieces):
            self.model.store.free(self.boundaries.pop(piece))

    def all_boundaries(self, first: int) -> dict[int, Activations]:
        """Every boundary from piece `first` to the head, for a backward pass. Kept until forgotten."""
        wanted, self.pieces = self.pieces, self.pieces | set(range(first, self.model.layers + 2))
        for piece in range(first, self.model.layers + 2):
            self._entering(piece)
        self.pieces = wanted
        return {piece: self.boundaries[piece] for piece in range(first, self.model.layers + 2)}

    def _entering(self, piece: int) -> Activations:
        """The states that enter `piece` with the kept edits; from the nearest boundary below that still holds."""
        if piece in self.boundaries:
            return self.boundaries[piece]
        at = max((p for p in self.boundaries if p < piece), default=0)
        work = self._copy(self.boundaries[at]) if at else self._embed()
        for p in range(max(at, 1), piece + 1):
            if p > max(at, 1):
                self.model.run_layer(p - 2, work)
            if p not in self.boundaries and (p in self.pieces or p == piece):
                self.boundaries[p] = self._allocate()
                self.boundaries[p].copy_from(work)
        return self.boundaries[piece]

    def _embed(self) -> Activations:
        fresh = self.model.embed(self.objective.windows)
        if self._working is None:
            self._working = fresh
        else:
            self._working.copy_from(fresh)
            self.model.store.free(fresh)
        return self._working

    def _copy(self, activations: Activations) -> Activations:
        if self._working is None:
            self._working = self._allocate()
        self._working.copy_from(activations)
        return self._working

    def _allocate(self) -> Activations:
        lengths = [len(w.tokens) - 1 for w in self.objective.windows]
        return self.model.store.allocate(lengths, self.model.width, self.model.dtype)


def change(objective: Objective, before: list[float], after: list[float]) -> tuple[float, float | None]:
    """d and se of the objective, NaN and None where a value is not finite."""
    if not all(map(math.isfinite, [*before, *after])):
        return math.nan, None
    return paired_difference(before, after, objective.weights)
