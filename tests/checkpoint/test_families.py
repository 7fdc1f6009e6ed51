"""Names to roles: every tensor of every family has one, and similar names are not confused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import laser
from laser.checkpoint.families import Matrix, doubts, list_matrices
from laser.checkpoint.reader import open_checkpoint
from laser.errors import CheckpointError


def named(path: Path) -> dict[str, Matrix]:
    return {m.name: m for m in list_matrices(open_checkpoint(path))}


def test_mixtral(pico: Path) -> None:
    matrices = named(pico)
    expert = matrices["model.layers.2.block_sparse_moe.experts.3.w2.weight"]
    assert (expert.role, expert.layer, expert.expert, expert.shape) == ("w2", 2, 3, (32, 48))
    assert matrices["model.layers.1.self_attn.k_proj.weight"].role == "k"
    assert matrices["model.layers.1.block_sparse_moe.gate.weight"].role == "router"
    assert matrices["model.embed_tokens.weight"].role == "embedding"
    assert matrices["lm_head.weight"].role == "head"
    assert {m.role for m in matrices.values() if not m.is_matrix} == {"norm"}
    assert "other" not in {m.role for m in matrices.values()}


@pytest.mark.parametrize("family", ["mistral", "llama"])
def test_dense(family: str, make_pico: Callable[..., Path]) -> None:
    names = [f"model.layers.11.mlp.{r}_proj.weight" for r in ("gate", "up", "down")]
    tensors = {name: torch.zeros(4, 6) for name in names} | {"model.layers.1.self_attn.q_proj.weight": torch.ones(4, 4)}
    found = named(make_pico(model_type=family, shards=1, tensors=tensors))
    assert [found[n].role for n in names] == ["gate", "up", "down"]
    assert {m.layer for m in found.values()} == {1, 11}


def test_what_the_row_does_not_know_is_other_and_not_guessed(make_pico: Callable[..., Path]) -> None:
    names = [
        "model.layers.1.mlp.gate_proj.weight.extra",
        "x.model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weights",
        "model.layers.x.self_attn.q_proj.weight",
        "model.layers.1.block_sparse_moe.experts.0.w4.weight",
    ]
    found = named(make_pico(shards=1, tensors={name: torch.zeros(4, 4) for name in names}))
    assert {m.role for m in found.values()} == {"other"}


def test_an_unknown_family_is_guessed_and_the_guesses_are_told(make_pico: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(make_pico(model_type="mixtral_of_tomorrow", shards=1))
    matrices = list_matrices(checkpoint)
    assert {m.role for m in matrices} == {m.role for m in list_matrices(open_checkpoint(make_pico("known")))}
    told = doubts(checkpoint, matrices)
    assert told is not None
    assert "model_type 'mixtral_of_tomorrow' is not in the table" in told
    assert "model.layers.N.block_sparse_moe.experts.N.wN.weight (12) for w1" in told
    assert "model.layers.N.input_layernorm.weight (3) for kept, no matrix" in told


def test_tensors_without_a_row_are_told(make_pico: Callable[..., Path]) -> None:
    tensors = {
        "model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4),
        "model.layers.0.adapter.weight": torch.ones(4, 4),
    }
    checkpoint = open_checkpoint(make_pico(tensors=tensors, shards=1))
    assert "they are kept as they are: model.layers.0.adapter.weight;" in str(
        doubts(checkpoint, list_matrices(checkpoint))
    )


@pytest.mark.parametrize(
    ("family", "name", "shape", "config", "message"),
    [
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight", (65, 32), {}, r"\[65, 32\], expected 32 \+ 16 \+ 16 rows"),
        ("phi3", "model.layers.0.mlp.gate_up_proj.weight", (7, 4), {}, "a dimension that 2 parts share equally"),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj", (4, 8), {}, r"expected 3 dimensions \(expert column row\)"),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj", (4, 0, 8), {}, "none of them empty"),
        ("dbrx", "transformer.blocks.0.ffn.experts.mlp.w1", (9, 8), {}, "4 equal parts, one per expert"),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.weight", (9, 8), {}, "4 equal parts, one per head"),
        (
            "dbrx",
            "transformer.blocks.0.ffn.experts.mlp.w1",
            (8, 8),
            {"num_local_experts": "4"},
            "holds none of num_loc",
        ),
    ],
)
def test_a_fused_tensor_of_another_shape_is_refused(
    family: str,
    name: str,
    shape: tuple[int, ...],
    config: dict[str, Any],
    message: str,
    make_pico: Callable[..., Path],
) -> None:
    path = make_pico(model_type=family, tensors={name: torch.zeros(shape)}, shards=1, **config)
    with pytest.raises(CheckpointError, match=message) as caught:
        named(path)
    assert "use the config that belongs to these weights" in str(caught.value)


def test_a_name_that_a_cut_would_take_is_refused(make_pico: Callable[..., Path]) -> None:
    name = "model.layers.0.mlp.gate_up_proj.weight"
    path = make_pico(model_type="phi3", tensors={name: torch.zeros(4, 4), f"{name}[up]": torch.zeros(2, 4)}, shards=1)
    with pytest.raises(CheckpointError, match=r"two matrices would be called .*gate_up_proj.weight\[up\]"):
        named(path)


def test_what_the_index_does_not_name_is_cut_like_the_rest(pico: Path) -> None:
    """transformers loads every tensor of a shard; so such a tensor is read, planned and accounted for."""
    path, name = pico / "model.safetensors.index.json", "model.layers.1.self_attn.q_proj.weight"
    index = json.loads(path.read_text())
    del index["weight_map"][name]
    path.write_text(json.dumps(index))
    with pytest.warns(laser.DoubtWarning, match=f"{name} is in .* and not in the index"):
        plan = laser.make_plan(laser.scan(laser.open_checkpoint(pico)), "rank:4")
    assert name in plan.reductions and plan.source.unindexed == 0 and plan.coverage["unaccounted"] == 0
