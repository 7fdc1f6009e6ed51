"""Which file `--force` may replace: one that laser made, of the same kind, by what is in it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laser.checkpoint.reader import OUTCOME
from laser.checkpoint.safetensors import MAX_HEADER
from laser.checkpoint.side_files import is_weights
from laser.errors import OutputError
from laser.files import open_regular, real

REPLACEABLE = {"spectra", "moments", "plan", "eval", "leaderboard"}
# Drawn or derived from records: how such a file begins, or what stands near its beginning.
DRAWN = (
    (b"\x89PNG\r\n", b"laser"),
    (b"<svg", b"laser"),
    (b"<!doctype html", b"<title>laser report"),
    (b'"snr":', b'"type":'),
)

_LIST = re.compile(rb"(#.*\n)*unfrozen_parameters:\n((- |#).*\n?)*-?")  # and no key of somebody's own configuration


def require_replaceable(path: Path, kind: str | None) -> None:
    """Raises OutputError unless the file at `path` is a record of this `kind`, or for None a drawing, page or list."""
    found = record_kind(path)
    if kind is None and found is None:
        with open_regular(path) as file:
            start = file.read(4096)
        if not start or any(all(mark in start for mark in marks) for marks in DRAWN) or _LIST.fullmatch(start):
            return
    if kind is None or found != kind:
        message = f"a record of kind {found!r}" if found else "no record of laser"
        expected = f"a record of kind {kind!r}" if kind else "what this verb writes"
        raise OutputError(f"{path} is {message}, expected {expected}: --force replaces nothing else; try another -o")


def record_kind(path: Path) -> str | None:
    """The kind of a record of laser; None for any other file."""
    try:
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if length <= min(MAX_HEADER, path.stat().st_size):
                header = json.loads(file.read(length))
                return _kind(json.loads(header["__metadata__"]["laser"]))
            file.seek(0)
            return _kind(json.loads(file.read(MAX_HEADER)))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return _torn(path)


def _kind(document: Any) -> str | None:
    found = document.get("kind") if isinstance(document, Mapping) else None
    return found if found in REPLACEABLE else None


def _torn(path: Path) -> str | None:
    """The kind of a record that is damaged: it has to be possible to make it again."""
    with open_regular(path) as file:
        start = file.read(512).translate(None, b"\\ \n")
    return next((kind for kind in sorted(REPLACEABLE) if f'"kind":"{kind}","version":'.encode() in start), None)


def require_outside_models(path: Path) -> None:
    """Raises OutputError for a file that would lie in the directory of a model that laser did not make."""
    for folder in real(path).parents:
        model = any((folder / name).is_file() for name in ("config.json", "params.json"))
        if model and not (folder / OUTCOME).exists() and any(is_weights(p.name) for p in folder.iterdir()):
            raise OutputError(f"{path} lies in the model {folder}, and a source is never written to; try another -o")
