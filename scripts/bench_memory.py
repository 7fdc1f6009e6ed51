#!/usr/bin/env python3
"""Peak resident memory of scan and reduce on a synthetic checkpoint with true Mixtral shapes.

    python scripts/bench_memory.py [--layers 3] [--experts 8] [--work DIR] [--roles w1,q,k]

Writes `layers` decoder layers of random bf16 weights (14336 x 4096 experts; one layer is 2.9 GB), then runs `scan` and
`reduce` each in a process of its own that prints how far its resident memory rose above that of importing the package.
The bound: 8 times the largest matrix in float32, plus 200 MB, whatever the checkpoint's size.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HIDDEN, WIDTH, KEY_VALUE, VOCABULARY = 4096, 14336, 1024, 32000
CHILD = """
import re, sys, time
from pathlib import Path
import laser
from laser.selection import Selection, parse_roles

def peak():  # not getrusage, whose maximum a child inherits from the process that started it
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

verb, source, work, roles = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4]
device = laser.choose_device("cpu")
before, start = peak(), time.perf_counter()
checkpoint = laser.open_checkpoint(source)
if verb == "scan":
    selection = Selection(layers=(0,), roles=parse_roles(roles), exclude=r"experts\\.[2-9]")
    laser.scan(checkpoint, selection, device=device).save(work / "spectra.safetensors")
else:
    plan = laser.make_plan(laser.Spectra.load(work / "spectra.safetensors"), "fraction:0.4")
    laser.reduce(checkpoint, plan, work / "out", device=device)
print(peak() - before, time.perf_counter() - start)
"""


def shapes(experts: int) -> dict[str, tuple[int, ...]]:
    """Tensor names within a layer, and their shapes in Mixtral-8x7B."""
    layer: dict[str, tuple[int, ...]] = {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    for role, rows in {"q": HIDDEN, "k": KEY_VALUE, "v": KEY_VALUE, "o": HIDDEN}.items():
        layer[f"self_attn.{role}_proj"] = (rows, HIDDEN)
    layer["block_sparse_moe.gate"] = (experts, HIDDEN)
    for expert in range(experts):
        for role in ("w1", "w3"):
            layer[f"block_sparse_moe.experts.{expert}.{role}"] = (WIDTH, HIDDEN)
        layer[f"block_sparse_moe.experts.{expert}.w2"] = (HIDDEN, WIDTH)
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


def write_synthetic_mixtral(path: Path, layers: int, experts: int) -> None:
    """A checkpoint in the Hub's layout, one shard per layer, without tokenizer."""
    path.mkdir(parents=True)
    rng, weight_map = np.random.default_rng(0), {}
    parts = {"embed": {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}}
    for layer in range(layers):
        parts[str(layer)] = {f"model.layers.{layer}.{k}.weight": v for k, v in shapes(experts).items()}
    for number, tensors in enumerate(parts.values(), 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_shard(path / file, tensors, rng)
        weight_map |= dict.fromkeys(tensors, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": HIDDEN}
    config |= {"intermediate_size": WIDTH, "num_hidden_layers": layers, "num_local_experts": experts}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 8, "num_experts_per_tok": 2, "vocab_size": VOCABULARY}
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True, "torch_dtype": "bfloat16"}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path(".demo/memory"))
    parser.add_argument("--roles", default="w1,w2,q,k")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there, for bench_streaming.py")
    arguments = parser.parse_args()
    work = arguments.work
    start = time.perf_counter()
    if not (work / "model" / "config.json").exists():  # written last; an earlier one is used again
        shutil.rmtree(work, ignore_errors=True)
        write_synthetic_mixtral(work / "model", arguments.layers, arguments.experts)
    shutil.rmtree(work / "out", ignore_errors=True)
    size = sum(f.stat().st_size for f in (work / "model").iterdir())
    print(f"{size / 1e9:.2f} GB of weights written in {time.perf_counter() - start:.0f} s", flush=True)
    bound = 8 * 4 * WIDTH * HIDDEN + 200e6
    worst = 0.0
    for verb in ("scan", "reduce"):
        command = [sys.executable, "-c", CHILD, verb, str(work / "model"), str(work), arguments.roles]
        rise, seconds = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        worst = max(worst, rise)
        print(
            f"{verb:7s} peak {rise / 1e6:7.0f} MB above the import, bound {bound / 1e6:.0f} MB, {seconds:.1f} s",
            flush=True,
        )
    if not arguments.keep:
        shutil.rmtree(work)
    sys.exit(worst > bound)


if __name__ == "__main__":
    main()
