"""The verbs eval and search through the command line: exit codes, tables, JSON, and files that are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pico_language import TEXT, make_model, write_tokenizer

from laser.cli import main
from laser.evaluation.perplexity import Perplexity
from laser.plan import Plan


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "other.txt").write_text(TEXT[::-1])
    return str(make_model(tmp_path / "m", "mixtral"))


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def test_eval_of_one_and_of_two(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ["--text", tmp_path / "text.txt", "--window", 32]
    assert run("eval", model, *text, "-o", tmp_path / "eval.json") == 0
    told = capsys.readouterr().out
    record = Perplexity.load(tmp_path / "eval.json")
    assert f"{record.nll:.5f}" in told and f"windows of {record.window} tokens with BOS" in told
    assert record.tokens == len(TEXT)
    assert run("eval", model, *text, "-o", tmp_path / "eval.json") == 1
    assert "exists; try another -o, or --force" in capsys.readouterr().err
    # the record stands for its model
    assert run("eval", tmp_path / "eval.json", model, *text, "--stream", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert abs(document["difference"]["nll"]) < 1e-6 and len(document["evaluations"]) == 2
    assert run("eval", tmp_path / "eval.json", model, *text) == 0
    assert "no difference beyond one standard error" in capsys.readouterr().out
    assert run("eval", tmp_path / "eval.json", model, "--text", tmp_path / "other.txt") == 2
    assert "not measured on the same tokens" in capsys.readouterr().err


def test_eval_says_what_is_wrong(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("")
    text = ["--text", tmp_path / "text.txt"]
    for arguments, code, message in (
        (["--text", tmp_path / "empty.txt"], 1, "empty.txt is empty"),
        (["--text", tmp_path / "none.txt"], 1, "no such text"),
        ([*text, "--dataset", "x"], 2, "both --text and --dataset"),
        ([*text, "--dtype", "float8"], 2, "--dtype float32|bfloat16"),
        ([*text, "--mode", "sliding"], 2, "expected windows or rolling"),
        ([*text, model, "-o", tmp_path / "e.json"], 2, "one record is written per model"),
    ):
        assert run("eval", model, *arguments) == code
        assert message in capsys.readouterr().err
    write_tokenizer(Path(model), extra=2)
    (tmp_path / "text.txt").write_text("no!" * 40)
    assert run("eval", model, *text) == 2
    assert "embeds only 64" in capsys.readouterr().err


def test_search_writes_a_plan_and_goes_on_from_its_journal(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.json"
    options = ["--text", tmp_path / "text.txt", "--window", 24, "--windows", 4, "--held-out-windows", 4]
    options += ["--rules", "fraction:0.8,fraction:0.4", "--roles", "o", "--accept", "any-drop"]
    assert run("search", model, "-o", plan, *options) == 0
    told = capsys.readouterr().out
    assert "calibration: loss on text.txt, 4 units" in told and "held out: loss on text.txt, 4 units" in told
    kept = Plan.load(plan).reductions
    assert told.count(" kept ") == len(kept)
    journal = (tmp_path / "search.jsonl").read_text()
    plan.unlink()
    assert run("search", model, "-o", plan, *options, "--stream", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert Plan.load(plan).reductions == kept and len(document["trials"]) == 6
    assert (tmp_path / "search.jsonl").read_text() == journal  # nothing was measured again
    assert run("search", model, "-o", plan, *options) == 1
    plan.unlink()
    assert run("search", model, "-o", plan, *options, "--order", "snr") == 1
    assert "belongs to another run: order differ" in capsys.readouterr().err
    assert run("search", model, "-o", plan, *options, "--order", "snr", "--force") == 0


def test_search_with_a_grid_a_task_and_a_shortlist(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ["--text", tmp_path / "text.txt", "--window", 24, "--windows", 4, "--held-out-windows", 3]
    words = TEXT.split()
    rows = [
        {"question": a, "answer": b, "alternatives": [c]} for a, b, c in zip(words, words[1:], words[2:], strict=False)
    ]
    (tmp_path / "task.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    grid = ["--grid", "fraction:0.9,0.2", "--layers", "2", "--roles", "q,w2", "--held-out", tmp_path / "other.txt"]
    task = ["--objective", "accuracy", "--task", tmp_path / "task.jsonl"]
    assert run("search", model, "-o", tmp_path / "a" / "plan.json", *text, *grid, *task) == 1  # no such directory
    (tmp_path / "a").mkdir()
    assert run("search", model, "-o", tmp_path / "a" / "plan.json", *text, *grid, *task) == 0
    told = capsys.readouterr().out
    assert "layer 2 w2  fraction:0.2" in told and "calibration: accuracy on task.jsonl, 4 units" in told
    assert "held out: accuracy on task.jsonl, 3 units" in told and "held out: loss on other.txt" in told
    (tmp_path / "b").mkdir()
    short = ["--shortlist", "gradient:4", "--roles", "k,v,o", "--rules", "fraction:0.9"]
    assert run("search", model, "-o", tmp_path / "b" / "plan.json", *text, *short) == 0
    told = capsys.readouterr().out
    assert "Spearman" in told and told.count("fraction:0.9") == 4


def test_search_says_what_is_wrong(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ["--text", tmp_path / "text.txt", "--window", 24, "--windows", 4]
    for arguments, message in (
        (["--grid", "fraction"], "--grid fraction:0.9"),
        (["--shortlist", "magic"], "--shortlist gradient:15"),
        (["--objective", "accuracy"], "--task FILE.jsonl"),
        (["--windows", "99"], "nothing is left after 99"),
        (["--accept", "all"], "--accept better|no-worse|any-drop"),
        (["--held-out", tmp_path / "text.txt"], "also calibration windows"),
    ):
        assert run("search", model, "-o", tmp_path / "plan.json", *text, *arguments) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "plan.json").exists()
