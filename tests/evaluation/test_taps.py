"""What calibration meets, family by family: every matrix that is multiplied as it is stored."""

from pathlib import Path

import numpy as np
import pytest
from families import CONFIGS, build
from test_stream_families import REFUSED, WINDOWS

import laser
from laser.calibration import calibrate
from laser.evaluation.text import Windows

# Stored transposed: no product has them as matrices. Their tokens are 0, and a plan in the data's metric keeps them.
UNMET = ("GPT-OSS", "Llama 4")


@pytest.mark.parametrize("family", [f for f in CONFIGS if f not in REFUSED])
def test_every_matrix_of_a_layer_is_met(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path / "model")
    checkpoint = laser.open_checkpoint(tmp_path / "model")
    windows = Windows(tuple(WINDOWS) * 8, "t", "0", 17, "windows", True, None)
    moments = calibrate(checkpoint, windows, tmp_path / "m.safetensors", shrink=True)
    unmet = {m.name for m in laser.list_matrices(checkpoint) if m.name in moments.sites and not moments.tokens(m.name)}
    assert bool(unmet) == (family in UNMET) and all(".experts." in name for name in unmet)
    assert np.isfinite([site.fourth for site in moments.sites.values()]).all()
