"""Write a whole new checkpoint directory from shards that no file holds yet.

Nothing has its name until all of it is there.
"""

from __future__ import annotations

import filecmp
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from laser.checkpoint.reader import INDEX, Checkpoint
from laser.checkpoint.safetensors import BITS, HeaderEntry, TensorInfo, virtual_shard
from laser.checkpoint.swap import restore_earlier, take_place
from laser.errors import OutputError
from laser.files import claimed, disk_errors, require_led, require_no_mount, require_only, tidy_up, unfinished

_IN_WORK = re.compile("new|old")  # in OUT.partial: what is written, and an earlier output on its way out
MAX_SHARD = 5_000_000_000  # bytes, as save_pretrained cuts by default


def assemble_shards(
    path: Path, config: Mapping[str, Any], entries: Sequence[HeaderEntry], tensor: Callable[[str], torch.Tensor]
) -> Checkpoint:
    """The Hub's checkpoint of these tensors: config, index, shards of at most MAX_SHARD bytes; none is a file yet.

    path: where the weights come from. `tensor` gives each as its entry says.
    """
    groups = list(_groups(entries))
    files = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    shards = [virtual_shard(file, path, group, tensor) for file, group in zip(files, groups, strict=True)]
    tensors = {info.name: info for shard in shards for info in shard.tensors}
    total = sum(info.end - info.start for info in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": {name: info.shard for name, info in tensors.items()}}
    texts = [(json.dumps(document, indent=2) + "\n").encode() for document in (config, index)]
    return Checkpoint(path, config, texts[0], texts[1], tuple(shards), tensors)


def _groups(entries: Sequence[HeaderEntry]) -> Iterator[list[HeaderEntry]]:
    group: list[HeaderEntry] = []
    size = 0
    for entry in entries:
        bytes_ = math.prod(entry[2]) * BITS[entry[1]] // 8
        if group and size + bytes_ > MAX_SHARD:
            yield group
            group, size = [], 0
        group.append(entry)
        size += bytes_
    if group:
        yield group


def require_new(out: Path, force: bool = False) -> None:
    """Raises OutputError where `write_directory` would find something in its way."""
    require_led(out)
    if out.exists() and not force:
        raise OutputError(f"{out} exists; try another -o, or remove it yourself")
    if out.exists():
        require_no_mount(out)


def require_alike(out: Path, new: Path) -> None:
    """Raises OutputError where `out` holds a file that is not in `new` with the same bytes.

    What is written whole has no mark of laser on it. So nothing goes that was not there to be made again.
    """
    files = [path for path in sorted(out.rglob("*")) if path.is_symlink() or not path.is_dir()]
    for path in files if out.is_dir() and not out.is_symlink() else [out]:
        there = new / path.relative_to(out)
        if path.is_symlink() or not there.is_file() or not filecmp.cmp(path, there, shallow=False):
            raise OutputError(
                f"{path} is not what would be written there, and --force replaces nothing else; try another -o, or "
                f"remove {out} yourself"
            )


def write_directory(
    checkpoint: Checkpoint,
    out: Path,
    files: Mapping[str, bytes] | None = None,
    *,
    force: bool = False,
    tick: Callable[[TensorInfo], object] = lambda _: None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write config, index, shards and further `files` of `checkpoint` into the new directory `out`.

    All is written into OUT.partial/new, which is renamed when it is whole; one that an interrupted conversion left
    behind is made anew. One tensor is in memory at a time. `tick` is called with each tensor, and `check` before the
    rename: it raises where the source has changed meanwhile. force: an `out` whose files are all the same is replaced.
    Raises OutputError where `out` exists otherwise, or cannot be written.
    """
    with claimed(out):
        _write_directory(checkpoint, out, files or {}, force, tick, check)


def _write_directory(
    checkpoint: Checkpoint,
    out: Path,
    files: Mapping[str, bytes],
    force: bool,
    tick: Callable[[TensorInfo], object],
    check: Callable[[], None],
) -> None:
    needed, partial = sum(shard.size for shard in checkpoint.shards), unfinished(out)
    require_only(partial, _IN_WORK)
    restore_earlier(out, partial / "old")
    require_new(out, force)
    small = {"config.json": checkpoint.config_bytes, **files}
    if checkpoint.index_bytes is not None:
        small[INDEX] = checkpoint.index_bytes
    with disk_errors(out):
        if partial.exists():
            shutil.rmtree(partial)
        new = partial / "new"
        new.mkdir(parents=True)
        try:
            free = shutil.disk_usage(partial).free
            if free < needed:
                raise OutputError(
                    f"not enough disk for {out}: found {free / 1e9:.2f} GB free, expected {needed / 1e9:.2f} GB; "
                    "free some space or try -o on another disk"
                )
            for name, data in small.items():
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                (new / name).write_bytes(data)
            for shard in checkpoint.shards:
                assert shard.data is not None, "a shard that is a file needs no conversion"
                with (new / shard.name).open("wb") as file:
                    file.write(shard.header)
                    for info in shard.tensors:
                        for piece in shard.data(info.start, info.end):
                            file.write(piece)
                        tick(info)
                    file.flush()
                    os.fsync(file.fileno())
            check()
            if out.exists():
                require_new(out, force)  # again: hours have passed
                require_alike(out, new)
            take_place(new, out, partial / "old")
        except BaseException:
            restore_earlier(out, partial / "old")
            shutil.rmtree(partial, ignore_errors=True)  # it would be made anew: nothing in it is worth its room
            raise
    tidy_up(partial, out)
