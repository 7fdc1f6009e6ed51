"""Measuring a device, and the method that follows from it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from laser.spectral import measuring
from laser.spectral.devices import HOST, Device
from laser.spectral.measuring import choose_method, measure_device
from laser.spectral.probe import Probe

MPS = Device("mps", torch.float32, True, "pretends")


def test_everything_is_measured(device: Device, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    found = measure_device(device, (32, 64), tmp_path, copied=2**20)
    assert torch.get_num_threads() == threads
    assert (found.device, found.exact_products) == (device.label, True)
    assert found.threads == (1 if device.host_blas else threads)
    assert found.eigenvalues.keys() == found.eigenvectors.keys() == found.projector.keys() == {32, 64}
    assert found.null.keys() == {2 * 32**2, 2 * 64**2} and min(found.null.values()) > 0
    rates = [found.product, found.projection, found.disk_read, found.disk_write]
    rates += [] if device.host_blas else [found.to_device, found.to_host]  # nothing is copied on the host
    assert all(rate is not None and rate > 1e5 for rate in rates)
    assert (found.to_device is None) == (found.to_host is None) == device.host_blas
    assert list(tmp_path.iterdir()) == []
    assert measure_device(device, (32,), copied=2**20).disk_read is None
    found.save(tmp_path / "devices.json")
    assert Probe.load(device.label, tmp_path / "devices.json") == found


def probed(vectors: float, sign: float) -> Probe:
    return Probe("mps float32", "Apple GPU", "2.13", 8, 1e12, {1024: 0.1}, {1024: vectors}, {1024: sign})


def test_the_probe_decides_between_projector_and_eigenvectors_on_mps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "devices.json"
    probed(vectors=0.5, sign=0.2).save(path)
    method, why = choose_method("auto", MPS, path)
    assert method == "projector" and "0.3 s and eigenvectors on the host 0.5 s" in why
    probed(vectors=0.5, sign=0.45).save(path)
    assert choose_method("auto", MPS, path)[0] == "gram"  # the projector needs the eigenvalues besides
    path.write_text("damaged")
    # Measuring takes seconds, and says what this machine is.
    monkeypatch.setattr(measuring, "measure_device", lambda device, sides: probed(0.5, 0.1))
    assert choose_method("auto", MPS, path)[0] == "projector"
    # As above.
    monkeypatch.setattr(measuring, "measure_device", lambda *_: pytest.fail("measured again"))
    assert choose_method("auto", MPS, path)[0] == "projector"  # kept, so that the next run decides alike


def test_elsewhere_the_method_is_gram_unless_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "devices.json"
    for device in (HOST, replace(HOST, dtype=torch.float32), Device("cuda", torch.float64, False, "pretends")):
        assert choose_method("auto", device, path)[0] == "gram"
    assert choose_method("svd", MPS, path) == ("svd", "asked for") and not path.exists()
