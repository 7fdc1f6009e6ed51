"""For the pages from docstrings: lines that say what a field or an argument is become a list, as they are meant."""

from __future__ import annotations

import re
from typing import Any

import griffe

# "name: what it is" or "one, other: ..." at the beginning of a line, and what follows it to the next or to a gap.
FIELDS = re.compile(r"^(\w+(?:, \w+)*): (?=\S)", flags=re.MULTILINE)


def as_list(text: str) -> str:
    """Paragraphs that begin with a field become lists, with code for the names."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        if FIELDS.match(paragraph):
            lines = FIELDS.sub(lambda m: "- " + ", ".join(f"`{n}`" for n in m[1].split(", ")) + ": ", paragraph)
            paragraph = "\n".join(
                line if line.startswith("- ") else f"    {line.strip()}" for line in lines.split("\n")
            )
        paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


class Fields(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_list(obj.docstring.value)
