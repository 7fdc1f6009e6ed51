"""laser rebuild of a PEFT adapter without a record: the ordinary merge, one matrix in memory, or a refusal by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from helpers import snapshot, tensors_in
from merges import BF16, weights
from models import HIDDEN, tensors, write_model
from safetensors.torch import save_file

RANK = 4
MODULES = {
    f"model.layers.{i}.self_attn.{role}_proj": rows
    for i in (0, 1)
    for role, rows in (("q", HIDDEN), ("v", HIDDEN // 2))
}


def write_adapter(path: Path, config: dict[str, Any] | None = None, **more: torch.Tensor) -> Path:
    path.mkdir()
    stated = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj", "v_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(stated | (config or {})))
    found = {}
    for seed, (module, rows) in enumerate(MODULES.items()):
        rank = (config or {}).get("rank_pattern", {}).get(module.partition("layers.")[2], RANK)
        found[f"base_model.model.{module}.lora_A.weight"] = weights(rank, HIDDEN, seed, torch.float32)
        found[f"base_model.model.{module}.lora_B.weight"] = weights(rows, rank, seed + 9, torch.float32)
    save_file(found | more, path / "adapter_model.safetensors")
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base")


def expected(adapter: Path, name: str, W: torch.Tensor, scale: float, how: str) -> torch.Tensor:
    found, module = tensors_in(adapter), f"base_model.model.{name.removesuffix('.weight')}"
    if f"{module}.lora_A.weight" not in found:
        return W
    X = (found[f"{module}.lora_B.weight"] @ found[f"{module}.lora_A.weight"]) * scale  # in float32, as PEFT does
    return W + X.to(BF16) if how == "delta-first" else (W.float() + X).to(BF16)


@pytest.mark.parametrize("how", ["once", "delta-first"])
@pytest.mark.parametrize("config, scale", [
    ({}, 2.0), ({"use_rslora": True}, 4.0), ({"lora_alpha": 6}, 1.5), ({"alpha_pattern": {"(q|v)_proj": 8}}, 2.0),
])  # fmt: skip
def test_it_is_the_merge_written_out(
    run: Run, base: Path, tmp_path: Path, how: str, config: dict[str, Any], scale: float
) -> None:
    adapter = write_adapter(tmp_path / "adapter", config)
    code, out, err = run("rebuild", base, adapter, "-o", tmp_path / "out", "--formula", how, "--json")
    assert code == 0 and json.loads(out)["formula"] == how, err
    source, result = tensors_in(base), tensors_in(tmp_path / "out")
    assert list(result) == list(source)
    for name, W in source.items():
        assert torch.equal(result[name], expected(adapter, name, W, scale, how)), name
    others = {name: data for name, data in snapshot(base).items() if not name.endswith(".safetensors")}
    assert others.items() <= snapshot(tmp_path / "out").items()


def test_a_rank_of_its_own_and_a_module_trained_whole(run: Run, base: Path, tmp_path: Path) -> None:
    norm = torch.linspace(0.5, 1.5, HIDDEN)
    patterns = {
        "rank_pattern": {"1.self_attn.q_proj": 2},
        "alpha_pattern": {"1.self_attn.q_proj": 2},
        "lora_alpha": RANK,
    }
    adapter = write_adapter(tmp_path / "adapter", patterns, **{"base_model.model.model.norm.weight": norm})
    assert run("rebuild", base, adapter, "-o", tmp_path / "out")[0] == 0
    result = tensors_in(tmp_path / "out")
    assert torch.equal(result["model.norm.weight"], norm.to(BF16))
    for name, W in tensors().items():
        if "norm" not in name:
            assert torch.equal(result[name], expected(adapter, name, W, 1.0, "once")), name


@pytest.mark.parametrize("config, more, message", [
    ({"use_dora": True}, {}, "sets use_dora, which is not merged here"),
    ({"bias": "all"}, {}, "bias is 'all', expected 'none'"),
    ({"peft_type": "LOHA"}, {}, "found an adapter of type 'LOHA', expected 'LORA'"),
    ({"trainable_token_indices": [3]}, {}, "sets trainable_token_indices"),
    ({"r": 8}, {}, "has rank 8 and alpha 8, found 4 in the file"),
    ({}, {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, HIDDEN)}, "which base has not"),
    ({}, {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 63)}, "do not fit model.embed_tokens"),
    ({}, {"base_model.model.model.embed_tokens.lora_magnitude_vector": torch.ones(4)}, "is no part of a plain LoRA"),
    ({}, {"base_model.model.lm_head.base_layer.weight": torch.ones(64, HIDDEN)}, "is not the base's own"),
    ({}, {"base_model.model.model.norm.weight": torch.ones(5)}, r"has shape [5], expected [96]"),
])  # fmt: skip
def test_what_is_no_plain_lora_is_refused(
    run: Run, base: Path, tmp_path: Path, config: dict[str, Any], more: dict[str, torch.Tensor], message: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", config, **more)
    code, _, err = run("rebuild", base, adapter, "-o", tmp_path / "out")
    assert code in (1, 2) and message in err and not (tmp_path / "out").exists()


def test_a_formula_is_for_adapters_without_a_record(run: Run, base: Path, tmp_path: Path) -> None:
    assert run("unmerge", base, base, "-o", tmp_path / "adapter", "--device", "cpu")[0] == 0
    code, _, err = run("rebuild", base, tmp_path / "adapter", "-o", tmp_path / "out", "--formula", "once")
    assert code == 2 and "says itself how it was merged" in err
    code, _, err = run("rebuild", base, base, "-o", tmp_path / "out")
    assert code == 1 and "try the directory of a PEFT adapter" in err
