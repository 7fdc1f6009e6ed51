"""The base of a fine-tune: which of its matrices stands for which of the tuned one's, and the difference of the two.

To a scan a difference is one more matrix: biwhitened, so that what rounding leaves is noise with sigma = 1. Both
checkpoints make one source, the virtual checkpoint TUNED - BASE, which no record of either alone is of. Names need not
agree, nor shards, formats, or whether experts are fused: matrices are matched by name, or else by stack, layer, role
and expert where only one on each side has these.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from laser.checkpoint.matrices import ALIASES, Matrix, list_matrices
from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.safetensors import read_bytes
from laser.checkpoint.source import Source, require_unchanged
from laser.differences.difference import Change, Verdict, as_merged, compare_tensors, whitened
from laser.differences.formats import STORED_FLOATS
from laser.errors import NumericalError, RecordError
from laser.spectral.devices import Device


@dataclass(frozen=True)
class Pair:
    """Which two checkpoints a record of differences speaks of."""

    base: Source
    tuned: Source

    @property
    def source(self) -> Source:
        """The virtual checkpoint TUNED - BASE."""
        return difference_of(self.tuned, self.base)

    def require(self, tuned: Checkpoint, base: Base | None, what: str) -> None:
        """Raises RecordError unless `what` was made of these two."""
        if base is None:
            raise RecordError(
                f"the {what} was made from {self.source.name} ({self.source.identity[:12]}), the difference of two "
                f"checkpoints, found {tuned.name} alone; try it with --base and the directory or id of {self.base.name}"
            )
        self.base.require(base.checkpoint, f"{what} of {self.source.name}")
        self.tuned.require(tuned, f"{what} of {self.source.name}")


@dataclass(frozen=True)
class Delta(Pair):
    """What a record of differences says beside the spectra. changes: by the tuned one's name of each tensor, and by the
    base's of what the tuned one lacks."""

    changes: Mapping[str, Change] = field(default_factory=dict)

    @property
    def pair(self) -> Pair:
        return Pair(self.base, self.tuned)

    def unlike(self, names: Sequence[str]) -> str | None:
        """What in it contradicts the rest of a file whose tensors are these."""
        known = set(names)
        for name, change in self.changes.items():
            if (name in known) == (change.kind is Verdict.MISSING):
                return f"{name} is {change.kind}, and {'is' if name in known else 'is not'} in the tuned checkpoint"
        if missing := known - self.changes.keys():
            return f"nothing says what became of {min(missing)}"
        return None


class Between(NamedTuple):
    """What became of a matrix, as far as its entries tell, and the biwhitened difference; None where there is none."""

    change: Change
    matrix: torch.Tensor | None


def difference_of(tuned: Source, base: Source) -> Source:
    """Which checkpoint a difference is of: neither, but both."""

    def both(a: str | None, b: str | None) -> str | None:
        return None if a is None or b is None else hashlib.sha256(f"{a} - {b}".encode()).hexdigest()

    content, samples = both(tuned.content, base.content), both(tuned.samples, base.samples)
    if content is None and samples is None:  # one is on the Hub and the other in a directory: what is known of each
        samples = both(tuned.content or tuned.samples, base.content or base.samples)
    name, identity = f"{tuned.name} - {base.name}", str(both(tuned.identity, base.identity))
    return replace(tuned, name=name, identity=identity, content=content, samples=samples)


@dataclass(frozen=True)
class Base:
    """A base that a tuned checkpoint is compared with. places: the tuned one's name -> the base's matrix."""

    checkpoint: Checkpoint
    tuned: Checkpoint
    places: Mapping[str, Matrix]
    missing: tuple[str, ...] = ()

    @staticmethod
    def of(base: Checkpoint, tuned: Checkpoint) -> Base:
        theirs, ours = list_matrices(base), list_matrices(tuned)
        places = matched(theirs, ours)
        used = {m.name for m in places.values()}
        return Base(base, tuned, places, tuple(m.name for m in theirs if m.name not in used))

    @cached_property
    def pair(self) -> Pair:
        """What records say of the two."""
        return Pair(Source.of(self.checkpoint), Source.of(self.tuned))

    @property
    def source(self) -> Source:
        """The virtual checkpoint TUNED - BASE."""
        return self.pair.source

    def stated(self) -> dict[str, Any]:
        """What a journal of differences is identified by beside the tuned checkpoint."""
        return {"base": [self.pair.base.identity, self.pair.base.weights.short]}

    def require(self, source: Source, what: str) -> None:
        """Raises RecordError unless `what` was made of these two checkpoints."""
        if not source.is_of(self.source):
            raise RecordError(
                f"the {what} was made from {source.name} ({source.identity[:12]}), found {self.source.name} "
                f"({self.source.identity[:12]}); make the {what} again: `laser delta BASE TUNED -o FILE`"
            )

    def delta_of(self, changes: Mapping[str, Change]) -> Delta:
        """What a record says of these changes, and of what the tuned checkpoint lacks."""
        gone = {name: Change(Verdict.MISSING) for name in self.missing}
        return Delta(self.pair.base, self.pair.tuned, {**changes, **gone})

    def read(self, matrix: Matrix) -> torch.Tensor | None:
        """The base's weights (m, n) for a matrix of the tuned one; None where it has none."""
        there = self.places.get(matrix.name)
        return None if there is None else self.checkpoint.read(there.tensor, there.part)

    def weights(self, matrix: Matrix) -> torch.Tensor:
        """The same. Raises as `require_place`."""
        self.require_place(matrix)
        there = self.places[matrix.name]
        return self.checkpoint.read(there.tensor, there.part)

    def require_place(self, matrix: Matrix) -> None:
        """Raises RecordError where a tensor has no difference that could be cut or scaled, as far as headers tell."""
        there = self.places.get(matrix.name)
        alike = there is not None and there.shape == matrix.shape and there.no_spectrum is None
        if not alike or matrix.dtype not in STORED_FLOATS:
            found = "none" if there is None else f"{there.dtype} {list(there.shape)}"
            raise RecordError(
                f"{matrix.name}, {matrix.dtype} {list(matrix.shape)}: found {found} in {self.checkpoint.name}, "
                f"expected weights of this shape, its own of {', '.join(STORED_FLOATS)}; plan again, or keep it"
            )

    def difference(self, matrix: Matrix, q: torch.Tensor, device: Device, spectrum: bool = True) -> Between:
        """What became of a tensor whose tuned values are q, of any shape. spectrum: whether its difference is wanted.

        Raises NumericalError where the difference holds NaN or Inf.
        """
        W, there = self.read(matrix), self.places.get(matrix.name)
        if W is None or there is None:
            return Between(Change(Verdict.ADDED), None)
        if W.shape != q.shape:
            return Between(_resized(W, q), None)
        found = compare_tensors(W, q)
        if found.kind is Verdict.CHANGED and (cast := as_merged(W, q, device)) is not W:
            W, found = cast, compare_tensors(cast, q)
        if not spectrum or not matrix.is_matrix or found.kind is Verdict.NOT_FINITE:
            return Between(found, None)
        if found.kind is Verdict.SAME:
            return Between(found, torch.zeros(matrix.shape, dtype=torch.float64))
        if not {matrix.dtype, there.dtype} <= STORED_FLOATS.keys():  # what eight bits round to is not known here
            return Between(found, None)
        return Between(found, whitened(W, q, device))

    def matrix(self, matrix: Matrix, q: torch.Tensor, device: Device) -> torch.Tensor:
        """The biwhitened difference (m, n). Raises NumericalError where there is none."""
        change, D = self.difference(matrix, q, device)
        if D is None:
            raise NumericalError(f"{change.kind}, so there is no difference to factorise")
        return D

    def by_bytes(self, matrix: Matrix) -> Change:
        """What became of a tensor of a dtype that torch does not have, or that holds no weights."""
        there = self.places.get(matrix.name)
        if there is None:
            return Change(Verdict.ADDED)
        if there.shape != matrix.shape:
            return Change(Verdict.SHAPE)
        ours, theirs = (
            read_bytes(checkpoint.shard_of(name), checkpoint.tensors[name].start, checkpoint.tensors[name].end)
            for checkpoint, name in ((self.tuned, matrix.tensor), (self.checkpoint, there.tensor))
        )
        return Change(Verdict.SAME if there.dtype == matrix.dtype and torch.equal(ours, theirs) else Verdict.CHANGED)

    def require_unchanged(self) -> None:
        """Raises CheckpointError where the base is not what it was when it was opened."""
        require_unchanged(self.checkpoint)


def _resized(W: torch.Tensor, q: torch.Tensor) -> Change:
    """Of another shape; of one with other rows alone, as of a resized vocabulary, how many common entries moved."""
    if W.ndim != q.ndim or W.ndim == 0 or W.shape[1:] != q.shape[1:]:
        return Change(Verdict.SHAPE)
    rows = min(len(W), len(q))
    return replace(compare_tensors(W[:rows], q[:rows]), kind=Verdict.SHAPE)


def matched(theirs: Sequence[Matrix], ours: Sequence[Matrix]) -> dict[str, Matrix]:
    """The tuned one's names with the base's matrices. A tied head's place is taken by the embedding it is tied to."""
    by_name = {m.name: m for m in theirs}
    found = {m.name: by_name[m.name] for m in ours if m.name in by_name}
    taken = {m.name for m in found.values()}

    def alone(matrices: Sequence[Matrix]) -> dict[tuple[object, ...], Matrix]:
        """Those that are the only one of their kind."""
        counts = Counter(map(_key, matrices))
        return {_key(m): m for m in matrices if counts[_key(m)] == 1 and m.role != "other"}

    left = alone([m for m in theirs if m.name not in taken])
    for key, m in alone([m for m in ours if m.name not in found]).items():
        if key in left:
            found[m.name] = left[key]
    embeddings = alone([m for m in theirs if m.role == "embedding"])
    for m in ours:
        tied = embeddings.get((m.stack, m.layer, "embedding", m.expert))
        if m.name not in found and m.role == "head" and tied is not None and not any(t.role == "head" for t in theirs):
            found[m.name] = tied
    return found


def _key(m: Matrix) -> tuple[object, ...]:
    """Mixtral's experts are w1, w2, w3 each by itself, and gate, down, up where they are fused."""
    return (m.stack, m.layer, ALIASES[m.role] if m.role in ("w1", "w2", "w3") else m.role, m.expert)
