#!/usr/bin/env python3
"""Write the table of docs/reference/families.md from a run on tiny models; tests/test_family_models.py checks it.

python scripts/render_families.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from families import END, START, everything, examine, table  # noqa: E402

PAGE = ROOT / "docs" / "reference" / "families.md"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [examine(family, Path(folder, family)) for family in everything()]
    text = PAGE.read_text()
    before, rest = text.split(START)
    PAGE.write_text(before + START + table(rows) + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
