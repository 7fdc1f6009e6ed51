"""Estimates and what it took: --dry-run, and the last lines of scan, reduce and run."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from laser.checkpoint.matrices import PROTECTED, DoubtWarning, Matrix, doubts, list_matrices
from laser.checkpoint.reader import Checkpoint
from laser.cli import common
from laser.cli.common import say
from laser.engine.cost import Estimate, Measuring, Meter, cut_seconds, estimate_cost, forward_seconds
from laser.engine.crew import Crew
from laser.evaluation.causal import build_causal
from laser.evaluation.footprint import active_weights
from laser.evaluation.leaderboard import Workload
from laser.evaluation.objective import Objective
from laser.evaluation.placement import Placement
from laser.evaluation.streaming import LayeredModel
from laser.outcome import Outcome
from laser.records import plain
from laser.searching.candidates import Candidate
from laser.searching.passes import count_passes
from laser.selection import MAIN, Selection
from laser.spectral.devices import Device

NAMED = 8  # files that a line names before it only counts


def chosen_of(matrices: list[Matrix], chosen: Selection) -> list[Matrix]:
    return [m for m in matrices if chosen.why_not(m) is None]


def print_dry_run(
    checkpoint: Checkpoint,
    chosen: Selection,
    crew: Crew,
    as_json: bool,
    draws: int = 0,
    in_data: bool = False,
    measuring: Sequence[Measuring] = (),
    scaled: bool = False,
) -> None:
    matrices = list_matrices(checkpoint)
    if message := doubts(checkpoint, matrices):
        warnings.warn(message, DoubtWarning, stacklevel=2)
    chosen.check(matrices)
    skipped = chosen.skipped(matrices)
    matrices_chosen = chosen_of(matrices, chosen)
    print_estimate(checkpoint, matrices_chosen, crew, as_json, None, draws, in_data, skipped, measuring, scaled)
    kept = Counter(
        (m.stack if m.role not in PROTECTED else "", m.role) for m in matrices if m.is_matrix and chosen.why_not(m)
    )
    if kept and not as_json:
        counts = ", ".join(f"{stack + ' ' if stack else ''}{role} {count}" for (stack, role), count in kept.items())
        say(f"left as they are, matrices by role: {counts}")


def print_estimate(
    checkpoint: Checkpoint,
    matrices: list[Matrix],
    crew: Crew,
    as_json: bool,
    ranks: Mapping[str, int] | None = None,
    draws: int = 0,
    in_data: bool = False,
    skipped: Mapping[str, str] | None = None,
    measuring: Sequence[Measuring] = (),
    scaled: bool = False,
) -> None:
    """A row per kind of matrix, what scanning and reducing them would take, and what measuring the model would.

    scaled: of differences that are scaled, which takes none of that."""
    estimated = estimate_cost(checkpoint, matrices, crew, ranks, draws, in_data)
    if as_json:
        return common.print_json(
            asdict(estimated)
            | {"device": crew.label, "names": [m.name for m in matrices]}
            | {"skipped": skipped or {}}
            | {each.what: asdict(each) for each in measuring}
        )
    groups: dict[tuple[str, str, tuple[int, ...], str], list[Matrix]] = {}
    for m in matrices:
        groups.setdefault((m.stack, m.role, m.shape, m.dtype), []).append(m)
    several = len({m.stack for m in matrices}) > 1
    common.print_table(
        ("role", "matrices", "shape", "dtype", *(["stack"] if several else []), "layers"),
        [
            (role, len(ms), "x".join(map(str, shape)), dtype, *([stack or MAIN] if several else []), _span(ms))
            for (stack, role, shape, dtype), ms in groups.items()
        ],
    )
    for name, why in list((skipped or {}).items())[:NAMED]:
        say(f"{name}: {why}")
    if skipped and len(skipped) > NAMED:
        say(f"and {len(skipped) - NAMED} more are skipped")
    if scaled:
        say(
            f"{len(matrices)} matrices on {crew.label}: a scale factorises nothing: it takes as long as to read both "
            f"models and to write one; {estimated.disk_bytes / 1e9:.2f} GB of disk for the scaled copy"
        )
    else:
        say(
            f"{len(matrices)} matrices on {crew.label}: about {_duration(estimated.scan_seconds)} to scan, "
            f"{_duration(estimated.reduce_seconds)} to reduce them all, {estimated.peak_bytes / 1e9:.2f} GB of memory "
            f"at the peak besides the libraries, {estimated.disk_bytes / 1e9:.2f} GB of disk for a reduced copy "
            f"({estimated.basis})"
        )
    for each in measuring:
        say(measuring_line(each))


def search_measuring(
    model: LayeredModel,
    placed: Placement,
    calibration: Objective,
    reported: Sequence[Objective],
    matrices: Sequence[Matrix],
    candidates: Sequence[Candidate],
    device: Device,
    *,
    tried: int | None,
    order: str,
    grid: bool = False,
    shortlisted: bool = False,
) -> Measuring:
    """What a search takes at the most: the passes of `count_passes`, and the matrices that are truncated for them."""
    passes = count_passes(
        candidates, model.layers, calibration, reported, tried=tried, order=order, grid=grid, shortlisted=shortlisted,
        together=placed.variants or None,
    )  # fmt: skip
    in_layers, in_head = active_weights(model.model)
    read = (  # of the layers that do not stay
        passes.loads * (1 - placed.layers / model.layers) * sum(s.size for s in model.checkpoint.shards) / model.layers
    )
    products = in_layers / model.layers * passes.layer_tokens + in_head * passes.tokens
    seconds, basis = forward_seconds(device, products, read)
    named = {name for c in candidates for _, ranks in c.options for name in ranks}
    most_expensive = sorted((m for m in matrices if m.name in named), key=lambda m: -m.cost)
    most_expensive = most_expensive if grid or shortlisted else most_expensive[: passes.candidates]
    seconds += passes.cuts * cut_seconds(most_expensive, device) / max(len(most_expensive), 1)
    texts = ", ".join(dict.fromkeys(each.text for each in (calibration, *reported)))
    return Measuring(
        "search", texts, passes.candidates, passes.trials, passes.windows, passes.tokens, passes.layer_forwards,
        seconds, placed.peak, placed.stream, basis, placed.dtype, placed.layers, placed.variants, placed.why,
    )  # fmt: skip


def board_measuring(
    checkpoint: Checkpoint, workload: Workload, placed: Placement, device: Device, models: int
) -> Measuring:
    """What the six tasks take of so many models of this kind."""
    active = sum(active_weights(build_causal(checkpoint)))
    prompts, tokens = models * workload.prompts, models * workload.tokens
    seconds, basis = forward_seconds(device, active * tokens)
    return Measuring(
        "leaderboard", "the tasks' rows", 0, 0, prompts, tokens, 0, seconds, placed.peak, False, basis, placed.dtype,
        0, 0, placed.why,
    )  # fmt: skip


def measuring_line(of: Measuring) -> str:
    """For people."""
    searched = of.what == "search"
    tried = f"at most {of.candidates} candidates in {of.trials} trials, " if searched else ""
    runs = f", {of.layer_forwards} times a layer" if searched else ""
    return (
        f"{of.what}: {tried}{of.texts} {'windows' if searched else 'prompts'} scored{runs} "
        f"({of.tokens} tokens of {of.on}), about {_duration(of.seconds)}, {of.peak_bytes / 1e9:.2f} GB of memory, "
        f"in {of.dtype} ({of.basis}); {of.placed}"
    )


def _span(matrices: list[Matrix]) -> str:
    layers = [m.layer for m in matrices if m.layer is not None]
    return f"{min(layers)}-{max(layers)}" if layers else "-"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def print_outcome(
    outcome: Outcome, output: Path, meter: Meter, seconds: float | None, estimated: Estimate, as_json: bool
) -> None:
    """`seconds`: what was estimated for this very work, None where nothing can be, as for a search."""
    if as_json:
        return common.print_json(plain(outcome) | {"output": str(output)} | took(meter, seconds, estimated))
    common.print_plan(outcome.plan.lines, of_difference=outcome.plan.pair is not None)
    if outcome.plan.edited:
        say("the plan was edited after the rule had made it, and was carried out line by line as it stands")
    worst = max((m["residual"] for m in outcome.matrices.values()), default=0.0)
    say(f"written to {output} in {meter.seconds:.1f} s; largest residual of a certificate {worst:.1e}")
    fallen = {name: m for name, m in outcome.matrices.items() if m.get("note")}
    if fallen:
        name, first = next(iter(fallen.items()))
        matrices = "1 matrix was" if len(fallen) == 1 else f"{len(fallen)} matrices were"
        say(f"{matrices} cut by another method than asked for; {name} by {first['method']}, as {first.get('note')}")
    if outcome.left_out:
        named, more = ", ".join(outcome.left_out[:NAMED]), len(outcome.left_out) - NAMED
        more = f" and {more} more" if more > 0 else ""
        say(f"left out, as other copies of weights, parts of them, or links: {named}{more}")
    if seconds is not None:
        say(meter.against(seconds, estimated))


def took(meter: Meter, seconds: float | None, estimated: Estimate) -> dict[str, Any]:
    """For programs: what it took, and what was estimated."""
    estimate = {"seconds": seconds, "peak_bytes": estimated.peak_bytes, "basis": estimated.basis}
    return {"seconds": meter.seconds, "peak_bytes": meter.peak, "estimated": estimate}
