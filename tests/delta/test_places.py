"""Where PEFT has an adapter's factors: names in memory, rows of fused weights, experts in one parameter."""

import re
from pathlib import Path

import pytest
import torch
from conftest import write_checkpoint_directory
from models import EXPERTS, HIDDEN, INNER, LAYERS, llama_config, phi, write_mixtral, write_model

from laser.checkpoint.matrices import list_matrices
from laser.checkpoint.reader import open_checkpoint
from laser.differences.places import (
    ModulePlace,
    module_places,
    names_at,
    of_expert,
    of_experts,
    rows_in_parameter,
    stems,
    units,
)


def test_modules_have_the_names_of_their_tensors(tmp_path: Path) -> None:
    matrices = list_matrices(open_checkpoint(write_model(tmp_path / "model")))
    places = module_places(matrices)
    assert places["model.layers.0.mlp.up_proj.weight"].weight == "model.layers.0.mlp.up_proj"
    assert places["model.embed_tokens.weight"].group == "embedding" and places["lm_head.weight"].group == "module"
    assert not any("norm" in name for name in places)
    assert [len(unit) for unit in units(matrices, places)] == [1] * len(matrices)


def test_experts_are_parameters_in_memory(tmp_path: Path) -> None:
    """w1 and w3 of an expert are rows of one parameter, in this order; a router has no place."""
    matrices = list_matrices(open_checkpoint(write_mixtral(tmp_path / "model")))
    places = module_places(matrices)
    assert not any("block_sparse_moe.gate" in name for name in places)
    one, other = (places[f"model.layers.1.block_sparse_moe.experts.2.w{i}.weight"] for i in (1, 3))
    assert one == ModulePlace("model.layers.1.mlp.experts", 2 * INNER, 0, "gate_up_proj", 2, EXPERTS)
    assert other.weight == one.weight and other.start == INNER
    stacked = [unit for unit in units(matrices, places) if len(unit) > 1]
    assert len(stacked) == EXPERTS * LAYERS and {m.role for unit in stacked for m in unit} == {"w1", "w3"}


def test_experts_as_they_are_saved_in_memory(tmp_path: Path) -> None:
    """One tensor for all experts: the same places, and rows as the slices have them."""
    at = "model.layers.0.mlp.experts."
    tensors = {f"{at}gate_up_proj": torch.zeros(EXPERTS, 2 * INNER, HIDDEN)}
    tensors |= {f"{at}down_proj": torch.zeros(EXPERTS, HIDDEN, INNER), "model.norm.weight": torch.ones(HIDDEN)}
    config = llama_config(model_type="mixtral", num_local_experts=EXPERTS)
    matrices = list_matrices(open_checkpoint(write_checkpoint_directory(tmp_path / "m", tensors, config, 1)))
    places = module_places(matrices)
    for m in matrices:
        if m.is_matrix:
            place = places[m.name]
            assert (place.expert, place.experts) == (m.expert, EXPERTS)
            start = INNER if m.role == "up" else 0
            assert torch.equal(rows_in_parameter(m, place), torch.arange(start, start + m.shape[0]))


def test_rows_of_a_fused_module(tmp_path: Path) -> None:
    """q, k and v lie one after the other, and cover the tensor."""
    config = llama_config(model_type="phi3", num_key_value_heads=2, architectures=["Phi3ForCausalLM"])
    matrices = list_matrices(open_checkpoint(write_checkpoint_directory(tmp_path / "phi", phi(), config)))
    places = module_places(matrices)
    fused = next(unit for unit in units(matrices, places) if len(unit) == 3)
    rows = torch.cat([rows_in_parameter(m, places[m.name]) for m in fused])
    assert torch.equal(rows, torch.arange(2 * HIDDEN)) and places[fused[0].name].weight.endswith("qkv_proj")


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 3, 2)])
def test_factors_of_experts_are_where_peft_looks(ranks: tuple[int, ...]) -> None:
    """The product of PEFT's own reshapes and einsum, written out; an expert without an adapter gets none."""
    generator = torch.Generator().manual_seed(0)
    E, m, n = 4, 6, 5
    factors = {
        expert: (torch.randn(rank, n, generator=generator), torch.randn(m, rank, generator=generator))
        for expert, rank in zip((0, 2, 3), ranks, strict=True)
    }
    place = ModulePlace("experts", m, 0, "down_proj", 0, E)
    A, B = of_experts(factors, place)
    assert A.shape == (E * max(ranks), n) and B.shape == (m, E * max(ranks))
    X = torch.einsum("ore,eri->eoi", B.reshape(m, -1, E), A.reshape(E, -1, n))
    for expert in range(E):
        a, b = of_expert(A, B, ModulePlace("experts", m, 0, "down_proj", expert, E))
        wanted = factors[expert][1] @ factors[expert][0] if expert in factors else torch.zeros(m, n)
        assert torch.allclose(b @ a, wanted, atol=1e-6) and torch.allclose(X[expert], wanted, atol=1e-6)


def test_names_in_the_file() -> None:
    """Of two parameters of one module gate_up_proj is wrapped inside; a single one is not."""
    gate, down = (ModulePlace("layers.0.mlp.experts", 4, 0, name, 0, 2) for name in ("gate_up_proj", "down_proj"))
    alone = ModulePlace("layers.1.mlp.experts", 4, 0, "gate_up_proj", 0, 2)
    found = stems([gate, down, alone])
    assert found[gate.weight] == "base_model.model.layers.0.mlp.experts.base_layer"
    assert found[down.weight] == "base_model.model.layers.0.mlp.experts"
    assert found[alone.weight] == "base_model.model.layers.1.mlp.experts"
    assert names_at("x", ModulePlace("embed", 4, embedding=True)) == ("x.lora_embedding_A", "x.lora_embedding_B")
    assert re.fullmatch(r"x\.lora_[AB]\.weight", names_at("x", gate)[0])
