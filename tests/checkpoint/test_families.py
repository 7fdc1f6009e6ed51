"""Names to roles: every tensor of every family has one, and similar names are not confused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from laser.checkpoint.families import Matrix, list_matrices
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


def test_unknown_family_is_refused(make_pico: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="model_type is 'bert', expected one of mixtral, mistral, llama"):
        named(make_pico(model_type="bert"))
