"""Whether a model is loaded whole or run layer by layer, decided before it is loaded.

What it needs is held against what is free. A function says what is free, so that this room knows no device's library. A
choice of the user's wins. One that cannot be met is refused with the flags that can, each of them held against what is
free before it is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from laser.errors import OutOfMemory
from laser.evaluation.activations import MEMORY_LIMIT, Store
from laser.evaluation.footprint import Needs
from laser.evaluation.layout import NotByLayers

# (name of the device, bytes of files that are mapped meanwhile) -> bytes that are free there; None: not known
Free = Callable[[str, int], int | None]
HOST_NAME = "cpu"
SMALLEST = 32  # tokens of a window below which a loss says nothing


@dataclass(frozen=True)
class Asked:
    """How a model is to be run. stream: layer by layer; None: as memory allows. batch: texts at a time."""

    dtype: str
    device: str
    tokens: int
    stream: bool | None = None
    batch: int = 1

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)


# What a model run so needs. Raises NotByLayers where it cannot be.
NeedsOf = Callable[[Asked], Needs]
# Flags of the command line that ask for something smaller, and what they ask for.
Ways = Sequence[tuple[str, Asked]]


@dataclass(frozen=True)
class Placement:
    """How a model is run, as it was chosen.

    left: bytes of the host's memory that stay free beside it, None where that is not known
    stated: what to say of the choice, None where there was none
    """

    stream: bool
    needs: Needs
    left: int | None
    stated: str | None = None

    def store(self) -> Store:
        """Room for the states between the pieces: half of what is left, so that they never are what is too much."""
        return Store(MEMORY_LIMIT if self.left is None else max(0, min(MEMORY_LIMIT, self.left // 2)))


def place(name: str, asked: Asked, needs_of: NeedsOf, free: Free, ways: Ways) -> Placement:
    """Whole if it fits, else layer by layer, unless the one or the other is asked for.

    Raises OutOfMemory, with the first of `ways` that fits, where what is asked for does not; NotByLayers where it is
    asked for layer by layer, cannot be run so, and would fit whole.
    """
    tried: list[tuple[bool, Needs]] = []
    cannot: NotByLayers | None = None
    for stream in (False, True) if asked.stream is None else (asked.stream,):
        try:
            needs = needs_of(replace(asked, stream=stream))
        except NotByLayers as error:
            cannot = error
            continue
        if shortage(needs, asked.device, free) is None:
            left = free(HOST_NAME, needs.mapped)
            message = f"{name} {_too_much(tried[0][1], asked.device, free)}: {_how(True, needs)}" if tried else None
            return Placement(stream, needs, None if left is None else left - needs.host, message)
        tried.append((stream, needs))
    if cannot is not None and asked.stream and _fits(replace(asked, stream=False), needs_of, free):
        raise cannot
    raise refusal(name, asked, needs_of, free, ways, cannot)


def refusal(
    name: str, asked: Asked, needs_of: NeedsOf, free: Free, ways: Ways, cannot: NotByLayers | None = None
) -> OutOfMemory:
    """Why it does not fit, and what does."""
    reasons, least = [], None
    for stream in (False, True) if asked.stream is None else (asked.stream,):
        if stream and cannot is not None:
            reasons.append(cannot.why)
            continue
        needs = needs_of(replace(asked, stream=stream))
        least = needs if least is None or needs.host + needs.device < least.host + least.device else least
        reasons.append(_too_much(needs, asked.device, free, stream))
    why = f"{name} {', '.join(reasons)}"
    every = [*ways, *((f"{a} {b}", _both(asked, x, y)) for a, x in ways for b, y in ways if _apart(asked, x, y))]
    for flags, other in every:
        if cannot is not None:
            other = replace(other, stream=False)
        if _fits(other, needs_of, free):
            flags = f"--no-stream {flags}" if cannot is not None and asked.stream else flags
            return OutOfMemory(why, f"try {flags}")
    wanted = "" if least is None else f" with {gigabytes(least.host + least.device)} of memory free"
    return OutOfMemory(why, f"try a machine{wanted}")


def shortage(needs: Needs, device: str, free: Free) -> tuple[str, int, int] | None:
    """The first place that has too little: its name, bytes needed and bytes free there; None where all have enough."""
    pairs = [(HOST_NAME, needs.host)] if device == HOST_NAME else [(device, needs.device), (HOST_NAME, needs.host)]
    for where, needed in pairs:
        there = free(where, needs.mapped if where == HOST_NAME else 0)
        if there is not None and needed > there:
            return where, needed, there
    return None


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def smaller_windows(asked: Asked) -> Iterator[tuple[str, Asked]]:
    """--window, halved until it is small."""
    window = (asked.tokens + 1) // 2
    while window >= SMALLEST:
        yield f"--window {window}", replace(asked, tokens=window - 1)
        window //= 2


def _fits(asked: Asked, needs_of: NeedsOf, free: Free) -> bool:
    for stream in (False, True) if asked.stream is None else (asked.stream,):
        try:
            if shortage(needs_of(replace(asked, stream=stream)), asked.device, free) is None:
                return True
        except NotByLayers:
            continue
    return False


def _too_much(needs: Needs, device: str, free: Free, stream: bool = False) -> str:
    where, needed, there = shortage(needs, device, free) or (HOST_NAME, needs.host, free(HOST_NAME, needs.mapped) or 0)
    if where == HOST_NAME and there != (
        whole := free(HOST_NAME, 0) or 0
    ):  # the process's own limit, which counts mapped files
        needed, there = needed + needs.mapped, whole
    place = "of memory" if where == HOST_NAME else f"on {where}"
    return f"needs {gigabytes(needed)} {place} {_how_words(stream)}, and {gigabytes(there)} are free"


def _how_words(stream: bool) -> str:
    return "layer by layer" if stream else "to be loaded whole"


def _how(stream: bool, needs: Needs) -> str:
    return f"running it {_how_words(stream)}, which needs {gigabytes(needs.device + needs.host)}"


def _apart(asked: Asked, x: Asked, y: Asked) -> bool:
    """Whether two ways change different things, the first of them in the order of the fields."""
    names = [[f for f in Asked.__dataclass_fields__ if getattr(way, f) != getattr(asked, f)] for way in (x, y)]
    return names[0] < names[1] and not set(names[0]) & set(names[1])


def _both(asked: Asked, x: Asked, y: Asked) -> Asked:
    changes = {f: getattr(y, f) for f in Asked.__dataclass_fields__ if getattr(y, f) != getattr(asked, f)}
    return replace(x, **changes)
