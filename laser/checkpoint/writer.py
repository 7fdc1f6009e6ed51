"""Shard in, shard out: header verbatim, untouched bytes copied in the kernel, touched matrices written in place.

Order of events, so that being killed at any byte loses nothing and leaves nothing that looks whole:

    laser/journal.jsonl   says which run this is; gains a line after each step below
    side files            config, tokenizer and so on, byte for byte
    NAME.partial          pre-sized, untouched ranges copied, then each touched matrix, in the order in which they
                          are finished, with its sha256 in the journal
    NAME                  renamed once the whole shard is on the disk (fsync), and hashed if anything in it is new
    laser.json            the outcome
    the index             last: a directory with an index is a finished checkpoint
                          (a checkpoint of one file, or of Mistral's format, has none; there the renames are last)

The header bytes of a shard are reused, so names, shapes, dtypes, order, offsets and `__metadata__` cannot change.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch

from laser.checkpoint.families import Matrix
from laser.checkpoint.files import Journal, disk_errors, to_json, write_atomically
from laser.checkpoint.hub import side_files
from laser.checkpoint.reader import INDEX, OUTCOME, Checkpoint, Shard
from laser.checkpoint.shards import Job, begin, copy_untouched, partial_of, put, settle
from laser.checkpoint.side_files import modules_of, stays_behind
from laser.errors import OutputError

RECORDS = "laser"  # directory in the output for the journal, and for `laser run`'s spectra and plan
JOURNAL = f"{RECORDS}/journal.jsonl"
DOWNLOADS = 2  # shards of a model on the Hub being downloaded or copied beside the one in work

# names of matrices in file order -> (name, new matrix or None, its record), each name once, in any order
New = tuple[str, torch.Tensor | None, dict[str, Any]]
Compute = Callable[[list[str]], Generator[New, None, None]]
# (records by matrix, sha256 by shard or None where it is the source's) -> the document for laser.json
Describe = Callable[[dict[str, dict[str, Any]], dict[str, str | None]], dict[str, Any]]


def require_apart(source: Checkpoint, out: Path) -> None:
    """Raises OutputError where an output would lie in the source, through whatever links, or the source in it."""
    target = out.resolve()
    if target == source.path or source.path in target.parents or target in source.path.parents:
        raise OutputError(f"{out} and the source {source.path} lie in one another; try a directory beside the source")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file, expected a new directory; try another -o")


def prepare_output(source: Checkpoint, out: Path, *, resume: bool, force: bool) -> None:
    """Make `out` ready to be written, or raise OutputError saying why it may not be.

    `force` removes an earlier output of laser, and nothing else; anything else has to be removed by hand.
    """
    require_apart(source, out)
    ours = (out / JOURNAL).exists() or (out / OUTCOME).exists()
    if force and ours:
        with disk_errors(out):
            shutil.rmtree(out)
    elif out.is_dir() and any(p.name != RECORDS for p in out.iterdir()):
        if not ours:
            raise OutputError(f"{out} exists and was not made by laser; try another -o, or remove it yourself")
        if not resume:
            state = "is a finished checkpoint" if is_finished(source, out) else "is unfinished"
            raise OutputError(f"{out} exists and {state}; try --resume to go on with it, or --force to replace it")
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)


def write_checkpoint(
    source: Checkpoint,
    out: Path,
    touched: Sequence[Matrix],
    compute: Compute,
    describe: Describe,
    run: dict[str, Any],
    done: Callable[[Shard], None] = lambda _: None,
) -> dict[str, Any]:
    """Write `source` to `out` with the `touched` matrices replaced by what `compute` yields; returns laser.json.

    `compute` gets the names that are not finished, shard by shard, and yields them in any order, each once; a matrix
    of which it yields None stays as it is. Meanwhile the untouched bytes of the next shards are copied, and finished
    shards go to the disk for good. `run` identifies the work: with the same `run` an unfinished `out` is continued
    (call `prepare_output` first). `done` is called with each shard whose source is not needed any more.
    Raises OutputError for a full disk or an `out` of another run; what was finished by then is kept.
    """
    if is_settled(source, out):
        document = json.loads((out / OUTCOME).read_bytes())
        if document.get("run") == run:
            return document
        raise OutputError(f"{out} holds the finished output of another run; try another -o, or --force to replace it")
    with Journal(out / JOURNAL, run) as journal:
        records = {e["matrix"]: e for e in journal.entries if "matrix" in e}
        hashes = {e["shard"]: e["sha256"] for e in journal.entries if "shard" in e}
        hashes = {n: h for n, h in hashes.items() if (out / n).exists() or partial_of(out, n).exists()}
        for shard in source.shards:
            if shard.name in hashes:
                done(shard)
        _check_space(source, out, hashes)
        if source.hub is not None:
            side_files(source.hub)
        left_out = _copy_side_files(source, out)
        inside: dict[str, list[Matrix]] = {}
        for matrix in touched:
            inside.setdefault(source.tensors[matrix.tensor].shard, []).append(matrix)
        jobs = [begin(s, out, inside.get(s.name, []), journal) for s in source.shards if s.name not in hashes]
        _write_shards(source, out, jobs, compute, journal, records, hashes, done)
        ordered = {m.name: records[m.name]["record"] for m in touched if records[m.name]["record"]}
        document = describe(ordered, {s.name: hashes[s.name] for s in source.shards}) | {
            "left_out": [*left_out, *source.left_out]
        }
        document = {**document, "run": document.get("run", run)}
        write_atomically(out / OUTCOME, to_json(document))
        for shard in source.shards:  # already renamed, but where there is no index or a kill came between
            if partial_of(out, shard.name).exists():
                _rename(partial_of(out, shard.name), out / shard.name)
        if source.index_bytes is not None:
            write_atomically(out / INDEX, source.index_bytes)
        _sync_directory(out)
        journal.remove()
    return document


def _write_shards(
    source: Checkpoint,
    out: Path,
    jobs: list[Job],
    compute: Compute,
    journal: Journal,
    records: dict[str, dict[str, Any]],
    hashes: dict[str, str | None],
    done: Callable[[Shard], None],
) -> None:
    """Two helpers beside the caller's thread: one copies what is untouched, shard after shard, one settles what is
    whole. Only this thread writes matrices and the journal."""
    copier, settler = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    copies: dict[str, Future[bool]] = {}
    waiting, ahead = list(jobs), len(jobs) if source.hub is None else DOWNLOADS
    settling: list[tuple[Shard, Future[str | None]]] = []
    by_name = {m.name: (job, m) for job in jobs for m in job.todo}
    left = {job.shard.name: len(job.todo) for job in jobs}
    idle = [job for job in jobs if not job.todo]

    def copy_on(until: Job | None = None) -> None:
        """Let the copier go on: to its limit, or as far as a shard that is needed now."""
        while waiting and (len(copies) < ahead or until in waiting):
            job = waiting.pop(0)
            copies[job.shard.name] = copier.submit(copy_untouched, job, out)

    def ready(job: Job) -> None:
        """Wait until the shard's untouched bytes are in place, and tell the journal."""
        copy_on(job)
        future = copies.pop(job.shard.name, None)
        if future is not None and future.result():
            journal.append({"copied": job.shard.name})

    def finish(job: Job) -> None:
        ready(job)
        changed = any(records[m.name]["sha256"] is not None for m in job.touched)
        settling.append((job.shard, settler.submit(settle, partial_of(out, job.shard.name), changed)))

    def sweep(wait: bool) -> None:
        copy_on()
        while idle and (wait or (idle[0].shard.name in copies and copies[idle[0].shard.name].done())):
            finish(idle.pop(0))
            copy_on()
            _collect(source, out, journal, hashes, settling, False, done)
        _collect(source, out, journal, hashes, settling, wait, done)

    try:
        with closing(compute(list(by_name))) if by_name else nullcontext(iter(())) as results:
            for expected, _ in list(by_name.values()):  # as many results as names; most likely this shard's are next
                ready(expected)
                name, new, record = next(results)
                job, matrix = by_name[name]
                ready(job)
                with disk_errors(partial_of(out, job.shard.name)):
                    sha256 = put(job.shard, matrix, out, new)
                del new  # before the next is waited for
                records[name] = {"matrix": name, "sha256": sha256, "record": record}
                journal.append(records[name])
                left[job.shard.name] -= 1
                if not left[job.shard.name]:
                    finish(job)
                sweep(wait=False)
            next(results, None)  # what the computation does behind its last result
        sweep(wait=True)
    finally:
        copier.shutdown(cancel_futures=True)
        settler.shutdown(cancel_futures=True)


def _collect(
    source: Checkpoint,
    out: Path,
    journal: Journal,
    hashes: dict[str, str | None],
    settling: list[tuple[Shard, Future[str | None]]],
    wait: bool,
    done: Callable[[Shard], None],
) -> None:
    """Rename the shards that are on the disk for good."""
    while settling and (wait or settling[0][1].done()):
        shard, future = settling.pop(0)
        hashes[shard.name] = future.result()
        journal.append({"shard": shard.name, "sha256": hashes[shard.name]})
        if source.index_bytes is not None:  # without an index the shards wait for laser.json
            _rename(partial_of(out, shard.name), out / shard.name)
        done(shard)


def _rename(partial: Path, final: Path) -> None:
    with disk_errors(final):
        partial.replace(final)


def is_settled(source: Checkpoint, out: Path) -> bool:
    """Whether `out` is a finished checkpoint with nothing left to tidy up."""
    return is_finished(source, out) and not (out / JOURNAL).exists()


def is_finished(source: Checkpoint, out: Path) -> bool:
    """Whether `out` holds everything."""
    last = [s.name for s in source.shards] if source.index_bytes is None else [INDEX]
    return (out / OUTCOME).exists() and all((out / name).exists() for name in last)


def _check_space(source: Checkpoint, out: Path, hashes: Mapping[str, str | None]) -> None:
    def there(shard: Shard) -> int:
        partial = partial_of(out, shard.name)
        return partial.stat().st_blocks * 512 if partial.exists() else 0

    needed = sum(max(s.size - there(s), 0) for s in source.shards if s.name not in hashes)
    free = shutil.disk_usage(out).free
    if free < needed:
        raise OutputError(
            f"not enough disk for {out}: found {free / 1e9:.2f} GB free, expected {needed / 1e9:.2f} GB; "
            "free some space or try -o on another disk"
        )


def _copy_side_files(source: Checkpoint, out: Path) -> list[str]:
    """Everything that may travel (side_files.py), byte for byte; returns what was left out on purpose."""
    ours = {INDEX, OUTCOME, "README.md"} | {s.name for s in source.shards}
    read = {s.path.name for s in source.shards if s.path.name != s.name}  # pickles, written as safetensors
    read |= {"pytorch_model.bin.index.json"} if read else set()
    modules, left_out = modules_of(source.path), []
    for path in sorted(source.path.rglob("*")):
        relative = path.relative_to(source.path)
        hidden = any(part.startswith(".") for part in relative.parts[:-1]) or relative.parts[0] == RECORDS
        if not path.is_file() or hidden or str(relative) in ours:
            continue
        if stays_behind(source.path, relative, modules):
            left_out += [] if str(relative) in read else [str(relative)]
            continue
        with disk_errors(out / relative):
            (out / relative).parent.mkdir(parents=True, exist_ok=True)
            if str(relative) == "config.json":
                (out / relative).write_bytes(source.config_bytes)  # a view in another dtype has its own
            else:
                shutil.copyfile(path, out / relative)
    return left_out


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
