"""The verbs whose core takes opened things, for people who have names: models, texts and devices as strings and paths.

The other verbs take names themselves: `scan`, `reduce`, `verify`, `calibrate`, `evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from laser.checkpoint.matrices import list_matrices
from laser.checkpoint.reader import Checkpoint
from laser.cli.options import SearchText
from laser.cli.search import (
    default_rules,
    layered_model,
    most_variants,
    objectives_of,
    searched_of,
)
from laser.differences.base import Base
from laser.differences.opened import base_named, opened_model
from laser.differences.solver import ROUNDS
from laser.differences.unmerge import AdapterRecord, all_roles, unmerge_into
from laser.engine.crew import Crew
from laser.errors import UsageError
from laser.evaluation.leaderboard import Leaderboard, run_leaderboard
from laser.evaluation.text import Text, default_text, load_tokenizer, text_named
from laser.flow import Result, run_flow
from laser.moments import Moments
from laser.pipeline import scan
from laser.plan import Plan, Treatment, make_plan
from laser.searching.search import SearchResult, check_request, search_plan
from laser.selection import Selection
from laser.spectra import Spectra
from laser.spectral.devices import Device, device_of
from laser.spectral.rules import draws_needed

Named = Checkpoint | str | Path
"""A checkpoint: opened, its directory, its Hub id, org/name[@revision], or either with +ADAPTER behind it."""


def search(
    model: Named,
    rules: str | Sequence[str] | None = None,
    *,
    text: Text | str | Path | None = None,
    held_out: Text | str | Path | None = None,
    window: int = 512,
    windows: int = 16,
    held_out_windows: int = 16,
    spectra: Spectra | None = None,
    selection: Selection | None = None,
    lowest_snr: int | Literal["default"] | None = "default",
    accept: str = "better",
    order: str = "layers",
    racing: bool = False,
    moments: Moments | None = None,
    base: Named | None = None,
    device: Device | str | None = None,
    dtype: str = "float32",
    stream: bool | None = None,
    journal: str | Path | None = None,
) -> SearchResult:
    """Try one matrix after another and keep what measurably helps, as `laser search` does.

    rules: one or more, by default laser-rmt; with `base` rounding and three scales, and a candidate is a role.
    text, held_out: Text, or a file; by default Python's pydoc topics, and what follows the calibration. window: tokens.
    spectra: of `scan`; measured here if not given. lowest_snr: only so many candidates, by default 15,
    or all roles with a `base`; None: all.
    stream: None loads as many layers as fit. journal: a file that keeps every trial, so that none is run twice.
    Raises UsageError for a request that makes no sense, OutOfMemory where the model does not fit, RecordError for
    spectra of another model.
    """
    checkpoint, where = opened_model(model), device_of(device)
    compared = base_named(base, checkpoint)
    if lowest_snr == "default":
        lowest_snr = 15 if compared is None else None
    named = default_rules(compared is not None, searching=True) if rules is None else rules
    wanted = [rule for rule in (named.split(",") if isinstance(named, str) else named) if rule]
    chosen, crew = selection or Selection(), Crew((where,))
    how: dict[str, Any] = {"lowest_snr": lowest_snr, "accept": accept, "order": order}
    check_request(wanted, **how, calibrated=moments is not None, of_difference=compared is not None)
    cut = SearchText(window=window, windows=windows, held_out_windows=held_out_windows)
    first = default_text() if text is None else text_named(text)
    other = None if held_out is None else text_named(held_out)
    calibration, reported = objectives_of(checkpoint, load_tokenizer(checkpoint.path), None, first, other, cut)
    chosen.check(list_matrices(checkpoint))
    matrices = [m for m in list_matrices(checkpoint) if chosen.why_not(m) is None]
    searched = searched_of(checkpoint, chosen, compared is not None)
    layered, _ = layered_model(
        checkpoint, calibration, reported, matrices, crew, where, dtype, stream,
        variants=most_variants(searched, wanted, lowest_snr, by_role=compared is not None), rules=len(wanted),
    )  # fmt: skip
    if spectra is None:
        draws = max((draws_needed(rule, compared is not None) for rule in wanted), default=0)
        spectra = scan(
            checkpoint, chosen, crew=crew, null_draws=draws, moments=moments, base=compared, rules=wanted
        )  # fmt: skip
    return search_plan(
        layered, spectra, wanted, calibration, reported, selection=chosen, **how, racing=racing, device=where,
        journal=None if journal is None else Path(journal), moments=moments, base=compared,
    )  # fmt: skip


def run(
    model: Named,
    output: str | Path,
    rule: str | None = None,
    *,
    selection: Selection | None = None,
    lowest_snr: int | None = None,
    treatment: Mapping[str, Any] | None = None,
    moments: Moments | None = None,
    base: Named | None = None,
    device: Device | str | None = None,
    method: str = "gram",
    resume: bool = False,
    force: bool = False,
) -> Result:
    """Scan, plan under one rule, reduce and write the card, as `laser run --no-search` does.

    rule: by default laser-rmt, or rounding for differences from a `base`.
    treatment: shrink, two_sided or require_fit, as `make_plan` takes them. A search is `search(...).plan`, which
    `reduce` writes. Raises OutputError for an `output` that is there, RecordError for a run of another kind.
    """
    checkpoint, chosen, how = opened_model(model), selection or Selection(), dict(treatment or {})
    compared = base_named(base, checkpoint)
    rule = default_rules(compared is not None, searching=False) if rule is None else rule
    asked = Treatment(rule, **how)
    asked.check(moments is not None)

    def planned(spectra: Spectra) -> Plan:
        return make_plan(spectra, rule, chosen, lowest_snr=lowest_snr, **how)

    return run_flow(
        checkpoint, Path(output), chosen, planned, crew=Crew((device_of(device),)), method=method,
        null_draws=draws_needed(rule, compared is not None), moments=moments, base=compared,
        treatment=asked if lowest_snr is None else None, rules=[rule], resume=resume, force=force,
    )  # fmt: skip


def delta(
    base: Named, tuned: Named, *, selection: Selection | None = None, device: Device | str | None = None, **how: Any
) -> Spectra:
    """What became of every tensor of `base` in `tuned`, with the spectra of the differences, as `laser delta` finds it.

    how: as `scan` takes it. Raises UsageError for a selection that matches nothing.
    """
    return scan(tuned, selection, base=base, device=device, **how)


def unmerge(
    base: Named,
    tuned: Named,
    output: str | Path,
    *,
    only_lora: bool = False,
    rounds: int = ROUNDS,
    dtype: torch.dtype = torch.float32,
    device: Device | str | None = None,
    force: bool = False,
) -> AdapterRecord:
    """Write the PEFT adapter that was merged into `tuned`, and what it does not explain, as `laser unmerge` does.

    Raises UsageError where `base` is not the base, or for `only_lora` where more than an adapter was merged;
    OutputError for an `output` that is there.
    """
    checkpoint, crew = opened_model(tuned), Crew((device_of(device),))
    there = opened_model(base)
    for each in (checkpoint, there):
        if each.on_top is not None:
            raise UsageError(f"{each.name} is in no files; make it with laser rebuild, and try its directory")
    compared = Base.of(there, checkpoint)
    found = scan(checkpoint, Selection(roles=all_roles(checkpoint)), crew=crew, base=compared).delta
    assert found is not None, "a scan with a base measures differences"
    return unmerge_into(
        compared, found, Path(output), crew=crew, only_lora=only_lora, rounds=rounds, dtype=dtype, force=force
    )


def leaderboard(
    model: Named,
    tasks: Sequence[str] | None = None,
    *,
    limit: int | None = None,
    data: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    batch_size: int = 1,
) -> Leaderboard:
    """Scores on the six tasks of the Open LLM Leaderboard, version 1, through lm-eval; see `run_leaderboard`."""
    return run_leaderboard(
        opened_model(model),
        tasks=None if tasks is None else tuple(tasks),
        limit=limit,
        data=None if data is None else Path(data),
        device=device,
        dtype=dtype,
        batch_size=batch_size,
    )
