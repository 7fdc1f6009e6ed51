"""The model without weights, and how to fill it: which tensors on disk make each parameter.

What a tensor on disk is called in memory is asked of transformers' own loader, name by name. It knows prefixes that are
added or dropped, and names of older checkpoints. It also knows the experts of a layer, which most checkpoints store one
by one and transformers 5 keeps in two 3-D parameters. A parameter that is tied to another is filled from that one's
tensors. Buffers that are stored are filled like parameters; the others are computed as `from_pretrained` computes
them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laser.checkpoint.matrices import Matrix
from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.safetensors import read_bytes
from laser.checkpoint.side_files import require_small_files
from laser.errors import CheckpointError, LaserError, UsageError, first_line, is_out_of_memory

WHOLE_NUMBERS = {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


@dataclass(frozen=True)
class Part:
    """A tensor on disk and its place in a parameter, as an index tuple; () is the whole."""

    tensor: str
    where: tuple[int | slice, ...]


@dataclass(frozen=True)
class Filling:
    """What makes each parameter and stored buffer of a model, and which tensors of the checkpoint make none."""

    parts: Mapping[str, tuple[Part, ...]]
    unused: tuple[str, ...]


class NotByLayers(UsageError):
    """A model that cannot be run layer by layer. `why`: the sentence without what to try."""

    def __init__(self, why: str, advice: str) -> None:
        super().__init__(f"{why}; {advice}")
        self.why = why


def not_by_layers(checkpoint: Checkpoint, why: str) -> NotByLayers:
    return NotByLayers(
        f"{checkpoint.name} cannot be run layer by layer: {why}",
        "try laser eval without --stream, which runs it whole, or laser run with --no-search",
    )


def by_layers(checkpoint: Checkpoint) -> AbstractContextManager[None]:
    """`running`, layer by layer."""
    return running(checkpoint, "try laser eval without --stream, or another --window", " layer by layer")


@contextmanager
def running(checkpoint: Checkpoint, advice: str, how: str = "") -> Iterator[None]:
    """A fault of the model's own code inside becomes a UsageError of one line. Memory and disk that are full do not."""
    try:
        yield
    except (LaserError, OSError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        fault = f"{type(error).__name__} {first_line(error)}"
        raise UsageError(f"{checkpoint.name} cannot be run{how}: its code fails, {fault}; {advice}") from error


def require_hub_format(path: Path) -> None:
    """Raises UsageError for a directory in Mistral's own format, which transformers does not load, and CheckpointError
    for one in which it would wait for ever or read without end."""
    if (path / "params.json").exists() and not (path / "config.json").exists():
        raise UsageError(
            f"{path.name} is in Mistral's own format, which transformers does not load; "
            f"try laser convert {path.name} -o {path.name}-hub, and measure that"
        )
    if path.is_dir():
        require_small_files(path)


def load_config(path: Path, name: str) -> Any:
    """The config of the model in `path` as transformers takes it. Raises CheckpointError for one that it does not."""
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        if not isinstance(named := getattr(config, "architectures", None) or [], list):
            raise TypeError(f"architectures is {named!r}, expected a list of names")
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise cannot_build(name, error) from error
    return config


def cannot_build(name: str, error: Exception) -> CheckpointError:
    """What to say of the model `name`, of whose config transformers makes nothing."""
    return CheckpointError(
        f"{name}/config.json: transformers cannot build it ({type(error).__name__}: {first_line(error)}); "
        "use the config that belongs to these weights"
    )


# --- the skeleton -----------------------------------------------------------------------------------------------------


def compute_buffers(checkpoint: Checkpoint, model: Any) -> None:
    """Give every buffer that no checkpoint stores its values, on the host, as `from_pretrained` does.

    They are filled with NaN first: what is NaN afterwards was not computed, and is refused.
    """
    stored = model.state_dict().keys()
    waiting: dict[str, torch.Tensor] = {}
    for name, buffer in list(model.named_buffers()):
        if name in stored or buffer.device.type != "meta":
            continue
        owner, leaf = owner_of(model, name)
        empty = math.nan if buffer.is_floating_point() or buffer.is_complex() else 0
        owner._buffers[leaf] = waiting[name] = torch.full_like(buffer, empty, device="cpu")
        owner._is_hf_initialized = False
    if waiting:
        model.initialize_weights()
    for name in waiting:
        owner, leaf = owner_of(model, name)
        if owner._buffers[leaf].is_floating_point() and bool(owner._buffers[leaf].isnan().any()):
            raise not_by_layers(checkpoint, f"{type(model).__name__} computes {name} only when it is built")


def check_embedding(checkpoint: Checkpoint, model: Any) -> None:
    """Raises UsageError where transformers writes over a row of the embedding after it was loaded (Youtu's padding)."""
    embedding = model.get_input_embeddings()
    padding = getattr(embedding, "padding_idx", None)
    if not isinstance(embedding, torch.nn.Embedding) or padding is None:
        return
    small = torch.nn.Embedding(padding + 1, 1, padding, device="cpu")
    torch.nn.init.ones_(small.weight)
    small.weight._is_hf_initialized = True  # type: ignore[attr-defined]  # how transformers marks what was loaded
    model._init_weights(small)
    if not bool((small.weight == 1).all()):
        raise not_by_layers(checkpoint, f"transformers writes over row {padding} of its embedding when it loads it")


def keep_dtypes(model: Any, dtype: torch.dtype) -> None:
    """Parameters that `from_pretrained` keeps in float32 whatever `dtype` is."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    kept, names, _ = build_glob_alternation(list(plan))
    for name, value in list(model.state_dict(keep_vars=True).items()):
        if (match := kept.search(name)) and match.lastgroup is not None:
            value.data = value.data.to(plan[names[match.lastgroup]])


def owner_of(model: Any, name: str) -> tuple[Any, str]:
    """The module that holds a parameter or buffer, and what it is called there."""
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf


def decoder_of(model: Any) -> Any:
    """The part of the model that holds its decoder layers. In ModernBERT's decoder that name is the head's."""
    decoder = model.get_decoder()
    return decoder if any(isinstance(m, torch.nn.ModuleList) for m in decoder.modules()) else model.base_model


def stack_of(checkpoint: Checkpoint, model: Any) -> tuple[str, Any]:
    """The decoder layers: where they lie in the model, and the list of them. Raises UsageError where none is found."""
    decoder = decoder_of(model)
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [(n, m) for n, m in decoder.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
    depth = min((name.count(".") for name, _ in lists), default=0)
    highest = [pair for pair in lists if pair[0].count(".") == depth]
    found = [m for _, m in lists if len(m) == count] or [m for _, m in highest if len(highest) == 1]
    if not found:
        raise not_by_layers(checkpoint, f"{type(model).__name__} has no list of {count} decoder layers")
    return next((name, module) for name, module in model.named_modules() if module is found[0])


# --- from names on disk to parameters ---------------------------------------------------------------------------------


def fill(checkpoint: Checkpoint, model: Any) -> Filling:
    """What fills `model`. Raises CheckpointError where the checkpoint lacks a tensor or has one of another shape,
    UsageError where a tensor is converted in a way that is not known here."""
    sources, converters, unused = sources_of(checkpoint, model)
    state = model.state_dict()
    parts: dict[str, tuple[Part, ...]] = {}
    for name, patterns in sources.items():
        if None in patterns:
            parts[name] = (Part(patterns[None][0], ()),)
        else:
            converter = next(c for c in converters if next(iter(patterns)) in c.source_patterns)
            parts[name] = _converted(checkpoint, name, converter, patterns)
        _check_parts(checkpoint, name, tuple(state[name].shape), parts[name])
    return Filling(_with_tied(checkpoint, model, parts), tuple(unused))


def sources_of(
    checkpoint: Checkpoint, model: Any
) -> tuple[dict[str, dict[str | None, list[str]]], list[Any], list[str]]:
    """Parameter -> pattern of a converter, or None -> its tensors, in the order of transformers' own loop; the
    converters; and the tensors that make no parameter."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    scales = set(checkpoint.fp8.scales.values()) if checkpoint.fp8 else set()
    sources: dict[str, dict[str | None, list[str]]] = {}
    unused: list[str] = []
    for tensor in sorted(checkpoint.tensors, key=dot_natural_key):
        if tensor in scales:  # read together with the tensor that they scale
            continue
        name, pattern = rename_source_key(tensor, renamings, converters, prefix, state)
        if name not in state and tensor in state:
            name, pattern = rename_source_key(tensor, [], [], prefix, state)
        found = sources.setdefault(name, {}).setdefault(pattern, []) if name in state else unused
        if found is not unused and pattern is None and found:  # a second name of the same: the first counts
            found = unused
        found.append(tensor)
    return sources, converters, unused


def _converted(
    checkpoint: Checkpoint, name: str, converter: Any, patterns: Mapping[str | None, Sequence[str]]
) -> tuple[Part, ...]:
    """Tensors that are stacked (MergeModulelist), joined (Concatenate), or both, experts first."""
    steps = [(type(step).__name__, step.dim if hasattr(step, "dim") else None) for step in converter.operations]
    kinds = tuple(kind for kind, _ in steps)
    if len(converter.target_patterns) > 1 or kinds not in KNOWN or (kinds[0] == STACKED and steps[0][1] != 0):
        raise not_by_layers(checkpoint, f"transformers makes {name} by {', '.join(kinds)} of {next(iter(patterns))}")
    stacked, joined = kinds[0] == STACKED, steps[-1][1] if kinds[-1] == JOINED else None
    parts, start = [], 0
    for pattern in converter.source_patterns:  # the order in which they are joined
        for number, tensor in enumerate(patterns.get(pattern, ())):
            shape = checkpoint.tensors[tensor].shape
            where: list[int | slice] = [number] if stacked else []
            if joined is not None:
                axis = joined - stacked  # of the tensor, which has no axis of experts
                if not 0 <= axis < len(shape):
                    raise not_by_layers(checkpoint, f"transformers joins {tensor} along another axis than it has")
                where += [slice(None)] * axis + [slice(start, start + shape[axis])]
                start += 0 if stacked else shape[axis]
            parts.append(Part(tensor, tuple(where)))
        if stacked and joined is not None and patterns.get(pattern):
            start += checkpoint.tensors[patterns[pattern][0]].shape[joined - 1]
    return tuple(parts)


STACKED, JOINED = "MergeModulelist", "Concatenate"
KNOWN = ((STACKED,), (JOINED,), (STACKED, JOINED))


def _check_parts(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], parts: Sequence[Part]) -> None:
    """Raises CheckpointError unless the parts have the shapes of their places and cover the parameter."""
    covered = 0
    for part in parts:
        found = checkpoint.tensors[part.tensor].shape
        try:
            expected = tuple(torch.empty(shape, device="meta")[part.where].shape)
        except IndexError:  # an expert more than the config has
            expected = ()
        if found != expected:  # or copying would broadcast without a word
            raise CheckpointError(
                f"{checkpoint.name}: {part.tensor} has shape {list(found)}, expected {list(expected)} by config.json; "
                "use the config that belongs to these weights"
            )
        covered += math.prod(found)
    if covered != math.prod(shape):
        raise CheckpointError(
            f"{checkpoint.name} has {covered} of the {math.prod(shape)} numbers of {name}, the rest would be random; "
            "finish the download"
        )


def _with_tied(
    checkpoint: Checkpoint, model: Any, parts: Mapping[str, tuple[Part, ...]]
) -> dict[str, tuple[Part, ...]]:
    """With parameters that have no tensor of their own but are tied to one that has. Raises CheckpointError for one
    that has neither: transformers would fill it with random numbers."""
    state = model.state_dict(keep_vars=True)
    groups: dict[int, list[str]] = {}
    for name, value in state.items():
        groups.setdefault(id(value), []).append(name)
    whole, missing = dict(parts), []
    for name, value in state.items():
        if name not in parts:
            twin = next((other for other in groups[id(value)] if other in parts), None)
            if twin is not None:
                whole[name] = parts[twin]
            else:
                missing.append(name)
    if gaps := [name for name in missing if not _may_be_missing(model, name)]:
        raise no_weights_for(checkpoint, gaps)
    return whole


def no_weights_for(checkpoint: Checkpoint, gaps: Sequence[str]) -> CheckpointError:
    """What is said where transformers would go on with random numbers."""
    head = any(name.endswith(("lm_head.weight", "embed_out.weight")) for name in gaps)
    advice = "a model without a head predicts no text, try scan, plan and reduce" if head else "finish the download"
    return CheckpointError(
        f"{checkpoint.name} has no weights for {gaps[0]} ({len(gaps)} in all), which would be random; {advice}"
    )


def _may_be_missing(model: Any, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ())


def edited(
    checkpoint: Checkpoint, tensor: str, edits: Mapping[str, torch.Tensor], matrices: Mapping[str, Matrix]
) -> torch.Tensor:
    """A tensor of the checkpoint with the matrices of `edits` (by name) in their places."""
    inside = [matrices[name] for name in edits if matrices[name].tensor == tensor]
    if inside and inside[0].part is None:
        return edits[inside[0].name]
    info = checkpoint.tensors[tensor]
    if info.dtype in WHOLE_NUMBERS:  # a table that routes tokens, which no cut is ever made of
        data = read_bytes(checkpoint.shard_of(tensor), info.start, info.end)
        return data.view(WHOLE_NUMBERS[info.dtype]).reshape(info.shape)
    W = checkpoint.read(tensor)
    for matrix in inside:
        assert matrix.part is not None
        matrix.part.put(W, edits[matrix.name])
    return W
