"""The notebooks run from top to bottom, on the demo's real weights where they are and on a pico model elsewhere."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from pico_language import make_model

nbformat = pytest.importorskip("nbformat", reason="running notebooks needs nbformat, nbclient and ipykernel")
nbclient = pytest.importorskip("nbclient", reason="running notebooks needs nbformat, nbclient and ipykernel")
pytest.importorskip("ipykernel", reason="running notebooks needs nbformat, nbclient and ipykernel")
pytest.importorskip("matplotlib", reason='the pictures need the extra: pip install "laser-rmt[plot]"')

ROOT = Path(__file__).parent.parent


executed = runpy.run_path(str(ROOT / "scripts" / "run_notebooks.py"))["executed"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the notebook machinery, not ours: the code runs in a process of its own
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs_and_shows_what_it_says(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ROOT / ".demo" / "mixtral"
    monkeypatch.setenv("LASER_MODEL", "")
    monkeypatch.setenv("PYTHONPATH", "")
    stored = nbformat.read(path, as_version=4)
    if any("from peft" in cell.source for cell in stored.cells):
        pytest.importorskip("peft", reason="this notebook trains an adapter with peft")
    again = executed(path, str(real if real.is_dir() else make_model(tmp_path / "m", "mixtral")))
    assert [kinds(cell) for cell in again.cells] == [kinds(cell) for cell in stored.cells]
    outputs = [output for cell in again.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)


def kinds(cell: Any) -> list[tuple[str, ...]]:
    """What a cell shows, without what it says: numbers are of the model and the machine."""
    return [(output.output_type, *sorted(output.get("data", {}))) for output in cell.get("outputs", ())]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_stored_with_its_outputs_and_holds_no_logic(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells) and any(cell.outputs for cell in cells)
    text, shown = path.read_text(), "".join(str(cell.outputs) for cell in cells)
    assert len(text) < 300_000
    assert not re.search(r"np\.float64|site-packages|/tmp/|/root/|/home/|Traceback", shown)
    assert "image/png" in shown
    tree = ast.parse("\n".join(cell.source for cell in cells))
    assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef | ast.While) for node in ast.walk(tree))


def test_there_are_five() -> None:
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3", "4", "5"]
