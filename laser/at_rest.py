"""What `verify` looks at last: the files of an output beside its weights, and the records of how it was made.

Not the card: README.md is there to be edited.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from laser.checkpoint.at_rest import damage
from laser.checkpoint.files import is_sealed, journal_is_whole
from laser.checkpoint.records import parse
from laser.checkpoint.regular import read_regular
from laser.checkpoint.writer import RECORDS
from laser.errors import RecordError
from laser.evaluation.leaderboard import Leaderboard
from laser.evaluation.perplexity import Perplexity
from laser.plan import Plan
from laser.reduction import Outcome, plan_as_measured
from laser.spectra import Spectra

MEASURED: dict[str, type[Perplexity] | type[Leaderboard]] = dict.fromkeys(("eval.json", "eval-source.json"), Perplexity)
MEASURED |= dict.fromkeys(("leaderboard.json", "leaderboard-source.json"), Leaderboard)
SPECTRA, PLAN, SEARCH, TRIALS, SOURCE = "spectra.safetensors", "plan.json", "search.json", "search.jsonl", "source.json"


def damage_at_rest(out: Path, outcome: Outcome) -> list[str]:
    """What is not as laser left it: side files, laser.json, and each record in OUT/laser."""
    problems, folder, plan = damage(out), out / RECORDS, outcome.plan

    def check(name: str, is_right: Callable[[Path], bool]) -> None:
        try:
            right = is_right(folder / name)
        except (RecordError, OSError, ValueError) as error:
            problems.append(f"{RECORDS}/{name}: {error}")
            return
        if not right:
            problems.append(f"{RECORDS}/{name} is not as it was written; it was changed or damaged since")

    there = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if {SPECTRA, PLAN} & there:  # of a whole run, which leaves these two, and one about its source
        check(SPECTRA, lambda path: Spectra.load(path).source == plan.source)
        check(PLAN, lambda path: _is_plan_of(path, outcome))
        there.add(SOURCE)
        if "accept" in plan.selection:  # chosen by a search
            there |= {SEARCH, TRIALS}
    for name, kind in MEASURED.items():
        if name in there:
            check(name, lambda path, kind=kind: bool(kind.load(path)))
    if SEARCH in there:
        check(SEARCH, lambda path: is_sealed(parse(read_regular(path))))
    if TRIALS in there:
        check(TRIALS, journal_is_whole)
    if SOURCE in there:
        check(SOURCE, lambda path: is_sealed(parse(read_regular(path))))
    return problems


def _is_plan_of(path: Path, outcome: Outcome) -> bool:
    """Whether a plan is the one that was carried out, written as laser writes it."""
    plan = Plan.load(path)
    return read_regular(path) == plan.to_json() and plan_as_measured(plan, outcome.matrices) == outcome.plan
