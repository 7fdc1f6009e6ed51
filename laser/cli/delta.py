"""The verb delta: what a fine-tune did to its base, tensor by tensor. It parses, calls and prints."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path

from laser.checkpoint.matrices import list_matrices
from laser.cli import common, options
from laser.cli.common import say
from laser.cli.estimates import print_dry_run
from laser.cli.progress import Progress
from laser.differences.base import Base
from laser.differences.difference import Verdict
from laser.differences.opened import open_model
from laser.differences.overview import QUANTISED, is_base, is_base_quantised, overview_rows
from laser.engine.cost import Meter
from laser.errors import UsageError
from laser.pipeline import check_scan, scan_into
from laser.records import plain
from laser.spectra import Spectra


def delta_verb(
    base: str,
    tuned: str,
    *,
    output: Path | None,
    which: options.Matrices,
    compute: options.ComputeOptions,
    null: int,
    work: options.WorkOptions,
) -> None:
    """`laser delta`, whose arguments and help are in verbs.py."""
    selected = which.selection()
    first, second = open_model(base), open_model(tuned)
    method = "gram" if compute.method == "auto" else compute.method
    crew = compute.crew()
    check_scan(method, null)
    if work.dry_run:
        return print_dry_run(second, selected, crew, work.as_json, null)
    if output is None:
        raise UsageError("delta needs a file to write; try -o delta.safetensors")
    work.claim(output, "spectra")
    compared, meter = Base.of(first, second), Meter()
    with Progress("delta", list_matrices(second)) as bar:
        spectra = scan_into(
            output, second, selected, crew, method, bar, null_draws=null, base=compared, anew=work.force
        )
    assert spectra.delta is not None, "a scan with a base measures differences"
    changes = spectra.delta.changes
    if work.as_json:
        return common.print_json(
            {
                "output": str(output),
                "base": plain(spectra.delta.base),
                "tuned": plain(spectra.delta.tuned),
                "is_base": is_base(spectra.matrices, changes),
                "tensors": {name: asdict(change) for name, change in changes.items()},
                "device": spectra.device,
                "seconds": meter.seconds,
            }
        )
    print_changes(spectra)
    say(f"{len(changes)} tensors in {meter.seconds:.1f} s on {spectra.device}, written to {output}")


def print_changes(spectra: Spectra) -> None:
    """The table by role, and what it comes to."""
    assert spectra.delta is not None, "asked of differences alone"
    changes = spectra.delta.changes
    rows = [
        (
            row.role, row.kind, row.tensors, row.layers or "-", _ranks(row.ranks),
            row.energy, row.share, row.moved, row.rest,
        )
        for row in overview_rows(spectra.matrices, changes)
    ]  # fmt: skip
    headings = ("role", "what became of it", "tensors", "layers", "rank", "energy", "||D||/||W||", "moved", "rest")
    common.print_table(headings, rows)
    kinds = Counter(change.kind for change in changes.values())
    if not is_base(spectra.matrices, changes):
        say(
            f"{spectra.delta.base.name} IS NOT THE BASE of {spectra.delta.tuned.name}: none of their matrices are alike"
        )
    if is_base_quantised(changes):
        say(QUANTISED.format(tuned=spectra.delta.tuned.name, base=spectra.delta.base.name))
    if kinds[Verdict.FAINT]:
        say(f"{kinds[Verdict.FAINT]} faint: too few entries moved for a spectrum to tell; their rank is a hint")


def _ranks(ranks: tuple[int, int] | None) -> str:
    if ranks is None:
        return "-"
    return str(ranks[0]) if ranks[0] == ranks[1] else f"{ranks[0]}-{ranks[1]}"
