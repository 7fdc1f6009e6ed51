"""A base and its fine-tunes on disk: two layers of a Llama, large enough for a spectrum to tell a rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import mixtral_config, write_checkpoint_directory
from merges import BF16, weights

HIDDEN, WIDTH, LAYERS, WORDS = 96, 144, 2, 64
Change = Callable[[str, torch.Tensor], torch.Tensor]


def tensors(seed: int = 0, dtype: torch.dtype = BF16, words: int = WORDS, head: bool = True) -> dict[str, torch.Tensor]:
    shapes = {"q": (HIDDEN, HIDDEN), "k": (HIDDEN // 2, HIDDEN), "v": (HIDDEN // 2, HIDDEN), "o": (HIDDEN, HIDDEN)}
    head_seed = seed + 7
    found = {"model.embed_tokens.weight": weights(words, HIDDEN, seed, dtype)}
    for layer in range(LAYERS):
        at, seed = f"model.layers.{layer}.", seed + 100
        found[at + "input_layernorm.weight"] = torch.ones(HIDDEN, dtype=dtype)
        for i, (role, shape) in enumerate(shapes.items()):
            found[f"{at}self_attn.{role}_proj.weight"] = weights(*shape, seed + i, dtype)
        found[at + "post_attention_layernorm.weight"] = torch.ones(HIDDEN, dtype=dtype)
        for i, (name, shape) in enumerate(
            {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}.items()
        ):
            found[f"{at}mlp.{name}_proj.weight"] = weights(*shape, seed + 10 + i, dtype)
    found["model.norm.weight"] = torch.ones(HIDDEN, dtype=dtype)
    if head:
        found["lm_head.weight"] = weights(words, HIDDEN, head_seed, dtype)
    return found


def llama_config(**more: Any) -> dict[str, Any]:
    base = {k: v for k, v in mixtral_config().items() if k not in ("num_local_experts", "num_experts_per_tok")}
    base |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "vocab_size": WORDS}
    return base | {"intermediate_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4} | more


INNER, EXPERTS = 64, 4


def mixtral(seed: int = 0, dtype: torch.dtype = BF16) -> dict[str, torch.Tensor]:
    """The same with a Mixtral's experts for its MLP."""
    found = {name: W for name, W in tensors(seed, dtype).items() if ".mlp." not in name}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}.block_sparse_moe."
        found[f"{at}gate.weight"] = weights(EXPERTS, HIDDEN, seed + 50 + layer, dtype)
        for expert in range(EXPERTS):
            for i, (name, shape) in enumerate(
                {"w1": (INNER, HIDDEN), "w2": (HIDDEN, INNER), "w3": (INNER, HIDDEN)}.items()
            ):
                place = f"{at}experts.{expert}.{name}.weight"
                found[place] = weights(*shape, seed + 1000 * (layer + 1) + 10 * expert + i, dtype)
    return found


def write_mixtral(path: Path) -> Path:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": WORDS}
    return write_checkpoint_directory(path, mixtral(), mixtral_config() | sizes, 2)


def write_model(path: Path, change: Change | None = None, *, shards: int = 2, seed: int = 0, **more: Any) -> Path:
    """The base, or a fine-tune of it: `change` gets each name and tensor and answers with what takes its place."""
    kept = {key: more.pop(key) for key in ("dtype", "words", "head") if key in more}
    found = tensors(seed, **kept)
    made = {name: (change(name, W) if change else W).contiguous() for name, W in found.items()}
    return write_checkpoint_directory(path, made, llama_config(**more), shards)


def phi(change: Change | None = None) -> dict[str, torch.Tensor]:
    """The Llama's matrices fused as Phi-3 stores them."""
    one, found = {name: change(name, W) if change else W for name, W in tensors().items()}, {}
    for name, W in one.items():
        if "q_proj" in name:
            W = torch.cat([one[name.replace("q_proj", f"{role}_proj")] for role in "qkv"])
            found[name.replace("q_proj", "qkv_proj")] = W
        elif "gate_proj" in name:
            found[name.replace("gate_proj", "gate_up_proj")] = torch.cat((W, one[name.replace("gate_proj", "up_proj")]))
        elif not any(f"{role}_proj" in name for role in ("k", "v", "up")):
            found[name] = W
    return found
