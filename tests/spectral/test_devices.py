"""The choice of device, and its reason."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Machine
from helpers import names_of, tensor_cores

from laser.errors import UsageError
from laser.spectral import devices
from laser.spectral.devices import Device, choose_device


@pytest.mark.slow
def test_a_device_joins_the_numeric_suites_by_its_line_in_available() -> None:
    """The host under another name, of which `available` says that it is there: the fixture has it, and a test passes
    on it."""
    code = (
        "import sys, pytest\n"
        "from laser.spectral import devices\n"
        "there = devices.available() | {'cpu:0': devices.Here(True, 'the host again')}\n"
        # The fixture asks while its file is imported, which is over in this process; so another one asks anew.
        "devices.available = lambda *_: there\n"
        "sys.exit(pytest.main(sys.argv[1:]))\n"
    )
    numeric = Path(__file__).with_name("test_factorise.py")
    words = (f"{numeric}::test_rows_beyond_one_block", "-rA", "-p", "no:cacheprovider", "-p", "no:xdist")
    ended = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    passed = re.findall(r"PASSED .*::test_rows_beyond_one_block\[(.+)\]", ended.stdout)
    assert {*names_of(devices.available()), "cpu:0", "like mps"} <= set(passed)


def test_cpu_is_always_there() -> None:
    device = choose_device("cpu")
    assert (device.name, device.dtype, device.host_eigensolver) == ("cpu", torch.float64, True)
    assert "asked for" in device.reason and device.label == "cpu float64"


@pytest.mark.parametrize("found, expected", [(("cuda", "mps"), "cuda"), (("mps",), "mps"), ((), "cpu")])
def test_auto_takes_the_first_that_is_there(found: tuple[str, ...], expected: str, machine: Machine) -> None:
    machine(cuda=int("cuda" in found), mps="mps" in found)
    device = choose_device("auto")
    assert device.name == expected and "first of" in device.reason
    assert device.dtype == (torch.float32 if expected == "mps" else torch.float64)
    assert device.host_eigensolver == (expected != "cuda")  # no LAPACK on MPS


@pytest.mark.parametrize(
    "capability, dtype",
    [
        ((8, 0), torch.float64),
        ((9, 0), torch.float64),
        ((10, 0), torch.float64),
        ((7, 5), torch.float32),
        ((8, 6), torch.float32),
        ((8, 9), torch.float32),
        ((12, 0), torch.float32),
    ],
)
def test_precision_goes_by_the_rate_of_float64(
    capability: tuple[int, int], dtype: torch.dtype, machine: Machine
) -> None:
    machine(cuda=2, capability=capability)
    device = choose_device("cuda:1")
    assert device.dtype == dtype and not device.host_eigensolver and device.name == "cuda:1"
    assert f"compute capability {capability[0]}.{capability[1]}" in device.reason and "cuda:1's" in device.reason
    assert choose_device("cuda", "float32").dtype == torch.float32
    machine(cuda=2, capability=capability, exact=False)  # as with NVIDIA_TF32_OVERRIDE=1
    assert choose_device("cuda").dtype == choose_device("cuda", "float64").dtype == torch.float64
    with pytest.raises(UsageError, match=r"float32 on cuda carry less than 24 bits.*try --precision float64"):
        choose_device("cuda", "float32")


def test_an_apple_gpu_that_rounds_its_operands_is_not_used(machine: Machine) -> None:
    machine(mps=True, exact=False)
    device = choose_device()
    assert (device.name, device.dtype) == ("cpu", torch.float64) and "less than 24 bits" in device.reason


@pytest.mark.parametrize("mantissa, exact", [(23, True), (10, False), (7, False)])
def test_the_precision_probe_sees_short_operands(mantissa: int, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    true = torch.Tensor.__matmul__

    def cut(x: torch.Tensor) -> torch.Tensor:
        step = 2.0**mantissa
        return torch.round(x * step) / step

    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda x, y: true(cut(x), cut(y)))
    devices.exact_products.cache_clear()
    assert devices.exact_products(torch.device("cpu")) is exact
    devices.exact_products.cache_clear()


def test_the_probe_of_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def sums_well(mm: Callable[..., torch.Tensor]) -> bool:
        # The product exists on CUDA only.
        monkeypatch.setattr(torch, "mm", mm)
        devices._sums_in_float32.cache_clear()
        return devices._sums_in_float32(torch.device("cpu"), torch.bfloat16, (64,))

    def raises(error: Exception) -> Callable[..., torch.Tensor]:
        def mm(*_: object, **__: object) -> torch.Tensor:
            raise error

        return mm

    assert sums_well(tensor_cores())
    assert not sums_well(tensor_cores(bits=14))
    assert not sums_well(lambda A, B, out_dtype: (A @ B).to(out_dtype))  # rounded to 8 bits first
    assert not sums_well(raises(TypeError("mm() got an unexpected keyword argument 'out_dtype'")))
    assert not sums_well(raises(RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")))
    with pytest.raises(RuntimeError, match="out of memory"):  # another time it may say something
        sums_well(raises(torch.OutOfMemoryError("CUDA out of memory")))
    devices._sums_in_float32.cache_clear()


def test_tensor_cores_are_for_cuda_in_float32_and_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    # The probe computes on the device.
    monkeypatch.setattr(devices, "_sums_in_float32", lambda *_: True)
    single = Device("cuda:0", torch.float32, False, "pretends")
    assert devices.products_in_float32(single, torch.bfloat16) and devices.products_in_float32(single, torch.float16)
    assert not devices.products_in_float32(single, torch.float32)
    assert not devices.products_in_float32(replace(single, dtype=torch.float64), torch.bfloat16)
    for name in ("cpu", "mps"):
        assert not devices.products_in_float32(replace(single, name=name), torch.bfloat16)


def test_free_memory_is_known_and_plausible() -> None:
    free = devices.free_bytes(devices.HOST)
    assert free is not None and 2**20 < free < 2**50


def test_full_precision_is_shared_by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Switch:
        fp32_precision = "tf32"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", Switch)
    with devices.full_precision():
        assert Switch.fp32_precision == "ieee"
        with devices.full_precision():  # another thread's
            pass
        assert Switch.fp32_precision == "ieee"
    assert Switch.fp32_precision == "tf32"


def test_what_is_not_there_is_said(machine: Machine) -> None:
    machine(mps=True)
    for name in ("cuda", "cuda:0"):
        with pytest.raises(UsageError, match=f"'{name}' is not available: no CUDA .*; try --device auto"):
            choose_device(name)
    machine(cuda=2, mps=True)
    for name in ("cuda:2", "cuda:x", "cuda:", "cpu:1"):
        with pytest.raises(
            UsageError, match=f"no device '{name}': found [12], counted from 0; try --device (cuda|cpu)"
        ):
            choose_device(name)
    with pytest.raises(UsageError, match="no float64"):
        choose_device("mps", "float64")
    for name in ("all", "cuda:0,cuda:1"):
        with pytest.raises(UsageError, match=f"for scan, reduce and run, found --device {name}; try --device auto"):
            choose_device(name)
    with pytest.raises(UsageError, match="unknown device"):
        choose_device("tpu")


def test_thread_count_is_put_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), devices.host_threads(8):
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
