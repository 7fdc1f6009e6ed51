"""What the header of a GGUF file claims, held against the file's size before the gguf package believes it.

That package loops as often as a count says and keeps some hundred bytes of every value, also behind the end of the
file. The layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from pathlib import Path

from laser.checkpoint.regular import open_regular
from laser.errors import CheckpointError

MOST_VALUES = 3_000_000  # in all metadata together; a vocabulary of 256,000 words and its merges are 1.3 million
LONGEST_NAME = 65535  # bytes, the format's own limit
DIMENSIONS = 4  # the same
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type
STRING, ARRAY = 8, 9


def require_counts(path: Path) -> None:
    """Raises CheckpointError for a header of more values, names or tensors than the file can hold."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 24:
            raise CheckpointError(f"{path.name} is truncated: found {size} bytes; download it again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Header(path.name, data, size).walk()


class _Header:
    def __init__(self, name: str, data: mmap.mmap, size: int) -> None:
        self.name, self.data, self.size, self.at, self.values = name, data, size, 4, 0
        self.order = "<"
        if self.number("I") & 0xFFFF == 0:  # written on a machine of the other byte order
            self.order = ">"

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.name} cannot be read as GGUF: found {what} at byte {self.at}: truncated or damaged; download it "
            "again"
        )

    def number(self, kind: str) -> int:
        width = struct.calcsize(kind)
        self.skip(width)
        return struct.unpack_from(self.order + kind, self.data, self.at - width)[0]

    def skip(self, count: int) -> None:
        if count > self.size - self.at:
            raise self.wrong(f"{self.size} bytes, expected {count} more")
        self.at += count

    def count(self, what: str, width: int) -> int:
        """A number of things of at least `width` bytes each, all of them in the file."""
        found = self.number("Q")
        if found * width > self.size - self.at:
            raise self.wrong(f"{found} {what}, more than the file can hold,")
        return found

    def text(self, longest: int | None = None) -> None:
        length = self.number("Q")
        if longest is not None and length > longest:
            raise self.wrong(f"a name of {length} bytes, expected at most {longest},")
        self.skip(length)

    def more(self, count: int) -> None:
        self.values += count
        if self.values > MOST_VALUES:
            raise self.wrong(f"more than {MOST_VALUES} values of metadata")

    def value(self, kind: int, depth: int = 0) -> None:
        self.more(1)
        if kind == STRING:
            self.text()
        elif kind in WIDTHS:
            self.skip(WIDTHS[kind])
        elif kind == ARRAY and depth < 2:
            inner = self.number("I")
            count = self.count("values", WIDTHS.get(inner, 8))
            if inner in WIDTHS:
                self.more(count)
                self.skip(count * WIDTHS[inner])
            else:
                for _ in range(count):
                    self.value(inner, depth + 1)
        else:
            raise self.wrong(f"a value of type {kind}, expected 0 to 12")

    def walk(self) -> None:
        tensors, pairs = self.count("tensors", 24), self.count("entries of metadata", 13)
        for _ in range(pairs):
            self.text(LONGEST_NAME)
            self.value(self.number("I"))
        for _ in range(tensors):
            self.text(LONGEST_NAME)
            dimensions = self.number("I")
            if not 1 <= dimensions <= DIMENSIONS:
                raise self.wrong(f"a tensor of {dimensions} dimensions, expected 1 to {DIMENSIONS},")
            shape = [self.number("Q") for _ in range(dimensions)]
            if not 0 < math.prod(shape) <= 16 * self.size:  # no type has less than half a bit an entry
                raise self.wrong(f"a tensor of {' x '.join(map(str, shape))}, which the file cannot hold,")
            self.number("I")
            if self.number("Q") > self.size:
                raise self.wrong("a tensor that begins behind the end of the file")
