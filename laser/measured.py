"""What a scan finds of one matrix, and how a journal holds it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laser.checkpoint.records import has_shape
from laser.errors import RecordError

# A line of a journal, by its keys and their types; vectors are base64 of their bytes.
ENTRY: dict[str, Any] = {"name": str, "skipped": str | None, "kurtosis": float | None, "note": str}
ENTRY |= {"data_failed": str | None, "values": str, "null": str, "data": str}


@dataclass(frozen=True)
class Measured:
    """What a scan finds of one matrix: its spectrum (p,), its null's (draws,), the kurtosis, or why there are none."""

    values: NDArray[np.float64]
    null: NDArray[np.float64]
    kurtosis: float | None = None
    skipped: str | None = None
    data: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))  # the values again in the data's metric
    data_failed: str | None = None  # why not in the data's metric
    note: str = ""  # by which step of the ladder, where it was not the method asked for, and why


def to_entry(name: str, measured: Measured) -> dict[str, Any]:
    """A line of a journal."""
    vectors = {"values": _encode(measured.values), "null": _encode(measured.null)}
    vectors |= {"data": _encode(measured.data)}
    told = {"name": name, "skipped": measured.skipped, "kurtosis": measured.kurtosis, "note": measured.note}
    return told | {"data_failed": measured.data_failed} | vectors


def from_entry(entry: Any, where: str) -> Measured:
    """Raises RecordError, which begins with `where`, for what no scan writes."""
    try:
        if not isinstance(entry, Mapping) or not has_shape(entry, ENTRY):
            raise ValueError
        values, null, data = (_decode(entry[key]) for key in ("values", "null", "data"))
    except ValueError:
        raise RecordError(f"{where} is not what a scan measures; start afresh with --force") from None
    told = entry["kurtosis"], entry["skipped"], data, entry["data_failed"], entry["note"]
    return Measured(values, null, *told)


def _encode(vector: NDArray[np.float64]) -> str:
    return base64.b64encode(vector.astype("<f8").tobytes()).decode()


def _decode(text: str) -> NDArray[np.float64]:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f8")
