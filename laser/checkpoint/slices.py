"""A matrix inside a stored tensor: one expert of a 3-D tensor, q of a fused qkv, every second column.

A slice is a strided part of a tensor, so it can be read from and written to a file in place, without the rest of the
tensor in memory. Long runs of neighbouring bytes are read and written one by one; where runs are short (GPT-OSS
interleaves gate and up column by column) the span that encloses them is read, changed and written back.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

LONG_RUN = 64 << 10  # bytes; shorter runs are not worth a system call each
MAX_SPAN = 64 << 20  # bytes in memory beside the matrix, where runs are short


@dataclass(frozen=True, slots=True)
class Slice:
    """tensor.view(view)[index] with all axes but the last joined into rows; transposed afterwards if so stored.

    view: the tensor's shape, an axis of it perhaps split in two. index: (start, stop, step) for each axis of the view.
    """

    view: tuple[int, ...]
    index: tuple[tuple[int, int, int], ...]
    transposed: bool = False

    @property
    def extent(self) -> tuple[int, ...]:
        return tuple(len(range(*axis)) for axis in self.index)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the matrix."""
        rows, columns = math.prod(self.extent[:-1]), self.extent[-1]
        return (columns, rows) if self.transposed else (rows, columns)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The matrix (m, n) of a whole stored tensor."""
        return self.oriented(tensor.reshape(self.view)[tuple(slice(*axis) for axis in self.index)])

    def put(self, tensor: torch.Tensor, W: torch.Tensor) -> None:
        """W (m, n) into its place in a whole contiguous tensor."""
        tensor.view(self.view)[tuple(slice(*axis) for axis in self.index)] = self.stored(W)

    def oriented(self, part: torch.Tensor) -> torch.Tensor:
        """`extent` as stored -> (m, n)."""
        matrix = part.reshape(-1, self.extent[-1])
        return matrix.T.contiguous() if self.transposed else matrix.contiguous()

    def stored(self, W: torch.Tensor) -> torch.Tensor:
        """(m, n) -> `extent`, contiguous: the order in which its bytes are stored and hashed."""
        return (W.T if self.transposed else W).contiguous().reshape(self.extent)


def whole_slice(shape: tuple[int, ...]) -> Slice:
    """The slice that is the tensor itself."""
    return Slice(shape, tuple((0, size, 1) for size in shape))


@dataclass(frozen=True)
class Span:
    """A piece of a slice: elements [start, start + length) of the tensor, and which of them belong to the slice."""

    start: int
    length: int
    where: tuple[int | slice, ...]  # in the slice's extent
    extent: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dense(self) -> bool:
        return math.prod(self.extent) == self.length

    def part_of(self, elements: torch.Tensor) -> torch.Tensor:
        return elements.as_strided(self.extent, self.strides)


def spans(slice_: Slice, itemsize: int) -> Iterator[Span]:
    """The pieces of a slice in stored order: dense runs where they are long, else spans of at most about MAX_SPAN."""
    extent = slice_.extent
    if not math.prod(extent):
        return
    strides = [math.prod(slice_.view[axis + 1 :]) for axis in range(len(slice_.view))]
    steps = [stride * axis[2] for stride, axis in zip(strides, slice_.index, strict=True)]
    base = sum(axis[0] * stride for axis, stride in zip(slice_.index, strides, strict=True))

    def length(axis: int) -> int:  # of the span of everything behind `axis`
        return 1 + sum((extent[i] - 1) * steps[i] for i in range(axis, len(extent)))

    axes = range(len(extent))
    split = next(axis for axis in (*axes, len(extent)) if math.prod(extent[axis:]) == length(axis))
    rows = 1  # of axis split - 1 in one span
    if split and length(split) * itemsize < LONG_RUN:
        split = next((axis for axis in axes if steps[axis] * itemsize <= MAX_SPAN), len(extent) - 1) + 1
        rows = max(1, MAX_SPAN // (steps[split - 1] * itemsize))
    if split == 0:
        yield Span(base, length(0), (), extent, tuple(steps))
        return
    last = split - 1
    for where in product(*(range(n) for n in extent[:last])):
        start = base + sum(i * step for i, step in zip(where, steps, strict=False))
        for row in range(0, extent[last], rows):
            count = min(rows, extent[last] - row)
            inner = (count, *extent[split:])
            size = length(split) + (count - 1) * steps[last]
            yield Span(start + row * steps[last], size, (*where, slice(row, row + count)), inner, tuple(steps[last:]))


# (first byte, how many) -> those bytes (count,), uint8; counted from where the tensor begins
Fetch = Callable[[int, int], torch.Tensor]


def read_slice(fetch: Fetch, dtype: torch.dtype, slice_: Slice) -> torch.Tensor:
    """The part of a tensor that belongs to `slice_`, in stored order (`Slice.extent`)."""
    part, size = torch.empty(slice_.extent, dtype=dtype), dtype.itemsize
    for span in spans(slice_, size):
        part[span.where] = span.part_of(fetch(span.start * size, span.length * size).view(dtype))
    return part


def write_slice(fetch: Fetch, put: Callable[[int, memoryview], None], part: torch.Tensor, slice_: Slice) -> None:
    """Write what `read_slice` reads; the bytes in between stay as they are. One writer per tensor at a time."""
    size = part.element_size()
    for span in spans(slice_, size):
        elements = part[span.where]
        if not span.dense:
            whole = fetch(span.start * size, span.length * size).view(part.dtype)
            span.part_of(whole).copy_(elements)
            elements = whole
        put(span.start * size, bytes_of(elements))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; a copy only where it is laid out otherwise."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tensor_sha256(tensor: torch.Tensor) -> str:
    """Of a tensor's bytes in row-major order, whatever its dtype and shape."""
    return hashlib.sha256(bytes_of(tensor)).hexdigest()


def fetch_from(file: Any, base: int) -> Fetch:
    """Reads of an unbuffered file, counted from byte `base`; shorter than asked for at the end of the file."""

    def fetch(start: int, count: int) -> torch.Tensor:
        raw = torch.empty(count, dtype=torch.uint8)
        view = raw.numpy().data
        file.seek(base + start)
        while view and (read := file.readinto(view)):
            view = view[read:]
        return raw

    return fetch


def put_into(file: Any, base: int) -> Callable[[int, memoryview], None]:
    """Writes to an unbuffered file, counted from byte `base`."""

    def put(start: int, data: memoryview) -> None:
        file.seek(base + start)
        while data:
            data = data[file.write(data) :]

    return put
