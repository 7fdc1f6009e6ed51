"""Write the reduced checkpoint, shard by shard.

Headers stay verbatim, untouched bytes are copied in the kernel, touched matrices are written in place.

Order of events, so that being killed at any byte loses nothing and leaves nothing that looks whole:

    laser/journal.jsonl   says which run this is; gains a line after each step below; no line of it is believed before
                          the bytes that it speaks of have been read again
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

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from laser.checkpoint.at_rest import CARD, OPTIONS_FILE, check_names, damage
from laser.checkpoint.hub import require_content, side_files
from laser.checkpoint.matrices import Matrix, list_matrices
from laser.checkpoint.reader import INDEX, OUTCOME, Checkpoint, Shard
from laser.checkpoint.safetensors import CHUNK
from laser.checkpoint.shards import (
    Job,
    Made,
    New,
    begin_shard,
    copy_untouched,
    equal_ranges,
    intact,
    partial_of,
    put,
    settle,
    untouched,
)
from laser.checkpoint.side_files import (
    folded,
    foreign_links,
    is_desktops,
    is_one_file,
    modules_of,
    own_file,
    stays_behind,
)
from laser.checkpoint.source import require_unchanged
from laser.errors import CheckpointError, OutputError
from laser.files import (
    PASSING,
    disk_errors,
    open_regular,
    read_regular,
    real,
    require_led,
    require_regular,
    sweep,
    write_atomically,
)
from laser.journal import Journal, spoiling
from laser.parts import PartOfRun, alone, journals_there, opened, read_all, require_undivided, tidy_parts
from laser.records import decode, differences, is_sealed, parse_record, save_json, sealed

RECORDS = "laser"  # directory in the output for the journal, and for `laser run`'s spectra and plan
JOURNAL = f"{RECORDS}/journal.jsonl"
BESIDE = {
    INDEX,
    OUTCOME,
    CARD,
    OPTIONS_FILE,
}  # what an output has of its own beside its shards, and takes from no source
# What the journal's lines say: a matrix is in place, a shard is whole, a shard's untouched bytes are.
JOURNAL_SHAPES: tuple[dict[str, Any], ...] = (
    {"matrix": str, "sha256": str | None, "record": dict},
    {"shard": str, "sha256": str | None},
    {"copied": str},
)
DOWNLOADS = 2  # shards of a model on the Hub being downloaded or copied beside the one in work

# names of matrices in file order -> each of them, once, in any order
MakeNew = Callable[[list[str]], Generator[New, None, None]]
# shards that are to be made, in whatever process -> each of them, once, in any order
MakeShards = Callable[[list[Job]], Generator[Made, None, None]]
# (records by matrix, sha256 by shard or None where it is the source's) -> the document for laser.json
Describe = Callable[[Mapping[str, dict[str, Any]], dict[str, str | None]], dict[str, Any]]

OnCheck = Callable[[int, int], None]  # (bytes read, bytes in all)


@dataclass
class Promises:
    """What a journal's entries say of an output, each by its name.

    matrices: sha256 of those that are in place, shards: of those that are whole; None where it is the source's
    copied: shards whose untouched bytes are in place
    records: of each matrix, the number of the entry that has its record; None where that is empty
    """

    matrices: dict[str, str | None] = field(default_factory=dict)
    shards: dict[str, str | None] = field(default_factory=dict)
    copied: set[str] = field(default_factory=set)
    records: dict[str, int | None] = field(default_factory=dict)

    def add(self, number: int, entry: Mapping[str, Any]) -> None:
        """An entry of the journal, of one of JOURNAL_SHAPES, and its number there."""
        if "matrix" in entry:
            self.matrices[entry["matrix"]] = entry["sha256"]
            self.records[entry["matrix"]] = number if entry["record"] else None
        elif "shard" in entry:
            self.shards[entry["shard"]] = entry["sha256"]
        elif "copied" in entry:
            self.copied.add(entry["copied"])


@dataclass(frozen=True)
class Records(Mapping[str, dict[str, Any]]):
    """The records of matrices, read from the journal one by one: all of them at once are as large as the spectra."""

    journal: Journal
    numbers: Mapping[str, int]

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self.journal.entries[self.numbers[name]]["record"]

    def __iter__(self) -> Iterator[str]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)


def require_apart(source: Checkpoint, out: Path) -> None:
    """Raises OutputError where `require_outside` does, or the source has links that no output can have."""
    require_outside(source, out)
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file, expected a new directory; try another -o")
    for link in foreign_links(source.path):  # they would stay behind, and the output would not load
        raise OutputError(
            f"{link} is a link to {link.readlink()}, and what a link leads to is not published; put a copy in its place"
        )


def require_outside(source: Checkpoint, out: Path) -> None:
    """Raises OutputError where an output would lie in the source, through whatever links, or the source in it."""
    target, on_top = real(out), source.on_top.stamps if source.on_top else ()
    for place in (source.path, *{path.parent for path in on_top}):
        if target == place or place in target.parents or target in place.parents:
            raise OutputError(f"{out} and the source {place} lie in one another; try a directory beside the source")


OUTCOME_MARKS = (b'"kind": "outcome"', b'"matrices": {', b'"shards": {', b'"left_out": [', b'"plan": {', b'"run": {')


def is_ours(out: Path) -> bool:
    """Whether a directory holds an output of laser, whole or not, by what its files say."""
    try:
        for journal in (out / JOURNAL, *journals_there(out / JOURNAL)):
            if journal.is_file() and not journal.is_symlink():
                with open_regular(journal) as file:
                    if file.read(1) in (b"", b"\0", b"{"):  # nobody else calls a file like that
                        return True
        data = read_regular(out / OUTCOME)
    except OSError:
        return False
    return sum(mark in data for mark in OUTCOME_MARKS) > len(OUTCOME_MARKS) // 2  # one of them may be damaged


# What laser keeps in OUT/laser, whole or half written.
_KEPT = re.compile(
    r"(journal\.jsonl(\.\d+-of-\d+)?|spectra\.safetensors|plan\.json|search\.jsonl?|source\.json|spectrum\.svg|(eval|leaderboard)(-source)?\.json)"
    r"(\.partial)?"
)


def is_kept(name: str) -> bool:
    """Whether laser calls a record in an output so; the name is its path there."""
    folder, _, record = name.partition("/")
    return folder == RECORDS and bool(_KEPT.fullmatch(record))


def _is_passing(name: str) -> bool:
    return bool(PASSING.fullmatch(name)) or is_desktops(name)


def require_ours(source: Checkpoint, out: Path) -> None:
    """Raises OutputError unless `--force` may replace all of a directory: laser made it, and what is in it."""
    if not is_ours(out):
        if all(is_desktops(p.name) for p in out.iterdir()):
            return
        raise OutputError(f"{out} exists and was not made by laser; try another -o, or remove it yourself")
    known = {s.name for s in source.shards} | {p.name for p in source.path.iterdir()}
    try:
        document = parse_record(read_regular(out / OUTCOME))
        known |= {Path(name).parts[0] for name in (*document["files"], *document["shards"])}
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        pass  # unfinished, or of an older laser: it does not say what it wrote
    known |= {*BESIDE, RECORDS, ".cache"}
    foreign = [p for p in out.iterdir() if p.name.removesuffix(".partial") not in known and not _is_passing(p.name)]
    if (out / RECORDS).is_dir():
        foreign += [p for p in (out / RECORDS).iterdir() if not (_KEPT.fullmatch(p.name) or _is_passing(p.name))]
    if foreign:
        raise OutputError(
            f"{out} holds {min(foreign).relative_to(out)}, which laser did not write, and --force would remove it; "
            "move it away first"
        )


def _require_no_link(out: Path) -> None:
    """Raises OutputError for a link in an unfinished output: what is written would go where the link leads."""
    for path in out.rglob("*"):
        with suppress(FileNotFoundError):  # of another part, which is at work
            if path.is_symlink() or (path.is_file() and path.stat().st_nlink > 1):
                raise OutputError(
                    f"{path} is a link, and going on would write to what it leads to; put a copy in its place"
                )


def prepare_output(source: Checkpoint, out: Path, *, resume: bool) -> None:
    """Make `out` ready to be written, or raise OutputError saying why it may not be."""
    require_usable(source, out, resume=resume)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)


def require_usable(source: Checkpoint, out: Path, *, resume: bool) -> None:
    """Raises OutputError where `prepare_output` would; makes and removes nothing."""
    require_apart(source, out)
    require_led(out)
    if out.is_dir() and any(p.name != RECORDS and not is_desktops(p.name) for p in out.iterdir()):
        if not is_ours(out):
            raise OutputError(f"{out} exists and was not made by laser; try another -o, or remove it yourself")
        if not resume:
            require_undivided(out / JOURNAL)  # such an output is gone on with by its parts, and not with --resume
            state = "is a finished checkpoint" if is_finished(source, out) else "is unfinished"
            raise OutputError(f"{out} exists and {state}; try --resume to go on with it, or --force to replace it")
        if not is_settled(source, out):
            _require_no_link(out)


def _settled(out: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """The outcome of a finished output. Raises OutputError where it is another run's."""
    document = read_outcome(out)
    if differences(document.get("run") or {}, run):
        raise OutputError(f"{out} holds the finished output of another run; try another -o, or --force to replace it")
    return document


def require_run(source: Checkpoint, out: Path, run: Mapping[str, Any]) -> None:
    """Raises as `write_checkpoint` where what lies in `out` is of another run; changes nothing."""
    if is_settled(source, out):
        _settled(out, run)
    else:
        Journal.require(out / JOURNAL, run, JOURNAL_SHAPES)


def write_checkpoint(
    source: Checkpoint,
    out: Path,
    touched: Sequence[Matrix],
    compute: MakeNew,
    describe: Describe,
    run: dict[str, Any],
    done: Callable[[Shard], None] = lambda _: None,
    on_check: OnCheck = lambda *_: None,
    elsewhere: MakeShards | None = None,
) -> dict[str, Any]:
    """Write `source` to `out` with the `touched` matrices replaced by what `compute` yields; returns laser.json.

    `compute` gets the names that are not finished, shard by shard, and yields them in any order, each once; a matrix
    of which it yields None stays as it is. Meanwhile the untouched bytes of the next shards are copied, and finished
    shards go to the disk for good. `run` identifies the work: with the same `run` an unfinished `out` is continued
    (call `prepare_output` first); what is there is believed once it has been read. `done` is called with each shard
    whose source is not needed any more, `on_check` with how many bytes of an earlier run were read, of how many. With
    `elsewhere`, other processes make each shard from beginning to end (`make_shard`), and this one keeps the journal.
    Raises OutputError for a full disk or an `out` of another run; what was finished by then is kept. Raises
    CheckpointError for weights that were damaged in the Hub's cache.
    """
    if is_settled(source, out):
        document = _settled(out, run)
        require_intact(source, out, document, touched, on_check)
        return _tidied(out, document)
    if source.hub is not None:
        require_content(source.hub)
    with Journal(out / JOURNAL, run, shapes=JOURNAL_SHAPES) as journal:
        if journals_there(out / JOURNAL):
            if not len(journal.entries):
                journal.remove()
            require_undivided(out / JOURNAL)
        work = _Work(source, out, touched, compute, elsewhere, journal, done, on_check)
        return _write_all(work, describe, run)


def write_part(
    source: Checkpoint,
    out: Path,
    touched: Sequence[Matrix],
    compute: MakeNew,
    describe: Describe,
    run: dict[str, Any],
    part: PartOfRun,
    done: Callable[[Shard], None] = lambda _: None,
    on_check: OnCheck = lambda *_: None,
    elsewhere: MakeShards | None = None,
) -> dict[str, Any] | list[PartOfRun]:
    """As `write_checkpoint`, of every Nth shard alone; whoever ends last adds all else, and returns laser.json.

    Others return which parts are not done.
    What the other parts have done is read again first, as before every record of a whole output.
    """
    if is_settled(source, out):
        document = _settled(out, run)
        require_intact(source, out, document, touched, on_check)
        return _tidied(out, document)
    if source.hub is not None:
        require_content(source.hub)
    mine = part.mine(_by_cost(source, touched))
    with opened(out / JOURNAL, run, JOURNAL_SHAPES, part) as (journal, was_done):
        if is_settled(source, out):  # made whole meanwhile: this journal is a new one, of nothing
            journal.remove()
        else:
            work = _Work(source, out, touched, compute, elsewhere, journal, done, on_check)
            before = len(journal.entries)
            work.find(mine)
            work.make(work.begin(mine))
            work.require_unchanged()
            if not was_done or len(journal.entries) > before:
                journal.append({"done": {}})
    with read_all(out / JOURNAL, run, JOURNAL_SHAPES, part) as (_, missing):
        if missing and not is_settled(source, out):
            return missing
    with alone(out):
        if is_settled(source, out):
            return _tidied(out, _settled(out, run))
        with read_all(out / JOURNAL, run, JOURNAL_SHAPES, part) as (journals, _):
            (out / JOURNAL).unlink(missing_ok=True)  # of a part that was killed here
            with Journal(out / JOURNAL, run, shapes=JOURNAL_SHAPES) as journal:
                for each in journals:
                    for entry in each.entries:
                        if "done" not in entry:
                            journal.append(entry)
                work = _Work(source, out, touched, compute, elsewhere, journal, done, on_check)
                document = _write_all(work, describe, run)
    return _tidied(out, document)


def _by_cost(source: Checkpoint, touched: Sequence[Matrix]) -> list[Shard]:
    """The shards, the most expensive first."""
    costs = dict.fromkeys((shard.name for shard in source.shards), 0)
    for matrix in touched:
        costs[source.tensors[matrix.tensor].shard] += matrix.cost
    return sorted(source.shards, key=lambda shard: (-costs[shard.name], -shard.size, shard.name))


def _tidied(out: Path, document: dict[str, Any]) -> dict[str, Any]:
    tidy_parts(out / JOURNAL)
    with suppress(OSError):  # somebody's lock may lie there
        (out / RECORDS).rmdir()
    return document


@dataclass
class _Work:
    """Shards of an output being written, all of them or a part's, by one journal.

    promises: what the journal says, hashes: sha256 of the shards that are whole, None where it is the source's
    """

    source: Checkpoint
    out: Path
    touched: Sequence[Matrix]
    compute: MakeNew
    elsewhere: MakeShards | None
    journal: Journal
    done: Callable[[Shard], None]
    on_check: OnCheck
    promises: Promises = field(default_factory=Promises)
    hashes: dict[str, str | None] = field(default_factory=dict)

    def find(self, shards: Sequence[Shard]) -> None:
        """See which of these are whole.

        Raises OutputError where the disk has no room for the rest.
        """
        for number, entry in enumerate(self.journal.entries):
            self.promises.add(number, entry)
        mine = {shard.name for shard in shards}
        stated = {name: sha256 for name, sha256 in self.promises.shards.items() if name in mine}
        self.hashes = _finished(self.source, self.out, stated, self.touched, self.on_check)
        for shard in shards:
            if shard.name in self.hashes:
                self.done(shard)
        others = {shard.name for shard in self.source.shards} - mine
        require_room(self.source, self.out, others | self.hashes.keys())

    def begin(self, shards: Sequence[Shard]) -> list[Job]:
        """What is left to do of those that are not."""
        left = [shard for shard in shards if shard.name not in self.hashes]
        inside: dict[str, list[Matrix]] = {}
        for matrix in self.touched:
            inside.setdefault(self.source.tensors[matrix.tensor].shard, []).append(matrix)
        parts = _parts(self.source, self.touched) if self.promises.copied else {}
        tick = _counting(sum(s.size for s in left), self.on_check)
        copied, promised = self.promises.copied, self.promises.matrices
        return [begin_shard(s, self.out, inside.get(s.name, []), parts, copied, promised, tick) for s in left]

    def make(self, jobs: list[Job]) -> None:
        """Make these shards, or let others make them.

        Two threads beside the caller's: one copies what is untouched, shard after shard, one settles what is whole.
        Only the caller's writes matrices and the journal.
        """
        if self.elsewhere is not None:
            return self._take(jobs, self.elsewhere)
        out, journal = self.out, self.journal
        copier, settler = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        copies: dict[str, Future[bool]] = {}
        waiting, ahead = list(jobs), len(jobs) if self.source.hub is None else DOWNLOADS
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
            if future is not None and future.result() and job.touched:
                journal.append({"copied": job.shard.name})

        def finish(job: Job) -> None:
            ready(job)
            changed = any(self.promises.matrices[m.name] is not None for m in job.touched)
            settling.append((job.shard, settler.submit(settle, partial_of(out, job.shard.name), changed)))

        def sweep(wait: bool) -> None:
            copy_on()
            while idle and (wait or (idle[0].shard.name in copies and copies[idle[0].shard.name].done())):
                finish(idle.pop(0))
                copy_on()
                self._collect(settling, False)
            self._collect(settling, wait)

        try:
            with closing(self.compute(list(by_name))) if by_name else nullcontext(iter(())) as results:
                for expected, _ in list(
                    by_name.values()
                ):  # as many results as names; most likely this shard's are next
                    ready(expected)
                    name, new, record = next(results)
                    job, matrix = by_name[name]
                    ready(job)
                    with disk_errors(partial_of(out, job.shard.name)):
                        with partial_of(out, job.shard.name).open("r+b", buffering=0) as target:
                            sha256 = put(job.shard, matrix, target, new)
                    del new  # before the next is waited for
                    entry = {"matrix": name, "sha256": sha256, "record": record}
                    journal.append(entry)
                    self.promises.add(len(journal.entries) - 1, entry)
                    left[job.shard.name] -= 1
                    if not left[job.shard.name]:
                        finish(job)
                    sweep(wait=False)
                next(results, None)  # what the computation does behind its last result
            sweep(wait=True)
        finally:
            copier.shutdown(cancel_futures=True)
            settler.shutdown(cancel_futures=True)

    def _take(self, jobs: list[Job], elsewhere: MakeShards) -> None:
        """Let others make each shard, and journal it once it is there for this process, too.

        Raises OutputError where it is not: where `out` is another directory on the machine that made it.
        """
        out, journal = self.out, self.journal
        shards = {job.shard.name: job.shard for job in jobs}
        with closing(elsewhere(jobs)) if jobs else nullcontext(iter(())) as results:
            for made in results:
                shard, partial = shards[made.shard], partial_of(out, made.shard)
                try:
                    with open_regular(partial) as file:  # opening asks the server, where a network keeps what it knew
                        there = os.fstat(file.fileno()).st_size == shard.size
                except FileNotFoundError:
                    there = False
                if not there:
                    raise elsewhere_is_not_here(out)
                for line in made.matrices:
                    journal.append(line)
                    self.promises.add(len(journal.entries) - 1, line)
                self.hashes[shard.name] = made.sha256
                journal.append({"shard": shard.name, "sha256": made.sha256})
                if self.source.index_bytes is not None:  # without an index the shards wait for laser.json
                    _rename(partial, out / shard.name)
                self.done(shard)

    def _collect(self, settling: list[tuple[Shard, Future[str | None]]], wait: bool) -> None:
        """Rename the shards that are on the disk for good."""
        while settling and (wait or settling[0][1].done()):
            shard, future = settling.pop(0)
            self.hashes[shard.name] = future.result()
            self.journal.append({"shard": shard.name, "sha256": self.hashes[shard.name]})
            if self.source.index_bytes is not None:  # without an index the shards wait for laser.json
                _rename(partial_of(self.out, shard.name), self.out / shard.name)
            self.done(shard)

    def require_unchanged(self) -> None:
        """Raises CheckpointError where the source is no more what it was when it was opened."""
        with spoiling(self.journal):
            # Of a model on the Hub, shards that are no more needed may have left the cache.
            gone = [s.name for s in self.source.shards if self.source.hub and not s.path.exists()]
            require_unchanged(self.source, gone)


def _write_all(work: _Work, describe: Describe, run: dict[str, Any]) -> dict[str, Any]:
    """All that is left of an output; the journal goes. Returns laser.json."""
    source, out, promises, touched = work.source, work.out, work.promises, work.touched
    work.find(source.shards)
    if source.hub is not None:
        side_files(source.hub)
    files, left_out = _copy_side_files(source, out)
    work.make(work.begin(source.shards))
    work.require_unchanged()
    records = Records(work.journal, {m.name: n for m in touched if (n := promises.records[m.name]) is not None})
    document = describe(records, {s.name: work.hashes[s.name] for s in source.shards}) | {
        "left_out": [*left_out, *source.left_out]
    }
    document = {**document, "run": document.get("run", run)}
    _require_there(out, files)
    document = sealed(document | {"files": files})
    save_json(out / OUTCOME, document)
    for shard in source.shards:  # already renamed, but where there is no index or a kill came between
        partial = partial_of(out, shard.name)
        with disk_errors(partial):
            if source.index_bytes is not None and (out / shard.name).exists():  # of a node given up, and too late
                partial.unlink(missing_ok=True)
            elif partial.exists():
                _rename(partial, out / shard.name)
        if work.elsewhere is not None:  # of a node that was lost
            sweep(partial)
    if source.index_bytes is not None:
        write_atomically(out / INDEX, source.index_bytes)
    _sync_directory(out)
    work.journal.remove()
    return document


def _require_there(out: Path, files: Mapping[str, str]) -> None:
    """Raises OutputError where a side file is not, or no more, as it was copied hours ago."""
    for problem in damage(out, sealed({"files": files})):
        raise OutputError(f"{out / problem} it was changed meanwhile; run the same command again, with --resume")


def _counting(total: int, on_check: OnCheck) -> Callable[[int], None]:
    """Calls `on_check` with the running sum of what it is called with."""
    so_far = 0

    def tick(count: int) -> None:
        nonlocal so_far
        so_far += count
        on_check(so_far, total)

    return tick


def _finished(
    source: Checkpoint,
    out: Path,
    stated: Mapping[str, str | None],
    touched: Sequence[Matrix],
    on_check: OnCheck,
) -> dict[str, str | None]:
    """sha256 by name of the shards that a journal calls finished, and that are; None where it is the source's."""
    shards = [shard for shard in source.shards if shard.name in stated]
    tick = _counting(sum(shard.size for shard in shards), on_check)

    def is_there(shard: Shard) -> bool:
        files = (out / shard.name, partial_of(out, shard.name))
        file = next((file for file in files if file.exists()), None)
        with disk_errors(out / shard.name):
            return file is not None and _is_intact(source, shard, file, stated[shard.name], touched, tick)

    return {shard.name: stated[shard.name] for shard in shards if is_there(shard)}


def _is_intact(
    source: Checkpoint,
    shard: Shard,
    file: Path,
    sha256: str | None,
    touched: Sequence[Matrix],
    tick: Callable[[int], None],
) -> bool:
    """Whether a finished file is what was promised, and of this source: its hash alone would be right of another's."""
    if not intact(shard, file, sha256, tick, _etag(source, shard)):
        return False
    if sha256 is None or source.hub is not None:  # compared whole; and the Hub's hashes tell models apart
        return True
    return equal_ranges(shard, file, untouched(shard, {m.tensor for m in touched}), lambda _: None)


def _etag(source: Checkpoint, shard: Shard) -> str:
    return source.hub.etags.get(shard.name, "") if source.hub else ""


def require_intact(
    source: Checkpoint, out: Path, document: Mapping[str, Any], touched: Sequence[Matrix], on_check: OnCheck
) -> None:
    """Raises OutputError, naming the file, where a finished output is not what its outcome says."""
    stated, tick = document["shards"], _counting(sum(shard.size for shard in source.shards), on_check)
    for shard in source.shards:
        if not _is_intact(source, shard, out / shard.name, stated.get(shard.name), touched, tick):
            raise OutputError(
                f"{out / shard.name} is not what was written there, or not of these weights: it was changed or damaged "
                "since; try --force to make the output again"
            )
    if source.index_bytes is not None and read_regular(out / INDEX) != source.index_bytes:
        raise OutputError(f"{out / INDEX} is not the source's index: it was changed or damaged since; try --force")
    for problem in damage(out, document):
        raise OutputError(f"{out}: {problem}; try --force to make the output again")


def read_outcome(out: Path) -> dict[str, Any]:
    """laser.json of a finished output. Raises OutputError for one that is not as it was written."""
    where, remedy = str(out / OUTCOME), "try --force to make the output again"
    try:
        document = parse_record(read_regular(out / OUTCOME))
    except (OSError, ValueError) as error:
        raise OutputError(f"{where} cannot be read ({error}); {remedy}") from error
    if not is_sealed(document):
        raise OutputError(f"{where} was changed or damaged since it was written; {remedy}")
    if missing := {"run", "shards", "files"} - document.keys():
        raise OutputError(f"{where} has no key {min(missing)!r}; {remedy}")
    decode(dict, document["run"], f"{where}: run", remedy)
    check_names(document, where, remedy)
    return document


def _parts(source: Checkpoint, touched: Sequence[Matrix]) -> dict[str, list[Matrix]]:
    """All matrices of each tensor of which some are touched and that is cut into several."""
    parts: dict[str, list[Matrix]] = {m.tensor: [] for m in touched if m.part is not None}
    for matrix in list_matrices(source) if parts else ():
        if matrix.tensor in parts:
            parts[matrix.tensor].append(matrix)
    return parts


def elsewhere_is_not_here(out: Path) -> OutputError:
    return OutputError(
        f"{out} is not the same directory on every node, each of which writes whole shards; try -o on a disk that they "
        "share, or --engine threads"
    )


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


def require_room(source: Checkpoint, out: Path, finished: Container[str]) -> None:
    """Raises OutputError where the disk of `out` has no room for the shards that are not `finished`, or cannot be
    written to. The sizes are known from the headers, before any work; `out` need not be there yet."""

    def there(shard: Shard) -> int:
        partial = partial_of(out, shard.name)
        return partial.stat().st_blocks * 512 if partial.exists() else 0

    needed = sum(max(s.size - there(s), 0) for s in source.shards if s.name not in finished)
    place = next(folder for folder in (real(out), *real(out).parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {out}: {place} is no directory that can be written to; try another -o")
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OutputError(
            f"not enough disk for {out}: found {free / 1e9:.2f} GB free, expected {needed / 1e9:.2f} GB; "
            "free some space or try -o on another disk"
        )


def travelling(source: Checkpoint) -> tuple[dict[Path, Path], list[str]]:
    """The source's files that may travel (side_files.py), by their place in it; and what was left out on purpose."""
    ours = BESIDE | {s.name for s in source.shards}
    read = {s.path.name for s in source.shards if s.path.name != s.name}  # pickles, written as safetensors
    read |= {"pytorch_model.bin.index.json"} if read else set()
    modules, left_out, files = modules_of(source.path), [], {}
    for path in sorted(source.path.rglob("*")):
        relative = path.relative_to(source.path)
        hidden = any(part.startswith(".") for part in relative.parts[:-1]) or relative.parts[0] == RECORDS
        if hidden or str(relative) in ours or is_desktops(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            if not (os.access(path, os.R_OK | os.X_OK) or path.name.startswith(".")):
                left_out.append(f"{relative} (a directory that cannot be read)")
            continue
        own = own_file(source.path, path)
        if own is None and str(relative) not in read:
            left_out.append(f"{relative} ({'a link' if path.is_symlink() else 'no regular file'})")
        if own is None:
            continue
        if stays_behind(source.path, relative, modules):
            left_out += [] if str(relative) in read else [str(relative)]
            continue
        files[relative] = own
    return files, left_out


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; download it again, or remove it") from error


def require_side_files(source: Checkpoint) -> None:
    """Raises CheckpointError where a file that is to travel cannot be read: it would be copied behind the scan."""
    for relative, own in travelling(source)[0].items():
        with _reading(source.path / relative):
            require_regular(own)


def _copy_side_files(source: Checkpoint, out: Path) -> tuple[dict[str, str], list[str]]:
    """Everything that may travel, byte for byte; returns their sha256 by name, and what was left out on purpose."""
    files, left_out = travelling(source)
    sums: dict[str, str] = {}
    written = {folded(name): name for name in BESIDE | {s.name for s in source.shards}}
    for relative, own in files.items():
        twin = written.setdefault(folded(relative.as_posix()), relative.as_posix())
        if twin != relative.as_posix() and is_one_file(out / relative, out / twin):
            raise OutputError(
                f"{source.path} holds {twin} and {relative}, and the disk of {out} makes no difference between the "
                "two; try a directory on another disk, or a source without one of them"
            )
        with disk_errors(out / relative):
            (out / relative).parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            # A view in another dtype has a config of its own.
            own_config = str(relative) == "config.json"
            pieces = iter([source.config_bytes]) if own_config else _pieces(own, source.path / relative)
            with (out / relative).open("wb") as target:
                for piece in pieces:
                    target.write(piece)
                    digest.update(piece)
        sums[relative.as_posix()] = digest.hexdigest()
    return sums, left_out


def _pieces(own: Path, path: Path) -> Iterator[bytes]:
    """The bytes of a source's file, called `path`; what cannot be read is an error of the source, not of the output."""
    with _reading(path), open_regular(own, follow=False) as file:
        while piece := file.read(CHUNK):
            yield piece


def _sync_directory(path: Path) -> None:
    with disk_errors(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
