"""A PEFT LoRA adapter merged into its base, one matrix in memory: the ordinary merge, streamed.

For every adapted weight W becomes merge(W, s B A), with s = alpha / r, or alpha / sqrt(r) for rsLoRA, and ranks and
alphas of their own where rank_pattern and alpha_pattern match a weight's name as PEFT matches them. PEFT keeps A and B
in float32, whatever their file has, and adds s B A to a module's weight without casting it first: formula once. To an
embedding, and to a parameter of experts, it adds it cast: formula delta-first (formulas.py). B A is computed in float32
as there, so the bits are PEFT's on the same machine. What modules_to_save holds takes the base's place, cast to its
dtype. Whatever else an adapter may be is refused by its name: a merge that leaves something out would be another model.
So is a packed base: what is merged into its plain numbers could not be stored as they were.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from laser.checkpoint.at_rest import CARD, OPTIONS_FILE
from laser.checkpoint.convert import write_directory
from laser.checkpoint.fingerprint import Stamp, stamp_of
from laser.checkpoint.hub import hub_origin
from laser.checkpoint.matrices import Matrix, list_matrices
from laser.checkpoint.reader import INDEX, OUTCOME, Checkpoint, OnTop
from laser.checkpoint.safetensors import (
    TORCH,
    Shard,
    TensorInfo,
    parse_json,
    pieces,
    read_header,
    sha256_of,
    tensor_in,
    within,
)
from laser.checkpoint.slices import bytes_of
from laser.checkpoint.source import require_unchanged
from laser.differences.formats import STORED_FLOATS
from laser.differences.formulas import Formula
from laser.differences.in_memory import memory_of
from laser.differences.places import (
    KEPT_FACTORS,
    PEFT,
    PEFT_FORMULAS,
    ModulePlace,
    module_places,
    of_expert,
    rows_in_parameter,
    stems,
)
from laser.differences.unmerge import CONFIG, MODEL, is_tied, side_files_of
from laser.errors import CheckpointError, UsageError, first_line
from laser.files import read_regular, require_regular
from laser.records import LARGEST_FLOAT

# What would make the merge another one than written here, where it is set.
OTHERWISE = ("use_dora", "fan_in_fan_out", "trainable_token_indices", "layer_replication")
OTHERWISE += ("lora_bias", "use_qalora", "alora_invocation_tokens", "arrow_config", "velora_config")
OTHERWISE += ("corda_config", "lora_ga_config", "loftq_config", "kasa_config", "monteclora_config", "use_bdlora")
# What tells PEFT which layers an adapter is of.
NARROWING = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
# Where training began from the base's own weights. PiSSA, OLoRA and others put what A and B do not hold in their place.
INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")
# What tells of a base's own weights, and not of those that are written.
LEFT_BEHIND = (CARD, OPTIONS_FILE, OUTCOME)
NUMBERS_AT_ONCE = 1 << 22  # numbers that are looked at together, in a copy of eight bytes each


@dataclass(frozen=True)
class Lora:
    """The adapter of one weight in memory: the names of A and B in its file, and the scale."""

    A: str
    B: str
    scale: float
    place: ModulePlace


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter as its folder says. updates, saved: by the base's tensors; experts: by its matrices."""

    path: Path
    updates: Mapping[str, Lora]
    experts: Mapping[str, Lora]
    saved: Mapping[str, str]

    @property
    def weights(self) -> int:
        """How many of the base's matrices it changes."""
        return len(self.updates) + len(self.experts) + len(self.saved)

    def product(self, lora: Lora, factor: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """s B A of the adapted weight, or of one expert in it, float32. factor: name -> A or B as stored, float32."""
        A, B = of_expert(factor(lora.A), factor(lora.B), lora.place)
        # As PEFT multiplies an embedding's factors before it transposes their product.
        return (A.T @ B.T).T * lora.scale if lora.place.embedding else (B @ A) * lora.scale

    def tensor(self, name: str) -> torch.Tensor:
        return tensor_of(self.path, name)


def tensor_of(path: Path, name: str) -> torch.Tensor:
    try:
        return tensor_in(_adapter_header(path, stamp_of(path)), name)
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f"{path}: {name}: {first_line(error)}; download it again") from error


@lru_cache(1)
def _adapter_header(path: Path, stamp: Stamp | None) -> Shard:
    """An adapter's file by its header, which is read again only where the file is another."""
    return read_header(path)


def open_adapter(folder: Path, base: Checkpoint) -> PeftAdapter:
    """Raises CheckpointError for what is missing, damaged or of another base, UsageError for no plain LoRA, or for a
    base whose weights are packed."""
    if base.packed:
        raise UsageError(
            f"{base.name} holds {base.packed} weights, into which no adapter can be merged; try the unquantised model, "
            "and quantise the result again"
        )
    place, path = folder / CONFIG, folder / MODEL
    if place.exists() and not path.exists():
        _require_no_other_form(folder)
    try:
        config = parse_json(read_regular(place), place)
        require_regular(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror}; try the directory of a PEFT adapter") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise UsageError(f"{place}: found an adapter of type {kind!r}, expected 'LORA'; try PEFT's own merge")
    _require_known(config, place)
    found = _Reading(path, config, base, {info.name: info for info in read_header(path).tensors})
    for name in found.tensors:
        found.take(name)
    of_experts = {m.tensor for m in found.matrices if m.name in found.experts}
    changed = Counter(chain(found.updates, of_experts, found.saved))
    if twice := sorted(name for name, count in changed.items() if count > 1):
        raise UsageError(f"{path} changes {twice[0]} in two ways; try PEFT's own merge")
    adapter = PeftAdapter(path, found.updates, found.experts, found.saved)
    if not adapter.weights:
        raise CheckpointError(f"{path} holds no adapter of {base.name}; download it again")
    embeddings = {m.tensor for m in found.matrices if m.role == "embedding"}
    if is_tied(base) and embeddings & found.saved.keys() and not config.get("ensure_weight_tying"):
        raise UsageError(
            f"{place}: {min(embeddings & found.saved.keys())} was trained whole and is the head as well, which PEFT "
            "then keeps as it was; try PEFT's own merge"
        )
    return adapter


def _require_no_other_form(folder: Path) -> None:
    """Raises UsageError for an adapter whose factors lie in a pickle, or in several files, with how to convert it."""
    pickle, shards = folder / "adapter_model.bin", sorted(folder.glob("adapter_model-*.safetensors"))
    if pickle.exists():
        way = f"PeftModel.from_pretrained(model, {str(folder)!r}).save_pretrained(NEW) writes it"
        raise UsageError(f"{pickle} is a pickle, expected {MODEL}; try it by PEFT: {way}")
    if shards:
        raise UsageError(
            f"{folder} holds {len(shards)} shards as {shards[0].name}, expected one {MODEL}; try to join them: "
            "safetensors.torch.load_file reads each, save_file writes all their tensors"
        )


def _require_known(config: Mapping[str, Any], place: Path) -> None:
    """Raises UsageError for a config that says of no plain LoRA, or says it as PEFT does not."""
    for key in OTHERWISE:
        if config.get(key):
            raise UsageError(f"{place} sets {key}, which is not merged here; try PEFT's own merge")
    if config.get("bias", "none") != "none":
        raise UsageError(f"{place}: bias is {config['bias']!r}, expected 'none'; try PEFT's own merge")
    initial = config.get("init_lora_weights")
    if (initial.lower() if isinstance(initial, str) else initial) not in INITIAL:
        raise UsageError(
            f"{place}: init_lora_weights is {initial!r}, expected one of {', '.join(map(str, INITIAL[1:]))}, which "
            "leave the base's weights as they are; try PEFT's own merge"
        )
    for key, patterns, is_one, expected in (
        ("r", "rank_pattern", _is_rank, "a positive whole number"),
        ("lora_alpha", "alpha_pattern", _is_alpha, "a positive number"),
    ):
        if not is_one(config.get(key)):
            raise UsageError(f"{place}: {key} is {config.get(key)!r}, expected {expected}; check the adapter")
        by_name = config.get(patterns)
        if by_name is not None and not isinstance(by_name, dict):
            raise UsageError(f"{place}: {patterns} is {by_name!r}, expected an object; check the adapter")
        for pattern, value in (by_name or {}).items():
            if not is_one(value):
                raise UsageError(
                    f"{place}: {patterns} has {value!r} for {pattern!r}, expected {expected}; check the adapter"
                )
            _require_pattern(pattern, f"{place}: {patterns}")
    for key, single, one, expected in (
        *((key, False, str, "a list of names") for key in ("target_parameters", "modules_to_save")),
        *((key, True, str, "names or a pattern") for key in ("target_modules", "exclude_modules", "layers_pattern")),
        ("layers_to_transform", True, int, "numbers of layers"),
    ):
        value: Any = config.get(key)
        alone = single and type(value) is one
        if not (value is None or alone or (isinstance(value, list) and all(type(each) is one for each in value))):
            raise UsageError(f"{place}: {key} is {value!r}, expected {expected}; check the adapter")
        # PEFT reads the items of these two as patterns, and those of the others as names.
        listed: list[Any] = value if isinstance(value, list) and key in ("modules_to_save", "layers_pattern") else []
        for pattern in [value] if alone and one is str else listed:
            _require_pattern(str(pattern), f"{place}: {key}")


def _require_pattern(pattern: str, where: str) -> None:
    try:
        re.compile(_as_pattern(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"{where} has {pattern!r}, which is no pattern ({error}); check the adapter") from error


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= LARGEST_FLOAT


@dataclass
class _Reading:
    """An adapter's file, tensor by tensor."""

    path: Path
    config: Mapping[str, Any]
    base: Checkpoint
    tensors: Mapping[str, TensorInfo]
    updates: dict[str, Lora] = field(default_factory=dict)
    experts: dict[str, Lora] = field(default_factory=dict)
    saved: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.matrices = list_matrices(self.base)
        self.memory = memory_of(self.base)
        self.adapted: dict[str, list[tuple[Matrix, ModulePlace]]] = {}
        # Adapters of transformers 4 have the names of the checkpoint, which PEFT takes as well: those of memory first.
        for places in (module_places(self.matrices, self.memory), module_places(self.matrices)):
            known = set(self.adapted)
            for m in self.matrices:
                if m.name in places and places[m.name].weight not in known:
                    self.adapted.setdefault(places[m.name].weight, []).append((m, places[m.name]))
        self.parameters = sorted(w for w, found in self.adapted.items() if found[0][1].parameter and self.targeted(w))
        of = stems(self.adapted[w][0][1] for w in self.parameters)
        self.stems = {stem: weight for weight, stem in of.items()}

    def targeted(self, weight: str) -> bool:
        """Whether target_parameters names a parameter, as PEFT matches it."""
        named = self.config.get("target_parameters") or ()
        return any(weight == each or weight.endswith(f".{each}") for each in named)

    def take(self, name: str) -> None:
        bare = name.removeprefix(PEFT)
        stem, _, what = name.rpartition(".lora_")
        if name == bare or (stem and what not in ("A.weight", "B.weight", "embedding_A", "embedding_B")):
            raise UsageError(f"{self.path}: {name} is no part of a plain LoRA; try PEFT's own merge")
        if not stem:
            self.whole(name, bare)
        elif what in ("A.weight", "embedding_A"):
            self.factors(name, f"{stem}.lora_{what.replace('A', 'B')}", stem, what)
            self.require_adapted(name, stem)
        elif f"{stem}.lora_{what.replace('B', 'A')}" not in self.tensors:
            raise CheckpointError(f"{self.path}: {name} has no lora_A; download it again")

    def require_adapted(self, name: str, stem: str) -> None:
        """Raises UsageError for factors that PEFT passes over without a word, as its config names no such layer."""
        module, config = stem.removeprefix(PEFT), self.config
        if stem in self.stems or self.targeted(f"{module}.weight"):
            return
        if str(config.get("target_modules")).lower() == "all-linear":
            config = {**config, "target_modules": self.linear}
        if not is_adapted(config, module):
            raise UsageError(
                f"{self.path}: {name} is of a layer that {CONFIG} leaves out, and PEFT does so; correct its "
                f"{', '.join(NARROWING)}, or try PEFT's own merge"
            )

    @cached_property
    def linear(self) -> list[str]:
        """The layers that all-linear stands for: PEFT takes no embedding among them, and no head."""
        kept = [m for m in self.matrices if m.is_matrix and m.role not in ("embedding", "head")]
        places = module_places(kept)
        return [m.tensor.removesuffix(".weight") for m in kept] + [place.weight for place in places.values()]

    def whole(self, name: str, bare: str) -> None:
        """A tensor that takes the base's place; or the base's own, which PEFT saves below an adapted head."""
        target = self.stored(bare.replace(".base_layer.", "."))
        if target not in self.base.tensors:
            if self.is_copy(name, target):
                return
            raise CheckpointError(
                f"{self.path}: {name} is of {target}, which {self.base.name} has not; is that its base?"
            )
        info, expected = self.tensors[name], self.base.tensors[target]
        if info.shape != expected.shape:
            raise CheckpointError(f"{self.path}: {name} has shape {list(info.shape)}, expected {list(expected.shape)}")
        own = ".base_layer." not in bare
        if own and expected.dtype not in (*STORED_FLOATS, "F64"):
            raise UsageError(
                f"{target} is stored as {expected.dtype}, and was trained whole; try the unquantised model"
            )
        if own:
            self.require_numbers(name, expected.dtype)
            self.saved[target] = name
        elif not torch.equal(tensor_of(self.path, name), self.base.raw(target)):
            raise UsageError(f"{self.path}: {name} is not the base's own, as it was; try PEFT's own merge")

    def stored(self, parameter: str) -> str:
        """The tensor of the base that makes a parameter."""
        return self.memory.whole.get(parameter, parameter) if self.memory else parameter

    def is_copy(self, name: str, target: str) -> bool:
        """Whether it is of a head that is the embedding, and the same as what was saved of that.

        Raises UsageError for another one: PEFT then unties the two, and the base has one tensor for both.
        """
        twins = self.memory.tied.get(target, ()) if self.memory else ()
        saved = [PEFT + twin for twin in twins if PEFT + twin in self.tensors]
        if saved and self.config.get("ensure_weight_tying"):
            of_both = (tensor_of(self.path, each) for each in (saved[0], name))
            return torch.equal(*of_both) or self.require_apart(target, name)
        return self.require_apart(target, name)

    def require_apart(self, target: str, name: str) -> bool:
        """Raises UsageError for a weight that the base has only as another's."""
        twins = self.memory.tied.get(target, ()) if self.memory else ()
        if not twins:
            return False
        twin = twins[0]
        raise UsageError(
            f"{self.path}: {name} changes a weight that {self.base.name} ties to {twin} and stores once; try PEFT's "
            "own merge"
        )

    def factors(self, name: str, other: str, stem: str, what: str) -> None:
        weight = self.stems.get(stem) or stem.removeprefix(PEFT)
        found = self.adapted.get(weight) or self.of_its_own(weight)
        if not found:
            self.require_apart(f"{weight}.weight", name)
        group = found[0][1].group if found else ""
        if not found or (what == "embedding_A") != (group == "embedding"):
            raise CheckpointError(
                f"{self.path}: {name} is of {weight}, which {self.base.name} has not; is that its base?"
            )
        matrix, place = found[0]
        A, B, E = self.tensors[name], self.tensors.get(other), place.experts or 1
        a, b = (A.shape, B.shape if B else ()) if group != "embedding" else (B.shape[::-1] if B else (), A.shape[::-1])
        if len(a) != 2 or len(b) != 2 or (b[0], a[1], b[1]) != (place.rows, matrix.shape[1], a[0]) or a[0] % E:
            shape = [place.rows, matrix.shape[1]]
            raise CheckpointError(f"{self.path}: {name} and its lora_B do not fit {weight} {shape}")
        for each in (name, other):
            self.require_numbers(each)
        for m, own in found:
            if m.dtype not in STORED_FLOATS:
                raise UsageError(
                    f"{m.tensor} is stored as {m.dtype}, expected one of {', '.join(STORED_FLOATS)}; try the "
                    "unquantised model"
                )
            lora = Lora(name, other, scale_of(self.config, own.weight, a[0] // E, self.path.with_name(CONFIG)), own)
            if group == "parameter":
                self.experts[m.name] = lora
            else:
                self.updates[m.tensor] = lora

    def require_numbers(self, name: str, dtype: str = "F32") -> None:
        """Raises CheckpointError for a tensor that holds what is no number, or is none any more in the base's dtype."""
        for part in tensor_of(self.path, name).flatten().split(NUMBERS_AT_ONCE):
            if not part.double().isfinite().all():
                raise CheckpointError(f"{self.path}: {name} holds NaN or Inf, expected numbers; download it again")
            if not part.to(TORCH[dtype]).double().isfinite().all():
                raise UsageError(f"{self.path}: {name} holds numbers too large for {dtype}; try a base in float32")

    def of_its_own(self, weight: str) -> list[tuple[Matrix, ModulePlace]]:
        """A module by the name that its tensor has: transformers 4 held experts one by one, and the gate as a layer.

        In memory a gate is no layer, and PEFT adapts its weight as a parameter.
        """
        tensor = self.stored(f"{weight}.weight")
        layer = self.memory is None or self.memory.kinds.get(weight) != ""
        of = [m for m in self.matrices if m.tensor == tensor and m.part is None and m.is_matrix]
        return [(m, ModulePlace(weight, m.shape[0], 0, None if layer else "weight")) for m in of]


def is_adapted(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT puts factors into a module, by the keys of NARROWING: layers_to_transform narrows listed names."""
    saved = config.get("modules_to_save") or ()
    if _is_named(config.get("exclude_modules"), module):
        return False
    if any(re.match(rf"(?:.*\.)?{each}(?:\.|$)", module) for each in saved):
        return False
    named, layers = config.get("target_modules") or [], config.get("layers_to_transform")
    if isinstance(named, str) or module in named or layers is None or layers == []:
        return _is_named(named, module)
    patterns = config.get("layers_pattern") or ()
    patterns = [patterns] if isinstance(patterns, str) else patterns
    before = [rf"(?:.*?\.)??{each}" for each in patterns] or [
        r".*?\.[^.]*"
    ]  # of several numbers the first is the layer's
    found = next(filter(None, (re.match(rf"{each}\.(?P<layer>\d+)\.", module) for each in before)), None)
    wanted = layers if isinstance(layers, list) else [layers]
    return _is_named(named, module) and found is not None and int(found["layer"]) in wanted


def _is_named(named: str | Sequence[str] | None, module: str) -> bool:
    """As PEFT matches a module with a pattern for all of its name, or a list of what names end in."""
    if isinstance(named, str):
        return bool(named) and re.fullmatch(named, module) is not None
    return any(module == each or module.endswith(f".{each}") for each in named or ())


def scale_of(config: Mapping[str, Any], weight: str, rank: int, place: Path) -> float:
    """s for a weight, as PEFT's LoraLayer.update_layer has it. Raises UsageError for ranks that contradict the file."""
    r = _module_pattern(config.get("rank_pattern"), weight, config.get("r"))
    alpha = _module_pattern(config.get("alpha_pattern"), weight, config.get("lora_alpha"))
    if r != rank:
        raise UsageError(
            f"{place}: {weight} has rank {r} and alpha {alpha}, found {rank} in the file; check the adapter"
        )
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _module_pattern(patterns: Any, weight: str, otherwise: Any) -> Any:
    for key, value in (patterns or {}).items():
        if re.match(_as_pattern(key), weight):
            return value
    return otherwise


def _as_pattern(key: str) -> str:
    return rf"(.*\.)?({key})$"


def merged_shards(base: Checkpoint, adapter: PeftAdapter, formula: str | None = None) -> tuple[Shard, ...]:
    """The base's shards with the adapter merged, which no file holds: the same headers, and one tensor in memory.

    formula: of all of it; None: those of PEFT.
    """
    factor = lru_cache(KEPT_FACTORS)(lambda name: adapter.tensor(name).float())

    parts: dict[str, list[Matrix]] = {}
    for m in list_matrices(base):
        if m.name in adapter.experts:
            parts.setdefault(m.tensor, []).append(m)
    changed = adapter.updates.keys() | parts.keys() | adapter.saved.keys()

    def merged(W: torch.Tensor, lora: Lora, rows: torch.Tensor | None = None) -> torch.Tensor:
        how = Formula(formula or PEFT_FORMULAS[lora.place.group], lora.scale)
        X = adapter.product(lora, factor)
        return how.merge(W, X if rows is None else X[rows], W.dtype)

    def tensor(info: TensorInfo) -> torch.Tensor:
        if info.name in adapter.updates:
            return merged(base.raw(info.name), adapter.updates[info.name])
        if info.name in adapter.saved:
            return adapter.tensor(adapter.saved[info.name]).to(TORCH[info.dtype])
        whole = base.raw(info.name)
        for m in parts[info.name]:
            lora = adapter.experts[m.name]
            W = whole if m.part is None else m.part.of(whole)
            new = merged(W, lora, rows_in_parameter(m, lora.place))
            if m.part is None:
                whole = new
            else:
                m.part.put(whole, new)
        return whole

    def made(shard: Shard) -> Shard:
        # Of experts in one tensor each matrix is read by itself, and the tensor made once for all of them.
        lock, last = Lock(), dict[str, torch.Tensor]()

        def once(info: TensorInfo) -> torch.Tensor:
            if info.name not in parts or parts[info.name][0].part is None:
                return tensor(info)
            with lock:
                if info.name not in last:
                    last.clear()
                    last[info.name] = tensor(info)
                return last[info.name]

        def data(start: int, end: int) -> Iterator[memoryview]:
            at = start
            for info in within(shard, start, end):
                if info.name in changed:
                    yield from pieces(shard, at, max(at, info.start))  # what lies before it is the base's
                    low, at = max(start, info.start), min(end, info.end)
                    yield bytes_of(once(info))[low - info.start : at - info.start]
            yield from pieces(shard, at, end)

        return replace(shard, data=data, whole=None, stamp=None)

    return tuple(map(made, base.shards))


def with_adapter_merged(
    base: Checkpoint, folder: Path, formula: str | None = None, *, given: tuple[str, ...] = ()
) -> Checkpoint:
    """BASE+ADAPTER, as `merge_streamed` would write it, seen without writing it. Raises as `open_adapter`.

    Its identity is that of both, by the sha256 of the adapter's files. formula: of all of it; None: those of PEFT.
    given: how the two were named.
    """
    hub_id, _ = hub_origin(folder)  # there its folder has a commit's name
    folder = folder.resolve()
    files = [folder / CONFIG, folder / MODEL]
    stamps = {file: stamp_of(file) for file in files}
    adapter = open_adapter(folder, base)
    name = hub_id.rpartition("/")[2] if hub_id else folder.name
    elsewhere = "+".join(Path(word).resolve().name if Path(word).exists() else word for word in given)
    sums = {file.name: sha256_of(file) for file in files}
    on_top = OnTop(name, sums, stamps, adapter.weights, "+".join(given), elsewhere)
    shards = merged_shards(base, adapter, formula)
    return replace(base, shards=shards, hub=None, origin=base, remade=True, on_top=on_top)


def merge_streamed(
    base: Checkpoint,
    folder: Path,
    out: Path,
    formula: str | None = None,
    *,
    force: bool = False,
    tick: Callable[[TensorInfo], object] = lambda _: None,
) -> int:
    """Write the new directory `out`: `base` with the adapter in `folder` merged. Returns how many matrices it is of.

    formula: of all of it; None: those of PEFT. In memory is one tensor. Shards, names and dtypes are the base's. force:
    see `write_directory`. Raises as `open_adapter`, and OutputError where `out` cannot be written.
    """
    merged = with_adapter_merged(base, folder, formula=formula)
    assert merged.on_top is not None
    files = {n: data for n, data in side_files_of(base).items() if n not in ("config.json", INDEX, *LEFT_BEHIND)}
    written = replace(base, shards=merged.shards)
    write_directory(written, out, files, force=force, tick=tick, check=lambda: require_unchanged(merged))
    return merged.on_top.weights
