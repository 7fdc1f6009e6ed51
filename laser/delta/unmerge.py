"""unmerge: a fine-tune as its base and an adapter, to the last bit.

Every matrix of the tuned checkpoint is written down in the shortest way that gives its stored bits again: it is the
base's, or that cast or scaled, or the base's with an update of low rank and the few entries that the formula misses, or
it is kept whole. Each is put together again from what is about to be written, and compared, before it counts.

ADAPTER/ holds

    adapter_config.json, adapter_model.safetensors   the adapter as PEFT has it, float32, scaled by 1; and norms,
                                                     embeddings and heads that were trained whole (modules_to_save)
    remainder.safetensors                            entries that the formula misses, matrices kept whole, adapters of
                                                     parts of fused tensors, and the headers of the shards
    tuned/                                           files beside the tuned weights that the base has not, or otherwise
    laser.json                                       both identities, and per matrix how it is made; see AdapterRecord
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from laser.checkpoint.convert import require_new
from laser.checkpoint.matrices import Matrix, list_matrices
from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.safetensors import TORCH, join, pieces, sha256_of
from laser.checkpoint.side_files import own_file, stays_behind
from laser.checkpoint.slices import tensor_sha256
from laser.checkpoint.source import Source, require_unchanged
from laser.choices import ROUNDS
from laser.delta.base import Base, Delta
from laser.delta.difference import Change, Verdict
from laser.delta.formats import STORED_FLOATS, format_of, same_bits
from laser.delta.formulas import Formula
from laser.delta.overview import is_base
from laser.delta.packing import pack, pack_some, unpack_some
from laser.delta.recover import USUAL, is_believed, recover, vote
from laser.delta.solver import wrong_bits
from laser.engine.crew import Crew, most_expensive_first
from laser.engine.workers import visit_all
from laser.errors import CheckpointError, OutputError, RecordError, UsageError
from laser.files import PASSING, claimed, disk_errors, read_regular, unfinished, write_atomically
from laser.journal import Journal
from laser.records import SPARSE, Misfit, Record, plain, reader
from laser.spectral.devices import Device

CONFIG, MODEL, REMAINDER, RECORD, SIDE_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "remainder.safetensors",
    "laser.json",
    "tuned",
)
PEFT = "base_model.model."  # before every name in a PEFT adapter
# What is trained whole beside an adapter, by PEFT's modules_to_save.
SAVED_WHOLE = ("norm", "embedding", "head")
_OWN_NAMES = re.compile(
    rf"\d{{6}}\.(?:adapter|remainder)\.safetensors|headers\.remainder\.safetensors|journal\.jsonl|new"
    rf"|delta\.safetensors(?:\.partial)?|{PASSING.pattern}"
)
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

    of: the base's matrix; sha256: of its bits, row-major; peft: whether its adapter is in adapter_model.safetensors
    rank, formula, rounds, missed: of an adapter: how many of its `entries` the formula misses
    scale: of How.SCALED, or the formula's
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
    peft: bool = field(default=True, metadata=SPARSE)

    def wrong(self) -> str | None:
        if self.how is How.ADAPTER and (not self.rank or self.formula is None or self.of is None):
            return "an adapter without rank, formula or base"
        if self.how in (How.SAME, How.CAST, How.SCALED) and self.of is None:
            return f"{self.how} without what it is of"
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


# --- one matrix -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """What is written of a matrix: its entry, and tensors for the adapter's file and for the remainder."""

    entry: MatrixEntry
    adapter: Mapping[str, torch.Tensor] = field(default_factory=dict)
    remainder: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Unmerge:
    """A visit that writes a matrix down. voted: the rank of most, perhaps `proven` by spectra."""

    base: Base
    changes: Mapping[str, Change]
    voted: int | None = None
    proven: bool = False
    formulas: tuple[Formula, ...] = USUAL
    rounds: int = ROUNDS

    def __call__(self, matrix: Matrix, q: torch.Tensor, device: Device) -> Piece:
        """q: the tuned values, of any shape, as they are stored."""
        change, W = self.changes[matrix.name], self.base.read(matrix)
        there = self.base.places.get(matrix.name)
        entry = MatrixEntry(matrix.name, How.WHOLE, change.kind, tensor_sha256(q), q.numel(), there and there.name)
        saved = matrix.role in SAVED_WHOLE and matrix.part is None and matrix.tensor.endswith(".weight")
        if W is not None and W.shape == q.shape:
            for how in (How.SAME, How.CAST, *(() if saved else (How.SCALED,))):  # PEFT knows no scaled module
                made = simple(how, W, q.dtype, change.scale)
                if made is not None and same_bits(made, q).all():
                    return Piece(replace(entry, how=how, scale=change.scale if how is How.SCALED else None))
            if change.kind in (Verdict.LOW_RANK, Verdict.FAINT) and (
                piece := self.by_adapter(entry, matrix, W, q, device)
            ):
                return piece
        if saved:
            return Piece(replace(entry, how=How.SAVED), {PEFT + matrix.tensor: q.contiguous()})
        known = W if W is not None and (W.shape, W.dtype) == (q.shape, q.dtype) else None
        return Piece(
            replace(entry, of=entry.of if known is not None else None), {}, {f"whole/{matrix.name}": pack(q, known)}
        )

    def by_adapter(
        self, entry: MatrixEntry, matrix: Matrix, W: torch.Tensor, q: torch.Tensor, device: Device
    ) -> Piece | None:
        """The matrix as base and adapter; None where it is none, or the whole of it is shorter."""
        found = recover(W, q, self.changes[matrix.name], self.voted, self.proven, self.formulas, device, self.rounds)
        if found is None:
            return None
        peft = matrix.part is None and matrix.tensor.endswith(".weight")
        A, B = adapter_names(matrix.tensor if peft else matrix.name, peft)
        factors, rest = {A: found.adapter.A, B: found.adapter.B}, {}
        made = found.formula.merge(W, found.adapter.rows(0, len(q)), q.dtype)
        positions = wrong_bits(W, q, found.adapter, found.formula)
        if len(positions):
            stored, found_there = (x.reshape(-1)[positions] for x in (q, made))
            rest[f"wrong/{matrix.name}"] = pack_some(positions, stored, found_there)
            made = unpack_some(rest[f"wrong/{matrix.name}"], made)
        if not same_bits(made, q).all() or sum(t.nbytes for t in (*factors.values(), *rest.values())) > q.nbytes:
            return None
        entry = replace(
            entry, how=How.ADAPTER, rank=found.adapter.rank, formula=found.formula.name, scale=found.formula.scale,
            rounds=found.rounds, missed=len(positions), peft=peft,
        )  # fmt: skip
        return Piece(entry, factors if peft else {}, rest if peft else {**factors, **rest})


def simple(how: How, W: torch.Tensor, dtype: torch.dtype, scale: float | None = None) -> torch.Tensor | None:
    """The base's W as it is, cast or scaled, stored as `dtype`; None where that is not possible."""
    if how is How.SAME:
        return W if W.dtype == dtype else None
    if how is How.CAST:
        return W.to(dtype) if W.dtype != dtype else None
    return None if scale is None else (W.double() * scale).to(format_of(dtype).wide).to(dtype)


def adapter_names(name: str, peft: bool) -> tuple[str, str]:
    """What A and B are called: as PEFT calls them, or by the matrix where PEFT has no name for it."""
    stem = PEFT + name.removesuffix(".weight") if peft else f"adapter/{name}"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


# --- the formula ------------------------------------------------------------------------------------------------------


def choose_formula(base: Base, delta: Delta, device: Device, rounds: int = ROUNDS) -> tuple[Formula, ...]:
    """The formula of the merge, tried on the matrix that says most: of low rank, and of the largest share of its norm.

    All of USUAL where no matrix tells them apart. A scale that is no power of two is looked for where neither fits.
    """
    voted, _ = vote(delta.changes.values())
    told = [m for m in list_matrices(base.tuned) if delta.changes[m.name].kind is Verdict.LOW_RANK]
    told = told or [m for m in list_matrices(base.tuned) if delta.changes[m.name].kind is Verdict.FAINT]
    if not told or voted is None:
        return USUAL
    best = max(told, key=lambda m: (delta.changes[m.name].rank == voted, delta.changes[m.name].share or 0, -m.cost))
    W, q = base.read(best), base.tuned.read(best.tensor, best.part)
    assert W is not None, "of low rank are those that the base has"
    found = {f: recover(W, q, delta.changes[best.name], voted, False, (f,), device, rounds) for f in USUAL}
    wrong = {f: solution.share_wrong for f, solution in found.items() if solution is not None}
    if not wrong:
        scales = {alpha / voted**power for alpha in SCALES for power in (0.5, 1.0)}
        for scale in sorted(s for s in scales if math.frexp(s)[0] != 0.5):  # of a power of two it is delta-first
            one = recover(
                W, q, delta.changes[best.name], voted, False, (Formula("scaled-after", scale),), device, rounds
            )
            if one is not None and is_believed(one, q.dtype):
                return (one.formula,)
        return USUAL
    least = min(wrong.values())
    return tuple(sorted((f for f in wrong if wrong[f] <= 10 * least + 1e-5), key=lambda f: wrong[f]))


# --- all of them ------------------------------------------------------------------------------------------------------


def unmerge(
    base: Base,
    delta: Delta,
    out: Path,
    *,
    crew: Crew,
    only_lora: bool = False,
    rounds: int = ROUNDS,
    tick: Callable[[Matrix, float], None] = lambda *_: None,
) -> AdapterRecord:
    """Write the new directory `out`: the adapter of `base` that makes the tuned checkpoint, and what it does not make.

    delta: what `laser delta` found of the two. only_lora: refuse what is neither the base's nor an adapter. In memory
    are the workers' matrices, and what a solution takes. Interrupted, OUT.partial/ keeps what is done. Raises
    UsageError where the base is not the base, or for `only_lora`; OutputError for an `out` that is there.
    """
    tuned = base.tuned
    if not is_base(list_matrices(tuned), delta.changes):
        raise UsageError(
            f"{base.checkpoint.name} is not the base of {tuned.name}: none of their matrices are alike; try another one"
        )
    require_files(tuned)
    with claimed(out):
        require_new(out)
        partial = unfinished(out)
        with disk_errors(out):
            partial.mkdir(parents=True, exist_ok=True)
        require_own(partial)
        entries = _visited(base, delta, partial, crew, only_lora, rounds, tick)
        record = _put_together(base, delta, partial, entries)
        require_unchanged(tuned)
        base.require_unchanged()
        with disk_errors(out):
            (partial / "new").rename(out)
            shutil.rmtree(partial)
    return record


def require_files(tuned: Checkpoint) -> None:
    """Raises UsageError for a checkpoint whose files are no safetensors, or hold more than is loaded of them."""
    if tuned.hub is None and any(shard.data is not None for shard in tuned.shards):
        raise UsageError(f"{tuned.name} is not stored as safetensors, and its files cannot be made again; convert it")
    if tuned.left_out:
        raise UsageError(
            f"{tuned.name} holds tensors twice, as {tuned.left_out[0]}, of which one is loaded; write it anew first"
        )


def require_own(partial: Path) -> None:
    """Raises OutputError where OUT.partial holds what no `unmerge` has put there: it is removed in the end."""
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise OutputError(f"{partial} is in the way: a directory of that name is needed; move it away")
    foreign = sorted(p.name for p in partial.iterdir() if not _OWN_NAMES.fullmatch(p.name)) if partial.exists() else []
    if foreign:
        raise OutputError(f"{partial} holds {foreign[0]}, which laser did not write; move it away")


def delta_in(partial: Path) -> Path:
    """Where the record of the differences is kept meanwhile."""
    return partial / "delta.safetensors"


def all_roles(tuned: Checkpoint) -> tuple[str, ...]:
    """The roles of matrices that an adapter can be of: all but look-ups."""
    return tuple(sorted({m.role for m in list_matrices(tuned) if m.is_matrix} - {"embedding", "position"}))


def _visited(
    base: Base, delta: Delta, partial: Path, crew: Crew, only_lora: bool, rounds: int,
    tick: Callable[[Matrix, float], None],
) -> list[MatrixEntry]:  # fmt: skip
    """Every matrix written down: its entry in the journal, its tensors in files of its own."""
    run = {"kind": "unmerge journal", "version": AdapterRecord.version, **delta.tuned.stated()}
    run |= {"base": [delta.base.identity, delta.base.weights.short], "rounds": rounds, "device": crew.label}
    matrices = list_matrices(base.tuned)
    places = {m.name: number for number, m in enumerate(matrices)}
    found: dict[str, MatrixEntry] = {}
    with _journal(partial, run) as log:
        for line in log.entries:
            if (entry := _entry_in(line, partial)) is not None:
                found[entry.name] = entry
        todo = [m for m in matrices if m.name not in found]

        def keep(matrix: Matrix, piece: Piece, seconds: float = 0.0) -> None:
            if only_lora and piece.entry.how not in (How.SAME, How.CAST, How.ADAPTER, How.SAVED):
                raise UsageError(
                    f"{matrix.name} is {piece.entry.kind}, and no base with an adapter; try without --only-lora"
                )
            files = {}
            for what, tensors in (("adapter", piece.adapter), ("remainder", piece.remainder)):
                if tensors:
                    path = partial / f"{places[matrix.name]:06d}.{what}.safetensors"
                    write_atomically(path, save(dict(tensors)))
                    files[path.name] = sha256_of(path)
            log.append({"entry": plain(piece.entry), "files": files})
            found[matrix.name] = piece.entry
            tick(matrix, seconds)

        for matrix in (m for m in todo if m.dtype not in STORED_FLOATS):
            keep(matrix, _by_bytes(base, matrix))
        todo = [m for m in todo if m.dtype in STORED_FLOATS]
        if any(delta.changes[m.name].kind in (Verdict.LOW_RANK, Verdict.FAINT) for m in todo):
            formulas = choose_formula(base, delta, crew.devices[0], rounds)
        else:
            formulas = USUAL
        voted, proven = vote(delta.changes.values())
        work = Unmerge(base, delta.changes, voted, proven, formulas, rounds)
        with closing(visit_all(base.tuned, most_expensive_first(todo), work, crew)) as visits:
            for matrix, piece, seconds in visits:
                keep(matrix, piece, seconds)
    return [found[m.name] for m in matrices]


def _journal(partial: Path, run: Mapping[str, Any]) -> Journal:
    try:
        return Journal(partial / "journal.jsonl", run)
    except RecordError as error:
        raise of_another_unmerge(partial) from error


def of_another_unmerge(partial: Path) -> RecordError:
    return RecordError(f"{partial} holds the work of another run, or damaged work; remove it, or try another -o")


def _entry_in(line: Mapping[str, Any], partial: Path) -> MatrixEntry | None:
    """The entry of a journal's line, if its files are there as they were written."""
    try:
        entry = reader(MatrixEntry)(line.get("entry"))
        files = line.get("files")
        whole = isinstance(files, dict) and all(sha256_of(partial / name) == digest for name, digest in files.items())
    except (Misfit, OSError):
        return None
    return entry if whole else None


def _by_bytes(base: Base, matrix: Matrix) -> Piece:
    """A tensor of a dtype whose rounding is not known, by its bytes alone."""
    if matrix.part is not None or matrix.dtype not in TORCH:
        change = base.by_bytes(matrix) if matrix.part is None else None
        if change is None or change.kind is not Verdict.SAME:
            raise UsageError(
                f"{matrix.name} is stored as {matrix.dtype}, expected one of {', '.join(STORED_FLOATS)}; try "
                "checkpoints converted to bfloat16"
            )
        return Piece(
            MatrixEntry(matrix.name, How.SAME, Verdict.SAME, "", matrix.parameters, base.places[matrix.name].name)
        )
    q, change = base.tuned.raw(matrix.tensor), base.by_bytes(matrix)
    entry = MatrixEntry(matrix.name, How.WHOLE, change.kind, tensor_sha256(q), q.numel())
    if change.kind is Verdict.SAME:
        return Piece(replace(entry, how=How.SAME, of=base.places[matrix.name].name))
    return Piece(entry, {}, {f"whole/{matrix.name}": pack(q)})


def _put_together(base: Base, delta: Delta, partial: Path, entries: Sequence[MatrixEntry]) -> AdapterRecord:
    """OUT in partial/new: the parts joined, and the record."""
    new, tuned = partial / "new", base.tuned
    with disk_errors(new):
        if new.exists():
            shutil.rmtree(new)
        new.mkdir()
        headers = {f"header/{s.name}": torch.frombuffer(bytearray(s.header), dtype=torch.uint8) for s in tuned.shards}
        write_atomically(partial / "headers.remainder.safetensors", save(headers))
        for what, file in (("adapter", MODEL), ("remainder", REMAINDER)):
            join(sorted(partial.glob(f"*.{what}.safetensors")), new / file, {"format": "pt"})
        files = side_files_of(tuned)
        for name, data in files.items():
            if base_file(base.checkpoint, name) != data:
                (new / SIDE_FILES).mkdir(exist_ok=True)
                (new / SIDE_FILES / name).write_bytes(data)
        write_atomically(new / CONFIG, (json.dumps(peft_config(base, entries), indent=2) + "\n").encode())
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
    """The files beside a checkpoint's weights, at the top of its folder, that belong to the model; and its index.

    Raises CheckpointError for one that is called as a shard of it.
    """
    found: dict[str, bytes] = {}
    shards = {shard.name for shard in checkpoint.shards}
    for path in sorted(checkpoint.path.iterdir()):
        if path.name in shards or path.name.startswith(".") or not path.is_file():
            continue
        own = own_file(checkpoint.path, path)
        if own is not None and not stays_behind(checkpoint.path, Path(path.name), ()):
            found[path.name] = read_regular(own, follow=False)
    if checkpoint.index_bytes is not None:
        found["model.safetensors.index.json"] = checkpoint.index_bytes
    if "config.json" not in found:
        raise CheckpointError(f"{checkpoint.path} has no config.json of its own; try a checkpoint in the Hub's format")
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


def peft_config(base: Base, entries: Sequence[MatrixEntry]) -> dict[str, Any]:
    """adapter_config.json: every adapter scaled by 1, other ranks in rank_pattern, what was trained whole by name."""
    ranks = {e.name.removesuffix(".weight"): e.rank or 0 for e in entries if e.how is How.ADAPTER and e.peft}
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    saved = [e.name.removesuffix(".weight") for e in entries if e.how is How.SAVED]
    hub = base.checkpoint.hub
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": hub.repo if hub else base.checkpoint.name,
        "r": usual,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": targets(ranks, [m.name.removesuffix(".weight") for m in list_matrices(base.checkpoint)]),
        "rank_pattern": others,
        "alpha_pattern": others,
        "modules_to_save": saved or None,
    }


def targets(adapted: Mapping[str, int], modules: Sequence[str]) -> list[str]:
    """The adapted modules by the last part of their names where every module that ends so is adapted, else in full."""
    every = Counter(module.rpartition(".")[2] for module in modules)
    ours = Counter(module.rpartition(".")[2] for module in adapted)
    return sorted({leaf if every[leaf] == ours[leaf] else m for m in adapted for leaf in [m.rpartition(".")[2]]})
