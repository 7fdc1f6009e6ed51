"""Bytes of one shard, by range: copied in the kernel, replaced in place, checked against a promise."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from laser.checkpoint.files import Journal, disk_errors
from laser.checkpoint.headers import CHUNK, Shard, TensorInfo, pieces


def untouched(shard: Shard, touched: set[str]) -> Iterator[tuple[int, int]]:
    """Byte ranges to copy, merged: everything but the touched tensors."""
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
    """Byte ranges of a shard to the same places in `target`: in the kernel where the shard is a local file."""
    if shard.data is None:
        with shard.path.open("rb") as source:
            for start, end in ranges:
                copy_range(source, target, start, end)
        return
    for start, end in ranges:
        target.seek(start)
        count = 0
        for piece in shard.data(start, end):
            write_all(target, piece)
            count += len(piece)
        if count != end - start:
            raise OSError(errno.EIO, f"{shard.name} became shorter while it was copied")


def write_all(target: Any, data: memoryview) -> None:
    """All of `data` at the position of an unbuffered file, which may take it in pieces."""
    while data:
        data = data[target.write(data) :]


def digest(shard: Shard, tensor: TensorInfo) -> str:
    """sha256 of a tensor's bytes, or of what there is of them."""
    found = hashlib.sha256()
    for piece in pieces(shard, tensor.start, tensor.end):
        found.update(piece)
    return found.hexdigest()


@dataclass(frozen=True)
class Job:
    """A shard to be written: which of its tensors are touched, and which of those are not finished yet."""

    shard: Shard
    touched: tuple[TensorInfo, ...]
    todo: tuple[TensorInfo, ...]
    copied: bool  # whether its untouched bytes are in place


def begin(shard: Shard, out: Path, touched: list[TensorInfo], journal: Journal) -> Job:
    """What is left to do of a shard, by the journal, every promise of which is checked on the file."""
    partial = partial_of(out, shard.name)
    copied = any(e.get("copied") == shard.name for e in journal.entries)
    copied = copied and partial.exists() and partial.stat().st_size == shard.size
    if not copied:
        return Job(shard, tuple(touched), tuple(touched), False)
    promised = {e["matrix"]: e["sha256"] for e in journal.entries if "matrix" in e}
    made = replace(shard, path=partial, data=None)

    def finished(tensor: TensorInfo) -> bool:
        """Whether the bytes that the journal promised are really there; None stands for the source's."""
        if tensor.name not in promised:
            return False
        return digest(made, tensor) == (promised[tensor.name] or digest(shard, tensor))

    with disk_errors(partial):
        return Job(shard, tuple(touched), tuple(t for t in touched if not finished(t)), True)


def copy_untouched(job: Job, out: Path) -> bool:
    """Make the .partial of a shard in its full size, all but the touched tensors in place; False if it was there."""
    if job.copied:
        return False
    partial = partial_of(out, job.shard.name)
    with disk_errors(partial), partial.open("wb") as target:
        target.truncate(job.shard.size)
        copy(job.shard, target, list(untouched(job.shard, {t.name for t in job.touched})))
    return True


def put(shard: Shard, tensor: TensorInfo, out: Path, new: torch.Tensor | NDArray[np.uint8] | None) -> str | None:
    """The new bytes of a tensor into its place, and their sha256; for None the source's bytes, and None."""
    with partial_of(out, shard.name).open("r+b", buffering=0) as target:
        if new is None:
            copy(shard, target, [(tensor.start, tensor.end)])
            return None
        raw = new if isinstance(new, np.ndarray) else new.contiguous().view(torch.uint8).numpy()
        data = raw.data.cast("B")
        target.seek(tensor.start)
        write_all(target, data)
        return hashlib.sha256(data).hexdigest()


def settle(partial: Path, changed: bool) -> str | None:
    """The shard on the disk for good; its sha256, or None for a plain copy, whose bytes are the source's: hashing it
    would take twice as long as copying it."""
    with disk_errors(partial), partial.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest() if changed else None


def partial_of(out: Path, name: str) -> Path:
    """The file in which a shard is made."""
    return out / f"{name}.partial"
