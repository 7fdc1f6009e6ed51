"""Before a model is loaded: does it fit, and if not, what does. For eval, search, run and leaderboard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial

import torch

from laser.checkpoint.matrices import Matrix
from laser.checkpoint.reader import Checkpoint
from laser.cli.common import say
from laser.engine.crew import Crew, worker_bytes
from laser.errors import OutOfMemory, UsageError
from laser.evaluation.causal import build_causal
from laser.evaluation.footprint import READING, WORKER, Needs, layered_needs, longest, states_bytes, whole_needs
from laser.evaluation.layout import NotByLayers
from laser.evaluation.placement import Alive, Asked, NeedsOf, Placement, place, refusal, smaller_windows
from laser.evaluation.streaming import MODEL_DTYPES, LayeredModel
from laser.evaluation.text import Window
from laser.spectral.devices import HOST, Device, choose_device, free_bytes


def free(name: str, mapped: int = 0) -> int | None:
    """Bytes that are free on a device."""
    if name == HOST.name:
        return free_bytes(HOST, mapped)
    return free_bytes(choose_device(name))


def for_eval(
    checkpoint: Checkpoint, windows: Sequence[Window], device: Device, dtype: str, stream: bool | None
) -> Placement:
    """How eval runs a model: whole by transformers, or layer by layer."""
    asked, needs_of = _of_eval(checkpoint, windows, device, dtype, stream)
    return place(checkpoint.name, asked, needs_of, free, _ways(asked))


def cannot_stream(
    checkpoint: Checkpoint,
    windows: Sequence[Window],
    device: Device,
    dtype: str,
    error: NotByLayers,
) -> OutOfMemory:
    """What to say where eval streamed for want of memory, and the model turned out to be no row of layers."""
    asked, needs_of = _of_eval(checkpoint, windows, device, dtype, None)
    return refusal(checkpoint.name, asked, needs_of, free, _ways(asked), error)


def _of_eval(
    checkpoint: Checkpoint, windows: Sequence[Window], device: Device, dtype: str, stream: bool | None
) -> tuple[Asked, NeedsOf]:
    if dtype not in MODEL_DTYPES:
        raise UsageError(f"no evaluation in {dtype!r}; try --dtype {'|'.join(MODEL_DTYPES)}")

    def needs_of(asked: Asked, resident: int | None) -> Needs:
        kind = MODEL_DTYPES[asked.dtype]
        if resident is not None:
            return layered_needs(_built(checkpoint, asked.dtype), asked.torch_device, asked.tokens, resident)
        return whole_needs(checkpoint, build_causal(checkpoint, kind), kind, asked.torch_device, asked.tokens)

    return Asked(dtype, device.name, longest(windows), stream), needs_of


def for_search(
    checkpoint: Checkpoint,
    calibration: Sequence[Window],
    reported: Sequence[Window],
    matrices: Sequence[Matrix],
    crew: Crew,
    device: Device,
    dtype: str,
    stream: bool | None,
    *,
    variants: int,
    rules: int = 1,
    backward: bool = False,
) -> Placement:
    """How a search runs a model: which of its pieces stay, and how many of `variants` are measured in one walk.

    A cut of the largest of `matrices` is made beside it. crew: has scanned them before. rules: for each candidate.
    backward: with --shortlist gradient.
    """
    beside = {"host": worker_bytes(matrices, HOST), "mapped": READING + WORKER * len(crew.pool(matrices))}
    built = cache(partial(_built, checkpoint))
    asked = Asked(dtype, device.name, longest([*calibration, *reported]), stream)

    def needs_of(asked: Asked, resident: int | None) -> Needs:
        needs = layered_needs(built(asked.dtype), asked.torch_device, asked.tokens, resident, backward)
        # What stays on a device leaves room to cut there; where nothing does, the host cuts if it must.
        cut = worker_bytes(matrices, device) if resident != 0 and asked.device != HOST.name else 0
        return needs.beside(device=cut, **beside)

    model = built(dtype)
    # States before each layer with a candidate; a pass backwards wants those between all the layers.
    kept = model.layers + 1 if backward else min(len({m.layer for m in matrices}), variants // rules)
    alive = Alive(model.layers, states_bytes(model, calibration), variants, rules, kept)
    return place(checkpoint.name, asked, needs_of, free, _ways(asked), alive)


def for_gradients(checkpoint: Checkpoint, windows: Sequence[Window], device: Device, dtype: str) -> tuple[Needs, int]:
    """What it takes to run a text back for the gradients at outputs, and bytes of the states that are kept for that."""
    model = _built(checkpoint, dtype)
    needs = layered_needs(model, device.torch_device, longest(windows), 0, backward=True, of_weights=False)
    # What enters each layer, what is where the walk is, and the gradient there.
    return needs, states_bytes(model, windows) * (model.layers + 2)


PROMPT = 3072  # tokens: the longest of the six tasks' prompts, MMLU's and ARC's, in vocabularies of 32,000 and more


def for_leaderboard(checkpoint: Checkpoint, device: Device, dtype: str, batch: int) -> Placement:
    """Whether lm-eval can have the model: it takes it whole. Raises OutOfMemory where it does not fit."""
    asked = Asked(stored_dtype(checkpoint) if dtype == "auto" else dtype, device.name, PROMPT, False, batch)

    def needs_of(asked: Asked, _: int | None) -> Needs:
        kind = getattr(torch, asked.dtype)
        model = build_causal(checkpoint, kind)
        held = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        tokens = min(asked.tokens, held) if isinstance(held, int) else asked.tokens
        return whole_needs(checkpoint, model, kind, asked.torch_device, tokens, asked.batch, widened=False)

    ways = [("--batch-size 1", replace(asked, batch=1))] if batch > 1 else []
    return place(checkpoint.name, asked, needs_of, free, [*ways, *_ways(asked, streamed=False)])


def for_run_leaderboard(checkpoint: Checkpoint, device: Device, *, needed: bool) -> Placement | None:
    """The same for a run, which leaves the leaderboard out where it does not fit and was not asked for, and says so."""
    try:
        return for_leaderboard(checkpoint, device, "auto", 1)
    except OutOfMemory as error:
        if needed:
            raise OutOfMemory(f"the leaderboard: {error.why}", "try --no-leaderboard") from error
        say(f"laser: the leaderboard is left out: {error.why}", aside=True)
        return None


def stored_dtype(checkpoint: Checkpoint) -> str:
    """What transformers makes of dtype "auto": what config.json says, else what the first tensor is stored in."""
    for section in (checkpoint.config, checkpoint.config.get("text_config")):
        stated = isinstance(section, dict) and (section.get("dtype") or section.get("torch_dtype"))
        if isinstance(stated, str) and stated.removeprefix("torch.") in ("float32", "bfloat16", "float16"):
            return stated.removeprefix("torch.")
    stored = {"F32": "float32", "F16": "float16", "F64": "float64"}
    return next((stored.get(t.dtype, "bfloat16") for t in checkpoint.tensors.values() if t.dtype[0] in "BF"), "float32")


def said(placement: Placement) -> Placement:
    """The same; what memory decided is a line on stderr."""
    if placement.news:
        say(f"laser: {placement.why}", aside=True, needed=False)
    return placement


def _built(checkpoint: Checkpoint, dtype: str) -> LayeredModel:
    """Without weights, and without the memory of the C library set for streaming."""
    return LayeredModel(checkpoint, dtype=dtype, device="meta", resident=None)


def _ways(asked: Asked, streamed: bool = True) -> list[tuple[str, Asked]]:
    """What may be asked for instead, the mildest first."""
    ways = [("--stream", replace(asked, stream=True))] if streamed and asked.stream is False else []
    if asked.dtype == "float32":
        ways.append(("--dtype bfloat16", replace(asked, dtype="bfloat16")))
    if asked.device != HOST.name:
        ways.append(("--device cpu", replace(asked, device=HOST.name)))
    return [*ways, *(smaller_windows(asked) if streamed else ())]
