#!/usr/bin/env python3
"""The projector against eigenvectors: which gaps it resolves, in how many products, how well; and what it refuses.

    python benchmarks/bench_projector.py [--device cpu] [--precision float32] [--sides 256,512,1024,2048] [--draws 1000]

First table: a bulk of noise, plain, with 16 spikes, or with heavy tails, of shape 2 p x p, and a pair of values planted
around rank p/3 at relative gap g = (s_r - s_{r+1}) / s_r. delta is the half gap of their squares over ||G - tau^2||,
"x" the two values of the sign that should be +1 and -1, "error" ||W_P - W_r||_F / ||W||_F against W_r from the exact
factors. "refused": the gap is under what the dtype can tell apart, so that the ladder goes on to eigenvectors.

Second table: draws with an eigenvalue planted within 1 % of the finest gap of the threshold itself (the sign alone must
notice), and draws with a pair that is closer than that (the truncation must go on to eigenvectors and be right).
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
import smoke
import torch

from laser.errors import NumericalError
from laser.spectral.devices import Device, choose_device, full_precision, synchronise
from laser.spectral.factorise import truncate
from laser.spectral.gram import gram
from laser.spectral.projector import UNRESOLVED, finest, matrix_sign, resolved_sign

SPECTRA = ("noise", "spikes 5", "spikes 20", "heavy")


def spectrum(kind: str, p: int, random: np.random.Generator) -> np.ndarray:
    """(p,) singular values, falling."""
    s = np.linalg.svd(random.standard_normal((2 * p, p)), compute_uv=False)
    if kind.startswith("spikes"):
        s[:16] *= np.linspace(float(kind.split()[1]), 2, 16)
    elif kind == "heavy":
        s *= 1 + random.pareto(1.5, p)
        s *= 3 * np.median(s) / max(3 * np.median(s), s.max() / 30)  # at most 90 medians
    return np.sort(s)[::-1].copy()


def orthonormal(rows: int, columns: int, random: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(random.standard_normal((rows, columns)))[0]


def row(kind: str, p: int, g: float, U: np.ndarray, V: np.ndarray, s: np.ndarray, device: Device) -> tuple[str, float]:
    """One line of the first table, and its error; 0 where the sign is refused."""
    s, r = s.copy(), p // 3
    middle = (s[r - 1] + s[r]) / 2
    s[:r], s[r:] = np.maximum(s[:r], middle * (1 + g / 2)), np.minimum(s[r:], middle * (1 - g / 2))
    s[r - 1], s[r] = middle * (1 + g / 2), middle * (1 - g / 2)
    tau = math.sqrt((s[r - 1] ** 2 + s[r] ** 2) / 2)
    delta = (s[r - 1] ** 2 - s[r] ** 2) / 2 / max(s[0] ** 2 - tau**2, tau**2)
    W = torch.from_numpy((U * s) @ V.T).to(device.dtype)
    told = f"| {p} | {kind} | {s[0] / tau:.0f} | {g:.0e} | {delta:.0e} |"
    with full_precision():
        G = gram(W, device)
        synchronise(device)
        start = time.perf_counter()
        try:
            sign = resolved_sign(G, s, r)
        except NumericalError as error:
            return f"{told} - | - | - | refused: {str(error).split(':')[0]} | - |", 0.0
        synchronise(device)
        seconds = time.perf_counter() - start
    X = sign.X.cpu().double().numpy()
    x = [float(V[:, i] @ X @ V[:, i]) for i in (r - 1, r)]
    full = W.double().numpy()
    error = np.linalg.norm((full + full @ X) / 2 - (U[:, :r] * s[:r]) @ V[:, :r].T) / np.linalg.norm(full)
    line = f"{told} {sign.products} | {x[0]:+.3f} {x[1]:+.3f} | {sign.unresolved:.0e} | {error:.0e} | {seconds:.2f} |"
    return line, float(error)


def on_the_threshold(draw: int, device: Device) -> bool:
    """Whether the sign of a Gram matrix with an eigenvalue on tau^2 is seen to be unresolved."""
    random = np.random.default_rng(draw)
    p, heavy = (24, 48, 64)[draw % 3], draw % 2
    s = np.sort(random.pareto(1.5, p) + 0.2 if heavy else np.abs(random.standard_normal(p)) + 0.2)[::-1]
    r = int(random.integers(p // 4, 3 * p // 4))
    tau = float((s[r] + s[r - 1]) / 2)
    values, threshold = s.astype(np.longdouble) ** 2, np.longdouble(tau * tau)
    offset = 0.01 * finest(p, device.dtype) * random.uniform(-1, 1)
    values[r] = threshold + offset * np.abs(values - threshold).max()
    G = np.diag(values)
    for _ in range(3):  # reflections in long doubles: in float64 the planted value would be moved by rounding
        v = random.standard_normal(p).astype(np.longdouble)
        v /= np.sqrt(v @ v)
        G -= 2 * np.outer(v, v @ G)
        G -= 2 * np.outer(G @ v, v)
    sign = matrix_sign(torch.from_numpy(G.astype(np.float64)).to(device.dtype).to(device.torch_device), tau)
    return abs(sign.unresolved) > UNRESOLVED


def too_close(draw: int, device: Device) -> bool:
    """Whether a truncation between two values that cannot be told apart is made, rightly, by eigenvectors."""
    random = np.random.default_rng(draw)
    p = (24, 48, 64)[draw % 3]
    s = np.sort(random.pareto(1.5, p) + 0.2 if draw % 2 else np.abs(random.standard_normal(p)) + 0.2)[::-1].copy()
    r = int(random.integers(p // 4, 3 * p // 4))
    s[r] = s[r - 1] * (1 - random.choice([0.0, 1e-12, 1e-9]) * 2.0 ** -(29 ** float(device.dtype == torch.float64)))
    W = torch.from_numpy((orthonormal(2 * p, p, random) * s) @ orthonormal(p, p, random).T)
    found = truncate(W.to(device.dtype), r, device, "projector", s)
    distance = float(torch.linalg.vector_norm(W - found.matrix.double()))
    right = abs(distance - np.linalg.norm(s[r:])) < 1e-4 * np.linalg.norm(s)
    return bool(right) and found.certificate.method != "projector" and "unresolved" in found.certificate.note


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--sides", default="256,512,1024,2048")
    parser.add_argument("--spectra", default=",".join(SPECTRA))
    parser.add_argument("--draws", type=int, default=1000)
    arguments = smoke.parse(parser, lambda _: ["--sides", 64, "--spectra", "noise,heavy", "--draws", 6])
    device = choose_device(arguments.device, arguments.precision)
    print(f"torch {torch.__version__}, {device.label}, {torch.get_num_threads()} threads\n")
    print("| p | spectrum | s_1/tau | g | delta | products | x | p - norm^2 | error | s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for p in map(int, arguments.sides.split(",")):
        random = np.random.default_rng(p)
        U, V = orthonormal(2 * p, p, random), orthonormal(p, p, random)
        for kind in arguments.spectra.split(","):
            s = spectrum(kind, p, random)
            for g in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6) if p < 2048 else (1e-3, 1e-5):
                line, error = row(kind, p, g, U, V, s, device)
                print(line, flush=True)
                if arguments.smoke:
                    # A gap g leaves an error of about eps / g, whose digits are the machine's.
                    assert error < max(1e-4, torch.finfo(device.dtype).eps / g / 10) and (error or g < 1e-3), line
    print(f"\n| planted, of {arguments.draws} draws | seen |\n|---|---|")
    for what, seen in (("a value on the threshold", on_the_threshold), ("a pair too close to part", too_close)):
        count = sum(seen(draw, device) for draw in range(arguments.draws))
        print(f"| {what} | {count} |", flush=True)
        assert not arguments.smoke or count == arguments.draws, what


if __name__ == "__main__":
    main()
