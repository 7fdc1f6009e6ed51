"""Very many matrices: every verb is linear in their number, counted in lines of laser and not in seconds."""

from __future__ import annotations

import json
import random
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from conftest import Run, mixtral_config, write_checkpoint_directory
from mistral_release import write_release
from pico_language import TEXT, VOCABULARY, write_tokenizer

import laser
from laser.cli import common, look
from laser.journal import Journal
from laser.plan import Plan
from laser.reasons import Kind, Why
from laser.records import sha256_of_json, to_json

FEW, MANY = 60, 300  # experts, of three matrices each
ROOM = str(Path(laser.__file__).parent)


def model_of(path: Path, experts: int) -> Path:
    """A Mixtral of one layer, in two shards, whose matrices are 8 x 8, with the tokenizer of the pico models."""
    torch.manual_seed(0)
    base, layer = torch.bfloat16, "model.layers.0"
    names = [f"{layer}.self_attn.{x}_proj.weight" for x in "qkvo"]
    names += [f"{layer}.block_sparse_moe.experts.{e}.{x}.weight" for e in range(experts) for x in ("w1", "w2", "w3")]
    tensors = {name: torch.randn(8, 8, dtype=base) for name in names}
    tensors |= {f"{x}.weight": torch.randn(VOCABULARY, 8, dtype=base) for x in ("model.embed_tokens", "lm_head")}
    tensors[f"{layer}.block_sparse_moe.gate.weight"] = torch.randn(experts, 8, dtype=base)
    norms = ("model.norm", f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm")
    tensors |= {f"{norm}.weight": torch.ones(8, dtype=base) for norm in norms}
    config = mixtral_config() | {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config |= {"num_local_experts": experts, "num_attention_heads": 2, "num_key_value_heads": 2}
    return write_tokenizer(write_checkpoint_directory(path, tensors, config, shards=2))


@contextmanager
def counted_lines() -> Iterator[list[int]]:
    """How many lines of laser are run inside, in all threads."""
    count = [0]

    def trace(frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.startswith(ROOM):
            return None
        count[0] += event == "line"
        return trace

    before = sys.gettrace()
    threading.settrace(trace)
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)
        threading.settrace(before)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_every_verb_is_linear_in_the_number_of_matrices(run: Run, tmp_path: Path) -> None:
    """Five times the matrices, at most about five times the lines: what walked all of them for each made it 25."""
    windows = ("--window", "32", "--windows", "4")
    verbs: dict[str, tuple[str, ...]] = {
        "scan": ("scan", "model", "-o", "spectra"),
        "plan": ("plan", "spectra", "--rule", "fraction:0.4", "-o", "plan"),
        "spectra": ("spectra", "spectra"),
        "report": ("report", "spectra", "-o", "report"),
        "reduce": ("reduce", "model", "plan", "-o", "out"),
        "verify": ("verify", "model", "out"),
        "card": ("card", "out", "--source", "model", "--force"),
        "run": ("run", "model", "-o", "ran", "--rule", "fraction:0.4", "--no-search"),
        "convert": ("convert", "release", "-o", "converted"),
        "calibrate": ("calibrate", "model", "-o", "moments", "--text", "text", "--ledoit-wolf", *windows),
        "scan, by the data": ("scan", "model", "-o", "bydata", "--moments", "moments"),
        "eval": ("eval", "model", "--text", "text", *windows, "--stream"),
        "delta": ("delta", "model", "out", "-o", "differences"),
        "unmerge": ("unmerge", "model", "out", "-o", "adapter", "--rounds", "1"),
        "rebuild": ("rebuild", "model", "adapter", "-o", "rebuilt"),
    }
    lines: dict[str, list[int]] = {verb: [] for verb in verbs}
    for experts in (3, FEW, MANY):  # the first fills the caches of laws
        folder = tmp_path / str(experts)
        write_release(model_of(folder / "model", experts), folder / "release")
        (folder / "text").write_text(TEXT)
        for verb, words in verbs.items():
            with counted_lines() as count:
                code, _, err = run(
                    *(
                        folder / word if word.isalpha() and i and words[i - 1] != "--rule" else word
                        for i, word in enumerate(words)
                    )
                )
            assert code == 0, err
            lines[verb].append(count[0])
    for verb, (fewest, few, many) in lines.items():
        assert many - fewest < 1.15 * (MANY - 3) / (FEW - 3) * (few - fewest), (verb, lines)


@pytest.mark.slow
def test_a_journal_keeps_places_and_no_entries(tmp_path: Path) -> None:
    """At p = 2048 a scan's entry is 22 kB, and 45,000 of them were held."""
    entry = {"values": "x" * 100_000}
    with Journal(tmp_path / "journal", {"kind": "x"}) as journal:
        tracemalloc.start()
        for number in range(50):
            journal.append({"number": number} | entry)
        assert tracemalloc.get_traced_memory()[1] < 10 * 100_000
        assert journal.entries[7] == {"number": 7} | entry and journal.entries[-1]["number"] == 49
        tracemalloc.stop()
    tracemalloc.start()
    with Journal(tmp_path / "journal", {"kind": "x"}) as journal:
        assert [found["number"] for found in journal.entries] == list(range(50))
        assert tracemalloc.get_traced_memory()[1] < 20 * 100_000
        tracemalloc.stop()
        journal.forget(journal.entries[30])
        assert len(journal.entries) == 30
        journal.append({"number": 99})
    with Journal(tmp_path / "journal", {"kind": "x"}) as journal:
        assert [found["number"] for found in journal.entries] == [*range(30), 99]


def test_a_journal_that_was_cut_meanwhile_says_so(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal", {"kind": "x"}) as journal:
        journal.append({"number": 1})
        (tmp_path / "journal").write_bytes(b"")
        with pytest.raises(laser.OutputError, match=r"journal became shorter .*; run the same command again"):
            journal.entries[0]


def some_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(9 if depth < 6 else 6)
    if kind < 6:
        return (rng.choice(['a\n"b', "é\u2028", "\ud800", ""]), rng.random() * 10 ** rng.randrange(-20, 20), -(10**20),
                rng.choice([True, False, None]), {}, [])[kind]  # fmt: skip
    if kind == 8:
        keys = [rng.choice([f"k{i}", i, f"é{i}"]) for i in range(rng.randrange(5))]
        return {key: some_value(rng, depth + 1) for key in keys}
    found = [some_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return tuple(found) if kind == 7 else found


def test_json_in_pieces_is_what_python_writes() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        value = some_value(rng)
        assert to_json(value) == (json.dumps(value, indent=1) + "\n").encode()
    for value in (float("nan"), [1, float("inf")], {"a": {"b": [float("nan")]}}):
        with pytest.raises(ValueError):
            to_json(value)
    with pytest.raises(TypeError):
        to_json({"a": [object()]})


@pytest.mark.slow
def test_a_plan_is_saved_in_less_memory_than_its_text(pico: Path, tmp_path: Path) -> None:
    """45,000 lines are 31 MB of text, which stood in memory five times."""
    plan = laser.make_plan(laser.scan(laser.open_checkpoint(pico), laser.Selection(roles=("q",))), "fraction:0.5")
    line = replace(plan.lines[0], why=Why(Kind.RULE, "x" * 200))
    plan = replace(plan, lines=tuple(replace(line, name=f"layers.{number}.q") for number in range(3000)))
    tracemalloc.start()
    plan.save(tmp_path / "plan.json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (tmp_path / "plan.json").stat().st_size / 2
    assert (tmp_path / "plan.json").read_bytes() == plan.to_json() == to_json(plan.document())
    assert plan.sha256 == sha256_of_json(plan.document()) and Plan.load(tmp_path / "plan.json").lines == plan.lines


def test_lists_for_people_end(
    run: Run, pico: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common.say_first([f"problem {number}" for number in range(45_000)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 41 and lines[-2:] == ["problem 39", "... and 44960 more; --json lists all"]
    common.say_first(["one", "two"])
    assert capsys.readouterr().out == "one\ntwo\n"
    assert run("scan", pico, "-o", tmp_path / "s", "--layers", 0)[0] == 0
    # Or the table would need 200 matrices.
    monkeypatch.setattr(look, "MOST_ROWS", 5)
    lines = run("spectra", tmp_path / "s")[1].splitlines()
    assert len(lines) == 8 and lines[6] == "... and 11 more; --csv and --json list all"
    assert len(run("spectra", tmp_path / "s", "--csv")[1].splitlines()) == 17
