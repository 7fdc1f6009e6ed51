"""What a command says of its way: a bar on a terminal, plain lines elsewhere, all in a log file, nothing if told."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import connect, serving
from pico_language import TEXT, make_model

from laser.cli import common, progress
from laser.cli.progress import Bar, Lines

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
        bar.update(now="1 kept", to_come=3)
    with Bar("eval") as bar:
        bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"laser: convert: 1\.50kB of 3\.00kB; 0:00:0\d, about 0:00:0\d left", lines[0])
    assert re.fullmatch(r"laser: search: 1 of 4 trials, 1 kept; 0:00:0\d, about 0:00:0\d left", lines[1])
    assert re.fullmatch(r"laser: eval: 1 steps; 0:00:0\d", lines[2])


class Clock:
    """Seconds that pass when it is said."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_line_comes_every_30_seconds_with_done_total_time_left_and_what() -> None:
    clock, said = Clock(), list[str]()
    lines = Lines(said.append, "scan", 100, "%", clock=clock)
    for _ in range(30):  # every 10 seconds, 2 of 100
        clock.now += 10
        lines.now = f"matrix {lines.n / 2:g}"
        lines.update(2)
    lines.close()
    assert said[0] == "laser: scan: 6 %, matrix 2; 0:00:30, about 0:07:50 left" and len(said) == 10
    assert said[-1] == "laser: scan: 60 %, matrix 29; 0:05:00, about 0:03:20 left"


def test_a_line_comes_also_while_nothing_is_done() -> None:
    clock, said = Clock(), list[str]()
    lines = Lines(said.append, "calibrate", 4, "layers", clock=clock)
    for _ in range(7):
        clock.now += 10
        lines.say_if_due()
    assert said == [f"laser: calibrate: 0 of 4 layers; 0:{minutes}" for minutes in ("00:30", "01:00")]
    lines.close()
    clock.now += 100
    lines.say_if_due()
    lines.update(1)
    assert len(said) == 2  # it has ended


@pytest.mark.slow
def test_a_thread_looks_whether_a_line_is_due(often: None) -> None:
    said = list[str]()
    lines = Lines(said.append, "calibrate", None, "layers")
    time.sleep(1.5)
    lines.close()
    found = list(said)
    time.sleep(1.2)
    assert said == found == ["laser: calibrate: 0 layers; 0:00:01"]


def test_what_was_done_before_counts_as_done_and_not_for_the_time_left() -> None:
    clock = Clock()
    lines = Lines(lambda _: None, "download a.safetensors", 3000, "B", begun=1000, clock=clock)
    clock.now += 10
    lines.update(500)
    lines.close()
    assert lines.line() == "laser: download a.safetensors: 1.50kB of 3.00kB; 0:00:10, about 0:00:30 left"


def test_a_line_says_nothing_once_its_bar_has_ended(often: None, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar("scan", 2)
    bar.close()
    bar.update(1, "a matrix", to_come=1)
    assert capsys.readouterr().err == "" and bar.done == 0


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Whether it is a terminal is what the stream says.
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Bar("convert", 4096, size=True, begun=1024) as bar:
        bar.update(1024, "a.weight", to_come=1024)
        assert bar.done == 2048
        [shown] = bar._shown
        assert shown.total == 3072 and "2.05k/3.07k" in str(shown) and "a.weight" in str(shown)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("eval", "{model}"), r"eval m: 1 of 2 windows; "),
        (("eval", "{model}", "--stream"), r"eval m: 1 of 5 layers; "),
        (("calibrate", "{model}", "-o", "c", "--ledoit-wolf"), r"calibrate: 2 of 3 layers, layer 1; .* left"),
        (
            ("run", "{model}", "-o", "o", "--rule", "rank:4", "--lowest-snr", "2", "--no-search"),
            r"reduce: \d+ %, 1 of 2 ",
        ),
        (
            ("search", "{model}", "-o", "p", "--lowest-snr", "2"),
            r"search: 1 of 2 trials, \d kept, \d rejected; piece 3 of \d, .* left",
        ),
    ],
    ids=["eval", "eval streamed", "calibrate", "run", "search"],
)
@pytest.mark.slow
def test_long_work_tells_its_total(
    words: tuple[str, ...], told: str, often: None, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "m", "mixtral")
    (tmp_path / "t.txt").write_text(TEXT)
    # Files are written where the command line is.
    monkeypatch.chdir(tmp_path)
    text = () if "--rule" in words else ("--text", "t.txt", "--window", "16", "--windows", "2")
    code, _, err = run(*(word.replace("{model}", "m") for word in words), *text, "--device", "cpu")
    assert code == 0 and re.search(rf"^laser: {told}", err, re.M), err


@pytest.mark.slow
def test_downloads_and_conversions_tell_how_far_they_are(
    often: None, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "m", "mixtral")
    (tmp_path / "t.txt").write_text(TEXT)
    with serving() as hub:
        hub.add("maker/m", tmp_path / "m")
        connect(hub, tmp_path / "cache", monkeypatch)
        words = ("eval", "maker/m", "--text", tmp_path / "t.txt", "--window", "16", "--windows", "2")
        code, _, err = run(*words)
        assert code == 0, err
        found = re.findall(r"^laser: download (\S+): (\S+) of (\S+); 0:00:0\d, about 0:00:00 left$", err, re.M)
        assert "config.json" in {name for name, _, _ in found} and any(".safetensors" in name for name, _, _ in found)
        assert all(done == total for _, done, total in found)
        shutil.rmtree(tmp_path / "cache")
        assert run("-q", *words)[2] == ""
        shutil.rmtree(tmp_path / "cache")
        assert "\nlaser: download config.json\n" in f"\n{run('-v', *words)[2]}"


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("scan", 2) as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""


def test_a_command_tells_its_log_file_what_it_tells_people(often: None, pico: Path, tmp_path: Path, run: Run) -> None:
    log = tmp_path / "laser.log"
    code, out, err = run("scan", pico, "--log-file", log, "-o", tmp_path / "s")
    assert code == 0 and re.search(r"^laser: scan: \d+ %, \d+ of 48 matrices, model\.\S+; ", err, re.M)
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
    steps = [line for line in err.splitlines() if re.match(r"laser: scan: \d+ of \d+ matrices, model\.", line)]
    assert code == 0 and len(steps) == int(re.search(r"(\d+) matrices in", out)[1])  # type: ignore[index]


@pytest.mark.parametrize("words", [["--log-file"], ["--log-file="]])
def test_a_log_file_has_a_name(words: list[str], pico: Path, run: Run) -> None:
    code, _, err = run("scan", pico, *words)
    assert (code, err) == (2, "laser: --log-file names no file; try --log-file laser.log\n")


def test_a_log_file_is_no_models(pico: Path, run: Run) -> None:
    code, _, err = run("scan", pico, "--log-file", pico / "laser.log")
    assert code == 1 and "laser.log" in err and not (pico / "laser.log").exists()
    assert common.talk().log is None
