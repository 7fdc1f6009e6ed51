"""Listening in on a layer: every product with a weight, its inputs and its outputs, whatever module makes it.

Hooks on modules would miss the experts, which are slices of 3-D parameters and no modules. So calls of
`torch.nn.functional.linear` are watched, and the weight in a call is known by where its memory lies. An expert's inputs
are then by themselves the tokens that were routed to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from laser.checkpoint.families import Matrix
from laser.evaluation.layout import parts_of
from laser.evaluation.streaming import LayeredModel


@dataclass(frozen=True)
class Met:
    """Matrices that are multiplied in one call: their names, and which of the output's columns are whose."""

    names: tuple[str, ...]
    rows: tuple[slice, ...]


# (what was met, inputs (T, n), outputs without bias (T, m of all rows))
Listener = Callable[[Met, torch.Tensor, torch.Tensor], None]


def run_one_expert_at_a_time(model: LayeredModel) -> None:
    """Have a mixture's experts computed one by one with plain products; the fast kernels hide them in one call."""
    config = model.model.config
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"


class Tap(TorchFunctionMode):
    """Inside, `listen` is told of every product of decoder layer `layer` with one of the `matrices`.

    A matrix that is stored transposed or interleaved with another is in no product as it stands, and is not told of.
    """

    def __init__(self, model: LayeredModel, layer: int, matrices: Sequence[Matrix], listen: Listener) -> None:
        super().__init__()
        self.model, self.layer, self.matrices, self.listen = model, layer, matrices, listen
        self._places: list[tuple[int, Matrix]] | None = None  # (address, matrix)
        self._met: dict[tuple[int, tuple[int, ...]], Met] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
            weight = given["weight"]
            key = (weight.data_ptr(), tuple(weight.shape))
            if key not in self._met:
                self._met[key] = self._inside(weight)
            if self._met[key].names:
                bias = given.get("bias")
                y = out if bias is None else out - bias
                x = given["input"].reshape(-1, weight.shape[1])
                self.listen(self._met[key], x, y.reshape(-1, weight.shape[0]))
        return out

    def _inside(self, weight: torch.Tensor) -> Met:
        """The matrices that are whole rows of `weight` (m, n), by where they lie in memory."""
        if self._places is None:  # the layer is loaded when its first product is made
            self._places = self._find()
        row, start = weight.shape[1] * weight.element_size(), weight.data_ptr()
        names, rows = [], []
        for address, matrix in self._places:
            first, rest = divmod(address - start, row)
            if matrix.shape[1] == weight.shape[1] and not rest and 0 <= first <= len(weight) - matrix.shape[0]:
                names.append(matrix.name)
                rows.append(slice(first, first + matrix.shape[0]))
        return Met(tuple(names), tuple(rows))

    def _find(self) -> list[tuple[int, Matrix]]:
        by_tensor: dict[str, list[Matrix]] = {}
        for matrix in self.matrices:
            by_tensor.setdefault(matrix.tensor, []).append(matrix)
        found = []
        prefix = f"model.layers.{self.layer}."
        for short, parameter in self.model.inner.layers[self.layer].named_parameters():
            for part in parts_of(self.model.checkpoint, prefix + short, tuple(parameter.shape)):
                for matrix in by_tensor.get(part.tensor, ()):
                    place, cut = parameter.data[part.where], matrix.cut
                    if cut is not None:
                        place = place.view(cut.view)[tuple(slice(*axis) for axis in cut.index)]
                    if place.is_contiguous() and (cut is None or not cut.transposed):
                        found.append((place.data_ptr(), matrix))
        return found
