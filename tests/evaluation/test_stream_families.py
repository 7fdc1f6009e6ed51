"""Layer by layer, every family is as transformers' whole model; edits are what they are in that."""

from pathlib import Path

import numpy as np
import pytest
import torch
from families import RANK, build, causal, reduce_in_memory

import laser
from laser.checkpoint.matrices import read_matrix
from laser.errors import CheckpointError, UsageError
from laser.evaluation.streaming import LayeredModel, token_losses
from laser.evaluation.text import Window
from laser.spectral.devices import choose_device
from laser.spectral.factorise import truncate

# What is more than its layers one after the other: Gemma 3n carries four streams of states through them.
REFUSED = {"Gemma 3n": r"its layers take states of shape \(2, 1, 16, 32\), expected \(1, 16, 32\)"}
STREAMED = [family for family in causal() if family not in REFUSED]
WINDOWS = [Window(np.random.default_rng(i).integers(3, 64, 17).astype(np.int64), 16) for i in range(2)]


def whole_losses(model: torch.nn.Module) -> list[float]:
    sums = []
    for window in WINDOWS:
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(window.tokens[:-1])[None]).logits[0]
        sums.append(float(token_losses(logits, torch.from_numpy(window.tokens[1:]))[0].double().sum()))
    return sums


@pytest.mark.parametrize("family", REFUSED)
def test_refused_by_layers(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=f"{REFUSED[family]}.*; try laser eval without --stream"):
        LayeredModel(laser.open_checkpoint(tmp_path)).losses(WINDOWS)


@pytest.mark.slow
@pytest.mark.parametrize("family", STREAMED)
def test_streamed_and_edited_as_in_memory(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    checkpoint = laser.open_checkpoint(tmp_path)
    chosen = [m.name for m in laser.list_matrices(checkpoint) if laser.Selection().why_not(m) is None]
    edits = {n: truncate(read_matrix(checkpoint, n), RANK, choose_device("cpu")).matrix for n in chosen}
    whole = whole_losses(model)
    reduce_in_memory(model)
    whole_after = whole_losses(model)
    for resident in (0, 2, None):
        layered = LayeredModel(checkpoint, resident=resident)
        before = layered.losses(WINDOWS).sums
        assert np.allclose(before, whole, atol=1e-4)
        for name, matrix in edits.items():
            layered.edit(name, matrix)
        after = layered.losses(WINDOWS).sums
        for name in edits:
            layered.edit(name, None)
        assert np.allclose(layered.losses(WINDOWS).sums, before, atol=1e-6)
        assert np.allclose(after, whole_after, atol=1e-3) and not np.allclose(after, before, atol=1e-1)


def test_gradients_of_the_matrices_in_a_fused_tensor(tmp_path: Path) -> None:
    """Each is the part of the whole model's gradient that lies where its weights lie."""
    model = build("GPT-OSS")
    model.save_pretrained(tmp_path)
    layered = LayeredModel(laser.open_checkpoint(tmp_path), resident=None)
    boundaries, activations = {}, layered.embed(WINDOWS)
    for layer in range(layered.layers):
        boundaries[layer + 1] = layered.store.allocate([16, 16], layered.width, layered.dtype)
        boundaries[layer + 1].copy_from(activations)
        layered.run_layer(layer, activations)
    boundaries[layered.layers + 1] = activations
    fused = "model.layers.1.mlp.experts.gate_up_proj"
    found = dict(
        layered.gradients(WINDOWS, boundaries, [f"{fused}[{e},{part}]" for e in range(4) for part in ("gate", "up")])
    )
    loss = torch.zeros(())
    for window in WINDOWS:
        logits = model(input_ids=torch.from_numpy(window.tokens[:-1])[None]).logits[0]
        loss = loss + token_losses(logits, torch.from_numpy(window.tokens[1:]))[0].sum() / 32
    loss.backward()
    expected = model.get_parameter(fused).grad
    for e in range(4):
        assert torch.allclose(found[f"{fused}[{e},gate]"], expected[e][:, ::2].T, atol=1e-5)
        assert torch.allclose(found[f"{fused}[{e},up]"], expected[e][:, 1::2].T, atol=1e-5)


def test_a_matrix_that_is_not_there_is_named(tmp_path: Path) -> None:
    build("Phi-3").save_pretrained(tmp_path)
    checkpoint = laser.open_checkpoint(tmp_path)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert read_matrix(checkpoint, f"{name}[k]").shape == (16, 32)
    with pytest.raises(CheckpointError, match=r"holds no matrix .*qkv_proj.weight; try laser scan --dry-run"):
        read_matrix(checkpoint, name)
    with pytest.raises(UsageError, match="is used by no piece"):
        LayeredModel(checkpoint).first_piece(name)
