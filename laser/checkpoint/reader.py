"""Open a checkpoint directory: headers first, weights one tensor at a time. Hostile input stops here.

Nothing is executed, no path outside the directory is followed from the index, and every number in a header is checked
against the file before it is believed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from laser.checkpoint.cuts import Cut, read_cut
from laser.checkpoint.headers import BITS, TORCH, Shard, TensorInfo, parse_json, read_bytes, read_header
from laser.checkpoint.pickles import (
    PICKLE_INDEX,
    SUFFIXES,
    find_pickles,
    read_pickle,
    safetensors_index,
    safetensors_name,
)
from laser.errors import CheckpointError

__all__ = ["BITS", "INDEX", "SINGLE", "Checkpoint", "Shard", "TensorInfo", "open_checkpoint"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
OUTCOME = "laser.json"  # in a checkpoint that laser wrote
RELEASE = "mistral_release"  # stands for the model_type that Mistral's params.json does not name


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
        """sha256 over config, index, and each shard's name, size and header: the same wherever the files lie.

        A reduction has its source's headers; its laser.json, which counts too, tells the two apart.
        """
        digest = hashlib.sha256()
        outcome = self.path / OUTCOME
        parts = [self.config_bytes, self.index_bytes or b"", *([outcome.read_bytes()] if outcome.is_file() else [])]
        for shard in self.shards:
            parts += [shard.name.encode(), str(shard.size).encode(), shard.header]
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()

    def shard_of(self, name: str) -> Shard:
        """The shard that holds tensor `name`."""
        return self._shards[self.tensors[name].shard]

    @cached_property
    def _shards(self) -> Mapping[str, Shard]:
        return {shard.name: shard for shard in self.shards}

    def read(self, name: str, cut: Cut | None = None) -> torch.Tensor:
        """Tensor `name`, or the matrix (m, n) that `cut` takes from it, on the host, in its storage dtype.

        Raises CheckpointError for a file that changed or a dtype that torch does not know.
        """
        info, shard = self.tensors[name], self.shard_of(name)
        if info.dtype not in TORCH:
            raise CheckpointError(f"{info.shard}: {name} is stored as {info.dtype}, expected one of {', '.join(TORCH)}")
        if cut is None:
            return read_bytes(shard, info.start, info.end).view(TORCH[info.dtype]).reshape(info.shape)

        def fetch(start: int, count: int) -> torch.Tensor:
            return read_bytes(shard, info.start + start, info.start + start + count)

        return cut.oriented(read_cut(fetch, TORCH[info.dtype], cut))


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Read config, index and shard headers of a local directory, or of a Hub id whose files are in the Hub's cache.

    Symlinked shards (the cache's own layout) are followed. Raises CheckpointError for anything that is missing,
    damaged or inconsistent; no weight is read.
    """
    path = _find(model)
    release = (path / "params.json").exists() and not (path / "config.json").exists()
    about = path / ("params.json" if release else "config.json")
    config_bytes = _bytes(about, "a checkpoint directory needs its config.json")
    config = parse_json(config_bytes, about)
    if not isinstance(config, dict):
        raise CheckpointError(f"{about}: found {type(config).__name__}, expected a JSON object")
    if release:
        config = config | {"model_type": RELEASE}
    index_bytes, weight_map, shards = (None, None, _release(path)) if release else _shards(path)
    found = {(t.shard, t.name): t for shard in shards for t in shard.tensors}
    if weight_map is None:
        tensors = {name: info for (_, name), info in found.items()}
        if len(tensors) < len(found):
            twice = next(name for shard, name in found if tensors[name].shard != shard)
            raise CheckpointError(
                f"{path.name}: {twice} is in more than one file: weights that are split among GPUs cannot be joined "
                "here; try the Hub's version of this model"
            )
    else:
        for name, shard in weight_map.items():
            if (shard, name) not in found:
                raise CheckpointError(
                    f"{INDEX} says that {name} is in {shard}, which does not hold it; download both again"
                )
        # In file order, so that work walks each shard once from front to back.
        tensors = {name: info for (shard, name), info in found.items() if weight_map.get(name) == shard}
    return Checkpoint(path, config, config_bytes, index_bytes, shards, tensors)


def _shards(path: Path) -> tuple[bytes | None, dict[str, str] | None, tuple[Shard, ...]]:
    """(index or None, tensor -> shard or None, shards) of whichever format lies in a directory."""
    if (path / INDEX).exists():
        data = _bytes(path / INDEX, "")
        weight_map = _weight_map(data, path / INDEX, (".safetensors",))
        return data, weight_map, tuple(read_header(path / name) for name in sorted(set(weight_map.values())))
    if (path / SINGLE).exists():
        return None, None, (read_header(path / SINGLE),)
    if (path / PICKLE_INDEX).exists():
        data = _bytes(path / PICKLE_INDEX, "")
        files = _weight_map(data, path / PICKLE_INDEX, SUFFIXES)
        weight_map = {tensor: safetensors_name(file) for tensor, file in files.items()}
        index = safetensors_index(parse_json(data, path / PICKLE_INDEX))
        return index, weight_map, tuple(read_pickle(path / name) for name in sorted(set(files.values())))
    pickles = find_pickles(path)
    if len(pickles) > 1:
        raise CheckpointError(
            f"{path} holds {', '.join(pickles[:4])} and no {PICKLE_INDEX}; try a directory with one model"
        )
    if pickles:
        return None, None, (read_pickle(path / pickles[0], SINGLE),)
    raise CheckpointError(f"{path} holds neither {INDEX} nor {SINGLE}; try the directory that holds the weights")


def _release(path: Path) -> tuple[Shard, ...]:
    """The files of Mistral's own format: there is no index, each holds whole tensors."""
    if partial := sorted(p.name for p in path.glob("consolidated*.partial")):
        raise CheckpointError(
            f"{path} is unfinished: {partial[0]} is still there; repeat the command that makes it, with --resume"
        )
    for suffix, read in ((".safetensors", read_header), (".pt", read_pickle), (".pth", read_pickle)):
        files = sorted(path.glob(f"consolidated*{suffix}"))
        if len(files) == 1 and read is read_pickle:  # Mistral's own loader knows no other name for one file
            return (read_pickle(files[0], "consolidated.safetensors"),)
        if files:
            return tuple(read(file) for file in files)
    raise CheckpointError(
        f"{path} holds params.json and no consolidated*.safetensors or .pt; finish the download and try again"
    )


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


def _weight_map(data: bytes, path: Path, suffixes: tuple[str, ...]) -> dict[str, str]:
    index = parse_json(data, path)
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
        if not shard.endswith(suffixes):
            raise CheckpointError(f"{path.name}: {tensor} is in {shard!r}, expected a {suffixes[0]} file")
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
