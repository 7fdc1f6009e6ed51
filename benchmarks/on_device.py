#!/usr/bin/env python3
"""All that a GPU has to show, in one go and under a time limit each, for a machine that is lent for minutes.

    python benchmarks/on_device.py --out DIR [--device cuda] [--minutes 8] [--layers 4] [--steps facts,tests,...]

In this order: `facts` (what this torch does on this chip, see below), `tests` (tests/spectral with the device in the
fixture), `decomposition` (bench_decomposition beside torch's own svdvals and svd), `pass` (bench_pass on --layers
synthetic layers of Mixtral-8x7B's shapes), `search` (15 candidates on those layers, streamed in bfloat16). Each step
writes DIR/NN-NAME.log as it goes; DIR/summary.json and a last table say how each ended. A step that fails or outlasts
its limit does not keep the next from its turn. The exit code is 0 where all ended well.

The facts: products in 16 bits into float32; milliseconds of a Gram matrix by each way, of eigenvalues and eigenvectors;
how many matrices (p, p) the eigenproblem holds at its peak beside what `device_bytes` counts; matrices of p = 1024 by
1, 2, 4 and 8 workers with a stream each; copies from pageable and page-locked memory; a permutation, bit for bit that
of the host; kurtosis; one draw of the null; values in the metric of the data, with its root and with a kept one.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import smoke
import torch
from synthetic import Sizes, write_synthetic_mixtral

from laser.spectral.devices import (
    HOST,
    Device,
    choose_device,
    full_precision,
    in_float64,
    products_in_float32,
    sent,
    staged,
    synchronise,
)
from laser.spectral.factorise import eigensolver_slack, eigh_squares

HERE = Path(__file__).parent
# Minutes at the most, of eight together; what one does not need is there for the next.
LIMITS = {"facts": 1.5, "tests": 3.0, "decomposition": 1.5, "pass": 4.0, "search": 2.5}
CANDIDATES = 15
SMOKE = ("--steps", "facts,tests,search")  # the others have smoke runs of their own


# --- the steps --------------------------------------------------------------------------------------------------------


def commands(given: argparse.Namespace) -> dict[str, list[str]]:
    """The words of each step."""
    python, device = sys.executable, given.device
    own = [python, __file__, "--device", device, "--work", str(given.work), "--layers", str(given.layers)]
    own += ["--tiny"] if given.tiny else []
    shapes = "96x64,64x96" if given.tiny else "4096x4096,14336x4096,1024x4096"
    tests = [str(HERE.parent / "tests" / "spectral" / name) for name in (["test_recent.py"] if given.tiny else [""])]
    shrink = ["--shrink", "32", "--experts", "2"] if given.tiny else []
    made = ["--layers", str(given.layers), "--work", str(given.work), "--keep", *shrink]
    return {
        "facts": [*own, "--part", "facts"],
        "tests": [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        "decomposition": [
            *(python, str(HERE / "bench_decomposition.py"), "--device", device, "--shapes", shapes),
            *("--rank", "8" if given.tiny else "83", "--repeat", "2"),
        ],
        "pass": [python, str(HERE / "bench_pass.py"), "--device", device, *made],
        "search": [*own, "--part", "search"],
    }


def run(name: str, words: list[str], limit: float, log: Path) -> dict[str, Any]:
    """One step, its output in `log`; ended, with all that it started, where it takes more than `limit` seconds."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(HERE.parent), os.environ.get("PYTHONPATH", "")))}
    start = time.monotonic()
    with log.open("wb") as file:
        file.write(f"$ {' '.join(words)}\n".encode())
        file.flush()
        child = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, cwd=HERE.parent, env=environment, start_new_session=True
        )
        try:
            code: int | None = child.wait(max(limit, 1))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            code = None
    return {"step": name, "code": code, "seconds": round(time.monotonic() - start, 1), "limit": round(limit, 1)}


def drive(given: argparse.Namespace) -> int:
    given.out.mkdir(parents=True, exist_ok=True)
    end, found = time.monotonic() + 60 * given.minutes, list[dict[str, Any]]()
    wanted = given.steps.split(",")
    for number, (name, words) in enumerate(commands(given).items()):
        if name not in wanted:
            continue
        log = given.out / f"{number}-{name}.log"
        found.append(run(name, words, min(60 * LIMITS[name], end - time.monotonic()), log))
        (given.out / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
        print(log.read_text(errors="replace")[-3000:], flush=True)
    for each in found:
        ended = "out of time" if each["code"] is None else "well" if not each["code"] else f"with {each['code']}"
        print(f"{each['step']:14s} {ended:12s} {each['seconds']:6.1f} s of {each['limit']:.0f}")
    return int(any(each["code"] != 0 for each in found))


# --- facts ------------------------------------------------------------------------------------------------------------


def milliseconds(call: Callable[[], object], device: Device, repeat: int = 3) -> float:
    """The fastest of a few, after one that loads libraries."""
    taken = []
    for _ in range(repeat + 1):
        synchronise(device)
        start = time.perf_counter()
        call()
        synchronise(device)
        taken.append(time.perf_counter() - start)
    return 1000 * min(taken[1:])


def peak_squares(call: Callable[[], object], p: int, dtype: torch.dtype, device: Device) -> str:
    """How many matrices (p, p) were allocated on the device at the peak of `call`, what was there before left out."""
    if device.torch_device.type != "cuda":
        return "-"
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device.torch_device)
    before = torch.cuda.memory_allocated(device.torch_device)
    call()
    synchronise(device)
    return f"{(torch.cuda.max_memory_allocated(device.torch_device) - before) / p / p / dtype.itemsize:.2f}"


def facts(name: str, tiny: bool) -> None:
    from laser.spectral.data_metric import ROOTS, ByData, data_values
    from laser.spectral.gram import eigenvalues, gram
    from laser.spectral.measuring import chip
    from laser.spectral.permutation import null_largest, permuted
    from laser.spectral.spectrum import excess_kurtosis

    device = choose_device(name)
    single, double = replace(device, dtype=torch.float32), in_float64(device)
    where = device.torch_device
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {chip(device)}; {device.reason}")
    for storage in (torch.bfloat16, torch.float16):
        print(f"{storage} multiplied as it is, into float32: {products_in_float32(single, storage)}")
    generator = torch.Generator().manual_seed(0)

    def drawn(m: int, n: int) -> torch.Tensor:
        return (0.02 * torch.randn(m, n, generator=generator)).to(torch.bfloat16)

    with full_precision():
        for m, n in [(96, 64)] if tiny else [(14336, 4096), (4096, 4096), (1024, 4096)]:
            W, p = drawn(m, n).to(where), min(m, n)
            ways = {"float64": double, "float32": single}
            told = [f"Gram {label} {milliseconds(lambda d=d, W=W: gram(W, d), d):.1f}" for label, d in ways.items()]
            exact, cores = gram(W, double), gram(W, single)
            off = float(torch.linalg.vector_norm(cores.double() - exact) / torch.linalg.vector_norm(exact))
            for label, d in ways.items():
                G = gram(W, d)
                told.append(f"eigenvalues {label} {milliseconds(lambda d=d, G=G: eigenvalues(G, d), d):.1f}")
                for call in (torch.linalg.eigvalsh, torch.linalg.eigh):
                    held = peak_squares(lambda call=call, G=G: call(G), p, d.dtype, d)
                    told.append(f"{call.__name__.removeprefix('linalg_')} {label} holds {held} + 1")
            print(f"{m}x{n} ms: {', '.join(told)} (counted: {eigh_squares()}); Gram float32 off by {off:.1e}")
        if not device.host_eigensolver:
            print(f"eigenvalues in float32: the stated error holds {eigensolver_slack(single):g} times")
        p = 64 if tiny else 1024
        squares = [gram(drawn(2 * p, p).to(where), double) for _ in range(8)]
        for workers in (1, 2, 4, 8):
            print(f"p = {p}, {workers} workers: {_together(squares, workers, double):.2f} ms a matrix")
    m, n = (96, 64) if tiny else (14336, 4096)
    W = drawn(m, n)
    locked = staged(W, where)
    for label, x in (("pageable", W), ("page-locked" if locked is not W else "not locked", locked)):
        taken = milliseconds(lambda x=x: sent(x, where), device)
        print(f"copied from {label} memory: {W.nbytes / taken / 1e6:.1f} GB/s")
    there = W.to(where)
    same = all(torch.equal(permuted(W, 7, kind), permuted(there, 7, kind).cpu()) for kind in ("entries", "rows"))
    print(f"permuted as on the host, bit for bit: {same}; {milliseconds(lambda: permuted(there, 0), device):.1f} ms")
    off = abs(excess_kurtosis(there, device) - excess_kurtosis(W, HOST))
    print(f"kurtosis {milliseconds(lambda: excess_kurtosis(there, device), device):.1f} ms, off by {off:.1e}")
    print(f"one draw of the null {milliseconds(lambda: null_largest(there, 1, device), device, 1):.1f} ms")
    X = torch.randn(2 * n, n, generator=generator, dtype=torch.float64)
    metric = ByData("full", X.T @ X / len(X), len(X), key="on_device")
    del X
    ROOTS.clear()
    with_root = milliseconds(lambda: (ROOTS.clear(), data_values(W, metric, device)), device, 1)
    kept = milliseconds(lambda: data_values(W, metric, device), device, 1)
    print(f"values in the metric of the data: {with_root:.0f} ms, {kept:.0f} ms with a root that is there")
    assert same, "the permutation differs from the host's"


def _together(squares: list[torch.Tensor], workers: int, device: Device) -> float:
    """Milliseconds for the eigenvalues of one of them, by so many threads, each with a stream of its own."""
    from laser.engine.crew import own_stream
    from laser.spectral.gram import eigenvalues

    def work(mine: list[torch.Tensor]) -> None:
        with own_stream(device):
            for G in mine:
                eigenvalues(G, device)

    def together() -> None:
        with ThreadPoolExecutor(workers) as pool:
            for done in [pool.submit(work, squares[i::workers]) for i in range(workers)]:
                done.result()

    return milliseconds(together, device, 2) / len(squares)


# --- search -----------------------------------------------------------------------------------------------------------


def find(name: str, work: Path, tiny: bool, layers: int) -> None:
    from laser.checkpoint.reader import open_checkpoint
    from laser.evaluation.objective import Loss
    from laser.evaluation.streaming import LayeredModel
    from laser.evaluation.text import Window, Windows
    from laser.pipeline import scan
    from laser.searching.search import search_plan
    from laser.selection import Selection

    device = choose_device(name)
    if not (work / "model" / "config.json").exists():  # the step before has made it, if it was asked for
        write_synthetic_mixtral(work / "model", layers, 2 if tiny else 8, Sizes().over(32 if tiny else 1))
    checkpoint = open_checkpoint(work / "model")
    count, length = (2, 16) if tiny else (4, 512)
    generator = np.random.default_rng(0)

    def windows(of: str) -> Windows:
        ids = [generator.integers(3, checkpoint.config["vocab_size"], length + 1) for _ in range(count)]
        return Windows(tuple(Window(i, length) for i in ids), of, "0" * 64, length, "windows", False, None)

    start = time.perf_counter()
    selection = Selection(roles=("q", "w1"))
    spectra = scan(checkpoint, selection, device=device)
    middle = time.perf_counter()
    model = LayeredModel(checkpoint, dtype="bfloat16", device=device.torch_device)
    found = search_plan(
        model, spectra, ["fraction:0.5"], Loss(windows("random")), [Loss(windows("other random"))],
        selection=selection, lowest_snr=CANDIDATES, device=device,
    )  # fmt: skip
    synchronise(device)
    end = time.perf_counter()
    loads = getattr(model, "loads", "?")
    print(f"{checkpoint.config['num_hidden_layers']} layers, {len(spectra.values)} spectra in {middle - start:.1f} s")
    print(f"{len(found.trials)} trials of {count} windows of {length} in {end - middle:.1f} s; pieces loaded: {loads}")
    for trial in found.trials:
        print(f"  {trial.label}: d {trial.d:+.5f} +- {trial.se:.5f}{', kept' if trial.accepted else ''}")
    assert found.trials, "nothing was tried"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".demo/on-device"))
    parser.add_argument("--work", type=Path, help="for the synthetic model; by default a folder in --out")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", default=",".join(LIMITS))
    parser.add_argument("--tiny", action="store_true", help="matrices of 96 x 64, to try the script")
    parser.add_argument("--part", choices=("facts", "search"), help=argparse.SUPPRESS)
    given = smoke.parse(
        parser,
        lambda folder: ["--out", folder / "out", "--device", "cpu", "--layers", 1, "--tiny", "--minutes", 4, *SMOKE],
    )
    given.work = given.work or given.out / "work"
    if given.part == "facts":
        return facts(given.device, given.tiny)
    if given.part == "search":
        return find(given.device, given.work, given.tiny, given.layers)
    sys.exit(drive(given))


if __name__ == "__main__":
    main()
