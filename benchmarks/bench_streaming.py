#!/usr/bin/env python3
"""The empty plan against `cp -r` of the same checkpoint, in turn, medians; both once the page cache is warm.

    python benchmarks/bench_streaming.py CHECKPOINT [--work DIR] [--repeat 7]

Two pairs are printed: as they stand (`laser` hashes every shard and waits for the disk, `cp` does neither), and with
`sync` after `cp`, so that both have the bytes on the disk when they end. Start-up of Python is not counted.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import smoke

from laser.checkpoint.matrices import list_matrices
from laser.checkpoint.reader import Checkpoint, open_checkpoint
from laser.checkpoint.source import Source
from laser.pipeline import reduce
from laser.plan import empty_plan
from laser.reasons import Kind, Why
from laser.spectra import Spectra


def no_spectra(checkpoint: Checkpoint) -> Spectra:
    """A record without a scan: the empty plan needs only the names."""
    matrices = tuple(list_matrices(checkpoint))
    why = Why(Kind.NOT_SCANNED, "not scanned")
    return Spectra(Source.of(checkpoint), matrices, {}, {m.name: why for m in matrices}, "gram", "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, help="directory for the copies; default beside the checkpoint")
    parser.add_argument("--repeat", type=int, default=7)
    arguments = smoke.parse(parser, lambda folder: [smoke.pico(folder), "--work", folder / "work", "--repeat", 1])
    source = arguments.checkpoint
    work = arguments.work or source.resolve().parent / "bench_streaming"
    checkpoint = open_checkpoint(source)
    plan = empty_plan(no_spectra(checkpoint))

    def ours(out: Path) -> None:
        reduce(open_checkpoint(source), plan, out)

    def copy(out: Path) -> None:
        subprocess.run(["cp", "-r", str(source), str(out)], check=True)

    def copy_and_sync(out: Path) -> None:
        copy(out)
        subprocess.run(["sync", "-f", str(out)], check=True)

    def timed(way: Callable[[Path], None]) -> float:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        subprocess.run(["sync"], check=True)  # what is still to be written belongs to nobody's time
        start = time.perf_counter()
        way(work / "out")
        return time.perf_counter() - start

    timed(copy)
    ways = {"laser, empty plan": ours, "cp -r": copy, "cp -r; sync": copy_and_sync}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.repeat):
        for name, way in ways.items():
            times[name].append(timed(way))
    if arguments.smoke:
        timed(ours)
        for shard in checkpoint.shards:
            assert filecmp.cmp(shard.path, work / "out" / shard.name, shallow=False), shard.name
    shutil.rmtree(work)
    size = sum(s.size for s in checkpoint.shards) / 1e9
    medians = {name: statistics.median(t) for name, t in times.items()}
    for name, taken in medians.items():
        ratio = medians["laser, empty plan"] / taken
        print(f"{name:20s} {taken:7.3f} s  {size / taken:6.2f} GB/s  laser takes {ratio:5.2f} times as long")


if __name__ == "__main__":
    main()
