"""How much memory a model takes before it is loaded: whole, in pieces of which some stay, or streamed. By shapes.

Measured on the demo model (docs/log) the peak lies at most a tenth and 64 MiB above the sum of what is counted here,
and `Needs` has that margin in it. Files that are only read are no need: their pages can be given back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.safetensors import BITS
from laser.evaluation.layout import decoder_of, keep_dtypes, sources_of
from laser.evaluation.streaming import HEAD_ROWS, LayeredModel
from laser.evaluation.text import Window

MARGIN, LEAST_SPACE = 0.1, 64 << 20  # of what is counted; the second for work space of the libraries and small things
# Reserved while a run lasts and hardly ever filled, beyond LEAST_SPACE: stacks of the threads that read; and for each
# worker that scans a stack, and buffers of NumPy's and SciPy's OpenBLAS. Measured.
READING, WORKER = 64 << 20, 72 << 20
# How many arrays (tokens, rows + columns of the largest matrix) a layer holds at a time: gate, up, product, norms.
# STACKED is for stacked experts, whose gate and up are one matrix, for each expert that a token is sent to. Measured:
# 2.0 to 3.9 (Phi-3, Llama, GPT-2), 2.0 to 2.2 (Mixtral, Qwen3-MoE).
PLAIN_LOGITS, STACKED_COPIES = 4.0, 2.5
SCORES, SCAN = 3, 3  # arrays of attention's scores where they are made at all; of states of a scan (GPT-OSS, Mamba)
SAVED = 3  # times as many that a backward pass keeps
SENT_TO = ("num_experts_per_tok", "moe_topk", "top_k_experts")
_STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Needs:
    """Bytes at the peak besides the libraries.

    device: on an accelerator, 0 without one
    mapped: what is mapped or reserved meanwhile and takes no memory; only the process's own limits count it
    """

    device: int
    host: int
    mapped: int = 0

    def beside(self, host: int = 0, device: int = 0, mapped: int = 0) -> Needs:
        """With so many more bytes."""
        return Needs(self.device + device, self.host + host, self.mapped + mapped)


def longest(windows: Sequence[Window]) -> int:
    """Inputs of the longest window: its last token is only predicted."""
    return max(len(w.tokens) - 1 for w in windows)


def whole_needs(
    checkpoint: Checkpoint,
    model: Any,
    dtype: torch.dtype,
    device: torch.device,
    tokens: int,
    batch: int = 1,
    widened: bool = True,
) -> Needs:
    """Of transformers' own `from_pretrained` and a forward pass of `batch` texts of `tokens` tokens.

    It is loaded on the host and then sent to `device`. Experts that are stored one by one are all there in `dtype`
    before they are stacked: twice, where they are not stored in it. model: built in `dtype` without weights. widened:
    whether logits become float32 before their logarithms are taken.
    """
    keep_dtypes(model, dtype)
    weights = _tensor_bytes([*model.parameters(), *model.buffers()])
    named = dict(model.named_parameters())
    joined = [
        _tensor_bytes([named[name]])
        for name, patterns in sources_of(checkpoint, model)[0].items()
        if None not in patterns and name in named
    ]
    stored = {info.dtype for info in checkpoint.tensors.values()}
    again = max(joined, default=0) if stored == {_STORED.get(dtype)} else sum(joined)
    logits = _logits_bytes(model, dtype, tokens) if widened else 2 * dtype.itemsize * tokens * _vocabulary(model)
    passing = batch * max(_layer_bytes(model, dtype, tokens), logits)
    mapped = sum(shard.size for shard in checkpoint.shards)
    if device.type == "cpu":
        return _needs(0, weights + again + passing, mapped)
    return _needs(weights + passing, weights + again, mapped)


def layered_needs(
    model: LayeredModel,
    device: torch.device,
    tokens: int,
    resident: int | None,
    backward: bool = False,
    of_weights: bool = True,
) -> Needs:
    """What a pass in pieces needs, for windows of up to `tokens` inputs. More with each piece that stays.

    The states between the pieces are not counted: see `states_bytes`.

    resident: how many of the last pieces stay, None: all of them; where any does, the others are read one ahead
    backward: also of a pass back through each layer; of_weights: with gradients of its weights
    """
    sizes = [_tensor_bytes(kinds) for kinds in model.kinds()]
    *pieces, rest = sizes
    layers = max(pieces[1:-1])
    head = _logits_bytes(model.model, model.dtype, min(tokens, HEAD_ROWS))
    passing = max(head, _layer_bytes(model.model, model.dtype, tokens) * (SAVED if backward else 1))
    if resident == 0:  # the head is not there with a layer, nor a layer with it
        weights = max(pieces[0], max(layers + passing, pieces[-1] + head) - passing)
    else:  # those that stay, and of the others the one that runs and the next, which is read meanwhile
        stay = 0 if resident is None else max(len(pieces) - resident, 0)
        weights = sum(pieces[stay:]) + max((sum(pieces[i : min(i + 2, stay)]) for i in range(stay)), default=0)
    there = rest + weights + passing + layers * (backward and of_weights)
    reading = _reading_bytes(model.checkpoint)
    if device.type == "cpu":
        return _needs(0, there + reading)
    return _needs(there, reading + max(pieces))  # what is copied to a device is pinned until it is there


def states_bytes(model: LayeredModel, windows: Sequence[Window]) -> int:
    """Of the hidden states of all windows between two pieces, once."""
    return sum(len(w.tokens) - 1 for w in windows) * model.width * model.dtype.itemsize


def active_weights(model: Any) -> tuple[int, int]:
    """How many weights each token is multiplied with, in the layers and in the head: of stacked experts those that it
    is sent to."""
    config = model.config.get_text_config()
    sent_to, found = _count(config, SENT_TO), 0
    head = model.get_output_embeddings()
    for module in decoder_of(model).modules():
        if not isinstance(module, torch.nn.Embedding) and module is not head:
            for W in module.parameters(recurse=False):
                if W.dim() > 1:
                    found += W.numel() // (W.shape[0] if W.dim() == 3 else 1) * (sent_to if W.dim() == 3 else 1)
    return found, _vocabulary(model) * int(config.hidden_size)  # the head may be the embedding again


def _needs(device: int, host: int, mapped: int = 0) -> Needs:
    def with_margin(counted: int) -> int:
        return int(counted * (1 + MARGIN)) + LEAST_SPACE if counted else 0

    return Needs(with_margin(device), with_margin(host), mapped)


def _tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.dtype.itemsize for t in tensors)


def _reading_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the largest tensor as it is stored, in FP8 also as float32 and with its scale at each element."""
    fp8 = checkpoint.fp8.scales if checkpoint.fp8 else {}
    return max(
        (math.prod(t.shape) * (BITS[t.dtype] + (64 if t.name in fp8 else 0)) // 8 for t in checkpoint.tensors.values()),
        default=0,
    )


def _layer_bytes(model: Any, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of what passes through one layer at a time."""
    config = model.config.get_text_config()
    sent_to = _count(config, SENT_TO)
    states = _count(config, ("state_size", "mamba_d_state", "ssm_state_size"), none=0)
    wide, rows = 0.0, 0
    for module in decoder_of(model).modules():
        for W in () if isinstance(module, torch.nn.Embedding) else module.parameters(recurse=False):
            if W.dim() > 1:
                rows = max(rows, *W.shape[-2:])
                wide = max(wide, sum(W.shape[-2:]) * (PLAIN_LOGITS if W.dim() == 2 else STACKED_COPIES * sent_to))
    made = getattr(config, "_attn_implementation", None) == "eager"
    heads = _count(config, ("num_attention_heads",)) if made else 0
    passing = tokens * int(wide * dtype.itemsize + rows * states * SCAN * 4)
    return passing + tokens * tokens * (1 + SCORES * heads * 4)  # 1: a mask of truth values


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _count(config: Any, names: Sequence[str], none: int = 1) -> int:
    found = (getattr(config, name, None) for name in names)
    return max([none, *(n for n in found if isinstance(n, int))])


def _logits_bytes(model: Any, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of the logits, of their copy in float32 where they are in another dtype, and of their logarithms."""
    return tokens * _vocabulary(model) * (dtype.itemsize + 4 + (4 if dtype != torch.float32 else 0))
