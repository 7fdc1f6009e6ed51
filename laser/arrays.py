"""Records whose vectors and matrices lie in a safetensors file, and all else as JSON in its metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from laser.files import require_regular, write_atomically
from laser.records import Record, parse_record

KEY = "laser"  # of the metadata


class ArrayRecord(Record):
    """Base of the records that a safetensors file with arrays holds."""

    @property
    def metadata(self) -> dict[str, str]:
        return {KEY: json.dumps(self.document(), allow_nan=False)}

    def save(self, path: Path, arrays: Mapping[str, NDArray[Any]] | None = None) -> None:
        write_atomically(path, save(dict(arrays or {}), metadata=self.metadata))

    @classmethod
    @contextmanager
    def opened(cls, path: Path, framework: str) -> Iterator[Any]:
        """The file at `path` as `safe_open` gives it. Raises RecordError for what cannot be read, also inside."""
        # NumPy knows not every dtype that safetensors does, and says so in ways of its own.
        with cls.reading(path, SafetensorError, TypeError, AttributeError, LookupError, MemoryError):
            require_regular(path)
            with safe_open(path, framework=framework) as file:
                yield file

    @classmethod
    def document_in(cls, file: Any, path: Path) -> Any:
        """The JSON of an open file. Raises RecordError unless it is of this kind and version."""
        document = parse_record((file.metadata() or {}).get(KEY, "null"))
        cls.require_kind(document, path)
        return document

    @classmethod
    def load(cls, path: str | Path, *, as_written: bool = True) -> Self:
        """The record without its arrays. Raises RecordError as Record.load."""
        path = Path(path)
        with cls.opened(path, "numpy") as file:
            document = cls.document_in(file, path)
        return cls.from_document(document, path, as_written=as_written)


def hash_of(arrays: Mapping[str, NDArray[np.float64]]) -> str:
    """sha256 over names and values."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode("utf-8", "surrogatepass") + array.tobytes())
    return digest.hexdigest()
