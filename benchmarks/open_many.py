#!/usr/bin/env python3
"""Opening a checkpoint of very many tensors: DeepSeek-V3's names and shapes, 45,000 tensors in 163 shards.

    python benchmarks/open_many.py [--layers 61] [--experts 256] [--shards 163] [--pairs 7] [--against DIR]
                                   [--work DIR] [--keep] [--smoke]

The headers are true, and the weights are holes: 1.3 TB of which a few megabytes lie on the disk. Medians in seconds of
the processor, so that a busy machine makes less of a difference:

    open          laser.open_checkpoint: config, index and headers, checked
    list          laser.list_matrices
    fingerprint   some pages of every tensor, warm; not where DIR has no such thing

With --against, which names a directory with another version of laser, both versions are timed in alternation, each in
a process of its own, and the ratio is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import time
from math import prod
from pathlib import Path

import smoke

HIDDEN, WIDTH, NARROW, DENSE_LAYERS = 7168, 18432, 2048, 3
ATTENTION = {
    "q_a_proj": (1536, HIDDEN),
    "q_b_proj": (24576, 1536),
    "kv_a_proj_with_mqa": (576, HIDDEN),
    "kv_b_proj": (32768, 512),
    "o_proj": (HIDDEN, 16384),
    "q_a_layernorm": (1536,),
    "kv_a_layernorm": (512,),
}


def gated(width: int) -> dict[str, tuple[int, ...]]:
    return {"gate_proj": (width, HIDDEN), "up_proj": (width, HIDDEN), "down_proj": (HIDDEN, width)}


def tensors(layers: int, experts: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes, as the published index has them, without the scales of FP8."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (129280, HIDDEN)}
    for layer in range(layers):
        base = f"model.layers.{layer}"
        found |= {f"{base}.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
        found |= {f"{base}.self_attn.{name}.weight": shape for name, shape in ATTENTION.items()}
        if layer < DENSE_LAYERS:
            found |= {f"{base}.mlp.{name}.weight": shape for name, shape in gated(WIDTH).items()}
            continue
        found |= {f"{base}.mlp.gate.weight": (experts, HIDDEN), f"{base}.mlp.gate.e_score_correction_bias": (experts,)}
        for part in (*(f"experts.{expert}" for expert in range(experts)), "shared_experts"):
            found |= {f"{base}.mlp.{part}.{name}.weight": shape for name, shape in gated(NARROW).items()}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (129280, HIDDEN)}


def write_holes(folder: Path, layers: int, experts: int, shards: int) -> None:
    """The checkpoint, its weights holes. config.json is written last."""
    folder.mkdir(parents=True)
    named = list(tensors(layers, experts).items())
    weight_map = {}
    each = -(-len(named) // shards)
    parts = [named[at : at + each] for at in range(0, len(named), each)]
    for number, part in enumerate(parts, 1):
        file, offset, header = f"model-{number:05d}-of-{len(parts):06d}.safetensors", 0, {}
        for name, shape in part:
            size = 2 * prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
            weight_map[name] = file
        text = json.dumps(header, separators=(",", ":")).encode()
        with (folder / file).open("wb") as made:
            made.write(struct.pack("<Q", len(text)) + text)
            made.truncate(8 + len(text) + offset)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": layers}
    config |= {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "moe_intermediate_size": NARROW, "vocab_size": 129280}
    config |= {"n_routed_experts": experts, "n_shared_experts": 1, "first_k_dense_replace": DENSE_LAYERS}
    config |= {"num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512}
    config |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))


def measured(model: Path) -> dict[str, float]:
    """Seconds of each part with the laser that this process imports; the counts beside them."""
    import laser

    start = time.process_time()
    checkpoint = laser.open_checkpoint(model)
    opened = time.process_time()
    matrices = laser.list_matrices(checkpoint)
    listed = time.process_time()
    taken = {"open": opened - start, "list": listed - opened}
    if hasattr(checkpoint, "fingerprint"):
        assert checkpoint.fingerprint
        taken["fingerprint"] = time.process_time() - listed
    return taken | {"tensors": len(checkpoint.tensors), "matrices": len(matrices)}


def in_process(model: Path, laser: Path) -> dict[str, float]:
    """The same, by the laser in that directory, in a process of its own."""
    told = subprocess.run(
        [sys.executable, __file__, "--once", "--work", str(model.parent)],
        env=os.environ | {"PYTHONPATH": str(laser)}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(told.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--shards", type=int, default=163)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--against", type=Path, help="a directory with another version of laser")
    parser.add_argument("--work", type=Path, default=Path(".demo/many"))
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--once", action="store_true", help="time what lies in --work, once, and print it as JSON")
    arguments = smoke.parse(
        parser,
        lambda folder: ["--layers", 5, "--experts", 4, "--shards", 3, "--pairs", 1, "--work", folder / "work"],
    )
    model: Path = arguments.work / "model"
    if arguments.once:
        return print(json.dumps(measured(model)))
    if not (model / "config.json").exists():
        shutil.rmtree(model, ignore_errors=True)
        write_holes(model, arguments.layers, arguments.experts, arguments.shards)
    here = Path(__file__).resolve().parent.parent
    found: dict[str, list[dict[str, float]]] = {"this": [], "other": []}
    for _ in range(arguments.pairs):
        if arguments.against is None:
            found["this"].append(measured(model))
        else:  # neither always first
            order = [("this", here), ("other", arguments.against)]
            for which, laser in order if len(found["this"]) % 2 else reversed(order):
                found[which].append(in_process(model, laser))
    first = found["this"][0]
    assert first["tensors"] == len(tensors(arguments.layers, arguments.experts)), "a tensor is missing"
    print(f"{first['tensors']:.0f} tensors, {first['matrices']:.0f} matrices, {arguments.pairs} times")
    for part in ("open", "list", "fingerprint"):
        medians = {
            which: statistics.median(once[part] for once in times)
            for which, times in found.items()
            if times and part in times[0]
        }
        ratio = f"  ratio {medians['this'] / medians['other']:.2f}" if "other" in medians else ""
        print(f"{part:12s} " + "  ".join(f"{which} {seconds:.3f} s" for which, seconds in medians.items()) + ratio)
    if not arguments.keep:
        shutil.rmtree(arguments.work)


if __name__ == "__main__":
    main()
