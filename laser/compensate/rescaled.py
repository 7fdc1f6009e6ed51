"""Scales that a quantiser moved through the model, as AWQ and SmoothQuant do, so that the function stays the same.

A norm's weight is divided by c and the columns behind it are multiplied with c, or the rows of one matrix are divided
and the columns of the next are multiplied. Such a copy's matrix stands for diag(r) W diag(c), and its inputs are x / c.
What it differs from W by says nothing until both are taken back.

Of a norm, c is known. The r of rows is fitted; whatever it is, the function is the same, since what comes behind is
scaled by the same numbers. Which of a layer's norms stands before a matrix is told by which scales bring it nearest to
the copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from laser.checkpoint.matrices import list_matrices
from laser.checkpoint.reader import Checkpoint
from laser.compensate.places import ParameterPlace, find_places
from laser.errors import UsageError
from laser.selection import Selection
from laser.spectral.correction import MovedScales

NORM_CHANGED = 0.02  # of a norm's weight, the change that is no rounding: bf16 changes it by 0.004 at the most
CLEARLY = 0.99  # of the distance: how much nearer it has to be for scales that are less simple
EXPLAINED = 0.5  # of the distance: what is left of it where scales of rows or columns are most of the difference
BEHIND = {"v": ("o",), "up": ("down",), "w3": ("w2",)}  # whose columns may make up for scaled rows of whom


@dataclass(frozen=True)
class Rescaled:
    """The norms of a copy that are not the original's, and the scales of places that follow from them."""

    original: Checkpoint
    copy: Checkpoint

    @cached_property
    def places(self) -> Sequence[ParameterPlace]:
        """Every place that could be corrected, selected or not: one makes up for another."""
        return find_places(self.original, self.copy, Selection()).places

    @cached_property
    def _by_layer(self) -> Mapping[tuple[object, int | None], list[ParameterPlace]]:
        """The same by layer and expert: of 45,000 places each is asked for its neighbours."""
        found: dict[tuple[object, int | None], list[ParameterPlace]] = {}
        for place in self.places:
            found.setdefault((place.matrices[0].place, place.expert), []).append(place)
        return found

    @cached_property
    def norms(self) -> Mapping[object, Mapping[str, list[torch.Tensor]]]:
        """By layer and name, the norms whose weight was changed: what the copy has of the original's outputs, (n,).

        There are two answers: some families store what is added to 1.
        """
        found: dict[object, dict[str, list[torch.Tensor]]] = {}
        for matrix in list_matrices(self.original):
            if matrix.role != "norm" or matrix.tensor not in self.copy.tensors or matrix.tensor.endswith("bias"):
                continue
            w, v = (each.read(matrix.tensor).double() for each in (self.original, self.copy))
            if w.ndim == 1 and w.shape == v.shape:
                shares = [torch.where(w + one == 0, 1.0, (v + one) / (w + one)) for one in (0.0, 1.0)]
                if float((v - w).norm()) > NORM_CHANGED * float(w.norm()):
                    found.setdefault(matrix.place, {})[matrix.tensor] = shares
        return found

    def of(self, place: ParameterPlace) -> MovedScales | None:
        """The scales of a place; None where it has the original's."""
        rows = torch.ones(place.shape[0], dtype=torch.float64)
        for behind in self._layer(place):
            if (found := self._made_up_for(place, behind)) is not None:
                rows[found[0]] = found[1]
        inputs = self._behind_norm(place)[1]
        for before in self._layer(place):
            if (found := self._made_up_for(before, place)) is not None:
                inputs = found[1]
        return None if bool((rows == 1).all() and (inputs == 1).all()) else MovedScales(rows, inputs)

    def require_made_up_for(self) -> None:
        """Raises UsageError where no weight makes up for a changed norm."""
        for layer, norms in self.norms.items():
            taken = {self._behind_norm(place)[0] for place in self.places if place.matrices[0].place == layer}
            if left := sorted(norms.keys() - taken):
                raise UsageError(
                    f"{self.copy.name}: {left[0]} is not that of {self.original.name}, and no weight makes up for it; "
                    "try a copy that has the original's norms"
                )

    def _layer(self, place: ParameterPlace) -> list[ParameterPlace]:
        return self._by_layer.get((place.matrices[0].place, place.expert), [])

    def _both(self, place: ParameterPlace) -> tuple[torch.Tensor, torch.Tensor]:
        return place.read(self.original).double(), place.read(self.copy, copied=True).double()

    def _behind_norm(self, place: ParameterPlace) -> tuple[str | None, torch.Tensor]:
        """The changed norm whose outputs are the place's inputs, if there is one, and what the copy has of them."""
        W, Q = self._both(place)

        def distance(inputs: torch.Tensor) -> float:
            target = _columns_scaled(W, inputs)
            for rows, _ in _scaled_parts(place):
                target[rows] *= _fitted(target[rows], Q[rows])[:, None]
            return float((Q - target).norm())

        alike = torch.ones(place.shape[1], dtype=torch.float64)
        best, name, found = distance(alike), None, alike
        for tensor, shares in self.norms.get(place.matrices[0].place, {}).items():
            for share in shares:
                if len(share) == len(alike) and (far := distance(share)) < CLEARLY * best:
                    best, name, found = far, tensor, share
        return name, found

    def _made_up_for(self, before: ParameterPlace, behind: ParameterPlace) -> tuple[slice, torch.Tensor] | None:
        """Which rows of `before` were scaled, and by what (n,), so that `behind` of n columns was scaled to match."""
        for rows, role in _scaled_parts(before):
            fits = rows.stop - rows.start == behind.shape[1]
            if not fits or behind.matrices[0].role not in BEHIND[role] or before.name == behind.name:
                continue
            W, Q = self._both(before)
            fitted = _fitted(_columns_scaled(W, self._behind_norm(before)[1])[rows], Q[rows])
            W, Q = self._both(behind)
            if (Q - _columns_scaled(W, fitted)).norm() < CLEARLY * (Q - W).norm():
                return rows, fitted
        return None


def is_scaled_beyond(W: torch.Tensor, Q: torch.Tensor, scales: MovedScales | None) -> bool:
    """Whether most of what a copy Q (m, n) differs from W by is more scales of its rows or columns than those that are
    known. Rounding, pruning and cutting look like no such scales; an adapter would take them for losses."""
    W, Q = W.double(), Q.double()
    if scales is not None:
        W = scales.rows[:, None] * _columns_scaled(W, scales.inputs)
    far = float((Q - W).norm())
    rows, columns = _fitted(W, Q)[:, None], _fitted(W.T, Q.T)
    return min(float((Q - rows * W).norm()), float((Q - columns * W).norm())) < EXPLAINED * far


def _scaled_parts(place: ParameterPlace) -> list[tuple[slice, str]]:
    """The rows of a place that the columns of another can make up for, with the role of those rows."""
    roles = {matrix.name: matrix.role for matrix in place.matrices}
    some = [(slice(*piece.rows), roles.get(piece.original.name, "")) for piece in place.pieces]
    return [(rows, role) for rows, role in some if role in BEHIND]


def _columns_scaled(W: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """W (m, n) for inputs that are these parts (n,) of its own; 0 where nothing comes in."""
    return W.double() * torch.where(inputs == 0, 0.0, 1 / inputs)


def _fitted(W: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
    """(m,) by what each row of W is multiplied to be nearest to that of Q; 1 where that is nothing or turns it."""
    found = (W * Q).sum(1) / W.square().sum(1)
    return torch.where(found > 0, found, 1.0)
