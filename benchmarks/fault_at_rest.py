#!/usr/bin/env python3
"""Files damaged while nobody works on them: every file of an output, finished and interrupted, with every fault.

    python benchmarks/fault_at_rest.py [--cases N] [--seed S] [--smoke]

--cases N: of each output's cases N, drawn at random; without it all of them.

Faults: emptied, halved, one bit flipped in the middle and near the end, 512 bytes zeroed, deleted. An interrupted
output is gone on with: it has to end as an undisturbed one (repaired), or be refused by a sentence (named). A finished
one is given to the verb that reads it: that has to name what is wrong, or to end with the right bytes. Silent is exit
code 0 over anything else. Left out: the card, which people edit, and plan.json by itself, whose lines they edit.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # and not where a test imports this
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from disk_faults import Fault
from fault_trials import VERBS, Bench, make_inputs, normal, pinned
from test_faults_at_rest import faults

KINDS = {verb.name: verb for verb in VERBS}
INTERRUPTED = ("scan", "reduce", "reduce, one file", "run", "run, two passes", "search", "calibrate", "leaderboard")
PARTS = (0.35, 0.55, 0.8)  # of the disk calls of an undisturbed run
# Finished: what reads them, and what that writes
READERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "reduce": (("verify", "{model}", "o"),),
    "reduce, one file": (("verify", "{single}", "o"),),
    "run": (("verify", "{model}", "o"),),
    "run --search": (("verify", "{model}", "o"),),
    "scan": (("plan", "s", "-o", "p", "--rule", "rank:4"),),
    "calibrate": (("scan", "{model}", "-o", "s", "--roles", "q,w2", "--moments", "mo"),),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    smoke, draw = arguments.smoke, Draw(arguments.cases, random.Random(arguments.seed))
    pinned()
    total: Counter[str] = Counter()
    print("| output | files | cases | repaired | named | silent |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="laser-at-rest-") as folder:
        inputs = make_inputs(Path(folder, "inputs"))
        for name in ("reduce",) if smoke else INTERRUPTED:
            bench = Bench(KINDS[name], inputs, Path(folder, f"i-{name}"), warm=True)
            total += told(f"{name}, interrupted", interrupted(bench, PARTS[:1] if smoke else PARTS, draw))
        for name in ("scan",) if smoke else READERS:
            bench = Bench(KINDS[name], inputs, Path(folder, f"f-{name}"), warm=True)
            total += told(f"{name}, finished", finished(bench, READERS[name], draw))
        told("all", total)
    return int(bool(total["silent"]))


@dataclass(frozen=True)
class Draw:
    """Which of an output's cases are tried."""

    count: int | None
    rng: random.Random

    def of(self, cases: list[Any]) -> list[Any]:
        return cases if self.count is None else self.rng.sample(cases, min(self.count, len(cases)))


def told(name: str, count: Counter[str]) -> Counter[str]:
    numbers = (count[key] for key in ("files", "cases", "repaired", "named", "silent"))
    print(f"| {name} | " + " | ".join(map(str, numbers)) + " |", flush=True)
    return count


def damaged(bench: Bench, template: Path, draw: Draw, skip: tuple[str, ...] = ()) -> Iterator[str]:
    """The bench's place again and again as in `template`, with one file damaged; yields what was done to which."""
    for file, fault in draw.of(list(faults(template))):
        if file.rpartition("/")[2] in skip or not (template / file).stat().st_size:
            continue
        shutil.rmtree(bench.place)
        shutil.copytree(template, bench.place)
        fault(bench.place / file)
        path = bench.place / file
        if path.exists() and path.read_bytes() == (template / file).read_bytes():
            continue  # there were zeros already
        yield f"{file}, {fault.__name__}"


def interrupted(bench: Bench, parts: tuple[float, ...], draw: Draw) -> Counter[str]:
    """Every file of a killed run, damaged and gone on with."""
    count: Counter[str] = Counter()
    for part in parts:
        bench.again()
        bench.run(bench.verb.words, Fault("kill", max(int(part * len(bench.calls)), 1)))
        template = bench.root / f"killed-{part}"
        shutil.copytree(bench.place, template)
        count["files"] += sum(path.is_file() for path in template.rglob("*"))
        if not any(path.is_file() for path in template.rglob("*")):
            continue
        words = [*bench.verb.words, *(["--resume"] if bench.verb.resumes else [])]
        for what in damaged(bench, template, draw):
            end = bench.run(words)
            count["cases"] += 1
            if end.code == 0 and not bench.differs(normal(bench.place)):
                count["repaired"] += 1
            elif end.code == 1 and end.err.count("\n") == 1 and "Traceback" not in end.err:
                count["named"] += 1
            else:
                count["silent"] += 1
                print(f"{bench.verb.name}: {what}: exit {end.code} {end.err.strip()[-200:]}", flush=True)
    return count


def finished(bench: Bench, readers: tuple[tuple[str, ...], ...], draw: Draw) -> Counter[str]:
    """Every file of a finished output, damaged and read."""
    count: Counter[str] = Counter()
    template = bench.root / "finished"
    shutil.copytree(bench.place, template)
    count["files"] = sum(path.is_file() for path in template.rglob("*"))
    words = readers[0]
    calm = bench.run(words)
    assert calm.code == 0, calm.err
    wanted = normal(bench.place)
    for what in damaged(bench, template, draw, ("README.md",)):
        end = bench.run(words)
        count["cases"] += 1
        lines = (end.out + end.err).strip()
        if end.code == 1 and lines and "Traceback" not in end.err:
            count["named"] += 1
        elif end.code == 0 and normal(bench.place) == wanted:
            count["repaired"] += 1
        else:
            count["silent"] += 1
            print(f"{bench.verb.name}: {what}: exit {end.code} {lines[-200:]}", flush=True)
    return count


if __name__ == "__main__":
    sys.exit(main())
