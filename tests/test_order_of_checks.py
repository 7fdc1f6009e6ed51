"""Errors at the right moment: what a command asks for wrongly is refused before one matrix is read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from pico_language import dense_tensors, make_model, write_tokenizer
from safetensors import safe_open
from safetensors.torch import save_file

from laser.checkpoint import reader, safetensors
from laser.cli import main
from laser.evaluation import layout

# Placeholders are files and folders of `place`, below. {new} is free to be written.
EVERYWHERE = ("--device tpu", "--layers 99", "--layers 2-1", "--roles nose", "--include [", "--include nothing-of-it")
WRONG: dict[str, tuple[str, ...]] = {
    "scan {model} -o {new}": (
        *(*EVERYWHERE, "--precision bf16", "--method magic", "--null -1", "--workers 0", "--engine none"),
        *("--device cpu,tpu", "--moments {missing}", "--moments {spectra}", "--moments {others_moments}"),
    ),
    "scan {model} -o": ("{there}", "{folder}/none/s", "{model}/s", "{folder}", "{there} --force"),
    "reduce {model} {plan} -o {new}": (
        *("--device tpu", "--precision bf16", "--method magic", "--workers 0", "--engine none", "--device cpu,tpu"),
        *("--moments {missing}", "--fresh {missing}", "--fresh {others_moments}", "--evict", "--output-dtype float8"),
    ),
    "reduce {model}": ("{missing} -o {new}", "{others_plan} -o {new}", "{spectra} -o {new}"),
    "reduce {model} {plan} -o": ("{output}", "{text}", "{model}", "{model}/in", "{folder} --force", "{text}/in"),
    "run {model} -o {new} --no-search": (
        *(*EVERYWHERE, "--precision bf16", "--method magic", "--workers 0", "--engine none", "--device cpu,tpu"),
        *("--rule nose", "--rule energy:2", "--rule rank:x", "--rule mp-edge,mp-median", "--rule data:mp-edge"),
        *("--rule data:energy:0.9", "--moments {missing}", "--moments {others_moments}", "--recipe {missing}"),
        *("--recipe {text}", "--lowest-snr 0", "--lowest-snr x", "--shrink nose", "--require-fit 2"),
        *("--leaderboard --data {missing}", "--leaderboard --data {folder}", "--leaderboard --limit 0"),
        "--rule data:energy:0.9 --shrink frobenius --moments {moments}",
    ),
    "run {model} -o": ("{output}", "{text}", "{model}", "{model}/in", "{folder} --force", "{text}/in"),
    "run {model} -o {new} --text {text} --window 32": (
        *("--rule nose", "--rule laser-rmt,nose", "--rule data:energy:0.9", "--accept nose", "--order nose"),
        *("--window 1", "--windows -1", "--windows 1", "--windows 0", "--held-out-windows -1", "--held-out {text}"),
        *("--held-out {missing}", "--text {missing}", "--text {rows}", "--field text", "--text {empty}"),
        *("--windows 9999", "--lowest-snr 0", "--shrink frobenius", "--two-sided", "--text {rows} --field none"),
        *("--rule ,", "--moments {others_moments}", "--layers 99"),
    ),
    "search {model} -o {new} --text {text} --window 32": (
        *(*EVERYWHERE, "--precision bf16", "--rules nose", "--rules laser-rmt,nose", "--rules ,", "--rules energy:2"),
        *("--rules data:energy:0.9", "--rules data:mp-edge", "--moments {missing}", "--moments {others_moments}"),
        *("--lowest-snr 0", "--lowest-snr x", "--shortlist nose", "--shortlist gradient:0", "--shortlist gradient:x"),
        *("--grid fraction:", "--grid nose:1", "--grid fraction:2", "--grid fraction:0.5 --shortlist gradient:3"),
        *("--accept nose", "--order nose", "--objective nose", "--objective accuracy", "--task {task}"),
        *("--objective accuracy --task {missing}", "--objective accuracy --task {text}"),
        *("--objective accuracy --task {rows}", "--objective accuracy --task {task} --shortlist gradient:3"),
        *("--text {missing}", "--text {rows}", "--text {empty}", "--field text", "--dataset none/such"),
        *("--held-out {missing}", "--held-out {text}", "--window 1", "--windows 1", "--windows 0", "--windows -1"),
        *("--held-out-windows -1", "--windows 9999", "--dtype float8", "--stream --dtype float8"),
        *("--spectra {others_spectra}", "--spectra {plan}", "--spectra {none}/s", "--spectra {few} --layers 1"),
        *("--spectra {spectra} --rules data:energy:0.9 --moments {moments}", "--spectra {spectra} --rules parallel"),
        *("--journal {folder}", "--journal {none}/j", "--journal {model}/j"),
    ),
    "calibrate {model} -o {new} --text {text} --window 32 --windows 4": (
        *(*EVERYWHERE, "--roles embedding", "--dtype float8", "--window 1", "--windows -1", "--skip -1"),
        *(
            "--skip 99999",
            "--text {missing}",
            "--text {rows}",
            "--text {empty}",
            "--field text",
            "--window 8 --windows 1",
        ),
    ),
    "calibrate {model} --text {text} -o": ("{there}", "{folder}/none/s", "{model}/s", "{folder}", "{there} --force"),
    "eval {model} --text {text} --window 32 --windows 4": (
        *("--device tpu", "--dtype float8", "--stream --dtype float8", "--window 1", "--windows -1", "--skip -1"),
        *("--skip 99999", "--text {missing}", "--text {rows}", "--text {empty}", "--field text", "--mode magic"),
        *("{missing}", "{without}", "{missing}.json", "{record}", "{spelling}", "{model} -o {new}", "-o {there}"),
        "-o {folder}/none/e",
    ),
    "null {model}": (
        *(*EVERYWHERE, "--precision bf16", "--rules nose", "--rules mp-edge,nose", "--rules ,", "--permute magic"),
        *("--draws 0", "--draws -1", "--spectra {missing}", "--spectra {plan}", "--spectra {others_spectra}"),
    ),
    "leaderboard {model} -o {new}": (
        *("--tasks nose", "--tasks ,", "--limit 0", "--data {missing}", "--data {folder}", "--dtype float8"),
        *("--batch-size 0", "--device tpu"),
    ),
    "leaderboard {model} --data {folder} -o": ("{there}", "{folder}/none/s", "{model}/s", "{there} --force"),
    "leaderboard": ("{model}", "{without} -o {new}"),
    "verify {model}": ("{missing}", "{folder}", "{output} --device tpu", "{output} --moments {missing}"),
    "verify {other}": ("{output}",),
    "plot {spectra} -o {new}.png": (
        *("", "--matrix q --heat kept", "--heat nose", "--heat kept --with {spectra}", "--heat kept --rule nose"),
        *("--matrix nose", "--matrix q_proj --with {missing}", "--heat kept --layers 99", "--heat kept --include ["),
    ),
    "plot {spectra} --heat kept -o": ("{new}.gif", "{new}", "{folder}/none/p.png", "{there}"),
    "report {spectra} -o {new}": ("--rule nose", "--layers 99", "--roles nose", "--include ["),
    "spectra {spectra}": ("--rule nose", "--layers 99", "--unfrozen-yaml {new} --top-percent 200"),
    "plan {spectra} -o {new} --rule mp-edge": (
        *(
            "--rule nose",
            "--rule energy:2",
            "--lowest-snr 0",
            "--shrink nose",
            "--rule nose:energy:1",
            "--rule data:mp-edge",
        ),
        *("--require-fit 2", "--layers 99", "--roles nose", "--include [", "--fewest-tokens -1"),
    ),
    "push": ("{missing} a/b", "{folder} a/b", "{output} a/b/c", "{output} nose/../x"),
    "card": ("{missing}", "{folder}", "{output} --source {missing}"),
    "convert": ("{missing} -o {new}", "{model} -o {new}", "{model} -o {output}", "{folder} -o {new}"),
}
CASES = [(command, words) for command, several in WRONG.items() for words in several]


FILES = ("new", "folder", "none", "missing", "output", "without", "other", "model", "few")
NAMED = {"text": ".txt", "rows": ".jsonl", "task": ".jsonl", "empty": ".txt", "record": ".json"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files and folders that a command may name; most were made by laser."""
    root = tmp_path_factory.mktemp("place")
    at = {name: root / name for name in FILES} | {name: root / (name + end) for name, end in NAMED.items()}
    at |= {name: root / name for name in ("spectra", "others_spectra", "plan", "others_plan", "moments")}
    at |= {"others_moments": root / "others_moments", "there": root / "there.txt", "spelling": root / "spelling"}
    at["folder"].mkdir()
    (at["folder"] / "mine").write_text("not made by laser")
    sentence = "the quick brown fox, 1 of 9, jumps over: the lazy dogs. "
    at["text"].write_text(sentence * 40)
    at["there"].write_text("not made by laser")
    at["rows"].write_text('{"text": "some words"}\n' * 9)
    at["task"].write_text('{"question": "a word?", "answer": "yes"}\n' * 9)
    at["empty"].write_text(" \n")
    make_model(at["model"], "llama")
    make_model(at["other"], "llama")
    for name, seed in (("other", 1), ("model", 0)):
        for file in sorted(at[name].glob("*.safetensors")):
            tensors = dense_tensors(seed)
            with safe_open(file, "pt") as opened:
                save_file({key: tensors[key] for key in opened.keys()}, file, metadata={"format": "pt"})
    make_model(at["without"], "llama")
    for file in at["without"].glob("tokenizer*"):
        file.unlink()
    make_model(at["spelling"], "llama")
    write_tokenizer(at["spelling"], bos=False)
    words = ["--text", str(at["text"]), "--window", "32"]

    def laser(*arguments: object) -> None:
        assert main([str(a) for a in arguments]) == 0, arguments

    for whose in ("", "others_"):
        model = at["other" if whose else "model"]
        laser("scan", model, "-o", at[whose + "spectra"])
        laser("plan", at[whose + "spectra"], "-o", at[whose + "plan"], "--rule", "fraction:0.5", "--roles", "q")
        laser("calibrate", model, "-o", at[whose + "moments"], *words, "--windows", "8", "--ledoit-wolf")
    laser("scan", at["model"], "-o", at["few"], "--layers", "0")
    laser("reduce", at["model"], at["plan"], "-o", at["output"])
    laser("eval", at["model"], "-o", at["record"], *words, "--windows", "2")
    return at


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards of which bytes of weights were read, once per read."""
    found: list[str] = []

    def counting(shard: Any, start: int, end: int, *rest: Any) -> Any:
        found.append(f"{shard.name} {start} to {end}")
        return safetensors.read_bytes(shard, start, end, *rest)

    # Commands open their checkpoints themselves; every read of weights goes through this.
    for module in (reader, layout):
        monkeypatch.setattr(module, "read_bytes", counting)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("command", "words"), CASES, ids=[f"{c.split()[0]} {w}" for c, w in CASES])
def test_what_is_asked_for_wrongly_is_refused_before_a_matrix_is_read(
    command: str, words: str, place: dict[str, Path], reads: list[str], run: Run
) -> None:
    root = place["new"].parent
    before = set(root.rglob("*"))
    code, _, err = run(*f"{command} {words}".format_map(place).split())
    left = sorted(str(path) for path in set(root.rglob("*")) - before)
    for path in left:  # the other cases begin as this one did
        shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink(missing_ok=True)
    assert (code in (1, 2), err.count("laser: "), "Traceback" in err) == (True, 1, False), (code, err)
    assert (reads, left) == ([], []), err
