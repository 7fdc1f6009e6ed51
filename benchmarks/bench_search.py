"""Does the cache of a search pay, and does it change anything? Candidates evenly over the layers, both ways.

    python benchmarks/bench_search.py [MODEL] [--text FILE] [--role q] [--every 3] [--windows 4] [--window 256]
        [--stream]

Without MODEL it makes a random Mixtral of 32 layers in which head and embedding have the share that they have in
Mixtral-8x7B (1 % of a pass); in small models with large vocabularies the head, which no cache can save, has more.

The same search is run twice in one process: every trial as a plain full pass, and from the cached states that enter the
candidate's layer. Order and decisions must be the same to the last bit; printed are decoder-layer passes and seconds
per trial (truncation included, first the plain ones), and which share of a pass embedding, norm and head are, since the
cache cannot save the head. Fails if a decision differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import smoke
from bench_stream_memory import VOCABULARY, make

import laser.search.runner
from laser.checkpoint.reader import open_checkpoint
from laser.evaluation.objective import Loss
from laser.evaluation.streaming import LayeredModel
from laser.evaluation.text import Window, Windows, cut_windows, default_text, load_tokenizer, read_text
from laser.pipeline import scan
from laser.search.search import SearchResult, search
from laser.selection import Selection
from laser.spectral.devices import choose_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--role", default="q")
    parser.add_argument("--include", help="narrow the role down to one matrix per layer, for experts")
    parser.add_argument("--every", type=int, default=3, help="one candidate in every N layers")
    parser.add_argument("--rule", default="laser-rmt")
    parser.add_argument("--accept", default="any-drop")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds instead of wall seconds: shared machines")
    parser.add_argument("--layers", type=int, default=32, help="of the model that is made")
    parser.add_argument("--hidden", type=int, default=512, help="of the model that is made")
    given = smoke.parse(parser, lambda _: ["--layers", 5, "--hidden", 64, "--windows", 2, "--window", 32])
    if given.cpu_time:
        laser.search.runner.time = SimpleNamespace(perf_counter=time.process_time)
    if given.model:
        return bench(given.model, given)
    with tempfile.TemporaryDirectory() as directory:
        make(Path(directory), layers=given.layers, hidden=given.hidden)
        bench(directory, given)


def bench(name: str, given: argparse.Namespace) -> None:
    checkpoint, device = open_checkpoint(name), choose_device("cpu")
    if given.model:
        tokenizer = load_tokenizer(checkpoint.path)
        text = read_text(given.text) if given.text else default_text()
        calibration = cut_windows(text, tokenizer, length=given.window, limit=given.windows)
        held_out = cut_windows(text, tokenizer, length=given.window, limit=2, skip=given.windows)
    else:
        calibration, held_out = random_windows(given.windows, given.window, 1), random_windows(2, given.window, 2)
    layers = checkpoint.config["num_hidden_layers"]
    spread = tuple(range((layers - 1) % given.every // 2, layers, given.every))
    selection = Selection(layers=spread, roles=(given.role,), include=given.include)
    spectra = scan(checkpoint, selection, device=device)

    def attempt(cache: bool) -> tuple[SearchResult, LayeredModel]:
        model = LayeredModel(checkpoint, resident=0 if given.stream else None)
        model.losses(held_out.windows)  # warm: weights resident, kernels chosen
        found = search(
            model,
            spectra,
            [given.rule],
            Loss(calibration),
            [Loss(held_out)],
            selection=selection,
            accept=given.accept,
            device=device,
            cache=cache,
        )
        return found, model

    plain, model = attempt(False)
    clock = laser.search.runner.time.perf_counter
    start = clock()
    activations = model.embed(calibration.windows)
    model.score(activations, calibration.windows)
    ends = clock() - start
    del model
    fast, _ = attempt(True)
    decisions = [[(t.label, t.rule, t.d, t.se, t.accepted) for t in r.trials] for r in (plain, fast)]
    kind = "CPU" if given.cpu_time else "wall"
    kept = sum(t.accepted for t in fast.trials)
    count = len(fast.trials)
    # The first cached trial pays for the first states of every layer: part of the cost, so part of the sum.
    forwards = [sum(t.layer_forwards for t in r.trials) / count for r in (plain, fast)]
    seconds = [sum(t.seconds for t in r.trials) / count for r in (plain, fast)]
    print(
        f"{checkpoint.name}, {given.role} of layers {spread}, {given.rule}, {given.accept}, {count} trials, {kept} kept"
    )
    print(f"{calibration.tokens} tokens in {len(calibration.windows)} windows of {given.window}, float32, one process")
    print(
        f"layer passes per trial: plain {forwards[0]:.1f}, cached {forwards[1]:.1f}: {forwards[0] / forwards[1]:.2f} x"
    )
    print(f"{kind} seconds per trial: plain {seconds[0]:.3f}, cached {seconds[1]:.3f}: {seconds[0] / seconds[1]:.2f} x")
    print(f"embedding, norm and head alone: {ends:.3f} s, {100 * ends / seconds[0]:.0f} % of a plain trial")
    same = decisions[0] == decisions[1] and fast.plan == plain.plan and fast.held_out == plain.held_out
    print("decisions, changes and plans: " + ("the same to the last bit" if same else "DIFFERENT"))
    if not same:
        sys.exit(1)
    assert not given.smoke or (count >= 2 and forwards[1] < forwards[0]), (count, forwards)


def random_windows(count: int, length: int, seed: int) -> Windows:
    generator = np.random.default_rng(seed)
    cut = [Window(generator.integers(3, VOCABULARY, length), length - 1) for _ in range(count)]
    return Windows(tuple(cut), f"random tokens {seed}", "0" * 64, length, "windows", False, None)


if __name__ == "__main__":
    main()
