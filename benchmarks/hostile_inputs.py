#!/usr/bin/env python3
"""Changed records and hostile foreign files through every verb that reads them, each in a child with limits.

    python benchmarks/hostile_inputs.py [records|pickles|ggufs|params ...] [--count N] [--seed S] [--smoke]

A child has 1 GB above what the libraries take, and 20 s of the processor. It must end in one sentence or in a right
result: what is made of a record as it was, or what the format's own library reads. Everything else is listed, and the
exit code is 1 where there is one. The same changes, fewer of them, are in the tests.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import hostile_records
import hostile_weights

PARTS = {
    "records": (hostile_records.build, hostile_records.trial, 500),
    "pickles": (hostile_weights.pickles, partial(hostile_weights.trial, "pickles"), 100),
    "ggufs": (hostile_weights.ggufs, partial(hostile_weights.trial, "ggufs"), 100),
    "params": (hostile_weights.params, partial(hostile_weights.trial, "params"), 100),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--count", type=int, help="cases of each part; default: 500 records, 100 of each other kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--smoke", action="store_true", help="a few cases of each")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every case")
    asked = parser.parse_args()
    wrong = 0
    for part in asked.parts or PARTS:
        build, trial, usual = PARTS[part]
        count = asked.count or (20 if asked.smoke else usual)
        ends: Counter[str] = Counter()
        with tempfile.TemporaryDirectory(prefix="laser-hostile-") as folder:
            source = Path(folder, "source")
            source.mkdir()
            build(source)
            start, slowest = time.perf_counter(), (0.0, "")
            for seed in range(asked.seed, asked.seed + count):
                begun = time.perf_counter()
                what, found = trial(source, Path(folder), seed)
                slowest = max(slowest, (time.perf_counter() - begun, what))
                for verb, said in found:
                    ends["one sentence" if said.code else "success"] += 1
                    if asked.verbose:
                        print(f"{seed}: {what}: {' '.join(verb)}: {said.code} {said.err.strip()[:300]}")
                    if said.wrong:
                        wrong += 1
                        ends["wrong"] += 1
                        print(f"WRONG {seed}: {what}: {' '.join(verb)}: {said.wrong}")
        told = ", ".join(f"{end} {times}" for end, times in sorted(ends.items()))
        seconds = time.perf_counter() - start
        print(f"{part}: {count} cases, {told}; {seconds:.0f} s, slowest {slowest[0]:.1f} s ({slowest[1]})")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
