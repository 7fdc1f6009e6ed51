"""Measure a Probe: a few products, eigenproblems and copies on a device. Each is the faster of two runs.

On the host everything is measured with one BLAS thread, as a worker has. On a device without LAPACK the probe also
decides the method: eigenvectors on the host, or the projector, whichever takes less time there.
"""

from __future__ import annotations

import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from laser.errors import RecordError, UsageError
from laser.spectral.devices import (
    Device,
    available,
    exact_products,
    free_bytes,
    full_precision,
    host_threads,
    sent,
    staged,
    synchronise,
)
from laser.spectral.eigen import ROUTE_TABLES, Routes, choose, offered
from laser.spectral.factorise import METHODS
from laser.spectral.gram import eigenvalues, eigenvectors, factors_by_gram, gram
from laser.spectral.permutation import null_largest
from laser.spectral.probe import Probe
from laser.spectral.projector import matrix_sign
from laser.spectral.shrinkage import Gains

HOST_SIDES = (256, 768, 1536)  # some five seconds on one core
ROUTE_SIDES = (1024, 2048, 4096)  # half a minute on two cores
DEVICE_SIDES = (1024, 2048, 4096)
START_UP = (1024,)  # what a decision at start-up is made on, where nothing was measured before
COPIED = 256 * 2**20  # bytes, for copies and for the disk
GAP = 1e-5  # of the projector's measurement, relative: 11 to 13 steps, as for the bulk of a trained matrix


def measure_device(
    device: Device, sides: tuple[int, ...] | None = None, disk: Path | None = None, copied: int = COPIED
) -> Probe:
    """The constants of `device`, measured now. `disk`: a directory whose disk is measured too. Not saved."""
    route_sides = sides or ROUTE_SIDES
    sides = sides or (HOST_SIDES if device.host_blas else DEVICE_SIDES)
    p = max(sides)
    W = torch.randn(2 * p, p, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).to(device.torch_device)
    busy = _busy(device, max(route_sides)) if device.host_blas else 1
    # host_threads(1): a small matrix's share, which is one thread
    with full_precision(), host_threads(1) if device.host_blas else nullcontext():
        routes = measure_routes(device, route_sides, busy) if device.host_blas else {}
        device = replace(device, routes=choose(routes))
        G = gram(W, device)
        product = 2 * 2 * p**3 / _seconds(lambda: gram(W, device), device)
        projection = _projection(W, device)
        corners = {side: G[:side, :side].clone() for side in sides}  # Gram matrices too
        values = {n: _seconds(lambda n=n: eigenvalues(corners[n], device), device) for n in sides}
        vectors = {n: _seconds(lambda n=n: _half(corners[n], device), device) for n in sides}
        # On the host, where it is no use, one size is enough to compare.
        signed = [n for n in sides if n <= 1024 or not device.host_blas]
        signs = {n: _sign_seconds(corners[n], device) for n in signed}
        null = {2 * n * n: _seconds(lambda n=n: null_largest(W[: 2 * n, :n], 1, device), device) for n in sides}
    to_device, to_host = _copy_rates(device, copied)
    read, write = _disk_rates(disk, copied) if disk else (None, None)
    return Probe(
        device=device.label,
        name=chip(device),
        torch=torch.__version__,
        threads=1 if device.host_blas else torch.get_num_threads(),
        product=product,
        eigenvalues=values,
        eigenvectors=vectors,
        projector=signs,
        to_device=to_device,
        to_host=to_host,
        disk_read=read,
        disk_write=write,
        exact_products=exact_products(device.torch_device),
        projection=projection,
        null=null,
        measured=time.strftime("%Y-%m-%d"),
        routes=routes,
        busy=busy,
    )


def measure_routes(device: Device, sides: tuple[int, ...], busy: int) -> dict[str, dict[str, dict[int, float]]]:
    """Seconds of every route for eigenvalues and for half of the eigenvectors, with `busy` workers at work.

    NumPy's own functions make the same calls as the route one-stage, and are asked only without it. A route that takes
    half as long again as the best one is not asked at the next side.
    """
    found: dict[str, dict[str, dict[int, float]]] = {what: {} for what in ROUTE_TABLES}
    asked = {what: set(offered(what)) for what in ROUTE_TABLES}
    for what, routes in asked.items():
        routes -= {"numpy"} if "one-stage" in routes else set()
        for p in sides:
            W = torch.randn(2 * p, p, generator=torch.Generator().manual_seed(0))
            G = gram(W, device)
            solve = eigenvalues if what == "values" else _half
            taken = {}
            for route in sorted(routes):
                there = replace(device, routes=Routes(((0, route),), ((0, route),)))
                taken[route] = found[what].setdefault(route, {})[p] = _seconds_at_once(partial(solve, G, there), busy)
            routes = {route for route in routes if taken[route] < 1.5 * min(taken.values())}
    return found


def chosen_routes(device: Device, path: Path | None = None) -> Routes | None:
    """The host's routes as this machine's probe has them; None for the default ones, and where there is no probe.

    path: as for `choose_method`. What was measured on another chip, by a home directory that machines share, says
    nothing here.
    """
    if not device.host_blas:
        return None
    try:
        probe = Probe.load(device.label, path)
    except RecordError:  # told by `laser devices`; a default is as right
        return None
    return choose(probe.routes) if probe and probe.name == chip(device) else None


def choose_method(method: str, device: Device, path: Path | None = None) -> tuple[str, str]:
    """`method`, or for "auto" the one to use on this device; and why.

    Where the device has LAPACK, or is the host, `gram`. On Apple MPS the probe decides; one that is missing is measured
    at one size and kept, so that the next run decides alike. path: of the record, by default the user's cache, which
    may be missing, damaged or full. Raises UsageError for a method that does not exist.
    """
    if method not in ("auto", *METHODS):
        raise UsageError(f"no method is called {method!r}; try --method {'|'.join(METHODS)}")
    if method != "auto":
        return method, "asked for"
    if device.host_blas or not device.host_eigensolver:
        return "gram", "eigenvectors by LAPACK where the products are"
    try:
        probe = Probe.load(device.label, path)
    except RecordError:
        probe = None
    if probe is None or not probe.projector:
        probe = measure_device(device, START_UP)
        with suppress(OSError):
            probe.save(path)
    p = max(probe.projector.keys() & probe.eigenvectors.keys(), default=0)
    if not p:
        return "gram", "the projector was not measured here"
    # Both want eigenvalues: the projector to know where to cut.
    sign = probe.eigenvalues.get(p, 0.0) + probe.projector[p]
    message = f"at p = {p} the projector takes {sign:.3g} s and eigenvectors on the host {probe.eigenvectors[p]:.3g} s"
    return ("projector" if sign < probe.eigenvectors[p] else "gram"), message


def chip(device: Device) -> str:
    """The name of the device's chip, in words."""
    base = device.torch_device.type
    if base == "cpu":
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        except (OSError, StopIteration):
            return platform.processor() or platform.machine()
    return torch.cuda.get_device_name(device.torch_device) if base == "cuda" else available()[base].what


def _seconds(call: Callable[[], object], device: Device) -> float:
    """Seconds of the faster of two calls: the first one also loads libraries and fills caches."""
    taken = []
    for _ in range(2):
        synchronise(device)
        start = time.perf_counter()
        call()
        synchronise(device)
        taken.append(time.perf_counter() - start)
    return max(min(taken), 1e-9)


def _half(G: torch.Tensor, device: Device) -> torch.Tensor:
    """The leading half of the eigenvectors of G (p, p): more than that no cut needs."""
    p = len(G)
    return eigenvectors(G, device)[1](np.arange(p - p // 2, p))


def _busy(device: Device, p: int) -> int:
    """How many workers the host has for matrices of side p: as many as cores, and as fit into half of the memory."""
    free = free_bytes(device)
    room = math.inf if free is None else free // 2 // (5 * p * p * device.dtype.itemsize)
    return max(1, int(min(torch.get_num_threads(), room)))


def _seconds_at_once(call: Callable[[], object], busy: int) -> float:
    """Seconds until `busy` threads have each made the call; the faster of two where that is short."""
    taken: list[float] = []
    while not taken or (len(taken) < 2 and taken[0] < 1):
        with ThreadPoolExecutor(busy) as pool:
            start = time.perf_counter()
            for done in [pool.submit(_alone, call) for _ in range(busy)]:
                done.result()
            taken.append(time.perf_counter() - start)
    return max(min(taken), 1e-9)


def _alone(call: Callable[[], object]) -> None:
    torch.set_num_threads(1)  # OpenMP keeps it per thread
    call()


def _projection(W: torch.Tensor, device: Device) -> float:
    """Operations a second of cutting W (m, n) to half of its rank, the eigenvectors being known."""
    factors, half = factors_by_gram(W, device), min(W.shape) // 2
    return 4 * W.shape[0] * W.shape[1] * half / _seconds(lambda: factors.cut(Gains(half)), device)


def _sign_seconds(G: torch.Tensor, device: Device) -> float:
    size = float(torch.diagonal(G).mean())
    return _seconds(lambda: matrix_sign(G, size**0.5, GAP * size), device)


def _copy_rates(device: Device, copied: int) -> tuple[float | None, float | None]:
    """Bytes a second to the device, from such memory as a checkpoint is read into for it, and back."""
    if device.host_blas:
        return None, None
    here = staged(torch.zeros(copied, dtype=torch.uint8), device)
    there = sent(here, device.torch_device)
    return copied / _seconds(lambda: sent(here, device.torch_device), device), copied / _seconds(there.cpu, device)


def _disk_rates(directory: Path, copied: int) -> tuple[float, float]:
    """Bytes a second, read and written, of one file in `directory`, which is removed again.

    The write ends with fsync; before the read the file's pages are dropped from the cache where the system allows it.
    """
    chunk = os.urandom(2**20)  # not zeros, which some file systems do not store
    with tempfile.TemporaryFile(dir=directory) as file:
        start = time.perf_counter()
        for _ in range(copied // len(chunk)):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        begun = time.perf_counter()
        while file.read(len(chunk)):
            pass
        return copied / (time.perf_counter() - begun), copied / (written - start)
