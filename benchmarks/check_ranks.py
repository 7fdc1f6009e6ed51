#!/usr/bin/env python3
"""The same ranks everywhere? Every rule on real weights, in float64, in float32, and counted by the projector.

    python benchmarks/check_ranks.py MODEL [--layers 0,15,29] [--device cpu] [--null 19]

For each matrix singular values in float64 on the host and in float32 on --device (with float64 there as well, if it has
it), every rule's rank from each; and, where the rule has a threshold t, the number of eigenvalues of the float32 Gram
matrix over t^2 by the matrix sign, which needs no eigensolver. A rank that differs must be one that the plan of the
device calls "at the threshold". Fails if one does not.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import numpy as np
import smoke
import torch

from laser.checkpoint.matrices import list_matrices
from laser.checkpoint.reader import open_checkpoint
from laser.selection import Selection, parse_layers
from laser.spectral.devices import HOST, choose_device, full_precision
from laser.spectral.factorise import singular_values
from laser.spectral.gram import gram
from laser.spectral.permutation import null_largest
from laser.spectral.projector import UNRESOLVED, matrix_sign
from laser.spectral.rules import RULES, apply_rule
from laser.spectral.spectrum import at_threshold


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--layers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--null", type=int, default=19)
    parser.add_argument("--no-projector", action="store_true")
    arguments = smoke.parse(parser, lambda folder: [smoke.pico(folder), "--layers", 0])
    checkpoint, selection = open_checkpoint(arguments.model), Selection(parse_layers(arguments.layers))
    matrices = [m for m in list_matrices(checkpoint) if selection.why_not(m) is None]
    device = choose_device(arguments.device, "float32")
    eps = torch.finfo(torch.float32).eps
    columns = (
        "matrices",
        "float32 differs",
        "device float64 differs",
        "said near",
        "unsaid",
        "sign differs",
        "unresolved",
    )
    asked = [rule.sample or name for name, rule in RULES.items() if not rule.needs_sigma]
    table = {name: np.zeros(len(columns), dtype=int) for name in asked}
    for matrix in matrices:
        W, shape = checkpoint.read(matrix.name), (matrix.shape[0], matrix.shape[1])
        exact, rough = singular_values(W, HOST)[0], singular_values(W, device)[0]
        double = singular_values(W, replace(device, dtype=torch.float64))[0] if device.has_float64 else exact
        null = null_largest(W, arguments.null, HOST)
        with full_precision():
            G = gram(W, device)
            for spec, counts in table.items():
                cut, single = apply_rule(spec, exact, shape, null), apply_rule(spec, rough, shape, null)
                near = bool(at_threshold(spec, rough, single, eps))
                differs = single.rank != cut.rank
                also = apply_rule(spec, double, shape, null).rank != cut.rank
                counted = unresolved = False
                if cut.threshold and not arguments.no_projector:
                    sign = matrix_sign(G, cut.threshold)
                    unresolved = abs(sign.unresolved) > UNRESOLVED
                    counted = not unresolved and round(sign.positive) != cut.rank
                unsaid = (differs or counted) and not near
                counts += np.array([1, differs, also, near, unsaid, counted, unresolved], dtype=int)
    print(f"{checkpoint.name}, {len(matrices)} matrices, {device.label} against {HOST.label}\n")
    print("| rule | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for spec, counts in table.items():
        print(f"| {spec} | " + " | ".join(map(str, counts)) + " |")
    sys.exit(any(counts[4] or counts[2] for counts in table.values()))


if __name__ == "__main__":
    main()
