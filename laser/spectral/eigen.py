"""Eigenvalues and eigenvectors of a symmetric matrix on the host, by one of several routes.

    numpy      NumPy's LAPACK in float64: eigvalsh, eigh
    one-stage  NumPy's own OpenBLAS, called directly (openblas.py): reduction to tridiagonal form, its eigenvalues in
               float64, and only those eigenvectors that are asked for. In float64 and float32
    two-stage  the same with a reduction in two stages, which keeps no vectors: for eigenvalues alone

Torch's MKL is none of them: its last digits depend on where memory lies, so that two workers at once do not get the
bits of one; in float32 it also loses more digits than the stated error allows (docs/log).

Which one is fastest depends on the side p, on the machine, and on how many workers share its memory. DEFAULT holds what
was measured for docs/log; `laser devices --probe` measures here. Routes differ in the last bits, so that a choice which
is not the default is part of a record's device label.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from laser.errors import UsageError
from laser.spectral.openblas import LARGEST, OpenBlas, Real, Tridiagonal, find_openblas
from laser.spectral.unit import unit

Eigenvalues = NDArray[np.float64]  # (p,), ascending
Steps = tuple[tuple[int, str], ...]  # (from this side p on, this route), rising


@dataclass(frozen=True)
class Eigen:
    """Eigenvalues (p,), float64, ascending, and what gives the eigenvectors (p, k) of those with the numbers (k,)."""

    values: Eigenvalues
    vectors: Callable[[NDArray[np.intp]], Real]


@dataclass(frozen=True)
class Routes:
    """Which route is taken from which side on, for eigenvalues alone and for eigenvectors. The first side is 0."""

    values: Steps
    vectors: Steps

    def stated(self) -> str:
        """For a device label: "values:0=numpy,1448=two-stage vectors:0=numpy"."""
        told = ((what, ",".join(f"{p}={route}" for p, route in steps)) for what, steps in vars(self).items())
        return " ".join(f"{what}:{steps}" for what, steps in told)


SMALLEST_SIDE = 256  # side under which nothing is to be gained
LEAST_GAIN = 0.1
# From 2560 on two stages are faster, with one worker and with all (docs/log).
DEFAULT = Routes(
    values=((0, "numpy"), (SMALLEST_SIDE, "one-stage"), (2560, "two-stage")),
    vectors=((0, "numpy"), (SMALLEST_SIDE, "one-stage")),
)


def here(routes: Routes | None) -> Routes:
    """What is taken on this machine, which may lack a route of the default."""
    found: dict[str, Steps] = {}
    for what in ("values", "vectors"):
        steps: list[tuple[int, str]] = []
        for start, _ in getattr(routes or DEFAULT, what):
            route = taken(what, max(start, 2), routes)
            if not steps or steps[-1][1] != route:
                steps.append((start, route))
        found[what] = tuple(steps)
    return Routes(**found)


def values_route(p: int, routes: Routes | None = None) -> Callable[[Real], Eigenvalues]:
    """What gives the eigenvalues (p,), float64, ascending, of a symmetric G (p, p) in float64 or float32.

    routes: None for DEFAULT. Raises UsageError for a route that does not exist here; what is returned raises
    LinAlgError where LAPACK does not converge.
    """
    return VALUE_ROUTES[taken("values", p, routes)]


def vectors_route(p: int, routes: Routes | None = None) -> Callable[[Real], Eigen]:
    """As `values_route`, and eigenvectors in the precision of G."""
    return VECTOR_ROUTES[taken("vectors", p, routes)]


def choose(measured: Mapping[str, Mapping[str, Mapping[int, float]]]) -> Routes | None:
    """The routes that are fastest by measured["values" or "vectors"][route][side] seconds; None: those of DEFAULT.

    Another route than the default one has to be faster by LEAST_GAIN: the next measurement should choose alike.
    """
    found = Routes(*(_fastest(what, measured.get(what, {})) for what in ("values", "vectors")))
    return None if found == DEFAULT else found


def _fastest(what: str, seconds: Mapping[str, Mapping[int, float]]) -> Steps:
    """From side 256 on the best route of each measured side, up to half way (in logarithms) to the next one."""
    there = {route: table for route, table in seconds.items() if route in offered(what)}
    sides = sorted({p for table in there.values() for p in table})
    best: list[str] = []
    for p in sides:
        usual = taken(what, p, None)
        at = {route: table[p] for route, table in there.items() if p in table}
        first = min(at, key=lambda route: at[route])
        best.append(first if at[first] < at.get(usual, math.inf) * (1 - LEAST_GAIN) else usual)
    if best == [taken(what, p, None) for p in sides]:
        return getattr(DEFAULT, what)
    steps = [(0, "numpy")]
    for i, (p, route) in enumerate(zip(sides, best, strict=True)):
        if route != steps[-1][1]:
            steps.append((round(math.sqrt(sides[i - 1] * p)) if i else SMALLEST_SIDE, route))
    return tuple(steps)


def taken(what: str, p: int, routes: Routes | None) -> str:
    """The route for "values" or "vectors" at side p. One of the default that is missing here gives way to NumPy."""
    route = next(route for start, route in reversed(getattr(routes or DEFAULT, what)) if start <= p)
    if not 1 < p <= LARGEST:
        return "numpy"
    if route in offered(what):
        return route
    if routes:
        raise UsageError(f"there is no route {route} for eigen{what} here; try `laser devices --probe`")
    return "numpy"


def offered(what: str) -> tuple[str, ...]:
    """The routes for "values" or "vectors" that this machine has."""
    return tuple(route for route in ROUTE_TABLES[what] if route == "numpy" or find_openblas() is not None)


# --- routes -----------------------------------------------------------------------------------------------------------


def _numpy_values(G: Real) -> Eigenvalues:
    return np.linalg.eigvalsh(G).astype(np.float64)


def _numpy_vectors(G: Real) -> Eigen:
    values, vectors = np.linalg.eigh(G)
    return Eigen(values.astype(np.float64), lambda which: columns(vectors, which))


def _reduced(G: Real, stages: int) -> tuple[OpenBlas, Tridiagonal, Eigenvalues]:
    """G's tridiagonal form and its eigenvalues, from G in a unit: the squares that a reflection sums stay in range."""
    library = find_openblas()
    assert library is not None, "the route is offered only where it is"
    u = unit(float(np.max(np.abs(np.diagonal(G)))))
    T = library.tridiagonal(G if u == 1 else (G / u).astype(G.dtype), stages)
    return library, T, library.values(T) * u


def _one_stage_vectors(G: Real) -> Eigen:
    library, T, values = _reduced(G, 1)
    found: list[Real] = []  # of T: made when a vector is wanted, as many matrices are left as they are

    def vectors(which: NDArray[np.intp]) -> Real:
        if not found:
            found.append(library.vectors(T))
        return library.turn_back(T, np.array(columns(found[0], which), order="F"))

    return Eigen(values, vectors)


def columns(V: Real, which: NDArray[np.intp]) -> Real:
    """Columns number `which` of V (p, p), which rise."""
    return V[:, which[0] : which[-1] + 1] if neighbours(which) else V[:, which]


def neighbours(which: NDArray[np.intp]) -> bool:
    """Whether these are one range of columns, as in every plain cut: a slice then, without an index's copy."""
    return bool(len(which) and which[-1] - which[0] == len(which) - 1)


VALUE_ROUTES: Mapping[str, Callable[[Real], Eigenvalues]] = {
    "numpy": _numpy_values,
    "one-stage": lambda G: _reduced(G, 1)[2],
    "two-stage": lambda G: _reduced(G, 2)[2],
}
VECTOR_ROUTES: Mapping[str, Callable[[Real], Eigen]] = {
    "numpy": _numpy_vectors,
    "one-stage": _one_stage_vectors,
}
ROUTE_TABLES: Mapping[str, Mapping[str, object]] = {"values": VALUE_ROUTES, "vectors": VECTOR_ROUTES}
