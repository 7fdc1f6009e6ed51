"""plan: from spectra to one line for every tensor: reduce to rank r, keep, or skipped, each with its reason."""

from __future__ import annotations

import difflib
import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from laser.checkpoint.matrices import Matrix, list_matrices, place_of
from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.source import Source
from laser.differences.base import Base, Pair
from laser.differences.difference import Verdict
from laser.differences.formats import STORED_FLOATS
from laser.differences.overview import is_base
from laser.errors import CrowdWarning, RecordError, UsageError
from laser.moments import NO_MOMENTS, Calibration, Moments
from laser.notebook import FrameRows, Shown, drawn
from laser.reasons import Kind, Why, earlier_reason, earlier_unseen
from laser.records import LATER, SPARSE, Misfit, Record, has_shape, plain, shown, under, words
from laser.selection import Selection
from laser.spectra import Spectra, in_metric_of, seen_by
from laser.spectral.noise import DEFAULT_ESTIMATOR, NoiseFit, estimate_noise, fit_noise
from laser.spectral.rules import (
    NO_DIFFERENCE,
    apply_rule,
    by_data,
    crowd,
    energy_share,
    parse_rule,
    rule_in,
    scale_in,
    signal_to_noise,
)
from laser.spectral.shrinkage import SHRINKERS, Gains, check_shrinker
from laser.spectral.spectrum import HEAVY, at_threshold, edge_shift, precision_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of these there is no difference, or none that could be scaled.
UNSCALED = (Verdict.SAME, Verdict.CAST, Verdict.NOT_FINITE, Verdict.SHAPE, Verdict.MISSING, Verdict.ADDED)
FLAG_LEVEL = 0.01  # a fit that fewer than one in a hundred pure noise matrices would have is said in the reason
ACTIONS = ("reduce", "keep", "skip")
METRICS = ("plain", "data")
COVERAGE = ("action", "kind", "matrices", "parameters")
MADE_BY = "laser plan SPECTRA -o FILE --rule RULE"
SELECTION: dict[str, Any] = {
    "layers": tuple[int, ...],
    "roles": tuple[str, ...],
    "include": str | None,
    "exclude": str | None,
    "lowest_snr": int | None,
    "accept": str,
}


@dataclass(frozen=True, slots=True)
class PlanLine:
    """What happens to one tensor, and why. Numbers are None where no rule was asked or none applies."""

    name: str
    role: str
    layer: int | None
    expert: int | None
    action: str  # reduce, keep or skip
    why: Why
    rank: int | None = None  # of the result
    full_rank: int | None = None  # p
    threshold: float | None = None  # in the unit of the singular values
    sigma: float | None = None  # in the unit of the weights
    snr: float | None = None  # sum(s > t) / sum(s <= t)
    energy_kept: float | None = None  # predicted share of the squared singular values
    fit: float | None = None  # Kolmogorov-Smirnov distance of the bulk from the law of noise
    fit_level: float | None = None  # share of pure noise that lies as far from it; small: the bulk is not such noise
    edge_shift: float | None = None  # by the entries' tails, in Tracy-Widom units (spectrum.py); None: not measured
    below: int = 0  # of `rank`, how many are the smallest singular values, kept by a two-sided plan
    shrink: str | None = None  # shrinker of the kept values above (shrinkage.py)
    noise: float | None = None  # the sigma that shrinking and the lower edge go by, in the unit of the weights
    # "data": threshold, snr and energy_kept are of W C^(1/2), C the moment of the inputs of `tokens` tokens
    metric: str = "plain"
    tokens: int | None = None
    parameters: int = 0  # numbers in it
    stack: str = ""  # whose layers are counted: "" the language model's own
    unseen: str = ""  # said where it has seen too few inputs of the calibration, whatever else became of it
    # By which the whole difference from the base is multiplied. Of what is no matrix the ranks are then None.
    scale: float | None = field(default=None, metadata=SPARSE)

    def wrong(self) -> str | None:
        """What in the line cannot be carried out, or contradicts the rest of it."""
        if self.action not in ACTIONS:
            return f"action {self.action!r}, expected one of {', '.join(ACTIONS)}"
        if self.metric not in METRICS:
            return f"metric {self.metric!r}, expected one of {', '.join(METRICS)}"
        counts = ("parameters", "below", "full_rank", "tokens", "layer", "expert")
        if negative := under(self, 0, "threshold", "sigma", "snr", "noise", *counts):
            return negative
        for key in ("energy_kept", "fit", "fit_level"):
            if (value := getattr(self, key)) is not None and not 0 <= value <= 1 + 1e-9:
                return f"{key} {value}, expected a share between 0 and 1"
        message = f"action {self.action!r} and rank {self.rank} of {self.full_rank}"
        if self.rank is not None and not (self.full_rank is not None and 0 <= self.rank <= self.full_rank):
            return f"{message}, expected a rank from 0 to the full one"
        if self.action == "skip" and self.rank is not None:
            return f"{message}, expected none: skip is for what could not be measured, try keep"
        if self.below > (self.rank or 0):
            return f"{message}, of these {self.below} below, expected no more than the rank"
        if self.shrink is not None and self.shrink not in SHRINKERS:
            return f"shrink {self.shrink!r}, expected one of {', '.join(SHRINKERS)} or null"
        if self.shrink is not None and self.noise is None:
            return f"shrink {self.shrink!r} and no noise, expected the level to shrink by"
        if self.noise is not None and self.shrink is None and not self.below:
            return f"noise {self.noise:.4g} and neither shrink nor below, expected null"
        if (self.tokens is None) != (self.metric == "plain"):
            message = f"metric {self.metric!r} and tokens {self.tokens}"
            return f"{message}, expected tokens in the metric data and null in plain"
        if self.tokens is not None and (self.shrink or self.below):
            return f"metric {self.metric!r} with shrink or below, which are for the plain one"
        if self.scale is not None and not (self.action == "reduce" and 0 <= self.scale < 1):
            return f"action {self.action!r} and scale {self.scale:g}, expected 'reduce' and a number from 0 to under 1"
        if self.scale is not None and (self.shrink or self.below or self.tokens is not None):
            return f"scale {self.scale:g} with shrink, below or tokens, which are for a cut"
        if self.action != "reduce" or self.scale is not None:
            return None
        if self.rank is None or self.full_rank is None:
            return f"{message}, expected a rank under the full one"
        if self.rank == self.full_rank and self.shrink is None:
            return f"{message}, which removes nothing, expected a rank under the full one, or action 'keep'"
        return None

    @property
    def place(self) -> int | str | None:
        return place_of(self.layer, self.stack)

    @property
    def gains(self) -> Gains:
        """What reduce does to each singular value."""
        return Gains((self.rank or 0) - self.below, self.below, self.shrink, self.noise)


def _lines_from_texts(document: dict[str, Any]) -> dict[str, Any]:
    """A plan of versions up to 2, whose reasons are texts alone, as of today; of the first, only one of a model on the
    Hub knows its weights. Raises Misfit."""
    lines, digest = document.get("lines"), document.get("digest")
    kept = dict(document)
    if isinstance(digest, str):
        del kept["digest"]  # of the lines as they were
        if digest != digest_of(document.get("rule"), document.get("selection"), lines):
            kept["edited"] = True
    if isinstance(lines, list | tuple):
        kept["lines"] = [_line_with_kind(line, number) for number, line in enumerate(lines, 1)]
    return kept


def _line_with_kind(line: Any, number: int) -> Any:
    """The line of an earlier version with the kind of its reason; what is no object is left to be refused."""
    if not isinstance(line, dict):
        return line
    reason, rest = line.get("reason"), {key: value for key, value in line.items() if key != "reason"}
    if not isinstance(reason, str) or {"why", "unseen"} & rest.keys():
        raise Misfit(f"reason is {shown(reason)}, expected a text and no key 'why'", ": ").inside(f"line {number}")
    why = earlier_reason(reason, rest.get("action") == "reduce")
    return rest | {"why": plain(why), "unseen": earlier_unseen(reason)}


@dataclass(frozen=True, repr=False)
class Plan(
    Shown,
    Record,
    kind="plan",
    version=3,
    earlier={2: _lines_from_texts, 1: _lines_from_texts},
    made_by=MADE_BY,
    mend=f"mend it or plan again: `{MADE_BY}`",
    seal=False,
    beside={"coverage": Mapping[str, Any], "digest": str | None},
):
    """What becomes of every tensor of a checkpoint, and why. People may edit it, so each line is checked when used."""

    source: Source
    rule: str
    selection: Mapping[str, Any]
    lines: tuple[PlanLine, ...]
    calibration: Calibration | None = field(default=None, metadata=LATER)  # where a line is in the data's metric
    # Whether its file was changed after it was written: rule and selection may not have made it.
    edited: bool = field(default=False, metadata=LATER)
    pair: Pair | None = field(default=None, metadata=SPARSE)  # of differences: which two, whose difference `source` is

    @property
    def model(self) -> Source:
        """The checkpoint that its output takes the place of."""
        return self.source if self.pair is None else self.pair.tuned

    @cached_property
    def digest(self) -> str:
        """sha256 of what a plan was made to be; a file whose digest is another one was edited."""
        return digest_of(self.rule, self.selection, self.lines)

    @cached_property
    def reductions(self) -> Mapping[str, PlanLine]:
        """The lines that reduce, by name. Made once: whoever writes asks for it at every matrix."""
        return {line.name: line for line in self.lines if line.action == "reduce"}

    def headline(self) -> str:
        counts = Counter(line.action for line in self.lines)
        told = f"{counts['reduce']} to reduce, {counts['keep']} to keep, {counts['skip']} skipped"
        return f"Plan for {self.source.name} by {self.rule}: {told}"

    def frame_rows(self) -> FrameRows:
        return [asdict(line) | {"why": line.why.text} for line in self.lines]

    def glance(self) -> tuple[FrameRows, Sequence[float]]:
        """A row for each matrix that is reduced, and the shares of their ranks that are kept."""
        rows = [
            {"matrix": x.name, "rank": x.rank, "of": x.full_rank, "SNR": x.snr, "energy kept": x.energy_kept}
            for x in self.reductions.values()
        ]
        return rows, [(x.rank or 0) / (x.full_rank or 1) for x in self.reductions.values()]

    def plot(self, *, experts: bool = True, ax: Axes | None = None) -> Axes:
        """Draw which share of its singular values each matrix keeps, layer by role, on `ax` if there is one."""
        return drawn("plot_plan", self, experts=experts, ax=ax)

    def stated(self) -> dict[str, Any]:
        return super().stated() | {"coverage": self.coverage, "digest": self.digest}

    @classmethod
    def current(cls, document: dict[str, Any]) -> Plan:
        plan = super().current(document)
        return plan if document.get("digest") in (None, plan.digest) else replace(plan, edited=True)

    def wrong(self) -> str | None:
        if not self.source.weights.stated():
            return "it does not say which weights it was made from"
        if self.pair is not None and self.source != self.pair.source:
            return "its source is not the difference of the two that it names"
        if self.pair is None and (line := next((x for x in self.lines if x.scale is not None), None)) is not None:
            return f"{line.name} is scaled, and the plan is of no difference"
        try:
            for part in self.rule.split(",") if self.rule != "none" else ():
                parse_rule(rule_in(part))
        except UsageError as error:
            return str(error)
        for key, hint in SELECTION.items():
            if key in self.selection and not has_shape({key: self.selection[key]}, {key: hint}):
                return f"selection.{key} is {shown(self.selection[key])}, expected {words(hint)}"
        first: dict[str, int] = {}
        for number, line in enumerate(self.lines, 1):
            if first.setdefault(line.name, number) != number:
                return f"line {number} ({line.name}) repeats line {first[line.name]}, expected each tensor once"
            if line.action == "reduce" and line.tokens is not None and self.calibration is None:
                return f"line {number} ({line.name}): metric {line.metric!r} in a plan without calibration"
        return None

    @property
    def coverage(self) -> dict[str, Any]:
        """Matrices and parameters by what happens to them and why; `unaccounted` is what no line speaks of: 0."""
        rows: dict[tuple[str, str], list[int]] = {}
        for line in self.lines:
            counts = rows.setdefault((line.action, line.why.kind), [0, 0])
            counts[0] += 1
            counts[1] += line.parameters
        if self.source.unindexed:
            rows["keep", Kind.UNINDEXED] = [0, self.source.unindexed]
        stated = [dict(zip(COVERAGE, (*row, *counts), strict=True)) for row, counts in rows.items()]
        accounted = sum(counts[1] for counts in rows.values())
        total = accounted if self.source.parameters is None else self.source.parameters
        return {"parameters": total, "unaccounted": total - accounted, "reasons": stated}

    def unlike(self, matrices: Sequence[Matrix]) -> list[str]:
        """Where the lines are not those of a checkpoint that holds these matrices, each with its line."""
        known = {m.name: m for m in matrices}
        found = []
        for number, line in enumerate(self.lines, 1):
            if line.name not in known:
                # Only for the first, and for what can be a name: it takes its time.
                near = difflib.get_close_matches(line.name, known, 1) if not found and len(line.name) < 500 else []
                meant = f"; did you mean {near[0]}?" if near else ""
                found.append(f"line {number} ({line.name}): the checkpoint has no such tensor{meant}")
                continue
            matrix = known[line.name]
            p = min(matrix.shape) if matrix.is_matrix else None
            for key in ("role", "layer", "expert", "parameters", "stack"):
                if getattr(line, key) != getattr(matrix, key):
                    wrong = f"{key} is {shown(getattr(line, key))}, expected {shown(getattr(matrix, key))}"
                    found.append(f"line {number} ({line.name}): {wrong}")
            if line.full_rank is not None and line.full_rank != p:
                expected = f"expected {p}, its smaller side" if p else "but it is no matrix"
                found.append(f"line {number} ({line.name}): full_rank is {line.full_rank}, {expected}")
        named = {line.name for line in self.lines}
        return found + [f"no line is about {name}" for name in known if name not in named]

    def require_source(self, checkpoint: Checkpoint, base: Base | None = None, what: str = "plan") -> None:
        """Raises RecordError unless `what`, which rests on this plan, is of this checkpoint, and of this base if it is
        of differences; UsageError for a base that it has no use for."""
        if self.pair is not None:
            return self.pair.require(checkpoint, base, what)
        if base is not None:
            raise UsageError(f"the {what} is of {self.source.name} and of no difference; try it without --base")
        self.source.require(checkpoint, what)

    def require(self, checkpoint: Checkpoint, base: Base | None = None) -> None:
        """Raises as `require_source`, and RecordError unless every tensor of the checkpoint has its line."""
        self.require_source(checkpoint, base)
        if wrong := self.unlike(list_matrices(checkpoint)):
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise RecordError(f"the plan does not fit {checkpoint.name}: {wrong[0]}{more}; mend the line or plan again")
        now = Source.of(checkpoint)
        for key in ("parameters", "unindexed"):
            stated, there = getattr(self.source, key), getattr(now, key)
            if stated is not None and stated != there:
                raise RecordError(f"the plan's source has {key} {stated}, found {there}; plan again")

    def require_moments(self, moments: Moments | None) -> None:
        """Raises UsageError where the plan needs moments and there are none, RecordError where they are others."""
        names = [line.name for line in self.reductions.values() if line.tokens is not None]
        if not names:
            return
        made = self.calibration
        message = f"{made.identity[:12]} of {made.text}" if made else "others"
        if moments is None:
            raise UsageError(
                f"the plan reduces {len(names)} matrices in the metric of the data; try --moments with the file of "
                f"laser calibrate{f' on {made.text}' if made else ''}"
            )
        if made is None or moments.calibration.identity != made.identity:
            raise RecordError(
                f"{moments.path}: found moments {moments.calibration.identity[:12]} of {moments.calibration.text}, the "
                f"plan was made with {message}; scan and plan again with these"
            )


def digest_of(rule: Any, selection: Any, lines: Any) -> str:
    """sha256 of these three as one JSON list, of whose lines one is in memory at a time."""
    encode = json.JSONEncoder(sort_keys=True).encode
    if not isinstance(lines, list | tuple):  # of a file that somebody has edited
        return hashlib.sha256(encode([rule, selection, lines]).encode()).hexdigest()
    digest, joint = hashlib.sha256(encode([rule, selection])[:-1].encode() + b", ["), b""
    for line in lines:
        digest.update(joint + encode(plain(line)).encode())
        joint = b", "
    digest.update(b"]]")
    return digest.hexdigest()


@dataclass(frozen=True)
class Treatment:
    """What a plan does to a matrix that it reduces. `require_fit` keeps a matrix whose fit has a lower level whole."""

    rule: str
    shrink: str | None = None
    two_sided: bool = False
    require_fit: float | None = None

    def check(self, calibrated: bool = True) -> None:
        """Raises UsageError for a rule, shrinker or level that does not exist or does not go with the rest.

        calibrated: whether there are moments, without which no rule is asked in the metric of the data.
        """
        parse_rule(rule_in(self.rule))
        if scale_in(self.rule) is not None and (self.shrink or self.two_sided or self.require_fit is not None):
            raise UsageError("a scale cuts nothing; try it without --shrink, --two-sided and --require-fit")
        asks_data = by_data(self.rule)
        if asks_data and not calibrated:
            raise UsageError(NO_MOMENTS)
        if asks_data and (self.shrink or self.two_sided or self.require_fit is not None):
            raise UsageError("--shrink, --two-sided and --require-fit rest on the plain law; leave them out")
        if self.shrink is not None:
            check_shrinker(self.shrink)
        if self.require_fit is not None and not 0 < self.require_fit < 1:
            raise UsageError(f"--require-fit {self.require_fit:g} is not a level between 0 and 1; try 0.05")

    def describe(self) -> dict[str, Any]:
        """Only what was asked for: a plain plan reads as plain."""
        asked = {"shrink": self.shrink, "two_sided": self.two_sided or None, "require_fit": self.require_fit}
        return {name: value for name, value in asked.items() if value is not None}


def make_plan(
    spectra: Spectra,
    rule: str,
    selection: Selection | None = None,
    *,
    lowest_snr: int | None = None,
    shrink: str | None = None,
    two_sided: bool = False,
    require_fit: float | None = None,
    fewest_tokens: int | None = None,
) -> Plan:
    """Apply `rule` (`NAME[:ARGUMENT]`, see RULES) to every scanned matrix that the selection names.

    `lowest_snr` K reduces only the K matrices with the lowest signal-to-noise ratio (LaserRMT takes 15); matrices
    without one, because nothing lies at or below the threshold, are kept. A rule that keeps every value keeps the
    matrix. `shrink` names a shrinker for the kept values. `two_sided` also keeps what lies under the lower edge of the
    noise, where trained matrices hide information (arXiv 2410.17770). `require_fit` keeps every matrix whose bulk
    looks like noise at no more than that level. Tails of the entries that move the edge of noise are said in the
    reason. A rule `data:NAME` is asked of the spectra in the metric of the calibration's inputs, and a matrix that saw
    fewer than `fewest_tokens` (default: its p) of them is kept.
    Raises UsageError for an unknown rule or a selection that matches nothing that was scanned, and for differences from
    a model that is not the base.
    """
    treatment = Treatment(rule, shrink, two_sided, require_fit)
    treatment.check()
    check_lowest_snr(lowest_snr)
    spectra = in_metric_of(rule, spectra, fewest_tokens)
    selection = selection or Selection()
    selection.check(spectra.matrices)
    if (entry := selection.never_scanned(spectra.matrices, spectra.skipped)) is not None:
        what = "role" if entry in selection.roles else "layer"
        raise UsageError(f"{what} {entry} was not in the scan of these spectra; scan again with it, or leave it out")
    scale = scale_in(rule)
    if scale is not None and lowest_snr is not None:
        raise UsageError("a scale cuts nothing, so no matrix has an SNR; try it without --lowest-snr")
    if spectra.delta is not None and not is_base(spectra.matrices, spectra.delta.changes):
        names = f"{spectra.delta.base.name} is not the base of {spectra.delta.tuned.name}"
        raise UsageError(
            f"{names}: none of their matrices are alike; try --base with the model that it was trained from"
        )
    lines = [line_of(spectra, matrix, treatment, selection) for matrix in spectra.matrices]
    if scale is None and not any(line.rank is not None for line in lines):
        if spectra.seen is not None:
            raise UsageError(
                "no selected matrix has seen as many tokens as it has dimensions; calibrate on more text, or try "
                "laser plan --fewest-tokens, with moments of laser calibrate --ledoit-wolf"
            )
        for line in lines:
            if line.action == "skip":
                raise UsageError(
                    f"no selected matrix has a spectrum: {line.name} is {line.why.text}; try other layers or roles, or "
                    "a release of the model without this"
                )
        raise UsageError("no selected matrix was scanned; try the layers and roles of the scan, or scan again")
    warn_of_crowds(spectra, rule, [line.name for line in lines if line.rank is not None])
    if lowest_snr is not None:
        lines = _keep_all_but_lowest(lines, lowest_snr)
    described = selection.describe() | {"lowest_snr": lowest_snr} | treatment.describe()
    described |= {} if fewest_tokens is None else {"fewest_tokens": fewest_tokens}
    calibration = spectra.data.calibration if spectra.data and spectra.seen is not None else None
    pair = spectra.delta.pair if spectra.delta else None
    return Plan(spectra.source, rule, described, tuple(lines), calibration, pair=pair)


def check_lowest_snr(count: Any) -> None:
    """Raises UsageError unless it is None, for all of them, or a count of 1 or more."""
    if count is not None and (not isinstance(count, Integral) or isinstance(count, bool) or count < 1):
        raise UsageError(
            f"--lowest-snr {count} is no count of matrices; try --lowest-snr 15, as LaserRMT does, or --lowest-snr all"
        )


def parse_lowest_snr(text: str | None, default: int | None) -> int | None:
    """`15` or `all`, which is None, as `make_plan` takes it. Raises UsageError for anything else."""
    if text is None or text == "all":
        return default if text is None else None
    count = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else text
    check_lowest_snr(count)
    return int(count)


def warn_of_crowds(spectra: Spectra, rule: str, names: Sequence[str]) -> None:
    """Warns (CrowdWarning) where some of these matrices have more spikes than `rule` can bear, see `crowd`."""
    if parse_rule(rule_in(rule))[0].reads is None:
        return
    wanted, found = set(names), []
    for matrix in spectra.matrices:
        if matrix.name in wanted and matrix.name in spectra.values:
            s = spectra.values[matrix.name]
            if (spikes := crowd(rule, s, (matrix.shape[0], matrix.shape[1]))) is not None:
                found.append(f"{matrix.name} ({spikes} of {len(s)})")
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        warnings.warn(
            f"rule {rule} takes spikes for noise where they are many, as in {', '.join(found[:3])}{more}; "
            "try mp-edge in its place",
            CrowdWarning,
            stacklevel=3,
        )


def empty_plan(spectra: Spectra) -> Plan:
    """The plan that reduces nothing: its output is the source, byte for byte."""
    lines = tuple(
        PlanLine(
            m.name,
            m.role,
            m.layer,
            m.expert,
            "keep",
            Why(Kind.EMPTY, "empty plan"),
            parameters=m.parameters,
            stack=m.stack,
        )
        for m in spectra.matrices
    )
    return Plan(spectra.source, "none", Selection().describe() | {"lowest_snr": None}, lines)


def line_of(spectra: Spectra, matrix: Matrix, treatment: Treatment, selection: Selection) -> PlanLine:
    """What `treatment` does to one matrix of the spectra, by its own values alone."""
    line = PlanLine(
        matrix.name, matrix.role, matrix.layer, matrix.expert, "keep", Why(Kind.RULE, ""),
        parameters=matrix.parameters, stack=matrix.stack,
    )  # fmt: skip
    rule = rule_in(treatment.rule)
    if (scale := scale_in(rule)) is not None:
        return line_scaled(line, spectra, matrix, scale, selection)
    why = selection.why_not(matrix)
    if why is None and matrix.name not in spectra.values:
        why = spectra.skipped.get(matrix.name, Why(Kind.NOT_SCANNED, "not scanned"))
    if why is not None:
        unseen = ""
        if why.kind is Kind.UNSEEN and spectra.seen is not None:
            unseen = seen_by(spectra.seen[matrix.name], min(matrix.shape))
        return replace(line, action="skip" if why.kind is Kind.FAILED else "keep", why=why, unseen=unseen)
    s, shape = spectra.values[matrix.name], (matrix.shape[0], matrix.shape[1])
    cut = apply_rule(rule, s, shape, spectra.nulls.get(matrix.name), spectra.sigma)
    eps = precision_of(spectra.device, spectra.method, spectra.steps.get(matrix.name, ""))
    near = at_threshold(rule, s, cut, eps)
    if (spikes := crowd(rule, s, shape)) is not None:
        crowded = f"{spikes} of {len(s)} values stand out, more than this rule can tell from noise"
        near = f"{near}; {crowded}" if near else crowded
    why = Why(Kind.RULE, cut.reason).also(near)
    line = replace(line, full_rank=len(s), threshold=cut.threshold, sigma=cut.sigma, why=why)
    if spectra.delta is not None and spectra.delta.changes[matrix.name].kind is Verdict.CAST:  # what shows is rounding
        line = replace(line, why=Why(Kind.NO_DIFFERENCE, f"{Verdict.CAST}: no difference to cut"))
        return replace(line, rank=0, energy_kept=1.0)
    if not s.any():
        return replace(line, rank=0, energy_kept=1.0)
    if spectra.seen is not None:
        return line_in_data(line, s, cut.rank, spectra.seen[matrix.name])
    estimator = parse_rule(rule)[0].estimator or DEFAULT_ESTIMATOR
    noise = cut.noise or estimate_noise(s, shape, estimator)
    fit = fit_noise(s, shape, estimator, noise)
    lower = noise.lower_edge(shape)
    below = int(np.count_nonzero(s[cut.rank :] < lower)) if treatment.two_sided else 0
    kurtosis = spectra.kurtosis.get(matrix.name)
    shift = None if kurtosis is None else edge_shift(kurtosis, shape)
    gains = Gains(cut.rank, below, treatment.shrink, fit.sigma)
    g = gains.of(s, shape)
    kept = int(np.count_nonzero(g[: cut.rank]))  # a shrinker may take values to 0
    line = replace(
        line,
        action="reduce",
        rank=kept + below,
        snr=signal_to_noise(s, cut.rank),
        energy_kept=energy_share(s, g),
        fit=fit.distance,
        fit_level=fit.level,
        edge_shift=shift,
        below=below,
        shrink=treatment.shrink,
        noise=None if gains.plain else fit.sigma,
    )
    if treatment.two_sided:
        line = replace(line, why=line.why.also(f"{below} under the lower edge {lower:.4g} kept"))
    if treatment.shrink:
        line = replace(line, why=line.why.also(f"shrunk for {treatment.shrink} loss"))
    heavy = ""
    if shift is not None and shift > HEAVY:
        heavy = f"heavy tails: excess kurtosis {kurtosis:.3g} moves the edge by {shift:.2g} Tracy-Widom units"
    if fit.level < FLAG_LEVEL:
        line = replace(line, why=line.why.also(f"the bulk is not such noise: {_describe(fit)}"))
    line = replace(line, why=line.why.also(heavy))
    kept_whole = None
    if np.all(g == 1):
        kept_whole = Why(Kind.ALL_KEPT, f"the rule keeps all {len(s)} values").also(near)
    elif np.all(g[s > 0] == 1):
        message = f"the {len(s) - cut.rank} values under the cut are 0: nothing to remove, and no SNR"
        kept_whole = Why(Kind.ALL_KEPT, message)
    elif treatment.require_fit is not None and fit.level < treatment.require_fit:
        kept_whole = Why(Kind.NOT_NOISE, f"the bulk is not noise at level {treatment.require_fit:g}: {_describe(fit)}")
    return replace(line, action="keep", why=kept_whole) if kept_whole else line


def _describe(fit: NoiseFit) -> str:
    return f"distance {fit.distance:.3g}, level {fit.level:.3g}"


def _snr(line: PlanLine) -> str:
    return "no SNR: what it removes is 0, and it" if line.snr is None else f"SNR {line.snr:.4g}"


def _keep_all_but_lowest(lines: list[PlanLine], count: int) -> list[PlanLine]:
    ranked = sorted(
        (line for line in lines if line.action == "reduce" and line.snr is not None),
        key=lambda line: line.snr or 0.0,
    )
    lowest = {line.name: place for place, line in enumerate(ranked[:count], 1)}
    return [
        replace(line, why=line.why.also(f"SNR {line.snr:.4g} is number {lowest[line.name]} from below"))
        if line.name in lowest
        else line
        if line.action != "reduce"
        else replace(line, action="keep", why=Why(Kind.NOT_LOWEST, f"{_snr(line)} is not among the {count} lowest"))
        for line in lines
    ]


def line_scaled(line: PlanLine, spectra: Spectra, tensor: Matrix, c: float, selection: Selection) -> PlanLine:
    """A plan's line for a tensor of any shape whose difference from the base's is multiplied by c."""
    if spectra.delta is None:
        raise UsageError(NO_DIFFERENCE)
    why, change = selection.why_not_tensor(tensor), spectra.delta.changes[tensor.name]
    of_eight_bits = change.kind not in UNSCALED and change.moved and tensor.dtype not in STORED_FLOATS
    if why is None and (of_eight_bits or change.kind is Verdict.SHAPE):
        stated = f"stored as {tensor.dtype}" if of_eight_bits else str(change.kind)
        why = Why(Kind.FAILED, f"skipped: {stated}, so its difference is not scaled, and all of it stays")
        return replace(line, action="skip", why=why)
    if why is None and (change.kind in UNSCALED or not change.moved or tensor.dtype not in STORED_FLOATS):
        of = f" of {tensor.dtype}" if change.kind not in UNSCALED else ""
        why = Why(Kind.NO_DIFFERENCE, f"{change.kind}{of}: no difference to scale")
    if why is not None:
        return replace(line, why=why)
    why = Why(Kind.RULE, f"{change.kind}, {c:g} of the difference from the base")
    p = min(tensor.shape) if tensor.is_matrix else None
    rank = p if c or p is None else 0
    return replace(line, action="reduce", why=why, rank=rank, full_rank=p, energy_kept=c * c, scale=c)


def line_in_data(line: PlanLine, s: NDArray[np.float64], rank: int, tokens: int) -> PlanLine:
    """A plan's line for a matrix of data values `s` (p,) that a rule cuts at `rank`.

    No law of noise holds in the data's metric, so there is no fit to tell of. A rank over the number of directions that
    show in the data becomes that number: nothing else makes a difference to these inputs.
    """
    shown = int(np.count_nonzero(s))
    rank = min(rank, shown)
    line = replace(line, rank=rank, metric="data", tokens=tokens)
    if rank == len(s):
        return replace(line, why=Why(Kind.ALL_KEPT, f"the rule keeps all {rank} values"))
    directions = f", which show {shown} directions" if rank == shown else ""
    why = line.why.also(f"in the metric of {tokens} tokens{directions}")
    snr, energy = signal_to_noise(s, rank), energy_share(s, np.arange(len(s)) < rank)
    return replace(line, action="reduce", snr=snr, energy_kept=energy, why=why)
