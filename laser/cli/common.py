"""What every verb shares: what is said to people, tables, JSON for programs, files kept for a verb alone."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import typer

from laser.errors import OutputError, UsageError
from laser.escape import shown_value, visible
from laser.files import claimed, disk_errors, real, require_led
from laser.records import to_json

MOST_LINES = 40  # of a list for people that may have one line for each of 45,000 matrices


@dataclass
class Held:
    """What a verb keeps for itself until it ends.

    files: those that it is to write, as they were when it began
    idle: those of its options that do nothing as it was called
    given: the words that a recipe or config added to its command line
    configured: those of them that were a config's
    options: its options by their names, wherever their values come from
    """

    stack: ExitStack = field(default_factory=ExitStack)
    files: dict[Path, tuple[int, int] | None] = field(default_factory=dict)
    idle: set[str] = field(default_factory=set)
    given: list[str] = field(default_factory=list)
    configured: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def written(self) -> dict[Path, bool]:
        """Whether each file is there, whole: they appear by a rename, as another file."""
        return {path: (now := _which(path)) is not None and now != before for path, before in self.files.items()}


def _which(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


_verb_now: ContextVar[Held | None] = ContextVar("what this verb holds", default=None)


@contextmanager
def one_verb(held: Held | None = None) -> Iterator[None]:
    """Around a verb: what it keeps for itself is given back when it ends."""
    held = held or Held()
    with held.stack:
        token = _verb_now.set(held)
        try:
            yield
        finally:
            _verb_now.reset(token)


def keep(path: Path) -> None:
    """Nobody else writes `path` until this verb ends. Raises OutputError where somebody is at work on it."""
    if (held := _verb_now.get()) is not None:
        held.stack.enter_context(claimed(path))


def to_write(path: Path) -> None:
    """This verb is to write `path`, which appears by a rename: should it be interrupted, it says whether it did."""
    if (held := _verb_now.get()) is not None:
        held.files[path] = _which(path)


def do_nothing(*options: str) -> None:
    """These options do nothing in this call of the verb: they are not advised."""
    if (held := _verb_now.get()) is not None:
        held.idle.update(options)


def give(words: Sequence[str], *, config: bool = False) -> None:
    """A recipe or config gives these words of a command line: what is said of it counts them as given there."""
    if (held := _verb_now.get()) is not None:
        held.given.extend(words)
        held.configured.extend(words if config else ())


def configured_now() -> Sequence[str]:
    """The words of a command line that a config gave."""
    held = _verb_now.get()
    return () if held is None else held.configured


def called_with(options: Mapping[str, Any]) -> None:
    """This verb was called with these options, by their names."""
    if (held := _verb_now.get()) is not None:
        held.options = dict(options)


def options_now() -> Mapping[str, Any]:
    """What `called_with` got last."""
    held = _verb_now.get()
    return {} if held is None else held.options


def check_file(path: Path) -> None:
    """Raises OutputError where a file to be written is none, or its directory is missing or a model's."""
    from laser.checkpoint.reader import OUTCOME
    from laser.checkpoint.replaceable import require_outside_models
    from laser.checkpoint.writer import RECORDS

    place = real(path)
    require_led(path)
    records = place.parent.name == RECORDS and (place.parent.parent / OUTCOME).is_file()
    if not place.parent.is_dir() and not records:  # an output's own folder of records is made by whoever is first
        raise OutputError(f"there is no directory {place.parent}; make it, or try another -o")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} exists and is no file; try another name")
    require_outside_models(path)


def keep_file(path: Path) -> None:
    """`keep`, of a file. Raises as `check_file`, too."""
    check_file(path)
    keep(path)


@dataclass
class Talk:
    """How much a command says. quiet: its result and errors alone; verbose: a line for each step as well.

    file: the name of one that gets all of it, each line with its time; log: that file
    """

    quiet: bool = False
    verbose: bool = False
    file: str | None = None
    log: TextIO | None = None

    def open(self) -> None:
        """Begin the log file, behind what it holds. Raises UsageError, OutputError."""
        if self.file is None:
            return
        if not self.file:
            raise UsageError("--log-file names no file; try --log-file laser.log")
        check_file(Path(self.file))
        with disk_errors(Path(self.file)):
            self.log = Path(self.file).open("a", encoding="utf-8", errors="backslashreplace")

    def write(self, line: str) -> None:
        """A line into the log file, if there is one, at once: whoever looks there waits for it."""
        if self.log is not None:
            self.log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {visible(line)}\n")
            self.log.flush()


_talk_now: ContextVar[Talk | None] = ContextVar("how much this command says", default=None)


def talk() -> Talk:
    return _talk_now.get() or Talk()


@contextmanager
def talking(how: Talk) -> Iterator[None]:
    """Around a command."""
    token = _talk_now.set(how)
    try:
        yield
    finally:
        _talk_now.reset(token)
        if how.log is not None:
            how.log.close()


def say(line: str, *, aside: bool = False, needed: bool = True, log: bool = True, where: TextIO | None = None) -> None:
    """One line for people; all that the verbs print for them goes through here, for names may hold anything.

    aside: on stderr, where there is one, at once. needed: also where the command is to be quiet. log: also in its file.
    where: the stream that stderr was, if others may have taken its place.
    """
    stream, how = where or (sys.stderr if aside else sys.stdout), talk()
    if stream is not None and (needed or not how.quiet):  # `print` takes stdout in the place of a stderr that is closed
        print(visible(line), file=stream, flush=aside)
    if log:
        how.write(line)


def print_json(document: Any) -> None:
    print_raw(to_json(document))


def print_raw(data: bytes) -> None:
    """A record in its own format, nothing around it."""
    if sys.stdout is None:
        raise OSError(errno.EBADF, "standard output is closed")
    sys.stdout.write(data.decode())


def print_table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Aligned columns, numbers to the right. Plain text: the same in a terminal, a pipe and a README."""
    cells = [list(headings)] + [[shown_value(x) for x in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    right = [bool(rows) and isinstance(rows[0][i], int | float) for i in range(len(headings))]
    for row in cells:
        line = (cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True))
        say("  ".join(line).rstrip())


def say_first(lines: Sequence[str], limit: int = MOST_LINES, what: str = "--json lists all") -> None:
    """The first of these lines, and how many more there are."""
    for line in lines[:limit]:
        say(line)
    if len(lines) > limit:
        say(f"... and {len(lines) - limit} more; {what}")


def tell_verified(found: Any, told: str, as_json: bool) -> None:
    """What was verified, a dataclass with `problems`: these first, then one line. Exit code 1 where there are any."""
    if as_json:
        print_json(asdict(found))
    else:
        say_first(found.problems)
        say(f"{told}, {len(found.problems)} problems")
    if found.problems:
        raise typer.Exit(1)


def print_plan(lines: Sequence[Any], limit: int = MOST_LINES, *, of_difference: bool = False) -> None:
    """One row per reduced matrix (the first `limit`), what becomes zero, then how many were reduced and kept.

    of_difference: the lines are about differences from a base, of which nothing may be left, too.
    """
    reduced = [line for line in lines if line.action == "reduce"]
    if reduced:
        print_table(
            ("matrix", "rank", "of", "SNR", "energy removed"),
            [(x.name, x.rank, _of(x), x.snr, _removed(x.energy_kept)) for x in reduced[:limit]],
        )
    if len(reduced) > limit:
        say(f"... and {len(reduced) - limit} more")
    if zeroed := [line.name for line in reduced if line.rank == 0]:
        more = f" and {len(zeroed) - 3} more" if len(zeroed) > 3 else ""
        what = "the BASE'S, nothing of their change" if of_difference else "ZERO, nothing of them"
        say(f"RANK 0: {len(zeroed)} of them become {what} is left: {', '.join(zeroed[:3])}{more}")
    kept = sum(line.action == "keep" for line in lines)
    skipped = [line for line in lines if line.action == "skip"]
    say(f"{len(reduced)} to reduce, {kept} to keep, {len(skipped)} skipped, of {len(lines)} tensors")
    say_first([f"  {line.name}: {line.why.text}" for line in skipped], limit, "the plan has all")


def _of(line: Any) -> object:
    return line.full_rank if line.scale is None else f"{line.full_rank or '-'}, times {line.scale:g}"


def _removed(kept: float | None) -> str:
    return "-" if kept is None else f"{100 * (1 - kept):.2f} %"
