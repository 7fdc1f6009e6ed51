"""Two processes on one output: the second is told who is at work, and nothing is left of a lock once its holder is."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier, Thread

import pytest

import laser
from laser import files
from laser.checkpoint.push import push
from laser.errors import LaserError, OutputError
from laser.files import claimed, replacing, write_atomically
from laser.plan import make_plan
from laser.verification import verify

HOLDER = """
import importlib.util, sys, time, types
sys.modules["laser"] = types.ModuleType("laser")  # its locks alone, not the libraries
for name in ("errors", "files"):
    spec = importlib.util.spec_from_file_location("laser." + name, sys.argv[1] + "/" + name + ".py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["laser." + name] = module
    spec.loader.exec_module(module)
with module.claimed(__import__("pathlib").Path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(path: Path) -> Iterator[int]:
    """Another process, by its id, that holds `path` until it is killed."""
    package = str(Path(laser.__file__).parent)
    child = subprocess.Popen([sys.executable, "-c", HOLDER, package, str(path)], stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        try:
            yield child.pid
        finally:
            child.kill()


@pytest.mark.slow
def test_the_second_process_is_told_who_holds_it_and_a_killed_one_holds_nothing(pico: Path, tmp_path: Path) -> None:
    from laser.cli import main

    spectra, plan, out = tmp_path / "s", tmp_path / "p", tmp_path / "out"
    words = {
        spectra: ["scan", pico, "-o", spectra],
        plan: ["plan", spectra, "-o", plan, "--rule", "rank:4"],
        out: ["reduce", pico, plan, "-o", out],
    }
    link = tmp_path / "link"
    link.symlink_to(out, target_is_directory=True)  # the same place by another name
    for path, command in words.items():
        with holder(link if path is out else path):
            assert main([str(w) for w in command]) == 1 and not path.exists()
            assert main([str(w) for w in (*command, "--force")]) == 1 and not path.exists()
        assert main([str(w) for w in command]) == 0
    with holder(out):  # nobody may replace an output that is described or uploaded
        assert main(["card", str(out)]) == 1 and not (out / "README.md").exists()
        with pytest.raises(OutputError, match="is being written by process"):
            push(out, "a/b")
    assert main(["card", str(out)]) == 0
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"pico", "s", "p", "out", "link"}


def test_the_message_names_process_and_command(tmp_path: Path) -> None:
    with holder(tmp_path / "x") as pid:
        told = rf"x is being written by process {pid} \(`.+`, since 20\d\d-.*wait"
        with pytest.raises(OutputError, match=told), claimed(tmp_path / "x"):
            pass
    with claimed(tmp_path / "x"), claimed(tmp_path / "x"):  # whoever holds it may ask again
        assert (tmp_path / ".x.lock").exists()
    assert not list(tmp_path.iterdir())


def test_of_many_at_once_exactly_one_wins(pico: Path, tmp_path: Path) -> None:
    checkpoint = laser.open_checkpoint(pico)
    spectra = laser.scan(checkpoint, laser.Selection(roles=("q",)))
    plans = [make_plan(spectra, f"rank:{4 + i % 2}") for i in range(6)]  # equal and different commands
    for force in (False, True):
        out, barrier, ends = tmp_path / "out", Barrier(len(plans)), list[str]()

        def attempt(plan: laser.Plan, out: Path = out, barrier: Barrier = barrier, ends: list[str] = ends) -> None:
            barrier.wait()
            try:
                laser.reduce(checkpoint, plan, out, force=force)  # noqa: B023
                ends.append("won")
            except LaserError as error:
                ends.append(str(error))

        threads = [Thread(target=attempt, args=(plan,)) for plan in plans]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert force or ends.count("won") == 1
        assert all("being written by process" in e or "exists and is" in e for e in ends if e != "won"), ends
        assert verify(checkpoint, out).problems == ()


@pytest.mark.slow
def test_a_lock_just_taken_is_never_taken_for_a_file_of_others(tmp_path: Path) -> None:
    path, barrier, told = tmp_path / "x", Barrier(4), set[str]()

    def attempt() -> None:
        barrier.wait()
        for _ in range(150):
            try:
                with claimed(path):
                    pass
            except OutputError as error:
                told.add(str(error).split(" (")[0])

    threads = [Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("is being written by" in each for each in told) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["FIFO", "text"])
def test_a_file_of_others_that_has_the_name_of_the_lock_stays(tmp_path: Path, kind: str) -> None:
    lock = tmp_path / ".x.lock"
    os.mkfifo(lock) if kind == "FIFO" else lock.write_text("mine")
    with pytest.raises(OutputError, match="is no lock of laser, which needs the name; move it away"):
        with claimed(tmp_path / "x"):
            pass
    assert lock.is_fifo() if kind == "FIFO" else lock.read_text() == "mine"


def test_no_two_writers_share_a_temporary_name(tmp_path: Path) -> None:
    path = tmp_path / "record"
    with replacing(path) as one, replacing(path) as two:
        one.write(b"one")
        two.write(b"two")
    assert path.read_bytes() in (b"one", b"two") and [p.name for p in tmp_path.iterdir()] == ["record"]
    (tmp_path / ".record.0badcafe.tmp").write_bytes(b"of a process that was killed")
    write_atomically(path, b"three")
    assert path.read_bytes() == b"three" and [p.name for p in tmp_path.iterdir()] == ["record"]
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"three" and [p.name for p in tmp_path.iterdir()] == ["record"]


def test_without_locks_it_says_so_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "fcntl", None)  # as on Windows
    with pytest.raises(OutputError, match="which Windows lacks; try it in WSL"), claimed(tmp_path / "x"):
        pass
