"""The ladder: which step is tried after which, and what makes a step fail.

    the method asked for  ->  float64 on the same device  ->  the host  ->  plain SVD in float64 on the host

A projector goes to eigenvectors first. A step that does not exist (float64 on Apple MPS, another host on the host) is
left out. A step fails with NaN in its result, a missed certificate, an eigensolver that does not converge, or too
little memory on the device; it is written down with its reason, and the next one starts from the untouched matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from laser.errors import NumericalError, first_line
from laser.spectral.devices import HOST, Device, failed_there, free_bytes, full_precision, host_threads, release
from laser.spectral.gram import BLOCK_ROWS

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """One step: `name` is what a certificate calls it, `method` a row of the tables in decomposition.py."""

    name: str
    method: str
    device: Device


def steps(method: str, device: Device) -> tuple[Step, ...]:
    """The steps for `method` on `device`, in order."""
    host = replace(HOST, reason="the ladder")
    if method == "svd":
        return (Step("svd", "svd", host),)
    found = [Step(name, name, device) for name in dict.fromkeys((method, "gram"))]
    if device.dtype == torch.float32 and device.has_float64:
        found.append(Step("gram float64", "gram", replace(device, dtype=torch.float64)))
    if not device.host_blas:
        found.append(Step("gram on the host", "gram", host))
    return (*found, Step("svd", "svd", host))


def climb(W: torch.Tensor, ladder: tuple[Step, ...], attempt: Callable[[Step, torch.Tensor], T]) -> tuple[T, str, str]:
    """The first result of `attempt` that holds, its step's name, and which steps failed before it and why.

    `attempt` gets W with the step, since a step of the host's gets it on the host: what it makes beside W would else
    be made on the device that has just run out of memory. Raises NumericalError with every step's reason when none is
    left.
    """
    failures: list[str] = []
    residual = None
    for step in ladder:
        W = W.cpu() if step.device.host_blas else W
        on_host = step.device.host_blas and step.method != "svd"
        try:
            with full_precision(), host_threads(min(W.shape)) if on_host else nullcontext():
                _require_memory(W, step)
                return attempt(step, W), step.name, "; ".join(failures)
        except NumericalError as error:
            failures.append(f"{step.name}: {error}")
            residual = error.residual if residual is None else residual
        except MemoryError as error:
            if step.device.host_blas:  # no other step needs less, and a matrix is not skipped for want of memory
                raise
            failures.append(f"{step.name}: {first_line(error)}")
        except (LinAlgError, np.linalg.LinAlgError) as error:
            failures.append(f"{step.name}: {first_line(error)}")
        except RuntimeError as error:
            if not failed_there(error, step.device):
                raise
            # Without the numbers in torch's message: they differ from run to run, and records do not.
            memory = "out of memory" in str(error).lower()
            failures.append(f"{step.name}: {'out of memory on the device' if memory else first_line(error)}")
        release(step.device)  # outside `except`: until it is left, the traceback holds the step's tensors
    raise NumericalError(
        f"no method gave a certified result ({'; '.join(failures)}); try --exclude this matrix", residual
    )


def device_bytes(W: torch.Tensor, method: str, device: Device) -> int:
    """Memory that a step needs on its device at the peak, in bytes; W and the result count where W lies there.

    With eigenvalues on the device G, V and the solver's work space of three more; else G and V, or for the projector G,
    X and two of its powers. And four blocks of rows in the precision of the arithmetic.
    """
    p, q = min(W.shape), max(W.shape)
    there = 2 * W.nbytes if W.device.type == device.torch_device.type else 0
    squares = 5 if not device.host_eigensolver else 4 if method == "projector" else 2
    return there + (squares * p * p + 4 * min(BLOCK_ROWS, q) * p) * torch.finfo(device.dtype).bits // 8


def _require_memory(W: torch.Tensor, step: Step) -> None:
    """Before a matrix is sent. The host is not asked: there is nowhere else to go, and it can swap."""
    free = None if step.device.host_blas else free_bytes(step.device)
    needed = device_bytes(W, step.method, step.device)
    if free is not None and needed > free:
        raise NumericalError(f"needs {needed / 2**30:.2f} GiB of memory on the device, more than is free")
