"""Quantised weights: FP8 with a scale per block is read and written; what is packed in no known way is refused.

FP8 as DeepSeek-V3 publishes it (https://arxiv.org/abs/2412.19437, section 3.3): a weight (m, n) in float8_e4m3fn, and
beside it NAME_scale_inv (ceil(m / 128), ceil(n / 128)), by which each block of 128 x 128 is multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from laser.checkpoint.safetensors import TensorInfo
from laser.errors import CheckpointError

LARGEST_FP8 = 448.0  # of float8_e4m3fn
FP8_BLOCK = (128, 128)
SUFFIX = "_scale_inv"
# Ends of tensor names that only a packed format has -> its name. GPTQ and AWQ share theirs.
PACKED = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    "_blocks": "MXFP4",
    ".weight_packed": "compressed-tensors",
    ".W_q": "hqq",
    ".codebooks": "AQLM",
    ".Qidxs": "QuIP",
}
# What no packed format keeps its numbers in: the weights' own dtypes, and those of positions and masks.
UNQUANTISED = ("F64", "F32", "F16", "BF16", "I64", "BOOL")
# Methods whose tensors have names of PACKED: where none has, config.json is wrong about them.
QUANTISERS = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "mxfp4": "MXFP4", "mlx": "MLX"}


@dataclass(frozen=True)
class Fp8:
    """Which tensors are FP8 with scales.

    scales: weight -> its scale tensor
    block: rows and columns of a block
    """

    scales: Mapping[str, str]
    block: tuple[int, int] = FP8_BLOCK
    powers_of_two: bool = False  # scales are rounded up to one (scale_fmt "ue8m0")


def recognise(where: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Fp8 | None:
    """How the weights are quantised, by the tensors that are there; None where they are not, whatever config.json says
    (`leftover`). where: the checkpoint's name, for messages.

    Raises CheckpointError for a format that cannot be reduced, or FP8 whose scales do not fit.
    """
    section, method, packed = section_of(config), method_of(config), _packed(tensors)
    if packed or (method not in ("", "fp8") and not _is_leftover(method, tensors)):
        kind = QUANTISERS.get(method, method) or packed
        raise CheckpointError(
            f"{where} holds {kind} weights, whose packed numbers have no spectrum; start from the unquantised model, "
            "and quantise the result again"
        )
    scales = {n.removesuffix(SUFFIX): n for n in tensors if n.endswith(SUFFIX) and n.removesuffix(SUFFIX) in tensors}
    scales = {weight: scale for weight, scale in scales.items() if tensors[weight].dtype == "F8_E4M3"}
    if not scales:
        return None
    size = section.get("weight_block_size", FP8_BLOCK)
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise CheckpointError(
            f"{where}: weight_block_size is {size!r}, expected two numbers; try the unquantised model"
        )
    for name, info in tensors.items():
        if info.dtype.startswith("F8") and name not in scales:
            raise CheckpointError(
                f"{info.shard}: {name} is {info.dtype} without a scale per block ({name}{SUFFIX}); start from the "
                "unquantised model"
            )
    for weight, scale in scales.items():
        m_n, found = tensors[weight].shape, tensors[scale]
        expected = tuple(math.ceil(a / b) for a, b in zip(m_n, size, strict=False))
        if len(m_n) != 2 or found.shape != expected or found.dtype not in ("F32", "BF16", "F16"):
            raise CheckpointError(
                f"{found.shard}: {scale} is {found.dtype} {list(found.shape)}, expected F32 {list(expected)} for "
                f"{list(m_n)} in blocks of {size[0]} x {size[1]}; start from the unquantised model"
            )
    return Fp8(scales, (size[0], size[1]), section.get("scale_fmt") == "ue8m0")


def leftover(where: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str | None:
    """What to say where config.json tells of a quantisation that the weights do not have; None where it does not."""
    method = method_of(config)
    if not method or not _is_leftover(method, tensors):
        return None
    kind = QUANTISERS.get(method, method)
    return (
        f"{where}: config.json says that the weights are quantised ({kind}), and they are stored as plain numbers, so "
        "they are read as such; other loaders go by config.json: remove its quantization_config from a copy"
    )


def _is_leftover(method: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether the weights are not quantised by the method that config.json names: no tensor has such a name, or no
    matrix is stored in a dtype that a quantised one may have."""
    plain = all(info.dtype in UNQUANTISED for info in tensors.values() if len(info.shape) > 1)
    return not _packed(tensors) and (method in QUANTISERS or plain)


def section_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config's section on quantisation, its own or its text model's; MLX calls it by another name."""
    for place in (config, config.get("text_config")):
        if isinstance(place, dict):
            found = place.get("quantization_config") or place.get("compression_config") or place.get("quantization")
            if isinstance(found, dict):
                return found
    return {}


def method_of(config: Mapping[str, Any]) -> str:
    """By which method config.json says that the weights are quantised; "" where it does not."""
    section = section_of(config)
    named = section.get("quant_method") or section.get("quant_algo")
    named = named or ("bitsandbytes" if section.get("load_in_4bit") or section.get("load_in_8bit") else "")
    return str(named or ("MLX" if "bits" in section and "group_size" in section else "")).lower()


def _packed(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The packed format that the tensors' names and dtypes show, if any."""
    for name, info in tensors.items():
        for end, kind in PACKED.items():
            if _is_packed(name, end, tensors):
                return kind
        if info.dtype == "U32" and name.endswith(".weight") and f"{name.removesuffix('weight')}scales" in tensors:
            return "MLX"
    return None


def _is_packed(name: str, end: str, tensors: Mapping[str, TensorInfo]) -> bool:
    if not name.endswith(end):
        return False
    return end != "_blocks" or f"{name.removesuffix(end)}_scales" in tensors


def spread(scale: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """Scales (rows of blocks, columns of blocks) to one per element, (m, n), float32."""
    wide = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return wide[: shape[0], : shape[1]]


def dequantise(W: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] = FP8_BLOCK) -> torch.Tensor:
    """W (m, n), float8_e4m3fn, times its block's scale: (m, n), float32, in which the product is rounded once."""
    return W.float().mul_(spread(scale, block, W.shape))


def rounding(W: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] = FP8_BLOCK) -> torch.Tensor:
    """Half a unit of e4m3 at each dequantised element W (m, n): how far off `quantise` may have put it. (m, n)."""
    return torch.maximum(W.abs() * 2.0**-4, spread(scale, block, W.shape) * 2.0**-10)


def quantise(
    W: torch.Tensor, dtype: torch.dtype, block: tuple[int, int] = FP8_BLOCK, powers_of_two: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """W (m, n) to float8_e4m3fn (m, n) and the scales, of `dtype`, that `dequantise` multiplies by.

    A block's scale is amax / 448, rounded to `dtype` (or up to a power of two) before the weights are divided by it, so
    that its rounding costs nothing. An element is off by half a unit of e4m3 at most: 2^-4 of it, or 2^-10 of the
    scale where it is subnormal. A block of zeros has the scale 1.
    """
    m, n = W.shape
    rows, columns = math.ceil(m / block[0]), math.ceil(n / block[1])
    amax = torch.zeros(rows, columns)
    for i in range(rows):
        strip = W[i * block[0] : (i + 1) * block[0]].float().abs().amax(0)  # (n,)
        padded = torch.nn.functional.pad(strip, (0, columns * block[1] - n))
        amax[i] = padded.reshape(columns, block[1]).amax(1)
    scale = torch.where(amax > 0, amax / LARGEST_FP8, torch.ones(()))
    if powers_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    scale = scale.clamp_min(torch.finfo(dtype).tiny).to(dtype)
    scaled = W.float() / spread(scale, block, W.shape)
    return scaled.clamp_(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn), scale
