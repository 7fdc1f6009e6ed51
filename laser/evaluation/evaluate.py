"""eval: the loss of one checkpoint on one text, by the whole model or streamed layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.source import require_unchanged
from laser.choices import WINDOW
from laser.differences.opened import opened_model
from laser.errors import CheckpointError, UsageError, first_line, is_out_of_memory
from laser.evaluation.activations import Store
from laser.evaluation.as_stored import as_stored
from laser.evaluation.causal import build_causal, check_causal, check_windows, probes, say_unused
from laser.evaluation.layout import no_weights_for, running
from laser.evaluation.perplexity import Perplexity, record_of_losses
from laser.evaluation.streaming import MODEL_DTYPES, LayeredModel, require_dtype, token_losses
from laser.evaluation.text import Text, Window, Windows, windows_named


def evaluate(
    checkpoint: Checkpoint | str | Path,
    windows: Windows | Text | str | Path,
    *,
    window: int = WINDOW,
    limit: int | None = None,
    stream: bool = False,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    store: Store | None = None,
    tick: Callable[[], None] = lambda: None,
    expect: Callable[[int], None] = lambda _: None,
) -> Perplexity:
    """Loss and standard error of `checkpoint` on `windows`: cut already, or a text, or its file.

    window, limit: tokens of each, and how many from the front, where they are not cut yet.

    In memory the model is transformers' own `from_pretrained`, called window by window. With `stream` one layer's
    weights are in memory at a time and every window passes through it; the result is equal to 1e-6 in float32. Packed
    weights always go that way: laser unpacks them, whether or not transformers can. `tick` is called per window, or per
    piece when streaming, and before that `expect` with how many these will be.
    Raises UsageError for what is no causal language model, a token beyond the embedding, windows beyond learned
    positions or a model that cannot be streamed, CheckpointError for weights that are missing, NumericalError for a
    loss that is not finite.
    """
    checkpoint = opened_model(checkpoint)
    windows = windows_named(windows, checkpoint.path, window, limit)
    check_vocabulary(checkpoint, windows)
    weights = checkpoint.fingerprint.stated()
    if stream or checkpoint.remade:
        model = LayeredModel(checkpoint, dtype=dtype, device=device, store=store)
        expect(model.pieces)
        sums = model.losses(windows.windows, tick).sums
    else:
        whole = load_whole(checkpoint, dtype).to(device)
        check_whole(checkpoint, whole, windows.windows, dtype)
        with running(checkpoint, "try another --window, or --dtype"):
            expect(len(windows.windows))
            sums = whole_losses(whole, windows, tick)
    require_unchanged(checkpoint)
    stated = {"model": checkpoint.name, "identity": checkpoint.identity, "weights": weights}
    return record_of_losses(windows, sums, **stated, dtype=dtype, device=str(device))


def check_evaluation(checkpoint: Checkpoint, windows: Windows) -> None:
    """What can be refused of an evaluation before any weight is read. Raises as `evaluate` does."""
    check_vocabulary(checkpoint, windows)
    check_windows(checkpoint, build_causal(checkpoint), windows.windows)


def check_vocabulary(checkpoint: Checkpoint, windows: Windows) -> None:
    """Raises UsageError for a token id that the embedding has no row for, before any weight is read."""
    embedding, text = checkpoint.tensors.get("model.embed_tokens.weight"), checkpoint.config.get("text_config")
    config = text if isinstance(text, dict) and "vocab_size" not in checkpoint.config else checkpoint.config
    rows = embedding.shape[0] if embedding else config.get("vocab_size")
    highest = max(int(w.tokens.max()) for w in windows.windows)
    if isinstance(rows, int) and highest >= rows:
        raise UsageError(
            f"the tokenizer gives token {highest}, but {checkpoint.name} embeds only {rows} (0 to {rows - 1}); "
            "use the tokenizer that belongs to these weights"
        )


def load_whole(checkpoint: Checkpoint, dtype: str) -> Any:
    """transformers' own model in memory. Raises UsageError for what is no causal language model, CheckpointError where
    transformers would fill a gap with random weights."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    require_dtype(dtype)
    build_causal(checkpoint)
    showing, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(checkpoint.path),
            dtype=MODEL_DTYPES[dtype],
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **as_stored(checkpoint),
            ignore_mismatched_sizes=True,  # so that they are reported, by name, and refused below
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{checkpoint.name}: transformers cannot load it ({first_line(error)}); try laser scan --dry-run"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if showing:
            logging.enable_progress_bar()
    model, info = loaded
    if gaps := sorted(info["missing_keys"]):
        raise no_weights_for(checkpoint, gaps)
    for name, found, expected in info["mismatched_keys"]:
        raise CheckpointError(
            f"{checkpoint.name}: {name} has shape {list(found)}, expected {list(expected)} by config.json; "
            "use the config that belongs to these weights"
        )
    say_unused(checkpoint, info["unexpected_keys"])
    return model.eval()


def check_whole(checkpoint: Checkpoint, model: Any, windows: Sequence[Window], dtype: str) -> None:
    """What can be refused before the first window: see `check_windows` and `check_causal`."""
    check_windows(checkpoint, model, windows)
    _, second, changed = probes(windows)
    with running(checkpoint, "try another --dtype"), torch.inference_mode():
        before, after = (_logits(model, tokens) for tokens in (second, changed))
    check_causal(checkpoint, before, after, MODEL_DTYPES[dtype])


def whole_losses(model: Any, windows: Windows, tick: Callable[[], None] = lambda: None) -> list[float]:
    """Summed loss of each window (W,), nats, by a transformers model in memory."""
    sums = []
    with torch.inference_mode():
        for window in windows.windows:
            logits = _logits(model, window.tokens)[-window.scored :]
            losses, _ = token_losses(logits, torch.from_numpy(window.tokens[-window.scored :]))
            sums.append(float(losses.cpu().double().sum()))
            tick()
    return sums


def _logits(model: Any, tokens: Any) -> torch.Tensor:
    """What predicts each of tokens[1:], (T, V)."""
    ids = torch.from_numpy(tokens[:-1].copy())[None].to(model.device)
    return model(input_ids=ids, use_cache=False).logits[0]
