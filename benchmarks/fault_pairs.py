#!/usr/bin/env python3
"""Two processes on one output: exactly one wins, and what lies there is what the winner makes when it is alone.

    python benchmarks/fault_pairs.py [--rounds N] [--seed S] [--smoke]

A pair is two command lines on one output, equal or different. In a race both start at once. In the other half of the
rounds the first is stopped at a disk call of its own, while it holds the lock; the second then runs from its start to
its end and has to be refused, and the first goes on and wins. In a race under --force both may win, one behind the
other: then the later one's result lies there, and it counts as "both in turn". Exit code 1 where anything was wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

if __name__ == "__main__":  # and not where a test imports this
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from disk_faults import End, Fault, forked, start
from fault_trials import CALIBRATE, EVAL, ONE_PASS, PLAN, REDUCE, SCAN, filled, laser, make_inputs, normal, pinned

ROUNDS = 10
FORCE = ("--force",)
OTHER_RUN = (*ONE_PASS, "--lowest-snr", "1")
# what is there before; two commands on one output
PAIRS: tuple[tuple[str, tuple[tuple[str, ...], ...], tuple[str, ...], tuple[str, ...]], ...] = (
    ("scan, equal", (), SCAN, SCAN),
    ("scan, different", (), SCAN, (*SCAN[:-1], "q")),
    ("plan, different", (), (*PLAN, "rank:4"), (*PLAN, "rank:6")),
    ("reduce, equal", (), REDUCE, REDUCE),
    ("reduce and run", (), REDUCE, ONE_PASS),
    ("run, different", (), ONE_PASS, OTHER_RUN),
    ("calibrate, different", (), CALIBRATE, (*CALIBRATE, "--diagonal")),
    ("eval, different", (), EVAL, (*EVAL, "--skip", "1")),
    ("scan --force, different", (SCAN,), (*SCAN, *FORCE), (*SCAN[:-1], "q", *FORCE)),
    ("reduce --force, equal", (OTHER_RUN,), (*REDUCE, *FORCE), (*REDUCE, *FORCE)),
    ("reduce and run --force", (OTHER_RUN,), (*REDUCE, *FORCE), (*ONE_PASS, *FORCE)),
    ("run --force --resume", (OTHER_RUN,), (*ONE_PASS, *FORCE), (*ONE_PASS, *FORCE, "--resume")),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="Races, and as many stopped pairs, of each kind.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    rng, rounds = random.Random(arguments.seed), 1 if arguments.smoke else arguments.rounds
    pinned()
    total: Counter[str] = Counter()
    print("| pair | pairs | one won | both in turn | wrong |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="laser-pairs-") as folder:
        inputs = make_inputs(Path(folder, "inputs"))
        for name, old, one, two in PAIRS[::5] if arguments.smoke else PAIRS:
            count = both(Path(folder, "place"), inputs, old, one, two, rounds, rng)
            print(f"| {name} | {count['pairs']} | {count['one']} | {count['both']} | {count['wrong']} |", flush=True)
            total += count
    print(f"| all | {total['pairs']} | {total['one']} | {total['both']} | {total['wrong']} |")
    return int(bool(total["wrong"]))


def both(
    place: Path,
    inputs: Mapping[str, str],
    old: Sequence[tuple[str, ...]],
    one: Sequence[str],
    two: Sequence[str],
    rounds: int,
    rng: random.Random,
) -> Counter[str]:
    """What became of `rounds` races and `rounds` stopped pairs of two commands."""
    count: Counter[str] = Counter()
    pair = [filled(words, inputs) for words in (one, two)]

    def fresh() -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for words in old:
            assert forked(laser(filled(words, inputs)), place).code == 0

    alone = []
    for words in pair:
        fresh()
        end = forked(laser(words), place)
        assert end.code == 0, end.err
        alone.append((normal(place), end))
    for number in range(2 * rounds):
        fresh()
        if number % 2:
            # From the call behind the lock's own writing, to the last rename: there the first one holds the output.
            held = alone[0][1].calls.index("flock") + 3
            at = rng.randrange(held + 1, len(alone[0][1].calls) - 1)
            ends = stopped(pair, place, at)
        else:
            racers = [start(laser(words), place) for words in rng.sample(pair, 2)]
            ends = [racer.wait() for racer in racers]
        won = [end.code for end in ends].count(0)
        problem = wrong(ends, won, normal(place), [files for files, _ in alone], bool(number % 2), "--force" in one)
        if problem:
            print(f"{' '.join(one[:2])} / {' '.join(two[:2])}: {problem}", flush=True)
        count.update({"pairs": 1, "wrong": bool(problem), "one": won == 1, "both": won == 2})
    return count


def stopped(pair: Sequence[list[str]], place: Path, at: int) -> list[End]:
    """The first is stopped at its disk call `at` until the second has ended."""
    gate_read, gate_write = os.pipe()
    told_read, told_write = os.pipe()
    os.set_inheritable(gate_write, False)

    def first() -> int:
        os.close(gate_write)
        return laser(pair[0])()

    begun = start(first, place, Fault("wait", at, gate_read, told_write))
    os.close(told_write)
    os.close(gate_read)
    os.read(told_read, 1)  # ends when it has reached the call
    second = forked(laser(pair[1]), place)
    os.close(gate_write)
    os.close(told_read)
    return [begun.wait(), second]


def wrong(
    ends: Sequence[End],
    won: int,
    found: dict[str, bytes],
    alone: Sequence[dict[str, bytes]],
    ordered: bool,
    force: bool,
) -> str:
    """What is not as it should be; "" where all is."""
    for end in ends:
        if end.code not in (0, 1) or "Traceback" in end.err:
            return f"exit {end.code}: {end.err.strip()[-300:]}"
        if end.code == 1 and not any(t in end.err for t in ("is being written by process", "exists", "another run")):
            return f"refused for another reason: {end.err.strip()}"
    if found not in alone:
        return f"what lies there is nobody's result ({sorted(found)[:5]})"
    if ordered:
        return "" if ends[0].code == 0 and ends[1].code == 1 and found == alone[0] else "the second was not refused"
    return "" if won == 1 or (won == 2 and force) else f"{won} won"


if __name__ == "__main__":
    sys.exit(main())
