"""run: the whole flow in one call, every record kept beside the weights that it describes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from laser.checkpoint.families import Matrix
from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.writer import RECORDS, prepare_output
from laser.plan import Plan, make_plan
from laser.reduction import Outcome, reduce
from laser.selection import Selection
from laser.spectra import Spectra, scan
from laser.spectral.devices import Device
from laser.spectral.rules import draws_needed


@dataclass(frozen=True)
class Result:
    """What `run` made; the records lie in OUT/laser and OUT/laser.json."""

    spectra: Spectra
    plan: Plan
    outcome: Outcome


def run(
    checkpoint: Checkpoint,
    out: Path,
    rule: str,
    selection: Selection,
    *,
    lowest_snr: int | None = None,
    shrink: str | None = None,
    two_sided: bool = False,
    require_fit: float | None = None,
    device: Device,
    method: str = "gram",
    resume: bool = False,
    force: bool = False,
    on_scan: Callable[[Matrix], None] = lambda _: None,
    on_plan: Callable[[Plan], None] = lambda _: None,
    on_reduce: Callable[[Matrix, float], None] = lambda *_: None,
) -> Result:
    """scan, plan, reduce. Killed and called again with `resume`, it goes on where it was: nothing is computed twice.

    The callbacks are called per scanned matrix, once with the plan, and per reduced matrix with its seconds.
    """
    draws = draws_needed(rule)
    prepare_output(checkpoint, out, resume=resume, force=force)
    records = out / RECORDS
    spectra = scan_into(records / "spectra.safetensors", checkpoint, selection, device, method, on_scan, draws)
    plan = make_plan(
        spectra,
        rule,
        selection,
        lowest_snr=lowest_snr,
        shrink=shrink,
        two_sided=two_sided,
        require_fit=require_fit,
    )
    plan.save(records / "plan.json")
    on_plan(plan)
    outcome = reduce(checkpoint, plan, out, device=device, method=method, resume=True, tick=on_reduce)
    return Result(spectra, plan, outcome)


def scan_into(
    path: Path,
    checkpoint: Checkpoint,
    selection: Selection,
    device: Device,
    method: str,
    tick: Callable[[Matrix], None] = lambda _: None,
    null_draws: int = 0,
) -> Spectra:
    """The spectra at `path` if they are those of this scan; else scan, keeping the work so far in `path`.partial."""
    if path.exists():
        there = Spectra.load(path)
        wanted = {m.name for m in there.matrices if selection.why_not(m) is None}
        done = there.values.keys() | {name for name, why in there.skipped.items() if why.startswith("skipped")}
        if (there.source.identity, there.method, there.device) == (checkpoint.identity, method, device.label):
            drawn = {len(there.nulls.get(name, ())) for name in there.values}
            if wanted == done and drawn <= {null_draws}:
                return there
    partial = path.with_name(path.name + ".partial")
    spectra = scan(
        checkpoint, selection, device=device, method=method, journal=partial, null_draws=null_draws, tick=tick
    )
    spectra.save(path)
    partial.unlink()
    return spectra
