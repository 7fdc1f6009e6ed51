"""unmerge: a fine-tune as its base and an adapter, to the last bit.

Every matrix of the tuned checkpoint is written down in the shortest way that gives its stored bits again. It is the
base's, or that cast or scaled. It is the base's with an update of low rank and the few entries that the formula misses.
Or it is kept whole. Each is put together again from what is about to be written, and compared, before it counts.

ADAPTER/ holds

    adapter_config.json, adapter_model.safetensors   the adapter as PEFT has it, scaled by 1 (places.py); and norms,
                                                     embeddings and heads that were trained whole (modules_to_save)
    remainder.safetensors                            entries that the formula misses, matrices kept whole, adapters for
                                                     which PEFT has no place, and the headers of the shards
    tuned/                                           files beside the tuned weights: small ones, and those that the
                                                     base has not, or otherwise
    laser.json                                       both identities, and per matrix how it is made; see AdapterRecord
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save

from laser.checkpoint.at_rest import CARD, OPTIONS_FILE, wrong_sums
from laser.checkpoint.convert import require_new
from laser.checkpoint.matrices import Matrix, list_matrices
from laser.checkpoint.reader import OUTCOME, Checkpoint
from laser.checkpoint.safetensors import MAX_HEADER, TORCH, join, pieces, read_bytes, read_header, sha256_of
from laser.checkpoint.side_files import foreign_links, own_file, stays_behind
from laser.checkpoint.slices import bytes_of, tensor_sha256
from laser.checkpoint.source import Source, require_unchanged
from laser.checkpoint.swap import restore_earlier, take_place
from laser.checkpoint.writer import require_side_files, travelling
from laser.choices import ROUNDS
from laser.differences.base import Base, Delta, Pair
from laser.differences.difference import AGREE, Change, Verdict, looks_quantised
from laser.differences.formats import STORED_FLOATS, format_of, same_bits
from laser.differences.formulas import Formula
from laser.differences.in_memory import WEIGHT, Memory, memory_of
from laser.differences.overview import is_base
from laser.differences.packing import pack, pack_some, unpack, unpack_some
from laser.differences.places import (
    PEFT,
    PEFT_FORMULAS,
    ModulePlace,
    module_places,
    names_at,
    of_experts,
    rows_in_parameter,
    stems,
    units,
)
from laser.differences.recover import USUAL, is_believed, recover, vote
from laser.differences.solver import Adapter, Solution, wrong_bits
from laser.engine.crew import Crew, most_expensive_first
from laser.engine.workers import visit_all
from laser.errors import CheckpointError, OutputError, RecordError, UsageError
from laser.files import (
    PASSING,
    claimed,
    disk_errors,
    read_regular,
    require_no_mount,
    require_only,
    tidy_up,
    unfinished,
    write_atomically,
)
from laser.journal import Journal
from laser.records import SPARSE, Misfit, Record, parse_record, plain, reader
from laser.spectral.devices import Device

CONFIG, MODEL, REMAINDER, RECORD, SIDE_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "remainder.safetensors",
    "laser.json",
    "tuned",
)
# What is trained whole beside an adapter, by PEFT's modules_to_save.
SAVED_WHOLE = ("norm", "embedding", "head")
PARTIAL_JOURNAL, EARLIER_ADAPTER = "journal.jsonl", "old"  # in OUT.partial
# What PEFT takes for an adapter in which no module has factors; an empty list it refuses.
DUMMY_TARGET = "dummy-target-modules"
SMALL_SIDE_FILE = 10_000_000  # bytes: of a tokenizer, under what an adapter has
_PART_NAMES = re.compile(r"\d{6}\.(?:adapter|expert|remainder)\.safetensors")
_OWN_NAMES = re.compile(
    rf"{_PART_NAMES.pattern}|headers\.remainder\.safetensors|{re.escape(PARTIAL_JOURNAL)}|new|old"
    rf"|delta\.safetensors(?:\.partial)?|{PASSING.pattern}"
)
FEW = 4  # entries
SCALES = (8, 16, 20, 24, 32, 48, 64, 128, 256)  # values of lora_alpha that people use


class How(StrEnum):
    """How a matrix of the tuned checkpoint is made."""

    SAME = "same"  # the base's
    CAST = "cast"  # the base's in the other format
    SCALED = "scaled"
    ADAPTER = "adapter"
    SAVED = "saved"  # whole, in adapter_model.safetensors
    WHOLE = "whole"  # packed, in remainder.safetensors


@dataclass(frozen=True)
class MatrixEntry:
    """One matrix, or tensor of any shape, of the tuned checkpoint.

    of: the base's matrix; sha256: of its bits, row-major
    rank, formula, rounds, missed: of an adapter: how many of its `entries` the formula misses
    scale: of How.SCALED, or the formula's; cast: whether the base was cast before it
    place: of its adapter in adapter_model.safetensors, or None: it is in the remainder
    saved_as: of How.SAVED, its parameter in memory, where that has another name
    """

    name: str
    how: How
    kind: Verdict
    sha256: str
    entries: int
    of: str | None = field(default=None, metadata=SPARSE)
    rank: int | None = field(default=None, metadata=SPARSE)
    formula: str | None = field(default=None, metadata=SPARSE)
    scale: float | None = field(default=None, metadata=SPARSE)
    rounds: int | None = field(default=None, metadata=SPARSE)
    missed: int | None = field(default=None, metadata=SPARSE)
    cast: bool = field(default=False, metadata=SPARSE)
    place: ModulePlace | None = field(default=None, metadata=SPARSE)
    saved_as: str | None = field(default=None, metadata=SPARSE)

    @property
    def merged_by(self) -> Formula:
        return Formula(self.formula or "", self.scale or 1.0, self.cast)

    def wrong(self) -> str | None:
        if self.how is How.ADAPTER and (not self.rank or self.formula is None or self.of is None):
            return "an adapter without rank, formula or base"
        if self.how in (How.SAME, How.CAST, How.SCALED) and self.of is None:
            return f"{self.how} without what it is of"
        place = self.place
        if place is not None and place.experts is not None and not 0 <= (place.expert or 0) < place.experts:
            return f"expert {place.expert} of {place.experts}"
        return "scaled without a scale" if self.how is How.SCALED and self.scale is None else None


@dataclass(frozen=True)
class ShardEntry:
    """A shard of the tuned checkpoint."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class AdapterRecord(Record, kind="adapter", version=1, made_by="laser unmerge BASE TUNED -o ADAPTER"):
    """What ADAPTER/laser.json says. files: those beside the tuned weights, by sha256; parts: those of ADAPTER."""

    base: Source
    tuned: Source
    entries: tuple[MatrixEntry, ...]
    shards: tuple[ShardEntry, ...]
    files: Mapping[str, str]
    parts: Mapping[str, str]

    def wrong(self) -> str | None:
        names = [entry.name for entry in self.entries]
        return "a matrix is in it twice" if len(set(names)) < len(names) else None


# --- one matrix, or those that were adapted together ------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """What is written of some matrices: their entries, tensors for the adapter's file and for the remainder, and A and
    B of an expert, which are put together with those of the others."""

    entries: tuple[MatrixEntry, ...]
    adapter: Mapping[str, torch.Tensor] = field(default_factory=dict)
    remainder: Mapping[str, torch.Tensor] = field(default_factory=dict)
    expert: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __add__(self, other: Piece) -> Piece:
        return Piece(
            self.entries + other.entries,
            {**self.adapter, **other.adapter},
            {**self.remainder, **other.remainder},
            {**self.expert, **other.expert},
        )


class AdapterPart(NamedTuple):
    """A matrix to be solved: base W and tuned q (m, n), and its entry so far."""

    matrix: Matrix
    entry: MatrixEntry
    W: torch.Tensor
    q: torch.Tensor


@dataclass(frozen=True)
class Unmerge:
    """A visit that writes a matrix down, and those that were adapted together with it.

    units: by the name of their first matrix; places: where PEFT has what of them is adapted, see `peft_places`
    saved: what PEFT may keep whole, see `saved_places`
    voted: the rank of most, perhaps `proven` by spectra; formulas: to try first, by the group of a place
    dtype: of the adapter
    """

    base: Base
    changes: Mapping[str, Change]
    units: Mapping[str, tuple[Matrix, ...]]
    places: Mapping[str, ModulePlace]
    saved: Mapping[str, SavedPlace]
    voted: int | None = None
    proven: bool = False
    formulas: Mapping[str, tuple[Formula, ...]] = field(default_factory=dict)
    rounds: int = ROUNDS
    dtype: torch.dtype = torch.float32

    def __call__(self, matrix: Matrix, q: torch.Tensor, device: Device) -> Piece:
        """q: the tuned values, of any shape, as they are stored."""
        done, todo = Piece(()), []
        for m in self.units.get(matrix.name, (matrix,)):
            x = q if m is matrix or m.name == matrix.name else self.base.tuned.read(m.tensor, m.part)
            found = self.without_solving(m, x)
            if isinstance(found, AdapterPart):
                todo.append(found)
            else:
                done += found
        return self.as_modules(done + self.by_adapter(todo, device) if todo else done)

    def as_modules(self, piece: Piece) -> Piece:
        """PEFT loads all that a module has where one of it was trained whole: its bias too, be it the base's."""
        if not any(entry.how is How.SAVED for entry in piece.entries):
            return piece
        done = Piece(())
        for entry in piece.entries:
            done += self.saved_whole(entry, self.base.tuned.read(entry.name))
        return done

    def saved_whole(self, entry: MatrixEntry, q: torch.Tensor) -> Piece:
        place = self.saved[entry.name]
        entry = replace(entry, how=How.SAVED, saved_as=place.parameter if place.parameter != entry.name else None)
        names = (place.parameter, *place.tied)
        return Piece((entry,), {PEFT + name: q.contiguous().clone() for name in names})

    def without_solving(self, matrix: Matrix, q: torch.Tensor) -> Piece | AdapterPart:
        """The matrix written down, or what has to be solved first."""
        change, W = self.changes[matrix.name], self.base.read(matrix)
        there = self.base.places.get(matrix.name)
        entry = MatrixEntry(matrix.name, How.WHOLE, change.kind, tensor_sha256(q), q.numel(), there and there.name)
        if W is not None and W.shape == q.shape:
            # PEFT scales no module.
            for how in (How.SAME, How.CAST, *(() if self.is_saved(matrix) else (How.SCALED,))):
                made = simple(how, W, q.dtype, change.scale)
                if made is not None and same_bits(made, q).all():
                    return Piece((replace(entry, how=how, scale=change.scale if how is How.SCALED else None),))
            if change.kind in (Verdict.LOW_RANK, Verdict.FAINT):
                return AdapterPart(matrix, entry, W, q)
        return self.whole(matrix, entry, W, q)

    def whole(self, matrix: Matrix, entry: MatrixEntry, W: torch.Tensor | None, q: torch.Tensor) -> Piece:
        if W is not None and self.is_saved(matrix) and (W.shape == q.shape or is_resized(matrix, tuple(W.shape))):
            return self.saved_whole(entry, q)
        known = W if W is not None and (W.shape, W.dtype) == (q.shape, q.dtype) else None
        entry = replace(entry, of=entry.of if known is not None else None)
        return Piece((entry,), {}, {f"whole/{matrix.name}": pack(q, known)})

    def is_saved(self, matrix: Matrix) -> bool:
        return matrix.name in self.saved and not self.saved[matrix.name].only_beside

    def by_adapter(self, parts: Sequence[AdapterPart], device: Device) -> Piece:
        """Matrices as base and adapter, together where one adapter of their stacked rows explains them, else each by
        its own, or whole where that is shorter."""
        found = self.together(parts, device) if len(parts) > 1 else None
        found = found or [self.recovered(part, device) for part in parts]
        done = Piece(())
        solved: list[tuple[AdapterPart, Solution]] = []
        for part, solution in zip(parts, found, strict=True):
            if solution is None or self.longer_than_whole(part, solution):
                done += self.whole(part.matrix, part.entry, part.W, part.q)
            else:
                solved.append((part, solution))
        return done + self.written(solved) if solved else done

    def together(self, parts: Sequence[AdapterPart], device: Device) -> list[Solution | None] | None:
        """One adapter of all rows, its rows of B given to each; None where they share no A."""
        changes = [self.changes[part.matrix.name] for part in parts]
        if len({(part.W.dtype, part.q.dtype, part.q.shape[1]) for part in parts}) > 1:
            return None
        ranks = [change.rank or 0 for change in changes]
        kind = Verdict.LOW_RANK if any(c.kind is Verdict.LOW_RANK for c in changes) else Verdict.FAINT
        moved = sum((c.moved or 0) * p.q.numel() for c, p in zip(changes, parts, strict=True))
        stacked = Change(kind, moved / sum(part.q.numel() for part in parts), rank=max(ranks))
        stacked = replace(stacked, roundings=max(change.roundings for change in changes))
        W, q = (torch.cat(each) for each in zip(*((p.W, p.q) for p in parts), strict=True))
        most = max(sum(ranks) - 1, max(ranks), self.voted or 0)
        solution = self.recover(parts[0], W, q, stacked, device, most)
        if solution is None:
            return None
        sizes = [len(part.q) for part in parts]
        return [
            replace(solution, adapter=Adapter(B, solution.adapter.A), entries=part.q.numel())
            for part, B in zip(parts, solution.adapter.B.split(sizes), strict=True)
        ]

    def recovered(self, part: AdapterPart, device: Device) -> Solution | None:
        return self.recover(part, part.W, part.q, self.changes[part.matrix.name], device)

    def recover(
        self,
        part: AdapterPart,
        W: torch.Tensor,
        q: torch.Tensor,
        change: Change,
        device: Device,
        most: int | None = None,
    ) -> Solution | None:
        """By the formulas of the group, or where those give no adapter by any."""
        group = group_of(part.matrix, self.places)
        first = self.formulas.get(group, ())
        for formulas in (first, tuple(f for f in usual_of(W, q, group) if f not in first)):
            if formulas and (
                found := recover(W, q, change, self.voted, self.proven, formulas, device, self.rounds, most)
            ):
                return replace(found, adapter=found.adapter.stored_as(self.dtype))
            if change.kind is not Verdict.LOW_RANK or change.roundings > 1:
                break
        return None

    def longer_than_whole(self, part: AdapterPart, solution: Solution) -> bool:
        return solution.adapter.B.nbytes + solution.adapter.A.nbytes > part.q.nbytes

    def written(self, solved: Sequence[tuple[AdapterPart, Solution]]) -> Piece:
        """The factors in one place, the entries that they miss, and all of it tried before it counts."""
        shared = {id(solution.adapter.A): solution.adapter.A for _, solution in solved}
        starts = dict(zip(shared, itertools.accumulate((len(A) for A in shared.values()), initial=0), strict=False))
        place = self.places.get(solved[0][0].matrix.name)
        A = torch.cat(list(shared.values()))
        rows = place.rows if place else sum(len(part.q) for part, _ in solved)
        B = A.new_zeros(rows, len(A))
        done, row = Piece(()), 0
        for part, solution in solved:
            own = solution.adapter
            at = (
                rows_in_parameter(part.matrix, self.places[part.matrix.name])
                if place
                else torch.arange(row, row + len(own.B))
            )
            row += len(own.B)
            columns = slice(starts[id(own.A)], starts[id(own.A)] + own.rank)
            B[at[:, None], torch.arange(columns.start, columns.stop)] = own.B
            done += self.mended(part, solution, own if place is None else Adapter(B[at], A))
            if place is None:
                names = names_at(f"adapter/{part.matrix.name}", NOWHERE)
                done += Piece((), {}, dict(zip(names, (own.A, own.B), strict=True)))
        if place is not None and place.expert is not None:
            return done + Piece((), expert={"A": A, "B": B})
        if place is not None:
            names = names_at(PEFT + place.module, place)
            factors = (B.T, A.T) if place.embedding else (A, B)
            return done + Piece((), {name: x.contiguous() for name, x in zip(names, factors, strict=True)})
        return done

    def mended(self, part: AdapterPart, solution: Solution, adapter: Adapter) -> Piece:
        """The entry of a matrix, and the bits that the formula misses; kept whole where not even these mend it."""
        W, q, rest = part.W, part.q, {}
        made = solution.formula.merge(W, adapter.rows(0, len(q)), q.dtype)
        positions = wrong_bits(W, q, adapter, solution.formula)
        if len(positions):
            stored, found_there = (x.reshape(-1)[positions] for x in (q, made))
            rest[f"wrong/{part.matrix.name}"] = pack_some(positions, stored, found_there)
            made = unpack_some(rest[f"wrong/{part.matrix.name}"], made)
        if not same_bits(made, q).all() or adapter.B.nbytes + sum(t.nbytes for t in rest.values()) > q.nbytes:
            return self.whole(part.matrix, part.entry, W, q)
        entry = replace(
            part.entry, how=How.ADAPTER, rank=solution.adapter.rank, formula=solution.formula.name,
            scale=solution.formula.scale, cast=solution.formula.cast, rounds=solution.rounds, missed=len(positions),
            place=self.places.get(part.matrix.name),
        )  # fmt: skip
        return Piece((entry,), {}, rest)


NOWHERE = ModulePlace("", 0)  # of an adapter that PEFT has no place for: its names are as of a module


@dataclass(frozen=True)
class SavedPlace:
    """Of a tensor that PEFT keeps whole with its module, by modules_to_save.

    parameter: in memory; tied: those that are the same there; only_beside: kept only where the module's weight is, as
    the bias of a head: alone it would take the whole head with it
    """

    module: str
    parameter: str
    tied: tuple[str, ...] = ()
    only_beside: bool = False


def saved_places(base: Base, memory: Memory | None) -> dict[str, SavedPlace]:
    """The tensors of norms, embeddings and heads that PEFT can keep whole: of modules that have nothing else."""
    ours = {m.tensor: m for m in list_matrices(base.tuned) if m.part is None and m.dtype in STORED_FLOATS}
    names = {t: t for t in ours} if memory is None else {t: p for t, p in memory.names.items() if t in ours}
    by_module: dict[str, dict[str, str]] = {}
    for tensor, parameter in names.items():
        by_module.setdefault(parameter.rpartition(".")[0], {})[tensor] = parameter
    found, names_taken = {}, set(names.values())
    for tensor, m in ours.items():
        if m.role not in SAVED_WHOLE or not names.get(tensor, "").endswith(WEIGHT):
            continue
        module = names[tensor].removesuffix(WEIGHT)
        members, tied = by_module[module], () if memory is None else memory.tied[names[tensor]]
        if memory is None:
            tied = ("lm_head.weight",) if m.role == "embedding" and is_tied(base.tuned) else ()
        elif not _is_all_of(memory, module, members.values(), tied):
            continue
        if len(tied) > 1 or not names_taken.isdisjoint(tied):
            continue  # of several that are tied PEFT keeps one as it was
        for each, parameter in members.items():
            beside = each != tensor and m.role != "norm"
            found[each] = SavedPlace(module, parameter, tied if each == tensor else (), beside)
    return found


def is_resized(matrix: Matrix, base: tuple[int, ...]) -> bool:
    """Whether it is the base's matrix of this shape with other rows, as of a vocabulary that was resized."""
    rows = matrix.role in ("embedding", "head") and len(base) == len(matrix.shape) == 2
    return rows and base[1] == matrix.shape[1] and base[0] != matrix.shape[0]


def _is_all_of(memory: Memory, module: str, parameters: Iterable[str], tied: Sequence[str]) -> bool:
    """Whether these are all that a module holds, and what it is tied to is all that there is of that module."""
    held = {name: memory.tensors_of(name) for name in (module, *(t.removesuffix(WEIGHT) for t in tied))}
    others = {other for name in held[module] for other in memory.tied[name]}
    return sorted(parameters) == sorted(held.pop(module)) and others == set(tied) == {
        n for o in held.values() for n in o
    }


def memory_of_base(base: Base) -> Memory | None:
    """The base in memory, on which PEFT loads the adapter, as the tuned checkpoint's tensors fill it."""
    return memory_of(base.checkpoint, base.tuned.tensors)


def peft_places(base: Base) -> dict[str, ModulePlace]:
    """Where PEFT has adapters of the tuned checkpoint's matrices: only where the base has the same weight in memory,
    and of dtypes whose rounding is known; others are none's, each by itself."""
    ours = list_matrices(base.tuned)
    theirs = module_places(list_matrices(base.checkpoint), memory_of(base.checkpoint))
    known = {m.name for m in ours if m.dtype in STORED_FLOATS}

    def is_there(name: str, place: ModulePlace) -> bool:
        there = base.places.get(name)
        return there is not None and there.name in theirs and theirs[there.name].weight == place.weight

    places = module_places(ours, memory_of_base(base))
    return {name: p for name, p in places.items() if name in known and is_there(name, p)}


def modules_kept(saved: Mapping[str, SavedPlace]) -> dict[str, str]:
    """The module of each tensor that is one of several of a module."""
    several = Counter(place.module for place in saved.values())
    return {name: place.module for name, place in saved.items() if several[place.module] > 1}


def group_of(matrix: Matrix, places: Mapping[str, ModulePlace]) -> str:
    return places[matrix.name].group if matrix.name in places else "module"


def simple(how: How, W: torch.Tensor, dtype: torch.dtype, scale: float | None = None) -> torch.Tensor | None:
    """The base's W as it is, cast or scaled, stored as `dtype`; None where that is not possible."""
    if how is How.SAME:
        return W if W.dtype == dtype else None
    if how is How.CAST:
        return W.to(dtype) if W.dtype != dtype else None
    return None if scale is None else (W.double() * scale).to(format_of(dtype).wide).to(dtype)


# --- the formula ------------------------------------------------------------------------------------------------------


def usual_of(W: torch.Tensor, q: torch.Tensor, group: str) -> tuple[Formula, ...]:
    """The formulas to try, PEFT's for the group first; where base and tuned are of different formats also with the
    base cast before."""
    usual = sorted(USUAL, key=lambda f: f.name != PEFT_FORMULAS[group])
    return tuple(replace(f, cast=cast) for cast in ((False,) if W.dtype == q.dtype else (True, False)) for f in usual)


def choose_formulas(
    base: Base, delta: Delta, places: Mapping[str, ModulePlace], device: Device, rounds: int = ROUNDS
) -> dict[str, tuple[Formula, ...]]:
    """The formula of each group of places, see `choose_formula`: PEFT merges modules otherwise than experts."""
    groups: dict[str, list[Matrix]] = {}
    for m in list_matrices(base.tuned):
        if m.name in delta.changes and delta.changes[m.name].kind in (Verdict.LOW_RANK, Verdict.FAINT):
            groups.setdefault(group_of(m, places), []).append(m)
    return {group: choose_formula(base, delta, found, group, device, rounds) for group, found in groups.items()}


def choose_formula(
    base: Base, delta: Delta, matrices: Sequence[Matrix], group: str, device: Device, rounds: int = ROUNDS
) -> tuple[Formula, ...]:
    """The formula of a merge, tried on the matrix that says most: of low rank, and of the largest share of its norm.

    All usual ones where it does not tell them apart. A scale that is no power of two is looked for where none fits.
    """
    voted, _ = vote(delta.changes.values())
    told = [m for m in matrices if delta.changes[m.name].kind is Verdict.LOW_RANK] or matrices
    told = [m for m in told if delta.changes[m.name].roundings == 1] or told
    best = max(told, key=lambda m: (delta.changes[m.name].rank == voted, delta.changes[m.name].share or 0, -m.cost))
    W, q = base.read(best), base.tuned.read(best.tensor, best.part)
    assert W is not None, "of low rank are those that the base has"
    usual = usual_of(W, q, group)
    if voted is None:
        return usual

    def tried(formula: Formula) -> Solution | None:
        return recover(W, q, delta.changes[best.name], voted, False, (formula,), device, rounds)

    found = {f: tried(f) for f in usual}
    wrong = {f: solution.wrong for f, solution in found.items() if solution is not None}
    if not wrong:
        scales = {alpha / voted**power for alpha in SCALES for power in (0.5, 1.0)}
        for scale in sorted(s for s in scales if math.frexp(s)[0] != 0.5):  # of a power of two it is delta-first
            for cast in sorted({f.cast for f in usual}):
                formula = Formula("scaled-after", scale, cast)
                if (one := tried(formula)) is not None and is_believed(one, q.dtype):
                    return (formula,)
        return usual
    least = min(wrong.values())
    # A small matrix may be explained by two: the order is the usual one where a few entries are all that tells.
    fit = [f for f in wrong if wrong[f] <= 10 * least + max(1e-5 * q.numel(), FEW)]
    return tuple(sorted(fit, key=lambda f: 0 if wrong[f] <= least + FEW else wrong[f]))


# --- all of them ------------------------------------------------------------------------------------------------------


def unmerge_into(
    base: Base,
    delta: Delta,
    out: Path,
    *,
    crew: Crew,
    only_lora: bool = False,
    rounds: int = ROUNDS,
    dtype: torch.dtype = torch.float32,
    force: bool = False,
    tick: Callable[[Matrix, float], None] = lambda *_: None,
) -> AdapterRecord:
    """Write the directory `out`: the adapter of `base` that makes the tuned checkpoint, and what it does not make.

    delta: what `laser delta` found of the two. only_lora: refuse what is neither the base's nor an adapter. dtype: of
    the adapter. In memory are the workers' matrices, and what a solution takes. Interrupted, OUT.partial/ keeps what
    is done. With `force` an earlier adapter stands until the new one is whole. Raises UsageError where the base is not
    the base, or for `only_lora`; OutputError for an `out` that is there.
    """
    tuned = base.tuned
    if not is_base(list_matrices(tuned), delta.changes):
        raise UsageError(
            f"{base.checkpoint.name} is not the base of {tuned.name}: none of their matrices are alike; try another one"
        )
    require_files(tuned)
    with claimed(out):
        partial = unfinished(out)
        require_own(partial)
        run = run_of_unmerge(delta, crew, rounds, dtype)
        if (there := adapter_found_again(out, run, only_lora)) is not None:
            return there
        restore_earlier(out, partial / EARLIER_ADAPTER)
        require_adapter_place(out, force)
        with disk_errors(out):
            partial.mkdir(parents=True, exist_ok=True)
        entries = _visited(base, delta, partial, run, crew, only_lora, rounds, dtype, force, tick)
        record = _put_together(base, delta, partial, entries)
        require_unchanged(tuned)
        base.require_unchanged()
        with _journal(partial, run) as log:
            log.append({"whole": sha256_of(partial / "new" / RECORD)})
        with disk_errors(out):
            if out.exists():
                require_adapter_place(out, force)  # again: hours have passed
            take_place(partial / "new", out, partial / EARLIER_ADAPTER)
        _remove_work(partial, out)
    return record


def run_of_unmerge(pair: Pair, crew: Crew, rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    """What a run is told from others by."""
    run = {"kind": "unmerge journal", "version": AdapterRecord.version, **pair.tuned.stated()}
    run |= {"base": [pair.base.identity, pair.base.weights.short], "rounds": rounds, "device": crew.label}
    return run | {"dtype": str(dtype)}


def _remove_work(partial: Path, out: Path) -> None:
    """The journal goes last: while anything is left, it says that the output is whole."""

    def remove(folder: Path) -> None:
        for path in sorted(folder.iterdir()):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != PARTIAL_JOURNAL:
                path.unlink()
        shutil.rmtree(folder)

    tidy_up(partial, out, remove)


def adapter_found_again(out: Path, run: Mapping[str, Any], only_lora: bool) -> AdapterRecord | None:
    """The output of this very run, whole, which was killed while it tidied up: it is tidy now."""
    partial = unfinished(out)
    if not (out / RECORD).is_file() or not partial.is_dir():
        return None
    try:
        with Journal.look(partial / PARTIAL_JOURNAL, run) as log:
            stated = [line["whole"] for line in log.entries if "whole" in line]
        if not stated or sha256_of(out / RECORD) != stated[-1]:
            return None
        record = AdapterRecord.load(out / RECORD)
    except (OSError, OutputError, RecordError):
        return None
    if wrong_sums(out, record.parts):
        return None
    if only_lora:
        for entry in record.entries:
            _require_lora(entry)
    _remove_work(partial, out)
    return record


def require_adapter_place(out: Path, force: bool) -> None:
    """Raises OutputError where `out` is there, and is not what `unmerge` wrote or may not be replaced."""
    ours = {CONFIG, MODEL, REMAINDER, RECORD, SIDE_FILES}
    with disk_errors(out):
        foreign = sorted(p.name for p in out.iterdir() if p.name not in ours) if out.is_dir() else [out.name]
    other = bool(foreign) or out.is_symlink() or not (out / RECORD).is_file()
    if not (force and out.exists()):
        if not other:
            raise OutputError(f"{out} exists; try another -o, or --force to replace it")
        return require_new(out)
    require_no_mount(out)
    if other:
        inside = foreign and out.is_dir()
        what = f"holds {foreign[0]}, which laser unmerge did not write" if inside else "is no adapter of laser unmerge"
        raise OutputError(
            f"{out} {what}, and --force replaces nothing else; "
            f"try another -o{', or move that file elsewhere' if inside else ''}"
        )


def is_recorded(folder: Path) -> bool:
    """Whether `laser unmerge` wrote an adapter's folder: then every byte is known, and nothing may be left out."""
    if (folder / REMAINDER).exists() or not ((folder / RECORD).exists() and (folder / CONFIG).exists()):
        return (folder / REMAINDER).exists()
    try:
        document = parse_record(read_regular(folder / RECORD))
    except (OSError, ValueError):
        return True  # damaged, which is said where it is read
    return not isinstance(document, dict) or document.get("kind") == AdapterRecord.kind  # not of laser compensate


def require_base(base: Base) -> None:
    """Raises UsageError where of three matrices, first, middle and last of the layers, none is like the base's."""
    told = [m for m in list_matrices(base.tuned) if m.is_matrix and m.no_spectrum is None and _is_alike(base, m)]
    told = [m for m in told if m.layer is not None] or told
    some = {m.name: m for m in (told[0], told[len(told) // 2], told[-1])} if told else {}
    cosines = []
    for m in some.values():
        there = base.places[m.name]
        W, q = (c.read(x.tensor, x.part).double() for c, x in ((base.checkpoint, there), (base.tuned, m)))
        cosine = float((W * q).sum() / (W.norm() * q.norm()))
        cosines += [cosine] if math.isfinite(cosine) else []
    if cosines and max(cosines) < AGREE:
        raise UsageError(
            f"{base.checkpoint.name} is not the base of {base.tuned.name}: the cosine of their weights is "
            f"{max(cosines):.2f} at the most, expected over {AGREE}; try another one"
        )


def _is_alike(base: Base, m: Matrix) -> bool:
    there = base.places.get(m.name)
    return there is not None and there.shape == m.shape and there.no_spectrum is None


def require_files(tuned: Checkpoint) -> None:
    """Raises UsageError for a checkpoint whose files are no safetensors, or hold other than what is read of them, and
    CheckpointError where its config.json or another file beside them is not its own, or cannot be read."""
    if tuned.packed:
        raise UsageError(
            f"{tuned.name} holds {tuned.packed} weights, whose packed bytes no adapter makes again; try the fine-tune "
            "before it was quantised"
        )
    if tuned.hub is None and any(shard.data is not None for shard in tuned.shards):
        raise UsageError(f"{tuned.name} is not stored as safetensors, and its files cannot be made again; convert it")
    for link in foreign_links(tuned.path):
        if not stays_behind(tuned.path, link.relative_to(tuned.path), ()):  # else nobody misses it in what is rebuilt
            raise CheckpointError(
                f"{link} is a link to {link.readlink()}, and what a link leads to is not kept; put a copy in its place"
            )
    require_side_files(tuned)
    side_files_of(tuned)
    if tuned.left_out:
        raise UsageError(
            f"{tuned.name} holds tensors twice, as {tuned.left_out[0]}, of which one is loaded; write it anew first"
        )


def require_own(partial: Path) -> None:
    """Raises OutputError where OUT.partial holds what no `unmerge` has put there: it is removed in the end."""
    require_only(partial, _OWN_NAMES)


def delta_in(partial: Path) -> Path:
    """Where the record of the differences is kept meanwhile."""
    return partial / "delta.safetensors"


def all_roles(tuned: Checkpoint) -> tuple[str, ...]:
    """The roles of matrices that an adapter can be of."""
    return tuple(sorted({m.role for m in list_matrices(tuned) if m.is_matrix} - {"position"}))


def _visited(
    base: Base, delta: Delta, partial: Path, run: Mapping[str, Any], crew: Crew, only_lora: bool, rounds: int,
    dtype: torch.dtype, force: bool, tick: Callable[[Matrix, float], None],
) -> list[MatrixEntry]:  # fmt: skip
    """Every matrix written down: its entry in the journal, its tensors in files of its own."""
    matrices, places, saved = list_matrices(base.tuned), peft_places(base), saved_places(base, memory_of_base(base))
    numbers = {m.name: number for number, m in enumerate(matrices)}
    by_first = {unit[0].name: unit for unit in units(matrices, places, modules_kept(saved))}
    found: dict[str, MatrixEntry] = {}
    files: set[str] = set()
    with _journal(partial, run, anew=force) as log:
        for line in log.entries:
            if entries := _entries_in(line, partial):
                found |= {entry.name: entry for entry in entries}
                files |= line["files"].keys()
        _remove_parts(partial, besides=files)
        if only_lora:  # a run without it may have been interrupted
            for entry in found.values():
                _require_lora(entry, delta.changes[entry.name])
        todo = [unit[0] for unit in by_first.values() if any(m.name not in found for m in unit)]

        def keep(matrix: Matrix, piece: Piece, seconds: float = 0.0) -> None:
            for entry in piece.entries:
                if only_lora:
                    _require_lora(entry, delta.changes[entry.name])
            files = {}
            for what, tensors in (("adapter", piece.adapter), ("remainder", piece.remainder), ("expert", piece.expert)):
                if tensors:
                    path = partial / f"{numbers[matrix.name]:06d}.{what}.safetensors"
                    write_atomically(path, save(dict(tensors)), sweeping=False)
                    files[path.name] = sha256_of(path)
            log.append({"entries": [plain(entry) for entry in piece.entries], "files": files})
            found.update({entry.name: entry for entry in piece.entries})
            for m in by_first[matrix.name]:
                tick(m, seconds if m is matrix else 0.0)

        for matrix in (m for m in todo if m.dtype not in STORED_FLOATS):
            keep(matrix, _by_bytes(base, matrix))
        todo = [m for m in todo if m.dtype in STORED_FLOATS]
        formulas = choose_formulas(base, delta, places, crew.devices[0], rounds) if todo else {}
        voted, proven = vote(delta.changes.values())
        work = Unmerge(base, delta.changes, by_first, places, saved, voted, proven, formulas, rounds, dtype)
        with closing(visit_all(base.tuned, most_expensive_first(todo), work, crew)) as visits:
            for matrix, piece, seconds in visits:
                keep(matrix, piece, seconds)
    return [found[m.name] for m in matrices]


def _require_lora(entry: MatrixEntry, change: Change | None = None) -> None:
    """Raises UsageError for what is neither the base's nor an adapter."""
    if entry.how not in (How.SAME, How.CAST, How.ADAPTER, How.SAVED):
        grid = change is not None and looks_quantised(change)
        what = ", as of a base that was quantised before it was tuned," if grid else ""
        raise UsageError(f"{entry.name} is {entry.kind}{what} and no base with an adapter; try without --only-lora")


def _remove_parts(partial: Path, besides: Set[str]) -> None:
    """Those of another run, or that no line names: all that lie there are joined in the end."""
    with disk_errors(partial):
        for path in sorted(partial.iterdir()):
            if _PART_NAMES.fullmatch(path.name) and path.name not in besides:
                path.unlink()


def _journal(partial: Path, run: Mapping[str, Any], anew: bool = False) -> Journal:
    try:
        return Journal(partial / PARTIAL_JOURNAL, run, anew=anew)
    except RecordError as error:
        raise of_another_unmerge(partial) from error


def of_another_unmerge(partial: Path) -> RecordError:
    return RecordError(
        f"{partial} holds the work of another run, or damaged work; try another -o, or --force to begin anew"
    )


def _entries_in(line: Mapping[str, Any], partial: Path) -> list[MatrixEntry]:
    """The entries of a journal's line, if its files are there as they were written."""
    try:
        entries = [reader(MatrixEntry)(entry) for entry in line.get("entries") or ()]
        files = line.get("files")
        whole = isinstance(files, dict) and all(sha256_of(partial / name) == digest for name, digest in files.items())
    except (Misfit, OSError):
        return []
    return entries if whole else []


def _by_bytes(base: Base, matrix: Matrix) -> Piece:
    """A tensor of a dtype whose rounding is not known, by its bytes alone; of those that torch lacks they are all."""
    info, there, known = base.tuned.tensors[matrix.tensor], base.places.get(matrix.name), matrix.dtype in TORCH
    shard = base.tuned.shard_of(info.name)
    q = base.tuned.raw(info.name, matrix.part) if known else read_bytes(shard, info.start, info.end)
    change = base.by_bytes(matrix)
    digest = tensor_sha256(q) if known or change.kind is not Verdict.SAME else ""
    entry = MatrixEntry(matrix.name, How.WHOLE, change.kind, digest, matrix.parameters)
    if there is not None and change.kind is Verdict.SAME:
        return Piece((replace(entry, how=How.SAME, of=there.name),))
    return Piece((entry,), {}, {f"whole/{matrix.name}": pack(q)})


def _put_together(base: Base, delta: Delta, partial: Path, entries: Sequence[MatrixEntry]) -> AdapterRecord:
    """OUT in partial/new: the parts joined, and the record."""
    new, tuned = partial / "new", base.tuned
    with disk_errors(new):
        if new.exists():
            shutil.rmtree(new)
        new.mkdir()
        headers = {f"header/{s.name}": packed_header(s.header) for s in tuned.shards}
        write_atomically(partial / "headers.remainder.safetensors", save(headers))
        _experts_together(base, partial, entries)
        for what, file in (("adapter", MODEL), ("remainder", REMAINDER)):
            join(sorted(partial.glob(f"*.{what}.safetensors")), new / file, {"format": "pt"})
        files = side_files_of(tuned)
        for name, data in files.items():
            # A small one even where the base has the same, whose own may be gone or changed by the time it is needed.
            if len(data) <= SMALL_SIDE_FILE or base_file(base.checkpoint, name) != data:
                (new / SIDE_FILES / name).parent.mkdir(parents=True, exist_ok=True)
                (new / SIDE_FILES / name).write_bytes(data)
        write_atomically(
            new / CONFIG,
            (json.dumps(peft_config(base, entries, ranks_in(new / MODEL, entries)), indent=2) + "\n").encode(),
        )
    shards = []
    for shard in tuned.shards:
        digest = hashlib.sha256()
        for piece in pieces(shard, 0, shard.size):
            digest.update(piece)
        shards.append(ShardEntry(shard.name, shard.size, digest.hexdigest()))
    record = AdapterRecord(
        delta.base, delta.tuned, tuple(entries), tuple(shards),
        {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        {name: sha256_of(new / name) for name in (MODEL, REMAINDER)},
    )  # fmt: skip
    record.save(new / RECORD)
    return record


def side_files_of(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The files beside a checkpoint's weights, and in folders there, that belong to the model; and its index."""
    files = {inside.as_posix(): own for inside, own in travelling(checkpoint)[0].items()}
    for name in (CARD, OPTIONS_FILE, OUTCOME):
        if (own := own_file(checkpoint.path, checkpoint.path / name)) is not None:
            files[name] = own
    found = {name: read_regular(files[name], follow=False) for name in sorted(files)}
    if checkpoint.index_bytes is not None:
        found["model.safetensors.index.json"] = checkpoint.index_bytes
    if "config.json" not in found:
        raise CheckpointError(
            f"{checkpoint.path} has no config.json of its own, expected a file there and no link; try a checkpoint in "
            "the Hub's format"
        )
    return found


def base_file(checkpoint: Checkpoint, name: str) -> bytes | None:
    """A file of this name beside the base's weights; None where it has none."""
    if name == "model.safetensors.index.json":
        return checkpoint.index_bytes
    try:
        own = own_file(checkpoint.path, checkpoint.path / name)
        return None if own is None else read_regular(own, follow=False)
    except OSError:
        return None


def packed_header(header: bytes) -> torch.Tensor:
    """A shard's header, uint8: its length, as it begins, and the rest packed."""
    whole = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    return torch.cat((whole[:8], pack(whole[8:])))


def unpacked_header(packed: torch.Tensor) -> bytes:
    """Raises RecordError for what `packed_header` did not make."""
    length = int.from_bytes(bytes_of(packed[:8]), "little")
    rest = unpack(packed[8:], (min(length, MAX_HEADER),), torch.uint8)
    return bytes(bytes_of(packed[:8])) + bytes(bytes_of(rest))


def _experts_together(base: Base, partial: Path, entries: Sequence[MatrixEntry]) -> None:
    """The factors of every parameter that holds experts, from the files of the experts; one parameter in memory."""
    matrices = list_matrices(base.tuned)
    numbers, places = {m.name: number for number, m in enumerate(matrices)}, peft_places(base)
    firsts = {m.name: unit[0] for unit in units(matrices, places) for m in unit}
    adapted = [e for e in entries if e.how is How.ADAPTER and e.place is not None and e.place.expert is not None]
    by_weight: dict[str, dict[int, Path]] = {}
    for entry in adapted:
        assert entry.place is not None and entry.place.expert is not None, "those were chosen"
        file = partial / f"{numbers[firsts[entry.name].name]:06d}.expert.safetensors"
        by_weight.setdefault(entry.place.weight, {})[entry.place.expert] = file
    stem_of = stems(e.place for e in adapted if e.place)
    by_name = {e.place.weight: e.place for e in adapted if e.place}
    for weight, files in by_weight.items():
        factors = {expert: load_file(file) for expert, file in files.items()}
        A, B = of_experts({expert: (f["A"], f["B"]) for expert, f in factors.items()}, by_name[weight])
        names = names_at(stem_of[weight], by_name[weight])
        first = next(iter(files.values()))
        path = first.with_name(first.name.replace(".expert.", ".adapter."))
        write_atomically(path, save(dict(zip(names, (A, B), strict=True))), sweeping=False)


def ranks_in(file: Path, entries: Sequence[MatrixEntry]) -> dict[str, int]:
    """The rank of every adapted weight in the adapter's file."""
    shapes = {info.name: info.shape for info in read_header(file).tensors}
    places = [e.place for e in entries if e.how is How.ADAPTER and e.place]
    stem_of = stems(places)
    ranks = {p.weight: (shapes[names_at(stem_of[p.weight], p)[0]][0], p.experts or 1) for p in places}
    return {weight: rank // experts for weight, (rank, experts) in ranks.items()}


def peft_config(base: Base, entries: Sequence[MatrixEntry], ranks: Mapping[str, int]) -> dict[str, Any]:
    """adapter_config.json: every adapter scaled by 1, other ranks in rank_pattern, what was trained whole by name."""
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    others = {weight: rank for weight, rank in ranks.items() if rank != usual}
    memory = memory_of_base(base)
    whole = [e.name for e in entries if e.how is How.SAVED]
    places = saved_places(base, memory) if whole else {}
    saved = sorted({places[name].module for name in whole})
    embeddings = {m.name for m in list_matrices(base.tuned) if m.role == "embedding"}
    hub = base.checkpoint.hub
    parameters = {e.place.weight for e in entries if e.place and e.place.parameter}
    if memory is not None:
        modules, every = set(memory.kinds), set(memory.shapes)
    else:
        theirs = module_places(list_matrices(base.checkpoint)).values()
        modules, every = ({p.weight for p in theirs if bool(p.parameter) is kind} for kind in (False, True))
    adapted = targets(ranks.keys() - parameters, modules)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if memory is None else memory.task,
        "base_model_name_or_path": hub.repo if hub else base.checkpoint.name,
        "r": usual,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": adapted if adapted or parameters else DUMMY_TARGET,
        "target_parameters": targets(parameters, every, 2) or None,
        "rank_pattern": others,
        "alpha_pattern": others,
        "modules_to_save": saved or None,
        "ensure_weight_tying": is_tied(base.tuned) and not embeddings.isdisjoint(whole),
    }


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the head is the embedding."""
    roles = {m.role for m in list_matrices(checkpoint)}
    return "embedding" in roles and "head" not in roles


def targets(adapted: Iterable[str], every: Iterable[str], parts: int = 1) -> list[str]:
    """The adapted weights by the last `parts` of their names where every one that ends so is adapted, else in full."""

    def leaf(name: str) -> str:
        return ".".join(name.split(".")[-parts:])

    adapted = list(adapted)
    all_of, ours = Counter(map(leaf, every)), Counter(map(leaf, adapted))
    return sorted({leaf(name) if all_of[leaf(name)] == ours[leaf(name)] else name for name in adapted})
