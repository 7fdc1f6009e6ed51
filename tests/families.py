"""Every family end to end on a tiny model of transformers' own classes; what `scripts/render_families.py` tabulates.

The reference is a plain loop over the modules of the model in memory, which knows transformers' modules and nothing of
laser: it truncates each weight with torch.linalg.svd, cutting fused ones by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import laser

RANK = 4
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
DBRX = {
    "vocab_size": 64,
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 64,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
# name in the table -> model_type, entries of the config
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("mixtral", SIZES | LOCAL),
    "Mistral": ("mistral", SIZES),
    "Llama 2": ("llama", SIZES | {"num_key_value_heads": 4}),
    "Llama 3": ("llama", SIZES | {"tie_word_embeddings": True}),
    "Qwen2, Qwen2.5": ("qwen2", SIZES | {"tie_word_embeddings": True}),
    "Qwen3": ("qwen3", SIZES | {"head_dim": 16}),
    "Qwen2-MoE": ("qwen2_moe", SIZES | MOE | {"shared_expert_intermediate_size": 40}),
    "Qwen3-MoE": ("qwen3_moe", SIZES | MOE | {"head_dim": 16}),
    "OLMoE": ("olmoe", SIZES | {"num_experts": 4, "num_experts_per_tok": 2}),
    "DeepSeek-V2": ("deepseek_v2", SIZES | DEEPSEEK),
    "DeepSeek-V3": ("deepseek_v3", SIZES | DEEPSEEK),
    "PhiMoE": ("phimoe", SIZES | LOCAL),
    "Granite-MoE": ("granitemoe", SIZES | LOCAL),
    "Granite-MoE, shared": ("granitemoeshared", SIZES | LOCAL | {"shared_intermediate_size": 40}),
    "Gemma 2": ("gemma2", SIZES | {"head_dim": 8}),
    "Gemma 3": ("gemma3_text", SIZES | {"head_dim": 8}),
    "GPT-OSS": ("gpt_oss", SIZES | LOCAL | ROPE | {"head_dim": 8}),
    "Llama 4": ("llama4_text", SIZES | LOCAL | {"intermediate_size_mlp": 56, "head_dim": 8}),
    "DBRX": ("dbrx", DBRX),
    "Phi-3": ("phi3", SIZES),
    "GPT-NeoX": ("gpt_neox", SIZES),
    "GPT-2": ("gpt2", GPT2),
}


def build(family: str) -> Any:
    """A model of random float32 weights, in memory; the same on every call."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, entries = CONFIGS[family]
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **entries), dtype=torch.float32)
    for parameter in model.parameters():  # a zero bias or a gain of one would hide a mistake
        parameter.data.copy_(torch.randn(parameter.shape) * (0.3 if parameter.dim() > 1 else 0.1) + parameter.data)
    return model.eval()


def truncated(W: torch.Tensor) -> torch.Tensor:
    """The best approximation of W (m, n) of rank RANK."""
    U, s, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return ((U[:, :RANK] * s[:RANK]) @ Vh[:RANK]).to(W.dtype)


def reduce_in_memory(model: Any) -> None:
    """Truncate every weight matrix of the decoder layers but the routers, in place: the slow, obvious reference."""
    config = model.config
    for name, parameter in model.named_parameters():
        if not re.search(r"\.(layers|h|blocks)\.\d+\.", name) or parameter.dim() < 2 or "bias" in name:
            continue
        if re.search(r"router|\.gate\.weight|shared_expert_gate", name):
            continue
        W, leaf = parameter.data, name.removesuffix(".weight").rpartition(".")[2]
        kind = config.model_type
        if leaf == "gate_up_proj" and kind == "gpt_oss":  # (E, H, 2I), columns taking turns
            pieces = [W[e][:, i::2] for e in range(len(W)) for i in range(2)]
        elif leaf == "gate_up_proj" and kind == "llama4_text":  # (E, H, 2I)
            pieces = [half for e in range(len(W)) for half in W[e].chunk(2, dim=1)]
        elif leaf == "gate_up_proj" and W.dim() == 3:  # (E, 2I, H)
            pieces = [half for e in range(len(W)) for half in W[e].chunk(2, dim=0)]
        elif W.dim() == 3:
            pieces = list(W)
        elif leaf in ("w1", "v1", "w2"):  # DBRX: (E * I, H)
            pieces = list(W.chunk(4, dim=0))
        elif leaf in ("gate_up_proj", "input_linear"):  # (2I, H)
            pieces = list(W.chunk(2, dim=0))
        elif leaf in ("qkv_proj", "Wqkv"):  # 4 query heads, 2 of keys, 2 of values, each 8 wide
            pieces = list(W.split([32, 16, 16], dim=0))
        elif leaf == "query_key_value":  # per head: q, k, v
            pieces = [torch.cat([W[h * 24 + i * 8 : h * 24 + i * 8 + 8] for h in range(4)]) for i in range(3)]
            for i, piece in enumerate(map(truncated, pieces)):
                for h in range(4):
                    W[h * 24 + i * 8 : h * 24 + i * 8 + 8] = piece[h * 8 : h * 8 + 8]
            continue
        elif leaf == "c_attn":  # (H, 3H)
            pieces = list(W.chunk(3, dim=1))
        else:
            pieces = [W]
        for piece in pieces:  # views of W
            piece.copy_(truncated(piece))


@dataclass(frozen=True)
class Row:
    """What was seen of one family; every flag has been checked by the calls that set it."""

    family: str
    model_type: str
    matrices: int  # logical matrices that were reduced
    tensors: int  # that hold them
    cut: int  # tensors among them that hold more than one
    tied: bool
    unaccounted: int  # parameters
    verified: bool
    parameters_equal: bool
    logits_equal: bool
    changed: bool  # by the reduction, or equality would say nothing


def examine(family: str, folder: Path) -> Row:
    """Save, scan, plan rank RANK for everything, reduce, verify, load, and compare with the reduction in memory."""
    from transformers import AutoModelForCausalLM

    model = build(family)
    source, out = folder / "source", folder / "out"
    model.save_pretrained(source)
    checkpoint = laser.open_checkpoint(source)
    spectra = laser.scan(checkpoint)
    plan = laser.make_plan(spectra, f"rank:{RANK}")
    laser.reduce(checkpoint, plan, out)
    found = laser.verify(checkpoint, out)
    ids = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        reduce_in_memory(model)
        expected = model(input_ids=ids).logits
        loaded: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        logits = loaded(input_ids=ids).logits
    there = dict(loaded.named_parameters())
    same = all(torch.allclose(p, there[name], atol=2e-6, rtol=1e-5) for name, p in model.named_parameters())
    holders = [m.tensor for m in spectra.matrices if m.name in plan.reductions]
    return Row(
        family,
        CONFIGS[family][0],
        len(holders),
        len(set(holders)),
        sum(holders.count(name) > 1 for name in set(holders)),
        bool(getattr(model.config, "tie_word_embeddings", False)),
        plan.coverage["unaccounted"],
        not found.problems and found.touched == len(holders),
        same and len(there) == len(dict(model.named_parameters())),
        bool(torch.allclose(logits, expected, atol=1e-4, rtol=1e-4)),
        bool((before - expected).abs().max() > 1e-2),
    )


HEADINGS = ("family", "`model_type`", "scan", "reduce", "fused cut", "tied", "load", "logits equal")
START, END = "<!-- families -->\n", "<!-- /families -->\n"


def line_of(row: Row) -> str:
    """One line of the README's table."""
    assert row.changed and not row.unaccounted
    cells = (
        row.family,
        f"`{row.model_type}`",
        f"{row.matrices} matrices",
        "verified" if row.verified else "no",
        f"{row.cut} tensors" if row.cut else "none",
        "yes" if row.tied else "no",
        "yes" if row.parameters_equal else "no",
        "yes" if row.logits_equal else "no",
    )
    return "| " + " | ".join(cells) + " |"


def table(rows: list[Row]) -> str:
    """The README's table with the version of transformers that it was made with."""
    import transformers

    head = ["| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    made = f"transformers {transformers.__version__}, tiny random models, every matrix cut to rank {RANK}"
    return "\n".join([*head, *map(line_of, rows), "", f"Made by `python scripts/render_families.py`: {made}.", ""])


Examine = Callable[[str, Path], Row]
