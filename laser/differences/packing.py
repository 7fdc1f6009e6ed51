"""Bits packed without loss: what of a tensor an adapter does not give, or the whole of it.

Against what is known, bits are the difference as integers: 0 where they are equal, 1 or -1 where they are one step of
the format apart. Of either sign a small difference is a small number: 0, -1, 1, -2 are written as 0, 1, 2, 3. Bytes of
one significance lie together, and zlib (RFC 1950) does the rest.
"""

from __future__ import annotations

import zlib

import torch

from laser.checkpoint.slices import bytes_of
from laser.errors import RecordError

LEVEL = 6  # zlib's own default
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(q: torch.Tensor, known: torch.Tensor | None = None) -> torch.Tensor:
    """The bits of q, uint8 of any length; against those of `known`, of the same dtype and shape, if that is given."""
    bits = _bits(q)
    if known is None:
        return _deflated(bits)
    return _deflated(_signed_last(bits - _bits(known)), zlib.Z_FILTERED)


def unpack(
    packed: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, known: torch.Tensor | None = None
) -> torch.Tensor:
    """The tensor that `pack` was given, with the same `known`. Raises RecordError for what it did not make."""
    count = 1
    for size in shape:
        count *= size
    bits = _inflated(packed, count, dtype.itemsize)
    if known is not None:
        bits = _signed_first(bits) + _bits(known)
    return bits.view(dtype).reshape(shape)


def pack_some(positions: torch.Tensor, q: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """The bits of q (count,) at rising `positions` (count,), int64, against those of `known` there: uint8.

    The first 16 bytes hold the count and the length of the packed gaps between the positions.
    """
    gaps = torch.diff(positions, prepend=positions.new_tensor([-1])) - 1
    one, other = _deflated(gaps, zlib.Z_FILTERED), pack(q, known)
    head = torch.tensor([len(positions), len(one)], dtype=torch.int64).view(torch.uint8)
    return torch.cat((head, one, other))


def unpack_some(packed: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """`made`, what the formula gives, mended in place where `pack_some` says. Raises RecordError as `unpack`."""
    if len(packed) < 16:
        raise RecordError(_DAMAGED)
    count, length = packed[:16].clone().view(torch.int64).tolist()
    if not (0 <= count <= made.numel() and 0 <= length <= len(packed) - 16):
        raise RecordError(_DAMAGED)
    positions = torch.cumsum(_inflated(packed[16 : 16 + length], count, 8) + 1, 0) - 1
    if count and not (0 <= int(positions.min()) and int(positions.max()) < made.numel()):
        raise RecordError(_DAMAGED)
    flat = made.reshape(-1)
    flat[positions] = unpack(packed[16 + length :], (count,), made.dtype, flat[positions])
    return flat.reshape(made.shape)


_DAMAGED = "the remainder is damaged; make it again: `laser unmerge BASE TUNED -o ADAPTER`"


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().reshape(-1).view(_INTEGERS[x.element_size()])


def _signed_last(d: torch.Tensor) -> torch.Tensor:
    """0, -1, 1, -2 as 0, 1, 2, 3, in integers that wrap around."""
    return (d + d) ^ (d >> 8 * d.element_size() - 1)


def _signed_first(z: torch.Tensor) -> torch.Tensor:
    """What `_signed_last` was given."""
    return ((z >> 1) & torch.iinfo(z.dtype).max) ^ -(z & 1)


def _deflated(bits: torch.Tensor, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> torch.Tensor:
    """Integers (count,), bytes of one significance after the others, packed. Z_FILTERED: of numbers, mostly small."""
    planes = bits.contiguous().view(torch.uint8).reshape(bits.numel(), bits.element_size()).T.contiguous()
    deflater = zlib.compressobj(LEVEL, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, strategy)
    data = deflater.compress(bytes_of(planes)) + deflater.flush()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _inflated(packed: torch.Tensor, count: int, size: int) -> torch.Tensor:
    """What `_deflated` was given: `count` integers of `size` bytes."""
    inflater = zlib.decompressobj()
    try:
        # No more than is expected, and one byte: a hostile file could unfold without end.
        data = inflater.decompress(bytes_of(packed), count * size + 1)
    except zlib.error as error:
        raise RecordError(_DAMAGED) from error
    if len(data) != count * size or not inflater.eof:
        raise RecordError(_DAMAGED)
    planes = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return planes.reshape(size, count).T.reshape(-1).contiguous().view(_INTEGERS[size])
