"""reduce: write the checkpoint that a plan describes, every touched matrix with its certificate."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laser.checkpoint.at_rest import check_names
from laser.checkpoint.dequantised import as_bfloat16
from laser.checkpoint.families import Matrix, list_matrices
from laser.checkpoint.files import read_json, require_sealed
from laser.checkpoint.fingerprint import require_stamp
from laser.checkpoint.headers import TORCH, Shard
from laser.checkpoint.hub import drop
from laser.checkpoint.quantised import quantise
from laser.checkpoint.reader import OUTCOME, Checkpoint, by_whole_shards
from laser.checkpoint.records import require_finite, require_keys, value_of
from laser.checkpoint.swap import writing
from laser.checkpoint.writer import New, OnCheck, write_checkpoint
from laser.edits import on_fresh_text, reduced_in_data, require_moments
from laser.engine.workers import Crew, near, visit
from laser.errors import NumericalError, RecordError, UsageError
from laser.moments import Moments
from laser.plan import VERSION as PLAN_VERSION
from laser.plan import Plan, PlanLine
from laser.reasons import Kind, Why
from laser.spectral.certificate import Truncation
from laser.spectral.devices import Device, choose_device
from laser.spectral.factorise import METHODS, truncate
from laser.spectral.rules import signal_to_noise

KIND, VERSION = "outcome", 2
CLOSE = 1e-4  # of a foretold figure: a scan in float32 is nearer, and one rank of 4096 is further
AGAIN = "it is damaged: run laser reduce again"
MEASURED: dict[str, Any] = {
    "rank": int,
    "full_rank": int,
    "snr": float | None,
    "over_threshold": int | None,
    "energy_kept": float,
    "residual": float,
    "method": str,
    "note": str | None,
}
MORE: dict[str, Any] = dict.fromkeys(("tolerance", "orthogonality", "fresh_output_error"), float)  # may be wanting
LEAST = ("rank", "full_rank", "snr", "over_threshold", "energy_kept", "residual", "tolerance", "orthogonality")
HEADER = ("kind", "version", "files", "check")  # files: sha256 by name, see checkpoint/at_rest.py
LATER = ("snr", "over_threshold", "note")  # not yet in outcomes of laser 0.1


@dataclass(frozen=True)
class Outcome:
    """laser.json: what was done to each matrix, measured. Deterministic: no times, no paths.

    matrices: matrix name -> rank, full_rank, snr, over_threshold (values over the plan's threshold), energy_kept,
        residual, tolerance, orthogonality, method, note: all as measured when it was cut
    shards: file name -> sha256, or None where the file is a byte-for-byte copy of the source's
    """

    plan: Plan
    matrices: Mapping[str, Mapping[str, Any]]
    shards: Mapping[str, str | None]
    run: Mapping[str, Any]
    left_out: tuple[str, ...]  # files of the source that were not copied: other copies of weights, adapters, states

    @staticmethod
    def load(out: Path, *, as_written: bool = True) -> Outcome:
        """The outcome in a directory that `reduce` wrote. Raises RecordError where there is none, or a damaged one.

        as_written: whether its checksum has to be right; `verify` tells of that beside all else that it finds.
        """
        path = out / OUTCOME
        document = read_json(path, KIND, VERSION)
        outcome = Outcome.from_document(document, path)
        if as_written:
            require_sealed(document, path, KIND)
        return outcome

    @staticmethod
    def from_document(document: Mapping[str, Any], path: Path) -> Outcome:
        """Raises RecordError for a document that is damaged or of another version."""
        require_keys(document, ("plan", "matrices", "shards", "run", "left_out"), HEADER, str(path), AGAIN)
        records = value_of(Mapping[str, dict], document["matrices"], "matrices", str(path), AGAIN)
        check_measured(records, f"{path}: matrices", AGAIN)
        require_finite(document["run"], f"{path}: run", AGAIN)
        check_names(document, str(path), AGAIN)
        shards = document["shards"]
        run = value_of(Mapping[str, Any], document["run"], "run", str(path), AGAIN)
        left_out = value_of(tuple[str, ...], document["left_out"], "left_out", str(path), AGAIN)
        return Outcome(Plan.from_document(document["plan"], path), records, shards, run, left_out)

    def unlike_plan(self) -> list[str]:
        """Where what was written is not what the plan's lines say."""
        lines, found = self.plan.reductions, []
        for name in lines.keys() | self.matrices.keys():
            if name not in self.matrices:
                found.append(f"{name}: the plan's line reduces it, but no record says that it was written")
            elif name not in lines:
                found.append(f"{name}: a record says that it was reduced, but no line of the plan does")
            elif self.matrices[name]["rank"] != lines[name].rank:
                ranks = f"found rank {self.matrices[name]['rank']}, expected {lines[name].rank}"
                found.append(f"{name}: {ranks} by the plan's line")
        return sorted(found)


def check_measured(records: Mapping[str, Any], where: str, remedy: str = "start afresh with --force") -> None:
    """Raises RecordError, which begins with `where`, for an entry that `record_of` does not make."""
    for name, record in records.items():
        here = f"{where} {name}"
        value_of(dict, record, "the entry", here, remedy)
        require_keys(record, [key for key in MEASURED if key not in LATER], (*LATER, *MORE), here, remedy)
        for key, found in record.items():
            value_of((MEASURED | MORE)[key], found, key, here, remedy)
        if negative := [key for key in LEAST if (record.get(key) or 0) < 0]:
            raise RecordError(f"{here}: {negative[0]} is {record[negative[0]]}, expected 0 or more; {remedy}")
        if record["rank"] > record["full_rank"] or record["energy_kept"] > 1 + CLOSE:
            told = f"rank {record['rank']} of {record['full_rank']}, energy_kept {record['energy_kept']}"
            raise RecordError(f"{here}: {told}, expected no more than the whole matrix; {remedy}")


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


def record_of(line: PlanLine, result: Truncation) -> dict[str, Any]:
    """A matrix's entry in laser.json: what was measured, whatever the line foretells."""
    s, shape = result.singular_values, (result.matrix.shape[0], result.matrix.shape[1])
    rank = int(np.count_nonzero(line.gains.of(s, shape)))  # a shrinker may take more values to 0 than the line says
    over = None if line.threshold is None else int(np.count_nonzero(s > line.threshold))
    found = {"rank": rank, "full_rank": len(s), "snr": signal_to_noise(s, line.gains.above), "over_threshold": over}
    return found | asdict(result.certificate)


def as_measured(line: PlanLine, record: Mapping[str, Any]) -> PlanLine:
    """The line of a matrix that was cut. Where it foretold something else, as after an edit by hand, what was measured:
    the figures of another rank are not left standing."""
    record = {"snr": line.snr, "over_threshold": None} | dict(record)  # journals of before had neither
    above, over = line.gains.above, record["over_threshold"]
    held = over is None or over == above or (line.shrink is not None and over > above)
    same = line.rank == record["rank"] and (line.snr is None) == (record["snr"] is None)
    for told, found in ((line.energy_kept, record["energy_kept"]), (line.snr, record["snr"])):
        same = same and (told is None) == (found is None) and (told is None or abs(told - found) <= CLOSE * (1 + found))
    if held and same:
        return line
    found = {"rank": record["rank"], "energy_kept": record["energy_kept"], "snr": record["snr"]}
    why = Why(Kind.MEASURED, f"rank {record['rank']} by its line and not by the rule; figures as measured")
    return replace(line, threshold=line.threshold if held else None, why=why, **found)


def plan_as_measured(plan: Plan, records: Mapping[str, Mapping[str, Any]]) -> Plan:
    """The plan as laser.json has it, from the records by matrix."""
    lines = (as_measured(x, records[x.name]) if x.name in records else x for x in plan.lines)
    return replace(plan, lines=tuple(lines))


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


def describe_by(plan: Plan) -> Callable[[dict[str, dict[str, Any]], dict[str, str | None]], dict[str, Any]]:
    """laser.json from what was measured."""

    def describe(records: dict[str, dict[str, Any]], shards: dict[str, str | None]) -> dict[str, Any]:
        check_measured(records, "the journal's entry of")
        done = plan_as_measured(plan, records)
        document = {"kind": KIND, "version": VERSION, "plan": {"kind": "plan", "version": PLAN_VERSION} | asdict(done)}
        return document | {"matrices": records, "shards": shards}

    return describe


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
