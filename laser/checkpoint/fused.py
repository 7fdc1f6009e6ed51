"""Fused tensors: where the matrices of one stored tensor lie in it.

The family's row gives the axes, config.json the numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from laser.checkpoint.families import NUMBERS, FamilyRow
from laser.checkpoint.safetensors import TensorInfo
from laser.checkpoint.slices import Slice
from laser.errors import CheckpointError

TEXT_CONFIGS = ("text_config", "llm_config", "language_config")  # of the language model inside a model of several


def slices_of(
    info: TensorInfo, row: FamilyRow, config: Mapping[str, Any]
) -> Iterator[tuple[str, str, int | None, Slice]]:
    """(label, role, expert, slice) of each matrix in a fused tensor, in stored order of the experts.

    Raises CheckpointError where the tensor does not have the shape that config.json implies.
    """
    axes, view = _layout(info, row, config)
    # The rows of a matrix come before its columns, or it is stored transposed.
    transposed = axes.index("column") < len(axes) - 1
    fused = next((axis for axis, name in enumerate(axes) if name in ("blocks", "comb")), None)
    groups = 1 if fused is None or axes[0] in ("expert", "column", "blocks") else view[0]
    ranges = {row.role: None} if fused is None else _ranges(info, row, axes[fused], view[fused], groups, config)
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
            yield f"[{','.join(words)}]" if words else "", role, expert, Slice(view, tuple(index), transposed)


def _layout(info: TensorInfo, row: FamilyRow, config: Mapping[str, Any]) -> tuple[list[str], tuple[int, ...]]:
    """The axes' names and the tensor's shape in them, by the first of the row's layouts that the shape allows."""
    layouts = [layout.split() for layout in row.axes.split("|")]
    for words in layouts:
        sized = [word.partition("=") for word in words]
        dimensions = [name for name, _, _ in sized]
        if len(dimensions) != len(info.shape) or not math.prod(info.shape):
            expected = f"{len(words)} dimensions ({' '.join(words)}), none of them empty"
            raise _other_shape(info, expected)
        wanted = [
            config_number(config, size) if size else found
            for (_, _, size), found in zip(sized, info.shape, strict=True)
        ]
        if wanted == list(info.shape):
            break
    else:
        raise _other_shape(info, " or ".join(" x ".join(words) for words in layouts))
    axes, view = " ".join(dimensions).replace("*", " ").split(), info.shape
    if len(axes) > len(view):
        count = config_number(config, axes[0])
        if view[0] % count:
            raise _other_shape(info, f"rows in {count} equal parts, one per {axes[0]}")
        view = (count, view[0] // count, *view[1:])
    return axes, view


def _ranges(
    info: TensorInfo, row: FamilyRow, axis: str, size: int, groups: int, config: Mapping[str, Any]
) -> dict[str, tuple[int, int, int]]:
    """role -> (start, stop, step) on the axis of `size` that the parts share, in each of the groups."""
    roles, widths = zip(*(part.partition("=")[::2] for part in row.parts), strict=True)
    count = len(roles)
    if not any(widths):
        if size % count:
            raise _other_shape(info, f"a dimension that {count} parts share equally ({', '.join(roles)})")
        if axis == "comb":
            return {role: (i, size, count) for i, role in enumerate(roles)}
        sizes = [size // count] * count
    else:
        known = [
            math.prod(config_number(config, factor) for factor in width.split("*")) // groups if width != "*" else 0
            for width in widths
        ]
        rest = size - sum(known)
        sizes = [rest if width == "*" else n for width, n in zip(widths, known, strict=True)]
        if ("*" not in widths and rest) or min(sizes) < 1:
            rows = " + ".join("more" if width == "*" else str(n) for width, n in zip(widths, known, strict=True))
            each = f" in each of {groups} groups" if groups > 1 else ""
            raise _other_shape(info, f"{rows} rows for {', '.join(roles)}{each}")
    starts = [sum(sizes[:i]) for i in range(count)]
    return {role: (start, start + n, 1) for role, start, n in zip(roles, starts, sizes, strict=True)}


def _other_shape(info: TensorInfo, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{info.shard}: {info.name} has shape {list(info.shape)}, expected {expected} by config.json; "
        "use the config that belongs to these weights"
    )


def config_number(config: Mapping[str, Any], what: str) -> int:
    """A count that this family's config.json gives (see NUMBERS). Raises CheckpointError where it is missing."""
    found = number_or_none(config, what)
    if found is None:
        raise CheckpointError(
            f"config.json holds none of {', '.join(_config_keys(config, what))}, which this family's fused tensors are "
            "cut by; use the config that belongs to these weights"
        )
    return found


def number_or_none(config: Mapping[str, Any], what: str) -> int | None:
    """The same, or None where config.json does not say."""
    for alternative in _config_keys(config, what):
        flag, _, expression = alternative.rpartition("?")
        wanted = not flag.startswith("!")
        if flag and config_entry(config, flag.removeprefix("!")) is not wanted:
            continue
        if (found := _product_of(config, expression)) is not None:
            return found
    return None


def _config_keys(config: Mapping[str, Any], what: str) -> list[str]:
    own = NUMBERS.get(str(config.get("model_type")), {})
    return (own.get(what) or NUMBERS[""].get(what) or what).split()


def _product_of(config: Mapping[str, Any], expression: str) -> int | None:
    """A key, a number, or keys with * and / between; None where one of them is no positive number."""
    first, *rest = re.split(r"([*/])", expression)
    found = _positive(config, first)
    for operator, key in zip(rest[::2], rest[1::2], strict=True):
        value = _positive(config, key)
        if found is None or value is None:
            return None
        found = found * value if operator == "*" else found // value
    return found


def _positive(config: Mapping[str, Any], key: str) -> int | None:
    value = int(key) if key.isdigit() else config_entry(config, key)
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and value > 0 else None


def config_entry(config: Mapping[str, Any], key: str) -> Any:
    """An entry of config.json, of the language model's part before the whole's; `a.b` is entry b of entry a."""
    for place in (*text_configs(config), config):
        found: Any = place
        for word in key.split("."):
            found = found.get(word) if isinstance(found, Mapping) else None
        if found is not None:
            return found
    return None


def text_configs(config: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The parts of config.json that describe a language model inside a model of several."""
    thinker = config.get("thinker_config")
    inner = text_configs(thinker) if isinstance(thinker, Mapping) else ()
    return [*inner, *(config[k] for k in TEXT_CONFIGS if isinstance(config.get(k), Mapping))]
