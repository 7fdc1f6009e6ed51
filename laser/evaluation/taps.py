"""Listen in on a layer: every product with a weight, its inputs and outputs, whatever module makes it.

Hooks on modules would miss the experts, which are slices of 3-D parameters and no modules. So the calls of torch that
multiply are watched, and the weight in a call is known by where its memory lies. An expert's inputs are then by
themselves the tokens that were routed to it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from laser.checkpoint.matrices import Matrix
from laser.evaluation.streaming import LayeredModel


@dataclass(frozen=True)
class SharedInput:
    """Matrices that are multiplied in one call: their names, and which of the output's columns are whose."""

    names: tuple[str, ...]
    rows: tuple[slice | torch.Tensor, ...]


# x @ w: weights that are stored transposed (GPT-OSS), or those of all experts in one call (Llama 4).
MATMULS = (
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.mm,
    torch.Tensor.mm,
    torch.bmm,
    torch.Tensor.bmm,
)

# (which matrices, inputs (T, n), outputs without bias (T, m of all rows))
Listener = Callable[[SharedInput, torch.Tensor, torch.Tensor], None]


def run_one_expert_at_a_time(model: LayeredModel) -> None:
    """Have a mixture's experts computed one by one with plain products; the fast kernels hide them in one call."""
    config = model.model.config
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"


class Tap(TorchFunctionMode):
    """Inside, `listen` is called with every product of decoder layer `layer` with one of the `matrices`.

    back: called likewise in a pass back, with the gradient at the outputs in the place of the outputs.
    """

    def __init__(
        self,
        model: LayeredModel,
        layer: int,
        matrices: Sequence[Matrix],
        listen: Listener,
        back: Listener | None = None,
    ) -> None:
        super().__init__()
        self.listen, self.back, self.block = listen, back, model.blocks[layer]
        self.parts, self.prefix = model.parts(layer), f"{model.stack}.{layer}."
        self.matrices = matrices
        # Found at the layer's first product, for it is loaded by then. By address, each with its place in their order.
        self._places: list[tuple[int, Place]] = []
        self._storages: set[int] = set()
        self._known: dict[tuple[int, tuple[int, ...], tuple[int, ...]], SharedInput] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
            weight, bias = given["weight"], given.get("bias")
            self._hear(weight, given["input"], out, bias)
        elif func is torch.addmm and len(args) == 3 and not kwargs:  # GPT-2 stores its weights transposed
            self._hear(args[2].T, args[1], out, args[0])
        elif func in MATMULS and len(args) == 2 and args[1].ndim == 2:
            self._hear(args[1].T, args[0], out)
        elif func in MATMULS and len(args) == 2 and args[0].ndim == args[1].ndim == 3:
            for number, (x, weight) in enumerate(zip(*args, strict=False)):
                self._hear(weight.T, x, out, number=number)
        return out

    def _hear(
        self,
        weight: torch.Tensor,
        x: torch.Tensor,
        out: torch.Tensor,
        bias: torch.Tensor | None = None,
        number: int | None = None,
    ) -> None:
        """out = weight x + bias, `weight` (m, n) however it is strided; number: of a product among several in `out`."""
        storages = self._storages or {parameter.untyped_storage().data_ptr() for parameter in self.block.parameters()}
        if weight.untyped_storage().data_ptr() not in storages:  # two activations, as in attention
            return
        if not self._storages:
            self._storages, self._places = storages, sorted(enumerate(self._find()), key=_address)
        key = (weight.data_ptr(), tuple(weight.shape), weight.stride())
        if key not in self._known:
            self._known[key] = self._inside(weight)
        (m, n), what = weight.shape, self._known[key]
        # Where several experts are multiplied at once, inputs of 0 are tokens of others.
        routed = ... if number is None else x.any(dim=-1)
        x = x.reshape(-1, n)[routed]
        if not what.names or not len(x):
            return

        def rows(of_out: torch.Tensor) -> torch.Tensor:
            return (of_out if number is None else of_out[number]).reshape(-1, m)[routed]

        self.listen(what, x, rows(out if bias is None else out - bias))
        if (back := self.back) is not None:
            if not out.requires_grad:  # of inputs that no state of the model reaches
                out.requires_grad_(True)
            out.register_hook(lambda gradient: back(what, x, rows(gradient)))

    def _inside(self, weight: torch.Tensor) -> SharedInput:
        """The matrices that are rows of `weight` (m, n), all or some, by where they lie in memory."""
        stride, across = weight.stride()
        begin, end = weight.data_ptr(), weight.data_ptr() + len(weight) * stride * weight.element_size()
        # Of a layer's hundreds of experts only those that begin in `weight` are looked at.
        near = (bisect_left(self._places, at, key=_address) for at in (begin, end))
        names, rows = [], []
        for _, (matrix, start, offsets, between) in sorted(self._places[slice(*near)], key=itemgetter(0)):
            at = offsets + (start - begin) // weight.element_size()
            first, last = divmod(int(at[0]), stride), divmod(int(at[-1]), stride)
            inside = not first[1] and not last[1] and 0 <= first[0] <= last[0] < len(weight)
            if inside and matrix.shape[1] == weight.shape[1] and between in (across, None) and not (at % stride).any():
                names.append(matrix.name)
                rows.append(_as_slice(at // stride))
        return SharedInput(tuple(names), tuple(rows))

    def _find(self) -> list[Place]:
        """Each matrix (m, n) as it lies in the layer's parameters."""
        by_tensor: dict[str, list[Matrix]] = {}
        for matrix in self.matrices:
            by_tensor.setdefault(matrix.tensor, []).append(matrix)
        found = []
        for short, parameter in self.block.named_parameters():
            for part in self.parts.get(self.prefix + short, ()):
                for matrix in by_tensor.get(part.tensor, ()):
                    if place := _place(matrix, parameter.data[part.where]):
                        found.append(place)
        return found


# A matrix (m, n), the address of its first element, where its rows begin behind that (m,), and between two columns;
# both in elements, None for a single column.
Place = tuple[Matrix, int, torch.Tensor, int | None]


def _address(numbered: tuple[int, Place]) -> int:
    return numbered[1][1]


def _place(matrix: Matrix, stored: torch.Tensor) -> Place | None:
    """None where its columns are not evenly apart: no single product has them."""
    part, place = matrix.part, stored
    if part is not None:
        place = stored.view(part.view)[tuple(slice(*axis) for axis in part.index)]
    if place.ndim < 2 or matrix.shape != (part.shape if part else tuple(place.shape)):
        return None
    joined, last = _offsets(place.shape[:-1], place.stride()[:-1]), _offsets(place.shape[-1:], place.stride()[-1:])
    rows, columns = (last, joined) if part is not None and part.transposed else (joined, last)
    steps = columns.diff().unique()
    if len(steps) > 1:
        return None
    return matrix, place.data_ptr(), rows, int(steps[0]) if len(steps) else None


def _offsets(shape: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
    """Of every element of these axes from the first, the last axis running fastest."""
    offsets = torch.zeros(1, dtype=torch.long)
    for size, stride in zip(shape, strides, strict=True):
        offsets = (offsets[:, None] + stride * torch.arange(size)).flatten()
    return offsets


def _as_slice(rows: torch.Tensor) -> slice | torch.Tensor:
    steps = rows.diff().unique()
    if len(steps) > 1:
        return rows
    step = int(steps[0]) if len(steps) else 1
    return slice(int(rows[0]), int(rows[-1]) + 1, step)
