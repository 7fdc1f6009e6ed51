#!/usr/bin/env python3
"""Every verb that writes, disturbed at its disk calls; what was wrong is listed, and counted in a table.

    python benchmarks/faults.py [VERB ...] [--kills N] [--faults N] [--short N] [--interrupts N] [--seed S] [--smoke]

Kills: SIGKILL before a call, or behind half of a write. Faults: the disk is full from there on (ENOSPC), or the call
fails once (EACCES for a path, EIO for data). Short: a write takes half of its bytes. Interrupts: SIGINT. So many of
each are drawn over all verbs, in proportion to their disk calls, at least one a verb; 0 is every call there is. After
each trial the advice of the message is followed, and the end is compared byte for byte with that of an undisturbed run;
but for what a search cost (seconds, layers run, checksums over them) in search.json and search.jsonl.
Exit code 1 where anything was wrong.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # and not where a test imports this
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from disk_faults import Fault
from fault_trials import VERBS, Bench, Count, make_inputs, pinned

GROUPS = {"kills": ("kill", "torn"), "faults": ("full", "error"), "short": ("short",), "interrupts": ("interrupt",)}
HEADINGS = (
    "verb", "disk calls", "kills", "faults", "cut short", "interrupts", "refused in one line", "tracebacks",
    "silent wrong", "half", "old lost", "untrue words", "lost work", "not resumed equal", "stray",
)  # fmt: skip


def row(name: str, count: Count) -> list[str]:
    """A line of the table."""
    met = count.met
    numbers = [count.calls, met["kill"] + met["torn"], met["full"] + met["error"], met["short"], met["interrupt"]]
    numbers += [count.refused, count.of("traceback", "hang")]
    numbers += [count.of("silent", "exit"), count.of("half"), count.of("old lost")]
    numbers += [count.of("untrue", "advice", "message"), count.of("lost work")]
    numbers += [count.of("not resumed", "resumed unequal"), count.of("stray")]
    return [name, *map(str, numbers)]


def show(cells: Sequence[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verbs", nargs="*", help=", ".join(verb.name for verb in VERBS))
    for name in GROUPS:
        parser.add_argument(f"--{name}", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    pinned()
    rows: list[tuple[str, Count]] = []
    with tempfile.TemporaryDirectory(prefix="laser-faults-") as folder:
        inputs = make_inputs(Path(folder, "inputs"))
        chosen = [v for v in VERBS if (v.name in arguments.verbs or not arguments.verbs)]
        chosen = [v for v in chosen if not (arguments.smoke and v.slow)]
        benches = [Bench(verb, inputs, Path(folder, str(i)), warm=True) for i, verb in enumerate(chosen)]
        drawn: list[list[Fault]] = [[] for _ in benches]
        for name, kinds in GROUPS.items():
            pools = [list(bench.faults(*kinds)) for bench in benches]
            every, wanted = sum(map(len, pools)), 1 if arguments.smoke else getattr(arguments, name)
            for pool, mine in zip(pools, drawn, strict=True):
                mine += rng.sample(pool, min(math.ceil(wanted * len(pool) / every), len(pool))) if wanted else pool
        show(HEADINGS)
        show(["---"] * len(HEADINGS))
        for bench, faults in zip(benches, drawn, strict=True):
            start, count = time.monotonic(), Count(calls=len(bench.calls))
            for fault in faults:
                for line in count.add(bench, fault):
                    print(line, flush=True)
            rows.append((bench.verb.name, count))
            show(row(bench.verb.name, count))
            print(f"{bench.verb.name}: {len(faults)} trials in {time.monotonic() - start:.0f} s", file=sys.stderr)
    lines = [row(name, count) for name, count in rows]
    show(["all", *(str(sum(int(line[i]) for line in lines)) for i in range(1, len(HEADINGS)))])
    return int(any(count.wrong for _, count in rows))


if __name__ == "__main__":
    sys.exit(main())
