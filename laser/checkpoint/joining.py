"""Several safetensors files as one, copied without passing through memory, whatever their size."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from laser.checkpoint.files import disk_errors
from laser.checkpoint.headers import file_pieces
from laser.checkpoint.locks import replacing
from laser.checkpoint.regular import open_regular


def read_json_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a file of our own, and where its data begin."""
    with open_regular(path) as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


def join(parts: Sequence[Path], path: Path, metadata: Mapping[str, str]) -> None:
    """All tensors of `parts`, which have different names, in the file `path` with this metadata; complete or not there.

    Raises OutputError, as every writer here, for a full disk.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    ranges, at = [], 0
    for part in parts:
        entries, start = read_json_header(part)
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            header[name] = entry | {"data_offsets": [at + x for x in entry["data_offsets"]]}
        size = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        ranges.append((part, start, start + size))
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with disk_errors(path), replacing(path) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for part, start, end in ranges:
            for piece in file_pieces(part, start, end):
                out.write(piece)
