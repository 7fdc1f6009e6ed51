"""What a checkpoint holds, by its headers alone: layers, experts, roles, shapes, bytes, what would be left alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from laser.checkpoint.families import FAMILIES
from laser.checkpoint.matrices import Matrix, doubts, family_of, list_matrices
from laser.checkpoint.packed import find_packings
from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.safetensors import TORCH
from laser.selection import MAIN, Selection


@dataclass(frozen=True)
class Kinds:
    """Tensors that are alike. bytes: as they are stored. dtype: likewise, of packed ones after the packing's name.

    why_not: what keeps them from being cut unless they are asked for by name; None where a scan measures them.
    """

    stack: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    parameters: int
    bytes: int
    why_not: str | None


@dataclass(frozen=True)
class Inventory:
    """What a checkpoint holds. layers: stack -> how many; "decoder" is the language model's own.

    known: whether laser's table has the family; roles of any other are guessed. tied: the head is the embedding.
    tensors, bytes: as the files hold them. fp8: how many tensors are FP8 with scales. packed: the format of packed
    weights, which are listed as what they stand for. doubts: what to look at before the list is trusted
    """

    model: str
    family: str
    known: bool
    shards: int
    tensors: int
    parameters: int
    bytes: int
    layers: Mapping[str, int]
    experts: int
    tied: bool
    fp8: int
    packed: str | None
    kinds: tuple[Kinds, ...]
    doubts: str | None


def take_inventory(checkpoint: Checkpoint) -> Inventory:
    """What the checkpoint holds. Reads headers only. Raises CheckpointError as `list_matrices`."""
    matrices = list_matrices(checkpoint)
    files = checkpoint.origin if checkpoint.packed and checkpoint.origin else checkpoint
    packings = {packing.weight: packing for packing in find_packings(files)} if checkpoint.packed else {}
    handed_out: dict[str, int] = {}  # weights of a packed tensor whose bytes are told of already
    chosen, found = Selection(), dict[tuple[str, str, tuple[int, ...], str], list[Matrix]]()
    layers: dict[str, set[int]] = {}
    sizes = {info.name: info.end - info.start for info in files.tensors.values()}

    def dtype_of(m: Matrix) -> str:
        if m.tensor not in packings:
            return m.dtype
        packing = packings[m.tensor]
        return f"{packing.kind} {files.tensors[max(packing.parts.values(), key=sizes.__getitem__)].dtype}"

    for m in matrices:
        found.setdefault((m.stack or MAIN, m.role, m.shape, dtype_of(m)), []).append(m)
        if m.layer is not None:
            layers.setdefault(m.stack or MAIN, set()).add(m.layer)

    def stored(m: Matrix) -> int:
        info = checkpoint.tensors[m.tensor]
        if m.tensor in packings:  # matrices of one packed tensor share its bytes, to the last of them
            whole = sum(sizes[part] for part in packings[m.tensor].parts.values())
            before = handed_out.get(m.tensor, 0)
            handed_out[m.tensor] = before + m.parameters
            of = math.prod(info.shape)
            return whole * handed_out[m.tensor] // of - whole * before // of
        return info.end - info.start if m.part is None else m.parameters * TORCH[m.dtype].itemsize

    kinds = []
    for (stack, role, shape, dtype), these in found.items():
        why = chosen.why_not(these[0])
        kinds.append(
            Kinds(
                stack,
                role,
                shape,
                dtype,
                len(these),
                sum(m.parameters for m in these),
                sum(map(stored, these)),
                None if why is None else why.text,
            )
        )
    return Inventory(
        checkpoint.name,
        family_of(checkpoint),
        family_of(checkpoint) in FAMILIES,
        len(files.shards),
        len(files.tensors),
        sum(kind.parameters for kind in kinds),
        sum(sizes.values()),
        {stack: len(numbers) for stack, numbers in layers.items()},
        len({m.expert for m in matrices if m.expert is not None}),
        not any(m.role == "head" for m in matrices) and any(m.role == "embedding" for m in matrices),
        len(checkpoint.fp8.scales) if checkpoint.fp8 else 0,
        checkpoint.packed,
        tuple(sorted(kinds, key=lambda kind: (kind.stack != MAIN, kind.stack, kind.why_not is not None, -kind.bytes))),
        doubts(checkpoint, matrices),
    )
