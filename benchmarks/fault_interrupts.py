#!/usr/bin/env python3
"""Every verb that takes its time, told to end in the midst of it: what it says is true, and what it advises works.

    python benchmarks/fault_interrupts.py [VERB ...] [--each N] [--seed S] [--smoke]

SIGINT (Ctrl-C) and SIGTERM (`kill`, a queue, a container that is stopped), each N times a verb, at a moment drawn from
the seconds that an undisturbed run takes. Exit code 1 where anything was wrong: a traceback, two sentences or none, a
sentence that is not true, or an end, once gone on, that is not byte for byte that of an undisturbed run.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # and not where a test imports this
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from fault_trials import VERBS, Bench, Verb, make_inputs, pinned

CREWED = ("scan", "reduce", "run", "scan --force", "reduce --force")  # also with two workers
KINDS: list[Verb] = [
    *(verb for verb in VERBS if verb.words[0] not in ("spectra", "plot", "report", "card")),
    *(replace(v, name=f"{v.name}, two workers", words=(*v.words, "--workers", "2")) for v in VERBS if v.name in CREWED),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verbs", nargs="*", help=", ".join(verb.name for verb in KINDS))
    parser.add_argument("--each", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    rng, each = random.Random(arguments.seed), 1 if arguments.smoke else arguments.each
    pinned()
    total: Counter[str] = Counter()
    print("| verb | SIGINT | SIGTERM | interrupted | already whole | wrong |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="laser-interrupts-") as folder:
        inputs = make_inputs(Path(folder, "inputs"))
        for place, verb in enumerate(KINDS):
            if (arguments.verbs and verb.name not in arguments.verbs) or (arguments.smoke and verb.slow):
                continue
            bench, count = Bench(verb, inputs, Path(folder, str(place)), warm=True), Counter[str]()
            bench.again()
            start = time.monotonic()
            bench.run(verb.words)
            seconds = time.monotonic() - start
            for number in (signal.SIGINT, signal.SIGTERM) * each:
                problems, end = bench.signalled(number, rng.uniform(0.1, 1.0) * seconds)
                count.update({number.name: 1, "interrupted": end.code == 130, "whole": end.code == 0})
                count["wrong"] += bool(problems)
                for problem in problems:
                    print(f"{verb.name}, {number.name}: {problem}", flush=True)
            show(verb.name, count)
            total += count
        show("all", total)
    return int(bool(total["wrong"]))


def show(name: str, count: Counter[str]) -> None:
    keys = ("SIGINT", "SIGTERM", "interrupted", "whole", "wrong")
    print(f"| {name} | " + " | ".join(str(count[key]) for key in keys) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
