"""Listening in on a layer: every product with a weight, its inputs and its outputs, whatever module makes it.

Hooks on modules would miss the experts, which are slices of 3-D parameters and no modules. So calls of
`torch.nn.functional.linear` are watched, and the weight in a call is known by where its memory lies. An expert's inputs
are then by themselves the tokens that were routed to it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from laser.evaluation.layout import parts_of
from laser.evaluation.streaming import LayeredModel


@dataclass(frozen=True)
class Met:
    """Tensors that are multiplied in one call: names in file order and their rows of the output; their shared shape n.

    `rows[i]` is a slice of the output's last dimension.
    """

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
    """Inside, `listen` is told of every product of decoder layer `layer` with one of the tensors `names`."""

    def __init__(self, model: LayeredModel, layer: int, names: Collection[str], listen: Listener) -> None:
        super().__init__()
        self.model, self.layer, self.names, self.listen = model, layer, frozenset(names), listen
        self._met: dict[tuple[int, tuple[int, ...]], Met] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
            weight = given["weight"]
            if self._met is None:  # the layer is loaded when its first product is made
                self._met = self._places()
            met = self._met.get((weight.data_ptr(), tuple(weight.shape)))
            if met is not None:
                bias = given.get("bias")
                y = out if bias is None else out - bias
                self.listen(met, given["input"].reshape(-1, weight.shape[1]), y.reshape(-1, weight.shape[0]))
        return out

    def _places(self) -> dict[tuple[int, tuple[int, ...]], Met]:
        found: dict[tuple[int, tuple[int, ...]], Met] = {}
        prefix = f"model.layers.{self.layer}."
        for short, parameter in self.model.inner.layers[self.layer].named_parameters():
            for part in parts_of(self.model.checkpoint, prefix + short, tuple(parameter.shape)):
                if part.tensor not in self.names:
                    continue
                whole = [i for i in part.where if isinstance(i, int)]
                weight = parameter.data[tuple(whole)]
                rows = next((i for i in part.where if isinstance(i, slice)), slice(None))
                key = (weight.data_ptr(), tuple(weight.shape))
                before = found.get(key, Met((), ()))
                found[key] = Met((*before.names, part.tensor), (*before.rows, rows))
        return found
