#!/usr/bin/env python3
"""kill -9 at random moments during `laser reduce`, each followed by --resume; the result must be byte-identical.

    python benchmarks/bench_kill.py CHECKPOINT [--kills 20] [--work DIR] [--rule mp-edge] [--seed 0]
                                       [--by-matrices]

The moment is random in seconds, or with --by-matrices in matrices: for small models, whose start-up takes longest.
Prints, per kill, the moment and how many matrices the journal held. Fails if a matrix of which the journal said that it
was finished is computed again, if an index file is there before the end, or if one byte differs at the end.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import smoke
from synthetic import Sizes, write_synthetic_mixtral

from laser.cli import main as laser

LASER = [sys.executable, "-m", "laser"]


def finished(out: Path) -> list[str]:
    """Matrices that the journal holds, in order; a torn last line does not count."""
    journal = out / "laser" / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
    entries = (json.loads(line) for line in lines if line.endswith("\n"))
    return [entry["matrix"] for entry in entries if "matrix" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--work", type=Path, default=Path(".demo/kill"))
    parser.add_argument("--rule", default="mp-edge")
    parser.add_argument("--roles", default="q,o,w1,w2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--by-matrices", action="store_true", help="kill after a random number of matrices")
    arguments = smoke.parse(
        parser,
        lambda folder: [
            *(write_synthetic_mixtral(folder / "model", 2, 8, Sizes(256, 384, 64, 512)), "--work", folder / "work"),
            *("--kills", 1, "--rule", "fraction:0.3", "--by-matrices"),
        ],
    )
    work, rng = arguments.work, random.Random(arguments.seed)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    spectra, plan = work / "spectra.safetensors", work / "plan.json"
    quiet = {"stdout": subprocess.DEVNULL, "check": True}
    if laser(["scan", str(arguments.checkpoint), "-o", str(spectra), "--roles", arguments.roles]):
        sys.exit("the scan failed")
    if laser(["plan", str(spectra), "-o", str(plan), "--rule", arguments.rule]):
        sys.exit("the plan failed")
    reduce = [*LASER, "reduce", str(arguments.checkpoint), str(plan), "-o"]
    start = time.perf_counter()
    subprocess.run([*reduce, str(work / "undisturbed")], **quiet)
    whole = time.perf_counter() - start
    total = sum(line["action"] == "reduce" for line in json.loads(plan.read_text())["lines"])
    print(f"undisturbed: {total} matrices, {whole:.1f} s", flush=True)
    out, kills = work / "out", 0
    while kills < arguments.kills:
        before = finished(out)
        # Start-up included: some kills fall before the first matrix. Short, so that all of them fall within the run.
        moment = rng.uniform(0.5, 3.0 + 1.5 * whole / arguments.kills)
        matrices = len(before) + rng.randint(1, max(1, (total - len(before)) // (arguments.kills - kills + 1)))
        begun, passed = time.perf_counter(), 0.0
        child = subprocess.Popen([*reduce, str(out), "--resume"], stdout=subprocess.DEVNULL)
        while child.poll() is None:
            passed = time.perf_counter() - begun
            if (len(finished(out)) >= matrices) if arguments.by_matrices else (passed >= moment):
                child.kill()
                break
            time.sleep(0.002)
        if child.wait() >= 0:
            sys.exit(f"finished before kill {kills + 1}; choose more work or fewer kills")
        kills += 1
        after = finished(out)
        print(f"kill {kills:2d} after {passed:5.2f} s: {len(after):3d} matrices in the journal", flush=True)
        if arguments.by_matrices and not after:
            sys.exit("no matrix was finished")
        if after[: len(before)] != before or len(set(after)) != len(after):
            sys.exit("a finished matrix was computed again")
        if (out / "model.safetensors.index.json").exists():
            sys.exit("an index file is there before the end")
    subprocess.run([*reduce, str(out), "--resume"], **quiet)
    names = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    wanted = sorted(str(p.relative_to(work / "undisturbed")) for p in (work / "undisturbed").rglob("*") if p.is_file())
    different = [n for n in names if n not in wanted or not filecmp.cmp(out / n, work / "undisturbed" / n, False)]
    if names != wanted or different:
        sys.exit(f"the result differs from the undisturbed one: {different or set(names) ^ set(wanted)}")
    print(f"after {kills} kills: {len(names)} files, byte-identical to the undisturbed run")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
