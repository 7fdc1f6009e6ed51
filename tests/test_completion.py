"""Tab completion: the scripts that `laser --completion SHELL` prints, and what the command answers to them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from conftest import Run
from test_options import COMMANDS
from test_start import HEAVY

from laser.checkpoint.families import FAMILIES
from laser.choices import ACCEPT, ROLES
from laser.cli import SHELLS, VERBS
from laser.cli.recipe import packaged
from laser.differences.formulas import FORMULA_NAMES
from laser.evaluation.lm_tasks import TASKS
from laser.evaluation.text import MODES
from laser.report.plots import QUANTITIES
from laser.searching.candidates import ORDERS
from laser.spectral.devices import PRECISIONS
from laser.spectral.factorise import METHODS
from laser.spectral.permutation import PERMUTATIONS
from laser.spectral.rules import RULES
from laser.spectral.shrinkage import SHRINKERS

CODE = "from laser.__main__ import main; main()"


def answered(shell: str, line: str) -> list[str]:
    """What the command answers where Tab is pressed at the end of a line, for one of the shells' scripts."""
    words = line.split(" ")
    asked = {"_LASER_COMPLETE": f"complete_{shell}", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    asked |= {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    code = f"import atexit, sys; atexit.register(lambda: print([n for n in {HEAVY} if n in sys.modules])); {CODE}"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, timeout=60
    )
    *told, heavy = done.stdout.splitlines()
    assert (done.returncode, done.stderr, heavy) == (0, "", "[]")
    return told


@pytest.mark.parametrize("shell", SHELLS)
def test_verbs_and_options_are_completed_without_a_library(shell: str) -> None:
    verbs, options = "\n".join(answered(shell, "laser ")), "\n".join(answered(shell, "laser scan --l"))
    assert all(verb.__name__ in verbs for verb in VERBS)
    assert "--layers" in options and "--roles" not in options


LINES = {
    "laser run --rule mp": ["mp-edge", "mp-median", "mp-iqr"],
    "laser spectra --rule gav": ["gavish-donoho"],
    "laser null --rules laser-rmt,be": ["laser-rmt,bema"],
    "laser scan --roles q,w": ["q,w1", "q,w2", "q,w3"],
    "laser eval --dtype ": ["float32", "bfloat16"],
    "laser scan --device c": ["cuda", "cpu"],
    "laser reduce --engine ": ["threads", "ray"],
}


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=[pytest.mark.slow] * (n > 0)) for n, line in enumerate(LINES)]
)
def test_values_are_completed_without_a_library(shell: str, line: str) -> None:
    """Every one, and no other; zsh and fish get some words beside them."""
    told = "\n".join(answered(shell, line)).removeprefix("_arguments '*: :((")
    first = r'^"([^"]+)"' if shell == "zsh" else r"^(\S+)"
    assert re.findall(first, told, re.MULTILINE) == LINES[line]


# Option -> what it takes, by the tables of those who read it, which completion does not import.
TAKES: dict[str, Iterable[str]] = {
    **{"rule": RULES, "rules": RULES, "shrink": SHRINKERS, "accept": ACCEPT, "order": ORDERS, "mode": MODES},
    **{"precision": PRECISIONS, "method": ("auto", *METHODS), "permute": PERMUTATIONS, "formula": FORMULA_NAMES},
    **{"heat": QUANTITIES, "tasks": TASKS, "recipe": packaged(), "roles": ROLES, "lowest_snr": ("all",)},
    **{"engine": ("threads", "ray"), "objective": ("loss", "accuracy")},
}
IN_HELP = ("device", "dtype")  # what each verb says that it takes


@pytest.mark.parametrize("verb", COMMANDS)
def test_values_are_those_that_the_verb_takes(verb: str) -> None:
    context = COMMANDS[verb].make_context(verb, [], resilient_parsing=True)
    for option in COMMANDS[verb].params:
        found = option.shell_complete(context, "")
        names = [item.value for item in found if item.type == "plain"]
        assert all(isinstance(item.help or "", str) for item in found)
        if option.name in TAKES:
            assert names == list(TAKES[option.name]), option.name
        elif option.name in IN_HELP:
            assert names and all(name in option.help for name in names), option.name
        else:
            assert not names, option.name


def test_roles_are_those_of_the_families() -> None:
    rows = [row for rows in FAMILIES.values() for row in rows]
    found = {row.role for row in rows} | {part.partition("=")[0] for row in rows for part in row.parts}
    assert set(ROLES) >= found - {"ssm"} and len(set(ROLES)) == len(ROLES)


@pytest.mark.slow
def test_a_file_is_completed_by_the_shell_itself() -> None:
    assert "".join(answered("bash", "laser plan spec")) == "" == "".join(answered("bash", "laser scan m -o spec"))


@pytest.mark.slow
@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_is_for_the_command(shell: str, run: Run) -> None:
    code, script, err = run("--completion", shell)
    assert (code, err) == (0, "") and f"_LASER_COMPLETE=complete_{shell}" in script
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=script, text=True, check=True, timeout=60)


@pytest.mark.slow
def test_bash_completes_by_the_script(run: Run, tmp_path: Path) -> None:
    command = tmp_path / "laser"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{CODE}" "$@"\n')
    command.chmod(0o755)
    lines = (run("--completion", "bash")[1], "complete -p laser", "COMP_WORDS=(laser re) COMP_CWORD=1")
    script = "\n".join((*lines, "_laser_completion laser", 'echo "${COMPREPLY[@]}"'))
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash"], input=script, env={**os.environ, **path}, capture_output=True, text=True, timeout=60
    )
    how, found = done.stdout.splitlines()
    assert "-F _laser_completion laser" in how and "-o default" in how  # files, where it finds nothing
    assert found.split() == ["reduce", "report", "rebuild"] and not done.stderr


def test_another_shell_is_refused(run: Run) -> None:
    code, out, err = run("--completion", "tcsh")
    assert (code, out) == (2, "") and "no script completes for 'tcsh'; try --completion bash, zsh, fish" in err
