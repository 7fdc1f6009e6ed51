"""What the two readers of --unfrozen-yaml leave trainable, written from what they do.

axolotl reads YAML; behind a pattern it takes [i], [a:b], [a:] or [:b] for rows of the parameter, in what is left every
dot that no plus follows for a plain dot, and matches from the start of a name. Training scripts for Spectrum and
LaserRMT take what stands between "- " and the next "- " of each line that begins so, and match it as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import yaml


def by_axolotl(text: str, sizes: Mapping[str, int]) -> dict[str, set[int]]:
    """parameter -> rows left trainable; `sizes` has the first dimension of every parameter."""
    trained: dict[str, set[int]] = {}
    patterns = yaml.safe_load(text)["unfrozen_parameters"]
    for name, size in sizes.items():
        matched, rows = False, set()
        for pattern in patterns:
            found = re.match(r"^(?P<name>.+)\[(?P<start>[0-9]*)(?P<colon>:(?P<end>[0-9]*))?\]$", pattern)
            if not re.match(re.sub(r"\.(?!\+)", r"\\.", found["name"] if found else pattern), name):
                continue
            matched = True
            if found:
                start = int(found["start"] or 0)
                end = int(found["end"] or size) if found["colon"] else start + 1
                assert 0 <= start < end <= size
                rows |= set(range(start, end))
        if matched:
            trained[name] = rows or set(range(size))
    return trained


def by_scripts(text: str, names: Mapping[str, object]) -> set[str]:
    patterns = [line.split("- ")[1] for line in text.splitlines() if line.startswith("- ")]
    return {name for name in names if any(re.match(pattern, name) for pattern in patterns)}
