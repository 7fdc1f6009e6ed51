"""Every family end to end on a tiny model of transformers' own classes; what `scripts/render_families.py` tabulates.

The reference is a plain loop over the modules of the model in memory, which knows transformers' modules and nothing of
laser: it truncates each weight with torch.linalg.svd, cutting fused ones by hand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import laser
from laser.checkpoint.families import FAMILIES

RANK = 4
SIZES: dict[str, Any] = {
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
DEEPSEEK: dict[str, Any] = {
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
SHARED = DEEPSEEK | {"num_key_value_heads": 2}
LAYER_TYPES = {"layer_types": ["linear_attention", "full_attention"]}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
} | LAYER_TYPES
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
EXPERTS = MOE | {"shared_expert_intermediate_size": 40}
ERNIE = {
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_intermediate_size": 24,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 1,
    "moe_layer_interval": 1,
}
GEMMA3N = {
    "head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
    "num_kv_shared_layers": 0,
    "activation_sparsity_pattern": [0.0, 0.0],
    "layer_types": ["sliding_attention", "full_attention"],
}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2} | {
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
BART = {"vocab_size": 64, "d_model": 32, "max_position_embeddings": 64, "encoder_layers": 1, "decoder_layers": 2} | {
    f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("ffn_dim", 48), ("attention_heads", 4))
}
# Name in the table -> model_type, entries of the config. A family of laser's table that is not here is built
# of SIZES: it needs an entry where it wants other numbers, or another name in the table.
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
    "Ministral": ("ministral3", SIZES | {"head_dim": 8}),
    "Gemma": ("gemma", SIZES | {"head_dim": 8}),
    "Gemma 3n": ("gemma3n_text", SIZES | GEMMA3N),
    "OLMo": ("olmo", SIZES),
    "OLMo 2": ("olmo2", SIZES),
    "OLMo 3": ("olmo3", SIZES),
    "FlexOlmo": ("flex_olmo", SIZES | {"num_experts": 4, "num_experts_per_tok": 2}),
    "SmolLM3": ("smollm3", SIZES),
    "Granite": ("granite", SIZES),
    "Granite 4": (
        "granitemoehybrid",
        SIZES | LOCAL | MAMBA2 | {"shared_intermediate_size": 40, "layer_types": ["mamba", "attention"]},
    ),
    "GLM-4": ("glm4", SIZES | {"head_dim": 8}),
    "GLM-4 (2024)": ("glm", SIZES | {"head_dim": 8}),
    "GLM-4.5, GLM-4.6": ("glm4_moe", SIZES | SHARED | {"head_dim": 8}),
    "GLM-4.7-Flash": ("glm4_moe_lite", SIZES | DEEPSEEK),
    "dots.llm1": ("dots1", SIZES | SHARED | {"head_dim": 8}),
    "Qwen3-Next": ("qwen3_next", SIZES | EXPERTS | DELTA),
    "Qwen3.5": ("qwen3_5_text", SIZES | DELTA),
    "Qwen3.5-MoE": ("qwen3_5_moe_text", SIZES | EXPERTS | DELTA),
    "MiniMax-M1": ("minimax", SIZES | LOCAL | LAYER_TYPES | {"head_dim": 8, "block_size": 8}),
    "MiniMax-M2": ("minimax_m2", SIZES | LOCAL | {"head_dim": 8}),
    "ERNIE 4.5": ("ernie4_5", SIZES | {"head_dim": 8}),
    "ERNIE 4.5 MoE": ("ernie4_5_moe", SIZES | ERNIE),
    "Hunyuan": ("hunyuan_v1_dense", SIZES | {"head_dim": 8}),
    "Hunyuan MoE": ("hunyuan_v1_moe", SIZES | {"num_experts": 4, "moe_topk": 2, "head_dim": 8}),
    "LFM2": (
        "lfm2",
        SIZES | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "conv_L_cache": 3},
    ),
    "LFM2-MoE": ("lfm2_moe", SIZES | MOE | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "Falcon-H1": ("falcon_h1", SIZES | MAMBA2 | {"mamba_d_ssm": 64}),
    "Jamba": (
        "jamba",
        SIZES
        | {"num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
        | {"expert_layer_period": 2, "expert_layer_offset": 0, "mamba_d_state": 8, "mamba_dt_rank": 4}
        | {"use_mamba_kernels": False},
    ),
    "Bamba": ("bamba", SIZES | MAMBA2 | {"attn_layer_indices": [1]}),
    "Mamba": ("mamba", SIZES | {"state_size": 8, "time_step_rank": 4}),
    "Mamba 2": ("mamba2", SIZES | {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2}),
    "Seed-OSS": ("seed_oss", SIZES | {"head_dim": 8}),
    "Cohere (Command R)": ("cohere", SIZES),
    "Cohere 2 (Command A)": ("cohere2", SIZES),
    "EXAONE 4": ("exaone4", SIZES),
    "Helium": ("helium", SIZES | {"head_dim": 8}),
    "Apertus": ("apertus", SIZES),
    "Arcee": ("arcee", SIZES),
    "Nemotron": ("nemotron", SIZES),
    "StableLM": ("stablelm", SIZES),
    "StarCoder2": ("starcoder2", SIZES),
    "Phi-2": ("phi", SIZES),
    "GPT-J": ("gptj", GPT2 | {"rotary_dim": 4}),
    "CodeGen": ("codegen", GPT2 | {"rotary_dim": 4, "n_ctx": 64}),
    "GPTBigCode (StarCoder)": ("gpt_bigcode", GPT2),
    "GPTBigCode, a key per head": ("gpt_bigcode", GPT2 | {"multi_query": False}),
    "Falcon": ("falcon", SIZES | {"num_kv_heads": 71}),  # one key, as multi_query says, whatever this number is
    "Falcon, grouped": ("falcon", SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "Falcon, a key per head": ("falcon", SIZES | {"multi_query": False}),
    "BLOOM": ("bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "MPT": ("mpt", {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2}),
    "OPT": ("opt", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "Persimmon": ("persimmon", SIZES),
    "Phi-4-multimodal": (
        "phi4_multimodal",
        SIZES
        | {
            "vision_config": VISION | {"crop_size": 28, "image_token_id": 60},
            "audio_config": {"hidden_size": 16, "intermediate_size": 24, "num_blocks": 1, "num_attention_heads": 2}
            | {"nemo_conv_channels": 8, "ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16}
            | {"audio_token_id": 61, "bias_max_distance": 8},
        },
    ),
}
# The same for models that are no causal language models, or hold one beside other towers -> their class as well
OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "Mistral Small 3": (
        "mistral3",
        {"text_config": {"model_type": "mistral", "head_dim": 8} | SIZES, "vision_config": VISION},
        "AutoModelForImageTextToText",
    ),
    "Gemma 3, vision": (
        "gemma3",
        {"text_config": SIZES | {"head_dim": 8}, "vision_config": VISION},
        "AutoModelForImageTextToText",
    ),
    "Llama 4, vision": (
        "llama4",
        {
            "text_config": SIZES | LOCAL | {"intermediate_size_mlp": 56, "head_dim": 8},
            "vision_config": VISION | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
        },
        "AutoModelForImageTextToText",
    ),
    "Qwen2-VL": (
        "qwen2_vl",
        {
            "text_config": SIZES | MROPE,
            "vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32},
        },
        "AutoModelForImageTextToText",
    ),
    "Qwen2.5-VL": (
        "qwen2_5_vl",
        {"text_config": SIZES | MROPE, "vision_config": QWEN_VISION},
        "AutoModelForImageTextToText",
    ),
    "Qwen3-VL": (
        "qwen3_vl",
        {"text_config": SIZES | MROPE | {"head_dim": 8}, "vision_config": QWEN_VISION},
        "AutoModelForImageTextToText",
    ),
    "Qwen3-VL-MoE": (
        "qwen3_vl_moe",
        {"text_config": SIZES | MROPE | MOE | {"head_dim": 8}, "vision_config": QWEN_VISION},
        "AutoModelForImageTextToText",
    ),
    "Qwen3.5, vision": (
        "qwen3_5",
        {"text_config": SIZES | DELTA, "vision_config": QWEN_VISION},
        "AutoModelForImageTextToText",
    ),
    "GLM-4.1V": (
        "glm4v",
        {"text_config": SIZES | MROPE, "vision_config": QWEN_VISION | {"image_size": 28}},
        "AutoModelForImageTextToText",
    ),
    "Qwen2-Audio": (
        "qwen2_audio",
        {
            "text_config": {"model_type": "qwen2"} | SIZES,
            "audio_config": {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24},
        },
        "Qwen2AudioForConditionalGeneration",
    ),
    "T5": ("t5", T5, "AutoModelForSeq2SeqLM"),
    "T5, gated (Flan)": ("t5", T5 | {"feed_forward_proj": "gated-gelu"}, "AutoModelForSeq2SeqLM"),
    "BART": ("bart", BART, "AutoModelForSeq2SeqLM"),
    "BERT": ("bert", SIZES, "AutoModelForMaskedLM"),
    "RoBERTa": ("roberta", SIZES | {"max_position_embeddings": 66}, "AutoModelForMaskedLM"),
    "ModernBERT": ("modernbert", SIZES, "AutoModelForMaskedLM"),
}


# Families whose rows are those of another, and that transformers builds only as that one, or not here.
TWINS = {
    "kimi_k2": "deepseek_v3",  # its own name for DeepSeek's model, in a config that needs remote code
    "minimax_m1": "minimax",  # the same, before transformers had it
    "minimax_text_01": "minimax",
    "phi4mm": "phi4_multimodal",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "gemma3n": "gemma3n_text",  # its vision tower needs timm
    "ministral": "ministral3",
    "xlm-roberta": "roberta",
    "whisper": "bart",
    "mistral_release": "mistral_release",  # of no model_type: tests/checkpoint/test_mistral.py
}


def causal() -> dict[str, tuple[str, dict[str, Any]]]:
    """Causal language models: CONFIGS, and whatever else laser's table has, of SIZES and under its own name."""
    listed = {kind for kind, *_ in (OTHERS | CONFIGS).values()} | TWINS.keys()
    return CONFIGS | {family: (family, SIZES) for family in FAMILIES if family not in listed}


def everything() -> dict[str, tuple[str, dict[str, Any]] | tuple[str, dict[str, Any], str]]:
    return causal() | OTHERS


def build(family: str) -> Any:
    """A model of random float32 weights, in memory; the same on every call."""
    import transformers

    kind, entries, *auto = everything()[family]
    torch.manual_seed(0)
    loader: Any = getattr(transformers, auto[0] if auto else "AutoModelForCausalLM")
    make = loader.from_config if hasattr(loader, "from_config") else loader._from_config
    model = make(transformers.AutoConfig.for_model(kind, **entries), dtype=torch.float32)
    for parameter in model.parameters():  # a zero bias or a gain of one would hide a mistake
        parameter.data.copy_(torch.randn(parameter.shape) * (0.3 if parameter.dim() > 1 else 0.1) + parameter.data)
    return model.eval()


def truncated(W: torch.Tensor) -> torch.Tensor:
    """The best approximation of W (m, n) of rank RANK."""
    U, s, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return ((U[:, :RANK] * s[:RANK]) @ Vh[:RANK]).to(W.dtype)


KEPT = (
    r"router|\.gate\.|shared_expert_gate|altup|visual|vision|audio|projector|_decay|slope_rate|"
    r"conv\.weight|conv1d|A_log|x_proj|dt_proj|in_proj_ba|in_proj_[ab]\.|relative_attention_bias|embed|bias|mamba\.D"
)


def turns(rows: int, groups: int, *sizes: int) -> list[list[int]]:
    """Rows of each part, where every group holds `sizes` rows of the parts one after another."""
    step, starts = rows // groups, [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        [g * step + start + i for g in range(groups) for i in range(n)] for start, n in zip(starts, sizes, strict=True)
    ]


def parts_of(kind: str, leaf: str, rows: int) -> list[list[int]]:
    """Rows of the matrices in a 2-D parameter of these tiny models, as transformers' modules split its output."""
    if leaf == "in_proj_qkvz":  # two key heads
        return turns(rows, 2, 8, 8, 16, 16)
    if leaf == "in_proj_qkv":
        return turns(rows, 1, 16, 16, 32)
    if leaf == "q_proj" and kind.startswith(("qwen3_next", "qwen3_5")):
        return turns(rows, 4, 8, 8)
    if leaf == "in_proj" and kind in ("jamba", "mamba"):
        return turns(rows, 1, 64 if kind == "jamba" else 48, 64 if kind == "jamba" else 48)
    if leaf == "in_proj" and kind in ("lfm2", "lfm2_moe"):
        return turns(rows, 1, 32, 32, 32)
    if leaf == "in_proj":  # Mamba 2: what comes behind z and x is kept
        return turns(rows, 1, 64, 64)
    if leaf == "qkv_proj" and kind in ("minimax", "codegen"):  # head by head; on four cores
        return turns(rows, 4, 8, 8, 8)
    if leaf in ("qkv_proj", "Wqkv") and kind in ("phi3", "phi4_multimodal", "dbrx"):
        return turns(rows, 1, 32, 16, 16)
    if leaf == "Wqkv":
        return turns(rows, 1, 32, 32, 32)
    if leaf in ("query_key_value", "c_attn"):  # Falcon's and StarCoder's with one key; with two; one for each head
        return {48: turns(rows, 1, 32, 8, 8), 64: turns(rows, 2, 16, 8, 8), 96: turns(rows, 4, 8, 8, 8)}[rows]
    if leaf in ("gate_up_proj", "input_linear", "Wi"):
        return turns(rows, 1, rows // 2, rows // 2)
    if leaf in ("w1", "v1", "w2") and kind == "dbrx":  # (E * I, H)
        return turns(rows, 1, *[rows // 4] * 4)
    return [list(range(rows))]


def reduce_in_memory(model: Any) -> None:
    """Truncate every weight matrix of the text's layers but the routers, in place: the slow, obvious reference."""
    kind = model.config.model_type
    for name, parameter in model.named_parameters():
        if not re.search(r"\.(layers|h|blocks|block|layer)\.\d+\.", name) or parameter.dim() < 2:
            continue
        if re.search(KEPT, name):
            continue
        W, leaf = parameter.data, name.removesuffix(".weight").rpartition(".")[2]
        if leaf == "gate_up_proj" and kind == "gpt_oss":  # (E, H, 2I), columns taking turns
            pieces = [W[e][:, i::2] for e in range(len(W)) for i in range(2)]
        elif leaf == "gate_up_proj" and kind.startswith("llama4"):  # (E, H, 2I)
            pieces = [half for e in range(len(W)) for half in W[e].chunk(2, dim=1)]
        elif leaf == "gate_up_proj" and W.dim() == 3:  # (E, 2I, H)
            pieces = [half for e in range(len(W)) for half in W[e].chunk(2, dim=0)]
        elif leaf == "input_linear" and W.dim() == 3:  # (E, 2I, H)
            pieces = [half for e in range(len(W)) for half in W[e].chunk(2, dim=0)]
        elif W.dim() == 3:
            pieces = list(W)
        elif leaf == "c_attn" and kind == "gpt2":  # (H, 3H)
            pieces = list(W.chunk(3, dim=1))
        else:
            for rows in parts_of(kind, leaf, len(W)):
                W[rows] = truncated(W[rows])
            continue
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
    model = build(family)
    source, out = folder / "source", folder / "out"
    model.save_pretrained(source)
    checkpoint = laser.open_checkpoint(source)
    spectra = laser.scan(checkpoint)
    plan = laser.make_plan(spectra, f"rank:{RANK}")
    laser.reduce(checkpoint, plan, out)
    found = laser.verify(checkpoint, out)
    ids = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    given = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    with torch.no_grad():
        before = model(**given).logits
        reduce_in_memory(model)
        expected = model(**given).logits
        loaded = type(model).from_pretrained(out, dtype=torch.float32).eval()
        logits = loaded(**given).logits
    there = dict(loaded.named_parameters())
    same = all(torch.allclose(p, there[name], atol=2e-6, rtol=1e-5) for name, p in model.named_parameters())
    holders = [m.tensor for m in spectra.matrices if m.name in plan.reductions]
    return Row(
        family,
        everything()[family][0],
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
    """One line of the table of families."""
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
    """The table of families with the version of transformers that it was made with."""
    import transformers

    head = ["| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    made = f"transformers {transformers.__version__}, tiny random models, every matrix cut to rank {RANK}"
    return "\n".join([*head, *map(line_of, rows), "", f"Made by `python scripts/render_families.py`: {made}.", ""])
