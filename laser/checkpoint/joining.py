"""Several safetensors files as one, copied without passing through memory, whatever their size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from laser.checkpoint.files import disk_errors
from laser.checkpoint.headers import file_pieces, header_text, read_header
from laser.checkpoint.locks import replacing


def join(parts: Sequence[Path], path: Path, metadata: Mapping[str, str]) -> None:
    """All tensors of `parts`, which have different names, in the file `path` with this metadata; complete or not there.

    Raises OutputError, as every writer here, for a full disk.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    ranges, at = [], 0
    for part in parts:
        shard = read_header(part)
        begin = len(shard.header)
        for info in shard.tensors:
            offsets = [at + info.start - begin, at + info.end - begin]
            header[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
        ranges.append((part, begin, shard.size))
        at += shard.size - begin
    text = header_text(header)
    with disk_errors(path), replacing(path) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for part, start, end in ranges:
            for piece in file_pieces(part, start, end):
                out.write(piece)
