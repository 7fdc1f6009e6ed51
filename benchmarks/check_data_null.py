"""The null in the data's metric on real inputs: how often noise is taken for signal, and its spectrum against the law.

    python benchmarks/check_data_null.py MODEL --text FILE [--windows 32] [--window 256] [--roles k,down]
        [--layers 2,28] [--draws 200] [--level-of k_proj] [--directions 110]

Calibrates twice: once the whole C of every matrix's inputs, once as if they were too wide for that (as w2 of
Mixtral), known to the null by --directions of the first inputs and the diagonal of the rest (SKETCH in calibration.py).

Level: Gaussian weights of the shape of the first matrix whose name holds --level-of meet those inputs; the rule
parallel:0.05 must keep one value or more in about 5 % of the draws, with either null. Law: Kolmogorov-Smirnov distance
between Silverstein's equation and the spectrum of Gaussian weights, of the matrix with its entries permuted, and of the
matrix as it is; and how many of its values from the first on lie over the permuted matrix's of the same place.
Sketch: the null by those directions over that by the whole C.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import smoke
import torch

import laser
from laser import calibration
from laser.checkpoint.families import Matrix, read_matrix
from laser.evaluation.text import cut_windows, load_tokenizer, read_text
from laser.moments import Moments
from laser.selection import parse_layers, parse_roles
from laser.spectral.data_metric import Metric, data_values
from laser.spectral.data_null import null_in_metric
from laser.spectral.permutation import permuted
from laser.spectral.rules import apply_rule
from laser.spectral.silverstein import distance

CPU = laser.choose_device("cpu")
COLUMNS = ("matrix", "shape", "tokens", "C: s_1^2 / trace", "gaussian", "permuted", "as it is", "over", "sketch")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--roles", default="q,k,v,o,w1,w2,w3")
    parser.add_argument("--layers", default="2,8,15,22,28")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--level-of", default="k_proj")
    parser.add_argument("--directions", type=int, default=110)
    asked = smoke.parse(
        parser,
        lambda folder: [
            *(smoke.pico(folder), "--text", smoke.text(folder), "--windows", 2, "--window", 64, "--roles", "q,k"),
            *("--layers", 0, "--draws", 20, "--directions", 8),
        ],
    )
    checkpoint = laser.open_checkpoint(asked.model)
    selection = laser.Selection(parse_layers(asked.layers), parse_roles(asked.roles))
    text = cut_windows(read_text(asked.text), load_tokenizer(asked.model), length=asked.window, limit=asked.windows)
    with tempfile.TemporaryDirectory() as work:
        whole = calibration.calibrate(checkpoint, text, Path(work) / "whole.safetensors", selection)
        calibration.SKETCH = asked.directions
        wide = calibration.calibrate(checkpoint, text, Path(work) / "wide.safetensors", selection, full_side=0)
        matrices = [m for m in laser.list_matrices(checkpoint) if whole.tokens(m.name)]
        for matrix in [m for m in matrices if asked.level_of in m.name][:1]:
            shares = level(checkpoint, matrix, whole, wide, asked.draws)
            assert not asked.smoke or shares["whole"] <= 0.25, shares  # 5 % in the mean
        print(f"\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
        for matrix in matrices:
            print(f"| {' | '.join(row(checkpoint, matrix, whole, wide))} |", flush=True)


def level(checkpoint: laser.Checkpoint, matrix: Matrix, whole: Moments, wide: Moments, draws: int) -> dict[str, float]:
    """How often each null takes noise for signal."""
    stored = read_matrix(checkpoint, matrix.name)
    metric, few = (moments.metric(matrix.name, stored) for moments in (whole, wide))
    kept: dict[str, list[int]] = {"whole": [], "directions": []}
    for seed in range(draws):
        W = torch.randn(*matrix.shape, generator=torch.Generator().manual_seed(1000 + seed))
        s = data_values(W, metric, CPU)
        known = {"whole": metric}
        if few.form == "outputs":
            known["directions"] = replace(few, moment=W.double() @ metric.moment @ W.double().T)
        for name, inputs in known.items():
            null = null_in_metric(W, inputs, 19, CPU)
            kept[name].append(apply_rule("parallel:0.05", s, (matrix.shape[0], matrix.shape[1]), null).rank)
    shares: dict[str, float] = {}
    for name, found in ((name, np.array(ranks)) for name, ranks in kept.items() if ranks):
        share, one = np.mean(found > 0), np.mean(found <= 1)
        shares[name] = float(share)
        error = (share * (1 - share) / draws) ** 0.5
        print(
            f"{matrix.name}, {name}: noise on its inputs, {draws} draws: 1 or more kept in {100 * share:.1f} ± "
            f"{100 * error:.1f} %, at most 1 in {100 * one:.1f} %, most {found.max()}"
        )
    return shares


def row(checkpoint: laser.Checkpoint, matrix: Matrix, whole: Moments, wide: Moments) -> list[str]:
    W = read_matrix(checkpoint, matrix.name)
    metric, few = (moments.metric(matrix.name, W) for moments in (whole, wide))
    population = np.linalg.eigvalsh(metric.moment.numpy()).clip(0)
    G = torch.randn(*matrix.shape, generator=torch.Generator().manual_seed(0))
    cells = [matrix.name, "x".join(map(str, matrix.shape)), str(metric.tokens)]
    cells.append(f"{population[-1] / population.sum():.3f}")
    spectra = []
    for V in (G, permuted(W, 0), W.float()):
        s = data_values(V, metric, CPU) / (float(V.double().std()) * matrix.shape[1] ** 0.5)
        spectra.append(s)
        cells.append(f"{distance(s[s > 0], population, matrix.shape[0] / matrix.shape[1], points=300):.4f}")
    # Place by place and not against the largest: how many values lie over the permuted matrix's.
    cells.append(str(int(np.argmin(np.append(spectra[2] > spectra[1], False)))))
    return [*cells, ratio(W, few, metric)]


def ratio(W: torch.Tensor, few: Metric, metric: Metric) -> str:
    if few.form != "outputs":
        return ""
    one, other = (null_in_metric(W, known, 5, CPU) for known in (few, metric))
    return f"{np.mean(one / other):.4f}"


if __name__ == "__main__":
    main()
