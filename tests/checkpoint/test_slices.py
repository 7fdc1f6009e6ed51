"""Parts of tensors: read and written in place they are what plain indexing gives, whatever the strides."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laser.checkpoint import slices
from laser.checkpoint.slices import Slice, bytes_of, read_slice, spans, write_slice


@st.composite
def any_part(draw: st.DrawFn) -> Slice:
    view = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    index = []
    for size in view:
        start = draw(st.integers(0, size - 1))
        index.append((start, draw(st.integers(start + 1, size)), draw(st.integers(1, 3))))
    return Slice(view, tuple(index), draw(st.booleans()))


@pytest.mark.slow
@pytest.mark.parametrize(("long_run", "max_span"), [(64 << 10, 64 << 20), (1, 1), (8, 40), (40, 8)])
@given(part=any_part())
def test_in_place_is_plain_indexing(long_run: int, max_span: int, part: Slice) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # Limits: real ones need tensors of megabytes for each of hundreds of examples.
        patch.setattr(slices, "LONG_RUN", long_run)
        patch.setattr(slices, "MAX_SPAN", max_span)
        size = math.prod(part.view)
        tensor = torch.arange(size, dtype=torch.int32)
        memory = bytearray(bytes_of(tensor))

        def fetch(start: int, count: int) -> torch.Tensor:
            assert 0 <= start and start + count <= len(memory)
            return torch.frombuffer(bytearray(memory[start : start + count]), dtype=torch.uint8)

        def put(start: int, data: memoryview) -> None:
            memory[start : start + len(data)] = data

        stored = read_slice(fetch, torch.int32, part)
        slow = tensor.reshape(part.view)[tuple(slice(*axis) for axis in part.index)]
        assert torch.equal(stored, slow)
        W = part.oriented(stored)
        assert tuple(W.shape) == part.shape and W.is_contiguous()
        assert torch.equal(W, part.of(tensor)) and torch.equal(part.stored(W), stored)

        write_slice(fetch, put, part.stored(-1 - W), part)
        expected = tensor.clone()
        part.put(expected, -1 - W)
        assert torch.equal(torch.frombuffer(memory, dtype=torch.int32), expected)
        assert int((expected < 0).sum()) == math.prod(part.extent)
        found = list(spans(part, 4))
        assert sum(math.prod(span.extent) for span in found) == math.prod(part.extent)


def test_long_runs_are_read_alone_and_short_ones_within_their_span() -> None:
    """Rows of a fused qkv cost their own bytes; interleaved columns cost the span, in pieces of bounded size."""
    rows = Slice((3 * 64, 1024), ((64, 128, 1), (0, 1024, 1)))
    assert [(s.start, s.length) for s in spans(rows, 2)] == [(64 * 1024, 64 * 1024)]
    heads = Slice((4, 3, 64, 1024), ((0, 4, 1), (1, 2, 1), (0, 64, 1), (0, 1024, 1)))
    assert [s.length for s in spans(heads, 2)] == [64 * 1024] * 4
    comb = Slice((2, 5120, 16384), ((1, 2, 1), (0, 5120, 1), (1, 16384, 2)), transposed=True)
    found = list(spans(comb, 2))
    assert max(s.length for s in found) * 2 <= slices.MAX_SPAN and len(found) == 3
