"""Packing without loss, and packed bytes that nobody packed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merges import BF16, F16, F32, merged, update, weights

from laser.differences.formats import same_bits
from laser.differences.packing import pack, pack_some, unpack, unpack_some
from laser.errors import RecordError

DTYPES = [BF16, F16, F32, torch.float64, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.binary(max_size=64), other=st.binary(min_size=64, max_size=64))
@pytest.mark.slow
def test_what_is_packed_comes_back(dtype: torch.dtype, data: bytes, other: bytes) -> None:
    """Any bits at all, NaN and signs of zero among them, with and without something to go by."""
    size = len(data) // dtype.itemsize
    kind = torch.uint8 if dtype == torch.bool else dtype
    raw = bytearray(data[: size * dtype.itemsize])
    x = torch.frombuffer(raw, dtype=kind) if raw else torch.empty(0, dtype=kind)
    known = torch.frombuffer(bytearray(other), dtype=kind)[:size]
    for by in (None, known):
        back = unpack(pack(x, by), (size,), kind, by)
        assert back.dtype == x.dtype and torch.equal(back.view(torch.uint8), x.view(torch.uint8))


def test_shapes() -> None:
    for x in (torch.tensor(1.5), torch.zeros(0, 3), torch.randn(2, 3, 4).to(BF16), torch.randn(4, 5).T):
        assert torch.equal(unpack(pack(x), tuple(x.shape), x.dtype), x)


def test_some_entries_come_back() -> None:
    q = weights(40, 30)
    made = merged(q, update(q, 2, 1e-3))
    positions = torch.nonzero(~same_bits(made, q).reshape(-1)).reshape(-1)
    packed = pack_some(positions, q.reshape(-1)[positions], made.reshape(-1)[positions])
    assert 0 < len(packed) < 4 * len(positions) + 60
    assert same_bits(unpack_some(packed, made.clone()), q).all()
    none = pack_some(positions[:0], q.reshape(-1)[:0], made.reshape(-1)[:0])
    assert same_bits(unpack_some(none, made.clone()), made).all()


def test_a_small_change_packs_well() -> None:
    """Less than half: the high bytes are the same."""
    W = weights(64, 64)
    q = merged(W, update(W, 3, 3e-3))
    assert len(pack(q, W)) < 0.4 * q.nbytes < len(pack(q))


def test_steps_up_and_down_are_near_their_entropy() -> None:
    """In float32 one entry in ten is a step off: where, and to which side, takes H(0.1) + 0.1 bits an entry."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(200_000, generator=generator)
    positions = torch.nonzero(torch.rand(made.shape, generator=generator) < 0.1).reshape(-1)
    steps = 2 * torch.randint(0, 2, positions.shape, generator=generator, dtype=torch.int32) - 1
    q = (made[positions].view(torch.int32) + steps).view(F32)
    packed = pack_some(positions, q, made[positions])
    assert len(packed) < 1.15 * (0.469 + 0.1) * len(made) / 8
    assert torch.equal(unpack_some(packed, made.clone())[positions], q)


@pytest.mark.parametrize("spoil", [
    lambda p: p[:10], lambda p: p[:-3], lambda p: torch.cat((p, p)), lambda p: p.flip(0), lambda p: p[:0],
])  # fmt: skip
def test_damage_is_told(spoil: object) -> None:
    q = weights(8, 8)
    with pytest.raises(RecordError, match="the remainder is damaged"):
        unpack(spoil(pack(q)), (8, 9), BF16)  # pyright: ignore[reportCallIssue]
    positions = torch.tensor([3, 60])
    packed = pack_some(positions, q.reshape(-1)[positions], q.reshape(-1)[positions] * 2)
    with pytest.raises(RecordError, match="the remainder is damaged"):
        unpack_some(spoil(packed), q[:1].clone())  # pyright: ignore[reportCallIssue]


def test_a_bomb_is_not_unfolded() -> None:
    bomb = pack(torch.zeros(1 << 20, dtype=torch.int64))
    with pytest.raises(RecordError, match="damaged"):
        unpack(bomb, (4,), torch.int64)
