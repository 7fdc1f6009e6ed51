"""The notebooks run from top to bottom, on the demo's real weights where they are and on a pico model elsewhere."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="running notebooks needs nbformat, nbclient and ipykernel")
nbclient = pytest.importorskip("nbclient", reason="running notebooks needs nbformat, nbclient and ipykernel")
pytest.importorskip("ipykernel", reason="running notebooks needs nbformat, nbclient and ipykernel")
pytest.importorskip("matplotlib", reason='the pictures need the extra: pip install "laser-rmt[plot]"')

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the notebook machinery, not ours: the code runs in a process of its own
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs_and_shows_what_it_says(path: Path, pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ROOT / ".demo" / "mixtral"
    monkeypatch.setenv("LASER_MODEL", os.environ.get("LASER_MODEL", str(real if real.is_dir() else pico)))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    if any("from peft" in cell.source for cell in notebook.cells):
        pytest.importorskip("peft", reason="this notebook trains an adapter with peft")
    nbclient.NotebookClient(notebook, timeout=110, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_stripped_and_holds_no_logic(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    tree = ast.parse("\n".join(cell.source for cell in cells))
    assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef | ast.While) for node in ast.walk(tree))


def test_there_are_four() -> None:
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3", "4"]
