"""Advice can be followed: every option and verb that a message, a help page or the documentation names is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from laser.cli import app

ROOT = Path(__file__).parent.parent
OPTIONS = {
    name: {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    for name, command in typer.main.get_command(app).commands.items()  # pyright: ignore[reportAttributeAccessIssue]
}
OF_EVERY_VERB = {"--debug", "--version", "--quiet", "--verbose", "--log-file", "--completion"}
KNOWN = set().union(*OPTIONS.values(), OF_EVERY_VERB)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z_-]*")
# `laser VERB`, and what belongs to it: until the sentence, the code or the command ends, or another begins.
CALL = re.compile(r"(?<![\w./-])laser ([a-z]+)\b((?:(?!\blaser |[;`|\n]|, |\. |\) | and | or ).)*)")
FOREIGN = re.compile(r"`(?!laser )[^`]*`|pip install [^;]*")  # commands of other programs stand in such marks
WORDS = {  # that follow `laser` where it is no command
    *(
        "cannot",
        "did",
        "does",
        "has",
        "is",
        "itself",
        "knows",
        "made",
        "model",
        "needs",
        "reader",
        "reads",
        "takes",
        "writes",
        "wrote",
    ),
}


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every string of a program but docstrings of its own code, an f-string as one with its values as *."""
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            inside.add(id(node.body[0].value))  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(node, ast.JoinedStr):
            inside |= {id(value) for value in node.values}
            yield node.lineno, "".join(str(v.value) if isinstance(v, ast.Constant) else "*" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.lineno, node.value


def wrong(text: str) -> list[str]:
    """What a text names that the command line does not have."""
    found = []
    for verb, rest in CALL.findall(text):
        if verb in OPTIONS:
            found += [f"laser {verb} {flag}" for flag in FLAG.findall(rest) if flag not in OPTIONS[verb]]
        elif verb not in WORDS:
            found.append(f"laser {verb}")
    return found


SOURCES = sorted((ROOT / "laser").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(ROOT)) for p in SOURCES])
def test_a_program_names_what_is_there(path: Path) -> None:
    faults = [
        f"{path.name}:{line}: {fault}" for line, text in texts(ast.parse(path.read_text())) for fault in wrong(text)
    ]
    assert not faults


@pytest.mark.slow
def test_options_in_messages_are_there() -> None:
    faults = []
    for path in SOURCES:
        for line, text in texts(ast.parse(path.read_text())):
            own = FOREIGN.sub("", text)
            faults += [f"{path.name}:{line}: {flag}" for flag in FLAG.findall(own) if flag not in KNOWN]
    assert not faults


def test_a_verb_s_own_messages_name_its_own_options() -> None:
    faults = []
    for path in sorted((ROOT / "laser" / "cli").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name in OPTIONS:
                for line, text in texts(node):
                    own = CALL.sub("", text)
                    faults += [
                        f"{path.name}:{line}: laser {node.name} {flag}"
                        for flag in FLAG.findall(own)
                        if flag not in OPTIONS[node.name]
                    ]
    assert not faults


# Modules of which several verbs say what went wrong, and those verbs.
SHARED_BY = {
    "evaluation/leaderboard.py": ("leaderboard", "run"),
    "evaluation/lm_tasks.py": ("leaderboard", "run"),
    "searching/search.py": ("search", "run"),
    "searching/candidates.py": ("search", "run"),
    "spectral/rules.py": ("plan", "run", "search", "null"),
}


@pytest.mark.parametrize("name", SHARED_BY)
def test_what_several_verbs_say_names_options_that_all_of_them_have(name: str) -> None:
    """Or the verb that has it; what begins with an option speaks to who gave it."""
    faults = []
    for line, text in texts(ast.parse((ROOT / "laser" / name).read_text())):
        own = CALL.sub("", FOREIGN.sub("", text))
        for verb in SHARED_BY[name] if not own.startswith("--") else ():
            faults += [f"{name}:{line}: laser {verb} {f}" for f in FLAG.findall(own) if f not in OPTIONS[verb]]
    assert not faults


# But for the log, which says what was typed on its day.
DOCUMENTS = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.parent.name != "log")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=[p.name for p in DOCUMENTS])
def test_documentation_names_what_is_there(path: Path) -> None:
    text = path.read_text().replace("\\\n", " ")
    assert not wrong(text)
