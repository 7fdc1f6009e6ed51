"""Bytes of one shard, by range: copied in the kernel, replaced in place, checked against a promise."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from laser.checkpoint.files import Journal, disk_errors
from laser.checkpoint.reader import Shard, TensorInfo

CHUNK = 8 << 20


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


def write_all(target: Any, data: memoryview) -> None:
    """All of `data` at the position of an unbuffered file, which may take it in pieces."""
    while data:
        data = data[target.write(data) :]


def digest(file: Any, tensor: TensorInfo) -> str | None:
    """sha256 of a tensor's bytes in an unbuffered file, None where the file ends before them."""
    found = hashlib.sha256()
    file.seek(tensor.start)
    left = tensor.end - tensor.start
    while left > 0:
        data = file.read(min(CHUNK, left))
        if not data:
            return None
        found.update(data)
        left -= len(data)
    return found.hexdigest()


def holds(file: Any, tensor: TensorInfo, sha256: str | None) -> bool:
    """Whether the bytes that the journal promised for a tensor are really there."""
    return sha256 is not None and digest(file, tensor) == sha256


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
    with disk_errors(partial), partial.open("rb", buffering=0) as file, shard.path.open("rb", buffering=0) as original:

        def finished(tensor: TensorInfo) -> bool:
            if tensor.name not in promised:
                return False
            sha256 = promised[tensor.name]
            return holds(file, tensor, digest(original, tensor) if sha256 is None else sha256)

        return Job(shard, tuple(touched), tuple(t for t in touched if not finished(t)), True)


def copy_untouched(job: Job, out: Path) -> bool:
    """Make the .partial of a shard in its full size, all but the touched tensors in place; False if it was there."""
    if job.copied:
        return False
    partial = partial_of(out, job.shard.name)
    with disk_errors(partial), job.shard.path.open("rb") as source, partial.open("wb") as target:
        target.truncate(job.shard.size)
        for start, end in untouched(job.shard, {t.name for t in job.touched}):
            copy_range(source, target, start, end)
    return True


def put(shard: Shard, tensor: TensorInfo, out: Path, new: torch.Tensor | NDArray[np.uint8] | None) -> str | None:
    """The new bytes of a tensor into its place, and their sha256; for None the source's bytes, and None."""
    with partial_of(out, shard.name).open("r+b", buffering=0) as target:
        if new is None:
            with shard.path.open("rb") as source:
                copy_range(source, target, tensor.start, tensor.end)
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
