"""Parallel analysis: the largest singular value of a matrix once its structure is destroyed.

Permuting the entries keeps their distribution, heavy tails and all, and destroys everything that rank reduction could
want to keep (Horn 1965, Dobriban 2020). Only the largest singular value is needed, so Lanczos iteration replaces a
factorisation: some forty products with W against p^3.

The order of the entries is a function of the seed alone, in integers, and so the same on every device, and under every
version of torch and NumPy. The entries are numbered along a grid of a rows and b columns, a the largest divisor of
their number up to its root. Then by turns a place's row moves on by an amount that only its column decides, and its
column by one that only its row decides, both modulo the grid:

    row + f_1(column),  column + g_2(row),  row + f_3(column),  ...  after FEISTEL_ROUNDS: where the entry comes from

Each step can be undone, so this is a permutation: a Feistel network with addition (Luby and Rackoff 1988; Black and
Rogaway 2002 for sides that are no powers of two). The amounts come from SplitMix64 (Steele, Lea and Flood 2014). They
are tables of a or b numbers, made on the host; a device looks them up, adds, and looks the entry up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

from laser.errors import NumericalError, UsageError
from laser.spectral.devices import Device, full_precision, on_device_or_host
from laser.spectral.gram import moved, tall, to_host
from laser.spectral.unit import in_unit

Product = Callable[[NDArray[np.float64]], NDArray[np.float64]]
PERMUTATIONS = ("entries", "rows")
# Which order a seed gives, for records: 2 is the one above; 1, of records that say nothing, was NumPy's shuffle.
NULL_ORDER = 2
# The largest singular value of permuted stripes, blocks, chequers and sorted entries is off with 3 rounds, by up to 25
# standard errors of 300 draws; with 4 sometimes by 2; with 6 it is that of NumPy's shuffle (docs/log).
FEISTEL_ROUNDS = 6
GRID_PLACES = {"cpu": 1 << 16}  # worked out at a time: on the host what stays in a core's cache
PLACES_ELSEWHERE = 1 << 22
SMALL_SIDE = 16  # up to this p a factorisation is cheaper than an iteration, which needs p > 2 anyway
VECTORS = 12  # of Lanczos: as many products as with 20 for a permuted matrix, and 13 for 21 in the data's metric
TOLERANCE = 1e-6  # relative, of the squared value; the null's own spread is p^(-2/3), 4e-3 at p = 4096


def permuted(W: torch.Tensor, seed: int, kind: str = "entries") -> torch.Tensor:
    """W (m, n) with its entries in random order, over the matrix or within each row (`rows`); where W is, in its dtype.

    `rows` keeps each row's variance and is the null of noise whose rows differ. The same seed gives the same order.
    Raises UsageError for another kind.
    """
    if kind not in PERMUTATIONS:
        raise UsageError(f"no permutation is called {kind!r}; try one of {', '.join(PERMUTATIONS)}")
    W = W.detach().contiguous()
    out = torch.empty_like(W)
    if kind == "entries":
        flat, flat_out = W.view(-1), out.view(-1)
        for start, sources in places(W.numel(), seed, W.device):
            flat_out[start : start + len(sources)] = torch.index_select(flat, 0, sources)
    else:
        for start, columns in columns_by_row(W.shape[0], W.shape[1], seed):
            stop = start + len(columns)
            out[start:stop] = torch.gather(W[start:stop], 1, torch.from_numpy(columns).to(W.device))
    return out


# --- the order of the entries -----------------------------------------------------------------------------------------


def places(count: int, seed: int, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
    """From which place of `count` each comes, in pieces: the first place of a piece, and the sources (k,) of it."""
    a, b = grid(count)
    dtype = torch.int32 if count < 2**31 else torch.int64  # half as much to move

    def on_device(numbers: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(numbers).to(dtype).to(device)

    # The amounts are added up as they are, and the tables repeat themselves: that spares reducing after each step.
    sides = (b, a) * FEISTEL_ROUNDS
    table = [on_device(np.tile(row[: sides[i]], 1 + (i + 1) // 2)) for i, row in enumerate(amounts(seed, a, b))]
    first_of_row = on_device(np.arange((1 + (FEISTEL_ROUNDS + 1) // 2) * a) % a * b)
    column_of = on_device(np.arange((1 + FEISTEL_ROUNDS // 2) * b) % b)
    rows = max(GRID_PLACES.get(device.type, PLACES_ELSEWHERE) // b, 1)
    columns = torch.arange(b, dtype=dtype, device=device)
    for start in range(0, a, rows):
        numbers = torch.arange(start, min(start + rows, a), dtype=dtype, device=device)
        row = (numbers.view(-1, 1) + table[0]).view(-1)  # the columns of the first step are 0, 1, ...
        column = (torch.index_select(table[1], 0, row).view(-1, b) + columns).view(-1)
        for step in range(2, FEISTEL_ROUNDS):
            if step % 2 == 0:
                row.add_(torch.index_select(table[step], 0, column))
            else:
                column.add_(torch.index_select(table[step], 0, row))
        yield start * b, torch.index_select(first_of_row, 0, row).add_(torch.index_select(column_of, 0, column))


def grid(count: int) -> tuple[int, int]:
    """(a, b), a * b = count, a the largest divisor up to the root."""
    low = np.arange(1, math.isqrt(count) + 1)
    a = int(low[count % low == 0][-1]) if count else 1
    return a, count // a


def amounts(seed: int, a: int, b: int) -> NDArray[np.int64]:
    """(FEISTEL_ROUNDS, b) by how much a place moves on in each step: by turns f (b,), below a, and g, below b, of
    which a are used."""
    steps = np.arange(FEISTEL_ROUNDS, dtype=np.uint64)[:, None]
    keys = split_mix(split_mix(np.array([seed], dtype=np.uint64)) + steps)
    high = split_mix(keys ^ np.arange(b, dtype=np.uint64)) >> np.uint64(32)
    limits = np.where(steps % np.uint64(2) == 0, np.uint64(a), np.uint64(b))  # below 2^32
    return (high * limits >> np.uint64(32)).astype(np.int64)


def columns_by_row(m: int, n: int, seed: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """From which column of its row each entry of (m, n) comes, in pieces (rows, n): columns sorted by their SplitMix64.

    The lowest bits of what is sorted are the column, which settles ties and is what is left of it.
    """
    bits = np.uint64(max(n - 1, 1).bit_length())
    mask, columns = (np.uint64(1) << bits) - np.uint64(1), np.arange(n, dtype=np.uint64)
    key = split_mix(split_mix(np.array([seed], dtype=np.uint64)) + np.uint64(FEISTEL_ROUNDS))  # none of `amounts`
    rows = max(GRID_PLACES["cpu"] // max(n, 1), 1)
    for start in range(0, m, rows):
        numbers = np.arange(start, min(start + rows, m), dtype=np.uint64)
        mixed = split_mix(key ^ split_mix(numbers)[:, None] ^ columns) & ~mask | columns
        mixed.sort(axis=1)
        yield start, (mixed & mask).astype(np.int64)


def split_mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 of states `x`: one output each, modulo 2^64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# --- the largest singular value ---------------------------------------------------------------------------------------


def largest_singular_value(W: torch.Tensor, device: Device) -> float:
    """s_1 of W (m, n), to a relative 1e-6 or so (Lanczos on the Gram matrix, never formed; a fixed start vector).

    Raises NumericalError where the iteration does not settle.
    """
    W, u = in_unit(W)
    return on_device_or_host(lambda where: _largest(W, where), device) * u


def _largest(W: torch.Tensor, device: Device) -> float:
    A = moved(tall(W), device.torch_device, torch.float32)  # (q, p)
    p = A.shape[1]
    if not A.any():  # Lanczos would have no direction to start in
        return 0.0
    if p <= SMALL_SIDE:
        small = to_host(A)
        return float(np.sqrt(max(np.linalg.eigvalsh(small.T @ small)[-1], 0.0)))

    def product(x: NDArray[np.float64]) -> NDArray[np.float64]:
        column = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32).reshape(p)).to(A.device)
        with full_precision():
            return to_host(A.T @ (A @ column))

    return float(np.sqrt(max(largest_eigenvalue(product, p), 0.0)))


def largest_eigenvalue(product: Product, side: int) -> float:
    """The largest eigenvalue of the symmetric matrix, not 0, whose `product` with a vector (side,) is given.

    To TOLERANCE, by Lanczos iteration from a fixed start. Raises NumericalError where it does not settle.
    """
    start = np.random.default_rng(0).standard_normal(side)
    operator = LinearOperator((side, side), matvec=product, dtype=np.float64)  # pyright: ignore[reportCallIssue]
    try:  # SciPy's stubs take the default 0 for the type of tol
        value = eigsh(operator, k=1, v0=start, ncv=VECTORS, tol=TOLERANCE, return_eigenvectors=False)  # pyright: ignore
    except ArpackError as error:
        raise NumericalError(f"the largest singular value did not settle ({error}); try --device cpu") from error
    return float(value[0])


def null_largest(W: torch.Tensor, draws: int, device: Device) -> NDArray[np.float64]:
    """(draws,) largest singular values of W (m, n) with its entries permuted, one per seed 0, 1, ...

    Permuted where W is, and on the host where the device fails.
    """
    W, u = in_unit(W)

    def drawn(seed: int, where: Device) -> float:
        return _largest(permuted(W.cpu() if where.host_blas else W, seed), where)

    return np.array(
        [on_device_or_host(lambda where, seed=seed: drawn(seed, where), device) * u for seed in range(draws)]
    )
