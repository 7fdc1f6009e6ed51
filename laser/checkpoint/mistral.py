"""Mistral's own release format, and its translation into the Hub's.

Such a release is params.json with consolidated*.safetensors or .pt. Both hold the same matrices under other names.
Rotary embedding turns neighbouring rows of q and k there, and rows half a head apart in transformers, so these two are
permuted row by row; everything else is copied. Names and parameters as in Mistral's releases of 7B, 8x7B (experts
stacked in one tensor, w2 transposed) and 8x22B.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from laser.checkpoint.convert import assemble_shards
from laser.checkpoint.matrices import Matrix, list_matrices
from laser.checkpoint.reader import RELEASE, Checkpoint
from laser.errors import CheckpointError
from laser.records import shown

# our name for it -> the releases' names: 7B and 8x22B have the first, the first release of 8x7B the second
PARAMS = {
    "hidden_size": ("dim", "hidden_size"),
    "intermediate_size": ("hidden_dim", "intermediate_size"),
    "num_hidden_layers": ("n_layers", "num_hidden_layers"),
    "num_attention_heads": ("n_heads", "num_attention_heads"),
    "vocab_size": ("vocab_size",),
}
# What changes the mathematics in ways that this translation does not know.
NOT_CONVERTED = ("vision_encoder", "quantization", "yarn", "lora", "llama_4_scaling", "q_lora_rank", "ragged_attention")
# Of any number, and of layers and experts, that a file of either format may ask for.
LARGEST_NUMBER, MOST_LAYERS = 2**31 - 1, 4096
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
PLACES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
MISTRAL_MLP = {"w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj"}
NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def is_release(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.get("model_type") == RELEASE


def hub_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json for a release's params.json. Raises CheckpointError for what is missing or not known."""
    params = checkpoint.config
    strange = [key for key in NOT_CONVERTED if params.get(key)]
    if strange:
        raise CheckpointError(
            f"{checkpoint.name}/params.json: {strange[0]} has no translation here; try the Hub's version of this model"
        )
    moe = params.get("moe") or params
    if not isinstance(moe, Mapping):
        raise CheckpointError(
            f"{checkpoint.name}/params.json: moe is {shown(moe)}, expected an object; download it again"
        )

    def whole(place: Mapping[str, Any], *names: str, default: Any = None, most: int = LARGEST_NUMBER) -> Any:
        found = next((place[name] for name in names if place.get(name) is not None), default)
        if found is not default and (type(found) is not int or not 1 <= found <= most):
            raise wrong(names[0], found, f"a whole number from 1 to {most}")
        return found

    def positive(name: str, default: float) -> float:
        found = default if params.get(name) is None else params[name]
        if type(found) not in (int, float) or not 0 < found <= sys.float_info.max:
            raise wrong(name, found, "a number above 0")
        return float(found)

    def wrong(name: str, found: Any, expected: str) -> CheckpointError:
        stated = None if found is None else shown(found)
        return CheckpointError(
            f"{checkpoint.name}/params.json: found {name} {stated}, expected {expected}; download it again"
        )

    numbers = {}
    for ours, names in PARAMS.items():
        numbers[ours] = whole(params, *names, most=MOST_LAYERS if ours == "num_hidden_layers" else LARGEST_NUMBER)
        if numbers[ours] is None:
            raise wrong(names[0], None, "a whole number")
    heads, tied = numbers["num_attention_heads"], params.get("tied_embeddings")
    if tied not in (None, False, True):
        raise wrong("tied_embeddings", tied, "true or false")
    config: dict[str, Any] = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        **numbers,
        "num_key_value_heads": whole(params, "n_kv_heads", "num_key_value_heads", default=heads),
        "head_dim": whole(params, "head_dim", default=numbers["hidden_size"] // heads),
        "hidden_act": "silu",
        "rms_norm_eps": positive("norm_eps" if params.get("norm_eps") is not None else "rms_norm_eps", 1e-5),
        "max_position_embeddings": whole(params, "max_seq_len", "max_position_embeddings", default=32768),
        "sliding_window": whole(params, "sliding_window"),
        "tie_word_embeddings": bool(tied),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    # Where params.json does not say, Mistral's own code takes 1e6, and 1e4 with a sliding window (the first 7B).
    config["rope_theta"] = positive("rope_theta", 1e4 if config["sliding_window"] else 1e6)
    experts = whole(moe, "num_experts", "num_local_experts", most=MOST_LAYERS)
    if experts:
        config |= {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": experts,
            "num_experts_per_tok": whole(moe, "num_experts_per_tok", default=2, most=experts),
        }
    dtypes = {info.dtype for info in checkpoint.tensors.values()}
    if len(dtypes) == 1 and dtypes <= TORCH_NAMES.keys():
        config["torch_dtype"] = TORCH_NAMES[dtypes.pop()]
    return config


def impossible(config: Mapping[str, Any], tensors: int) -> str | None:
    """What of a config no model of `tensors` tensors can have: said before the names of all its tensors are made."""
    layers, experts, width = config["num_hidden_layers"], config.get("num_local_experts") or 1, config["head_dim"]
    if layers * experts > tensors:
        return f"found {tensors} tensors, expected those of {layers} layers of {experts} experts"
    if width < 2 or width % 2:
        return f"found heads of {width} dimensions, expected an even number, for a rotary embedding turns pairs"
    return None


def as_hub(checkpoint: Checkpoint) -> Checkpoint:
    """A release seen as a Hub checkpoint: config, index and shards of at most MAX_SHARD bytes that no file holds yet.

    Raises CheckpointError for a tensor that is missing, has another shape, or is not known.
    """
    config = hub_config(checkpoint)
    matrices = {_hub_name(matrix): matrix for matrix in list_matrices(checkpoint)}
    _check_release(checkpoint, config, matrices)

    def tensor(name: str) -> torch.Tensor:
        matrix = matrices[name]
        W = checkpoint.read(matrix.tensor, matrix.part)
        return halves_from_pairs(W, config["head_dim"]) if matrix.role in ("q", "k") else W

    entries = [(name, m.dtype, m.shape) for name, m in matrices.items()]
    return assemble_shards(checkpoint.path, config, entries, tensor)


def halves_from_pairs(W: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of q or k (heads * width, n) from rotary pairs (0, 1), (2, 3), ... to (0, width/2), (1, width/2 + 1), ..."""
    rows, n = W.shape
    return W.view(rows // width, width // 2, 2, n).transpose(1, 2).reshape(rows, n)


def _hub_name(matrix: Matrix) -> str:
    around = {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight"}
    layer, role = f"model.layers.{matrix.layer}.", matrix.role
    if role in around:
        return around[role]
    if role == "norm":
        kind = matrix.name.split(".")[-2]
        return f"{layer}{NORMS[kind]}.weight" if kind in NORMS else "model.norm.weight"
    if role in PLACES:
        return f"{layer}{PLACES[role]}.weight"
    if role == "router":
        return f"{layer}block_sparse_moe.gate.weight"
    if role in MISTRAL_MLP and matrix.expert is not None:
        return f"{layer}block_sparse_moe.experts.{matrix.expert}.{role}.weight"
    if role in MISTRAL_MLP:
        return f"{layer}{MISTRAL_MLP[role]}.weight"
    raise CheckpointError(f"{matrix.name} is no tensor of Mistral's format; try the Hub's version of this model")


def _check_release(checkpoint: Checkpoint, config: Mapping[str, Any], found: Mapping[str, Matrix]) -> None:
    if message := impossible(config, len(found)):
        raise CheckpointError(
            f"{checkpoint.name}: {message} by params.json; use the params.json that belongs to these weights"
        )
    wanted = expected(config)
    for name in (*wanted, *found):
        if name not in found:
            raise CheckpointError(
                f"{checkpoint.name} holds no tensor for {name}, which params.json asks for; finish the download"
            )
        shape = found[name].shape
        if wanted.get(name) != shape:
            expected_shape = list(wanted[name]) if name in wanted else "no such tensor"
            raise CheckpointError(
                f"{checkpoint.name}: {found[name].name} has shape {list(shape)}, expected {expected_shape} by "
                "params.json; use the params.json that belongs to these weights"
            )


def expected(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor that the Hub's model of this config has, with its shape."""
    H, width, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = (config[f"num_{who}_heads"] * config["head_dim"] for who in ("attention", "key_value"))
    shapes = {"model.embed_tokens.weight": (words, H), "model.norm.weight": (H,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (words, H)
    mlp = {"w1": (width, H), "w2": (H, width), "w3": (width, H)}
    for layer in (f"model.layers.{number}." for number in range(config["num_hidden_layers"])):
        shapes |= {f"{layer}{norm}.weight": (H,) for norm in NORMS.values()}
        for role, shape in {"q": (q, H), "k": (kv, H), "v": (kv, H), "o": (H, q)}.items():
            shapes[f"{layer}{PLACES[role]}.weight"] = shape
        experts = config.get("num_local_experts")
        if experts:
            shapes[f"{layer}block_sparse_moe.gate.weight"] = (experts, H)
        for role, shape in mlp.items():
            if experts:
                at = f"{layer}block_sparse_moe.experts."
                shapes |= {f"{at}{expert}.{role}.weight": shape for expert in range(experts)}
            else:
                shapes[f"{layer}{MISTRAL_MLP[role]}.weight"] = shape
    return shapes
