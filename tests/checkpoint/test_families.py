"""Names to roles: every tensor of every family has one, and similar names are not confused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import laser
from laser.checkpoint.matrices import Matrix, doubts, list_matrices
from laser.checkpoint.reader import open_checkpoint
from laser.errors import CheckpointError, UsageError
from laser.selection import Selection, parse_layers


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
    assert told.count("\n") < 6
    for kind in (
        "model.embed_tokens.weight (1)",
        "model.layers.N.block_sparse_moe.gate.weight (3)",
        "lm_head.weight (1)",
    ):
        assert kind in told.partition("kept: ")[2]


def test_tensors_without_a_row_are_told(make_pico: Callable[..., Path]) -> None:
    tensors = {
        "model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4),
        "model.layers.0.adapter.weight": torch.ones(4, 4),
    }
    checkpoint = open_checkpoint(make_pico(tensors=tensors, shards=1))
    assert "they are kept as they are: model.layers.N.adapter.weight (1);" in str(
        doubts(checkpoint, list_matrices(checkpoint))
    )


@pytest.mark.parametrize(
    ("family", "name", "shape", "config", "message"),
    [
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight", (65, 32), {}, r"\[65, 32\], expected 32 \+ 16 \+ 16 rows"),
        ("phi3", "model.layers.0.mlp.gate_up_proj.weight", (7, 4), {}, "a dimension that 2 parts share equally"),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj", (4, 8), {}, r"expected 3 dimensions \(expert column row\)"),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj", (4, 0, 8), {}, "none of them empty"),
        (
            "dbrx",
            "transformer.blocks.0.ffn.experts.mlp.w1",
            (9, 8),
            {"ffn_config": {"moe_num_experts": 4}},
            "4 equal parts, one per expert",
        ),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.weight", (9, 8), {}, "4 equal parts, one per head"),
        (
            "dbrx",
            "transformer.blocks.0.ffn.experts.mlp.w1",
            (8, 8),
            {"ffn_config": {"moe_num_experts": "4"}},
            "holds none of ffn_config.moe_num_experts",
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


@pytest.mark.slow
def test_what_the_index_does_not_name_is_cut_like_the_rest(pico: Path) -> None:
    """transformers loads every tensor of a shard; so such a tensor is read, planned and accounted for."""
    path, name = pico / "model.safetensors.index.json", "model.layers.1.self_attn.q_proj.weight"
    index = json.loads(path.read_text())
    del index["weight_map"][name]
    path.write_text(json.dumps(index))
    with pytest.warns(laser.DoubtWarning, match=f"{name} is in .* and not in the index"):
        plan = laser.make_plan(laser.scan(laser.open_checkpoint(pico)), "rank:4")
    assert name in plan.reductions and plan.source.unindexed == 0 and plan.coverage["unaccounted"] == 0


PICO = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}


def placed(tmp_path: Path, config: dict[str, Any], **shapes: tuple[int, ...] | None) -> dict[str, tuple[str, Any]]:
    """name -> (role, layer as --layers spells it); a shape of None is (32, 32)."""
    save_file({name: torch.ones(shape or (32, 32)) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(PICO | config))
    found = {m.name: (m.role, m.place) for m in list_matrices(open_checkpoint(tmp_path))}
    return {name: found[name] for name in shapes if name in found}


def chosen(matrices: list[Matrix], layers: str | None = None, *roles: str) -> set[str]:
    return {m.name for m in matrices if Selection(parse_layers(layers), roles).why_not(m) is None}


KEPT_EVERYWHERE = {
    "vision_tower.transformer.layers.0.attention.q_proj.weight": ("vision", "vision:0"),
    "visual.blocks.1.attn.qkv.weight": ("vision", "vision:1"),
    "model.visual.merger.mlp.0.weight": ("vision", None),
    "model.vision_model.encoder.layers.3.mlp.fc1.weight": ("vision", "vision:3"),
    "multi_modal_projector.linear_1.weight": ("vision", None),
    "model.connector.modality_projection.proj.weight": ("vision", None),
    "qformer.encoder.layer.2.attention.attention.query.weight": ("vision", "vision:2"),
    "model.embed_vision.embedding_projection.weight": ("vision", None),
    "mlp1.1.weight": ("vision", None),
    "audio_tower.layers.0.self_attn.q_proj.weight": ("audio", "audio:0"),
    "talker.model.layers.0.self_attn.q_proj.weight": ("audio", "audio:0"),
    "model.layers.0.altup.modality_router.weight": ("router", 0),
    "model.altup_projections.0.weight": ("router", None),
    "model.layers.0.mlp.gate.weight": ("router", 0),
    "model.layers.0.mlp.shared_expert_gate.weight": ("router", 0),
    "model.layers.0.mlp.moe_statics.e_score_correction_bias": ("router", 0),
    "model.layers.0.mamba.dt_proj.weight": ("ssm", 0),
    "model.layers.0.mamba.x_proj.weight": ("ssm", 0),
    "model.layers.0.mamba.A_log": ("ssm", 0),
    "model.layers.1.linear_attn.in_proj_ba.weight": ("ssm", 1),
    "model.layers.0.self_attn.relative_attention_bias.weight": ("position", 0),
    "model.layers.0.self_attn.b_proj.weight": ("ssm", 0),
    "model.layers.0.self_attn.g_a_proj.weight": ("ssm", 0),
    "model.layers.0.attn.gk_proj.0.weight": ("ssm", 0),
    "model.layers.0.attn.w_lora.lora.2.weight": ("ssm", 0),
    "backbone.blocks.0.mlstm_layer.igate_preact.weight": ("ssm", 0),
    "model.layers.0.mlp.gate.gate_network.0.weight": ("router", 0),
    "model.layers.0.attn_hyper_connection.input_mix_weight_down.weight": ("router", 0),
    "model.layers.0.attn.compressor.wgate.weight": ("router", 0),
    "model.layers.0.attn.attn_sink_proj.weight": ("sinks", 0),
    "model.layers.0.self_attn.rel_logits_proj.proj": ("position", 0),
    "model.layers.0.input_layernorm.W_down.weight": ("norm", 0),
    "model.layers.0.feed_forward.gate_up_proj_adapter_list.0.1.weight": ("adapter", 0),
    "layer.0.output.adapter_modules.en_XX.dense1.weight": ("adapter", 0),
    "model.layers.0.self_attn.q_proj.lora_A.weight": ("adapter", 0),
    "transformer.wpe.weight": ("position", None),
    "some.embed_tokens.weight": ("embedding", None),
    "some.lm_head.weight": ("head", None),
}


@pytest.mark.parametrize("family", ["llama", "qwen3_next", "gpt2", "bert", "mistral3", "of_tomorrow"])
def test_what_is_kept_is_kept_in_every_family(family: str, tmp_path: Path) -> None:
    """Towers, routers, state spaces, positions, adapters, look-ups: by rows that come before any family's own."""
    found = placed(tmp_path, {"model_type": family}, **dict.fromkeys(KEPT_EVERYWHERE))
    assert found == KEPT_EVERYWHERE
    matrices = list_matrices(open_checkpoint(tmp_path))
    assert not chosen(matrices)
    assert chosen(matrices, None, "vision") == {n for n, (role, _) in KEPT_EVERYWHERE.items() if role == "vision"}
    audio = {"audio_tower.layers.0.self_attn.q_proj.weight", "talker.model.layers.0.self_attn.q_proj.weight"}
    assert chosen(matrices, "audio:0") == chosen(matrices, "audio:all", "audio") == audio


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3", "glm4_moe", "of_tomorrow"])
@pytest.mark.parametrize(
    ("prefix", "place"),
    [
        ("mtp.layers.0.", "mtp:0"),
        ("model.mtp.layers.1.", "mtp:1"),
        ("model.mtp_layers.0.", "mtp:0"),
        ("mtp.0.", "mtp:0"),
        ("model.layers.2.", "mtp:2"),
        ("model.layers.61.", "mtp:61"),
    ],
)
def test_blocks_of_multi_token_prediction_are_no_layers_of_the_model(
    family: str, prefix: str, place: str, tmp_path: Path
) -> None:
    inside = {
        "self_attn.o_proj.weight": "o",
        "mlp.down_proj.weight": "down",
        "eh_proj.weight": "mtp",
        "shared_head.head.weight": "head",
        "embed_tokens.weight": "embedding",
    }
    main = ["model.layers.0.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.weight"]
    found = placed(tmp_path, {"model_type": family}, **dict.fromkeys([*main, *(prefix + name for name in inside)]))
    assert all(found[prefix + name] == (role, place) for name, role in inside.items())
    matrices = list_matrices(open_checkpoint(tmp_path))

    blocks = [prefix + "self_attn.o_proj.weight", prefix + "mlp.down_proj.weight"]
    assert chosen(matrices) == chosen(matrices, "0-1") == chosen(matrices, None, "o") == set(main)
    assert chosen(matrices, "mtp:all", "o", "down") == chosen(matrices, place, "o", "down") == set(blocks)
    assert chosen(matrices, f"0,{place}", "o") == {main[0], blocks[0]}
    assert not chosen(matrices, "mtp:all") & {prefix + "embed_tokens.weight", prefix + "shared_head.head.weight"}
    assert chosen(matrices, None, "mtp") == {prefix + "eh_proj.weight"}


def test_an_encoder_beside_a_decoder_is_another_stack(tmp_path: Path) -> None:
    names = [f"{side}.block.0.layer.0.SelfAttention.q.weight" for side in ("encoder", "decoder")]
    for family in ("t5", "of_tomorrow"):
        assert list(placed(tmp_path, {"model_type": family}, **dict.fromkeys(names)).values()) == [
            ("q", "encoder:0"),
            ("q", 0),
        ]
        matrices = list_matrices(open_checkpoint(tmp_path))
        for layers, expected in (("0", names[1:]), ("encoder:0", names[:1]), ("0,encoder:all", names), (None, names)):
            assert chosen(matrices, layers) == set(expected)
        with pytest.raises(UsageError, match="no layer mtp:1; try --layers 0-0 or encoder:0-0"):
            Selection(layers=("mtp:1",)).check(matrices)
    alone = placed(tmp_path, {"model_type": "bert"}, **{"bert.encoder.layer.1.attention.self.query.weight": None})
    assert list(alone.values()) == [("q", 1)]
    heard = placed(
        tmp_path, {"model_type": "whisper"}, **{f"model.{s}.layers.0.fc1.weight": None for s in ("encoder", "decoder")}
    )
    assert list(heard.values()) == [("audio", "audio:0"), ("up", 0)]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."])
@pytest.mark.parametrize("family", ["llama", "of_tomorrow"])
def test_what_wrappers_leave_in_names_is_seen_through_and_told(family: str, prefix: str, tmp_path: Path) -> None:
    names = {"model.layers.0.self_attn.q_proj.weight": "q", "model.embed_tokens.weight": "embedding"}
    found = placed(tmp_path, {"model_type": family}, **{prefix + name: None for name in names})
    assert [role for role, _ in found.values()] == list(names.values())
    checkpoint = open_checkpoint(tmp_path)
    told = str(doubts(checkpoint, list_matrices(checkpoint)))
    assert "which transformers does not load; it was saved through" in told and "instead, and scan that" in told
    assert "--roles other" not in told


def test_fields_that_a_family_does_not_define_are_not_read(tmp_path: Path) -> None:
    """A GPT-2 has no groups of queries, a Falcon with multi_query one key, whatever else its config says."""
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "num_key_value_heads": 2, "head_dim": 5}
    name = "h.0.attn.c_attn.weight"
    placed(tmp_path, gpt2, **{name: (32, 96)})
    assert {m.shape for m in list_matrices(open_checkpoint(tmp_path))} == {(32, 32)}
    falcon = {"model_type": "falcon", "num_kv_heads": 4, "multi_query": True}
    name = "transformer.h.0.self_attention.query_key_value.weight"
    placed(tmp_path, falcon, **{name: (48, 32)})
    assert [m.shape for m in list_matrices(open_checkpoint(tmp_path))] == [(32, 32), (8, 32), (8, 32)]
    with pytest.raises(CheckpointError, match=r"expected 32 \+ 8 \+ 8 rows for q, k, v"):
        placed(tmp_path, falcon, **{name: (96, 32)})


def test_experts_of_qwen3_vl_either_way_round(tmp_path: Path) -> None:
    config = {"model_type": "qwen3_vl_moe", "text_config": PICO}
    at = "model.language_model.layers.0.mlp.experts."
    W = torch.arange(2 * 48 * 32.0).view(2, 48, 32)  # (E, 2I, H)
    for stored in (W, W.transpose(1, 2).contiguous()):
        placed(tmp_path, config, **{f"{at}gate_up_proj": tuple(stored.shape)})
        parts = {m.name: m.part for m in list_matrices(open_checkpoint(tmp_path))}
        found = parts[f"{at}gate_up_proj[1,up]"]
        assert found is not None and torch.equal(found.of(stored), W[1, 24:])
    with pytest.raises(CheckpointError, match=r"column=hidden or expert x column=hidden x blocks by config\.json"):
        placed(tmp_path, config, **{f"{at}gate_up_proj": (2, 20, 24)})


def test_doubts_about_an_unknown_family_are_three_lists(tmp_path: Path) -> None:
    shapes: dict[str, Any] = {f"model.layers.{n}.self_attn.qkv_proj.weight": (64, 32) for n in range(2)}
    shapes |= {f"model.layers.{n}.mlp.in_out.weight": (64, 32) for n in range(2)}  # q, k and v by the rows alone
    shapes |= {f"model.layers.{n}.mlp.experts.gate_up_proj": (2, 8, 32) for n in range(2)}
    shapes |= {f"model.tower_{'abcdefgh'[n]}_image.weight": None for n in range(8)}
    shapes |= {"model.layers.0.self_attn.o_proj.weight": None, "model.norm.weight": (32,)}
    placed(tmp_path, {"model_type": "of_tomorrow"}, **shapes)
    checkpoint = open_checkpoint(tmp_path)
    heading, fused, unreached, kept = str(doubts(checkpoint, list_matrices(checkpoint))).split("\n")
    assert "model_type 'of_tomorrow' is not in the table of families" in heading
    assert fused.startswith("  cut as one though probably fused") and fused.endswith(
        "model.layers.N.mlp.in_out.weight (2), model.layers.N.self_attn.qkv_proj.weight (2)"
    )
    assert unreached == "  not reached: model.layers.N.mlp.experts.gate_up_proj (2)"
    assert kept.startswith("  kept: model.tower_a_image.weight (1), ") and kept.endswith(" and 2 more")


def test_what_gates_a_head_or_an_expert_is_a_router_whatever_it_is_called(tmp_path: Path) -> None:
    """In a family without rows: as many rows as experts, or as heads at the most; the next wider one is cut."""
    at = "model.layers.0.block."
    shapes: dict[str, Any] = {
        f"{at}head_wise.weight": (4, 32),
        f"{at}chooser.weight": (6, 32),
        f"{at}wide.weight": (8, 32),
    }
    found = placed(tmp_path, {"model_type": "of_tomorrow", "num_experts": 6}, **shapes)
    assert [role for role, _ in found.values()] == ["router", "router", "linear"]
    assert chosen(list_matrices(open_checkpoint(tmp_path))) == {f"{at}wide.weight"}


def test_experts_in_three_dimensions_and_gated_queries_are_told(tmp_path: Path) -> None:
    """JetMoe's and Aria's experts end in .weight, so that a role is guessed for them; nothing of them can be cut."""
    shapes: dict[str, Any] = {
        "model.layers.0.mlp.input_linear.weight": (4, 96, 32),
        "model.layers.0.self_attn.q_proj.weight": (64, 32),  # 4 heads of 8, and as much for their gate
        "model.layers.0.self_attn.o_proj.weight": (32, 32),
    }
    placed(tmp_path, {"model_type": "of_tomorrow"}, **shapes)
    checkpoint = open_checkpoint(tmp_path)
    told = str(doubts(checkpoint, list_matrices(checkpoint)))
    assert "not reached: model.layers.N.mlp.input_linear.weight (1)" in told
    assert "probably fused (--exclude leaves them out): model.layers.N.self_attn.q_proj.weight (1)" in told
