"""GGUF files of the llama architecture seen as the Hub's checkpoint, dequantised. Llama, Mistral, Mixtral.

Read by the `gguf` package (the extra [gguf]), tensor by tensor from the mapped file, or files where llama.cpp's
gguf-split has cut it. Names and metadata as llama.cpp writes them: its converter turns the rotary halves of q and k
into pairs, which is undone here. Every count in a header is checked against the file's size before the package reads
it. The scaling of rotary embeddings is written as transformers has it, and refused where it cannot be.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from laser.checkpoint.convert import assemble_shards
from laser.checkpoint.formats import GGUF, SHARD, pointer
from laser.checkpoint.mistral import LARGEST_NUMBER, MOST_LAYERS, TORCH_NAMES, expected, halves_from_pairs, impossible
from laser.checkpoint.reader import Checkpoint
from laser.errors import CheckpointError, UsageError, first_line
from laser.files import open_regular
from laser.records import named

GGUF_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
AROUND = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
GGUF_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_down": "mlp.down_proj", "ffn_up": "mlp.up_proj"}
EXPERTS = {"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"}
# A place in the file: (its tensor, expert in a stacked one or None, heads whose rows are permuted or None)
GgufPlace = tuple[Any, int | None, int | None]


def open_gguf(path: Path, dtype: str | None = None) -> Checkpoint:
    """The file as a Hub checkpoint that no file holds yet; weights are dequantised as they are read.

    dtype: float32, float16 or bfloat16; by default that of the file's matrices, or bfloat16 where they are quantised.
    Raises CheckpointError for another architecture or what is not GGUF, UsageError without the `gguf` package.
    """
    if dtype is not None and dtype not in GGUF_DTYPES:
        raise UsageError(f"no model is written as {dtype!r}; try --output-dtype {', '.join(GGUF_DTYPES)}")
    meta, tensors = _read_gguf(path)
    architecture = meta.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(
            f"{path.name}: architecture is {named(architecture)}, expected 'llama' (Llama, Mistral, Mixtral); start "
            "from the model on the Hub"
        )
    config = _config(path, meta)
    factors = {t.name: [float(f) for f in t.data.reshape(-1)] for t in tensors if t.name in FACTORS}
    if scaling := rope_scaling(path.name, lambda key, default: meta.get(f"llama.{key}", default), factors, config):
        config["rope_scaling"] = scaling
    places = _places(path, [t for t in tensors if t.name not in FACTORS], config)
    kinds = {t.tensor_type.name for t in tensors if len(t.shape) > 1}
    stored = kinds.pop() if len(kinds) == 1 else ""
    chosen = GGUF_DTYPES[dtype] if dtype else stored if stored in TORCH_NAMES else "BF16"
    config |= {
        "tie_word_embeddings": "lm_head.weight" not in places,
        "vocab_size": int(places["model.embed_tokens.weight"][0].shape[-1]),
        "torch_dtype": TORCH_NAMES[chosen],
    }
    entries = [(name, chosen, _shape(place)) for name, place in places.items()]
    _check_shapes(path, config, {name: shape for name, _, shape in entries})
    return assemble_shards(
        path, config, entries, partial(_gguf_tensor, places, config, getattr(torch, TORCH_NAMES[chosen]))
    )


def tokenizer_files(path: Path) -> dict[str, bytes] | str:
    """The tokenizer that transformers makes of the metadata, as files; or why it makes none."""
    try:
        from transformers import AutoTokenizer
        from transformers.utils import logging

        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it would repeat on the terminal what the file says
        parts = gguf_parts(path)
        with TemporaryDirectory() as alone, TemporaryDirectory() as folder:
            for part in parts:  # without what lies beside them, which transformers would take first
                (Path(alone) / part.name).symlink_to(part.resolve())
            try:
                tokenizer = AutoTokenizer.from_pretrained(
                    alone, gguf_file=parts[0].name, local_files_only=True, trust_remote_code=False
                )
            finally:
                logging.set_verbosity(verbosity)
            tokenizer.save_pretrained(folder)
            return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if p.is_file()}
    except Exception as error:  # whatever the metadata lack; the weights are there all the same
        return f"{type(error).__name__}: {first_line(error)}"


def gguf_parts(path: Path) -> list[Path]:
    """The files of a model that gguf-split has cut, in order, by any one of them; the file alone where it is whole.

    Raises CheckpointError where one is missing.
    """
    match = SHARD.fullmatch(path.name)
    if match is None or match["end"] != ".gguf":
        return [path]
    names = [f"{match['stem']}-{n:05d}-of-{match['count']}.gguf" for n in range(1, int(match["count"]) + 1)]
    if path.name not in names:  # counted as no part is: it has to be whole
        return [path]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path.name} is one of {len(names)} parts, and {missing[0]} is missing from {path.parent} "
            f"({len(missing)} in all); finish the download and try again"
        )
    return [path.parent / name for name in names]


def _read_gguf(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """The metadata, which only the first part has, and the tensors of all parts."""
    files = gguf_parts(path)
    parts = [_read_part(file) for file in files]
    metas = [meta for meta, _ in parts]
    for number, (file, meta) in enumerate(zip(files, metas, strict=True)):
        stated = (meta.get("split.no", 0), meta.get("split.count", 0) or 1)
        if stated != (number, len(files)):
            part = stated[0] + 1 if type(stated[0]) is int else repr(stated[0])
            raise CheckpointError(
                f"{file.name} is part {part} of {stated[1]} by its metadata, expected {number + 1} of "
                f"{len(files)}; give every part the name that gguf-split gave it, NAME-00001-of-00003.gguf"
            )
    tensors = [t for _, here in parts for t in here]
    count = metas[0].get("split.tensors.count", len(tensors)) if len(files) > 1 else len(tensors)
    twice = len(tensors) - len({t.name for t in tensors})
    if count != len(tensors) or twice:
        raise CheckpointError(
            f"{path.name}: found {len(tensors)} tensors in {len(files)} parts, {twice} twice, expected {count}; "
            "download all parts again"
        )
    return metas[0], tensors


def _read_part(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """The metadata and the tensors of one file. Raises CheckpointError."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UsageError("reading GGUF needs the gguf package; try pip install 'laser-rmt[gguf]'") from error
    try:
        with open_regular(path) as file:
            if message := pointer(path):
                raise CheckpointError(message)
            if file.read(4) != GGUF:
                raise CheckpointError(f"{path.name} is no GGUF file: it does not begin with GGUF; download it again")
        require_counts(path)
        reader = GGUFReader(path)
        return {name: field.contents() for name, field in reader.fields.items()}, reader.tensors
    except CheckpointError:
        raise
    except Exception as error:  # hostile bytes can fail in any way
        raise CheckpointError(f"{path.name} cannot be read as GGUF ({first_line(error)}); download it again") from error


def _config(path: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    def get(key: str, default: Any = None) -> Any:
        found = meta.get(f"llama.{key}", default)
        if found is None:
            raise CheckpointError(f"{path.name}: metadata lack llama.{key}; download it again")
        return found

    def wrong(key: str, found: Any, wanted: str) -> CheckpointError:
        return CheckpointError(
            f"{path.name}: llama.{key} is {named(found)}, expected {wanted}; download it again, or start from the "
            "model on the Hub"
        )

    def whole(key: str, default: int | None = None, most: int = LARGEST_NUMBER) -> int:
        found = get(key, default)
        if type(found) is not int or not 1 <= found <= most:  # a list has a number per layer
            raise wrong(key, found, f"a whole number from 1 to {most}")
        return found

    def positive(key: str, default: float | None = None) -> float:
        found = get(key, default)
        if type(found) not in (int, float) or not (math.isfinite(found) and found > 0):
            raise wrong(key, found, "a number above 0")
        return float(found)

    if get("attention.causal", True) is False:
        raise wrong("attention.causal", False, "a model in which no token sees those that follow")
    heads, hidden = whole("attention.head_count"), whole("embedding_length")
    experts = whole("expert_count", most=MOST_LAYERS) if get("expert_count", 0) != 0 else 0
    turned = whole("rope.dimension_count", max(hidden // heads, 1))
    config: dict[str, Any] = {
        "architectures": ["MixtralForCausalLM" if experts else "LlamaForCausalLM"],
        "model_type": "mixtral" if experts else "llama",
        "hidden_size": hidden,
        "intermediate_size": whole("feed_forward_length"),
        "num_hidden_layers": whole("block_count", most=MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": whole("attention.head_count_kv", heads),
        "head_dim": whole("attention.key_length", turned),
        "hidden_act": "silu",
        "rms_norm_eps": float(f"{positive('attention.layer_norm_rms_epsilon'):.6g}"),  # a float32 there
        "rope_theta": positive("rope.freq_base", 10000.0),
        "max_position_embeddings": whole("context_length"),
    }
    if experts:
        config |= {
            "num_local_experts": experts,
            "num_experts_per_tok": whole("expert_used_count"),
            "sliding_window": None,
        }
    for token in ("bos", "eos"):
        found = meta.get(f"tokenizer.ggml.{token}_token_id")
        if type(found) is int:
            config[f"{token}_token_id"] = found
    if turned != config["head_dim"] and "llama.rope.dimension_count" in meta:
        raise CheckpointError(
            f"{path.name}: {turned} of {config['head_dim']} dimensions of a head are turned, which has no translation; "
            "start from the model on the Hub"
        )
    return config


def _places(path: Path, tensors: Any, config: Mapping[str, Any]) -> dict[str, GgufPlace]:
    """The Hub's name of every tensor, and every expert of a stacked one, to where it lies in the file."""
    places: dict[str, GgufPlace] = {}
    permuted = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}

    def put(name: str, place: GgufPlace) -> None:
        if name in places:
            raise CheckpointError(f"{path.name}: {place[0].name} and another are both {name}; download it again")
        places[name] = place

    for t in tensors:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+?)(_exps)?(?:\.(\d+))?\.weight", t.name)
        layer, kind, stacked, expert = match.groups() if match else (None, "", None, None)
        prefix = f"model.layers.{layer}."
        if layer is None and kind in AROUND:
            put(f"{AROUND[kind]}.weight", (t, None, None))
        elif layer is not None and kind in GGUF_LAYER:
            put(f"{prefix}{GGUF_LAYER[kind]}.weight", (t, None, permuted.get(kind)))
        elif layer is not None and kind == "ffn_gate_inp":
            put(f"{prefix}block_sparse_moe.gate.weight", (t, None, None))
        elif layer is not None and kind in EXPERTS and stacked:
            if t.shape[-1] != config.get("num_local_experts"):
                raise CheckpointError(
                    f"{path.name}: {t.name} holds {t.shape[-1]} experts, expected "
                    f"{config.get('num_local_experts', 0)} by its metadata; download it again"
                )
            for e in range(int(t.shape[-1])):
                put(f"{prefix}block_sparse_moe.experts.{e}.{EXPERTS[kind]}.weight", (t, e, None))
        elif layer is not None and kind in EXPERTS and expert is not None:
            put(f"{prefix}block_sparse_moe.experts.{expert}.{EXPERTS[kind]}.weight", (t, None, None))
        elif layer is not None and kind in GGUF_MLP:
            put(f"{prefix}{GGUF_MLP[kind]}.weight", (t, None, None))
        else:
            raise CheckpointError(f"{path.name}: {t.name} has no translation here; start from the model on the Hub")
    if "model.embed_tokens.weight" not in places:
        raise CheckpointError(f"{path.name} holds no token_embd.weight; download it again")
    return places


def _shape(place: GgufPlace) -> tuple[int, ...]:
    tensor, expert, _ = place
    shape = tuple(int(n) for n in reversed(tensor.shape))  # GGUF counts from the innermost
    return shape if expert is None else shape[1:]


def _check_shapes(path: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError for a tensor that is missing, or of another shape than the metadata imply."""
    if message := impossible(config, len(shapes)):
        raise CheckpointError(f"{path.name}: {message} by its metadata; download it again")
    wanted = expected(config)
    if config["tie_word_embeddings"]:
        wanted.pop("lm_head.weight", None)
    for name in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(name) != shapes.get(name):
            raise CheckpointError(
                f"{path.name}: {name} has shape {shapes.get(name)}, expected {wanted.get(name)} by its metadata; "
                "download it again"
            )


def _gguf_tensor(
    places: Mapping[str, GgufPlace], config: Mapping[str, Any], dtype: torch.dtype, name: str
) -> torch.Tensor:
    from gguf.quants import dequantize

    tensor, expert, heads = places[name]
    try:
        W = dequantize(tensor.data if expert is None else tensor.data[expert], tensor.tensor_type)
    except NotImplementedError as error:
        raise CheckpointError(f"{tensor.name}: {error} in the gguf package; start from the model on the Hub") from error
    made = torch.tensor(W, dtype=torch.float32)  # a copy: the file is mapped for reading only
    if heads is not None:
        made = halves_from_pairs(made, config["head_dim"])
    return made.to(dtype)


# --- the header, before it is believed --------------------------------------------------------------------------------

MOST_VALUES = 3_000_000  # in all metadata together; a vocabulary of 256,000 words and its merges are 1.3 million
LONGEST_NAME = 65535  # bytes, the format's own limit
DIMENSIONS = 4  # the same
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type
STRING, ARRAY = 8, 9


def require_counts(path: Path) -> None:
    """Raises CheckpointError for a header of more values, names or tensors than the file can hold."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 24:
            raise CheckpointError(f"{path.name} is truncated: found {size} bytes; download it again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Header(path.name, data, size).walk()


class _Header:
    def __init__(self, name: str, data: mmap.mmap, size: int) -> None:
        self.name, self.data, self.size, self.at, self.values = name, data, size, 4, 0
        self.order = "<"
        if self.number("I") & 0xFFFF == 0:  # written on a machine of the other byte order
            self.order = ">"

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.name} cannot be read as GGUF: found {what} at byte {self.at}: truncated or damaged; download it "
            "again"
        )

    def number(self, kind: str) -> int:
        width = struct.calcsize(kind)
        self.skip(width)
        return struct.unpack_from(self.order + kind, self.data, self.at - width)[0]

    def skip(self, count: int) -> None:
        if count > self.size - self.at:
            raise self.wrong(f"{self.size} bytes, expected {count} more")
        self.at += count

    def count(self, what: str, width: int) -> int:
        """A number of things of at least `width` bytes each, all of them in the file."""
        found = self.number("Q")
        if found * width > self.size - self.at:
            raise self.wrong(f"{found} {what}, more than the file can hold,")
        return found

    def text(self, longest: int | None = None) -> None:
        length = self.number("Q")
        if longest is not None and length > longest:
            raise self.wrong(f"a name of {length} bytes, expected at most {longest},")
        self.skip(length)

    def more(self, count: int) -> None:
        self.values += count
        if self.values > MOST_VALUES:
            raise self.wrong(f"more than {MOST_VALUES} values of metadata")

    def value(self, kind: int, depth: int = 0) -> None:
        self.more(1)
        if kind == STRING:
            self.text()
        elif kind in WIDTHS:
            self.skip(WIDTHS[kind])
        elif kind == ARRAY and depth < 2:
            inner = self.number("I")
            count = self.count("values", WIDTHS.get(inner, 8))
            if inner in WIDTHS:
                self.more(count)
                self.skip(count * WIDTHS[inner])
            else:
                for _ in range(count):
                    self.value(inner, depth + 1)
        else:
            raise self.wrong(f"a value of type {kind}, expected 0 to 12")

    def walk(self) -> None:
        tensors, pairs = self.count("tensors", 24), self.count("entries of metadata", 13)
        for _ in range(pairs):
            self.text(LONGEST_NAME)
            self.value(self.number("I"))
        for _ in range(tensors):
            self.text(LONGEST_NAME)
            dimensions = self.number("I")
            if not 1 <= dimensions <= DIMENSIONS:
                raise self.wrong(f"a tensor of {dimensions} dimensions, expected 1 to {DIMENSIONS},")
            shape = [self.number("Q") for _ in range(dimensions)]
            if not 0 < math.prod(shape) <= 16 * self.size:  # no type has less than half a bit an entry
                raise self.wrong(f"a tensor of {' x '.join(map(str, shape))}, which the file cannot hold,")
            self.number("I")
            if self.number("Q") > self.size:
                raise self.wrong("a tensor that begins behind the end of the file")


# --- rope scaling -----------------------------------------------------------------------------------------------------

FREQS, LONG_FACTORS, SHORT_FACTORS = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
FACTORS = (FREQS, LONG_FACTORS, SHORT_FACTORS)
SCALINGS = ("none", "linear", "yarn", "longrope")
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
FROM_THE_HUB = "start from the model on the Hub"


def rope_scaling(
    where: str, get: Callable[[str, Any], Any], factors: Mapping[str, Sequence[float]], config: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The config's `rope_scaling`; None where nothing is scaled.

    where: the file's name. get: a key of the metadata without the architecture, or the default. factors: the tensors
    of FACTORS that there are, each (d / 2,). Raises CheckpointError for what transformers cannot express.
    """

    def number(key: str, default: float) -> float:
        found = get(key, default)
        if not isinstance(found, int | float) or not math.isfinite(found) or found < 0:
            raise CheckpointError(f"{where}: {key} is {found!r}, expected a positive number; {FROM_THE_HUB}")
        return float(f"{found:.7g}")  # a float32 there

    kind = get("rope.scaling.type", "linear")
    if kind not in SCALINGS:
        raise CheckpointError(
            f"{where}: rope scaling {kind!r} is not known, expected {', '.join(SCALINGS)}; {FROM_THE_HUB}"
        )
    if number("rope.scaling.alpha", 0.0):
        raise CheckpointError(f"{where}: rope.scaling.alpha has no translation to transformers; {FROM_THE_HUB}")
    given = number("rope.scaling.factor", number("rope.scale_linear", 0.0))
    if kind == "yarn" and not given:
        raise CheckpointError(f"{where}: rope scaling 'yarn' needs rope.scaling.factor, found none; {FROM_THE_HUB}")
    factor = given or 1.0
    factor = 1.0 if kind == "none" else factor
    attention = number("rope.scaling.attn_factor", 1.0)
    # 0 stands for the context that the model was trained on.
    original = int(number("rope.scaling.original_context_length", 0)) or config["max_position_embeddings"]
    half = config["head_dim"] // 2
    for name, values in factors.items():
        if len(values) != half or not all(math.isfinite(v) and v > 0 for v in values):
            raise CheckpointError(f"{where}: {name} has {len(values)} values, expected {half} above 0; {FROM_THE_HUB}")
    if kind == "longrope":
        if LONG_FACTORS not in factors or SHORT_FACTORS not in factors:
            lost = LONG_FACTORS if LONG_FACTORS not in factors else SHORT_FACTORS
            raise CheckpointError(
                f"{where}: rope scaling 'longrope' needs the tensor {lost}, found none; {FROM_THE_HUB}"
            )
        return _longrope(factors[SHORT_FACTORS], factors[LONG_FACTORS], factor, attention, original)
    freqs = factors.get(FREQS, [1.0] * half)
    scaled = any(f != 1 for f in freqs)
    if kind == "yarn" and factor != 1:
        return _yarn(where, factor, attention, original, scaled, number)
    if scaled and factor == attention == 1 and (found := _llama3(freqs, config["rope_theta"])):
        return found
    if scaled or attention != 1:
        return _longrope(freqs, freqs, factor, attention, original)
    return None if factor == 1 else {"rope_type": "linear", "factor": factor}


def _yarn(
    where: str, factor: float, attention: float, original: int, scaled: bool, number: Callable[[str, float], float]
) -> dict[str, Any]:
    """YaRN. Its attention factor there is transformers' own default times a."""
    mixed = number("rope.scaling.yarn_ext_factor", 1.0)
    stated = number("rope.scaling.yarn_attn_factor", 1.0)
    for wrong, what in (
        (factor < 1, f"a factor of {factor:g}"),
        (scaled, f"{FREQS} beside it"),
        (mixed != 1, f"yarn_ext_factor {mixed:g}"),
        (stated != 1, f"yarn_attn_factor {stated:g}"),
    ):
        if wrong:
            raise CheckpointError(f"{where}: rope scaling 'yarn' with {what} has no translation; {FROM_THE_HUB}")
    found = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        if (given := number(f"rope.scaling.yarn_{key}", default)) != default:
            found[key] = given
    log = number("rope.scaling.yarn_log_multiplier", 0.0)
    if log or attention != 1:
        whole = 0.1 * math.log(factor) + 1
        found["attention_factor"] = attention * whole / (0.1 * log * math.log(factor) + 1)
    return found


def _longrope(
    short: Sequence[float], long: Sequence[float], factor: float, attention: float, original: int
) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "short_factor": [f * factor for f in short],
        "long_factor": [f * factor for f in long],
        "attention_factor": attention,
        "original_max_position_embeddings": original,
    }


def _llama3(freqs: Sequence[float], theta: float) -> dict[str, Any] | None:
    """Llama 3.1's scaling by its parameters, where these factors are those that llama.cpp's converter makes of it."""
    factor, half = round(max(freqs), 4), len(freqs)
    low, high, original = LLAMA3.values()
    for i, found in enumerate(freqs):
        length = 2 * math.pi * theta ** (i / half)
        smooth = min(max((original / length - low) / (high - low), 0.0), 1.0)
        if not math.isclose(found, 1 / ((1 - smooth) / factor + smooth), rel_tol=1e-4):
            return None
    return {"rope_type": "llama3", "factor": factor} | LLAMA3
