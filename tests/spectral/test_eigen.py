"""Routes of the host's eigenproblem: laws that each has to keep, in both precisions, and which one is taken."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from laser.engine.crew import quiet
from laser.errors import UsageError
from laser.spectral import eigen, openblas
from laser.spectral.devices import HOST, Device
from laser.spectral.eigen import (
    DEFAULT,
    VALUE_ROUTES,
    VECTOR_ROUTES,
    Routes,
    here,
    offered,
    taken,
    values_route,
    vectors_route,
)
from laser.spectral.gram import factors_by_gram, gram, tall, values_by_gram
from laser.spectral.openblas import find_openblas
from laser.spectral.shrinkage import Gains
from laser.spectral.spectrum import value_errors

SINGLE = replace(HOST, dtype=torch.float32)
DTYPES = (np.dtype(np.float64), np.dtype(np.float32))
EVERY = [(what, dtype, route) for what in ("values", "vectors") for dtype in DTYPES for route in offered(what)]
SIDES = (2, 3, 65, 300)  # the last ones need more than one block of any reduction
needs_openblas = pytest.mark.skipif(find_openblas() is None, reason="NumPy computes with another BLAS here")


def gram_of(p: int, rank: int, dtype: np.dtype, scale: float = 1.0) -> np.ndarray:
    A = np.random.default_rng(p).standard_normal((max(rank, 1), p)) * scale
    return (A.T @ A).astype(dtype)


@pytest.mark.parametrize(("what", "dtype", "route"), EVERY)
@pytest.mark.parametrize("p", SIDES)
def test_every_route_keeps_the_laws(what: str, dtype: np.dtype, route: str, p: int) -> None:
    """Against NumPy's eigenvalues; trace; V^T V = I and G V = V diag(values), for a part of the vectors as well."""
    for rank in (2 * p, p // 2):  # half of the eigenvalues are 0 in the second
        G = gram_of(p, rank, dtype)
        truth = np.linalg.eigvalsh(G.astype(np.float64))
        allowed = 2 * p**0.5 * np.finfo(dtype).eps * truth[-1]  # what spectrum.py states
        found = VALUE_ROUTES[route](G) if what == "values" else VECTOR_ROUTES[route](G).values
        assert found.dtype == np.float64 and (np.diff(found) >= 0).all()
        assert np.abs(found - truth).max() <= allowed
        assert abs(found.sum() - np.trace(G.astype(np.float64))) <= p * allowed
        if what == "values":
            continue
        solved = VECTOR_ROUTES[route](G)
        for which in (np.arange(p), np.arange(p - p // 2, p), np.array([0, p - 1]), np.arange(0)):
            V = solved.vectors(which)
            assert V.dtype == dtype and V.shape == (p, len(which))
            if len(which):
                assert np.abs(V.T @ V - np.eye(len(which))).max() <= 8 * p * np.finfo(dtype).eps
                assert np.abs(G @ V - V * solved.values[which]).max() <= 4 * allowed


@pytest.mark.parametrize(("what", "dtype", "route"), EVERY)
def test_a_route_gives_the_same_bits_again_and_leaves_its_matrix_alone(what: str, dtype: np.dtype, route: str) -> None:
    G = gram_of(200, 400, dtype)
    before, which = G.copy(), np.arange(150, 200)
    if what == "values":
        assert (VALUE_ROUTES[route](G) == VALUE_ROUTES[route](G)).all()
    else:
        one, other = VECTOR_ROUTES[route](G), VECTOR_ROUTES[route](G)
        assert (one.vectors(which) == other.vectors(which)).all() and (one.values == other.values).all()
        assert (one.vectors(which) == one.vectors(which)).all()  # asked again, as by a second cut
    assert (G == before).all()


@pytest.mark.parametrize(("what", "dtype", "route"), EVERY)
def test_two_workers_at_once_get_the_bits_of_one(what: str, dtype: np.dtype, route: str) -> None:
    which = np.arange(200, 300)

    def solve(p: int) -> np.ndarray:
        G = gram_of(p, 2 * p, dtype)
        return VALUE_ROUTES[route](G) if what == "values" else VECTOR_ROUTES[route](G).vectors(which)

    with quiet(HOST), ThreadPoolExecutor(2) as pool:
        alone = [solve(p) for p in (300, 350)]
        for one, other in zip(alone * 4, pool.map(solve, (300, 350) * 4), strict=True):
            assert (one == other).all()


@needs_openblas
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [2.0**-16, 2.0**14])
def test_the_unit_keeps_squares_in_range(dtype: np.dtype, scale: float) -> None:
    """A power of two in, the same bits out, where float32 alone would sum squares of 2^56 or 2^-64."""
    G = gram_of(300, 900, dtype)
    big = (G * scale * scale).astype(dtype)
    for route in ("one-stage", "two-stage"):
        assert (VALUE_ROUTES[route](big) == VALUE_ROUTES[route](G) * scale * scale).all()
    which = np.arange(100)
    assert (VECTOR_ROUTES["one-stage"](big).vectors(which) == VECTOR_ROUTES["one-stage"](G).vectors(which)).all()


@needs_openblas
def test_a_failure_of_lapack_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN reaches no route (`trace_of`), so that the code LAPACK returns is injected."""
    library, true = find_openblas(), openblas.OpenBlas._call
    assert library is not None

    def call(self: openblas.OpenBlas, name: str, dtype: np.dtype, *arguments: object) -> None:
        true(self, name, dtype, *arguments)
        if name == "sterf":
            arguments[-1].value = 3  # pyright: ignore[reportAttributeAccessIssue]

    # No matrix is known that sterf gives up on.
    monkeypatch.setattr(openblas.OpenBlas, "_call", call)
    with pytest.raises(np.linalg.LinAlgError, match="sterf failed with info 3"):
        VALUE_ROUTES["one-stage"](gram_of(20, 40, DTYPES[0]))


# --- which one is taken -----------------------------------------------------------------------------------------------


@needs_openblas
def test_the_default_goes_by_the_side() -> None:
    assert here(None) == DEFAULT
    assert [taken("values", p, None) for p in (1, 255, 256, 2559, 2560, 10**5)] == [
        *("numpy", "numpy", "one-stage", "one-stage", "two-stage", "numpy"),
    ]
    assert [taken("vectors", p, None) for p in (255, 256, 4096)] == ["numpy", "one-stage", "one-stage"]


def test_a_chosen_route_is_taken_and_never_replaced_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = Routes(((0, "numpy"), (100, "two-stage")), ((0, "numpy"),))
    # A NumPy with another BLAS.
    monkeypatch.setattr(eigen, "find_openblas", lambda: None)
    G = gram_of(300, 600, DTYPES[0])
    assert taken("values", 300, None) == "numpy"  # one of the default gives way: nothing was recorded
    assert (values_route(len(G))(G) == np.linalg.eigvalsh(G)).all()
    assert here(None).stated() == "values:0=numpy vectors:0=numpy"
    with pytest.raises(UsageError, match=r"no route two-stage .*laser devices --probe"):
        values_route(len(G), chosen)(G)


@needs_openblas
def test_the_device_carries_its_routes_to_the_gram_matrix() -> None:
    W = torch.from_numpy(np.random.default_rng(0).standard_normal((400, 300)))
    G = gram(W, HOST).numpy()
    for route in offered("values"):
        device = replace(HOST, routes=Routes(((0, route),), DEFAULT.vectors))
        expected = np.sqrt(np.maximum(VALUE_ROUTES[route](G)[::-1], 0))
        assert np.allclose(values_by_gram(W, device), expected, rtol=1e-15)
    one = vectors_route(len(G), Routes(DEFAULT.values, ((0, "one-stage"),)))(G).vectors(np.arange(5))
    assert (one == VECTOR_ROUTES["one-stage"](G).vectors(np.arange(5))).all()


# --- float32 on the host ----------------------------------------------------------------------------------------------


@needs_openblas
def test_float32_solves_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """No float64 loop of NumPy's and no double routine but the last step on the tridiagonal's values."""
    called: list[str] = []
    true = openblas.OpenBlas._call

    def call(self: openblas.OpenBlas, name: str, dtype: np.dtype, *arguments: object) -> None:
        called.append(f"{name} {dtype}")
        true(self, name, dtype, *arguments)

    # Nothing that comes back tells which routine was called.
    monkeypatch.setattr(openblas.OpenBlas, "_call", call)
    for solver in ("eigh", "eigvalsh"):
        monkeypatch.setattr(np.linalg, solver, lambda *_: pytest.fail("in float64"))
    W = torch.randn(600, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    values_by_gram(W, SINGLE)
    factors_by_gram(W, SINGLE).cut(Gains(40))
    assert {c for c in called if c.endswith("float64")} == {"sterf float64"}
    assert {"syrk float32", "sytrd float32", "stedc float32", "ormtr float32"} <= set(called)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(600, 300), (300, 600), (1100, 1030)])
@pytest.mark.parametrize("noise", [True, False])
def test_float32_keeps_the_stated_error(shape: tuple[int, int], noise: bool) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    W = W if noise else W + 3 * torch.outer(torch.randn(shape[0]), torch.randn(shape[1]))
    W = W.bfloat16()
    exact = values_by_gram(W, HOST)
    for route in set(offered("values")) - {"numpy"}:
        found = values_by_gram(W, replace(SINGLE, routes=Routes(((0, route),), DEFAULT.vectors)))
        assert (np.abs(found - exact) <= value_errors(exact, 2.0**-23)).all()
        assert np.abs(found - exact).max() > 1e-12 * exact[0]  # or float64 did it
    assert (np.abs(factors_by_gram(W, SINGLE).singular_values - exact) <= value_errors(exact, 2.0**-23)).all()


# --- the Gram matrix --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (700, 520), (520, 700), (2100, 600), (600, 4200), (1, 1), (3, 1)])
@pytest.mark.parametrize("device", [HOST, SINGLE], ids=["float64", "float32"])
def test_gram_is_the_product_whole_and_symmetric(
    shape: tuple[int, int], device: Device, library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not library:  # a NumPy with another BLAS
        # Looked up where it is used.
        monkeypatch.setattr("laser.spectral.gram.find_openblas", lambda: None)
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    A = tall(W).double()
    G, truth = gram(W, device), A.T @ A
    assert torch.equal(G, G.T)
    assert (G.double() - truth).abs().max() <= 16 * torch.finfo(device.dtype).eps * truth.abs().max()


@needs_openblas
def test_gram_takes_a_slice_of_a_larger_matrix() -> None:
    whole = torch.randn(900, 800, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for W in (
        whole[100:400, 50:700],
        whole.T[100:400, 50:700],
        whole[::2, :30],
        whole[::2, ::2],
        whole[:1].expand(9, 800),
    ):
        A = tall(W)
        assert torch.allclose(gram(W, HOST), A.T @ A, rtol=0, atol=1e-10)
