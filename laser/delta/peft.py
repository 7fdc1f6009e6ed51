"""A PEFT LoRA adapter merged into its base, one matrix in memory: the ordinary merge, streamed.

For every adapted module W becomes merge(W, s B A), by a formula that is named (formulas.py), with s = alpha / r, or
alpha / sqrt(r) for rsLoRA, and ranks and alphas of their own where rank_pattern and alpha_pattern match a module's name
as PEFT matches them. What modules_to_save holds takes the base's place, cast to its dtype. Whatever else an adapter may
be is refused by its name: a merge that leaves something out would be another model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from laser.checkpoint.convert import write_directory
from laser.checkpoint.reader import INDEX, Checkpoint
from laser.checkpoint.safetensors import TORCH, Shard, TensorInfo, parse_json, pieces, read_header
from laser.checkpoint.slices import bytes_of
from laser.checkpoint.source import require_unchanged
from laser.delta.formats import STORED_FLOATS
from laser.delta.formulas import Formula
from laser.delta.unmerge import CONFIG, MODEL, PEFT, RECORD, REMAINDER, side_files_of
from laser.errors import CheckpointError, UsageError, first_line
from laser.files import read_regular, require_regular

# What would make the merge another one than written here, where it is set.
OTHERWISE = ("use_dora", "fan_in_fan_out", "target_parameters", "trainable_token_indices", "layer_replication")
OTHERWISE += ("lora_bias", "use_qalora", "alora_invocation_tokens", "arrow_config", "velora_config")


@dataclass(frozen=True)
class Lora:
    """One adapted tensor of the base: the names of A and B in the adapter's file, and the scale."""

    A: str
    B: str
    scale: float


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter as its folder says. updates, saved: by the base's tensors."""

    path: Path
    updates: Mapping[str, Lora]
    saved: Mapping[str, str]

    def tensor(self, name: str) -> torch.Tensor:
        try:
            with safe_open(self.path, "pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path}: {name}: {first_line(error)}; download it again") from error


def open_adapter(folder: Path, base: Checkpoint) -> PeftAdapter:
    """Raises CheckpointError for what is missing, damaged or of another base, UsageError for no plain LoRA."""
    place, path = folder / CONFIG, folder / MODEL
    try:
        config = parse_json(read_regular(place), place)
        require_regular(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror}; try the directory of a PEFT adapter") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise UsageError(f"{place}: found an adapter of type {kind!r}, expected 'LORA'; try PEFT's own merge")
    for key in OTHERWISE:
        if config.get(key):
            raise UsageError(f"{place} sets {key}, which is not merged here; try PEFT's own merge")
    if config.get("bias", "none") != "none":
        raise UsageError(f"{place}: bias is {config['bias']!r}, expected 'none'; try PEFT's own merge")
    tensors = {info.name: info for info in read_header(path).tensors}
    updates, saved = {}, {}
    for name, info in tensors.items():
        bare = name.removeprefix(PEFT)
        module, _, what = bare.rpartition(".lora_")
        target = f"{module}.weight" if module else bare
        if name == bare or (module and what not in ("A.weight", "B.weight")):
            raise UsageError(f"{path}: {name} is no part of a plain LoRA; try PEFT's own merge")
        if target not in base.tensors:
            raise CheckpointError(f"{path}: {name} is of {target}, which {base.name} has not; is that its base?")
        expected = base.tensors[target]
        if module and what == "A.weight":
            other = f"{PEFT}{module}.lora_B.weight"
            B = tensors.get(other)
            fits = B is not None and len(info.shape) == len(B.shape) == len(expected.shape) == 2
            if not fits or B is None or (B.shape[0], info.shape[1], B.shape[1]) != (*expected.shape, info.shape[0]):
                raise CheckpointError(f"{path}: {name} and its lora_B do not fit {target} {list(expected.shape)}")
            if expected.dtype not in STORED_FLOATS:
                raise UsageError(f"{target} is stored as {expected.dtype}, expected one of {', '.join(STORED_FLOATS)}")
            updates[target] = Lora(name, other, scale_of(config, module, info.shape[0], place))
        elif module and f"{PEFT}{module}.lora_A.weight" not in tensors:
            raise CheckpointError(f"{path}: {name} has no lora_A; download it again")
        elif not module:
            if info.shape != expected.shape:
                raise CheckpointError(f"{path}: {name} has shape {list(info.shape)}, expected {list(expected.shape)}")
            saved[target] = name
    if not updates and not saved:
        raise CheckpointError(f"{path} holds no adapter of {base.name}; download it again")
    return PeftAdapter(path, updates, saved)


def scale_of(config: Mapping[str, Any], module: str, rank: int, place: Path) -> float:
    """s for a module, as PEFT's LoraLayer.update_layer has it. Raises UsageError for ranks that contradict the file."""
    r = _module_pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _module_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if r != rank or not isinstance(alpha, int | float):
        raise UsageError(
            f"{place}: {module} has rank {r} and alpha {alpha}, found {rank} in the file; check the adapter"
        )
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _module_pattern(patterns: Any, module: str, otherwise: Any) -> Any:
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return otherwise


def merge_streamed(
    base: Checkpoint,
    folder: Path,
    out: Path,
    formula: Formula,
    *,
    tick: Callable[[TensorInfo], object] = lambda _: None,
) -> int:
    """Write the new directory `out`: `base` with the adapter in `folder` merged. Returns how many tensors changed.

    Shards, names and dtypes are the base's. Raises as `open_adapter`, and OutputError where `out` cannot be written.
    """
    adapter = open_adapter(folder, base)

    def tensor(info: TensorInfo) -> Iterator[memoryview]:
        dtype = TORCH.get(info.dtype)
        if dtype is not None and info.name in adapter.updates:
            lora, W = adapter.updates[info.name], base.raw(info.name)
            A, B = (adapter.tensor(name).double() for name in (lora.A, lora.B))
            yield bytes_of(replace(formula, scale=lora.scale).merge(W, lora.scale * (B @ A), dtype))
        elif dtype is not None and info.name in adapter.saved:
            yield bytes_of(adapter.tensor(adapter.saved[info.name]).to(dtype))
        else:
            yield from pieces(base.shard_of(info.name), info.start, info.end)

    def made(shard: Shard) -> Shard:
        def data(start: int, end: int) -> Iterator[memoryview]:
            yield from tensor(next(info for info in shard.tensors if (info.start, info.end) == (start, end)))

        return replace(shard, data=data)

    files = {name: data for name, data in side_files_of(base).items() if name not in ("config.json", INDEX)}
    written = replace(base, shards=tuple(map(made, base.shards)))
    write_directory(written, out, files, tick=tick, check=lambda: require_unchanged(base))
    return len(adapter.updates) + len(adapter.saved)


def is_recorded(folder: Path) -> bool:
    """Whether `laser unmerge` wrote an adapter's folder: then every byte is known, and nothing may be left out."""
    return (folder / RECORD).exists() or (folder / REMAINDER).exists()
