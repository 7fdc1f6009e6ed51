"""`--force --resume` goes on where a killed process was, also when all but the exchange was done."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import sampled
from disk_faults import forked
from helpers import snapshot

import laser.cli.run
from laser.checkpoint import swap
from laser.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
OLD = ["run", "pico", "-o", "out", "--rule", "rank:3", "--roles", "q", "--no-search"]
NEW = ["run", "pico", "-o", "out", "--rule", "rank:4", "--roles", "q", "--no-search", "--leaderboard"]


def ran(folder: Path, words: list[str], board: Callable[..., None] = lambda *_: None) -> tuple[int, str]:
    """A command line in a child of its own, with this in the place of the leaderboard; exit code and stderr."""

    def work() -> int:
        laser.cli.run.leaderboards = board  # pyright: ignore[reportAttributeAccessIssue]
        laser.cli.run.require_leaderboard = lambda *_, **__: None  # pyright: ignore
        laser.cli.run.write_card = lambda *_, **__: None  # pyright: ignore
        return main(words)

    end = forked(work, folder)
    return end.code, end.err


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def weights(folder: Path) -> dict[str, tuple[int, int]]:
    """inode and time of the last write by shard."""
    found = {path.name: path.stat() for path in folder.glob("*.safetensors")}
    return {name: (at.st_ino, at.st_mtime_ns) for name, at in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("touched", sampled([False, True], 2))
def test_a_run_killed_behind_its_reduction_writes_no_shard_again(pico: Path, tmp_path: Path, touched: bool) -> None:
    """touched: the earlier output was copied or restored meanwhile, and looks younger than the new one."""
    assert ran(tmp_path, OLD) == (0, "")
    old = snapshot(tmp_path / "out")
    assert ran(tmp_path, [*NEW, "--force"], die) == (-signal.SIGKILL, "")
    assert snapshot(tmp_path / "out") == old
    if touched:
        for path in (tmp_path / "out").rglob("*"):
            os.utime(path)
    made = weights(tmp_path / ".out.new")
    assert made
    assert ran(tmp_path, [*NEW, "--force", "--resume"]) == (0, "")
    assert weights(tmp_path / "out") == made
    found = snapshot(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"pico", "out"}
    (tmp_path / "out").rename(tmp_path / "resumed")
    assert ran(tmp_path, NEW) == (0, "")
    assert found == snapshot(tmp_path / "out") != old


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("linux", sampled([True, False], 2))
def test_a_process_killed_beside_the_exchange_leaves_one_of_both_and_no_doubt(
    pico: Path, tmp_path: Path, after: bool, linux: bool
) -> None:
    assert ran(tmp_path, OLD)[0] == 0
    real = swap._exchange

    def exchange(new: Path, target: Path, old: Path) -> None:
        if after:
            real(new, target, old)
            die()
        if linux:
            new.rename(old)
        else:
            target.rename(old)
        die()

    def work() -> int:
        swap._exchange = exchange
        return main([*NEW[:-1], "--force"])

    assert forked(work, tmp_path).code == -signal.SIGKILL
    made = weights(tmp_path / ("out" if after else ".out.old" if linux else ".out.new"))
    assert len(made) == len(weights(tmp_path / "pico"))
    assert ran(tmp_path, [*NEW[:-1], "--force", "--resume"]) == (0, "")
    assert weights(tmp_path / "out") == made
    assert {path.name for path in tmp_path.iterdir()} == {"pico", "out"}
