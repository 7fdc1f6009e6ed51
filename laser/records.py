"""Records: JSON on the disk, frozen dataclasses in memory, the one made from the other by the types of the fields.

A record declares its kind, its version and its fields. What is missing, unknown, of another type or not finite in its
file is a RecordError, and so is a checksum that is not that of the rest. `wrong` says how it contradicts itself.
`Fingerprint` says which weights a record is of, and `differences` in what two descriptions of a run differ.
"""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

from laser.errors import RecordError, first_line
from laser.files import disk_errors, read_regular, replacing

LARGEST_FLOAT = sys.float_info.max
# Objects and lists inside one another; our deepest record has 6, and writing stops at some hundreds.
DEEPEST_RECORD = 32
# Metadata of a field: earlier versions lack it; it is written only where it is not the default; it is never written.
LATER, SPARSE, ASIDE = ({"laser": word} for word in ("later", "sparse", "aside"))


# --- JSON -------------------------------------------------------------------------------------------------------------


def parse_record(data: bytes | str) -> Any:
    """The document in a record's JSON. Raises ValueError for what is no JSON, or twice in it, or nested too deep."""
    if not isinstance(data, str):  # as `json.loads` does it, which holds both while it reads
        data = data.decode(json.detect_encoding(data), "surrogatepass")
    try:
        document = json.loads(data, object_pairs_hook=each_once)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if is_deep(document, DEEPEST_RECORD):
        raise ValueError(f"it is nested more than {DEEPEST_RECORD} deep")
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


def to_json(document: Any) -> bytes:
    """Strict JSON (NaN and Infinity raise ValueError), indented, the same bytes for the same document."""
    return b"".join(json_pieces(document))


def json_pieces(document: Any) -> Iterator[bytes]:
    """What `to_json` makes of a document, whose values may be parts of records, in pieces of about one entry each.

    The text of a plan of 45,000 lines, and JSON of all its lines at once, are larger than the plan.
    """
    if not _holds_others(document):
        yield _ENCODER.encode(document).encode()
    else:
        for piece in _in_pieces(document, 0):
            yield piece.encode()
    yield b"\n"


CONTAINERS = Mapping | list | tuple
DEEPEST_PIECES = 3  # objects and lists around a piece: those of a line in the plan of an outcome
TOGETHER = 32  # entries of a piece


def _holds_others(value: Any) -> bool:
    """Whether a JSON object or list holds objects or lists, and is not a part of a record, such as a plan's line."""
    if not isinstance(value, CONTAINERS):
        return False
    inside = value.values() if isinstance(value, Mapping) else value
    return any(isinstance(each, CONTAINERS) or is_dataclass(each) for each in inside)


def _in_pieces(value: Any, depth: int) -> Iterator[str]:
    """The text of an object or list inside `depth` others: entries that hold no others together, the rest in pieces of
    their own."""
    make, start, end = (dict, "{", "}") if isinstance(value, Mapping) else (list, "[", "]")
    together: list[Any] = []

    def written() -> str:
        """No text in JSON holds a line's end: those are between the entries."""
        text = _ENCODER.encode(make(together))[1:-2].replace("\n", "\n" + " " * depth)
        together.clear()
        return text

    for each in value.items() if make is dict else value:
        key, inside = each if make is dict else (None, each)
        opened = depth < DEEPEST_PIECES - 1 and _holds_others(inside)
        if not opened:
            together.append(each)
        if together and (opened or len(together) == TOGETHER):
            yield start + written()
            start = ","
        if opened:
            before = "" if make is list else json.dumps({key: 0})[1:-2]
            pieces = _in_pieces(inside, depth + 1)
            yield start + "\n" + " " * (depth + 1) + before + next(pieces)
            yield from pieces
            start = ","
    if together:
        yield start + written()
    yield "\n" + " " * depth + end


def _part(value: Any) -> Any:
    if is_dataclass(value) or isinstance(value, Mapping):
        return plain(value)
    raise TypeError(f"{type(value).__name__} has no JSON")


_ENCODER = json.JSONEncoder(indent=1, allow_nan=False, default=_part)


def fields_of(record: Any) -> dict[str, Any]:
    """The fields of a dataclass that its file holds, as they are."""
    written = ((name, default, getattr(record, name)) for name, default in _written_fields(type(record)))
    return {name: value for name, default, value in written if value != default}


def plain(value: Any) -> Any:
    """A value of a record as JSON has it."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):  # which a dataclass may be
        return {key: plain(each) for key, each in value.items()}
    if is_dataclass(value):
        return {name: plain(each) for name, each in fields_of(value).items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


@cache
def _written_fields(cls: Any) -> list[tuple[str, Any]]:
    """The fields of a dataclass that are written, each with the value at which it is not; MISSING: it always is."""
    written = [field for field in fields(cls) if field.metadata != ASIDE]
    return [(field.name, field.default if field.metadata == SPARSE else MISSING) for field in written]


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with a checksum of the rest of it, last."""
    bare = {key: value for key, value in document.items() if key != "check"}
    return bare | {"check": sha256_of_json(bare)}


def sha256_of_json(document: Any) -> str:
    """sha256 of what `to_json` makes of a document."""
    digest = hashlib.sha256()
    for piece in json_pieces(document):
        digest.update(piece)
    return digest.hexdigest()


def is_sealed(document: Any) -> bool:
    """Whether a document's checksum is that of the rest of it."""
    return isinstance(document, dict) and "check" in document and sealed(document)["check"] == document["check"]


def save_json(path: Path, document: Any) -> None:
    """`to_json` of a document at `path`, or the old file untouched."""
    with disk_errors(path), replacing(path) as file:
        for piece in json_pieces(document):
            file.write(piece)


# --- a value by its type ----------------------------------------------------------------------------------------------

SINGULAR = {"matrices": "matrix", "losses": "loss", "hashes": "hash", "families": "family"}
CALLED = ("name", "task", "label")  # keys that say which entry of a list it is


class Misfit(Exception):
    """A JSON value is not what its type has. `places` lead to it from the outside; `stated` says what was found."""

    def __init__(self, stated: str, joint: str = " ") -> None:
        self.stated, self.joint = stated, joint
        self.places: list[str] = []

    def inside(self, place: str) -> Misfit:
        """The same, one place further out."""
        at = self.places[:1]
        if at and isinstance(at[0], _Entry):
            self.places[0] = type(place)(f"{SINGULAR.get(place, place.removesuffix('s'))} {at[0]}")
        else:
            self.places.insert(0, place)
        return self

    def sentence(self, where: str) -> str:
        """All of it but for what to try."""
        places = [f"entry {place}" if isinstance(place, _Entry) else place for place in self.places]
        about = places or (["it"] if self.joint == " " else [])
        return ": ".join([where, *about]) + self.joint + self.stated


class _Entry(str):
    """Which entry of a list or a mapping: the field that holds it puts its own name before."""


def decode(hint: Any, found: Any, where: str, remedy: str) -> Any:
    """`found`, from JSON, as the type `hint` has it. Raises RecordError: `where`, found and expected, `remedy`."""
    try:
        return reader(hint)(found)
    except Misfit as misfit:
        raise RecordError(f"{misfit.sentence(where)}; {remedy}") from None


def has_shape(found: Mapping[str, Any], shape: Mapping[str, Any]) -> bool:
    """Whether an object has the keys of `shape` and no others, and values of its types."""
    if found.keys() != shape.keys():
        return False
    try:
        for name, hint in shape.items():
            reader(hint)(found[name])
    except Misfit:
        return False
    return True


@cache
def reader(hint: Any) -> Callable[[Any], Any]:
    """What makes a value of the type `hint` from JSON: a list will do for a tuple, a whole number for a number.

    A dataclass's own method `wrong` is asked as well. What it makes raises Misfit.
    """
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _either(hint, inside)
    if origin is tuple:
        return _list(hint, inside)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(hint, reader(inside[0]), reader(inside[1]))
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.nested
    if is_object(hint):
        return object_reader(hint)
    if hint is Any:
        return _finite
    if hint is dict:
        return _mapping(hint, _finite, _finite)
    if hint is float:
        return _finite_number
    return _word_reader(hint) if issubclass(hint, StrEnum) else _exact(hint)


def is_object(hint: Any) -> bool:
    """Whether a type is one of named fields."""
    return isinstance(hint, type) and (is_dataclass(hint) or is_typeddict(hint))


def _exact(hint: type) -> Callable[[Any], Any]:
    def read(found: Any) -> Any:
        if type(found) is not hint:
            raise _misfit(hint, found)
        return found

    return read


def _finite_number(found: Any) -> Any:
    if type(found) not in (float, int) or not abs(found) <= LARGEST_FLOAT:  # NaN is no more than anything
        raise _misfit(float, found)
    return found


def _finite(found: Any) -> Any:
    """Whatever it is, without NaN and Infinity anywhere in it."""
    todo = [found]
    while todo:
        value = todo.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise Misfit(f"holds {value}, expected a finite number")
        todo += value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return found


def _word_reader(hint: type[StrEnum]) -> Callable[[Any], Any]:
    known = {str(word): word for word in hint}

    def read(found: Any) -> Any:
        if not isinstance(found, str) or found not in known:
            raise _misfit(hint, found)
        return known[found]

    return read


def _either(hint: Any, inside: Sequence[Any]) -> Callable[[Any], Any]:
    readers = [(one, reader(one)) for one in inside]
    may_be_none = type(None) in inside

    def read(found: Any) -> Any:
        if found is None and may_be_none:
            return None
        nearest = None
        for one, read_one in readers:
            try:
                return read_one(found)
            except Misfit as misfit:
                if is_object(one) and isinstance(found, dict):  # its own fault says more than that of all
                    nearest = misfit
        raise nearest or _misfit(hint, found)

    return read


def _list(hint: Any, inside: Sequence[Any]) -> Callable[[Any], Any]:
    every = reader(inside[0]) if inside[-1] is Ellipsis else None
    each = None if every else [reader(one) for one in inside]

    def read(found: Any) -> Any:
        if not isinstance(found, list | tuple) or (each and len(each) != len(found)):
            raise _misfit(hint, found)
        made: list[Any] = []
        try:
            for number, value in enumerate(found):
                made.append(every(value) if every else each[number](value))  # pyright: ignore[reportOptionalSubscript]
        except Misfit as misfit:
            value = found[len(made)]
            called = [value[key] for key in CALLED if isinstance(value, dict) and isinstance(value.get(key), str)]
            place = f"{len(made) + 1} ({called[0][:200]})" if called else f"{len(made) + 1}"
            raise misfit.inside(_Entry(place)) from None
        return tuple(made)

    return read


def _mapping(hint: Any, read_key: Callable[[Any], Any], read_value: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def read(found: Any) -> Any:
        if not isinstance(found, dict):
            raise _misfit(hint, found)
        made: dict[Any, Any] = {}
        for key, value in found.items():
            try:
                made[read_key(key)] = read_value(value)
            except Misfit as misfit:
                raise misfit.inside(_Entry(str(key)[:200])) from None
        return made

    return read


@cache
def object_reader(cls: Any) -> Callable[[Any], Any]:
    """What makes a dataclass or a typed dictionary from a JSON object: its fields are the keys that there may be."""
    hints = get_type_hints(cls)
    if is_dataclass(cls):
        names = [field.name for field in fields(cls) if field.metadata != ASIDE]
        optional = {field.name for field in fields(cls) if field.metadata in (LATER, SPARSE)}
    else:
        names, optional = list(hints), set(cls.__optional_keys__)
    needed = [name for name in names if name not in optional]
    inside = {name: (reader(hints[name]), _place_of(name, hints[name])) for name in names}
    make, wrong = cast("Callable[..., Any]", cls), getattr(cls, "wrong", lambda _: None)
    made_already: Any = cls if is_dataclass(cls) else ()

    def read(found: Any) -> Any:
        if isinstance(found, made_already):  # a part of a document that was not read from a file
            return checked(found)
        if not isinstance(found, dict):
            raise _misfit(cls, found)
        for name in needed:
            if name not in found:
                raise Misfit(f"has no key {name!r}, expected {', '.join(needed)}")
        made = {}
        for name, value in found.items():
            if name not in inside:
                raise Misfit(f"has a key {named(name)}, expected only {', '.join(names)}")
            read_one, place = inside[name]
            try:
                made[name] = read_one(value)
            except Misfit as misfit:
                raise misfit.inside(place) from None
        return checked(make(**made))

    def checked(value: Any) -> Any:
        if why := wrong(value):
            raise Misfit(why, ": ")
        return value

    return read


def _place_of(name: str, hint: Any) -> str:
    """What an error calls a field: the one object that it holds is told apart from a plain value."""
    one_of = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return f"its {name}" if any(map(is_object, one_of)) else name


def _misfit(hint: Any, found: Any) -> Misfit:
    return Misfit(f"is {shown(found)}, expected {words(hint)}")


# --- types and values in messages -------------------------------------------------------------------------------------

WIDEST_VALUE = 60  # characters of a value that a message repeats
_short = reprlib.Repr()  # looks no further into a value than it tells of it
_short.maxlevel, _short.maxdict, _short.maxlist, _short.maxtuple = 3, 8, 16, 16
_short.maxstring = _short.maxlong = _short.maxother = WIDEST_VALUE
WORDS = {
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def words(hint: Any) -> str:
    """A type, for people."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(words(one) for one in inside)
    if origin is tuple:
        return f"a list, each {words(inside[0])}" if inside[-1] is Ellipsis else "a list"
    if is_object(hint) and len(get_type_hints(hint)) < 4:
        return f"an object of {' and '.join(get_type_hints(hint))}"
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return f"one of {', '.join(hint)}"
    return WORDS.get(hint, "an object")


def shown(found: Any, quote: str = '"') -> str:
    """A value as its file has it, shortened."""
    text = {None: "null", True: "true", False: "false"}.get(found) if type(found) in (bool, type(None)) else None
    text = text or (f"{quote}{found[:WIDEST_VALUE]}{quote}" if isinstance(found, str) else _short.repr(found))
    return text if len(text) <= WIDEST_VALUE else text[: WIDEST_VALUE - 3] + "..."


def named(found: Any) -> str:
    """A value as its file has it, shortened, in the quotes of a name."""
    return shown(found, "'")


def under(record: Any, least: float, *names: str) -> str | None:
    """How the first of these numbers is less than the least that it can be; None where none is."""
    for name in names:
        value = record.get(name) if isinstance(record, Mapping) else getattr(record, name)
        if value is not None and value < least:
            return f"{name} is {shown(value)}, expected {least} or more"
    return None


# --- records ----------------------------------------------------------------------------------------------------------


class Record:
    """Base of the frozen dataclasses that lie in files of their own.

    Declared in the line of the class, and where they are not, by their defaults:

    kind, version: as the file says them
    made_by: the command that makes one
    mend: how a sentence about what is in it ends; else it says to make it again by that command
    missing: how a sentence ends where there is no such file, or another record was named
    earlier: versions that are read as well, each with what makes today's document of its own
    seal: whether a checksum of the rest stands last, and must be right
    derived: properties that are written before the fields, and must agree with them
    beside: keys that may stand beside the fields, and their types
    """

    kind: ClassVar[str]
    version: ClassVar[int]
    made_by: ClassVar[str]
    mend: ClassVar[str]
    missing: ClassVar[str]
    earlier: ClassVar[Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]]]
    seal: ClassVar[bool]
    derived: ClassVar[Sequence[str]]
    beside: ClassVar[Mapping[str, Any]]

    def __init_subclass__(
        cls,
        *,
        kind: str = "",
        version: int = 1,
        made_by: str = "",
        mend: str = "",
        missing: str = "",
        earlier: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] | None = None,
        seal: bool = True,
        derived: Sequence[str] = (),
        beside: Mapping[str, Any] | None = None,
    ) -> None:
        cls.kind, cls.version, cls.made_by, cls.seal, cls.derived = kind, version, made_by, seal, derived
        cls.mend, cls.missing = mend or f"make it again: `{made_by}`", missing or f"{made_by} makes one"
        cls.earlier, cls.beside = earlier or {}, beside or {}

    def wrong(self) -> str | None:
        """How the record contradicts itself, as a sentence; None where it does not."""
        return None

    @classmethod
    def heading(cls) -> dict[str, Any]:
        """What a file of this kind begins with."""
        return {"kind": cls.kind, "version": cls.version}

    def stated(self) -> dict[str, Any]:
        """What the file holds besides its checksum, the values of fields as they are."""
        return self.heading() | {name: getattr(self, name) for name in self.derived} | fields_of(self)

    def _sealed(self) -> dict[str, Any]:
        return sealed(self.stated()) if self.seal else self.stated()

    def document(self) -> dict[str, Any]:
        """What the file holds, as JSON has it."""
        return plain(self._sealed())

    def to_json(self) -> bytes:
        return to_json(self._sealed())

    @property
    def sha256(self) -> str:
        """Of the file's bytes."""
        return sha256_of_json(self._sealed())

    def save(self, path: Path) -> None:
        save_json(path, self._sealed())

    @classmethod
    def load(cls, path: str | Path, *, as_written: bool = True) -> Self:
        """The record at `path`. Raises RecordError for one that is missing, damaged, or of another kind or version.

        as_written: whether its checksum has to be right.
        """
        path = Path(path)
        with cls.reading(path):
            document = parse_record(read_regular(path))
        return cls.from_document(document, path, as_written=as_written)

    @classmethod
    @contextmanager
    def reading(cls, path: Path, *unreadable: type[Exception]) -> Iterator[None]:
        """OSError, ValueError and what else is `unreadable` inside, as a RecordError about the file at `path`."""
        try:
            yield
        except FileNotFoundError:
            raise RecordError(f"no such file: {path}; {cls.missing}") from None
        except (OSError, ValueError, *unreadable) as error:
            message = f"{path} is not a readable {cls.kind} file ({first_line(error)})"
            raise RecordError(f"{message}; make it again: `{cls.made_by}`") from error

    @classmethod
    def from_document(cls, document: Any, path: Path, *, as_written: bool = False) -> Self:
        """The record in a document of the file at `path`. Raises RecordError as `load`."""
        cls.require_kind(document, path)
        record = decode(cls, document, f"{path} is not a whole {cls.kind} file", cls.mend)
        if as_written:
            cls.require_seal(document, path)
        return record

    @classmethod
    def require_kind(cls, document: Any, path: Path) -> None:
        """Raises RecordError for a document of another kind or version."""
        if stated := cls.other(document):
            of_kind = isinstance(document, dict) and document.get("kind") == cls.kind
            remedy = f"make it again with this version of laser: `{cls.made_by}`" if of_kind else cls.missing
            raise RecordError(f"{path}: {stated}; {remedy}")

    @classmethod
    def require_seal(cls, document: Any, path: Path) -> None:
        """Raises RecordError for a document that is not as laser wrote it."""
        if cls.seal and not is_sealed(document):
            message = f"{path} was changed or damaged since it was written"
            raise RecordError(f"{message}; make it again: `{cls.made_by}`")

    @classmethod
    def other(cls, document: Any) -> str | None:
        """How a document says that it is of another kind or version; None where it is one of these."""
        kind, version = (document.get("kind"), document.get("version")) if isinstance(document, dict) else (None, None)
        if kind == cls.kind and type(version) is int and version in (cls.version, *cls.earlier):
            return None
        message = f"kind {named(kind)} version {shown(version)}"
        message = "kind None, so no record of laser" if kind is None and version is None else message
        return f"found {message}, expected {cls.kind!r} version {cls.version}"

    @classmethod
    def nested(cls, document: Any) -> Self:
        """The record in a document, which may lie inside another one. Raises Misfit."""
        if stated := cls.other(document):
            raise Misfit(stated, ": ")
        return cls.current(cls.earlier.get(document["version"], dict)(document))

    @classmethod
    def current(cls, document: dict[str, Any]) -> Self:
        """The record in a document of today's version. Raises Misfit."""
        apart = {"kind", "version", *cls.derived, *cls.beside} | ({"check"} if cls.seal else set())
        record = object_reader(cls)({key: value for key, value in document.items() if key not in apart})
        for name, hint in cls.beside.items():
            if name in document:
                _place_inside(name, hint, document[name])
        for name in cls.derived:
            if name not in document:
                raise Misfit(f"has no key {name!r}")
            hint, expected = get_type_hints(getattr(cls, name).fget)["return"], getattr(record, name)
            if not near_enough(_place_inside(name, hint, document[name]), expected):
                raise Misfit(f"{name} is {shown(document[name])}, expected {shown(expected)} by the rest of it", ": ")
        return record


def _place_inside(name: str, hint: Any, found: Any) -> Any:
    try:
        return reader(hint)(found)
    except Misfit as misfit:
        raise misfit.inside(name) from None


def near_enough(a: float | None, b: float | None, within: float = 1e-6) -> bool:
    """Whether two figures are the same but for rounding; one that is None is only like None."""
    return a is b if a is None or b is None else math.isclose(a, b, abs_tol=within)


# --- which weights a record is of -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fingerprint:
    """Which weights these are, by hashes of them.

    samples: sha256 over bytes of every tensor; None where they lie on the Hub
    content: one hash over the hashes that the Hub has of the files; None elsewhere
    """

    samples: str | None = None
    content: str | None = None

    def stated(self) -> dict[str, str]:
        """The hashes that are known, for records."""
        known = {"content": self.content, "samples": self.samples}
        return {kind: digest for kind, digest in known.items() if digest}

    @property
    def short(self) -> str:
        """The first digits of a hash, for messages."""
        return (self.samples or self.content or "unknown")[:12]


def agree(a: Fingerprint, b: Fingerprint) -> bool | None:
    """Whether the two are of the same weights: equal in every kind that both know; None where they share no kind."""
    pairs = [(x, y) for x, y in ((a.content, b.content), (a.samples, b.samples)) if x and y]
    return all(x == y for x, y in pairs) if pairs else None


def fingerprint_in(record: Mapping[str, Any]) -> Fingerprint:
    """What a record or journal states of weights."""
    samples, content = (
        stated if isinstance(stated := record.get(key), str) else None for key in ("samples", "content")
    )
    return Fingerprint(samples, content)


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Keys in which two descriptions of a run differ. The model's name does not count, and its weights are compared
    by what both know of them."""
    aside = {"samples", "content", "model"}
    different = sorted(k for k in (found.keys() | expected.keys()) - aside if found.get(k) != expected.get(k))
    a, b = fingerprint_in(found), fingerprint_in(expected)
    same = agree(a, b) or (a == b and "source" not in different)
    return different if same else [*different, "weights"]
