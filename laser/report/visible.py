"""Names come with a model and can hold anything; how each medium shows them as they are, in one place.

`visible` is for terminals and comments, and comes first everywhere. `cell` and `code` in markdown.py are for Markdown,
`label` in plots.py for matplotlib, `visible` in page.html for the page.
"""

from __future__ import annotations


def visible(text: object) -> str:
    """Text on one line in which every character can be seen: others become their Python escapes.

    These are controls (a newline, the escape of a terminal's commands), marks that reverse what is read, blanks other
    than the space, lone surrogates and unassigned characters.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
