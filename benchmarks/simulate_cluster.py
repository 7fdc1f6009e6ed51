#!/usr/bin/env python3
"""How far does the engine ray scale? A simulation of DeepSeek-V3 with measured constants, on 1 to 512 GPUs.

    python benchmarks/simulate_cluster.py [--matrices 45000] [--shape 2048x7168] [--constant NAME=VALUE ...]

The rules are those of engine/ray.py. Of a scan: groups of matrices, two tasks per GPU (one reads while the other
computes), twice as many tasks in flight as slots. Of a reduction: a task per shard, which reads while it computes, then
copies, writes and hashes; with `--through-driver`, as it was before, the scan's tasks, and one driver that writes all.
What is busy or free: each GPU, each node's link to the shared file system, the file system as a whole, and the driver,
which takes results one after the other. Nothing fails. Printed: seconds, speed-up, and how busy these are, which shows
what limits; before that, the constants and where they come from.
"""

from __future__ import annotations

import argparse
import heapq
from dataclasses import dataclass, field, fields

import smoke

from laser.engine.cost import ELSEWHERE
from laser.engine.ray import GROUP, GROUP_BYTES, IN_FLIGHT, SHARE, lent_to_a_task


@dataclass(frozen=True)
class Constants:
    """Seconds, and bytes a second."""

    task: float = field(default=0.001, metadata={"told": "driver: to submit a task and take its result (docs/log)"})
    line: float = field(default=7e-6, metadata={"told": "driver: a matrix's line in the journal (docs/log)"})
    bring: float = field(default=0.85e9, metadata={"told": "one writer: copied, hashed and written (docs/log)"})
    file_system: float = field(default=20e9, metadata={"told": "all nodes together, to read or write; assumed"})
    node: float = field(default=2.5e9, metadata={"told": "one node of 8 GPUs, to read or write; assumed"})
    copy: float = field(default=1e10, metadata={"told": "to the GPU and back, pageable memory; assumed"})


@dataclass
class Server:
    """Something that does one thing after the other."""

    free: float = 0.0
    busy: float = 0.0

    def take(self, at: float, seconds: float) -> float:
        """When work that may begin at `at` is done."""
        self.free = max(self.free, at) + seconds
        self.busy += seconds
        return self.free


def simulate(
    gpus: int, matrices: int, shape: tuple[int, int], constants: Constants, *, reduce: bool
) -> tuple[float, ...]:
    """(seconds, share of the time in which the GPUs, the file system and the driver are busy)."""
    m, n = shape
    size = 2 * m * n
    probe = ELSEWHERE["cuda float64"]
    compute = probe.truncate_seconds(m, n) if reduce else probe.values_seconds(m, n)
    group = max(1, min(int(GROUP["cuda"] // (m * n * min(m, n))), GROUP_BYTES // size))
    tasks = [min(group, matrices - i) for i in range(0, matrices, group)]
    driver, disk = Server(), Server()
    cards = [Server() for _ in range(gpus)]
    nodes = [Server() for _ in range(-(-gpus // 8))]
    slots = [(0.0, gpu) for gpu in range(gpus) for _ in range(int(1 / SHARE))]
    heapq.heapify(slots)
    finished: list[tuple[float, int]] = []  # (when, matrices) of tasks whose results wait for the driver
    in_flight = end = 0
    limit = IN_FLIGHT * len(slots)
    waiting = iter(tasks)
    pending = next(waiting, None)
    while pending or finished:
        while pending and in_flight < limit:
            submitted = driver.take(end, constants.task / 2)
            at, gpu = heapq.heappop(slots)
            read = pending * size
            begun = max(at, submitted)
            ready = max(
                disk.take(begun, read / constants.file_system), nodes[gpu // 8].take(begun, read / constants.node)
            )
            copied = pending * size * (2 if reduce else 1) / constants.copy
            done = cards[gpu].take(ready, pending * compute + copied)
            heapq.heappush(slots, (done, gpu))
            heapq.heappush(finished, (done, pending))
            in_flight += 1
            pending = next(waiting, None)
        when, count = heapq.heappop(finished)
        back = count * size / constants.bring if reduce else 0.0
        end = driver.take(max(when, end), constants.task / 2 + back)
        in_flight -= 1
    return end, sum(c.busy for c in cards) / gpus / end, disk.busy / end, driver.busy / end


def simulate_shards(
    gpus: int, matrices: int, shape: tuple[int, int], constants: Constants, shard_bytes: float
) -> tuple[float, ...]:
    """As `simulate`, of a reduction whose tasks are whole shards, each of one node."""
    m, n = shape
    size = 2 * m * n
    compute = ELSEWHERE["cuda float64"].truncate_seconds(m, n) + 2 * size / constants.copy
    many = max(1, int(shard_bytes // size))
    tasks = [min(many, matrices - i) for i in range(0, matrices, many)]
    here = [min(8, gpus - first) for first in range(0, gpus, 8)]
    lent = lent_to_a_task(len(tasks), here, SHARE)
    driver, disk, nodes = Server(), Server(), [Server() for _ in here]
    # A task's cards, of which it needs all, or half of one that it shares with another task.
    cards = [(node, Server()) for node, count in enumerate(here) for _ in range(int(count // max(lent, 1)))]
    # What happens next: (when, number, what, task's matrices, its cards). 0: it begins, 1: it is read, 2: computed.
    events = [(0.0, i, 0, 0, i % len(cards)) for i in range(int(len(cards) / min(lent, 1)))]
    waiting, end, number = iter(tasks), 0.0, len(events)
    while events:
        at, _, what, count, slot = heapq.heappop(events)
        node, card = cards[slot]
        if what == 0:
            end = max(end, at)
            count = next(waiting, 0)
            if not count:
                continue
            at = driver.take(at, constants.task + count * constants.line)
        if what == 1:
            at = card.take(at, count * compute / max(lent, 1))
        else:
            seconds = 0.0 if what == 0 else count * size / constants.bring
            ready = disk.take(at, count * size / constants.file_system)
            at = max(ready, nodes[node].take(at, count * size / constants.node), at + seconds)
        number += 1
        heapq.heappush(events, (at, number, (what + 1) % 3, count, slot))
    return end, sum(card.busy for _, card in cards) * max(lent, 1) / gpus / end, disk.busy / end, driver.busy / end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", type=int, default=45_000)
    parser.add_argument("--shape", default="2048x7168")
    parser.add_argument("--gpus", default="1,2,4,8,16,32,64,128,512")
    parser.add_argument("--shard-bytes", type=float, default=5e9)
    parser.add_argument("--through-driver", action="store_true", help="a reduction as it was before")
    parser.add_argument("--constant", action="append", default=[], metavar="NAME=VALUE")
    arguments = smoke.parse(parser, lambda _: ["--matrices", 500, "--gpus", "1,2,8"])
    constants = Constants(**{name: float(value) for name, value in (c.split("=") for c in arguments.constant)})
    for constant in fields(Constants):
        print(f"{constant.name:12s} {getattr(constants, constant.name):10.4g}  {constant.metadata['told']}")
    m, n = (int(side) for side in arguments.shape.split("x"))
    for what, reduce in (("scan", False), ("reduce", True)):
        print(f"\n{what} of {arguments.matrices} matrices of {m} x {n}\n")
        print("| GPUs | seconds | speed-up | GPUs busy | file system busy | driver busy |\n|---|---|---|---|---|---|")
        alone = None
        for gpus in map(int, arguments.gpus.split(",")):
            if reduce and not arguments.through_driver:
                seconds, *busy = simulate_shards(gpus, arguments.matrices, (m, n), constants, arguments.shard_bytes)
            else:
                seconds, *busy = simulate(gpus, arguments.matrices, (m, n), constants, reduce=reduce)
            alone = alone or seconds * gpus
            assert alone / seconds <= gpus * 1.001, "a cluster of N is at most N times as fast as one"
            cells = " | ".join(f"{100 * share:.0f} %" for share in busy)
            print(f"| {gpus} | {seconds:.0f} | {alone / seconds:.1f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
