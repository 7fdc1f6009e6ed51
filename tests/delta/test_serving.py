"""Whether vLLM takes an adapter, and the rules of its published sources, which can fail."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from vllm_rules import require_vllm_form

from laser.differences.serving import MAX_LORA_RANKS, in_vllm

FUSED = "model.layers.0.mlp.experts"


def written(folder: Path, modules: dict[str, int], **config: object) -> str:
    """in_vllm of an adapter with these modules and ranks."""
    most = max(modules.values())
    stated = {"r": most, "lora_alpha": most, "rank_pattern": {}, "modules_to_save": None}
    (folder / "adapter_config.json").write_text(json.dumps(stated | config))
    tensors = {f"base_model.model.{name}.lora_A.weight": torch.zeros(rank, 4) for name, rank in modules.items()}
    tensors |= {name.replace("_A", "_B"): torch.zeros(4, len(A)) for name, A in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return in_vllm(folder)


def test_the_rank_that_it_has_to_be_told(tmp_path: Path) -> None:
    for rank, most in ((1, 1), (2, 8), (8, 8), (9, 16), (100, 128)):
        assert written(tmp_path, {"model.layers.0.mlp.up_proj": rank}).endswith(f"--max-lora-rank {most}`")
    other = written(tmp_path, {"a": 4, "b": 20}, r=4, rank_pattern={"b": 20})
    assert other.endswith("--max-lora-rank 32`"), "r is the usual rank, and others are in the pattern"
    assert "is 513" in written(tmp_path, {"a": 513}) and MAX_LORA_RANKS[-1] == 512


def test_experts_come_as_a_pair(tmp_path: Path) -> None:
    both = written(tmp_path, {FUSED: 4, f"{FUSED}.base_layer": 4})
    assert both.endswith("--max-lora-rank 8` with `--enable-mixed-moe-lora-format`")
    for half in (FUSED, f"{FUSED}.base_layer"):
        assert f"does not take it: of base_model.model.{FUSED}" in written(tmp_path, {half: 4})


def test_what_was_trained_whole_is_refused(tmp_path: Path) -> None:
    assert "lm_head was trained whole" in written(tmp_path, {"a": 4}, modules_to_save=["lm_head"])


@pytest.mark.parametrize("change", [{"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"lora_alpha": 3}])
def test_the_rules_can_fail(tmp_path: Path, change: dict[str, object]) -> None:
    fair: dict[str, object] = {"bias": "none", "use_dora": False, "alpha_pattern": {}, "target_modules": ["up_proj"]}
    written(tmp_path, {"model.layers.0.mlp.up_proj": 4}, **fair)
    require_vllm_form(tmp_path)
    written(tmp_path, {"model.layers.0.mlp.up_proj": 4}, **(fair | change))
    with pytest.raises(AssertionError):
        require_vllm_form(tmp_path)
