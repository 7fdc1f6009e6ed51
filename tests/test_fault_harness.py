"""Every verb that writes survives faults at its disk calls: a sample here, every call in benchmarks/faults.py."""

import errno
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sampled
from disk_faults import DATA, End, Fault, forked
from fault_trials import VERBS, Bench, Count, make_inputs, pinned
from helpers import snapshot

from laser import start
from laser.checkpoint import swap
from laser.cli import left_behind
from laser.errors import OutputError
from laser.files import claimed, lock_of, tidy_up, unfinished, write_atomically
from laser.journal import Journal, journal_is_whole
from laser.pipeline import tidy_spectra

# verb -> (kind, which call by its name, or a share of them)
SAMPLE: dict[str, tuple[tuple[str, str | float], ...]] = {
    "scan": (("kill", 0.6), ("full", "flock"), ("error", "unlink"), ("terminate", 0.6)),
    "reduce": (("kill", 0.5), ("torn", 0.6), ("short", "copy_file_range"), ("error", "close")),
    "reduce, one file": (("kill", "rename"),),
    "run": (("torn", 0.8), ("full", 0.7), ("interrupt", 0.6)),
    "search": (("kill", 0.8), ("error", 0.59)),
    "leaderboard": (("full", 0.33), ("error", 0.15)),
    "run, two passes": (("torn", "rename"),),
    "spectra": (("interrupt", 0.6),),
    "convert": (("full", 0.5), ("interrupt", 0.5), ("interrupt", 1.0)),
    "card": (("kill", 0.7),),
    "plan --force": (("full", "write"), ("interrupt", 1.0)),
    "reduce --force": (
        ("kill", 0.95),
        ("kill", "exchange"),
        ("torn", "exchange"),
        ("error", "exchange"),
        ("full", "exchange"),
    ),
    "plot --force": (("full", "write"), ("torn", "write")),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A small model and records of it; OpenMP's threads, which no fork survives, are put away meanwhile."""
    threads = torch.get_num_threads()
    pinned()
    yield make_inputs(tmp_path_factory.mktemp("faults") / "inputs")
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(SAMPLE, len(SAMPLE)))
def test_a_verb_survives_faults_at_its_disk_calls(name: str, inputs: dict[str, str], tmp_path: Path) -> None:
    if "plot" in name:
        pytest.importorskip("matplotlib")
    if "leaderboard" in name:
        pytest.importorskip("lm_eval")
    bench = Bench(next(verb for verb in VERBS if verb.name == name), inputs, tmp_path / "bench")
    count = Count()
    for kind, where in SAMPLE[name]:
        at = bench.calls.index(where) + 1 if isinstance(where, str) else max(int(where * len(bench.calls)), 1)
        if kind == "torn" and isinstance(where, float):
            at = next(i for i, call in enumerate(bench.calls, 1) if i >= at and call in DATA)
        count.add(bench, Fault(kind, at))
    assert not count.wrong, "\n".join(count.wrong)
    assert sum(count.met.values()) == len(SAMPLE[name])


def test_every_verb_with_an_output_is_among_them() -> None:
    """A new verb that writes has to be put under the harness."""
    from typer.main import get_command

    from laser.cli import app

    writing = {name for name, command in get_command(app).commands.items()  # pyright: ignore[reportAttributeAccessIssue]
               if any({"-o", "--force"} & set(option.opts) for option in command.params)}  # fmt: skip
    assert writing == {verb.words[0] for verb in VERBS}


# --- the harness itself sees what is wrong ----------------------------------------------------------------------------


def in_place(path: Path) -> Callable[[], int]:
    """A writer as it should not be."""

    def work() -> int:
        path.write_bytes(b"new" * 5)
        return 0

    return work


@pytest.mark.slow
def test_the_shim_counts_fails_cuts_and_kills(tmp_path: Path) -> None:
    path = tmp_path / "x"

    def disturbed(kind: str, at: int, work: Callable[[], int] | None = None) -> tuple[End, bytes | None]:
        for left in tmp_path.iterdir():  # temporary files of who was killed
            left.unlink()
        path.write_bytes(b"old")
        end = forked(work or in_place(path), tmp_path, Fault(kind, at))
        return end, path.read_bytes() if path.exists() else None

    calm = forked(in_place(path), tmp_path)
    assert calm.code == 0 and calm.calls == ("create", "write", "close") and not calm.hit
    assert disturbed("kill", 1) == (End(-9, "", "", ("create",), True, 0), b"old")
    assert disturbed("kill", 2)[1] == b"" and disturbed("torn", 2)[1] == b"newnewn"
    short = disturbed("short", 2)
    assert short[0].calls == ("create", "write", "write", "close") and short[1] == b"new" * 5
    full, content = disturbed("full", 2)
    assert full.code == 97 and "No space left" in full.err and content == b"newnewn"
    assert "Permission denied" in disturbed("error", 1)[0].err and "Input/output error" in disturbed("error", 2)[0].err
    assert "KeyboardInterrupt" in disturbed("interrupt", 2)[0].err
    calls = forked(lambda: write_atomically(path, b"new" * 5) or 0, tmp_path).calls
    assert {"create", "write", "fsync", "rename", "flock"} <= set(calls)
    for kind in ("kill", "torn", "full", "error", "interrupt"):  # and the right way to write survives them all
        for at in range(1, len(calls) + 1):
            end, content = disturbed(kind, at, lambda: write_atomically(path, b"new" * 5) or 0)
            assert content in (b"old", b"new" * 5) and end.hit, (kind, at)


@pytest.mark.slow
def test_a_trial_tells_a_verb_that_writes_in_place(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each check of the harness on a verb that is wrong in that way."""
    verb = next(verb for verb in VERBS if verb.name == "plan --force")
    # A verb as it should not be: laser has none.
    monkeypatch.setattr("laser.records.replacing", lambda path: path.open("wb"))
    bench = Bench(verb, inputs, tmp_path / "bench")
    at = next(i for i, name in enumerate(bench.calls, 1) if name == "write" and i > 6)
    problems, _ = bench.trial(Fault("torn", at))
    assert any(line.startswith("old lost") for line in problems)
    problems, _ = bench.trial(Fault("error", at))
    assert any(line.startswith("traceback") or line.startswith("old lost") for line in problems)


# --- what it found ----------------------------------------------------------------------------------------------------


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_lock_holds_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a traceback. What cannot be written there is only who holds it."""
    with monkeypatch.context() as disk:
        disk.setattr(os, "write", full)
        with claimed(tmp_path / "x"):
            disk.undo()
            assert (tmp_path / ".x.lock").read_bytes() == b""
    assert not list(tmp_path.iterdir())


def test_a_journal_that_cannot_be_closed_or_removed_is_one_sentence(tmp_path: Path) -> None:
    """A close that flushes met the full disk once more, behind the first error."""
    for name in ("close", "unlink"):
        journal = Journal(tmp_path / name / "j", {"kind": "x"})
        kept, journal._file = journal._file, _Failing(journal._file) if name == "close" else journal._file  # pyright: ignore
        if name == "unlink":
            journal.path.unlink()
        with pytest.raises(OutputError, match=r"cannot write .*j: "):
            journal.remove()
        kept.close()


class _Failing:
    def __init__(self, file: Any) -> None:
        self.close = full


def test_forgetting_an_entry_is_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All was cut off and what stays was written again: a kill between lost what a search had kept."""
    path, run = tmp_path / "j", {"kind": "x"}
    with Journal(path, run) as journal:
        for number in range(4):
            journal.append({"entry": number})
        with monkeypatch.context() as watched:
            # That it is not called is what is shown.
            watched.setattr(Journal, "_append", full)
            journal.forget(journal.entries[2])
        journal.append({"entry": 9})
    with Journal(path, run) as again:
        assert [entry["entry"] for entry in again.entries] == [0, 1, 9]
    assert journal_is_whole(path)


def test_what_is_whole_and_cannot_be_tidied_up_is_called_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work.partial").write_bytes(b"x")
    monkeypatch.setattr(Path, "unlink", full)
    for name in ("work", "work.partial"):
        with pytest.raises(OutputError, match=rf"out is written, but .*{name} cannot be removed .*remove it yourself"):
            tidy_up(tmp_path / name, tmp_path / "out", full)


def test_spectra_are_tidied_up_where_there_is_something_and_no_lock_is_taken_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "s"
    end = forked(lambda: tidy_spectra(path) or 0, tmp_path)
    assert end.code == 0 and not end.calls
    lock_of(path).write_bytes(b"")  # of a process that was killed behind its scan
    Journal(unfinished(path), {"kind": "scan journal"}).close()
    tidy_spectra(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", [swap._exchange, swap.take_place])
def test_a_swap_that_fails_leaves_the_old_one_at_its_place(
    way: Callable[[Path, Path, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without renameat2 there are two renames; when the second failed, nothing was left under the name."""
    new, target, old = (tmp_path / name for name in ("new", "target", "old"))
    new.mkdir()
    target.mkdir()
    (target / "x").write_bytes(b"old")
    monkeypatch.setattr(swap.sys, "platform", "darwin")
    rename, count = Path.rename, 0

    def second(self: Path, to: Path) -> Path:
        nonlocal count
        count += 1
        return full() if count == 2 else rename(self, to)

    monkeypatch.setattr(Path, "rename", second)
    with pytest.raises(OSError, match="No space left"):
        way(new, target, old)
    assert (target / "x").read_bytes() == b"old" and new.is_dir() and not old.exists()


def test_a_second_interrupt_does_not_wait_for_what_is_computed(tmp_path: Path) -> None:
    def work() -> int:
        start.on_interrupt(start.interrupted)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGINT)
        return 0

    end = forked(work, tmp_path)
    assert (end.code, end.err.count("\n")) == (130, 1) and end.err.startswith("laser: interrupted twice, and ended at")


def test_what_an_interrupted_verb_says_is_true(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert left_behind("plan", {a: False}) == "nothing was written"
    assert left_behind("scan", {a: False}) == "what is finished is kept, run the same command again"
    assert left_behind("scan", {a: True}) == f"{a} is written, whole: there is nothing left to do"
    assert "for the rest run the same command again, with --force" in left_behind("spectra", {a: True, b: False})


@pytest.mark.slow
def test_the_card_of_a_resumed_run_has_the_command_of_an_undisturbed_one(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    """--resume and --force say how one got there, not what was made."""
    verb = next(verb for verb in VERBS if verb.name == "run")
    bench = Bench(verb, inputs, tmp_path / "bench")
    assert bench.run((*verb.words, "--resume")).code == 0
    told = json.loads(snapshot(bench.place)["o/laser/source.json"])
    assert told["commands"] == ["laser run model -o o --rule rank:4 --roles q,w2 --no-search"]
    assert not bench.differs(snapshot(bench.place))
