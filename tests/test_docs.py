"""Documentation that runs: the commands and Python of every page, links, pictures, and what is made from the code."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import mixtral_config, mixtral_tensors, write_checkpoint_directory
from hub_server import TOKEN, Hub, connect, serving
from huggingface_hub import close_session, constants
from pico_language import TEXT, write_tokenizer

import laser
import laser.errors
from laser.cli import app, main
from laser.spectral.rules import RULES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
LOG = ROOT / "docs" / "log"  # says what was run on its day, not what is to be run
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if LOG not in p.parents)]
GUIDE = "\n".join(path.read_text() for path in PAGES if path.parent.name == "guide")
VERBS = [c.name or c.callback.__name__ for c in app.registered_commands if c.callback]

FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
TITLE = re.compile(r'title="([^"]+)"')
# What stands before `laser` in a shell's line, and behind a command of it.
BEFORE = re.compile(r"^(?:nohup |srun )?")
BEHIND = re.compile(r"(?: > \S+)?(?: 2>&1)?(?: &)?$")
# Commands of other programs, which no test runs: installing, what makes the demo's model, and what only shows.
OTHERS = ("pip install ", "python3 -m venv ", "python scripts/", "bash scripts/", "tail ", "export ", "#")
BASE, DEMO = "mistralai/Mixtral-8x7B-Instruct-v0.1", ".demo/mixtral"


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path) -> Iterator[tuple[str, str, str]]:
    """Kind, title and text of every fenced block of a page."""
    for kind, info, text in FENCE.findall(path.read_text()):
        found = TITLE.search(info)
        yield kind, found.group(1) if found else "", text


def commands(kind: str, text: str) -> list[str]:
    """The lines of a block that somebody would type; of a console those behind the prompt."""
    lines = text.replace("\\\n", " ").splitlines()
    if kind == "console":
        return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip()] if kind == "bash" else []


def words_of(line: str) -> list[str] | None:
    """What `laser` is called with in a line of a shell; None where it calls something else."""
    bare = BEHIND.sub("", BEFORE.sub("", line.strip()))
    bare = bare.replace("$SLURM_ARRAY_TASK_ID", "1")
    return shlex.split(bare)[1:] if bare.startswith("laser ") else None


RUNS = [p for p in PAGES if any(words_of(line) for kind, _, text in blocks(p) for line in commands(kind, text))]
RUNS += [p for p in PAGES if p not in RUNS and any(kind == "python" for kind, _, _ in blocks(p))]


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages speak of, made once: the demo's model, its fine-tune by a merged adapter, texts and rows."""
    shelf = tmp_path_factory.mktemp("shelf")
    base = mixtral_tensors(seed=3)
    generator, tuned = torch.Generator().manual_seed(4), dict(base)
    for name, W in base.items():
        if "q_proj" in name or "v_proj" in name:
            A, B = torch.randn(2, W.shape[1], generator=generator), torch.randn(W.shape[0], 2, generator=generator)
            tuned[name] = (W.float() + 0.02 * (B @ A)).to(W.dtype)
    config = mixtral_config() | {"max_position_embeddings": 4096}
    for name, tensors in ((DEMO, base), ("my-mixtral", tuned)):
        write_tokenizer(write_checkpoint_directory(shelf / name, tensors, config))
    for i, name in enumerate(("train.txt", "held-out.txt", "wiki.test.raw")):
        (shelf / name).write_text(TEXT[7 * i :])
    (shelf / "support.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    row = {"option1": "ann", "option2": "eve", "answer": "1"}
    rows = [json.dumps({"sentence": f"ann met eve {i} times as _ was late."} | row) + "\n" for i in range(12)]
    (shelf / "rows").mkdir()
    (shelf / "rows" / "winogrande.jsonl").write_text("".join(rows))
    return shelf


@pytest.fixture
def desk(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own with all of the shelf in it."""
    shutil.copytree(shelf, tmp_path / "desk")
    monkeypatch.chdir(tmp_path / "desk")
    return tmp_path / "desk"


@pytest.fixture
def hub(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on the loopback that has the base, and on which somebody is logged in."""
    with serving() as server:
        server.add(BASE, shelf / DEMO)
        connect(server, tmp_path / "cache", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server
        close_session()


@pytest.mark.slow
@pytest.mark.parametrize("path", RUNS, ids=label)
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # within the Hub's client
def test_what_a_page_tells_to_type_runs(path: Path, desk: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """Every block in its order, in one folder: files by their title, `laser` lines, Python."""
    if "$ laser plot" in path.read_text():
        pytest.importorskip("matplotlib", reason='pictures need pip install "laser-rmt[plot]"')
    if "$ laser leaderboard" in path.read_text():
        pytest.importorskip("lm_eval", reason="the six tasks need pip install 'laser-rmt[eval]'")
    namespace: dict[str, Any] = {}
    for kind, title, text in blocks(path):
        if title:
            (desk / title).write_text(text)
        if kind == "python":
            exec(compile(text, label(path), "exec"), namespace)
        for line in commands(kind, text):
            words = words_of(line)
            if words is None:
                assert line.startswith(OTHERS), f"{line}: no test runs it"
                continue
            code = main(words)
            out, err = capsys.readouterr()
            assert code == 0, f"{line}: {err}"
            assert out, f"{line} printed nothing"


def test_every_how_to_has_commands() -> None:
    pages = [p for p in PAGES if p.parent.name == "how-to" and p.name != "index.md"]
    assert len(pages) >= 10 and set(pages) <= set(RUNS)


@pytest.mark.slow
def test_shown_output_of_the_readme_is_real(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Line by line, but for times; where the demo's model is there."""
    real = ROOT / DEMO
    if not real.is_dir():
        pytest.skip("needs the demo's model: python scripts/make_demo_model.py .demo/mixtral")
    monkeypatch.chdir(tmp_path)
    (tmp_path / DEMO).parent.mkdir()
    (tmp_path / DEMO).symlink_to(real)
    for text in (text for kind, _, text in blocks(ROOT / "README.md") if kind == "console"):
        for command in re.split(r"^\$ laser ", text, flags=re.MULTILINE)[1:]:
            line, *shown = command.splitlines()
            assert main(shlex.split(line)) == 0
            printed = capsys.readouterr().out
            for expected in shown:
                assert re.search(r"[\d.]+ s[ ;,]", expected) or expected in printed, expected


# --- README ---


def test_readme_is_short_and_begins_with_what_counts() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    first = "\n".join(lines[:40])
    assert "docs/images/histogram.svg" in first and "pip install" in first
    assert "bash scripts/demo.sh" in first and "bash scripts/test.sh" in first


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_in_the_guide(verb: str) -> None:
    assert f"## laser {verb}\n" in GUIDE and f"**laser {verb}** " in GUIDE


def test_which_rule_speaks_of_every_rule() -> None:
    page = (ROOT / "docs" / "how-to" / "which-rule.md").read_text()
    assert [rule for rule in RULES if not re.search(rf"`(data:)?{rule}(:[\w.]+)?`", page)] == []


# --- pages that speak of the code ---


def test_every_error_has_its_remedies() -> None:
    """And what a page quotes of messages is said somewhere in the code."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    classes = [
        name
        for name, kind in inspect.getmembers(laser.errors, inspect.isclass)
        if kind.__module__ == "laser.errors" and issubclass(kind, laser.LaserError | Warning)
    ]
    assert len(classes) >= 9
    assert [name for name in classes if f"\n## {name}\n" not in page] == []
    code = "\n".join(p.read_text() for p in (ROOT / "laser").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    tables = re.findall(r"\| the line says \|.*?\n\n", page, flags=re.DOTALL)
    quoted = [
        q
        for table in tables
        for row in table.strip().splitlines()[2:]
        for q in re.findall(r"`([^`]+)`", row.split("|")[1])
    ]
    assert len(quoted) >= 20
    assert [q for q in quoted if q not in code] == []


@pytest.mark.slow
def test_fields_of_files_are_those_that_are_written(shelf: Path, tmp_path: Path) -> None:
    """Every key of a record that a reduction leaves is in the page of files."""
    page = (ROOT / "docs" / "reference" / "files.md").read_text()
    documented = set(re.findall(r"`(?:source\.)?(\w+)`", page))
    checkpoint = laser.open_checkpoint(shelf / DEMO)
    spectra = laser.scan(checkpoint, laser.Selection(layers=(0,), roles=("q", "w1")))
    plan = laser.make_plan(spectra, "mp-edge", lowest_snr=1)
    outcome = laser.reduce(checkpoint, plan, tmp_path / "out")
    spectra.save(tmp_path / "s")
    data = (tmp_path / "s").read_bytes()
    header = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["laser"])
    keys = {*header, *header["source"], *plan.document(), *outcome.document()}
    keys |= {key for matrix in header["matrices"] for key in matrix}
    keys |= {key for line in plan.document()["lines"] for key in line}
    keys |= {key for found in outcome.document()["matrices"].values() for key in found}
    assert keys - documented == set()


def test_readme_counts_the_families() -> None:
    rows = (ROOT / "docs" / "reference" / "families.md").read_text().count("| verified |")
    for path in (ROOT / "README.md", ROOT / "docs" / "faq.md"):
        assert f"[{rows} families](" in path.read_text(), rows


@pytest.mark.slow
def test_example_of_the_package_runs(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only docstring with something to type, as the next test says."""
    monkeypatch.chdir(tmp_path)
    code = (laser.__doc__ or "").partition("\n\n")[2].replace("path/to/Mixtral-8x7B-Instruct-v0.1", str(shelf / DEMO))
    exec(compile(code, "laser/__init__.py", "exec"), {"laser": laser, "Path": Path})
    assert (tmp_path / "reduced" / "laser.json").is_file()


@pytest.mark.slow
def test_no_other_docstring_has_something_to_type() -> None:
    """An example that no test runs would be a promise that nobody keeps."""
    found = []
    for path in sorted((ROOT / "laser").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                lines = (ast.get_docstring(node) or "").splitlines()
                found += [label(path) for line in lines if re.match(r"\s*(>>> |\$ |laser [a-z]+ [A-Z-])", line)]
    assert found == []


def test_every_path_of_the_contributing_page_is_there() -> None:
    """But for those that hold a word in capitals, which stands for a name."""
    named = re.findall(r"(?:laser|tests|scripts|benchmarks|docs)/[\w./-]+\w|\b[\w.]+\.(?:md|toml|txt)\b", CONTRIBUTING)
    paths = {path for path in named if not re.search(r"NAME|AREA|DATE", path)}
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


# --- links, pictures, the built pages ---

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md", *sorted(LOG.glob("*.md"))], ids=label)
def test_links_lead_somewhere(path: Path) -> None:
    prose = FENCE.sub("", path.read_text())
    prose = re.sub(r"`[^`\n]*`", "", prose)
    for target in LINK.findall(prose):
        if not target.startswith(("http://", "https://")):
            file, _, anchor = target.partition("#")
            found = (path.parent / file).resolve() if file else path
            assert found.is_file(), f"{label(path)}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", found.read_text(), flags=re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}
                assert anchor in slugs, f"{label(path)}: {target}"


def test_scripts_that_pages_name_are_there() -> None:
    for path in PAGES:
        for script in set(re.findall(r"(?:scripts|benchmarks)/\w+\.(?:py|sh)", path.read_text())):
            assert (ROOT / script).is_file(), f"{label(path)}: {script}"


@pytest.mark.slow
def test_pictures_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """And tell when they are not."""
    pytest.importorskip("matplotlib", reason='pictures need pip install "laser-rmt[plot]"')
    monkeypatch.syspath_prepend(ROOT / "scripts")
    pictures = importlib.import_module("render_pictures")
    for name in pictures.PICTURES:
        kept = (pictures.IMAGES / f"{name}.svg").read_text()
        assert pictures.same(kept, pictures.drawn(name)), f"{name}.svg: run python scripts/render_pictures.py"
    assert pictures.same('<a x="1.25"/>', '<a x="1.26"/>')
    assert not pictures.same('<a x="1.25"/>', '<a x="9.25"/>')
    assert not pictures.same('<a x="1.25"/>', '<b x="1.25"/>')


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocstrings") is None, reason="needs pip install 'laser-rmt[docs]'")
def test_pages_are_built_strictly_and_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As scripts/docs.sh does, in a process of its own: mkdocs sets logging up for all."""
    import subprocess
    import sys

    quiet = {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(words, cwd=ROOT, env={**os.environ, **quiet}, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    loaded = re.compile(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(https?:)?//[^"]+"')
    for page in tmp_path.rglob("*.html"):
        text = page.read_text()
        assert not loaded.search(re.sub(r'<link rel="canonical"[^>]*>', "", text)), page.name
    api = (tmp_path / "reference" / "python.html").read_text()
    assert [name for name in laser.__all__ if name != "RULES" and f'id="laser.{name}"' not in api] == []
