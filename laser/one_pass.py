"""Scan and reduce in one visit: each matrix read once and factorised once, for rules that judge it by itself.

A scan needs eigenvalues, a reduction eigenvectors too, and those cost 2 to 4 times as much. Where every matrix is
judged by its own spectrum, its eigenvectors are at hand when the verdict falls, and the scan comes for nothing. With
--lowest-snr K, or a search, the verdict needs all spectra: then eigenvalues of all and eigenvectors of K are cheaper
than eigenvectors of all, which nobody could keep either (as many bytes as the model in float64), and two passes stay.

What is left behind is that of two passes: spectra, plan, shards, laser.json. Eigenvalues by themselves and beside their
vectors come from two LAPACK routines, so that singular values may differ from a scan's in the last digits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laser.checkpoint.families import DoubtWarning, Matrix, doubts, list_matrices
from laser.checkpoint.reader import OUTCOME, Checkpoint, by_whole_shards
from laser.checkpoint.writer import JOURNAL, RECORDS, New, OnCheck, write_checkpoint
from laser.engine.workers import Crew, near, visit
from laser.errors import NumericalError, RecordError, UsageError
from laser.measured import Measured, from_entry, to_entry
from laser.plan import Plan, Treatment, line_of
from laser.reduction import VERSION, Outcome, by_shard, check_measured, describe_by, record_of, run_of
from laser.selection import Selection
from laser.spectra import Source, Spectra, assemble, describe_failure, measure
from laser.spectral.devices import Device
from laser.spectral.factorise import METHODS
from laser.spectral.factorise import visit as factorise
from laser.spectral.permutation import null_largest
from laser.spectral.shrinkage import Gains
from laser.spectral.spectrum import excess_kurtosis

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


def run_of_pass(
    checkpoint: Checkpoint, selection: Selection, treatment: Treatment, crew: Crew, method: str, null_draws: int
) -> dict[str, Any]:
    """What the journal of one pass belongs to."""
    return {
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

    run = run_of_pass(checkpoint, selection, treatment, crew, method, null_draws)
    document = write_checkpoint(checkpoint, out, list(selected.values()), compute, describe, run, on_check=on_check)
    return made["spectra"], made["plan"], Outcome.from_document(document, out / OUTCOME)
