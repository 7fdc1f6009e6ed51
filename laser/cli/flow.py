"""The verbs of the flow: scan, plan, reduce, verify. Each parses, calls and prints."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from laser.checkpoint.families import Matrix, list_matrices
from laser.checkpoint.reader import open_checkpoint
from laser.checkpoint.swap import require_place
from laser.checkpoint.writer import require_run
from laser.cli import common
from laser.cli.common import say
from laser.cli.estimates import chosen_of, print_dry_run, print_estimate, print_outcome, took
from laser.engine.estimate import Meter, estimate
from laser.engine.workers import choose_crew
from laser.errors import UsageError
from laser.flow import scan_into
from laser.plan import Plan, Treatment, make_plan, parse_lowest_snr
from laser.reasons import Kind
from laser.reduction import prepare
from laser.reduction import reduce as reduce_checkpoint
from laser.spectra import Spectra, check_scan
from laser.spectral.devices import choose_device
from laser.spectral.measuring import choose_method
from laser.spectral.rules import RULES
from laser.spectral.shrinkage import SHRINKERS
from laser.verification import verify as verify_output

Output = Annotated[Path, typer.Option("-o", "--output", help="What to write.")]
RuleOption = Annotated[str | None, typer.Option("--rule", help=f"NAME or NAME:ARGUMENT, of {', '.join(RULES)}.")]
LowestSnr = Annotated[
    str | None, typer.Option("--lowest-snr", metavar="K", help="Reduce only the K matrices of lowest SNR; or all.")
]
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
    device: common.DeviceNames = "auto",
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
    crew = choose_crew(device, precision, workers=workers, engine=engine)
    check_scan(method, null)
    known = common.moments_of(moments)
    if known is not None:
        known.source.require(checkpoint, "moments")
    if dry_run:
        return print_dry_run(checkpoint, selected, crew, as_json, null, moments is not None)
    if output is None:
        raise UsageError("scan needs a file to write; try -o spectra.safetensors")
    common.refuse_to_overwrite(output, force, "spectra")
    matrices = chosen_of(list_matrices(checkpoint), selected)
    foretold, meter = estimate(checkpoint, matrices, crew, draws=null, in_data=known is not None), Meter()
    with common.Progress("scan", matrices) as bar:
        spectra = scan_into(output, checkpoint, selected, crew, method, bar, null_draws=null, moments=known, anew=force)
    if as_json:
        return common.print_json(
            {
                "output": str(output),
                "source": asdict(spectra.source),
                "scanned": len(spectra.values),
                "skipped": {name: asdict(why) for name, why in spectra.skipped.items()},
                "device": spectra.device,
                **took(meter, foretold.scan_seconds, foretold),
            }
        )
    _print_spectra(spectra)
    say(f"{len(spectra.values)} matrices in {meter.seconds:.1f} s on {spectra.device}, written to {output}")
    say(meter.against(foretold.scan_seconds, foretold))


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
    count = parse_lowest_snr(lowest_snr, None)
    Treatment(rule, shrink, two_sided, require_fit, metric).check()
    common.refuse_to_overwrite(output, force, "plan")
    chosen = common.selection(layers, roles, include, exclude)
    made = make_plan(
        Spectra.load(spectra),
        rule,
        chosen,
        lowest_snr=count,
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
    say(f"written to {output}")


def reduce(
    model: common.Model,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="File written by laser plan.")],
    output: Output,
    device: common.DeviceNames = "auto",
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
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="bfloat16: an FP8 source without FP8; default: FP8, new scales.")
    ] = None,
    dry_run: common.DryRun = False,
    as_json: common.Json = False,
) -> None:
    """Write the checkpoint that the plan describes. Killed at any moment, --resume goes on without losing a matrix."""
    checkpoint, wanted = open_checkpoint(model), Plan.load(plan)
    crew = choose_crew(device, precision, workers=workers, engine=engine)
    touched = [m for m in list_matrices(checkpoint) if m.name in wanted.reductions]
    ranks = {name: line.rank or 0 for name, line in wanted.reductions.items()}
    method, _ = choose_method(method, crew.devices[0])
    known, elsewhere = common.moments_of(moments), common.moments_of(fresh)
    if dry_run:
        written, _, asked = prepare(checkpoint, wanted, crew, method, evict, dtype, known, elsewhere)
        place = require_place(written, output, resume=resume, force=force)
        if resume:
            require_run(written, place, asked)
        return print_estimate(checkpoint, touched, crew, as_json, ranks)
    foretold, meter = estimate(checkpoint, touched, crew, ranks), Meter()
    with common.Progress("reduce", touched) as bar, common.Checking() as check:
        outcome = reduce_checkpoint(
            checkpoint,
            wanted,
            output,
            crew=crew,
            method=method,
            resume=resume,
            force=force,
            evict=evict,
            dtype=dtype,
            moments=known,
            fresh=elsewhere,
            tick=bar,
            on_check=check,
        )
    print_outcome(outcome, output, meter, foretold.reduce_seconds, foretold, as_json)


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
            say(problem)
        say(f"{found.untouched} tensors identical, {found.touched} as planned, {len(found.problems)} problems")
    if found.problems:
        raise typer.Exit(1)


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
        if why.kind is Kind.FAILED:
            say(f"{name}: {why.text}")
