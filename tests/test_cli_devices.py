"""laser devices, and the methods of the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from laser.spectra import Spectra
from laser.spectral import factorise, measuring
from laser.spectral.probe import Probe

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "laser" / "devices.json"


def test_devices_says_what_and_why(run: Run) -> None:
    code, out, _ = run("devices", "--device", "cpu")
    assert code == 0 and "takes cpu float64: asked for" in out and "method gram: " in out
    assert "GiB of memory free" in out and "all 24 bits" in out and "try --probe" in out
    assert json.loads(run("devices", "--device", "cpu", "--json")[1])["probe"] is None


def test_probe_is_printed_and_kept(run: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "HOST_SIDES", (32, 64))
    monkeypatch.setattr(measuring, "COPIED", 2**20)
    code, out, _ = run("devices", "--device", "cpu", "--probe", "--disk", str(tmp_path))
    assert code == 0 and str(cache) in out and "eigenvalues s" in out and "disk write" in out
    kept = Probe.load("cpu float64", cache)
    assert kept is not None and kept.eigenvectors.keys() == {32, 64} and kept.disk_read
    shown = json.loads(run("devices", "--device", "cpu", "--json")[1])["probe"]
    assert shown["product"] == kept.product
    assert "--probe measures again" in run("devices", "--device", "cpu")[1]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_the_projector_makes_a_checkpoint_that_verifies(run: Run, pico: Path, tmp_path: Path, precision: str) -> None:
    out, spectra, plan = (str(tmp_path / name) for name in ("out", "s.safetensors", "p.json"))
    how = ("--device", "cpu", "--precision", precision)
    assert run("scan", str(pico), "-o", spectra, "--method", "projector", *how)[0] == 0
    assert run("plan", spectra, "-o", plan, "--rule", "fraction:0.5")[0] == 0
    assert run("reduce", str(pico), plan, "-o", out, "--method", "projector", *how)[0] == 0
    assert run("verify", str(pico), out)[0] == 0
    matrices = json.loads((tmp_path / "out" / "laser.json").read_text())["matrices"]
    methods = [m["method"] for m in matrices.values()]
    assert methods.count("projector") > 0.9 * len(methods)
    assert all((m["note"] == "") == (m["method"] == "projector") for m in matrices.values())


def test_steps_that_failed_are_in_the_record_and_on_the_screen(
    run: Run, pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise LinAlgError("injected")

    monkeypatch.setitem(factorise._FACTORS, "gram", fail)
    out = tmp_path / "out"
    code, told, _ = run(
        *("run", str(pico), "-o", str(out), "--rule", "fraction:0.5", "--no-search", "--roles", "q", "--device", "cpu")
    )
    assert (
        code == 0
        and "3 matrices were cut by another method than asked for; " in told
        and "by svd, as gram: injected" in told
    )
    matrices = json.loads((out / "laser.json").read_text())["matrices"]
    assert {(m["method"], m["note"]) for m in matrices.values()} == {("svd", "gram: injected")}
    monkeypatch.setitem(factorise._VALUES, "gram", fail)
    record = tmp_path / "s.safetensors"
    assert run("scan", str(pico), "-o", str(record), "--roles", "q", "--device", "cpu")[0] == 0
    for notes in (Spectra.load(record).notes, Spectra.load(out / "laser" / "spectra.safetensors").notes):
        assert len(notes) == 3 and set(notes.values()) == {"by svd, as gram: injected"}
