"""RULES: from a spectrum to a rank, one row per published rule.

A rule answers with a `Cut`. The kept values are those strictly above the threshold, rank = #{ s_i > t }: "not >=",
or a zero matrix (threshold 0) would keep everything. Laws that every rule obeys, checked in tests/test_laws.py:
scaling W by c scales the threshold by c and leaves the rank, transposing changes nothing, 0 <= rank <= p, and a zero
matrix has rank 0. Adding a row here adds it to those tests, to the command line and to the documentation.

`parallel` asks for more than the spectrum: the largest singular values of the matrix with its entries permuted, which a
scan measures beside the spectrum with `--null` (permutation.py). Planning itself never reads a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from laser.errors import UsageError
from laser.spectral import gamma_law, noise
from laser.spectral import marchenko_pastur as mp
from laser.spectral.noise import Noise, Shape, Spectrum, fit_noise, standard_error
from laser.spectral.unit import unit_of

UNFIT = 0.01  # level of a fit under which a law of noise is not believed
SCALE = "scale"  # the rule that multiplies a difference
BEMA_LEVEL = 0.1  # Ke, Ma and Lin 2021, section 2.3: beta


@dataclass(frozen=True)
class Cut:
    """Where a rule cuts a spectrum. `threshold` is in the unit of s, `sigma` in that of the weights."""

    rank: int
    threshold: float | None  # None where the rule fixes the rank and not a level
    sigma: float | None  # None where the rule estimates no noise
    reason: str
    noise: Noise | None = None  # that the rule rests on; in the unit of the weights, as sigma is


@dataclass(frozen=True)
class Rule:
    """One row of the table: the function, its argument (if it takes one) and where it comes from."""

    cut: Callable[[Spectrum, Shape, float], Cut]
    source: str
    estimator: str | None = None  # row of noise.ESTIMATORS that it rests on
    needs_null: bool = False  # its spectrum is that of the permuted matrices, see `apply_rule`
    needs_sigma: bool = False  # the level of the noise is known: of differences of two checkpoints, see `apply_rule`
    any_metric: bool = False  # supposes no law of the noise, so it may be asked of spectra in the data's metric, too
    argument: str | None = None
    default: float | None = None
    sample: str = ""  # with an argument, as the tests ask for it; not needed where there is none, or a default
    calibrated: bool = True  # of pure noise it keeps next to nothing
    # Up to which quantile its estimate reads the spectrum: spikes beyond that many are taken for noise (`crowd`).
    reads: float | None = None
    valid: Callable[[float], bool] = lambda _: True
    expected: str = ""


def _above(s: Spectrum, threshold: float, reason: str, noise: Noise | None = None) -> Cut:
    sigma = None if noise is None else noise.sigma
    return Cut(int(np.count_nonzero(s > threshold)), threshold, sigma, reason, noise)


def _laser_rmt(s: Spectrum, shape: Shape, _: float) -> Cut:
    sigma = noise.sigma_normal_iqr(s)
    _, _, beta = mp.aspect(shape)
    # Its sigma is no deviation of the entries, and so no Noise.
    return replace(_above(s, sigma * (1 + beta**0.5), "above IQR/1.349 * (1 + sqrt beta)"), sigma=sigma)


def _mp_edge(s: Spectrum, shape: Shape, _: float) -> Cut:
    """The edge of what is left when the signal is set aside: noise of shape (p - k, q - k), see noise.trimmed."""
    found = noise.trimmed(s, shape)
    reason = f"above the Marchenko-Pastur edge, sigma by trimmed median ({found.signals} values set aside)"
    return _above(s, found.upper_edge(shape), reason, found)


def _mp_median(s: Spectrum, shape: Shape, _: float) -> Cut:
    sigma = noise.sigma_median(s, shape)
    return _above(s, mp.edges(sigma, shape)[1], "above the Marchenko-Pastur edge, sigma by median", Noise(sigma))


def _mp_iqr(s: Spectrum, shape: Shape, _: float) -> Cut:
    """The edge, two standard errors above that of the IQR's own estimate: an interquartile range is a noisy statistic.

    Where its error exceeds the bulk's relative half-width sqrt(beta), it cannot tell noise at all: then the median.
    """
    error = standard_error(shape, "iqr")
    if not _iqr_tells(shape):
        cut = _mp_median(s, shape, 0.0)
        return replace(cut, reason=f"{cut.reason}: an IQR of {min(shape)} values is {error:.0%} off", noise=None)
    sigma = noise.sigma_iqr(s, shape)
    edge = mp.edges(sigma * (1 + 2 * error), shape)[1]
    reason = f"above the Marchenko-Pastur edge, sigma by IQR + 2 errors of {error:.2%}"
    return _above(s, edge, reason, Noise(sigma))


def _tracy_widom(s: Spectrum, shape: Shape, alpha: float) -> Cut:
    sigma = noise.sigma_median(s, shape)
    threshold = mp.tracy_widom_edge(sigma, shape, alpha)
    return _above(s, threshold, f"above the Tracy-Widom level {alpha:g}, sigma by median", Noise(sigma))


def gavish_donoho_lambda(beta: float) -> float:
    """lambda(beta) of Gavish and Donoho (2014), equation 11: 4/sqrt(3) at beta = 1, sqrt(2) towards 0."""
    return (2 * (beta + 1) + 8 * beta / ((beta + 1) + (beta**2 + 14 * beta + 1) ** 0.5)) ** 0.5


def _gavish_donoho(s: Spectrum, shape: Shape, _: float) -> Cut:
    _, q, beta = mp.aspect(shape)
    sigma = noise.sigma_median(s, shape)
    threshold = gavish_donoho_lambda(beta) * sigma * q**0.5
    return _above(s, threshold, "above the Gavish-Donoho optimal hard threshold", Noise(sigma))


def _bema(s: Spectrum, shape: Shape, _: float) -> Cut:
    found = noise.bema(s, shape)
    P, Q = found.sides(shape)
    threshold = found.sigma * Q**0.5 * gamma_law.noise_top(P, Q, found.theta, BEMA_LEVEL)
    spread = "equal" if np.isinf(found.theta) else f"gamma({found.theta:g})"
    return _above(s, threshold, f"above noise with {spread} variances, level {BEMA_LEVEL:g}", found)


def fewest_draws(alpha: float) -> int:
    """How many permutations a test of level alpha needs: their largest value is exceeded with 1 / (draws + 1)."""
    return int(np.ceil(1 / alpha - 1e-9)) - 1


def _parallel(null: Spectrum, shape: Shape, alpha: float) -> Cut:
    """Horn (1965). `null` are the (draws,) largest values of the permuted matrices.

    Under the null s_1 is as likely to take any place among them. So the k-th largest of them is exceeded with
    probability k / (draws + 1), exact for any law of the entries. Dobriban (2020) says when it finds the signal; a very
    strong one hides weaker ones (shadowing).
    """
    if len(null) < fewest_draws(alpha):
        raise UsageError(
            f"rule parallel:{alpha:g} needs {fewest_draws(alpha)} permutations of each matrix, found {len(null)}; "
            f"try `laser scan --null {fewest_draws(alpha)}`"
        )
    place = int(np.floor(alpha * (len(null) + 1) + 1e-9))
    threshold = float(np.sort(null)[-place])
    return Cut(0, threshold, None, f"above the {alpha:g} level of {len(null)} permuted matrices")


def _at_rounding_edge(s: Spectrum, shape: Shape, sigma: float) -> Cut:
    """The edge of noise whose `sigma` is known, not estimated: of rounding to a stored format (laser/differences)."""
    return _above(s, mp.edges(sigma, shape)[1], "above the edge of the storage format's rounding", Noise(sigma))


def _scale(s: Spectrum, shape: Shape, _: float) -> Cut:
    """Keeps all values: the difference itself is multiplied (laser/differences/edits.py), and no spectrum is asked."""
    return Cut(len(s), None, None, "the difference is scaled, and nothing of it cut")


def _energy(s: Spectrum, shape: Shape, share: float) -> Cut:
    energy = np.cumsum(s**2)
    # Not searchsorted on the bare product: share = 1 must find the last value that adds anything.
    rank = int(np.searchsorted(energy, share * energy[-1] * (1 - 1e-15))) + 1
    return Cut(min(rank, len(s)), None, None, f"smallest rank with {share:g} of the energy")


def _fraction(s: Spectrum, shape: Shape, rho: float) -> Cut:
    # The small addition undoes binary rounding: 0.29 * 100 is 28.999... and means 29.
    rank = max(1, int(np.floor(rho * len(s) + 1e-9)))
    return Cut(rank, None, None, f"max(1, floor({rho:g} * p))")


def _rank(s: Spectrum, shape: Shape, rank: float) -> Cut:
    return Cut(min(int(rank), len(s)), None, None, f"rank {int(rank)} asked for")


_SHARE = {"valid": lambda x: 0 < x <= 1, "expected": "a number in (0, 1]"}

RULES: dict[str, Rule] = {
    "laser-rmt": Rule(
        _laser_rmt, "LaserRMT, rmt_laser.py (not calibrated: keeps 24 to 100 % of pure noise)", calibrated=False
    ),
    "mp-edge": Rule(_mp_edge, "Marchenko and Pastur 1967; trimming as in Kritchman and Nadler 2009", "trimmed"),
    "mp-median": Rule(_mp_median, "the same edge; median matching as in Gavish and Donoho 2014", "median"),
    "mp-iqr": Rule(_mp_iqr, "LaserRMT's estimator with the Marchenko-Pastur law's own constant", "iqr", reads=0.75),
    "tracy-widom": Rule(
        _tracy_widom,
        "Johnstone 2001; Tracy-Widom quantile by Chiani 2014",
        "median",
        argument="ALPHA",
        default=0.05,  # Johnstone 2001, section 1.2, tests at this level
        valid=lambda x: 0 < x < 1 and math.isfinite(mp.tracy_widom_upper(x)),
        expected="a level between 0 and 1 that some value exceeds",
    ),
    "gavish-donoho": Rule(_gavish_donoho, "Gavish and Donoho 2014, equation 11", "median"),
    "bema": Rule(_bema, "Ke, Ma and Lin 2021, algorithm 2; noise of unequal variances", "bema", reads=0.8),
    "parallel": Rule(
        _parallel,
        "Horn 1965, Dobriban 2020: the matrix against its own permutations",
        needs_null=True,
        argument="ALPHA",
        default=0.05,
        valid=lambda x: 0 < x < 1,
        expected="a level between 0 and 1",
    ),
    "rounding": Rule(
        _at_rounding_edge,
        "differences of two checkpoints: rounding's variance is known; Landa, Zhang and Kluger 2022",
        needs_sigma=True,
    ),
    SCALE: Rule(
        _scale,
        "differences of two checkpoints: weights between base and fine-tune, Wortsman et al. 2022 (WiSE-FT)",
        needs_sigma=True,
        argument="C",
        sample="scale:0.5",
        calibrated=False,
        valid=lambda x: 0 <= x < 1,
        expected="a number from 0, which is the base, to under 1, which is the fine-tune",
    ),
    "energy": Rule(
        _energy, "common practice", argument="X", sample="energy:0.9", any_metric=True, calibrated=False, **_SHARE
    ),
    "fraction": Rule(
        _fraction,
        "LASER, Sharma et al. 2023 (arXiv 2312.13558)",
        any_metric=True,
        argument="RHO",
        sample="fraction:0.3",
        calibrated=False,
        **_SHARE,
    ),
    "rank": Rule(
        _rank,
        "a fixed rank",
        any_metric=True,
        argument="K",
        sample="rank:3",
        calibrated=False,
        valid=lambda x: x >= 0 and float(x).is_integer(),
        expected="a whole number, 0 or more",
    ),
}


NO_DIFFERENCE = (
    "rules rounding and scale are for differences of two checkpoints, whose noise is known; try laser delta BASE "
    "TUNED, laser run TUNED --base BASE, or the rule mp-edge"
)
# By `laser null` unless it is asked for others.
TESTED = ("laser-rmt", "mp-edge", "mp-median", "mp-iqr", "tracy-widom", "gavish-donoho", "bema")
BY_DATA = "data:"  # before a rule that is asked of the values in the metric of the data


def metric_in(asked: str) -> str:
    """In which metric a rule is asked: "data" for `data:NAME`, else "plain"."""
    return "data" if asked.startswith(BY_DATA) else "plain"


def by_data(asked: str) -> bool:
    """Whether a rule is asked of the values in the metric of the data."""
    return asked.startswith(BY_DATA)


def rule_in(asked: str) -> str:
    """The rule that is asked in whatever metric. Raises UsageError where it does not exist, or not in that metric."""
    spec = asked.removeprefix(BY_DATA)
    if by_data(asked) and not parse_rule(spec)[0].any_metric:
        able = ", ".join(name for name, row in RULES.items() if row.any_metric)
        raise UsageError(
            f"rule {spec!r} supposes noise that is the same in all directions, and in the metric of the data no noise "
            f"is; try one of {able}"
        )
    return spec


def parse_rule(spec: str) -> tuple[Rule, float]:
    """`NAME` or `NAME:ARGUMENT` to a row of RULES and its argument. Raises UsageError with the whole list."""
    name, _, text = spec.partition(":")
    if spec.startswith(BY_DATA):
        raise UsageError(f"{spec!r} is of values by the data, and those of the weights are shown here; try {text}")
    if name not in RULES:
        known = ", ".join(n + (f":{r.argument}" if r.argument else "") for n, r in RULES.items())
        raise UsageError(f"no rule is called {name!r}; try one of {known}")
    rule = RULES[name]
    if rule.argument is None:
        if text:
            raise UsageError(f"rule {name!r} takes no argument, found {text!r}; try {name} alone")
        return rule, 0.0
    if not text and rule.default is not None:
        return rule, rule.default
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not rule.valid(value):
        raise UsageError(f"rule {name!r} needs {rule.expected}, found {text!r}; try {name}:{rule.argument}")
    return rule, value


def scale_in(spec: str) -> float | None:
    """C of the rule `scale:C`; None for every other rule. Raises UsageError as `parse_rule`."""
    rule, argument = parse_rule(spec.removeprefix(BY_DATA))
    return argument if rule is RULES[SCALE] else None


def draws_needed(asked: str, of_difference: bool = False) -> int:
    """How many permutations of each matrix a rule asks a scan for; 0 for most.

    Raises UsageError as `rule_in`, and for a rule that no scan of one checkpoint can serve.
    """
    rule, argument = parse_rule(rule_in(asked))
    if rule.needs_sigma and not of_difference:  # which no scan of one checkpoint knows
        raise UsageError(NO_DIFFERENCE)
    return fewest_draws(argument) if rule.needs_null else 0


def apply_rule(spec: str, s: Spectrum, shape: Shape, null: Spectrum | None = None, sigma: float | None = None) -> Cut:
    """The cut that rule `spec` makes in singular values `s` (p,), descending, of a matrix of `shape` (m, n).

    null: (draws,) largest singular values of the permuted matrix, for the rules that ask for them. sigma: the level of
    the noise where it is known, as in differences of two checkpoints. Raises UsageError where a rule asks for what it
    does not get.
    """
    rule, argument = parse_rule(spec)
    if len(s) == 0 or s[0] == 0:
        return Cut(0, 0.0, 0.0, "zero matrix")
    u = unit_of(s)  # squares of what follows stay in range
    s = s / u
    if rule.needs_null:
        cut = rule.cut(np.empty(0) if null is None else null / u, shape, argument)
        cut = _above(s, cut.threshold or 0.0, cut.reason)
    elif rule.needs_sigma:
        if sigma is None:
            raise UsageError(NO_DIFFERENCE)
        cut = rule.cut(s, shape, sigma / u)
    else:
        cut = rule.cut(s, shape, argument)
    threshold, sigma = (None if x is None else x * u for x in (cut.threshold, cut.sigma))
    found = None if cut.noise is None else replace(cut.noise, sigma=cut.noise.sigma * u)
    return replace(cut, threshold=threshold, sigma=sigma, noise=found)


def energy_share(s: Spectrum, gains: Spectrum | NDArray[np.bool_]) -> float:
    """sum((g s)^2) / sum(s^2) for singular values `s` (p,), not all 0, and what becomes of each, `gains` (p,)."""
    s = s / unit_of(s)
    return float(np.sum((gains * s) ** 2)) / float(np.sum(s**2))


def crowd(spec: str, s: Spectrum, shape: Shape) -> int | None:
    """How many values of `s` (p,) stand out as spikes, where they are more than rule `spec` can bear; else None.

    The estimates of `mp-iqr` and `bema` read the spectrum up to its 0.75 and 0.8 quantile. With more spikes than the
    rest of it they read spikes as noise, and the threshold leaps over most of them. Spikes are counted by the trimmed
    median, which bears half of the spectrum. Rows of very unequal variance stand out like spikes, and such noise is
    what `bema` is for: of it no more is said than where its own law does not fit. Fewer than BEMA_FEWEST values are not
    asked. Alarms on pure noise and hits on planted spikes are in docs/log.
    """
    rule, _ = parse_rule(spec)
    if rule.reads is None or rule.estimator is None or len(s) < noise.BEMA_FEWEST or s[0] == 0:
        return None
    if rule.estimator == "iqr" and not _iqr_tells(shape):  # then it is the median's
        return None
    spikes = noise.estimate_noise(s, shape, "trimmed").signals
    if spikes <= (1 - rule.reads) * len(s) + 1e-9:
        return None
    if rule.estimator == "bema" and fit_noise(s, shape, "bema").level > UNFIT:
        return None
    return spikes


def _iqr_tells(shape: Shape) -> bool:
    """Whether the error of an IQR is within the bulk's relative half-width, sqrt(beta)."""
    return standard_error(shape, "iqr") <= mp.aspect(shape)[2] ** 0.5


def signal_to_noise(s: Spectrum, rank: int) -> float | None:
    """sum(s > t) / sum(s <= t) (LaserRMT). None, not infinite, where nothing is at or below the threshold."""
    s = s / unit_of(s)  # a sum may leave the range, too
    noise_sum = float(s[rank:].sum())
    return float(s[:rank].sum()) / noise_sum if noise_sum > 0 else None
