"""Verbs under disk faults: each trial disturbs one command at one disk call, follows the advice, and judges the end.

A trial is right where the exit code is true, stderr is one sentence and no traceback, nothing half-written looks whole,
an earlier result under --force is whole, and the next command (what laser itself advised; after a kill the same one,
with --resume where there is such an option) ends with the bytes of an undisturbed run, nothing beside them, and no
piece of work done twice that had been written down.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conftest import mixtral_config, mixtral_tensors, write_checkpoint_directory
from disk_faults import DATA, Board, End, Fault, forked, start
from helpers import snapshot
from mistral_release import write_release
from pico_language import TEXT, write_tokenizer

from laser.__main__ import main
from laser.cli import main as cli
from laser.start import on_interrupt, too_early

RESUMED = ("reduce", "run")  # verbs with --resume
# What a trial of a search cost, which no two runs have in common, nor a run and its sequel; and checksums over it.
TIMES = re.compile(rb'"(seconds|layer_forwards|check)": ("[0-9a-f]+"|[0-9.e+-]+)')
TIMED = ("search.jsonl", "search.json")
# (key of a journal's line) of a finished piece of work
UNITS = ("matrix", "name", "entry", "entries", "report", "task")
RULE = ("--rule", "rank:4", "--roles", "q,w2")
WINDOWS = ("--window", "48", "--windows", "2")


@dataclass(frozen=True)
class Verb:
    """A command that writes, in an empty folder, or with `old` in the folder where its first result came from there."""

    name: str
    words: tuple[str, ...]
    outputs: tuple[str, ...]
    old: tuple[tuple[str, ...], ...] = ()  # commands that make what is there before; then `words` has --force
    slow: bool = False  # too slow for the tests

    @property
    def resumes(self) -> bool:
        return self.words[0] in RESUMED

    @property
    def replaces(self) -> bool:
        return "--force" in self.words


def laser(words: Sequence[str]) -> Callable[[], int]:
    """A command line as a piece of work for a child, from where a process of its own would begin."""

    def work() -> int:
        sys.argv = ["laser", *words]
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 96  # it always ends the process

    return work


def make_inputs(folder: Path) -> dict[str, str]:
    """A model of two layers and two experts in two shards and in one file, and records of it; names to fill in."""
    folder.mkdir()
    tensors = {
        name: tensor[:2].clone() if "gate" in name else tensor
        for name, tensor in mixtral_tensors().items()
        if not re.search(r"layers\.2|experts\.[23]", name)
    }
    config = mixtral_config() | {"num_hidden_layers": 2, "num_local_experts": 2}
    paths = {"model": folder / "model", "single": folder / "single", "text": folder / "text.txt"}
    write_checkpoint_directory(paths["model"], tensors, config, 2)
    write_checkpoint_directory(paths["single"], tensors, config, 1)
    for name in ("model", "single"):
        write_tokenizer(paths[name])
    paths["release"] = write_release(paths["single"], folder / "release")
    paths["text"].write_text(TEXT)
    paths |= {name: folder / name for name in ("spectra", "plan", "single-plan", "moments", "rows")}
    paths["rows"].mkdir()
    rows = [
        {
            "question": f"which is {i}",
            "choices": {"text": [f"one {i}", f"{i} and two", "three", "a fourth one"], "label": list("ABCD")},
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(27)
    ]
    (paths["rows"] / "arc_challenge.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {name: str(path) for name, path in paths.items()}
    for words in (
        ("scan", "{model}", "-o", "{spectra}", "--roles", "q,w2"),
        ("plan", "{spectra}", "-o", "{plan}", "--rule", "rank:4"),
        ("scan", "{single}", "-o", str(folder / "s"), "--roles", "q,w2"),
        ("plan", str(folder / "s"), "-o", "{single-plan}", "--rule", "rank:4"),
    ):
        end = forked(laser(filled(words, found)), folder)
        assert end.code == 0, end.err
    return found


def filled(words: Sequence[str], inputs: Mapping[str, str]) -> list[str]:
    """The words of a command with {name} replaced by the path of that input."""
    return [re.sub(r"\{([\w-]+)\}", lambda match: inputs[match[1]], word) for word in words]


REDUCE = ("reduce", "{model}", "{plan}", "-o", "o")
ONE_PASS = ("run", "{model}", "-o", "o", *RULE, "--no-search")
SEARCH = ("run", "{model}", "-o", "o", *RULE, "--search", "--text", "{text}", *WINDOWS, "--held-out-windows", "2")
CALIBRATE = ("calibrate", "{model}", "-o", "mo", "--text", "{text}", *WINDOWS, "--roles", "q,w2", "--ledoit-wolf")
EVAL = ("eval", "{model}", "-o", "e.json", "--text", "{text}", *WINDOWS)
BOARD = ("leaderboard", "{model}", "-o", "b.json", "--data", "{rows}", "--tasks", "arc_challenge", "--limit", "1")


def _forced(name: str, words: tuple[str, ...], outputs: tuple[str, ...], *old: tuple[str, ...], slow: bool = False):
    return Verb(f"{name} --force", (*words, "--force"), outputs, old or (words,), slow)


PLAN = ("plan", "{spectra}", "-o", "p", "--rule")
SCAN = ("scan", "{model}", "-o", "s", "--roles", "q,w2")
HUNT = ("search", "{model}", "-o", "p", "--rules", "rank:4", "--roles", "q", "--text", "{text}", *WINDOWS, "--held-out-windows", "2")  # fmt: skip # noqa: E501
UNMERGE = ("unmerge", "{model}", "o", "-o", "a")
REBUILD = ("rebuild", "{model}", "a", "-o", "t")
COMPENSATE = ("compensate", "{model}", "o", "-o", "a", "--roles", "q,w2", "--rank")
BUDGET = (*COMPENSATE[:-1], "--bits", "1", "--text", "{text}", *WINDOWS)
VERBS = (
    Verb("scan", SCAN, ("s",)),
    Verb("plan", (*PLAN, "rank:4"), ("p",)),
    Verb("reduce", REDUCE, ("o",)),
    Verb("reduce, one file", ("reduce", "{single}", "{single-plan}", "-o", "o"), ("o",)),
    Verb("run", ONE_PASS, ("o",)),
    Verb("run, two passes", (*ONE_PASS, "--lowest-snr", "2"), ("o",)),
    Verb("run --search", SEARCH, ("o",), slow=True),
    Verb("search", HUNT, ("p", "search.jsonl", "spectra.safetensors"), slow=True),
    Verb("calibrate", CALIBRATE, ("mo",), slow=True),
    Verb("calibrate --gradients", (*CALIBRATE, "--gradients"), ("mo",), slow=True),
    Verb("eval", EVAL, ("e.json",)),
    Verb("leaderboard", BOARD, ("b.json",), slow=True),
    Verb("report", ("report", "{spectra}", "-o", "r.html"), ("r.html",)),
    Verb("plot", ("plot", "{spectra}", "-o", "x.svg", "--heat", "kept"), ("x.svg",)),
    Verb("spectra", ("spectra", "{spectra}", "--snr-json", "a", "--unfrozen-yaml", "b"), ("a", "b")),
    Verb("convert", ("convert", "{release}", "-o", "c"), ("c",)),
    Verb("card", ("card", "o", "--source", "{model}"), ("o",), (REDUCE,)),
    Verb("delta", ("delta", "{model}", "o", "-o", "d"), ("d",), (REDUCE,)),
    Verb("unmerge", UNMERGE, ("a",), (REDUCE,)),
    Verb("rebuild", REBUILD, ("t",), (REDUCE, UNMERGE)),
    Verb("compensate", (*COMPENSATE, "2", "--plain"), ("a",), (REDUCE,)),
    Verb("compensate --text", (*COMPENSATE, "2", "--text", "{text}", *WINDOWS), ("a",), (REDUCE,), slow=True),
    Verb("compensate --bits", BUDGET, ("a",), (REDUCE,), slow=True),
    _forced("compensate", (*COMPENSATE, "3", "--plain"), ("a",), REDUCE, (*COMPENSATE, "2", "--plain")),
    _forced("unmerge", UNMERGE, ("a",), REDUCE, ("unmerge", "{model}", "{model}", "-o", "a")),
    _forced("rebuild", REBUILD, ("t",), REDUCE, UNMERGE, REBUILD),
    _forced("scan", (*SCAN, "--null", "1"), ("s",), SCAN),
    _forced("plan", (*PLAN, "rank:6"), ("p",), (*PLAN, "rank:4")),
    _forced("reduce", REDUCE, ("o",), (*ONE_PASS, "--lowest-snr", "1")),
    _forced("run", ONE_PASS, ("o",), (*ONE_PASS, "--lowest-snr", "1")),
    _forced("calibrate", (*CALIBRATE, "--diagonal"), ("mo",), CALIBRATE, slow=True),
    _forced("eval", (*EVAL, "--skip", "1"), ("e.json",), EVAL),
    _forced("plot", ("plot", "{spectra}", "-o", "x.png", "--heat", "kept"), ("x.png",),
            ("plot", "{spectra}", "-o", "x.png", "--heat", "kept", "--mean")),
    _forced("report", ("report", "{spectra}", "-o", "r.html", "--rule", "rank:4"), ("r.html",),
            ("report", "{spectra}", "-o", "r.html")),
    _forced("search", (*HUNT, "--accept", "any-drop"), ("p", "search.jsonl"), HUNT, slow=True),
    _forced("leaderboard", (*BOARD[:-1], "2"), ("b.json",), BOARD, slow=True),
)  # fmt: skip


def watch(board: Board) -> None:
    """In a child: count the pieces of work that are written down."""
    from laser.calibration_parts import Parts
    from laser.journal import Journal

    append, save, save_back = Journal.append, Parts.save_states, Parts.save_gradients

    def counted(self: Journal, entry: dict[str, Any]) -> None:
        append(self, entry)
        if any(key in entry for key in UNITS):
            board.put(2, board.get(2) + 1)

    def saved(self: Parts, *arguments: Any) -> None:
        save(self, *arguments)
        board.put(2, board.get(2) + 1)

    def saved_back(self: Parts, *arguments: Any) -> None:
        save_back(self, *arguments)
        board.put(2, board.get(2) + 1)

    Journal.append, Parts.save_states = counted, saved  # pyright: ignore[reportAttributeAccessIssue]
    Parts.save_gradients = saved_back  # pyright: ignore[reportAttributeAccessIssue]


def listening(board: Board) -> None:
    """`watch`, in a child that hears signals as one does in which `import laser` has begun."""
    watch(board)
    on_interrupt(too_early)
    board.put(3, 1)


@dataclass
class Bench:
    """A verb with its folder, what is there before it, and what it makes when nothing disturbs it."""

    verb: Verb
    inputs: Mapping[str, str]
    root: Path
    warm: bool = False
    before: dict[str, bytes] = field(default_factory=dict)
    wanted: dict[str, bytes] = field(default_factory=dict)
    calm: End | None = None

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True)
        self.place.mkdir()
        for words in self.verb.old:
            end = self.run(words)
            assert end.code == 0, end.err
        shutil.copytree(self.place, self.root / "before")
        self.before = normal(self.place)
        if self.warm:  # what is imported or built on first use is then there for every child
            with chdir(self.place), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                cli(filled(self.verb.words, self.inputs))
            self.again()
        self.calm = self.run(self.verb.words)
        assert self.calm.code == 0, self.calm.err
        self.wanted = normal(self.place)

    @property
    def place(self) -> Path:
        return self.root / "place"

    @property
    def calls(self) -> tuple[str, ...]:
        assert self.calm is not None
        return self.calm.calls

    def run(self, words: Sequence[str], fault: Fault | None = None) -> End:
        return forked(laser(filled(words, self.inputs)), self.place, fault, watch)

    def again(self) -> None:
        """The folder as it was before the verb."""
        shutil.rmtree(self.place)
        shutil.copytree(self.root / "before", self.place)

    def faults(self, *kinds: str) -> Iterator[Fault]:
        """Each kind at every call of an undisturbed run that it can befall, and a few beyond, for threads race."""
        for kind in kinds:
            for at, name in enumerate((*self.calls, "", ""), 1):
                if kind not in ("short", "torn") or name in DATA or (kind == "torn" and name):
                    yield Fault(kind, at)

    def trial(self, fault: Fault) -> tuple[list[str], End]:
        """What was wrong in one trial; nothing where all was right."""
        self.again()
        end = self.run(self.verb.words, fault)
        return [*self._judge(fault, end), *self._go_on(end)], end

    def signalled(self, number: int, seconds: float) -> tuple[list[str], End]:
        """As `trial`, with a signal after so many seconds, wherever the child may be then."""
        self.again()
        begun = start(laser(filled(self.verb.words, self.inputs)), self.place, None, listening)
        limit = time.monotonic() + 60
        while not begun.board.get(3) and time.monotonic() < limit:  # before that it is no process of laser yet
            time.sleep(0.001)
        time.sleep(seconds)
        os.kill(begun.pid, number)
        end = begun.wait()
        return [*self._judge(Fault("signal", 0), end), *self._go_on(end)], end

    def _judge(self, fault: Fault, end: End) -> Iterator[str]:
        found = normal(self.place)
        if "Traceback" in end.err or "Exception ignored" in end.err or end.code in (97, 98, 99):
            yield f"traceback: {end.err.strip().splitlines()[-1] if end.err.strip() else end.code}"
        if end.code == -14:
            yield "hang"
        killed = end.hit and fault.kind in ("kill", "torn")
        allowed = {-9} if killed else {0, 1, 130} if end.hit and fault.kind != "short" else {0}
        allowed |= {130} if fault.kind == "signal" else set()
        if end.code not in allowed:
            yield f"exit: {end.code}: {end.err.strip()[:200]}"
        told = [line for line in end.err.splitlines() if line.startswith("laser: ") and "warning" not in line]
        if end.code in (1, 130) and len(told) != 1:
            yield f"message: {end.err.strip()[:200]!r}"
        room = ("free some space and run the same command again", "is written, but")
        if fault.kind == "full" and end.code == 1 and not any(words in end.err for words in room):
            yield f"message of a full disk: {end.err.strip()[:200]}"
        if end.code == 0 and self._parted(found, self.wanted):
            yield f"silent: exit 0, and {self._parted(found, self.wanted)}"
        for output in self.verb.outputs:
            yield from self._half(output, found, end)
        if end.code == 130 and "nothing was written" in end.err:
            if difference := self._parted(found, self.before):
                yield f"untrue: nothing was written, and {difference}"
        told_whole = end.code == 130 and "nothing left to do" in end.err
        if told_whole and any(_below(found, x) != _below(self.wanted, x) for x in self.verb.outputs):
            yield f"untrue: {end.err.strip()}"

    def _half(self, output: str, found: dict[str, bytes], end: End) -> Iterator[str]:
        """What lies under the output's name is whole: the new one, or the one before."""
        here, new, old = (_below(files, output) for files in (found, self.wanted, self.before))
        if self.verb.name == "card":  # README and what it is made of, each whole
            if any(content not in (new.get(name), old.get(name)) for name, content in here.items()
                   if not name.endswith((".tmp", ".lock"))):  # fmt: skip
                yield "half: a file of the card"
        elif self.verb.replaces and here not in (old, new) and not output.endswith(".jsonl"):
            yield f"old lost: {output} is neither the old nor the new one ({len(here)} files of {len(new)})"
        elif "" in new:  # a file; a journal grows
            if "" in here and here[""] not in (new[""], old.get("")) and not output.endswith(".jsonl"):
                yield f"half: {output} of {len(here[''])} bytes, expected {len(new[''])}"
        elif not self.verb.replaces and self._looks_whole(here, new):
            behind = ("laser/", "README", "laser.yaml")  # written when the weights are whole; the same command goes on
            apart = [n for n in new if not n.startswith(behind) and here.get(n) != new[n]]
            if apart:
                yield f"half: {output} looks whole, and {apart[0]} is not as it should be"

    @staticmethod
    def _looks_whole(here: dict[str, bytes], new: dict[str, bytes]) -> bool:
        index = "model.safetensors.index.json"
        last = [index] if index in new else [n for n in new if n.endswith(".safetensors") and "/" not in n]
        return all(name in here for name in last)

    def differs(self, found: Mapping[str, bytes]) -> str:
        """The first difference from an undisturbed run; "" for none."""
        return self._parted(found, self.wanted)

    def _parted(self, found: Mapping[str, bytes], wanted: Mapping[str, bytes]) -> str:
        """The first difference, locks and temporary files aside."""
        a, b = ({n: x for n, x in files.items() if not n.endswith((".lock", ".tmp"))} for files in (found, wanted))
        names = sorted(n for n in a.keys() | b.keys() if a.get(n) != b.get(n))
        return f"{names[0]} differs" if names else ""

    def _go_on(self, end: End) -> Iterator[str]:
        """Follow the advice; the end has to be that of an undisturbed run."""
        assert self.calm is not None
        whole = not self._parted(normal(self.place), self.wanted)
        words = list(self.verb.words)
        if self.verb.resumes and ("with --resume" in end.err or end.code < 0):
            words += ["--resume"]
        if "without --force" in end.err:
            words = [word for word in words if word != "--force"]
        last = self.run(words)
        if last.code == 1 and "try --resume" in last.err:
            words += ["--resume"]
            last = self.run(words)
        units = last.units
        if last.code == 1 and " exists; try another -o, or remove it yourself" in last.err and whole:
            return  # a verb without --force, which had finished
        if last.code == 1 and "--force to replace it" in last.err and "--force" not in words:
            done = all(_below(normal(self.place), x) == _below(self.wanted, x) for x in self.verb.outputs)
            if not done and len(self.verb.outputs) == 1:  # of two files the first may be there, and is made again
                yield f"advice: {last.err.strip()[:200]}"
            last = self.run([*words, "--force"])
            units = last.units
        if last.code != 0:
            yield f"not resumed: exit {last.code}: {last.err.strip()[-300:]}"
            return
        found = normal(self.place)
        if difference := self._parted(found, self.wanted):
            yield f"resumed unequal: {difference}"
        if stray := sorted(found.keys() - self.wanted.keys()):
            yield f"stray: {stray[0]}"
        if (end.code < 0 or end.code == 130) and end.units + units > self.calm.units and not whole:
            yield f"lost work: {end.units} were written down, and {units} done again of {self.calm.units}"


def _below(files: Mapping[str, bytes], output: str) -> dict[str, bytes]:
    """The files of an output: itself, or what lies in it."""
    return {
        name.removeprefix(output).removeprefix("/"): content
        for name, content in files.items()
        if name == output or name.startswith(f"{output}/")
    }


def normal(folder: Path) -> dict[str, bytes]:
    """The files of a folder, seconds and what depends on them made equal."""
    found = snapshot(folder)
    for name, content in found.items():
        if name.rpartition("/")[2] in TIMED:
            found[name] = TIMES.sub(rb'"\1": 0', content)
    return found


@dataclass
class Count:
    """What became of the trials of one verb."""

    calls: int = 0
    refused: int = 0  # ended with one line
    met: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, bench: Bench, fault: Fault) -> list[str]:
        problems, end = bench.trial(fault)
        if end.hit:
            self.met[fault.kind] += 1
        self.refused += end.code == 1
        told = [f"{bench.verb.name}, {fault.kind} at {fault.at} ({_at(end, fault)}): {p}" for p in problems]
        self.wrong += told
        return told

    def of(self, *starts: str) -> int:
        return sum(any(f"): {start}" in line for start in starts) for line in self.wrong)


def _at(end: End, fault: Fault) -> str:
    return end.calls[fault.at - 1] if fault.at <= len(end.calls) else "-"


def pinned() -> None:
    """Threads as in a child, for OpenMP's pool does not survive a fork."""
    torch.set_num_threads(1)
