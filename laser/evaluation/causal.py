"""Whether a checkpoint can be asked for the loss of a text at all, and of windows of that length.

Perplexity is of causal language models: each token is predicted from those before it. Encoders, sequence-to-sequence
models and classifiers have none, though transformers builds many of them as one without a word.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from laser.checkpoint.matrices import DoubtWarning
from laser.checkpoint.reader import Checkpoint
from laser.errors import CheckpointError, LaserError, UsageError, is_out_of_memory
from laser.evaluation.layout import cannot_build, decoder_of, load_config, require_hub_format
from laser.evaluation.text import Window

# Architectures that score a text, or fill gaps in it, and do not continue it.
OTHER_TASKS = re.compile(
    r"\w*(For(Sequence|Token|Image|Audio|Sentence)\w*Classification|ForSequenceRegression|For\w*QuestionAnswering|"
    r"ForMultipleChoice|For\w*MaskedLM|ForNextSentencePrediction|ForReward\w*|Reward\w*Model|\w*RewardModel|ForScore|"
    r"ForRetrieval|ForTextEncoding|ForProcessReward\w*|ValueModel)"
)
COMPUTED = re.compile(r"rotary_emb\.|inv_freq|position_ids$|masked_bias$|attn\.bias$|attention\.bias$")
# As many tokens as a model is tried on before it is measured.
PROBE = 16
# Of a loss; what float arithmetic in another order makes of it is far below.
LEAK_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
# What rounding moves earlier logits by, relative to what the last token moves its own.
LEAK = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def no_causal_model(checkpoint: Checkpoint, why: str) -> UsageError:
    return UsageError(
        f"{checkpoint.name} is no causal language model ({why}), so it has no perplexity; "
        "try laser scan, plan and reduce, which need none"
    )


def build_causal(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model of a checkpoint's config with every parameter on the meta device: no memory, no weights.

    Raises UsageError for what is no causal language model, CheckpointError for a config that transformers does not
    know or cannot build.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    require_hub_format(checkpoint.path)
    config = load_config(checkpoint.path, checkpoint.name)
    _require_possible(checkpoint, config)
    named = [str(name) for name in getattr(config, "architectures", None) or ()]
    if getattr(config, "is_encoder_decoder", False):
        raise no_causal_model(checkpoint, "it goes from sequence to sequence, is_encoder_decoder is true")
    if named and all(OTHER_TASKS.fullmatch(name) for name in named):
        raise no_causal_model(checkpoint, f"config.json names {named[0]}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise no_causal_model(checkpoint, f"transformers has none of model_type {config.model_type}")
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except LaserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise cannot_build(checkpoint.name, error) from error
    # GPT-NeoX has an is_decoder that nobody reads; in families that can look across it turns the causal mask on.
    if getattr(model.config, "is_decoder", True) is False and hasattr(model.config, "add_cross_attention"):
        raise no_causal_model(checkpoint, "each token sees those that follow, is_decoder is false")
    return model.eval()


MOST_EXPERTS = 1 << 16  # of a layer; the most of any model so far are some hundreds


def _require_possible(checkpoint: Checkpoint, config: Any) -> None:
    """Raises CheckpointError for more layers than there are tensors: making modules for them would take for ever."""
    entries = {**config.to_dict(), **config.get_text_config().to_dict()}
    most = {"num_hidden_layers": len(checkpoint.tensors)}
    most |= dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), MOST_EXPERTS)
    for key, limit in most.items():
        if isinstance(entries.get(key), int) and entries[key] > limit:
            raise CheckpointError(
                f"{checkpoint.name}/config.json: {key} is {entries[key]}, expected at most {limit} beside "
                f"{len(checkpoint.tensors)} tensors; download it again"
            )


def say_unused(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Once per model: which weights of the checkpoint the model does not hold, how many and one of them."""
    # Tables of rotary angles and masks are computed now, whatever old checkpoints say.
    weights = sorted(name for name in names if not COMPUTED.search(name))
    if weights:
        warnings.warn(
            f"{checkpoint.name}: {len(weights)} tensors are not in the model that transformers runs, such as "
            f"{weights[0]}; they do not count in what is measured",
            DoubtWarning,
            stacklevel=2,
        )


# --- windows ----------------------------------------------------------------------------------------------------------


def check_windows(checkpoint: Checkpoint, model: Any, windows: Sequence[Window]) -> None:
    """Raises UsageError for a token that has no embedding or a window longer than the positions that the model has
    learned; warns where it is longer than the rotary positions that it was made for."""
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(int(w.tokens.max()) for w in windows)
    if highest >= rows:
        raise UsageError(
            f"the tokenizer gives token {highest}, but {checkpoint.name} embeds only {rows} (0 to {rows - 1}); "
            "use the tokenizer that belongs to these weights"
        )
    longest = max(len(w.tokens) - 1 for w in windows)
    table, made_for = learned_positions(model), rotary_positions(model)
    if table is not None and longest > table:
        raise UsageError(
            f"the windows have {longest} tokens before the last, and {checkpoint.name} has learned {table} positions; "
            f"try --window {table}"
        )
    if table is None and made_for is not None and longest > made_for:
        warnings.warn(
            f"{checkpoint.name}: windows of {longest + 1} tokens are longer than the {made_for} positions that the "
            f"model was made for, so their loss says little; try --window {made_for}",
            DoubtWarning,
            stacklevel=2,
        )


def learned_positions(model: Any) -> int | None:
    """How many positions the model has a row for, learned or written down; None where positions have no table."""
    found = []
    embedding = model.get_input_embeddings()
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in decoder_of(model).named_modules():
        # Those of the text stand beside its layers, or one deeper; deeper still are those of other modalities' towers.
        beside = name.count(".") < 2 and re.search(r"pos|wpe", name)
        if isinstance(module, torch.nn.Embedding) and module is not embedding and beside:
            first = getattr(module, "offset", 0) or (0 if module.padding_idx is None else module.padding_idx + 1)
            found.append(module.num_embeddings - first)
    for name, buffer in decoder_of(model).named_buffers():
        if re.search(r"pos", name.rpartition(".")[2]) and buffer.dim() == 2 and buffer.shape[0] == limit:
            found.append(limit)
    return min(found, default=None)


def rotary_positions(model: Any) -> int | None:
    """The positions that rotary embeddings were made for, scaled as the config says; None without any."""
    config = model.config.get_text_config()
    limit, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None)
    if not isinstance(limit, int) or not isinstance(rope, Mapping):
        return None
    if not any("rotary" in type(m).__name__.lower() for m in model.modules()):
        return None
    kinds = [r for r in (rope, *rope.values()) if isinstance(r, Mapping)]
    scaled = [
        (r.get("original_max_position_embeddings") or limit) * (r.get("factor") or 1)
        for r in kinds
        if r.get("rope_type", "default") != "default"
    ]
    return int(max([limit, *scaled]))


def grows_between(model: Any, lengths: Sequence[int]) -> int | None:
    """A length whose texts get different rotary angles because a longer text came between them, None if there is none.

    With rope_type dynamic transformers keeps the angles of the longest text until one comes that is short again.
    """
    config = model.config.get_text_config()
    rope, limit = getattr(config, "rope_parameters", None), getattr(config, "max_position_embeddings", None)
    if not isinstance(rope, Mapping) or not isinstance(limit, int):
        return None
    if not any(r.get("rope_type") == "dynamic" for r in (rope, *rope.values()) if isinstance(r, Mapping)):
        return None
    grown, seen = limit, dict[int, int]()
    for length in lengths:
        grown = limit if length < limit else max(grown, length)
        if seen.setdefault(length, grown) != grown:
            return length
    return None


def probes(windows: Sequence[Window]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three short texts (T + 1,) out of the windows: two of different tokens, and the second with another last input.

    The last token is only predicted. T is at most PROBE.
    """
    longest = sorted(windows, key=lambda w: -len(w.tokens))[:2]
    length = min(PROBE + 1, len(longest[-1].tokens))
    first, second = longest[0].tokens[:length].copy(), longest[-1].tokens[:length].copy()
    if np.array_equal(first, second):
        first = first[::-1].copy()
    changed = second.copy()
    others = [t for w in windows for t in w.tokens[: 4 * PROBE] if t != second[-2]]
    if others:
        changed[-2] = others[0]
    return first, second, changed


def check_causal(checkpoint: Checkpoint, before: torch.Tensor, after: torch.Tensor, dtype: torch.dtype) -> None:
    """Raises UsageError where another last token changed a prediction before it.

    before, after (T, V): logits of two texts that differ in the last token. How far the last prediction went tells what
    the token moves from what rounding moves.
    """
    moved = (after - before).abs().float().nan_to_num(0.0, 0.0, 0.0).amax(-1)  # (T,)
    if len(moved) > 1 and float(moved[:-1].max()) > LEAK[dtype] * float(moved[-1]):
        raise no_causal_model(
            checkpoint,
            f"another last token moves its own logits by {float(moved[-1]):.2g} and earlier ones "
            f"by {float(moved[:-1].max()):.2g}",
        )


def same_logits(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two vectors of losses are equal but for the rounding of `dtype`; neither finite counts as equal."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)):
        return False
    return bool(((a - b).abs() <= LEAK_TOLERANCE[dtype] * (1 + a.abs()))[finite].all())
