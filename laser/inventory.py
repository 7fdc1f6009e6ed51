"""What a checkpoint holds, by its headers alone: layers, experts, roles, shapes, bytes, what would be left alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from laser.checkpoint.families import FAMILIES
from laser.checkpoint.matrices import Matrix, doubts, family_of, list_matrices
from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.safetensors import TORCH
from laser.selection import MAIN, Selection


@dataclass(frozen=True)
class Kinds:
    """Tensors that are alike. bytes: as they are stored. why_not: what keeps them from being cut unless they are asked
    for by name; None where a scan measures them."""

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
    fp8: how many tensors are FP8 with scales. doubts: what to look at before the list is trusted
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
    kinds: tuple[Kinds, ...]
    doubts: str | None


def take_inventory(checkpoint: Checkpoint) -> Inventory:
    """What the checkpoint holds. Reads headers only. Raises CheckpointError as `list_matrices`."""
    matrices = list_matrices(checkpoint)
    chosen, found = Selection(), dict[tuple[str, str, tuple[int, ...], str], list[Matrix]]()
    layers: dict[str, set[int]] = {}
    for m in matrices:
        found.setdefault((m.stack or MAIN, m.role, m.shape, m.dtype), []).append(m)
        if m.layer is not None:
            layers.setdefault(m.stack or MAIN, set()).add(m.layer)

    def stored(m: Matrix) -> int:
        info = checkpoint.tensors[m.tensor]
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
        len(checkpoint.shards),
        len(checkpoint.tensors),
        sum(kind.parameters for kind in kinds),
        sum(info.end - info.start for info in checkpoint.tensors.values()),
        {stack: len(numbers) for stack, numbers in layers.items()},
        len({m.expert for m in matrices if m.expert is not None}),
        not any(m.role == "head" for m in matrices) and any(m.role == "embedding" for m in matrices),
        len(checkpoint.fp8.scales) if checkpoint.fp8 else 0,
        tuple(sorted(kinds, key=lambda kind: (kind.stack != MAIN, kind.stack, kind.why_not is not None, -kind.bytes))),
        doubts(checkpoint, matrices),
    )
