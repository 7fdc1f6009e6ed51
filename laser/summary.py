"""spectra: every scanned matrix as one row of numbers, and the files that other tools read."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import TYPE_CHECKING, Any

from laser.checkpoint.matrices import MEMORY_NAMES, ONE_EXPERT, place_of
from laser.checkpoint.source import Source
from laser.errors import UsageError
from laser.escape import visible
from laser.moments import Calibration
from laser.notebook import FrameRows, Shown, drawn
from laser.plan import warn_of_crowds
from laser.reasons import Kind
from laser.records import plain, to_json
from laser.selection import Selection
from laser.spectra import Spectra
from laser.spectral.noise import DEFAULT_ESTIMATOR, Spectrum, estimate_noise, fit_noise
from laser.spectral.rules import apply_rule, parse_rule, signal_to_noise
from laser.spectral.spectrum import ENERGIES, Description, describe_spectrum, edge_shift, log_alpha_norm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What a matrix of a fused tensor is called behind the tensor's name: trainers know the tensor only.
CUT = r"\[[\w,]+\]$"
# Beside the chosen matrices, Spectrum and axolotl always train these two.
ALWAYS_UNFROZEN = ("lm_head.weight", "model.embed_tokens.weight")
# Spectrum's own scores are by this rule; by another the lists below can name nearly the complement of its choice.
SPECTRUM_RULE = "laser-rmt"
# A checkpoint of the model without its head lacks this, which transformers puts before every name when it loads it.
PREFIXES = {"h": "transformer.", "layers": "model."}
# Fused experts: Granite's have another name in memory.
ALL_EXPERTS = re.compile(
    r"(?P<tensor>.*\.(?:experts\.(?:gate_up|down)_proj|(?:in|out)put_linear\.weight))\[(?P<expert>\d+)"
)
GRANITE_NAMES = {"input_linear.weight": "experts.gate_up_proj", "output_linear.weight": "experts.down_proj"}
FUSED_EXPERTS = (
    "# Lines that end in [e:f] are axolotl's, for experts that are one parameter in memory, as under transformers 5:",
    "# it trains rows e to f - 1, which is expert e, its gate and its up together. Scripts that read line by line know",
    "# no ranges. They train by the lines without, or nothing where the model has no parameter of that name.",
)
FUSED_PARTS = ("# A parameter that holds other matrices than experts is trained whole where one of them is chosen.",)


@dataclass(frozen=True, slots=True)
class SummaryRow:
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
    alpha_error: float | None  # its standard error
    alpha_distance: float | None  # Kolmogorov-Smirnov
    xmin: float | None  # where the tail starts, in squared units
    num_pl_spikes: int | None  # eigenvalues in it
    alpha_weighted: float | None  # alpha log10(s_1^2), in the unit of the weights
    log_alpha_norm: float | None  # log10 of the sum of (s^2)^alpha
    entropy: float | None  # of s^2 / sum(s^2), over the log of the numerical rank
    rank_loss: int  # values that are zero to the precision of float32 weights
    mp_softrank: float | None  # squared upper edge of the law of noise over s_1^2
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
    # In the metric of the data, where the scan was given moments; None where it was not, or the matrix saw no token:
    tokens: int | None = None  # inputs that the matrix has seen
    data_effective_rank: float | None = None
    data_rank_99: int | None = None  # directions that hold 99 % of the outputs' mean square
    stack: str = ""  # whose layers are counted: "" the language model's own

    @property
    def place(self) -> int | str | None:
        return place_of(self.layer, self.stack)


@dataclass(frozen=True, repr=False)
class Summary(Shown):
    source: Source
    rule: str
    rows: tuple[SummaryRow, ...]  # in file order
    skipped: tuple[tuple[str, str], ...]  # tensors that have no spectrum, and why
    calibration: Calibration | None = None  # of the data's metric

    def headline(self) -> str:
        return f"Summary of {self.source.name}: {len(self.rows)} matrices, rule {self.rule}"

    def frame_rows(self) -> FrameRows:
        return [asdict(row) for row in self.rows]

    def glance(self) -> tuple[FrameRows, Sequence[float]]:
        """A row for each matrix, and the shares of their ranks that the rule keeps."""
        keys = ("name", "role", "largest", "stable_rank", "alpha", "fit", "rank", "full_rank", "snr")
        return [{key: getattr(r, key) for key in keys} for r in self.rows], [r.rank / r.full_rank for r in self.rows]

    def plot(self, quantity: str = "kept", *, experts: bool = True, ax: Axes | None = None) -> Axes:
        """Draw a quantity of every matrix, layer by role, on `ax` if there is one. Raises as `plot_heat_map`."""
        return drawn("plot_heat_map", self, quantity, experts=experts, ax=ax)

    @property
    def under_seen(self) -> list[SummaryRow]:
        """Matrices that saw fewer tokens than they have dimensions: what the data say of them is not to be trusted."""
        return [row for row in self.rows if row.tokens is not None and row.tokens < row.full_rank]

    def to_json(self) -> bytes:
        return to_json({"kind": "summary", "version": 1} | plain(self))

    def to_csv(self) -> str:
        """A header line and a line per matrix; an undefined number is an empty field."""
        names = [f.name for f in fields(SummaryRow)]
        return "".join(_csv_line(line) for line in (names, *(asdict(row).values() for row in self.rows)))

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

        Two programs read it. axolotl reads YAML, takes a dot for a dot and a range behind the pattern for rows of the
        parameter. Training scripts take what stands behind "- " in each line as a regular expression. Raises UsageError
        for a share outside (0, 100].
        """
        check_share(top_percent)
        lines = [f"- {_pattern(name)}" for name in ALWAYS_UNFROZEN]
        notes: list[str] = []
        for kind in dict.fromkeys(_type(row) for row in self.rows):
            scored = [r for r in self.rows if _type(r) == kind and r.snr_over_largest is not None]
            scored.sort(key=lambda r: -(r.snr_over_largest or 0.0))
            lines.append(f"# {visible(kind).encode('ascii', 'backslashreplace').decode()} layers")
            for row in scored[: int(len(scored) * top_percent / 100)]:
                tensor, slices = re.sub(CUT, "", row.name), _slices(row.name)
                lines.append(f"- {_pattern(tensor)}")
                lines += [f"- {_pattern(name)}[{e}:{e + 1}]" for name, e in slices]
                notes += FUSED_EXPERTS if slices else FUSED_PARTS if tensor != row.name else ()
        return "\n".join([*dict.fromkeys(notes), "unfrozen_parameters:", *dict.fromkeys(lines)]) + "\n"


def check_share(top_percent: float) -> None:
    """Raises UsageError for a share of the matrices outside (0, 100]."""
    if not 0 < top_percent <= 100:
        raise UsageError(f"--top-percent {top_percent:g} is no share of the matrices; try 50")


def _csv_line(values: Iterable[Any]) -> str:
    out = io.StringIO(newline="")
    csv.writer(out).writerow(values)  # with its own line end, or a carriage return in a name would not be quoted
    return out.getvalue().removesuffix("\r\n") + "\n"


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _type(row: SummaryRow) -> str:
    """The module's place in its layer, without layer and expert number: Spectrum groups experts one by one, so that a
    share of them is a share per expert; here all experts of a role compete."""
    inside = re.sub(r"^.*\blayers\.\d+\.", "", _module(row.name))
    return re.sub(r"\bexperts\.\d+\.|(?<=\[)\d+,|\[\d+\]", lambda m: "experts." if m[0][0] == "e" else "", inside)


def _pattern(name: str) -> str:
    """A regular expression in ASCII and without spaces that matches `name`, for both readers of the list.

    Unanchored, `layers.1` also matches `layers.10`. A dot is left alone, for axolotl escapes dots itself; to a script
    it is any character, and no model has two names that differ only there.
    """
    escaped = "".join(c if re.fullmatch(r"[\w.-]", c, re.ASCII) else _escaped(c) for c in name)
    first = name.partition(".")[0]
    return f"^({PREFIXES[first]})?{escaped}$" if first in PREFIXES else f"^{escaped}$"


def _escaped(character: str) -> str:
    number = ord(character)
    if character.isascii() and character.isprintable() and character != " ":
        return "\\" + character
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _slices(name: str) -> list[tuple[str, int]]:
    """(parameter in memory, index of its first dimension) of an expert's matrix, under every name that it may have."""
    if (one := ONE_EXPERT.fullmatch(name)) and one["part"] in MEMORY_NAMES:
        # Mixtral's block has another name in memory; Granite's, which is fused on disk too, has not.
        block = one["block"].replace(".block_sparse_moe.", ".mlp.")
        return [(f"{block}experts.{MEMORY_NAMES[one['part']]}", int(one["expert"]))]
    if every := ALL_EXPERTS.match(name):
        tensor, expert = every["tensor"], int(every["expert"])
        other = re.sub("|".join(map(re.escape, GRANITE_NAMES)), lambda m: GRANITE_NAMES[m[0]], tensor)
        return [(parameter, expert) for parameter in dict.fromkeys((tensor, other))]
    return []


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
        numbers, cut = (
            describe_spectrum(s, shape),
            apply_rule(rule, s, shape, spectra.nulls.get(matrix.name), spectra.sigma),
        )
        noise = cut.noise or estimate_noise(s, shape, estimator)
        fit = fit_noise(s, shape, estimator, noise)
        snr = signal_to_noise(s, cut.rank)
        kurtosis = spectra.kurtosis.get(matrix.name)
        ranks = dict(zip(ENERGIES, numbers.energy_ranks, strict=True))
        rows.append(
            SummaryRow(
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
                **_tail_of(numbers, s),
                entropy=numbers.entropy,
                rank_loss=numbers.rank_loss,
                mp_softrank=(noise.upper_edge(shape) / numbers.largest) ** 2 if numbers.largest else None,
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
    warn_of_crowds(spectra, rule, [row.name for row in rows])
    if not rows:
        raise UsageError("no selected matrix was scanned; try the layers and roles of the scan, or scan again")
    skipped = tuple((name, why.text) for name, why in spectra.skipped.items() if why.kind is Kind.FAILED)
    calibration = None if spectra.data is None else spectra.data.calibration
    return Summary(spectra.source, rule, tuple(rows), skipped, calibration)


def _tail_of(numbers: Description, s: Spectrum) -> dict[str, Any]:
    """The columns of the power law; all None where there is none."""
    tail = numbers.tail
    return {
        "alpha": tail and tail.alpha,
        "alpha_error": tail and tail.alpha_error,
        "alpha_distance": tail and tail.distance,
        "xmin": tail.start if tail and isfinite(tail.start) else None,  # a square may leave float64's range
        "num_pl_spikes": tail and tail.count,
        "alpha_weighted": numbers.alpha_weighted,
        "log_alpha_norm": tail and log_alpha_norm(s, tail.alpha),
    }


def _in_data(spectra: Spectra, name: str) -> dict[str, Any]:
    if spectra.data is None:
        return {}
    tokens = spectra.data.seen.get(name)
    if name not in spectra.data.values or not spectra.data.values[name].any():
        return {"tokens": tokens}
    numbers = describe_spectrum(spectra.data.values[name])
    ranks = dict(zip(ENERGIES, numbers.energy_ranks, strict=True))
    return {"tokens": tokens, "data_effective_rank": numbers.effective_rank, "data_rank_99": ranks[0.99]}
