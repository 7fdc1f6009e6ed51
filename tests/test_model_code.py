"""A model's own code is never run, by any verb: a folder may hold any, and its config may name it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import Run, sampled
from pico_language import TEXT, make_model

from laser.cli import app
from laser.evaluation.lm_tasks import TASKS

MAPPED = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor")


def with_code(path: Path, marker: Path, model_type: str) -> Path:
    """A model whose configs name modeling_x.py, which writes `marker` when it is run."""
    make_model(path, "llama")
    code = f"open({str(marker)!r}, 'w').write(__file__)\nclass X: pass\n"
    for name in (
        "modeling_x.py",
        "configuration_x.py",
        "tokenization_x.py",
        "setup.py",
        "__init__.py",
        "sitecustomize.py",
    ):
        (path / name).write_text(code)
    (path / "custom_generate").mkdir()
    (path / "custom_generate" / "generate.py").write_text(code)
    named = {name: "modeling_x.X" for name in MAPPED}
    for file in ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"):
        told = json.loads((path / file).read_text()) if (path / file).exists() else {}
        mapped = named | {"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]}
        (path / file).write_text(json.dumps(told | {"auto_map": mapped, "trust_remote_code": True}))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": model_type, "custom_generate": "generate"}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sampled(["nobody_knows", "llama"], 2))
def test_no_verb_runs_the_code_of_a_model(
    model_type: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    model = with_code(tmp_path / "model", marker, model_type)
    (tmp_path / "text.txt").write_text(TEXT)
    rows = [{"sentence": f"ann met eve {i} times as _ was late.", "option1": "ann", "option2": "eve", "answer": "1"}
            for i in range(9)]  # fmt: skip
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / TASKS["winogrande"].file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(model)  # as `import` would look there first
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # to whoever asks for leave
    at, text = tmp_path.joinpath, ("--text", tmp_path / "text.txt", "--window", 16)
    few = (*text, "--windows", 4)
    verbs = {
        "devices": [()],
        "info": [(model,)],
        "scan": [(model, "--dry-run"), (model, "-o", at("s"))],
        "plan": [(at("s"), "-o", at("p"), "--rule", "fraction:0.5", "--roles", "q")],
        "reduce": [(model, at("p"), "-o", at("out"))],
        "verify": [(model, at("out"))],
        "eval": [(model, at("out"), *few), (model, "--stream", *few)],
        "calibrate": [(model, "-o", at("m"), *text, "--windows", 8, "--roles", "q")],
        "search": [(model, "-o", at("p2"), *few, "--held-out-windows", 2, "--roles", "q", "--lowest-snr", 1)],
        "run": [
            (model, "-o", at("out2"), *few, "--held-out-windows", 2, "--roles", "q", "--lowest-snr", 1),
            (model, "-o", at("out3"), "--rule", "fraction:0.5", "--no-search"),
        ],
        "leaderboard": [(model, "-o", at("b"), "--tasks", "winogrande", "--data", at("rows"), "--limit", 1)],
        "card": [(at("out"), "--source", model, "--force")],
        "push": [(at("out"), "a/b")],
        "null": [(model, "--roles", "q", "--layers", 0)],
        "spectra": [(at("s"),)],
        "plot": [(at("s"), "-o", at("p.png"), "--heat", "kept")],
        "report": [(at("s"), "-o", at("r.html"), "--roles", "q", "--layers", 0)],
        "convert": [(model, "-o", at("c"))],
        "delta": [(model, at("out"), "-o", at("d"))],
        "unmerge": [(model, at("out"), "-o", at("a"))],
        "rebuild": [(model, at("a"), "-o", at("t"))],
        "compensate": [(model, at("out"), "-o", at("a2"), "--plain", "--roles", "q")],
    }
    assert verbs.keys() == {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    refused = (
        {"push", "convert"}
        if model_type == "llama"
        else {"push", "convert", "eval", "calibrate", "search", "leaderboard", "compensate"}
    )
    for verb, several in verbs.items():
        for words in several:
            code, _, err = run(verb, *words)
            assert not marker.exists(), f"{verb}: {marker.read_text()}"
            searched = model_type != "llama" and verb == "run" and "--no-search" not in words
            if not searched and (verb, model_type) != ("leaderboard", "llama"):  # which needs lm-eval
                assert (code == 0) == (verb not in refused), (verb, err)
    assert not [name for name in sys.modules if name.endswith(("modeling_x", "tokenization_x", "configuration_x"))]
