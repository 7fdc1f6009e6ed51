"""List a checkpoint's logical matrices: each with its stack, layer, role and expert.

The family's rows say which they are, and fused tensors are cut into theirs. A tensor that is one matrix keeps its name;
a matrix inside a tensor is called TENSOR[3,gate], TENSOR[3] or TENSOR[q]: expert, role, or both. The matrices of a
tensor cover it exactly, so every parameter of a checkpoint is in one of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from typing import Any

import torch

from laser.checkpoint.families import (
    ENCODER_TOWERS,
    FAMILIES,
    FUSED_NAMES,
    GUESSES,
    KEPT,
    LAYER_NUMBER,
    MTP,
    MTP_JOINT,
    TOWERS,
    WRAPPERS,
    FamilyRow,
)
from laser.checkpoint.fused import number_or_none, slices_of, text_configs
from laser.checkpoint.quantised import leftover
from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.safetensors import TORCH, TensorInfo
from laser.checkpoint.slices import Slice
from laser.errors import CheckpointError
from laser.errors import DoubtWarning as DoubtWarning

FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes whose numbers are the weights themselves
ALIASES = {"w1": "gate", "w2": "down", "w3": "up", "gate": "w1", "down": "w2", "up": "w3"}
# Never reduced unless asked for by role: a router of 8 rows decides everything, embeddings and head are look-ups.
PROTECTED = (
    *("router", "embedding", "position", "head", "norm", "bias", "sinks", "buffer", "scale"),
    *("ssm", "adapter", "vision", "audio", "mtp", "other"),
)
LIKELY = 4096  # different names, numbers aside; a model has fewer than a hundred
# transformers 5 holds all experts of a layer in two parameters, whether the checkpoint has one tensor an expert (the
# first row) or those of memory (the last).
ONE_EXPERT = re.compile(r"(?P<block>.*\.)experts\.(?P<expert>\d+)\.(?P<part>\w+)\.weight")
MEMORY_NAMES = {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
MEMORY_NAMES |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
EXPERTS_IN_MEMORY = re.compile(r"(?P<module>.*\.experts)\.(?P<parameter>gate_up_proj|down_proj)")
KEPT_STACKS = ("mtp",)  # whose layers are never reduced unless asked for, although they have the roles of any layer


@dataclass(frozen=True, slots=True)
class Matrix:
    """A logical matrix (or whatever else a tensor is) and where it lies, known from headers alone."""

    name: str
    role: str  # "other" for a name that the family's rows do not know
    layer: int | None
    expert: int | None
    shape: tuple[int, ...]  # (out, in), however it is stored
    dtype: str
    tensor: str  # that holds it
    part: Slice | None = None  # its place in the tensor; None: it is the tensor
    scaled: bool = False  # FP8, and its scales are known
    stack: str = ""  # whose layers are counted: "" the language model's own, else "mtp", "encoder", "vision", "audio"

    @property
    def no_spectrum(self) -> str | None:
        """Why the numbers that are stored are not the weights, so that nothing can be cut; None where they are."""
        if self.dtype in FLOATS or self.scaled:
            return None
        if self.dtype.startswith("F8"):
            return f"stored as {self.dtype}, found no scales for it, and without them its values are not the weights"
        return f"stored as {self.dtype}, expected one of {', '.join(FLOATS)}, or FP8 with its scales"

    @property
    def place(self) -> int | str | None:
        return place_of(self.layer, self.stack)

    @property
    def is_matrix(self) -> bool:
        """Two-dimensional, not empty: something that has a singular spectrum."""
        return len(self.shape) == 2 and min(self.shape) > 0

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def cost(self) -> int:
        """m * n * min(m, n): proportional to the work of a factorisation; 0 for what is no matrix."""
        return 0 if not self.is_matrix else self.shape[0] * self.shape[1] * min(self.shape)


def place_of(layer: int | None, stack: str) -> int | str | None:
    """A layer as --layers spells it: 3, or mtp:3; None for what lies in no layer."""
    return layer if layer is None or not stack else f"{stack}:{layer}"


def list_matrices(checkpoint: Checkpoint) -> list[Matrix]:
    """Everything that the checkpoint's tensors hold, in file order; see `doubts` for what had to be guessed.

    Raises CheckpointError where a fused tensor does not have the shape that config.json implies.
    """
    names = _Names(checkpoint)
    matrices = [matrix for info in checkpoint.tensors.values() for matrix in names.matrices(info)]
    scales = set(checkpoint.fp8.scales.values()) if checkpoint.fp8 else ()
    matrices = [replace(m, role="scale") if m.tensor in scales else m for m in matrices]
    weights = set(checkpoint.fp8.scales) if checkpoint.fp8 else ()
    matrices = [replace(m, scaled=True) if m.tensor in weights else m for m in matrices]
    seen: set[str] = set()
    for matrix in matrices:
        if matrix.name in seen:
            raise CheckpointError(f"{checkpoint.name}: two matrices would be called {matrix.name}; rename that tensor")
        seen.add(matrix.name)
    return _tied(matrices, checkpoint.config)


def matrix_called(checkpoint: Checkpoint, name: str) -> Matrix:
    """One of `list_matrices`, found without listing them all. Raises CheckpointError where none has that name."""
    info = checkpoint.tensors.get(name) or checkpoint.tensors.get(name.rpartition("[")[0])
    for matrix in _Names(checkpoint).matrices(info) if info else ():
        if matrix.name == name:
            return matrix
    raise CheckpointError(f"{checkpoint.name} holds no matrix {name}; try laser scan --dry-run")


def read_matrix(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """The matrix (m, n) of that name, in storage dtype."""
    matrix = matrix_called(checkpoint, name)
    return checkpoint.read(matrix.tensor, matrix.part)


def _tied(matrices: list[Matrix], config: Mapping[str, Any]) -> list[Matrix]:
    """Where config.json ties the head to the embedding, a head that is stored as well is a copy of it: what is done to
    one has to be done to the other, or transformers would untie them. So both are selected by the role embedding."""
    if not any(place.get("tie_word_embeddings") is True for place in (config, *text_configs(config))):
        return matrices
    embeddings = {(m.shape, m.dtype) for m in matrices if m.role == "embedding"}
    copies = {m.name for m in matrices if m.role == "head" and (m.shape, m.dtype) in embeddings}
    return [replace(m, role="embedding") if m.name in copies else m for m in matrices]


def family_of(checkpoint: Checkpoint) -> str:
    return str(checkpoint.config.get("model_type"))


@cache
def _rows_of(family: str) -> tuple[tuple[FamilyRow, re.Pattern[str]], ...]:
    """The rows to try for a family, in order: what is kept in all families, then its own or guesses."""
    return tuple((row, re.compile(row.pattern)) for row in (*KEPT, *FAMILIES.get(family, GUESSES)))


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


class _Names:
    """What a checkpoint's names say: stack, layer, expert and role of each tensor."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.family = family_of(checkpoint)

    @cached_property
    def depth(self) -> int | None:
        """How many layers the language model runs, where config.json says; layers behind them predict more tokens."""
        return None if self.config.get("is_encoder_decoder") is True else number_or_none(self.config, "depth")

    @cached_property
    def encoder(self) -> str:
        """The stack of layers in an encoder: the model's own if there are no others."""
        names = {unwrapped(_alike(name)) for name in self.checkpoint.tensors}
        if not any(_compiled(LAYER_NUMBER).search(n) and not _in_encoder(n) and not _tower(n) for n in names):
            return ""
        towers = (role for role, kinds in ENCODER_TOWERS.items() if _compiled(kinds).fullmatch(self.family))
        return next(towers, "encoder")

    def stack(self, name: str, layer: int | None) -> str:
        if tower := _tower(name):
            return tower
        if _compiled(MTP).match(name):
            return "mtp"
        if _in_encoder(name):
            return self.encoder
        return "mtp" if layer is not None and self.depth is not None and layer >= self.depth else ""

    @cached_property
    def _counts(self) -> tuple[int, int]:
        return number_or_none(self.config, "head") or 0, number_or_none(self.config, "expert") or 0

    def _decides(self, shape: tuple[int, ...]) -> bool:
        """Whether a matrix whose name says nothing chooses experts or gates heads: flat, with a row for each."""
        heads, experts = self._counts
        return len(shape) == 2 and 4 * shape[0] <= shape[1] and (shape[0] <= heads or shape[0] == experts)

    def matrices(self, info: TensorInfo) -> list[Matrix]:
        found = _compiled(LAYER_NUMBER).search(info.name)
        layer = int(found[1]) if found else None
        name = unwrapped(_alike(info.name))
        stack = self.stack(name, layer)
        expert = _compiled(r"\.experts\.(\d+)\.").search(info.name)
        whole = Matrix(
            info.name,
            "other",
            layer,
            int(expert[1]) if expert else None,
            info.shape,
            info.dtype,
            info.name,
            stack=stack,
        )
        if stack in TOWERS:
            return [replace(whole, role=stack)]
        if stack == "mtp":
            name = _compiled(MTP).sub("", name, count=1)
            name = f"layers.{name}" if name[:1].isdigit() else name
            if _compiled(MTP_JOINT).fullmatch(name):
                return [replace(whole, role="mtp")]
        row = _row_of(self.family, name)
        if row is None:
            return [replace(whole, role="mtp" if stack == "mtp" else "other")]
        if row.axes and info.dtype in TORCH:
            return [
                replace(whole, name=info.name + label, role=role, expert=e, shape=part.shape, part=part)
                for label, role, e, part in slices_of(info, row, self.config)
            ]
        if row.role == "linear" and self.family not in FAMILIES and self._decides(info.shape):
            return [replace(whole, role="router")]
        # Packed numbers cannot be cut by their shape.
        return [replace(whole, role="other" if row.axes else row.role)]


def _alike(name: str) -> str:
    """The name with 0 for every layer and expert: what is found out for one of them holds for all, and is kept."""
    return _compiled(r"(?<![^.])\d+(?![^.])").sub("0", name)


@lru_cache(LIKELY)
def _row_of(family: str, name: str) -> FamilyRow | None:
    return next((row for row, pattern in _rows_of(family) if pattern.fullmatch(name)), None)


@lru_cache(LIKELY)
def unwrapped(name: str) -> str:
    """A tensor's name without what wrappers put into it."""
    for prefix in WRAPPERS:
        name = _compiled(prefix).sub("", name)
    return name


@lru_cache(LIKELY)
def _tower(name: str) -> str | None:
    return next((role for role, pattern in TOWERS.items() if _compiled(pattern).fullmatch(name)), None)


@lru_cache(LIKELY)
def _in_encoder(name: str) -> bool:
    return _compiled(r"(?:(?!\w*decoder\.)\w+\.)*?encoder\.").match(name) is not None


def doubts(checkpoint: Checkpoint, matrices: Sequence[Matrix]) -> str | None:
    """What a user should look at before trusting the list: guesses for an unknown family, tensors without a row, or
    names that transformers does not load. At most six lines."""
    family = family_of(checkpoint)
    lines = [stated] if (stated := leftover(checkpoint.name, checkpoint.config, checkpoint.tensors)) else []
    for prefix, cure in WRAPPERS.items():
        wrapped = [m.tensor for m in matrices if _compiled(prefix).search(m.tensor)]
        if wrapped:
            found = _compiled(prefix).search(wrapped[0])
            lines.append(
                f"{checkpoint.name}: {len(set(wrapped))} names hold {found[0] if found else ''} as in {wrapped[0]}, "
                f"which transformers does not load; {cure}, and scan that"
            )
    unknown = [m for m in matrices if m.role == "other" and len(m.shape) > 1]
    if family in FAMILIES:
        if unknown:
            lines.append(
                f"{checkpoint.name}: family {family} has no such tensors, so they are kept as they are: "
                f"{_folded(unknown)}; check the checkpoint, or ask for them with --roles other"
            )
        return "\n".join(lines) or None
    lines.append(f"{checkpoint.name}: model_type {family!r} is not in the table of families; roles are guessed by name")
    fused, kept = [], []
    sums = {"linear": _sums(checkpoint.config), "q": _gated(checkpoint.config)}
    for m in matrices:
        if m.is_matrix and (m.role in PROTECTED or m.stack in KEPT_STACKS):
            kept.append(m)
        elif m.is_matrix and _looks_fused(m, sums):
            fused.append(m)
    # Experts in three dimensions, whatever their name is guessed to be.
    unreached = [m for m in matrices if len(m.shape) > 2 and m.role not in set(PROTECTED) - {"other"}]
    for what, these in (
        ("cut as one though probably fused (--exclude leaves them out)", fused),
        ("not reached", unreached),
        ("kept", kept),
    ):
        if these:
            lines.append(f"  {what}: {_folded(these)}")
    return "\n".join(lines)


def _folded(matrices: Sequence[Matrix], most: int = 6) -> str:
    """Names with N for their numbers, and how many each stands for."""
    kinds: dict[str, int] = {}
    for matrix in matrices:
        kind = _compiled(r"\d+").sub("N", matrix.name)
        kinds[kind] = kinds.get(kind, 0) + 1
    shown = [f"{kind} ({count})" for kind, count in list(kinds.items())[:most]]
    left = sum(list(kinds.values())[most:])
    return ", ".join(shown) + (f" and {left} more" if left else "")


def _sums(config: Mapping[str, Any]) -> set[int]:
    """How many rows q, k and v, or gate and up, have together, as far as config.json says."""
    head, key_value, width, wide = (
        number_or_none(config, what) for what in ("head", "key_value", "width", "intermediate_size")
    )
    sums = {(head + 2 * key_value) * width} if head and key_value and width else set()
    return sums | ({2 * wide} if wide else set())


def _gated(config: Mapping[str, Any]) -> set[int]:
    """How many rows the queries have together with a gate of their output, as Qwen3-Next stores them."""
    head, width = number_or_none(config, "head"), number_or_none(config, "width")
    return {2 * head * width} if head and width else set()


def _looks_fused(matrix: Matrix, sums: Mapping[str, set[int]]) -> bool:
    """By its name, or because it has as many rows as several matrices together."""
    leaf = matrix.name.removesuffix(".weight").rpartition(".")[2]
    return _compiled(FUSED_NAMES).fullmatch(leaf) is not None or matrix.shape[0] in sums.get(matrix.role, ())
