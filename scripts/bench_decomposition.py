#!/usr/bin/env python3
"""Seconds and error of each method against plain torch, both ways in one run, medians.

    python scripts/bench_decomposition.py [--shapes 4096x4096,...] [--device cpu] [--repeat 3] [--rank-share 0.25]

For each shape a bf16 matrix of noise with power-law spikes. "values" compares singular_values() with
torch.linalg.svdvals, "truncation" compares truncate() with torch.linalg.svd and the product U_r diag(s_r) V_r^T cast
back to bf16. torch computes in the same precision as ours (float64 on the host) and, as a second row, in float32. The
error is the largest one of a singular value against torch.linalg.svdvals in float64 on the host, relative to the
median singular value (relative to itself it would be that of the smallest, which in a square matrix is almost 0).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from laser.spectral.decomposition import singular_values, truncate
from laser.spectral.devices import choose_device

SHAPES = "4096x4096,14336x4096,1024x4096,1536x576"


def spiked(m: int, n: int, device: torch.device) -> torch.Tensor:
    """Noise of deviation 0.02 and p/4 spikes whose strength falls as a power law from 15 edges."""
    generator = torch.Generator().manual_seed(0)
    k = min(m, n) // 4
    strength = 15 * 0.02 * (m**0.5 + n**0.5) * torch.arange(1, k + 1) ** -0.7
    left = torch.randn(m, k, generator=generator) / m**0.5 * strength
    signal = left @ (torch.randn(k, n, generator=generator) / n**0.5)
    return (0.02 * torch.randn(m, n, generator=generator) + signal).to(torch.bfloat16).to(device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rank-share", type=float, default=0.25)
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    where = device.torch_device
    print(
        f"torch {torch.__version__}, {device.label}, {torch.get_num_threads()} threads; medians of {arguments.repeat}"
    )
    print(f"{'shape':>12} {'what':>10} {'ours s':>8}  {'torch s':>8} {'ratio':>6}  {'f32 s':>8} {'ratio':>6}  error")
    for shape in arguments.shapes.split(","):
        m, n = map(int, shape.split("x"))
        W, rank = spiked(m, n, where), int(min(m, n) * arguments.rank_share)

        def plain(dtype: torch.dtype, W: torch.Tensor = W, rank: int = rank) -> torch.Tensor:
            U, s, Vh = torch.linalg.svd(W.to(dtype), full_matrices=False)
            return ((U[:, :rank] * s[:rank]) @ Vh[:rank]).to(W.dtype)

        calls: dict[str, list[Callable[[], object]]] = {
            "values": [
                lambda W=W: singular_values(W, device),
                lambda W=W: torch.linalg.svdvals(W.to(device.dtype)),
                lambda W=W: torch.linalg.svdvals(W.float()),
            ],
            "truncation": [
                lambda W=W, rank=rank: truncate(W, rank, device),
                lambda: plain(device.dtype),
                lambda: plain(torch.float32),
            ],
        }
        truth = torch.linalg.svdvals(W.cpu().double()).numpy()
        error = float(np.max(np.abs(singular_values(W, device)[0] - truth)) / np.median(truth))
        for what, ways in calls.items():
            times: list[list[float]] = [[], [], []]
            for _ in range(arguments.repeat):  # in turn, so that a busy machine is busy for all three
                for way, taken in zip(ways, times, strict=True):
                    taken.append(seconds(way, where))
            ours, same, single = (statistics.median(t) for t in times)
            shown = f"{error:.1e}" if what == "values" else ""
            print(
                f"{shape:>12} {what:>10} {ours:8.3f}  {same:8.3f} {same / ours:6.2f}  {single:8.3f} "
                f"{single / ours:6.2f}  {shown}",
                flush=True,
            )


if __name__ == "__main__":
    main()
