"""The verbs from Python, by names: what they make is what the command line makes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from helpers import snapshot
from pico_language import TEXT, make_model

import laser
from laser.evaluation.text import cut_windows, load_tokenizer, read_text

WINDOWS: dict[str, Any] = {"window": 24, "windows": 6, "held_out_windows": 2}
ASKED = ("--window", "24", "--windows", "6", "--held-out-windows", "2")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 3)
    return path


def test_verbs_are_functions_whatever_is_imported_first() -> None:
    """A package of the same name would hide the function as soon as one of its modules is imported."""
    code = "import laser, laser.searching.search, laser.differences.unmerge, laser.cli.verbs\n"
    code += "verbs = 'scan make_plan reduce run search calibrate evaluate leaderboard delta unmerge verify'.split()\n"
    code += "print([v for v in verbs if not callable(getattr(laser, v))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


@pytest.mark.slow
def test_search_is_the_verbs(tmp_path: Path, text: Path, run: Run) -> None:
    model = make_model(tmp_path / "m", "mixtral")
    found = laser.search(str(model), "fraction:0.8,fraction:0.3", text=str(text), lowest_snr=3, device="cpu", **WINDOWS)
    words = ("search", model, "-o", tmp_path / "plan.json", "--text", text, "--rules", "fraction:0.8,fraction:0.3")
    assert run(*words, *ASKED, "--lowest-snr", 3, "--device", "cpu")[0] == 0
    assert found.plan.reductions == laser.Plan.load(tmp_path / "plan.json").reductions
    assert "trials accepted" in repr(found) and len(found.trials) == 6
    with pytest.raises(laser.UsageError, match="no way to accept"):
        laser.search(model, text=text, accept="always", **WINDOWS)


@pytest.mark.slow
def test_run_is_the_verbs(pico: Path, tmp_path: Path, run: Run) -> None:
    made = laser.run(str(pico), str(tmp_path / "a" / "out"), "mp-median", device="cpu")
    assert (
        run("run", pico, "-o", tmp_path / "b" / "out", "--rule", "mp-median", "--no-search", "--device", "cpu")[0] == 0
    )
    there, here = snapshot(tmp_path / "b" / "out"), snapshot(tmp_path / "a" / "out")
    assert {name: data for name, data in here.items() if name.endswith((".safetensors", "plan.json"))}.items() <= (
        there.items()
    )
    assert made.outcome == laser.Outcome.load(tmp_path / "a" / "out") and "README.md" in here
    with pytest.raises(laser.OutputError, match="exists"):
        laser.run(pico, tmp_path / "a" / "out", device="cpu")


@pytest.mark.slow
def test_texts_are_taken_by_name(tmp_path: Path, text: Path) -> None:
    model = make_model(tmp_path / "m", "mixtral")
    found = laser.evaluate(model, text, window=24, limit=4, device="cpu")
    assert len(found.losses) == found.windows == 4 and found.text == "text.txt"
    cut = cut_windows(read_text(text), load_tokenizer(model), length=24, limit=4)
    assert laser.evaluate(model, cut, device="cpu") == found
    moments = laser.calibrate(model, str(text), tmp_path / "m.safetensors", window=24)
    assert moments.source.name == "m"
