"""Texts and windows: what is scored, and clear errors for what cannot be."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from pico_language import TEXT, write_tokenizer

from laser.errors import LaserError, RecordError, UsageError
from laser.evaluation.text import Text, cut_windows, dataset_text, default_text, load_tokenizer, read_text


@pytest.fixture
def tokenizer(tmp_path: Path):
    return load_tokenizer(write_tokenizer(tmp_path / "tokenizer"))


def test_every_token_is_scored_once_behind_a_bos(tokenizer) -> None:
    windows = cut_windows(Text("t", TEXT), tokenizer, length=50)
    assert windows.bos and all(w.tokens[0] == 1 and w.scored == len(w.tokens) - 1 for w in windows.windows)
    assert tokenizer.decode(np.concatenate([w.tokens[1:] for w in windows.windows])).replace(" ", "") == TEXT.replace(
        " ", ""
    )
    assert windows.tokens == len(TEXT) and windows.bytes == len(TEXT)


def test_without_a_bos_the_first_token_of_a_window_is_only_context(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer", bos=False))
    windows = cut_windows(Text("t", TEXT[:101]), tokenizer, length=50)
    # 50 + 50 + 1: the last piece has nothing to predict and is dropped
    assert [(len(w.tokens), w.scored) for w in windows.windows] == [(50, 49), (50, 49)]
    assert not windows.bos and windows.tokens == 98 and windows.bytes == 98
    with pytest.raises(UsageError, match="no BOS token"):
        cut_windows(Text("t", TEXT), tokenizer, bos=True)


def test_rolling_windows_score_each_token_once_with_context_to_the_left(tokenizer) -> None:
    windows = cut_windows(Text("t", TEXT[:120]), tokenizer, length=50, mode="rolling")
    ids = tokenizer(TEXT[:120], add_special_tokens=False)["input_ids"]
    assert [w.scored for w in windows.windows] == [50, 50, 20]
    assert np.concatenate([w.tokens[-w.scored :] for w in windows.windows]).tolist() == ids
    assert windows.windows[0].tokens[0] == 1 and len(windows.windows[0].tokens) == 51
    assert windows.windows[1].tokens.tolist() == ids[49:100]
    assert windows.windows[2].tokens.tolist() == ids[69:120]  # filled up with context


def test_bytes_count_utf8(tokenizer) -> None:
    text = Text("t", "a é 汉 😀 z")
    assert cut_windows(text, tokenizer, length=4).bytes == len(text.content.encode())


def test_limit_and_skip_take_windows_that_do_not_overlap(tokenizer) -> None:
    text = Text("t", TEXT)
    first = cut_windows(text, tokenizer, length=50, limit=3)
    rest = cut_windows(text, tokenizer, length=50, skip=3)
    whole = cut_windows(text, tokenizer, length=50)
    assert first.tokens + rest.tokens == whole.tokens
    assert len({first.sha256, rest.sha256, whole.sha256}) == 3
    with pytest.raises(UsageError, match=r"18 windows of 50 tokens; nothing is left after 99"):
        cut_windows(text, tokenizer, length=50, skip=99)


def test_short_and_empty_texts(tokenizer, tmp_path: Path) -> None:
    assert [len(w.tokens) for w in cut_windows(Text("t", "abc"), tokenizer, length=512).windows] == [4]
    with pytest.raises(LaserError, match=r"only 1 token.*at least 2"):
        cut_windows(Text("t", "a"), tokenizer, bos=False)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(LaserError, match=r"empty\.txt is empty"):
        read_text(tmp_path / "empty.txt")
    with pytest.raises(UsageError, match="expected windows or rolling"):
        cut_windows(Text("t", TEXT), tokenizer, length=1)


def test_jsonl_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in ("one\u2028line", "two")) + "\n\n")
    assert read_text(path, "text").content == "one\u2028line\n\ntwo"
    with pytest.raises(UsageError, match="try --field text"):
        read_text(path)
    with pytest.raises(RecordError, match=r"line 1: expected a text in field 'body', found text"):
        read_text(path, "body")
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(RecordError, match="line 2 is not JSON"):
        read_text(path, "text")


def test_unreadable_texts(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no such text"):
        read_text(tmp_path / "absent.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(RecordError, match="as UTF-8 text"):
        read_text(tmp_path / "latin.txt")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UsageError, match=r"--field x is for \.jsonl"):
        read_text(tmp_path / "a.txt", "x")


def test_the_default_text_is_there_and_a_dataset_fails_clearly_offline() -> None:
    assert len(default_text().content) > 100_000
    with pytest.raises(UsageError, match=r"try .*--text FILE"):
        dataset_text("nobody/no-such-dataset")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs pip install datasets")
def test_a_dataset_is_read_by_the_library(tmp_path: Path) -> None:
    rows = [{"text": "one\n"}, {"text": "two"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = dataset_text(str(tmp_path))
    assert text.content == "one\n\n\ntwo"
    with pytest.raises(UsageError, match=r"no field 'body', found text"):
        dataset_text(str(tmp_path), field="body")


def test_a_missing_tokenizer_is_named(pico: Path) -> None:
    with pytest.raises(LaserError, match=r"pico has no usable tokenizer"):
        load_tokenizer(pico)
