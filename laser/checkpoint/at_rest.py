"""Is a finished output what was written there? Its small files by their checksums, which laser.json holds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from laser.checkpoint.reader import OUTCOME
from laser.checkpoint.safetensors import sha256_of
from laser.errors import RecordError
from laser.files import read_regular, require_regular
from laser.records import decode, is_sealed, named, parse_record

SHA256 = re.compile(r"[0-9a-f]{64}")
# Ours, made again at will, and people's to edit: the card, and the options of the run.
CARD, OPTIONS_FILE = "README.md", "laser.yaml"


def wrong_names(sums: Mapping[str, str], shards: Mapping[str, str | None]) -> str | None:
    """What is wrong with the names of an outcome's files, or their sha256; None where all lie inside the output."""
    for name in (*sums, *shards):
        path = PurePosixPath(name)
        if (
            path.is_absolute()
            or not path.parts
            or ".." in path.parts
            or "\0" in name
            or (name in shards and path.name != name)
        ):
            return f"{name!r} is no file of an output"
    for name, stated in (*sums.items(), *shards.items()):
        if stated is not None and not SHA256.fullmatch(stated):
            return f"{name} has the sha256 {named(stated)}, expected 64 digits"
    return None


def check_names(document: Mapping[str, Any], where: str, remedy: str) -> None:
    """Raises RecordError unless an outcome has sums of files, and all its names are of files inside the output."""
    sums = decode(Mapping[str, str], document.get("files", {}), f"{where}: files", remedy)
    shards = decode(Mapping[str, str | None], document.get("shards", {}), f"{where}: shards", remedy)
    if wrong := wrong_names(sums, shards):
        raise RecordError(f"{where}: {wrong}; {remedy}")


def damage(out: Path, document: Mapping[str, Any] | None = None) -> list[str]:
    """What is wrong with laser.json and the files that it has sums of; each entry names the file."""
    if document is None:
        try:
            document = parse_record(read_regular(out / OUTCOME))
        except (OSError, ValueError) as error:
            return [f"{OUTCOME} cannot be read ({error}); make the output again with --force"]
    if not isinstance(document, dict) or not is_sealed(document):
        return [f"{OUTCOME} was changed or damaged since it was written"]
    check_names(document, OUTCOME, "make the output again with --force")
    return wrong_sums(out, document.get("files", {}))


def wrong_sums(folder: Path, sums: Mapping[str, str]) -> list[str]:
    """Which files of a folder do not have the sha256 that is stated; each entry begins with the file's name."""
    problems = []
    for name, expected in sums.items():
        try:
            require_regular(folder / name)
            found = "" if (digest := sha256_of(folder / name)) == expected else f"found sha256 {digest[:12]}"
        except OSError as error:
            found = str(error.strerror)
        if found:
            problems.append(f"{name}: {found}, expected {expected[:12]}")
    return problems
