#!/usr/bin/env python3
"""Run the notebooks from top to bottom and store what they show in them.

    python scripts/run_notebooks.py [NOTEBOOK ...]

They read the demo's model (scripts/demo.sh makes it), or the checkpoint that LASER_MODEL names. Without arguments all
of notebooks/ are run. The order and time of execution are not stored.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
PLACE = re.compile(r"(?:/[\w.-]+)*/tmp[\w.-]*/")  # of this run alone


def executed(path: Path, model: str) -> Any:
    """The notebook with the outputs that it makes on `model`. What libraries warn of on stderr is dropped."""
    notebook = nbformat.read(path, as_version=4)
    os.environ |= {"LASER_MODEL": model, "PYTHONPATH": str(ROOT)}
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=600, record_timing=False, coalesce_streams=True, resources=where).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.get("outputs", ()):
            output.get("metadata", {}).clear()
            if "text" in output:
                output["text"] = PLACE.sub("", output["text"])
    notebook.metadata.get("language_info", {}).pop("version", None)
    return notebook


def main() -> None:
    model = str(Path(os.environ.get("LASER_MODEL", ROOT / ".demo" / "mixtral")).resolve())
    chosen = [Path(name) for name in sys.argv[1:]] or sorted((ROOT / "notebooks").glob("*.ipynb"))
    for path in chosen:
        path.write_text(nbformat.writes(executed(path, model)) + "\n")
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
