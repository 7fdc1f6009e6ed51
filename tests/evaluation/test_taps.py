"""What calibration meets, family by family: every matrix, however it is stored, with its own inputs and outputs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sampled
from families import build
from test_stream_families import STREAMED, WINDOWS

import laser
from laser.calibration import calibrate
from laser.evaluation.streaming import LayeredModel
from laser.evaluation.taps import SharedInput, Tap, run_one_expert_at_a_time
from laser.evaluation.text import Windows

# A family for each way in which matrices are stored and met: the first of the table, and what is stored otherwise.
STORED = [*STREAMED[:22], "Qwen3-Next", "Granite 4", "Falcon, grouped", "LFM2", "Mamba", "Phi-4-multimodal"]


@pytest.mark.slow
@pytest.mark.parametrize("family", STORED[::2])  # the test below meets all of them
def test_every_matrix_of_a_layer_is_met_with_outputs_of_its_own(family: str, tmp_path: Path) -> None:
    """Outputs as for inputs wider than 4096, whose whole moment is never formed.

    Parts of a fused tensor share their inputs.
    """
    build(family).save_pretrained(tmp_path / "model")
    checkpoint = laser.open_checkpoint(tmp_path / "model")
    windows = Windows(tuple(WINDOWS) * 4, "t", "0", 17, "windows", True, None)
    whole, wide = (
        calibrate(checkpoint, windows, tmp_path / f"{side}.safetensors", shrink=True, full_side=side)
        for side in (4096, 0)
    )
    for moments in (whole, wide):
        assert all(map(moments.tokens, moments.sites)), [n for n in moments.sites if not moments.tokens(n)]
        assert np.isfinite([site.fourth for site in moments.sites.values()]).all()
    forms = set()
    for matrix in laser.list_matrices(checkpoint):
        if matrix.name in whole.sites:
            W = checkpoint.read(matrix.tensor, matrix.part)
            metric, known = wide.metric(matrix.name, W), whole.metric(matrix.name, W)
            forms.add(metric.form)
            if metric.form == "outputs":
                exact = W.double() @ known.moment @ W.double().T
                assert torch.allclose(metric.moment, exact, atol=1e-5 * float(exact.max())), matrix.name
    assert "outputs" in forms


@pytest.mark.parametrize("family", sampled(STORED, 9))
def test_what_is_met_is_the_product_with_the_stored_matrix(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path / "model")
    checkpoint = laser.open_checkpoint(tmp_path / "model")
    model = LayeredModel(checkpoint, dtype="float32")
    run_one_expert_at_a_time(model)
    chosen = [m for m in laser.list_matrices(checkpoint) if laser.Selection().why_not(m) is None]
    stored = {m.name: (m.tensor, m.part) for m in chosen}
    states, met = model.embed(WINDOWS), set[str]()
    for layer in range(model.layers):
        matrices = [m for m in chosen if m.layer == layer]

        def listen(what: SharedInput, x: torch.Tensor, y: torch.Tensor) -> None:
            for name, rows in zip(what.names, what.rows, strict=True):
                wanted = x @ checkpoint.read(*stored[name]).float().T
                assert torch.allclose(wanted, y[:, rows], atol=1e-5 * float(wanted.abs().max())), name
                assert x.any(dim=1).all()  # no token of another expert
            met.update(what.names)

        with Tap(model, layer, matrices, listen):
            model.run_layer(layer, states)
    experts = {m.name for m in chosen if m.expert is not None}
    assert met <= set(stored) and bool(met & experts) == bool(experts)
