"""The adapter as PEFT has it: its file, one tensor in memory at a time, and its config.

What its tensors are called, and how those of experts lie in one another, is in differences/places.py. Tried with peft
0.21, which warns that it ignores the rank_pattern of parameters, and goes by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laser.checkpoint.safetensors import BITS, TORCH, HeaderEntry, pieces, virtual_shard
from laser.compensate.places import ParameterPlace
from laser.differences.places import names_at, of_experts, stems
from laser.differences.unmerge import targets
from laser.files import disk_errors, replacing
from laser.spectral.correction import FACTOR_DTYPE

FACTOR_DTYPE_NAME = next(name for name, dtype in TORCH.items() if dtype is FACTOR_DTYPE)
# A place and a rank -> A (r, n) and B (m, r), of lower rank where it shows fewer directions
LoraFactors = Callable[[ParameterPlace, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Slot:
    """One parameter's adapter: its places, its rank, and where PEFT keeps it."""

    parameter: str
    rank: int
    places: tuple[ParameterPlace, ...]
    stem: str

    @property
    def entries(self) -> list[HeaderEntry]:
        """A and B."""
        (m, n), wide = self.places[0].shape, self.rank * self.places[0].experts
        shapes = ((wide, n), (m, wide))
        names = names_at(self.stem, self.places[0].in_peft)
        return [(name, FACTOR_DTYPE_NAME, shape) for name, shape in zip(names, shapes, strict=True)]

    def tensor(self, name: str, factors: LoraFactors) -> torch.Tensor:
        """A or B, of all experts."""
        first = self.places[0]
        found = {place.expert or 0: factors(place, self.rank) for place in self.places}
        both = found[0] if first.expert is None else of_experts(found, first.in_peft)
        return both[name == self.entries[1][0]].contiguous()


def slots_of(places: Sequence[ParameterPlace], ranks: Mapping[str, int]) -> list[Slot]:
    """The adapters of all parameters whose rank is not 0. places: in the order of the model's parameters."""
    groups: dict[str, list[ParameterPlace]] = {}
    for place in places:
        if ranks[place.parameter]:
            groups.setdefault(place.parameter, []).append(place)
    stem_of = stems(place.in_peft for group in groups.values() for place in group)
    return [Slot(of, ranks[of], tuple(group), stem_of[group[0].in_peft.weight]) for of, group in groups.items()]


def write_adapter(path: Path, slots: Sequence[Slot], factors: LoraFactors) -> None:
    """The adapter's safetensors file, one tensor in memory at a time. Raises OutputError."""
    by_name = {entry[0]: slot for slot in slots for entry in slot.entries}
    entries = [entry for slot in slots for entry in slot.entries]
    shard = virtual_shard(path.name, path, entries, lambda name: by_name[name].tensor(name, factors))
    with disk_errors(path), replacing(path) as file:
        for piece in pieces(shard, 0, shard.size):
            file.write(piece)


def stored_bits(slots: Sequence[Slot]) -> int:
    """Of all numbers in the adapter."""
    return sum(shape[0] * shape[1] * BITS[dtype] for slot in slots for _, dtype, shape in slot.entries)


def config_of(base: str, slots: Sequence[Slot], modules: Sequence[str]) -> dict[str, Any]:
    """adapter_config.json: every adapter scaled by 1. modules: every linear layer of the model."""
    largest = max(slot.rank for slot in slots)
    weights = {slot.places[0].in_peft.weight: slot for slot in slots}
    parameters = sorted(name for name, slot in weights.items() if slot.places[0].expert is not None)
    others = {name: slot.rank for name, slot in weights.items() if slot.rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(slot.places[0].transposed for slot in slots),
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": targets(weights.keys() - set(parameters), modules),
        "target_parameters": parameters or None,
        "rank_pattern": others,
        "alpha_pattern": others,
        "modules_to_save": None,
    }
