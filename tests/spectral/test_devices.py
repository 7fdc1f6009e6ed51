"""The choice of device, and its reason."""

import pytest
import torch

from laser.errors import UsageError
from laser.spectral import devices
from laser.spectral.devices import choose_device


def test_cpu_is_always_there() -> None:
    device = choose_device("cpu")
    assert (device.name, device.dtype, device.host_eigensolver) == ("cpu", torch.float64, True)
    assert "asked for" in device.reason and device.label == "cpu float64"


@pytest.mark.parametrize("found, expected", [(("cuda", "mps"), "cuda"), (("mps",), "mps"), ((), "cpu")])
def test_auto_takes_the_first_that_is_there(
    found: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {n: "there" if n in found else "not available: injected" for n in ("cuda", "mps")} | {"cpu": "2 threads"}
    monkeypatch.setattr(devices, "available", lambda: here)
    monkeypatch.setattr(devices, "exact_products", lambda _: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    device = choose_device("auto")
    assert device.name == expected and "first of" in device.reason
    assert device.dtype == (torch.float32 if expected == "mps" else torch.float64)
    assert device.host_eigensolver == (expected != "cuda")  # no LAPACK on MPS


def test_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "available", lambda: {"cuda": "not available: x", "mps": "Apple GPU", "cpu": ""})
    with pytest.raises(UsageError, match="'cuda' is not available: x; try --device auto"):
        choose_device("cuda")
    with pytest.raises(UsageError, match="no float64"):
        choose_device("mps", "float64")
    with pytest.raises(UsageError, match="unknown device"):
        choose_device("tpu")


def test_thread_count_is_put_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), devices.host_threads(8):
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
