"""What is estimated: by the probe of this machine, by another's constants without one, and against what it took."""

import json
from pathlib import Path

import pytest
import torch
from conftest import Run

import laser
from laser.engine.cost import ELSEWHERE, Estimate, Meter, estimate_cost
from laser.engine.crew import Crew
from laser.spectral.devices import Device, choose_device
from laser.spectral.probe import Probe

CPU = choose_device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own: what the user has probed must not count."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def selected(checkpoint: laser.Checkpoint) -> list[laser.Matrix]:
    return [m for m in laser.list_matrices(checkpoint) if laser.Selection().why_not(m) is None]


def test_by_the_probe_of_this_machine(pico: Path) -> None:
    probe = Probe("cpu float64", "a chip", "2.13", 1, 1e6, {32: 0.5}, {32: 1.0}, measured="2026-11-23")
    probe.save()
    checkpoint = laser.open_checkpoint(pico)
    matrices = [m for m in selected(checkpoint) if m.role == "q"]  # three of 32 x 32
    one = estimate_cost(checkpoint, matrices, Crew((CPU,), 1))
    product = 2 * 32**3 / 1e6
    assert one.scan_seconds == pytest.approx(3 * (product + 0.5))
    assert one.reduce_seconds == pytest.approx(3 * (2 * product + 1.0))  # rank p / 2: as much again for the cut
    assert one.visit_seconds < one.scan_seconds + one.reduce_seconds
    assert one.basis == "by the probe of 2026-11-23"
    second = Crew((Device("cuda:1", torch.float64, False, ""),))  # a probe of "cuda" serves each of several
    Probe("cuda float64", "a chip", "2.13", 1, 1e6, {32: 0.5}, {32: 1.0}, measured="2026-11-22").save()
    assert estimate_cost(checkpoint, matrices, second).basis == "by the probe of 2026-11-22"
    two = estimate_cost(checkpoint, matrices, Crew((CPU,), 3))
    assert two.scan_seconds == pytest.approx(one.scan_seconds / 3) and two.peak_bytes > one.peak_bytes
    known = estimate_cost(checkpoint, matrices, Crew((CPU,), 1), {m.name: 0 for m in matrices})
    assert known.reduce_seconds == pytest.approx(3 * (product + 1.0))


def test_permutations_and_the_metric_of_the_data_are_foretold_too(pico: Path) -> None:
    Probe("cpu float64", "a chip", "2.13", 1, 1e6, {32: 0.5}, {32: 1.0}, null={32**2: 1.0}).save()
    checkpoint = laser.open_checkpoint(pico)
    matrices = [m for m in selected(checkpoint) if m.role == "q"]
    plain = estimate_cost(checkpoint, matrices, Crew((CPU,), 1))
    drawn = estimate_cost(checkpoint, matrices, Crew((CPU,), 1), draws=19)
    assert drawn.scan_seconds - plain.scan_seconds == pytest.approx(3 * 19 * 1.0)
    assert drawn.visit_seconds > plain.visit_seconds and drawn.reduce_seconds == plain.reduce_seconds
    both = estimate_cost(checkpoint, matrices, Crew((CPU,), 1), draws=19, in_data=True)
    assert both.peak_bytes > drawn.peak_bytes
    assert both.scan_seconds - drawn.scan_seconds > plain.scan_seconds  # a second spectrum, and no second permutations


def test_the_slower_of_disk_and_arithmetic_decides(pico: Path) -> None:
    checkpoint = laser.open_checkpoint(pico)
    Probe("cpu float64", "a chip", "2.13", 1, 1e15, {32: 0.0}, {32: 0.0}, disk_read=1e3, disk_write=1e3).save()
    found = estimate_cost(checkpoint, selected(checkpoint), Crew((CPU,), 1))
    assert found.reduce_seconds == pytest.approx(2 * found.disk_bytes / 1e3)
    assert found.scan_seconds == pytest.approx(sum(2 * m.parameters for m in selected(checkpoint)) / 1e3)


def test_without_a_probe_it_says_whose_constants(pico: Path, cache: Path) -> None:
    checkpoint = laser.open_checkpoint(pico)
    for label in ELSEWHERE:
        name, dtype = label.split()
        device = Device(name, getattr(torch, dtype), name == "cpu", "")
        found = estimate_cost(checkpoint, selected(checkpoint), Crew((device,)))
        assert "`laser devices --probe` measures yours" in found.basis and 0 < found.scan_seconds < found.reduce_seconds
    (cache / "laser").mkdir(parents=True)
    (cache / "laser" / "devices.json").write_text("{")
    assert "--probe" in estimate_cost(checkpoint, selected(checkpoint), Crew((CPU,))).basis


def test_the_constants_of_elsewhere_give_the_measured_times() -> None:
    """Measured on one: eigenvalues of 14336 x 4096 in 0.125 s on an H100, truncation to rank 83 in 0.136 s."""
    assert ELSEWHERE["cuda float64"].values_seconds(14336, 4096) == pytest.approx(0.125, rel=0.05)
    assert ELSEWHERE["cuda float64"].truncate_seconds(14336, 4096, 83) == pytest.approx(0.136, rel=0.05)


@pytest.mark.slow
def test_a_run_ends_with_foretold_and_real(run: Run, pico: Path, tmp_path: Path) -> None:
    spectra, plan = tmp_path / "s.safetensors", tmp_path / "plan.json"
    _, out, _ = run("scan", pico, "-o", spectra)
    assert "estimated" in out.splitlines()[-1] and "took" in out.splitlines()[-1]
    run("plan", spectra, "-o", plan, "--rule", "mp-edge")
    _, out, _ = run("reduce", pico, plan, "-o", tmp_path / "out", "--json")
    document = json.loads(out)
    assert document["seconds"] > 0 and document["peak_bytes"] > 0 and document["estimated"]["seconds"] > 0
    _, out, _ = run("run", pico, "-o", tmp_path / "run", "--rule", "mp-edge", "--no-search")
    assert "estimated" in out.splitlines()[-1]
    _, out, _ = run("scan", pico, "--dry-run", "--json")
    assert "basis" in json.loads(out)


def test_what_it_took_is_told_beside_it() -> None:
    told = Meter().against(1.0, Estimate(0, 0.0, 0.0, 0.0, 2 * 10**9, 0, "by nothing"))
    assert told.startswith("estimated 1.0 s and 2.00 GB (by nothing), took 0.0 s")
