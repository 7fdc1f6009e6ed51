"""Mean square gradients at outputs: those of the whole model's own backward pass, for every matrix and expert."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backward import squares_by_hand
from conftest import sampled, write_checkpoint_directory
from families import build
from pico_language import dense_tensors, make_model, write_tokenizer
from test_stream_families import STREAMED
from test_stream_families import WINDOWS as FAMILY_WINDOWS

import laser
from laser.checkpoint.matrices import Matrix
from laser.checkpoint.reader import Checkpoint
from laser.errors import NumericalError
from laser.evaluation.activations import Store
from laser.evaluation.gradients import gradients_at_outputs
from laser.evaluation.streaming import LayeredModel
from laser.evaluation.taps import SharedInput, Tap, run_one_expert_at_a_time
from laser.evaluation.text import Window
from laser.selection import Selection


def windows_like(*lengths: tuple[int, int]) -> list[Window]:
    """Windows of so many tokens, of which so many are scored."""
    generator = np.random.default_rng(0)
    return [Window(generator.integers(3, 60, size=length), scored) for length, scored in lengths]


SEVERAL = windows_like((17, 16), (17, 16), (9, 8), (12, 4))  # the last is scored at its tail only


def by_layer(checkpoint: Checkpoint, selection: Selection | None = None) -> dict[int, list[Matrix]]:
    found: dict[int, list[Matrix]] = defaultdict(list)
    for matrix in laser.list_matrices(checkpoint):
        if (selection or Selection()).why_not(matrix) is None and matrix.layer is not None:
            found[matrix.layer].append(matrix)
    return found


def streamed(
    checkpoint: Checkpoint, windows: list[Window], selection: Selection | None = None, store: Store | None = None
) -> dict[str, float]:
    model = LayeredModel(checkpoint, store=store)
    run_one_expert_at_a_time(model)
    upstream = model.room_for(windows)
    walk = gradients_at_outputs(model, windows, by_layer(checkpoint, selection), upstream)
    return {name: square for _, found in walk for name, square in found.items()}


@pytest.mark.parametrize("kind", ["mixtral", "llama", "tied", "sliding"])
def test_they_are_those_of_one_backward_through_the_whole_model(kind: str, tmp_path: Path) -> None:
    checkpoint = laser.open_checkpoint(make_model(tmp_path / "m", kind))
    found, expected = streamed(checkpoint, SEVERAL), squares_by_hand(checkpoint, SEVERAL)
    chosen = {m.name for matrices in by_layer(checkpoint).values() for m in matrices}
    assert found.keys() == (chosen & expected.keys()) and len(found) >= 21
    for name, square in found.items():
        assert square == pytest.approx(expected[name], rel=1e-4), name
    assert streamed(checkpoint, SEVERAL, store=Store(limit=0)) == found  # all states in files
    assert len({round(np.log10(square), 3) for square in found.values()}) > len(found) / 2  # no two are alike


def test_a_walk_that_goes_on_gives_the_same(tmp_path: Path) -> None:
    """From what it had of the last layer; of a selection only the layers down to its first are walked back."""
    checkpoint = laser.open_checkpoint(make_model(tmp_path / "m", "mixtral"))
    model = LayeredModel(checkpoint)
    run_one_expert_at_a_time(model)
    matrices = by_layer(checkpoint, Selection(layers=(1, 2)))
    upstream, ticks = model.room_for(SEVERAL), list[int]()
    walk = gradients_at_outputs(model, SEVERAL, matrices, upstream, tick=ticks.append)
    layer, last = next(walk)
    entering = upstream.hidden.clone()
    assert layer == 2
    (_, before), *rest = walk
    assert (
        not rest
        and ticks == [0, 1, 2, 2, 1]
        and before.keys() | last.keys() == set(streamed(checkpoint, SEVERAL, Selection(layers=(1, 2))))
    )
    upstream.hidden.copy_(entering)
    assert list(gradients_at_outputs(model, SEVERAL, matrices, upstream, begun=2)) == [(1, before)]
    assert list(gradients_at_outputs(model, SEVERAL, matrices, upstream, begun=1)) == []
    assert model.store.used == upstream.hidden.nbytes  # nothing else is kept


def test_a_gradient_that_is_not_finite_is_named(tmp_path: Path) -> None:
    tensors = dense_tensors()
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    make_model(tmp_path / "m", "llama")
    path = write_tokenizer(
        write_checkpoint_directory(tmp_path / "n", tensors, json.loads((tmp_path / "m" / "config.json").read_text()))
    )
    with pytest.raises(NumericalError, match=r"the gradient at the outputs of model\.layers\.\d.* is not finite.*scan"):
        streamed(laser.open_checkpoint(path), SEVERAL)


@pytest.mark.parametrize("family", sampled(STREAMED, 9))
def test_with_the_inputs_they_make_the_gradient_of_the_weight(family: str, tmp_path: Path) -> None:
    """sum of g x^T over the tokens, whatever module multiplies, however the weight is stored."""
    build(family).save_pretrained(tmp_path / "model")
    checkpoint = laser.open_checkpoint(tmp_path / "model")
    model = LayeredModel(checkpoint)
    run_one_expert_at_a_time(model)
    boundaries, states, matrices = {}, model.embed(FAMILY_WINDOWS), by_layer(checkpoint)
    for layer in range(model.layers):
        boundaries[layer + 1] = model.room_for(FAMILY_WINDOWS)
        boundaries[layer + 1].copy_from(states)
        model.run_layer(layer, states)
    boundaries[model.layers + 1] = states
    found: dict[str, Any] = defaultdict(float)

    def back(what: SharedInput, x: torch.Tensor, gradient: torch.Tensor) -> None:
        for name, rows in zip(what.names, what.rows, strict=True):
            found[name] += gradient[:, rows].T @ x.detach()

    upstream = model.room_for(FAMILY_WINDOWS)
    model.run_back(model.layers + 1, FAMILY_WINDOWS, states, upstream)
    for layer in reversed(range(model.layers)):
        with Tap(model, layer, matrices.get(layer, ()), lambda *_: None, back):
            model.run_back(layer + 1, FAMILY_WINDOWS, boundaries[layer + 1], upstream)
    inside = [n for n in found if model.layer_of(n) is not None]
    assert inside
    for name, G in model.gradients(FAMILY_WINDOWS, boundaries, inside):
        assert torch.allclose(found[name], G, rtol=1e-3, atol=1e-5 * float(G.abs().max())), name
