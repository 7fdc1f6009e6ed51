"""Bytes of one shard, by range: copied in the kernel, replaced in place, checked by their hash."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from laser.checkpoint.matrices import Matrix
from laser.checkpoint.safetensors import CHUNK, TORCH, Shard, file_pieces, pieces, read_bytes
from laser.checkpoint.slices import Slice, fetch_from, put_into, read_slice, tensor_sha256, whole_slice, write_slice
from laser.errors import CheckpointError
from laser.files import disk_errors, open_regular, replacing, unfinished


def untouched(shard: Shard, touched: set[str]) -> Iterator[tuple[int, int]]:
    """Byte ranges to copy, merged: everything but the tensors that are replaced whole."""
    start = 0
    for tensor in shard.tensors:
        if tensor.name in touched:
            if tensor.start > start:
                yield start, tensor.start
            start = tensor.end
    if shard.size > start:
        yield start, shard.size


def copy_range(source: BinaryIO, target: BinaryIO, start: int, end: int) -> None:
    """Bytes [start, end) of one file to the same place in another, in the kernel where it can."""
    while start < end and hasattr(os, "copy_file_range"):
        try:
            count = os.copy_file_range(source.fileno(), target.fileno(), end - start, start, start)
        except OSError as error:  # two file systems, or one that lacks the call
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            break
        if not count:
            break
        start += count
    while start < end:
        data = os.pread(source.fileno(), min(CHUNK, end - start), start)
        if not data:
            raise OSError(errno.EIO, f"{source.name} became shorter while it was copied")
        start += os.pwrite(target.fileno(), data, start)


def copy(shard: Shard, target: BinaryIO, ranges: list[tuple[int, int]]) -> None:
    """Byte ranges of a shard to the same places in `target`: in the kernel where there is such a file, or can be."""
    if shard.data is None or shard.whole is not None:
        with open_regular(shard.whole() if shard.whole else shard.path) as source:
            for start, end in ranges:
                copy_range(source, target, start, end)
        return
    for start, end in ranges:
        target.seek(start)
        count = 0
        for piece in shard.data(start, end):
            count += target.write(piece)
        if count != end - start:
            raise OSError(errno.EIO, f"{shard.name} became shorter while it was copied")


@dataclass(frozen=True, eq=False)
class Job:
    """A shard to be written: which of its matrices are touched, and which of those are not finished yet."""

    shard: Shard
    touched: tuple[Matrix, ...]
    todo: tuple[Matrix, ...]
    copied: bool  # whether its untouched bytes are in place


def begin_shard(
    shard: Shard,
    out: Path,
    touched: Sequence[Matrix],
    parts: Mapping[str, Sequence[Matrix]],
    copied: Collection[str],
    promised: Mapping[str, str | None],
    tick: Callable[[int], None] = lambda _: None,
) -> Job:
    """What is left to do of a shard, by what a journal promises: each promise is checked on the file.

    parts: all matrices of each tensor that is cut into several. copied: shards whose untouched bytes are in place.
    promised: sha256 of the matrices that are, None where it is the source's. `tick` is called with counts of bytes.
    """
    partial = partial_of(out, shard.name)
    with disk_errors(partial):
        if shard.name not in copied or not _untouched_is_there(shard, partial, touched, parts, tick):
            return Job(shard, tuple(touched), tuple(touched), False)
        made = replace(shard, path=partial, data=None)

        def finished(matrix: Matrix) -> bool:
            """Whether the bytes that the journal promised are really there; None stands for the source's."""
            if matrix.name not in promised:
                return False
            tick(matrix.parameters * TORCH[matrix.dtype].itemsize)
            return digest(made, matrix) == (promised[matrix.name] or digest(shard, matrix))

        return Job(shard, tuple(touched), tuple(m for m in touched if not finished(m)), True)


def _untouched_is_there(
    shard: Shard,
    partial: Path,
    touched: Sequence[Matrix],
    parts: Mapping[str, Sequence[Matrix]],
    tick: Callable[[int], None],
) -> bool:
    """Whether a file has the source's header, and its bytes wherever no matrix is to be replaced."""
    if not partial.exists() or partial.stat().st_size != shard.size:
        return False
    names = {m.name for m in touched}
    tensors = {m.tensor for m in touched}
    if not equal_ranges(shard, partial, untouched(shard, tensors), tick):
        return False
    made = replace(shard, path=partial, data=None)
    for tensor in {m.tensor for m in touched if m.part is not None}:
        if sum(m.parameters for m in parts[tensor]) != math.prod(shard.by_name[tensor].shape):
            return False  # there is something between them that cannot be looked at by itself
        for matrix in parts[tensor]:
            if matrix.name not in names and digest(made, matrix) != digest(shard, matrix):
                return False
    return True


def equal_ranges(shard: Shard, file: Path, ranges: Iterable[tuple[int, int]], tick: Callable[[int], None]) -> bool:
    """Whether a file has a shard's bytes in these ranges."""
    with open_regular(file) as copy_:
        for start, end in ranges:
            copy_.seek(start)
            at = start
            for piece in pieces(shard, start, end):
                if copy_.read(len(piece)) != bytes(piece):  # memcmp; memoryviews compare number by number
                    return False
                at += len(piece)
                tick(len(piece))
            if at != end:
                return False
    return True


def intact(shard: Shard, file: Path, sha256: str | None, tick: Callable[[int], None], etag: str = "") -> bool:
    """Whether a finished file is what the journal or the outcome says: of this sha256, or for None the source's bytes.

    etag: what the Hub says of the source, whose bytes then need not be fetched again where it is their sha256.
    """
    if not file.is_file() or file.stat().st_size != shard.size:
        return False
    if sha256 is None and shard.whole is not None and re.fullmatch(r"[0-9a-f]{64}", etag):
        sha256 = etag
    if sha256 is None:
        return equal_ranges(shard, file, [(0, shard.size)], tick)
    found = hashlib.sha256()
    for piece in file_pieces(file, 0, shard.size):
        found.update(piece)
        tick(len(piece))
    return found.hexdigest() == sha256


def copy_untouched(job: Job, out: Path) -> bool:
    """Make the .partial of a shard in its full size, all but the touched tensors in place; False if it was there.

    Where matrices are to follow it is on the disk for good behind this, for the journal will say that it is there.
    """
    if job.copied:
        return False
    partial = partial_of(out, job.shard.name)
    with disk_errors(partial), partial.open("wb") as target:
        _copy_around(job.shard, job.touched, target)
        if job.touched:
            target.flush()
            os.fsync(target.fileno())
    return True


def _copy_around(shard: Shard, touched: Iterable[Matrix], target: BinaryIO) -> None:
    """Give `target` the shard's size and all bytes around the touched matrices."""
    target.truncate(shard.size)
    # A tensor of parts is copied whole: what lies between a part's elements has to be there.
    copy(shard, target, list(untouched(shard, {m.tensor for m in touched if m.part is None})))


def put(shard: Shard, matrix: Matrix, target: BinaryIO, new: torch.Tensor | None) -> str | None:
    """A new matrix (m, n) into its place in an unbuffered file, and the sha256 of its bytes.

    For None the source's bytes, and None.
    """
    start, part = _place_in_shard(shard, matrix)
    if new is None:
        if matrix.part is None:  # else they are there
            copy(shard, target, [(start, start + matrix.parameters * TORCH[matrix.dtype].itemsize)])
        return None
    assert new.dtype == TORCH[matrix.dtype], f"{matrix.name} is {new.dtype}, stored as {matrix.dtype}"
    stored = part.stored(new)
    write_slice(fetch_from(target, start), put_into(target, start), stored, part)
    return tensor_sha256(stored)


# name of a matrix, the new one or None for the source's, its record
New = tuple[str, torch.Tensor | None, dict[str, Any]]


class Made(NamedTuple):
    """A shard that is whole, on the disk for good: its sha256, None where it is the source's, and the journal's lines
    of its matrices."""

    shard: str
    sha256: str | None
    matrices: list[dict[str, Any]]


def make_shard(shard: Shard, touched: Sequence[Matrix], out: Path, results: Iterable[New]) -> Made:
    """Make the .partial of a shard from beginning to end, of what `results` give of each touched matrix, once each.

    It has a name of its own until it is on the disk for good. So two may make the same shard at the same time, as when
    a node that was given up still works: neither sees half of the other's.
    """
    partial, left = partial_of(out, shard.name), {m.name: m for m in touched}
    lines = []
    with ExitStack() as stack:
        with disk_errors(partial):  # round what is written, and not round what is computed
            file = stack.enter_context(replacing(partial))
            target = stack.enter_context(os.fdopen(os.dup(file.fileno()), "r+b", buffering=0))
            _copy_around(shard, touched, target)
        for name, new, record in results:
            with disk_errors(partial):
                lines.append({"matrix": name, "sha256": put(shard, left.pop(name), target, new), "record": record})
            del new
        assert not left, f"{min(left)} was not made"
        with disk_errors(partial):
            target.seek(0)
            changed = any(line["sha256"] is not None for line in lines)
            sha256 = hashlib.file_digest(target, "sha256").hexdigest() if changed else None
            stack.close()
    return Made(shard.name, sha256, lines)


def digest(shard: Shard, matrix: Matrix) -> str | None:
    """sha256 of a matrix's bytes in stored order; None where the shard ends before them."""
    start, part = _place_in_shard(shard, matrix)

    def fetch(at: int, count: int) -> torch.Tensor:
        return read_bytes(shard, start + at, start + at + count)

    try:
        return tensor_sha256(read_slice(fetch, TORCH[matrix.dtype], part))
    except CheckpointError:
        return None


def _place_in_shard(shard: Shard, matrix: Matrix) -> tuple[int, Slice]:
    """First byte of the tensor that holds a matrix, and the part of it that is the matrix."""
    info = shard.by_name[matrix.tensor]
    return info.start, matrix.part or whole_slice(info.shape)


def settle(partial: Path, changed: bool) -> str | None:
    """The shard on the disk for good; its sha256, or None for a plain copy, whose bytes are the source's: hashing it
    would take twice as long as copying it."""
    with disk_errors(partial), open_regular(partial) as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest() if changed else None


def partial_of(out: Path, name: str) -> Path:
    """The file in which a shard is made."""
    return unfinished(out / name)
