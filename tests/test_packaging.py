"""What is published: a wheel and an sdist are built off line, hold all that laser opens, and work where they lie."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from conftest import mixtral_config, mixtral_tensors, write_checkpoint_directory

import laser

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPENED = ("report/page.html", "report/card.md.jinja", "recipes/laser-rmt.toml", "py.typed")  # by name, when laser runs
OFF_LINE = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_CACHE_DIR": "1"}


def called(*words: object, cwd: Path, **more: str) -> str:
    """What a command prints, run without this tree on its path."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | OFF_LINE | more
    done = subprocess.run([str(w) for w in words], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Wheel and sdist, built of a copy: setuptools leaves folders where it builds."""
    folder = tmp_path_factory.mktemp("built")
    tree, out = folder / "tree", folder / "out"
    shutil.copytree(ROOT / "laser", tree / "laser", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]):
        shutil.copy(ROOT / name, tree)
    backend = "from setuptools import build_meta; build_meta.build_sdist('../out')"
    out.mkdir()
    called(sys.executable, "-c", backend, cwd=tree)
    [sdist] = out.glob("*.tar.gz")
    # The wheel is made of the sdist, as pip makes it where there is no wheel.
    build = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out, sdist)
    called(sys.executable, *build, cwd=folder)
    [wheel] = out.glob("*.whl")
    return wheel, sdist


def modules() -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / "laser").rglob("*.py")}


def test_both_hold_every_module_and_all_that_laser_opens(built: tuple[Path, Path]) -> None:
    wheel, sdist = built
    needed = modules() | {f"laser/{name}" for name in OPENED}
    with zipfile.ZipFile(wheel) as file:
        held = set(file.namelist())
    assert needed <= held and not [name for name in held if name.startswith(("tests", "benchmarks", "scripts"))]
    with tarfile.open(sdist) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    assert needed | {"pyproject.toml", "README.md", "LICENSE"} <= inside


def test_nothing_that_lies_beside_the_modules_is_left_out(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as file:
        held = {name for name in file.namelist() if name.startswith("laser/")}
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "laser").rglob("*") if path.is_file()}
    assert {name for name in there if "__pycache__" not in name} == held


def test_the_metadata_says_what_it_is(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as file:
        [name] = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        stated = Parser().parsestr(file.read(name).decode())
        [entries] = [file.read(n).decode() for n in file.namelist() if n.endswith("entry_points.txt")]
    assert (stated["Name"], stated["Version"], stated["License-Expression"]) == (
        "laser-rmt",
        PROJECT["version"],
        "Apache-2.0",
    )
    assert set(stated.get_all("Classifier", [])) == set(PROJECT["classifiers"]) and "LoRA" in stated["Keywords"]
    assert "# laser" in str(stated.get_payload()) and "laser = laser.__main__:main" in entries
    needed = [line.split(";")[0] for line in stated.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert any(line.startswith("pyyaml") for line in needed)


def test_every_library_that_is_always_needed_is_declared() -> None:
    """Of those that laser imports by name, and of these alone; the others are imported where they are asked for."""
    names = {"yaml": "pyyaml"}
    declared = {line.split(">")[0].split("[")[0] for line in PROJECT["dependencies"]}
    asked_for = {"matplotlib", "lm_eval", "datasets", "gguf", "ray", "bitsandbytes", "compressed_tensors", "pandas"}
    found: set[str] = set()
    for path in (ROOT / "laser").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            whole = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            whole += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {name.partition(".")[0] for name in whole}
    ours = found - set(sys.stdlib_module_names) - {"laser"} - asked_for
    assert {names.get(name, name) for name in ours} == declared


def test_the_wheel_works_where_nothing_else_of_laser_is(built: tuple[Path, Path], tmp_path: Path) -> None:
    target, here = tmp_path / "target", tmp_path / "here"
    here.mkdir()
    called(sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, built[0], cwd=here)
    write_checkpoint_directory(here / "m", mixtral_tensors(), mixtral_config())

    def run(*words: str) -> str:
        return called(sys.executable, "-m", "laser", *words, cwd=here, PYTHONPATH=str(target))

    where = called(sys.executable, "-c", "import laser; print(laser.__file__)", cwd=here, PYTHONPATH=str(target))
    assert Path(where.strip()).is_relative_to(target)
    assert run("--version") == f"laser {PROJECT['version']}\n"
    run("scan", "m", "-o", "s.safetensors", "--device", "cpu")
    laser.scan(laser.open_checkpoint(here / "m")).save(here / "t.safetensors")
    assert (here / "s.safetensors").read_bytes() == (here / "t.safetensors").read_bytes()
    run("report", "s.safetensors", "-o", "page.html")
    assert "<title>laser report" in (here / "page.html").read_text()
    run("run", "m", "-o", "out", "--recipe", "laser-rmt", "--device", "cpu")
    assert (here / "out" / "README.md").is_file()


def test_every_dependency_has_a_lower_bound_that_the_job_tries() -> None:
    """And what is pinned for development is not under it."""
    job = runpy.run_path(str(ROOT / "scripts" / "lower_bounds.py"))
    bounds = {name.lower(): version for name, version in job["declared"]().items()}
    extras = PROJECT["optional-dependencies"].values()
    wanted = {re.split(r"[\[<>=;]", each)[0] for each in (*PROJECT["dependencies"], *(e for es in extras for e in es))}
    assert bounds.keys() == {name.lower() for name in wanted} - {"laser-rmt"}
    pins = dict(line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().split())
    for name in bounds.keys() & pins.keys():
        assert as_numbers(pins[name]) >= as_numbers(bounds[name]), name
    assert bounds.keys() <= pins.keys()


def as_numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]
