"""COPY + ADAPTER as one checkpoint, which no file holds: one tensor of it is in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.safetensors import read_bytes, virtual_shard
from laser.compensate.peft import Slot
from laser.compensate.places import ParameterPlace, StoredPiece
from laser.differences.peft import tensor_of
from laser.differences.places import of_expert


def with_adapter(copy: Checkpoint, adapter: Path, slots: Sequence[Slot]) -> Checkpoint:
    """The copy with B A added to every corrected weight, in float32, as PEFT computes it. adapter: the file."""
    where: dict[str, list[tuple[Slot, ParameterPlace, StoredPiece]]] = {}
    for slot in slots:
        for place in slot.places:
            for piece in place.pieces:
                where.setdefault(piece.copied.tensor, []).append((slot, place, piece))
    hidden = set(copy.fp8.scales.values()) if copy.fp8 else set()
    wide = where.keys() | (copy.fp8.scales.keys() if copy.fp8 else set())
    entries = [
        (info.name, "F32" if info.name in wide else info.dtype, info.shape)
        for info in copy.tensors.values()
        if info.name not in hidden
    ]

    def tensor(name: str) -> torch.Tensor:
        if name not in wide:  # by its bytes, of whatever dtype they are
            info = copy.tensors[name]
            return read_bytes(copy.shard_of(name), info.start, info.end)
        Q = copy.read(name).float()
        if name not in where:
            return Q
        for slot, place, piece in where[name]:
            A, B = factors_in(adapter, slot, place)
            update = B[slice(*piece.rows)] @ A
            if (part := piece.copied.part) is None:
                return Q + (update.T if place.transposed else update)
            part.put(Q, part.of(Q) + update)  # one of several in the tensor
        return Q

    shard = virtual_shard("adapted", copy.path, entries, tensor)
    tensors = {info.name: info for info in shard.tensors}
    return replace(copy, shards=(shard,), tensors=tensors, fp8=None, origin=copy, remade=True, index_bytes=None)


def factors_in(adapter: Path, slot: Slot, place: ParameterPlace) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, n) and B (m, r) of a place, float32, as PEFT takes them from the file."""
    A, B = (tensor_of(adapter, name).float() for name, _, _ in slot.entries)
    return of_expert(A, B, place.in_peft)
