"""Journals: append-only files of JSON lines that remember what of a long run is finished."""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, overload

from laser.errors import CheckpointError, OutputError, RecordError
from laser.files import disk_errors, open_regular, raw_regular
from laser.records import differences, fingerprint_in, has_shape, parse_record

SPOILED = "spoiled"  # key of a journal's line: what stands before it was made of weights that changed meanwhile
CHECKED = re.compile(rb'(?:, )?"check": "([0-9a-f]{16})"}\n?$')


class Entries(Sequence[dict[str, Any]]):
    """The entries of a journal, each read from its file whenever it is asked for: a line may be as long as a spectrum,
    and there are as many as matrices. Of each only the place of its line is in memory, 8 bytes."""

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        """read: gives the bytes between two places of the file."""
        self._read = read
        self.ends = array("Q")  # of the first line of the file, which is no entry, and of every entry's

    def __len__(self) -> int:
        return max(len(self.ends) - 1, 0)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        entry = json.loads(self._read(self.ends[number], self.ends[number + 1]))
        del entry["check"]
        return entry


class OfAnotherRun(RecordError):
    """A journal's first line says that it is of another run. found: how the two differ."""

    def __init__(self, found: str) -> None:
        super().__init__(f"{found}; repeat the command that began it, or start afresh with --force")
        self.found = found


class Journal:
    """An append-only file of JSON lines; the first says which run it belongs to.

    Every line ends with a checksum of itself and of the line before it. Opened again with the same `run`, the journal
    holds the entries of every line that is as it was written. A torn or altered line and all that follows it are cut
    off: what they stood for is simply done again. `anew` drops the file where it belongs to another run, or to none.
    shapes: the kinds of lines that there are, each by its keys and their types; any other is as good as torn.
    """

    def __init__(
        self,
        path: Path,
        run: Mapping[str, Any],
        *,
        shapes: Sequence[Mapping[str, Any]] | None = None,
        anew: bool = False,
    ) -> None:
        self._begin(path, run, shapes)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                whole = self._load(run) if path.exists() else 0
            except RecordError:
                if not anew:
                    raise
                self._begin(path, run, shapes)
                whole = 0
            self._file = path.open("a+b", buffering=0)
            self._file.truncate(whole)
        if not whole:
            self._append(run)

    def _begin(self, path: Path, run: Mapping[str, Any], shapes: Sequence[Mapping[str, Any]] | None) -> None:
        self.path, self._run = path, run
        self._shapes = None if shapes is None else (*shapes, {SPOILED: str})
        self.entries = Entries(self._bytes)
        self._last = b""

    @classmethod
    def require(cls, path: Path, run: Mapping[str, Any], shapes: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Raises as opening it would where the journal at `path`, if there is one, is of another run."""
        with suppress(FileNotFoundError):
            cls.look(path, run, shapes).close()

    @classmethod
    def look(cls, path: Path, run: Mapping[str, Any], shapes: Sequence[Mapping[str, Any]] | None = None) -> Journal:
        """The journal at `path` as it stands, to be read. Raises FileNotFoundError, and as opening it would."""
        looked = cls.__new__(cls)
        looked._begin(path, run, shapes)
        looked._file = raw_regular(path)
        try:
            looked._load(run)
        except BaseException:
            looked.close()
            raise
        return looked

    def _load(self, run: Mapping[str, Any]) -> int:
        """Find the `entries`; returns how many bytes of the file are whole lines of this run."""
        whole = 0
        if not _is_journal(self.path, run):
            raise OutputError(f"{self.path} is no journal of laser, and would be overwritten; try another name")
        lines = _lines(self.path)
        for number, line in enumerate(lines):
            entry = self._checked(line, first=number == 0)
            if entry is None:
                if number == 0 and next(lines, None) is not None:
                    raise RecordError(
                        f"{self.path}: its first line, which says what it belongs to, is damaged or of an older laser; "
                        "start afresh with --force"
                    )
                break
            if number == 0:
                self._require(entry, run)
            elif SPOILED in entry:
                raise RecordError(
                    f"{self.path} holds work on a model that changed meanwhile: {entry[SPOILED]}; start afresh with "
                    "--force"
                )
            whole += len(line)
            self.entries.ends.append(whole)
        return whole

    def _checked(self, line: bytes, *, first: bool) -> dict[str, Any] | None:
        """The entry of a line; None for one that was not written like that, or does not follow the one before."""
        written = _written_line(line, self._last)
        if written is None:
            return None
        body, check = written
        try:
            entry = parse_record(body)
        except ValueError:
            return None
        free = first or self._shapes is None
        if not isinstance(entry, dict) or not (free or any(has_shape(entry, shape) for shape in self._shapes or ())):
            return None
        self._last = check
        return entry

    def _require(self, found: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        different = differences(found, run)
        if {"source", "weights"} & set(different):
            models = [f"{stated.get('model')} ({fingerprint_in(stated).short})" for stated in (found, run)]
            begun = f"it was begun with {models[0]}, found {models[1]}"
            raise OfAnotherRun(f"{self.path} belongs to another run: {', '.join(different)} differ; {begun}")
        was, now = (str(stated.get("device", "")) for stated in (found, run))
        if set(different) == {"device"} and was.split()[:2] == now.split()[:2]:
            raise RecordError(
                f"{self.path} was begun when this machine's probe chose other routes: found {now!r}, expected {was!r}; "
                "try without the file that `laser devices` names, or start afresh with --force"
            )
        if different:
            raise OfAnotherRun(f"{self.path} belongs to another run: {', '.join(different)} differ")

    def append(self, entry: dict[str, Any]) -> None:
        self._append(entry)

    def forget(self, from_: dict[str, Any]) -> None:
        """Cut off an entry and all that follow it, in one step: a kill loses nothing of what stands before it."""
        kept = self.entries.index(from_)
        ends = self.entries.ends[: kept + 1]  # the first is that of the line that says whose they are
        with disk_errors(self.path):
            self._file.truncate(ends[-1])
        match = CHECKED.search(self._bytes(ends[-2] if kept else 0, ends[-1]))
        assert match is not None, "its own line"
        self.entries.ends, self._last = ends, match[1]

    def _bytes(self, start: int, end: int) -> bytes:
        """What stands between two places of the file."""
        with disk_errors(self.path):
            found = b""
            while len(found) < end - start:
                piece = os.pread(self._file.fileno(), end - start - len(found), start + len(found))
                if not piece:
                    raise OutputError(f"{self.path} became shorter while it was written; run the same command again")
                found += piece
        return found

    def spoil(self, why: str) -> None:
        """Let nobody go on with what stands here."""
        self._append({SPOILED: why})

    def _append(self, entry: Mapping[str, Any]) -> None:
        body = json.dumps(dict(entry), allow_nan=False).encode()
        self._last = _check(self._last, body)
        line = body[:-1] + (b", " if entry else b"") + b'"check": "' + self._last + b'"}\n'
        self.entries.ends.append((self.entries.ends[-1] if self.entries.ends else 0) + len(line))
        with disk_errors(self.path):
            while line:  # to the kernel: survives a killed process; readers check what lines claim
                line = line[self._file.write(line) :]

    def close(self) -> None:
        with disk_errors(self.path):
            self._file.close()

    def remove(self) -> None:
        """Delete the file, and its directory if that was all in it."""
        self.close()
        with disk_errors(self.path):
            self.path.unlink()
            if not any(self.path.parent.iterdir()):
                self.path.parent.rmdir()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, each with its end, one in memory at a time."""
    with open_regular(path) as file:
        yield from file


def _is_journal(path: Path, run: Mapping[str, Any]) -> bool:
    """Whether a file was a journal once, whole or torn or damaged, and no file of somebody else."""
    begun = json.dumps(dict(run)).encode()[:12]
    with open_regular(path) as file:
        first = file.read(12)
    if begun.startswith(first) or any(map(CHECKED.search, _lines(path))):
        return True
    return not any(line.strip(b"\0") for line in _lines(path))


def was_journal(path: Path, kind: str) -> bool:
    """Whether the file at `path` is, or was before it was damaged, a journal of this kind."""
    try:
        return _is_journal(path, {"kind": kind})
    except OSError:
        return False


def journal_is_whole(path: Path) -> bool:
    """Whether every line of a journal is as it was written. Lines that are missing at its end are not seen."""
    last = b""
    for line in _lines(path):
        written = _written_line(line, last)
        if written is None:
            return False
        last = written[1]
    return bool(last)


def _written_line(line: bytes, last: bytes) -> tuple[bytes, bytes] | None:
    """A line's JSON and its checksum, where it is as it was written after the line whose checksum is `last`."""
    match = CHECKED.search(line)
    if not match or not line.endswith(b"\n"):
        return None
    body = line[: match.start()] + b"}"
    return (body, match[1]) if _check(last, body) == match[1] else None


def _check(before: bytes, body: bytes) -> bytes:
    """Checksum of a line: without one a flipped bit in a number would be taken for the number."""
    return hashlib.sha256(before + body).hexdigest()[:16].encode()


@contextmanager
def spoiling(journal: Journal | None) -> Iterator[None]:
    """A CheckpointError inside, that the weights changed meanwhile, makes the journal one that nobody goes on with."""
    try:
        yield
    except CheckpointError as error:
        if journal:
            journal.spoil(str(error))
        raise
