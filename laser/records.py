"""Records: their JSON to frozen dataclasses and back, sealed, and journals of what is finished.

What is missing, unknown or of another type in a record is a RecordError. Every record says which weights it is of.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from laser.errors import CheckpointError, OutputError, RecordError
from laser.files import read_regular

if TYPE_CHECKING:
    pass

from laser.files import disk_errors

T = TypeVar("T")
LARGEST = sys.float_info.max
DEEPEST = 32  # objects and lists inside one another; our deepest record has 6, and writing stops at some hundreds
WORDS = {
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def parse(data: bytes | str) -> Any:
    """The document in a record's JSON. Raises ValueError for what is no JSON, or twice in it, or nested too deep."""
    try:
        document = json.loads(data, object_pairs_hook=each_once)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if is_deep(document, DEEPEST):
        raise ValueError(f"it is nested more than {DEEPEST} deep")
    return document


def is_deep(document: Any, deepest: int) -> bool:
    """Whether a JSON value nests deeper than anybody writes: walking through it could end Python's recursion."""
    todo = [(document, 0)]
    while todo:
        value, depth = todo.pop()
        if depth > deepest:
            return True
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        todo += [(each, depth + 1) for each in inside]
    return False


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that is there twice, of which Python would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        of = f"the entry of {found['name']}" if isinstance(found.get("name"), str) else "an object"
        raise ValueError(f"the key {named(twice)} is twice in {of[:200]}")
    return found


def decode(cls: type[T], found: Any, where: str, remedy: str, optional: Sequence[str] = ()) -> T:
    """The dataclass `cls` from a JSON object, whose keys must be its fields and whose values of their types.

    optional: fields that an earlier version did not write and that have a default. where: begins the error, as
    `plan.json: line 3 (NAME)`; remedy: ends it. Raises RecordError.
    """
    if not isinstance(found, dict):
        raise RecordError(f"{where} is {shown(found)}, expected an object; {remedy}")
    hints, names = get_type_hints(cls), [field.name for field in fields(cls)]  # pyright: ignore[reportArgumentType]
    require_keys(found, [name for name in names if name not in optional], optional, where, remedy)
    return cls(**{name: value_of(hints[name], found[name], name, where, remedy) for name in names if name in found})


def require_keys(
    found: Mapping[str, Any], needed: Sequence[str], optional: Sequence[str], where: str, rest: str
) -> None:
    """Raises RecordError unless the object has the `needed` keys and no others than these and the `optional` ones."""
    if missing := [name for name in needed if name not in found]:
        raise RecordError(f"{where} has no key {missing[0]!r}, expected {', '.join(needed)}; {rest}")
    if unknown := next((name for name in found if name not in needed and name not in optional), None):
        expected = ", ".join([*needed, *optional])
        raise RecordError(f"{where} has a key {named(unknown)}, expected only {expected}; {rest}")


def has_shape(found: Mapping[str, Any], shape: Mapping[str, Any]) -> bool:
    """Whether an object has the keys of `shape` and no others, and values of its types."""
    if found.keys() != shape.keys():
        return False
    try:
        for name, hint in shape.items():
            _as(hint, found[name])
    except TypeError:
        return False
    return True


def value_of(hint: Any, found: Any, name: str, where: str, remedy: str) -> Any:
    """`found` as `hint` has it (a list for a tuple). Raises RecordError."""
    try:
        return _as(hint, found)
    except TypeError:
        told = f"{where}: {name} is {shown(found)}, expected {words(hint)}; {remedy}"
        raise RecordError(told) from None


def _as(hint: Any, found: Any) -> Any:
    """Raises TypeError. A whole number will do for a number, true and false for none; NaN and Infinity never do."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for one in inside:
            try:
                return _as(one, found)
            except TypeError:
                continue
        raise TypeError
    if hint is Any or (hint is dict and isinstance(found, dict)):
        return found
    if origin is tuple and isinstance(found, (list, tuple)):
        each = inside[:1] * len(found) if inside[-1] is Ellipsis else inside
        if len(each) != len(found):
            raise TypeError
        return tuple(map(_as, each, found))
    if origin is not None and isinstance(found, dict) and issubclass(origin, Mapping):
        return {_as(inside[0], key): _as(inside[1], x) for key, x in found.items()}
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(found, dict):
        hints = get_type_hints(hint)
        if found.keys() != hints.keys():
            raise TypeError
        return hint(**{key: _as(one, found[key]) for key, one in hints.items()})
    if isinstance(hint, type) and issubclass(hint, StrEnum) and found in list(hint):
        return hint(found)
    if hint is float and isinstance(found, int | float) and type(found) is not bool and abs(found) <= LARGEST:
        return found
    if isinstance(hint, type) and type(found) is hint and hint is not float:
        return found
    raise TypeError


def words(hint: Any) -> str:
    """A type, for people."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(words(one) for one in inside)
    if origin is tuple:
        return f"a list, each {words(inside[0])}" if inside[-1] is Ellipsis else "a list"
    if is_dataclass(hint):
        return f"an object of {' and '.join(field.name for field in fields(hint))}, each as laser writes it"
    return WORDS.get(hint, "an object")


WIDEST = 60  # characters of a value that a message repeats
_short = reprlib.Repr()  # looks no further into a value than it tells of it
_short.maxlevel, _short.maxdict, _short.maxlist, _short.maxtuple = 3, 8, 16, 16
_short.maxstring = _short.maxlong = _short.maxother = WIDEST


def shown(found: Any, quote: str = '"') -> str:
    """A value as its file has it, shortened."""
    text = {None: "null", True: "true", False: "false"}.get(found) if type(found) in (bool, type(None)) else None
    text = text or (f"{quote}{found[:WIDEST]}{quote}" if isinstance(found, str) else _short.repr(found))
    return text if len(text) <= WIDEST else text[: WIDEST - 3] + "..."


def named(found: Any) -> str:
    """A value as its file has it, shortened, in the quotes of a name."""
    return shown(found, "'")


def require_finite(found: Any, where: str, remedy: str) -> None:
    """Raises RecordError for NaN or Infinity anywhere in a JSON value."""
    todo = [found]
    while todo:
        value = todo.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise RecordError(f"{where} holds {value}, expected a finite number; {remedy}")
        todo += value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()


@dataclass(frozen=True)
class Fingerprint:
    """Which weights these are, by hashes of them.

    samples: sha256 over bytes of every tensor; None where they lie on the Hub
    content: one hash over the hashes that the Hub has of the files; None elsewhere
    """

    samples: str | None = None
    content: str | None = None

    def told(self) -> dict[str, str]:
        """The hashes that are known, for records."""
        known = {"content": self.content, "samples": self.samples}
        return {kind: digest for kind, digest in known.items() if digest}

    @property
    def short(self) -> str:
        """The first digits of a hash, for messages."""
        return (self.samples or self.content or "unknown")[:12]


# --- comparing --------------------------------------------------------------------------------------------------------


def agree(a: Fingerprint, b: Fingerprint) -> bool | None:
    """Whether the two are of the same weights: equal in every kind that both know; None where they share no kind."""
    pairs = [(x, y) for x, y in ((a.content, b.content), (a.samples, b.samples)) if x and y]
    return all(x == y for x, y in pairs) if pairs else None


def fingerprint_in(record: Mapping[str, Any]) -> Fingerprint:
    """What a record or journal states of weights."""
    samples, content = (told if isinstance(told := record.get(key), str) else None for key in ("samples", "content"))
    return Fingerprint(samples, content)


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Keys in which two descriptions of a run differ. The model's name does not count, and its weights are compared
    by what both know of them."""
    aside = {"samples", "content", "model"}
    different = sorted(k for k in (found.keys() | expected.keys()) - aside if found.get(k) != expected.get(k))
    a, b = fingerprint_in(found), fingerprint_in(expected)
    same = agree(a, b) or (a == b and "source" not in different)
    return different if same else [*different, "weights"]


SPOILED = "spoiled"  # key of a journal's line: what stands before it was made of weights that changed meanwhile
# kind of record -> the command that makes one
COMMANDS = {
    "spectra": "laser scan MODEL -o FILE",
    "plan": "laser plan SPECTRA -o FILE --rule RULE",
    "moments": "laser calibrate MODEL --text TEXT -o FILE",
    "outcome": "laser reduce MODEL PLAN -o OUT",
    "eval": "laser eval MODEL -o FILE",
    "leaderboard": "laser leaderboard MODEL -o FILE",
    "search": "laser run MODEL -o OUT --search",
    "source": "laser card OUT --source MODEL",
}
# and how that is said where another file was named
MADE_BY = {kind: f"{command} makes one" for kind, command in COMMANDS.items()}
MADE_BY["outcome"] = "name a directory that laser reduce or laser run has finished"


def to_json(document: Any) -> bytes:
    """Strict JSON (NaN and Infinity raise ValueError), indented, the same bytes for the same document."""
    return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with a checksum of the rest of it, last."""
    bare = {key: value for key, value in document.items() if key != "check"}
    return bare | {"check": hashlib.sha256(to_json(bare)).hexdigest()}


def is_sealed(document: Any) -> bool:
    """Whether a document's checksum is that of the rest of it."""
    return isinstance(document, dict) and "check" in document and sealed(document)["check"] == document["check"]


def require_sealed(document: Any, path: Path, kind: str) -> None:
    """Raises RecordError for a record that is not as laser wrote it."""
    if not is_sealed(document):
        raise RecordError(f"{path} was changed or damaged since it was written; make it again: `{COMMANDS[kind]}`")


def read_json(path: Path, kind: str, version: int, *earlier: int) -> dict[str, Any]:
    """The record at `path`, checked to be a `kind` of this `version`, or of an `earlier` one. Raises RecordError."""
    try:
        document = parse(read_regular(path))
    except FileNotFoundError:
        raise RecordError(f"no such file: {path}; {MADE_BY.get(kind, 'check the path')}") from None
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} is not a readable {kind} file ({error}); make it again") from error
    check_header(document, path, kind, version, *earlier)
    return document


def check_header(document: Any, path: Path, kind: str, version: int, *earlier: int) -> None:
    """Raises RecordError unless the document says that it is a `kind` of `version`, or of an `earlier` one."""
    found = (document.get("kind"), document.get("version")) if isinstance(document, dict) else (None, None)
    if found[0] == kind and type(found[1]) is int and found[1] in (version, *earlier):
        return
    told = f"kind {named(found[0])} version {shown(found[1])}"
    told = "kind None, so no record of laser" if found == (None, None) else told
    again = f"make it again with this version of laser{f': `{COMMANDS[kind]}`' if kind in COMMANDS else ''}"
    remedy = again if found[0] == kind else MADE_BY.get(kind, "check the path")
    raise RecordError(f"{path}: found {told}, expected {kind!r} version {version}; {remedy}")


CHECKED = re.compile(rb'(?:, )?"check": "([0-9a-f]{16})"}\n?$')


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
                self.entries, self._last, whole = [], b"", 0
            self._file = path.open("ab", buffering=0)
            self._file.truncate(whole)
        if not whole:
            self._append(run)

    def _begin(self, path: Path, run: Mapping[str, Any], shapes: Sequence[Mapping[str, Any]] | None) -> None:
        self.path, self._run = path, run
        self._shapes = None if shapes is None else (*shapes, {SPOILED: str})
        self.entries: list[dict[str, Any]] = []
        self._last = b""

    @classmethod
    def require(cls, path: Path, run: Mapping[str, Any], shapes: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Raises as opening it would where the journal at `path`, if there is one, is of another run."""
        looked = cls.__new__(cls)
        looked._begin(path, run, shapes)
        if path.exists():
            looked._load(run)

    def _load(self, run: Mapping[str, Any]) -> int:
        """Fill `entries`; returns how many bytes of the file are whole lines of this run."""
        whole = 0
        data = read_regular(self.path, math.inf)
        if not _is_journal(data, run):
            raise OutputError(f"{self.path} is no journal of laser, and would be overwritten; try another name")
        lines = data.splitlines(keepends=True)
        for number, line in enumerate(lines):
            entry = self._checked(line, first=number == 0)
            if entry is None:
                if number == 0 and len(lines) > 1:
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
            else:
                self.entries.append(entry)
            whole += len(line)
        return whole

    def _checked(self, line: bytes, *, first: bool) -> dict[str, Any] | None:
        """The entry of a line; None for one that was not written like that, or does not follow the one before."""
        written = _written(line, self._last)
        if written is None:
            return None
        body, check = written
        try:
            entry = parse(body)
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
            models = [f"{told.get('model')} ({fingerprint_in(told).short})" for told in (found, run)]
            raise RecordError(
                f"{self.path} belongs to another run: {', '.join(different)} differ; it was begun with {models[0]}, "
                f"found {models[1]}; repeat the command that began it, or start afresh with --force"
            )
        if different:
            raise RecordError(
                f"{self.path} belongs to another run: {', '.join(different)} differ; "
                "repeat the command that began it, or start afresh with --force"
            )

    def append(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        self._append(entry)

    def forget(self, from_: dict[str, Any]) -> None:
        """Cut off an entry and all that follow it, in one step: a kill loses nothing of what stands before it."""
        kept = next(i for i, entry in enumerate(self.entries) if entry is from_)
        with disk_errors(self.path):
            lines = self.path.read_bytes().splitlines(keepends=True)[: kept + 1]  # the first says whose they are
            self._file.truncate(sum(map(len, lines)))
        match = CHECKED.search(lines[-1])
        assert match is not None, "its own line"
        self.entries, self._last = self.entries[:kept], match[1]

    def spoil(self, why: str) -> None:
        """Let nobody go on with what stands here."""
        self._append({SPOILED: why})

    def _append(self, entry: Mapping[str, Any]) -> None:
        body = json.dumps(dict(entry), allow_nan=False).encode()
        self._last = _check(self._last, body)
        line = body[:-1] + (b", " if entry else b"") + b'"check": "' + self._last + b'"}\n'
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


def _is_journal(data: bytes, run: Mapping[str, Any]) -> bool:
    """Whether a file was a journal once, whole or torn or damaged, and no file of somebody else."""
    begun = json.dumps(dict(run)).encode()[:12]
    return not data.strip(b"\0") or begun.startswith(data[:12]) or any(map(CHECKED.search, data.splitlines()))


def was_journal(path: Path, kind: str) -> bool:
    """Whether the file at `path` is, or was before it was damaged, a journal of this kind."""
    try:
        return _is_journal(read_regular(path, math.inf), {"kind": kind})
    except OSError:
        return False


def journal_is_whole(path: Path) -> bool:
    """Whether every line of a journal is as it was written. Lines that are missing at its end are not seen."""
    last = b""
    for line in read_regular(path, math.inf).splitlines(keepends=True):
        written = _written(line, last)
        if written is None:
            return False
        last = written[1]
    return bool(last)


def _written(line: bytes, last: bytes) -> tuple[bytes, bytes] | None:
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
