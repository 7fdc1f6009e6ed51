#!/usr/bin/env python3
"""Peak resident memory of scan and reduce on a synthetic checkpoint with true Mixtral shapes.

    python benchmarks/bench_memory.py [--layers 3] [--experts 8] [--shrink 1] [--work DIR] [--roles w1,q,k]

Writes `layers` decoder layers of random bf16 weights (14336 x 4096 experts; one layer is 2.9 GB), then runs `scan` and
`reduce` each in a process of its own that prints how far its resident memory rose above that of importing the package.
The bound: 8 times the largest matrix in float32, plus 200 MB, whatever the checkpoint's size.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import smoke
from synthetic import Sizes, write_synthetic_mixtral

CHILD = """
import re, sys, time
from pathlib import Path
import laser
from laser.selection import Selection, parse_roles

def peak():  # not getrusage, whose maximum a child inherits from the process that started it
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

verb, source, work, roles = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4]
device = laser.choose_device("cpu")
before, start = peak(), time.perf_counter()
checkpoint = laser.open_checkpoint(source)
if verb == "scan":
    selection = Selection(layers=(0,), roles=parse_roles(roles), exclude=r"experts\\.[2-9]")
    laser.scan(checkpoint, selection, device=device).save(work / "spectra.safetensors")
else:
    plan = laser.make_plan(laser.Spectra.load(work / "spectra.safetensors"), "fraction:0.4")
    laser.reduce(checkpoint, plan, work / "out", device=device)
print(peak() - before, time.perf_counter() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--shrink", type=int, default=1, help="divide every side by this")
    parser.add_argument("--work", type=Path, default=Path(".demo/memory"))
    parser.add_argument("--roles", default="w1,w2,q,k")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there, for bench_streaming.py")
    arguments = smoke.parse(
        parser, lambda folder: ["--layers", 1, "--experts", 2, "--shrink", 32, "--work", folder / "work"]
    )
    work, sizes = arguments.work, Sizes().over(arguments.shrink)
    start = time.perf_counter()
    if not (work / "model" / "config.json").exists():  # written last; an earlier one is used again
        shutil.rmtree(work, ignore_errors=True)
        write_synthetic_mixtral(work / "model", arguments.layers, arguments.experts, sizes)
    shutil.rmtree(work / "out", ignore_errors=True)
    size = sum(f.stat().st_size for f in (work / "model").iterdir())
    print(f"{size / 1e9:.2f} GB of weights written in {time.perf_counter() - start:.0f} s", flush=True)
    bound = 8 * 4 * sizes.width * sizes.hidden + 200e6
    worst = 0.0
    for verb in ("scan", "reduce"):
        command = [sys.executable, "-c", CHILD, verb, str(work / "model"), str(work), arguments.roles]
        rise, seconds = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        worst = max(worst, rise)
        print(
            f"{verb:7s} peak {rise / 1e6:7.0f} MB above the import, bound {bound / 1e6:.0f} MB, {seconds:.1f} s",
            flush=True,
        )
    if not arguments.keep:
        shutil.rmtree(work)
    sys.exit(worst > bound)


if __name__ == "__main__":
    main()
