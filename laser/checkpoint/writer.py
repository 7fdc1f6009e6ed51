"""Shard in, shard out: header verbatim, untouched bytes copied in the kernel, touched matrices written in place.

Order of events, so that being killed at any byte loses nothing and leaves nothing that looks whole:

    laser/journal.jsonl   says which run this is; gains a line after each step below
    side files            config, tokenizer and so on, byte for byte
    NAME.partial          pre-sized, untouched ranges copied, then each touched matrix, with its sha256 in the journal
    NAME                  renamed once the whole shard is on the disk (fsync), and hashed if anything in it is new
    laser.json            the outcome
    the index             last: a directory with an index is a finished checkpoint
                          (a one-file checkpoint has none; there the rename of its only shard is last)

The header bytes of a shard are reused, so names, shapes, dtypes, order, offsets and `__metadata__` cannot change.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch

from laser.checkpoint.files import WEIGHTS, Journal, disk_errors, to_json, write_atomically
from laser.checkpoint.hub import arriving, side_files
from laser.checkpoint.reader import INDEX, SINGLE, Checkpoint, Shard
from laser.errors import OutputError

OUTCOME = "laser.json"
RECORDS = "laser"  # directory in the output for the journal, and for `laser run`'s spectra and plan
JOURNAL = f"{RECORDS}/journal.jsonl"
CHUNK = 8 << 20

# names in file order -> (name, new tensor, its record), one at a time
Compute = Callable[[list[str]], Iterable[tuple[str, torch.Tensor, dict[str, Any]]]]
# (records by tensor, sha256 by shard or None where it is the source's) -> the document for laser.json
Describe = Callable[[dict[str, dict[str, Any]], dict[str, str | None]], dict[str, Any]]


def prepare_output(source: Checkpoint, out: Path, *, resume: bool, force: bool) -> None:
    """Make `out` ready to be written, or raise OutputError saying why it may not be.

    `force` removes an earlier output of laser, and nothing else; anything else has to be removed by hand.
    """
    target = out.resolve()
    if target == source.path or source.path in target.parents or target in source.path.parents:
        raise OutputError(f"{out} and the source {source.path} lie in one another; try a directory beside the source")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file, expected a new directory; try another -o")
    ours = (out / JOURNAL).exists() or (out / OUTCOME).exists()
    if force and ours:
        with disk_errors(out):
            shutil.rmtree(out)
    elif out.is_dir() and any(p.name != RECORDS for p in out.iterdir()):
        if not ours:
            raise OutputError(f"{out} exists and was not made by laser; try another -o, or remove it yourself")
        if not resume:
            state = "is a finished checkpoint" if _is_finished(source, out) else "is unfinished"
            raise OutputError(f"{out} exists and {state}; try --resume to go on with it, or --force to replace it")
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)


def write_checkpoint(
    source: Checkpoint,
    out: Path,
    touched: list[str],
    compute: Compute,
    describe: Describe,
    run: dict[str, Any],
    done: Callable[[Shard], None] = lambda _: None,
) -> dict[str, Any]:
    """Write `source` to `out` with the `touched` tensors replaced by what `compute` yields; returns laser.json.

    `run` identifies the work: with the same `run` an unfinished `out` is continued (call `prepare_output` first).
    `done` is called with each shard whose source is not needed any more.
    Raises OutputError for a full disk or an `out` of another run; what was finished by then is kept.
    """
    if _is_finished(source, out) and not (out / JOURNAL).exists():
        document = json.loads((out / OUTCOME).read_bytes())
        if document.get("run") == run:
            return document
        raise OutputError(f"{out} holds the finished output of another run; try another -o, or --force to replace it")
    with Journal(out / JOURNAL, run) as journal:
        records = {e["matrix"]: e for e in journal.entries if "matrix" in e}
        hashes = {e["shard"]: e["sha256"] for e in journal.entries if "shard" in e}
        hashes = {n: h for n, h in hashes.items() if (out / n).exists() or _partial(out, n).exists()}
        for shard in source.shards:
            if shard.name in hashes:
                done(shard)
        _check_space(source, out, hashes)
        if source.hub is not None:
            side_files(source.hub)
        left_out = _copy_side_files(source, out)
        with ThreadPoolExecutor(1) as background:  # fsync and hash of one shard while the next is being made
            pending: list[tuple[Shard, Future[str | None]]] = []
            for shard in arriving(source.hub, [s for s in source.shards if s.name not in hashes]):
                names = [t.name for t in shard.tensors if t.name in touched and source.tensors[t.name] == t]
                _write_shard(shard, out, names, compute, journal, records)
                pending.append((shard, background.submit(_settle, _partial(out, shard.name), bool(names))))
                _collect(source, out, journal, hashes, pending, keep=2, done=done)
            _collect(source, out, journal, hashes, pending, keep=0, done=done)
        ordered = {name: records[name]["record"] for name in touched}
        document = describe(ordered, {s.name: hashes[s.name] for s in source.shards}) | {"left_out": left_out}
        write_atomically(out / OUTCOME, to_json({**document, "run": run}))
        for shard in source.shards:  # already renamed, but for a one-file checkpoint and a kill between two steps
            if _partial(out, shard.name).exists():
                _rename(_partial(out, shard.name), out / shard.name)
        if source.index_bytes is not None:
            write_atomically(out / INDEX, source.index_bytes)
        _sync_directory(out)
        journal.remove()
    return {**document, "run": run}


def _write_shard(
    shard: Shard,
    out: Path,
    names: list[str],
    compute: Compute,
    journal: Journal,
    records: dict[str, dict[str, Any]],
) -> None:
    partial = _partial(out, shard.name)
    where = {t.name: t for t in shard.tensors}
    copied = any(e.get("copied") == shard.name for e in journal.entries)
    with disk_errors(partial):
        if not (copied and partial.exists() and partial.stat().st_size == shard.size):
            with partial.open("wb") as target:
                target.truncate(shard.size)
                _copy(shard, target, list(_untouched(shard, set(names))))
            journal.append({"copied": shard.name})
            copied = False
        with partial.open("r+b", buffering=0) as target:
            finished = {n for n in names if copied and n in records and _holds(target, where[n], records[n]["sha256"])}
            todo = [n for n in names if n not in finished]
            for name, tensor, record in compute(todo) if todo else ():
                data = tensor.contiguous().view(torch.uint8).numpy().data.cast("B")
                target.seek(where[name].start)
                _write_all(target, data)
                records[name] = {"matrix": name, "sha256": hashlib.sha256(data).hexdigest(), "record": record}
                journal.append(records[name])


def _copy(shard: Shard, target: BinaryIO, ranges: list[tuple[int, int]]) -> None:
    """Byte ranges of a shard to the same places in `target`: in the kernel where the shard is a local file."""
    if shard.data is None:
        with shard.path.open("rb") as source:
            for start, end in ranges:
                copy_range(source, target, start, end)
        return
    for start, end in ranges:
        target.seek(start)
        count = sum(target.write(piece) for piece in shard.data(start, end))
        if count != end - start:
            raise OSError(errno.EIO, f"{shard.name} became shorter while it was copied")


def _untouched(shard: Shard, touched: set[str]) -> Iterator[tuple[int, int]]:
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


def _write_all(target: Any, data: memoryview) -> None:
    while data:
        data = data[target.write(data) :]


def _holds(file: Any, tensor: Any, sha256: str) -> bool:
    """Whether the bytes that the journal promised for a matrix are really there."""
    digest = hashlib.sha256()
    file.seek(tensor.start)
    left = tensor.end - tensor.start
    while left > 0:
        data = file.read(min(CHUNK, left))
        if not data:
            return False
        digest.update(data)
        left -= len(data)
    return digest.hexdigest() == sha256


def _settle(partial: Path, changed: bool) -> str | None:
    """The shard on the disk for good; its sha256, or None for a plain copy, whose bytes are the source's: hashing it
    would take twice as long as copying it."""
    with disk_errors(partial), partial.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest() if changed else None


def _collect(
    source: Checkpoint,
    out: Path,
    journal: Journal,
    hashes: dict[str, str | None],
    pending: list[tuple[Shard, Future[str | None]]],
    keep: int,
    done: Callable[[Shard], None],
) -> None:
    while len(pending) > keep:
        shard, future = pending.pop(0)
        hashes[shard.name] = future.result()
        journal.append({"shard": shard.name, "sha256": hashes[shard.name]})
        if source.index_bytes is not None:  # the only shard of a one-file checkpoint waits for laser.json
            _rename(_partial(out, shard.name), out / shard.name)
        done(shard)


def _rename(partial: Path, final: Path) -> None:
    with disk_errors(final):
        partial.replace(final)


def _partial(out: Path, name: str) -> Path:
    return out / f"{name}.partial"


def _is_finished(source: Checkpoint, out: Path) -> bool:
    return (out / OUTCOME).exists() and (out / (SINGLE if source.index_bytes is None else INDEX)).exists()


def _check_space(source: Checkpoint, out: Path, hashes: Mapping[str, str | None]) -> None:
    def there(shard: Shard) -> int:
        partial = _partial(out, shard.name)
        return partial.stat().st_blocks * 512 if partial.exists() else 0

    needed = sum(max(s.size - there(s), 0) for s in source.shards if s.name not in hashes)
    free = shutil.disk_usage(out).free
    if free < needed:
        raise OutputError(
            f"not enough disk for {out}: found {free / 1e9:.2f} GB free, expected {needed / 1e9:.2f} GB; "
            "free some space or try -o on another disk"
        )


def _copy_side_files(source: Checkpoint, out: Path) -> list[str]:
    """Everything that is not weights, byte for byte; returns what was left out on purpose."""
    ours = {INDEX, OUTCOME, "README.md"} | {s.name for s in source.shards}
    left_out = []
    for path in sorted(source.path.rglob("*")):
        relative = path.relative_to(source.path)
        hidden = any(part.startswith(".") for part in relative.parts[:-1]) or relative.parts[0] == RECORDS
        if not path.is_file() or hidden or str(relative) in ours:
            continue
        if path.name.endswith(WEIGHTS):  # the same weights in another format would be unreduced copies
            left_out.append(str(relative))
            continue
        with disk_errors(out / relative):
            (out / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / relative)
    return left_out


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
