"""The house rules that a machine can check, besides who imports whom (lint-imports, by the contracts in pyproject)."""

import ast
import tomllib
from pathlib import Path

import pytest

import laser

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "laser"
FILES = sorted(PACKAGE.rglob("*.py"))


def test_files_say_what_they_are() -> None:
    texts = {path: path.read_text() for path in FILES}
    assert not [path for path, text in texts.items() if text and not ast.get_docstring(ast.parse(text))]


def test_only_one_file_says_mps_and_the_methods_call_linalg() -> None:
    assert [p.name for p in FILES if '"mps"' in p.read_text()] == ["choices.py", "devices.py"]
    callers = [p.name for p in FILES if "torch.linalg." in p.read_text().replace("`torch.linalg", "")]
    found = ["correction.py", "data_metric.py", "factorise.py", "gram.py", "projector.py", "spectrum.py"]
    assert callers == ["solver.py", *found]


def test_a_wheel_has_every_file_that_is_no_module() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["laser"]
    there = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert there == {path for pattern in patterns for path in PACKAGE.glob(pattern)}


def test_exported_names_are_sorted_and_there() -> None:
    assert laser.__all__ == sorted(laser.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    assert all(hasattr(laser, name) and getattr(laser, name).__doc__ for name in laser.__all__ if name != "RULES")
    assert set(laser.__all__) <= set(dir(laser))
    with pytest.raises(AttributeError, match="no attribute 'scann'"):
        _ = laser.scann


def test_what_is_imported_when_asked_for_is_what_type_checkers_read() -> None:
    """laser/__init__.py says of every name where it is in two places; a type checker reads only one of them."""
    (block,) = [node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If)]
    read = {
        f"{node.module}.{alias.name}"
        for node in block.body
        for alias in getattr(node, "names", ())
        if isinstance(node, ast.ImportFrom)
    }
    assert read == {f"laser.{home}.{name}" for home, names in laser._HOMES.items() for name in names}
    assert sorted(name.rpartition(".")[2] for name in read) == sorted(laser.__all__)


def test_everything_for_people_is_printed_in_one_place() -> None:
    """`say` escapes what names may hold; a print elsewhere would hand them to the terminal as they are."""
    calls = [
        (path.name, node.lineno)
        for path in sorted((PACKAGE / "cli").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "typer.echo", "sys.stderr.write")
    ]
    assert [name for name, _ in calls] == ["common.py"], calls
