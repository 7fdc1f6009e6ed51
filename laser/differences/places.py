"""Where PEFT has an adapter's factors: under names of modules in memory, which a checkpoint's tensors need not have.

A module's A and B lie beside its name. transformers 5 holds all experts of a layer in two parameters, gate_up_proj and
down_proj, however they are stored. PEFT has one A and one B for such a parameter of E experts:

    lora_A (E r, n): the rows e r to (e + 1) r are A of expert e
    lora_B (m, r E): the columns e, e + E, e + 2 E, ... are B of expert e

Both parameters are of one module, and wrapped one after the other: that of down_proj outside, where both are adapted.
An embedding is looked up, not multiplied: PEFT calls its factors lora_embedding_A and _B, and its update is (B A)^T.
Which module is what, and what it is called, is seen in memory where transformers builds the model (in_memory.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch

from laser.checkpoint.matrices import EXPERTS_IN_MEMORY, MEMORY_NAMES, ONE_EXPERT, Matrix
from laser.differences.in_memory import WEIGHT, Memory
from laser.records import SPARSE

PEFT = "base_model.model."  # before every name in a PEFT adapter
KEPT_FACTORS = 4  # A and B of both parameters of a layer: every expert in turn is a part of them
PEFT_FORMULAS = {"module": "once", "embedding": "delta-first", "parameter": "delta-first"}  # by the group of a place


Key = tuple[object, ...]


@dataclass(frozen=True)
class ModulePlace:
    """Of one matrix in the weight that PEFT adapts.

    module: in memory; parameter: of it, where PEFT adapts that by its name, as those that hold experts
    rows: of the whole weight; start: the first of them that are the matrix's, if they are neighbours
    """

    module: str
    rows: int
    start: int | None = field(default=None, metadata=SPARSE)
    parameter: str | None = field(default=None, metadata=SPARSE)
    expert: int | None = field(default=None, metadata=SPARSE)
    experts: int | None = field(default=None, metadata=SPARSE)
    embedding: bool = field(default=False, metadata=SPARSE)

    @property
    def weight(self) -> str:
        """The adapted weight's name, for rank_pattern and target_parameters."""
        return f"{self.module}.{self.parameter}" if self.parameter else self.module

    @property
    def group(self) -> str:
        """PEFT merges these by formulas of their own."""
        return "parameter" if self.parameter else "embedding" if self.embedding else "module"


def module_places(matrices: Sequence[Matrix], memory: Memory | None = None) -> dict[str, ModulePlace]:
    """The matrices of a checkpoint that PEFT can adapt, by name; without `memory` as their tensors' names have it."""
    gates: dict[Key, int] = {}
    experts: dict[Key, set[int]] = {}
    for m in matrices:
        if m.role in ("gate", "w1") and m.is_matrix:
            gates[m.stack, m.layer, m.expert] = m.shape[0]
        if m.expert is not None:
            experts.setdefault((m.stack, m.layer, m.role), set()).add(m.expert)
    found = {}
    for m in matrices:
        if m.is_matrix and m.role not in ("router", "position"):
            apart = m.part is None and ONE_EXPERT.fullmatch(m.name)
            place = _one_of(m, apart, gates, experts) if apart else _in_one(m)
            if place is not None and memory is not None:
                place = _seen_in(memory, m, place)
            if place is not None:
                found[m.name] = place
    return found


def _one_of(
    m: Matrix, name: re.Match[str], gates: Mapping[Key, int], experts: Mapping[Key, set[int]]
) -> ModulePlace | None:
    """Of an expert's matrix that is a tensor of its own; in memory it is part of a parameter."""
    parameter, numbers = MEMORY_NAMES.get(name["part"]), experts.get((m.stack, m.layer, m.role), set())
    if parameter is None or numbers != set(range(len(numbers))):
        return None
    module = name["block"].replace(".block_sparse_moe.", ".mlp.") + "experts"  # Mixtral's has another name in memory
    if parameter == "down_proj":
        return ModulePlace(module, m.shape[0], 0, parameter, m.expert, len(numbers))
    gate = gates.get((m.stack, m.layer, m.expert))
    if gate is None:
        return None
    start = gate if name["part"] in ("w3", "up_proj") else 0
    return ModulePlace(module, 2 * gate, start, parameter, m.expert, len(numbers))


def _in_one(m: Matrix) -> ModulePlace | None:
    """Of a matrix whose tensor is what it is in memory, or part of such a one."""
    if m.part is not None and m.expert is not None:
        every = EXPERTS_IN_MEMORY.fullmatch(m.tensor)
        if every is None:
            return None
        rows = m.part.view[-1] if m.part.transposed else prod(m.part.view[1:-1])
        return ModulePlace(every["module"], rows, None, every["parameter"], m.expert, m.part.view[0])
    if not m.tensor.endswith(WEIGHT) or (m.part is not None and m.part.transposed):
        return None
    rows = m.shape[0] if m.part is None else prod(m.part.view[:-1])
    return ModulePlace(m.tensor.removesuffix(WEIGHT), rows, None if m.part else 0, embedding=m.role == "embedding")


def _seen_in(memory: Memory, m: Matrix, place: ModulePlace) -> ModulePlace | None:
    """The place by its names in memory; None where PEFT adapts no such module, or would turn its factors round."""
    name = memory.names.get(m.tensor, "")
    if place.parameter is None:
        module = name.removesuffix(WEIGHT)
        kind = memory.adapted_as(module) if name.endswith(WEIGHT) else None
        if kind is None:
            return None
        how = {"embedding": kind == "embedding", "parameter": WEIGHT[1:] if kind == "parameter" else None}
        return replace(place, module=module, **how)
    module, _, parameter = name.rpartition(".")
    if parameter != place.parameter:
        return None
    turned = m.part is not None and m.part.transposed and m.part.view == memory.shapes[name]
    return None if turned != (module in memory.transposed) else replace(place, module=module)


def rows_in_parameter(m: Matrix, place: ModulePlace) -> torch.Tensor:
    """Which rows of the adapted weight are the matrix's, (rows of m,), int64."""
    if place.start is not None or m.part is None:
        start = place.start or 0
        return torch.arange(start, start + m.shape[0])
    index, every = m.part.index, torch.arange(place.rows)
    if m.part.transposed:
        return every[slice(*index[-1])]
    first = 0 if place.expert is None else 1
    view = every.reshape(m.part.view[first:-1])
    return view[tuple(slice(*axis) for axis in index[first:-1])].reshape(-1)


def units(
    matrices: Iterable[Matrix], places: Mapping[str, ModulePlace], modules: Mapping[str, str] | None = None
) -> list[tuple[Matrix, ...]]:
    """The matrices that PEFT adapts together, as gate and up of an expert: their updates share their rows' space.

    modules: of tensors that PEFT keeps whole together, as weight and bias of a norm, by name
    """
    found: dict[object, list[Matrix]] = {}
    for m in matrices:
        place, module = places.get(m.name), (modules or {}).get(m.name)
        key = ("whole", module) if module else (place.weight, place.expert) if place else m.name
        found.setdefault(key, []).append(m)
    return [tuple(each) for each in found.values()]


def stems(places: Iterable[ModulePlace]) -> dict[str, str]:
    """What stands before `.lora_A` in the adapter's file, for the weight of each place."""
    adapted = list(places)
    both = Counter(module for module, _ in {(p.module, p.parameter) for p in adapted if p.parameter})
    found = {}
    for place in adapted:
        inside = place.parameter == "gate_up_proj" and both[place.module] > 1
        found[place.weight] = PEFT + place.module + (".base_layer" if inside else "")
    return found


def names_at(stem: str, place: ModulePlace) -> tuple[str, str]:
    """What PEFT calls A and B."""
    if place.embedding:
        return f"{stem}.lora_embedding_A", f"{stem}.lora_embedding_B"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def of_expert(A: torch.Tensor, B: torch.Tensor, place: ModulePlace) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, n) and B (rows, r) of a place, from the factors as PEFT's file has them."""
    if place.embedding:
        return B.T, A.T
    if place.expert is None or place.experts is None:
        return A, B
    rank = len(A) // place.experts
    return A[place.expert * rank : (place.expert + 1) * rank], B[:, place.expert :: place.experts]


def of_experts(
    factors: Mapping[int, tuple[torch.Tensor, torch.Tensor]], place: ModulePlace
) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's A and B of a parameter from those (A, B) of some of its experts; zeros make up for lower ranks."""
    E, rank = place.experts or 1, max(len(A) for A, _ in factors.values())
    some = next(iter(factors.values()))[0]
    A, B = some.new_zeros(E, rank, some.shape[1]), some.new_zeros(place.rows, rank, E)
    for expert, (a, b) in factors.items():
        A[expert, : len(a)], B[:, : b.shape[1], expert] = a, b
    return A.reshape(E * rank, -1), B.reshape(place.rows, rank * E)
