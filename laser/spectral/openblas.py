"""NumPy's own OpenBLAS, called directly for what NumPy does not pass on.

NumPy solves eigenproblems in float64 only, computes all eigenvectors or none, and reduces in one stage. The OpenBLAS
that its wheels bring has float32, the two-stage reduction, and the parts of an eigenproblem one by one. ctypes lets go
of Python's lock meanwhile, and the number of threads is the one that NumPy's own calls obey.

Where NumPy has another BLAS (Accelerate, MKL), or this one lacks a routine, `find_openblas()` is None and NumPy does
the work.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

Real = NDArray[Any]  # float64 or float32
# As the wheels of NumPy, conda and Linux distributions name them.
NAMES = tuple((prefix, suffix) for prefix in ("scipy_", "") for suffix in ("_64_", "64_", "_"))
NEEDED = ("dsyrk", "ssyrk", *(f"{x}{name}" for x in "ds" for name in ("sytrd", "sytrd_2stage", "stedc", "ormtr")))
NEEDED += ("dsterf",)
LARGEST = 32768  # side up to which every work space can be counted in 32 bits


@lru_cache(maxsize=1)
def find_openblas() -> OpenBlas | None:
    """The library that NumPy computes with, found once; None where it is no OpenBLAS, or has not all that is needed."""
    if sys.byteorder != "little":  # see _Integer
        return None
    loaded = sorted(pool["filepath"] for pool in ThreadpoolController().info() if pool["internal_api"] == "openblas")
    for path in loaded:
        if {"scipy", "scipy.libs"} & set(Path(path).parts[-3:]):
            continue  # SciPy's wheel has one of its own, of another version, which may be loaded or not
        library = ctypes.CDLL(path)
        for prefix, suffix in NAMES:
            if all(hasattr(library, f"{prefix}{name}{suffix}") for name in NEEDED):
                return OpenBlas(library, prefix, suffix)
    return None


@dataclass(frozen=True)
class Tridiagonal:
    """Q^T G Q with its diagonal (p,) and its subdiagonal (p - 1,), in the precision of G.

    reflectors (p, p) and scales (p,): what Q is made of, as LAPACK has them; None after a reduction in two stages,
    which does not keep it
    """

    diagonal: Real
    beside: Real
    reflectors: Real | None
    scales: Real | None


class OpenBlas:
    """Routines of LAPACK and BLAS by their names there. All take float64 or float32 and answer in the same."""

    def __init__(self, library: ctypes.CDLL, prefix: str, suffix: str) -> None:
        self._library, self._prefix, self._suffix = library, prefix, suffix

    def add_gram(self, A: Real, G: Real) -> None:
        """G += A^T A for A (k, p), in the upper triangle of G (p, p) in C's order."""
        k, p = A.shape
        rows = A.strides[1] == A.itemsize  # rows are contiguous: to Fortran it is A^T
        beside, leading, least = (0, p, p) if rows else (1, k, k)
        if A.shape[beside] > 1:
            leading = A.strides[beside] // A.itemsize
        if leading < least or not (rows or A.strides[0] == A.itemsize):  # strides that BLAS does not know
            return self.add_gram(np.array(A, order="C"), G)
        self._call("syrk", A.dtype, "L", "N" if rows else "T", p, k, 1.0, A, leading, 1.0, G, p)

    def tridiagonal(self, G: Real, stages: int) -> Tridiagonal:
        """Of a symmetric G (p, p), p > 1, by Householder reflections in one stage or in two.

        Two stages have little that is bound by the memory's speed, and are faster from some thousand columns on.
        """
        p = len(G)
        F = np.array(G.T, order="F")
        d, e, tau = np.empty(p, G.dtype), np.empty(p - 1, G.dtype), np.empty(p, G.dtype)
        if stages == 1:
            self._lapack("sytrd", G.dtype, "L", p, F, p, d, e, tau, _Work())
            return Tridiagonal(d, e, F, tau)
        self._lapack("sytrd_2stage", G.dtype, "N", "L", p, F, p, d, e, tau, _Work(), _Work())
        return Tridiagonal(d, e, None, None)

    def values(self, T: Tridiagonal) -> NDArray[np.float64]:
        """Eigenvalues (p,), ascending; in float64 whatever T's precision, since QL steps in float32 lose digits."""
        d, e = T.diagonal.astype(np.float64), T.beside.astype(np.float64)
        self._lapack("sterf", d.dtype, len(d), d, e)
        return d

    def vectors(self, T: Tridiagonal) -> Real:
        """Eigenvectors of T itself (p, p), by divide and conquer; columns in the order of rising eigenvalues."""
        d, e, p = T.diagonal.copy(), T.beside.copy(), len(T.diagonal)
        Z = np.empty((p, p), d.dtype, order="F")
        self._lapack("stedc", d.dtype, "I", p, d, e, Z, p, _Work(), _Work(np.int64))
        return Z

    def turn_back(self, T: Tridiagonal, Z: Real) -> Real:
        """Q Z, in the place of Z (p, k) in Fortran's order: eigenvectors of G from those of T."""
        p, k = Z.shape
        if k:
            self._lapack("ormtr", Z.dtype, "L", "L", "N", p, k, T.reflectors, p, T.scales, Z, p, _Work())
        return Z

    def _lapack(self, name: str, dtype: np.dtype[Any], *arguments: Any) -> None:
        """Call it; where it takes work spaces, first ask how large. Raises LinAlgError where LAPACK reports failure."""
        spaces = [a for a in arguments if isinstance(a, _Work)]
        for asking in (True, False) if spaces else (False,):
            sent: list[Any] = []
            for a in arguments:
                sent += a.sent(dtype, asking) if isinstance(a, _Work) else [a]
            info = ctypes.c_int64(0)
            self._call(name, dtype, *sent, info)
            failed = ctypes.c_int32(info.value & 0xFFFFFFFF).value
            if failed:
                raise np.linalg.LinAlgError(f"LAPACK's {name} failed with info {failed}")

    def _call(self, name: str, dtype: np.dtype[Any], *arguments: Any) -> None:
        """Fortran's way: everything by its address, and the lengths of texts behind all else."""
        routine = getattr(self._library, f"{self._prefix}{'d' if dtype == np.float64 else 's'}{name}{self._suffix}")
        number = ctypes.c_double if dtype == np.float64 else ctypes.c_float
        addresses: list[Any] = []
        for a in arguments:
            if isinstance(a, str):
                addresses.append(ctypes.c_char_p(a.encode()))
            elif isinstance(a, np.ndarray):
                addresses.append(ctypes.c_void_p(a.ctypes.data))
            elif isinstance(a, float):
                addresses.append(ctypes.byref(number(a)))
            else:
                # 64 bits whatever the library's integers are: on a little-endian machine the lower half is the 32-bit
                # number, and an array of integers is only longer than it has to be.
                addresses.append(ctypes.byref(a if isinstance(a, ctypes.c_int64) else ctypes.c_int64(a)))
        lengths = [ctypes.c_size_t(1) for a in arguments if isinstance(a, str)]
        routine(*addresses, *lengths)


class _Work:
    """A work space: two arguments, the array and its length. LAPACK says how long when it is asked with -1."""

    def __init__(self, dtype: Any = None) -> None:
        self.dtype = dtype  # None: that of the matrix
        self.array: Real = np.zeros(1)

    def sent(self, dtype: np.dtype[Any], asking: bool) -> list[Any]:
        if asking:
            self.array = np.zeros(1, self.dtype or dtype)
            return [self.array, -1]
        found = self.array[0]
        # As a float32 a large number may have been rounded down.
        length = int(found) if self.dtype else int(float(found) * (1 + 2**-20)) + 1
        self.array = np.empty(max(length, 1), self.dtype or dtype)
        return [self.array, len(self.array)]
