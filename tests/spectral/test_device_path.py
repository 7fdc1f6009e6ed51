"""What runs on an accelerator without LAPACK (Apple MPS): only operators that are native there, never float64, and no
tensor of one device mixed with one of another.

The whole path is run twice: on CPU tensors under a guard that records every operator (ALLOWED is the whole list; two
tests hold it against the reference lists, where those are present), and on fake tensors, which know their device and
have no data.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LIKE_MPS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from laser.spectral import data_metric, devices, gram, projector
from laser.spectral.data_metric import ByData, data_values, relative_error, rounding_error, truncate_in_metric
from laser.spectral.devices import Device, exact_products
from laser.spectral.factorise import climb, singular_values, steps, truncate
from laser.spectral.permutation import PERMUTATIONS, largest_singular_value, null_largest, permuted
from laser.spectral.shrinkage import Gains
from laser.spectral.spectrum import excess_kurtosis

ALLOWED = {
    "aten::_local_scalar_dense",
    "aten::_to_copy",
    "aten::abs",
    "aten::add.Tensor",
    "aten::add_.Tensor",
    "aten::addmm",
    "aten::addmm_",
    "aten::aminmax",
    "aten::all",
    "aten::any",
    "aten::arange",
    "aten::arange.start",
    "aten::bitwise_not",
    "aten::copy_",
    "aten::detach",
    "aten::diagonal",
    "aten::div.Tensor",
    "aten::empty_like",
    "aten::eq.Tensor",
    "aten::eye",
    "aten::full",
    "aten::index_select",
    "aten::lift_fresh",
    "aten::linalg_vector_norm",
    "aten::max",
    "aten::mm",
    "aten::mul.Tensor",
    "aten::mul_.Tensor",
    "aten::mv",
    "aten::ne.Scalar",
    "aten::permute",
    "aten::slice.Tensor",
    "aten::stack",
    "aten::sub.Tensor",
    "aten::sub_.Tensor",
    "aten::sum",
    "aten::sum.dim_IntList",
    "aten::view",
    "aten::zeros",
    "aten::zeros_like",
}
# What the host may do with a matrix that is stored in float64: look at it, cut it up, permute and convert it, and fill
# the result.
TRANSPORT = {
    "aten::_local_scalar_dense",  # its largest entry
    "aten::_to_copy",
    "aten::aminmax",
    "aten::copy_",
    "aten::detach",
    "aten::empty_like",
    "aten::index_select",
    "aten::lift_fresh",
    "aten::permute",
    "aten::slice.Tensor",
    "aten::view",
}
shapes = pytest.mark.parametrize("shape", [(80, 40), (40, 80), (48, 48)])
SHRUNK = Gains(5, 0, "frobenius", 0.1)


class Guard(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.float64_storage = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        name = f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name
        self.seen.add(name)
        assert name in ALLOWED, f"{name} is not on the list of the device path"
        out = func(*args, **(kwargs or {}))
        wide = [t for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor) and t.dtype == torch.float64]
        if not (self.float64_storage and name in TRANSPORT):
            assert not wide, f"{name} met float64, which Apple MPS does not have"
        return out


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    # A limit: real blocks need matrices of thousands of rows.
    for module in (gram, projector):
        monkeypatch.setattr(module, "BLOCK_ROWS", 32)


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guard]:
    small_blocks(monkeypatch)
    with Guard() as active:
        yield active


def weights(shape: tuple[int, int]) -> torch.Tensor:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return torch.from_numpy(array).to(torch.bfloat16)


@pytest.mark.slow
@shapes
@pytest.mark.parametrize("method", ["gram", "projector"])
def test_values_and_truncation_use_native_operators_only(guard: Guard, shape: tuple[int, int], method: str) -> None:
    W = weights(shape)
    exact = W.float().numpy().astype(np.float64)
    U, s, Vh = np.linalg.svd(exact, full_matrices=False)
    found, used = singular_values(W, LIKE_MPS, method)
    assert used == "gram" and found == pytest.approx(s, abs=1e-4 * s[0])
    for rank in (0, 5, 30, min(shape)):
        result = truncate(W, rank, LIKE_MPS, method)
        truth = (U[:, :rank] * s[:rank]) @ Vh[:rank]
        assert (result.certificate.method, result.certificate.note) == (method, "")
        assert np.abs(result.matrix.float().numpy() - truth).max() <= 2**-7 * np.abs(truth).max()
    assert "aten::addmm_" in guard.seen and "aten::mm" in guard.seen


@shapes
def test_a_matrix_stored_in_float64_is_converted_on_the_host(guard: Guard, shape: tuple[int, int]) -> None:
    guard.float64_storage = True
    exact = np.random.default_rng(0).standard_normal(shape)
    U, s, Vh = np.linalg.svd(exact, full_matrices=False)
    W = torch.from_numpy(exact)
    assert singular_values(W, LIKE_MPS)[0] == pytest.approx(s, abs=1e-4 * s[0])
    for method in ("gram", "projector"):
        result = truncate(W, 5, LIKE_MPS, method)
        assert result.certificate.method == method and result.matrix.dtype == torch.float64
        assert np.abs(result.matrix.numpy() - (U[:, :5] * s[:5]) @ Vh[:5]).max() < 1e-4
    assert excess_kurtosis(W, LIKE_MPS) == pytest.approx((exact**4).mean() / (exact**2).mean() ** 2 - 3, abs=1e-4)
    assert null_largest(W, 1, LIKE_MPS)[0] == pytest.approx(shape[0] ** 0.5 + shape[1] ** 0.5, rel=0.2)


@shapes
def test_gains_use_native_operators_only(guard: Guard, shape: tuple[int, int]) -> None:
    W = weights(shape)
    U, s, Vh = np.linalg.svd(W.float().numpy().astype(np.float64), full_matrices=False)
    for wanted in (SHRUNK, Gains(5, below=3)):
        for method in ("gram", "projector"):
            result = truncate(W, wanted, LIKE_MPS, method)
            truth = (U * (s * wanted.of(s, shape))) @ Vh
            assert result.certificate.method == "gram"
            assert ("need eigenvectors" in result.certificate.note) == (method == "projector")
            assert np.abs(result.matrix.float().numpy() - truth).max() <= 2**-7 * np.abs(truth).max()


def test_the_null_and_the_precision_probe_use_native_operators_only(guard: Guard) -> None:
    for shape in ((80, 40), (12, 30)):
        null = null_largest(weights(shape), 2, LIKE_MPS)
        assert (null > 0.8 * (shape[0] ** 0.5 + shape[1] ** 0.5)).all()
    assert null_largest(torch.zeros(40, 80), 1, LIKE_MPS) == [0.0]
    x = weights((80, 40)).float().numpy().astype(np.float64)
    expected = (x**4).mean() / (x**2).mean() ** 2 - 3
    assert excess_kurtosis(weights((80, 40)), LIKE_MPS) == pytest.approx(expected, abs=1e-4)
    exact_products.cache_clear()
    assert exact_products(torch.device("cpu"))


def test_the_guard_refuses_what_is_not_there(guard: Guard) -> None:
    with pytest.raises(AssertionError, match="not on the list"):
        torch.linalg.svdvals(torch.ones(4, 4))


def test_the_list_is_native_on_apple_mps(shared: Path) -> None:
    native = set((shared / "mps" / "mps_native_ops_torch2.13.txt").read_text().split())
    assert native >= ALLOWED


def test_the_list_needs_no_fallback_and_has_no_conditions(shared: Path) -> None:
    for file in ("mps_missing_ops_torch2.13.txt", "mps_fallback_ops_torch2.13.txt"):
        assert not ALLOWED & set((shared / "mps" / file).read_text().split())


# --- fake tensors: every operator checks that its arguments lie on one device -----------------------------------------


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake tensors, and stand-ins for the four ways in which data enters or leaves a device."""
    true_to = torch.Tensor.to

    def send(tensor: torch.Tensor, target: Any) -> torch.Tensor:  # torch without CUDA refuses to copy even a fake
        if not isinstance(target, torch.device):
            assert target != torch.float64 or tensor.device.type != "mps"
            return true_to(tensor, target)
        if target.type == tensor.device.type:
            return tensor
        assert tensor.dtype != torch.float64 or target.type != "mps"
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=target)

    def to_numpy(tensor: torch.Tensor) -> np.ndarray:
        assert tensor.device.type == "cpu"
        return np.ones(tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))

    def part(tensor: torch.Tensor, key: Any) -> torch.Tensor:  # nor to slice it
        for dim, which in enumerate(key if isinstance(key, tuple) else (key,)):
            start, stop, _ = which.indices(tensor.shape[dim])
            tensor = torch.narrow(tensor, dim, start, stop - start)
        return tensor

    def put(tensor: torch.Tensor, key: Any, value: torch.Tensor) -> None:
        there = part(tensor, key)
        assert (there.shape, there.device, there.dtype) == (value.shape, value.device, value.dtype)

    small_blocks(monkeypatch)
    devices._sums_in_float32.cache_clear()
    monkeypatch.setattr(torch.Tensor, "to", send)
    monkeypatch.setattr(torch.Tensor, "__getitem__", part)
    monkeypatch.setattr(torch.Tensor, "__setitem__", put)
    monkeypatch.setattr(torch.Tensor, "numpy", to_numpy)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: False)
    monkeypatch.setattr(torch.Tensor, "__float__", lambda _: 1.0)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda _: True)
    monkeypatch.setattr(projector, "UNRESOLVED", 1e9)  # nothing is right in a fake
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
    devices._sums_in_float32.cache_clear()


ACCELERATORS = {
    "cuda": Device("cuda", torch.float64, False, "fake"),
    "cuda float32": Device("cuda:0", torch.float32, False, "fake"),
    "mps": Device("mps", torch.float32, True, "fake"),
}


CASES = [  # on the device may lie what it has
    (name, resident, storage)
    for name, device in ACCELERATORS.items()
    for storage in (torch.bfloat16, torch.float64)
    for resident in ((False, True) if storage == torch.bfloat16 or device.has_float64 else (False,))
]


@pytest.mark.slow
@shapes
@pytest.mark.parametrize(("name", "resident", "storage"), CASES)
def test_no_device_is_mixed_with_another(
    fake: None, shape: tuple[int, int], name: str, resident: bool, storage: torch.dtype
) -> None:
    device = ACCELERATORS[name]
    W = torch.empty(shape, dtype=storage, device=device.torch_device if resident else "cpu")
    p = min(shape)
    assert gram.values_by_gram(W, device).shape == (p,)
    s = np.linspace(2, 1, p)
    for wanted in (Gains(0), Gains(5), Gains(p - 3), Gains(p), SHRUNK, Gains(3, below=2)):
        for factors in (gram.factors_by_gram(W, device), projector.factors_by_projector(W, device, s)):
            if factors.singular_values is s and not wanted.plain:
                continue
            raw = factors.cut(wanted)
            assert raw.matrix.device == W.device and raw.matrix.dtype == W.dtype and raw.matrix.shape == W.shape


@pytest.mark.slow
@pytest.mark.parametrize("name", ACCELERATORS)
def test_the_metric_of_the_data_is_in_float64_where_the_device_has_it(
    fake: None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, x = replace(ACCELERATORS[name], share=1 << 40), torch.empty(300, 40, dtype=torch.float64)
    # Nothing is right in a fake.
    monkeypatch.setattr(data_metric, "SAFETY", math.inf)
    # A root is made on one worker's stream and used on another's: it is waited for, and each use of it noted.
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: events.append("waited"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "a stream")
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: events.append("noted"))
    data_metric.ROOTS.clear()
    at = "cuda" if device.has_float64 else "cpu"

    class There(TorchDispatchMode):
        """Products and eigenproblems, and where."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.name in ("aten::mm", "aten::_linalg_eigh", "aten::addmm"):
                found = {(t.device.type, t.dtype) for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
                assert found == {(at, torch.float64)}, func
                seen.add(func._schema.name)
            return func(*args, **(kwargs or {}))

    for m in (30, 60):
        W = torch.empty(m, 40, dtype=torch.bfloat16)
        C = torch.empty(40, 40, dtype=torch.float64)
        wide = ByData("outputs", torch.empty(m, m, dtype=torch.float64), 300, 1.0, shrink=True)
        for metric in (ByData("full", C, 300, 1.0, m > 40, "key"), ByData("diagonal", x.sum(dim=0), 300), wide):
            seen: set[str] = set()
            p = m if metric.form == "outputs" else min(m, 40)
            with There():
                assert data_values(W, metric, device).shape == (p,)
                found = truncate_in_metric(W, 1, metric, device).matrix
                assert found.device.type == "cpu" and found.dtype == W.dtype
                assert relative_error(W, W, 1, metric, device) >= 0
                assert rounding_error(W, W, W, 1, metric, device) >= 0
            assert seen == ({"aten::mm", "aten::_linalg_eigh"} if at == "cuda" else {"aten::mm"})
    # Only the tall matrix takes a root, for its values and for its truncation.
    assert events == (["waited", "noted", "noted"] if at == "cuda" else [])
    kept = list(data_metric.ROOTS._kept.values())
    assert [each.result().device.type for each in kept] == [at]
    data_metric.ROOTS.clear()


@pytest.mark.parametrize("name", ACCELERATORS)
def test_the_null_mixes_no_devices(fake: None, name: str) -> None:
    device = ACCELERATORS[name]
    for shape, storage in (((80, 40), torch.bfloat16), ((12, 30), torch.float64)):
        assert null_largest(torch.empty(shape, dtype=storage), 1, device).shape == (1,)
        there = torch.empty(shape, dtype=torch.bfloat16, device=device.torch_device)  # permuted where it is
        assert null_largest(there, 1, device).shape == (1,)
        for kind in PERMUTATIONS:
            moved = permuted(there, 0, kind)
            assert (moved.device, moved.dtype, moved.shape) == (there.device, there.dtype, there.shape)
        assert np.isfinite(largest_singular_value(torch.empty(shape, dtype=storage), device))
        assert np.isfinite(excess_kurtosis(torch.empty(shape, dtype=storage), device))
    exact_products.cache_clear()
    assert exact_products(device.torch_device)
    exact_products.cache_clear()


class Noted(TorchDispatchMode):
    """The operators that run, and the dtypes of what they get."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, tuple[torch.dtype, ...]]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtypes = tuple(t.dtype for t in tree_leaves(args) if isinstance(t, torch.Tensor))
        self.seen.add((f"{func._schema.name}.{func._schema.overload_name}", dtypes))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_tensor_cores_multiply_what_is_stored_in_16_bits(
    fake: None, storage: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Limits: real ones need matrices of thousands of rows.
    monkeypatch.setattr(gram, "TENSOR_SIDE", 40)
    monkeypatch.setattr(gram, "TENSOR_ROWS", 16)
    device, wide = ACCELERATORS["cuda float32"], ("aten::mm.dtype", (storage, storage))
    for shape in ((80, 40), (40, 80)):
        for where in ("cpu", device.torch_device):
            W = torch.empty(shape, dtype=storage, device=where)
            with Noted() as noted:
                G = gram.gram(W, device)
            assert (G.dtype, G.device.type, tuple(G.shape)) == (torch.float32, "cuda", (40, 40))
            assert (wide in noted.seen) == (storage != torch.float32)
            if storage != torch.float32:  # nothing is converted, there or here
                assert not any("_to_copy" in name for name, _ in noted.seen)
    small = torch.empty(80, 39, dtype=storage)
    with Noted() as noted:
        gram.gram(W, ACCELERATORS["cuda"])  # in float64 they are of no use
        gram.gram(small, device)  # and where their error would show
    assert not any(name == "aten::mm.dtype" for name, _ in noted.seen)


def test_a_step_of_the_host_makes_nothing_on_the_device(fake: None) -> None:
    """W lies on a GPU that is full: whether it is finite is asked on the host, and so is the host's step."""
    device = replace(ACCELERATORS["cuda"], share=1 << 30)
    W, seen = torch.empty(80, 40, dtype=torch.bfloat16, device="cuda"), []

    class Full(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            assert all(t.device.type == "cpu" for t in tree_leaves(out) if isinstance(t, torch.Tensor)), func
            return out

    def by_gram(W: torch.Tensor, at: Device) -> torch.Tensor:
        seen.append((at.torch_device.type, W.device.type))
        if at is device:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.empty_like(W)

    with Full():
        found, method, _ = climb(W, steps("gram", device), {"gram": by_gram}, lambda found, _: found)
    assert (method, seen) == ("gram on the host", [("cuda", "cuda"), ("cpu", "cpu")])
    assert found.device.type == "cpu"


def test_the_fake_notices_a_mixture(fake: None) -> None:
    with pytest.raises(Exception, match="same device"):
        torch.mm(torch.empty(4, 4, device="mps"), torch.empty(4, 4))
