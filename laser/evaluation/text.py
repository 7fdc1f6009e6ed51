"""Text in, windows of tokens out: what exactly is scored is decided here, once, and hashed.

A window is a sequence of token ids of which the model sees all but the last and is scored on its last `scored` ones.
Two ways to cut a text:

- `windows` (default): disjoint pieces of at most `length` tokens, beginning-of-sequence token included, with one at the
  start of each piece where the tokenizer has one. With it every token of the text is scored; without it the first
  token of each piece only serves as context. A text shorter than `length` gives one short window, and the last window
  of a long text may be short: the loss is weighted by tokens, so nothing is lost or padded.
- `rolling`: as lm-eval's `loglikelihood_rolling`: one prefix token (BOS, or EOS where there is none) before the text
  and none later, the model sees `length` tokens, and the last window is filled up with context to its left. Every
  token is scored exactly once. Without BOS there is no prefix token: the text's first token is only context, and every
  later one is scored once.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laser.choices import WINDOW
from laser.errors import CheckpointError, LaserError, UsageError, first_line, is_out_of_memory
from laser.evaluation.layout import load_config, require_hub_format
from laser.evaluation.rows import TextRow, holds_rows, read_content, require_characters, rows_of

# 512: short enough for 512 x vocabulary logits to fit anywhere, long enough for attention to matter. LaserRMT scored
# 384, 128 and 32 tokens in turn and pooled them; here the length is one and is written down.
MODES = ("windows", "rolling")


@dataclass(frozen=True)
class Text:
    """A text and what to call it in records. `notes`: what was read otherwise than it stands in its file."""

    name: str
    content: str
    file_sha256: str | None = None  # None: not from a file
    notes: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Of the file's own bytes, as `sha256sum` gives it; of any other text, of its content in UTF-8."""
        return self.file_sha256 or hashlib.sha256(self.content.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Window:
    """`tokens` (n,) int64: the model sees tokens[:-1]; the last `scored` tokens are what it must predict."""

    tokens: NDArray[np.int64]
    scored: int


@dataclass(frozen=True)
class Windows:
    """A text cut into windows for one tokenizer. `bytes` is the UTF-8 length of what is scored, where known; `asked`
    how many windows were asked for, None for all: a shorter text gives fewer."""

    windows: tuple[Window, ...]
    text: str
    text_sha256: str
    length: int
    mode: str
    bos: bool
    bytes: int | None
    asked: int | None = None

    @property
    def tokens(self) -> int:
        """How many tokens are scored."""
        return sum(w.scored for w in self.windows)

    @property
    def sha256(self) -> str:
        """Over every token id and what is scored: equal if and only if the very same predictions are asked for."""
        digest = hashlib.sha256()
        for window in self.windows:
            digest.update(f"{len(window.tokens)} {window.scored} ".encode() + window.tokens.astype("<i8").tobytes())
        return digest.hexdigest()


def read_text(path: str | Path, field: str | None = None) -> Text:
    """A file of plain text, or of rows of JSON (.jsonl, .json) of which `field` holds the text, joined by blank lines.

    Raises RecordError for a file that is missing, not UTF-8, packed, or whose row lacks the field; LaserError for an
    empty one; UsageError where `field` is missing or makes no sense.
    """
    path = Path(path)
    found = read_content(path, "text", "try --text with a .txt, .jsonl or .json file")
    content = found.text
    if holds_rows(path):
        if field is None:
            raise UsageError(f"{path.name} holds rows of JSON: say which field is the text; try --field text")
        content = "\n\n".join(row.text(field) for row in rows_of(path, content))
    elif field is not None:
        raise UsageError(f"--field {field} is for .jsonl and .json files, found {path.name}; leave it out")
    return _checked(Text(path.name, content, found.sha256, found.notes))


def default_text() -> Text:
    """The text that every CPython carries: pydoc's topics, sorted by name, joined by blank lines. For offline use.

    It differs between Python versions; the record's sha256 says which one it was.
    """
    from pydoc_data.topics import topics

    return Text("pydoc topics", "\n\n".join(topics[name] for name in sorted(topics)))


def dataset_text(name: str, config: str | None = None, split: str = "test", field: str = "text") -> Text:
    """A split of a Hub dataset through the `datasets` library, rows joined by blank lines.

    Raises UsageError where the library is not installed or the dataset cannot be loaded, RecordError naming a row
    without a text.
    """
    if importlib.util.find_spec("datasets") is None:
        raise UsageError("--dataset needs the library `datasets`; try `pip install datasets`, or --text FILE")
    from datasets import load_dataset  # pyright: ignore[reportMissingImports]

    try:
        rows: Any = load_dataset(name, config, split=split, trust_remote_code=False)
        found = list(rows.column_names)
    except Exception as error:  # the library raises its own, huggingface_hub's, pyarrow's and the network's errors
        if is_out_of_memory(error):
            raise
        raise UsageError(
            f"dataset {name!r} ({config}, {split}) cannot be loaded: {first_line(error)}; try --text FILE"
        ) from error
    if field not in found:
        raise UsageError(f"dataset {name!r} has no field {field!r}, found {', '.join(found)}; try --field")
    label = " ".join(part for part in (name, config, split) if part)
    texts = [TextRow(f"{label}, row {n}", {field: value}).text(field) for n, value in enumerate(rows[field], 1)]
    return _checked(Text(label, "\n\n".join(texts)))


def _checked(text: Text) -> Text:
    if not text.content.strip():
        raise LaserError(f"{text.name} is empty: there is nothing to score; try another --text")
    require_characters(text.content, text.name)
    return text


def load_tokenizer(model: str | Path) -> Any:
    """The tokenizer in a checkpoint directory. Raises LaserError where there is none, CheckpointError for a
    config.json that is of no model; never runs the model's code."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    require_hub_format(Path(model))
    try:
        str(model).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{model}: no tokenizer can be read from a path that is no UTF-8; rename it") from error
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would repeat on the terminal what config.json says
    try:
        return AutoTokenizer.from_pretrained(str(model), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and the Rust library's own type
        if is_out_of_memory(error):
            raise
        if (Path(model) / "config.json").exists():  # which it reads, too, to know which tokenizer there is
            load_config(Path(model), Path(model).name)
        raise LaserError(
            f"{Path(model).name} has no usable tokenizer ({type(error).__name__}: {first_line(error)}); "
            "copy tokenizer.json and tokenizer_config.json of the source beside the weights"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def check_cut(length: int, limit: int | None = None, skip: int = 0, mode: str = "windows") -> None:
    """What can be refused of `cut_windows` without a tokenizer. Raises UsageError."""
    if mode not in MODES or length < 2 or skip < 0 or (limit is not None and limit < 1):
        raise UsageError(
            f"mode {mode!r}, window {length}, skip {skip}, limit {limit}: expected {' or '.join(MODES)}, a window of "
            "2 or more tokens, skip of 0 or more and a limit of 1 or more; try --window 512"
        )


def cut_windows(
    text: Text,
    tokenizer: Any,
    *,
    length: int = WINDOW,
    limit: int | None = None,
    skip: int = 0,
    bos: bool | None = None,
    mode: str = "windows",
) -> Windows:
    """Tokenise `text` and cut it as the module's docstring says; at most `limit` windows, after the first `skip` ones.

    `bos` None means: where the tokenizer has one. Raises UsageError for a length under 2, an unknown mode, a BOS that
    does not exist, or a `skip` past the end; LaserError for a text of fewer than 2 tokens (BOS included).
    """
    check_cut(length, limit, skip, mode)
    if bos and tokenizer.bos_token_id is None:
        raise UsageError("this tokenizer has no BOS token; try without bos=True")
    ids, sizes = _tokenise(_checked(text), tokenizer)
    prefix = tokenizer.bos_token_id if bos is not False else None
    if mode == "rolling":
        if prefix is None and bos is not False:
            prefix = tokenizer.eos_token_id
            if prefix is None:
                raise UsageError("a rolling score needs BOS or EOS and this tokenizer has neither; try --no-bos")
        spans = _rolling(len(ids), length, prefix is not None)
    else:
        spans = _disjoint(len(ids), length, prefix is not None)
    if not spans:
        raise LaserError(
            f"{text.name} is only {len(ids)} token(s) long and at least 2 are needed, BOS included, to predict one; "
            "try a longer text"
        )
    chosen = spans[skip : None if limit is None else skip + limit]
    if not chosen:
        raise UsageError(
            f"{text.name} has {len(spans)} windows of {length} tokens; nothing is left after {skip}; try fewer "
            "windows, shorter ones, or a longer text"
        )
    windows, scored_bytes = [], 0
    for start, end, scored in chosen:
        tokens = ids[max(start, 0) : end]
        if prefix is not None and (start < 0 or mode == "windows"):  # rolling: -1 stands for the prefix, once
            tokens = np.concatenate([np.array([prefix], dtype=np.int64), tokens])
        windows.append(Window(tokens, scored))
        scored_bytes += int(sizes[end - scored : end].sum()) if sizes is not None else 0
    has_bos = prefix is not None and prefix == tokenizer.bos_token_id
    counted = scored_bytes if sizes is not None else None
    return Windows(tuple(windows), text.name, text.sha256, length, mode, has_bos, counted, limit)


def text_named(text: Text | str | Path) -> Text:
    """The text, read where only its file is given."""
    return text if isinstance(text, Text) else read_text(text)


def windows_named(
    text: Windows | Text | str | Path, model: str | Path, length: int = WINDOW, limit: int | None = None
) -> Windows:
    """The windows that were cut already, or those of a text or of its file, by the tokenizer of `model`."""
    if isinstance(text, Windows):
        return text
    return cut_windows(text_named(text), load_tokenizer(model), length=length, limit=limit)


def _disjoint(total: int, length: int, prefixed: bool) -> list[tuple[int, int, int]]:
    """(start, end, scored) in the text's tokens; a prefix takes one place of each window and lets all be scored."""
    body = length - 1 if prefixed else length
    spans = [(start, min(start + body, total)) for start in range(0, total, body)]
    found = [(start, end, end - start if prefixed else end - start - 1) for start, end in spans]
    return [span for span in found if span[2] > 0]


def _rolling(total: int, length: int, prefixed: bool) -> list[tuple[int, int, int]]:
    """lm-eval 0.4's get_rolling_token_windows(context_len=1) made disjoint; start -1 is the prefix token. Without one
    the first token of the text takes its place.

    The model sees `length` tokens, so a whole window is length + 1 long: one of context and `length` scored ones. The
    last window reaches back to the left for as much context as fits.
    """
    first = -1 if prefixed else 0
    spans, done = [], first + 1
    while done < total:
        end = min(done + length, total)
        start = max(end - length - 1, first)
        spans.append((start, end, end - done))
        done = end
    return spans


def _tokenise(text: Text, tokenizer: Any) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """Token ids (n,) without special tokens, and how many UTF-8 bytes of the text each one adds (n,), where the
    tokenizer tells positions. A character split over two tokens is counted with the last."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    # verbose=False: the text is meant to be longer than the model's maximum, it is cut below.
    coded = tokenizer(text.content, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    ids = np.asarray(coded["input_ids"], dtype=np.int64)
    if not fast or not len(ids):
        return ids, None
    ends = np.maximum.accumulate(np.asarray([end for _, end in coded["offset_mapping"]], dtype=np.int64))
    widths = [len(c.encode("utf-8", "surrogatepass")) for c in text.content]
    position = np.concatenate([[0], np.cumsum(widths)])[ends]
    return ids, np.diff(position, prepend=0)
