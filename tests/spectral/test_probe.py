"""The record of a machine's constants: kept, read back, and used."""

from dataclasses import replace
from pathlib import Path

import pytest

from laser.errors import RecordError
from laser.spectral import probe
from laser.spectral.probe import Probe, interpolate

ONE = Probe("cpu float64", "a chip", "2.13", 2, 1e10, {256: 0.01, 1024: 0.5}, {256: 0.02, 1024: 1.5}, measured="now")


def test_saved_beside_others_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Probe.load("cpu float64") is None
    other = Probe("cuda float64", "b", "2.13", 2, 6e13, {4096: 0.1}, {4096: 0.1}, {4096: 0.2}, 5e10, 5e10, 1e9, 1e9)
    other = replace(other, routes={"values": {"mkl": {1024: 0.5}}, "vectors": {}}, busy=4)
    assert ONE.save() == other.save() == tmp_path / "laser" / "devices.json"
    assert Probe.load("cpu float64") == ONE and Probe.load("cuda float64") == other
    assert [p.name for p in (tmp_path / "laser").iterdir()] == ["devices.json"]


def test_a_relative_cache_directory_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert probe.cache_path() == Path.home() / ".cache" / "laser" / "devices.json"


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"kind": "devices", "version": 9, "probes": {}}', '{"kind":"devices","version":1,"probes":3}']
)
def test_a_damaged_file_is_named_and_replaced(text: str, tmp_path: Path) -> None:
    path = tmp_path / "devices.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=r"devices\.json.*laser devices --probe"):
        Probe.load("cpu float64", path)
    ONE.save(path)
    assert Probe.load("cpu float64", path) == ONE


def test_half_a_probe_is_named(tmp_path: Path) -> None:
    path = tmp_path / "devices.json"
    path.write_text('{"kind": "devices", "version": 1, "probes": {"cpu float64": {"device": "cpu float64"}}}')
    with pytest.raises(RecordError, match="not whole"):
        Probe.load("cpu float64", path)


def test_between_and_beyond_what_was_measured() -> None:
    cubic = {p: 1e-9 * p**3 for p in (256, 1024, 2048)}
    for p in (100, 256, 500, 1024, 1500, 4096):
        assert interpolate(cubic, p) == pytest.approx(1e-9 * p**3)
    assert interpolate({}, 10) == 0.0


def test_estimated_seconds_grow_with_the_matrix_and_not_with_its_orientation() -> None:
    assert ONE.values_seconds(1024, 4096) == ONE.values_seconds(4096, 1024) > ONE.values_seconds(1024, 1024)
    assert ONE.truncate_seconds(1024, 1024) == ONE.truncate_seconds(1024, 1024, 512)
    assert ONE.truncate_seconds(1024, 1024, 10) == pytest.approx(ONE.truncate_seconds(1024, 1024, 1014))
    assert ONE.values_seconds(1024, 1024) == pytest.approx(2 * 1024**3 / 1e10 + 0.5)
