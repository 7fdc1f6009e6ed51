"""Recipes: files that hold nothing but options of `laser run`, so that a published model can be made by name."""

from __future__ import annotations

import inspect
import math
import tomllib
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import typer
from typer.models import OptionInfo

from laser.cli import common
from laser.errors import RecordError, UsageError, first_line
from laser.files import read_regular
from laser.records import named


def packaged() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(p.name.removesuffix(".toml") for p in resources.files("laser.recipes").iterdir() if ".toml" in p.name)


def follow(ctx: typer.Context, recipe: str | None) -> str | None:
    """What --recipe does: its values are the defaults of this command line, whose own options win over them.

    Raises UsageError for an option that the verb does not have, or a value that it does not take.
    """
    if recipe is None:
        return None
    options = {
        word.removeprefix("--"): option
        for option in ctx.command.params
        if option.param_type_name == "option" and not option.is_eager
        for word in option.opts
        if word.startswith("--")
    }
    declared = inspect.signature(ctx.command.callback, eval_str=True).parameters if ctx.command.callback else {}
    ctx.default_map = {}
    for flag, value in load_recipe(recipe).items():
        if flag not in options:
            raise UsageError(f"recipe {recipe}: no flag is called {named(flag)}; try {', '.join(options)}")
        option = options[flag]
        kinds = _kinds(declared[option.name].annotation)
        if not any(_is(value, kind) for kind in kinds):
            expected = " or ".join(_kind_word(kind) for kind in kinds)
            raise UsageError(f"recipe {recipe}: {flag} is {named(value)}, expected {expected}; mend the line")
        try:
            option.process_value(ctx, value)  # as click does it with what a default map holds
        except typer.BadParameter as error:
            message = first_line(error)
            raise UsageError(f"recipe {recipe}: {flag} is {named(value)} ({message}); mend the line") from error
        ctx.default_map[option.name] = value
        common.give(option.secondary_opts if value is False else [f"--{flag}", str(value)])
    return recipe


def _kinds(annotation: Any) -> list[Any]:
    """The kinds of value that an option has in a recipe: its own, or those that `options.option` names for recipes."""
    own, *stated = get_args(annotation)
    kinds = next((each for each in stated if each is not None and not isinstance(each, OptionInfo)), own)
    several = (kinds,) if get_origin(kinds) in (None, list, Literal) else get_args(kinds)
    return [kind for kind in several if kind is not NoneType]


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is(each, get_args(kind)[0]) for each in value)
    if kind is Path:
        return isinstance(value, str)
    return type(value) is kind and not (kind is float and not math.isfinite(value))  # True is an int to isinstance


def _kind_word(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) is list:
        return f"a list of {_kind_word(get_args(kind)[0])}"
    return "str" if kind is Path else kind.__name__


def load_recipe(name_or_file: str) -> dict[Any, Any]:
    """What a packaged recipe (by name) or a TOML or YAML file says, unchecked.

    Raises UsageError for an unknown name, RecordError for a file that cannot be parsed.
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
    import yaml  # comes with huggingface_hub; imported when needed

    try:
        flags = yaml.safe_load(text) if suffix in (".yaml", ".yml") else tomllib.loads(text)
    # ValueError: of a date or a number that is none; the others: of what YAML's aliases can build.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise RecordError(f"recipe {name_or_file} cannot be parsed ({first_line(error)}); mend it") from error
    if not isinstance(flags, dict):
        raise RecordError(f"recipe {name_or_file} holds {type(flags).__name__}, expected flag = value lines")
    return flags
