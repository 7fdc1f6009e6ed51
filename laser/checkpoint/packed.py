"""Packed weights seen as the plain ones that they stand for, one tensor at a time.

    format               stored as                                                     becomes
    bitsandbytes nf4/fp4 weight (k, 1), weight.absmax, .quant_map, .quant_state...     what the state says
    bitsandbytes int8    weight (m, n), SCB (m,)                                       float32
    compressed-tensors   weight_packed or weight, weight_scale, weight_zero_point      the scale's dtype
    GPTQ                 qweight (n b / 32, m), qzeros, scales (groups, m), g_idx      the scale's dtype
    AWQ (gemm)           qweight (n, m / 8), qzeros, scales (groups, m)                the scale's dtype
    FP8, weight_scale    weight (m, n), weight_scale: one, or one per row              float32

bitsandbytes and compressed-tensors are unpacked by their own libraries. GPTQ and AWQ, whose libraries unpack whole
models only, are read here: w = scale (q - zero), rounded once to the scale's dtype. GPTQ's first format stores a zero
less 1. Such a checkpoint can be looked at and compared, and is not written: its reduction is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from laser.checkpoint.quantised import method_of, recognise, section_of
from laser.checkpoint.safetensors import TORCH, Shard, TensorInfo, read_bytes, virtual_shard
from laser.errors import CheckpointError, UsageError

TensorsByName = Mapping[str, torch.Tensor]
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where the columns of eight lie in an int32
GPTQ_BITS = (2, 4, 8)  # those that fill an int32
BNB_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(?:nf4|fp4)")
CT_PARTS = ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
CT_PARTS += ("weight_global_scale",)
DTYPE_NAMES = {dtype: name for name, dtype in TORCH.items()}
PACKED_DTYPES = TORCH | {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
LARGEST_STATE = 10_000  # bytes of what bitsandbytes says of one weight
UNPACKING_LIBRARIES = {"bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed_tensors"}


@dataclass(frozen=True)
class Packing:
    """One packed weight. parts: role -> the tensor that holds it; unpack: those -> (m, n) of this dtype."""

    kind: str
    weight: str
    parts: Mapping[str, str]
    shape: tuple[int, int]
    dtype: str
    unpack: Callable[[TensorsByName], torch.Tensor]


def find_packings(checkpoint: Any) -> list[Packing]:
    """Every packed weight of a checkpoint whose format is known here. Raises CheckpointError for one whose parts do not
    fit together, or whose library is not installed."""
    tensors: Mapping[str, TensorInfo] = checkpoint.tensors
    section, method = section_of(checkpoint.config), method_of(checkpoint.config)

    def read(name: str) -> torch.Tensor:
        return _stored(checkpoint, name)

    finders: list[Callable[[], Iterator[Packing]]] = [lambda: _bitsandbytes(checkpoint.name, tensors, read)]
    if method == "compressed-tensors":
        finders.append(lambda: _compressed(checkpoint.name, section, tensors, read))
    elif method == "gptq":
        finders.append(lambda: _gptq(checkpoint.name, section, tensors))
    elif method == "awq":
        finders.append(lambda: _awq(checkpoint.name, section, tensors))
    else:
        finders.append(lambda: _fp8(tensors))
    found = [packing for finder in finders for packing in finder()]
    for kind in {packing.kind for packing in found}:
        _require_library(checkpoint.name, kind)
    return found


def as_plain(checkpoint: Any, packings: Sequence[Packing]) -> Any:
    """The checkpoint with every packed weight under its own name, as plain numbers; its identity is the source's.

    Raises CheckpointError where something else in it is packed in a way that is not known.
    """
    by_weight = {packing.weight: packing for packing in packings}
    dropped = {name for packing in packings for name in packing.parts.values()} - by_weight.keys()
    config = {
        key: value
        for key, value in checkpoint.config.items()
        if key not in ("quantization_config", "compression_config", "quantization")
    }

    def tensor(name: str) -> torch.Tensor:
        packing = by_weight.get(name)
        if packing is None:
            info = checkpoint.tensors[name]
            return read_bytes(checkpoint.shard_of(name), info.start, info.end)
        return unpacked(checkpoint, packing)

    def shard(of: Shard) -> Shard:
        here = [p for p in packings if checkpoint.tensors[next(iter(p.parts.values()))].shard == of.name]
        entries = [(p.weight, p.dtype, p.shape) for p in here]
        entries += [(t.name, t.dtype, t.shape) for t in of.tensors if t.name not in dropped and t.name not in by_weight]
        return virtual_shard(of.name, of.path, entries, tensor)

    shards = tuple(map(shard, checkpoint.shards))
    tensors = {info.name: info for each in shards for info in each.tensors}
    if recognise(checkpoint.name, config, tensors) is not None:  # whose scales this view would drop
        raise CheckpointError(
            f"{checkpoint.name} holds FP8 weights with a scale per block beside weights packed otherwise; try a "
            "checkpoint of one kind, or start from the unquantised model"
        )
    kinds = " and ".join(sorted({packing.kind for packing in packings}))
    return replace(
        checkpoint, config=config, shards=shards, tensors=tensors, origin=checkpoint, remade=True, packed=kinds
    )


def unpacked(checkpoint: Any, packing: Packing) -> torch.Tensor:
    """The weight (m, n). Raises CheckpointError for parts that do not fit together."""
    parts = {role: _stored(checkpoint, name) for role, name in packing.parts.items()}
    try:
        W = packing.unpack(parts)
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise CheckpointError(
            f"{checkpoint.name}: {packing.weight} cannot be unpacked as {packing.kind} ({error}); download it again"
        ) from error
    if tuple(W.shape) != packing.shape or W.dtype != TORCH[packing.dtype]:
        raise CheckpointError(
            f"{checkpoint.name}: {packing.weight} unpacks to {W.dtype} {list(W.shape)}, expected {packing.dtype} "
            f"{list(packing.shape)}; download it again"
        )
    return W


def _stored(checkpoint: Any, name: str) -> torch.Tensor:
    """A tensor as it lies there, of whatever dtype. Raises CheckpointError for one that torch has not."""
    info = checkpoint.tensors[name]
    if info.dtype not in PACKED_DTYPES:
        raise CheckpointError(
            f"{info.shard}: {name} is stored as {info.dtype}, expected one of {', '.join(PACKED_DTYPES)}"
        )
    return (
        read_bytes(checkpoint.shard_of(name), info.start, info.end).view(PACKED_DTYPES[info.dtype]).reshape(info.shape)
    )


def require_unpacked(checkpoint: Any) -> None:
    """Raises UsageError for a view of packed weights, which nothing can be written in place of."""
    if checkpoint.packed:
        raise UsageError(
            f"{checkpoint.name} holds {checkpoint.packed} weights, which can be looked at and not reduced; reduce the "
            "unquantised model, and quantise the result again"
        )


def _unfit(where: str, kind: str, what: str) -> CheckpointError:
    return CheckpointError(f"{where} holds {kind} weights, and {what}; start from the unquantised model")


@cache
def _installed(library: str) -> bool:
    from importlib.util import find_spec

    return find_spec(library) is not None


def _require_library(where: str, kind: str) -> None:
    library = UNPACKING_LIBRARIES.get(kind.partition(" ")[0])
    if library is not None and not _installed(library):
        raise _unfit(where, kind, f"{library} is not installed, which unpacks them: try pip install {kind.split()[0]}")


# --- bitsandbytes -----------------------------------------------------------------------------------------------------


def _bitsandbytes(
    where: str, tensors: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor]
) -> Iterator[Packing]:
    for name, info in tensors.items():
        if (found := BNB_STATE.fullmatch(name)) and found[1] in tensors:
            weight = found[1]
            parts = {"weight": weight}
            parts |= {n.removeprefix(f"{weight}."): n for n in tensors if n.startswith(f"{weight}.")}
            if info.dtype != "U8" or info.end - info.start > LARGEST_STATE:
                raise _unfit(where, "bitsandbytes", f"{name} does not say which matrix it is")
            shape, dtype = _bnb_state(where, name, read(name))
            stored = tensors[weight]
            if (stored.end - stored.start) * 2 - math.prod(shape) not in (0, 1):
                raise _unfit(where, "bitsandbytes", f"{weight} has no 4 bits for each of {list(shape)}")
            yield Packing("bitsandbytes", weight, parts, shape, dtype, _unpack_bnb_4bit)
        elif name.endswith(".SCB"):
            weight = f"{name.removesuffix('SCB')}weight"
            stored = tensors.get(weight)
            if stored is None or stored.dtype != "I8" or len(stored.shape) != 2 or info.shape != stored.shape[:1]:
                raise _unfit(where, "bitsandbytes", f"{name} fits no int8 matrix {weight}")
            m, n = stored.shape
            parts = {"weight": weight, "SCB": name}
            if f"{weight}_format" in tensors:
                parts["format"] = f"{weight}_format"
            yield Packing("bitsandbytes", weight, parts, (m, n), "F32", _unpack_bnb_int8)


def _bnb_state(where: str, name: str, state: torch.Tensor) -> tuple[tuple[int, int], str]:
    """Shape and dtype of a 4-bit weight, from the JSON that lies beside it."""
    try:
        document = json.loads(bytes(state.tolist()))
        (m, n), dtype = document["shape"], DTYPE_NAMES[getattr(torch, document["dtype"])]
        if not (type(m) is type(n) is int and min(m, n) > 0):
            raise ValueError("no shape of a matrix")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unfit(where, "bitsandbytes", f"{name} does not say which matrix it is") from error
    return (m, n), dtype


def _unpack_bnb_4bit(parts: TensorsByName) -> torch.Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = {role: tensor for role, tensor in parts.items() if role != "weight"}
    return dequantize_4bit(parts["weight"], QuantState.from_dict(state, device=torch.device("cpu")))


def _unpack_bnb_int8(parts: TensorsByName) -> torch.Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    if "format" in parts and int(parts["format"].reshape(-1)[0]) != 0:
        raise ValueError("its rows are interleaved for an old kind of GPU")
    return int8_vectorwise_dequant(parts["weight"], parts["SCB"])


# --- compressed-tensors -----------------------------------------------------------------------------------------------


def _compressed(
    where: str, section: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor]
) -> Iterator[Packing]:
    kind = "compressed-tensors"
    for name, info in tensors.items():
        if not name.endswith(".weight_scale"):
            continue
        module = name.removesuffix(".weight_scale")
        parts = {part: f"{module}.{part}" for part in CT_PARTS if f"{module}.{part}" in tensors}
        main = parts.get("weight_packed") or parts.get("weight")
        if main is None or len(tensors[main].shape) != 2 or info.dtype not in ("F32", "F16", "BF16"):
            raise _unfit(where, kind, f"{name} is {info.dtype} and scales no weight, or not by plain numbers")
        if "weight_packed" in parts:
            if "weight_shape" not in parts:
                raise _unfit(where, kind, f"{module}.weight_shape is missing")
            sizes, (rows, columns) = tensors[parts["weight_shape"]], tensors[main].shape[:2]
            m, n = map(int, read(sizes.name).tolist()) if sizes.shape == (2,) else (-1, -1)
            if m != rows or not 0 < n <= 32 * columns:
                raise _unfit(where, kind, f"{sizes.name} says no shape of {main} {list(tensors[main].shape)}")
        else:
            m, n = tensors[main].shape
        settings = _ct_settings(where, section, module)
        extra = [f"{module}.{x}" for x in ("input_scale", "input_zero_point", "input_global_scale", "output_scale")]
        parts |= {x.rpartition(".")[2]: x for x in extra if x in tensors}
        yield Packing(kind, f"{module}.weight", parts, (m, n), info.dtype, lambda p, s=settings: _unpack_ct(p, s))


def _ct_settings(where: str, section: Mapping[str, Any], module: str) -> dict[str, Any]:
    """The config group of a module: one that names it before one that names all linear layers."""
    groups = section.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    if not groups or not all(isinstance(g, dict) and isinstance(g.get("targets", []), list) for g in groups):
        raise _unfit(where, "compressed-tensors", "config.json names no config_groups with targets")

    def fits(target: Any) -> int:
        if target == module:
            return 3
        if isinstance(target, str) and target.startswith("re:"):
            return 2 if re.match(target[3:], module) else 0
        return 1 if isinstance(target, str) and "." not in target else 0

    try:
        best = max(groups, key=lambda group: max(map(fits, group.get("targets") or ("Linear",))))
    except (re.error, RecursionError, OverflowError) as error:
        raise _unfit(where, "compressed-tensors", f"a target of config.json is no expression ({error})") from error
    return {**best, "format": best.get("format") or section.get("format")}


def _unpack_ct(parts: TensorsByName, settings: Mapping[str, Any]) -> torch.Tensor:
    from compressed_tensors.compressors import BaseCompressor  # pyright: ignore[reportMissingImports]
    from compressed_tensors.quantization import QuantizationScheme  # pyright: ignore[reportMissingImports]

    scheme = QuantizationScheme.model_validate(dict(settings))
    compressor: Any = BaseCompressor.get_value_from_registry(str(settings["format"]))
    found = {role: tensor for role, tensor in parts.items() if role in CT_PARTS}
    return compressor.decompress(found, scheme)["weight"]


# --- GPTQ and AWQ -----------------------------------------------------------------------------------------------------


def _parts_of(
    where: str, kind: str, tensors: Mapping[str, TensorInfo], needed: Sequence[str]
) -> Iterator[tuple[str, dict[str, str], dict[str, TensorInfo]]]:
    """Every module with a qweight: its name, its parts, and what is known of them."""
    for name in tensors:
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        parts = {part: f"{module}.{part}" for part in needed if f"{module}.{part}" in tensors}
        infos = {part: tensors[tensor] for part, tensor in parts.items()}
        missing = [part for part in needed if part not in parts and part != "g_idx"]
        if missing:
            raise _unfit(where, kind, f"{module}.{missing[0]} is missing")
        plain = all(len(infos[part].shape) == 2 for part in ("qweight", "qzeros", "scales"))
        whole = plain and infos["qweight"].dtype == infos["qzeros"].dtype == "I32"
        if not whole or infos["scales"].dtype not in ("F16", "BF16", "F32"):
            raise _unfit(where, kind, f"{name} and its scales are not int32 and floats of two dimensions")
        yield module, parts, infos


def _gptq(where: str, section: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Iterator[Packing]:
    bits, form = section.get("bits"), section.get("checkpoint_format") or "gptq"
    if any(n.endswith((".qweight", ".qzeros")) for n in tensors):
        if bits not in GPTQ_BITS or form not in ("gptq", "gptq_v2"):
            message = f"of {bits!r} bits as {form!r}, expected {', '.join(map(str, GPTQ_BITS))} bits as gptq or gptq_v2"
            raise _unfit(where, "GPTQ", f"they are {message}")
    for module, parts, infos in _parts_of(where, "GPTQ", tensors, ("qweight", "qzeros", "scales", "g_idx")):
        assert isinstance(bits, int)
        each = 32 // bits
        (rows, m), (groups, columns) = infos["qweight"].shape, infos["qzeros"].shape
        n = rows * each
        fits = infos["scales"].shape == (groups, m) and columns * each == m and groups > 0 and n % groups == 0
        if not fits or ("g_idx" in infos and infos["g_idx"].shape != (n,)):
            raise _unfit(where, "GPTQ", f"the shapes of {module}.qweight, qzeros, scales and g_idx do not fit")
        offset = 1 if form == "gptq" else 0
        yield Packing(
            "GPTQ", f"{module}.weight", parts, (m, n), infos["scales"].dtype,
            lambda p, b=bits, o=offset: unpack_gptq(p, b, o),
        )  # fmt: skip


def unpack_gptq(parts: TensorsByName, bits: int, offset: int) -> torch.Tensor:
    """W (m, n) of qweight (n b / 32, m), qzeros (groups, m b / 32), scales (groups, m), g_idx (n,).

    offset: what is added to every stored zero: to its int32 as a whole, as GPTQModel does, which subtracted it so.
    """
    scales = parts["scales"]
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    mask = 2**bits - 1
    q = (parts["qweight"][:, None, :] >> shifts[None, :, None]) & mask
    q = q.reshape(-1, scales.shape[1])  # (n, m)
    added = offset * sum(1 << shift for shift in range(0, 32, bits))
    zeros = (((parts["qzeros"].long() + added)[:, :, None] >> shifts) & mask).reshape(scales.shape)
    n, groups = len(q), len(scales)
    group = parts["g_idx"].long() if "g_idx" in parts else torch.arange(n) // (n // groups)
    if n and not (0 <= int(group.min()) and int(group.max()) < groups):
        raise ValueError(f"g_idx names a group beyond {groups}")
    return _times_scales(q - zeros[group], scales[group]).T.contiguous()


def _awq(where: str, section: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Iterator[Packing]:
    bits, form = section.get("bits", section.get("w_bit")), str(section.get("version") or "gemm").lower()
    if any(n.endswith((".qweight", ".qzeros")) for n in tensors) and (bits != 4 or form != "gemm"):
        raise _unfit(where, "AWQ", f"they are of {bits!r} bits as {form!r}, expected 4 bits as gemm")
    for module, parts, infos in _parts_of(where, "AWQ", tensors, ("qweight", "qzeros", "scales")):
        (n, columns), (groups, others) = infos["qweight"].shape, infos["qzeros"].shape
        m = columns * 8
        if infos["scales"].shape != (groups, m) or others != columns or not groups or n % groups:
            raise _unfit(where, "AWQ", f"the shapes of {module}.qweight, qzeros and scales do not fit")
        yield Packing("AWQ", f"{module}.weight", parts, (m, n), infos["scales"].dtype, unpack_awq)


def unpack_awq(parts: TensorsByName) -> torch.Tensor:
    """W (m, n) of qweight (n, m / 8), qzeros (groups, m / 8), scales (groups, m), four bits each in AWQ_ORDER."""
    shifts = torch.tensor([4 * place for place in AWQ_ORDER], dtype=torch.int32)
    q, zeros = (((parts[x][:, :, None] >> shifts) & 15).flatten(1) for x in ("qweight", "qzeros"))
    repeat = len(q) // len(zeros)
    zeros, scales = (x.repeat_interleave(repeat, 0) for x in (zeros, parts["scales"]))
    return _times_scales(q - zeros, scales).T.contiguous()


def _times_scales(q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """scale q, rounded once: whole numbers of 8 bits times 16-bit floats are exact in float32."""
    return (q.float() * scales.float()).to(scales.dtype)


# --- FP8 with a scale for the whole or for each row -------------------------------------------------------------------


def _fp8(tensors: Mapping[str, TensorInfo]) -> Iterator[Packing]:
    for name, info in tensors.items():
        scale = tensors.get(f"{name}_scale")
        if scale is None or info.dtype not in ("F8_E4M3", "F8_E5M2") or len(info.shape) != 2:
            continue
        m, n = info.shape
        if scale.dtype not in ("F32", "BF16", "F16") or scale.shape not in ((), (1,), (m,), (m, 1), (1, 1)):
            continue
        parts = {"weight": name, "scale": scale.name}
        if (given := f"{name.removesuffix('weight')}input_scale") in tensors:
            parts["input_scale"] = given
        yield Packing("FP8", name, parts, (m, n), "F32", unpack_fp8)


def unpack_fp8(parts: TensorsByName) -> torch.Tensor:
    """W (m, n) of FP8 numbers and one scale, or one per row, by which they are multiplied in float32."""
    W, scale = parts["weight"].float(), parts["scale"].float().reshape(-1)
    return W * (scale[:, None] if len(scale) > 1 else scale if math.prod(W.shape) else 1.0)
