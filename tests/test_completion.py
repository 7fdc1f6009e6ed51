"""Tab completion: the scripts that `laser --completion SHELL` prints, and what the command answers to them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Run
from test_start import HEAVY

from laser.cli import SHELLS, VERBS

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
