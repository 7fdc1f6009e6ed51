"""Recipes: files that hold nothing but the flags of `laser run`, so that a published model can be made by name."""

from __future__ import annotations

import math
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from laser.errors import RecordError, UsageError, first_line
from laser.files import read_regular
from laser.records import named

# flag -> type of its value, spelled as on the command line without the dashes
FLAGS: dict[str, type] = {
    "rule": str,
    "search": bool,
    "accept": str,
    "order": str,
    "lowest-snr": int,
    "shrink": str,
    "two-sided": bool,
    "require-fit": float,
    "layers": str,
    "roles": str,
    "include": str,
    "exclude": str,
    "method": str,
    "device": str,
}


def packaged() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(p.name.removesuffix(".toml") for p in resources.files("laser.recipes").iterdir() if ".toml" in p.name)


def load_recipe(name_or_file: str) -> dict[str, Any]:
    """The flags of a packaged recipe (by name) or of a TOML or YAML file. Roles that a model lacks are no error there.

    Raises UsageError for an unknown name or flag, RecordError for a file that cannot be parsed.
    """
    if name_or_file in packaged():
        text, suffix = (resources.files("laser.recipes") / f"{name_or_file}.toml").read_text(), ".toml"
    else:
        path = Path(name_or_file)
        if not path.exists() and not path.is_symlink():
            raise UsageError(f"no recipe {name_or_file!r}; try one of {', '.join(packaged())}, or a TOML or YAML file")
        try:
            text, suffix = read_regular(path).decode(), path.suffix
        except (OSError, ValueError) as error:
            raise RecordError(f"recipe {name_or_file} cannot be read ({first_line(error)}); mend it") from error
    import yaml  # comes with huggingface_hub; imported when met

    try:
        flags = yaml.safe_load(text) if suffix in (".yaml", ".yml") else tomllib.loads(text)
    # ValueError: of a date or a number that is none; the others: of what YAML's aliases can build.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise RecordError(f"recipe {name_or_file} cannot be parsed ({first_line(error)}); mend it") from error
    if not isinstance(flags, dict):
        raise RecordError(f"recipe {name_or_file} holds {type(flags).__name__}, expected flag = value lines")
    for flag, value in flags.items():
        if flag not in FLAGS:
            raise UsageError(f"recipe {name_or_file}: no flag is called {named(flag)}; try {', '.join(FLAGS)}")
        right = type(value) is FLAGS[flag] or (flag, value) == ("lowest-snr", "all")
        if not right or (isinstance(value, float) and not math.isfinite(value)):
            raise UsageError(
                f"recipe {name_or_file}: {flag} is {named(value)}, expected {FLAGS[flag].__name__}; mend the line"
            )
    return flags
