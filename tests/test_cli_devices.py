"""laser devices, and the methods of the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Methods, Run
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from laser.spectra import Spectra
from laser.spectral import measuring
from laser.spectral.probe import Probe


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # The command takes no sizes: those of a user take half a minute, and a quarter of a GiB of disk.
    monkeypatch.setattr(measuring, "HOST_SIDES", (32, 64))
    monkeypatch.setattr(measuring, "ROUTE_SIDES", (32, 300))
    monkeypatch.setattr(measuring, "COPIED", 2**20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "laser" / "devices.json"


def test_devices_says_what_and_why(run: Run) -> None:
    code, out, _ = run("devices", "--device", "cpu")
    assert code == 0 and "takes cpu float64: asked for" in out and "method gram: " in out
    assert "GiB of memory free" in out and "all 24 bits" in out and "try --probe" in out
    assert json.loads(run("devices", "--device", "cpu", "--json")[1])["probe"] is None


@pytest.mark.slow
def test_probe_is_printed_and_kept(run: Run, cache: Path, tmp_path: Path) -> None:
    code, out, _ = run("devices", "--device", "cpu", "--probe", "--disk", str(tmp_path))
    assert code == 0 and str(cache) in out and "eigenvalues s" in out and "disk write" in out
    kept = Probe.load("cpu float64", cache)
    assert kept is not None and kept.eigenvectors.keys() == {32, 64} and kept.disk_read
    shown = json.loads(run("devices", "--device", "cpu", "--json")[1])["probe"]
    assert shown["product"] == kept.product
    assert "--probe measures again" in run("devices", "--device", "cpu")[1]


WRONG = {"kind": "devices", "version": 1, "probes": {"cpu float64": {"product": 0}}}


@pytest.mark.slow
@pytest.mark.parametrize("content", ["{", json.dumps(WRONG), "null"])
def test_a_damaged_record_is_told_and_measured_again(run: Run, cache: Path, content: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    code, out, err = run("devices", "--device", "cpu")
    assert code == 0 and "speed not measured" in out and "try `laser devices --probe`" in err and err.count("\n") == 1
    assert json.loads(run("devices", "--device", "cpu", "--json")[1])["probe"] is None
    assert run("devices", "--device", "cpu", "--probe")[0] == 0
    assert run("devices", "--device", "cpu")[::2] == (0, "")


@pytest.mark.slow
def test_a_probe_leaves_nothing_behind(run: Run, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = ("devices", "--device", "cpu", "--probe")
    cache.parent.mkdir(parents=True)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    killed, living = (cache.with_name(f"{cache.name}.{n}.partial") for n in (ended.pid, os.getppid()))
    killed.write_text("half")
    living.write_text("half")
    assert run(*probe)[0] == 0 and sorted(cache.parent.iterdir()) == sorted([cache, living])

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        assert run(*probe)[0] == 130
    assert sorted(cache.parent.iterdir()) == sorted([cache, living])


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_costs_no_probe(run: Run, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    code, out, err = run("devices", "--device", "cpu", "--probe")
    assert code == 0 and "eigenvalues s" in out and "not kept" in err and err.count("\n") == 1


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
    run: Run, pico: Path, tmp_path: Path, methods: Methods
) -> None:
    def fail(*_: object) -> None:
        raise LinAlgError("injected")

    methods.factors["gram"] = fail
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
    methods.values["gram"] = fail
    record = tmp_path / "s.safetensors"
    assert run("scan", str(pico), "-o", str(record), "--roles", "q", "--device", "cpu")[0] == 0
    for notes in (Spectra.load(record).notes, Spectra.load(out / "laser" / "spectra.safetensors").notes):
        assert len(notes) == 3 and set(notes.values()) == {"by svd, as gram: injected"}
