"""What the tensors of each model family are called and how they are stored: a row per kind of tensor, no code.

Roles: q, k, v, o (attention), q_a, q_b, kv_a, kv_b (DeepSeek's compressed attention); w1, w2, w3 (Mixtral's experts)
and gate, down, up (the same three matrices under Llama's names, experts and dense MLPs alike); router, embedding, head,
norm, bias.

`axes` says how a tensor is stored that is not one matrix (out, in), first axis first:

    expert   one matrix per index             head     attention heads, one after another
    row      outputs of a matrix              column   its inputs
    blocks   `parts` one after another        comb     `parts` taking turns

blocks and comb stand where the rows of a matrix are. `expert*row` is one dimension that holds both, and config.json
knows how many experts (or heads) there are. Facts from transformers 5.23 and from Mistral's releases.
"""

from __future__ import annotations

from dataclasses import dataclass

LAYER = r"(?:language_model\.)?(?:model\.)?(?:language_model\.)?layers\.(?P<layer>\d+)\."
EXPERT = r"experts\.(?P<expert>\d+)\."


@dataclass(frozen=True)
class Row:
    """One kind of tensor: its role, and the pattern of its whole name."""

    role: str
    pattern: str
    axes: str = ""  # "" for one matrix (out, in), or whatever is never cut
    parts: tuple[str, ...] = ()  # the roles that blocks or comb consist of

    def at(self, place: str) -> Row:
        return Row(self.role, place + self.pattern, self.axes, self.parts)


def _roles(place: str, roles: str, suffix: str = r"_proj\.weight") -> tuple[Row, ...]:
    return tuple(Row(role, rf"{place}{role}{suffix}") for role in roles.split())


GATE_UP, QKV = ("gate", "up"), ("q", "k", "v")
ATTENTION = _roles(rf"{LAYER}self_attn\.", "q k v o")
COMPRESSED = (
    *_roles(rf"{LAYER}self_attn\.", "q o q_a q_b kv_b"),
    Row("kv_a", rf"{LAYER}self_attn\.kv_a_proj_with_mqa\.weight"),
)
DENSE = _roles(rf"{LAYER}mlp\.", "gate up down")
AROUND = (
    Row("norm", rf"{LAYER}(?:self_attn\.)?\w*(?:norm|layernorm)\.(?:weight|bias)"),
    Row("norm", r"(?:language_model\.)?(?:model\.)?(?:language_model\.)?norm\.(?:weight|bias)"),
    Row("bias", rf"{LAYER}(?:self_attn|mlp)\.\w+\.bias"),
    Row("embedding", r"(?:language_model\.)?(?:model\.)?(?:language_model\.)?embed_tokens\.weight"),
    Row("head", r"(?:language_model\.)?lm_head\.(?:weight|bias)"),
)
# A checkpoint that transformers 5 saved with save_original_format=False: experts as they are in memory.
IN_MEMORY = (
    Row("gate", rf"{LAYER}mlp\.experts\.gate_up_proj", "expert blocks column", GATE_UP),
    Row("down", rf"{LAYER}mlp\.experts\.down_proj", "expert row column"),
    Row("router", rf"{LAYER}mlp\.(?:gate|router)\.weight"),
)
SPARSE = _roles(rf"{LAYER}block_sparse_moe\.{EXPERT}", "w1 w2 w3", r"\.weight")
SPARSE += (Row("router", rf"{LAYER}block_sparse_moe\.gate\.weight"), *IN_MEMORY)
EXPERTS = _roles(rf"{LAYER}mlp\.{EXPERT}", "gate up down")
SHARED = _roles(rf"{LAYER}mlp\.shared_experts?\.", "gate up down")
MOE = (
    *EXPERTS,
    *SHARED,
    *IN_MEMORY,
    Row("router", rf"{LAYER}mlp\.shared_expert_gate\.weight"),
    Row("bias", rf"{LAYER}mlp\.gate\.e_score_correction_bias"),
)
VISION = (Row("vision", r"(?:model\.)?(?:vision_tower|vision_model|multi_modal_projector)\..*"),)

LLAMA = (*ATTENTION, *DENSE, *AROUND)
GRANITE = (
    Row("gate", rf"{LAYER}block_sparse_moe\.input_linear\.weight", "expert blocks column", GATE_UP),
    Row("down", rf"{LAYER}block_sparse_moe\.output_linear\.weight", "expert row column"),
    Row("router", rf"{LAYER}block_sparse_moe\.router\.layer\.weight"),
    Row("gate", rf"{LAYER}shared_mlp\.input_linear\.weight", "blocks column", GATE_UP),
    Row("down", rf"{LAYER}shared_mlp\.output_linear\.weight"),
)
GPT_OSS = (
    Row("gate", rf"{LAYER}mlp\.experts\.gate_up_proj", "expert column comb", GATE_UP),
    Row("down", rf"{LAYER}mlp\.experts\.down_proj", "expert column row"),
    Row("bias", rf"{LAYER}mlp\.experts\.\w+_bias"),
    Row("router", rf"{LAYER}mlp\.router\.(?:weight|bias)"),
    Row("sinks", rf"{LAYER}self_attn\.sinks"),
)
LLAMA4 = (
    *ATTENTION,
    Row("gate", rf"{LAYER}feed_forward\.experts\.gate_up_proj", "expert column blocks", GATE_UP),
    Row("down", rf"{LAYER}feed_forward\.experts\.down_proj", "expert column row"),
    Row("router", rf"{LAYER}feed_forward\.router\.weight"),
    *_roles(rf"{LAYER}feed_forward\.(?:shared_expert\.)?", "gate up down"),
    *AROUND,
    *VISION,
)
PHI3 = (
    Row("q", rf"{LAYER}self_attn\.qkv_proj\.weight", "blocks column", QKV),
    Row("o", rf"{LAYER}self_attn\.o_proj\.weight"),
    Row("gate", rf"{LAYER}mlp\.gate_up_proj\.weight", "blocks column", GATE_UP),
    Row("down", rf"{LAYER}mlp\.down_proj\.weight"),
    *AROUND,
)
BLOCK = r"transformer\.blocks\.(?P<layer>\d+)\."
DBRX = (
    Row("q", rf"{BLOCK}norm_attn_norm\.attn\.Wqkv\.weight", "blocks column", QKV),
    Row("o", rf"{BLOCK}norm_attn_norm\.attn\.out_proj\.weight"),
    Row("gate", rf"{BLOCK}ffn\.experts\.mlp\.w1", "expert*row column"),
    Row("up", rf"{BLOCK}ffn\.experts\.mlp\.v1", "expert*row column"),
    Row("down", rf"{BLOCK}ffn\.experts\.mlp\.w2", "expert*column row"),
    Row("router", rf"{BLOCK}ffn\.router\.layer\.weight"),
    Row("norm", rf"{BLOCK}norm_attn_norm\.norm_[12]\.weight|transformer\.norm_f\.weight"),
    Row("embedding", r"transformer\.wte\.weight"),
    Row("head", r"lm_head\.weight"),
)
NEOX = r"gpt_neox\.layers\.(?P<layer>\d+)\."
GPT_NEOX = (
    Row("q", rf"{NEOX}attention\.query_key_value\.weight", "head*blocks column", QKV),
    Row("o", rf"{NEOX}attention\.dense\.weight"),
    Row("up", rf"{NEOX}mlp\.dense_h_to_4h\.weight"),
    Row("down", rf"{NEOX}mlp\.dense_4h_to_h\.weight"),
    Row("norm", rf"{NEOX}\w+_layernorm\.(?:weight|bias)|gpt_neox\.final_layer_norm\.(?:weight|bias)"),
    Row("bias", rf"{NEOX}(?:attention|mlp)\.\w+\.bias"),
    # Buffers that older releases saved: the causal mask, its fill value, the rotary frequencies.
    Row("buffer", rf"{NEOX}attention\.(?:bias|masked_bias|rotary_emb\.inv_freq)"),
    Row("embedding", r"gpt_neox\.embed_in\.weight"),
    Row("head", r"embed_out\.weight"),
)
H = r"(?:transformer\.)?h\.(?P<layer>\d+)\."
GPT2 = (
    Row("q", rf"{H}attn\.c_attn\.weight", "column blocks", QKV),
    Row("o", rf"{H}attn\.c_proj\.weight", "column row"),
    Row("up", rf"{H}mlp\.c_fc\.weight", "column row"),
    Row("down", rf"{H}mlp\.c_proj\.weight", "column row"),
    Row("norm", rf"{H}ln_[12]\.(?:weight|bias)|(?:transformer\.)?ln_f\.(?:weight|bias)"),
    Row("bias", rf"{H}(?:attn|mlp)\.c_\w+\.bias"),
    Row("buffer", rf"{H}attn\.(?:bias|masked_bias)"),  # the causal mask, saved by older releases
    Row("embedding", r"(?:transformer\.)?wte\.weight"),
    Row("position", r"(?:transformer\.)?wpe\.weight"),
    Row("head", r"lm_head\.weight"),
)
RELEASE = r"layers\.(?P<layer>\d+)\."
MISTRAL_RELEASE = (
    *(Row(role, rf"{RELEASE}attention\.w{role}\.weight") for role in "qkvo"),
    *_roles(rf"{RELEASE}feed_forward\.(?:{EXPERT})?", "w1 w2 w3", r"\.weight"),
    # Mixtral's first release: (experts * width, hidden), w2 stored transposed.
    Row("w1", rf"{RELEASE}block_sparse_moe\.w1", "expert*row column"),
    Row("w3", rf"{RELEASE}block_sparse_moe\.w3", "expert*row column"),
    Row("w2", rf"{RELEASE}block_sparse_moe\.w2", "expert*column row"),
    Row("router", rf"{RELEASE}(?:feed_forward|block_sparse_moe)\.gate\.weight"),
    Row("norm", rf"{RELEASE}(?:attention|ffn)_norm\.weight|norm\.weight"),
    Row("embedding", r"tok_embeddings\.weight"),
    Row("head", r"output\.weight"),
)

# config.json's model_type -> rows, the first whose pattern is the whole name counts
FAMILIES: dict[str, tuple[Row, ...]] = {
    "mixtral": (*ATTENTION, *SPARSE, *AROUND),
    "mistral": LLAMA,
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "qwen2_moe": (*LLAMA, *MOE),
    "qwen3_moe": (*LLAMA, *MOE),
    "olmoe": (*ATTENTION, *MOE, *AROUND),
    "deepseek_v2": (*COMPRESSED, *DENSE, *MOE, *AROUND),
    "deepseek_v3": (*COMPRESSED, *DENSE, *MOE, *AROUND),
    "phimoe": (*ATTENTION, *SPARSE, *AROUND),
    "granitemoe": (*ATTENTION, *GRANITE, *AROUND),
    "granitemoeshared": (*ATTENTION, *GRANITE, *AROUND),
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "gemma3": (*LLAMA, *VISION),
    "gpt_oss": (*ATTENTION, *GPT_OSS, *AROUND),
    "llama4_text": LLAMA4,
    "llama4": LLAMA4,
    "dbrx": DBRX,
    "phi3": PHI3,
    "gpt_neox": GPT_NEOX,
    "gpt2": GPT2,
    "mistral_release": MISTRAL_RELEASE,  # params.json instead of config.json: reader.RELEASE
}

# For a family that has no row: names that many families share, wherever they stand. Never cut.
ANY = r"(?:.*\.)?(?:layers|layer|blocks|block|h)\.(?P<layer>\d+)\.(?:.*\.)?"
IN_EXPERT = rf"{ANY}experts\.(?P<expert>\d+)\.(?:.*\.)?"
GUESSES = (
    Row("norm", r".*(?:norm|layernorm|ln_\w+|ln)\d*\.(?:weight|bias)"),
    Row("bias", r".*bias"),
    *_roles(IN_EXPERT, "gate up down w1 w2 w3", r"(?:_proj)?\.weight"),
    *_roles(ANY, "q k v o q_a q_b kv_b gate up down"),
    *_roles(ANY, "w1 w2 w3", r"\.weight"),
    Row("router", rf"{ANY}(?:gate|router|shared_expert_gate)(?:\.\w+)?\.weight"),
    Row("embedding", r".*(?:embed|wte|wpe)\w*(?:\.\w+)?\.weight"),
    Row("head", r"(?:.*\.)?(?:lm_head|output|embed_out)\.weight"),
    Row("linear", rf"{ANY}[^.]+\.weight"),
)
