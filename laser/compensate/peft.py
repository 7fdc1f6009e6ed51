"""The adapter as PEFT has it: what its tensors are called, how those of experts lie in one another, and its config.

A module's adapter is lora_A (r, n) and lora_B (m, r). That of a parameter with E experts (target_parameters) is
lora_A (E r, n), experts first, and lora_B (m, r E), experts last. Parameters of one module are wrapped one around the
other, in the module's order, and the inner one is called base_layer. Tried with peft 0.21, which warns that it ignores
the rank_pattern of parameters, and goes by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laser.checkpoint.safetensors import BITS, TORCH, HeaderEntry, pieces, virtual_shard
from laser.compensate.places import ParameterPlace
from laser.differences.unmerge import PEFT, targets
from laser.files import disk_errors, replacing
from laser.spectral.correction import FACTOR_DTYPE

FACTOR_DTYPE_NAME = next(name for name, dtype in TORCH.items() if dtype is FACTOR_DTYPE)
# A place and a rank -> B (m, r) and A (r, n)
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
        m, n = self.places[0].shape
        wide = self.rank * self.places[0].experts
        return [
            (f"{self.stem}.lora_A.weight", FACTOR_DTYPE_NAME, (wide, n)),
            (f"{self.stem}.lora_B.weight", FACTOR_DTYPE_NAME, (m, wide)),
        ]

    def tensor(self, name: str, factors: LoraFactors) -> torch.Tensor:
        """A or B, of all experts."""
        which = 1 if name.endswith(".lora_A.weight") else 0
        if self.places[0].expert is None:
            return factors(self.places[0], self.rank)[which].contiguous()
        (m, n), experts = self.places[0].shape, self.places[0].experts
        shape = (experts, self.rank, n) if which else (m, self.rank, experts)
        whole = torch.zeros(shape, dtype=FACTOR_DTYPE)
        for place in self.places:
            found = factors(place, self.rank)[which]  # of lower rank where an expert shows fewer directions
            if which:
                whole[place.expert, : len(found)] = found
            else:
                whole[:, : found.shape[1], place.expert] = found
        return whole.reshape(self.rank * experts, n) if which else whole.reshape(m, self.rank * experts)


def slots_of(places: Sequence[ParameterPlace], ranks: Mapping[str, int]) -> list[Slot]:
    """The adapters of all parameters whose rank is not 0. places: in the order of the model's parameters."""
    groups: dict[str, list[ParameterPlace]] = {}
    for place in places:
        if ranks[place.parameter]:
            groups.setdefault(place.parameter, []).append(place)
    wrapped: dict[str, list[str]] = {}
    for parameter, group in groups.items():
        if group[0].expert is not None:
            wrapped.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    found = []
    for parameter, group in groups.items():
        module = parameter.rpartition(".")[0]
        around = wrapped.get(module, [])
        inner = ".base_layer" * (len(around) - 1 - around.index(parameter)) if parameter in around else ""
        found.append(Slot(parameter, ranks[parameter], tuple(group), PEFT + module + inner))
    return found


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
    of_modules = {s.parameter.rpartition(".")[0]: s.rank for s in slots if s.places[0].expert is None}
    parameters = {slot.parameter: slot.rank for slot in slots if slot.places[0].expert is not None}
    others = {name: rank for name, rank in {**of_modules, **parameters}.items() if rank != largest}
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
        "target_modules": targets(of_modules, modules),
        "target_parameters": sorted(parameters) or None,
        "rank_pattern": others,
        "alpha_pattern": others,
        "modules_to_save": None,
    }
