"""Caches are for speed: one that cannot be read, written or made is no reason to stop work on local files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pico_language import TEXT, make_model

from laser.errors import RecordError
from laser.spectral.probe import Probe, cache_path

VARIABLES = ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "MPLCONFIGDIR", "TMPDIR", "HOME")
# Verbs that import what has caches: transformers, datasets, matplotlib, torch.
SCRIPT = """
import sys
from laser.cli import main
model, text, at, few = sys.argv[1:]
verbs = (
    ["devices"],
    ["scan", model, "--dry-run"],
    ["run", model, "-o", at + "/out", "--rule", "fraction:0.5", "--roles", "q", "--no-search"],
    ["scan", model, "-o", at + "/s"],
    ["plot", at + "/s", "-o", at + "/p.png", "--heat", "kept"],
    ["eval", model, at + "/out", "--text", text, "--window", "16", "--windows", "2"],
    ["calibrate", model, "-o", at + "/m", "--text", text, "--window", "16", "--windows", "4"],
)
for words in verbs[:2] if few else verbs:
    assert main(words) == 0, words
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a file", "missing and cannot be made"])
def test_local_work_goes_on_without_caches(kind: str, tmp_path: Path) -> None:
    """Every variable at once: a file stands where the directory should be, or above it."""
    model = make_model(tmp_path / "model", "llama")
    (tmp_path / "text.txt").write_text(TEXT)
    in_the_way = tmp_path / "file"
    in_the_way.write_text("no directory")
    place = in_the_way if kind == "a file" else in_the_way / "cache"
    environment = os.environ | dict.fromkeys(VARIABLES, str(place))
    words = [sys.executable, "-c", SCRIPT, str(model), str(tmp_path / "text.txt"), str(tmp_path)]
    words += ["few" if kind == "a file" else ""]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert in_the_way.read_text() == "no directory"


def test_a_record_of_devices_that_cannot_be_reached_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def refused(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", refused)
    with pytest.raises(RecordError, match="Permission denied"):
        Probe.load("cpu float64")
    monkeypatch.undo()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    assert not cache_path().exists() and Probe.load("cpu float64") is None
