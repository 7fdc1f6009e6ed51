"""The verb run: the whole flow in one command, with a search unless a recipe says otherwise."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laser.checkpoint.at_rest import OPTIONS_FILE
from laser.checkpoint.matrices import Matrix, list_matrices
from laser.checkpoint.push import names_a_place
from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.swap import require_place, writing
from laser.cli import common, memory, options
from laser.cli.estimates import board_measuring, chosen_of, print_dry_run, print_outcome, search_measuring
from laser.cli.progress import Checking, Progress
from laser.cli.publish import leaderboards
from laser.cli.recipe import resolved
from laser.cli.search import (
    NO_DATA,
    check_objective,
    default_rules,
    layered_model,
    most_variants,
    objectives_of,
    print_search,
    search_with_bar,
    searched_of,
)
from laser.differences.base import Base
from laser.differences.opened import open_model
from laser.engine.cost import Measuring, Meter, estimate_cost
from laser.engine.crew import Crew
from laser.errors import UsageError
from laser.evaluation.leaderboard import lm_eval_is_here, require_leaderboard
from laser.evaluation.objective import Objective
from laser.evaluation.placement import Placement
from laser.evaluation.streaming import LayeredModel, require_dtype
from laser.evaluation.text import Text, load_tokenizer
from laser.files import write_atomically
from laser.flow import require_same_run, run_flow
from laser.pipeline import records_of, require_base_apart
from laser.plan import Plan, Treatment, make_plan
from laser.report.publish import SEARCH_FILE, write_card
from laser.searching.passes import possible_candidates
from laser.searching.search import SearchRecord, check_objectives, check_request, require_journal
from laser.spectra import Spectra
from laser.spectral.devices import Device, choose_device
from laser.spectral.rules import draws_needed, scale_in


def run_verb(
    model: str,
    *,
    output: Path,
    recipe: str | None,
    base: options.FromBase,
    how: options.RuleOptions,
    moments: options.Inputs,
    lowest: options.Lowest,
    which: options.Matrices,
    search: bool | None,
    trials: options.Trials,
    text: options.SearchText,
    stream: bool | None,
    dtype: str,
    leaderboard: bool | None,
    rows: options.Rows,
    compute: options.ComputeOptions,
    part: str | None,
    work: options.Directory,
) -> None:
    """`laser run`, whose arguments and help are in verbs.py."""
    if part is not None:
        raise UsageError(
            f"run is no work for parts; try laser scan MODEL -o SPECTRA --part {part}, then laser plan SPECTRA, and "
            f"laser reduce MODEL PLAN -o OUT --part {part}"
        )
    # Rule and number default to the published procedure's candidates.
    searching = recipe is None if search is None else search
    wanted = default_rules(base.base is not None, searching) if how.rule is None else how.rule
    count = lowest.count(15 if searching and base.base is None else None)
    chosen, treatment = which.selection(), how.treatment()
    rules = [rule for rule in wanted.split(",") if rule] if searching else [wanted]
    for each in rules:
        Treatment(each, **treatment).check(moments.moments is not None)
    if searching and any(treatment.values()):
        raise UsageError("a search tries plain cuts; try --no-search with --shrink, --two-sided and --require-fit")
    if base.base is not None and moments.moments is not None:
        raise UsageError(NO_DATA)
    if searching:
        calibrated = moments.moments is not None
        check_request(
            rules, accept=trials.accept, order=trials.order, lowest_snr=count, calibrated=calibrated,
            of_difference=base.base is not None,
        )  # fmt: skip
        check_objective("loss", None, text)
        require_dtype(dtype)
    crew = compute.crew()
    draws = max((draws_needed(each, base.base is not None) for each in rules), default=0)
    method = compute.truncating(crew)
    texts, known = text.read(), moments.load()
    checkpoint = open_model(model, "files" if work.dry_run else "weights")
    compared = base.of(checkpoint)
    require_base_apart(compared, output)
    begun = require_place(checkpoint, output, resume=work.resume, force=work.force)
    matrices = list_matrices(checkpoint)
    chosen.check(matrices)
    if known is not None:
        known.source.require(checkpoint, "moments")
    wants_board = leaderboard if leaderboard is not None else bool(recipe and search and lm_eval_is_here())

    common.do_nothing(
        *(() if searching else ("--stream", "--window", "--dtype")), *(() if wants_board else ("--no-leaderboard",))
    )

    def here() -> Device:
        """For search and leaderboard, which run in this process, whatever the cluster lends."""
        if compute.engine == "threads":
            return crew.devices[0]
        return choose_device("cpu" if compute.device == "cpu" else "auto", compute.precision)

    matrices = chosen_of(matrices, chosen)
    measuring: list[Measuring] = []
    workload = board = measure = None
    if not wants_board and rows != options.Rows():
        raise UsageError(
            "--tasks, --data and --limit are for the leaderboard, which this run leaves out; try --leaderboard"
        )
    if wants_board:
        workload = require_leaderboard(checkpoint, **rows.request(), counted=work.dry_run)
        board = memory.for_run_leaderboard(checkpoint, here(), needed=bool(leaderboard))
    searched = searched_of(checkpoint, chosen, compared is not None) if searching else []
    if searching:
        most = most_variants(searched, rules, count, by_role=compared is not None)
        measure = _search_measure(
            checkpoint, *texts, text, crew, here(), dtype, stream, matrices, trials, most, len(rules)
        )

    def planned(spectra: Spectra) -> Plan:
        return make_plan(spectra, wanted, chosen, lowest_snr=count, **treatment)

    of_run: dict[str, Any] = {
        "crew": crew,
        "method": method,
        "null_draws": draws,
        "moments": known,
        "base": compared,
        "treatment": Treatment(wanted, **treatment) if not searching and count is None else None,
        "rules": rules,
    }
    if work.dry_run:  # everything is checked that the run itself would refuse
        if work.resume:
            require_same_run(begun, checkpoint, chosen, None if searching else planned, **of_run)
            if measure is not None:
                asked = {"lowest_snr": count, "accept": trials.accept, "order": trials.order, "racing": trials.racing}
                journal = records_of(begun) / "search.jsonl"
                require_journal(
                    journal, measure.model, rules, measure.calibration, chosen, here(), known, asked, compared
                )
        if measure is not None:
            found = possible_candidates(searched, measure.model, rules, False, by_role=compared is not None)
            measuring.append(
                search_measuring(
                    measure.model,
                    measure.placed,
                    measure.calibration,
                    measure.reported,
                    matrices,
                    found,
                    here(),
                    tried=count,
                    order=trials.order,
                )
            )
        if board is not None and workload is not None:
            measuring.append(board_measuring(checkpoint, workload, board, here(), models=2))
        scaled = not searching and scale_in(wanted) is not None
        print_dry_run(checkpoint, chosen, crew, work.as_json, draws, known is not None, measuring, scaled)
        return

    def choose(spectra: Spectra) -> Plan:
        scanned.close()
        plan = chosen_by(spectra)
        reduced.append(bars.enter_context(Progress("reduce", [m for m in visited if m.name in plan.reductions])))
        return plan

    def chosen_by(spectra: Spectra) -> Plan:
        if measure is None:
            return planned(spectra)
        result = search_with_bar(
            measure.model, spectra, rules, measure.calibration, measure.reported,
            selection=chosen, lowest_snr=count, accept=trials.accept, order=trials.order, racing=trials.racing,
            device=here(), journal=records_of(place) / "search.jsonl", moments=known,
            base=compared,
        )  # fmt: skip
        SearchRecord.of(result).save(place / SEARCH_FILE)
        if not work.as_json:
            print_search(result)
        return result.plan

    found = {"search": searching, "rule": wanted, "lowest-snr": count or "all", "leaderboard": board is not None}
    again = resolved(common.options_now(), found, checkpoint.name)
    command = _run_command(checkpoint, output, compared, again)
    estimated, meter = estimate_cost(checkpoint, matrices, crew, draws=draws, in_data=known is not None), Meter()
    seconds = None if searching or scale_in(wanted) is not None else estimated.visit_seconds
    if (count or known) and seconds is not None:
        share = min((count or len(matrices)) / max(len(matrices), 1), 1.0)
        seconds = estimated.scan_seconds + estimated.reduce_seconds * share
    reduced: list[Progress] = []  # its bar, once it is known what is reduced
    visited = matrices if compared is None else list_matrices(checkpoint)
    with (
        ExitStack() as bars,
        Checking() as check,
        writing(checkpoint, output, resume=work.resume, force=work.force) as place,
    ):
        scanned = bars.enter_context(Progress("scan", visited))
        result = run_flow(
            checkpoint,
            place,
            chosen,
            choose,
            **of_run,
            resume=True,
            name=output.resolve().name,
            command=command,
            on_scan=scanned,
            on_reduce=lambda matrix, _: reduced[0](matrix) if reduced else None,
            on_check=check,
        )
        if board is not None:  # in `place`: an earlier output stands until this one is measured, too
            leaderboards(checkpoint, place, output.resolve().name, here().name, rows.request())
            of = compared.checkpoint if compared else None
            write_card(place, checkpoint, name=output.resolve().name, base=of, commands=(command,))
        write_atomically(place / OPTIONS_FILE, again)
    print_outcome(result.outcome, output, meter, seconds if board is None else None, estimated, work.as_json)


@dataclass(frozen=True)
class _Measure:
    """What a search measures with; known before the scan, so that what cannot be measured is not scanned."""

    model: LayeredModel
    placed: Placement
    calibration: Objective
    reported: Sequence[Objective]


def _search_measure(
    checkpoint: Checkpoint,
    text: Text,
    held_out: Text | None,
    asked: options.SearchText,
    crew: Crew,
    device: Device,
    dtype: str,
    stream: bool | None,
    matrices: Sequence[Matrix],
    trials: options.Trials,
    variants: int,
    rules: int,
) -> _Measure:
    calibration, reported = objectives_of(checkpoint, load_tokenizer(checkpoint.path), None, text, held_out, asked)
    check_objectives(calibration, reported, trials.accept, racing=trials.racing)
    layered, placed = layered_model(
        checkpoint, calibration, reported, matrices, crew, device, dtype, stream, variants=variants, rules=rules
    )
    return _Measure(layered, placed, calibration, reported)


def _run_command(checkpoint: Checkpoint, output: Path, base: Base | None, options: bytes) -> str:
    """The command line that makes the output: as it was given, without folders of this machine.

    What only says how to get there is left out, so that the card of a run that was killed and resumed is that of an
    undisturbed one. options: what the output's own file of options says.
    """
    both = (checkpoint, *([base.checkpoint] if base else ()))
    models = {each.path: (each.origin if each.origin and each.on_top else each).name for each in both}
    names = {str(path): name for path, name in models.items()} | {str(output): output.resolve().name}
    names |= {each.on_top.given: each.on_top.elsewhere for each in both if each.on_top}  # no folder is called so
    words, config = sys.argv[1:], common.options_now().get("config")
    if config is not None and names_a_place(options):
        words = _with_options_of_config(words)
    elif config is not None:  # what it says lies in the output
        names[str(config)] = OPTIONS_FILE
    given = [w for w in words if w not in ("--resume", "--force")]

    def shown(word: str) -> str:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        value = names.get(value) or models.get(Path(value).resolve(), value)
        return option + equals + (Path(value).name if value.startswith(("/", "~")) else value)

    words = [shown(w) if not w.startswith("--") or "=" in w else w for w in given]
    if not any(w == "-o" or w.startswith(("-o", "--output")) for w in given):  # a config gave it
        words += ["-o", output.resolve().name]
    return shlex.join(["laser", *words])


def _with_options_of_config(words: Sequence[str]) -> list[str]:
    """A command line with what its config says in the config's place: before all others, which win over it."""
    left, rest = list[str](), iter(words)
    for word in rest:
        if word == "--config":
            next(rest, None)
        elif not word.startswith("--config="):
            left.append(word)
    verb = left.index("run") + 1 if "run" in left else 0
    return [*left[:verb], *common.configured_now(), *left[verb:]]
