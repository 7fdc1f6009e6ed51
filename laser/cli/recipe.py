"""Files of options: recipes, which `laser run` follows by name, and what --config names, which every verb takes.

The command line wins over a config, a config over a recipe, a recipe over the defaults. YAML is read more strictly than
its readers do: what would be lost or read as another value is refused, as anchors, merged maps, and 1:30 for 90.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import typer
from typer.models import OptionInfo

from laser.cli import common
from laser.errors import RecordError, UsageError, first_line
from laser.escape import visible
from laser.files import read_regular
from laser.records import named

# Of no use to whoever makes the same again: where it went, and how it got there.
PASSING_OPTIONS = ("config", "recipe", "output", "resume", "force", "dry-run", "json", "part")
PLAIN_NUMBER = re.compile(r"[-+]?(?:0|[1-9]\d*)?(?:\.\d*)?(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|nan)", re.IGNORECASE)


def packaged() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(p.name.removesuffix(".toml") for p in resources.files("laser.recipes").iterdir() if ".toml" in p.name)


def follow(ctx: typer.Context, recipe: str | None) -> str | None:
    """What --recipe does: its values are the defaults of this command line, whose own options win over them.

    Raises UsageError for an option that the verb does not have, or a value that it does not take.
    """
    if recipe is not None:
        values = _defaults_of(ctx, load_recipe(recipe), f"recipe {recipe}", ("recipe", "config"))
        ctx.default_map = values | dict(ctx.default_map or {})
    return recipe


def configure(ctx: typer.Context, config: Path | None) -> Path | None:
    """What --config does: the same, and its values win over a recipe's, which it may name. Raises as `follow`."""
    if config is not None:
        where = f"config {config}"
        values = _defaults_of(
            ctx,
            _options_in(_text_of_options(config, where), config.suffix.lower() != ".toml", where),
            where,
            ("config",),
        )
        ctx.default_map = dict(ctx.default_map or {}) | values
    return config


def resolved(options: Mapping[str, Any], found: Mapping[str, Any], model: str) -> bytes:
    """The file of options that makes the same again, as --config reads it.

    options: by their names, as they were given; found: what became of those that depend on others. Those that are not
    set are left out, and so are PASSING_OPTIONS.
    """
    import yaml

    kept = {name: value for name, value in (dict(options) | dict(found)).items() if value is not None}
    plain = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in kept.items()
        if name not in PASSING_OPTIONS
    }
    heading = "# The options that made this model, defaults too: "
    heading += f"laser run {visible(shlex.quote(model))} -o OUT --config laser.yaml\n"
    return (heading + yaml.safe_dump(plain, sort_keys=False)).encode()


def _defaults_of(
    ctx: typer.Context, document: Sequence[tuple[Any, Any]], where: str, without: Sequence[str]
) -> dict[str, Any]:
    """A file's values by the names of the verb's parameters. without: the options that it may not give."""
    options = {
        word.removeprefix("--"): option
        for option in ctx.command.params
        if option.param_type_name == "option" and option.name not in without
        for word in option.opts
        if word.startswith("--")
    }
    declared = inspect.signature(ctx.command.callback, eval_str=True).parameters if ctx.command.callback else {}
    found: dict[str, Any] = {}
    for key, value in document:
        flag = key.replace("_", "-") if isinstance(key, str) else key
        if not isinstance(flag, str) or flag not in options:
            if isinstance(flag, str) and flag.startswith("no-") and (on := flag.removeprefix("no-")) in options:
                raise UsageError(f"{where}: no flag is called {named(key)}; try {on}: false")
            near = difflib.get_close_matches(str(flag)[:99], options, 1) or list(options)
            raise UsageError(f"{where}: no flag is called {named(key)}; try {', '.join(near)}")
        option = options[flag]
        if option.name in found:
            raise UsageError(f"{where}: {flag} is given twice; leave one of the lines")
        kinds = _kinds(declared[option.name].annotation)
        if not any(_is(value, kind) for kind in kinds):
            expected = " or ".join(_kind_word(kind) for kind in kinds)
            raise UsageError(f"{where}: {flag} is {named(value)}, expected {expected}; {_how_to_write(value, kinds)}")
        try:
            option.process_value(ctx, value)  # as click does it with what a default map holds
        except (typer.BadParameter, ValueError) as error:  # ValueError: of a path with a NUL, by typer 0.19
            message = first_line(error)
            raise UsageError(f"{where}: {flag} is {named(value)} ({message}); mend the line") from error
        found[option.name] = value
        common.give(_command_words(option, flag, value), config="recipe" not in without)
    return found


def _command_words(option: Any, flag: str, value: Any) -> list[str]:
    """An option and its value as a command line has them; a flag that is off and has no word for it is none."""
    if isinstance(value, bool):
        return [f"--{flag}"] if value else list(option.secondary_opts)
    return [word for each in (value if isinstance(value, list) else [value]) for word in (f"--{flag}", str(each))]


def _how_to_write(value: Any, kinds: Sequence[Any]) -> str:
    """How to write a value that has another type than its option."""
    if isinstance(value, dict):
        return "try one option a line, with no map below it"
    texts = {str, Path} & set(kinds)
    if isinstance(value, list) and texts and all(isinstance(each, str | int) for each in value):
        return f"try {','.join(map(str, value))}"
    if type(value) in (int, float) and texts:
        return f"try it in quotes, {str(value)!r}"
    if isinstance(value, str) and {int, float} & set(kinds):
        try:
            number = float(value[:99])
        except ValueError:
            return "mend the line"
        if math.isfinite(number):  # 1e-3 is a text to YAML 1.1, which wants a point and a sign: 1.0e-3
            return f"try {int(number) if float not in kinds and number.is_integer() else number}, without quotes"
    return "mend the line"


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
    if kind is float and type(value) is int:
        return True
    return type(value) is kind and not (kind is float and not math.isfinite(value))  # True is an int to isinstance


def _kind_word(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) is list:
        return f"a list of {_kind_word(get_args(kind)[0])}"
    return "str" if kind is Path else kind.__name__


def load_recipe(name_or_file: str) -> list[tuple[Any, Any]]:
    """What a packaged recipe (by name) or a TOML or YAML file says, unchecked: options and values.

    Raises UsageError for an unknown name, RecordError for a file that cannot be parsed.
    """
    if name_or_file in packaged():
        text = (resources.files("laser.recipes") / f"{name_or_file}.toml").read_text()
        return _options_in(text, False, f"recipe {name_or_file}")
    path = Path(name_or_file)
    if not path.exists() and not path.is_symlink():
        raise UsageError(f"no recipe {name_or_file!r}; try one of {', '.join(packaged())}, or a TOML or YAML file")
    where = f"recipe {name_or_file}"
    return _options_in(_text_of_options(path, where), path.suffix.lower() in (".yaml", ".yml"), where)


def _text_of_options(path: Path, where: str) -> str:
    try:
        return read_regular(path).decode()
    except FileNotFoundError as error:
        raise RecordError(f"{where}: there is no such file; check the path") from error
    except (OSError, ValueError) as error:
        raise RecordError(f"{where} cannot be read ({first_line(error)}); mend it") from error


def _options_in(text: str, is_yaml: bool, where: str) -> list[tuple[Any, Any]]:
    """Options and values of a file's text, a key that stands twice as often as it does."""
    import yaml

    try:
        if is_yaml:
            return list(_options_of_yaml(text, where))
        return list(tomllib.loads(text).items())
    # ValueError: of a date or a number that is none; the others: of what can be nested.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise RecordError(f"{where} cannot be parsed ({first_line(error)}); mend it") from error


def _options_of_yaml(text: str, where: str) -> Iterator[tuple[Any, Any]]:
    import yaml

    for event in yaml.parse(text, yaml.SafeLoader):
        if anchor := getattr(event, "anchor", None):
            line = event.start_mark.line + 1
            raise UsageError(f"{where}: line {line} has the anchor {named(anchor)}; write the value where it is meant")
    loader = yaml.SafeLoader(text)
    node = loader.get_single_node()
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise RecordError(f"{where} holds a {node.tag.rpartition(':')[2]}, expected lines of `option: value`; mend it")
    for key, value in node.value if node is not None else ():
        number = value.tag.rpartition(":")[2] in ("int", "float")
        found = loader.construct_object(value, deep=True)
        if number and not PLAIN_NUMBER.fullmatch(value.value):
            raise UsageError(
                f"{where}: {key.value} is {value.value[:60]}, which YAML reads as {found}; try it in quotes, or "
                "write the number plainly"
            )
        yield key.value if isinstance(key, yaml.ScalarNode) else loader.construct_object(key, deep=True), found
