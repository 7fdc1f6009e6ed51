"""--config: one file of options for a command, the file that a run leaves in its output, and what is refused in one."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Run
from pico_language import TEXT, make_model
from test_options import COMMANDS

from laser.checkpoint.push import names_a_place

SEARCH = ("--lowest-snr", "3", "--window", "16", "--windows", "2", "--held-out-windows", "2", "--no-leaderboard")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    make_model(folder / "m", "mixtral")
    (folder / "text.txt").write_text(TEXT)
    return folder / "m"


def params(verb: str, *words: object) -> dict[str, Any]:
    return COMMANDS[verb].make_context(verb, [str(word) for word in words]).params


def test_the_command_line_wins_over_a_config_that_over_a_recipe_and_that_over_the_defaults(tmp_path: Path) -> None:
    config, recipe = tmp_path / "c.yaml", tmp_path / "r.toml"
    recipe.write_text('rule = "mp-edge"\nroles = "q"\nlayers = "0"\nwindow = 32\n')
    config.write_text(f"recipe: {recipe}\nroles: k\nlayers: '1'\nlowest_snr: 2\n")
    told = ("--config", config), ("--recipe", recipe)
    for words in (told[0], (*told[0], *told[1]), (*told[1], *told[0])):
        found = params("run", "m", "-o", "o", *words, "--layers", "2")
        assert (found["layers"], found["roles"], found["rule"]) == ("2", "k", "mp-edge")
        assert (found["window"], found["lowest_snr"], found["windows"]) == (32, "2", 16)
    assert params("run", "m", "-o", "o", *told[1])["roles"] == "q"


def test_every_verb_takes_a_config(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("{}\n")
    (tmp_path / "scan.toml").write_text('output = "s"\nnull = 3\n')
    for verb, command in COMMANDS.items():
        assert any("--config" in parameter.opts for parameter in command.params), verb
    found = params("scan", "m", "--config", tmp_path / "scan.toml")
    assert (str(found["output"]), found["null"]) == ("s", 3)
    assert params("scan", "m", "--config", tmp_path / "c.yaml")["null"] == 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("wndow: 3", "no flag is called 'wndow'; try window"),
        ("no-json: true", "no flag is called 'no-json'; try json: false"),
        ("model: m", "no flag is called 'model'; try "),
        ("config: c.yaml", "no flag is called 'config'; try "),
        ("window: 3\nwindow: 4", "window is given twice; leave one of the lines"),
        ("lowest-snr: 3\nlowest_snr: 3", "lowest-snr is given twice; leave one of the lines"),
        ("window: many", "window is 'many', expected int; mend the line"),
        ("window:", "window is null, expected int; mend the line"),
        ("require-fit: 1e-3", "require-fit is '1e-3', expected float; try 0.001, without quotes"),
        ("window: '16'", "window is '16', expected int; try 16, without quotes"),
        ("layers: 4", "layers is 4, expected str; try it in quotes, '4'"),
        ("roles: [w1, q]", "roles is ['w1', 'q'], expected str; try w1,q"),
        ("rule: {mp-edge: 1}", "rule is {'mp-edge': 1}, expected str; try one option a line"),
        ("text:\n  file: a.txt", "text is {'file': 'a.txt'}, expected str; try one option a line"),
        ("roles: &these q\ninclude: *these", "line 1 has the anchor 'these'; write the value where it is meant"),
        ("<<: {window: 3}", "no flag is called '<<'; try "),
        ("window: 1:30", "window is 1:30, which YAML reads as 90; try it in quotes, or write the number plainly"),
        ("window: 016", "window is 016, which YAML reads as 14; try it in quotes, or write the number plainly"),
        ("window: 0x10", "window is 0x10, which YAML reads as 16; try "),
        ("- window", "holds a seq, expected lines of `option: value`; mend it"),
        ("window: [", "cannot be parsed ("),
        ("? [a]\n: 3", "no flag is called ['a']; try "),
        ("window: !!python/object/apply:os.getcwd []", "cannot be parsed ("),
        ("rule: nothing", "no rule is called 'nothing'"),
    ],
)
def test_a_config_is_refused_in_one_sentence(text: str, told: str, run: Run, model: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    code, out, err = run("run", model, "-o", tmp_path / "o", "--no-search", "--config", config)
    assert code in (1, 2) and out == "" and told in err and err.count("\n") == 1
    assert "rule" in text or f"config {config}" in err
    assert not (tmp_path / "o").exists()


def test_a_config_that_cannot_be_read_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"rule: \xff\n")
    for name, told in (("none", ": there is no such file"), ("c.yaml", " cannot be read"), (".", " cannot be read")):
        code, _, err = run("scan", "m", "--config", tmp_path / name)
        assert code == 1 and f"config {tmp_path / name}{told}" in err and err.count("\n") == 1


def shards_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (*out.glob("*.safetensors"), out / "laser.json")}


@pytest.mark.parametrize(
    "words",
    [
        ("--recipe", "laser-rmt", "--layers", "0", "--shrink", "frobenius"),
        pytest.param(SEARCH, marks=pytest.mark.slow),
    ],
    ids=["recipe", "search"],
)
def test_a_run_leaves_its_options_and_takes_them_back(
    words: Any, run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    words = (*words, "--text", model.parent / "text.txt", "--device", "cpu", "--workers", "1")
    assert run("run", model, "-o", one, *words)[0] == 0
    again = ["run", str(model), "-o", str(two), "--config", str(one / "laser.yaml")]
    # The card quotes the command line of the process, which is pytest's here.
    monkeypatch.setattr("sys.argv", ["laser", *again])
    assert run(*again)[0] == 0
    assert shards_of(one) == shards_of(two) and (one / "laser.yaml").read_bytes() == (two / "laser.yaml").read_bytes()
    said = yaml.safe_load((one / "laser.yaml").read_text())
    assert said["search"] is (words[:4] == SEARCH[:4]) and said["rule"] == "laser-rmt" and said["leaderboard"] is False
    assert said["window"] == (16 if said["search"] else 512) and said["text"] == str(model.parent / "text.txt")
    assert not {"recipe", "config", "output", "resume", "force", "dry-run", "json"} & said.keys()
    assert run("verify", model, two)[0] == 0
    made = re.search("^laser run .*", (two / "README.md").read_text(), re.MULTILINE)
    assert made is not None  # laser.yaml names a place on this machine, so push leaves it behind, and the card it out
    assert "laser.yaml" not in made[0] and str(tmp_path) not in made[0] and " --text text.txt " in made[0]
    (tmp_path / "elsewhere").mkdir()
    for name in ("m", "text.txt"):
        (tmp_path / "elsewhere" / name).symlink_to(model.parent / name)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run(*shlex.split(made[0])[1:])[0] == 0
    assert shards_of(tmp_path / "elsewhere" / "two") == shards_of(one)


def test_a_card_names_the_config_only_where_push_sends_it(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And else its options, which the command line still wins over."""
    config = tmp_path / "mine.yaml"
    for text, at in (("text.txt", model.parent), (str(model.parent / "text.txt"), tmp_path)):
        monkeypatch.chdir(at)
        config.write_text(f"rule: rank:4\nsearch: false\nroles: q\ntext: {text}\nforce: true\n")
        words = ["run", str(model), "-o", str(tmp_path / "o"), "--rule", "rank:3", "--config", str(config)]
        # The card quotes the command line of the process, which is pytest's here.
        monkeypatch.setattr("sys.argv", ["laser", *words])
        assert run(*words)[0] == 0
        card = (tmp_path / "o" / "README.md").read_text()
        pushed = not names_a_place((tmp_path / "o" / "laser.yaml").read_bytes())
        assert pushed == (text == "text.txt") == ("laser run m -o o --rule rank:3 --config laser.yaml\n" in card)
        spelled = "laser run --rule rank:4 --no-search --roles q --text text.txt m -o o --rule rank:3\n"
        assert pushed != (spelled in card) and str(tmp_path) not in card


def test_a_resumed_run_and_a_forced_one_leave_the_same_file(run: Run, model: Path, tmp_path: Path) -> None:
    out, words = tmp_path / "o", ("--rule", "mp-edge", "--no-search", "--device", "cpu")
    assert run("run", model, "-o", out, *words)[0] == 0
    first = (out / "laser.yaml").read_bytes()
    (out / "laser.yaml").unlink()  # as a kill before the last step leaves it
    assert run("run", model, "-o", out, "--resume", *words)[0] == 0
    assert (out / "laser.yaml").read_bytes() == first
    assert run("run", model, "-o", out, "--config", out / "laser.yaml", "--force")[0] == 0
    assert (out / "laser.yaml").read_bytes() == first
    code, _, err = run("run", model, "-o", out, "--config", out / "laser.yaml", "--resume", "--rule", "rank:2")
    assert code == 1 and "another" in err and (out / "laser.yaml").read_bytes() == first


def test_a_source_with_such_a_file_gives_none_of_it_to_its_output(run: Run, model: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(model, source)
    (source / "laser.yaml").write_text("rule: rank:1\n")
    assert run("run", source, "-o", tmp_path / "o", "--rule", "rank:4", "--no-search")[0] == 0
    assert "rule: rank:4\n" in (tmp_path / "o" / "laser.yaml").read_text()
    assert "laser.yaml" not in json.loads((tmp_path / "o" / "laser.json").read_text())["files"]
