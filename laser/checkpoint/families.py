"""From tensors to logical matrices: layer, role and expert by the family's rows, fused tensors cut into what they hold.

A tensor that is one matrix keeps its name; a matrix inside a tensor is called TENSOR[3,gate], TENSOR[3] or TENSOR[q]:
expert, role, or both. The matrices of a tensor cover it exactly, so every parameter of a checkpoint is in one of them.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from laser.checkpoint.cuts import Cut
from laser.checkpoint.family_table import FAMILIES, GUESSES, Row
from laser.checkpoint.headers import TORCH, TensorInfo
from laser.checkpoint.quantised import leftover
from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.side_files import ADAPTER
from laser.errors import CheckpointError
from laser.errors import DoubtWarning as DoubtWarning

FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes whose numbers are the weights themselves
ALIASES = {"w1": "gate", "w2": "down", "w3": "up", "gate": "w1", "down": "w2", "up": "w3"}
# Never reduced unless asked for by role: a router of 8 rows decides everything, embeddings and head are look-ups.
PROTECTED = ("router", "embedding", "position", "head", "norm", "bias", "sinks", "buffer", "scale", "vision", "other")


@dataclass(frozen=True)
class Matrix:
    """A logical matrix (or whatever else a tensor is) and where it lies, known from headers alone."""

    name: str
    role: str  # "other" for a name that the family's rows do not know
    layer: int | None
    expert: int | None
    shape: tuple[int, ...]  # (out, in), however it is stored
    dtype: str
    tensor: str  # that holds it
    cut: Cut | None = None  # its place in the tensor; None: it is the tensor
    scaled: bool = False  # FP8, and its scales are known

    @property
    def no_spectrum(self) -> str | None:
        """Why the numbers that are stored are not the weights, so that nothing can be cut; None where they are."""
        if self.dtype in FLOATS or self.scaled:
            return None
        if self.dtype.startswith("F8"):
            return f"stored as {self.dtype}, found no scales for it, and without them its values are not the weights"
        return f"stored as {self.dtype}, expected one of {', '.join(FLOATS)}, or FP8 with its scales"

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


def list_matrices(checkpoint: Checkpoint) -> list[Matrix]:
    """Everything that the checkpoint's tensors hold, in file order; see `doubts` for what had to be guessed.

    Raises CheckpointError where a fused tensor does not have the shape that config.json implies.
    """
    rows = [(row, re.compile(row.pattern)) for row in FAMILIES.get(family_of(checkpoint), GUESSES)]
    matrices = [matrix for info in checkpoint.tensors.values() for matrix in _matrices(info, rows, checkpoint.config)]
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
    rows = [(row, re.compile(row.pattern)) for row in FAMILIES.get(family_of(checkpoint), GUESSES)]
    for matrix in _matrices(info, rows, checkpoint.config) if info else ():
        if matrix.name == name:
            return matrix
    raise CheckpointError(f"{checkpoint.name} holds no matrix {name}; try laser scan --dry-run")


def read_matrix(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """The matrix (m, n) of that name, in storage dtype."""
    matrix = matrix_called(checkpoint, name)
    return checkpoint.read(matrix.tensor, matrix.cut)


def _tied(matrices: list[Matrix], config: Mapping[str, Any]) -> list[Matrix]:
    """Where config.json ties the head to the embedding, a head that is stored as well is a copy of it: what is done to
    one has to be done to the other, or transformers would untie them. So both are selected by the role embedding."""
    text = config.get("text_config")
    places = (config, text) if isinstance(text, dict) else (config,)
    if not any(place.get("tie_word_embeddings") is True for place in places):
        return matrices
    embeddings = {(m.shape, m.dtype) for m in matrices if m.role == "embedding"}
    copies = {m.name for m in matrices if m.role == "head" and (m.shape, m.dtype) in embeddings}
    return [replace(m, role="embedding") if m.name in copies else m for m in matrices]


def family_of(checkpoint: Checkpoint) -> str:
    return str(checkpoint.config.get("model_type"))


def doubts(checkpoint: Checkpoint, matrices: Sequence[Matrix]) -> str | None:
    """What a user should look at before trusting the list: guesses for an unknown family, or tensors without a row."""
    if told := leftover(checkpoint.name, checkpoint.config, checkpoint.tensors):
        warnings.warn(told, DoubtWarning, stacklevel=2)
    if (checkpoint.path / ADAPTER).is_file():
        warnings.warn(
            f"{checkpoint.name}: {ADAPTER} lies beside the weights, so transformers with peft would load its base and "
            "not these; laser reads the weights that are here, and its output has no adapter",
            DoubtWarning,
            stacklevel=2,
        )
    family = family_of(checkpoint)
    if family in FAMILIES:
        unknown = [m.name for m in matrices if m.role == "other" and len(m.shape) > 1]
        if not unknown:
            return None
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        return (
            f"{checkpoint.name}: family {family} has no such tensors, so they are kept as they are: "
            f"{', '.join(unknown[:3])}{more}; check the checkpoint, or ask for them with --roles other"
        )
    kinds: dict[tuple[str, str], int] = {}
    for matrix in matrices:
        place = (re.sub(r"\d+", "N", matrix.name), matrix.role if matrix.is_matrix else "kept, no matrix")
        kinds[place] = kinds.get(place, 0) + 1
    took = "; ".join(f"{name} ({count}) for {role}" for (name, role), count in kinds.items())
    return f"{checkpoint.name}: model_type {family!r} is not in the table of families; by name and shape took {took}"


def _matrices(info: TensorInfo, rows: list[tuple[Row, re.Pattern[str]]], config: Mapping[str, Any]) -> list[Matrix]:
    for row, pattern in rows:
        if match := pattern.fullmatch(info.name):
            found = match.groupdict()
            layer, expert = (int(found[k]) if found.get(k) else None for k in ("layer", "expert"))
            if row.axes and info.dtype in TORCH:
                return [
                    Matrix(f"{info.name}{label}", role, layer, e, cut.shape, info.dtype, info.name, cut)
                    for label, role, e, cut in _cuts(info, row, config)
                ]
            role = row.role if not row.axes else "other"  # packed numbers cannot be cut by their shape
            return [Matrix(info.name, role, layer, expert, info.shape, info.dtype, info.name)]
    return [Matrix(info.name, "other", None, None, info.shape, info.dtype, info.name)]


def _cuts(info: TensorInfo, row: Row, config: Mapping[str, Any]) -> Iterator[tuple[str, str, int | None, Cut]]:
    """(label, role, expert, cut) of each matrix in a fused tensor, in stored order of the experts."""
    dimensions, view = row.axes.split(), info.shape
    if len(dimensions) != len(view) or not math.prod(view):
        raise _unlike(info, f"{len(dimensions)} dimensions ({row.axes}), none of them empty")
    axes = row.axes.replace("*", " ").split()
    if len(axes) > len(view):
        count = _number(config, axes[0])
        if view[0] % count:
            raise _unlike(info, f"rows in {count} equal parts, one per {axes[0]}")
        view = (count, view[0] // count, *view[1:])
    # The rows of a matrix come before its columns, or it is stored transposed.
    transposed = axes.index("column") < len(axes) - 1
    fused = next((axis for axis, name in enumerate(axes) if name in ("blocks", "comb")), None)
    ranges = {row.role: None} if fused is None else _ranges(info, row, axes, view[fused], config)
    experts = range(view[0]) if axes[0] == "expert" else (None,)
    for expert in experts:
        for role, part in ranges.items():
            index = [(0, size, 1) for size in view]
            if expert is not None:
                index[0] = (expert, expert + 1, 1)
            if fused is not None and part is not None:
                index[fused] = part
            words = [str(expert)] if expert is not None else []
            words += [role] if part is not None else []
            yield f"[{','.join(words)}]" if words else "", role, expert, Cut(view, tuple(index), transposed)


def _ranges(
    info: TensorInfo, row: Row, axes: Sequence[str], size: int, config: Mapping[str, Any]
) -> dict[str, tuple[int, int, int]]:
    """role -> (start, stop, step) on the axis of `size` that the parts share."""
    count = len(row.parts)
    if "comb" in axes or "head" in axes or row.parts[0] != "q":
        if size % count:
            raise _unlike(info, f"a dimension that {count} parts share equally ({', '.join(row.parts)})")
        if "comb" in axes:
            return {role: (i, size, count) for i, role in enumerate(row.parts)}
        sizes = [size // count] * count
    else:
        width = _number(config, "width")
        sizes = [_number(config, heads) * width for heads in ("head", "key_value", "key_value")]
        if sum(sizes) != size:
            raise _unlike(info, f"{' + '.join(map(str, sizes))} rows for {', '.join(row.parts)}")
    starts = [sum(sizes[:i]) for i in range(count)]
    return {role: (start, start + n, 1) for role, start, n in zip(row.parts, starts, sizes, strict=True)}


def _unlike(info: TensorInfo, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{info.shard}: {info.name} has shape {list(info.shape)}, expected {expected} by config.json; "
        "use the config that belongs to these weights"
    )


NUMBERS = {
    "expert": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "head": ("num_attention_heads", "n_head", "n_heads"),
    "key_value": ("num_key_value_heads", "n_kv_heads", "kv_n_heads", "num_attention_heads", "n_head", "n_heads"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
}


def _number(config: Mapping[str, Any], what: str) -> int:
    """A count from config.json, wherever the family puts it. Raises CheckpointError where it is missing or absurd."""
    nested = [config[k] for k in ("text_config", "attn_config", "ffn_config", "moe") if isinstance(config.get(k), dict)]
    if what == "width":
        given = [c["head_dim"] for c in (config, *nested) if type(c.get("head_dim")) is int and c["head_dim"] > 0]
        return given[0] if given else _number(config, "hidden") // _number(config, "head")
    for key in NUMBERS[what]:
        for place in (config, *nested):
            if type(place.get(key)) is int and place[key] > 0:
                return place[key]
    raise CheckpointError(
        f"config.json holds none of {', '.join(NUMBERS[what])}, which this family's fused tensors are cut by; "
        "use the config that belongs to these weights"
    )
