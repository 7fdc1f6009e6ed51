"""How much memory does a streamed evaluation need? On a Mixtral made on the spot, several times larger than a cap.

    python benchmarks/bench_stream_memory.py [--layers 40] [--hidden 1024] [--cap-mb 600]

Two subprocesses evaluate the same windows of random tokens: one streams under a cap on its data segment
(RLIMIT_DATA: anonymous memory, which is where weights and activations go; RLIMIT_AS would also count the libraries'
mapped files), and one loads the whole model under the same cap and must fail. Then the stream runs once more without a
cap and reports its peak resident set. Everything is in a temporary directory and removed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import smoke

EXPERTS, VOCABULARY, HEADS, TOKENS, WINDOWS = 4, 4096, 16, 256, 4


def make(path: Path, layers: int, hidden: int) -> int:
    """A bf16 Mixtral of random weights, one shard per layer, never more than one layer in memory. Returns its bytes."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    width = 2 * hidden

    def matrix(m: int, n: int) -> torch.Tensor:
        return (0.02 * torch.randn(m, n, generator=generator)).bfloat16()

    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 4,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(config))
    weight_map, total = {}, 0
    for layer in range(-1, layers):
        tensors = {}
        if layer < 0:
            tensors["model.embed_tokens.weight"] = matrix(VOCABULARY, hidden)
            tensors["lm_head.weight"] = matrix(VOCABULARY, hidden)
            tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        else:
            at = f"model.layers.{layer}."
            for role, rows in {"q": hidden, "k": hidden // 4, "v": hidden // 4, "o": hidden}.items():
                tensors[f"{at}self_attn.{role}_proj.weight"] = matrix(rows, hidden)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{at}{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
            tensors[at + "block_sparse_moe.gate.weight"] = matrix(EXPERTS, hidden)
            for expert in range(EXPERTS):
                tensors[f"{at}block_sparse_moe.experts.{expert}.w1.weight"] = matrix(width, hidden)
                tensors[f"{at}block_sparse_moe.experts.{expert}.w2.weight"] = matrix(hidden, width)
                tensors[f"{at}block_sparse_moe.experts.{expert}.w3.weight"] = matrix(width, hidden)
        shard = f"model-{layer + 2:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, path / shard)
        weight_map |= dict.fromkeys(tensors, shard)
        total += sum(t.nbytes for t in tensors.values())
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


def child(path: Path, stream: bool, cap: int, above: bool) -> None:
    """Evaluate and print the loss and the peak resident set, MB; `cap` bytes of data segment, 0 for none."""
    import numpy as np

    from laser.checkpoint.reader import open_checkpoint
    from laser.evaluation.evaluate import evaluate
    from laser.evaluation.streaming import LayeredModel  # the libraries are in memory before the cap counts
    from laser.evaluation.text import Window, Windows

    generator = np.random.default_rng(0)
    ids = [generator.integers(3, VOCABULARY, TOKENS + 1) for _ in range(WINDOWS)]
    windows = Windows(tuple(Window(i, TOKENS) for i in ids), "random", "0" * 64, TOKENS, "windows", False, None)
    checkpoint = open_checkpoint(path)
    LayeredModel(checkpoint)
    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if cap and above:  # what is resident differs from machine to machine; the data segment is what the cap counts
        status = Path("/proc/self/status").read_text()
        cap += 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmData:")))
    if cap:
        resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
    record = evaluate(checkpoint, windows, stream=stream, dtype="float32")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"nll": record.nll, "peak_mb": round(peak), "libraries_mb": round(imported)}))


def run(path: Path, kind: str, cap: int, above: bool = False) -> tuple[int, str, str]:
    command = [sys.executable, __file__, "--child", kind, "--path", str(path), "--cap-mb", str(cap)]
    command += ["--above-libraries"] if above else []
    # One thread: each thread of each BLAS reserves buffers, which the cap counts and nobody fills.
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet)
    return done.returncode, done.stdout.strip(), done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--cap-mb", type=int, default=600)
    parser.add_argument("--above-libraries", action="store_true", help="count the cap from what the libraries hold")
    parser.add_argument("--child", choices=("stream", "whole"))
    parser.add_argument("--path", type=Path)
    given = smoke.parse(parser, lambda _: ["--layers", 24, "--hidden", 256, "--cap-mb", 100, "--above-libraries"])
    if given.child:
        child(given.path, given.child == "stream", given.cap_mb << 20, given.above_libraries)
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        total = make(path, given.layers, given.hidden)
        layer = total / (given.layers + 0.5) * 2 / 1e6
        print(f"checkpoint {total / 1e6:.0f} MB in bf16, {2 * total / 1e6:.0f} MB in float32, one layer {layer:.0f} MB")
        code, out, error = run(path, "stream", given.cap_mb, given.above_libraries)
        print(f"streamed under a cap of {given.cap_mb} MB: exit {code} {out} {error[:110]}")
        whole, out, error = run(path, "whole", given.cap_mb, given.above_libraries)
        print(f"whole under the same cap: exit {whole} {out} {error[:110]}")
        free, out, _ = run(path, "stream", 0)
        print(f"streamed without a cap: exit {free} {out}")
    if code or not whole or free:
        sys.exit("the stream should have fitted under the cap, and the whole model not")


if __name__ == "__main__":
    main()
