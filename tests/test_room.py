"""A disk without room, and a place that cannot be written to, are told before the work, with both numbers."""

from __future__ import annotations

import os
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

from laser.checkpoint import reader

Usage = namedtuple("Usage", "total used free")  # of shutil.disk_usage


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a matrix was read")

    # Commands open their checkpoints themselves; every read of weights goes through this.
    monkeypatch.setattr(reader, "read_bytes", never)


def size_of(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


@pytest.mark.parametrize("verb", ["run", "run in two passes", "run --force", "reduce"])
def test_a_full_disk_is_told_before_a_matrix_is_read(
    verb: str, pico: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    out, spectra, plan = tmp_path / "out", tmp_path / "s", tmp_path / "p"
    words: tuple[Any, ...] = ("run", pico, "-o", out, "--rule", "fraction:0.5", "--roles", "q", "--no-search")
    if verb == "reduce":
        assert run("scan", pico, "-o", spectra, "--roles", "q")[0] == 0
        assert run("plan", spectra, "-o", plan, "--rule", "fraction:0.5")[0] == 0
        words = ("reduce", pico, plan, "-o", out)
    elif verb == "run in two passes":
        words += ("--lowest-snr", 1)
    elif verb == "run --force":
        assert run(*words)[0] == 0
        words += ("--force",)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    needed = size_of(pico)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(needed, 1, needed - 1))
    request.getfixturevalue("unread")
    code, _, err = run(*words)
    assert code == 1
    assert re.search(r"not enough disk for .*: found 0\.\d+ GB free, expected 0\.\d+ GB", err), err
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}.keys() == before.keys()


def test_what_is_there_counts_when_a_run_goes_on(
    pico: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, make_pico: Callable[..., Path]
) -> None:
    out = tmp_path / "out"
    words = ("run", pico, "-o", out, "--rule", "fraction:0.5", "--roles", "q", "--no-search")
    assert run(*words)[0] == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1, 1, 0))
    code, _, err = run(*words, "--resume")
    assert code == 0, err


def test_a_directory_that_may_only_be_read_is_told_first(
    pico: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, unread: None
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    code, _, err = run("run", pico, "-o", tmp_path / "out", "--rule", "fraction:0.5", "--no-search")
    assert code == 1 and "is no directory that can be written to; try another -o" in err
    assert not (tmp_path / "out").exists()
