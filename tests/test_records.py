"""A record is its dataclass: what is declared is read back, and all that was not declared is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pytest
from hostile_records import seal
from safetensors import safe_open
from safetensors.numpy import save_file

from laser.arrays import ArrayRecord
from laser.errors import RecordError
from laser.records import LATER, SPARSE, Record, under

JUNK: list[Any] = [None, True, 3, -1, 1.5, "x", [], {}, [1], {"a": 1}, float("nan"), float("inf"), 10**400]


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Size(TypedDict):
    width: int
    height: float


@dataclass(frozen=True)
class Part:
    name: str
    colour: Colour
    weight: float | None
    place: tuple[int, int]

    def wrong(self) -> str | None:
        return under(self, 0, "weight")


@dataclass(frozen=True)
class Inner(Record, kind="inner", version=1, made_by="toy inner", seal=False):
    text: str


@dataclass(frozen=True)
class Toy(
    Record,
    kind="toy",
    version=3,
    made_by="toy make",
    earlier={2: lambda document: document | {"whole": document["whole"] == "yes"}},
    derived=("count",),
):
    title: str
    whole: bool
    parts: tuple[Part, ...]
    sizes: Mapping[str, Size]
    first: Part | None
    free: Mapping[str, Any]
    shade: str = field(default="", metadata=LATER)
    note: str = field(default="", metadata=SPARSE)

    @property
    def count(self) -> int:
        return len(self.parts)

    def wrong(self) -> str | None:
        return None if self.title else "title is empty, expected a text"


PART = Part("a", Colour.RED, 1.5, (1, 2))
TOY = Toy(
    "toy", True, (PART, Part("b", Colour.BLUE, None, (3, 4))), {"s": {"width": 1, "height": 2.5}}, PART, {"x": [1]}
)


def saved(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document))
    return path


def places(document: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a typed value lies in a document: inside what is free, none does."""
    inside = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in inside:
        yield (*at, key)
        if key != "free":
            yield from places(value, (*at, key))


def changed(at: tuple[Any, ...], change: Callable[[Any, Any], object]) -> Any:
    """The document of TOY with one of its places changed, sealed again."""
    document = json.loads(TOY.to_json())
    holder = document
    for key in at[:-1]:
        holder = holder[key]
    change(holder, at[-1])
    return document if at[0] == "check" else seal(document)


def refused(path: Path, document: Any) -> str:
    with pytest.raises(RecordError) as caught:
        Toy.load(saved(path, document))
    text = str(caught.value)
    assert text.startswith(str(path)) and "toy make" in text and len(text.splitlines()) == 1
    return text


# By name: which of JUNK its type takes. `parts` takes [], but then `count` is wrong; a part's weight is 0 or more.
TAKEN: dict[str, list[Any]] = {"title": ["x"], "name": ["x"], "shade": ["x"], "whole": [True], "first": [None]}
TAKEN |= {"place": [3, -1, 10**400], "width": [3, -1, 10**400], "height": [3, -1, 1.5], "weight": [None, 3, 1.5]}
TAKEN |= {"sizes": [{}], "free": [{}, {"a": 1}]}
PLACES = list(places(json.loads(TOY.to_json())))
KEYS = [at for at in PLACES if isinstance(at[-1], str) and at[0] != "free" and at != ("sizes", "s")]


def test_it_reads_back_what_it_saved(tmp_path: Path) -> None:
    for toy in (TOY, replace(TOY, first=None, parts=(), note="n", shade="s")):
        toy.save(tmp_path / "toy")
        assert Toy.load(tmp_path / "toy") == toy
        assert Toy.load(saved(tmp_path / "again", toy.document())) == toy
    document = json.loads(TOY.to_json())
    assert list(document) == ["kind", "version", "count", *(k for k in asdict(TOY) if k != "note"), "check"]


@pytest.mark.parametrize("at", KEYS, ids=lambda at: "/".join(map(str, at)))
def test_a_missing_key_is_refused(at: tuple[Any, ...], tmp_path: Path) -> None:
    document = changed(at, lambda holder, key: holder.pop(key))
    if at == ("shade",):  # earlier files lack it
        assert Toy.load(saved(tmp_path / "toy", document)) == TOY
    else:
        assert at[-1] in refused(tmp_path / "toy", document) or at[-1] in ("kind", "version", "check")


@pytest.mark.parametrize("at", [(), ("parts", 0), ("first",), ("sizes", "s")], ids=str)
def test_an_extra_key_is_refused(at: tuple[Any, ...], tmp_path: Path) -> None:
    assert "has a key 'shiny', expected only" in refused(
        tmp_path / "toy", changed((*at, "shiny"), lambda holder, key: holder.update({key: 1}))
    )


@pytest.mark.slow
def test_a_value_of_another_type_is_refused(tmp_path: Path) -> None:
    """Each place takes its own type and no other; NaN and Infinity lie in none, also not in what is free."""
    for at in PLACES:
        if at[0] in ("kind", "version", "check", "count"):
            continue
        taken: list[Any] = []
        for junk in JUNK:
            document = changed(at, lambda holder, key, junk=junk: holder.__setitem__(key, junk))
            try:
                Toy.load(saved(tmp_path / "toy", document))
                taken.append(junk)
            except RecordError as error:
                assert len(str(error).splitlines()) == 1, error
        # An entry of `place` takes what is a whole number; a part, and `place` itself, take no junk.
        name = "" if at[-1] == "place" else "place" if "place" in at else str(at[-1])
        assert repr(taken) == repr(TAKEN.get(name, [])), at


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (("title",), 3, ": title is 3, expected a text; make it again: `toy make`"),
        (("title",), "", ": title is empty, expected a text;"),
        (("parts",), {}, ": parts is {}, expected a list, each an object"),
        (("parts", 1), 7, ": part 2 is 7, expected an object"),
        (("parts", 1, "colour"), "green", ': part 2 (b): colour is "green", expected one of red, blue;'),
        (("parts", 1, "place"), [1], ": part 2 (b): place is [1], expected a list;"),
        (("parts", 0, "weight"), -2, ": part 1 (a): weight is -2, expected 0 or more;"),
        (("first", "weight"), "x", ': its first: weight is "x", expected a number or null;'),
        (("sizes", "s", "width"), True, ": size s: width is true, expected a whole number;"),
        (("free", "x"), float("nan"), ": free x holds nan, expected a finite number;"),
        (("count",), 3, ": count is 3, expected 2 by the rest of it;"),
        (("kind",), "plan", ": found kind 'plan' version 3, expected 'toy' version 3; toy make makes one"),
        (("version",), 4, ": found kind 'toy' version 4, expected 'toy' version 3; make it again with this version"),
        (("version",), True, ": found kind 'toy' version true, expected"),
        (("check",), "0" * 64, " was changed or damaged since it was written; make it again: `toy make`"),
    ],
    ids=str,
)
def test_a_refusal_says_where_and_what(at: tuple[Any, ...], value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecordError) as caught:
        Toy.load(saved(tmp_path / "toy", changed(at, lambda holder, key: holder.__setitem__(key, value))))
    assert message in str(caught.value)


def test_an_earlier_version_is_read(tmp_path: Path) -> None:
    document = json.loads(TOY.to_json()) | {"version": 2, "whole": "yes"}
    assert Toy.load(saved(tmp_path / "toy", seal(document))) == TOY
    assert Toy.load(saved(tmp_path / "toy", seal(document | {"whole": "no"}))) == replace(TOY, whole=False)
    refused(tmp_path / "toy", seal(document | {"version": 1}))


def test_every_flipped_byte_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    whole = TOY.to_json()
    for at in range(len(whole)):
        (tmp_path / "toy").write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            assert Toy.load(tmp_path / "toy") == TOY, at  # as in the blanks of JSON
            assert chr(whole[at]).isspace(), at
        except RecordError:
            continue


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"7", b"{", b"\xff\xfe", b"[" * 99_999, b'{"kind": "toy", "kind": "toy"}']
)
def test_what_is_no_record_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "toy").write_bytes(data)
    with pytest.raises(RecordError, match=r"toy (is not a readable toy file|: found kind None)|toy: found kind None"):
        Toy.load(tmp_path / "toy")
    with pytest.raises(RecordError, match=r"no such file: .*/none; toy make makes one"):
        Toy.load(tmp_path / "none")
    with pytest.raises(RecordError, match="expected a regular file"):
        Toy.load(tmp_path)


def test_a_record_inside_a_record_says_its_own_version(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Outer(Record, kind="outer", made_by="toy outer"):
        inner: Inner

    globals()["Outer"] = Outer
    document = {"kind": "outer", "version": 1, "inner": {"kind": "inner", "version": 1, "text": "t"}}
    assert Outer.from_document(document, tmp_path) == Outer(Inner("t"))
    document["inner"] = {"kind": "inner", "version": 2, "text": "t"}
    with pytest.raises(RecordError, match=": its inner: found kind 'inner' version 2, expected 'inner' version 1"):
        Outer.from_document(document, tmp_path)


# --- with arrays ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head(ArrayRecord, kind="head", version=1, made_by="toy head"):
    names: tuple[str, ...]


def test_a_record_with_arrays(tmp_path: Path) -> None:
    head, path, a = Head(("a",)), tmp_path / "head", np.arange(3.0)
    head.save(path, {"a": a})
    assert Head.load(path) == head
    with Head.opened(path, "numpy") as file:
        assert np.array_equal(file.get_tensor("a"), a)
    with safe_open(path, "numpy") as file:
        document = json.loads(file.metadata()["laser"])
    for change, message in (
        ({"names": "a"}, 'head file: names is "a", expected a list, each a text'),
        ({"more": 1}, "has a key 'more'"),
        ({"version": 2}, "found kind 'head' version 2, expected 'head' version 1"),
        ({"names": ["b"]}, "was changed or damaged since it was written; make it again: `toy head`"),
    ):
        save_file({"a": a}, path, {"laser": json.dumps(document | change)})
        with pytest.raises(RecordError, match=message):
            Head.load(path)
    save_file({"a": a}, path)
    with pytest.raises(
        RecordError, match="kind None, so no record of laser, expected 'head' version 1; toy head makes"
    ):
        Head.load(path)
    path.write_bytes(b"junk")
    with pytest.raises(RecordError, match="is not a readable head file"):
        Head.load(path)
    with pytest.raises(RecordError, match="no such file"):
        Head.load(tmp_path / "none")
