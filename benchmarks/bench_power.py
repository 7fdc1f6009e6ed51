"""Power tables: planted spikes, growing signal, rows of unequal variance. Prints Markdown for docs/log.

    python benchmarks/bench_power.py [--draws 20]

A spike "at 1.2 times the edge" is planted so that its singular value shows there: a signal of size x shows as y with
y^2 = (x + 1/x)(x + beta/x) in units of sigma * sqrt(q). Rank errors are means of (kept - planted).
"""

from __future__ import annotations

import argparse

import numpy as np
import smoke
from numpy.typing import NDArray

from laser.spectral.noise import ESTIMATORS, estimate_noise
from laser.spectral.rules import apply_rule

SHAPES, UNEQUAL = ((256, 256), (256, 896)), ((256, 896), (896, 256), (256, 256))
SHARES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.25)  # of the p values that are signal
LEVELS = (1.1, 1.2, 1.5, 3.0)  # times the edge
RULES = ("laser-rmt", "mp-edge", "mp-median", "mp-iqr", "tracy-widom:0.05", "gavish-donoho", "bema")
Array = NDArray[np.float64]


def singular_values(W: Array) -> Array:
    return np.asarray(np.linalg.svd(W, compute_uv=False), dtype=np.float64)


def planted(shape: tuple[int, int], count: int, level: float, random: np.random.Generator) -> Array:
    """Singular values (p,) of unit noise plus `count` spikes that show at `level` times the edge."""
    p, q = shape
    beta = p / q
    b = (level * (1 + beta**0.5)) ** 2 - beta - 1
    size = ((b + (b * b - 4 * beta) ** 0.5) / 2 * q) ** 0.5
    left, _ = np.linalg.qr(random.standard_normal((p, max(count, 1))))
    right, _ = np.linalg.qr(random.standard_normal((q, max(count, 1))))
    signal = size * left[:, :count] @ right[:, :count].T
    return singular_values(signal + random.standard_normal((p, q)))


def power(draws: int, shapes: tuple[tuple[int, int], ...] = SHAPES) -> dict[str, float]:
    print(f"\n### sigma error in % / rank error of its own edge, by estimator ({draws} draws)\n")
    print(f"| shape | signal | at | {' | '.join(ESTIMATORS)} |")
    print("|---" * (3 + len(ESTIMATORS)) + "|")
    ranks: list[str] = []
    strong: dict[str, float] = {}  # largest error of a rank where the signal shows at three times the edge
    for shape in shapes:
        for share in SHARES:
            for level in LEVELS if share else LEVELS[:1]:
                random, count = np.random.default_rng(0), int(share * shape[0])
                spectra = [planted(shape, count, level, random) for _ in range(draws)]
                cells = []
                for name in ESTIMATORS:
                    found = [estimate_noise(s, shape, name) for s in spectra]
                    error = 100 * np.mean([n.sigma - 1 for n in found])
                    over = [np.count_nonzero(s > n.upper_edge(shape)) for s, n in zip(spectra, found, strict=True)]
                    cells.append(f"{error:+.1f} / {np.mean(over) - count:+.1f}")
                where = f"| {shape[0]}x{shape[1]} | {count} | {level if share else '-'} |"
                print(f"{where} {' | '.join(cells)} |", flush=True)
                errors = [np.mean([apply_rule(rule, s, shape).rank for s in spectra]) - count for rule in RULES]
                if level == max(LEVELS) and share in SHARES[1:3]:
                    found = zip(RULES, errors, strict=True)
                    strong |= {rule: max(abs(float(e)), strong.get(rule, 0.0)) for rule, e in found}
                ranks.append(f"{where} {' | '.join(f'{e:+.1f}' for e in errors)} |")
    print(f"\n### rank error by rule ({draws} draws)\n")
    print(f"| shape | signal | at | {' | '.join(RULES)} |")
    print("|---" * (3 + len(RULES)) + "|")
    print("\n".join(ranks))
    return strong


def unequal_rows(draws: int, shapes: tuple[tuple[int, int], ...] = UNEQUAL) -> None:
    """Row variances spread over a factor: log-uniform, mean 1; five spikes at twice the edge of the uneven noise."""
    rules = ("mp-median", "mp-edge", "bema")
    print(f"\n### rows of unequal variance, rank error: mean / worst ({draws} draws; 5 spikes, or none)\n")
    print(f"| shape | variances from 1 to | spikes | {' | '.join(rules)} |")
    print("|---" * (3 + len(rules)) + "|")
    for shape in shapes:
        for factor in (1, 3, 10):
            for count in (0, 5):
                errors: dict[str, list[int]] = {rule: [] for rule in rules}
                for seed in range(draws):
                    random = np.random.default_rng(seed)
                    tau = factor ** random.random(shape[0])
                    W = (tau / tau.mean())[:, None] ** 0.5 * random.standard_normal(shape)
                    top = np.linalg.norm(W, 2)
                    left, _ = np.linalg.qr(random.standard_normal((shape[0], 5)))
                    right, _ = np.linalg.qr(random.standard_normal((shape[1], 5)))
                    W += 2 * top * left[:, :count] @ right[:, :count].T
                    s = singular_values(W)
                    for rule in rules:
                        errors[rule].append(apply_rule(rule, s, shape).rank - count)
                cells = [f"{np.mean(e):+.1f} / {max(e, key=abs):+d}" for e in errors.values()]
                print(f"| {shape[0]}x{shape[1]} | {factor} | {count} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=20)
    asked = smoke.parse(parser, lambda _: ["--draws", 2])
    if asked.smoke:
        strong = power(asked.draws, ((64, 64), (64, 224)))
        assert max(strong[rule] for rule in ("mp-edge", "mp-median", "tracy-widom:0.05")) <= 3, strong
        return unequal_rows(asked.draws, ((64, 224), (64, 64)))
    power(asked.draws)
    unequal_rows(asked.draws)


if __name__ == "__main__":
    main()
