#!/usr/bin/env python3
"""The engine ray on this machine: what a task costs, and a scan and reduction against one process.

    python benchmarks/bench_ray.py CHECKPOINT [--roles q,w1] [--work DIR] [--tasks 60] [--overheads-only]

Starts a cluster of two nodes with one slot each. First, matrices that nothing is done with: seconds of each (read in a
task of its own, and its bytes brought back, copied, hashed and written by the driver), beside the same in one process;
they are the constants of simulate_cluster.py. Then scan and reduction of CHECKPOINT, byte by byte against one process.
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import ray
import smoke
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import save_file

import laser
from laser.engine import ray as ray_engine
from laser.engine.crew import Crew
from laser.engine.workers import visit_all

CPU = laser.choose_device("cpu")
HERE, ON_RAY = Crew((CPU,), 1), laser.choose_crew("cpu", engine="ray")
SHAPES = ((576, 576), (1536, 576), (4096, 1024), (7168, 2048))


def write_model(path: Path, shape: tuple[int, int], count: int) -> laser.Checkpoint:
    """`count` matrices of noise in one file."""
    path.mkdir(parents=True)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    tensors = {f"model.layers.{i}.self_attn.q_proj.weight": noise.clone() for i in range(count)}
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return laser.open_checkpoint(path)


def per_matrix(checkpoint: laser.Checkpoint, work: Callable[..., Any], crew: Crew, target: Any = None) -> list[float]:
    """Wall seconds and CPU seconds of this process per matrix; with `target`, an open file, its bytes are
    hashed and written as the driver does."""
    matrices = laser.list_matrices(checkpoint)
    start, busy = time.perf_counter(), time.process_time()
    with closing(visit_all(checkpoint, matrices, work, crew)) as visits:
        for _, result, _ in visits:
            if target is not None:
                data = result.view(-1).view(torch.uint8).numpy().data
                target.seek(0)
                target.write(data)
                hashlib.sha256(data).hexdigest()
    return [(time.perf_counter() - start) / len(matrices), (time.process_time() - busy) / len(matrices)]


def overheads(work: Path, tasks: int, shapes: tuple[tuple[int, int], ...] = SHAPES) -> None:
    print("Milliseconds per matrix: wall, and CPU of the driver's process\n")
    print("| shape | MB | read in a task | | and brought back, hashed, written | | the same here | | and | |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    grouping = dict(ray_engine.GROUP)
    ray_engine.GROUP["cpu"] = 1  # one matrix per task
    for shape in shapes:
        size = 2 * int(np.prod(shape)) / 1e6
        shutil.rmtree(work, ignore_errors=True)
        checkpoint = write_model(work, shape, max(8, min(tasks, int(600 / size))))
        row = []
        for crew in (ON_RAY, HERE):
            per_matrix(checkpoint, lambda m, W, d: None, crew)  # starts the workers
            row.extend(per_matrix(checkpoint, lambda m, W, d: None, crew))
            with (work / "out").open("wb", buffering=0) as target:
                row.extend(per_matrix(checkpoint, lambda m, W, d: W, crew, target))
        cells = " | ".join(f"{1000 * seconds:.1f}" for seconds in row)
        print(f"| {shape[0]}x{shape[1]} | {size:.1f} | {cells} |", flush=True)
    ray_engine.GROUP.update(grouping)
    shutil.rmtree(work)


def compare(checkpoint: laser.Checkpoint, roles: tuple[str, ...], work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    for label, crew in (("one process", HERE), ("two workers", Crew((CPU,), 2)), ("ray, two nodes", ON_RAY)):
        place = work / label
        place.mkdir(parents=True)
        start = time.perf_counter()
        spectra = laser.scan(checkpoint, laser.Selection(roles=roles), crew=crew)
        spectra.save(place / "spectra.safetensors")
        middle = time.perf_counter()
        laser.reduce(checkpoint, laser.make_plan(spectra, "mp-edge"), place / "out", crew=crew)
        end = time.perf_counter()
        count = len(spectra.values)
        print(f"{label:15s} scan {middle - start:6.1f} s, reduce {end - middle:6.1f} s, {count} matrices", flush=True)
        first = work / "one process"
        names = [p.relative_to(place) for p in sorted(place.rglob("*")) if p.is_file()]
        different = [str(n) for n in names if not filecmp.cmp(place / n, first / n, shallow=False)]
        print(f"{'':15s} {len(names)} files, {'byte-identical' if not different else different}", flush=True)
        assert names and not different, "the engines must write the same bytes"
        if place != first:
            shutil.rmtree(place)
    shutil.rmtree(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--roles", default="q,w1")
    parser.add_argument("--overheads-only", action="store_true")
    parser.add_argument("--compare-only", action="store_true")
    parser.add_argument("--tasks", type=int, default=60)
    parser.add_argument("--work", type=Path, default=Path(".demo/ray"))
    arguments = smoke.parse(
        parser, lambda folder: [smoke.pico(folder), "--tasks", 8, "--work", folder / "work", "--roles", "q"]
    )
    node = {"object_store_memory": 1 << 30}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **node})
    cluster.add_node(num_cpus=1, object_store_memory=1 << 30)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.WARNING)
    if not arguments.compare_only:
        overheads(arguments.work / "overhead", arguments.tasks, ((48, 32),) if arguments.smoke else SHAPES)
    roles = tuple(arguments.roles.split(","))
    if not arguments.overheads_only:
        compare(laser.open_checkpoint(arguments.checkpoint), roles, arguments.work / "compare")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
