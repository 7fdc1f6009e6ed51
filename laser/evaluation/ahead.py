"""Read the next piece of a model while this one computes.

One thread reads; on CUDA what it read goes through pinned memory and a stream of its own. Two events keep the order:
memory is written again only after the work that was queued on it before, and read only after it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from laser.spectral.devices import sent, staged

Tensors = dict[str, torch.Tensor]


def copy_in(place: torch.Tensor, W: torch.Tensor) -> None:
    """W into `place`, converted there: the narrower dtype is what travels to a device."""
    if place.device != W.device and (place.is_cuda or W.dtype.itemsize < place.dtype.itemsize):
        W = sent(staged(W, place.device), place.device)
    place.copy_(W)


class Ahead:
    """At most one piece that is being read, and what it is read into."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._reader: ThreadPoolExecutor | None = None
        self._stream: Any = None
        self._piece: int | None = None
        self._tensors: Tensors = {}
        self._future: Future[Any] | None = None

    def start(self, piece: int, tensors: Tensors, fill: Callable[[Tensors], None]) -> None:
        """Begin to `fill` the tensors of a piece, unless one is being read already."""
        assert self._future is None, "one piece at a time"
        self._reader = self._reader or ThreadPoolExecutor(1, "laser-ahead")
        before = torch.cuda.Event() if self.device.type == "cuda" else None
        if before is not None:
            before.record()
        self._piece, self._tensors = piece, tensors
        self._future = self._reader.submit(self._read, tensors, fill, before)

    def _read(self, tensors: Tensors, fill: Callable[[Tensors], None], before: Any) -> Any:
        if before is None:
            return fill(tensors)
        with torch.cuda.device(self.device):
            self._stream = self._stream or torch.cuda.Stream()
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(before)
                fill(tensors)
                done = torch.cuda.Event()
                done.record()
                return done

    @property
    def piece(self) -> int | None:
        """The piece that is being read, or was and has not been taken."""
        return self._piece

    def take(self) -> Tensors:
        """Its tensors, filled. Raises what reading it raised."""
        assert self._future is not None, "nothing was begun"
        future, tensors = self._future, self._tensors
        self._piece, self._tensors, self._future = None, {}, None
        done = future.result()
        if done is not None:
            torch.cuda.current_stream(self.device).wait_event(done)
        return tensors

    def close(self) -> None:
        """Wait for the thread and let go of it; what it read is dropped."""
        self._piece, self._tensors, self._future = None, {}, None
        if self._reader is not None:
            self._reader.shutdown(wait=True)
            self._reader = None
