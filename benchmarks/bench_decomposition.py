#!/usr/bin/env python3
"""Seconds and error of each method against plain torch, all in one run, medians.

    python benchmarks/bench_decomposition.py [--device cpu|cuda|mps] [--shapes 4096x4096,...] [--repeat 3] [--rank 83]
                                          [--methods ...] [--no-plain] [--json FILE]

On a GPU, as it stands:  python benchmarks/bench_decomposition.py --device cuda --shapes 14336x4096 --rank 83

For each shape a bf16 matrix of noise with power-law spikes, resident on the device. "values": singular values, against
torch.linalg.svdvals; "truncation" to --rank (or a quarter of p), against torch.linalg.svd and the product
U_r diag(s_r) V_r^T cast back to bf16. The ladder is left out: a row is one method in one precision, and a method that
fails says so. The clock stops when the device is idle. The projector finds the values itself, as in a reduction.

Errors are against float64 on the host. Of values: the largest one relative to the value itself, among those over a
hundredth of s_1 (below, a Gram matrix in float32 has lost them). Of a truncation: ||W_r - exact W_r||_F / ||W||_F, with
the rounding to bf16. On CUDA "gram float32" has bf16 operands multiplied on tensor cores where p is 1024 and more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import smoke
import torch

from laser.spectral.devices import Device, choose_device, full_precision, host_threads, synchronise
from laser.spectral.factorise import METHODS
from laser.spectral.gram import factors_by_gram, values_by_gram
from laser.spectral.measuring import chip
from laser.spectral.projector import factors_by_projector
from laser.spectral.shrinkage import Gains

SHAPES = "4096x4096,14336x4096,1024x4096,1536x576"
Ways = dict[str, Callable[[], object]]


def spiked(m: int, n: int, device: torch.device) -> torch.Tensor:
    """Noise of deviation 0.02 and p/4 spikes whose strength falls as a power law from 15 edges."""
    generator = torch.Generator().manual_seed(0)
    k = min(m, n) // 4
    strength = 15 * 0.02 * (m**0.5 + n**0.5) * torch.arange(1, k + 1) ** -0.7
    left = torch.randn(m, k, generator=generator) / m**0.5 * strength
    signal = left @ (torch.randn(k, n, generator=generator) / n**0.5)
    return (0.02 * torch.randn(m, n, generator=generator) + signal).to(torch.bfloat16).to(device)


def plain_cut(W: torch.Tensor, dtype: torch.dtype, rank: int) -> torch.Tensor:
    U, s, Vh = torch.linalg.svd(W.to(dtype), full_matrices=False)
    return ((U[:, :rank] * s[:rank]) @ Vh[:rank]).to(W.dtype)


def ways_of(W: torch.Tensor, rank: int, devices: list[Device], methods: list[str], plain: bool) -> dict[str, Ways]:
    """What is compared, ours first, for values and for a truncation."""
    values: Ways = {}
    cuts: Ways = {}
    for device in devices:
        precision = str(device.dtype).removeprefix("torch.")
        if "gram" in methods:
            values[f"gram {precision}"] = lambda d=device: values_by_gram(W, d)
            cuts[f"gram {precision}"] = lambda d=device: factors_by_gram(W, d).cut(Gains(rank)).matrix
        if "projector" in methods:
            cuts[f"projector {precision}"] = lambda d=device: factors_by_projector(W, d).cut(Gains(rank)).matrix
    if plain and not (devices[0].host_eigensolver and not devices[0].host_blas):  # torch has no svdvals on Apple MPS
        for device in devices:
            precision, dtype = str(device.dtype).removeprefix("torch."), device.dtype
            values[f"torch {precision}"] = lambda dtype=dtype: torch.linalg.svdvals(W.to(dtype)).cpu().double().numpy()
            cuts[f"torch {precision}"] = lambda dtype=dtype: plain_cut(W, dtype, rank)
    return {"values": values, "truncation": cuts}


def seconds(call: Callable[[], object], device: Device) -> tuple[float, object]:
    synchronise(device)
    start = time.perf_counter()
    result = call()
    synchronise(device)
    return time.perf_counter() - start, result


def value_error(found: np.ndarray, truth: np.ndarray) -> float:
    over = truth > 0.01 * truth[0]
    return float(np.max(np.abs(found[over] - truth[over]) / truth[over]))


def cut_error(found: torch.Tensor, truth: torch.Tensor, norm: float) -> float:
    return float(torch.linalg.vector_norm(found.cpu().double() - truth)) / norm


def measure(shape: str, rank: int, devices: list[Device], methods: list[str], repeat: int, plain: bool) -> list[dict]:
    m, n = map(int, shape.split("x"))
    W = spiked(m, n, devices[0].torch_device)
    rank = rank or min(m, n) // 4
    exact = W.cpu().double()
    U, s, Vh = torch.linalg.svd(exact, full_matrices=False)
    truth, best, norm = s.numpy(), (U[:, :rank] * s[:rank]) @ Vh[:rank], float(torch.linalg.vector_norm(exact))
    del U, Vh, exact
    rows = []
    for what, ways in ways_of(W, rank, devices, methods, plain).items():
        taken: dict[str, list[float]] = {}
        failed: dict[str, str] = {}
        errors: dict[str, float] = {}
        for turn in range(repeat + 1):  # in turn, so that a busy machine is busy for all; the first one is not counted
            for name, way in ways.items():
                if name in failed:
                    continue
                try:
                    alone = devices[0].host_blas and not name.startswith("torch")  # as the ladder runs ours
                    with full_precision(), host_threads(min(m, n)) if alone else nullcontext():
                        spent, result = seconds(way, devices[0])
                except Exception as error:  # a benchmark goes on
                    failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
                    continue
                if turn:
                    taken.setdefault(name, []).append(spent)
                elif isinstance(result, torch.Tensor):
                    errors[name] = cut_error(result, best, norm)
                elif isinstance(result, np.ndarray):
                    errors[name] = value_error(result, truth)
                del result
        plain_one = statistics.median(taken["torch float32"]) if taken.get("torch float32") else None
        for name in ways:
            row = {"shape": shape, "rank": rank, "what": what, "way": name, "failed": failed.get(name)}
            if name in taken:
                row |= {"seconds": statistics.median(taken[name]), "error": errors.get(name)}
                row |= {"ratio": plain_one / row["seconds"] if plain_one else None}
            rows.append(row)
            print(line(row), flush=True)
    return rows


def line(row: dict) -> str:
    told = f"{row['shape']:>12} {row['what']:>10}  {row['way']:<20}"
    if row["failed"]:
        return f"{told} failed: {row['failed']}"
    ratio = f"{row['ratio']:6.2f}" if row["ratio"] else "     -"
    return f"{told} {row['seconds']:9.4f} {ratio}  {row['error']:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rank", type=int, default=0, help="0: a quarter of p")
    parser.add_argument("--methods", default=",".join(m for m in METHODS if m != "svd"))
    parser.add_argument("--no-plain", action="store_true", help="without torch's own SVD, which takes longest")
    parser.add_argument("--json", type=Path)
    arguments = smoke.parse(parser, lambda _: ["--shapes", "64x48,48x64", "--repeat", 1, "--device", "cpu"])
    first = choose_device(arguments.device)
    precisions = (torch.float64, torch.float32) if first.has_float64 else (torch.float32,)
    devices = [replace(first, dtype=dtype) for dtype in precisions]
    head = {"torch": torch.__version__, "device": first.label, "chip": chip(first), "threads": torch.get_num_threads()}
    print(f"{', '.join(f'{k} {v}' for k, v in head.items())}; medians of {arguments.repeat}; ratio to torch float32")
    print(f"{'shape':>12} {'what':>10}  {'way':<20} {'seconds':>9} {'ratio':>6}  error")
    rows = []
    for shape in arguments.shapes.split(","):
        rows += measure(
            shape, arguments.rank, devices, arguments.methods.split(","), arguments.repeat, not arguments.no_plain
        )
    if arguments.smoke:  # the truncation is rounded to bf16
        assert len(rows) >= 8 and all(row["error"] < 5e-3 for row in rows), rows
    if arguments.json:
        arguments.json.write_text(json.dumps({"head": head, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
