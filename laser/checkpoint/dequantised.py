"""An FP8 checkpoint seen as the bfloat16 one that it stands for. Scales are gone, config and index match."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.safetensors import Shard, virtual_shard
from laser.errors import UsageError


def as_bfloat16(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with every FP8 tensor in bfloat16, as it would be on disk; its identity is the source's.

    `read` still gives float32, so that a reduction is rounded once. Raises UsageError where nothing is quantised.
    """
    if checkpoint.fp8 is None:
        raise UsageError(f"{checkpoint.name} is not quantised, and its dtype is kept; try without --output-dtype")
    shards = tuple(_shard(checkpoint, shard) for shard in checkpoint.shards)
    tensors = {t.name: t for shard in shards for t in shard.tensors if t.name in checkpoint.tensors}
    config: dict[str, Any] = dict(checkpoint.config)
    config.pop("quantization_config", None)
    config["dtype" if "dtype" in config else "torch_dtype"] = "bfloat16"
    return Checkpoint(
        checkpoint.path,
        config,
        (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(),
        None if checkpoint.index_bytes is None else _index_without_scales(checkpoint.index_bytes, shards),
        shards,
        {name: tensors[name] for name in checkpoint.tensors if name in tensors},
        checkpoint.hub,
        origin=checkpoint,
        left_out=checkpoint.left_out,
    )


def _shard(checkpoint: Checkpoint, shard: Shard) -> Shard:
    fp8 = checkpoint.fp8
    assert fp8 is not None
    dropped = set(fp8.scales.values())
    entries = [
        (t.name, "BF16" if t.name in fp8.scales else t.dtype, t.shape) for t in shard.tensors if t.name not in dropped
    ]
    made = virtual_shard(shard.name, shard.path, entries, partial(_dequantised, checkpoint))
    return replace(made, path=shard.path)


def _dequantised(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    assert checkpoint.fp8 is not None
    return checkpoint.read(name).to(torch.bfloat16) if name in checkpoint.fp8.scales else checkpoint.raw(name)


def _index_without_scales(data: bytes, shards: tuple[Shard, ...]) -> bytes:
    index = json.loads(data)
    there = {t.name for shard in shards for t in shard.tensors}
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name in there}
    if isinstance(index.get("metadata"), dict) and "total_size" in index["metadata"]:
        index["metadata"]["total_size"] = sum(shard.size - len(shard.header) for shard in shards)
    return (json.dumps(index, indent=2) + "\n").encode()
