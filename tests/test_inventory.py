"""`laser info`: what a checkpoint holds, by its headers alone, and what a scan would measure of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import mixtral_config, mixtral_tensors, write_checkpoint_directory

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


def gptq_of(m: int, n: int, groups: int = 2) -> dict[str, torch.Tensor]:
    """What GPTQ stores of a weight (m, n) in 4 bits, all zeros."""
    packed = {"qweight": torch.zeros(n // 8, m), "qzeros": torch.zeros(groups, m // 8)}
    return {part: zeros.int() for part, zeros in packed.items()} | {"scales": torch.zeros(groups, m).half()}


@pytest.mark.parametrize("fused", [False, True])
def test_packed_weights_are_listed_as_they_are_stored(run: Run, tmp_path: Path, fused: bool) -> None:
    """The bytes are those of the files, also where the q, k and v of one packed tensor share them."""
    tensors, config = mixtral_tensors(), mixtral_config()
    if fused:
        config = {"model_type": "phi3", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
        tensors = {"model.embed_tokens.weight": torch.zeros(64, 32)}
        tensors |= {f"model.layers.0.self_attn.qkv_proj.{part}": W for part, W in gptq_of(64, 32).items()}
    else:
        q = "model.layers.0.self_attn.q_proj."
        m, n = tensors.pop(f"{q}weight").shape
        tensors |= {q + part: W for part, W in gptq_of(m, n).items()}
    config |= {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 16}}
    found = take_inventory(open_checkpoint(write_checkpoint_directory(tmp_path / "packed", tensors, config, 1)))
    assert found.packed == "GPTQ" and found.tensors == len(tensors)
    assert found.bytes == sum(W.nbytes for W in tensors.values()) == sum(kind.bytes for kind in found.kinds)
    packed = {kind.role: kind for kind in found.kinds if kind.dtype == "GPTQ I32"}
    assert packed.keys() == ({"q", "k", "v"} if fused else {"q"})
    assert all(kind.count == 1 and kind.bytes < kind.parameters for kind in packed.values())
    code, out, _ = run("info", tmp_path / "packed")
    assert code == 0 and "its weights are packed (GPTQ)" in out and "  measured\n" in out
    assert "measured and cut" not in out
