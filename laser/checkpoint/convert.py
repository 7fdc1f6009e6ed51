"""A whole new checkpoint directory from shards that no file holds: nothing under its name until all of it is there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from laser.checkpoint.files import disk_errors
from laser.checkpoint.headers import TensorInfo
from laser.checkpoint.reader import INDEX, Checkpoint
from laser.errors import OutputError


def write_directory(
    checkpoint: Checkpoint,
    out: Path,
    files: Mapping[str, bytes] | None = None,
    *,
    tick: Callable[[TensorInfo], object] = lambda _: None,
) -> None:
    """Write config, index, shards and further `files` of `checkpoint` into the new directory `out`.

    All is written into the sibling directory OUT.partial, which is renamed when it is whole; one that an interrupted
    conversion left behind is made anew. One tensor is in memory at a time. `tick` is called with each tensor.
    Raises OutputError where `out` exists or cannot be written.
    """
    if out.exists():
        raise OutputError(f"{out} exists; try another -o, or remove it yourself")
    needed, partial = sum(shard.size for shard in checkpoint.shards), out.with_name(out.name + ".partial")
    with disk_errors(out):
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < needed:
            raise OutputError(
                f"not enough disk for {out}: found {free / 1e9:.2f} GB free, expected {needed / 1e9:.2f} GB; "
                "free some space or try -o on another disk"
            )
        small = {"config.json": checkpoint.config_bytes, **(files or {})}
        if checkpoint.index_bytes is not None:
            small[INDEX] = checkpoint.index_bytes
        for name, data in small.items():
            (partial / name).write_bytes(data)
        for shard in checkpoint.shards:
            assert shard.data is not None, "a shard that is a file needs no conversion"
            with (partial / shard.name).open("wb") as file:
                file.write(shard.header)
                for info in shard.tensors:
                    for piece in shard.data(info.start, info.end):
                        file.write(piece)
                    tick(info)
                file.flush()
                os.fsync(file.fileno())
        partial.rename(out)
