"""Tab completion of values, for options that have only so many. It asks no library and opens no model.

A value with a colon is left out, as `data:energy` or `ray://`: bash cuts a word there, and zsh takes the rest for a
description.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

Vocabulary = Mapping[str, str] | Iterable[str]
Completer = Callable[[str], list[tuple[str, str]]]


def one_of(values: Vocabulary) -> Completer:
    """Completes one of these. values: with what zsh and fish say beside each, where they are a mapping."""
    told = dict(values) if isinstance(values, Mapping) else dict.fromkeys(values, "")

    def complete(incomplete: str) -> list[tuple[str, str]]:
        return [(value, told[value]) for value in told if value.startswith(incomplete)]

    return complete


def several_of(values: Vocabulary) -> Completer:
    """Completes the last of several with commas between; what is named already is not named again."""
    one = one_of(values)

    def complete(incomplete: str) -> list[tuple[str, str]]:
        before, comma, begun = incomplete.rpartition(",")
        there = before.split(",")
        return [(before + comma + value, told) for value, told in one(begun) if value not in there]

    return complete
