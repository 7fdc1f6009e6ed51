"""Writing that survives: records appear whole or not at all, and a journal remembers what is finished."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from laser.errors import OutputError, RecordError

# Kind of a record -> which command makes one.
MADE_BY = {
    "eval": "laser eval MODEL -o FILE makes one",
    "leaderboard": "laser leaderboard MODEL -o FILE makes one",
    "outcome": "name a directory that laser reduce or laser run has finished",
    "moments": "laser calibrate MODEL -o FILE makes one",
    "plan": "laser plan SPECTRA -o FILE makes one",
    "spectra": "laser scan MODEL -o FILE makes one",
}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """An OSError while writing `path` as an OutputError that says what to do."""
    try:
        yield
    except OSError as error:
        remedy = "check the path and its permissions"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free some space and run the same command again (reduce and run: with --resume)"
        raise OutputError(f"cannot write {path}: {error.strerror or error}; {remedy}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """`data` at `path`, or the old file untouched: a sibling temporary file, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def to_json(document: Any) -> bytes:
    """Strict JSON (NaN and Infinity raise ValueError), indented, the same bytes for the same document."""
    return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()


def read_json(path: Path, kind: str, version: int) -> dict[str, Any]:
    """The record at `path`, checked to be a `kind` of this `version`. Raises RecordError."""
    try:
        document = json.loads(path.read_bytes(), object_pairs_hook=each_once)
    except FileNotFoundError:
        raise RecordError(f"no such file: {path}; {MADE_BY.get(kind, 'check the path')}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path} is not a readable {kind} file ({error}); make it again") from error
    check_header(document, path, kind, version)
    return document


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that is there twice, of which Python would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        of = f"the entry of {found['name']}" if "name" in found else "an object"
        raise ValueError(f"the key {twice!r} is twice in {of}")
    return found


def check_header(document: Any, path: Path, kind: str, version: int) -> None:
    """Raises RecordError unless the document says that it is a `kind` of `version`."""
    found = (document.get("kind"), document.get("version")) if isinstance(document, dict) else (None, None)
    if found == (kind, version):
        return
    told = "kind None, so no record of laser" if found == (None, None) else f"kind {found[0]!r} version {found[1]!r}"
    remedy = "make it again with this version of laser" if found[0] == kind else MADE_BY.get(kind, "check the path")
    raise RecordError(f"{path}: found {told}, expected {kind!r} version {version}; {remedy}")


class Journal:
    """An append-only file of JSON lines; the first says which run it belongs to.

    Opened again with the same `run`, it holds the entries of every line that was written whole. A torn or damaged line
    and all that follows it are cut off: what they stood for is simply done again.
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = self._load(run) if path.exists() else 0
            self._file = path.open("ab")
            self._file.truncate(whole)
        if not whole:
            self._append(run)

    def _load(self, run: dict[str, Any]) -> int:
        """Fill `entries`; returns how many bytes of the file are whole lines of this run."""
        whole = 0
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True)):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not line.endswith(b"\n") or not isinstance(entry, dict):
                break
            if number == 0:
                different = sorted(k for k in run.keys() | entry.keys() if run.get(k) != entry.get(k))
                if different:
                    raise RecordError(
                        f"{self.path} belongs to another run: {', '.join(different)} differ; "
                        "repeat the command that began it, or start afresh with --force"
                    )
            else:
                self.entries.append(entry)
            whole += len(line)
        return whole

    def append(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        self._append(entry)

    def _append(self, entry: dict[str, Any]) -> None:
        with disk_errors(self.path):
            self._file.write(json.dumps(entry, allow_nan=False).encode() + b"\n")
            self._file.flush()  # to the kernel: survives a killed process; readers check what lines claim

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """Delete the file, and its directory if that was all in it."""
        self.close()
        self.path.unlink()
        if not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
