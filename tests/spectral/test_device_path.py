"""What runs on an accelerator without LAPACK (Apple MPS): only operators that are native there, and never float64.

The path is run on CPU tensors under a guard that records every operator. ALLOWED is the whole list; one test holds it
against the reference lists, where those are present.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from laser.spectral import decomposition
from laser.spectral.decomposition import singular_values, truncate
from laser.spectral.devices import Device

ALLOWED = {
    "aten::_local_scalar_dense",
    "aten::_to_copy",
    "aten::abs",
    "aten::addmm_",
    "aten::all",
    "aten::copy_",
    "aten::detach",
    "aten::empty_like",
    "aten::eq.Tensor",
    "aten::eye",
    "aten::index.Tensor",
    "aten::lift_fresh",
    "aten::max",
    "aten::mm",
    "aten::mul.Tensor",
    "aten::ne.Scalar",
    "aten::permute",
    "aten::slice.Tensor",
    "aten::sub.Tensor",
    "aten::sum",
    "aten::zeros",
    "aten::zeros_like",
}
MPS_LIKE = Device("cpu", torch.float32, True, "an accelerator without LAPACK and float64, on CPU tensors")


class Guard(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        name = f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name
        self.seen.add(name)
        assert name in ALLOWED, f"{name} is not on the list of the device path"
        out = func(*args, **(kwargs or {}))
        wide = [t for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor) and t.dtype == torch.float64]
        assert not wide, f"{name} met float64, which Apple MPS does not have"
        return out


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guard]:
    monkeypatch.setattr(Device, "host_blas", property(lambda _: False))
    monkeypatch.setattr(decomposition, "BLOCK_ROWS", 32)
    with Guard() as active:
        yield active


@pytest.mark.parametrize("shape", [(80, 40), (40, 80), (48, 48)])
def test_values_and_truncation_use_native_operators_only(guard: Guard, shape: tuple[int, int]) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    W = torch.from_numpy(array).to(torch.bfloat16)
    exact = W.float().numpy().astype(np.float64)
    U, s, Vh = np.linalg.svd(exact, full_matrices=False)
    found, method = singular_values(W, MPS_LIKE)
    assert method == "gram" and found == pytest.approx(s, abs=1e-4 * s[0])
    for rank in (0, 5, 30):
        result = truncate(W, rank, MPS_LIKE)
        truth = (U[:, :rank] * s[:rank]) @ Vh[:rank]
        assert result.certificate.method == "gram"
        assert np.abs(result.matrix.float().numpy() - truth).max() <= 2**-7 * np.abs(truth).max()
    assert "aten::addmm_" in guard.seen and "aten::mm" in guard.seen


def test_the_guard_refuses_what_is_not_there(guard: Guard) -> None:
    with pytest.raises(AssertionError, match="not on the list"):
        torch.linalg.svdvals(torch.ones(4, 4))


def test_the_list_is_native_on_apple_mps(shared: Path) -> None:
    native = set((shared / "mps" / "mps_native_ops_torch2.13.txt").read_text().split())
    assert native >= ALLOWED
