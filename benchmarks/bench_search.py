"""What does a search cost, layer by layer and one trial after the other? Same decisions, to the last bit, or it fails.

    python benchmarks/bench_search.py [MODEL] [--candidates 15,60,480] [--rule fraction:0.9] [--accept better]
        [--windows 4] [--window 128] [--resident]

Without MODEL it makes a random Mixtral of 32 layers in which head and embedding have the share that they have in
Mixtral-8x7B. For each count of candidates the search is run twice in one process on a streamed model: one candidate a
walk, from states that were kept at every layer with a candidate, and as many candidates a walk as memory holds. Printed
are walks, pieces read, layers times windows, CPU and wall seconds, and the ratios.

Then a cost model: seconds to read a piece, to run it, to make a cut, each measured alone. What it says of these runs
stands beside what they took. The same formula with the sizes of Mixtral-8x7B and the speeds of a laptop and of an H100
gives the hours of a search there; these are computed, not measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import smoke
from bench_stream_memory import VOCABULARY, make

import laser.searching.search as search_module
from laser.checkpoint.reader import open_checkpoint
from laser.evaluation.objective import Loss
from laser.evaluation.streaming import LayeredModel
from laser.evaluation.text import Window, Windows, cut_windows, default_text, load_tokenizer, read_text
from laser.pipeline import scan
from laser.searching.candidates import cut_of
from laser.searching.runner import Runner, best_together
from laser.searching.search import SearchResult, search_plan
from laser.searching.trials import Bench
from laser.selection import Selection
from laser.spectra import Spectra
from laser.spectral.devices import choose_device

CPU = choose_device("cpu")


@dataclass
class Took:
    """What one search took."""

    result: SearchResult
    walks: int
    loads: int
    runs: int  # layers times windows
    cuts: int
    cpu: float
    wall: float


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Inside, a walk measures one candidate, from states that are kept wherever a candidate begins."""
    ahead, wanted = Runner._ahead, search_module._wanted
    Runner._ahead = lambda self, candidates, at: 1
    search_module._wanted = lambda candidates, model: ({max(c.piece, 1) for c in candidates}, set())
    try:
        yield
    finally:
        Runner._ahead, search_module._wanted = ahead, wanted


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Walks and cuts that are made inside."""
    counts, walk, cut = {"walks": 0, "cuts": 0}, Bench.walk, search_module.cut_of

    def counting(what: str, function: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            counts[what] += 1
            return function(*arguments, **options)

        return call

    Bench.walk, search_module.cut_of = counting("walks", walk), counting("cuts", cut)
    try:
        yield counts
    finally:
        Bench.walk, search_module.cut_of = walk, cut


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--candidates", default="15,60,480")
    parser.add_argument("--rule", default="fraction:0.9")
    parser.add_argument("--accept", default="better")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--resident", action="store_true")
    parser.add_argument("--layers", type=int, default=32, help="of the model that is made")
    parser.add_argument("--hidden", type=int, default=512, help="of the model that is made")
    small = ["--layers", 5, "--hidden", 64, "--windows", 2, "--window", 32, "--candidates", "6,20"]
    given = smoke.parse(parser, lambda _: small)
    if given.model:
        return bench(given.model, given)
    with tempfile.TemporaryDirectory() as directory:
        make(Path(directory), layers=given.layers, hidden=given.hidden)
        bench(directory, given)


def bench(name: str, given: argparse.Namespace) -> None:
    checkpoint = open_checkpoint(name)
    if given.model:
        tokenizer = load_tokenizer(checkpoint.path)
        text = read_text(given.text) if given.text else default_text()
        calibration = cut_windows(text, tokenizer, length=given.window, limit=given.windows)
        held_out = cut_windows(text, tokenizer, length=given.window, limit=2, skip=given.windows)
    else:
        calibration, held_out = random_windows(given.windows, given.window, 1), random_windows(2, given.window, 2)
    selection = Selection(roles=("q", "k", "v", "o", "w1", "w2", "w3"))
    spectra = scan(checkpoint, selection, device=CPU)
    print(f"{checkpoint.name}: {len(calibration.windows)} windows of {given.window}, {given.rule}, {given.accept}")

    def attempt(count: int) -> tuple[Took, LayeredModel]:
        model = LayeredModel(checkpoint, resident=None if given.resident else 0)
        model.prove(calibration.windows)
        model.loads, start = 0, (time.process_time(), time.perf_counter())
        with counted() as counts:
            result = search_plan(
                model, spectra, [given.rule], Loss(calibration), [Loss(held_out)], selection=selection,
                lowest_snr=count, accept=given.accept, device=CPU,
            )  # fmt: skip
        cpu, wall = time.process_time() - start[0], time.perf_counter() - start[1]
        return Took(result, counts["walks"], model.loads, model.layer_forwards, counts["cuts"], cpu, wall), model

    attempt(2)  # warm: kernels chosen, files in memory
    speeds = measure_speeds(LayeredModel(checkpoint), calibration, spectra)
    print("candidates  way            walks  pieces read  layer runs  cuts  CPU s  wall s  model's CPU s")
    failed = False
    for count in map(int, given.candidates.split(",")):
        with one_at_a_time():
            one, _ = attempt(count)
        many, _ = attempt(count)
        for way, took in (("one a walk", one), ("layer by layer", many)):
            said = speeds.seconds(took.loads, took.runs, took.cuts, took.walks)
            print(
                f"{count:10}  {way:14} {took.walks:6}  {took.loads:11}  {took.runs:10}  {took.cuts:4}  "
                f"{took.cpu:5.1f}  {took.wall:6.1f}  {said:13.1f}"
            )
        same = [[(t.label, t.rule, t.d, t.se, t.accepted) for t in took.result.trials] for took in (one, many)]
        alike = same[0] == same[1] and one.result.plan == many.result.plan
        alike = alike and one.result.held_out == many.result.held_out
        kept = sum(t.accepted for t in many.result.trials)
        print(
            f"{len(many.result.trials):10}  {kept} kept; pieces {one.loads / many.loads:.1f} times fewer, "
            f"CPU {one.cpu / many.cpu:.2f} times less, wall {one.wall / many.wall:.2f}; "
            f"decisions, losses and plans {'the same to the last bit' if alike else 'DIFFER'}"
        )
        failed = failed or not alike
        assert not given.smoke or given.resident or kept or many.loads < one.loads, (many.loads, one.loads)
    mixtral()
    if failed:
        sys.exit(1)


@dataclass(frozen=True)
class Speeds:
    """Seconds of the processor: to read a piece, to run a layer on one window, to make a cut, to score all windows."""

    load: float
    run: float
    cut: float
    ends: float

    def seconds(self, loads: int, runs: int, cuts: int, walks: int) -> float:
        """A search of so much work. Each walk has one base or variant at its ends at the least, which is left out."""
        return loads * self.load + runs * self.run + cuts * self.cut + walks * self.ends


def measure_speeds(model: LayeredModel, text: Windows, spectra: Spectra) -> Speeds:
    """Each alone, over all layers."""
    model.prove(text.windows)
    states, load, run = model.embed(text.windows), 0.0, 0.0
    for layer in range(model.layers):
        start = time.process_time()
        with model.held(layer + 1):
            load, start = load + time.process_time() - start, time.process_time()
            model.run_layer(layer, states)
            run += time.process_time() - start
    start = time.process_time()
    with model.held(*model.together(model.layers + 1)):
        model.score(states, text.windows)
    ends = time.process_time() - start
    names = list(spectra.values)[:: max(len(spectra.values) // 14, 1)]
    start = time.process_time()
    for name in names:
        cut_of(model.checkpoint, "fraction:0.9", {name: max(1, len(spectra.values[name]) * 9 // 10)}, CPU)
    cut = (time.process_time() - start) / len(names)
    model.unload()
    return Speeds(load / model.layers, run / model.layers / len(text.windows), cut, ends)


LAYERS, LAYER_WEIGHTS, ACTIVE = 32, 46.7e9 / 32, 12.9e9 / 32  # Mixtral-8x7B
TOKENS, STATE = 16 * 512, 16 * 512 * 4096  # 16 windows of 512
# name: weights read a second by (bytes stored a weight), products a second, bytes of states that memory holds
MACHINES = {
    "laptop, float32": (3e9 / 2, 0.5e12, 8e9, 4),
    "H100, streamed float32": (10e9 / 2, 50e12, 40e9, 4),
    "H100, streamed bf16": (10e9 / 2, 500e12, 60e9, 2),
}


def mixtral(kept: int = 3) -> None:
    """Hours of a search of Mixtral-8x7B: its walks by `simulate`, with speeds of MACHINES."""
    print(f"Mixtral-8x7B, computed: hours for 15 / 100 / 896 candidates, one a walk and layer by layer, {kept} kept")
    for name, (read, products, memory, size) in MACHINES.items():
        load, run = LAYER_WEIGHTS / read, 2 * ACTIVE * TOKENS / products
        room, hours = max(int(memory // (STATE * size)) - 2, 1), dict[str, list[float]]()
        for count in (15, 100, 896):
            for way, (loads, runs) in simulate(count, kept, room, load / run).items():
                hours.setdefault(way, []).append((loads * load + runs * run) / 3600)
        print(f"  {name:24}" + "   ".join(" / ".join(f"{h:.2f}" for h in way) for way in hours.values()))


def simulate(count: int, kept: int, room: int, ratio: float) -> dict[str, tuple[int, int]]:
    """Layers read and layers run of both ways, for candidates spread evenly over the layers, the last first. `kept` of
    them, spread evenly too, are accepted against the guess. ratio: of reading a layer to running it."""
    layers = [LAYERS - 1 - i * LAYERS // count for i in range(count)]
    accepted = {(2 * i + 1) * count // (2 * kept) for i in range(kept)}
    ends = 3 * LAYERS, 3 * LAYERS  # to prove that the pieces are the model, the base, and the report
    loads, runs = ends
    for layer in layers:
        loads, runs = loads + LAYERS - layer, runs + LAYERS - layer
    found = {"one": (loads, runs)}
    loads, runs = ends
    at = wrong = measured = 0  # measured: candidates that an earlier walk has measured, and kept states of
    since = LAYERS
    while at < count:
        stop = min(at + min(best_together(at, wrong, lambda: ratio), room), count)
        spare = room >= 2 * (stop - at)
        starts = [since if spare and i < measured else layers[i] for i in range(at, stop)]
        loads, runs = loads + LAYERS - min(starts), runs + sum(LAYERS - start for start in starts)
        measured = max(measured, stop)
        hit = next((i for i in range(at, stop) if i in accepted), None)
        at = stop if hit is None else hit + 1
        wrong, since = (wrong, since) if hit is None else (wrong + 1, layers[hit])
    return found | {"many": (loads, runs)}


def random_windows(count: int, length: int, seed: int) -> Windows:
    generator = np.random.default_rng(seed)
    cut = [Window(generator.integers(3, VOCABULARY, length), length - 1) for _ in range(count)]
    return Windows(tuple(cut), f"random tokens {seed}", "0" * 64, length, "windows", False, None)


if __name__ == "__main__":
    main()
