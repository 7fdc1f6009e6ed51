"""rebuild: the tuned checkpoint again, from its base and what `laser unmerge` wrote, every shard byte for byte.

A shard is put together tensor after tensor and hashed on its way to the disk. The new directory gets its name when the
sha256 of every shard and of every file beside them is the one that was recorded, and not otherwise.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from laser.checkpoint.at_rest import wrong_sums
from laser.checkpoint.convert import require_new, write_directory
from laser.checkpoint.matrices import Matrix, list_matrices
from laser.checkpoint.reader import INDEX, Checkpoint
from laser.checkpoint.safetensors import (
    TORCH,
    Shard,
    TensorInfo,
    filled,
    parse_header,
    parse_json,
    read_bytes,
    read_header,
    tensor_in,
)
from laser.checkpoint.side_files import is_weights
from laser.checkpoint.slices import tensor_sha256
from laser.checkpoint.source import require_unchanged
from laser.differences.formats import STORED_FLOATS
from laser.differences.packing import unpack, unpack_some
from laser.differences.places import KEPT_FACTORS, PEFT, names_at, of_expert, rows_in_parameter, stems
from laser.differences.solver import Adapter
from laser.differences.unmerge import (
    MODEL,
    NOWHERE,
    RECORD,
    REMAINDER,
    SIDE_FILES,
    AdapterRecord,
    How,
    MatrixEntry,
    base_file,
    simple,
    unpacked_header,
)
from laser.errors import CheckpointError, RecordError, first_line
from laser.files import read_regular

AGAIN = "make it again: `laser unmerge BASE TUNED -o ADAPTER`"


@dataclass(frozen=True)
class MadeShard:
    """What was rebuilt."""

    shards: int
    tensors: int
    size: int


class Adapted:
    """An adapter's folder, as `laser unmerge` writes it, and its base. Raises RecordError where it is not whole, or of
    another base. One whose shards are laid out otherwise, or that lies in pickles, is as good: matrices tell."""

    def __init__(self, base: Checkpoint, folder: Path) -> None:
        self.base, self.folder = base, folder
        self.held: dict[str, Shard] = {}  # the adapter's own files
        self.record = load_record(folder / RECORD)
        other = self._unlike()
        if odd := sorted(self.record.parts.keys() - {MODEL, REMAINDER}):
            raise RecordError(f"{folder / RECORD} names a part {odd[0]!r}, expected {MODEL} and {REMAINDER}; {AGAIN}")
        if wrong := wrong_sums(folder, self.record.parts):
            raise RecordError(f"{folder / wrong[0]}; {AGAIN}")
        self.entries = {entry.name: entry for entry in self.record.entries}
        self.stems = stems(e.place for e in self.record.entries if e.how is How.ADAPTER and e.place)
        self.theirs = {m.name: m for m in list_matrices(base)}
        self.files = self._files()
        self.tuned = self._headers()
        self.factor = lru_cache(KEPT_FACTORS)(lambda name: self._tensor(MODEL, name))
        self.parts: dict[str, list[Matrix]] = {}
        for m in list_matrices(self.tuned):
            if m.name not in self.entries:
                raise RecordError(f"{folder / RECORD}: nothing says how {m.name} is made; {AGAIN}")
            self.parts.setdefault(m.tensor, []).append(m)
        if other is not None and not self._fits():
            raise other

    def _unlike(self) -> RecordError | None:
        """What tells the base from the one recorded, where its matrices may be those all the same. Else it is raised:
        with the same names and shapes in the same places it is only the weights that can be others."""
        try:
            self.record.base.require(self.base, "adapter")
        except RecordError as error:
            names = {m.name for m in list_matrices(self.base)}
            if self.base.identity == self.record.base.identity or any(
                entry.of is not None and entry.of not in names for entry in self.record.entries
            ):
                raise
            return error
        return None

    def _fits(self) -> bool:
        """Whether matrices can be made of the base by their sha256: an adapted one, the first and the last.

        The others are proven as they are made, and every shard in the end."""
        made = {m: self.entries[m.name] for parts in self.parts.values() for m in parts}
        of = {m: e for m, e in made.items() if e.of is not None and e.how is not How.SAVED and m.dtype in TORCH}
        if not of or any(self._of(entry).shape != m.shape for m, entry in of.items()):
            return False
        changed = [m for m, entry in of.items() if entry.how is not How.SAME]
        try:
            for m in (*changed[:1], *list(of)[:1], *list(of)[-1:]):
                self.matrix(m)
        except RecordError:
            return False
        return True

    def _files(self) -> dict[str, bytes]:
        """What lies beside the tuned weights: from the adapter's folder, or the base's where that is the same."""
        found = {}
        for name, expected in self.record.files.items():
            path = self.folder / SIDE_FILES / name
            try:
                data = read_regular(path, follow=False) if path.exists() else base_file(self.base, name)
            except OSError as error:
                raise RecordError(f"cannot read {path}: {error.strerror}; {AGAIN}") from error
            if data is None or hashlib.sha256(data).hexdigest() != expected:
                what = "is missing" if data is None else "is another one"
                raise RecordError(f"{name} of the tuned checkpoint {what}: expected sha256 {expected[:12]}; {AGAIN}")
            found[name] = data
        return found

    def _headers(self) -> Checkpoint:
        """The tuned checkpoint as its headers have it; its shards give their bytes when they are asked."""
        config = self.files.get("config.json")
        if config is None:
            raise RecordError(f"{self.folder / RECORD} names no config.json; {AGAIN}")
        shards: list[Shard] = []
        for stated in self.record.shards:
            header = unpacked_header(self._tensor(REMAINDER, f"header/{stated.name}"))
            shards.append(filled(parse_header(stated.name, self.folder, stated.size, header[8:]), self.tensor))
            if shards[-1].header != header:
                raise RecordError(f"{self.folder / REMAINDER}: the header of {stated.name} is damaged; {AGAIN}")
        tensors = {info.name: info for shard in shards for info in shard.tensors}
        document = parse_json(config, self.folder / SIDE_FILES / "config.json")
        return Checkpoint(self.folder, document, config, self.files.get(INDEX), tuple(shards), tensors)

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        """A tensor of the tuned checkpoint, put together from its matrices, or its bytes where torch has no dtype."""
        parts = self.parts[info.name]
        if parts[0].part is None:
            entry = self.entries[parts[0].name]
            if info.dtype not in TORCH and entry.how is How.WHOLE:
                packed = self._tensor(REMAINDER, f"whole/{entry.name}")
                return unpack(packed, (info.end - info.start,), torch.uint8)
            if info.dtype not in TORCH:
                there = self.base.tensors[self._of(entry).tensor]
                return read_bytes(self.base.shard_of(there.name), there.start, there.end)
            return self.matrix(parts[0])
        whole = torch.empty(info.shape, dtype=TORCH[info.dtype])
        for m in parts:
            assert m.part is not None, "a tensor is one matrix or several parts"
            m.part.put(whole, self.matrix(m))
        return whole

    def _of(self, entry: MatrixEntry) -> Matrix:
        if entry.of not in self.theirs:
            raise RecordError(
                f"{self.folder / RECORD}: {entry.name} is made of {entry.of}, which the base has not; {AGAIN}"
            )
        return self.theirs[entry.of or ""]

    def matrix(self, m: Matrix) -> torch.Tensor:
        """A matrix, or tensor of any shape, in its storage dtype. Raises RecordError where its bits are others."""
        entry, dtype = self.entries[m.name], TORCH[m.dtype]
        made = self._made(entry, m, dtype)
        if made is None or made.dtype != dtype or tuple(made.shape) != m.shape or tensor_sha256(made) != entry.sha256:
            raise RecordError(f"{m.name} cannot be rebuilt to the bit from {self.base.name}; {AGAIN}")
        return made

    def _made(self, entry: MatrixEntry, m: Matrix, dtype: torch.dtype) -> torch.Tensor | None:
        if entry.how is How.SAVED:
            return self._tensor(MODEL, PEFT + (entry.saved_as or m.tensor))
        there = None if entry.of is None else self._of(entry)
        if entry.how is How.SAME and there is not None:
            # As unmerge compared them: values of formats whose rounding is known, and bytes of all others.
            read = self.base.read if m.dtype in STORED_FLOATS else self.base.raw
            return read(there.tensor, there.part)
        W = None if there is None else self.base.read(there.tensor, there.part)
        if entry.how is How.WHOLE:
            return unpack(self._tensor(REMAINDER, f"whole/{m.name}"), m.shape, dtype, W)
        assert W is not None, "the record says what it is of"
        if entry.how is not How.ADAPTER:
            return simple(entry.how, W, dtype, entry.scale)
        made = entry.merged_by.merge(W, self._adapter(entry, m).rows(0, len(W)), dtype)
        return unpack_some(self._tensor(REMAINDER, f"wrong/{m.name}"), made) if entry.missed else made

    def _adapter(self, entry: MatrixEntry, m: Matrix) -> Adapter:
        place = entry.place
        if place is None:
            A, B = (self._tensor(REMAINDER, name) for name in names_at(f"adapter/{m.name}", NOWHERE))
            return Adapter(B, A)
        names = names_at(self.stems[place.weight], place)
        A, B = of_expert(self.factor(names[0]), self.factor(names[1]), place)
        rows = rows_in_parameter(m, place)
        if len(rows) != m.shape[0] or len(B) != place.rows or int(rows.max()) >= place.rows:
            raise RecordError(f"{self.folder / RECORD}: {entry.name} has no place in {names[1]}; {AGAIN}")
        return Adapter(B[rows], A)

    def _tensor(self, file: str, name: str) -> torch.Tensor:
        path = self.folder / file
        try:
            if file not in self.held:
                self.held[file] = read_header(path)
            return tensor_in(self.held[file], name)
        except (OSError, CheckpointError) as error:
            raise RecordError(f"{path}: {name}: {first_line(error)}; {AGAIN}") from error


def rebuild(
    base: Checkpoint,
    folder: Path,
    out: Path,
    *,
    force: bool = False,
    tick: Callable[[TensorInfo], object] = lambda _: None,
) -> MadeShard:
    """Write the tuned checkpoint into the new directory `out`, byte for byte.

    One tensor is in memory at a time. force: see `write_directory`. Raises RecordError where the base is another, the
    adapter was changed, or a shard's sha256 is not the one that was recorded; OutputError where `out` is in the way or
    cannot be written.
    """
    require_new(out, force)
    adapted = Adapted(base, folder)
    digests = {stated.name: hashlib.sha256() for stated in adapted.record.shards}

    def hashed(shard: Shard) -> Shard:
        digests[shard.name].update(shard.header)
        give = shard.data
        assert give is not None, "it is made"

        def data(start: int, end: int) -> Iterator[memoryview]:
            for piece in give(start, end):
                digests[shard.name].update(piece)
                yield piece

        return replace(shard, data=data)

    def check() -> None:
        for stated in adapted.record.shards:
            if (found := digests[stated.name].hexdigest()) != stated.sha256:
                raise RecordError(
                    f"{stated.name}: rebuilt with sha256 {found[:12]}, expected {stated.sha256[:12]}; {AGAIN}"
                )
        require_unchanged(base)

    tuned = replace(adapted.tuned, shards=tuple(map(hashed, adapted.tuned.shards)))
    others = {name: data for name, data in adapted.files.items() if name not in ("config.json", INDEX)}
    write_directory(tuned, out, others, force=force, tick=tick, check=check)
    return MadeShard(len(tuned.shards), len(tuned.tensors), sum(shard.size for shard in tuned.shards))


def load_record(path: Path) -> AdapterRecord:
    """What an adapter's laser.json says. Raises RecordError for one that is damaged, or whose names could lead out of
    the folder that is written, or to one file twice."""
    record = AdapterRecord.load(path)
    for name in record.files:
        if not is_file_within(name):
            raise RecordError(f"{path} names a file {name!r}, expected one of a folder; {AGAIN}")
    taken = set(record.files)
    for shard in record.shards:
        if not is_shard_name(shard.name):
            raise RecordError(f"{path} names a shard {shard.name!r}, expected a plain name in .safetensors; {AGAIN}")
        if shard.name in taken:
            raise RecordError(f"{path} names {shard.name} twice, expected one file of each name; {AGAIN}")
        taken.add(shard.name)
    return record


def is_shard_name(name: str) -> bool:
    """Whether this is the name of a file of weights in the folder itself."""
    return re.fullmatch(r"[^/\\\0-\x1f\x7f\ud800-\udfff]+\.safetensors", name) is not None


def is_file_within(name: str) -> bool:
    """Whether a file of this name lies in the folder that it is named in."""
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts and path.as_posix() == name and bool(path.name)


@dataclass(frozen=True)
class RebuiltVerification:
    """What of a rebuilt folder was compared; `problems` is empty where every byte is as recorded."""

    shards: int
    files: int
    problems: tuple[str, ...]


def verify_rebuilt(folder: Path, out: Path) -> RebuiltVerification:
    """Whether `out` holds the tuned checkpoint that the adapter in `folder` was made from, by sha256, and no more.

    Neither the base nor the adapter's own files are read. Raises RecordError where the record cannot be.
    """
    record = load_record(folder / RECORD)
    shards = {shard.name: shard.sha256 for shard in record.shards}
    wrong = wrong_sums(out, {**shards, **record.files})
    problems = [f"{out / each}; make it again with laser rebuild" for each in wrong]
    there = (
        {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()} if out.is_dir() else set()
    )
    beside = sorted(name for name in there - shards.keys() - record.files.keys() if is_weights(Path(name).name))
    problems += [f"{out / name}: it is not of the tuned checkpoint; remove it" for name in beside]
    return RebuiltVerification(len(shards), len(record.files), tuple(problems))
