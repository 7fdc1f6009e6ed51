"""Texts and windows: what is scored, and clear errors for what cannot be."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pico_language import TEXT, write_tokenizer

import laser
from laser.errors import CheckpointError, LaserError, RecordError, UsageError
from laser.evaluation.causal import build_causal
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


@pytest.mark.parametrize("length", [2, 7, 50, 119, 120, 500])
@pytest.mark.parametrize("mode", ["windows", "rolling"])
def test_without_bos_no_window_holds_one(mode: str, length: int, tokenizer) -> None:
    windows = cut_windows(Text("t", TEXT[:120]), tokenizer, length=length, mode=mode, bos=False)
    ids = tokenizer(TEXT[:120], add_special_tokens=False)["input_ids"]
    assert not windows.bos and not any(1 in w.tokens for w in windows.windows)
    if mode == "rolling":  # the first token is only context, every later one is scored once
        assert np.concatenate([w.tokens[-w.scored :] for w in windows.windows]).tolist() == ids[1:]
        assert windows.tokens == windows.bytes == 119
        assert all(len(w.tokens) <= length + 1 for w in windows.windows)
        first, last = windows.windows[0], windows.windows[-1]
        assert first.tokens.tolist() == ids[: length + 1] and len(last.tokens) == min(length + 1, 120)


def test_rolling_without_bos_is_that_of_a_text_behind_its_first_token(tokenizer) -> None:
    """As lm-eval's windows with the first token as prefix: the same spans, one to the right."""
    whole = cut_windows(Text("t", TEXT[1:]), tokenizer, length=30, mode="rolling")
    plain = cut_windows(Text("t", TEXT), tokenizer, length=30, mode="rolling", bos=False)
    assert [w.scored for w in whole.windows] == [w.scored for w in plain.windows]
    assert all((a.tokens[1:] == b.tokens[1:]).all() for a, b in zip(whole.windows, plain.windows, strict=True))
    assert whole.windows[0].tokens[0] == 1 and plain.windows[0].tokens[0] != 1


def test_rolling_takes_eos_where_there_is_no_bos(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer", bos=False))
    windows = cut_windows(Text("t", TEXT), tokenizer, mode="rolling")
    assert windows.windows[0].tokens[0] == tokenizer.eos_token_id and not windows.bos
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="has neither; try --no-bos"):
        cut_windows(Text("t", TEXT), tokenizer, mode="rolling")
    assert cut_windows(Text("t", TEXT), tokenizer, mode="rolling", bos=False).tokens == len(TEXT) - 1


def test_how_many_windows_were_asked_for_is_kept(tokenizer) -> None:
    for limit in (None, 1, 4, 400):
        windows = cut_windows(Text("t", TEXT), tokenizer, length=50, limit=limit)
        assert windows.asked == limit and len(windows.windows) == min(limit or 18, 18)


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


ROWS = [{"text": "one\u2028line", "n": 1}, {"text": "two \U0001f600", "n": None}]


@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".JsonL", ".ndjson", ".jsonlines", ".json", ".JSON", ".Json"])
@pytest.mark.parametrize("ascii", [True, False])
def test_rows_are_read_by_their_suffix_in_any_case(suffix: str, ascii: bool, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    told = [json.dumps(row, ensure_ascii=ascii) for row in ROWS]
    written = f"[{', '.join(told)}]" if suffix.lower() == ".json" else "\n\n".join(told) + "\n\n"
    path.write_text(written)
    text = read_text(path, "text")
    assert text.content == "one\u2028line\n\ntwo \U0001f600"
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(UsageError, match="try --field text"):
        read_text(path)
    with pytest.raises(RecordError, match=r"(line|row) 1: expected a text in field 'body', found text, n"):
        read_text(path, "body")
    with pytest.raises(RecordError, match=r"(line|row) 1: expected a text in field 'n', found a number"):
        read_text(path, "n")


def test_one_object_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"text": "a b"}, indent=1))
    assert read_text(path, "text").content == "a b"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": null}\n', "line 3: expected a text in field 'text', found null"),
        ("a.jsonl", '{"text": ["a"]}', "found list; fill or remove the row"),
        ("a.jsonl", '{"text": true}', "found true or false"),
        ("a.jsonl", '"text"', "line 1: found a text, expected an object"),
        ("a.jsonl", '{"text": "\\ud800 lone"}', r"line 1 holds \\ud800 alone, half a character, at place 0"),
        ("a.jsonl", '{"text": "a", "b": {"c": ["\\udc00"]}}', r"line 1 holds \\udc00 alone"),
        ("a.jsonl", '{"text": ' + "[" * 50_000, "line 1 is nested too deep"),
        ("a.json", "[" * 50_000, "a.json is nested too deep"),
        ("a.json", '{"text": "a"}\n{"text": "b"}', "if it holds one row a line, call it .jsonl"),
        ("a.json", '["a", "b"]', "row 1: found a text, expected an object"),
        ("a.json", "3", "row 1: found a number, expected an object"),
        ("a.json", '[{"text": "a"}, {"text": null}]', "row 2: expected a text in field 'text', found null"),
        ("a.jsonl", '{"text": "a"}\0', "not plain text: byte 13 is NUL"),
        ("a.jsonl", '{"text": "a\\u0000"}', r"line 1 holds \\u0000, NUL, at place 1"),
        ("a.jsonl", '{"text": "a"}\n{"text": "a", "text": "b"}', "line 2 is not JSON .the key 'text' is twice"),
    ],
)
def test_rows_that_cannot_be_read(file: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(RecordError, match=message):
        read_text(tmp_path / file, "text")


def test_a_pair_of_surrogates_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}')
    assert read_text(tmp_path / "a.jsonl", "text").content == "\U0001f600"


@pytest.mark.parametrize("file", ["a.jsonl", "a.json"])
def test_no_rows_are_an_empty_text(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("[]" if file == "a.json" else "\n \n")
    with pytest.raises(LaserError, match=f"{file} is empty"):
        read_text(tmp_path / file, "text")


@pytest.mark.parametrize("file", ["a.txt", "a.md", "a", "a.TXT", "a.jsonl.txt", "json"])
def test_any_other_suffix_is_plain_text(file: str, tmp_path: Path) -> None:
    content = '{"text": "a"}\n'
    (tmp_path / file).write_text(content)
    text = read_text(tmp_path / file)
    assert text.content == content and text.notes == ()
    assert text.sha256 == hashlib.sha256(content.encode()).hexdigest()


def test_marks_and_line_ends_are_read_as_nothing_and_lf_and_said(tmp_path: Path) -> None:
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    text = read_text(path)
    assert text.content == "one\ntwo\nthree\n" and text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(text.notes) == 2 and "byte-order mark" in text.notes[0] and "LF" in text.notes[1]
    rows = tmp_path / "windows.jsonl"
    rows.write_bytes(b'\xef\xbb\xbf{"text": "a\\r\\n"}\r\n{"text": "b"}\r\n')
    assert read_text(rows, "text").content == "a\r\n\n\nb"  # what is said inside a row stands


@pytest.mark.parametrize("file", ["a.txt.gz", "a.jsonl.GZ", "a.zip", "a.tar", "a.xz", "a.zst", "a.bz2"])
def test_a_packed_file_is_no_text(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(gzip.compress(b"text"))
    with pytest.raises(RecordError, match=r"is packed, by its suffix \.\w+; unpack it"):
        read_text(tmp_path / file)


def test_unreadable_texts(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no such text"):
        read_text(tmp_path / "absent.txt")
    with pytest.raises(RecordError, match="cannot read the text"):
        read_text(tmp_path)
    for content, message in (
        (b"caf\xe9", "as UTF-8 text"),
        ("text".encode("utf-16"), "begins as UTF-16 does; convert it with iconv -f UTF-16 -t UTF-8"),
        ("text".encode("utf-32"), "begins as UTF-32 does; convert it with iconv -f UTF-32 -t UTF-8"),
        ("text".encode("utf-16-be"), "byte 0 is NUL"),
        (gzip.compress(b"text"), "as UTF-8 text"),
        (b"text\0", "byte 4 is NUL"),
    ):
        (tmp_path / "odd.txt").write_bytes(content)
        with pytest.raises(RecordError, match=message):
            read_text(tmp_path / "odd.txt")
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    with pytest.raises(RecordError, match="is a table, by its suffix"):
        read_text(tmp_path / "table.parquet")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UsageError, match=r"--field x is for \.jsonl"):
        read_text(tmp_path / "a.txt", "x")


def test_half_a_character_from_elsewhere_is_refused(tokenizer) -> None:
    with pytest.raises(RecordError, match=r"t holds \\ud800 alone"):
        cut_windows(Text("t", "a \ud800"), tokenizer)


@pytest.mark.slow
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
    (tmp_path / "test.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    with pytest.raises(RecordError, match="row 2: expected a text in field 'text', found null"):
        dataset_text(str(tmp_path))


@pytest.mark.parametrize("wrong", [{"num_attention_heads": "four"}, {"hidden_size": None}, {"vocab_size": [1]}])
def test_a_config_that_stops_the_tokenizer_is_named(speaker: Path, wrong: dict[str, Any]) -> None:
    config = json.loads((speaker / "config.json").read_text())
    (speaker / "tokenizer_config.json").unlink()  # then transformers asks the config which tokenizer there is
    (speaker / "config.json").write_text(json.dumps(config | wrong))
    with pytest.raises(CheckpointError, match=r"^speaker/config.json: transformers cannot build it"):
        load_tokenizer(speaker)


def test_architectures_that_are_no_list_are_refused(speaker: Path) -> None:
    config = json.loads((speaker / "config.json").read_text())
    (speaker / "config.json").write_text(json.dumps(config | {"architectures": 3}))
    with pytest.raises(CheckpointError, match="architectures is 3, expected a list of names"):
        build_causal(laser.open_checkpoint(speaker))


def test_a_missing_tokenizer_is_named(pico: Path) -> None:
    with pytest.raises(LaserError, match=r"pico has no usable tokenizer"):
        load_tokenizer(pico)
