"""laser: random-matrix rank reduction for language-model checkpoints, in the memory of one matrix.

checkpoint = laser.open_checkpoint("path/to/Mixtral-8x7B-Instruct-v0.1")
spectra = laser.scan(checkpoint, device="cpu")
plan = laser.make_plan(spectra, "laser-rmt", lowest_snr=15)
outcome = laser.reduce(checkpoint, plan, Path("reduced"))
"""

import importlib
from typing import TYPE_CHECKING, Any

import laser.start  # noqa: F401

if TYPE_CHECKING:
    from laser.calibration import calibrate
    from laser.checkpoint.matrices import DoubtWarning, Matrix, list_matrices
    from laser.checkpoint.reader import Checkpoint, open_checkpoint
    from laser.engine.crew import Crew
    from laser.engine.workers import choose_crew
    from laser.errors import CheckpointError, LaserError, NumericalError, OutputError, RecordError, UsageError
    from laser.evaluation.evaluate import evaluate
    from laser.evaluation.perplexity import Difference, Perplexity, difference
    from laser.moments import Moments
    from laser.null import NullTest, null_test
    from laser.outcome import Outcome
    from laser.pipeline import reduce, scan
    from laser.plan import Plan, PlanLine, empty_plan, make_plan
    from laser.python import delta, leaderboard, run, search, unmerge
    from laser.report.plots import plot_heat_map, plot_spectrum
    from laser.report.publish import write_card
    from laser.selection import Selection
    from laser.spectra import Spectra
    from laser.spectral.certificate import Certificate, Truncation
    from laser.spectral.devices import Device, choose_device
    from laser.spectral.factorise import singular_values, truncate
    from laser.spectral.rules import RULES, Cut, apply_rule
    from laser.summary import Summary, summarise
    from laser.verification import Verification, verify

__all__ = [
    "RULES",
    "Certificate",
    "Checkpoint",
    "CheckpointError",
    "Crew",
    "Cut",
    "Device",
    "Difference",
    "DoubtWarning",
    "LaserError",
    "Matrix",
    "Moments",
    "NullTest",
    "NumericalError",
    "Outcome",
    "OutputError",
    "Perplexity",
    "Plan",
    "PlanLine",
    "RecordError",
    "Selection",
    "Spectra",
    "Summary",
    "Truncation",
    "UsageError",
    "Verification",
    "apply_rule",
    "calibrate",
    "choose_crew",
    "choose_device",
    "delta",
    "difference",
    "empty_plan",
    "evaluate",
    "leaderboard",
    "list_matrices",
    "make_plan",
    "null_test",
    "open_checkpoint",
    "plot_heat_map",
    "plot_spectrum",
    "reduce",
    "run",
    "scan",
    "search",
    "singular_values",
    "summarise",
    "truncate",
    "unmerge",
    "verify",
    "write_card",
]

# Module -> the public names that it holds. It is imported when one of them is first asked for: torch takes two seconds.
_HOMES = {
    "calibration": ("calibrate",),
    "checkpoint.matrices": (
        "DoubtWarning",
        "Matrix",
        "list_matrices",
    ),
    "checkpoint.reader": (
        "Checkpoint",
        "open_checkpoint",
    ),
    "engine.crew": ("Crew",),
    "engine.workers": ("choose_crew",),
    "errors": (
        "CheckpointError",
        "LaserError",
        "NumericalError",
        "OutputError",
        "RecordError",
        "UsageError",
    ),
    "evaluation.evaluate": ("evaluate",),
    "evaluation.perplexity": (
        "Difference",
        "Perplexity",
        "difference",
    ),
    "moments": ("Moments",),
    "null": (
        "NullTest",
        "null_test",
    ),
    "outcome": ("Outcome",),
    "pipeline": (
        "reduce",
        "scan",
    ),
    "plan": (
        "Plan",
        "PlanLine",
        "empty_plan",
        "make_plan",
    ),
    "python": (
        "delta",
        "leaderboard",
        "run",
        "search",
        "unmerge",
    ),
    "report.plots": (
        "plot_heat_map",
        "plot_spectrum",
    ),
    "report.publish": ("write_card",),
    "selection": ("Selection",),
    "spectra": ("Spectra",),
    "spectral.certificate": (
        "Certificate",
        "Truncation",
    ),
    "spectral.devices": (
        "Device",
        "choose_device",
    ),
    "spectral.factorise": (
        "singular_values",
        "truncate",
    ),
    "spectral.rules": (
        "RULES",
        "Cut",
        "apply_rule",
    ),
    "summary": (
        "Summary",
        "summarise",
    ),
    "verification": (
        "Verification",
        "verify",
    ),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("laser-rmt")
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
