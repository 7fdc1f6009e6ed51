"""Scales that a quantiser moved through the model, as AWQ and SmoothQuant do, so that the function stays the same.

A norm's weight is divided by c and the columns behind it are multiplied with c, or the rows of one matrix are divided
and the columns of the next are multiplied. Such a copy's matrix stands for diag(r) W diag(c), and its inputs are x / c.
What it differs from W by says nothing until both are taken back.

Of a norm, c is known. The r of rows is fitted; whatever it is, the function is the same, since what comes behind is
scaled by the same numbers: a channel of a value in as many columns as heads share it. Which of a layer's norms stands
before matrices that share their inputs is told by which scales bring these nearest to the copy.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from laser.checkpoint.families import FAMILIES, LAYER_NUMBER
from laser.checkpoint.fused import config_entry, number_or_none
from laser.checkpoint.matrices import Matrix, family_of, list_matrices
from laser.checkpoint.reader import Checkpoint
from laser.compensate.places import ParameterPlace, find_places
from laser.differences.base import matched
from laser.errors import NumericalError, UsageError
from laser.selection import Selection
from laser.spectral.correction import MovedScales

NORM_CHANGED = 0.02  # of a norm's weight, the change that is no rounding: bf16 changes it by 0.004 at the most
CLEARLY = 0.99  # of the distance: how much nearer it has to be for scales that are less simple
EXPLAINED = 0.5  # of the distance: what is left of it where scales of rows or columns are most of the difference
BEHIND = {"v": "o", "up": "down", "w3": "w2"}  # whose columns may make up for scaled rows of whom
# role -> the first of those that are multiplied with the same inputs
SHARED = {"k": "q", "v": "q", "z": "q", "up": "gate", "w1": "gate", "w3": "gate"}
FOLLOWING = ("norm", "bias", "router")  # roles of what has to follow where weights were scaled
# Values that are normalised, or go through an activation; elsewhere config.json says that they are clipped.
BENT_VALUES = {"gemma3n", "gemma3n_text", "minimax", "minimax_m1", "minimax_text_01"}
CLIPPED = ("clip_qkv", "attn_config.clip_qkv")
# A norm, None for none that was changed, and what the copy has of its outputs, (n,)
Before = tuple[str | None, torch.Tensor]


class NotFiniteError(NumericalError):
    """NaN or Inf, with the checkpoint and the tensor that hold it."""


@dataclass(frozen=True)
class ChangedNorm:
    """A norm whose weight was changed. shares: what the copy has of the original's outputs, (n,).

    There are two answers: some families store what is added to 1. much: whether it is so as a whole.
    """

    shares: tuple[torch.Tensor, torch.Tensor]
    much: bool


@dataclass(frozen=True)
class Rescaled:
    """The norms of a copy that are not the original's, and the scales of places that follow from them."""

    original: Checkpoint
    copy: Checkpoint
    _known: dict[object, dict[tuple[str, int], Before]] = field(default_factory=dict)  # by layer, see _before

    @cached_property
    def _by_layer(self) -> Mapping[object, list[ParameterPlace]]:
        """Every place that could be corrected, selected or not: one makes up for another."""
        found: dict[object, list[ParameterPlace]] = {}
        for place in find_places(self.original, self.copy, Selection()).places:
            found.setdefault(place.matrices[0].place, []).append(place)
        return found

    @cached_property
    def _by_expert(self) -> Mapping[tuple[object, int | None], list[ParameterPlace]]:
        """The same by layer and expert: of 45,000 places each is asked for its neighbours."""
        found: dict[tuple[object, int | None], list[ParameterPlace]] = {}
        for layer, places in self._by_layer.items():
            for place in places:
                found.setdefault((layer, place.expert), []).append(place)
        return found

    @cached_property
    def norms(self) -> Mapping[object, Mapping[str, ChangedNorm]]:
        """By layer and name. Raises UsageError for one of another shape, NumericalError for NaN or Inf."""
        found: dict[object, dict[str, ChangedNorm]] = {}
        for norm, there in self._beside.values():
            if norm.role != "norm" or norm.tensor.endswith("bias"):
                continue
            w, v = self.original.read(norm.tensor).double(), self.copy.read(there).double()
            if v.shape != w.shape:
                raise UsageError(
                    f"{self.copy.name}: {there} has shape {list(v.shape)}, expected {list(w.shape)} as in "
                    f"{self.original.name}; try the copy of this model"
                )
            require_finite(self.original, norm.tensor, w)
            require_finite(self.copy, there, v)
            if w.ndim == 1:
                usual = w.abs().clamp_min(float(w.square().mean().sqrt()))
                if bool(((v - w).abs() > NORM_CHANGED * usual).any()):
                    first, second = (torch.where(w + one == 0, 1.0, (v + one) / (w + one)) for one in (0.0, 1.0))
                    much = float((v - w).norm()) > NORM_CHANGED * float(w.norm())
                    found.setdefault(norm.place, {})[norm.tensor] = ChangedNorm((first, second), much)
        return found

    def both(self, place: ParameterPlace) -> tuple[torch.Tensor, torch.Tensor]:
        """A place (m, n) of the original and of the copy, float64. Raises NumericalError for NaN or Inf."""
        W = place.read(self.original)
        return W.double(), self.copied(place, W).double()

    def copied(self, place: ParameterPlace, W: torch.Tensor) -> torch.Tensor:
        """A place (m, n) of the copy. Raises NumericalError for NaN or Inf, also in the original's W."""
        Q = place.read(self.copy, copied=True)
        for checkpoint, weights in ((self.original, W), (self.copy, Q)):
            require_finite(checkpoint, place.name, weights)
        return Q

    def of(self, place: ParameterPlace) -> MovedScales | None:
        """The scales of a place; None where it has the original's."""
        rows = torch.ones(place.shape[0], dtype=torch.float64)
        for behind in self._neighbours(place):
            if (found := self._made_up_for(place, behind)) is not None:
                rows[found[0]] = found[1]
        inputs = self._behind_norm(place)
        for before in self._neighbours(place):
            if (found := self._made_up_for(before, place)) is not None:
                inputs = found[2]
        return None if bool((rows == 1).all() and (inputs == 1).all()) else MovedScales(rows, inputs)

    def require_made_up_for(self) -> None:
        """Raises UsageError where no weight makes up for a changed norm, or its bias or the router behind it do not."""
        for layer, norms in self.norms.items():
            before = self._before(layer)
            taken = {norm for norm, _ in before.values()}
            odd = [norm for norm, changed in norms.items() if changed.much and norm not in taken]
            for (shared, n), (norm, share) in before.items():
                if norm is not None and not self._follows(_bias_of(norm), share):
                    odd.append(_bias_of(norm))
                routers = [m for m, _ in self._beside.values() if m.role == "router" and m.place == layer]
                for router in routers if shared == "gate" else ():
                    if router.shape[1:] == (n,) and not self._follows(
                        router.tensor, torch.where(share == 0, 0.0, 1 / share)
                    ):
                        odd.append(router.tensor)
            if odd:
                raise UsageError(
                    f"{self.copy.name}: {odd[0]} is not that of {self.original.name}, "
                    "and no weight makes up for it in its layer; "
                    "try a copy that has the original's norms"
                )

    @cached_property
    def _beside(self) -> Mapping[str, tuple[Matrix, str]]:
        """Norms, biases and routers of the original, with what they are called in the copy, which may lack a prefix."""
        ours, theirs = list_matrices(self.original), list_matrices(self.copy)
        names = {m.name: there.tensor for m, there in pairs(ours, theirs)}
        return {m.tensor: (m, names[m.name]) for m in ours if m.role in FOLLOWING and m.name in names}

    def _follows(self, tensor: str, scales: torch.Tensor) -> bool:
        """Whether the copy's is the original's times these scales, rather than the original's, or there is none."""
        if tensor not in self._beside:
            return True
        w, v = self.original.read(tensor).double(), self.copy.read(self._beside[tensor][1]).double()
        return float((v - w * scales).norm()) <= float((v - w).norm())

    def _neighbours(self, place: ParameterPlace) -> list[ParameterPlace]:
        return self._by_expert.get((place.matrices[0].place, place.expert), [])

    def _behind_norm(self, place: ParameterPlace) -> torch.Tensor:
        """What the copy has of the place's inputs, as a norm gives them, (n,)."""
        known = self._before(place.matrices[0].place)
        return known[_inputs(place)][1] if _inputs(place) in known else torch.ones(place.shape[1], dtype=torch.float64)

    def _before(self, layer: object) -> Mapping[tuple[str, int], Before]:
        """The changed norms of a layer that weights make up for, by the inputs that these share."""
        if layer not in self._known:
            together: dict[tuple[str, int], list[ParameterPlace]] = {}
            for place in self._by_layer.get(layer, ()) if layer in self.norms else ():
                together.setdefault(_inputs(place), []).append(place)
            self._known[layer] = self._told_apart(
                {shared: found for shared, places in together.items() if (found := self._distances(layer, places))}
            )
        return self._known[layer]

    def _distances(
        self, layer: object, places: Sequence[ParameterPlace]
    ) -> dict[str | None, tuple[float, torch.Tensor]]:
        """How far the copy is from places that share their inputs, and what these are then, behind each norm or none.

        It is measured in the columns that any of the norms would change.
        """
        n = places[0].shape[1]
        options: list[Before] = [(None, torch.ones(n, dtype=torch.float64))]
        for norm, changed in self.norms[layer].items():
            options += [(norm, share) for share in changed.shares if len(share) == n]
        columns = torch.stack([(share - 1).abs() > NORM_CHANGED for _, share in options]).any(0)
        squares = [0.0] * len(options)
        for place in places if len(options) > 1 else ():
            W, Q = self.both(place)
            for number, (_, share) in enumerate(options):
                target = _columns_scaled(W, share)
                for rows, _ in _scaled_parts(place):
                    target[rows] *= _fitted(target[rows], Q[rows])[:, None]
                squares[number] += float((Q - target)[:, columns].square().sum())
        found: dict[str | None, tuple[float, torch.Tensor]] = {}
        for (norm, share), square in zip(options, squares, strict=True):
            if norm not in found or square**0.5 < found[norm][0]:
                found[norm] = square**0.5, share
        return found

    @staticmethod
    def _told_apart(
        found: Mapping[tuple[str, int], Mapping[str | None, tuple[float, torch.Tensor]]],
    ) -> dict[tuple[str, int], Before]:
        """The nearest norm of each; one that is left over takes the place of another where both are as near."""
        nearest: dict[tuple[str, int], str | None] = {}
        for shared, norms in found.items():
            best = min(norms, key=lambda norm: norms[norm][0])
            nearest[shared] = best if norms[best][0] < CLEARLY * norms[None][0] else None
        for shared, norms in found.items():
            taken = nearest[shared]
            for norm in norms.keys() - nearest.values():
                spare = taken is not None and list(nearest.values()).count(taken) > 1
                if norm is not None and spare and CLEARLY * norms[norm][0] <= norms[taken][0]:
                    nearest[shared] = norm
                    break
        return {shared: (norm, found[shared][norm][1]) for shared, norm in nearest.items() if norm is not None}

    def _made_up_for(
        self, before: ParameterPlace, behind: ParameterPlace
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Which rows of `before` were scaled, by what, and by what the inputs (n,) of `behind` so were."""
        for rows, role in _scaled_parts(before):
            if behind.matrices[0].role != BEHIND[role] or before.name == behind.name:
                continue
            channels = self._channels(role, len(rows), behind.shape[1])
            if channels is None or not self._is_linear(role, before):
                continue
            W, Q = self.both(before)
            fitted = _fitted(_columns_scaled(W, self._behind_norm(before))[rows], Q[rows])
            W, Q = self.both(behind)
            if (Q - _columns_scaled(W, fitted[channels])).norm() < CLEARLY * (Q - W).norm():
                every = torch.ones(before.shape[0], dtype=torch.float64)
                every[rows] = fitted
                if all(self._follows(_bias_of(p.original.tensor), every[slice(*p.rows)]) for p in before.pieces):
                    return rows, fitted, fitted[channels]
        return None

    def _is_linear(self, role: str, place: ParameterPlace) -> bool:
        """Whether what a layer makes of these rows is scaled as they are, before the next columns are multiplied.

        Values are weighted and summed, in the families of which a test says so. The rest is gated, or a ReLU.
        """
        config = self.original.config
        if role == "v":
            clipped = any(config_entry(config, key) is not None for key in CLIPPED)
            return family_of(self.original) in FAMILIES.keys() - BENT_VALUES and not clipped
        gates = {m.role for each in self._neighbours(place) for m in each.matrices} & {"gate", "w1"}
        return bool(gates) or "relu" in (config_entry(config, key) for key in ("hidden_act", "activation_function"))

    def _channels(self, role: str, rows: int, columns: int) -> torch.Tensor | None:
        """Which of the rows each column behind them takes, (columns,); None where that is not known."""
        if rows == columns:
            return torch.arange(rows)
        heads = number_or_none(self.original.config, "head") if role == "v" else None
        if heads is None or columns % heads or rows % (width := columns // heads) or heads % (rows // width):
            return None
        of_values = torch.arange(rows).reshape(-1, width)  # heads that share a value follow each other
        return of_values.repeat_interleave(heads // len(of_values), 0).reshape(-1)


def is_scaled_beyond(W: torch.Tensor, Q: torch.Tensor, scales: MovedScales | None) -> bool:
    """Whether most of what a copy Q (m, n) differs from W by is more scales of its rows or columns than those that are
    known. Rounding, pruning and cutting look like no such scales; an adapter would take them for losses."""
    W, Q = _in_scales(W, scales), Q.double()
    far = float((Q - W).norm())
    rows, columns = _fitted(W, Q)[:, None], _fitted(W.T, Q.T)
    return min(float((Q - rows * W).norm()), float((Q - columns * W).norm())) < EXPLAINED * far


def require_finite(checkpoint: Checkpoint, name: str, weights: torch.Tensor) -> None:
    """Raises NumericalError for NaN or Inf."""
    if not weights.isfinite().all():
        raise NotFiniteError(
            f"{checkpoint.name}: {name} holds NaN or Inf, expected numbers; try laser scan to find all of them, "
            "and make it again"
        )


def likeness(W: torch.Tensor, Q: torch.Tensor, scales: MovedScales | None = None) -> float:
    """The cosine between a copy Q (m, n) and W in its scales; 0 where one of them is nothing."""
    W, Q = _in_scales(W, scales), Q.double()
    size = float(W.norm() * Q.norm())
    return float((W * Q).sum()) / size if size else 0.0


def _in_scales(W: torch.Tensor, scales: MovedScales | None) -> torch.Tensor:
    return W.double() if scales is None else scales.rows[:, None] * _columns_scaled(W, scales.inputs)


def _scaled_parts(place: ParameterPlace) -> list[tuple[torch.Tensor, str]]:
    """The rows of a place that the columns of another can make up for, with the role of those rows."""
    return [(place.rows_of(matrix), matrix.role) for matrix in place.matrices if matrix.role in BEHIND]


def _inputs(place: ParameterPlace) -> tuple[str, int]:
    """What places of a layer have in common that are multiplied with the same inputs."""
    role = place.matrices[0].role
    return SHARED.get(role, role), place.shape[1]


def _bias_of(tensor: str) -> str:
    return tensor.removesuffix("weight") + "bias"


def pairs(ours: Sequence[Matrix], theirs: Sequence[Matrix]) -> list[tuple[Matrix, Matrix]]:
    """Those of each that stand for each other: by name, as `matched`, or by what is not a prefix."""
    counts = Counter(map(_bare_name, theirs))
    alone = {_bare_name(m): m for m in theirs if counts[_bare_name(m)] == 1}
    known = {**{m.name: alone[_bare_name(m)] for m in ours if _bare_name(m) in alone}, **matched(theirs, ours)}
    return [(m, known[m.name]) for m in ours if m.name in known]


def _bare_name(norm: Matrix) -> tuple[str, str]:
    """What a norm is called without what stands before its layer, or before its own name."""
    found = re.search(LAYER_NUMBER, norm.tensor)
    return norm.stack, norm.tensor[found.start(1) :] if found else ".".join(norm.tensor.split(".")[-2:])


def _columns_scaled(W: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """W (m, n) for inputs that are these parts (n,) of its own; 0 where nothing comes in."""
    return W.double() * torch.where(inputs == 0, 0.0, 1 / inputs)


def _fitted(W: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
    """(m,) by what each row of W is multiplied to be nearest to that of Q; 1 where that is nothing or turns it."""
    found = (W * Q).sum(1) / W.square().sum(1)
    return torch.where(found > 0, found, 1.0)
