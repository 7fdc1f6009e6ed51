"""reduce: write the checkpoint that a plan describes, every touched matrix with its certificate."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from laser.checkpoint.families import Matrix, list_matrices
from laser.checkpoint.files import read_json
from laser.checkpoint.hub import drop
from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.writer import OUTCOME, prepare_output, write_checkpoint
from laser.errors import NumericalError, UsageError
from laser.plan import Plan
from laser.spectra import Source, read_ahead
from laser.spectral.decomposition import METHODS, truncate
from laser.spectral.devices import Device, choose_device

KIND, VERSION = "outcome", 1


@dataclass(frozen=True)
class Outcome:
    """laser.json: what was done to each matrix, measured. Deterministic: no times, no paths.

    matrices: tensor name -> rank, full_rank, energy_kept, residual, tolerance, orthogonality, method
    shards: file name -> sha256, or None where the file is a byte-for-byte copy of the source's
    """

    plan: Plan
    matrices: Mapping[str, Mapping[str, Any]]
    shards: Mapping[str, str | None]
    run: Mapping[str, Any]
    left_out: tuple[str, ...]  # files of the source that hold weights in another format, not copied

    @staticmethod
    def load(out: Path) -> Outcome:
        """The outcome in a directory that `reduce` wrote. Raises RecordError where there is none."""
        path = out / OUTCOME
        return Outcome.from_document(read_json(path, KIND, VERSION), path)

    @staticmethod
    def from_document(document: Mapping[str, Any], path: Path) -> Outcome:
        plan = Plan.from_document(document["plan"], path)
        return Outcome(plan, document["matrices"], document["shards"], document["run"], tuple(document["left_out"]))


def reduce(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    *,
    device: Device | None = None,
    method: str = "gram",
    resume: bool = False,
    force: bool = False,
    evict: bool = False,
    tick: Callable[[Matrix, float], None] = lambda *_: None,
) -> Outcome:
    """Write `checkpoint` to the directory `out` with the plan's matrices truncated to the plan's ranks.

    In memory are one matrix, its Gram matrix and eigenvectors, and the next matrix being read. Killed at any moment and
    called again with `resume`, the result is byte-identical and no finished matrix is computed twice. With `evict`,
    each shard of a model from the Hub leaves the Hub's cache as soon as its output is on the disk. `tick` is called
    with each matrix and its seconds. Raises RecordError for a plan of another checkpoint, OutputError for an `out` that
    may not be written, NumericalError (naming the tensor) where no method meets its certificate.
    """
    device = device or choose_device()
    if method not in METHODS:
        raise UsageError(f"no method is called {method!r}; try --method {'|'.join(METHODS)}")
    plan.source.require(checkpoint, "plan")
    hub = checkpoint.hub
    if evict and hub is None:
        raise UsageError(f"{checkpoint.path} is a directory, and a source is never changed; try without --evict")
    matrices = {m.name: m for m in list_matrices(checkpoint)}
    touched = [name for name in matrices if name in plan.reductions]
    prepare_output(checkpoint, out, resume=resume, force=force)

    def compute(names: list[str]) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
        for matrix, W in read_ahead(checkpoint, [matrices[name] for name in names]):
            start = time.perf_counter()
            line = plan.reductions[matrix.name]
            try:
                result = truncate(W, line.gains, device, method)
            except NumericalError as error:
                raise NumericalError(f"{matrix.name}: {error}", error.residual) from error
            record = {"rank": line.rank, "full_rank": line.full_rank} | asdict(result.certificate)
            yield matrix.name, result.matrix, record
            tick(matrix, time.perf_counter() - start)

    def describe(records: dict[str, dict[str, Any]], shards: dict[str, str | None]) -> dict[str, Any]:
        document = {"kind": KIND, "version": VERSION, "plan": {"kind": "plan", "version": 1} | asdict(plan)}
        return document | {"matrices": records, "shards": shards}

    run = {
        "kind": "reduce journal",
        **Source.of(checkpoint).told(),
        "plan": hashlib.sha256(plan.to_json()).hexdigest(),
        "method": method,
        "device": device.label,
    }
    document = write_checkpoint(
        checkpoint,
        out,
        touched,
        compute,
        describe,
        run,
        done=lambda shard: drop(hub, shard.path.name) if evict and hub else None,
    )
    return Outcome.from_document(document, out / OUTCOME)
