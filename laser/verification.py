"""verify: is OUT what its plan says? Measured on the files themselves, without trusting what they claim.

Last come the files beside the weights, and the records of how they were made. Not the card: README.md may be edited.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from laser.checkpoint.at_rest import damage
from laser.checkpoint.dequantised import as_bfloat16
from laser.checkpoint.matrices import Matrix, list_matrices
from laser.checkpoint.quantised import rounding
from laser.checkpoint.reader import Checkpoint, open_checkpoint
from laser.checkpoint.safetensors import Shard, TensorInfo, pieces, sha256_of
from laser.checkpoint.slices import bytes_of
from laser.checkpoint.source import require_unchanged
from laser.checkpoint.writer import RECORDS
from laser.differences.base import Base
from laser.differences.edits import OfDifference, scaling_problems
from laser.differences.opened import base_named, opened_model
from laser.errors import RecordError
from laser.evaluation.leaderboard import Leaderboard
from laser.evaluation.perplexity import Perplexity
from laser.files import open_regular, read_regular
from laser.journal import journal_is_whole
from laser.moments import Moments, metric_of
from laser.outcome import Outcome, plan_as_measured
from laser.plan import Plan
from laser.records import is_sealed, parse_record
from laser.spectra import Spectra
from laser.spectral.devices import Device, device_of, in_float64

MEASURED_FILES: dict[str, type[Perplexity] | type[Leaderboard]] = dict.fromkeys(
    ("eval.json", "eval-source.json"), Perplexity
)
MEASURED_FILES |= dict.fromkeys(("leaderboard.json", "leaderboard-source.json"), Leaderboard)
SPECTRA, PLAN, SEARCH, TRIALS, SOURCE = "spectra.safetensors", "plan.json", "search.json", "search.jsonl", "source.json"
PICTURE = "spectrum.svg"


def damage_at_rest(out: Path, outcome: Outcome) -> list[str]:
    """What is not as laser left it: side files, laser.json, and each record in OUT/laser."""
    problems, folder, plan = damage(out), out / RECORDS, outcome.plan

    def check(name: str, is_right: Callable[[Path], bool]) -> None:
        try:
            right = is_right(folder / name)
        except (RecordError, OSError, ValueError) as error:
            problems.append(f"{RECORDS}/{name}: {error}")
            return
        if not right:
            problems.append(f"{RECORDS}/{name} is not as it was written; it was changed or damaged since")

    there = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if {SPECTRA, PLAN} & there:  # of a whole run, which leaves these two, and one about its source
        check(SPECTRA, lambda path: Spectra.load(path).source == plan.source)
        check(PLAN, lambda path: _is_plan_of(path, outcome))
        there.add(SOURCE)
        if "accept" in plan.selection:  # chosen by a search
            there |= {SEARCH, TRIALS}
    for name, kind in MEASURED_FILES.items():
        if name in there:
            check(name, lambda path, kind=kind: bool(kind.load(path)))
    if SEARCH in there:
        check(SEARCH, lambda path: is_sealed(parse_record(read_regular(path))))
    if TRIALS in there:
        check(TRIALS, journal_is_whole)
    if SOURCE in there:
        check(SOURCE, lambda path: is_sealed(parse_record(read_regular(path))))
    if PICTURE in there or _picture_sum(folder):
        check(PICTURE, lambda path: sha256_of(path) == _picture_sum(folder))
    return problems


def _picture_sum(folder: Path) -> str | None:
    """The sha256 of the card's picture, as source.json has it; None where that has none, or cannot be read."""
    try:
        document = parse_record(read_regular(folder / SOURCE))
    except (OSError, ValueError):
        return None  # which is said of that file
    return document.get("picture") if isinstance(document, dict) else None


def _is_plan_of(path: Path, outcome: Outcome) -> bool:
    """Whether a plan is the one that was carried out, written as laser writes it."""
    plan = Plan.load(path)
    return sha256_of(path) == plan.sha256 and plan_as_measured(plan, outcome.matrices) == outcome.plan


@dataclass(frozen=True)
class Verification:
    """`problems` is empty when everything holds; each entry names a file or tensor with found and expected."""

    untouched: int  # tensors compared bit for bit
    touched: int  # matrices measured
    problems: tuple[str, ...]


def verify(
    source: Checkpoint | str | Path,
    out: str | Path,
    *,
    device: Device | str | None = None,
    moments: Moments | None = None,
    base: Base | Checkpoint | str | Path | None = None,
    tick: Callable[[Matrix], None] = lambda _: None,
) -> Verification:
    """Compare `out` with `source` and with the plan in its laser.json.

    Untouched tensors must be equal bit for bit. A touched matrix B must be a best approximation of W at the plan's rank
    r. By Eckart and Young (1936) that is the same as: its singular values are W's first r and then zero, but for
    rounding to the storage dtype, and ||W - B||_F is the norm of W's tail. Where the plan shrinks or cuts on two sides,
    W's values times their gains stand for both. A matrix reduced in the metric of the data must be a projection of W of
    rank r, and with the plan's `moments` lose what was predicted and no more of the outputs. Measured from the weights.
    Of a plan of differences, which needs the `base`, a touched tensor must be the base's and the difference cut or
    scaled, entry by entry.
    Also checked: that the plan's lines are the source's tensors and laser.json's records the plan's reductions, shard
    headers, index, and sha256 of every shard. Raises RecordError or CheckpointError where `out`
    cannot be read at all.
    """
    source, out = opened_model(source), Path(out)
    base = base_named(base, source)
    device = in_float64(device_of(device))  # in float32 the values of a cut matrix end at 1e-4, not at 0
    outcome, result = Outcome.load(out, as_written=False), open_checkpoint(out)
    outcome.plan.require_source(source, base, "output")
    matrices = list_matrices(source)
    if outcome.run.get("dtype"):
        source = as_bfloat16(source)
    if moments is not None:
        outcome.plan.require_moments(moments)
    problems = outcome.plan.unlike(matrices) + outcome.unlike_plan()
    if source.index_bytes != result.index_bytes:
        problems.append("the index differs from the source's; expected the same bytes")
    headers = {s.name: s.header for s in result.shards}
    for shard in source.shards:
        if headers.get(shard.name) != shard.header:
            problems.append(f"{shard.name}: header differs from the source's; expected the same bytes")
            continue
        expected = outcome.shards.get(shard.name)
        if expected is not None:  # the others are copies: every tensor in them is compared below
            if expected != (digest := sha256_of(out / shard.name)):
                problems.append(f"{shard.name}: found sha256 {digest[:12]}, expected {expected[:12]}")
    if problems:
        return Verification(0, 0, tuple(problems))
    lines = outcome.plan.reductions
    new_scales = {scale for weight, scale in source.fp8.scales.items() if weight in lines} if source.fp8 else set()
    untouched = touched = 0
    for matrix in list_matrices(source):
        if matrix.name in new_scales:
            touched += 1  # measured with the weights that they belong to
        elif matrix.name in lines:
            touched += 1
            line = lines[matrix.name]
            W, B = (checkpoint.read(matrix.tensor, matrix.part) for checkpoint in (source, result))
            if base is not None and line.scale is not None:
                problems += scaling_problems(matrix.name, base.weights(matrix), W, B, line.scale)
            else:
                metric = OfDifference(base.weights(matrix)) if base else metric_of(line.metric, matrix.name, W, moments)
                problems += metric.problems(matrix.name, W, B, _rounding(result, matrix, B), line.gains, device)
        else:
            untouched += 1
            if not _is_untouched(source, result, matrix):
                problems.append(f"{matrix.name}: untouched by the plan, but its bytes differ from the source's")
        tick(matrix)
    if not problems:  # else what is wrong has been said
        problems = damage_at_rest(out, outcome)
    for checkpoint in (source, result, *([base.checkpoint] if base else ())):
        require_unchanged(checkpoint)
    return Verification(untouched, touched, tuple(problems))


def _is_untouched(source: Checkpoint, result: Checkpoint, matrix: Matrix) -> bool:
    info = source.tensors[matrix.tensor]
    if matrix.part is None:
        return _same_bytes(source.shard_of(matrix.tensor), result.path / info.shard, info)
    a, b = (checkpoint.read(matrix.tensor, matrix.part) for checkpoint in (source, result))
    return bytes_of(a) == bytes_of(b)


def _same_bytes(shard: Shard, copy: Path, info: TensorInfo) -> bool:
    with open_regular(copy) as file:
        file.seek(info.start)
        return all(piece == file.read(len(piece)) for piece in pieces(shard, info.start, info.end))


def _rounding(result: Checkpoint, matrix: Matrix, B: torch.Tensor) -> torch.Tensor:
    """Half a unit in the last place of each element of B (m, n), in the dtype in which it is stored. Under the smallest
    normal number a unit gets no smaller: in float16 it is 6e-8 for every entry under 6e-5."""
    if result.fp8 is not None and matrix.tensor in result.fp8.scales:
        return rounding(B, result.raw(result.fp8.scales[matrix.tensor]), result.fp8.block)
    kind = torch.finfo(B.dtype)
    return B.abs().double().clamp_min(kind.smallest_normal) * (kind.eps / 2)
