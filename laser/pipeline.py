"""scan and reduce: every matrix visited once, measured, and cut where a plan or a rule says so."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from laser.checkpoint.dequantised import as_bfloat16
from laser.checkpoint.fingerprint import require_stamp
from laser.checkpoint.hub import drop
from laser.checkpoint.matrices import DoubtWarning, Matrix, doubts, list_matrices
from laser.checkpoint.quantised import quantise
from laser.checkpoint.reader import OUTCOME, Checkpoint, by_whole_shards
from laser.checkpoint.safetensors import TORCH, Shard
from laser.checkpoint.source import Source, require_unchanged
from laser.checkpoint.swap import writing
from laser.checkpoint.writer import JOURNAL, RECORDS, New, OnCheck, write_checkpoint
from laser.engine.crew import Crew, dearest_first, near
from laser.engine.workers import visit
from laser.errors import LaserError, NumericalError, OutputError, RecordError, UsageError
from laser.files import claimed, tidy_up
from laser.moments import Moments
from laser.outcome import VERSION, Outcome, check_measured, describe_by, record_of
from laser.plan import Plan, PlanLine, Treatment, line_of
from laser.reasons import Kind
from laser.records import (
    Journal,
    spoiling,
    was_journal,
)
from laser.selection import Selection
from laser.spectra import ENTRY, InData, Measured, Spectra, assemble, from_entry, to_entry
from laser.spectral.certificate import Truncation
from laser.spectral.data_metric import data_values, relative_error, truncate_in_metric
from laser.spectral.devices import Device, choose_device
from laser.spectral.factorise import METHODS, truncate
from laser.spectral.factorise import measure as measure_values
from laser.spectral.factorise import visit as factorise
from laser.spectral.permutation import null_largest
from laser.spectral.shrinkage import Gains
from laser.spectral.spectrum import excess_kurtosis

if TYPE_CHECKING:
    from laser.moments import Moments

from laser.spectra import VERSION as SPECTRA


def measure(W: torch.Tensor, device: Device, method: str, null_draws: int) -> Measured:
    """The scan of one matrix W (m, n), wherever it runs. What cannot be factorised is a reason, not an error."""
    try:
        found = measure_values(W, device, method)
        null = null_largest(W, null_draws, device) if null_draws else np.empty(0)
        return Measured(found.singular_values, null, excess_kurtosis(W, device), note=found.told)
    except (NumericalError, UsageError) as error:
        return Measured(np.empty(0), np.empty(0), skipped=describe_failure(W, error))


def check_scan(method: str, null_draws: int) -> None:
    """What can be refused of a scan before its model is opened. Raises UsageError."""
    if method not in METHODS:
        raise UsageError(f"no method is called {method!r}; try --method {'|'.join(METHODS)}")
    if null_draws < 0:
        raise UsageError(f"{null_draws} permutations cannot be drawn; try --null 19")


def scan(
    checkpoint: Checkpoint,
    selection: Selection | None = None,
    *,
    device: Device | None = None,
    crew: Crew | None = None,
    method: str = "gram",
    journal: Path | None = None,
    null_draws: int = 0,
    moments: Moments | None = None,
    tick: Callable[[Matrix], None] = lambda _: None,
    anew: bool = False,
) -> Spectra:
    """Singular values of every selected matrix; the others are listed with the reason why not.

    `crew` says who computes, by default `device` and, on the host, as many workers as cores and memory allow; the
    result does not depend on how many they are. In memory are the workers' matrices and two read ahead. With `journal`,
    each result is appended to that file at once and an interrupted scan goes on from there; the caller removes it when
    the spectra are saved, and with `anew` one of another scan is dropped. `tick` is called per matrix. A matrix with
    NaN or Inf, or one that no method can factorise,
    is skipped with its reason. `null_draws` permutations of each matrix are measured too, by their largest singular
    value: what the rule `parallel` needs. With `moments` the singular values are measured once more in the metric of
    the data, where a matrix was calibrated.
    Warns (DoubtWarning) about names that the table of families does not know.
    Raises UsageError for a selection that matches nothing, or a negative number of draws.
    """
    selection, crew = selection or Selection(), crew or Crew((device or choose_device(),))
    check_scan(method, null_draws)
    if moments is not None:
        moments.source.require(checkpoint, "moments")
    matrices = list_matrices(checkpoint)
    if told := doubts(checkpoint, matrices):
        warnings.warn(told, DoubtWarning, stacklevel=2)
    selection.check(matrices)
    skipped = {m.name: why for m in matrices if (why := selection.why_not(m))}
    run = {
        "kind": "scan journal",
        "version": SPECTRA,
        **Source.of(checkpoint).told(),
        "selection": selection.describe(),
        "method": method,
        "device": crew.label,
        "null_draws": null_draws,
    } | ({"moments": moments.calibration.identity} if moments else {})
    found: dict[str, Measured] = {}
    with Journal(journal, run, shapes=(ENTRY,), anew=anew) if journal else nullcontext() as log:
        for entry in log.entries if log else ():
            found[entry["name"]] = from_entry(entry, f"{journal}: the entry of {entry['name']}")
        for matrix in matrices:
            if matrix.name in found:
                tick(matrix)
        todo = [m for m in matrices if m.name not in found and m.name not in skipped]
        work = partial(_measure, method=method, null_draws=null_draws, moments=moments)
        with closing(visit(checkpoint, dearest_first(todo), work, crew)) as visits:
            for matrix, measured, _ in visits:
                found[matrix.name] = measured
                if log:
                    log.append(to_entry(matrix.name, measured))
                tick(matrix)
        with spoiling(log):
            require_unchanged(checkpoint)
    spectra = assemble(checkpoint, matrices, found, skipped, method, crew.label, null_draws)
    return replace(spectra, data=InData.of(moments, spectra.values, found))


def _measure(
    matrix: Matrix, W: torch.Tensor, device: Device, *, method: str, null_draws: int, moments: Moments | None
) -> Measured:
    found = measure(near(W, device), device, method, null_draws)
    if moments is None or not moments.tokens(matrix.name) or found.skipped is not None:
        return found
    try:
        return replace(found, data=data_values(W, moments.metric(matrix.name, W), device))
    except (NumericalError, UsageError) as error:  # the plain spectrum stands
        return replace(found, data_failed=str(error))


def describe_failure(W: torch.Tensor, error: LaserError) -> str:
    """The plan's reason for leaving a matrix alone."""
    W = W.cpu()  # where W lies there may be no memory left to look at it
    if W.is_floating_point() and W.element_size() > 1 and not torch.isfinite(W).all():
        bad = int((~torch.isfinite(W)).sum())
        return f"skipped: not finite ({bad} NaN or Inf of {W.numel()})"
    return f"skipped: {error}"


NO_MOMENTS = (
    "a rule in the metric of the data needs moments, and spectra that were scanned with them; try laser calibrate, "
    "then --moments, and laser search --spectra with a file that is not there yet"
)


def reduced_in_data(W: torch.Tensor, line: PlanLine, device: Device, moments: Moments | None) -> Truncation:
    """W (m, n) as its plan line says. Raises NumericalError where a certificate is missed."""
    assert moments is not None  # require_moments
    return truncate_in_metric(W, line.rank or 0, moments.metric(line.name, W), device)


def require_moments(plan: Plan, moments: Moments | None) -> None:
    """Raises UsageError where the plan needs moments and there are none, RecordError where they are others."""
    names = [line.name for line in plan.reductions.values() if line.metric == "data"]
    if not names:
        return
    told: Mapping[str, Any] = plan.calibration or {}
    if moments is None:
        raise UsageError(
            f"the plan reduces {len(names)} matrices in the metric of the data; try --moments with the file of "
            f"laser calibrate on {told.get('text')}"
        )
    if moments.calibration.identity != told.get("identity"):
        raise RecordError(
            f"{moments.path}: found moments {moments.calibration.identity[:12]} of {moments.calibration.text}, the "
            f"plan was made with {str(told.get('identity'))[:12]} of {told.get('text')}; scan and plan again with these"
        )


def require_same_moments(spectra: Spectra, moments: Moments | None) -> None:
    """Raises UsageError without moments or spectra that know them, RecordError where they are others."""
    known = None if spectra.data is None else spectra.data.calibration
    if moments is None or known is None:
        raise UsageError(NO_MOMENTS)
    if moments.calibration.identity != known.get("identity"):
        raise RecordError(
            f"{moments.path}: found moments {moments.calibration.identity[:12]} of {moments.calibration.text}, the "
            f"spectra were scanned with {str(known.get('identity'))[:12]} of {known.get('text')}; scan again with these"
        )


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


def cut(
    matrix: Matrix,
    W: torch.Tensor,
    device: Device,
    *,
    lines: Mapping[str, PlanLine],
    method: str,
    moments: Moments | None = None,
    fresh: Moments | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The reduction of one matrix W (m, n), wherever it runs: the new matrix and what was measured of it."""
    line = lines[matrix.name]
    try:
        plain = line.metric == "plain"
        result = (
            truncate(near(W, device), line.gains, device, method)
            if plain
            else reduced_in_data(W, line, device, moments)
        )
    except NumericalError as error:
        raise NumericalError(f"{matrix.name}: {error}", error.residual) from error
    new = result.matrix.cpu()
    return new, record_of(line, result) | on_fresh_text(W, new, line, fresh)


def reduce(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    *,
    device: Device | None = None,
    crew: Crew | None = None,
    method: str = "gram",
    resume: bool = False,
    force: bool = False,
    evict: bool = False,
    dtype: str | None = None,
    moments: Moments | None = None,
    fresh: Moments | None = None,
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
    what each edit costs there. `tick` is called with each finished matrix and its seconds of computation, `on_check`
    with how many bytes of an earlier run were read again, of how many. Raises
    RecordError for a plan or moments of another checkpoint, UsageError for moments that are needed and missing,
    OutputError for an `out` that may not be written, NumericalError (naming the tensor) where no method meets its
    certificate.
    """
    crew = crew or Crew((device or choose_device(),))
    hub = checkpoint.hub
    checkpoint, touched, run = prepare(checkpoint, plan, crew, method, evict, dtype, moments, fresh)

    def compute(names: list[str]) -> Generator[New, None, None]:
        work = partial(cut, lines=plan.reductions, method=method, moments=moments, fresh=fresh)
        wanted = set(names)
        weights = [m for m in touched if m.name in plan.reductions and wanted & parts_of(checkpoint, m)]
        order = by_shard(checkpoint, weights)
        with closing(visit(checkpoint, order, work, crew)) as visits:
            for matrix, (new, record), seconds in visits:
                for name, part, told in stored(checkpoint, matrix, new, record):
                    if name in wanted:
                        yield name, part, told
                    del part
                del new
                tick(matrix, seconds)

    def done(shard: Shard) -> None:
        if evict and hub is not None:
            if shard.stamp is not None and shard.path.exists():
                require_stamp(shard.path, shard.stamp)
            drop(hub, shard.path.name)

    with writing(checkpoint, out, resume=resume, force=force) as place:
        document = write_checkpoint(checkpoint, place, touched, compute, describe_by(plan), run, done, on_check)
    return Outcome.from_document(document, out / OUTCOME)


def prepare(
    checkpoint: Checkpoint,
    plan: Plan,
    crew: Crew,
    method: str,
    evict: bool,
    dtype: str | None,
    moments: Moments | None,
    fresh: Moments | None,
) -> tuple[Checkpoint, list[Matrix], dict[str, Any]]:
    """What `reduce` writes from, what it touches, what identifies it. Raises where it refuses what is asked for."""
    if method not in METHODS:
        raise UsageError(f"no method is called {method!r}; try --method {'|'.join(METHODS)}")
    plan.require(checkpoint)
    require_moments(plan, moments)
    if fresh is not None:
        fresh.source.require(checkpoint, "fresh moments")
    hub, checkpoint = checkpoint.hub, in_dtype(by_whole_shards(checkpoint), dtype)
    if evict and hub is None:
        raise UsageError(f"{checkpoint.path} is a directory, and a source is never changed; try without --evict")
    matrices = {m.name: m for m in list_matrices(checkpoint)}
    touched = with_scales(checkpoint, [m for m in matrices.values() if m.name in plan.reductions], matrices)
    run = run_of(checkpoint, plan, method, crew) | ({"fresh": asdict(fresh.calibration)} if fresh else {})
    return checkpoint, touched, run | ({"dtype": dtype} if dtype else {})


def in_dtype(checkpoint: Checkpoint, dtype: str | None) -> Checkpoint:
    """The checkpoint as it is to be written. Raises UsageError for a dtype that it cannot be written in."""
    if dtype is None:
        return checkpoint
    if dtype != "bfloat16":
        raise UsageError(f"no reduction is written as {dtype!r}; try --dtype bfloat16, or without")
    return as_bfloat16(checkpoint)


def parts_of(checkpoint: Checkpoint, matrix: Matrix) -> set[str]:
    """A matrix and, where it is FP8, its scales: what is written when it changes."""
    scales = checkpoint.fp8.scales if checkpoint.fp8 else {}
    return {matrix.name, scales.get(matrix.tensor, matrix.name)}


def with_scales(checkpoint: Checkpoint, touched: list[Matrix], matrices: Mapping[str, Matrix]) -> list[Matrix]:
    """The touched matrices and their scales, in file order. Raises UsageError for a part of a fused FP8 tensor."""
    if checkpoint.fp8 is None:
        return touched
    fused = next((m for m in touched if m.cut is not None and m.tensor in checkpoint.fp8.scales), None)
    if fused:
        raise UsageError(f"{fused.name} is a part of an FP8 tensor, whose blocks it shares; try --dtype bfloat16")
    names = {part for m in touched for part in parts_of(checkpoint, m)}
    return [m for m in matrices.values() if m.name in names]


def stored(checkpoint: Checkpoint, matrix: Matrix, new: torch.Tensor, record: dict[str, Any]) -> Iterator[New]:
    """A new matrix as it is to be stored: in its dtype, or as FP8 and scales, which have no record of their own."""
    fp8 = checkpoint.fp8
    if fp8 is None or matrix.tensor not in fp8.scales:
        yield matrix.name, new.to(TORCH[matrix.dtype]), record
        return
    scale = fp8.scales[matrix.tensor]
    q, s = quantise(new, TORCH[checkpoint.tensors[scale].dtype], fp8.block, fp8.powers_of_two)
    yield matrix.name, q, record
    yield scale, s, {}


def by_shard(checkpoint: Checkpoint, matrices: Iterable[Matrix]) -> list[Matrix]:
    """Shard after shard, and within each the dearest first: shards become whole, and go to the disk, all along, while
    the last matrices are still cheap ones."""
    place = {shard.name: i for i, shard in enumerate(checkpoint.shards)}
    return sorted(matrices, key=lambda m: (place[checkpoint.tensors[m.tensor].shard], -m.cost))


def run_of(checkpoint: Checkpoint, plan: Plan, method: str, crew: Crew) -> dict[str, Any]:
    """What a reduction is identified by: neither its output's place nor who did the work."""
    return {
        "kind": "reduce journal",
        "version": VERSION,
        **plan.source.told(),  # which `require` has compared with the checkpoint: here it may know more
        "plan": hashlib.sha256(plan.to_json()).hexdigest(),
        "method": method,
        "device": crew.label,
    }


Result = tuple[Measured, torch.Tensor | None, dict[str, Any] | None]


def judge(
    matrix: Matrix,
    W: torch.Tensor,
    device: Device,
    *,
    source: Source,
    treatment: Treatment,
    selection: Selection,
    method: str,
    null_draws: int,
) -> Result:
    """One visit to W (m, n): what a scan finds of it, and what it is replaced by, with its record, if it is."""

    def line(s: np.ndarray) -> Any:
        spectra = Spectra(source, (matrix,), {matrix.name: s}, {}, method, device.label, nulls, {matrix.name: tails})
        return line_of(spectra, matrix, treatment, selection)

    def decide(s: np.ndarray) -> Gains | None:
        found = line(s)
        return found.gains if found.action == "reduce" else None

    W = near(W, device)
    try:
        nulls = {matrix.name: null_largest(W, null_draws, device)} if null_draws else {}
        tails = excess_kurtosis(W, device)
        found = factorise(W, decide, device, method)
    except (NumericalError, UsageError) as error:
        scanned = measure(W, device, method, null_draws)
        if scanned.skipped is None:  # only the truncation fails: no reason to skip, but one to stop
            residual = error.residual if isinstance(error, NumericalError) else None
            raise NumericalError(f"{matrix.name}: {error}", residual) from error
        return Measured(np.empty(0), np.empty(0), skipped=describe_failure(W, error)), None, None
    s = found.values.singular_values
    measured = Measured(s, nulls.get(matrix.name, np.empty(0)), tails, note=found.values.told)
    if found.truncation is None:
        return measured, None, None
    return measured, found.truncation.matrix.cpu(), record_of(line(s), found.truncation)


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
    tick: Callable[[Matrix, float], None] = lambda *_: None,
    on_check: OnCheck = lambda *_: None,
) -> tuple[Spectra, Plan, Outcome]:
    """Reduce every selected matrix by `treatment` as it is visited, and make the records of scan and plan as well.

    `choose` makes the plan from all spectra; it must judge as `treatment` does. `out` has to be prepared. Killed and
    called again, it goes on where it was. Raises as scan and reduce do.
    """
    treatment.check()
    if method not in METHODS:
        raise UsageError(f"no method is called {method!r}; try --method {'|'.join(METHODS)}")
    checkpoint = by_whole_shards(checkpoint)
    matrices = list_matrices(checkpoint)
    if told := doubts(checkpoint, matrices):
        warnings.warn(told, DoubtWarning, stacklevel=2)
    selection.check(matrices)
    skipped = {m.name: why for m in matrices if (why := selection.why_not(m))}
    selected = {m.name: m for m in matrices if m.name not in skipped}
    made: dict[str, Any] = {}

    def compute(names: list[str]) -> Generator[New, None, None]:
        work = partial(
            judge,
            source=Source.of(checkpoint),
            treatment=treatment,
            selection=selection,
            method=method,
            null_draws=null_draws,
        )
        order = by_shard(checkpoint, [selected[name] for name in names])
        with closing(visit(checkpoint, order, work, crew)) as visits:
            for matrix, (measured, new, record), seconds in visits:
                yield matrix.name, new, {"scan": to_entry(matrix.name, measured), "cut": record}
                del new
                tick(matrix, seconds)

    def describe(records: Mapping[str, dict[str, Any]], shards: dict[str, str | None]) -> dict[str, Any]:
        place = f"{out / JOURNAL}: the entry of"
        found = {name: from_entry(record.get("scan"), f"{place} {name}") for name, record in records.items()}
        spectra = assemble(checkpoint, matrices, found, skipped, method, crew.label, null_draws)
        plan = choose(spectra)
        cuts = {name: record["cut"] for name, record in records.items() if record.get("cut") is not None}
        check_measured(cuts, place)
        if cuts.keys() != plan.reductions.keys():
            raise RecordError(f"{out / JOURNAL}: its matrices were judged otherwise; start afresh with --force")
        made.update(spectra=spectra, plan=plan)
        spectra.save(out / RECORDS / "spectra.safetensors")
        plan.save(out / RECORDS / "plan.json")
        return describe_by(plan)(cuts, shards) | {"run": run_of(checkpoint, plan, method, crew)}

    run = {
        "kind": "one pass journal",
        "version": VERSION,
        **Source.of(checkpoint).told(),
        "rule": treatment.rule,
        "treatment": treatment.describe(),
        "selection": selection.describe(),
        "method": method,
        "device": crew.label,
        "null_draws": null_draws,
    }
    document = write_checkpoint(checkpoint, out, list(selected.values()), compute, describe, run, on_check=on_check)
    return made["spectra"], made["plan"], Outcome.from_document(document, out / OUTCOME)


def records_of(out: Path) -> Path:
    """Where `run` keeps the records that it makes on the way: spectra, plan, search."""
    return out / RECORDS


def _there(
    path: Path,
    checkpoint: Checkpoint,
    selection: Selection,
    crew: Crew,
    method: str,
    null_draws: int,
    moments: Moments | None,
) -> Spectra | None:
    """The spectra at `path`, if they are those of this scan."""
    there = Spectra.load(path)
    wanted = {m.name for m in there.matrices if selection.why_not(m) is None}
    tried = {m.name for m in there.matrices if m.no_spectrum is None}
    reasons = ((name, why) for name, why in there.skipped.items() if name in tried)
    done = there.values.keys() | {name for name, why in reasons if why.kind is Kind.FAILED}
    if not there.source.is_of(Source.of(checkpoint)) or (there.method, there.device) != (method, crew.label):
        return None
    drawn = {len(there.nulls.get(name, ())) for name in there.values}
    known = there.data.calibration.get("identity") if there.data else None
    same = moments is None or known == moments.calibration.identity
    return there if wanted == done and drawn <= {null_draws} and same else None


def _of_another_run(out: Path) -> OutputError:
    return OutputError(f"{out} holds the finished output of another run; try another -o, or --force to replace it")


def tidy_spectra(path: Path) -> None:
    """Remove what a process that was killed behind its scan left beside whole spectra, unless somebody is at work."""
    partial = path.with_name(path.name + ".partial")
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
    anew: bool = False,
) -> Spectra:
    """The spectra at `path` if they are those of this scan; else scan, keeping the work so far in `path`.partial.

    `anew` measures again whatever is there, and drops the work of another scan.
    """
    partial = path.with_name(path.name + ".partial")
    with claimed(path):
        if path.exists() and not anew:
            there = _there(path, checkpoint, selection, crew, method, null_draws, moments)
            if there is not None:
                tidy_spectra(path)
                return there
        spectra = scan(
            checkpoint,
            selection,
            crew=crew,
            method=method,
            journal=partial,
            null_draws=null_draws,
            moments=moments,
            tick=tick,
            anew=anew,
        )
        spectra.save(path)
        tidy_up(partial, path)
        return spectra
