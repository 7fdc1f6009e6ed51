#!/usr/bin/env python3
"""Seconds and error of each method against plain torch in the same precision, all in one run, medians.

    python benchmarks/bench_decomposition.py [--device cpu|cuda|mps] [--shapes 4096x4096,...] [--repeat 3] [--rank 83]
                                          [--precisions float64,float32] [--workers 1,2] [--methods ...] [--no-plain]
                                          [--json FILE]

On a GPU, as it stands:  python benchmarks/bench_decomposition.py --device cuda --shapes 14336x4096 --rank 83
On two cores, under six minutes each:
    python benchmarks/bench_decomposition.py --methods gram --shapes 14336x4096 --precisions float64 --repeat 1
    python benchmarks/bench_decomposition.py --methods gram --shapes 14336x4096 --precisions float32 --repeat 1
    python benchmarks/bench_decomposition.py --methods gram --shapes 4096x4096 --repeat 1

For each shape a bf16 matrix of noise with power-law spikes, resident on the device. "values": singular values, against
torch.linalg.svdvals; "truncation" to --rank (or a quarter of p), against torch.linalg.svd and the product
U_r diag(s_r) V_r^T cast back to bf16. The ladder is left out: a row is one method in one precision, and a method that
fails says so. The clock stops when the device is idle. The projector finds the values itself, as in a reduction.

On the host, w workers are w matrices at once with one thread each, as laser's are, and for torch one matrix with w
threads. Seconds are those of the clock for one matrix. CPU seconds, of all threads for one matrix, are what to compare
where others use the machine. A ratio is how many times as long torch takes in the same precision, with as many workers;
"gain" is how much faster a matrix is than with one worker.

Errors are against float64 on the host. Of values: the largest one relative to the value itself, among those over a
hundredth of s_1 (below, a Gram matrix in float32 has lost them). Of a truncation: ||W_r - exact W_r||_F / ||W||_F, with
the rounding to bf16. On CUDA "gram float32" has bf16 operands multiplied on tensor cores where p is 1024 and more.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import smoke
import torch

from laser.engine.crew import quiet
from laser.spectral.devices import Device, choose_device, full_precision, synchronise
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


@dataclass(frozen=True)
class Spent:
    """On one matrix: seconds of the clock, and of all threads together."""

    seconds: float
    cpu: float


def spend(way: Callable[[], object], device: Device, workers: int, ours: bool) -> tuple[Spent, object]:
    """Time `way`: ours by so many workers at once, with a thread each; torch's once, with so many threads."""
    host = device.host_blas
    times = workers if ours and host else 1

    def work(_: int) -> object:
        if host:
            torch.set_num_threads(1 if ours else workers)  # OpenMP keeps it per thread
        return way()

    with full_precision(), quiet(device) if ours and host else nullcontext(), ThreadPoolExecutor(times) as pool:
        synchronise(device)
        start, cpu = time.perf_counter(), time.process_time()
        result = next(iter(list(pool.map(work, range(times))))) if host else way()
        synchronise(device)
        return Spent((time.perf_counter() - start) / times, (time.process_time() - cpu) / times), result


def value_error(found: np.ndarray, truth: np.ndarray) -> float:
    over = truth > 0.01 * truth[0]
    return float(np.max(np.abs(found[over] - truth[over]) / truth[over]))


def cut_error(found: torch.Tensor, truth: torch.Tensor, norm: float) -> float:
    return float(torch.linalg.vector_norm(found.cpu().double() - truth)) / norm


def measure(shape: str, devices: list[Device], workers: list[int], arguments: argparse.Namespace) -> list[dict]:
    m, n = map(int, shape.split("x"))
    W = spiked(m, n, devices[0].torch_device)
    rank = arguments.rank or min(m, n) // 4
    exact = W.cpu().double()
    U, s, Vh = torch.linalg.svd(exact, full_matrices=False)
    truth, best, norm = s.numpy(), (U[:, :rank] * s[:rank]) @ Vh[:rank], float(torch.linalg.vector_norm(exact))
    del U, Vh, exact
    rows = []
    for what, ways in ways_of(W, rank, devices, arguments.methods.split(","), not arguments.no_plain).items():
        taken: dict[tuple[str, int], list[Spent]] = {}
        failed: dict[str, str] = {}
        errors: dict[str, float] = {}
        # In turn, so that a busy machine is busy for all; of several turns the first one is not counted.
        turns = [
            (turn, w, name)
            for turn in range(arguments.repeat + (arguments.repeat > 1))
            for w in workers
            for name in ways
        ]
        for turn, w, name in turns:
            if name in failed:
                continue
            try:
                spent, result = spend(ways[name], devices[0], w, not name.startswith("torch"))
            except Exception as error:  # a benchmark goes on
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
                continue
            if turn or arguments.repeat == 1:
                taken.setdefault((name, w), []).append(spent)
            if name not in errors and isinstance(result, torch.Tensor):
                errors[name] = cut_error(result, best, norm)
            elif name not in errors and isinstance(result, np.ndarray):
                errors[name] = value_error(result, truth)
            del result
        rows += rows_of(shape, what, taken, failed, errors)
    return rows


def rows_of(
    shape: str,
    what: str,
    taken: dict[tuple[str, int], list[Spent]],
    failed: dict[str, str],
    errors: dict[str, float],
) -> list[dict]:
    """A row for each way and number of workers, and printed."""
    rows: list[dict[str, Any]] = [
        {"shape": shape, "what": what, "way": name, "failed": why} for name, why in failed.items()
    ]
    median = {
        key: Spent(*(statistics.median(x) for x in zip(*map(astuple, spent), strict=True)))
        for key, spent in taken.items()
    }
    for (name, w), spent in median.items():
        if name in failed:
            continue
        plain, one = median.get((f"torch {name.split()[-1]}", w)), median.get((name, 1))
        row = {
            "shape": shape,
            "what": what,
            "way": name,
            "failed": "",
            "workers": w,
            "error": errors.get(name, math.nan),
        }
        row |= {"seconds": spent.seconds, "cpu": spent.cpu}
        row |= {"ratio": plain and plain.seconds / spent.seconds, "cpu_ratio": plain and plain.cpu / spent.cpu}
        rows.append(row | {"gain": one and w > 1 and one.seconds / spent.seconds})
    for row in rows:
        print(line(row), flush=True)
    return rows


def line(row: dict) -> str:
    told = f"{row['shape']:>12} {row['what']:>10}  {row['way']:<20}"
    if row["failed"]:
        return f"{told} failed: {row['failed']}"
    ratio, cpu, gain = (f"{row[key]:6.2f}" if row[key] else "     -" for key in ("ratio", "cpu_ratio", "gain"))
    return (
        f"{told} {row['workers']:7d} {row['seconds']:9.4f} {ratio} {row['cpu']:9.4f} {cpu} {gain}  {row['error']:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rank", type=int, default=0, help="0: a quarter of p")
    parser.add_argument("--precisions", default="float64,float32")
    parser.add_argument("--workers", default="1,2", help="on the host")
    parser.add_argument("--methods", default=",".join(m for m in METHODS if m != "svd"))
    parser.add_argument("--no-plain", action="store_true", help="without torch's own SVD, which takes longest")
    parser.add_argument("--json", type=Path)
    arguments = smoke.parse(parser, lambda _: ["--shapes", "64x48,48x64", "--repeat", 1, "--device", "cpu"])
    first = choose_device(arguments.device)
    asked = [getattr(torch, name) for name in arguments.precisions.split(",")]
    devices = [replace(first, dtype=dtype) for dtype in asked if first.has_float64 or dtype == torch.float32]
    workers = [int(w) for w in arguments.workers.split(",")] if first.host_blas else [1]
    head = {"torch": torch.__version__, "device": first.label, "chip": chip(first), "threads": torch.get_num_threads()}
    print(f"{', '.join(f'{k} {v}' for k, v in head.items())}; medians of {arguments.repeat}; ratio to torch")
    columns = f"{'workers':>7} {'seconds':>9} {'ratio':>6} {'CPU s':>9} {'ratio':>6} {'gain':>6}  error"
    print(f"{'shape':>12} {'what':>10}  {'way':<20} {columns}")
    rows = []
    for shape in arguments.shapes.split(","):
        rows += measure(shape, devices, workers, arguments)
    if arguments.smoke:  # the truncation is rounded to bf16
        assert len(rows) >= 16 and all(row["error"] < 5e-3 for row in rows), rows
    if arguments.json:
        arguments.json.write_text(json.dumps({"head": head, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
