#!/usr/bin/env python3
"""Scan and reduction of a synthetic checkpoint with true Mixtral-8x7B shapes, against the way of published scripts.

    python benchmarks/bench_pass.py [--layers 2] [--experts 8] [--shrink 1] [--device auto] [--workers N]
                                 [--precision float64] [--rule fraction:0.4] [--plain-all] [--work DIR] [--keep]
                                 [--against DIR --repeat 3]

One layer before and after, a few minutes:  python benchmarks/bench_pass.py --layers 1 --experts 1 --against DIR

One layer is 2.9 GB. Printed, from one run on the same files, each part in a process of its own:

    laser     `laser run MODEL -o OUT --rule RULE --no-search`, the command line as it stands: one visit to each matrix;
              seconds from its first look at the model, how far resident memory rose, and the bound that `--dry-run`
              states. On CUDA also how busy the GPU was, sampled from the first matrix to the last, in the mean
    I/O       the same flow with nothing computed: every matrix read, written, hashed, put on the disk
    compute   the same visits to the matrices of the first layer, from memory, nothing read or written, times the layers
    overlap   wall / max(compute, I/O): 1 is a perfect overlap; the aim is at most 1.15
    plain     the whole model in memory in bf16, then torch.linalg.svdvals of one matrix after the other in float32, and
              torch.linalg.svd and the product with the cut factors again one after the other, and the model saved.
              Measured on one matrix of each shape, times their number, unless --plain-all; threads as torch likes

Needs the machine for itself: all four are compared.

With --against, another checkout of laser, only the command line is run, by that one and by this one in alternation.
Printed are medians of seconds and of CPU seconds, which other work on the machine hardly moves, and whether both wrote
the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import smoke
import torch
from safetensors.torch import load_file, save_file
from synthetic import Sizes, write_synthetic_mixtral

import laser
from laser.checkpoint.source import Source
from laser.checkpoint.writer import prepare_output, write_checkpoint
from laser.engine.crew import Crew
from laser.engine.workers import visit_all
from laser.pipeline import OnePass, by_shard
from laser.plan import Treatment
from laser.spectral.host_memory import resident_bytes


def high_water() -> int:
    """Bytes of resident memory at the most, 0 where the system does not tell."""
    return resident_bytes(peak=True) or 0


def selected(checkpoint: laser.Checkpoint) -> list[laser.Matrix]:
    return [m for m in laser.list_matrices(checkpoint) if laser.Selection().why_not(m) is None]


class FromMemory:
    """Stands for a checkpoint in `visit_all`: one matrix of each shape, read once."""

    def __init__(self, checkpoint: laser.Checkpoint, matrices: list[laser.Matrix]) -> None:
        self.shapes = {m.tensor: m.shape for m in matrices}
        first = {m.shape: m for m in reversed(matrices)}
        self.weights = {shape: checkpoint.read(m.tensor) for shape, m in first.items()}

    def read(self, name: str, _part: Any = None) -> torch.Tensor:
        return self.weights[self.shapes[name]]


def ours(model: Path, work: Path, arguments: argparse.Namespace, tree: Path | None = None) -> dict[str, Any]:
    """The command line, and its own account of itself; how busy the GPU was while matrices were visited. `tree`: the
    checkout to take it from, by default the one that is imported here."""
    command = [sys.executable, "-m", "laser", "run", str(model), "-o", str(work / "out"), "--rule", arguments.rule]
    command += ["--no-search", "--device", arguments.device, "--precision", arguments.precision, "--json"]
    command += ["--workers", str(arguments.workers)] if arguments.workers else []
    journal, samples = work / "out" / "laser" / "journal.jsonl", list[float]()
    place = {"cwd": tree, "env": os.environ | {"PYTHONPATH": str(tree)}} if tree else {}
    before = children_cpu()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **place)
    while True:
        try:
            output = child.communicate(timeout=0.2)[0]
            break
        except subprocess.TimeoutExpired:
            if arguments.device.startswith("cuda") and journal.exists():  # from the first result to the last
                samples.append(gpu_percent())
    if child.returncode:
        raise SystemExit(f"laser run failed with {child.returncode}")
    told = json.loads(output)
    return {
        "wall": told["seconds"],
        "peak": told["peak_bytes"],
        "bound": told["estimated"]["peak_bytes"],
        "gpu": samples,
        "cpu": children_cpu() - before,
    }


def children_cpu() -> float:
    """CPU seconds of all processes that were started here and have ended."""
    spent = os.times()
    return spent.children_user + spent.children_system


def against(other: Path, work: Path, arguments: argparse.Namespace) -> None:
    """Print the command line of `other` and that of this checkout, in alternation."""
    trees = {"before": other.resolve(), "after": Path(laser.__file__).parent.parent}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
    written: dict[str, dict[str, str]] = {}
    for _ in range(arguments.repeat):
        for name, tree in trees.items():
            shutil.rmtree(work / "out", ignore_errors=True)
            subprocess.run(["sync"], check=True)
            found[name].append(ours((work / "model").resolve(), work.resolve(), arguments, tree))
            shards = sorted((work / "out").glob("*.safetensors"))
            written[name] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards}
    for key, unit in (("wall", "s"), ("cpu", "CPU s")):
        times = {name: [run[key] for run in runs] for name, runs in found.items()}
        middle = {name: statistics.median(spent) for name, spent in times.items()}
        told = ", ".join(f"{name} {middle[name]:.1f} ({min(x):.1f} to {max(x):.1f})" for name, x in times.items())
        print(f"{unit:6s} {told}: {middle['before'] / middle['after']:.2f} times as fast")
    same = sum(written["after"].get(name) == digest for name, digest in written["before"].items())
    print(f"{same} of {len(written['before'])} shards with the same bytes")


def gpu_percent() -> float:
    """How much of the last sixth of a second or so kernels ran, as the driver counts it."""
    asked = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    return float(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0])


def io(checkpoint: laser.Checkpoint, work: Path, crew: Crew) -> dict[str, Any]:
    matrices = {m.name: m for m in selected(checkpoint)}

    def compute(names: list[str]) -> Any:
        order = by_shard(checkpoint, [matrices[name] for name in names])
        with closing(visit_all(checkpoint, order, lambda m, W, d: W, crew)) as visits:
            for matrix, W, _ in visits:
                yield matrix.name, W, {}

    prepare_output(checkpoint, work / "io", resume=False)
    write_checkpoint(
        checkpoint, work / "io", list(matrices.values()), compute, lambda r, s: {"shards": s}, {"kind": "bench"}
    )
    return {}


def compute_alone(checkpoint: laser.Checkpoint, crew: Crew, rule: str) -> dict[str, Any]:
    """The first layer, from memory, in the order in which the flow takes it."""
    matrices = by_shard(checkpoint, [m for m in selected(checkpoint) if m.layer == 0])
    memory: Any = FromMemory(checkpoint, matrices)
    label = crew.devices[0].label
    work = OnePass("gram", Source.of(checkpoint), Treatment(rule), laser.Selection(), label)
    start = time.perf_counter()
    for _ in visit_all(memory, matrices, work, crew):
        pass
    return {"seconds": time.perf_counter() - start}


def plain(checkpoint: laser.Checkpoint, work: Path, rule: str, everything: bool, device: str) -> dict[str, Any]:
    """What published scripts do, one matrix after the other."""
    matrices = selected(checkpoint)
    start = time.perf_counter()
    model: dict[str, torch.Tensor] = {}
    for shard in checkpoint.shards:
        model |= load_file(shard.path)
    loaded = time.perf_counter() - start
    count = Counter(m.shape for m in matrices)
    taken = matrices if everything else list({m.shape: m for m in reversed(matrices)}.values())
    seconds = {"svdvals": 0.0, "svd": 0.0}
    rows = []
    for matrix in taken:
        times = 1 if everything else count[matrix.shape]
        before = time.perf_counter()
        W = model[matrix.tensor].to(device).float()
        s = torch.linalg.svdvals(W).cpu()
        middle = time.perf_counter()
        rank = laser.apply_rule(rule, s.double().numpy(), (W.shape[0], W.shape[1])).rank
        W = model[matrix.tensor].to(device).float()
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        model[matrix.tensor] = ((U[:, :rank] * S[:rank]) @ Vh[:rank]).to(torch.bfloat16).cpu()
        end = time.perf_counter()
        seconds["svdvals"] += times * (middle - before)
        seconds["svd"] += times * (end - middle)
        rows.append(f"{'x'.join(map(str, matrix.shape))}: {middle - before:.1f} + {end - middle:.1f} s, {times} times")
        del W, U, S, Vh
    before = time.perf_counter()
    (work / "plain").mkdir()
    for shard in checkpoint.shards:
        save_file(
            {t.name: model[t.name] for t in shard.tensors}, work / "plain" / shard.name, metadata={"format": "pt"}
        )
    subprocess.run(["sync", "-f", str(work / "plain")], check=True)
    saved = time.perf_counter() - before
    return {"load": loaded, **seconds, "save": saved, "seconds": loaded + sum(seconds.values()) + saved, "rows": rows}


def child(part: str, arguments: argparse.Namespace) -> None:
    before = high_water()
    checkpoint, work = laser.open_checkpoint(arguments.work / "model"), arguments.work
    crew = laser.choose_crew(arguments.device, arguments.precision, workers=arguments.workers)
    start = time.perf_counter()
    if part == "io":
        found = io(checkpoint, work, replace(crew, workers=1) if crew.devices[0].host_blas else crew)
    elif part == "compute":
        found = compute_alone(checkpoint, crew, arguments.rule)
    else:
        device = str(crew.devices[0].torch_device)
        found = plain(checkpoint, work, arguments.rule, arguments.plain_all, device)
    wall = time.perf_counter() - start
    print(json.dumps({"wall": wall, "peak": high_water() - before} | found))


def assert_same(work: Path) -> None:
    """laser's weights are those of the plain way within a rounding to bf16, and I/O alone changes no byte."""
    changed = 0
    for path in sorted((work / "model").glob("*.safetensors")):
        assert path.read_bytes() == (work / "io" / path.name).read_bytes(), path.name
        before, one, other = (load_file(work / place / path.name) for place in ("model", "out", "plain"))
        for name, W in before.items():
            distance = torch.linalg.vector_norm(one[name].float() - other[name].float())
            assert distance <= 0.005 * torch.linalg.vector_norm(W.float()), name
            changed += not torch.equal(one[name], W)
    assert changed, "nothing was reduced"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--shrink", type=int, default=1, help="divide every side, to try the script")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--rule", default="fraction:0.4")
    parser.add_argument("--against", type=Path, help="another checkout of laser")
    parser.add_argument("--repeat", type=int, default=3, help="with --against")
    parser.add_argument("--plain-all", action="store_true")
    parser.add_argument("--work", type=Path, default=Path(".demo/pass"))
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = smoke.parse(
        parser,
        lambda folder: [
            *("--layers", 1, "--experts", 2, "--shrink", 32, "--device", "cpu", "--plain-all", "--keep"),
            *("--work", folder / "work"),
        ],
    )
    if arguments.part:
        return child(arguments.part, arguments)
    work: Path = arguments.work
    if not (work / "model" / "config.json").exists():  # written last; an earlier one is used again
        shutil.rmtree(work, ignore_errors=True)
        sizes = Sizes().over(arguments.shrink)
        write_synthetic_mixtral(work / "model", arguments.layers, arguments.experts, sizes)
    if arguments.against:
        return against(arguments.against, work, arguments)
    found: dict[str, Any] = {}
    for part in ("ours", "io", "compute", "plain"):
        for place in ("out", "io", "plain") if not arguments.smoke else ():
            shutil.rmtree(work / place, ignore_errors=True)
        subprocess.run(["sync"], check=True)
        if part == "ours":
            found[part] = ours(work / "model", work, arguments)
        else:
            command = [sys.executable, __file__, *sys.argv[1:], "--part", part]
            found[part] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        print(
            f"{part:8s} {found[part]['wall']:8.1f} s, {found[part]['peak'] / 1e9:6.2f} GB above the import", flush=True
        )
    wall, io_seconds = found["ours"]["wall"], found["io"]["wall"]
    alone = found["compute"]["seconds"] * arguments.layers
    print(f"\n{arguments.layers} layers of {arguments.experts} experts, rule {arguments.rule}")
    print(
        f"laser    {wall:.1f} s = {wall / arguments.layers:.1f} s a layer; a layer alone: compute "
        f"{found['compute']['seconds']:.1f} s, read and write {io_seconds / arguments.layers:.1f} s"
    )
    print(f"overlap  {wall / max(alone, io_seconds):.3f} of max(compute {alone:.1f} s, I/O {io_seconds:.1f} s)")
    if busy := found["ours"]["gpu"]:
        written = sum(path.stat().st_size for path in (work / "model").glob("*.safetensors")) / wall
        print(f"GPU      {sum(busy) / len(busy):.0f} % busy in {len(busy)} samples; {written / 1e9:.2f} GB/s written")
    print(f"memory   {found['ours']['peak'] / 1e9:.2f} GB, bound {found['ours']['bound'] / 1e9:.2f} GB")
    way = found["plain"]
    for row in way["rows"]:
        print(f"plain    {row}")
    print(
        f"plain    {way['seconds']:.1f} s = load {way['load']:.1f} + svdvals {way['svdvals']:.1f} + svd "
        f"{way['svd']:.1f} + save {way['save']:.1f}{'' if arguments.plain_all else ', by one matrix of each shape'}; "
        f"laser is {way['seconds'] / wall:.2f} times as fast"
    )
    if arguments.smoke:
        assert_same(work)
    if not arguments.keep:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
