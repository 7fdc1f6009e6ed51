"""delta and unmerge from Python, by names: what they make is what the command line makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Run
from helpers import snapshot
from merges import merged, update
from models import write_model

import laser


@pytest.mark.slow
def test_delta_and_unmerge_are_the_verbs(tmp_path: Path, run: Run) -> None:
    base = write_model(tmp_path / "base")
    tuned = write_model(
        tmp_path / "tuned", lambda name, W: merged(W, update(W, 4, 0.01)) if "q_proj" in name else W, shards=1
    )
    spectra = laser.delta(str(base), tuned, device="cpu")
    assert spectra.delta is not None and any(c.kind == "low rank" for c in spectra.delta.changes.values())
    record = laser.unmerge(str(base), str(tuned), tmp_path / "adapter", device="cpu")
    assert run("unmerge", base, tuned, "-o", tmp_path / "other", "--device", "cpu")[0] == 0
    assert snapshot(tmp_path / "adapter").items() == snapshot(tmp_path / "other").items()
    assert record.shards and run("rebuild", base, tmp_path / "adapter", "-o", tmp_path / "again")[0] == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tuned / "model.safetensors").read_bytes()
    with pytest.raises(laser.OutputError):
        laser.unmerge(base, tuned, tmp_path / "adapter", device="cpu", dtype=torch.bfloat16)
