"""FAMILIES: what each model family's tensors are called and how they are stored, as rows.

Roles that are measured and reduced:

    q, k, v, o                attention
    q_a, q_b, kv_a, kv_b      DeepSeek's compressed attention
    w1, w2, w3                Mixtral's experts
    gate, down, up            the same three matrices under Llama's names, experts and dense MLPs alike
    x, z, out                 what goes into a state space or a convolution, the gate of what comes out, and what that
                              goes through; out also behind linear attention
    b, c                      gates of LFM2's convolutions
    linear                    any other matrix of a layer

Kept unless asked for: router, embedding, position, head, norm, bias, sinks, buffer, ssm (parameters of a state space),
adapter, vision and audio (towers of other modalities and what connects them). So is mtp, what joins a block of
multi-token prediction.

`axes` says how a tensor is stored that is not one matrix (out, in), first axis first:

    expert   one matrix per index             head, key_value, ...  groups of rows, one after another
    row      outputs of a matrix              column                its inputs
    blocks   `parts` one after another        comb                  `parts` taking turns

blocks and comb stand where the rows of a matrix are. `expert*row` is one dimension that holds both, and config.json
knows how many experts (or heads) there are. `column=hidden` holds only where the dimension has that size, and what
stands behind | is tried next. A part is a role, or `role=head*width`: how many rows it has in all groups together;
`role=*` has the rest. Numbers are found in config.json as NUMBERS says. Facts from transformers 5.23 and from
Mistral's releases.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FamilyRow:
    """One kind of tensor: its role, and the pattern of its whole name."""

    role: str
    pattern: str
    axes: str = ""  # "" for one matrix (out, in), or whatever is never cut
    parts: tuple[str, ...] = ()  # what blocks or comb consist of


# What wrappers put before or between the names of a model's parameters -> how such a model is saved without it.
WRAPPERS = {
    r"_orig_mod\.": "it was saved through torch.compile: save `model._orig_mod` instead",
    r"^module\.": "it was saved through DataParallel or DistributedDataParallel: save `model.module` instead",
    r"^base_model\.model\.": "it was saved through PEFT: save what `model.merge_and_unload()` returns instead",
    r"_(?:fsdp_wrapped|checkpoint_wrapped|forward)_module\.": "it was saved through FSDP or a trainer: gather the full "
    "state dict and save the unwrapped model instead",
}

# Parts of a name that say whose layers these are. A tower's tensors have its role, whatever they are called inside.
VISION = (
    r"\w*(?:vision|visual|image|video)\w*|(?:img|vit|vpm|vqmodel|sam|qformer)(?:_\w+)?|embed_vision|mlp1|query_tokens|"
    r"(?:multi_?modal|mm|modality)_proj\w*|language_projection|\w*projector|connector|\w*resampler|perceiver\w*|"
    r"aligner|merger|patch_merger|\w+_tower|(?!text_)\w+_encoder"
)
AUDIO = r"\w*(?:audio|speech)\w*|(?:sound|acoustic|talker|code2wav|token2wav|codec)\w*|apm|tts"
TOWERS = {"audio": rf"(?:.*\.)?(?:{AUDIO})(?:\..*)?", "vision": rf"(?:.*\.)?(?:{VISION})(?:\..*)?"}
# Of an encoder and a decoder, which kinds of model have a tower for an encoder.
ENCODER_TOWERS = {
    "audio": r".*(?:whisper|speech|audio|asr|moonshine|voxtral).*",
    "vision": r".*(?:vision|trocr|donut|nougat|pix2struct|florence).*",
}
MTP = r"(?:.*\.)?(?:mtp|nextn)\w*\."
LAYER_NUMBER = (
    r"(?:^|\.)(?:layers|layer|blocks|block|h|encoders|(?:mtp|nextn)\w*)\.(\d+)(?:\.|$)"  # of a layer, the first
)

# What every family has and what is kept in all of them, known or not: looked up before a family's own rows.
_AT = r"(?:.*\.)?"
KEPT = (
    FamilyRow(
        "adapter",
        rf"{_AT}(?:(?:lora|ia3|hada|lokr|vera|oft)_\w+|modules_to_save|adapters|\w+_adapters?|\w*adapter_\w+)(?:\..*)?",
    ),
    FamilyRow(
        "router",
        rf"{_AT}(?:router|\w*_router|router_\w+|altup\w*|indexer|compressor|shared_expert_gate|shared_experts_gate|"
        r"\w*hyper_?connections?(?:_\w+)?|hc_\w+)(?:\.\w+)*|"
        rf"{_AT}(?:\w*moe|mlp|feed_forward|ffn|mixer)\.gate(?:\.\w+)*\.(?:weight|bias)|"
        rf"{_AT}(?:e_score_correction_bias|expert_bias|experts_bias|text_moe\.gate\.weight|vision_moe\.gate\.weight)",
    ),
    FamilyRow(
        "ssm",
        # Also the low-rank pairs and the gates by which linear attention forgets (GLA, RWKV, Kimi, xLSTM).
        rf"{_AT}(?:dt_proj|x_proj|bcdt_proj|in_proj_ba|in_proj_a|in_proj_b|[fg]_[ab]_proj|[abf]_proj|gk_proj|"
        r"[if]gate_preact|\w*conv_?1d|\w*sconv|conv)(?:\.\d+)?\.(?:weight|bias)|"
        rf"{_AT}(?:A_log|D|dt_bias|A|slope_rate|\w+_decay|time_\w+|rg_lru\.\w+)|{_AT}lora\.\d+\.(?:weight|bias)",
    ),
    # The causal mask, its fill value and the rotary frequencies, saved by older releases.
    FamilyRow("buffer", rf"{_AT}(?:attn|attention|self_attention)\.(?:masked_)?bias|{_AT}(?:inv_freq|rotary_emb\.\w+)"),
    FamilyRow(
        "position",
        rf"{_AT}(?:rel_(?:pos|logits|emb)\w*|relative_\w+|\w*position_embeddings?|embed_positions|"
        r"pos(?:itions?)?_emb\w*|wpe|linear_pos|pos_(?:\w+_)?proj|r_net|wr_du|self_attn\.r_proj)(?:\.\w+)*",
    ),
    FamilyRow("norm", rf"{_AT}(?:\w*[nN]orm\w*|\w*ln|ln_\w+)\.(?:W_\w+\.)?(?:weight|bias)"),
    FamilyRow("sinks", rf"{_AT}(?:\w+_)?sinks?(?:_proj)?(?:\.weight)?"),
    FamilyRow("bias", rf"{_AT}\w*bias"),
    FamilyRow(
        "head",
        rf"{_AT}(?:lm_head|embed_out|shared_head\.head|score|classifier|qa_outputs|seq_relationship|output_layer)(?:\.\w+)*|"
        rf"(?:output|head|decoder)\.weight|{_AT}(?:pooler|head|predictions\.transform)\.dense\.weight|"
        rf"{_AT}predictions\.decoder\.weight",
    ),
    FamilyRow("embedding", rf"{_AT}(?:wte|shared|\w*embed\w*|embeddings\.\w+)(?:\.\d+)?\.weight"),
)
# What joins a block of multi-token prediction to the model.
MTP_JOINT = r"(?:.*\.)?(?:eh_proj|fc|input_proj|\w*linear_proj(?:\.\d+)?)\.weight"


def _roles(place: str, roles: str, suffix: str = r"_proj\.weight") -> tuple[FamilyRow, ...]:
    return tuple(FamilyRow(role, rf"{place}{role}{suffix}") for role in roles.split())


TEXT = r"(?:thinker\.)?(?:language_model\.)?(?:model\.)?(?:language_model\.|text_model\.)?"  # before a decoder's layers
LAYER = rf"{TEXT}layers\.\d+\."
GATE_UP, QKV = ("gate", "up"), ("q", "k", "v")
GROUPED = ("q=head*width", "k=key_value*width", "v=key_value*width")

ATTENTION = _roles(rf"{LAYER}self_attn\.", "q k v o")
# Queries and the gate of the output take turns, head by head (Qwen3-Next and Qwen3.5).
GATED_ATTENTION = (FamilyRow("q", rf"{LAYER}self_attn\.q_proj\.weight", "head*blocks column", ("q", "z")), *ATTENTION)
COMPRESSED = (
    *_roles(rf"{LAYER}self_attn\.", "q o q_a q_b kv_b"),
    FamilyRow("kv_a", rf"{LAYER}self_attn\.kv_a_proj_with_mqa\.weight"),
)
DENSE_MLP = _roles(rf"{LAYER}mlp\.", "gate up down")
FUSED_DENSE = (
    FamilyRow("gate", rf"{LAYER}mlp\.gate_up_proj(?:\.base_layer)?\.weight", "blocks column", GATE_UP),
    FamilyRow("down", rf"{LAYER}mlp\.down_proj(?:\.base_layer)?\.weight"),
)
# A checkpoint that transformers 5 saved with save_original_format=False: experts as they are in memory.
IN_MEMORY = (
    FamilyRow("gate", rf"{LAYER}(?:mlp|feed_forward)\.experts\.gate_up_proj", "expert blocks column", GATE_UP),
    FamilyRow("down", rf"{LAYER}(?:mlp|feed_forward)\.experts\.down_proj", "expert row column"),
)
SPARSE_MLP = (*_roles(rf"{LAYER}block_sparse_moe\.experts\.\d+\.", "w1 w2 w3", r"\.weight"), *IN_MEMORY)
MOE = (
    *_roles(rf"{LAYER}mlp\.(?:experts\.\d+|shared_experts?|shared_mlp)\.", "gate up down"),
    *IN_MEMORY,
)
FEED_FORWARD = (*_roles(rf"{LAYER}feed_forward\.(?:(?:experts\.\d+|shared_expert)\.)?", "gate up down"), *IN_MEMORY)
# transformers 5 loads Qwen3-VL's experts either way round, as they lie in memory or transposed, as on the Hub.
EITHER_WAY = (
    FamilyRow(
        "gate",
        rf"{LAYER}mlp\.experts\.gate_up_proj",
        "expert blocks column=hidden | expert column=hidden blocks",
        GATE_UP,
    ),
    FamilyRow("down", rf"{LAYER}mlp\.experts\.down_proj", "expert row=hidden column | expert column row=hidden"),
)
# Mamba (x, z), and Mamba 2 (z, x, then B, C and dt: parameters of the state space).
MAMBA = (
    FamilyRow("x", rf"{LAYER}mamba\.in_proj\.weight", "blocks column", ("x", "z")),
    FamilyRow("out", rf"{LAYER}mamba\.out_proj\.weight"),
)
MAMBA2 = (
    FamilyRow("z", rf"{LAYER}mamba\.in_proj\.weight", "blocks column", ("z=inner", "x=inner", "ssm=*")),
    FamilyRow("out", rf"{LAYER}mamba\.out_proj\.weight"),
)
MIXER = r"(?:backbone\.|model\.)layers\.\d+\.mixer\."
# Qwen3-Next: q, k, v and z of each key head together; Qwen3.5: q, k and v one after another, z apart.
LINEAR_KEYS = ("q=linear_key*linear_key_width", "k=linear_key*linear_key_width", "v=linear_value*linear_value_width")
DELTA = (
    FamilyRow(
        "q",
        rf"{LAYER}linear_attn\.in_proj_qkvz\.weight",
        "linear_key*blocks column",
        (*LINEAR_KEYS, "z=linear_value*linear_value_width"),
    ),
    FamilyRow("q", rf"{LAYER}linear_attn\.in_proj_qkv\.weight", "blocks column", LINEAR_KEYS),
    FamilyRow("z", rf"{LAYER}linear_attn\.in_proj_z\.weight"),
    FamilyRow("out", rf"{LAYER}linear_attn\.out_proj\.weight"),
)

LLAMA = (*ATTENTION, *DENSE_MLP)
GRANITE_ROWS = (
    FamilyRow("gate", rf"{LAYER}block_sparse_moe\.input_linear\.weight", "expert blocks column", GATE_UP),
    FamilyRow("down", rf"{LAYER}block_sparse_moe\.output_linear\.weight", "expert row column"),
    FamilyRow("gate", rf"{LAYER}shared_mlp\.input_linear\.weight", "blocks column", GATE_UP),
    FamilyRow("down", rf"{LAYER}shared_mlp\.output_linear\.weight"),
)
GPT_OSS = (
    FamilyRow("gate", rf"{LAYER}mlp\.experts\.gate_up_proj", "expert column comb", GATE_UP),
    FamilyRow("down", rf"{LAYER}mlp\.experts\.down_proj", "expert column row"),
)
LLAMA4 = (
    *ATTENTION,
    FamilyRow("gate", rf"{LAYER}feed_forward\.experts\.gate_up_proj", "expert column blocks", GATE_UP),
    FamilyRow("down", rf"{LAYER}feed_forward\.experts\.down_proj", "expert column row"),
    *FEED_FORWARD,
)
PHI3 = (
    FamilyRow("q", rf"{LAYER}self_attn\.qkv_proj(?:\.base_layer)?\.weight", "blocks column", GROUPED),
    FamilyRow("o", rf"{LAYER}self_attn\.o_proj(?:\.base_layer)?\.weight"),
    *FUSED_DENSE,
)
# Lightning attention in some layers (q, k and v head by head), plain attention in the others.
MINIMAX = (
    FamilyRow("q", rf"{LAYER}self_attn\.qkv_proj\.weight", "head*blocks column", QKV),
    FamilyRow("o", rf"{LAYER}self_attn\.out_proj\.weight"),
    FamilyRow("z", rf"{LAYER}self_attn\.output_gate\.weight"),
    *ATTENTION,
    *SPARSE_MLP,
)
LFM2 = (
    *_roles(rf"{LAYER}self_attn\.", "q k v"),
    FamilyRow("o", rf"{LAYER}self_attn\.out_proj\.weight"),
    FamilyRow("out", rf"{LAYER}conv\.out_proj\.weight"),
    FamilyRow("x", rf"{LAYER}conv\.in_proj\.weight", "blocks column", ("b", "c", "x")),
    *_roles(rf"{LAYER}feed_forward\.(?:experts\.\d+\.)?", "w1 w2 w3", r"\.weight"),
    *IN_MEMORY,
)
GEMMA3N = (
    *LLAMA,
    FamilyRow("linear", rf"{LAYER}laurel\.linear_(?:left|right)\.weight"),
    FamilyRow("linear", rf"{LAYER}per_layer_(?:input_gate|projection)\.weight"),
    FamilyRow("embedding", rf"{TEXT}per_layer_model_projection\.weight"),
)
PHI = (
    *ATTENTION,
    FamilyRow("o", rf"{LAYER}self_attn\.dense\.weight"),
    FamilyRow("up", rf"{LAYER}mlp\.fc1\.weight"),
    FamilyRow("down", rf"{LAYER}mlp\.fc2\.weight"),
)
OPT = (
    *_roles(r"(?:model\.)?decoder\.layers\.\d+\.self_attn\.", "q k v"),
    FamilyRow("o", r"(?:model\.)?decoder\.layers\.\d+\.self_attn\.out_proj\.weight"),
    FamilyRow("up", r"(?:model\.)?decoder\.layers\.\d+\.fc1\.weight"),
    FamilyRow("down", r"(?:model\.)?decoder\.layers\.\d+\.fc2\.weight"),
    FamilyRow("embedding", r"(?:model\.)?decoder\.project_(?:in|out)\.weight"),
)
IN_BLOCKS = r"transformer\.blocks\.\d+\."
DBRX = (
    FamilyRow("q", rf"{IN_BLOCKS}norm_attn_norm\.attn\.Wqkv\.weight", "blocks column", GROUPED),
    FamilyRow("o", rf"{IN_BLOCKS}norm_attn_norm\.attn\.out_proj\.weight"),
    FamilyRow("gate", rf"{IN_BLOCKS}ffn\.experts\.mlp\.w1", "expert*row column"),
    FamilyRow("up", rf"{IN_BLOCKS}ffn\.experts\.mlp\.v1", "expert*row column"),
    FamilyRow("down", rf"{IN_BLOCKS}ffn\.experts\.mlp\.w2", "expert*column row"),
)
MPT = (
    FamilyRow("q", rf"{IN_BLOCKS}attn\.Wqkv\.weight", "blocks column", QKV),
    FamilyRow("o", rf"{IN_BLOCKS}attn\.out_proj\.weight"),
    *_roles(rf"{IN_BLOCKS}ffn\.", "up down"),
)
NEOX = r"(?:gpt_neox\.layers|(?:transformer\.)?h|model\.layers)\.\d+\."
NEOX_ATTENTION = rf"{NEOX}(?:attention|self_attention|self_attn)\."
AROUND_NEOX = (
    FamilyRow("o", rf"{NEOX_ATTENTION}dense\.weight"),
    FamilyRow("up", rf"{NEOX}mlp\.dense_h_to_4h\.weight"),
    FamilyRow("down", rf"{NEOX}mlp\.dense_4h_to_h\.weight"),
)
GPT_NEOX = (FamilyRow("q", rf"{NEOX_ATTENTION}query_key_value\.weight", "head*blocks column", QKV), *AROUND_NEOX)
# Falcon: each key's queries, its key and its value together, whether there is one key in all or one a head.
FALCON = (FamilyRow("q", rf"{NEOX_ATTENTION}query_key_value\.weight", "key_value*blocks column", GROUPED), *AROUND_NEOX)
H = r"(?:transformer\.)?h\.\d+\."
GPT2 = (
    FamilyRow("q", rf"{H}attn\.c_attn\.weight", "column blocks", QKV),
    FamilyRow("o", rf"{H}attn\.c_proj\.weight", "column row"),
    FamilyRow("up", rf"{H}mlp\.c_fc\.weight", "column row"),
    FamilyRow("down", rf"{H}mlp\.c_proj\.weight", "column row"),
)
GPT_BIGCODE = (
    FamilyRow("q", rf"{H}attn\.c_attn\.weight", "key_value*blocks column", GROUPED),
    FamilyRow("o", rf"{H}attn\.c_proj\.weight"),
    FamilyRow("up", rf"{H}mlp\.c_fc\.weight"),
    FamilyRow("down", rf"{H}mlp\.c_proj\.weight"),
)
GPTJ = (
    *_roles(rf"{H}attn\.", "q k v"),
    FamilyRow("q", rf"{H}attn\.qkv_proj\.weight", "4*blocks column", ("q", "v", "k")),  # CodeGen, made on four cores
    FamilyRow("o", rf"{H}attn\.out_proj\.weight"),
    FamilyRow("up", rf"{H}mlp\.fc_in\.weight"),
    FamilyRow("down", rf"{H}mlp\.fc_out\.weight"),
)
STARCODER2 = (
    *ATTENTION,
    FamilyRow("up", rf"{LAYER}mlp\.c_fc\.weight"),
    FamilyRow("down", rf"{LAYER}mlp\.c_proj\.weight"),
)
T5 = (
    *(
        FamilyRow(role, rf"(?:encoder|decoder)\.block\.\d+\.layer\.\d\.(?:Self|EncDec)Attention\.{role}\.weight")
        for role in "qkvo"
    ),
    FamilyRow("gate", r"(?:encoder|decoder)\.block\.\d+\.layer\.\d\.DenseReluDense\.wi_0\.weight"),
    FamilyRow("up", r"(?:encoder|decoder)\.block\.\d+\.layer\.\d\.DenseReluDense\.wi(?:_1)?\.weight"),
    FamilyRow("down", r"(?:encoder|decoder)\.block\.\d+\.layer\.\d\.DenseReluDense\.wo\.weight"),
)
SIDE = r"(?:model\.)?(?:encoder|decoder)\.layers\.\d+\."
BART = (
    *_roles(rf"{SIDE}(?:self_attn|encoder_attn)\.", "q k v"),
    FamilyRow("o", rf"{SIDE}(?:self_attn|encoder_attn)\.out_proj\.weight"),
    FamilyRow("up", rf"{SIDE}fc1\.weight"),
    FamilyRow("down", rf"{SIDE}fc2\.weight"),
)
BERT_LAYER = r"(?:\w+\.)?encoder\.layer\.\d+\."
BERT = (
    FamilyRow("q", rf"{BERT_LAYER}attention\.self\.query\.weight"),
    FamilyRow("k", rf"{BERT_LAYER}attention\.self\.key\.weight"),
    FamilyRow("v", rf"{BERT_LAYER}attention\.self\.value\.weight"),
    FamilyRow("o", rf"{BERT_LAYER}attention\.output\.dense\.weight"),
    FamilyRow("up", rf"{BERT_LAYER}intermediate\.dense\.weight"),
    FamilyRow("down", rf"{BERT_LAYER}output\.dense\.weight"),
)
MODERNBERT = (
    FamilyRow("q", r"(?:model\.)?layers\.\d+\.attn\.Wqkv\.weight", "blocks column", QKV),
    FamilyRow("o", r"(?:model\.)?layers\.\d+\.attn\.Wo\.weight"),
    FamilyRow("gate", r"(?:model\.)?layers\.\d+\.mlp\.Wi\.weight", "blocks column", GATE_UP),
    FamilyRow("down", r"(?:model\.)?layers\.\d+\.mlp\.Wo\.weight"),
)
RELEASE_LAYER = r"layers\.\d+\."
MISTRAL_RELEASE = (
    *(FamilyRow(role, rf"{RELEASE_LAYER}attention\.w{role}\.weight") for role in "qkvo"),
    *_roles(rf"{RELEASE_LAYER}feed_forward\.(?:experts\.\d+\.)?", "w1 w2 w3", r"\.weight"),
    # Mixtral's first release: (experts * width, hidden), w2 stored transposed.
    FamilyRow("w1", rf"{RELEASE_LAYER}block_sparse_moe\.w1", "expert*row column"),
    FamilyRow("w3", rf"{RELEASE_LAYER}block_sparse_moe\.w3", "expert*row column"),
    FamilyRow("w2", rf"{RELEASE_LAYER}block_sparse_moe\.w2", "expert*column row"),
)

_DEEPSEEK = (*COMPRESSED, *DENSE_MLP, *MOE)
_GLM = (*ATTENTION, *FUSED_DENSE)
_QWEN35 = (*GATED_ATTENTION, *DELTA, *DENSE_MLP, *MOE)
# config.json's model_type -> rows, the first whose pattern is the whole name counts
FAMILIES: dict[str, tuple[FamilyRow, ...]] = {
    "mixtral": (*ATTENTION, *SPARSE_MLP),
    "phimoe": (*ATTENTION, *SPARSE_MLP),
    **dict.fromkeys("minimax minimax_m1 minimax_text_01".split(), MINIMAX),
    "minimax_m2": (*ATTENTION, *SPARSE_MLP),
    **dict.fromkeys(
        "mistral ministral ministral3 llama qwen2 qwen3 gemma gemma2 gemma3_text smollm3 olmo olmo2 olmo3 granite "
        "ernie4_5 hunyuan_v1_dense cohere cohere2 stablelm exaone4 nemotron seed_oss helium apertus arcee".split(),
        LLAMA,
    ),
    **dict.fromkeys("mistral3 gemma3 qwen2_vl qwen2_5_vl qwen3_vl qwen2_audio".split(), LLAMA),
    **dict.fromkeys("qwen2_moe qwen3_moe glm4_moe ernie4_5_moe dots1 hunyuan_v1_moe".split(), (*LLAMA, *MOE)),
    "olmoe": (*ATTENTION, *MOE),
    "flex_olmo": (*ATTENTION, *MOE),
    "qwen3_vl_moe": (*EITHER_WAY, *LLAMA, *MOE),
    **dict.fromkeys("deepseek_v2 deepseek_v3 kimi_k2 glm4_moe_lite".split(), _DEEPSEEK),
    **dict.fromkeys("qwen3_next qwen3_5_text qwen3_5_moe_text qwen3_5 qwen3_5_moe".split(), _QWEN35),
    "granitemoe": (*ATTENTION, *GRANITE_ROWS),
    "granitemoeshared": (*ATTENTION, *GRANITE_ROWS),
    "granitemoehybrid": (*ATTENTION, *GRANITE_ROWS, *MAMBA2),
    "gpt_oss": (*ATTENTION, *GPT_OSS),
    "llama4_text": LLAMA4,
    "llama4": LLAMA4,
    "jamba": (*ATTENTION, *MAMBA, *FEED_FORWARD),
    "bamba": (*ATTENTION, *MAMBA2, *FEED_FORWARD),
    "falcon_h1": (*ATTENTION, *MAMBA2, *FEED_FORWARD),
    "mamba": (
        FamilyRow("x", rf"{MIXER}in_proj\.weight", "blocks column", ("x", "z")),
        FamilyRow("out", rf"{MIXER}out_proj\.weight"),
    ),
    "mamba2": (
        FamilyRow("z", rf"{MIXER}in_proj\.weight", "blocks column", ("z=inner", "x=inner", "ssm=*")),
        FamilyRow("out", rf"{MIXER}out_proj\.weight"),
    ),
    "lfm2": LFM2,
    "lfm2_moe": LFM2,
    "gemma3n_text": GEMMA3N,
    "gemma3n": GEMMA3N,
    "glm": _GLM,
    "glm4": _GLM,
    "glm4v": _GLM,
    "phi3": PHI3,
    "phi4_multimodal": PHI3,
    "phi4mm": PHI3,
    "phi": PHI,
    "dbrx": DBRX,
    "mpt": MPT,
    "gpt_neox": GPT_NEOX,
    "bloom": GPT_NEOX,
    "persimmon": GPT_NEOX,
    "falcon": FALCON,
    "gpt2": GPT2,
    "gpt_bigcode": GPT_BIGCODE,
    "gptj": GPTJ,
    "codegen": GPTJ,
    "starcoder2": STARCODER2,
    "opt": OPT,
    "t5": T5,
    "bart": BART,
    "whisper": BART,
    "bert": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "modernbert": MODERNBERT,
    "mistral_release": MISTRAL_RELEASE,  # params.json instead of config.json: reader.RELEASE
}

# What config.json calls a number: the first of these that is there, a product (or quotient) of them, or the number
# itself. `flag?key` is read where the flag is true, `!flag?key` where it is false. A family's own entry replaces the
# common one, so that a field which this family does not define is not read.
NUMBERS: dict[str, dict[str, str]] = {
    "": {
        "hidden": "hidden_size",
        "depth": "num_hidden_layers",
        "head": "num_attention_heads",
        "key_value": "num_key_value_heads num_attention_heads",
        "width": "head_dim hidden_size/num_attention_heads",
        "expert": "num_local_experts num_experts n_routed_experts moe.num_experts",
        "inner": "mamba_expand*hidden_size",
        "linear_key": "linear_num_key_heads",
        "linear_key_width": "linear_key_head_dim",
        "linear_value": "linear_num_value_heads",
        "linear_value_width": "linear_value_head_dim",
    },
    "mamba2": {"inner": "expand*hidden_size"},
    "falcon_h1": {"inner": "mamba_d_ssm mamba_expand*hidden_size"},
    "dbrx": {
        "depth": "n_layers",
        "head": "n_heads",
        "key_value": "attn_config.kv_n_heads 1",
        "width": "d_model/n_heads",
        "expert": "ffn_config.moe_num_experts",
    },
    "mpt": {"depth": "n_layers"},
    "gpt2": {"depth": "n_layer num_hidden_layers"},
    "gptj": {"depth": "n_layer num_hidden_layers"},
    "codegen": {"depth": "n_layer num_hidden_layers"},
    "bloom": {"head": "n_head num_attention_heads", "depth": "n_layer num_hidden_layers"},
    "falcon": {
        "key_value": "new_decoder_architecture?num_kv_heads new_decoder_architecture?num_attention_heads "
        "!multi_query?num_attention_heads 1",
        "width": "hidden_size/num_attention_heads",
    },
    "gpt_bigcode": {
        "head": "n_head num_attention_heads",
        "depth": "n_layer num_hidden_layers",
        "key_value": "!multi_query?n_head !multi_query?num_attention_heads 1",
        "width": "n_embd/n_head hidden_size/num_attention_heads",
    },
}

# For a family that has no row: names that many families share, wherever they stand. Never cut into parts.
ANY = r"(?:.*\.)?(?:layers|layer|blocks|block|h)\.\d+\.(?:.*\.)?"
IN_EXPERT = rf"{ANY}experts\.\d+\.(?:.*\.)?"
GUESSES = (
    *_roles(IN_EXPERT, "gate up down w1 w2 w3", r"(?:_proj)?\.weight"),
    *_roles(ANY, "q k v o", r"(?:_proj)?\.weight"),
    *_roles(ANY, "q_a q_b kv_b gate up down"),
    FamilyRow("kv_a", rf"{ANY}kv_a_proj_with_mqa\.weight"),
    *_roles(ANY, "w1 w2 w3", r"\.weight"),
    FamilyRow("q", rf"{ANY}query\.weight"),
    FamilyRow("k", rf"{ANY}key\.weight"),
    FamilyRow("v", rf"{ANY}value\.weight"),
    FamilyRow("router", rf"{ANY}gate(?:\.\w+)*\.weight"),
    FamilyRow("adapter", rf"{ANY}adapter\.(?:.*\.)?weight"),
    FamilyRow("linear", rf"{ANY}[^.]+\.weight"),
)
# Names that hold several matrices in most families that use them.
FUSED_NAMES = r".*(?:qkv|query_key_value|kv_proj|c_attn|gate_up|gate_and_up|in_proj|W_pack|fused|packed).*|Wi"
