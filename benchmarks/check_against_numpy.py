#!/usr/bin/env python3
"""Everything that the flow claims of a checkpoint, checked against numpy.linalg.svd in float64. Slow and obvious.

    python benchmarks/check_against_numpy.py CHECKPOINT [--every 8] [--work DIR]

1. The empty plan gives byte-identical shards and index.
2. For every N-th matrix, the singular values equal numpy's, and so does the rank under every rule.
3. A plan that cuts those matrices, each under another rule than the one before: touched tensors equal numpy's
   truncation within one rounding to the storage dtype plus 1e-5 of the largest entry, all others are bit-identical.

Exits with 1 at the first difference.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import smoke
import torch

import laser
from laser.spectral.permutation import null_largest

NULL_DRAWS = 19  # the least that has a 5 % quantile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path(".demo/check"))
    arguments = smoke.parse(parser, lambda folder: [smoke.pico(folder), "--every", 5, "--work", folder / "work"])
    shutil.rmtree(arguments.work, ignore_errors=True)
    checkpoint = laser.open_checkpoint(arguments.checkpoint)
    device = laser.choose_device("cpu")
    rules = [rule.sample or name for name, rule in laser.RULES.items() if not rule.needs_sigma]
    chosen = [m for m in laser.list_matrices(checkpoint) if laser.Selection().why_not(m) is None][:: arguments.every]
    print(f"{len(chosen)} matrices of {checkpoint.name}, {len(rules)} rules")

    pattern = "|".join(f"^{m.name.replace('.', '[.]')}$" for m in chosen)
    spectra = laser.scan(checkpoint, laser.Selection(include=pattern), device=device, null_draws=NULL_DRAWS)
    laser.reduce(checkpoint, laser.empty_plan(spectra), arguments.work / "empty", device=device)
    for file in [s.name for s in checkpoint.shards] + ["model.safetensors.index.json"] * (len(checkpoint.shards) > 1):
        if not filecmp.cmp(checkpoint.path / file, arguments.work / "empty" / file, shallow=False):
            sys.exit(f"the empty plan changed {file}")
    print("the empty plan: every shard and the index are byte-identical")

    plans = {rule: {x.name: x for x in laser.make_plan(spectra, rule).lines} for rule in rules}
    lines, truth, worst = {}, {}, 0.0
    for number, matrix in enumerate(chosen):
        W = checkpoint.read(matrix.name)
        U, s, Vh = np.linalg.svd(W.double().numpy(), full_matrices=False)
        worst = max(worst, float(np.abs(spectra.values[matrix.name] - s).max() / s[0]))
        null = null_largest(W, NULL_DRAWS, device)
        for rule in rules:
            rank = laser.apply_rule(rule, s, (W.shape[0], W.shape[1]), null).rank
            if rank != plans[rule][matrix.name].rank:
                sys.exit(f"{matrix.name}: {rule} gives rank {plans[rule][matrix.name].rank}, numpy's spectrum {rank}")
        line = plans[rules[number % len(rules)]][matrix.name]
        if line.action == "reduce":
            lines[matrix.name] = line
            truth[matrix.name] = (U[:, : line.rank] * s[: line.rank]) @ Vh[: line.rank]
    print(f"ranks equal under every rule; largest difference of a singular value {worst:.1e} of the largest")

    plan = laser.empty_plan(spectra)
    plan = replace(plan, lines=tuple(lines.get(x.name, x) for x in plan.lines))
    laser.reduce(checkpoint, plan, arguments.work / "reduced", device=device)
    result, furthest = laser.open_checkpoint(arguments.work / "reduced"), 0.0
    for name in checkpoint.tensors:
        before, after = checkpoint.read(name), result.read(name)
        if name not in truth:
            if not torch.equal(before.view(torch.uint8), after.view(torch.uint8)):
                sys.exit(f"{name} was not to be touched and differs")
            continue
        allowed = torch.finfo(after.dtype).eps * np.abs(truth[name]) + 1e-5 * np.abs(truth[name]).max()
        allowed += np.finfo(np.float64).tiny  # a truncation to rank 0 must be 0 everywhere
        off = float((np.abs(after.double().numpy() - truth[name]) / allowed).max())
        furthest = max(furthest, off)
        if off > 1:
            sys.exit(f"{name}: {off:.2f} times what one rounding and 1e-5 allow")
    untouched = len(checkpoint.tensors) - len(truth)
    print(f"{len(truth)} truncations equal numpy's: at most {furthest:.2f} of what one rounding and 1e-5 allow")
    print(f"{untouched} other tensors are bit-identical")
    shutil.rmtree(arguments.work)


if __name__ == "__main__":
    main()
