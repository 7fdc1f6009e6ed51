"""--part I/N: the bytes of one process, whoever comes when, and whatever is killed on the way."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, sampled
from helpers import snapshot

import laser
from laser.cli import main
from laser.engine.crew import Crew
from laser.errors import OutputError, UsageError
from laser.parts import PartOfRun
from laser.pipeline import reduce_part, scan_part
from laser.selection import Selection
from laser.spectral.devices import choose_device

pytestmark = pytest.mark.usefixtures("one_thread")
CREW = Crew((choose_device("cpu"),), 1)


@pytest.fixture
def whole(pico: Path, run: Run, tmp_path: Path) -> Path:
    """A folder with the spectra, the plan and the output of one process."""
    folder = tmp_path / "whole"
    folder.mkdir()
    assert run("scan", pico, "-o", folder / "s", "--workers", 1)[0] == 0
    assert run("plan", folder / "s", "-o", folder / "p", "--rule", "mp-edge")[0] == 0
    assert run("reduce", pico, folder / "p", "-o", folder / "out", "--workers", 1)[0] == 0
    return folder


def scan(pico: Path, output: Path, part: str, *more: object) -> list[object]:
    return ["scan", pico, "-o", output, "--workers", 1, "--part", part, *more]


def reduce(pico: Path, whole: Path, output: Path, part: str, *more: object) -> list[object]:
    return ["reduce", pico, whole / "p", "-o", output, "--workers", 1, "--part", part, *more]


@pytest.mark.slow
@pytest.mark.parametrize("order", sampled(list(permutations(range(1, 4))), 2))
def test_the_bytes_are_those_of_one_process(
    order: list[int], pico: Path, whole: Path, run: Run, tmp_path: Path
) -> None:
    """Whatever the order; and those that are not the last say which parts are not done."""
    left = {1, 2, 3}
    for number in order:
        left -= {number}
        for words in (scan(pico, tmp_path / "s", f"{number}/3"), reduce(pico, whole, tmp_path / "out", f"{number}/3")):
            code, out, err = run(*words)
            assert code == 0, err
            if left:
                named = ", ".join(f"{each}/3" for each in sorted(left))
                assert f"part {number}/3 is done in " in out and f" is not whole: not done are {named}\n" in out
        assert (tmp_path / "s").exists() == (tmp_path / "out" / "laser.json").exists() == (not left)
    assert (tmp_path / "s").read_bytes() == (whole / "s").read_bytes()
    assert snapshot(tmp_path / "out") == snapshot(whole / "out")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name not in ("pico", "whole")) == ["out", "s"]
    assert not list((tmp_path / "out").rglob(".*")) and not (tmp_path / "out" / "laser").exists()


@pytest.mark.parametrize("of", [1, 2, 5, 40])
@pytest.mark.slow
def test_any_number_of_parts_does(of: int, pico: Path, whole: Path, run: Run, tmp_path: Path) -> None:
    """Also more than there are shards, or matrices."""
    for number in range(1, of + 1):
        assert run(*scan(pico, tmp_path / "s", f"{number}/{of}"))[0] == 0
        if of <= 5:
            assert run(*reduce(pico, whole, tmp_path / "out", f"{number}/{of}"))[0] == 0
    assert (tmp_path / "s").read_bytes() == (whole / "s").read_bytes()
    assert of > 5 or snapshot(tmp_path / "out") == snapshot(whole / "out")


@pytest.mark.slow
def test_a_checkpoint_of_one_file(make_pico: Callable[..., Path], tmp_path: Path) -> None:
    """It has no index that comes last: the shard waits for laser.json under its other name."""
    checkpoint = laser.open_checkpoint(make_pico(shards=1))
    plan = laser.make_plan(laser.scan(checkpoint, crew=CREW), "mp-edge")
    laser.reduce(checkpoint, plan, tmp_path / "whole", crew=CREW)
    assert reduce_part(checkpoint, plan, tmp_path / "out", PartOfRun(1, 2), crew=CREW) == [PartOfRun(2, 2)]
    reduce_part(checkpoint, plan, tmp_path / "out", PartOfRun(2, 2), crew=CREW)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def work(words: list[object], begin: Any, code: Any) -> None:
    begin.wait()
    code.value = main([str(word) for word in words])


@pytest.mark.slow
@pytest.mark.parametrize("round", range(3))
def test_all_parts_at_once(round: int, pico: Path, whole: Path, tmp_path: Path) -> None:
    """One of them, whichever, makes the whole; one that comes to it at the same time waits and finds it made."""
    context = multiprocessing.get_context("fork")
    for make in (
        lambda part: scan(pico, tmp_path / "s", part),
        lambda part: reduce(pico, whole, tmp_path / "out", part),
    ):
        begin, codes = context.Barrier(4), [context.Value("i", 99) for _ in range(4)]
        children = [
            context.Process(target=work, args=(make(f"{number}/4"), begin, code))
            for number, code in enumerate(codes, 1)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(120)
        assert [code.value for code in codes] == [0] * 4
    assert (tmp_path / "s").read_bytes() == (whole / "s").read_bytes()
    assert snapshot(tmp_path / "out") == snapshot(whole / "out")


@pytest.mark.slow
def test_a_part_that_is_run_twice_does_nothing_twice(pico: Path, whole: Path, run: Run, tmp_path: Path) -> None:
    assert run(*scan(pico, tmp_path / "s", "1/2"))[0] == run(*reduce(pico, whole, tmp_path / "out", "1/2"))[0] == 0

    def state() -> list[object]:
        """Every byte, and which files weights were written to when; a journal that is opened is new to the disk."""
        shards = [path.stat() for path in sorted((tmp_path / "out").glob("*.safetensors"))]
        return [snapshot(tmp_path), [(found.st_ino, found.st_mtime_ns) for found in shards]]

    before = state()
    assert run(*scan(pico, tmp_path / "s", "1/2"))[0] == run(*reduce(pico, whole, tmp_path / "out", "1/2"))[0] == 0
    assert before == state()
    assert run(*scan(pico, tmp_path / "s", "2/2"))[0] == run(*reduce(pico, whole, tmp_path / "out", "2/2"))[0] == 0
    made = snapshot(tmp_path / "out")
    for part in ("1/2", "2/2"):  # the whole is there: it is looked at, and stays
        code, out, _ = run(*reduce(pico, whole, tmp_path / "out", part))
        assert code == 0 and "written to" in out and run(*scan(pico, tmp_path / "s", part))[0] == 0
    assert snapshot(tmp_path / "out") == made == snapshot(whole / "out")


@pytest.mark.slow
def test_the_same_part_in_two_processes_is_refused(pico: Path, whole: Path, tmp_path: Path) -> None:
    checkpoint, plan = laser.open_checkpoint(pico), laser.Plan.load(whole / "p")
    told: list[str] = []

    def tick(*_: object) -> None:
        if not told:
            words = [sys.executable, "-m", "laser", *map(str, reduce(pico, whole, tmp_path / "out", "1/2"))]
            done = subprocess.run(words, capture_output=True, text=True, timeout=120)
            told.append(f"{done.returncode} {done.stderr}")

    reduce_part(checkpoint, plan, tmp_path / "out", PartOfRun(1, 2), crew=CREW, tick=tick)
    assert told[0].startswith("1 laser: ") and "journal.jsonl.1-of-2 is being written by process " in told[0]


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["scan", "reduce"])
def test_what_is_of_another_run_is_refused(verb: str, pico: Path, whole: Path, run: Run, tmp_path: Path) -> None:
    """Another number of parts, another plan or selection, one process alone; and nothing of it is left."""
    output = tmp_path / "o"
    make = {"scan": lambda part: scan(pico, output, part), "reduce": lambda part: reduce(pico, whole, output, part)}[
        verb
    ]
    assert run(*make("1/3"))[0] == 0
    before = sorted(p for p in tmp_path.rglob("*") if whole not in p.parents)
    code, _, err = run(*make("2/4"))
    assert code == 1 and "1-of-3 is one of 3 parts, found --part 2/4; try --part I/3, or another -o" in err
    if verb == "reduce":
        assert run("plan", whole / "s", "-o", whole / "p", "--rule", "rank:4", "--force")[0] == 0
    else:
        make = lambda part: scan(pico, output, part, "--roles", "q")  # noqa: E731
    code, _, err = run(*make("2/3"))
    differ = {"scan": "selection", "reduce": "plan"}[verb]
    assert code == 1 and f"1-of-3 belongs to another run: {differ} differ; repeat the command of that part" in err
    undivided = [word for word in make("2/3") if word not in ("--part", "2/3")]
    for words in [[], ["--resume"]] if verb == "reduce" else [[]]:
        code, _, err = run(*undivided, *words)
        assert code == 1 and "1-of-3 is of a run in parts; give the command of one of them again" in err
    assert before == sorted(p for p in tmp_path.rglob("*") if whole not in p.parents)
    assert run(*undivided, "--force")[0] == 0  # begins afresh
    assert not [p for p in tmp_path.rglob("*") if "-of-" in p.name and "safetensors" not in p.name]


def test_a_part_of_what_was_begun_undivided_is_refused(pico: Path, whole: Path, run: Run, tmp_path: Path) -> None:
    checkpoint, plan = laser.open_checkpoint(pico), laser.Plan.load(whole / "p")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        laser.reduce(checkpoint, plan, tmp_path / "out", crew=CREW, tick=stop)
    with pytest.raises(OutputError, match=r"journal.jsonl is of a run without --part; go on with it without"):
        reduce_part(checkpoint, plan, tmp_path / "out", PartOfRun(1, 2), crew=CREW)
    laser.reduce(checkpoint, plan, tmp_path / "out", crew=CREW, resume=True)
    assert snapshot(tmp_path / "out") == snapshot(whole / "out")


@pytest.mark.slow
def test_a_killed_part_goes_on_and_so_does_one_killed_while_it_makes_the_whole(
    pico: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, plan, out = laser.open_checkpoint(pico), laser.Plan.load(whole / "p"), tmp_path / "out"
    ticks: list[str] = []

    def stop(matrix: Any, *_: object) -> None:
        ticks.append(matrix.name)
        if len(ticks) in (3, 7):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            reduce_part(checkpoint, plan, out, PartOfRun(1, 2), crew=CREW, tick=stop)
    assert reduce_part(checkpoint, plan, out, PartOfRun(1, 2), crew=CREW, tick=stop) == [PartOfRun(2, 2)]
    from laser.checkpoint import writer

    calls: list[Path] = []

    def killed(path: Path, *_: Any) -> None:
        calls.append(path)
        raise KeyboardInterrupt

    for name in ("save_json", "_sync_directory"):  # before laser.json, and behind the index
        with monkeypatch.context() as patch:
            patch.setattr(writer, name, killed)  # a kill at that very call: nothing can be handed in there
            with pytest.raises(KeyboardInterrupt):
                reduce_part(checkpoint, plan, out, PartOfRun(2, 2), crew=CREW, tick=stop)
    assert (out / "laser" / "journal.jsonl").exists() and len(calls) == 2
    reduce_part(checkpoint, plan, out, PartOfRun(1, 2), crew=CREW, tick=stop)  # any part
    assert sorted(ticks) == sorted(plan.reductions)  # no matrix was computed twice
    assert snapshot(out) == snapshot(whole / "out") and not (out / "laser").exists()


@pytest.mark.slow
def test_what_was_changed_between_two_parts_is_made_again(pico: Path, whole: Path, tmp_path: Path) -> None:
    checkpoint, plan, out = laser.open_checkpoint(pico), laser.Plan.load(whole / "p"), tmp_path / "out"
    reduce_part(checkpoint, plan, out, PartOfRun(1, 2), crew=CREW)
    first = next(out.glob("*.safetensors"))
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    reduce_part(checkpoint, plan, out, PartOfRun(2, 2), crew=CREW)
    assert snapshot(out) == snapshot(whole / "out")
    shutil.rmtree(out)
    reduce_part(checkpoint, plan, out, PartOfRun(1, 2), crew=CREW)
    next(out.glob("*.safetensors")).unlink()
    reduce_part(checkpoint, plan, out, PartOfRun(2, 2), crew=CREW)
    assert snapshot(out) == snapshot(whole / "out")


def test_the_last_part_reads_what_the_others_have_written(pico: Path, whole: Path, tmp_path: Path) -> None:
    """One bit is another, and the file looks as it was left."""
    checkpoint, plan, out = laser.open_checkpoint(pico), laser.Plan.load(whole / "p"), tmp_path / "out"
    reduce_part(checkpoint, plan, out, PartOfRun(1, 2), crew=CREW)
    first = next(out.glob("*.safetensors"))
    data, stat = bytearray(first.read_bytes()), first.stat()
    data[-1] ^= 1
    first.write_bytes(data)
    os.utime(first, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    reduce_part(checkpoint, plan, out, PartOfRun(2, 2), crew=CREW)
    assert snapshot(out) == snapshot(whole / "out")


def test_json_names_what_is_missing(pico: Path, run: Run, tmp_path: Path) -> None:
    code, out, _ = run(*scan(pico, tmp_path / "s", "2/3", "--json"))
    found = json.loads(out)
    assert code == 0 and found.pop("seconds") > 0
    assert found == {"output": str(tmp_path / "s"), "part": "2/3", "missing": ["1/3", "3/3"]}


@pytest.mark.parametrize("text", ["", "1", "0/3", "4/3", "-1/3", "1/0", "1/2/3", "a/b", "1/99999", "１/3", " 1/3"])
def test_what_names_no_part(text: str) -> None:
    with pytest.raises(
        UsageError, match=r"names no part, expected I/N with I from 1 to N and N up to 9999; try --part 1/8"
    ):
        PartOfRun.parse(text)


def test_what_is_only_for_the_whole(pico: Path, whole: Path, run: Run, tmp_path: Path) -> None:
    for flag in ("--force", "--dry-run"):
        for words in (scan(pico, tmp_path / "s", "1/2"), reduce(pico, whole, tmp_path / "out", "1/2")):
            code, _, err = run(*words, flag)
            assert code == 2 and f"{flag} is for the whole; try it without --part" in err
    code, _, err = run("run", pico, "-o", tmp_path / "out", "--part", "1/2")
    assert code == 2 and "laser scan MODEL -o SPECTRA --part 1/2" in err and "laser reduce MODEL PLAN" in err
    assert not (tmp_path / "out").exists() and not (tmp_path / "s").exists()


def test_every_matrix_is_of_one_part() -> None:
    for of in (1, 2, 3, 8):
        parts = [PartOfRun(number, of).mine(range(20)) for number in range(1, of + 1)]
        assert sorted(item for part in parts for item in part) == list(range(20))
    assert [str(part) for part in PartOfRun(2, 3).all()] == ["1/3", "2/3", "3/3"]


def test_a_selection_that_is_small(pico: Path, tmp_path: Path) -> None:
    checkpoint, selection = laser.open_checkpoint(pico), Selection(layers=(0,), roles=("q",))
    assert scan_part(tmp_path / "s", checkpoint, selection, CREW, "gram", PartOfRun(2, 2)) == [PartOfRun(1, 2)]
    spectra = scan_part(tmp_path / "s", checkpoint, selection, CREW, "gram", PartOfRun(1, 2))
    assert isinstance(spectra, laser.Spectra) and len(spectra.values) == 1
