"""`laser info`: what a checkpoint holds, by its headers alone, and what a scan would measure of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from laser.checkpoint.matrices import list_matrices
from laser.checkpoint.reader import Checkpoint, open_checkpoint
from laser.inventory import take_inventory
from laser.selection import Selection

Run = Callable[..., tuple[int, str, str]]


def test_it_adds_up_to_the_model_and_reads_no_weight(pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(pico)
    # No weight may be read, and nothing else shows whether one was.
    monkeypatch.setattr(Checkpoint, "raw", lambda *_: pytest.fail("a weight was read"))
    found, matrices = take_inventory(checkpoint), list_matrices(checkpoint)
    assert (found.family, found.known, found.layers, found.experts) == ("mixtral", True, {"decoder": 3}, 4)
    assert sum(kind.count for kind in found.kinds) == len(matrices)
    assert (
        sum(kind.bytes for kind in found.kinds)
        == found.bytes
        == sum(t.end - t.start for t in checkpoint.tensors.values())
    )
    assert found.parameters == sum(m.parameters for m in matrices) == found.bytes // 2  # bf16
    measured = [m for m in matrices if Selection().why_not(m) is None]
    assert sum(kind.count for kind in found.kinds if kind.why_not is None) == len(measured)


def test_it_is_said_in_lines_and_as_one_document(pico: Path, run: Run) -> None:
    code, out, err = run("info", pico)
    assert code == 0 and err == "" and out.startswith("pico: family mixtral, 3 layers, 4 experts\n")
    assert "role router is kept unless asked for" in out and "measured and cut" in out
    code, out, _ = run("info", pico, "--json")
    assert json.loads(out)["layers"] == {"decoder": 3}


def test_a_family_that_is_not_known_is_doubted_in_the_list(make_pico: Callable[..., Path], run: Run) -> None:
    code, out, err = run("info", make_pico("odd", model_type="nobody_knows"))
    assert code == 0 and err == "" and "'nobody_knows' is not in the table of families" in out
    assert not take_inventory(open_checkpoint(make_pico("odd2", model_type="nobody_knows"))).known
