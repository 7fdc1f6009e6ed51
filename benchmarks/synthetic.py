"""A checkpoint of random bf16 weights in the shapes of Mixtral-8x7B or a fraction of them, one tensor in memory."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Sizes:
    """Those of Mixtral-8x7B."""

    hidden: int = 4096
    width: int = 14336
    key_value: int = 1024
    vocabulary: int = 32000

    def over(self, factor: int) -> Sizes:
        """Every side divided by `factor`."""
        return Sizes(self.hidden // factor, self.width // factor, self.key_value // factor, self.vocabulary // factor)


def shapes(experts: int, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Tensor names within a layer, and their shapes."""
    hidden, width = sizes.hidden, sizes.width
    layer: dict[str, tuple[int, ...]] = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    for role, rows in {"q": hidden, "k": sizes.key_value, "v": sizes.key_value, "o": hidden}.items():
        layer[f"self_attn.{role}_proj"] = (rows, hidden)
    layer["block_sparse_moe.gate"] = (experts, hidden)
    for expert in range(experts):
        for role in ("w1", "w3"):
            layer[f"block_sparse_moe.experts.{expert}.{role}"] = (width, hidden)
        layer[f"block_sparse_moe.experts.{expert}.w2"] = (hidden, width)
    return layer


def write_shard(path: Path, tensors: dict[str, tuple[int, ...]], rng: np.random.Generator) -> None:
    """Random bf16 weights, one tensor in memory at a time."""
    header, offset = {}, 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in tensors.values():
            weights = 0.02 * rng.standard_normal(int(np.prod(shape)), dtype=np.float32)
            file.write((weights.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def write_synthetic_mixtral(path: Path, layers: int, experts: int, sizes: Sizes | None = None) -> Path:
    """A checkpoint in the Hub's layout, one shard per layer, without tokenizer. config.json is written last."""
    sizes = sizes or Sizes()
    path.mkdir(parents=True)
    rng, weight_map = np.random.default_rng(0), {}
    embedding = {"model.embed_tokens.weight": (sizes.vocabulary, sizes.hidden), "model.norm.weight": (sizes.hidden,)}
    parts: dict[str, dict[str, tuple[int, ...]]] = {"embed": embedding}
    for layer in range(layers):
        parts[str(layer)] = {f"model.layers.{layer}.{k}.weight": v for k, v in shapes(experts, sizes).items()}
    for number, tensors in enumerate(parts.values(), 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_shard(path / file, tensors, rng)
        weight_map |= dict.fromkeys(tensors, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": sizes.hidden}
    config |= {"intermediate_size": sizes.width, "num_hidden_layers": layers, "num_local_experts": experts}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 8, "num_experts_per_tok": 2}
    config |= {"vocab_size": sizes.vocabulary, "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    (path / "config.json").write_text(json.dumps(config))
    return path
