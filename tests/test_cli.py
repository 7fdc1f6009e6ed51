"""The command line as a user meets it: exit codes, tables, strict JSON, errors with a remedy."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, mixtral_config, mixtral_tensors, write_checkpoint_directory
from hostile import HOSTILE
from pico_language import write_tokenizer

from laser.checkpoint.reader import INDEX
from laser.cli import app, main
from laser.escape import visible
from laser.spectral.metric import Plain


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.slow
def test_the_whole_flow_verb_by_verb(run: Run, pico: Path, tmp_path: Path) -> None:
    spectra, plan, out = tmp_path / "s.safetensors", tmp_path / "plan.json", tmp_path / "out"
    code, text, _ = run("scan", pico, "-o", spectra, "--device", "cpu")
    assert code == 0 and "48 matrices in" in text and text.splitlines()[0].split()[:2] == ["role", "matrices"]
    code, text, _ = run("plan", spectra, "-o", plan, "--rule", "mp-edge", "--lowest-snr", "5")
    assert code == 0 and "5 to reduce, 55 to keep, 0 skipped, of 60 tensors" in text
    code, text, _ = run("reduce", pico, plan, "-o", out)
    assert code == 0 and f"written to {out}" in text
    code, text, _ = run("verify", pico, out)
    assert code == 0 and text == "55 tensors identical, 5 as planned, 0 problems\n"


@pytest.mark.slow
def test_json_is_strict_and_complete(run: Run, pico: Path, tmp_path: Path) -> None:
    spectra, plan, out = tmp_path / "s", tmp_path / "p", tmp_path / "o"
    assert strict(run("scan", pico, "-o", spectra, "--json")[1])["scanned"] == 48
    document = strict(run("plan", spectra, "-o", plan, "--rule", "laser-rmt", "--json")[1])
    assert len(document["lines"]) == 60
    assert strict(run("reduce", pico, plan, "-o", out, "--json")[1])["output"] == str(out)
    assert strict(run("verify", pico, out, "--json")[1])["problems"] == []
    here = strict(run("devices", "--json")[1])
    assert here["chosen"].startswith(("cpu", "cuda", "mps")) and here["exact_products"] and here["method"]
    assert strict(run("scan", pico, "--dry-run", "--json")[1])["matrices"] == 48
    assert strict(run("run", pico, "-o", tmp_path / "r", "--rule", "mp-edge", "--no-search", "--json")[1])["matrices"]
    for file in (plan, out / "laser.json", tmp_path / "r" / "laser" / "plan.json"):
        strict(file.read_text())


@pytest.mark.slow
def test_run_by_recipe_does_what_the_recipe_says(run: Run, pico: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("run", pico, "-o", out, "--recipe", "laser-rmt")[0] == 0
    outcome = json.loads((out / "laser.json").read_text())
    assert outcome["plan"]["rule"] == "laser-rmt" and outcome["plan"]["selection"]["lowest_snr"] == 15
    assert len(outcome["matrices"]) == 15
    for suffix, text in ((".toml", 'rule = "mp-edge"\nlowest-snr = 2\n'), (".yaml", "rule: mp-edge\nlowest-snr: 2\n")):
        mine = tmp_path / f"mine{suffix}"
        mine.write_text(text)
        assert run("run", pico, "-o", tmp_path / suffix, "--recipe", mine)[0] == 0
        assert len(json.loads((tmp_path / suffix / "laser.json").read_text())["matrices"]) == 2
    assert run("run", pico, "-o", out, "--recipe", "laser-rmt", "--lowest-snr", "3", "--force")[0] == 0
    assert len(json.loads((out / "laser.json").read_text())["matrices"]) == 3


@pytest.mark.parametrize(
    "text, message",
    [
        ("rule = ", "cannot be parsed"),
        ("rank = 3", "no flag is called 'rank'"),
        ('lowest-snr = "many"', "lowest-snr is 'many', expected int"),
    ],
)
def test_bad_recipes(run: Run, pico: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.toml").write_text(text)
    code, _, err = run("run", pico, "-o", tmp_path / "out", "--recipe", tmp_path / "r.toml")
    assert code in (1, 2) and message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_dry_run_reads_no_weight_and_writes_nothing(run: Run, pico: Path, tmp_path: Path, reads: list[str]) -> None:
    write_tokenizer(pico)  # a search needs one
    spectra, plan = tmp_path / "s", tmp_path / "p"
    run("scan", pico, "-o", spectra)
    run("plan", spectra, "-o", plan, "--rule", "mp-edge")
    before = sorted(tmp_path.rglob("*"))
    reads.clear()
    for verb in (["scan", pico], ["run", pico, "-o", tmp_path / "x", "--rule", "mp-edge"]):
        code, text, _ = run(*verb, "--dry-run")
        assert code == 0 and "48 matrices on cpu" in text and "of memory" in text and "of disk" in text
    assert run("reduce", pico, plan, "-o", tmp_path / "x", "--dry-run")[0] == 0
    assert sorted(tmp_path.rglob("*")) == before and not reads


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["scan", "{pico}"], 2, "try -o spectra.safetensors"),
        (["scan", "nowhere", "-o", "{tmp}/s"], 1, "no such model: nowhere"),
        (["scan", "{pico}", "-o", "{tmp}/s", "--roles", "w9"], 2, "no matrix has role 'w9'"),
        (["scan", "{pico}", "-o", "{tmp}/s", "--layers", "9"], 2, "no layer 9; try --layers 0-2"),
        (["scan", "{pico}", "-o", "{tmp}/s", "--device", "cuda:7"], 2, "try --device"),
        (["scan", "{pico}", "-o", "{tmp}/s", "--method", "magic"], 2, "try --method gram|projector|svd"),
        (["scan", "{pico}", "-o", "{tmp}/no/s"], 1, "there is no directory"),
        (["plan", "{tmp}/s", "-o", "{tmp}/p"], 2, "plan needs a rule"),
        (["plan", "{tmp}/s", "-o", "{tmp}/p", "--rule", "mp-edge"], 1, "laser scan MODEL -o FILE makes one"),
        (["plan", "{spectra}", "-o", "{tmp}/p", "--rule", "mp"], 2, "no rule is called 'mp'; try one of laser-rmt"),
        (["plan", "{spectra}", "-o", "{tmp}/p", "--rule", "mp-edge", "--lowest-snr", "0"], 2, "--lowest-snr 0"),
        (["plan", "{spectra}", "-o", "{spectra}", "--rule", "mp-edge"], 1, "exists; try another -o, or --force"),
        (["reduce", "{pico}", "{tmp}/none", "-o", "{tmp}/o"], 1, "no such file"),
        (["run", "{pico}", "-o", "{tmp}/o"], 1, "okenizer"),
        (["run", "{pico}", "-o", "{tmp}/o", "--recipe", "x"], 2, "no recipe 'x'; try one of laser-rmt"),
        (["run", "{pico}", "-o", "{pico}", "--rule", "mp-edge"], 1, "lie in one another"),
        (["verify", "{pico}", "{tmp}/none"], 1, "no such file"),
        (["melt"], 2, "No such command"),
        (["scan"], 2, "Missing argument"),
    ],
)
def test_errors_are_one_line_with_a_remedy(
    run: Run, pico: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    spectra = tmp_path / "spectra.safetensors"
    run("scan", pico, "-o", spectra, "--roles", "q")
    filled = [a.format(pico=pico, tmp=tmp_path, spectra=spectra) for a in arguments]
    found, out, err = run(*filled)
    assert (found, out) == (code, "")
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "o" / INDEX).exists()


@pytest.mark.slow
@pytest.mark.parametrize("attack, message", HOSTILE, ids=lambda x: x.__name__ if callable(x) else "")
def test_hostile_input_leaves_nothing_that_looks_whole(
    run: Run, pico: Path, tmp_path: Path, attack: Callable[[Path], None], message: str
) -> None:
    attack(pico)
    code, _, err = run("run", pico, "-o", tmp_path / "out", "--rule", "mp-edge", "--no-search")
    assert code == 1 and re.search(message, err)
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(run: Run) -> None:
    from laser.errors import CheckpointError

    with pytest.raises(CheckpointError):
        run("scan", "nowhere", "-o", "x", "--debug")


@pytest.mark.slow
def test_existing_output_is_kept_without_force(run: Run, pico: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("run", pico, "-o", out, "--rule", "mp-edge", "--no-search")[0] == 0
    before = (out / "laser.json").read_bytes()
    code, _, err = run("run", pico, "-o", out, "--rule", "gavish-donoho", "--no-search")
    assert code == 1 and "finished checkpoint; try --resume" in err
    assert (out / "laser.json").read_bytes() == before
    assert run("run", pico, "-o", out, "--rule", "mp-edge", "--no-search", "--resume")[0] == 0
    assert run("run", pico, "-o", out, "--rule", "gavish-donoho", "--no-search", "--force")[0] == 0
    assert (out / "laser.json").read_bytes() != before


@pytest.mark.slow
def test_interrupt_is_130_and_keeps_the_work(
    run: Run, pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, count = Plain.visit, 0

    def interrupt(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return true(*arguments)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        # A command takes no callback: it is interrupted where it computes.
        patch.setattr(Plain, "visit", interrupt)
        code, _, err = run("run", pico, "-o", out, "--rule", "mp-edge", "--no-search")
    assert code == 130 and "--resume" in err and not (out / INDEX).exists()
    assert run("run", pico, "-o", out, "--rule", "mp-edge", "--no-search", "--resume")[0] == 0
    assert run("verify", pico, out)[0] == 0


@pytest.mark.slow
def test_verify_fails_loudly(run: Run, pico: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("run", pico, "-o", out, "--rule", "mp-edge", "--no-search")
    shard = sorted(out.glob("model-*.safetensors"))[0]
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 255
    shard.write_bytes(raw)
    code, text, _ = run("verify", pico, out)
    assert code == 1 and "found sha256" in text and "1 problems" in text


@pytest.mark.slow
def test_every_verb_has_help(run: Run) -> None:
    for command in app.registered_commands:
        assert command.callback and (command.callback.__doc__ or "").strip()
        code, text, _ = run(command.callback.__name__, "--help")
        assert code == 0 and "Usage: laser" in text


def test_an_unknown_family_is_warned_of_in_one_line(run: Run, make_pico: Callable[..., Path], tmp_path: Path) -> None:
    path = make_pico(model_type="mixtral_of_tomorrow")
    for options in (("--dry-run",), ("-o", tmp_path / "s.safetensors")):
        code, out, err = run("scan", path, *options)
        assert code == 0 and "w1" in out
        assert err.count("laser: warning: ") == 1
        assert "kept: model.embed_tokens.weight (1), " in err


def test_every_parameter_is_in_the_coverage_of_the_plan(run: Run, pico: Path, tmp_path: Path) -> None:
    spectra, plan = tmp_path / "s.safetensors", tmp_path / "p.json"
    assert run("scan", pico, "-o", spectra, "--layers", "0,1")[0] == 0
    assert run("plan", spectra, "-o", plan, "--rule", "rank:4", "--roles", "w2,q")[0] == 0
    coverage = json.loads(plan.read_text())["coverage"]
    stored = sum(t.numel() for t in mixtral_tensors().values())
    assert coverage["parameters"] == stored and coverage["unaccounted"] == 0
    reasons = {(r["action"], r["kind"]): (r["matrices"], r["parameters"]) for r in coverage["reasons"]}
    assert sum(parameters for _, parameters in reasons.values()) == stored
    assert reasons["reduce", "rule"] == (10, 2 * 32 * 32 + 8 * 32 * 48)
    assert reasons["keep", "not a matrix"] == (7, 7 * 32)
    assert reasons["keep", "not selected"] == (60 - 10 - 7, stored - 10 * 32 * 32 - 8 * 32 * 16 - 7 * 32)
    assert len(reasons) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["\x1b[31mred", "a\nb", "a\u202eb", "\ta", "a\u2028b", "é 模型 😀"])
def test_a_tensor_cannot_command_the_terminal(
    run: Run, make_pico: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    """A name is shown on one line, with escapes for what cannot be seen, by every verb that lists or complains."""
    tensors = {
        f"model.layers.0.{name}.weight": torch.arange(64.0).reshape(8, 8).sin(),
        "x": torch.full((4, 4), torch.nan),
    }
    model = make_pico("m", tensors=tensors, shards=1, model_type="unknown")
    shown = f"model.layers.0.{visible(name)}.weight"
    for words in (
        ("scan", model, "-o", tmp_path / "s", "--roles", "linear,other"),
        ("spectra", tmp_path / "s"),
        ("plan", tmp_path / "s", "-o", tmp_path / "p", "--rule", "rank:1", "--roles", "linear"),
        ("reduce", model, tmp_path / "p", "-o", tmp_path / "out"),
        ("verify", model, tmp_path / "out"),
        ("null", model, "--roles", "linear"),
        ("plot", tmp_path / "s", "-o", tmp_path / "x.png", "--matrix", "nowhere"),
    ):
        code, text, err = run(*words)
        assert code == (2 if words[0] == "plot" else 0), (words, err)
        assert all(line.isprintable() for line in [*text.split("\n"), *err.split("\n")]), (words, text, err)
        assert words[0] not in ("spectra", "plan", "plot") or shown in text + err, (words, text, err)


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (("verify", "{source}", "{folder}/nothing"), "name a directory that laser reduce or laser run has finished"),
        (("card", "{source}"), "name a directory that laser reduce or laser run has finished"),
        (
            ("reduce", "{source}", "{folder}/no.json", "-o", "{folder}/out"),
            "laser plan SPECTRA -o FILE --rule RULE makes one",
        ),
        (("eval", "{folder}/no.json"), "laser eval MODEL -o FILE makes one"),
        (
            ("eval", "{source}/config.json"),
            "found kind None, so no record of laser, expected 'eval' version 2; laser eval MODEL -o",
        ),
        (
            ("reduce", "{source}", "{source}/config.json", "-o", "{folder}/out"),
            "laser plan SPECTRA -o FILE --rule RULE makes one",
        ),
        (("plan", "{shard}", "-o", "{folder}/p", "--rule", "mp-edge"), "laser scan MODEL -o FILE"),
    ],
)
def test_a_missing_record_names_a_verb_that_there_is(
    words: tuple[str, ...], advice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_checkpoint_directory(tmp_path / "source", mixtral_tensors(), mixtral_config(), shards=1)
    shard = next(source.glob("*.safetensors"))
    assert main([word.format(source=source, folder=tmp_path, shard=shard) for word in words]) == 1
    assert advice in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "told"),
    [
        ("reduce", "run the command again with --resume"),
        ("scan", "what is finished is kept, run the same command again"),
        ("eval", "nothing was written"),
        ("scan --dry-run", "nothing was written"),
    ],
)
def test_an_interrupted_verb_says_how_it_goes_on(
    verb: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise SystemExit(130)

    # A command that ends so, whatever it does.
    monkeypatch.setattr("laser.cli._click_commands", lambda: interrupted)
    assert main([*verb.split(), "model"]) == 130 and told in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--include", "--exclude"])
@pytest.mark.parametrize("text", ["[", "(", "*", "a{2,1}", "(?P<x", "\\"])
def test_what_is_no_regular_expression_is_refused(option: str, text: str, run: Run, pico: Path, tmp_path: Path) -> None:
    for words in (("-o", tmp_path / "s"), ("--dry-run",)):
        code, _, err = run("scan", pico, *words, option, text)
        assert code == 2 and "is not a regular expression" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--precision", "bf16"), "unknown precision 'bf16'; try --precision auto|float64|float32"),
        (("--device", "tpu"), "unknown device 'tpu'; try --device auto|cuda|mps|cpu"),
    ],
)
def test_the_option_that_is_wrong_is_named(words: tuple[str, ...], told: str, run: Run, pico: Path) -> None:
    code, _, err = run("scan", pico, "--dry-run", *words)
    assert code == 2 and told in err


@pytest.mark.slow
def test_lowest_snr_all_is_all_of_them_over_a_recipe(run: Run, pico: Path, tmp_path: Path) -> None:
    for folder, words in (("all", ("--rule", "laser-rmt", "--no-search")), ("zero", ("--recipe", "laser-rmt"))):
        number = ("--lowest-snr", "all") if folder == "zero" else ()
        assert run("run", pico, "-o", tmp_path / folder, *words, *number)[0] == 0
    one, two = (json.loads((tmp_path / folder / "laser.json").read_text()) for folder in ("all", "zero"))
    assert one["matrices"] == two["matrices"] and two["plan"]["selection"]["lowest_snr"] is None


@pytest.mark.parametrize("count", ["0", "-1", "nan", "inf", "1.5", "", "15x", "²", "9" * 5000])
@pytest.mark.parametrize("verb", ["plan", "run", "run --search", "search", "recipe"])
def test_lowest_snr_is_a_count_or_all(verb: str, count: str, run: Run, pico: Path, tmp_path: Path) -> None:
    """Refused before anything is read: neither the spectra nor a tokenizer are there."""
    words = {
        "plan": ["plan", tmp_path / "none", "--rule", "mp-edge"],
        "run": ["run", pico, "--rule", "mp-edge", "--no-search"],
        "run --search": ["run", pico],
        "search": ["search", pico],
        "recipe": ["run", pico, "--recipe", tmp_path / "r.yaml"],
    }[verb]
    if verb == "recipe":
        (tmp_path / "r.yaml").write_text(f"rule: mp-edge\nlowest-snr: {count if count != 'nan' else '.nan'}\n")
    else:
        words += ["--lowest-snr", count]
    code, out, err = run(*words, "-o", tmp_path / "o")
    told = "cannot be parsed" if verb == "recipe" and len(count) > 99 else "lowest-snr"
    assert (code in (1, 2), out) == (True, "") and told in err and len(err.splitlines()) == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("count", [0, -1, 2.5, float("nan"), float("inf"), True, "15"])
def test_lowest_snr_is_a_count_from_python_too(count: Any, pico: Path) -> None:
    import laser

    spectra = laser.scan(laser.open_checkpoint(pico), laser.Selection(roles=("q",)))
    with pytest.raises(laser.UsageError, match="--lowest-snr"):
        laser.make_plan(spectra, "mp-edge", lowest_snr=count)


@pytest.mark.parametrize("words", [(), ("--lowest-snr", 5)])
def test_one_rule_is_one_rule_before_the_scan(words: tuple[Any, ...], run: Run, pico: Path, tmp_path: Path) -> None:
    """Several are for a search; without one they are refused before anything is read or written."""
    code, _, err = run("run", pico, "-o", tmp_path / "o", "--rule", "mp-edge,laser-rmt", "--no-search", *words)
    assert code == 2 and len(err.splitlines()) == 1 and not (tmp_path / "o").exists()
