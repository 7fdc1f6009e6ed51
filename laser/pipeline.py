"""Every matrix visited once: measured as a scan does, and cut where a plan or a rule says so.

A scan needs eigenvalues, a reduction eigenvectors too, and those cost 2 to 4 times as much. Where every matrix is
judged by its own spectrum, its eigenvectors are at hand when the verdict falls, and the scan comes for nothing: one
pass. With --lowest-snr K, or a search, the verdict needs all spectra: then eigenvalues of all and eigenvectors of K are
cheaper than eigenvectors of all, which nobody could keep either (as many bytes as the model in float64). So two passes
stay. Eigenvalues by themselves and beside their vectors come from two LAPACK routines, so that singular values of one
pass may differ from a scan's in the last digits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from laser.checkpoint.dequantised import as_bfloat16
from laser.checkpoint.fingerprint import require_stamp
from laser.checkpoint.hub import drop
from laser.checkpoint.matrices import DoubtWarning, Matrix, doubts, list_matrices
from laser.checkpoint.quantised import quantise
from laser.checkpoint.reader import OUTCOME, Checkpoint, by_whole_shards
from laser.checkpoint.safetensors import TORCH, Shard
from laser.checkpoint.shards import Job, Made, New, make_shard
from laser.checkpoint.source import Source, require_unchanged
from laser.checkpoint.swap import require_place, writing
from laser.checkpoint.writer import (
    JOURNAL,
    RECORDS,
    Describe,
    MakeNew,
    MakeShards,
    OnCheck,
    elsewhere_is_not_here,
    prepare_output,
    require_outside,
    write_checkpoint,
    write_part,
)
from laser.differences.base import Base, Delta
from laser.differences.difference import Verdict, judge_difference
from laser.differences.edits import OfDifference, exact_method, scaled
from laser.differences.opened import base_named, opened_model
from laser.engine.crew import Crew, Work, most_expensive_first
from laser.engine.workers import visit_all
from laser.errors import LaserError, NumericalError, OutputError, RecordError, UsageError
from laser.files import claimed, lock_of, real, tidy_up, unfinished
from laser.journal import Journal, spoiling, was_journal
from laser.moments import Moments, metric_of
from laser.outcome import Outcome, check_entries, describe_by, entry_of
from laser.parts import PartOfRun, alone, opened, read_all, require_undivided, tidy_parts
from laser.plan import Plan, PlanLine, Treatment, line_of
from laser.reasons import Kind, Why
from laser.selection import Selection
from laser.spectra import ENTRY, OF_DIFFERENCE, InData, Measured, Spectra, SpectraHeader, assemble, from_entry, to_entry
from laser.spectral.certificate import Truncation
from laser.spectral.data_metric import relative_error
from laser.spectral.devices import Device, device_of, in_float64
from laser.spectral.factorise import METHODS, Spectrum, to_device_if_it_fits
from laser.spectral.metric import PLAIN
from laser.spectral.permutation import NULL_ORDER, null_largest
from laser.spectral.rules import scale_in
from laser.spectral.shrinkage import Gains
from laser.spectral.spectrum import doubt_by, excess_kurtosis

# --- one visit --------------------------------------------------------------------------------------------------------


class Visited(NamedTuple):
    """What a visit to one matrix gave. measured: what a scan records; None where nobody asked. new (m, n): what takes
    its place, on the host, and `record`, its entry in laser.json; None where it stays."""

    measured: Measured | None
    new: torch.Tensor | None = None
    record: dict[str, Any] | None = None


@dataclass(frozen=True)
class Scan:
    """A visit that measures: what cannot be factorised is a reason, not an error.

    null_draws: permutations that are measured too. moments: with them the matrix is measured in that metric as well.
    base: with it the difference from the base's is measured; of those in `compared` only the entries are compared.
    rules: that are going to be asked; where float32 leaves the rank of one of them open, the values are in float64.
    """

    method: str
    null_draws: int = 0
    moments: Moments | None = None
    rules: tuple[str, ...] = ()
    base: Base | None = None
    compared: frozenset[str] = frozenset()

    def __call__(self, matrix: Matrix, W: torch.Tensor, device: Device) -> Visited:
        """W (m, n) on the host."""
        if self.base is not None:
            return Visited(self.difference(self.base, matrix, W, device))
        measured = measured_of(to_device_if_it_fits(W, device), device, self.method, self.null_draws, self.rules)
        if measured.skipped is not None or self.moments is None or not self.moments.tokens(matrix.name):
            return Visited(measured)
        try:
            values = self.moments.metric(matrix.name, W).values(W, device)
            return Visited(replace(measured, data=values.singular_values))
        except (NumericalError, UsageError) as error:  # the plain spectrum stands
            return Visited(replace(measured, data_failed=str(error)))

    def difference(self, base: Base, matrix: Matrix, W: torch.Tensor, device: Device) -> Measured:
        """What became of W (m, n), or a tensor of any shape, of the tuned checkpoint, and its difference's spectrum."""
        change, D = base.difference(matrix, W, device, matrix.name not in self.compared)
        if D is None:
            reason = f"skipped: {change.kind}, so there is no difference to factorise"
            if matrix.name in self.compared:
                reason = "skipped: its entries alone were compared"
            return Measured(np.empty(0), np.empty(0), skipped=reason, change=change)
        if change.kind is Verdict.SAME:  # a zero matrix, whose values are known
            return Measured(np.zeros(min(matrix.shape)), np.zeros(self.null_draws), 0.0, change=change)
        measured = measured_of(D, in_float64(device), exact_method(W, self.method), self.null_draws)
        if measured.skipped is None:
            change = judge_difference(change, measured.values, (matrix.shape[0], matrix.shape[1]))
        return replace(measured, change=change)


@dataclass(frozen=True)
class Reduction:
    """A visit that cuts as the matrix's line of a plan says, in the line's metric.

    moments: of lines in the metric of the data. fresh: moments of another text, on which each edit is measured.
    base: of lines about differences.
    """

    method: str
    lines: Mapping[str, PlanLine]
    moments: Moments | None = None
    fresh: Moments | None = None
    base: Base | None = None

    def __call__(self, matrix: Matrix, W: torch.Tensor, device: Device) -> Visited:
        """W (m, n) on the host. Raises NumericalError where no method meets its certificate."""
        line = self.lines[matrix.name]
        if self.base is not None:
            found = edit_of_difference(line, self.base.weights(matrix), W, device, self.method)
            return Visited(None, found.matrix.cpu(), entry_of(line, found))
        try:
            metric = metric_of(line.metric, line.name, W, self.moments)
            found = metric.visit(W, lambda _: line.gains, device, self.method).truncation
        except NumericalError as error:
            raise NumericalError(f"{line.name}: {error}", error.residual) from error
        assert found is not None, "gains were given"
        new = found.matrix.cpu()
        return Visited(None, new, entry_of(line, found) | on_fresh_text(W, new, line, self.fresh))


def edit_of_difference(
    line: PlanLine, W: torch.Tensor, q: torch.Tensor, device: Device, method: str = "gram"
) -> Truncation:
    """The tuned q (m, n), or of any shape where it is scaled, with its difference from the base's W as its line says.

    Raises NumericalError where no method meets its certificate.
    """
    try:
        if line.scale is not None:
            return scaled(W, q, line.scale)
        found = OfDifference(W).visit(q, lambda _: line.gains, device, method).truncation
    except NumericalError as error:
        raise NumericalError(f"{line.name}: {error}", error.residual) from error
    assert found is not None, "gains were given"
    return found


@dataclass(frozen=True)
class OnePass:
    """A visit that measures, judges the matrix by its own spectrum, and cuts it if the verdict says so.

    label: of the device, as the verdict states it, see `Spectra.device`. base, compared: as in `Scan`; of differences
    the spectrum comes first, and the factors of those that are cut behind it.
    """

    method: str
    source: Source
    treatment: Treatment
    selection: Selection
    label: str
    null_draws: int = 0
    base: Base | None = None
    compared: frozenset[str] = frozenset()

    def __call__(self, matrix: Matrix, W: torch.Tensor, device: Device) -> Visited:
        """W (m, n) on the host. Raises NumericalError where only the truncation fails."""
        if self.base is not None:
            scan = Scan(self.method, self.null_draws, base=self.base, compared=self.compared)
            measured = scan.difference(self.base, matrix, W, device)
            line = self.line(matrix, measured)
            if line.action != "reduce":
                return Visited(measured)
            found = edit_of_difference(line, self.base.weights(matrix), W, device, self.method)
            return Visited(measured, found.matrix.cpu(), entry_of(line, found))
        line = None

        def decide(s: Spectrum) -> Gains | None:
            nonlocal line
            line = self.line(matrix, Measured(s, null, tails))
            return line.gains if line.action == "reduce" else None

        W = to_device_if_it_fits(W, device)
        try:
            null = null_largest(W, self.null_draws, device)
            tails = excess_kurtosis(W, device)
            doubt = doubt_by((self.treatment.rule,), (W.shape[0], W.shape[1]), null)
            found = PLAIN.visit(W, decide, device, self.method, doubt)
        except (NumericalError, UsageError) as error:
            scanned = measured_of(W, device, self.method, self.null_draws)
            if scanned.skipped is None:  # no reason to skip, but one to stop
                residual = error.residual if isinstance(error, NumericalError) else None
                raise NumericalError(f"{matrix.name}: {error}", residual) from error
            return Visited(scanned)
        measured = Measured(found.values.singular_values, null, tails, note=found.values.stated, step=found.values.step)
        if found.truncation is None or line is None:
            return Visited(measured)
        return Visited(measured, found.truncation.matrix.cpu(), entry_of(line, found.truncation))

    def line(self, matrix: Matrix, measured: Measured) -> PlanLine:
        """The plan's line of one matrix by what was measured of it alone."""
        nulls = {matrix.name: measured.null} if len(measured.null) else {}
        kurtosis = {} if measured.kurtosis is None else {matrix.name: measured.kurtosis}
        values, skipped = {matrix.name: measured.values}, {}
        if measured.skipped is not None:
            values, skipped = {}, {matrix.name: Why(Kind.FAILED, measured.skipped)}
        steps = {matrix.name: measured.step}
        spectra = Spectra(
            self.source, (matrix,), values, skipped, self.method, self.label, nulls, kurtosis, steps=steps
        )
        if self.base is not None and measured.change is not None:
            changes = {matrix.name: measured.change}
            spectra = replace(spectra, delta=Delta(self.base.pair.base, self.base.pair.tuned, changes))
        return line_of(spectra, matrix, self.treatment, self.selection)


def measured_of(W: torch.Tensor, device: Device, method: str, null_draws: int, rules: Sequence[str] = ()) -> Measured:
    """What a scan records of W (m, n), wherever it is, by its plain singular values. rules: as in `Scan`."""
    try:
        null = null_largest(W, null_draws, device)
        found = PLAIN.values(W, device, method, doubt_by(rules, (W.shape[0], W.shape[1]), null))
        return Measured(found.singular_values, null, excess_kurtosis(W, device), note=found.stated, step=found.step)
    except (NumericalError, UsageError) as error:
        return Measured(np.empty(0), np.empty(0), skipped=describe_failure(W, error))


def on_fresh_text(W: torch.Tensor, B: torch.Tensor, line: PlanLine, fresh: Moments | None) -> dict[str, float]:
    """What share of E||W x||^2 is lost with B in the place of W on the inputs of another calibration, if it saw any.

    Where that knows outputs alone, as of inputs wider than 4096, it can tell of projections only: of no shrunk matrix.
    """
    if fresh is None or not fresh.tokens(line.name):
        return {}
    metric = fresh.metric(line.name, W)
    if metric.form == "outputs" and (line.shrink or line.below):
        return {}
    return {"fresh_output_error": relative_error(W, B, line.rank or 0, metric)}


def describe_failure(W: torch.Tensor, error: LaserError) -> str:
    """The plan's reason for leaving a matrix alone."""
    W = W.cpu()  # where W lies there may be no memory left to look at it
    if W.is_floating_point() and W.element_size() > 1 and not torch.isfinite(W).all():
        bad = int((~torch.isfinite(W)).sum())
        return f"skipped: not finite ({bad} NaN or Inf of {W.numel()})"
    return f"skipped: {error}"


# --- what is visited --------------------------------------------------------------------------------------------------


def check_method(method: str) -> None:
    """Raises UsageError for a method that does not exist."""
    if method not in METHODS:
        raise UsageError(f"no method is called {method!r}; try --method {'|'.join(METHODS)}")


def selected_of(checkpoint: Checkpoint, selection: Selection) -> tuple[list[Matrix], dict[str, Why]]:
    """Every matrix of the checkpoint, in file order, and why some are not visited.

    Warns (DoubtWarning) about names that the table of families does not know. Raises UsageError for a selection that
    matches nothing.
    """
    matrices = list_matrices(checkpoint)
    if message := doubts(checkpoint, matrices):
        warnings.warn(message, DoubtWarning, stacklevel=3)
    selection.check(matrices)
    return matrices, {m.name: why for m in matrices if (why := selection.why_not(m))}


def visited_of(matrices: Iterable[Matrix], skipped: Container[str], base: Base | None) -> list[Matrix]:
    """What is read: what is not skipped, and with a base all whose entries can be compared."""
    return [m for m in matrices if m.name not in skipped or (base is not None and m.dtype in TORCH)]


def run_of(kind: str, version: int, checkpoint: Checkpoint, method: str, crew: Crew, **more: Any) -> dict[str, Any]:
    """What a journal is identified by: neither its output's place nor who did the work."""
    stated = Source.of(checkpoint).stated()
    return {"kind": kind, "version": version, **stated, "method": method, "device": crew.label} | more


# --- scan -------------------------------------------------------------------------------------------------------------


def check_scan(method: str, null_draws: int) -> None:
    """What can be refused of a scan before its model is opened. Raises UsageError."""
    check_method(method)
    if null_draws < 0:
        raise UsageError(f"{null_draws} permutations cannot be drawn; try --null 19")


def drawn_as(null_draws: int) -> dict[str, int]:
    """How many permutations a run measures, and in which order they put the entries: two orders are not mixed."""
    return {"null_draws": null_draws} | ({"null_order": NULL_ORDER} if null_draws else {})


def run_of_scan(
    checkpoint: Checkpoint,
    selection: Selection,
    crew: Crew,
    method: str,
    null_draws: int,
    moments: Moments | None,
    rules: Sequence[str] = (),
    base: Base | None = None,
) -> dict[str, Any]:
    """What a scan's journal is identified by."""
    more: dict[str, Any] = {"moments": moments.calibration.identity} if moments else {}
    if rules and crew.devices[0].dtype == torch.float32:  # in float64 they change nothing
        more |= {"rules": sorted(rules)}
    more |= base.stated() if base else {}
    more |= {"selection": selection.describe(), **drawn_as(null_draws)}
    return run_of("scan journal", SpectraHeader.version, checkpoint, method, crew, **more)


def scan(
    checkpoint: Checkpoint | str | Path,
    selection: Selection | None = None,
    *,
    device: Device | str | None = None,
    crew: Crew | None = None,
    method: str = "gram",
    journal: Path | None = None,
    null_draws: int = 0,
    moments: Moments | None = None,
    rules: Sequence[str] = (),
    base: Base | Checkpoint | str | Path | None = None,
    tick: Callable[[Matrix], None] = lambda _: None,
    anew: bool = False,
) -> Spectra:
    """Singular values of every selected matrix; the others are listed with the reason why not.

    checkpoint: opened, or its directory or Hub id. device: chosen, or its name. `crew` says who computes, by default
    `device` and, on the host, as many workers as cores and memory allow; the result does not depend on how many they
    are. In memory are the workers' matrices and two read ahead. With `journal`, each result is appended to that file at
    once and an interrupted scan goes on from there. The caller removes it when the spectra are saved, and with `anew`
    one of another scan is dropped. `tick` is called per matrix.

    A matrix with NaN or Inf, or one that no method can factorise, is skipped with its reason. `null_draws` permutations
    of each matrix are measured too, by their largest singular value: what the rule `parallel` needs. With `moments` the
    singular values are measured once more in the metric of the data, where a matrix was calibrated. In float32 the
    `rules` that are going to be asked send a matrix on to float64 where one of its values lies at the threshold. With
    `base` the values are those of the biwhitened differences from it, and what became of each tensor is recorded.
    Warns (DoubtWarning) about names that the table of families does not know.
    Raises UsageError for a selection that matches nothing, or a negative number of draws.
    """
    checkpoint = opened_model(checkpoint)
    base = base_named(base, checkpoint)
    selection, crew = selection or Selection(), crew or Crew((device_of(device),))
    check_scan(method, null_draws)
    if moments is not None:
        moments.source.require(checkpoint, "moments")
    matrices, skipped = selected_of(checkpoint, selection)
    run = run_of_scan(checkpoint, selection, crew, method, null_draws, moments, rules, base)
    todo = most_expensive_first(visited_of(matrices, skipped, base))
    work = Scan(method, null_draws, moments, tuple(rules), base, frozenset(skipped))
    with Journal(journal, run, shapes=(ENTRY, OF_DIFFERENCE), anew=anew) if journal else nullcontext() as log:
        found = _measure(checkpoint, todo, work, crew, log, tick)
        if base is not None:
            with spoiling(log):
                base.require_unchanged()
    return spectra_of(checkpoint, matrices, found, skipped, method, crew.label, null_draws, moments, base)


def spectra_of(
    checkpoint: Checkpoint,
    matrices: Sequence[Matrix],
    found: Mapping[str, Measured],
    skipped: Mapping[str, Why],
    method: str,
    label: str,
    null_draws: int,
    moments: Moments | None = None,
    base: Base | None = None,
) -> Spectra:
    """The record of a scan. With a base also what became of every tensor, those that are skipped too."""
    chosen = {name: measured for name, measured in found.items() if name not in skipped}
    spectra = assemble(checkpoint, matrices, chosen, skipped, method, label, null_draws)
    spectra = replace(spectra, data=InData.of(moments, spectra.values, chosen))
    if base is None:
        return spectra
    changes = {name: measured.change for name, measured in found.items() if measured.change is not None}
    delta = base.delta_of({m.name: changes.get(m.name) or base.by_bytes(m) for m in matrices})
    return replace(spectra, source=delta.source, delta=delta)


def _measure(
    checkpoint: Checkpoint,
    matrices: Sequence[Matrix],
    work: Scan,
    crew: Crew,
    log: Journal | None,
    tick: Callable[[Matrix], None],
) -> dict[str, Measured]:
    """What was measured of these matrices by name: what the journal has of them, and all else."""
    found = measured_in(log) if log else {}
    for matrix in matrices:
        if matrix.name in found:
            tick(matrix)
    todo = [m for m in matrices if m.name not in found]
    with closing(visit_all(checkpoint, todo, work, crew)) as visits:
        for matrix, visited, _ in visits:
            assert visited.measured is not None, "a scan measures"
            found[matrix.name] = visited.measured
            if log:
                log.append(to_entry(matrix.name, visited.measured))
            tick(matrix)
    with spoiling(log):
        require_unchanged(checkpoint)
    return found


def measured_in(log: Journal) -> dict[str, Measured]:
    """What a scan's journal has of its matrices, by name."""
    entries = (entry for entry in log.entries if "name" in entry)
    return {entry["name"]: from_entry(entry, f"{log.path}: the entry of {entry['name']}") for entry in entries}


def records_of(out: Path) -> Path:
    """Where `run` keeps the records that it makes on the way: spectra, plan, search."""
    return out / RECORDS


def spectra_there(
    path: Path,
    checkpoint: Checkpoint,
    selection: Selection,
    crew: Crew,
    method: str,
    null_draws: int,
    moments: Moments | None,
    base: Base | None = None,
) -> Spectra | None:
    """The spectra at `path`, if they are those of this scan."""
    there = Spectra.load(path)
    wanted = {m.name for m in there.matrices if selection.why_not(m) is None}
    tried = {m.name for m in there.matrices if m.no_spectrum is None}
    reasons = ((name, why) for name, why in there.skipped.items() if name in tried)
    done = there.values.keys() | {name for name, why in reasons if why.kind is Kind.FAILED}
    source = Source.of(checkpoint) if base is None else base.source
    if base is not None and wanted and not there.values:  # of a scale, whose entries alone were compared
        return None
    if not there.source.is_of(source) or (there.method, there.device) != (method, crew.label):
        return None
    drawn = {len(there.nulls.get(name, ())) for name in there.values}
    known = there.data.calibration.identity if there.data else None
    same = moments is None or known == moments.calibration.identity
    same_nulls = drawn <= {null_draws} and (not null_draws or there.null_order == NULL_ORDER)
    return there if wanted == done and same_nulls and same else None


def of_another_run(out: Path) -> OutputError:
    return OutputError(f"{out} holds the finished output of another run; try another -o, or --force to replace it")


def tidy_spectra(path: Path) -> None:
    """Remove what a process that was killed behind its scan left beside whole spectra, unless somebody is at work."""
    partial = unfinished(path)
    if not partial.exists() and not lock_of(path).exists():
        return
    with suppress(OutputError), claimed(path):
        if was_journal(partial, "scan journal"):
            tidy_up(partial, path)


def scan_into(
    path: Path,
    checkpoint: Checkpoint,
    selection: Selection,
    crew: Crew,
    method: str,
    tick: Callable[[Matrix], None] = lambda _: None,
    null_draws: int = 0,
    moments: Moments | None = None,
    base: Base | None = None,
    anew: bool = False,
    rules: Sequence[str] = (),
) -> Spectra:
    """The spectra at `path` if they are those of this scan; else scan, keeping the work so far in `path`.partial.

    `anew` measures again whatever is there, and drops the work of another scan.
    """
    partial = unfinished(path)
    with claimed(path):
        if path.exists() and not anew:
            there = spectra_there(path, checkpoint, selection, crew, method, null_draws, moments, base)
            if there is not None:
                tidy_spectra(path)
                return there
        if not anew:
            require_undivided(partial)
        spectra = scan(
            checkpoint,
            selection,
            crew=crew,
            method=method,
            journal=partial,
            null_draws=null_draws,
            moments=moments,
            rules=rules,
            base=base,
            tick=tick,
            anew=anew,
        )
        spectra.save(path)
        tidy_up(partial, path)
        tidy_parts(partial)
        return spectra


def scan_part(
    path: Path,
    checkpoint: Checkpoint,
    selection: Selection,
    crew: Crew,
    method: str,
    part: PartOfRun,
    tick: Callable[[Matrix], None] = lambda _: None,
    null_draws: int = 0,
    moments: Moments | None = None,
) -> Spectra | list[PartOfRun]:
    """Scan every Nth matrix; whoever ends last puts the spectra at `path`, and returns them.

    Others return which parts are not done. Killed and called again, it goes on where it was. Raises as `scan`, and
    OutputError where parts of another scan lie there.
    """
    check_scan(method, null_draws)
    if moments is not None:
        moments.source.require(checkpoint, "moments")
    matrices, skipped = selected_of(checkpoint, selection)
    run = run_of_scan(checkpoint, selection, crew, method, null_draws, moments)
    place = unfinished(path)

    def there() -> Spectra | None:
        """The spectra, where they are whole: then no part is left."""
        if not path.exists():
            return None
        made = spectra_there(path, checkpoint, selection, crew, method, null_draws, moments)
        if made is None:
            raise OutputError(f"{path} exists and is of another scan; try another -o")
        tidy_parts(place)
        return made

    if (made := there()) is not None:
        return made
    mine = part.mine(most_expensive_first([m for m in matrices if m.name not in skipped]))
    with opened(place, run, (ENTRY,), part) as (log, was_done):
        if not path.exists():  # else made whole meanwhile
            _measure(checkpoint, mine, Scan(method, null_draws, moments), crew, log, tick)
            if not was_done:
                log.append({"done": {}})
    with read_all(place, run, (ENTRY,), part) as (_, missing):
        if missing and not path.exists():
            return missing
    with alone(path):
        if (made := there()) is not None:
            return made
        found: dict[str, Measured] = {}
        with read_all(place, run, (ENTRY,), part) as (logs, _):
            for each in logs:
                found |= measured_in(each)
        spectra = assemble(checkpoint, matrices, found, skipped, method, crew.label, null_draws)
        spectra = replace(spectra, data=InData.of(moments, spectra.values, found))
        spectra.save(path)
        tidy_parts(place)
        return spectra


# --- reduce -----------------------------------------------------------------------------------------------------------


def reduce(
    checkpoint: Checkpoint | str | Path,
    plan: Plan,
    out: str | Path,
    *,
    device: Device | str | None = None,
    crew: Crew | None = None,
    method: str = "gram",
    resume: bool = False,
    force: bool = False,
    evict: bool = False,
    dtype: str | None = None,
    moments: Moments | None = None,
    fresh: Moments | None = None,
    base: Base | Checkpoint | str | Path | None = None,
    tick: Callable[[Matrix, float], None] = lambda *_: None,
    on_check: OnCheck = lambda *_: None,
) -> Outcome:
    """Write `checkpoint` to the directory `out` with the plan's matrices truncated to the plan's ranks.

    `crew` says who computes, by default `device` and, on the host, as many workers as cores and memory allow; the
    result does not depend on how many they are. In memory are each worker's matrix, Gram matrix and eigenvectors, two
    matrices read ahead and two results to be written. Killed at any moment and called again with `resume`, the result
    is byte-identical and no finished matrix is computed twice. With `evict`, each shard of a model from the Hub leaves
    the Hub's cache as soon as its output is on the disk. FP8 matrices are written as FP8 with new scales, or, with
    `dtype` "bfloat16", the whole checkpoint without FP8 and its config without quantization_config. Lines in the metric
    of the data need the `moments` that the plan was made with; with `fresh` moments of another text the outcome says
    what each edit costs there. A plan of differences needs the `base`, and the plan's lines are then about these.
    `tick` is called with each finished matrix and its seconds of computation, `on_check`
    with how many bytes of an earlier run were read again, of how many. Raises
    RecordError for a plan or moments of another checkpoint, UsageError for moments that are needed and missing,
    OutputError for an `out` that may not be written, NumericalError (naming the tensor) where no method meets its
    certificate.
    """
    checkpoint, out = opened_model(checkpoint), Path(out)
    base = base_named(base, checkpoint)
    crew = crew or Crew((device_of(device),))
    require_base_apart(base, out)
    writer = _Reducer(checkpoint, plan, crew, method, evict, dtype, moments, fresh, base, tick)
    with writing(writer.source, out, resume=resume, force=force) as place:
        document = write_checkpoint(**writer.whole(place), on_check=on_check)
    return Outcome.from_document(document, out / OUTCOME)


def reduce_part(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    part: PartOfRun,
    *,
    crew: Crew,
    method: str = "gram",
    evict: bool = False,
    dtype: str | None = None,
    moments: Moments | None = None,
    fresh: Moments | None = None,
    base: Base | None = None,
    tick: Callable[[Matrix, float], None] = lambda *_: None,
    on_check: OnCheck = lambda *_: None,
) -> Outcome | list[PartOfRun]:
    """As `reduce`, of every Nth shard alone; whoever ends last makes the output whole, and returns its outcome.

    Others return which parts are not done. Killed and called again, it goes on where it was. The directory `out` is the
    same one for all parts, at the same time or one after the other. Raises as `reduce`, and OutputError where parts of
    another reduction lie there, or one that was begun undivided.
    """
    require_base_apart(base, out)
    writer = _Reducer(checkpoint, plan, crew, method, evict, dtype, moments, fresh, base, tick)
    require_place(writer.source, out, resume=True, force=False)
    prepare_output(writer.source, out, resume=True)
    made = write_part(**writer.whole(out), part=part, on_check=on_check)
    return made if isinstance(made, list) else Outcome.from_document(made, out / OUTCOME)


class _Reducer:
    """What writes a reduction, once all that can be refused of it has been."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        crew: Crew,
        method: str,
        evict: bool,
        dtype: str | None,
        moments: Moments | None,
        fresh: Moments | None,
        base: Base | None,
        tick: Callable[[Matrix, float], None],
    ) -> None:
        self.hub, self.plan, self.crew, self.tick = checkpoint.hub if evict else None, plan, crew, tick
        self.base = base
        made = prepare(checkpoint, plan, crew, method, evict, dtype, moments, fresh, base)
        self.source, self.touched, self.run = made
        weights = tuple(m for m in self.touched if m.name in plan.reductions)
        self.cuts = Cuts(self.source, weights, Reduction(method, plan.reductions, moments, fresh, base), stored)

    def whole(self, out: Path) -> dict[str, Any]:
        """The arguments of `write_checkpoint` and `write_part`."""
        compute, elsewhere = makers_of(self.cuts, out, self.crew, self.tick)
        return {
            "source": self.source,
            "out": out,
            "touched": self.touched,
            "compute": compute,
            "describe": with_base(self.base, describe_by(self.plan)),
            "run": self.run,
            "done": self.done,
            "elsewhere": elsewhere,
        }

    def done(self, shard: Shard) -> None:
        """Let a shard of the source leave the Hub's cache."""
        if self.hub is not None:
            if shard.stamp is not None and shard.path.exists():
                require_stamp(shard.path, shard.stamp)
            drop(self.hub, shard.path.name)


def with_base(base: Base | None, describe: Describe) -> Describe:
    """`describe`, once the base is known to be still what it was when it was opened. Raises CheckpointError."""
    if base is None:
        return describe

    def checked(records: Mapping[str, dict[str, Any]], shards: dict[str, str | None]) -> dict[str, Any]:
        base.require_unchanged()
        return describe(records, shards)

    return checked


def require_base_apart(base: Base | None, out: Path) -> None:
    """Raises OutputError where an output would lie in the base, or the base in it."""
    if base is not None:
        require_outside(base.checkpoint, out)


def prepare(
    checkpoint: Checkpoint,
    plan: Plan,
    crew: Crew,
    method: str,
    evict: bool,
    dtype: str | None,
    moments: Moments | None,
    fresh: Moments | None,
    base: Base | None = None,
) -> tuple[Checkpoint, list[Matrix], dict[str, Any]]:
    """What `reduce` writes from, what it touches, what identifies it. Raises where it refuses what is asked for."""
    check_method(method)
    plan.require(checkpoint, base)
    plan.require_moments(moments)
    if fresh is not None and base is not None:
        raise UsageError("--fresh measures edits of a model, not of its difference from a base; try it without --base")
    if base is not None and dtype is not None:
        raise UsageError("--output-dtype is for FP8, which no difference is taken of; try it without")
    if fresh is not None:
        fresh.source.require(checkpoint, "fresh moments")
    hub, checkpoint = checkpoint.hub, in_dtype(by_whole_shards(checkpoint), dtype)
    if evict and hub is None:
        raise UsageError(f"{checkpoint.path} is a directory, and a source is never changed; try without --evict")
    matrices = {m.name: m for m in list_matrices(checkpoint)}
    touched = with_scales(checkpoint, [m for m in matrices.values() if m.name in plan.reductions], matrices)
    if base is not None:
        for matrix in touched:
            base.require_place(matrix)
    run = run_of_plan(plan, method, crew) | ({"fresh": asdict(fresh.calibration)} if fresh else {})
    return checkpoint, touched, run | ({"dtype": dtype} if dtype else {})


def in_dtype(checkpoint: Checkpoint, dtype: str | None) -> Checkpoint:
    """The checkpoint as it is to be written. Raises UsageError for a dtype that it cannot be written in."""
    if dtype is None:
        return checkpoint
    if dtype != "bfloat16":
        raise UsageError(f"no reduction is written as {dtype!r}; try --output-dtype bfloat16, or without")
    return as_bfloat16(checkpoint)


def weights_and_scales(checkpoint: Checkpoint, matrix: Matrix) -> set[str]:
    """A matrix and, where it is FP8, its scales: what is written when it changes."""
    scales = checkpoint.fp8.scales if checkpoint.fp8 else {}
    return {matrix.name, scales.get(matrix.tensor, matrix.name)}


def with_scales(checkpoint: Checkpoint, touched: list[Matrix], matrices: Mapping[str, Matrix]) -> list[Matrix]:
    """The touched matrices and their scales, in file order. Raises UsageError for a part of a fused FP8 tensor."""
    if checkpoint.fp8 is None:
        return touched
    fused = next((m for m in touched if m.part is not None and m.tensor in checkpoint.fp8.scales), None)
    if fused:
        raise UsageError(
            f"{fused.name} is a part of an FP8 tensor, whose blocks it shares; try --output-dtype bfloat16"
        )
    names = {part for m in touched for part in weights_and_scales(checkpoint, m)}
    return [m for m in matrices.values() if m.name in names]


def stored(checkpoint: Checkpoint, matrix: Matrix, visited: Visited) -> Iterator[New]:
    """A new matrix as it is to be stored: in its dtype, or as FP8 and scales, which have no record of their own."""
    fp8, new, record = checkpoint.fp8, visited.new, visited.record
    assert new is not None and record is not None, "a line of a plan replaces its matrix"
    if fp8 is None or matrix.tensor not in fp8.scales:
        yield matrix.name, new.to(TORCH[matrix.dtype]), record
        return
    scale = fp8.scales[matrix.tensor]
    q, s = quantise(new, TORCH[checkpoint.tensors[scale].dtype], fp8.block, fp8.powers_of_two)
    yield matrix.name, q, record
    yield scale, s, {}


def judged(_: Checkpoint, matrix: Matrix, visited: Visited) -> Iterator[New]:
    """A matrix of one pass as it is to be stored, None where it stays, with what was measured of it beside its cut."""
    assert visited.measured is not None, "one pass measures"
    yield matrix.name, visited.new, {"scan": to_entry(matrix.name, visited.measured), "cut": visited.record}


@dataclass(frozen=True)
class Cuts:
    """Where new matrices come from: visits to these `weights` of a checkpoint, and what is stored of each visit."""

    checkpoint: Checkpoint
    weights: tuple[Matrix, ...]
    work: Work[Visited]
    stored: Callable[[Checkpoint, Matrix, Visited], Iterator[New]]

    def make(
        self, names: Iterable[str], crew: Crew, tick: Callable[[Matrix, float], None]
    ) -> Generator[New, None, None]:
        """Those of these names, each once. The scales of an FP8 matrix, perhaps in another shard, are made with it."""
        wanted = set(names)
        weights = [m for m in self.weights if wanted & weights_and_scales(self.checkpoint, m)]
        with closing(visit_all(self.checkpoint, by_shard(self.checkpoint, weights), self.work, crew)) as visits:
            for matrix, visited, seconds in visits:
                for name, new, record in self.stored(self.checkpoint, matrix, visited):
                    if name in wanted:
                        yield name, new, record
                    del new
                del visited
                tick(matrix, seconds)


@dataclass(frozen=True)
class WholeShards:
    """On a node: a whole shard of `out`, made by the workers there."""

    cuts: Cuts
    out: Path

    def __call__(self, job: tuple[str, tuple[Matrix, ...]], crew: Crew) -> tuple[Made, list[tuple[Matrix, float]]]:
        """job: the shard's name, and which of its matrices are touched. Raises OutputError where `out` is not here."""
        if not self.out.is_dir():
            raise elsewhere_is_not_here(self.out)
        seconds: list[tuple[Matrix, float]] = []
        name, touched = job
        shard = next(shard for shard in self.cuts.checkpoint.shards if shard.name == name)
        names = [matrix.name for matrix in touched]
        with closing(self.cuts.make(names, crew, lambda *found: seconds.append(found))) as results:
            return make_shard(shard, touched, self.out, results), seconds


def makers_of(
    cuts: Cuts, out: Path, crew: Crew, tick: Callable[[Matrix, float], None]
) -> tuple[MakeNew, MakeShards | None]:
    """Who makes the matrices of `out` for `write_checkpoint`: workers here, or nodes that write whole shards."""

    def compute(names: list[str]) -> Generator[New, None, None]:
        return cuts.make(names, crew, tick)

    def elsewhere(jobs: list[Job]) -> Generator[Made, None, None]:
        from laser.engine.ray import on_nodes  # imported when needed: Ray is an extra

        todo = [(job.shard.name, job.touched) for job in jobs]
        with closing(on_nodes(cuts.checkpoint, todo, WholeShards(cuts, real(out)), crew)) as results:
            for made, visits in results:
                for matrix, seconds in visits:
                    tick(matrix, seconds)
                yield made

    return compute, None if crew.engine == "threads" else elsewhere


def by_shard(checkpoint: Checkpoint, matrices: Iterable[Matrix]) -> list[Matrix]:
    """Shard after shard, and within each the most expensive first.

    Shards become whole, and go to the disk, all along, while the last matrices are still cheap ones.
    """
    place = {shard.name: i for i, shard in enumerate(checkpoint.shards)}
    return sorted(matrices, key=lambda m: (place[checkpoint.tensors[m.tensor].shard], -m.cost))


def run_of_plan(plan: Plan, method: str, crew: Crew) -> dict[str, Any]:
    """What a reduction is identified by: neither its output's place nor who did the work."""
    return {
        "kind": "reduce journal",
        "version": Outcome.version,
        **plan.source.stated(),  # which `require` has compared with the checkpoint: here it may know more
        "plan": plan.sha256,
        "method": method,
        "device": crew.label,
    }


# --- one pass ---------------------------------------------------------------------------------------------------------


def run_of_pass(
    checkpoint: Checkpoint,
    selection: Selection,
    treatment: Treatment,
    crew: Crew,
    method: str,
    null_draws: int,
    base: Base | None = None,
) -> dict[str, Any]:
    """What the journal of one pass is identified by."""
    how: dict[str, Any] = base.stated() if base else {}
    how |= {"rule": treatment.rule, "treatment": treatment.describe(), "selection": selection.describe()}
    return run_of("one pass journal", Outcome.version, checkpoint, method, crew, **how, **drawn_as(null_draws))


def reduce_in_one_pass(
    checkpoint: Checkpoint,
    out: Path,
    selection: Selection,
    treatment: Treatment,
    choose: Callable[[Spectra], Plan],
    *,
    crew: Crew,
    method: str,
    null_draws: int,
    base: Base | None = None,
    tick: Callable[[Matrix, float], None] = lambda *_: None,
    on_check: OnCheck = lambda *_: None,
) -> tuple[Spectra, Plan, Outcome]:
    """Reduce every selected matrix by `treatment` as it is visited, and make the records of scan and plan as well.

    `choose` makes the plan from all spectra; it must judge as `treatment` does. `out` has to be prepared. Killed and
    called again, it goes on where it was. Raises as scan and reduce do.
    """
    treatment.check()
    check_method(method)
    checkpoint = by_whole_shards(checkpoint)
    matrices, skipped = selected_of(checkpoint, selection)
    visited = visited_of(matrices, skipped, base)
    # Of what is scaled the entries are enough.
    spared = skipped if scale_in(treatment.rule) is None else {m.name for m in matrices}
    made: dict[str, Any] = {}

    source = Source.of(checkpoint) if base is None else base.source
    label = crew.devices[0].label
    work = OnePass(method, source, treatment, selection, label, null_draws, base, frozenset(spared))
    compute, elsewhere = makers_of(Cuts(checkpoint, tuple(visited), work, judged), out, crew, tick)

    def describe(records: Mapping[str, dict[str, Any]], shards: dict[str, str | None]) -> dict[str, Any]:
        place = f"{out / JOURNAL}: the entry of"
        found, cuts = dict[str, Measured](), dict[str, Any]()
        for name, record in records.items():
            found[name] = from_entry(record.get("scan"), f"{place} {name}")
            if record.get("cut") is not None:
                cuts[name] = record["cut"]
        spectra = spectra_of(checkpoint, matrices, found, skipped, method, crew.label, null_draws, base=base)
        plan = choose(spectra)
        check_entries(cuts, place)
        if cuts.keys() != plan.reductions.keys():
            raise RecordError(f"{out / JOURNAL}: its matrices were judged otherwise; start afresh with --force")
        made.update(spectra=spectra, plan=plan)
        spectra.save(out / RECORDS / "spectra.safetensors")
        plan.save(out / RECORDS / "plan.json")
        return describe_by(plan)(cuts, shards) | {"run": run_of_plan(plan, method, crew)}

    run = run_of_pass(checkpoint, selection, treatment, crew, method, null_draws, base)
    document = write_checkpoint(
        checkpoint, out, visited, compute, with_base(base, describe), run, on_check=on_check, elsewhere=elsewhere
    )
    return made["spectra"], made["plan"], Outcome.from_document(document, out / OUTCOME)
