#!/usr/bin/env python3
"""Count the words of the documentation's sentences; fail where a document is hard to read.

python scripts/words.py            README.md, CONTRIBUTING.md, docs/ but for its log, and the help pages
python scripts/words.py --source   list long sentences in the docstrings and comments of laser/; never fails
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from inspect import cleandoc
from itertools import pairwise
from pathlib import Path

import typer.main
from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
MOST_ON_AVERAGE, MOST = 18, 40

# A point, and what may close after it, before a space and what a sentence may begin with. A dot inside of a number or a
# file's name has no space behind it, and one before a small letter ends nothing.
END = re.compile(r"[.!?][)\]\"'*_]*\s+(?=[(\[\"'*_]*[`A-Z0-9])")
ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|cf|vs|Fig|Eq|No|Dr|al)\.$")
FIELD = re.compile(r"^(\w+(?:, \w+)*: )", flags=re.MULTILINE)  # a line of a docstring that says what a field is
MARKDOWN = MarkdownIt("commonmark").enable("table")


@dataclass(frozen=True)
class Sentence:
    place: str  # FILE:LINE, or the command and option whose help it is
    text: str
    alone: bool = False  # a heading, a table cell, an option's help: no prose, so not in the average

    @property
    def words(self) -> int:
        """Marks alone, such as ± and |, are none."""
        return sum(any(c.isalnum() for c in word) for word in self.text.split())


def split(text: str) -> Iterator[tuple[int, str]]:
    """The sentences of one paragraph, each with the number of lines before it."""
    ends = [m.end() for m in END.finditer(text) if not ABBREVIATION.search(text[: m.start() + 1])]
    for start, end in pairwise([0, *ends, len(text)]):
        yield text[:start].count("\n"), " ".join(text[start:end].split())


def sentences(markdown: str, name: str, first_line: int = 1) -> Iterator[Sentence]:
    """Of every paragraph and list item; a heading and a table cell are one each. Code blocks and HTML are none."""
    opener, line = "", 0
    for token in MARKDOWN.parse(markdown):
        line = token.map[0] if token.map else line
        if token.type != "inline":
            opener = token.type
        elif token.content and opener == "paragraph_open":
            for before, text in split(token.content):
                yield Sentence(f"{name}:{first_line + line + before}", text)
        elif token.content:
            yield Sentence(f"{name}:{first_line + line}", token.content, alone=True)


def help_pages() -> Iterator[Sentence]:
    from laser.cli import app

    program = typer.main.get_command(app)
    for verb, command in {"": program, **program.commands}.items():  # pyright: ignore[reportAttributeAccessIssue]
        place = f"laser {verb}".strip()
        for sentence in sentences(cleandoc(command.help or ""), place):
            yield Sentence(place, sentence.text)
        for parameter in command.params:
            for _, text in split(getattr(parameter, "help", None) or ""):
                yield Sentence(f"{place} {max(parameter.opts, key=len)}", text, alone=True)


def source(path: Path, name: str) -> Iterator[Sentence]:
    """Of the docstrings and of the comments of a module; comments on adjacent lines are one text."""
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if docstring := ast.get_docstring(node):
                yield from sentences(FIELD.sub(r"- \1", docstring), name, node.body[0].lineno)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {t.start[0]: t for t in tokens if t.type == tokenize.COMMENT}
    block: list[str] = []
    for line in sorted(comments):
        block.append(comments[line].string.lstrip("# "))
        if line + 1 not in comments or comments[line + 1].start[1] != comments[line].start[1]:
            for before, sentence in split("\n".join(block)):
                yield Sentence(f"{name}:{line - len(block) + 1 + before}", sentence)
            block = []


def long(found: Iterable[Sentence]) -> list[str]:
    return [f"{s.place}: {s.words} words: {s.text[:60]}..." for s in found if s.words > MOST]


def check(name: str, found: list[Sentence]) -> tuple[str, list[str]]:
    """A row of the table, and what is wrong with a document."""
    prose = [s.words for s in found if not s.alone]
    average = sum(prose) / max(len(prose), 1)
    faults = long(found)
    if average > MOST_ON_AVERAGE:
        faults.append(f"{name}: {average:.1f} words a sentence, over {MOST_ON_AVERAGE}; try to split its sentences")
    return f"{name:34} {len(prose):9} {average:8.1f} {max((s.words for s in found), default=0):8}", faults


def documents() -> dict[str, list[Sentence]]:
    pages = sorted(p for p in (ROOT / "docs").rglob("*.md") if p.parent.name != "log")  # whose prose is as it was
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *pages]
    names = {str(p.relative_to(ROOT)): p for p in paths}
    return {n: list(sentences(p.read_text(), n)) for n, p in names.items()} | {"help pages": list(help_pages())}


def main() -> None:
    if "--source" in sys.argv:
        for path in sorted((ROOT / "laser").rglob("*.py")):
            for fault in long(source(path, str(path.relative_to(ROOT)))):
                print(fault)
        return
    faults = []
    print(f"{'document':34} {'sentences':>9} {'average':>8} {'longest':>8}")
    for name, found in documents().items():
        row, wrong = check(name, found)
        print(row)
        faults += wrong
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
