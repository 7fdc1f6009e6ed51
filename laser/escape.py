"""Names come with a model and can hold anything; how they are shown as they are on a terminal and in Markdown.

`visible` comes first everywhere. `label` in report/plots.py does the same for matplotlib, `visible` in page.html for
the page.
"""

from __future__ import annotations

import re


def visible(text: object) -> str:
    """Text on one line in which every character can be seen: others become their Python escapes.

    These are controls (a newline, the escape of a terminal's commands), marks that reverse what is read, blanks other
    than the space, lone surrogates and unassigned characters.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def shown_value(found: object) -> str:
    """What a table for people shows of a value: a float in four digits, a dash for None."""
    if found is None:
        return "-"
    return f"{found:.4g}" if isinstance(found, float) else visible(found)


def cell(text: object) -> str:
    """Plain text for a table cell or a heading: one line that shows what it says; nothing for None."""
    line = visible(" ".join("" if text is None else str(text).split()))
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace("`", "'")
    line = re.sub(r"[\\|*~$#]|\[(?=.*\])", r"\\\g<0>", line)
    # An underscore inside a word is plain: acc_norm.
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)


def code(text: object) -> str:
    """Inline code, also inside a table; nothing for None."""
    line = visible("" if text is None else text).strip().replace("`", "'")
    # GitHub takes backslashes before a bar in pairs, and after an even number of them the bar ends the cell.
    line = re.sub(r"(\\*)\|", lambda m: m[1] + "\\" * (1 + len(m[1]) % 2) + "|", line)
    return f"`{line}`" if line else ""


def fence(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks in it."""
    text = "".join(c if c in "\n\t" else visible(c) for c in text.replace("\r\n", "\n").rstrip("\n"))
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"
