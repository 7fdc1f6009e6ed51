"""One option mechanism: groups of options that several verbs take, and recipes, which give defaults to all of them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
import typer
import typer.main
from conftest import Run
from pico_language import TEXT, make_model
from typer.testing import CliRunner

from laser.cli import VERBS, app
from laser.cli.options import Matrices, RecordOptions, option, with_options
from laser.cli.recipe import follow, packaged
from laser.errors import UsageError

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]


def groups_of(verb: Callable[..., None]) -> list[type[Any]]:
    annotations = (p.annotation for p in inspect.signature(verb, eval_str=True).parameters.values())
    return [each for each in annotations if isinstance(each, type) and is_dataclass(each)]


def shown(verb: str) -> dict[str, tuple[Any, ...]]:
    """The options of a verb by the names of their values: flags, default and help."""
    return {p.name: (p.opts, p.secondary_opts, p.default, p.help) for p in COMMANDS[verb].params}


# --- groups -----------------------------------------------------------------------------------------------------------


def test_a_group_gives_every_verb_the_same_flags_defaults_and_help() -> None:
    found: dict[type[Any], dict[str, Any]] = {}
    taken: dict[type[Any], int] = {}
    for verb in VERBS:
        for group in groups_of(verb):
            options = {field.name: shown(verb.__name__)[field.name] for field in fields(group)}
            assert found.setdefault(group, options) == options, verb.__name__
            taken[group] = taken.get(group, 0) + 1
    assert taken[Matrices] > 2 and taken[RecordOptions] > 2
    assert found[Matrices]["layers"][0] == ["--layers"] and found[RecordOptions]["as_json"][0] == ["--json"]


def test_a_flag_that_two_verbs_take_from_a_group_has_one_text() -> None:
    """Also where groups were made of others; a device is one or several."""
    texts: dict[str, set[str]] = {}
    for verb in VERBS:
        for group in groups_of(verb):
            for field in fields(group):
                texts.setdefault(field.name, set()).add(field.metadata["declared"][0].help)
    assert {name for name, several in texts.items() if len(several) > 1} == {"device", "windows"}


def test_a_verb_gets_its_group_as_one_object() -> None:
    @dataclass(frozen=True)
    class Wishes:
        how_many: int = option(3, "A number.")
        loud: bool = option(False, "A switch.", "--loud")

    seen: list[Any] = []

    def verb(
        name: Annotated[str, typer.Argument()], *, wishes: Wishes, last: Annotated[str, typer.Option()] = "z"
    ) -> None:
        seen.append((name, wishes, last))

    verb.__annotations__["wishes"] = Wishes  # a class inside a function has no name that could be looked up
    toy = typer.Typer()
    toy.command()(with_options(verb))
    assert CliRunner().invoke(toy, ["a"]).exit_code == 0
    assert CliRunner().invoke(toy, ["b", "--how-many", "5", "--loud", "--last", "y"]).exit_code == 0
    assert seen == [("a", Wishes(3, False), "z"), ("b", Wishes(5, True), "y")]
    told = CliRunner().invoke(toy, ["--help"]).output
    assert "--no-loud" not in told and told.index("--how-many") < told.index("--loud") < told.index("--last")


def test_no_option_stands_twice_in_a_verb() -> None:
    def verb(which: Matrices, layers: Annotated[str, typer.Option()] = "") -> None: ...

    with pytest.raises(ValueError, match="layers"):
        with_options(verb)


# --- recipes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Every:
    """An option of every kind."""

    switch: bool = option(False, "true or false", "--switch")
    either: bool | None = option(None, "on, off or neither", "--either/--no-either")
    whole: int = option(1, "a whole number")
    part: float = option(0.5, "a number")
    place: Path | None = option(None, "a path")
    words: str = option("none", "a text")
    several: list[Path] | None = option(None, "paths", "--with")


def followed(recipe: Path | None, *words: str) -> Every:
    """What a verb with all of these options gets."""
    seen: list[Every] = []

    def verb(
        *, recipe: Annotated[str | None, typer.Option(is_eager=True, callback=follow)] = None, every: Every
    ) -> None:
        seen.append(every)

    toy = typer.Typer()
    toy.command()(with_options(verb))
    command = typer.main.get_command(toy)
    command([*words, *(["--recipe", str(recipe)] if recipe else [])], standalone_mode=False)
    return seen[0]


# option -> its default, a recipe's line in TOML, what that gives, words of a command line, what they give
KINDS: dict[str, tuple[Any, str, Any, list[str], Any]] = {
    "switch": (False, "switch = true", True, ["--switch"], True),
    "either": (None, "either = true", True, ["--no-either"], False),
    "whole": (1, "whole = 2", 2, ["--whole", "3"], 3),
    "part": (0.5, "part = 0.25", 0.25, ["--part", "0.75"], 0.75),
    "place": (None, 'place = "a/b"', Path("a/b"), ["--place", "c"], Path("c")),
    "words": ("none", 'words = "some"', "some", ["--words", "other"], "other"),
    "several": (None, 'with = ["a", "b"]', [Path("a"), Path("b")], ["--with", "c"], [Path("c")]),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_command_line_wins_over_the_recipe_and_that_over_the_default(name: str, tmp_path: Path) -> None:
    default, line, given, words, asked = KINDS[name]
    recipe, empty = tmp_path / "r.toml", tmp_path / "empty.toml"
    recipe.write_text(line + "\n")
    empty.write_text("")
    assert KINDS.keys() == {field.name for field in fields(Every)}
    for found, expected in (
        (followed(None), default),
        (followed(empty), default),
        (followed(recipe), given),
        (followed(recipe, *words), asked),
        (followed(None, *words), asked),
    ):
        assert getattr(found, name) == expected
        assert all(getattr(found, other) == KINDS[other][0] for other in KINDS if other != name)


def test_false_in_a_recipe_is_no_and_a_yaml_file_says_the_same(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("either: false\nswitch: false\nwhole: 0\nwith: [a]\n")
    assert followed(recipe) == Every(either=False, whole=0, several=[Path("a")])
    assert followed(recipe, "--either", "--whole", "7") == Every(either=True, whole=7, several=[Path("a")])


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("wole = 2", "no flag is called 'wole'; try whole"),
        ("recipe = 'x'", "no flag is called 'recipe'; try "),
        ("no-either = true", "no flag is called 'no-either'; try either"),
        # Flags are spelled as on the command line.
        ("several = ['a']", "no flag is called 'several'; try switch, either, whole, part, place, words, with"),
        ("switch = 1", "switch is 1, expected bool; mend the line"),
        ("switch = 'yes'", "switch is 'yes', expected bool; mend the line"),
        ("whole = '2'", "whole is '2', expected int; try 2, without quotes"),
        ("whole = true", "whole is true, expected int; mend the line"),
        ("whole = 2.0", "whole is 2.0, expected int; mend the line"),
        ("part = '0.5'", "part is '0.5', expected float; try 0.5, without quotes"),
        ("part = nan", "part is nan, expected float; mend the line"),
        ("part = -inf", "part is -inf, expected float; mend the line"),
        ("place = 3", "place is 3, expected str; try it in quotes, '3'"),
        ('place = "a\\u0000"', "; mend the line"),
        ("words = 3", "words is 3, expected str; try it in quotes, '3'"),
        ("words = 2020-01-01", "expected str; mend the line"),
        ("with = 'a'", "with is 'a', expected a list of str; mend the line"),
        ("with = ['a', 3]", "with is ['a', 3], expected a list of str; mend the line"),
    ],
)
def test_a_recipe_is_refused_by_its_name_its_flag_and_its_value(line: str, told: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(line + "\n")
    with pytest.raises(UsageError) as refused:
        followed(recipe)
    assert str(refused.value).startswith(f"recipe {recipe}: ") and told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_option_of_run_may_stand_in_a_recipe(tmp_path: Path) -> None:
    """But the recipe itself and a config; and with these values none is as it is without them."""
    samples: dict[Any, Any] = {bool: True, int: 3, float: 0.125, str: "x", Path: "x"}
    declared = inspect.signature(COMMANDS["run"].callback, eval_str=True).parameters
    plain = COMMANDS["run"].make_context("run", ["m", "-o", "o"]).params
    values: dict[str, Any] = {}
    for parameter in COMMANDS["run"].params:
        if parameter.name not in ("model", "recipe", "config"):
            kind = get_args(declared[parameter.name].annotation)[0]
            flag = parameter.opts[-1].removeprefix("--")
            values[flag] = next(value for each, value in samples.items() if each in (kind, *get_args(kind)))
    values["lowest-snr"] = 7
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps(values))
    found = COMMANDS["run"].make_context("run", ["m", "--recipe", str(recipe)]).params
    assert len(values) == len(found) - 3 > 30
    assert {name for name in found if found[name] == plain[name]} == {"model", "config"}
    assert found["lowest_snr"] == "7" and Path(found["held_out"]) == Path("x") and found["require_fit"] == 0.125


@pytest.mark.parametrize("name", packaged())
def test_a_packaged_recipe_is_one(name: str) -> None:
    found = COMMANDS["run"].make_context("run", ["m", "-o", "o", "--recipe", name]).params
    assert found["recipe"] == name and found["rule"] is not None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    make_model(folder / "m", "mixtral")
    (folder / "text.txt").write_text(TEXT)
    return folder / "m"


@pytest.mark.parametrize(
    ("lines", "words", "told"),
    [
        ("search: true\ntwo-sided: true", "", "a search tries plain cuts"),
        ("search: true", "--shrink frobenius", "a search tries plain cuts"),
        ("rule: mp-edge\nlimit: 3", "", "are for the leaderboard, which this run leaves out"),
        ("rule: 'data:energy:0.9'", "", "needs moments"),
        ("rule: mp-edge\nlowest-snr: 0", "", "--lowest-snr 0"),
        ("rule: mp-edge", "--lowest-snr 0", "--lowest-snr 0"),
        ("rule: ''", "", "no rule is called ''"),
        ("rule: mp-edge", "--rule=", "no rule is called ''"),
        ("search: true\nwindows: 0", "", "--windows 0 calibrates on the whole text"),
        ("rule: mp-edge\nworkers: 0", "", "0 workers do nothing"),
    ],
)
def test_what_a_recipe_gives_counts_as_given(
    lines: str, words: str, told: str, run: Run, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(lines)
    code, out, err = run("run", model, "-o", tmp_path / "o", "--recipe", tmp_path / "r.yaml", *words.split())
    assert (code, out) == (2, "") and told in err and err.count("\n") == 1 and not (tmp_path / "o").exists()


def test_a_recipe_may_ask_for_a_dry_run_and_for_json(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"rule: mp-edge\ndry-run: true\njson: true\nroles: q\noutput: {tmp_path / 'o'}\n")
    code, out, _ = run("run", model, "--recipe", tmp_path / "r.yaml")
    assert code == 0 and json.loads(out)["matrices"] == 3 and not (tmp_path / "o").exists()


@pytest.mark.parametrize(("line", "advised"), [("", True), ("workers: 1\n", False), ("dry-run: true\n", True)])
def test_what_a_recipe_gives_is_not_advised(
    line: str, advised: bool, run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    (tmp_path / "r.yaml").write_text("rule: 'rank:4'\n" + line)
    # Memory that runs out where the work is: a command takes no stand-in for it.
    for place in ("run_flow", "print_dry_run"):
        monkeypatch.setattr(f"laser.cli.run.{place}", fail)
    code, _, err = run("run", model, "-o", tmp_path / "out", "--recipe", tmp_path / "r.yaml")
    assert code == 1 and ("--workers 1" in err) == advised
    assert ("--resume" in err) == (line != "dry-run: true\n")
