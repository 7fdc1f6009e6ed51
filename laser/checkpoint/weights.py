"""Which files are a model's weights, and which copy of a tensor counts.

The rule is that of transformers, as in `_get_resolved_checkpoint_files` and `_load_pretrained_model` of
transformers/modeling_utils.py (5.23): one file before an index, safetensors before pickles, whole shards in the order
of their names, the last copy of a tensor. What vLLM would read (`_prepare_weights`,
`filter_duplicate_safetensors_files` in its model_loader, 0.11) is only reported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from laser.checkpoint.formats import NO_MODEL
from laser.checkpoint.pickles import PICKLE, PICKLE_INDEX, SUFFIXES
from laser.checkpoint.safetensors import CHUNK, Shard, TensorInfo, header_text, parse_header, pieces
from laser.checkpoint.side_files import ADAPTER, is_desktops
from laser.errors import CheckpointError
from laser.files import read_regular, require_regular

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ORDER = (SINGLE, INDEX, PICKLE, PICKLE_INDEX)  # transformers starts from the first that is there
DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
INDEXED = {SINGLE: INDEX, PICKLE: PICKLE_INDEX}  # one file -> the index that may lie beside it
# What classes of transformers call their base: a tensor is loaded by its name with it, or without.
BASES = ("model", "transformer", "gpt_neox", "backbone", "bert", "roberta")
VLLM_SKIPS = {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"}
SHOWN = 3  # names in a sentence
COMPARED = 4 << 30  # bytes of copies that are looked at when a model is opened


def files_in(folder: Path, pattern: str = "*") -> frozenset[str]:
    """Names of the files in a directory that can be opened, as the Hub would list them."""
    found = (p for p in folder.glob(pattern) if p.is_file() and not is_desktops(p.name))
    return frozenset(p.relative_to(folder).as_posix() for p in found)


def require_absent(path: Path) -> None:
    """Raises CheckpointError for what `files_in` passes over and yet is there: a FIFO, a device, a link to itself."""
    try:
        require_regular(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; put the file itself there") from error


def order(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The files for which transformers looks, one after the other: those of any model, or the one that config names."""
    named = config.get("transformers_weights")
    return ORDER if named is None else (str(named),)


def start_of(names: Collection[str], config: Mapping[str, Any], place: object) -> str | None:
    """The file from which the weights of a model with these files are loaded: an index, or the one file that holds all.

    A lone pickle of any name is taken too, though transformers asks for its name; None where there is nothing to load.
    Raises CheckpointError for weights that transformers would load and laser cannot write.
    """
    distributed = next((name for name in sorted(names) if DISTRIBUTED.fullmatch(name)), None)
    if distributed:
        raise CheckpointError(
            f"{place} holds {distributed}, a part of a distributed checkpoint, which transformers joins and laser "
            "does not; load it with transformers, save it with save_pretrained, and try that"
        )
    named = config.get("transformers_weights")
    if named is not None and named not in ORDER[:2]:
        if not isinstance(named, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", named) or named not in names:
            raise CheckpointError(
                f"{place}: config.json names {named!r} as the weights (transformers_weights), expected a .safetensors "
                f"file beside it; call an index {INDEX} and take that entry out of config.json"
            )
    start = next((name for name in order(config) if name in names), None)
    return start or (lone_pickle(names) if named is None else None)


def lone_pickle(names: Collection[str]) -> str | None:
    """The pickle that is all that a directory has of weights, whatever its name, unless that says that it is a part."""
    top = [name for name in names if "/" not in name and name.endswith((".safetensors", *SUFFIXES))]
    found = [name for name in top if not NO_MODEL.fullmatch(name)]
    alone = len(found) == 1 and found[0].endswith(SUFFIXES) and not re.search(r"-\d+-of-\d+", found[0])
    return found[0] if alone else None


def read_by_vllm(names: Collection[str], indexed: Collection[str] | None) -> frozenset[str]:
    """The files that vLLM would read; indexed: those that INDEX names, None where there is no index."""
    top = sorted(name for name in names if "/" not in name)
    if consolidated := [name for name in top if re.fullmatch(r"consolidated.*\.safetensors", name)]:
        return frozenset(consolidated)
    if found := [name for name in top if name.endswith(".safetensors")]:
        return frozenset(found if indexed is None else set(found) & set(indexed))
    for suffix in SUFFIXES[:2]:
        if found := {name for name in top if name.endswith(suffix)}:
            return frozenset(found - VLLM_SKIPS)
    return frozenset()


def index_at(path: Path) -> dict[str, str]:
    """tensor -> file by an index; empty where it is damaged: whoever needs it says how."""
    try:
        return {str(tensor): str(file) for tensor, file in json.loads(read_regular(path))["weight_map"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}


def nothing_found(place: Path | str, names: Collection[str]) -> CheckpointError:
    """What to say of a model without weights where they are looked for.

    place: its directory, or its id on the Hub; names: all its files, subfolders' too
    """
    missing = f"{place} holds neither {INDEX} nor {SINGLE}"
    get = "" if isinstance(place, Path) else f"fetch it with `hf download {place} --local-dir DIR`, "
    pickles = sorted(n for n in names if "/" not in n and n.endswith(SUFFIXES) and not NO_MODEL.fullmatch(n))
    if len(pickles) > 1:
        return CheckpointError(
            f"{place} holds {', '.join(pickles[:4])} and no {PICKLE_INDEX}; try a directory with one model"
        )
    inside = sorted({name.rpartition("/")[0] for name in names if "/" in name and name.rpartition("/")[2] in ORDER})
    if inside:
        more = f" (and in {len(inside) - 1} more)" if len(inside) > 1 else ""
        there = f"{place}/{inside[0]}" if isinstance(place, Path) else f"DIR/{inside[0]}"
        return CheckpointError(f"{missing}; its folder {inside[0]} holds weights{more}: {get}try {there}")
    return CheckpointError(f"{missing}; try the directory that holds the weights")


@dataclass(frozen=True)
class Merged:
    """Shards as they are loaded together: each tensor once.

    copies: tensor -> where it lies, in the order of loading, for each that lies in more than one shard; the last counts
    """

    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorInfo]  # in file order, so that work walks each shard once from front to back
    copies: Mapping[str, tuple[tuple[Shard, TensorInfo], ...]]

    @property
    def left_out(self) -> tuple[str, ...]:
        """The copies that do not count, for the record."""
        return tuple(f"{name} of {shard.name}" for name, found in self.copies.items() for shard, _ in found[:-1])


def merge(shards: Sequence[Shard]) -> Merged:
    """What transformers makes of shards, given in the order in which it loads them: the last copy of a tensor counts.

    A shard loses the copies that do not, and is gone where it held nothing else.
    """
    found: dict[str, list[tuple[Shard, TensorInfo]]] = {}
    for shard in shards:
        for info in shard.tensors:
            found.setdefault(info.name, []).append((shard, info))
    copies = {name: tuple(places) for name, places in found.items() if len(places) > 1}
    lost: dict[str, set[str]] = {}
    for name, places in copies.items():
        for shard, _ in places[:-1]:
            lost.setdefault(shard.name, set()).add(name)
    whole = [without(shard, lost[shard.name]) if shard.name in lost else shard for shard in shards]
    kept = tuple(shard for shard in whole if shard.tensors)
    return Merged(kept, {info.name: info for shard in kept for info in shard.tensors}, copies)


def without(shard: Shard, names: Collection[str]) -> Shard:
    """The shard as if it had never held these tensors: the others in their order, the metadata as it was."""
    text = json.loads(shard.header[8:])
    header, at, places = {"__metadata__": text["__metadata__"]} if "__metadata__" in text else {}, 0, []
    for info in shard.tensors:
        if info.name not in names:
            size = info.end - info.start
            header[info.name] = text[info.name] | {"data_offsets": [at, at + size]}
            places.append((at, at + size, info.start))
            at += size
    raw = header_text(header)
    base = 8 + len(raw)
    made = parse_header(shard.name, shard.path, base + at, raw)

    def data(start: int, end: int) -> Iterator[memoryview]:
        if start < base:
            yield memoryview(made.header)[start:end]
        for low, high, old in places:
            first, last = max(start, base + low), min(end, base + high)
            if first < last:
                yield from pieces(shard, old + first - base - low, old + last - base - low)

    return replace(made, data=data, stamp=shard.stamp)


def same_bytes(copies: Sequence[tuple[Shard, TensorInfo]]) -> bool | None:
    """Whether copies of a tensor are equal; None where that cannot be seen without fetching them from the Hub."""
    (shard, info), *others = copies
    if any((other.dtype, other.shape) != (info.dtype, info.shape) for _, other in others):
        return False
    if any(place.whole is not None and not place.path.exists() for place, _ in copies):
        return None
    return all(_equal(shard, info, place, other) for place, other in others)


def _equal(a: Shard, x: TensorInfo, b: Shard, y: TensorInfo) -> bool:
    def part(shard: Shard, info: TensorInfo, at: int) -> bytes:
        return b"".join(pieces(shard, info.start + at, min(info.start + at + CHUNK, info.end)))

    return all(part(a, x, at) == part(b, y, at) for at in range(0, x.end - x.start, CHUNK))


def check(
    place: object,
    start: str,
    names: Collection[str],
    merged: Merged,
    index: Mapping[str, Any] | None,
    beside: Mapping[str, str],
) -> None:
    """Raises CheckpointError where what is loaded cannot be all of the model, or one parameter would be loaded twice.

    names: the files that are there; index: the one that is followed; beside: the weight_map of one that is not, since
    one file is loaded before it
    """
    for tensor, file in (index or {}).get("weight_map", {}).items():
        if tensor not in merged.tensors:
            raise CheckpointError(
                f"{start} says that {tensor} is in {file}, which does not hold it, nor does another; download all again"
            )
    lacking = [name for name in beside if name not in merged.tensors and re.search(r"\.\d+\.", name)]
    if lacking and set(beside.values()) <= set(names):
        raise CheckpointError(
            f"{place}: transformers loads {start} and not what {INDEXED[start]} names, but it lacks {lacking[0]}"
            f"{_more(lacking)}, which the index says is in {beside[lacking[0]]}; remove {start}, or an old index"
        )
    for name, info in merged.tensors.items():
        for twin in (f"{base}.{name}" for base in BASES):
            if twin in merged.tensors:
                raise CheckpointError(
                    f"{place}: {name} is in {info.shard}, and {twin} in {merged.tensors[twin].shard}: transformers "
                    "would load both into one parameter; remove the one that is not meant"
                )


def indexes(index: Mapping[str, Any], merged: Merged) -> bool:
    """Whether an index says where every tensor is, and has the metadata without which transformers does not load it."""
    found = {name: info.shard for name, info in merged.tensors.items()}
    return found == index["weight_map"] and isinstance(index.get("metadata"), dict)


def index_of(index: Mapping[str, Any], merged: Merged) -> bytes:
    """The index that says where every tensor is, those that `index` names in its own order, the rest as it was."""
    files = {name: info.shard for name, info in merged.tensors.items()}
    total = sum(info.end - info.start for info in merged.tensors.values())
    metadata = index.get("metadata") if isinstance(index.get("metadata"), dict) else {"total_size": total}
    weight_map = {name: files[name] for name in index["weight_map"]} | files
    return (json.dumps(dict(index) | {"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n").encode()


def disagreements(
    start: str,
    names: Collection[str],
    read: Collection[str],
    vllm: Collection[str],
    merged: Merged,
    index: Mapping[str, Any] | None,
) -> Iterator[str]:
    """A sentence for each way in which files disagree about the weights, or another program could read others.

    start: as `start_of` found it; names: the files that are there; read: those that are read; vllm: those that vLLM
    would read; index: the one that is followed, with the names of merged's shards
    """
    if start.endswith(SUFFIXES) and start != PICKLE:
        yield f"{start} is read as the model; transformers loads it only under the name {PICKLE}"
    elif set(read) != set(vllm):
        yield (
            f"{_few(read)} {'is' if len(read) == 1 else 'are'} read, as transformers does; vLLM would read "
            f"{_other_files(read, vllm)}; an output holds only what is read here"
        )
    if ADAPTER in names:
        yield (
            f"{ADAPTER} lies beside the weights: transformers with peft would put its adapter on top of them; laser "
            "reads and measures them without it, and an output has no adapter"
        )
    yield from _copy_problems(merged)
    if index is not None:
        yield from _index_problems(merged, index["weight_map"])
        if not isinstance(index.get("metadata"), dict):
            found = "metadata that are no object" if index.get("metadata") is not None else "no metadata"
            yield f"{start} has {found}, without which transformers does not load it; an output's index has some"


def _copy_problems(merged: Merged) -> Iterator[str]:
    """Sentences on tensors that lie in more than one shard."""
    stored = sum(info.end - info.start for found in merged.copies.values() for _, info in found)
    equal = {name: same_bytes(found) if stored <= COMPARED else None for name, found in merged.copies.items()}
    last = "the last file's copy is read, as transformers does, and an output holds no other"
    for verdict, how in (
        (True, f"with the same values: {last}"),
        (False, f"with other values: {last}; vLLM, and programs that go by the index, may take another"),
        (None, f"which were not compared: {last}; where they differ, other programs may take another"),
    ):
        if names := [name for name in equal if equal[name] is verdict]:
            files = " and in ".join(shard.name for shard, _ in merged.copies[names[0]])
            yield f"{names[0]} is in {files}{_more(names)}, {how}"


def _index_problems(merged: Merged, weight_map: Mapping[str, str]) -> Iterator[str]:
    """Sentences on tensors that an index does not name, or names elsewhere."""
    if names := [name for name in merged.tensors if name not in weight_map]:
        where = merged.tensors[names[0]].shard
        yield (
            f"{names[0]} is in {where} and not in the index{_more(names)}: read, as transformers and vLLM do, and an "
            "output's index names it"
        )
    there = {info.name: info.shard for info in merged.tensors.values() if info.name not in merged.copies}
    if names := [name for name, file in weight_map.items() if there.get(name, file) != file]:
        yield (
            f"{names[0]} is in {there[names[0]]}, where the index says {weight_map[names[0]]}{_more(names)}: read, as "
            "transformers and vLLM do, and an output's index says where it is"
        )


def _other_files(read: Collection[str], vllm: Collection[str]) -> str:
    if not vllm:
        return "nothing, for the index names no file that is there"
    if set(vllm) > set(read):
        return f"{_few(set(vllm) - set(read))} as well"
    return f"{_few(vllm)} instead"


def _few(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""
