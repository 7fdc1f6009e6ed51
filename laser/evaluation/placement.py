"""How a model is run, decided before it is loaded: whole, layer by layer, or with the last of its layers in memory.

What it needs is held against what is free. A function says what is free, so that this room knows no device's library. A
choice of the user's wins. One that cannot be met is refused with the flags that can, each of them held against what is
free before it is named.

A search also keeps hidden states: the model's own, and those of each variant that is measured in the same walk over
the layers. More variants in a walk mean that fewer layers are read, unless none need be read at all. Hence the order:
the whole model with LEAST states, if that fits. Else states, for up to half of what is free beside one layer; then as
many of the last layers as fit. With more memory never fewer layers stay, nor is more read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from laser.errors import OutOfMemory
from laser.evaluation.activations import MEMORY_LIMIT, Store, pinned_bytes
from laser.evaluation.footprint import Needs
from laser.evaluation.layout import NotByLayers

# (name of the device, bytes of files that are mapped meanwhile) -> bytes that are free there; None: not known
Free = Callable[[str, int], int | None]
HOST_NAME = "cpu"
OWN_MEMORY = "cuda"  # the kind of device that has memory besides the host's: an Apple GPU takes it from that
OWN = 2  # states of a search that are the model's own: where a walk begins, and where it is
LEAST = OWN + 3  # states that come before layers
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


# What a model needs of which so many of the last pieces stay, None: all. Raises NotByLayers where it has none.
NeedsOf = Callable[[Asked, int | None], Needs]
# Flags of the command line that ask for something smaller, and what they ask for.
Ways = Sequence[tuple[str, Asked]]


@dataclass(frozen=True)
class Alive:
    """What a search has beside the pieces.

    layers: how many the model has
    size: bytes of the states of all windows, once
    variants: how many are measured in all
    alone: how many of these are measured at a time where no layer is read
    kept: states of the model's own that are kept for later, besides those that it has anyway
    """

    layers: int
    size: int
    variants: int
    alone: int = 1
    kept: int = 0

    def most(self, whole: bool) -> int:
        """How many states there can be at a time."""
        return OWN + self.kept + (self.alone if whole else self.variants)

    def least(self, whole: bool) -> int:
        """Bytes of the states that come before layers."""
        return min(LEAST, self.most(whole)) * self.size

    def wanted(self, left: int, whole: bool) -> int:
        """Bytes that states are to have where so many are left: half of them, but no fewer than `least`."""
        return min(self.most(whole) * self.size, max(self.least(whole), left // 2))


@dataclass(frozen=True)
class Placement:
    """How a model is run, as it was chosen.

    resident: how many of its last pieces stay in memory, the head being the last; None: all of it
    needs: without states
    host_states, device_states: bytes that states may take there
    dtype: of weights and states
    layers: of a search, how many stay
    variants: of a search that reads layers, how many can be measured in one walk
    why: the choice and its reason, as a sentence
    news: whether it would be another with memory enough
    """

    resident: int | None
    needs: Needs
    host_states: int
    device_states: int
    dtype: str
    layers: int
    variants: int
    why: str
    news: bool

    @property
    def stream(self) -> bool:
        """Whether anything is read again at each pass."""
        return self.resident is not None

    @property
    def peak(self) -> int:
        """Bytes at the most, those of a search's states with them."""
        states = self.host_states + self.device_states if self.layers or self.variants else 0
        return self.needs.device + self.needs.host + states

    def store(self, device: torch.device | str = HOST_NAME) -> Store:
        """Where states wait between pieces that run on `device`."""
        return Store(self.host_states, device=torch.device(device), device_limit=self.device_states)


def place(name: str, asked: Asked, needs_of: NeedsOf, free: Free, ways: Ways, alive: Alive | None = None) -> Placement:
    """Whole if it fits, else layer by layer, unless the one or the other is asked for. alive: of a search.

    Raises OutOfMemory, with the first of `ways` that fits, where what is asked for does not; NotByLayers where it is
    asked for layer by layer, cannot be run so, and would fit whole.
    """
    free, compared, cannot = cache(free), "", None  # it is held against one and the same figure throughout
    for resident in (None, 0) if asked.stream is None else (0 if asked.stream else None,):
        try:
            needs = needs_of(asked, resident)
        except NotByLayers as error:
            cannot = error
            continue
        wanted = needs
        if alive is not None and resident is None and asked.stream is None:
            wanted = needs.beside(**_at(asked.device, alive.least(whole=True)))
        compared = compared or f"{name} {_against(wanted, asked.device, free, resident == 0)}"
        if shortage(wanted, asked.device, free) is None:
            if alive is not None:
                return _searched(asked, resident, needs_of, free, compared, alive)
            left = _left(needs, HOST_NAME, asked.device, free)
            states = MEMORY_LIMIT if left is None else min(MEMORY_LIMIT, left // 2)
            how, news = "it is loaded whole", resident == 0 and asked.stream is None
            if resident == 0:
                how = f"running it layer by layer, which needs {gigabytes(needs.device + needs.host)}"
            return Placement(resident, needs, states, 0, asked.dtype, 0, 0, f"{compared}: {how}", news)
    if cannot is not None and asked.stream and _fits(replace(asked, stream=False), needs_of, free):
        raise cannot
    raise refusal(name, asked, needs_of, free, ways, cannot)


def _searched(
    asked: Asked, resident: int | None, needs_of: NeedsOf, free: Free, compared: str, alive: Alive
) -> Placement:
    """A search, of a model that fits whole (None) or layer by layer (0): with how many states, and how many layers."""
    needs = needs_of(asked, resident)
    own, whole = asked.device.partition(":")[0] == OWN_MEMORY, resident is None
    places = (asked.device,) if own else (asked.device, HOST_NAME)
    left = (_left(needs, where, asked.device, free) for where in places)
    known = min((count for count in left if count is not None), default=0 if own else 2 * MEMORY_LIMIT)
    near = min(alive.wanted(known, whole), known)  # bytes of states where the pieces run
    states = near // alive.size
    far = 0
    if own:  # where others wait, and come to the device for each layer
        left_here, size = _left(needs, HOST_NAME, asked.device, free), pinned_bytes(alive.size)
        far = min((alive.most(whole) - states) * size, MEMORY_LIMIT if left_here is None else left_here // 2)
        states += far // size
    if resident == 0 and asked.stream is None:
        beside = _at(asked.device, alive.wanted(known, whole))

        def lacks(pieces: int) -> bool:
            return shortage(needs_of(asked, pieces).beside(**beside), asked.device, free) is not None

        resident = bisect_left(range(1, alive.layers + 1), True, key=lacks)
        needs = needs_of(asked, resident)
    variants = 0 if resident is None else min(alive.variants, max(states - OWN, 1))
    return Placement(
        resident,
        needs,
        host_states=near if asked.device == HOST_NAME else far,
        device_states=0 if asked.device == HOST_NAME else near,
        dtype=asked.dtype,
        layers=alive.layers if resident is None else max(resident - 1, 0),
        variants=variants,
        why=f"{compared}: {_kept(resident, alive.layers)}{_at_a_time(variants, states)}",
        news=resident is not None and asked.stream is None,
    )


def refusal(
    name: str, asked: Asked, needs_of: NeedsOf, free: Free, ways: Ways, cannot: NotByLayers | None = None
) -> OutOfMemory:
    """Why it does not fit, and what does."""
    reasons, least = [], None
    for stream in (False, True) if asked.stream is None else (asked.stream,):
        if stream and cannot is not None:
            reasons.append(cannot.why)
            continue
        needs = needs_of(asked, 0 if stream else None)
        least = needs if least is None or needs.host + needs.device < least.host + least.device else least
        reasons.append(_against(needs, asked.device, free, stream))
    why = f"{name} {', '.join(reasons)}"
    every = [*ways, *((f"{a} {b}", _both(asked, x, y)) for a, x in ways for b, y in ways if _apart(asked, x, y))]
    for flags, other in every:
        if cannot is not None:
            other = replace(other, stream=False)
        if _fits(other, needs_of, free):
            flags = f"--no-stream {flags}" if cannot is not None and asked.stream else flags
            return OutOfMemory(why, f"try {flags}")
    if least is not None and free(HOST_NAME, least.mapped) != free(HOST_NAME, 0):  # see `_against`
        least = least.beside(host=least.mapped)
    wanted = "" if least is None else f" with {gigabytes(least.host + least.device)} of memory free"
    return OutOfMemory(why, f"try a machine{wanted}")


def shortage(needs: Needs, device: str, free: Free) -> tuple[str, int, int] | None:
    """The first place that has too little: its name, bytes needed and bytes free there; None where all have enough."""
    for where in dict.fromkeys((device, HOST_NAME)):
        needed, there = _needed(needs, where, device), free(where, needs.mapped if where == HOST_NAME else 0)
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
            if shortage(needs_of(asked, 0 if stream else None), asked.device, free) is None:
                return True
        except NotByLayers:
            continue
    return False


def _against(needs: Needs, device: str, free: Free, stream: bool) -> str:
    """What is needed and what is free, where it does not fit or else where the model runs."""
    mapped = needs.mapped if device == HOST_NAME else 0
    fits = device, _needed(needs, device, device), free(device, mapped)
    where, needed, there = shortage(needs, device, free) or fits
    if where == HOST_NAME and there != (whole := free(HOST_NAME, 0)):  # the process's own limit counts mapped files
        needed, there = needed + needs.mapped, whole
    place = "of memory" if where == HOST_NAME else f"on {where}"
    are_free = "nothing says how much is free" if there is None else f"{gigabytes(there)} are free"
    how = "layer by layer" if stream else "to be loaded whole"
    return f"needs {gigabytes(needed)} {place} {how}, and {are_free}"


def _kept(resident: int | None, layers: int) -> str:
    if resident is None:
        return "all of it stays in memory"
    if resident == 0:
        return "each layer is read at each pass"
    stay = f"the last {resident - 1} of {layers} layers stay" if resident > 1 else "only the head stays"
    return f"{stay} in memory, the {'others are' if resident > 1 else 'layers are'} read at each pass"


def _at_a_time(variants: int, states: int) -> str:
    files = ", its states in files" if states <= OWN else ""
    return f"; up to {variants} variant{'s' * (variants != 1)} at a time{files}" if variants else ""


def _left(needs: Needs, where: str, device: str, free: Free) -> int | None:
    """Bytes that stay free there beside `needs`; None where that is not known."""
    left = free(where, needs.mapped if where == HOST_NAME else 0)
    return None if left is None else max(left - _needed(needs, where, device), 0)


def _needed(needs: Needs, where: str, device: str) -> int:
    """Bytes that are taken there by a model that runs on `device`."""
    if where != HOST_NAME:
        return needs.device
    return needs.host if device.partition(":")[0] == OWN_MEMORY else needs.host + needs.device


def _at(device: str, count: int) -> dict[str, int]:
    """So many bytes on the device that the pieces run on, as `Needs.beside` takes them."""
    return {"host" if device == HOST_NAME else "device": count}


def _apart(asked: Asked, x: Asked, y: Asked) -> bool:
    """Whether two ways change different things, the first of them in the order of the fields."""
    names = [[f for f in Asked.__dataclass_fields__ if getattr(way, f) != getattr(asked, f)] for way in (x, y)]
    return names[0] < names[1] and not set(names[0]) & set(names[1])


def _both(asked: Asked, x: Asked, y: Asked) -> Asked:
    changes = {f: getattr(y, f) for f in Asked.__dataclass_fields__ if getattr(y, f) != getattr(asked, f)}
    return replace(x, **changes)
