"""What a command says of its way: a bar on a terminal, plain lines elsewhere, all in a log file, nothing if told."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from laser.cli import common, progress
from laser.cli.progress import Bar

Run = Callable[..., tuple[int, str, str]]
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for every step, and not every 30 seconds."""
    # The interval is a constant of the module: no option sets it.
    monkeypatch.setattr(progress, "EVERY", 0.0)


def test_where_there_is_no_terminal_a_line_says_how_far_it_is(often: None, capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("convert", 3000, size=True) as bar:
        bar.update(1500)
    with Bar("search", unit="trials") as bar:
        bar.update(now="1 kept", total=4)
    with Bar("eval") as bar:
        bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"laser: convert: 1\.50kB of 3\.00kB; 0:00:0\d, about 0:00:0\d left", lines[0])
    assert re.fullmatch(r"laser: search: 1 of 4 trials, 1 kept; 0:00:0\d, about 0:00:0\d left", lines[1])
    assert re.fullmatch(r"laser: eval: 1 steps; 0:00:0\d", lines[2])


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("scan", 2) as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""


def test_a_command_tells_its_log_file_what_it_tells_people(often: None, pico: Path, tmp_path: Path, run: Run) -> None:
    log = tmp_path / "laser.log"
    code, out, err = run("scan", pico, "--log-file", log, "-o", tmp_path / "s")
    assert code == 0 and re.search(r"^laser: scan: \d+ %, model\.\S+; ", err, re.M)
    written = log.read_text().splitlines()
    assert all(re.match(TIME, line) for line in written)
    found = [re.sub(TIME, "", line) for line in written]
    assert set(out.splitlines()) <= set(found) and any(line.startswith("laser: scan: 100 %") for line in found)
    code, _, err = run("scan", pico, "-o", tmp_path / "s", f"--log-file={log}")  # an error, behind what is there
    assert code == 1 and re.sub(TIME, "", log.read_text().splitlines()[len(written)]) == err.strip()


def test_quiet_leaves_the_result_and_verbose_names_each_step(often: None, pico: Path, tmp_path: Path, run: Run) -> None:
    code, out, err = run("-q", "scan", pico, "-o", tmp_path / "q")
    assert code == 0 and "written to" in out and err == ""
    code, out, err = run("scan", pico, "-o", tmp_path / "v", "--verbose")
    steps = [line for line in err.splitlines() if line.startswith("laser: scan: model.")]
    assert code == 0 and len(steps) == int(re.search(r"(\d+) matrices in", out)[1])  # type: ignore[index]


@pytest.mark.parametrize("words", [["--log-file"], ["--log-file="]])
def test_a_log_file_has_a_name(words: list[str], pico: Path, run: Run) -> None:
    code, _, err = run("scan", pico, *words)
    assert (code, err) == (2, "laser: --log-file names no file; try --log-file laser.log\n")


def test_a_log_file_is_no_models(pico: Path, run: Run) -> None:
    code, _, err = run("scan", pico, "--log-file", pico / "laser.log")
    assert code == 1 and "laser.log" in err and not (pico / "laser.log").exists()
    assert common.talk().log is None
