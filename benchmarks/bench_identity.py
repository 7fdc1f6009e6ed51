#!/usr/bin/env python3
"""What it costs to know which weights these are, and to look again at what an earlier run left, against the scan.

    python benchmarks/bench_identity.py [--layers 3] [--experts 8] [--shrink 1] [--work DIR] [--keep] [--smoke]

On a synthetic checkpoint of Mixtral-8x7B's shapes (3 layers: 9 GB). Printed in seconds and as a part of the scan:

    fingerprint   opening the checkpoint and reading a few places of every tensor, cold (dropped from the page cache,
                  as far as the system does what it is asked) and warm
    unchanged     looking again at the end of a verb
    finished      `--resume` on a finished output every shard of which is new: all of it is hashed
    unfinished    `--resume` on an output that ended in its last shard: finished shards hashed, the .partial compared
    scan          the first layer's matrices, times the layers
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

import smoke
import torch
from synthetic import Sizes, write_synthetic_mixtral

import laser
from laser.checkpoint.source import Source, require_unchanged
from laser.checkpoint.writer import prepare_output, write_checkpoint


class Ended(Exception):
    """Stands for a kill."""


def drop_from_cache(model: Path) -> None:
    """Ask the system to forget what it holds of the files."""
    for path in model.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def written(model: Path, out: Path, until: int | None = None) -> float:
    """Write every matrix as it is to `out`, or go on with that; seconds before the first matrix was asked for, or in
    all where none was. until: how many matrices are written before it ends."""
    checkpoint = laser.open_checkpoint(model)
    matrices = {m.name: m for m in laser.list_matrices(checkpoint)}
    start, asked = time.perf_counter(), list[float]()

    def compute(names: list[str]) -> Generator[tuple[str, torch.Tensor | None, dict[str, Any]]]:
        asked.append(time.perf_counter() - start)
        for count, name in enumerate(names):
            if count == until:
                raise Ended
            yield name, checkpoint.read(matrices[name].tensor, matrices[name].part), {}

    run = {"kind": "bench", **Source.of(checkpoint).stated()}
    prepare_output(checkpoint, out, resume=True)
    told = {"kind": "outcome", "version": 2, "plan": {}}
    with suppress(Ended):
        write_checkpoint(
            checkpoint, out, list(matrices.values()), compute, lambda r, s: told | {"matrices": r, "shards": s}, run
        )
    return asked[0] if asked else time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--shrink", type=int, default=1, help="divide every side by this")
    parser.add_argument("--work", type=Path, default=Path(".demo/identity"))
    parser.add_argument("--keep", action="store_true")
    arguments = smoke.parse(
        parser, lambda folder: ["--layers", 2, "--experts", 2, "--shrink", 64, "--work", folder / "work"]
    )
    work: Path = arguments.work
    model = work / "model"
    if not (model / "config.json").exists():
        shutil.rmtree(work, ignore_errors=True)
        write_synthetic_mixtral(model, arguments.layers, arguments.experts, Sizes().over(arguments.shrink))
    count = len(laser.list_matrices(laser.open_checkpoint(model)))
    taken: dict[str, float] = {}
    drop_from_cache(model)
    taken["fingerprint, cold"] = timed(lambda: Source.of(laser.open_checkpoint(model)))
    taken["fingerprint, warm"] = timed(lambda: Source.of(laser.open_checkpoint(model)))
    checkpoint = laser.open_checkpoint(model)
    Source.of(checkpoint)
    taken["unchanged"] = timed(lambda: require_unchanged(checkpoint))
    for name, until in (("finished", None), ("unfinished", count - 2)):
        shutil.rmtree(work / "out", ignore_errors=True)
        written(model, work / "out", until)
        taken[name] = written(model, work / "out")
    first = laser.Selection(layers=(0,))
    taken["scan"] = arguments.layers * timed(lambda: laser.scan(checkpoint, first, device=laser.choose_device("cpu")))
    size = sum(shard.size for shard in checkpoint.shards) / 1e9
    print(f"{size:.2f} GB, {len(checkpoint.tensors)} tensors, {count} matrices")
    for name, seconds in taken.items():
        print(f"{name:20s} {seconds:9.3f} s  {100 * seconds / taken['scan']:7.3f} % of the scan")
    if not arguments.keep:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
