"""The verbs eval and search through the command line: exit codes, tables, JSON, and files that are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pico_language import TEXT, make_model, write_tokenizer

from laser.cli import main
from laser.evaluation.perplexity import Perplexity
from laser.plan import Plan
from laser.records import sealed


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "other.txt").write_text(TEXT[::-1])
    return str(make_model(tmp_path / "m", "mixtral"))


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


@pytest.mark.slow
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


@pytest.mark.slow
def test_two_precisions_are_no_comparison(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same weights twice: whatever the numbers say, neither is better."""
    text = ["--text", tmp_path / "text.txt", "--window", 32, "--windows", 4]
    files = [tmp_path / f"{dtype}.json" for dtype in ("float32", "bfloat16")]
    for file in files:
        assert run("eval", model, *text, "--dtype", file.stem, "-o", file) == 0
    capsys.readouterr()
    for a, b in (files, files[::-1]):
        assert run("eval", a, b) == 0
        told = capsys.readouterr().out
        assert f": not like with like: dtype {a.stem} against {b.stem}\n" in told
        assert "better" not in told and "worse" not in told
    assert run("eval", files[1], model, *text, "--json") == 0
    difference = json.loads(capsys.readouterr().out)["difference"]
    assert difference["unlike"] == [{"what": "dtype", "before": "bfloat16", "after": "float32"}]
    document = json.loads(files[0].read_text())
    changed = document | {"device": "cuda:0", "versions": document["versions"] | {"torch": "0"}}
    files[1].write_text(json.dumps(changed))
    assert run("eval", *files) == 1 and "was changed or damaged since it was written" in capsys.readouterr().err
    files[1].write_text(json.dumps(sealed(changed)))
    assert run("eval", *files) == 0
    told = capsys.readouterr().out
    assert f"not like with like: device cpu against cuda, torch {document['versions']['torch']} against 0" in told
    for change in ({"versions": []}, {"versions": {"torch": 1}}, {"dtype": None}, {"device": 3}):
        files[1].write_text(json.dumps(document | change))
        assert run("eval", *files) == 1
        assert "is not a whole eval file" in capsys.readouterr().err


@pytest.mark.slow
def test_a_text_shorter_than_asked_for_is_said(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text(TEXT[:80])
    text = ["--text", tmp_path / "short.txt", "--window", 24]
    assert run("eval", model, *text, "-o", tmp_path / "e.json") == 0
    assert "only 4 of the 32 windows that were asked for: short.txt has no more" in capsys.readouterr().out
    record = Perplexity.load(tmp_path / "e.json")
    assert (record.windows, record.asked) == (4, 32)
    for count in (0, 4, 3):
        assert run("eval", model, *text, "--windows", count, "--json") == 0
        found = json.loads(capsys.readouterr().out)["evaluations"][0]
        assert (found["windows"], found["asked"]) == (count or 4, count or None)
        assert run("eval", model, *text, "--windows", count) == 0
        assert "asked for" not in capsys.readouterr().out
    options = ["--rules", "fraction:0.5", "--layers", "2", "--roles", "q", "--held-out-windows", 9]
    assert run("search", model, "-o", tmp_path / "p.json", *text, *options, "--windows", 3) == 0
    assert "only 1 of the 9 windows that were asked for: short.txt has no more" in capsys.readouterr().out
    assert (
        run("calibrate", model, *text, "-o", tmp_path / "moments", "--roles", "q", "--ledoit-wolf", "--windows", 7) == 0
    )
    assert "only 4 of the 7 windows that were asked for" in capsys.readouterr().out


@pytest.mark.slow
def test_0_windows_are_all_of_them_everywhere(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ["--text", tmp_path / "text.txt", "--window", 64]
    whole = -(-len(TEXT) // 63)
    assert run("eval", model, *text, "--windows", 0, "--json") == 0
    assert json.loads(capsys.readouterr().out)["evaluations"][0]["windows"] == whole
    few = ["--layers", "2", "--roles", "q"]
    assert run("calibrate", model, *text, "-o", tmp_path / "moments", *few, "--windows", 0, "--json") == 0
    assert json.loads(capsys.readouterr().out)["calibration"]["windows"] == whole
    options = [*few, "--rules", "fraction:0.5", "-o", tmp_path / "plan.json", "--json", "--windows", 0]
    assert run("search", model, *text, *options) == 2
    assert "nothing of it to report on; try --held-out FILE" in capsys.readouterr().err
    assert not (tmp_path / "spectra.safetensors").exists()  # refused before the scan
    assert run("search", model, *text, *options, "--held-out", tmp_path / "other.txt", "--held-out-windows", 0) == 0
    found = json.loads(capsys.readouterr().out)
    assert [found["calibration"]["units"], found["held_out"][0]["units"]] == [whole, whole]
    rows = [{"question": a, "answer": "b"} for a in TEXT[:40].split()]
    (tmp_path / "task.json").write_text(json.dumps(rows))
    task = ["--objective", "accuracy", "--task", tmp_path / "task.json", "--force"]
    assert run("search", model, *text, *options, *task, "--held-out-windows", 5) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["calibration"]["units"] == len(rows) and [r["units"] for r in found["held_out"]] == [5]
    for count in ("--windows", "--held-out-windows"):
        assert run("search", model, *text, "-o", tmp_path / "q.json", count, -1) == 2
        assert "limit of 1 or more" in capsys.readouterr().err


@pytest.mark.slow
def test_spectra_of_an_earlier_search_hold_what_is_selected(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--text", tmp_path / "text.txt", "--window", 24, "--windows", 4, "--rules", "fraction:0.5", "--force"]
    words += ["-o", tmp_path / "p.json", "--held-out-windows", 2]
    assert run("search", model, *words, "--layers", "2", "--roles", "q,k") == 0
    assert run("search", model, *words, "--layers", "2", "--roles", "q") == 0  # fewer are in it
    told = "spectra.safetensors has no values of model.layers."
    for wider in (["--layers", "1,2", "--roles", "q"], ["--layers", "2", "--roles", "q,v"], []):
        capsys.readouterr()
        assert run("search", model, *words, *wider) == 2
        assert told in capsys.readouterr().err
    named = [*words, "--spectra", tmp_path / "spectra.safetensors"]
    assert run("search", model, *named) == 0  # these and no others were asked for
    assert run("search", model, *named, "--roles", "q,v") == 2
    assert "role v was not in the scan of these spectra" in capsys.readouterr().err
    assert (
        run("plan", tmp_path / "spectra.safetensors", "-o", tmp_path / "q.json", "--rule", "rank:2", "--layers", "1-2")
        == 2
    )
    assert "layer 1 was not in the scan" in capsys.readouterr().err
    assert run("search", model, *words, "--grid", "fraction:0.5") == 2
    assert "--grid names its own rules; leave out --rules" in capsys.readouterr().err


@pytest.mark.slow
def test_texts_as_they_come(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows in capitals, a rolling score without BOS, what was read otherwise, and rows beside a plain text."""
    rows = [{"text": TEXT[:200]}, {"text": TEXT[200:400]}]
    (tmp_path / "ROWS.JSONL").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "rows.Json").write_text(json.dumps(rows))
    records = []
    for file in ("ROWS.JSONL", "rows.Json"):
        assert run("eval", model, "--text", tmp_path / file, "--field", "text", "--window", 32, "--json") == 0
        records.append(json.loads(capsys.readouterr().out)["evaluations"][0])
        assert run("eval", model, "--text", tmp_path / file) == 2
        assert "try --field text" in capsys.readouterr().err
    assert records[0]["windows_sha256"] == records[1]["windows_sha256"]
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.replace(",", "\r\n").encode())
    assert run("eval", model, "--text", tmp_path / "dos.txt", "--mode", "rolling", "--no-bos", "--window", 64) == 0
    told = capsys.readouterr()
    assert "rolling of 64 tokens without BOS" in told.out
    assert told.err.count("laser: ") == 2 and "byte-order mark" in told.err and "read as LF" in told.err
    assert run("eval", model, "--field", "text") == 2
    assert "--field text is for files of rows" in capsys.readouterr().err
    options = ["--rules", "fraction:0.5", "--layers", "2", "--roles", "q", "--window", 24, "--field", "text", "--json"]
    (tmp_path / "ROWS.JSONL").write_text(json.dumps({"text": TEXT[::-1]}))
    for text, held_out in (("text.txt", "ROWS.JSONL"), ("rows.Json", "other.txt"), ("rows.Json", "ROWS.JSONL")):
        files = ["--text", tmp_path / text, "--held-out", tmp_path / held_out, "--windows", 4]
        assert run("search", model, "-o", tmp_path / "plan.json", *options, *files, "--force") == 0
        assert json.loads(capsys.readouterr().out)["held_out"][0]["text"] == held_out
    files = ["--text", tmp_path / "text.txt", "--held-out", tmp_path / "other.txt"]
    assert run("search", model, "-o", tmp_path / "plan.json", *options, *files, "--force") == 2
    assert "--field text is for .jsonl" in capsys.readouterr().err


@pytest.mark.slow
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
    # Another text to report on changes no trial.
    other = ["--held-out", tmp_path / "other.txt", "--json"]
    assert run("search", model, "-o", plan, *options, *other) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["trials"] == document["trials"] and again["held_out"][0]["text"] == "other.txt"
    assert (tmp_path / "search.jsonl").read_text().startswith(journal)
    plan.unlink()
    assert run("search", model, "-o", plan, *options, "--order", "snr") == 1
    assert "belongs to another run: order differ" in capsys.readouterr().err
    assert run("search", model, "-o", plan, *options, "--order", "snr", "--force") == 0


@pytest.mark.slow
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
    assert "layer 2 w2  fraction:0.2" in told and "calibration: wrong answers on task.jsonl, 4 units" in told
    assert "held out: wrong answers on task.jsonl, 3 units" in told and "held out: loss on other.txt" in told
    (tmp_path / "b").mkdir()
    short = ["--shortlist", "gradient:4", "--roles", "k,v,o", "--rules", "fraction:0.9"]
    assert run("search", model, "-o", tmp_path / "b" / "plan.json", *text, *short) == 0
    told = capsys.readouterr().out
    assert "Spearman" in told and told.count("fraction:0.9") == 4


@pytest.mark.slow
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
