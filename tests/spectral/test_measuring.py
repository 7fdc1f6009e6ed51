"""Measuring a device, and the method that follows from it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from laser.checkpoint.reader import open_checkpoint
from laser.engine.crew import Crew
from laser.engine.workers import choose_crew
from laser.errors import RecordError
from laser.pipeline import scan
from laser.selection import Selection
from laser.spectra import Spectra
from laser.spectral import measuring
from laser.spectral.devices import HOST, Device
from laser.spectral.eigen import DEFAULT, Routes, offered
from laser.spectral.measuring import chip, choose_method, chosen_routes, measure_device
from laser.spectral.openblas import find_openblas
from laser.spectral.probe import Probe, cache_path
from laser.spectral.spectrum import precision_of

MPS = Device("mps", torch.float32, True, "pretends")


def test_everything_is_measured(device: Device, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    found = measure_device(device, (32, 64), tmp_path, copied=2**20)
    assert torch.get_num_threads() == threads
    assert (found.device, found.exact_products) == (device.label, True)
    assert found.threads == (1 if device.host_blas else threads)
    assert found.eigenvalues.keys() == found.eigenvectors.keys() == found.projector.keys() == {32, 64}
    assert found.null.keys() == {2 * 32**2, 2 * 64**2} and min(found.null.values()) > 0
    if device.host_blas:
        assert found.busy == torch.get_num_threads() and found.routes.keys() == {"values", "vectors"}
        for what, tables in found.routes.items():
            assert tables and set(tables) <= set(offered(what))
            assert min(seconds for table in tables.values() for seconds in table.values()) > 0
    else:
        assert found.routes == {}
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


# --- routes -----------------------------------------------------------------------------------------------------------

SINGLE = replace(HOST, dtype=torch.float32)
# Made by hand: on which side of a margin a measured time falls is up to the machine.
BOTH = {"one-stage": {1024: 1.0, 2048: 8.0, 4096: 70.0}, "two-stage": {1024: 1.2, 2048: 7.9, 4096: 40.0}}
needs_openblas = pytest.mark.skipif(find_openblas() is None, reason="NumPy computes with another BLAS here")


def probe_with(values: dict[str, dict[int, float]], device: Device = HOST, name: str = "") -> Probe:
    routes = {"values": values, "vectors": {"one-stage": {1024: 1.0}}}
    return Probe(device.label, name or chip(device), "2.13", 1, 1e10, {}, {}, routes=routes, busy=2)


@needs_openblas
def test_the_probe_chooses_routes_and_noise_does_not(tmp_path: Path) -> None:
    path = tmp_path / "devices.json"
    assert chosen_routes(HOST, path) is None
    probe_with(BOTH).save(path)
    assert chosen_routes(HOST, path) is None  # two-stage at 4096 is the default, and at 2048 it gains next to nothing
    probe_with(BOTH | {"two-stage": {1024: 1.2, 2048: 6.0, 4096: 40.0}}).save(path)
    assert chosen_routes(SINGLE, path) is None  # another label
    chosen = chosen_routes(HOST, path)
    assert chosen == Routes(((0, "numpy"), (256, "one-stage"), (1448, "two-stage")), DEFAULT.vectors)
    assert chosen is not None
    assert chosen.stated() == "values:0=numpy,256=one-stage,1448=two-stage vectors:0=numpy,256=one-stage"
    probe_with({"one-stage": {1024: 1.0, 4096: 8.0}, "two-stage": {1024: 2.0, 4096: 10.0}}).save(path)
    chosen = chosen_routes(HOST, path)
    assert chosen is not None and chosen.values == ((0, "numpy"), (256, "one-stage"))


@needs_openblas
def test_routes_of_another_chip_or_that_are_gone_are_not_taken(tmp_path: Path) -> None:
    path, fast = tmp_path / "devices.json", BOTH | {"two-stage": {1024: 0.1}}
    probe_with(fast, name="another chip").save(path)
    assert chosen_routes(HOST, path) is None
    probe_with(BOTH | {"gone": {1024: 0.1, 4096: 0.1}}).save(path)
    assert chosen_routes(HOST, path) is None
    path.write_text("damaged")
    assert chosen_routes(HOST, path) is None
    probe_with(fast, MPS).save(path)
    assert chosen_routes(MPS, path) is None


@needs_openblas
def test_a_route_that_is_far_behind_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def seconds(call: Any, _: int) -> float:
        G, device = call.args
        route = device.routes.values[0][1]
        asked.append((route, len(G)))
        return {"one-stage": 1.0, "two-stage": 1.4, "mkl": 1.6}[route]

    # Measured times are the machine's.
    monkeypatch.setattr(measuring, "_seconds_at_once", seconds)
    found = measuring.measure_routes(HOST, (8, 16), 1)
    assert found["values"].keys() - {"mkl"} == {"one-stage", "two-stage"}
    assert ("two-stage", 16) in asked and ("mkl", 16) not in asked and ("numpy", 8) not in asked


@needs_openblas
def test_a_record_is_of_its_routes(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan that was begun by one choice is not ended by another; by the same it is, to the same bits."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checkpoint, some = open_checkpoint(pico), Selection(layers=(0,))
    journal = tmp_path / "journal"

    def run(crew: Crew, stop: bool = False) -> Spectra:
        def tick(_: object) -> None:
            if stop:
                raise KeyboardInterrupt

        return scan(checkpoint, some, crew=crew, journal=journal, tick=tick)

    assert choose_crew("cpu").label == "cpu float64"
    with pytest.raises(KeyboardInterrupt):
        run(choose_crew("cpu"), stop=True)
    probe_with(BOTH | {"two-stage": {1024: 0.1, 2048: 0.1, 4096: 0.1}}).save()
    crew = choose_crew("cpu")
    assert crew.label == "cpu float64 values:0=numpy,256=two-stage vectors:0=numpy,256=one-stage"
    assert precision_of(crew.label, "gram") == 2.0**-52
    with pytest.raises(RecordError, match=r"other routes: found 'cpu float64 values.*expected 'cpu float64'; try"):
        run(crew)
    cache_path().unlink()
    whole = run(choose_crew("cpu"))
    journal.unlink()
    undisturbed = run(choose_crew("cpu"))
    assert whole.device == undisturbed.device == "cpu float64"
    assert all((whole.values[name] == s).all() for name, s in undisturbed.values.items())
