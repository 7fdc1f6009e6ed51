"""How much the loss minds an error of each matrix's outputs: the mean square of its gradient there.

Layers are walked forwards, what enters each is kept, and then backwards, where each is run again. In memory are one
layer with what autograd keeps of one window, and the kept states, in files beyond the store's limit. Of weights no
gradient is taken.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from laser.checkpoint.matrices import Matrix
from laser.errors import NumericalError, not_finite
from laser.evaluation.activations import Activations
from laser.evaluation.layout import running
from laser.evaluation.streaming import LayeredModel
from laser.evaluation.taps import SharedInput, Tap
from laser.evaluation.text import Window
from laser.spectral.devices import full_precision


def gradients_at_outputs(
    model: LayeredModel,
    windows: Sequence[Window],
    matrices: Mapping[int, Sequence[Matrix]],
    upstream: Activations,
    begun: int | None = None,
    tick: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Of each layer in `matrices`, the last first, the mean square gradient at the outputs of each of them.

    The loss is the mean over all scored tokens, nats per token. The mean is over a matrix's outputs and the tokens that
    it met, for an expert those that were routed to it; what met none is left out.
    upstream: with what is yielded for a layer it holds the gradient at the states that enter that layer.
    begun: the layer of which it holds that already, so that only those before are walked; None: none.
    tick: called with each layer that was walked, forwards and backwards.
    Raises NumericalError for a gradient that is not finite, UsageError for a model that does not run backwards.
    """
    first, end = min(matrices), model.layers if begun is None else min(begun, model.layers)
    if end <= first:
        return
    kept: dict[int, Activations] = {}
    states = model.embed(windows)
    for layer in range(end):
        if layer >= first:
            kept[layer] = model.room_for(windows)
            kept[layer].copy_from(states)
        if layer < end - 1 or begun is None:
            model.run_layer(layer, states)
        tick(layer)
    with running(
        model.checkpoint, "try laser calibrate without --gradients, or laser compensate with --rank", " backwards"
    ):
        if begun is None:
            model.run_back(model.layers + 1, windows, states, upstream)
        model.store.free(states)
        for layer in range(end - 1, first - 1, -1):
            found = _Squares(model.dtype)
            with full_precision(), Tap(model, layer, matrices.get(layer, ()), found.met, found.add):
                model.run_back(layer + 1, windows, kept[layer], upstream)
            model.store.free(kept.pop(layer))
            yield layer, found.means()
            tick(layer)


class _Squares:
    """The unfinished sums of one layer, by the name of the matrix."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.numbers_ = defaultdict[str, int](int)  # tokens times outputs
        self.squares_ = defaultdict[str, float](float)

    def met(self, what: SharedInput, x: torch.Tensor, y: torch.Tensor) -> None:
        for name, rows in zip(what.names, what.rows, strict=True):
            self.numbers_[name] += y[:, rows].numel()

    def add(self, what: SharedInput, x: torch.Tensor, gradient: torch.Tensor) -> None:
        for name, rows in zip(what.names, what.rows, strict=True):
            square = float(gradient[:, rows].float().square().sum())
            if not square < float("inf"):
                raise NumericalError(
                    f"the gradient at the outputs of {name} is not finite: the activations overflow or the weights "
                    f"hold NaN; {not_finite(self.dtype, '--dtype float32 and --force')}"
                )
            self.squares_[name] += square

    def means(self) -> dict[str, float]:
        return {name: self.squares_[name] / count for name, count in self.numbers_.items()}
