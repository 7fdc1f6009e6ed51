"""Documentation that runs: the README's commands and Python, every verb described, help pages up to date."""

import re
import shlex
from pathlib import Path

import pytest

from laser.cli import app, main
from laser.spectral.rules import RULES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)
VERBS = [c.name or c.callback.__name__ for c in app.registered_commands if c.callback]


@pytest.mark.slow
def test_commands_of_the_readme_run_in_their_order(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every `$ laser` line of every console block, on a pico model that stands where the demo's model would."""
    (tmp_path / ".demo").mkdir()
    pico.rename(tmp_path / ".demo" / "mixtral")
    monkeypatch.chdir(tmp_path)
    lines = [line[2:] for kind, block in BLOCKS if kind == "console" for line in block.splitlines() if line[:2] == "$ "]
    commands = [shlex.split(line) for line in lines if line.startswith("laser ")]
    assert len(commands) >= 6
    for command in commands:
        code = main(command[1:])
        captured = capsys.readouterr()
        assert code == 0, f"{shlex.join(command)}: {captured.err}"
        assert captured.out, f"{shlex.join(command)} printed nothing"


def test_python_of_the_readme_runs(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".demo").mkdir()
    pico.rename(tmp_path / ".demo" / "mixtral")
    monkeypatch.chdir(tmp_path)
    blocks = [block for kind, block in BLOCKS if kind == "python"]
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_in_the_readme(verb: str) -> None:
    assert f"**laser {verb}**" in README


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_in_the_readme(rule: str) -> None:
    assert re.search(rf"^\| `{rule}(:[A-Z]+)?` \|", README, flags=re.M)


def test_every_path_of_the_contributing_page_is_there() -> None:
    """But for those that hold a word in capitals, which stands for a name."""
    named = re.findall(r"(?:laser|tests|scripts|benchmarks|docs)/[\w./-]+\w|\b[\w.]+\.(?:md|toml|txt)\b", CONTRIBUTING)
    paths = {path for path in named if not re.search(r"NAME|AREA", path)}
    assert len(paths) >= 15
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_every_module_is_in_the_contributing_page() -> None:
    tree = CONTRIBUTING.partition("<!-- tree -->")[2].partition("<!-- /tree -->")[0]
    room, named = "", set()
    for line in tree.splitlines():
        name = line[:25].strip()
        room = name if name.endswith("/") else room
        named |= {room + name} if name.endswith(".py") else set()
        assert not name.endswith(("/", ".py")) or line[25:].strip(), f"{name} says nothing"
    assert named == {str(p.relative_to(ROOT)) for p in (ROOT / "laser").rglob("*.py") if p.name != "__init__.py"}


def test_first_screen_shows_both_commands() -> None:
    first = "\n".join(README.splitlines()[:40])
    assert "bash scripts/demo.sh" in first and "bash scripts/test.sh" in first


@pytest.mark.slow
def test_every_script_that_the_readme_names_is_there() -> None:
    for path in set(re.findall(r"(?:scripts|benchmarks)/[\w.]+\.(?:py|sh)", README)):
        assert (ROOT / path).is_file(), path
