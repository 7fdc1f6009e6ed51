#!/usr/bin/env python3
"""Every verb that writes, disturbed at every disk call; what was wrong is listed, and counted in a table.

    python benchmarks/faults.py [VERB ...] [--kinds kill,full,...] [--every N] [--smoke]

Kinds: kill (SIGKILL before the call), torn (SIGKILL behind half of a write), full (the disk is full from there on),
error (EACCES or EIO, once), short (a write takes half of its bytes), interrupt (SIGINT). After each trial the advice of
the message is followed, and the end is compared byte for byte with that of an undisturbed run; but for seconds and
checksums over them in search.json and search.jsonl. --every N takes each N-th call, --smoke a handful.
Exit code 1 where anything was wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from fault_trials import VERBS, Bench, Count, make_inputs, pinned

KINDS = ("kill", "torn", "full", "error", "short", "interrupt")
HEADINGS = (
    "verb", "disk calls", "kills", "faults", "cut short", "interrupts", "tracebacks", "silent wrong", "half",
    "old lost", "untrue words", "lost work", "not resumed equal", "stray",
)  # fmt: skip


def row(name: str, count: Count) -> list[str]:
    """A line of the table."""
    met = count.met
    numbers = [count.calls, met["kill"] + met["torn"], met["full"] + met["error"], met["short"], met["interrupt"]]
    numbers += [count.of("traceback", "hang"), count.of("silent", "exit"), count.of("half"), count.of("old lost")]
    numbers += [count.of("untrue", "advice", "message"), count.of("lost work")]
    numbers += [count.of("not resumed", "resumed unequal"), count.of("stray")]
    return [name, *map(str, numbers)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verbs", nargs="*", help=", ".join(verb.name for verb in VERBS))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    kinds, every = arguments.kinds.split(","), 37 if arguments.smoke else arguments.every
    pinned()
    rows = []
    with tempfile.TemporaryDirectory(prefix="laser-faults-") as folder:
        inputs = make_inputs(Path(folder, "inputs"))
        for number, verb in enumerate(VERBS):
            if (arguments.verbs and verb.name not in arguments.verbs) or (arguments.smoke and verb.slow):
                continue
            start, count = time.monotonic(), Count()
            bench = Bench(verb, inputs, Path(folder, str(number)), warm=True)
            count.calls = len(bench.calls)
            for fault in list(bench.faults(*kinds))[::every]:
                for line in count.add(bench, fault):
                    print(line, flush=True)
            rows.append((verb.name, count))
            print(f"{verb.name}: {sum(count.met.values())} trials in {time.monotonic() - start:.0f} s", flush=True)
    print("\n| " + " | ".join(HEADINGS) + " |\n|" + "---|" * len(HEADINGS))
    lines = [row(name, count) for name, count in rows]
    totals = [str(sum(int(line[i]) for line in lines)) for i in range(1, len(HEADINGS))]
    for line in (*lines, ["all", *totals]):
        print("| " + " | ".join(line) + " |")
    return int(any(count.wrong for _, count in rows))


if __name__ == "__main__":
    sys.exit(main())
