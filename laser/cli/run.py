"""The verb run: the whole flow in one command, with a search unless a recipe says otherwise."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from laser.checkpoint.families import Matrix, list_matrices
from laser.checkpoint.files import to_json, write_atomically
from laser.checkpoint.reader import Checkpoint, open_checkpoint
from laser.checkpoint.swap import require_place, writing
from laser.cli import common, memory
from laser.cli.estimates import board_measuring, chosen_of, print_dry_run, print_outcome, search_measuring
from laser.cli.flow import (
    Output,
    RequireFit,
    RuleOption,
    Shrink,
    TwoSided,
)
from laser.cli.measure import Field, Stream, TextFile, WindowLength, texts_of
from laser.cli.publish import Tasks, leaderboards, named
from laser.cli.search import check_objective, layered_model, objectives_of, print_search, search_with_bar
from laser.engine.estimate import Measuring, Meter, estimate
from laser.engine.workers import choose_crew
from laser.errors import UsageError
from laser.evaluation.leaderboard import lm_eval_is_here, require_leaderboard
from laser.evaluation.objective import Objective
from laser.evaluation.placement import Placement
from laser.evaluation.streaming import LayeredModel
from laser.evaluation.text import WINDOW, Text, load_tokenizer
from laser.flow import records_of, require_same_run
from laser.flow import run as run_flow
from laser.plan import Plan, Treatment, make_plan, parse_lowest_snr
from laser.publication import SEARCH, write_card
from laser.recipe import load_recipe, packaged
from laser.search.candidates import DATA, family_of
from laser.search.foretold import possible_candidates
from laser.search.search import check_objectives, check_request, require_journal, result_document
from laser.search.trials import ACCEPT
from laser.spectra import Spectra
from laser.spectral.devices import Device, choose_device
from laser.spectral.measuring import choose_method
from laser.spectral.rules import draws_needed


def run(
    model: common.Model,
    output: Output,
    recipe: Annotated[str | None, typer.Option(help=f"{', '.join(packaged())}, or a TOML or YAML file.")] = None,
    rule: RuleOption = None,
    moments: common.MomentsFile = None,
    lowest_snr: Annotated[
        str | None,
        typer.Option("--lowest-snr", metavar="K", help="Only the K matrices of lowest SNR, or all. Search: 15."),
    ] = None,
    shrink: Shrink = None,
    two_sided: TwoSided = False,
    require_fit: RequireFit = None,
    layers: common.Layers = None,
    roles: common.Roles = None,
    include: common.Include = None,
    exclude: common.Exclude = None,
    search: Annotated[
        bool | None, typer.Option("--search/--no-search", help="Keep only edits that help; default without a recipe.")
    ] = None,
    accept: Annotated[str | None, typer.Option("--accept", help=f"In a search: {', '.join(ACCEPT)}.")] = None,
    order: Annotated[str | None, typer.Option("--order", help="In a search: layers or snr.")] = None,
    text: TextFile = None,
    field: Field = None,
    held_out: Annotated[Path | None, typer.Option("--held-out", help="Text that a search reports on.")] = None,
    window: WindowLength = WINDOW,
    windows: Annotated[int, typer.Option("--windows", help="Calibration windows of a search; 0: all.")] = 16,
    held_out_windows: Annotated[int, typer.Option("--held-out-windows", help="Windows to report on; 0: all.")] = 16,
    stream: Stream = None,
    leaderboard: Annotated[
        bool | None, typer.Option("--leaderboard/--no-leaderboard", help="Six tasks; default with --search.")
    ] = None,
    tasks: Tasks = None,
    data: Annotated[Path | None, typer.Option("--data", help="Rows of the tasks, without the Hub.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first N rows of each task.")] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="auto, cuda, mps or cpu; several: cuda:0,cuda:1, or all.")
    ] = None,
    workers: common.Workers = None,
    engine: common.Engine = "threads",
    precision: common.Precision = "auto",
    method: Annotated[str | None, typer.Option("--method", help="auto, gram, projector or svd.")] = None,
    resume: common.Resume = False,
    force: common.Force = False,
    dry_run: common.DryRun = False,
    as_json: common.Json = False,
) -> None:
    """Scan, search or plan, reduce, and write the card: by a recipe or by flags, which win over the recipe.

    Without a recipe nothing is cut unmeasured: candidates are tried one at a time and kept only if the model gets
    better. A recipe is followed as it stands; with --search its candidates are tried in the same way, and the six tasks
    of the leaderboard are run on source and result where lm-eval is installed.
    """
    flags: dict[str, Any] = load_recipe(recipe) if recipe else {}
    # What is asked for here wins; rule and number default to the published procedure's candidates.
    wanted: str = rule or flags.get("rule", "laser-rmt")
    searching = flags.get("search", recipe is None) if search is None else search
    told = flags.get("lowest-snr") if lowest_snr is None else lowest_snr
    count = parse_lowest_snr(None if told is None else str(told), 15 if searching else None)
    chosen = common.selection(
        layers or flags.get("layers"),
        roles or flags.get("roles"),
        include or flags.get("include"),
        exclude or flags.get("exclude"),
    )
    treatment: dict[str, Any] = {
        "shrink": shrink or flags.get("shrink"),
        "two_sided": two_sided or flags.get("two-sided", False),
        "require_fit": require_fit if require_fit is not None else flags.get("require-fit"),
    }
    rules = [rule for rule in wanted.split(",") if rule] if searching else [wanted]
    for each in rules:
        Treatment(each.removeprefix(DATA), **treatment, metric=family_of(each)).check()
    if searching and any(treatment.values()):
        raise UsageError("a search tries plain cuts; try --no-search with --shrink, --two-sided and --require-fit")
    how: dict[str, Any] = {
        "accept": accept or flags.get("accept", "better"),
        "order": order or flags.get("order", "layers"),
    }
    if searching:
        check_request(rules, **how, lowest_snr=count, calibrated=moments is not None)
        check_objective("loss", None, window, windows, held_out_windows, held_out)
    elif DATA in wanted and moments is None:
        raise UsageError(f"--rule {wanted} goes by the data; try --moments with a file of laser calibrate")
    kind = device or flags.get("device", "auto")
    crew = choose_crew(kind, precision, workers=workers, engine=engine)
    draws = max((draws_needed(each.removeprefix(DATA)) for each in rules), default=0)
    method, _ = choose_method(method or flags.get("method", "auto"), crew.devices[0])
    texts, known = texts_of(text, field, None, held_out), common.moments_of(moments)
    checkpoint = open_checkpoint(model, "files" if dry_run else "weights")
    begun = require_place(checkpoint, output, resume=resume, force=force)
    matrices = list_matrices(checkpoint)
    chosen.check(matrices)
    if known is not None:
        known.source.require(checkpoint, "moments")
    wants_board = leaderboard if leaderboard is not None else bool(recipe and search and lm_eval_is_here())

    common.do_nothing(*(() if searching else ("--stream", "--window")), *(() if wants_board else ("--no-leaderboard",)))

    def here() -> Device:
        """For search and leaderboard, which run in this process, whatever the cluster lends."""
        return crew.devices[0] if engine == "threads" else choose_device("cpu" if kind == "cpu" else "auto", precision)

    matrices = chosen_of(matrices, chosen)
    measuring: list[Measuring] = []
    workload = board = measure = None
    if not wants_board and any(x is not None for x in (tasks, data, limit)):
        raise UsageError(
            "--tasks, --data and --limit are for the leaderboard, which this run leaves out; try --leaderboard"
        )
    if wants_board:
        workload = require_leaderboard(checkpoint, tasks=named(tasks), data=data, limit=limit, counted=dry_run)
        board = memory.for_run_leaderboard(checkpoint, here(), needed=bool(leaderboard))
    if searching:
        measure = _measure(
            checkpoint, *texts, window, windows, held_out_windows, here(), stream, matrices, how["accept"]
        )

    def planned(spectra: Spectra) -> Plan:
        bare, metric = wanted.removeprefix(DATA), family_of(wanted)
        return make_plan(spectra, bare, chosen, lowest_snr=count, metric=metric, **treatment)

    of_run: dict[str, Any] = {
        "crew": crew,
        "method": method,
        "null_draws": draws,
        "moments": known,
        "treatment": Treatment(wanted, **treatment) if not searching and count is None else None,
    }
    if dry_run:  # everything is checked that the run itself would refuse
        if resume:
            require_same_run(begun, checkpoint, chosen, None if searching else planned, **of_run)
            if measure is not None:
                asked = how | {"lowest_snr": count}
                journal = records_of(begun) / "search.jsonl"
                require_journal(journal, measure.model, rules, measure.calibration, chosen, here(), known, asked)
        if measure is not None:
            found = possible_candidates(matrices, measure.model, rules, False)
            measuring.append(search_measuring(*measure.told, matrices, found, here(), tried=count, order=how["order"]))
        if board is not None and workload is not None:
            measuring.append(board_measuring(checkpoint, workload, board, here(), models=2))
        return print_dry_run(checkpoint, chosen, crew, as_json, draws, known is not None, measuring)

    def choose(spectra: Spectra) -> Plan:
        if measure is None:
            return planned(spectra)
        result = search_with_bar(
            measure.model, spectra, rules, measure.calibration, measure.reported,
            selection=chosen, lowest_snr=count, **how, device=here(),
            journal=records_of(place) / "search.jsonl", moments=known,
        )  # fmt: skip
        write_atomically(place / SEARCH, to_json(result_document(result)))
        if not as_json:
            print_search(result)
        return result.plan

    foretold, meter = estimate(checkpoint, matrices, crew, draws=draws, in_data=known is not None), Meter()
    seconds = None if searching else foretold.visit_seconds
    if (count or known) and seconds is not None:
        share = min((count or len(matrices)) / max(len(matrices), 1), 1.0)
        seconds = foretold.scan_seconds + foretold.reduce_seconds * share
    with (
        common.Progress("scan", matrices) as scanned,
        common.Progress("reduce", matrices) as reduced,
        common.Checking() as check,
        writing(checkpoint, output, resume=resume, force=force) as place,
    ):
        result = run_flow(
            checkpoint,
            place,
            chosen,
            choose,
            **of_run,
            resume=True,
            name=output.resolve().name,
            command=_command(checkpoint, output),
            on_scan=scanned,
            on_reduce=reduced,
            on_check=check,
        )
        if board is not None:  # in `place`: an earlier output stands until this one is measured, too
            leaderboards(checkpoint, place, output.resolve().name, here().name, named(tasks), data, limit)
            command = (_command(checkpoint, output),)
            write_card(place, checkpoint, name=output.resolve().name, commands=command)
    print_outcome(result.outcome, output, meter, seconds if board is None else None, foretold, as_json)


@dataclass(frozen=True)
class _Measure:
    """What a search measures with; known before the scan, so that what cannot be measured is not scanned."""

    model: LayeredModel
    placed: Placement
    calibration: Objective
    reported: Sequence[Objective]

    @property
    def told(self) -> tuple[LayeredModel, Placement, Objective, Sequence[Objective]]:
        return self.model, self.placed, self.calibration, self.reported


def _measure(
    checkpoint: Checkpoint,
    text: Text,
    held_out: Text | None,
    window: int,
    windows: int,
    held_out_windows: int,
    device: Device,
    stream: bool | None,
    matrices: Sequence[Matrix],
    accept: str,
) -> _Measure:
    calibration, reported = objectives_of(
        checkpoint, load_tokenizer(checkpoint.path), None, text, held_out, window, windows, held_out_windows
    )
    check_objectives(calibration, reported, accept)
    layered, placed = layered_model(
        checkpoint, (calibration, *reported), matrices, device, "float32", stream, has_dtype=False
    )
    return _Measure(layered, placed, calibration, reported)


def _command(checkpoint: Checkpoint, output: Path) -> str:
    """The command line that makes the output: as it was given, without folders of this machine, and without what only
    says how to get there, so that the card of a run that was killed and resumed is that of an undisturbed one."""
    names = {str(checkpoint.path): checkpoint.name, str(output): output.resolve().name}
    given = [w for w in sys.argv[1:] if w not in ("--resume", "--force")]
    words = [names.get(w, checkpoint.name if Path(w).resolve() == checkpoint.path else w) for w in given]
    return shlex.join(["laser", *(Path(w).name if w.startswith("/") else w for w in words)])
