"""The scripts in benchmarks/ are whole: each is imported, and the quick ones do their `--smoke` in this process.

The others start processes of their own or take longer than a test should: run them by hand, as
`python benchmarks/NAME.py --smoke`, after a change to what they measure.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
# A file that is started by its name; the others are what these share.
SCRIPTS = sorted(p.stem for p in FOLDER.glob("*.py") if '__name__ == "__main__"' in p.read_text())
QUICK = ("bench_decomposition", "bench_identity", "bench_null", "check_against_numpy", "check_ranks")


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
@pytest.mark.parametrize("name", QUICK)
def test_smoke(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--smoke"])
    try:
        code = importlib.import_module(name).main()
    except SystemExit as ended:
        code = ended.code
    assert not code
    assert capsys.readouterr().out.strip(), "it says nothing"
    assert all(path.name.startswith("smoke-") for path in tmp_path.iterdir()), "it leaves files behind"
