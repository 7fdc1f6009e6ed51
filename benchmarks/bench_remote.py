"""Bytes moved over HTTP by `laser scan --layers 31 --roles w2` of a synthetic 10 GB Mixtral on a Hub of this machine.

    python benchmarks/bench_remote.py [--hidden 1280 --width 4864]

The weights are made as they are asked for and lie nowhere. Prints what was sent beside headers plus matrices.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import smoke
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from hub_server import Bytes, Generated, Repo, serving

from laser.checkpoint.safetensors import make_header

LAYERS, EXPERTS, SHARDS, VOCABULARY = 32, 8, 20, 32000


def remote(hidden: int, width: int) -> Repo:
    """Names and shapes of Mixtral-8x7B at a smaller size, bf16, in shards of whole layers."""
    groups: list[list[tuple[str, str, tuple[int, ...]]]] = [[] for _ in range(SHARDS)]
    groups[0].append(("model.embed_tokens.weight", "BF16", (VOCABULARY, hidden)))
    for layer in range(LAYERS):
        group, at = groups[layer * SHARDS // LAYERS], f"model.layers.{layer}."
        for role, rows in {"q": hidden, "k": hidden // 4, "v": hidden // 4, "o": hidden}.items():
            group.append((f"{at}self_attn.{role}_proj.weight", "BF16", (rows, hidden)))
        group.append((f"{at}block_sparse_moe.gate.weight", "BF16", (EXPERTS, hidden)))
        for expert in range(EXPERTS):
            for role in ("w1", "w2", "w3"):
                shape = (hidden, width) if role == "w2" else (width, hidden)
                group.append((f"{at}block_sparse_moe.experts.{expert}.{role}.weight", "BF16", shape))
    groups[-1].append(("lm_head.weight", "BF16", (VOCABULARY, hidden)))
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(1_048_583)).to(torch.bfloat16)  # a prime number
    tile, repo, weight_map = noise.view(torch.uint8).numpy().tobytes(), Repo({}), {}
    for number, group in enumerate(groups, 1):
        name, text = f"model-{number:05d}-of-{SHARDS:05d}.safetensors", make_header(group)
        size = 8 + len(text) + sum(2 * int(np.prod(shape)) for _, _, shape in group)
        repo.files[name] = Generated(len(text).to_bytes(8, "little") + text, size, tile, f"synthetic-{number}")
        weight_map |= {tensor: name for tensor, _, _ in group}
    config = {"model_type": "mixtral", "hidden_size": hidden, "num_local_experts": EXPERTS}
    repo.files["config.json"] = Bytes(json.dumps(config).encode())
    repo.files["model.safetensors.index.json"] = Bytes(json.dumps({"weight_map": weight_map}).encode())
    return repo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1280)
    parser.add_argument("--width", type=int, default=4864)
    sizes = smoke.parse(parser, lambda _: ["--hidden", 128, "--width", 512])
    with serving() as hub, tempfile.TemporaryDirectory() as folder:
        repo = hub.repos["maker/synthetic"] = remote(sizes.hidden, sizes.width)
        quiet = {"HF_ENDPOINT": hub.url, "HF_HOME": folder, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1,localhost"}
        command = [sys.executable, "-m", "laser", "scan", "maker/synthetic", "--layers", "31", "--roles", "w2"]
        start = time.perf_counter()
        subprocess.run([*command, "-o", f"{folder}/spectra.safetensors"], env=os.environ | quiet, check=True)
        seconds = time.perf_counter() - start
        total = sum(content.size for content in repo.files.values())
        small = sum(content.size for name, content in repo.files.items() if name.endswith(".json"))
        headers = sum(len(content.header) for content in repo.files.values() if isinstance(content, Generated))
        matrices, sent = EXPERTS * 2 * sizes.hidden * sizes.width, hub.sent()
    due = small + headers + matrices
    print(f"{total / 1e9:.2f} GB remote; config and index {small:,} B, headers {headers:,} B, matrices {matrices:,} B")
    print(f"sent {sent:,} B in {seconds:.1f} s: {100 * (sent / due - 1):+.3f} % beside what is due")
    if sizes.smoke:
        assert due <= sent < 1.05 * due and sent < total / 10, (sent, due, total)


if __name__ == "__main__":
    main()
