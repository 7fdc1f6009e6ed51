"""spectra: every scanned matrix as one row of numbers, and the files that other tools read."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from laser.checkpoint.families import place_of
from laser.checkpoint.files import to_json
from laser.errors import UsageError
from laser.plan import DEFAULT_ESTIMATOR
from laser.selection import Selection
from laser.spectra import Source, Spectra
from laser.spectral.entries import edge_shift
from laser.spectral.fit import fit_noise
from laser.spectral.noise import estimate
from laser.spectral.rules import apply_rule, parse_rule, signal_to_noise
from laser.spectral.statistics import ENERGIES, describe_spectrum

# What a matrix of a fused tensor is called behind the tensor's name: trainers know the tensor only.
CUT = r"\[[\w,]+\]$"
# Beside the chosen matrices, Spectrum and axolotl always train these two.
ALWAYS_UNFROZEN = ("lm_head.weight", "model.embed_tokens.weight")


@dataclass(frozen=True)
class Row:
    """A matrix in numbers. Undefined ones are None: strict JSON has no Infinity, and an empty cell sorts honestly."""

    name: str
    role: str
    layer: int | None
    expert: int | None
    rows: int
    columns: int
    largest: float  # s_1, in the unit of the weights, as is every level below
    norm: float  # ||W||_F
    stable_rank: float  # ||W||_F^2 / s_1^2
    effective_rank: float  # exp of the entropy
    rank_50: int  # singular values that hold 50 % of the energy
    rank_90: int
    rank_95: int
    rank_99: int
    alpha: float | None  # exponent of the tail of s^2
    alpha_distance: float | None  # Kolmogorov-Smirnov
    sigma: float  # noise level of the entries
    sigma_error: float  # its standard error
    fit: float  # Kolmogorov-Smirnov distance of the bulk from the law of noise
    fit_level: float  # share of pure noise matrices as far off
    kurtosis: float | None  # excess, of the entries; None in spectra that were scanned before it was measured
    edge_shift: float | None  # of the edge by that, in Tracy-Widom units
    lower_edge: float  # of the fitted law of noise
    upper_edge: float
    threshold: float | None  # of the rule; None where it fixes a rank
    rank: int  # singular values that the rule keeps
    full_rank: int
    snr: float | None  # sum(s > t) / sum(s <= t)
    snr_over_largest: float | None  # SNR / s_1: LaserRMT's scanner and Spectrum
    # In the metric of the data, where the scan was given moments; None where it was not, or the matrix met no token:
    tokens: int | None = None  # inputs that the matrix met
    data_effective_rank: float | None = None
    data_rank_99: int | None = None  # directions that hold 99 % of the outputs' mean square
    stack: str = ""  # whose layers are counted: "" the language model's own

    @property
    def place(self) -> int | str | None:
        return place_of(self.layer, self.stack)


@dataclass(frozen=True)
class Summary:
    source: Source
    rule: str
    rows: tuple[Row, ...]  # in file order
    skipped: tuple[tuple[str, str], ...]  # tensors that have no spectrum, and why
    calibration: Mapping[str, Any] | None = None  # of the data's metric: moments.Calibration

    @property
    def under_seen(self) -> list[Row]:
        """Matrices that met fewer tokens than they have dimensions: what the data say of them is not to be trusted."""
        return [row for row in self.rows if row.tokens is not None and row.tokens < row.full_rank]

    def to_json(self) -> bytes:
        return to_json({"kind": "summary", "version": 1} | asdict(self))

    def to_csv(self) -> str:
        """A header line and a line per matrix; an undefined number is an empty field."""
        out = io.StringIO()
        writer = csv.DictWriter(out, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        return out.getvalue()

    def snr_json(self) -> bytes:
        """Spectrum's file of scores: module name -> {"snr": SNR / s_1, "type": role}.

        Its readers sort by the score, so a matrix without one (nothing at or below the threshold) is left out rather
        than written as Infinity, which is no JSON. The score depends on the unit of the weights: compare it only
        within one role.
        """
        scores = {_module(r.name): {"snr": r.snr_over_largest, "type": _type(r)} for r in self.rows}
        return to_json({name: score for name, score in scores.items() if score["snr"] is not None})

    def unfrozen_yaml(self, top_percent: float) -> str:
        """Spectrum's and axolotl's list of parameters to train: the `top_percent` of each type by SNR / s_1.

        Anchored and escaped: unescaped, `layers.1` also matches `layers.10`, and the dot any character. Raises
        UsageError for a share outside (0, 100].
        """
        if not 0 < top_percent <= 100:
            raise UsageError(f"--top-percent {top_percent:g} is no share of the matrices; try 50")
        lines = ["unfrozen_parameters:"] + [f"- {_anchored(name)}" for name in ALWAYS_UNFROZEN]
        for kind in dict.fromkeys(_type(row) for row in self.rows):
            scored = [r for r in self.rows if _type(r) == kind and r.snr_over_largest is not None]
            scored.sort(key=lambda r: -(r.snr_over_largest or 0.0))
            lines.append(f"# {kind} layers")
            best = scored[: int(len(scored) * top_percent / 100)]
            lines += [f"- {_anchored(re.sub(CUT, '', r.name))}" for r in best]
        return "\n".join(dict.fromkeys(lines)) + "\n"


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _type(row: Row) -> str:
    """The module's place in its layer, without layer and expert number: Spectrum groups experts one by one, so that a
    share of them is a share per expert; here all experts of a role compete."""
    inside = re.sub(r"^.*\blayers\.\d+\.", "", _module(row.name))
    return re.sub(r"\bexperts\.\d+\.|(?<=\[)\d+,|\[\d+\]", lambda m: "experts." if m[0][0] == "e" else "", inside)


def _anchored(name: str) -> str:
    # Single quotes: YAML takes the backslashes as they are.
    return f"'^{re.escape(name)}$'"


def summarise(
    spectra: Spectra, rule: str = "mp-edge", selection: Selection | None = None, names: Sequence[str] = ()
) -> Summary:
    """A row for every scanned matrix that is selected (or is one of `names`), the cut being that of `rule`.

    Raises UsageError for an unknown rule, or a selection that matches nothing that was scanned.
    """
    found = parse_rule(rule)[0]
    estimator = found.estimator or DEFAULT_ESTIMATOR
    selection = selection or Selection()
    selection.check(spectra.matrices)
    rows = []
    for matrix in spectra.matrices:
        if matrix.name not in spectra.values or selection.why_not(matrix) or (names and matrix.name not in names):
            continue
        s, shape = spectra.values[matrix.name], (matrix.shape[0], matrix.shape[1])
        numbers, fit = describe_spectrum(s), fit_noise(s, shape, estimator)
        cut = apply_rule(rule, s, shape, spectra.nulls.get(matrix.name))
        noise = estimate(s, shape, estimator)
        snr = signal_to_noise(s, cut.rank)
        kurtosis = spectra.kurtosis.get(matrix.name)
        ranks = dict(zip(ENERGIES, numbers.energy_ranks, strict=True))
        rows.append(
            Row(
                name=matrix.name,
                role=matrix.role,
                layer=matrix.layer,
                stack=matrix.stack,
                expert=matrix.expert,
                rows=shape[0],
                columns=shape[1],
                largest=numbers.largest,
                norm=numbers.norm,
                stable_rank=numbers.stable_rank,
                effective_rank=numbers.effective_rank,
                rank_50=ranks[0.5],
                rank_90=ranks[0.9],
                rank_95=ranks[0.95],
                rank_99=ranks[0.99],
                alpha=numbers.tail.alpha if numbers.tail else None,
                alpha_distance=numbers.tail.distance if numbers.tail else None,
                sigma=fit.sigma,
                sigma_error=fit.standard_error,
                fit=fit.distance,
                fit_level=fit.level,
                kurtosis=kurtosis,
                edge_shift=None if kurtosis is None else edge_shift(kurtosis, shape),
                lower_edge=noise.lower_edge(shape),
                upper_edge=noise.upper_edge(shape),
                threshold=cut.threshold,
                rank=cut.rank,
                full_rank=len(s),
                snr=snr,
                snr_over_largest=snr / numbers.largest if snr is not None and numbers.largest else None,
                **_in_data(spectra, matrix.name),
            )
        )
    if not rows:
        raise UsageError("no selected matrix was scanned; try the layers and roles of the scan, or scan again")
    skipped = tuple((name, why) for name, why in spectra.skipped.items() if why.startswith("skipped"))
    calibration = None if spectra.data is None else spectra.data.calibration
    return Summary(spectra.source, rule, tuple(rows), skipped, calibration)


def _in_data(spectra: Spectra, name: str) -> dict[str, Any]:
    if spectra.data is None:
        return {}
    tokens = spectra.data.seen.get(name)
    if name not in spectra.data.values or not spectra.data.values[name].any():
        return {"tokens": tokens}
    numbers = describe_spectrum(spectra.data.values[name])
    ranks = dict(zip(ENERGIES, numbers.energy_ranks, strict=True))
    return {"tokens": tokens, "data_effective_rank": numbers.effective_rank, "data_rank_99": ranks[0.99]}
