"""What a search tries, in which order.

A candidate is one matrix, or one cell of matrices, at the ranks of one or more rules. Of differences from a base it is
a role, all its matrices at once, cut or scaled by one or more rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from laser.checkpoint.matrices import matrix_called, read_matrix
from laser.checkpoint.reader import Checkpoint
from laser.differences.base import Base
from laser.differences.edits import OfDifference, between
from laser.errors import UsageError
from laser.evaluation.streaming import LayeredModel
from laser.moments import Moments, metric_of
from laser.plan import Plan, make_plan
from laser.reasons import Kind, Why
from laser.searching.trials import Bench
from laser.selection import Selection
from laser.spectra import Spectra
from laser.spectral.devices import Device
from laser.spectral.rules import metric_in, scale_in
from laser.spectral.shrinkage import Gains

ORDERS = ("layers", "snr")


@dataclass(frozen=True)
class Candidate:
    """Matrices that are edited together.

    options: (rule, tensor name -> rank), mildest first, no rank twice in the same metric
    """

    label: str
    piece: int  # the first piece of the model that it touches
    snr: float | None  # by the first rule
    options: tuple[tuple[str, Mapping[str, int]], ...]
    predicted: float | None = None  # first-order change of the loss, nats per token, by the first rule


def plans_of(spectra: Spectra, rules: Sequence[str], selection: Selection, lowest_snr: int | None) -> dict[str, Plan]:
    """One plan per rule. Only the first is limited to the K lowest: a matrix's SNR depends on the rule."""
    plans = {}
    for i, rule in enumerate(rules):
        lowest = None if i else lowest_snr
        plans[rule] = make_plan(spectra, rule, selection, lowest_snr=lowest)
    return plans


def without_idle(spectra: Spectra, model: LayeredModel) -> Spectra:
    """The spectra of what the model runs. A matrix that it does not run (of an MTP layer, a leftover head, a tower of
    another modality) changes no loss, so it is kept, with that reason, and says nothing about the rest."""
    idle = {name for name in spectra.values if not model.runs(name)}
    why = Why(Kind.UNUSED, "the model that transformers runs does not use it")
    skipped = {**spectra.skipped, **dict.fromkeys(idle, why)}
    return replace(spectra, values={n: v for n, v in spectra.values.items() if n not in idle}, skipped=skipped)


def candidates_of(
    spectra: Spectra,
    model: LayeredModel,
    rules: Sequence[str],
    selection: Selection,
    lowest_snr: int | None,
    grid: bool,
) -> tuple[dict[str, Plan], list[Candidate]]:
    """What there is to try, and the plan of each rule that says so. Raises UsageError where there is nothing."""
    plans = plans_of(without_idle(spectra, model), rules, selection, lowest_snr)
    if spectra.delta is not None and not grid:
        found = role_candidates(plans, model)
    else:
        found = grid_candidates(plans, model) if grid else matrix_candidates(plans, model)
    if not found:
        raise UsageError("the first rule reduces no selected matrix, so there is nothing to try; try another rule")
    return plans, found


def matrix_candidates(plans: Mapping[str, Plan], model: LayeredModel) -> list[Candidate]:
    """Each matrix that the first rule's plan reduces, at the rank of every rule that reduces it."""
    first = next(iter(plans.values()))
    found = []
    for name, line in first.reductions.items():
        ranks: dict[tuple[int, str], str] = {}
        for rule, plan in plans.items():
            if name in plan.reductions:
                ranks.setdefault((-(plan.reductions[name].rank or 0), metric_in(rule)), rule)
        options = tuple((ranks[key], {name: -key[0]}) for key in sorted(ranks))
        found.append(Candidate(name, model.first_piece(name), line.snr, options))
    return found


def role_candidates(plans: Mapping[str, Plan], model: LayeredModel) -> list[Candidate]:
    """Each role of each stack: all its tensors that a rule cuts or scales, one option per rule. Ranks of what is no
    matrix are 0 here, and nobody asks for them."""
    found: dict[tuple[str, str], dict[str, dict[str, int]]] = {}
    for rule, plan in plans.items():
        for name, line in plan.reductions.items():
            if model.runs(name):
                found.setdefault((line.stack, line.role), {}).setdefault(rule, {})[name] = line.rank or 0
    return [
        Candidate(
            f"{stack} {role}".strip(),
            min(model.first_piece(name) for names in options.values() for name in names),
            None,
            tuple(options.items()),
        )
        for (stack, role), options in found.items()
    ]


def grid_candidates(plans: Mapping[str, Plan], model: LayeredModel) -> list[Candidate]:
    """Cells of LASER (arXiv 2312.13558, section 4): one layer, one role (all its experts), one rule."""
    cells: dict[tuple[int, str, str], dict[str, int]] = {}
    for rule, plan in plans.items():
        for name, line in plan.reductions.items():
            if not model.runs(name):
                continue
            piece = model.first_piece(name)
            cells.setdefault((piece, line.role, rule), {})[name] = line.rank or 0
    return [
        Candidate(f"layer {piece - 1} {role}", piece, None, ((rule, ranks),))
        for (piece, role, rule), ranks in cells.items()
    ]


def in_order(candidates: Sequence[Candidate], order: str) -> list[Candidate]:
    """`layers`: last first, lowest SNR first within one, so that what is kept stays above the cached states.
    `snr`: lowest first, LaserRMT's order. No SNR comes last; equal ones keep the file's order."""

    def key(candidate: Candidate) -> tuple[float, ...]:
        snr = float("inf") if candidate.snr is None else candidate.snr
        return (-candidate.piece, snr) if order == "layers" else (snr,)

    return sorted(candidates, key=key)


def cut_of(
    checkpoint: Checkpoint,
    rule: str,
    ranks: Mapping[str, int],
    device: Device,
    moments: Moments | None = None,
    base: Base | None = None,
) -> dict[str, torch.Tensor]:
    """The matrices truncated in the rule's metric, in storage dtype: what `reduce` writes by the method gram. With a
    base their differences are cut, or scaled."""
    found = {}
    for name, rank in ranks.items():
        W, gains = read_matrix(checkpoint, name), Gains(rank)
        if base is None:
            metric = metric_of(metric_in(rule), name, W, moments)
        else:
            there = base.weights(matrix_called(base.tuned, name))
            if (scale := scale_in(rule)) is not None:
                found[name] = between(there, W, scale)
                continue
            metric = OfDifference(there)
        cut = metric.visit(W, lambda _, gains=gains: gains, device).truncation
        assert cut is not None, "gains were given"
        found[name] = cut.matrix.cpu()
    return found


def predict(
    candidates: Sequence[Candidate], bench: Bench, device: Device, moments: Moments | None = None
) -> list[Candidate]:
    """Each candidate with sum(G * (W_r - W)), the first-order change of the loss under its first option.

    G = d loss / d W from one backward pass over the calibration windows. arXiv 2510.20800 uses the gradient of the
    singular values; this is the same derivative along the whole part that is removed. The pass starts from the
    unedited model and is exact only for small removals: the search's record compares it with what was measured.
    """
    names = {name for candidate in candidates for name in candidate.options[0][1]}
    first = min(candidate.piece for candidate in candidates)
    if first == 0:
        raise UsageError("--shortlist gradient cannot rank the embedding; leave its role out")
    boundaries = bench.all_boundaries(first)
    changes: dict[str, float] = {}
    firsts = {
        name: (rule, {name: rank}) for c in candidates for rule, ranks in c.options[:1] for name, rank in ranks.items()
    }
    checkpoint = bench.model.checkpoint
    for name, G in bench.model.gradients(bench.objective.windows, boundaries, sorted(names)):
        W = read_matrix(checkpoint, name).double()
        cut = cut_of(checkpoint, *firsts[name], device, moments)
        removed = cut[name].double() - W
        changes[name] = float((G.cpu().double() * removed).sum())
    return [replace(c, predicted=sum(changes[name] for name in c.options[0][1])) for c in candidates]
