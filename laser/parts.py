"""--part I/N: processes that share a disk and no cluster each do a part of the work; whoever ends last makes it whole.

Each part keeps a journal of its own beside the place of the one that an undivided run would keep. It ends with a line
that says that the part is done. What the parts are of stands in their first lines: all have to be of one run.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from laser.errors import OutputError, UsageError
from laser.files import InUse, claimed, disk_errors
from laser.journal import Journal, OfAnotherRun

T = TypeVar("T")
DONE: dict[str, Any] = {"done": dict}  # the shape of the line that ends a part's journal
MOST = 9999
OF_A_PART = re.compile(r"\.(\d+)-of-(\d+)$")  # the end of the name of a part's journal


@dataclass(frozen=True)
class PartOfRun:
    """The `number`th of `of` parts, from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> PartOfRun:
        """I/N. Raises UsageError for anything else."""
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text, re.ASCII)
        part = cls(int(found[1]), int(found[2])) if found else cls(0, 0)
        if not 1 <= part.number <= part.of <= MOST:
            raise UsageError(
                f"--part {text!r} names no part, expected I/N with I from 1 to N and N up to {MOST}; try --part 1/8"
            )
        return part

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def mine(self, items: Sequence[T]) -> list[T]:
        """Every `of`th. Items in the order of their cost come out about even."""
        return list(items[self.number - 1 :: self.of])

    def beside(self, path: Path) -> Path:
        """Where this part keeps its own `path`."""
        return path.with_name(f"{path.name}.{self.number}-of-{self.of}")

    def run(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """What the part's journal is identified by."""
        return {**run, "part": str(self)}

    def all(self) -> list[PartOfRun]:
        return [PartOfRun(number, self.of) for number in range(1, self.of + 1)]


def journals_there(path: Path) -> list[Path]:
    """The journals of parts, of whatever run, beside the place `path` of an undivided run's."""
    with suppress(FileNotFoundError):
        return sorted(
            p for p in path.parent.iterdir() if OF_A_PART.sub("", p.name) == path.name and p.name != path.name
        )
    return []


def require_undivided(path: Path) -> None:
    """Raises OutputError where parts of a run have been begun."""
    if there := journals_there(path):
        raise OutputError(
            f"{there[0]} is of a run in parts; give the command of one of them again, with its --part, or begin afresh "
            "with --force"
        )


@contextmanager
def opened(
    path: Path, run: Mapping[str, Any], shapes: Sequence[Mapping[str, Any]], part: PartOfRun
) -> Iterator[tuple[Journal, bool]]:
    """The journal of this part, which nobody else writes meanwhile, and whether it says already that the part is done.

    path: of the undivided run's journal. Raises OutputError where another run, or another number of parts, has been
    begun there.
    """
    with claimed(part.beside(path)):
        _require_alike(path, run, shapes, part)
        with Journal(part.beside(path), part.run(run), shapes=(*shapes, DONE)) as journal:
            try:
                _require_alike(path, run, shapes, part)  # again: of two that begin at once, one sees the other
            except OutputError:
                if not len(journal.entries):
                    journal.remove()
                raise
            yield journal, is_done(journal)


def is_done(journal: Journal) -> bool:
    return len(journal.entries) > 0 and "done" in journal.entries[-1]


def _require_alike(path: Path, run: Mapping[str, Any], shapes: Sequence[Mapping[str, Any]], part: PartOfRun) -> None:
    for other in journals_there(path):
        number, of = map(int, OF_A_PART.findall(other.name)[0])
        if of != part.of:
            raise OutputError(f"{other} is one of {of} parts, found --part {part}; try --part I/{of}, or another -o")
        try:
            Journal.require(other, PartOfRun(number, of).run(run), (*shapes, DONE))
        except OfAnotherRun as error:
            raise OutputError(
                f"{error.found}; repeat the command of that part with --part {part}, or try another -o"
            ) from error
    if path.exists():  # of a part that was killed while it made the whole, or of an undivided run
        with read_all(path, run, shapes, part) as (_, missing):
            if missing:
                raise OutputError(f"{path} is of a run without --part; go on with it without, or try another -o")


@contextmanager
def read_all(
    path: Path, run: Mapping[str, Any], shapes: Sequence[Mapping[str, Any]], part: PartOfRun
) -> Iterator[tuple[list[Journal], list[PartOfRun]]]:
    """The journals of all parts, open for reading, and which parts are not done; then there are no journals."""
    journals, missing = [], []
    with ExitStack() as stack:
        for each in part.all():
            place = each.beside(path)
            with suppress(FileNotFoundError):
                journals.append(stack.enter_context(Journal.look(place, each.run(run), (*shapes, DONE))))
                if is_done(journals[-1]):
                    continue
            missing.append(each)
        yield ([] if missing else journals), missing


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """`claimed`, for whoever makes the whole: where another part is at that already, it is waited for."""
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(claimed(path))
                break
            except InUse:
                time.sleep(0.2)
        yield


def tidy_parts(path: Path) -> None:
    """Remove the journals of parts, now that the whole is there."""
    for journal in journals_there(path):
        with disk_errors(journal):
            journal.unlink(missing_ok=True)
