"""eval: the loss of one checkpoint on one text, by the whole model in memory or streamed layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from laser.checkpoint.reader import Checkpoint
from laser.errors import CheckpointError, UsageError, first_line
from laser.evaluation.activations import Store
from laser.evaluation.perplexity import Perplexity, record_of
from laser.evaluation.plain_config import plain_config
from laser.evaluation.streaming import DTYPES, LayeredModel, token_losses
from laser.evaluation.text import Windows


def evaluate(
    checkpoint: Checkpoint,
    windows: Windows,
    *,
    stream: bool = False,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    store: Store | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Perplexity:
    """Loss and standard error of `checkpoint` on `windows`.

    In memory the model is transformers' own `from_pretrained`, called window by window. With `stream` one layer's
    weights are in memory at a time and every window passes through it; the result is equal to 1e-6 in float32. `tick`
    is called per window, or per piece when streaming. Raises UsageError for a token beyond the embedding,
    CheckpointError for weights that are missing, NumericalError for a loss that is not finite.
    """
    check_vocabulary(checkpoint, windows)
    if stream:
        model = LayeredModel(checkpoint, dtype=dtype, device=device, store=store)
        sums = model.losses(windows.windows, tick).sums
    else:
        sums = whole_losses(load_whole(checkpoint, dtype).to(device), windows, tick)
    return record_of(
        windows, sums, model=checkpoint.name, identity=checkpoint.identity, dtype=dtype, device=str(device)
    )


def check_vocabulary(checkpoint: Checkpoint, windows: Windows) -> None:
    """Raises UsageError for a token id that the embedding has no row for, before any weight is read."""
    embedding = checkpoint.tensors.get("model.embed_tokens.weight")
    rows = embedding.shape[0] if embedding else checkpoint.config.get("vocab_size")
    highest = max(int(w.tokens.max()) for w in windows.windows)
    if isinstance(rows, int) and highest >= rows:
        raise UsageError(
            f"the tokenizer gives token {highest}, but {checkpoint.name} embeds only {rows} (0 to {rows - 1}); "
            "use the tokenizer that belongs to these weights"
        )


def load_whole(checkpoint: Checkpoint, dtype: str) -> Any:
    """transformers' own model in memory. Raises CheckpointError where it would fill a gap with random weights."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if dtype not in DTYPES:
        raise UsageError(f"no evaluation in {dtype!r}; try --dtype {'|'.join(DTYPES)}")
    showing, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(checkpoint.path),
            dtype=DTYPES[dtype],
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **plain_config(checkpoint),
            ignore_mismatched_sizes=True,  # so that they are reported, by name, and refused below
        )
    except (ValueError, KeyError, OSError, RuntimeError, ImportError) as error:
        raise CheckpointError(
            f"{checkpoint.name}: transformers cannot load it ({first_line(error)}); try laser scan --dry-run"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if showing:
            logging.enable_progress_bar()
    model, info = loaded
    if gaps := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{checkpoint.name} has no weights for {gaps[0]} ({len(gaps)} in all), which would be random; "
            "finish the download"
        )
    for name, found, expected in info["mismatched_keys"]:
        raise CheckpointError(
            f"{checkpoint.name}: {name} has shape {list(found)}, expected {list(expected)} by config.json; "
            "use the config that belongs to these weights"
        )
    return model.eval()


def whole_losses(model: Any, windows: Windows, tick: Callable[[], None] = lambda: None) -> list[float]:
    """Summed loss of each window (W,), nats, by a transformers model in memory."""
    sums = []
    with torch.inference_mode():
        for window in windows.windows:
            ids = torch.from_numpy(window.tokens[:-1])[None].to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, -window.scored :]
            losses, _ = token_losses(logits, torch.from_numpy(window.tokens[-window.scored :]))
            sums.append(float(losses.cpu().double().sum()))
            tick()
    return sums
