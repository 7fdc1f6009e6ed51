"""Rows of JSON and plain text from files: what a file is, its suffix says, in capitals or not.

    .jsonl, .ndjson, .jsonlines   a JSON object a line; blank lines are skipped
    .json                         a list of objects, or one object
    anything else                 plain text in UTF-8

A byte-order mark is left out and line ends are read as \\n. What no tokenizer takes is refused, with the line.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laser.errors import RecordError, UsageError
from laser.files import LARGEST_TEXT, read_regular
from laser.records import each_once

JSON_LINES, JSON = (".jsonl", ".ndjson", ".jsonlines"), (".json",)
PACKED_SUFFIXES = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z", ".rar", ".tar")
TABLES = (".parquet", ".arrow", ".feather")
# UTF-32 first: its mark begins with that of UTF-16.
BYTE_ORDER_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"}
BYTE_ORDER_MARKS |= {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


@dataclass(frozen=True)
class Content:
    """A file's text. `notes`: what was read otherwise than it stands there."""

    text: str
    sha256: str  # of the file's own bytes
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextRow:
    """A JSON object and the place that it stands at, for messages."""

    where: str
    entries: dict[str, Any]

    def text(self, field: str) -> str:
        """The text in `field`. Raises RecordError where it is absent, null or no text."""
        if field not in self.entries:
            found = ", ".join(self.entries) or "no field"
            raise RecordError(f"{self.where}: expected a text in field {field!r}, found {found}; try another field")
        value = self.entries[field]
        if not isinstance(value, str):
            raise RecordError(
                f"{self.where}: expected a text in field {field!r}, found {json_kind(value)}; fill or remove the row"
            )
        return value


def holds_rows(path: Path) -> bool:
    """Whether a file of this name holds rows of JSON."""
    return path.suffix.lower() in JSON_LINES + JSON


def read_content(path: Path, what: str, remedy: str) -> Content:
    """A file as text, whatever its suffix, unless that says that it is packed.

    what, remedy: what the message calls a file that is not there, and how it ends. Raises RecordError for one that
    cannot be read as UTF-8.
    """
    suffix = path.suffix.lower()
    try:
        data = read_regular(path, LARGEST_TEXT)
    except FileNotFoundError:
        raise RecordError(f"no such {what}: {path}; {remedy}") from None
    except OSError as error:
        raise RecordError(f"cannot read the {what} {path} ({error.strerror}); {remedy}") from error
    if suffix in PACKED_SUFFIXES:
        raise RecordError(f"{path.name} is packed, by its suffix {suffix}; unpack it and name the text inside")
    if suffix in TABLES:
        raise RecordError(f"{path.name} is a table, by its suffix {suffix}; write its texts to a .jsonl file")
    return decode_rows(path.name, data)


def decode_rows(name: str, data: bytes) -> Content:
    """Bytes of UTF-8 as text. Raises RecordError for what is not UTF-8, or holds NUL and so is no text."""
    digest, notes = hashlib.sha256(data).hexdigest(), []
    if coding := next((coding for mark, coding in BYTE_ORDER_MARKS.items() if data.startswith(mark)), None):
        raise RecordError(
            f"cannot read {name} as UTF-8 text: it begins as {coding} does; convert it with iconv -f {coding} -t UTF-8"
        )
    if data.startswith(codecs.BOM_UTF8):
        data = data.removeprefix(codecs.BOM_UTF8)
        notes.append(f"{name} begins with a byte-order mark, which was left out")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(f"cannot read {name} as UTF-8 text ({error}); convert it and try again") from error
    if "\0" in text:
        at = data.index(b"\0")
        raise RecordError(f"{name} is not plain text: byte {at} is NUL; convert it to UTF-8, or remove the NUL bytes")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        notes.append(f"the line ends of {name} are CR or CRLF and were read as LF")
    return Content(text, digest, tuple(notes))


def rows_of(path: Path, text: str) -> list[TextRow]:
    """The rows in `text`, the content of a file of JSON. Raises RecordError for what is not as its suffix says."""
    if path.suffix.lower() in JSON:
        document = parse_row(text, path.name, "; if it holds one row a line, call it .jsonl")
        rows = document if isinstance(document, list) else [document]
        placed = [(f"{path.name}, row {number}", row) for number, row in enumerate(rows, 1)]
    else:
        # Not str.splitlines, which also breaks a row at U+2028 and its like, all allowed inside a JSON string.
        lines = [(f"{path.name}, line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        placed = [(where, parse_row(line, where)) for where, line in lines]
    for where, row in placed:
        if not isinstance(row, dict):
            raise RecordError(f"{where}: found {json_kind(row)}, expected an object such as {{'text': '...'}}")
        for text in texts_in(row):
            require_characters(text, where)
    return [TextRow(where, row) for where, row in placed]


def parse_row(text: str, where: str, remedy: str = "; mend or remove it") -> Any:
    """JSON to Python. Raises RecordError, also for lists nested deeper than Python goes."""
    try:
        return json.loads(text, object_pairs_hook=each_once)
    except ValueError as error:
        raise RecordError(f"{where} is not JSON ({error}){remedy}") from error
    except RecursionError:
        raise RecordError(f"{where} is nested too deep to be read; mend or remove it") from None


def require_rows(path: Path, what: str) -> None:
    """Raises UsageError for a file that, by its suffix, holds no rows."""
    if not holds_rows(path):
        raise UsageError(f"{what} needs rows of JSON, found {path.name}; try a file that ends in .jsonl or .json")


def require_characters(text: str, where: str) -> None:
    """Raises RecordError for half a character, as JSON can say \\ud800, which no tokenizer takes, and for NUL."""
    if (at := text.find("\0")) >= 0:
        raise RecordError(f"{where} holds \\u0000, NUL, at place {at}: it is no text; mend or remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise RecordError(
            f"{where} holds {half} alone, half a character, at place {error.start}; mend or remove it"
        ) from None


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a JSON value, names of fields included, however deep; without recursion, which has an end."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value


def json_kind(value: Any) -> str:
    """What JSON calls a value, for messages."""
    names = {type(None): "null", bool: "true or false", str: "a text", list: "list", dict: "an object"}
    return names.get(type(value), "a number")
