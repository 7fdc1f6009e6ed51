"""The null in the data's metric on real inputs: how often noise is taken for signal, and its spectrum against the law.

    python scripts/check_data_null.py MODEL MOMENTS [--draws 200] [--level-of k_proj] [--layers 2,28]

Level: Gaussian weights of the shape of the first matrix whose name holds --level-of meet the inputs of MOMENTS; the
rule parallel:0.05 must keep one value or more in about 5 % of the draws. Law: Kolmogorov-Smirnov distance between
Silverstein's equation and the spectrum of Gaussian weights, of the matrix with its entries permuted, and of the matrix
as it is; and how many of its values from the first on lie over the permuted matrix's of the same place. Sketch: the
null from n / 14 directions of C and the diagonal of the rest (as for inputs of 14336), over that from the whole C.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

import laser
from laser.checkpoint.families import read_matrix
from laser.moments import Moments
from laser.selection import parse_layers
from laser.spectral.data_metric import Metric, data_values, null_in_metric
from laser.spectral.permutation import permuted
from laser.spectral.rules import apply_rule
from laser.spectral.second_moments import nystrom
from laser.spectral.silverstein import distance


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("moments", type=Path)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--level-of", default="k_proj")
    parser.add_argument("--layers", default="")
    asked = parser.parse_args()
    checkpoint, moments, device = laser.open_checkpoint(asked.model), Moments.load(asked.moments), laser.choose_device()
    wanted = parse_layers(asked.layers)
    matrices = [m for m in laser.list_matrices(checkpoint) if moments.tokens(m.name)]
    matrices = [m for m in matrices if not wanted or m.layer in wanted]
    for matrix in [m for m in matrices if asked.level_of in m.name][:1]:
        kept, metric = [], moments.metric(matrix.name)
        for seed in range(asked.draws):
            W = torch.randn(*matrix.shape, generator=torch.Generator().manual_seed(1000 + seed))
            null, s = null_in_metric(W, metric, 19, device), data_values(W, metric, device)
            kept.append(apply_rule("parallel:0.05", s, (matrix.shape[0], matrix.shape[1]), null).rank)
        found = np.array(kept)
        share, one = np.mean(found > 0), np.mean(found <= 1)
        error = (share * (1 - share) / asked.draws) ** 0.5
        print(
            f"{matrix.name}: noise on its inputs, {asked.draws} draws: 1 or more kept in {100 * share:.1f} ± "
            f"{100 * error:.1f} %, at most 1 in {100 * one:.1f} %, most {found.max()}"
        )
    print(
        "\n| matrix | shape | tokens | C: s_1^2 / trace | gaussian | permuted | as it is | over | sketch |\n"
        + "|---" * 9
        + "|"
    )
    for matrix in matrices:
        metric, W = moments.metric(matrix.name), read_matrix(checkpoint, matrix.name).float()
        if metric.form != "full":
            continue
        population = np.linalg.eigvalsh(metric.moment.numpy()).clip(0)
        G = torch.randn(*matrix.shape, generator=torch.Generator().manual_seed(0))
        cells, spectra = [], []
        for V in (G, permuted(W, 0), W):
            sigma = float(V.double().std())
            s = data_values(V, metric, device) / (sigma * matrix.shape[1] ** 0.5)
            spectra.append(s)
            cells.append(f"{distance(s[s > 0], population, matrix.shape[0] / matrix.shape[1], points=300):.4f}")
        # Place by place and not against the largest: how many values lie over the permuted matrix's.
        cells.append(str(int(np.argmin(np.append(spectra[2] > spectra[1], False)))))
        few, whole = (null_in_metric(W, known, 5, device) for known in (sketched(metric, len(W)), metric))
        cells.append(f"{np.mean(few / whole):.3f}")
        top = population[-1] / population.sum()
        shape = "x".join(map(str, matrix.shape))
        print(f"| {matrix.name} | {shape} | {metric.tokens} | {top:.3f} | {' | '.join(cells)} |", flush=True)


def sketched(metric: Metric, m: int) -> Metric:
    """As if the inputs of `metric` were too wide for their whole moment C (n, n)."""
    C = metric.moment
    test = torch.randn(len(C), len(C) // 14, generator=torch.Generator().manual_seed(0)).double()
    B, rest = nystrom(C @ test, test, C.diagonal())
    return Metric("outputs", torch.eye(m, dtype=torch.float64), metric.tokens, sketch=B, rest=rest)


if __name__ == "__main__":
    main()
