"""null: what each rule finds in the user's own matrices once their structure is destroyed. Expected: about nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from laser.checkpoint.matrices import Matrix, list_matrices
from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.source import Source, require_unchanged
from laser.differences.base import Base
from laser.differences.opened import base_named, opened_model
from laser.errors import NumericalError, UsageError
from laser.pipeline import describe_failure
from laser.records import SPARSE, Record
from laser.selection import Selection
from laser.spectra import Spectra
from laser.spectral.devices import Device, device_of
from laser.spectral.factorise import check_storage, singular_values, to_device_if_it_fits
from laser.spectral.permutation import NULL_ORDER, PERMUTATIONS, largest_singular_value, permuted
from laser.spectral.rules import TESTED, apply_rule, draws_needed, parse_rule

# Rules that claim to tell signal from noise; energy, fraction and rank keep what they are asked to keep.


@dataclass(frozen=True)
class NullRow:
    """One rule on all matrices of one role. Kept values are counted over matrices and draws."""

    rule: str
    role: str
    matrices: int
    mean_kept: float  # singular values kept of a permuted matrix
    most_kept: int
    share_kept: float  # mean_kept / p, averaged over the matrices
    found: float | None  # mean number kept of the matrices as they are; None without their spectra
    found_share: float | None


@dataclass(frozen=True)
class NullTest(Record, kind="null test", version=1, made_by="laser null MODEL --json", seal=False):
    """What each rule keeps of the model's own matrices, permuted."""

    source: Source
    permutation: str
    draws: int
    rows: tuple[NullRow, ...]
    skipped: Mapping[str, str]  # name -> why it could not be tested
    order: int = field(default=1, metadata=SPARSE)  # of the permuted entries, see permutation.NULL_ORDER


@dataclass(frozen=True)
class _Counts:
    """One rule on one matrix."""

    p: int
    kept: list[int]  # per draw
    found: int | None


def null_test(
    checkpoint: Checkpoint | str | Path,
    selection: Selection | None = None,
    *,
    rules: Sequence[str] = TESTED,
    permutation: str = "entries",
    draws: int = 1,
    spectra: Spectra | None = None,
    base: Base | Checkpoint | str | Path | None = None,
    device: Device | str | None = None,
    method: str = "gram",
    tick: Callable[[Matrix], None] = lambda _: None,
) -> NullTest:
    """Permute each selected matrix `draws` times (seeded), apply each rule, count what it keeps.

    permutation: `entries` shuffles the whole matrix and keeps its entries' distribution; `rows` shuffles within each
    row and keeps the rows' variances too. With `spectra` of the same checkpoint the table also says what the rules
    find in the matrices as they are. A rule that asks for permutations of its own (`parallel`) gets more of the same
    kind, of the permuted matrix. With `base` the entries of the biwhitened differences from it are permuted, signal and
    all. Raises UsageError for an unknown rule or permutation, or no draws.
    """
    check_test(rules, permutation, draws)
    checkpoint = opened_model(checkpoint)
    base = base_named(base, checkpoint)
    parsed = {spec: parse_rule(spec) for spec in rules}
    needed = max((draws_needed(spec) for spec in rules), default=0)
    selection, device = selection or Selection(), device_of(device)
    source, matrices = Source.of(checkpoint) if base is None else base.source, list_matrices(checkpoint)
    if spectra is not None:
        if base is None:
            spectra.source.require(checkpoint, "spectra")
        else:
            base.require(spectra.source, "spectra")
    selection.check(matrices)
    counts: dict[tuple[str, str], list[_Counts]] = {}
    skipped: dict[str, str] = {}
    for matrix, W in _read_ahead(checkpoint, [m for m in matrices if selection.why_not(m) is None]):
        shape = (matrix.shape[0], matrix.shape[1])
        noise: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
        try:
            if base is not None:
                W = base.matrix(matrix, W, device)
            check_storage(W.dtype)
            W = to_device_if_it_fits(W, device)
            for seed in range(draws):
                s, _ = singular_values(permuted(W, seed, permutation), device, method)
                others = range(draws + seed * needed, draws + (seed + 1) * needed)
                tops = [largest_singular_value(permuted(W, other, permutation), device) for other in others]
                noise.append((s, np.array(tops)))
        except (NumericalError, UsageError) as error:
            skipped[matrix.name] = describe_failure(W, error)
        else:
            for spec, (rule, _) in parsed.items():
                kept = [apply_rule(spec, s, shape, tops).rank for s, tops in noise]
                found = _kept_of(spec, spectra, matrix, rule.needs_null)
                counts.setdefault((spec, matrix.role), []).append(_Counts(min(shape), kept, found))
        tick(matrix)
    require_unchanged(checkpoint)
    if base is not None:
        base.require_unchanged()
    rows = tuple(_null_row(spec, role, group) for (spec, role), group in counts.items())
    return NullTest(source, permutation, draws, rows, skipped, NULL_ORDER)


def check_test(rules: Sequence[str], permutation: str, draws: int) -> None:
    """What can be refused of a null test before its model is opened. Raises UsageError."""
    if not rules:
        raise UsageError(f"a null test needs at least one rule; try --rules {TESTED[0]}")
    for rule in rules:
        if parse_rule(rule)[0].needs_sigma:
            raise UsageError(
                f"rule {rule} knows the level of rounding, and what is permuted holds the signal as well, so it has no "
                f"null test; try --rules {TESTED[1]}"
            )
    if draws < 1:
        raise UsageError(f"a null test with {draws} draws says nothing; try --draws 1")
    if permutation not in PERMUTATIONS:
        raise UsageError(f"no permutation is called {permutation!r}; try one of {', '.join(PERMUTATIONS)}")


def _kept_of(spec: str, spectra: Spectra | None, matrix: Matrix, needs_null: bool) -> int | None:
    if spectra is None or matrix.name not in spectra.values or (needs_null and matrix.name not in spectra.nulls):
        return None
    shape = (matrix.shape[0], matrix.shape[1])
    return apply_rule(spec, spectra.values[matrix.name], shape, spectra.nulls.get(matrix.name), spectra.sigma).rank


def _null_row(rule: str, role: str, group: list[_Counts]) -> NullRow:
    found = [(c.found, c.p) for c in group if c.found is not None]
    return NullRow(
        rule,
        role,
        len(group),
        mean_kept=float(np.mean([c.kept for c in group])),
        most_kept=max(max(c.kept) for c in group),
        share_kept=float(np.mean([np.mean(c.kept) / c.p for c in group])),
        found=float(np.mean([n for n, _ in found])) if found else None,
        found_share=float(np.mean([n / p for n, p in found])) if found else None,
    )


def _read_ahead(checkpoint: Checkpoint, matrices: Iterable[Matrix]) -> Iterator[tuple[Matrix, torch.Tensor]]:
    """Each matrix with its weights, the next one being read meanwhile: two in memory, never more."""
    with ThreadPoolExecutor(1) as reader:
        ahead = None
        for matrix in matrices:
            future = reader.submit(checkpoint.read, matrix.tensor, matrix.part)
            if ahead:
                yield ahead[0], ahead[1].result()
            ahead = (matrix, future)
        if ahead:
            yield ahead[0], ahead[1].result()
