"""Open a checkpoint directory: headers first, weights one tensor at a time. Hostile input stops here.

Nothing is executed, no path outside the directory is followed from the index, and every number in a header is checked
against the file before it is believed.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from laser.checkpoint.fingerprint import Stamp, fingerprint_of
from laser.checkpoint.formats import what_is, what_lies_in
from laser.checkpoint.hub import Hub, download, find, headers, listing, recognised, side_files
from laser.checkpoint.packed import as_plain, find_packings
from laser.checkpoint.pickles import PICKLE_INDEX, read_pickle, safetensors_name
from laser.checkpoint.quantised import Fp8, dequantise, recognise
from laser.checkpoint.safetensors import (
    BITS,
    DEEPEST_CONFIG,
    TORCH,
    Shard,
    TensorInfo,
    file_pieces,
    is_deep,
    parse_json,
    read_bytes,
    read_header,
)
from laser.checkpoint.slices import Slice, read_slice
from laser.checkpoint.weights import (
    INDEX,
    INDEXED,
    ORDER,
    SINGLE,
    check,
    disagreements,
    files_in,
    index_at,
    index_of,
    indexes,
    merge,
    nothing_found,
    order,
    read_by_vllm,
    require_absent,
    start_of,
)
from laser.errors import CheckpointError, DoubtWarning
from laser.files import read_regular
from laser.records import Fingerprint

__all__ = ["BITS", "INDEX", "SINGLE", "Checkpoint", "Shard", "TensorInfo", "open_checkpoint"]

OUTCOME = "laser.json"  # in a checkpoint that laser wrote
RELEASE = "mistral_release"  # stands for the model_type that Mistral's params.json does not name


@dataclass(frozen=True)
class OnTop:
    """An adapter whose merge a view gives in place of its origin's weights.

    sums: sha256 of its files, by their names; stamps: what tells that one has changed since
    weights: how many of the origin's matrices it changes
    given: base and adapter as they were named, BASE+ADAPTER; elsewhere: the same without folders of this machine
    """

    name: str
    sums: Mapping[str, str]
    stamps: Mapping[Path, Stamp | None]
    weights: int
    given: str = ""
    elsewhere: str = ""

    def with_it(self, origins: str) -> str:
        """What stands for the merge, of what stands for the origin."""
        return hashlib.sha256(
            "\n".join([origins, *(f"{n} {self.sums[n]}" for n in sorted(self.sums))]).encode()
        ).hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, known by its headers. Reads weights only in `read`."""

    path: Path
    config: Mapping[str, Any]
    config_bytes: bytes
    index_bytes: bytes | None  # None for a one-file checkpoint
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorInfo]
    hub: Hub | None = None  # where it comes from, if it was opened by its Hub id; `path` is then in the Hub's cache
    fp8: Fp8 | None = None  # which of its tensors are FP8 with scales
    origin: Checkpoint | None = None  # the one that this is a view of, in another dtype: its values and its identity
    remade: bool = False  # a view with values of its own, which its shards make from the origin's
    packed: str | None = None  # the format of an origin whose packed weights this view gives as plain numbers
    on_top: OnTop | None = None  # of a view that merges an adapter into the origin's weights
    left_out: tuple[str, ...] = ()  # copies of tensors that are not loaded, and so not among its shards' tensors

    @property
    def name(self) -> str:
        if self.on_top is not None and self.origin is not None:
            return f"{self.origin.name}+{self.on_top.name}"
        return self.path.name if self.hub is None else self.hub.repo.rpartition("/")[2]

    @cached_property
    def identity(self) -> str:
        """sha256 over config, index, and each shard's name, size and header: the same wherever the files lie.

        A reduction has its source's headers; its laser.json, which counts too, tells the two apart.
        """
        if self.origin is not None:
            return self.origin.identity if self.on_top is None else self.on_top.with_it(self.origin.identity)
        digest = hashlib.sha256()

        def add(part: bytes) -> None:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)

        add(self.config_bytes)
        add(self.index_bytes or b"")
        if (self.path / OUTCOME).is_file():
            add(read_regular(self.path / OUTCOME))
        for shard in self.shards:
            add(shard.name.encode())
            add(str(shard.size).encode())
            add(shard.header)
        return digest.hexdigest()

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Which weights these are, by their bytes (fingerprint.py), when it was first asked for."""
        if self.origin is None:
            return fingerprint_of(self.shards, self.hub)
        known, on_top = self.origin.fingerprint, self.on_top
        if on_top is None:
            return known
        return Fingerprint(*(each and on_top.with_it(each) for each in (known.samples, known.content)))

    def shard_of(self, name: str) -> Shard:
        """The shard that holds tensor `name`."""
        return self._shards[self.tensors[name].shard]

    @cached_property
    def _shards(self) -> Mapping[str, Shard]:
        return {shard.name: shard for shard in self.shards}

    def read(self, name: str, part: Slice | None = None) -> torch.Tensor:
        """The values of tensor `name`, or of the matrix (m, n) that `part` takes from it, on the host: in the storage
        dtype, or float32 where they are FP8 with scales.

        Raises CheckpointError for a file that changed or a dtype that torch does not know.
        """
        if self.origin is not None and not self.remade:
            return self.origin.read(name, part)
        if self.fp8 is None or name not in self.fp8.scales:
            return self.raw(name, part)
        W = dequantise(self.raw(name), self.raw(self.fp8.scales[name]), self.fp8.block)
        return W if part is None else part.of(W)

    def raw(self, name: str, part: Slice | None = None) -> torch.Tensor:
        """What is stored of tensor `name`, or of the matrix (m, n) that `part` takes from it, in its storage dtype."""
        info, shard = self.tensors[name], self.shard_of(name)
        if info.dtype not in TORCH:
            raise CheckpointError(f"{info.shard}: {name} is stored as {info.dtype}, expected one of {', '.join(TORCH)}")
        if part is None:
            return read_bytes(shard, info.start, info.end).view(TORCH[info.dtype]).reshape(info.shape)

        def fetch(start: int, count: int) -> torch.Tensor:
            return read_bytes(shard, info.start + start, info.start + start + count)

        return part.oriented(read_slice(fetch, TORCH[info.dtype], part))


def opened_checkpoint(model: Checkpoint | str | Path) -> Checkpoint:
    """The checkpoint, opened where only its name is given."""
    return model if isinstance(model, Checkpoint) else open_checkpoint(model)


def open_checkpoint(model: str | Path, need: str = "ranges") -> Checkpoint:
    """Read config, index and shard headers of a local directory, or of a Hub id `org/name[@revision]`.

    A Hub id whose files are in the Hub's cache is used from there; otherwise its headers are fetched, and weights come
    by byte range when they are read. `need` fetches more at once: "files", everything but the weights, or "weights",
    everything. Symlinked shards (the cache's own layout) are followed. Raises CheckpointError for anything that is
    missing, damaged or inconsistent; no weight is read. Warns (DoubtWarning) where files disagree about the weights,
    and reads those that transformers would load.
    """
    path, hub = Path(model), None
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError as error:  # a name that no file can have, or a folder that may not be looked into
        raise CheckpointError(f"cannot read {str(path)[:200]}: {error.strerror}; check the path") from error
    if is_folder:
        path = path.resolve()
    elif is_there:
        raise CheckpointError(what_is(path))
    else:
        hub = find(str(model))
        if hub is None:
            raise CheckpointError(f"no such model: {path} is not a directory; try a checkpoint directory or a Hub id")
        path = hub.folder
        if need != "ranges":
            side_files(hub)
    # Mistral's own format, which the Hub's cache holds only beside the Hub's.
    release = hub is None and (path / "params.json").exists() and not (path / "config.json").exists()
    about = path / ("params.json" if release else "config.json")
    if hub is None and not about.exists() and (message := what_lies_in(path)):
        raise CheckpointError(message)
    config_bytes = _bytes(about, "a checkpoint directory needs its config.json")
    config = parse_json(config_bytes, about)
    if not isinstance(config, dict):
        raise CheckpointError(f"{about}: found {type(config).__name__}, expected a JSON object; download it again")
    if is_deep(config, DEEPEST_CONFIG):
        raise CheckpointError(
            f"{about} is nested more than {DEEPEST_CONFIG} deep, which no config is; download it again"
        )
    if release:
        config = config | {"model_type": RELEASE}
    weights = Weights(None, None, _release(path)) if release else _weights(path, hub, config, need)
    tensors = {info.name: info for shard in weights.shards for info in shard.tensors}
    for message in weights.doubts:
        warnings.warn(message, DoubtWarning, stacklevel=2)
    stored = Checkpoint(
        path,
        config,
        config_bytes,
        weights.index_bytes,
        weights.shards,
        tensors,
        weights.hub,
        left_out=weights.left_out,
    )
    if packings := find_packings(stored):
        return as_plain(stored, packings)
    return replace(stored, fp8=recognise(path.name if hub is None else hub.repo, config, tensors))


def by_whole_shards(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint; whoever reads from a shard on the Hub waits for the whole of it to come into the cache."""

    def wait_for(shard: Shard) -> Shard:
        whole = shard.whole
        return shard if whole is None else replace(shard, data=lambda start, end: file_pieces(whole(), start, end))

    if all(shard.whole is None for shard in checkpoint.shards):
        return checkpoint
    return replace(checkpoint, shards=tuple(wait_for(shard) for shard in checkpoint.shards))


@dataclass(frozen=True)
class Weights:
    """What is loaded of a model's files: each tensor in one shard, and an index that names them all."""

    hub: Hub | None  # with ETags
    index_bytes: bytes | None
    shards: tuple[Shard, ...]
    left_out: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


def _weights(path: Path, hub: Hub | None, config: Mapping[str, Any], need: str) -> Weights:
    """The weights that transformers would load, as laser/checkpoint/weights.py has it."""
    place = path if hub is None else hub.repo
    names = files_in(path) if hub is None else listing(hub)
    start = start_of(names, config, place)
    if start is None:
        for name in order(config) if hub is None else ():
            require_absent(path / name)
        if message := recognised(hub.repo, hub.commit) if hub else what_lies_in(path):
            raise CheckpointError(message)
        raise nothing_found(place, files_in(path, "**/*") if hub is None else names)
    if hub is not None:  # they are small; one that is not ours tells what others would read
        download(hub, sorted({INDEX, PICKLE_INDEX} & names))
    index = _index(path / start, hub, names) if start in (INDEX, PICKLE_INDEX) else None
    files = [start] if index is None else sorted(set(index["weight_map"].values()))
    pickled = not files[0].endswith(".safetensors")
    if pickled:
        hub = download(hub, files) if hub is not None else None  # a range of a pickle says nothing
        shards = _pickles(path, files, alone=index is None)
    elif hub is None:
        shards = tuple(read_header(path / file) for file in files)
    else:
        hub, shards = headers(hub, files)
        hub = download(hub, files) if need == "weights" else hub  # after their ETags are known, so that it is checked
    merged = merge(shards)
    check(place, start, names, merged, index, index_at(path / INDEXED[start]) if start in INDEXED else {})
    vllm = read_by_vllm(names, index_at(path / INDEX).values() if INDEX in names else None)
    if index is not None and pickled:
        index["weight_map"] = {tensor: safetensors_name(file) for tensor, file in index["weight_map"].items()}
    name = path.name if hub is None else hub.repo
    doubts = tuple(f"{name}: {each}" for each in disagreements(start, names, files, vllm, merged, index))
    index_bytes = None
    if index is not None:
        tidy = not pickled and indexes(index, merged)
        index_bytes = _bytes(path / start, "") if tidy else index_of(index, merged)
    return Weights(hub, index_bytes, merged.shards, merged.left_out, doubts)


def _pickles(path: Path, files: Sequence[str], alone: bool) -> tuple[Shard, ...]:
    names = [SINGLE] if alone else [safetensors_name(file) for file in files]
    if twice := [file for file, name in zip(files, names, strict=True) if names.count(name) > 1]:
        raise CheckpointError(f"{PICKLE_INDEX} names {' and '.join(twice)}, which would become one file; rename one")
    return tuple(read_pickle(path / file, name) for file, name in zip(files, names, strict=True))


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
            shards = tuple(read(file) for file in files)
            if twice := merge(shards).copies:
                raise CheckpointError(
                    f"{path.name}: {next(iter(twice))} is in more than one file: weights that are split among GPUs "
                    "cannot be joined here; try the Hub's version of this model"
                )
            return shards
    raise CheckpointError(
        f"{path} holds params.json and no consolidated*.safetensors or .pt; finish the download and try again"
    )


def _index(path: Path, hub: Hub | None, names: Collection[str]) -> dict[str, Any]:
    """An index whose weight_map can be followed. names: what lies beside it."""
    index, suffix = parse_json(_bytes(path, ""), path), ".safetensors" if path.name == INDEX else ".bin"
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path.name}: found no weight_map, expected tensor names and files; download it again")
    for tensor, shard in weight_map.items():
        plain = isinstance(shard, str) and shard not in ("", ".", "..") and not re.search(r"[/\\\0-\x1f\x7f]", shard)
        if not plain:
            raise CheckpointError(
                f"{path.name}: {tensor} points to {shard!r}, expected the name of a file in the same directory; "
                "do not use this checkpoint"
            )
        if not shard.endswith(suffix):
            raise CheckpointError(f"{path.name}: {tensor} is in {shard!r}, expected a {suffix} file")
        if hub is None and shard not in names:
            require_absent(path.parent / shard)
            other = next((f", or remove the index, and {name} is read" for name in ORDER[2:] if name in names), "")
            raise CheckpointError(
                f"{path.name} names {shard}, which is missing from {path.parent}; finish the download and try again"
                f"{other if path.name == INDEX else ''}"
            )
    return index


def _bytes(path: Path, why: str) -> bytes:
    try:
        return read_regular(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; {why or 'download it again'}") from error
