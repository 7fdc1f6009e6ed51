"""The verbs of the flow: scan, plan, reduce, verify. Each parses, calls and prints."""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from laser.checkpoint.families import DoubtWarning, Matrix, doubts, list_matrices
from laser.checkpoint.reader import Checkpoint, open_checkpoint
from laser.cli import common
from laser.errors import UsageError
from laser.estimate import estimate
from laser.flow import scan_into
from laser.plan import Plan, make_plan
from laser.reduction import Outcome
from laser.reduction import reduce as reduce_checkpoint
from laser.selection import Selection
from laser.spectra import Spectra
from laser.spectral.devices import choose_device
from laser.spectral.measuring import choose_method
from laser.spectral.rules import RULES
from laser.spectral.shrinkage import SHRINKERS
from laser.verification import verify as verify_output
from laser.workers import Crew, choose_crew

Output = Annotated[Path, typer.Option("-o", "--output", help="What to write.")]
RuleOption = Annotated[str | None, typer.Option("--rule", help=f"NAME or NAME:ARGUMENT, of {', '.join(RULES)}.")]
LowestSnr = Annotated[int | None, typer.Option("--lowest-snr", help="Reduce only the K matrices of lowest SNR.")]
Shrink = Annotated[str | None, typer.Option("--shrink", help=f"Shrink what is kept: {', '.join(SHRINKERS)} loss.")]
TwoSided = Annotated[bool, typer.Option("--two-sided", help="Keep what lies under the noise's lower edge as well.")]
RequireFit = Annotated[
    float | None, typer.Option("--require-fit", help="Keep a matrix whose bulk fits noise at a lower level than this.")
]


def scan(
    model: common.Model,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The spectra file to write.")] = None,
    layers: common.Layers = None,
    roles: common.Roles = None,
    include: common.Include = None,
    exclude: common.Exclude = None,
    device: common.DeviceName = "auto",
    devices: common.Devices = None,
    workers: common.Workers = None,
    engine: common.Engine = "threads",
    precision: common.Precision = "auto",
    method: common.Method = "auto",
    null: Annotated[int, typer.Option("--null", help="Permutations to measure, for the rule parallel.")] = 0,
    moments: common.MomentsFile = None,
    dry_run: common.DryRun = False,
    force: common.Force = False,
    as_json: common.Json = False,
) -> None:
    """Measure the singular values of every selected matrix and write them to one small file.

    Interrupted, it keeps what it has in OUTPUT.partial; the same command goes on from there.
    """
    checkpoint, selected = open_checkpoint(model), common.selection(layers, roles, include, exclude)
    method = "gram" if method == "auto" else method  # values are the Gram matrix's on every device
    crew = choose_crew(device, precision, workers=workers, devices=devices, engine=engine)
    if dry_run:
        return print_dry_run(checkpoint, selected, crew, as_json)
    if output is None:
        raise UsageError("scan needs a file to write; try -o spectra.safetensors")
    common.refuse_to_overwrite(output, force)
    if force:
        output.unlink(missing_ok=True)
        output.with_name(output.name + ".partial").unlink(missing_ok=True)
    start, known = time.perf_counter(), common.moments_of(moments)
    with common.Progress("scan", chosen_of(list_matrices(checkpoint), selected)) as bar:
        spectra = scan_into(output, checkpoint, selected, crew, method, bar, null_draws=null, moments=known)
    seconds = time.perf_counter() - start
    if as_json:
        return common.print_json(
            {
                "output": str(output),
                "source": asdict(spectra.source),
                "scanned": len(spectra.values),
                "skipped": dict(spectra.skipped),
                "device": spectra.device,
                "seconds": seconds,
            }
        )
    _print_spectra(spectra)
    print(f"{len(spectra.values)} matrices in {seconds:.1f} s on {spectra.device}, written to {output}")


def plan(
    spectra: Annotated[Path, typer.Argument(metavar="SPECTRA", help="File written by laser scan.")],
    output: Output,
    rule: RuleOption = None,
    lowest_snr: LowestSnr = None,
    shrink: Shrink = None,
    two_sided: TwoSided = False,
    require_fit: RequireFit = None,
    metric: Annotated[str, typer.Option("--metric", help="plain, or data: by what the outputs lose.")] = "plain",
    fewest_tokens: Annotated[
        int | None, typer.Option("--fewest-tokens", help="Keep a matrix that met fewer; default: its smaller side.")
    ] = None,
    layers: common.Layers = None,
    roles: common.Roles = None,
    include: common.Include = None,
    exclude: common.Exclude = None,
    force: common.Force = False,
    as_json: common.Json = False,
) -> None:
    """Apply a rule to the spectra: a line for every tensor, to reduce or to keep, and why."""
    if rule is None:
        raise UsageError(f"plan needs a rule; try --rule mp-edge, or one of {', '.join(RULES)}")
    common.refuse_to_overwrite(output, force)
    chosen = common.selection(layers, roles, include, exclude)
    made = make_plan(
        Spectra.load(spectra),
        rule,
        chosen,
        lowest_snr=lowest_snr,
        shrink=shrink,
        two_sided=two_sided,
        require_fit=require_fit,
        metric=metric,
        fewest_tokens=fewest_tokens,
    )
    made.save(output)
    if as_json:
        return common.print_json(asdict(made))
    common.print_plan(made.lines)
    print(f"written to {output}")


def reduce(
    model: common.Model,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="File written by laser plan.")],
    output: Output,
    device: common.DeviceName = "auto",
    devices: common.Devices = None,
    workers: common.Workers = None,
    engine: common.Engine = "threads",
    precision: common.Precision = "auto",
    method: common.Method = "auto",
    moments: common.MomentsFile = None,
    fresh: Annotated[
        Path | None, typer.Option("--fresh", help="Moments of another text, to measure what each edit costs there.")
    ] = None,
    resume: common.Resume = False,
    force: common.Force = False,
    evict: Annotated[
        bool, typer.Option("--evict", help="Drop each shard from the Hub's cache once its output is written.")
    ] = False,
    dry_run: common.DryRun = False,
    as_json: common.Json = False,
) -> None:
    """Write the checkpoint that the plan describes. Killed at any moment, --resume goes on without losing a matrix."""
    checkpoint, wanted = open_checkpoint(model), Plan.load(plan)
    crew = choose_crew(device, precision, workers=workers, devices=devices, engine=engine)
    touched = [m for m in list_matrices(checkpoint) if m.name in wanted.reductions]
    if dry_run:
        wanted.source.require(checkpoint, "plan")
        return _print_estimate(checkpoint, touched, crew, as_json)
    method, _ = choose_method(method, crew.devices[0])
    start, known, elsewhere = time.perf_counter(), common.moments_of(moments), common.moments_of(fresh)
    with common.Progress("reduce", touched) as bar:
        outcome = reduce_checkpoint(
            checkpoint,
            wanted,
            output,
            crew=crew,
            method=method,
            resume=resume,
            force=force,
            evict=evict,
            moments=known,
            fresh=elsewhere,
            tick=bar,
        )
    print_outcome(outcome, output, time.perf_counter() - start, as_json)


def verify(
    model: common.Model,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Directory written by laser reduce or laser run.")],
    device: common.DeviceName = "auto",
    moments: common.MomentsFile = None,
    as_json: common.Json = False,
) -> None:
    """Check on the files that untouched tensors are bit-identical and touched ones are as their plan says."""
    checkpoint = open_checkpoint(model)
    with common.Progress("verify", list_matrices(checkpoint)) as bar:
        found = verify_output(
            checkpoint, output, device=choose_device(device), moments=common.moments_of(moments), tick=bar
        )
    if as_json:
        common.print_json(asdict(found))
    else:
        for problem in found.problems:
            print(problem)
        print(f"{found.untouched} tensors identical, {found.touched} as planned, {len(found.problems)} problems")
    if found.problems:
        raise typer.Exit(1)


def chosen_of(matrices: list[Matrix], chosen: Selection) -> list[Matrix]:
    return [m for m in matrices if chosen.why_not(m) is None]


def print_dry_run(checkpoint: Checkpoint, chosen: Selection, crew: Crew, as_json: bool) -> None:
    matrices = list_matrices(checkpoint)
    if told := doubts(checkpoint, matrices):
        warnings.warn(told, DoubtWarning, stacklevel=2)
    chosen.check(matrices)
    _print_estimate(checkpoint, chosen_of(matrices, chosen), crew, as_json)


def _print_estimate(checkpoint: Checkpoint, matrices: list[Matrix], crew: Crew, as_json: bool) -> None:
    foretold = estimate(checkpoint, matrices, crew)
    if as_json:
        return common.print_json(asdict(foretold) | {"device": crew.label, "names": [m.name for m in matrices]})
    groups: dict[tuple[str, tuple[int, ...], str], list[Matrix]] = {}
    for m in matrices:
        groups.setdefault((m.role, m.shape, m.dtype), []).append(m)
    common.print_table(
        ("role", "matrices", "shape", "dtype", "layers"),
        [
            (role, len(ms), "x".join(map(str, shape)), dtype, _span([m.layer for m in ms if m.layer is not None]))
            for (role, shape, dtype), ms in groups.items()
        ],
    )
    print(
        f"{len(matrices)} matrices on {crew.label}: about {_duration(foretold.scan_seconds)} to scan, "
        f"{_duration(foretold.reduce_seconds)} to reduce them all, {foretold.peak_bytes / 1e9:.2f} GB of memory "
        f"at the peak besides the libraries, {foretold.disk_bytes / 1e9:.2f} GB of disk for a reduced copy"
    )


def _span(layers: list[int]) -> str:
    return f"{min(layers)}-{max(layers)}" if layers else "-"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _print_spectra(spectra: Spectra) -> None:
    by_role: dict[str, list[Matrix]] = {}
    for m in spectra.matrices:
        if m.name in spectra.values:
            by_role.setdefault(m.role, []).append(m)
    rows = []
    for role, ms in by_role.items():
        values = [spectra.values[m.name] for m in ms]
        means = (float(np.mean([f(s) for s in values])) for f in (np.max, np.median, np.linalg.norm))
        rows.append((role, len(ms), "x".join(map(str, ms[0].shape)), *means))
    common.print_table(("role", "matrices", "shape", "mean s_1", "mean median s", "mean ||W||"), rows)
    for name, why in spectra.skipped.items():
        if why.startswith("skipped"):
            print(f"{name}: {why}")


def print_outcome(outcome: Outcome, output: Path, seconds: float, as_json: bool) -> None:
    if as_json:
        return common.print_json(asdict(outcome) | {"output": str(output), "seconds": seconds})
    common.print_plan(outcome.plan.lines)
    worst = max((m["residual"] for m in outcome.matrices.values()), default=0.0)
    print(f"written to {output} in {seconds:.1f} s; largest residual of a certificate {worst:.1e}")
