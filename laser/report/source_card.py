"""What a source's own files say of it: the metadata of its README.md, and the licence whose text it carries."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

LICENCE = ("license", "license_name", "license_link")
LISTS = ("language",)  # always a list here; the others only where they name several
KEYS = (*LICENCE, *LISTS, "base_model")
FRONT_MATTER = re.compile(r"\s*---[ \t]*\n(?P<yaml>.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
LARGEST_CARD = 1 << 20  # characters; the largest on the Hub, full of results, have about a third of it
NOTHING = ("none", "null", "~")  # what programs write that have no value
# Texts without a change: what they begin with or hold, on one line in small letters, and how long they can be.
OWNER = r"(?:copyright [^.]{,100}\.?(?: all rights reserved\.)? )?"
APACHE = re.compile(OWNER + r"apache license version 2\.0, january 2004 .{8000,10500}")
MIT = re.compile(
    r"(?!.*\bmodified\b).{,300}permission is hereby granted, free of charge, to any person obtaining a copy of this "
    r"software and associated documentation files .{700,1000}"
)
TEXTS = {"apache-2.0": APACHE, "mit": MIT}


@dataclass(frozen=True)
class SourceCard:
    """The metadata that a card inherits, and why they may not be all that the source says."""

    entries: Mapping[str, str | list[str]]
    complaint: str | None = None  # goes on from "The source's README.md"


def read_source_card(readme: str | None) -> SourceCard:
    """The entries of KEYS in a README's metadata, as far as they are words; never an error, for files are foreign."""
    import yaml

    text = (readme or "").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        return SourceCard({}, "is not UTF-8 text, so its metadata were not read")
    block = FRONT_MATTER.match(text)
    if block is None:
        open_ended = text.lstrip().startswith("---\n")
        return SourceCard(
            {}, "has metadata without a second line of dashes; they were not read" if open_ended else None
        )
    if len(block["yaml"]) > LARGEST_CARD:
        return SourceCard({}, f"has more than {LARGEST_CARD} characters of metadata; they were not read")
    try:
        # Nodes and no values: nothing is built that a tag, an anchor or a date asks for, and words stay as written.
        node = yaml.compose(block["yaml"], Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" (line {text[: block.start('yaml')].count(chr(10)) + mark.line + 1})"
        return SourceCard({}, f"has metadata that are not valid YAML{where}; they were not read")
    if node is None:
        return SourceCard({})
    if not isinstance(node, yaml.MappingNode):
        return SourceCard({}, "has metadata that are no list of keys and values; they were not read")
    found: dict[str, list[str]] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value not in KEYS:
            continue
        if found.setdefault(key.value, _scalar_words(value)) != _scalar_words(value):
            return SourceCard({}, f"gives two values for {key.value}; its metadata were not used")
    entries = {k: v if k in LISTS or len(v) > 1 else v[0] for k, v in found.items() if v}
    marked = "begins with a byte order mark, behind which programs may find no metadata"
    return SourceCard(entries, marked if readme and readme.startswith("\ufeff") else None)


def _scalar_words(node: object) -> list[str]:
    """The words of a scalar or a list. YAML 1.1, as PyYAML reads it, takes the language `no`, Norwegian, for false; the
    Hub and YAML 1.2 take only `true` and `false` for truth values."""
    import yaml

    words = []
    for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        if isinstance(item, yaml.ScalarNode):
            kind, word = item.tag.rpartition(":")[2], item.value.strip()
            truth = kind == "bool" and word.lower() in ("true", "false")
            if kind in ("str", "bool") and not truth and word.isprintable() and word and word.lower() not in NOTHING:
                words.append(word)
    return words


def licence_of(text: str) -> str | None:
    """The Hub's name of the licence whose unchanged text this is, or None: only texts that are certain."""
    line = " ".join(text.lower().split())
    return next((name for name, pattern in TEXTS.items() if pattern.fullmatch(line)), None)
