"""The little Markdown that the reports need: tables and fences that no content can break out of."""

from __future__ import annotations

import re
from collections.abc import Sequence


def cell(text: object) -> str:
    """Plain text for a table cell: one line, no column breaks, no HTML."""
    line = " ".join(str(text).split())
    return line.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def code(text: object) -> str:
    """Inline code, also inside a table."""
    line = " ".join(str(text).split())
    return "`" + line.replace("`", "'").replace("|", "\\|") + "`" if line else ""


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows of ready cells (see `cell` and `code`); the columns numbered in `right` are aligned to the right."""
    rule = ["---:" if i in right else "---" for i in range(len(headings))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [headings, rule, *rows])


def fence(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{text.rstrip(chr(10))}\n{ticks}"
