"""How many ideas it takes to change laser: names, options, branches on the metric, frames down to LAPACK and the disk.

    python benchmarks/house.py [--smoke]

With --smoke it fails where a count is over its aim in MOST. Frames are counted in a run of one pass on a pico model,
from the worker's visit to `numpy.linalg.eigh` and from the writer's loop to the `write` of a tensor.
"""

from __future__ import annotations

import argparse
import ast
import collections
import inspect
import re
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import smoke

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
COMPARED = r"""(?:\bmetric|\.metric|metric_in\([^)]*\)) *(?:==|!=) *["'](?:plain|data)|(?<!def )\bby_data\("""
KNOWN = r"\b(?:moments|known|seen|tokens|calibration|fresh) is (?:not )?None"
PROSE = "|".join(
    (
        r"\b(?:why|reason|note|verdict)\.(?:startswith|rpartition|partition)\(",
        r"in (?:line|x)\.reason",
        r"re\.split\(\"\[:;\]\"",
        r"startswith\(\"not available\"",
    )
)


MOST = {
    "option declarations": 113,  # --config, --completion and --gradients came behind the house
    "names defined at the top of more than one module": 15,
    "branches on the metric": 6,
    "prose read as data": 0,
    "from the visit to eigh": 7,
    "from the writer to the write": 5,
}


def sources() -> dict[str, str]:
    """Path -> text of every module of laser."""
    return {str(p.relative_to(ROOT)): p.read_text() for p in sorted((ROOT / "laser").rglob("*.py"))}


def defined(text: str) -> set[str]:
    """The names that a module defines at its top."""
    found: set[str] = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        found |= {
            n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
    return found


def twice(texts: dict[str, str]) -> list[str]:
    """The names that more than one module defines at its top."""
    counts = collections.Counter(name for text in texts.values() for name in defined(text))
    return sorted(name for name, count in counts.items() if count > 1)


def lines_with(pattern: str, texts: dict[str, str]) -> list[str]:
    """Places, as file:line, that match."""
    return [
        f"{path}:{number}"
        for path, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(pattern, line)
    ]


def options_declared(texts: dict[str, str]) -> int:
    """Places where an option of the command line is declared."""
    return sum(len(re.findall(r"typer\.Option\(|= option\(", text)) for text in texts.values())


def depth_of(name: str) -> int:
    """How many calls of laser's own lie between the innermost frame called `name` and here."""
    frames = [f for f in inspect.stack()[2:] if f"{ROOT / 'laser'}" in f.filename or f.function == name]
    return next((i for i, f in enumerate(frames) if f.function == name), -1)


def frames() -> dict[str, int]:
    """Frames of laser from a worker's visit to LAPACK, and from the writer to the write."""
    import conftest  # first: it sets what the libraries read when they are imported
    from conftest import mixtral_config, mixtral_tensors, write_checkpoint_directory

    import laser
    from laser.checkpoint import shards
    from laser.flow import run_flow
    from laser.plan import Treatment, make_plan

    found: dict[str, int] = {}
    true, put_into = np.linalg.eigh, shards.put_into

    def eigh(*arguments: Any) -> Any:
        found["from the visit to eigh"] = max(found.get("from the visit to eigh", 0), depth_of("do"))
        return true(*arguments)

    def counted(file: Any, base: int) -> Any:
        def put(*arguments: Any) -> None:
            depth = depth_of("write_checkpoint") + 1  # with the `put` that this stands for
            found["from the writer to the write"] = max(found.get("from the writer to the write", 0), depth)
            true_put(*arguments)

        true_put = put_into(file, base)
        return put

    assert conftest
    with (
        tempfile.TemporaryDirectory() as folder,
        patch("numpy.linalg.eigh", eigh),
        patch.object(shards, "put_into", counted),
    ):
        source, out = Path(folder, "model"), Path(folder, "out")
        write_checkpoint_directory(source, mixtral_tensors(), mixtral_config())
        crew = laser.choose_crew("cpu", workers=1)
        run_flow(
            laser.open_checkpoint(source), out, laser.Selection(), lambda s: make_plan(s, "mp-edge"), crew=crew,
            treatment=Treatment("mp-edge"),
        )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked = smoke.parse(parser, lambda folder: ())
    texts = sources()
    found: dict[str, list[str] | int] = {
        "lines of laser/": sum(text.count("\n") for text in texts.values()),
        "modules of laser/": len(texts),
        "option declarations": options_declared(texts),
        "names defined at the top of more than one module": twice(texts),
        "branches on the metric": lines_with(COMPARED, texts),
        "lines that ask whether inputs are known": len(lines_with(KNOWN, texts)),
        "prose read as data": lines_with(PROSE, texts),
        **frames(),
    }
    for what, places in found.items():
        count = places if isinstance(places, int) else len(places)
        listed = "" if isinstance(places, int) or not places else f": {', '.join(places)}"
        print(f"{what} {count}{listed}")
        if asked.smoke and count > MOST.get(what, count):
            raise SystemExit(f"{what}: {count}, expected at most {MOST[what]}{listed}")


if __name__ == "__main__":
    main()
