"""compensate: an adapter that gives back what a smaller copy of a model lost, by the inputs of a calibration.

In memory are the workers' matrices. What is solved lies in OUT.partial/, a file for each place, so that an interrupted
run goes on. The ranks are chosen when all is solved, which a budget needs; each place is then cut to its rank.

ADAPTER/ holds

    adapter_config.json, adapter_model.safetensors   the adapter as PEFT has it, 16 bits a number, scaled by 1
    laser.json                                       both models, the text, and per place its errors; see record.py
    README.md                                        the card
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, get_type_hints

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from laser.checkpoint.at_rest import CARD, wrong_sums
from laser.checkpoint.matrices import Matrix
from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.safetensors import sha256_of
from laser.checkpoint.source import Source, require_unchanged
from laser.checkpoint.swap import restore_earlier, take_place
from laser.compensate.budget import BEYOND, BITS_STORED, Offer, even_rank, spend
from laser.compensate.card import card_of
from laser.compensate.copies import require_same_matrix
from laser.compensate.peft import Slot, config_of, slots_of, stored_bits, write_adapter
from laser.compensate.places import ParameterPlace, Places, as_matrices
from laser.compensate.record import CompensationRecord, Corrected, HeldOut
from laser.compensate.rescaled import NotFiniteError, Rescaled
from laser.differences.unmerge import CONFIG, MODEL, RECORD
from laser.engine.crew import Crew, most_expensive_first
from laser.engine.workers import visit_all
from laser.errors import NumericalError, OutputError, RecordError, UsageError
from laser.files import (
    PASSING,
    claimed,
    disk_errors,
    require_led,
    require_no_mount,
    require_only,
    tidy_up,
    unfinished,
    write_atomically,
)
from laser.journal import Journal
from laser.moments import Moments
from laser.records import has_shape
from laser.spectral.correction import FACTOR_DTYPE, Correction, correct, inputs_alike
from laser.spectral.devices import Device

_PARTIAL_NAMES = re.compile(
    rf"\d{{6}}\.safetensors|journal\.jsonl|new|old|moments\.safetensors(?:\.partial)?|{PASSING.pattern}"
)
# What the adapter in a directory is worth, asked before it gets its name.
Judge = Callable[[Path, Sequence[Slot]], HeldOut | None]
# What an error of a place as large as its outputs counts in a budget.
Worth = Callable[[ParameterPlace], float]


@dataclass(frozen=True)
class Request:
    """How much is to be stored: the same rank everywhere, or bits per weight of what is corrected."""

    rank: int | None = None
    bits: float | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for what is no amount."""
        if (self.rank is None) == (self.bits is None):
            raise UsageError("found --rank and --bits, or neither; try one of them")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"an adapter of rank {self.rank} corrects nothing; try --rank 8")
        if self.bits is not None and not 0 < self.bits <= BITS_STORED:
            raise UsageError(f"{self.bits} bits per weight are no budget; try --bits 0.2")

    def solved(self, places: Sequence[ParameterPlace]) -> int:
        """Up to which rank each place is solved."""
        if self.rank is not None:
            return self.rank
        return max(1, round(BEYOND * even_rank({p.name: p.shape for p in places}, self.bits or 0.0)))

    def by_gradients(self, moments: Moments | None) -> bool:
        """Whether the budget goes by them."""
        return self.bits is not None and moments is not None and moments.has_gradients

    def stated(self) -> dict[str, float]:
        return {"rank": self.rank} if self.rank is not None else {"bits": float(self.bits or 0.0)}


class Line(TypedDict):
    """A line of the journal: what was solved for one place, or why nothing was."""

    name: str
    left: str | None
    tokens: int
    shrunk: bool
    outputs: float
    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    residual: float
    orthogonality: float
    tolerance: float
    file: str | None


LINE = get_type_hints(Line)

# --- one place --------------------------------------------------------------------------------------------------------


class NothingToCorrect(Exception):
    """Why a place gets no correction."""


@dataclass(frozen=True)
class Solve:
    """A visit that solves the correction of a place. moments: None for the plain norm."""

    places: Mapping[str, ParameterPlace]
    moments: Moments | None
    rank: int
    rescaled: Rescaled

    def __call__(self, matrix: Matrix, W: torch.Tensor, device: Device) -> tuple[Line, Correction | None]:
        """W (m, n) on the host. Raises NumericalError, which names the place, RecordError for other moments."""
        place = self.places[matrix.name]
        tokens, shrunk = 0, False
        try:
            metric = inputs_alike(W.shape[1])
            if self.moments is not None:
                tokens = self._tokens(place)
                metric = self._metric(place)
                shrunk = metric.form == "full" and tokens < W.shape[1]
                metric = replace(metric, shrink=metric.shrink or shrunk)
            Q = self.rescaled.copied(place, W)
            scales = self.rescaled.of(place)
            require_same_matrix(place, W, Q, scales)
            found = correct(W, Q, self.rank, metric, device, scales)
            if not found.rank:
                raise NothingToCorrect("the copy's outputs are the original's")
        except NothingToCorrect as reason:
            return _line(place, str(reason), tokens), None
        except NumericalError as error:
            named = "" if isinstance(error, NotFiniteError) else f"{place.name}: "
            raise NumericalError(f"{named}{error}", error.residual) from error
        line = _line(place, None, tokens)
        line["shrunk"], line["outputs"] = shrunk, found.outputs
        line["predicted"], line["measured"] = tuple(found.predicted.tolist()), tuple(found.measured.tolist())
        line["residual"], line["orthogonality"] = found.residual, found.orthogonality
        line["tolerance"] = found.tolerance
        return line, found

    def _tokens(self, place: ParameterPlace) -> int:
        assert self.moments is not None
        sites = [self.moments.sites.get(matrix.name) for matrix in place.matrices]
        if any(site is None for site in sites):
            raise NothingToCorrect("its inputs are not in the moments")
        tokens = self.moments.tokens(place.matrices[0].name)
        if not tokens:  # each matrix is then a site of its own
            raise NothingToCorrect("it met no input of the calibration's text")
        if len({site.key for site in sites if site is not None}) > 1:
            raise NothingToCorrect("its parts are multiplied with different inputs")
        return tokens

    def _metric(self, place: ParameterPlace) -> Any:
        """Of the place's inputs; each matrix in it has to be the one that was calibrated."""
        assert self.moments is not None
        found = None
        for matrix in place.matrices:
            found = self.moments.metric(matrix.name, self.rescaled.original.read(matrix.tensor, matrix.part))
            if found.form == "outputs":
                raise NothingToCorrect("its moments are of its outputs, as its inputs are wide; try --text")
        return found


def _line(place: ParameterPlace, left: str | None, tokens: int) -> Line:
    """Of a place of which nothing is solved yet."""
    return Line(
        name=place.name, left=left, tokens=tokens, shrunk=False, outputs=0.0, predicted=(), measured=(), residual=0.0,
        orthogonality=0.0, tolerance=0.0, file=None,
    )  # fmt: skip


# --- all of them ------------------------------------------------------------------------------------------------------


def compensate(
    original: Checkpoint,
    copy: Checkpoint,
    places: Places,
    moments: Moments | None,
    asked: Request,
    out: Path,
    *,
    rescaled: Rescaled,
    crew: Crew,
    judge: Judge = lambda *_: None,
    force: bool = False,
    tick: Callable[[Matrix, float], None] = lambda *_: None,
) -> CompensationRecord:
    """Write the new directory `out`: the adapter of `copy` that brings it nearest to `original` on the moments' text.

    rescaled: what `require_copy` found. judge: measures the adapter on another text, before it has its name. force: an
    earlier output of laser may be replaced, and stands until the new one is whole. Raises UsageError for a copy that
    lost nothing, RecordError for moments of another model, OutputError for an `out` that is in the way.
    """
    if moments is not None:
        moments.source.require(original, "moments file")
        names = [matrix.name for place in places.places for matrix in place.matrices]
        if not any(name in moments.sites for name in names):
            raise UsageError(
                f"the moments file has no inputs of {names[0]}, nor of the other {len(names) - 1} to correct; "
                "try --moments of a calibration with these, or other --roles"
            )
        if not moments.calibration.shrink:
            met = [moments.tokens(place.matrices[0].name) for place in places.places]
            require_enough(moments.calibration.text, met, places.places)
    with claimed(out):
        partial = unfinished(out)
        restore_earlier(out, partial / "old")
        require_compensation_place(out, force)
        told = None if moments is None else (moments.calibration.windows_sha256, moments.calibration.dtype)
        run = run_of_compensation(original, copy, told, asked, places, crew, asked.by_gradients(moments))
        if (there := compensation_found_again(out, run)) is not None:
            return there
        with disk_errors(out):
            partial.mkdir(parents=True, exist_ok=True)
        lines = _solved(rescaled, places.places, moments, asked, partial, run, crew, force, tick)
        record = _assemble_output(original, copy, places, moments, asked, partial, run, lines, judge)
        for checkpoint in (original, copy):
            require_unchanged(checkpoint)
        with disk_errors(out):
            take_place(partial / "new", out, partial / "old")
        tidy_up(partial, out)
    return record


def run_of_compensation(
    original: Checkpoint,
    copy: Checkpoint,
    told: tuple[str, str] | None,
    asked: Request,
    places: Places,
    crew: Crew,
    by_gradients: bool,
) -> dict[str, Any]:
    """What a run is told from others by. told: of which windows, in which dtype, its moments are; None: of none."""
    other = Source.of(copy)
    return {
        "kind": "compensation journal",
        "version": CompensationRecord.version,
        **Source.of(original).stated(),
        "copy": [other.identity, other.weights.short],
        "windows": None if told is None else list(told),
        "asked": asked.stated(),
        **({"by": "gradients"} if by_gradients else {}),
        "scales": "of norms and rows",  # how they are taken back: a solution of an earlier build is none of this one
        "places": hashlib.sha256(" ".join(place.name for place in places.places).encode()).hexdigest(),
        "device": crew.label,
    }


def require_enough(text: str, met: Sequence[int], places: Sequence[ParameterPlace]) -> None:
    """Raises UsageError where no place meets as many inputs as it has dimensions. met: how many each place meets."""
    known = list(zip(met, places, strict=True))
    if any(tokens >= place.shape[1] for tokens, place in known):
        return
    tokens, place = max(known, key=lambda pair: (pair[0], -pair[1].shape[1]))
    raise UsageError(
        f"{text} is too short: no matrix met as many inputs as it has dimensions, found {tokens} for {place.name}, "
        f"expected {place.shape[1]}; try more --windows, or --moments of laser calibrate --ledoit-wolf"
    )


def require_compensation_place(out: Path, force: bool) -> None:
    """Raises OutputError where something is in the way of `out`."""
    require_led(out)
    partial = unfinished(out)
    if out.exists():
        if not is_compensation(out):
            raise OutputError(
                f"{out} exists and was not made by laser compensate, and --force replaces nothing else; try another -o"
            )
        if not force:
            raise OutputError(f"{out} exists; try another -o, or --force to replace it")
        require_no_mount(out)
    require_only(partial, _PARTIAL_NAMES)


def is_compensation(out: Path) -> bool:
    """Whether laser made what lies at `out`."""
    try:
        CompensationRecord.load(out / RECORD)
    except RecordError:
        return False
    return True


def compensation_found_again(out: Path, run: Mapping[str, Any]) -> CompensationRecord | None:
    """The output of this very run, whole, which was killed while it tidied up: it is tidy now."""
    if not (out.exists() and unfinished(out).exists()):
        return None
    there = CompensationRecord.load(out / RECORD)
    if dict(there.run) != dict(run) or wrong_sums(out, there.parts):
        return None
    tidy_up(unfinished(out), out)
    return there


def _solved(
    rescaled: Rescaled, places: Sequence[ParameterPlace], moments: Moments | None, asked: Request, partial: Path,
    run: Mapping[str, Any], crew: Crew, force: bool, tick: Callable[[Matrix, float], None],
) -> dict[str, Line]:  # fmt: skip
    """Every place solved: its line in the journal, its factors in a file."""
    seen, matrices = as_matrices(rescaled.original, places)
    numbers = {matrix.name: number for number, matrix in enumerate(matrices)}
    found: dict[str, Line] = {}
    moments_line: dict[str, Any] = {"moments": None if moments is None else moments.calibration.identity}
    with opened_journal(partial, run, force) as log:
        if log.entries and log.entries[0] != moments_line:
            if not force:
                raise _not_ours(partial)
            log.forget(log.entries[0])
        if not log.entries:
            log.append(moments_line)
        for line in log.entries:
            if has_shape(line, LINE) and _is_written(line, partial):
                found[line["name"]] = line  # pyright: ignore[reportArgumentType]
        todo = [m for m in matrices if m.name not in found]
        work = Solve({p.name: p for p in places}, moments, asked.solved(places), rescaled)
        with closing(visit_all(seen, most_expensive_first(todo), work, crew)) as visits:
            for matrix, (line, correction), seconds in visits:
                if correction is not None:
                    path = partial / f"{numbers[matrix.name]:06d}.safetensors"
                    write_atomically(path, save({"A": correction.A, "B": correction.B.contiguous()}), sweeping=False)
                    line["file"] = f"{path.name} {sha256_of(path)}"
                log.append(dict(line))
                found[matrix.name] = line
                tick(matrix, seconds)
    return {m.name: found[m.name] for m in matrices}


def opened_journal(partial: Path, run: Mapping[str, Any], force: bool) -> Journal:
    """What is solved in `partial`, which belongs to this run from now on; its first entry names the moments.

    Raises RecordError where it belongs to another run, unless force drops that.
    """
    try:
        return Journal(partial / "journal.jsonl", run, anew=force)
    except RecordError as error:
        raise _not_ours(partial) from error


def _not_ours(partial: Path) -> RecordError:
    return RecordError(f"{partial} holds the work of another run, or damaged work; remove it, or try --force")


def _is_written(line: Mapping[str, Any], partial: Path) -> bool:
    """Whether the factors of a journal's line are there as they were written."""
    if line["file"] is None:
        return line["left"] is not None
    name, _, digest = line["file"].partition(" ")
    try:
        return sha256_of(partial / name) == digest
    except OSError:
        return False


def choose_ranks(
    places: Sequence[ParameterPlace],
    lines: Mapping[str, Line],
    asked: Request,
    worth: Worth | None = None,
) -> dict[str, int]:
    """The rank of each parameter. Experts share one: PEFT stores theirs in one tensor.

    worth: what a budget goes by; None: all places alike, whatever the scale of their outputs.
    """
    groups: dict[str, list[ParameterPlace]] = {}
    for place in places:
        groups.setdefault(place.parameter, []).append(place)
    if asked.rank is not None:
        return {name: max(_solved_rank(lines[place.name]) for place in group) for name, group in groups.items()}
    offers = {}
    for name, group in groups.items():
        gains = np.zeros(max(_solved_rank(lines[place.name]) for place in group))
        for place in group:
            if len(found := gains_of(lines[place.name])):
                gains[: len(found)] += found * (1.0 if worth is None else worth(place))
        (m, n), experts = group[0].shape, group[0].experts
        offers[name] = Offer(gains, BITS_STORED * (m + n) * experts)
    return spend(offers, (asked.bits or 0.0) * sum(place.shape[0] * place.shape[1] for place in places))


def gains_of(line: Line) -> np.ndarray:
    """(k,) what each further rank takes away: squared singular values of (W - Q) C^(1/2), over E||W x||^2."""
    return np.maximum(-np.diff(line["predicted"]), 0.0)


def worth_by_gradients(lines: Mapping[str, Line], moments: Moments) -> Worth:
    """By what it does to the loss.

    An error e of the m outputs for one token changes the loss by g^T e. Its square is ||g||^2 ||e||^2 / m on the mean
    over directions of e. Over all tokens, those an expert did not meet being 0, that is share * mean(g^2) * E||e||^2.
    """

    def worth(place: ParameterPlace) -> float:
        line, rows = lines[place.name], [matrix.shape[0] for matrix in place.matrices]
        squares = [moments.gradient(matrix.name) for matrix in place.matrices]
        gradient = sum(m * square for m, square in zip(rows, squares, strict=True)) / sum(rows)
        return line["tokens"] / moments.calibration.tokens * gradient * line["outputs"] * place.shape[0]

    return worth


def _solved_rank(line: Line) -> int:
    return max(len(line["predicted"]) - 1, 0)


def _assemble_output(
    original: Checkpoint, copy: Checkpoint, places: Places, moments: Moments | None, asked: Request, partial: Path,
    run: Mapping[str, Any], lines: Mapping[str, Line], judge: Judge,
) -> CompensationRecord:  # fmt: skip
    """OUT in partial/new: adapter, config, record and card."""
    by_gradients = asked.by_gradients(moments)
    worth = worth_by_gradients(lines, moments) if moments is not None and by_gradients else None
    ranks = choose_ranks(places.places, lines, asked, worth)
    slots = slots_of(places.places, ranks)
    if not slots:
        why = next((line["left"] for line in lines.values() if line["left"]), "the budget buys no rank of any")
        raise UsageError(f"nothing of {copy.name} can be corrected: {why}; try another copy, text or budget")
    new = partial / "new"
    with disk_errors(new):
        if new.exists():
            tidy_up(new, new)
        new.mkdir()

    def factors(place: ParameterPlace, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        file = lines[place.name]["file"]
        if file is None:
            m, n = place.shape
            return torch.zeros(rank, n, dtype=FACTOR_DTYPE), torch.zeros(m, rank, dtype=FACTOR_DTYPE)
        with safe_open(partial / file.partition(" ")[0], "pt") as opened:
            return opened.get_tensor("A")[:rank], opened.get_tensor("B")[:, :rank]

    write_adapter(new / MODEL, slots, factors)
    config = config_of(copy.hub.repo if copy.hub else copy.name, slots, places.modules)
    write_atomically(new / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    entries, left = _entries(places, lines, ranks)
    weights = sum(place.shape[0] * place.shape[1] for place in places.places)
    record = CompensationRecord(
        Source.of(original), Source.of(copy), None if moments is None else moments.calibration, asked.stated(),
        stored_bits(slots) / weights, entries, left, judge(new / MODEL, slots), dict(run),
        {name: sha256_of(new / name) for name in (CONFIG, MODEL)}, by_gradients,
    )  # fmt: skip
    write_atomically(new / CARD, card_of(record).encode())
    record.save(new / RECORD)
    return record


def _entries(
    places: Places, lines: Mapping[str, Line], ranks: Mapping[str, int]
) -> tuple[tuple[Corrected, ...], dict[str, str]]:
    """What laser.json says of each place, and of each matrix that got nothing."""
    entries, left = [], dict(places.left)
    for place in places.places:
        line, rank = lines[place.name], min(ranks[place.parameter], _solved_rank(lines[place.name]))
        if not rank:
            left |= {matrix.name: line["left"] or "the budget buys more elsewhere" for matrix in place.matrices}
            continue
        entries.append(
            Corrected(
                place.name, place.shape, rank, line["tokens"], line["predicted"][0], line["predicted"][rank],
                line["measured"][rank], line["residual"], line["orthogonality"], line["tolerance"], line["shrunk"],
            )
        )  # fmt: skip
    return tuple(entries), left
