"""The model without weights, and how to fill it: each parameter in memory and the tensors on disk that make it.

Most parameters are one tensor of the same name. transformers 5 keeps a layer's experts in two 3-D parameters:
`experts.gate_up_proj` (E, 2I, H), rows 0..I-1 of each expert being gate (w1) and rows I..2I-1 up (w3), and
`experts.down_proj` (E, H, I), down (w2). On disk most families have them 2-D, one per expert, and Granite 3-D under
other names. A tied head is the embedding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laser.checkpoint.families import Matrix
from laser.checkpoint.reader import Checkpoint
from laser.errors import CheckpointError, UsageError, first_line

BLOCK = r"(?P<block>model\.layers\.\d+\.(?:mlp|feed_forward|block_sparse_moe)\.)"
FUSED = re.compile(BLOCK + r"(?P<what>experts\.gate_up_proj|experts\.down_proj)")
# names on disk of (gate, up, down), E standing for the expert's number
EXPERTS = (
    ("experts.E.w1.weight", "experts.E.w3.weight", "experts.E.w2.weight"),
    ("experts.E.gate_proj.weight", "experts.E.up_proj.weight", "experts.E.down_proj.weight"),
)
# a parameter's name behind its block -> its names on disk
RENAMED = {
    "experts.gate_up_proj": ("input_linear.weight",),
    "experts.down_proj": ("output_linear.weight",),
    "gate.weight": ("gate.weight",),
    "router.weight": ("gate.weight", "router.layer.weight"),
}


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
    match = re.fullmatch(BLOCK + r"(?P<what>.*)", parameter)
    if not match:
        return (Part(parameter, ()),)
    layer, what = re.sub(r"\w+\.$", "", match["block"]), match["what"]
    for block in (match["block"], layer + "block_sparse_moe."):
        for name in RENAMED.get(what, ()):
            if block + name in checkpoint.tensors:
                return (Part(block + name, ()),)
        for gate, up, down in EXPERTS:
            if FUSED.fullmatch(parameter) and block + gate.replace("E", "0") in checkpoint.tensors:
                half = shape[1] // 2
                places = {gate: slice(0, half), up: slice(half, None)} if what.endswith("gate_up_proj") else {down: ...}
                return tuple(
                    Part(block + name.replace("E", str(e)), (e,) if rows is ... else (e, rows))
                    for e in range(shape[0])
                    for name, rows in places.items()
                )
    return (Part(parameter, ()),)


def piece_of(checkpoint: Checkpoint, parameter: str, layers: int) -> int:
    """The piece that a parameter belongs to: 0 the embedding, i + 1 layer i, layers + 1 the norm and the head."""
    if parameter.startswith("model.embed_tokens."):
        return 0
    if parameter.startswith("model.layers."):
        return int(parameter.split(".")[2]) + 1
    if parameter.startswith(("model.norm.", "lm_head.")):
        return layers + 1
    raise UsageError(f"{checkpoint.name}: {parameter} belongs to no layer; try without --stream")


def edited(
    checkpoint: Checkpoint, tensor: str, edits: Mapping[str, torch.Tensor], matrices: Mapping[str, Matrix]
) -> torch.Tensor:
    """A tensor of the checkpoint with the matrices of `edits` (by name) in their places."""
    inside = [matrices[name] for name in edits if matrices[name].tensor == tensor]
    if inside and inside[0].cut is None:
        return edits[inside[0].name]
    W = checkpoint.read(tensor)
    for matrix in inside:
        assert matrix.cut is not None
        matrix.cut.put(W, edits[matrix.name])
    return W


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
        raise CheckpointError(
            f"{checkpoint.name}/config.json: transformers cannot build it ({first_line(error)})"
        ) from error
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
