"""Open a Hub-format directory of safetensors: headers first, weights one tensor at a time. Hostile input stops here.

Nothing is executed, no path outside the directory is followed from the index, and every number in a header is checked
against the file before it is believed. The layout (8 bytes of little-endian header length, a JSON header, the tensors
without holes) is that of https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from laser.checkpoint.cuts import Cut, read_cut
from laser.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000  # the limit of the safetensors library itself
BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
}
BITS |= {"U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}
BITS |= {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TORCH |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its header describes it; `start` and `end` are byte offsets in the shard's file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    end: int


@dataclass(frozen=True)
class Shard:
    """One file: its header bytes verbatim (length prefix included) and the tensors that it says it holds."""

    name: str
    path: Path
    size: int
    header: bytes
    tensors: tuple[TensorInfo, ...]  # in offset order


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, known by its headers. Reads weights only in `read`."""

    path: Path
    config: Mapping[str, Any]
    config_bytes: bytes
    index_bytes: bytes | None  # None for a one-file checkpoint
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorInfo]

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def identity(self) -> str:
        """sha256 over config, index, and each shard's name, size and header: the same wherever the files lie."""
        digest = hashlib.sha256()
        parts = [self.config_bytes, self.index_bytes or b""]
        for shard in self.shards:
            parts += [shard.name.encode(), str(shard.size).encode(), shard.header]
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()

    def read(self, name: str, cut: Cut | None = None) -> torch.Tensor:
        """Tensor `name`, or the matrix (m, n) that `cut` takes from it, on the host, in its storage dtype.

        Raises CheckpointError for a file that changed or a dtype that torch does not know.
        """
        info = self.tensors[name]
        if info.dtype not in TORCH:
            raise CheckpointError(f"{info.shard}: {name} is stored as {info.dtype}, expected one of {', '.join(TORCH)}")

        def fetch(start: int, count: int) -> torch.Tensor:
            return self._bytes(info, start, count)

        if cut is not None:
            return cut.oriented(read_cut(fetch, TORCH[info.dtype], cut))
        return fetch(0, info.end - info.start).view(TORCH[info.dtype]).reshape(info.shape)

    def _bytes(self, info: TensorInfo, start: int, count: int) -> torch.Tensor:
        """`count` bytes of a tensor (count,), from its byte `start`."""
        raw = torch.empty(count, dtype=torch.uint8)
        view = raw.numpy().data
        with (self.path / info.shard).open("rb", buffering=0) as file:
            file.seek(info.start + start)
            while view:
                read = file.readinto(view)
                if not read:
                    raise CheckpointError(
                        f"{info.shard} ends inside {info.name}: it changed while it was read; run again"
                    )
                view = view[read:]
        return raw


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Read config, index and shard headers of a local directory, or of a Hub id whose files are in the Hub's cache.

    Symlinked shards (the cache's own layout) are followed. Raises CheckpointError for anything that is missing,
    damaged or inconsistent; no weight is read.
    """
    path = _find(model)
    config_bytes = _bytes(path / "config.json", "a checkpoint directory needs its config.json")
    config = _json(config_bytes, path / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path / 'config.json'}: found {type(config).__name__}, expected a JSON object")
    index_bytes = None
    if (path / INDEX).exists():
        index_bytes = _bytes(path / INDEX, "")
        weight_map = _weight_map(index_bytes, path / INDEX)
        names = sorted(set(weight_map.values()))
    elif (path / SINGLE).exists():
        weight_map, names = None, [SINGLE]
    else:
        pickles = sorted(p.name for p in path.glob("*.bin")) + sorted(p.name for p in path.glob("*.pt*"))
        if pickles:
            raise CheckpointError(
                f"{path} holds pickled weights ({pickles[0]}), which are never unpickled here, since a pickle can run "
                "any code; save the model once with safetensors (save_pretrained does) and try that directory"
            )
        raise CheckpointError(f"{path} holds neither {INDEX} nor {SINGLE}; try the directory that holds the weights")
    shards = tuple(read_header(path / name) for name in names)
    found = {(t.shard, t.name): t for shard in shards for t in shard.tensors}
    if weight_map is None:
        tensors = {name: info for (_, name), info in found.items()}
    else:
        for name, shard in weight_map.items():
            if (shard, name) not in found:
                raise CheckpointError(
                    f"{INDEX} says that {name} is in {shard}, which does not hold it; download both again"
                )
        # In file order, so that work walks each shard once from front to back.
        tensors = {name: info for (shard, name), info in found.items() if weight_map.get(name) == shard}
    return Checkpoint(path, config, config_bytes, index_bytes, shards, tensors)


def _find(model: str | Path) -> Path:
    path = Path(model)
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise CheckpointError(f"{path} is a file, expected a checkpoint directory; try {path.parent}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) and not str(model).startswith("."):
        from huggingface_hub import snapshot_download  # imported when met: local directories do not need it
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(str(model), local_files_only=True))
        except LocalEntryNotFoundError:
            raise CheckpointError(
                f"no such model: {model} is neither a directory nor in the Hub cache; try `hf download {model}`"
            ) from None
    raise CheckpointError(f"no such model: {path} is not a directory; try a checkpoint directory or a Hub id")


def read_header(path: Path) -> Shard:
    """Parse and check the header of one safetensors file. Raises CheckpointError naming the file and the tensor."""
    name = path.name
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(
                    f"{name} is truncated: found {size} bytes, expected a header of {length} bytes; download it again"
                )
            if length > MAX_HEADER:
                raise CheckpointError(f"{name}: header of {length} bytes, expected at most {MAX_HEADER}; not a model")
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {name}: {error.strerror}; download it again") from error
    entries = _json(header, path)
    if not isinstance(entries, dict):
        raise CheckpointError(f"{name}: the header is a {type(entries).__name__}, expected an object; download again")
    entries.pop("__metadata__", None)
    base = 8 + length
    tensors = [_tensor(name, key, entry, base, size) for key, entry in entries.items()]
    tensors.sort(key=lambda t: (t.start, t.end))
    end = base
    for tensor in tensors:
        if tensor.start != end:
            what = "overlaps the tensor before it" if tensor.start < end else "leaves a hole before it"
            raise CheckpointError(
                f"{name}: {tensor.name} {what}: found offset {tensor.start - base}, expected {end - base}; "
                "download the file again"
            )
        end = tensor.end
    if end != size:
        raise CheckpointError(
            f"{name}: found {size} bytes, expected {end} by its header: "
            f"{'truncated' if size < end else 'bytes after the last tensor'}; download it again"
        )
    return Shard(name, path, size, length.to_bytes(8, "little") + header, tuple(tensors))


def _tensor(file: str, key: str, entry: Any, base: int, size: int) -> TensorInfo:
    def natural(values: Any) -> bool:
        return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)

    if not isinstance(entry, dict) or not natural(entry.get("shape")) or not natural(entry.get("data_offsets")):
        raise CheckpointError(f"{file}: the entry of {key} has no valid shape and data_offsets; download it again")
    dtype, shape, offsets = entry.get("dtype"), entry["shape"], entry["data_offsets"]
    if dtype not in BITS:
        raise CheckpointError(f"{file}: {key} has dtype {dtype!r}, expected one of {', '.join(BITS)}; update laser")
    if len(offsets) != 2 or offsets[0] > offsets[1] or base + offsets[1] > size:
        raise CheckpointError(
            f"{file}: {key} has offsets {offsets}, expected two rising numbers up to {size - base}: "
            "the file is truncated or damaged; download it again"
        )
    expected = math.prod(shape) * BITS[dtype]
    if (offsets[1] - offsets[0]) * 8 != expected:
        raise CheckpointError(
            f"{file}: {key} holds {offsets[1] - offsets[0]} bytes, expected {expected // 8} for {dtype} {shape}; "
            "download it again"
        )
    return TensorInfo(key, dtype, tuple(shape), file, base + offsets[0], base + offsets[1])


def _weight_map(data: bytes, path: Path) -> dict[str, str]:
    index = _json(data, path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path.name}: found no weight_map, expected tensor names and files; download it again")
    for tensor, shard in weight_map.items():
        plain = isinstance(shard, str) and shard not in ("", ".", "..") and not re.search(r"[/\\\0]", shard)
        if not plain:
            raise CheckpointError(
                f"{path.name}: {tensor} points to {shard!r}, expected the name of a file in the same directory; "
                "do not use this checkpoint"
            )
        if not shard.endswith(".safetensors"):
            raise CheckpointError(f"{path.name}: {tensor} is in {shard!r}, expected a .safetensors file")
        if not (path.parent / shard).exists():
            raise CheckpointError(
                f"{path.name} names {shard}, which is missing from {path.parent}; finish the download and try again"
            )
    return weight_map


def _bytes(path: Path, why: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; {why or 'download it again'}") from error


def _json(data: bytes, path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(pairs)
        if len(document) != len(pairs):
            raise ValueError("a key stands twice in one object")
        return document

    try:
        return json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not valid JSON ({error}); download it again") from error
