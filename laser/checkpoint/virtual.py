"""Shards that no file holds: a canonical header, and tensors made when they are asked for.

What is read from another format (a pickle, an FP8 file as bfloat16) is seen through such a shard, so that everything
behind it deals with one layout only, and writing it out gives a safetensors file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from laser.checkpoint.headers import BITS, TORCH, Shard, header_text, parse_header

# (name, dtype as the header spells it, shape)
Entry = tuple[str, str, tuple[int, ...]]
DTYPES = {dtype: name for name, dtype in TORCH.items()}
DTYPES |= {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}
DTYPES |= {torch.bool: "BOOL", torch.complex64: "C64", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64"}


def make_header(entries: Sequence[Entry]) -> bytes:
    """The JSON text of a safetensors header for these tensors, in this order; the same bytes for the same tensors.

    Wide dtypes come first, so that every tensor begins at a multiple of its element's size, as readers expect.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in sorted(entries, key=lambda entry: -BITS[entry[1]]):
        end = at + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    return header_text(header)


def virtual_shard(name: str, path: Path, entries: Sequence[Entry], tensor: Callable[[str], torch.Tensor]) -> Shard:
    """A shard called `name` that holds `entries`; `tensor` gives each, of the dtype and shape that its entry says.

    path: where the bytes come from, for messages. One tensor is in memory at a time.
    """
    text = make_header(entries)
    size = 8 + len(text) + sum(math.prod(shape) * BITS[dtype] // 8 for _, dtype, shape in entries)
    shard = parse_header(name, path, size, text)

    def data(start: int, end: int) -> Iterator[memoryview]:
        if start < len(shard.header):
            yield memoryview(shard.header)[start:end]
        for info in shard.tensors:
            low, high = max(start, info.start), min(end, info.end)
            if low < high:
                yield raw_bytes(tensor(info.name))[low - info.start : high - info.start]

    return replace(shard, data=data)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; a copy only where it is laid out otherwise."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
