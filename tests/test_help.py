"""Help pages: nothing is cut off, every option stands in a group, and every example is a command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from laser.cli import VERBS, app
from laser.cli.help import VALUE_FORMS, VERB_HELP

NAMES = [verb.__name__ for verb in VERBS]
EXAMPLES = [line for name in NAMES for line in VERB_HELP[name][1]]


def page(*words: str) -> str:
    return CliRunner().invoke(app, [*words, "--help"], prog_name="laser", env={"COLUMNS": "80"}).output


def test_no_summary_is_cut_off_in_a_terminal_of_80_columns() -> None:
    listed = page().partition("Commands:\n")[2].strip().splitlines()
    assert [line.split()[0] for line in listed] == NAMES == list(VERB_HELP)
    assert all(line.endswith(".") and "..." not in line for line in listed)


@pytest.mark.parametrize("verb", NAMES)
def test_a_page_ends_with_its_examples_and_lists_each_option_once(verb: str) -> None:
    text = page(verb)
    *_, last = re.split(r"^Examples?:\n", text, flags=re.M)
    assert [line.strip() for line in last.strip().splitlines()] == list(VERB_HELP[verb][1])
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    for parameter in command.params:
        if parameter.param_type_name == "option" and not parameter.hidden:
            assert len(re.findall(rf"^  (?:-\w, )?{parameter.opts[-1]}(?=[ \n])", text, re.M)) == 1, parameter.opts


@pytest.mark.parametrize("verb", ["", *NAMES])
def test_every_value_is_shown_by_its_form_and_no_line_is_too_long(verb: str) -> None:
    lines = page(*verb.split()).splitlines()
    assert not [line for line in lines if re.search(r"<\w+>|\bNone\b", line)]
    # Examples are one line each, however long, so that they can be copied.
    assert all(len(line) <= 80 for line in lines if not line.startswith("  laser ")), verb


def test_the_forms_are_of_options_that_are_there() -> None:
    there = {word for name in NAMES for p in typer.main.get_command(app).commands[name].params for word in p.opts}  # type: ignore[attr-defined]
    assert there >= VALUE_FORMS.keys()


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_is_a_command_line(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "OUT").mkdir()
    (tmp_path / "OUT" / "laser.yaml").write_text("rule: mp-edge\n")
    # A config is read where the command line is.
    monkeypatch.chdir(tmp_path)
    program, verb, *words = line.split()
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    assert program == "laser" and command.make_context(verb, words).params
