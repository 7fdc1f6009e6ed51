"""The verbs of the flow: scan, plan, reduce, verify. Each parses, calls and prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from laser.checkpoint.matrices import Matrix, list_matrices
from laser.checkpoint.swap import require_place
from laser.checkpoint.writer import require_run
from laser.cli import common, options
from laser.cli.adapters import verify_rebuilt_verb
from laser.cli.common import say
from laser.cli.estimates import chosen_of, print_dry_run, print_estimate, print_outcome, took
from laser.cli.progress import Checking, Progress
from laser.differences.difference import RULE
from laser.differences.opened import open_model
from laser.differences.unmerge import is_recorded
from laser.engine.cost import Meter, estimate_cost
from laser.errors import UsageError
from laser.files import unfinished
from laser.parts import PartOfRun
from laser.pipeline import check_scan, prepare, reduce_part, require_base_apart, scan_into, scan_part
from laser.pipeline import reduce as reduce_checkpoint
from laser.plan import Plan, Treatment, make_plan
from laser.reasons import Kind
from laser.records import plain
from laser.spectra import Spectra
from laser.spectral.rules import RULES, SCALE
from laser.verification import verify as verify_output


def scan_verb(
    model: str,
    *,
    output: Path | None,
    which: options.Matrices,
    compute: options.ComputeOptions,
    null: int,
    moments: options.Inputs,
    parts: options.PartOption,
    work: options.WorkOptions,
) -> None:
    """`laser scan`, whose arguments and help are in verbs.py."""
    part = parts.chosen(work)
    checkpoint, selected = open_model(model), which.selection()
    method = "gram" if compute.method == "auto" else compute.method  # values are the Gram matrix's on every device
    crew = compute.crew()
    check_scan(method, null)
    known = moments.load()
    if known is not None:
        known.source.require(checkpoint, "moments")
    if work.dry_run:
        return print_dry_run(checkpoint, selected, crew, work.as_json, null, known is not None)
    if output is None:
        raise UsageError("scan needs a file to write; try -o spectra.safetensors")
    if part is None:
        work.claim(output, "spectra")
    else:
        common.check_file(output)
        common.keep(part.beside(unfinished(output)))
    matrices = chosen_of(list_matrices(checkpoint), selected)
    estimated, meter = estimate_cost(checkpoint, matrices, crew, draws=null, in_data=known is not None), Meter()
    with Progress("scan", matrices) as bar:
        if part is None:
            spectra = scan_into(output, checkpoint, selected, crew, method, bar, null, known, anew=work.force)
        else:
            spectra = scan_part(output, checkpoint, selected, crew, method, part, bar, null, known)
    if isinstance(spectra, list):
        return _print_part(spectra, part, output, meter, work.as_json)
    if work.as_json:
        return common.print_json(
            {
                "output": str(output),
                "source": plain(spectra.source),
                "scanned": len(spectra.values),
                "skipped": {name: asdict(why) for name, why in spectra.skipped.items()},
                "device": spectra.device,
                **took(meter, estimated.scan_seconds, estimated),
            }
        )
    _print_spectra(spectra)
    say(f"{len(spectra.values)} matrices in {meter.seconds:.1f} s on {spectra.device}, written to {output}")
    say(meter.against(estimated.scan_seconds, estimated))


def plan_verb(
    spectra: Path,
    *,
    output: Path,
    how: options.RuleOptions,
    lowest: options.Lowest,
    fewest_tokens: int | None,
    which: options.Matrices,
    record: options.RecordOptions,
) -> None:
    """`laser plan`, whose arguments and help are in verbs.py."""
    count = lowest.count()
    measured = Spectra.load(spectra) if how.rule is None and spectra.is_file() else None
    if how.rule is None and (measured is None or measured.delta is None):
        raise UsageError(f"plan needs a rule; try --rule mp-edge, or one of {', '.join(RULES)}")
    rule = how.rule or RULE
    Treatment(rule, **how.treatment()).check()
    record.claim(output, "plan")
    made = make_plan(
        measured or Spectra.load(spectra),
        rule,
        which.selection(),
        lowest_snr=count,
        **how.treatment(),
        fewest_tokens=fewest_tokens,
    )
    made.save(output)
    if record.as_json:
        return common.print_json(plain(made))
    common.print_plan(made.lines, of_difference=made.pair is not None)
    say(f"written to {output}")


def reduce_verb(
    model: str,
    plan: Path | None,
    *,
    output: Path,
    base: options.FromBase,
    rule: str | None,
    scale: float | None,
    compute: options.ComputeOptions,
    moments: options.Inputs,
    fresh: Path | None,
    evict: bool,
    dtype: str | None,
    parts: options.PartOption,
    work: options.Directory,
) -> None:
    """`laser reduce`, whose arguments and help are in verbs.py."""
    if rule is not None and scale is not None:
        raise UsageError(f"found --rule {rule} and --scale {scale:g}; try one behind the other, or one of them")
    rule = rule if scale is None else f"{SCALE}:{scale!r}"
    part = parts.chosen(work)
    if plan is None:
        unused = {"--moments": moments.moments, "--fresh": fresh, "--output-dtype": dtype, "--part": part}
        unused |= {"--evict": evict or None}
        return _reduce_by_rule(model, output, base, RULE if rule is None else rule, compute, work, unused)
    if rule is not None:
        raise UsageError("--rule and --scale are for a reduction without a plan; try laser plan with the rule")
    checkpoint, wanted = open_model(model), Plan.load(plan)
    compared = base.of(checkpoint)
    crew = compute.crew()
    touched = [m for m in list_matrices(checkpoint) if m.name in wanted.reductions]
    ranks = {name: line.rank or 0 for name, line in wanted.reductions.items()}
    method = compute.truncating(crew)
    known, elsewhere = moments.load(), options.Inputs(fresh).load()
    if work.dry_run:
        require_base_apart(compared, output)
        written, _, asked = prepare(checkpoint, wanted, crew, method, evict, dtype, known, elsewhere, compared)
        place = require_place(written, output, resume=work.resume, force=work.force)
        if work.resume:
            require_run(written, place, asked)
        return print_estimate(checkpoint, touched, crew, work.as_json, ranks)
    estimated, meter = estimate_cost(checkpoint, touched, crew, ranks), Meter()
    with Progress("reduce", touched) as bar, Checking() as check:
        how: dict[str, Any] = {
            "crew": crew,
            "method": method,
            "evict": evict,
            "dtype": dtype,
            "moments": known,
            "fresh": elsewhere,
            "base": compared,
            "tick": bar,
            "on_check": check,
        }
        if part is None:
            outcome = reduce_checkpoint(checkpoint, wanted, output, resume=work.resume, force=work.force, **how)
        else:
            outcome = reduce_part(checkpoint, wanted, output, part, **how)
    if isinstance(outcome, list):
        return _print_part(outcome, part, output, meter, work.as_json)
    print_outcome(outcome, output, meter, estimated.reduce_seconds, estimated, work.as_json)


def _reduce_by_rule(
    model: str,
    output: Path,
    base: options.FromBase,
    rule: str,
    compute: options.ComputeOptions,
    work: options.Directory,
    unused: Mapping[str, object],
) -> None:
    """A reduction of a difference without a plan: what `laser run` does without a search, under a rule alone."""
    from laser.cli.run import run_verb  # imported when needed: it brings the search

    if base.base is None:
        raise UsageError(
            "reduce needs a plan, or a base to take the difference from; try laser plan SPECTRA -o plan.json, or --base"
        )
    if named := [flag for flag, given in unused.items() if given is not None]:
        raise UsageError(
            f"{named[0]} is for a reduction by a plan; try laser delta, laser plan, and this with the plan"
        )
    run_verb(
        model, output=output, recipe=None, base=base, how=options.RuleOptions(rule), moments=options.Inputs(),
        lowest=options.Lowest(), which=options.Matrices(), search=False, trials=options.Trials(),
        text=options.SearchText(), stream=None, dtype="float32", leaderboard=False, rows=options.Rows(),
        compute=compute, part=None, work=work,
    )  # fmt: skip


def verify_verb(
    model: str,
    output: Path,
    *,
    base: options.FromBase,
    where: options.OneDevice,
    moments: options.Inputs,
    shown_as: options.Json,
) -> None:
    """`laser verify`, whose arguments and help are in verbs.py."""
    if is_recorded(Path(model)):
        if base.base is not None or moments.moments is not None:
            raise UsageError(f"{model} says itself what {output} has to be; try without --base and --moments")
        return verify_rebuilt_verb(Path(model), output, shown_as)
    checkpoint = open_model(model)
    with Progress("verify", list_matrices(checkpoint)) as bar:
        found = verify_output(
            checkpoint, output, device=where.choose(), moments=moments.load(), base=base.of(checkpoint), tick=bar
        )
    told = f"{found.untouched} tensors identical, {found.touched} as planned"
    common.tell_verified(found, told, shown_as.as_json)


def _print_part(
    missing: Sequence[PartOfRun], part: PartOfRun | None, output: Path, meter: Meter, as_json: bool
) -> None:
    """What a part says that is not the last one."""
    if as_json:
        return common.print_json(
            {"output": str(output), "part": str(part), "missing": list(map(str, missing)), "seconds": meter.seconds}
        )
    named = f"{', '.join(map(str, missing[:20]))}{f' and {len(missing) - 20} more' if len(missing) > 20 else ''}"
    say(f"part {part} is done in {meter.seconds:.1f} s; {output} is not whole: not done are {named}")
    say("whoever ends last makes it whole; if none has, give the command of any part again")


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
    failed = [f"{name}: {why.text}" for name, why in spectra.skipped.items() if why.kind is Kind.FAILED]
    common.say_first(failed)
