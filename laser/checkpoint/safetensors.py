"""The safetensors layout: headers, checked before they are believed, and the bytes behind them.

8 bytes of little-endian header length, a JSON header, the tensors without holes, as
https://github.com/huggingface/safetensors has it. Every number is checked against the file's size.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from laser.checkpoint.formats import pointer
from laser.checkpoint.slices import bytes_of
from laser.errors import CheckpointError, first_line
from laser.files import disk_errors, open_regular, raw_regular, replacing
from laser.records import is_deep

MAX_HEADER = 100_000_000  # the limit of the safetensors library itself
DEEPEST_CONFIG = 100  # lists in lists, of a config, and of what an entry of a header holds beyond the format
CHUNK = 8 << 20  # bytes of a file that are read at a time
BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
}
BITS |= {"U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}
BITS |= {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TORCH |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
DTYPES = {dtype: name for name, dtype in TORCH.items()}
DTYPES |= {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}
DTYPES |= {torch.bool: "BOOL", torch.complex64: "C64", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64"}
_EVERY_DTYPE = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as its header describes it; `start` and `end` are byte offsets in the shard's file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    end: int


# (name, dtype as the header spells it, shape)
HeaderEntry = tuple[str, str, tuple[int, ...]]
# (start, end) -> the bytes of that range of a shard, in pieces of any size
Data = Callable[[int, int], Iterator[memoryview]]


@dataclass(frozen=True)
class Shard:
    """One file: its header bytes verbatim (length prefix included) and the tensors that it says it holds.

    `data` is None where `path` is that very file. Elsewhere (a pickle, the Hub, another dtype) it gives the bytes that
    the file would have; `path` is then where they come from, or would be in the Hub's cache.
    """

    name: str
    path: Path
    size: int
    header: bytes
    tensors: tuple[TensorInfo, ...]  # in offset order
    data: Data | None = None
    whole: Callable[[], Path] | None = None  # on the Hub: fetches the file, once, and says where it is
    stamp: tuple[int, int] | None = None  # size and mtime in ns of the file at `path`, before its header was read

    @cached_property
    def by_name(self) -> Mapping[str, TensorInfo]:
        """The tensors by name. Made once: a shard may hold thousands, each of which is looked up."""
        return {info.name: info for info in self.tensors}


def read_bytes(shard: Shard, start: int, end: int) -> torch.Tensor:
    """Bytes [start, end) of a shard: (end - start,), uint8. Raises CheckpointError where there are fewer."""
    raw = torch.empty(end - start, dtype=torch.uint8)
    view, at = raw.numpy().data, 0
    if shard.data is not None:
        for piece in shard.data(start, end):
            view[at : at + len(piece)] = piece
            at += len(piece)
    else:
        with raw_regular(shard.path) as file:
            file.seek(start)
            while at < end - start and (count := file.readinto(view[at:])):
                at += count
    if at != end - start:
        raise CheckpointError(f"{shard.name} ends at byte {start + at}, expected {end}: it changed; run again")
    return raw


def tensor_in(shard: Shard, name: str) -> torch.Tensor:
    """A tensor of a shard whose header was read before: to read that for each of thousands takes longer than they do.

    Raises CheckpointError for one that is not there, or is of a dtype that torch does not know."""
    info = shard.by_name.get(name)
    if info is None or info.dtype not in _EVERY_DTYPE:
        raise CheckpointError(f"{shard.name} holds {'no' if info is None else info.dtype} {name}; download it again")
    return read_bytes(shard, info.start, info.end).view(_EVERY_DTYPE[info.dtype]).reshape(info.shape)


def file_pieces(path: Path, start: int, end: int) -> Iterator[memoryview]:
    """Bytes [start, end) of a local file, a few megabytes at a time; fewer where it is shorter."""
    with open_regular(path) as file:
        file.seek(start)
        while start < end and (data := file.read(min(CHUNK, end - start))):
            yield memoryview(data)
            start += len(data)


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pieces(shard: Shard, start: int, end: int) -> Iterator[memoryview]:
    """Bytes [start, end) of a shard, wherever they lie, a piece at a time."""
    return file_pieces(shard.path, start, end) if shard.data is None else shard.data(start, end)


def read_header(path: Path) -> Shard:
    """Parse and check the header of one safetensors file. Raises CheckpointError naming the file and the tensor."""
    name = path.name
    if message := pointer(path):
        raise CheckpointError(message)
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            size = status.st_size
            length = int.from_bytes(file.read(8), "little")
            check_length(name, size, length)
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {name}: {error.strerror}; download it again") from error
    return replace(parse_header(name, path, size, header), stamp=(size, status.st_mtime_ns))


def check_length(name: str, size: int, length: int) -> None:
    """Raises CheckpointError for a header of `length` bytes that a file of `size` bytes cannot or should not have."""
    if size < 8 or length > size - 8:
        raise CheckpointError(
            f"{name} is truncated: found {size} bytes, expected a header of {length} bytes; download it again"
        )
    if length > MAX_HEADER:
        raise CheckpointError(f"{name}: header of {length} bytes, expected at most {MAX_HEADER}; not a model")


def header_text(entries: Mapping[str, Any]) -> bytes:
    """The JSON text of a safetensors header, padded to a multiple of 8 bytes as every reader expects. Its length, in 8
    bytes, stands before it in a file."""
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def parse_header(name: str, path: Path, size: int, header: bytes, data: Data | None = None) -> Shard:
    """The shard that the JSON text `header` describes, checked against the file's `size`. Raises CheckpointError."""
    entries, length = _strictly(header, path), len(header)
    if not isinstance(entries, dict):
        raise CheckpointError(f"{name}: the header is a {type(entries).__name__}, expected an object; download again")
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise CheckpointError(f"{name}: __metadata__ is no object of texts, as the format has it; download it again")
    base = 8 + length
    tensors = [_tensor(name, key, entry, base, size) for key, entry in entries.items()]
    tensors.sort(key=lambda t: (t.start, t.end))
    end = base
    for tensor in tensors:
        if tensor.start != end:
            what = "overlaps the tensor before it" if tensor.start < end else "leaves a hole before it"
            raise CheckpointError(
                f"{name}: {tensor.name} {what}: found offset {tensor.start - base}, expected {end - base}; "
                "download the file again"
            )
        end = tensor.end
    if end != size:
        raise CheckpointError(
            f"{name}: found {size} bytes, expected {end} by its header: "
            f"{'truncated' if size < end else 'bytes after the last tensor'}; download it again"
        )
    return Shard(name, path, size, length.to_bytes(8, "little") + header, tuple(tensors), data)


def _tensor(file: str, key: str, entry: Any, base: int, size: int) -> TensorInfo:
    def natural(values: Any) -> bool:
        return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)

    if not isinstance(entry, dict) or not natural(entry.get("shape")) or not natural(entry.get("data_offsets")):
        raise CheckpointError(f"{file}: the entry of {key} has no valid shape and data_offsets; download it again")
    dtype, shape, offsets = entry.get("dtype"), entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(
            f"{file}: {key} has dtype {str(dtype)[:60]!r}, expected one of {', '.join(BITS)}; update laser"
        )
    if len(entry) > 3:
        _require_plain(file, key, entry)
    if len(offsets) != 2 or offsets[0] > offsets[1] or base + offsets[1] > size:
        raise CheckpointError(
            f"{file}: {key} has offsets {_short_number(offsets)}, expected two rising numbers up to {size - base}: "
            "the file is truncated or damaged; download it again"
        )
    expected = math.prod(shape) * BITS[dtype]
    if (offsets[1] - offsets[0]) * 8 != expected:
        needed = (
            _short_number(expected // 8)
            if expected % 8 == 0
            else f"{_short_number(expected)} bits, which fill no whole bytes,"
        )
        raise CheckpointError(
            f"{file}: {key} holds {offsets[1] - offsets[0]} bytes, expected {needed} for {dtype} "
            f"{_short_number(shape)}; download it again"
        )
    if not expected and math.prod(n for n in shape if n) >> 63:  # nothing of it is stored, and no library can make it
        raise CheckpointError(
            f"{file}: {key} has shape {_short_number(shape)}, expected numbers within 64 bits; not a model"
        )
    return TensorInfo(key, dtype, tuple(shape), file, base + offsets[0], base + offsets[1])


def parse_json(data: bytes, path: Path, **hooks: Any) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(pairs)
        if len(document) != len(pairs):
            raise ValueError("a key stands twice in one object")
        return document

    try:
        # UTF-8, with no mark: nobody else reads others.
        document = json.loads(data.decode(), object_pairs_hook=unique, **hooks)
        if b"\\u" in data:  # half a character, as JSON can say \ud800, is a ValueError here
            json.dumps(document, ensure_ascii=False).encode()
        return document
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not valid JSON ({first_line(error)}); download it again") from error


def _strictly(header: bytes, path: Path) -> Any:
    """The JSON of a header, in which Python would take more than the safetensors library does: NaN, -0 for 0."""

    def refuse(text: str) -> int:
        raise ValueError(f"found the number {text[:60]}, expected whole numbers of 0 and more")

    def whole(text: str) -> int:
        return refuse(text) if text == "-0" else int(text)

    # Hooks for whole numbers cost a tenth of the time to open a model of 45,000 tensors.
    signed = {"parse_int": whole} if b"-0" in header else {}
    return parse_json(header, path, parse_constant=refuse, **signed)


def _require_plain(file: str, key: str, entry: dict[str, Any]) -> None:
    """Raises CheckpointError for more in an entry than the format has that safetensors, which passes over it, cannot
    read: numbers out of float64's range, nesting deeper than its limit of 128."""
    deep, todo = is_deep(entry, DEEPEST_CONFIG), list(entry.values())
    while todo and not deep:
        value = todo.pop()
        deep = isinstance(value, int | float) and not abs(value) <= sys.float_info.max
        todo += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if deep:
        raise CheckpointError(
            f"{file}: the entry of {key} holds more than dtype, shape and data_offsets, of numbers without end or "
            "nested too deep; download it again"
        )


def _short_number(value: Any) -> str:
    """A number or list for a message. Python makes no text of a number of more than 4,300 digits."""
    if isinstance(value, list):
        numbers = ", ".join(map(_short_number, value[:9])) + (", ..." if len(value) > 9 else "")
        return f"[{numbers}]"
    return str(value) if value >> 64 == 0 else "a number above 64 bits"


def make_header(entries: Sequence[HeaderEntry]) -> bytes:
    """The JSON text of a safetensors header for these tensors, in this order; the same bytes for the same tensors.

    Wide dtypes come first, so that every tensor begins at a multiple of its element's size, as readers expect.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in sorted(entries, key=lambda entry: -BITS[entry[1]]):
        end = at + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    return header_text(header)


def virtual_shard(
    name: str, path: Path, entries: Sequence[HeaderEntry], tensor: Callable[[str], torch.Tensor]
) -> Shard:
    """A shard called `name` that holds `entries`; `tensor` gives each, of the dtype and shape that its entry says.

    path: where the bytes come from, for messages. One tensor is in memory at a time.
    """
    text = make_header(entries)
    size = 8 + len(text) + sum(math.prod(shape) * BITS[dtype] // 8 for _, dtype, shape in entries)
    return filled(parse_header(name, path, size, text), lambda info: tensor(info.name))


def filled(shard: Shard, tensor: Callable[[TensorInfo], torch.Tensor]) -> Shard:
    """A shard of whose file only the header is known; `tensor` gives what it holds, one at a time."""

    def data(start: int, end: int) -> Iterator[memoryview]:
        if start < len(shard.header):
            yield memoryview(shard.header)[start:end]
        for info in within(shard, start, end):
            low, high = max(start, info.start), min(end, info.end)
            yield bytes_of(tensor(info))[low - info.start : high - info.start]

    return replace(shard, data=data)


def within(shard: Shard, start: int, end: int) -> Iterator[TensorInfo]:
    """The tensors that have bytes in the range [start, end) of a shard, found without looking at the others."""
    for number in range(bisect_right(shard.tensors, start, key=lambda info: info.end), len(shard.tensors)):
        info = shard.tensors[number]
        if info.start >= end:
            break
        if max(start, info.start) < min(end, info.end):
            yield info


def join(parts: Sequence[Path], path: Path, metadata: Mapping[str, str]) -> None:
    """All tensors of `parts`, which have different names, in the file `path` with this metadata; complete or not there.

    Raises OutputError, as every writer here, for a full disk.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    ranges, at = [], 0
    for part in parts:
        shard = read_header(part)
        begin = len(shard.header)
        for info in shard.tensors:
            offsets = [at + info.start - begin, at + info.end - begin]
            header[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
        ranges.append((part, begin, shard.size))
        at += shard.size - begin
    text = header_text(header)
    with disk_errors(path), replacing(path) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for part, start, end in ranges:
            for piece in file_pieces(part, start, end):
                out.write(piece)
