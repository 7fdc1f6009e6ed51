"""Where a correction goes: which stored tensors make one weight of the model in memory, and what PEFT calls it.

A place is a module, or one expert of a parameter that holds all experts of a layer (transformers 5). What is stored as
several tensors and multiplied with the same inputs, as gate and up of an expert, is one matrix here, rows on rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from laser.checkpoint.matrices import Matrix, list_matrices
from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.safetensors import TORCH, virtual_shard
from laser.checkpoint.slices import Slice
from laser.differences.base import matched
from laser.differences.places import ModulePlace, module_places, rows_in_parameter
from laser.errors import UsageError
from laser.evaluation.causal import build_causal
from laser.evaluation.layout import Part, fill, owner_of
from laser.selection import Selection

NO_MODULE = "no linear layer of the model holds it as one matrix, so PEFT has no name for its adapter"
NO_ORDER = "it lies in a parameter of three dimensions, in an order for which no adapter is made"


@dataclass(frozen=True)
class Stored:
    """A whole tensor as it lies there, or the matrix in one that is called `name`."""

    name: str
    tensor: str
    part: Slice | None = None

    @staticmethod
    def of(matrix: Matrix) -> Stored:
        """A tensor that is one matrix keeps its name, and is read whole."""
        return Stored(matrix.name, matrix.tensor, None if matrix.name == matrix.tensor else matrix.part)

    def shape(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        return checkpoint.tensors[self.tensor].shape if self.part is None else self.part.shape


@dataclass(frozen=True)
class StoredPiece:
    """What is stored of some rows of a place, in the original and in the copy."""

    rows: tuple[int, int]
    original: Stored
    copied: Stored


@dataclass(frozen=True)
class ParameterPlace:
    """parameter: its name in the model. expert: which, None for a module. shape: (m, n), as it is multiplied.

    transposed: stored (n, m). matrices: what moments and selections call what lies in it.
    """

    parameter: str
    expert: int | None
    shape: tuple[int, int]
    pieces: tuple[StoredPiece, ...]
    matrices: tuple[Matrix, ...]
    transposed: bool = False
    experts: int = 1  # of the parameter

    @cached_property
    def name(self) -> str:
        return self.parameter if self.expert is None else f"{self.parameter}[{self.expert}]"

    @cached_property
    def in_peft(self) -> ModulePlace:
        """Where PEFT has its factors."""
        module, _, name = self.parameter.rpartition(".")
        one_of = {} if self.expert is None else {"parameter": name, "expert": self.expert, "experts": self.experts}
        return ModulePlace(module, self.shape[0], 0, **one_of)

    def read(self, checkpoint: Checkpoint, copied: bool = False) -> torch.Tensor:
        """The matrix (m, n), of the original or of the copy."""
        stored = [piece.copied if copied else piece.original for piece in self.pieces]
        parts = [checkpoint.read(each.tensor, each.part) for each in stored]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.T.contiguous() if self.transposed else whole

    def rows_of(self, matrix: Matrix) -> torch.Tensor:
        """Which rows of the place are those of one of its matrices, int64."""
        for piece in self.pieces:
            if piece.original.name == matrix.name:
                return torch.arange(*piece.rows)
        start, stop = next(piece.rows for piece in self.pieces if piece.original.tensor == matrix.tensor)
        return start + rows_in_parameter(matrix, ModulePlace(self.parameter, stop - start))


@dataclass(frozen=True)
class Places:
    """Those of a model, in the order of its parameters. left: matrix -> why it gets no correction."""

    places: tuple[ParameterPlace, ...]
    left: Mapping[str, str]
    modules: tuple[str, ...]  # every linear layer of the model, corrected or not


def find_places(original: Checkpoint, copy: Checkpoint, selection: Selection) -> Places:
    """Where a correction of `copy` towards `original` can go, for the selected matrices of `original`.

    Raises UsageError for a copy that lacks one of them or has another shape, and for what is no causal language model;
    CheckpointError for weights that are missing.
    """
    model = build_causal(original)
    filling = fill(original, model)
    matrices = list_matrices(original)
    selection.check(matrices)
    chosen = {m.name: m for m in matrices if selection.why_not(m) is None}
    inside: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        inside.setdefault(matrix.tensor, []).append(matrix)
    others = list_matrices(copy)
    by_name = {m.name: m for m in others}
    theirs = {matrix.name: Stored.of(by_name[name]) for name, matrix in matched(matrices, others).items()}
    unread = {m.name: why for m in others if (why := m.no_spectrum) is not None}
    state, seen = model.state_dict(keep_vars=True), set[str]()
    found: list[ParameterPlace] = []
    mixed: set[str] = set()  # matrices in parameters that are not understood
    modules = tuple(name for name, module in model.named_modules() if _is_linear(module))
    for parameter in state:  # not in the files' order: by the model's PEFT wraps the experts' parameters
        parts = filling.parts.get(parameter, ())
        held = [m for part in parts for m in inside[part.tensor]]
        if not any(m.name in chosen for m in held) or held[0].tensor in seen:
            continue
        seen |= {part.tensor for part in parts}
        shape = tuple(state[parameter].shape)
        places = _places_of(parameter, parts, model, shape, inside)
        if not places and len(shape) == 3:
            mixed |= {m.name for m in held}
        for place in places:
            if all(m.name in chosen for m in place.matrices):
                pieces = tuple(
                    replace(p, copied=_in_copy(p.original, original, copy, theirs, unread)) for p in place.pieces
                )
                found.append(replace(place, pieces=pieces))
    placed = {m.name for place in found for m in place.matrices}
    left = {name: NO_ORDER if name in mixed else NO_MODULE for name in chosen if name not in placed}
    if not found:
        if those := mixed & chosen.keys():
            raise UsageError(f"{original.name}: {min(those)} cannot be corrected: {NO_ORDER}; try other --roles")
        raise UsageError(
            f"none of the {len(chosen)} selected matrices is a linear layer of {original.name}; try other --roles"
        )
    return Places(tuple(found), left, modules)


def _is_linear(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _places_of(
    parameter: str, parts: Sequence[Part], model: Any, shape: tuple[int, ...], inside: Mapping[str, Sequence[Matrix]]
) -> list[ParameterPlace]:
    """The places in a parameter of this shape; none where it is not understood."""
    owner, leaf = owner_of(model, parameter)
    if len(shape) == 2 and leaf == "weight" and _is_linear(owner):
        transposed = type(owner).__name__ == "Conv1D"
        if transposed and len(parts) > 1:
            return []
        rows = shape[1] if transposed else shape[0]
        pieces = _rows([(Stored(part.tensor, part.tensor), part.where) for part in parts], rows)
        held = tuple(m for part in parts for m in inside[part.tensor])
        turned = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
        return [ParameterPlace(parameter, None, turned, pieces, held, transposed)] if pieces else []
    if len(shape) != 3 or getattr(owner, "is_transposed", False):
        return []
    if len(parts) == 1 and not parts[0].where:
        return _fused_experts(parameter, inside[parts[0].tensor], shape)
    if any(not part.where or not isinstance(part.where[0], int) for part in parts):
        return []
    found = []
    for expert in range(shape[0]):
        of = [part for part in parts if part.where[0] == expert]
        pieces = _rows([(Stored(part.tensor, part.tensor), part.where[1:]) for part in of], shape[1])
        held = tuple(m for part in of for m in inside[part.tensor])
        if not pieces:
            return []
        found.append(ParameterPlace(parameter, expert, (shape[1], shape[2]), pieces, held, experts=shape[0]))
    return found


def _fused_experts(parameter: str, matrices: Sequence[Matrix], shape: tuple[int, ...]) -> list[ParameterPlace]:
    """The places in a parameter (experts, m, n) that is one tensor; none where an expert's matrices mix their rows."""
    in_memory, found = module_places(matrices), []
    for expert in range(shape[0]):
        held = tuple(m for m in matrices if m.expert == expert)
        if any(m.name not in in_memory for m in held):
            return []
        spans = [rows_in_parameter(m, in_memory[m.name]).tolist() for m in held]
        if any(rows != list(range(rows[0], rows[0] + len(rows))) for rows in spans):
            return []
        parts = [(Stored.of(m), (slice(rows[0], rows[-1] + 1),)) for m, rows in zip(held, spans, strict=True)]
        pieces = _rows(parts, shape[1])
        if not pieces:
            return []
        found.append(ParameterPlace(parameter, expert, (shape[1], shape[2]), pieces, held, experts=shape[0]))
    return found


def _rows(parts: Sequence[tuple[Stored, tuple[int | slice, ...]]], rows: int) -> tuple[StoredPiece, ...]:
    """The pieces in their order, which have to be whole rows one after the other; none where they are not."""
    found, at = [], 0
    for stored, where in sorted(parts, key=lambda part: _layer_span(part[1], rows)):
        start, stop = _layer_span(where, rows)
        if start != at or len(where) > 1:
            return ()
        found.append(StoredPiece((start, stop), stored, stored))
        at = stop
    return tuple(found) if at == rows else ()


def _layer_span(where: tuple[int | slice, ...], rows: int) -> tuple[int, int]:
    first = where[0] if where else slice(None)
    return first.indices(rows)[:2] if isinstance(first, slice) else (-1, -1)


def _in_copy(
    stored: Stored, original: Checkpoint, copy: Checkpoint, theirs: Mapping[str, Stored], unread: Mapping[str, str]
) -> Stored:
    """What the copy has in its place. Raises UsageError where that is nothing, of another shape, or no numbers.

    unread: name -> why the copy's matrix cannot be read
    """
    there = stored if stored.name in copy.tensors else theirs.get(stored.name)
    if there is None:
        raise UsageError(
            f"{copy.name} has no {stored.name}, so it is no copy of {original.name}; try the copy of this model"
        )
    if there.name in unread:
        raise UsageError(f"{copy.name}: {there.name} is {unread[there.name]}; try the copy with its scales")
    found, expected = there.shape(copy), stored.shape(original)
    if found != expected:
        raise UsageError(
            f"{copy.name}: {there.name} has shape {list(found)}, expected {list(expected)} as in {original.name}; "
            "try the copy of this model"
        )
    return there


def as_matrices(original: Checkpoint, places: Sequence[ParameterPlace]) -> tuple[Checkpoint, list[Matrix]]:
    """The original as a checkpoint whose tensors are the places, for those who visit matrix after matrix."""
    by_name, matrices = {place.name: place for place in places}, []
    for place in places:
        first = place.matrices[0]
        stored = {"tensor": place.name, "shape": place.shape, "dtype": "F32" if first.scaled else first.dtype}
        matrices.append(replace(first, name=place.name, part=None, scaled=False, **stored))
    entries = [(m.name, m.dtype, m.shape) for m in matrices]
    dtypes = {m.name: TORCH[m.dtype] for m in matrices}

    def tensor(name: str) -> torch.Tensor:
        return by_name[name].read(original).to(dtypes[name])

    shard = virtual_shard("places", original.path, entries, tensor)
    seen = {info.name: info for info in shard.tensors}
    return replace(original, shards=(shard,), tensors=seen, fp8=None, origin=original, remade=True), matrices
