"""Try edits: what a model's objective becomes with some matrices replaced. Many edits share one walk over the layers.

An edit in layer L leaves the states that enter layer L as they were. So one walk begins at the lowest layer that a
variant edits. Each variant branches off from the model's own states at its own lowest layer. In each layer the matrices
that a variant edits are swapped in place for as long as it runs. A layer is read once however many variants there are.
Each window is run by itself with the shapes of a plain pass, so that the bits are those of a plain pass.

States that enter a piece depend on the edits below it alone. Some are kept under that name, the model's own and those
of variants, and the next walk begins as high as they allow; an accepted edit makes those above it stale.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch

from laser.choices import ACCEPT
from laser.evaluation.activations import Activations
from laser.evaluation.objective import Measure, Objective
from laser.evaluation.perplexity import paired_difference
from laser.evaluation.streaming import LayeredModel

# A variant's matrices are made where the walk needs them, and freed behind.
RuleAndRank = tuple[str, int]  # rule, rank
Variant = Mapping[str, RuleAndRank]
# States that are kept: the piece that they enter, and the edits below it on top of those that are part of the model.
Boundary = tuple[int, frozenset[tuple[str, RuleAndRank]]]
NO_EDITS: frozenset[tuple[str, RuleAndRank]] = frozenset()


def accepted(rule: str, d: float, se: float | None) -> bool:
    """Whether a change is kept. Never when it is not finite: NaN compares false, and `not worse` must not mean that."""
    error = 0.0 if se is None else se
    return math.isfinite(d) and math.isfinite(error) and bool(ACCEPT[rule](d, error))


@dataclass(frozen=True)
class VariantResult:
    """One variant's values, one per unit of the objective, and what they took: the layers above its edits times
    windows, and its share of the walk's seconds."""

    values: list[float]
    layer_forwards: int
    seconds: float


class Walked(NamedTuple):
    """What a walk measured: each variant, the model as it is where that was asked for, and likewise the values of what
    was taken along."""

    variants: list[VariantResult]
    own: VariantResult | None = None
    along: list[float] | None = None


class Bench:
    """A model with its kept edits, and one objective that is measured on it with other edits on top.

    `cut` makes the matrix (m, n) that a name, rule and rank stand for, in storage dtype. `told` is called before each
    piece of a walk with its number, the last one's, and how many variants are alive.
    """

    def __init__(
        self,
        model: LayeredModel,
        objective: Measure,
        cut: Callable[[str, str, int], torch.Tensor],
        told: Callable[[int, int, int], None] = lambda *_: None,
    ) -> None:
        self.model, self.objective, self.cut, self.told = model, objective, cut, told
        self.wanted: set[int] = set()  # pieces before which the model's own states are kept
        self.branches: set[int] = set()  # pieces before which those of variants are kept, as far as memory goes
        self.boundaries: dict[Boundary, Activations] = {}
        self._firsts: dict[str, int] = {}  # of each matrix, asked for over and over
        self._ratio: float | None = None

    def first_piece(self, names: Iterable[str]) -> int:
        """Where a variant with edits of these matrices leaves the model's own states."""
        return min(map(self._first, names))

    def _first(self, name: str) -> int:
        if name not in self._firsts:
            self._firsts[name] = self.model.first_piece(name)
        return self._firsts[name]

    def room(self) -> int:
        """How many variants at a time leave their states in memory; at least 1. Beside them are the model's own states
        at the walk, and those that are still to be kept. The kept ones of variants give way."""
        give_way = sum(1 for boundary in self.boundaries if boundary[1])
        return max(self._room() + give_way - self.others(), 1)

    def _room(self) -> int:
        return self.model.store.room(self._lengths, self.model.width, self.model.dtype)

    def others(self) -> int:
        """States that a walk needs beside those of its variants."""
        return 1 + sum((piece, NO_EDITS) not in self.boundaries for piece in self.wanted)

    def as_many_as(self, other: Measure) -> int:
        """How many variants' states take as much memory as those of another objective's windows."""
        return math.ceil(sum(len(w.tokens) - 1 for w in other.windows) / sum(self._lengths))

    def reading_to_running(self) -> float:
        """How many times as long it takes to read a layer as to run the objective's windows through it; timed once, on
        the first layer, the best of three. It decides how much is measured together, and no result."""
        if self._ratio is None:
            windows, model = self.objective.windows, self.model
            reading, running = math.inf, math.inf
            for _ in range(3):  # other work on the machine only ever adds
                states, started = model.embed(windows), time.perf_counter()
                with model.held(1):
                    read = time.perf_counter()
                    model.run_layer(0, states)
                    states.hidden[-1, -1].item()  # a device is waited for
                    run = time.perf_counter()
                model.store.free(states)
                reading, running = min(reading, read - started), min(running, run - read)
            self._ratio = reading / max(running, 1e-9)
        return self._ratio

    def make_room(self, count: int, used: Collection[Boundary | None] = ()) -> None:
        """Let kept states of variants go until memory has room for `count` more; those that are `used` the last."""
        these = sorted((b for b in self.boundaries if b[1]), key=lambda boundary: boundary in used)
        for boundary in these:
            if self._room() >= count:
                return
            self.model.store.free(self.boundaries.pop(boundary))

    def may_keep(self, to_come: int) -> bool:
        """Whether states of a variant can be kept beside `to_come` others that a walk still needs."""
        return self._room() > to_come

    def walk(self, variants: Sequence[Variant], base: bool = False, along: Measure | None = None) -> Walked:
        """The objective's values for each variant on top of what is kept, and with `base` for the model as it is.

        along: another objective, whose values for the model as it is come with the same reading of the layers. The
        model is afterwards as it was before, bit for bit.
        """
        walk = _Walk(self, variants, base, along)
        try:
            return walk.go()
        finally:
            walk.free()

    def keep(self, variant: Variant) -> None:
        """Make the edits of `variant` part of the model."""
        for name, cut in variant.items():
            self.model.edit(name, self.model.store.keep(self.cut(name, *cut)))
        self.kept(variant)

    def kept(self, variant: Variant) -> None:
        """The edits of `variant` are part of the model now: what is kept here changes its name, or is stale."""
        for piece, below in tuple(self.boundaries):
            made = self.below(piece, variant)
            states = self.boundaries.pop((piece, below))
            if made <= below and (piece, below - made) not in self.boundaries:  # with it, or not touched by it
                self.boundaries[piece, below - made] = states
            else:
                self.model.store.free(states)

    def below(self, piece: int, variant: Variant) -> frozenset[tuple[str, RuleAndRank]]:
        """The edits that the states which enter a piece depend on."""
        return frozenset((name, cut) for name, cut in variant.items() if self._first(name) < piece)

    def forget(self, boundaries: Iterable[Boundary]) -> None:
        """Free what is kept there."""
        for boundary in tuple(boundaries):
            self.model.store.free(self.boundaries.pop(boundary))

    def all_boundaries(self, first: int) -> dict[int, Activations]:
        """Every boundary from piece `first` to the head, for a backward pass. Kept until forgotten."""
        pieces = range(first, self.model.layers + 2)
        if not self.boundaries.keys() >= {(piece, NO_EDITS) for piece in pieces}:
            wanted, self.wanted = self.wanted, set(pieces)
            self.walk((), base=True)
            self.wanted = wanted
        return {piece: self.boundaries[piece, NO_EDITS] for piece in pieces}

    @property
    def _lengths(self) -> list[int]:
        return [len(w.tokens) - 1 for w in self.objective.windows]

    def copy(self, states: Activations) -> Activations:
        """The same states in memory of their own."""
        found = self.model.store.allocate(self._lengths, self.model.width, self.model.dtype)
        found.copy_from(states)
        return found


class _Walk:
    """Once through the pieces: the model's own states, and those of each variant from where it branches off."""

    def __init__(self, bench: Bench, variants: Sequence[Variant], base: bool, along: Measure | None) -> None:
        self.bench, self.model, self.variants, self.base, self.along = bench, bench.model, variants, base, along
        self.last = self.model.layers + 1
        # Where each variant leaves the model's own states, and where its own are taken up that an earlier walk kept.
        self.begins: dict[int, list[int]] = {}
        self.kept: dict[int, Boundary] = {}
        self.edits: list[dict[int, dict[str, RuleAndRank]]] = []  # of each variant by piece
        beside = bench.others() + (bench.as_many_as(along) if along else 0)
        bench.make_room(len(variants) + beside, {*map(self._kept_of, variants)})
        for number, variant in enumerate(variants):
            if boundary := self._kept_of(variant):
                self.kept[number] = boundary
            else:
                self.begins.setdefault(bench.first_piece(variant), []).append(number)
            self.edits.append({})
            for name, cut in variant.items():
                for piece in self.model.pieces_of(name):
                    self.edits[number].setdefault(piece, {})[name] = cut
        # The model's own states are of use up to the piece where the last variant leaves them.
        self.highest = self.last if base else max(self.begins, default=0)
        self.own: Activations | None = None
        self.enters = self.last  # the piece that they enter first
        self.alive: dict[int, Activations] = {}
        self.steps = dict.fromkeys(range(-1, len(variants)), 0)  # pieces that each ran; -1: the model itself
        self.scores: dict[int, list[float]] = {}
        self.others: Activations | None = None  # of what is taken along
        self.others_seconds, self.others_scores = 0.0, list[float]()

    def _kept_of(self, variant: Variant) -> Boundary | None:
        """The highest piece before which states of this variant were kept."""
        boundaries, first = self.bench.boundaries, self.bench.first_piece(variant)
        found = ((p, self.bench.below(p, variant)) for p in sorted(self.bench.branches, reverse=True) if p > first)
        return next((boundary for boundary in found if boundary in boundaries), None)

    def go(self) -> Walked:
        started = time.perf_counter()
        self.model.prove(self.bench.objective.windows)
        for number in self.begins.get(0, ()):
            here = self._here(0, number).items()
            with self.model.held(*self.model.together(0)), self._swapped(here, {}, Counter()):
                self.alive[number] = self.model.embed(self.bench.objective.windows)
        with self.model.held(*self.model.together(0)) if self.along else nullcontext():
            if self.highest:
                self._enter()
            self.others = self.model.embed(self.along.windows) if self.along else None
        taken_up = [piece for piece, _ in self.kept.values()]
        for piece in range(1 if self.alive or self.others else min([self.enters, *taken_up]), self.last + 1):
            self._branch(piece)
            self.bench.told(piece, self.last, len(self.alive))
            with self.model.held(*self.model.together(piece), then=piece + 1 if piece < self.last else None):
                if self.own is not None and piece >= self.enters:
                    self._run(piece, -1, self.own)
                if self.along and self.others:
                    self._run_along(piece, self.along, self.others)
                cuts: dict[tuple[str, RuleAndRank], torch.Tensor] = {}  # those that come again in this piece
                alike = self._alike(piece)
                uses = Counter(edit for edits in alike for edit in edits)
                for edits, together in alike.items():
                    with self._swapped(edits, cuts, uses):
                        for number in together:
                            self._run(piece, number, self.alive[number])
        seconds = (time.perf_counter() - started - self.others_seconds) / max(sum(self.steps.values()), 1)
        found = {
            number: VariantResult(values, self._forwards(number), round(seconds * self.steps[number], 3))
            for number, values in self.scores.items()
        }
        variants = [found[number] for number in range(len(self.variants))]
        return Walked(variants, found.get(-1), self.others_scores if self.along else None)

    def _forwards(self, number: int) -> int:
        """What a variant needs by itself, whatever was known of it before; of the model itself (-1) all."""
        first = 1 if number < 0 else max(self.bench.first_piece(self.variants[number]), 1)
        return (self.last - first) * len(self.bench.objective.windows)

    def free(self) -> None:
        for states in (*self.alive.values(), self.own, self.others):
            if states is not None:
                self.model.store.free(states)
        self.alive, self.own, self.others = {}, None, None

    def _enter(self) -> None:
        """Take up the model's own states at the highest boundary that lies below all that needs them."""
        lowest = min(piece for piece in (*self.begins, self.last) if piece)
        at = max((piece for piece, below in self.bench.boundaries if below == NO_EDITS and piece <= lowest), default=0)
        windows = self.bench.objective.windows
        self.own = self.bench.copy(self.bench.boundaries[at, NO_EDITS]) if at else self.model.embed(windows)
        self.enters = at or 1

    def _branch(self, piece: int) -> None:
        """Let those begin that begin here, and keep what is worth keeping."""
        boundaries = self.bench.boundaries
        if self.own is not None and piece >= self.enters:
            if piece in self.bench.wanted and (piece, NO_EDITS) not in boundaries:
                boundaries[piece, NO_EDITS] = self.bench.copy(self.own)
            for number in self.begins.get(piece, ()):
                self.alive[number] = self.bench.copy(self.own)
            if piece == self.highest and not self.base:
                self.model.store.free(self.own)
                self.own = None
        if piece in self.bench.branches:
            to_come = len(self.variants) - len(self.alive) + self.bench.others() - 1
            for number in self.alive if len(self.variants) > 1 else ():
                boundary = piece, self.bench.below(piece, self.variants[number])
                if boundary[1] and boundary not in boundaries and self.bench.may_keep(to_come):
                    boundaries[boundary] = self.bench.copy(self.alive[number])
        for number, boundary in self.kept.items():
            if boundary[0] == piece:
                self.alive[number] = self.bench.copy(boundaries[boundary])

    def _alike(self, piece: int) -> dict[tuple[tuple[str, RuleAndRank], ...], list[int]]:
        """The variants that are alive, by what they edit in this piece: each cut is made and swapped in once."""
        found: dict[tuple[tuple[str, RuleAndRank], ...], list[int]] = {}
        for number in self.alive:
            found.setdefault(tuple(sorted(self._here(piece, number).items())), []).append(number)
        return found

    def _here(self, piece: int, number: int) -> dict[str, RuleAndRank]:
        edits = self.edits[number]
        return {name: cut for each in self.model.together(piece) for name, cut in edits.get(each, {}).items()}

    def _swapped(
        self,
        edits: Collection[tuple[str, RuleAndRank]],
        cuts: dict[tuple[str, RuleAndRank], torch.Tensor],
        uses: Counter[tuple[str, RuleAndRank]],
    ) -> AbstractContextManager[None]:
        """The model with these edits, each made once for all its `uses` in a piece and let go of after the last."""
        matrices = {}
        for edit in edits:
            name, cut = edit
            matrices[name] = cuts[edit] if edit in cuts else self.bench.cut(name, *cut)
            uses[edit] -= 1
            if uses[edit] > 0:
                cuts[edit] = matrices[name]
            else:
                cuts.pop(edit, None)
        return self.model.swapped(matrices)

    def _run(self, piece: int, number: int, states: Activations) -> None:
        if piece < self.last:
            self.model.run_layer(piece - 1, states)
        else:
            self.scores[number] = self._values(self.bench.objective, states)
        self.steps[number] += 1

    def _run_along(self, piece: int, along: Measure, states: Activations) -> None:
        started = time.perf_counter()
        if piece < self.last:
            self.model.run_layer(piece - 1, states)
        else:
            self.others_scores = self._values(along, states)
        self.others_seconds += time.perf_counter() - started

    def _values(self, objective: Measure, states: Activations) -> list[float]:
        return objective.values(self.model.score(states, objective.windows))


def change(objective: Objective, before: list[float], after: list[float]) -> tuple[float, float | None]:
    """d and se of the objective, NaN and None where a value is not finite. `after` may end early: see `racing`."""
    before = before[: len(after)]
    if not all(map(math.isfinite, [*before, *after])):
        return math.nan, None
    return paired_difference(before, after, objective.weights[: len(after)])
