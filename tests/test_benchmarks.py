"""The scripts in benchmarks/ are whole: each is imported, and does its `--smoke`, a run of seconds with assertions."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
# A file that is started by its name; the others are what these share.
SCRIPTS = sorted(p.stem for p in FOLDER.glob("*.py") if '__name__ == "__main__"' in p.read_text())


@pytest.fixture(autouse=True)
def script_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_a_smoke(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    assert ended.value.code == 0 and "--smoke" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_smoke(name: str, tmp_path: Path) -> None:
    """In a process of its own, as it is started by hand: some start others, or say how much memory they took."""
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(FOLDER.parent)}
    words = [sys.executable, str(FOLDER / f"{name}.py"), "--smoke"]
    ended = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert not ended.returncode, ended.stdout[-2000:] + ended.stderr[-2000:]
    assert ended.stdout.strip(), "it says nothing"
    left = [path.name for path in tmp_path.iterdir() if not path.name.startswith("smoke-")]
    assert not left, f"it leaves files behind: {left}"
