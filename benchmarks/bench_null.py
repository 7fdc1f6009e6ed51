"""The null table: what each rule keeps of pure noise, by shape and law of the entries. Prints Markdown for docs/log.

    python benchmarks/bench_null.py [--draws 200] [--large-draws 5] [--only gaussian] [--shapes 4096x4096,8x4096]

Gaussian matrices are drawn in bidiagonal form (noise.py), which has exactly their law of singular values; all others
are drawn whole. Every cell: mean / largest number of values kept, over all draws. `flagged`: share of the draws that a
plan flags: the bulk fits at a level under 0.01, or the tails of the entries move the edge. With --only gaussian even
the large shapes cost a second a draw.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import smoke
import torch

from laser.spectral.devices import Device, choose_device
from laser.spectral.factorise import singular_values
from laser.spectral.noise import fit_noise, gaussian_spectrum
from laser.spectral.rules import apply_rule
from laser.spectral.spectrum import HEAVY, edge_shift, excess_kurtosis

SHAPES = ((4096, 4096), (14336, 4096), (1024, 4096), (1536, 576), (576, 192), (8, 4096))
RULES = ("laser-rmt", "mp-edge", "mp-median", "mp-iqr", "tracy-widom:0.05", "gavish-donoho", "bema")
EDGES = ("mp-edge", "tracy-widom:0.05", "bema")  # what keeps at most 2 of any noise
LARGE = 1000  # a p above this gets the few draws
Draw = Callable[[tuple[int, int], np.random.Generator], torch.Tensor]


def laplace(shape: tuple[int, int], random: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(random.laplace(size=shape).astype(np.float32))


def student(shape: tuple[int, int], random: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(random.standard_t(5, size=shape).astype(np.float32))


def rounded(shape: tuple[int, int], random: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(0.02 * random.standard_normal(shape, dtype=np.float32)).to(torch.bfloat16)


ENTRIES: dict[str, Draw | None] = {
    "gaussian": None,
    "laplace": laplace,
    "student-t(5)": student,
    "bf16 gaussian": rounded,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--large-draws", type=int, default=5)
    parser.add_argument("--only", choices=list(ENTRIES), default=None)
    parser.add_argument("--shapes", default=",".join(f"{m}x{n}" for m, n in SHAPES))
    chosen = smoke.parse(parser, lambda _: ["--draws", 4, "--shapes", "64x48,48x64"])
    device = choose_device()
    print(f"| shape | entries | draws | {' | '.join(RULES)} | TW finds | flagged | seconds |")
    print("|---" * (len(RULES) + 6) + "|")
    for m, n in (text.split("x") for text in chosen.shapes.split(",")):
        shape = (int(m), int(n))
        for name, draw in ENTRIES.items():
            if chosen.only in (None, name):
                count = chosen.large_draws if min(shape) > LARGE else chosen.draws
                line, kept = row(shape, name, draw, count, device)
                print(line, flush=True)
                if chosen.smoke:  # LaserRMT's own rule takes noise for signal: that is what the table shows
                    assert max(max(ranks) for rule, ranks in kept.items() if rule in EDGES) <= 2, kept
                    assert len(kept["laser-rmt"]) == count and min(kept["laser-rmt"]) > 2, kept


def row(
    shape: tuple[int, int], name: str, draw: Draw | None, count: int, device: Device
) -> tuple[str, dict[str, list[int]]]:
    random, start = np.random.default_rng(0), time.perf_counter()
    kept: dict[str, list[int]] = {rule: [] for rule in RULES}
    flagged = 0
    for _ in range(count):
        if draw is None:
            s, heavy = gaussian_spectrum(min(shape), max(shape), random), False
        else:
            W = draw(shape, random)
            s, _ = singular_values(W, device)
            heavy = edge_shift(excess_kurtosis(W), shape) > HEAVY
        for rule in RULES:
            kept[rule].append(apply_rule(rule, s, shape).rank)
        flagged += heavy or fit_noise(s, shape).level < 0.01
    cells = [f"{np.mean(ranks):.3g} / {max(ranks)}" for ranks in kept.values()]
    finds = np.mean([rank > 0 for rank in kept["tracy-widom:0.05"]])
    seconds = time.perf_counter() - start
    size = f"{shape[0]}x{shape[1]}"
    line = f"| {size} | {name} | {count} | {' | '.join(cells)} | {finds:.1%} | {flagged / count:.1%} | {seconds:.0f} |"
    return line, kept


if __name__ == "__main__":
    main()
