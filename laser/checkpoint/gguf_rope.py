"""Rotary scaling of a GGUF file as transformers' `rope_scaling`, read as llama.cpp reads it.

llama.cpp (llama-model.cpp, llama-context.cpp, ggml's rope_yarn) turns pair i at position p by p * theta_i, with
theta_i = base^(-2i/d) / f_i and s = 1 / factor:

    none, linear   cos, sin of s p theta_i, times a; no type is linear, no factor is 1
    yarn           s p theta_i and p theta_i mixed by a ramp over i, times a (1 + 0.1 ln factor)
    longrope       f_i from rope_factors_long or _short, by the length of the context, times a

f_i is 1 where the file has no tensor of factors; a is rope.scaling.attn_factor. Where no type of transformers' own fits
(factors f_i, or an a beside linear scaling), its `longrope` with equal short and long factors is that very formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from laser.errors import CheckpointError

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
FACTORS = (FREQS, LONG, SHORT)
KINDS = ("none", "linear", "yarn", "longrope")
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SOURCE = "start from the model on the Hub"


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
            raise CheckpointError(f"{where}: {key} is {found!r}, expected a positive number; {SOURCE}")
        return float(f"{found:.7g}")  # a float32 there

    kind = get("rope.scaling.type", "linear")
    if kind not in KINDS:
        raise CheckpointError(f"{where}: rope scaling {kind!r} is not known, expected {', '.join(KINDS)}; {SOURCE}")
    if number("rope.scaling.alpha", 0.0):
        raise CheckpointError(f"{where}: rope.scaling.alpha has no translation to transformers; {SOURCE}")
    given = number("rope.scaling.factor", number("rope.scale_linear", 0.0))
    if kind == "yarn" and not given:
        raise CheckpointError(f"{where}: rope scaling 'yarn' needs rope.scaling.factor, found none; {SOURCE}")
    factor = given or 1.0
    factor = 1.0 if kind == "none" else factor
    attention = number("rope.scaling.attn_factor", 1.0)
    # 0 stands for the context that the model was trained on.
    original = int(number("rope.scaling.original_context_length", 0)) or config["max_position_embeddings"]
    half = config["head_dim"] // 2
    for name, values in factors.items():
        if len(values) != half or not all(math.isfinite(v) and v > 0 for v in values):
            raise CheckpointError(f"{where}: {name} has {len(values)} values, expected {half} above 0; {SOURCE}")
    if kind == "longrope":
        if LONG not in factors or SHORT not in factors:
            lost = LONG if LONG not in factors else SHORT
            raise CheckpointError(f"{where}: rope scaling 'longrope' needs the tensor {lost}, found none; {SOURCE}")
        return _longrope(factors[SHORT], factors[LONG], factor, attention, original)
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
    told = number("rope.scaling.yarn_attn_factor", 1.0)
    for wrong, what in (
        (factor < 1, f"a factor of {factor:g}"),
        (scaled, f"{FREQS} beside it"),
        (mixed != 1, f"yarn_ext_factor {mixed:g}"),
        (told != 1, f"yarn_attn_factor {told:g}"),
    ):
        if wrong:
            raise CheckpointError(f"{where}: rope scaling 'yarn' with {what} has no translation; {SOURCE}")
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
