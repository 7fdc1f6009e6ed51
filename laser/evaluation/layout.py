"""The model without weights, and how to fill it: each parameter in memory and the tensors on disk that make it.

Most parameters are one tensor of the same name. transformers 5 keeps a Mixtral layer's experts in two 3-D parameters:
`mlp.experts.gate_up_proj` (E, 2I, H), rows 0..I-1 of each expert being w1 (gate) and rows I..2I-1 w3 (up), and
`mlp.experts.down_proj` (E, H, I), w2. On disk they are 2-D, one per expert. A tied head is the embedding.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laser.checkpoint.reader import Checkpoint
from laser.errors import CheckpointError, UsageError

FUSED = re.compile(
    r"(?P<layer>model\.layers\.\d+\.)mlp\.(?P<what>experts\.gate_up_proj|experts\.down_proj|gate\.weight)"
)


@dataclass(frozen=True)
class Part:
    """A tensor on disk and its place in a parameter, as an index tuple; () is the whole."""

    tensor: str
    where: tuple[int | slice, ...]


def parts_of(checkpoint: Checkpoint, parameter: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
    """What fills `parameter` of `shape`. Raises CheckpointError where the checkpoint lacks a tensor for it."""
    parts = _parts(checkpoint, parameter, shape)
    for part in parts:
        if part.tensor not in checkpoint.tensors:
            raise CheckpointError(
                f"{checkpoint.name} holds no tensor {part.tensor}, which the model's {parameter} needs; "
                "finish the download, or try without --stream"
            )
        found = checkpoint.tensors[part.tensor].shape
        expected = tuple(torch.empty(shape, device="meta")[part.where].shape)
        if found != expected:  # or copying would broadcast without a word
            raise CheckpointError(
                f"{checkpoint.name}: {part.tensor} has shape {list(found)}, expected {list(expected)} by config.json; "
                "use the config that belongs to these weights"
            )
    return parts


def _parts(checkpoint: Checkpoint, parameter: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
    if parameter in checkpoint.tensors:
        return (Part(parameter, ()),)
    if parameter == "lm_head.weight":  # absent on disk: tied
        return (Part("model.embed_tokens.weight", ()),)
    match = FUSED.fullmatch(parameter)
    if not match:
        return (Part(parameter, ()),)
    block = match["layer"] + "block_sparse_moe."
    if match["what"] == "gate.weight":
        return (Part(block + "gate.weight", ()),)
    if match["what"] == "experts.down_proj":
        return tuple(Part(f"{block}experts.{e}.w2.weight", (e,)) for e in range(shape[0]))
    half = shape[1] // 2
    return tuple(
        Part(f"{block}experts.{e}.{w}.weight", (e, rows))
        for e in range(shape[0])
        for w, rows in (("w1", slice(0, half)), ("w3", slice(half, None)))
    )


def require_hub_format(path: Path) -> None:
    """Raises UsageError for a directory in Mistral's own format, which transformers does not load."""
    if (path / "params.json").exists() and not (path / "config.json").exists():
        raise UsageError(
            f"{path.name} is in Mistral's own format, which transformers does not load; "
            f"try laser convert {path.name} -o {path.name}-hub, and measure that"
        )


def build_skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The transformers model of a checkpoint's config with every parameter on the meta device: no memory, no weights.

    Raises CheckpointError for a config that transformers does not know, UsageError for a model of another build.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    require_hub_format(checkpoint.path)
    try:
        config = AutoConfig.from_pretrained(str(checkpoint.path), local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{checkpoint.name}/config.json: transformers cannot build it ({error})") from error
    inner = getattr(model, "model", None)
    missing = [n for n in ("embed_tokens", "layers", "norm", "rotary_emb") if not hasattr(inner, n)]
    if missing or inner is None:
        raise UsageError(
            f"{type(model).__name__} has no model.{missing[0] if missing else ''}, so it cannot be run layer by layer; "
            "try without --stream"
        )
    inner.rotary_emb = type(inner.rotary_emb)(config)  # its buffers are computed, not stored
    stranded = [name for name, buffer in model.named_buffers() if buffer.device.type == "meta"]
    if stranded:
        raise UsageError(f"{type(model).__name__} computes {stranded[0]} when it is built; try without --stream")
    return model.eval()
