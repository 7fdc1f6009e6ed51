"""Mean square gradients at outputs: those of the whole model's own backward pass, for every matrix and expert."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sampled
from families import build
from pico_language import make_model
from test_stream_families import STREAMED
from test_stream_families import WINDOWS as FAMILY_WINDOWS

import laser
from laser.checkpoint.matrices import Matrix
from laser.checkpoint.reader import Checkpoint
from laser.evaluation.evaluate import load_whole
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


def streamed(checkpoint: Checkpoint, windows: list[Window], selection: Selection | None = None) -> dict[str, float]:
    model = LayeredModel(checkpoint)
    run_one_expert_at_a_time(model)
    upstream = model.room_for(windows)
    walk = gradients_at_outputs(model, windows, by_layer(checkpoint, selection), upstream)
    return {name: square for _, found in walk for name, square in found.items()}


def by_hand(checkpoint: Checkpoint, windows: list[Window]) -> dict[str, float]:
    """By transformers' whole model, one backward of the mean loss, and a gradient kept at every output.

    An expert's products are written out here, since no module makes them.
    """
    whole: Any = load_whole(checkpoint, "float32")
    whole.config._experts_implementation = "eager"
    outputs: dict[str, list[torch.Tensor]] = defaultdict(list)

    def keep(name: str, y: torch.Tensor) -> torch.Tensor:
        y.retain_grad()
        outputs[name].append(y)
        return y

    def experts(layer: int) -> Any:
        def forward(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            module, prefix = whole.model.layers[layer].mlp.experts, f"model.layers.{layer}.block_sparse_moe.experts."
            out = torch.zeros_like(hidden)
            for expert in range(len(module.gate_up_proj)):
                token, place = torch.where(index == expert)
                if len(token):
                    w1, w3 = module.gate_up_proj[expert].chunk(2)
                    gate = keep(f"{prefix}{expert}.w1.weight", hidden[token] @ w1.T)
                    up = keep(f"{prefix}{expert}.w3.weight", hidden[token] @ w3.T)
                    x = torch.nn.functional.silu(gate) * up
                    y = keep(f"{prefix}{expert}.w2.weight", x @ module.down_proj[expert].T)
                    out = out.index_add(0, token, y * weights[token, place, None])
            return out

        return forward

    for name, module in whole.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_hook(lambda _, __, y, name=name: keep(f"{name}.weight", y))
        if name.endswith("mlp.experts"):
            module.forward = experts(int(name.split(".")[2]))
    loss, total = torch.zeros(()), sum(w.scored for w in windows)
    for window in windows:
        logits = whole(input_ids=torch.from_numpy(window.tokens[:-1])[None], use_cache=False).logits[0]
        targets = torch.from_numpy(window.tokens[1:])
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        loss = loss + losses[-window.scored :].sum() / total
    loss.backward()
    found = {n: torch.cat([g.grad.flatten(0, -2) for g in ys if g.grad is not None]) for n, ys in outputs.items()}
    return {name: float(g.double().square().mean()) for name, g in found.items()}


@pytest.mark.parametrize("kind", ["mixtral", "llama", "tied", "sliding"])
def test_they_are_those_of_one_backward_through_the_whole_model(kind: str, tmp_path: Path) -> None:
    checkpoint = laser.open_checkpoint(make_model(tmp_path / "m", kind))
    found, expected = streamed(checkpoint, SEVERAL), by_hand(checkpoint, SEVERAL)
    chosen = {m.name for matrices in by_layer(checkpoint).values() for m in matrices}
    assert found.keys() == (chosen & expected.keys()) and len(found) >= 21
    for name, square in found.items():
        assert square == pytest.approx(expected[name], rel=1e-4), name
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
