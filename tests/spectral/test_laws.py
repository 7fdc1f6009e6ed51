"""Laws that every rule obeys. A rule added to RULES is tested here by being there, as the last test shows."""

from functools import cache

import numpy as np
import pytest
from conftest import sampled
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from laser.errors import UsageError
from laser.spectral import noise
from laser.spectral.rules import RULES, Cut, Rule, apply_rule, gavish_donoho_lambda, parse_rule, signal_to_noise

SHAPES = [(128, 128), (128, 192), (128, 512), (40, 640), (600, 128)]


def specs(*, calibrated: bool = False) -> list[str]:
    """Every rule as these laws ask for it, or those alone that must keep next to nothing of noise.

    `parallel` looks at the permuted matrix besides the spectrum: its laws are in test_permutation.py. `rounding` is
    told the level of the noise: its laws are in delta/test_whitening.py.
    """
    asked = {
        name: rule
        for name, rule in RULES.items()
        if not (rule.needs_null or rule.needs_sigma) and rule.calibrated >= calibrated
    }
    return [rule.sample or name for name, rule in asked.items()]


every_rule = pytest.mark.parametrize("spec", specs())
every_calibrated_rule = pytest.mark.parametrize("spec", specs(calibrated=True))
shapes = st.tuples(st.integers(1, 24), st.integers(1, 24))


def spectrum(W: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.linalg.svd(W, compute_uv=False), dtype=np.float64)


def matrix(shape: tuple[int, int], seed: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal(shape)


@cache
def of_noise(shape: tuple[int, int], seed: int) -> NDArray[np.float64]:
    """For every rule the same draws."""
    return spectrum(matrix(shape, seed))


@cache
def of_spikes(shape: tuple[int, int]) -> NDArray[np.float64]:
    rng = np.random.default_rng(11)
    left, _ = np.linalg.qr(rng.standard_normal((shape[0], 5)))
    right, _ = np.linalg.qr(rng.standard_normal((shape[1], 5)))
    edge = shape[0] ** 0.5 + shape[1] ** 0.5
    return spectrum(rng.standard_normal(shape) + left @ np.diag([2.0, 2.2, 2.5, 3.0, 4.0]) @ right.T * edge)


@pytest.mark.slow
@every_rule
@given(shape=shapes, seed=st.integers(0, 99), scale=st.floats(1e-6, 1e6))
@settings(max_examples=40, deadline=None)
def test_scaling_the_matrix_scales_the_threshold_and_leaves_the_rank(
    spec: str, shape: tuple[int, int], seed: int, scale: float
) -> None:
    s = spectrum(matrix(shape, seed))
    one, scaled = apply_rule(spec, s, shape), apply_rule(spec, s * scale, shape)
    if one.threshold is not None and np.abs(s - one.threshold).min() < 1e-9 * s[0]:
        return  # a value on the threshold may fall either way in rounding
    assert scaled.rank == one.rank
    if one.threshold is not None and scaled.threshold is not None:
        assert scaled.threshold == pytest.approx(one.threshold * scale, rel=1e-9, abs=1e-300)


@pytest.mark.slow
@every_rule
@given(shape=shapes, seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_transposing_changes_nothing_and_rank_is_in_range(spec: str, shape: tuple[int, int], seed: int) -> None:
    s = spectrum(matrix(shape, seed))
    cut = apply_rule(spec, s, shape)
    assert cut == apply_rule(spec, s, (shape[1], shape[0]))
    assert 0 <= cut.rank <= min(shape)
    assert cut.reason


@every_rule
@given(shape=shapes)
@settings(max_examples=15, deadline=None)
def test_zero_matrix_has_rank_zero(spec: str, shape: tuple[int, int]) -> None:
    assert apply_rule(spec, np.zeros(min(shape)), shape).rank == 0


@pytest.mark.slow
@every_rule
def test_rank_counts_the_values_above_the_threshold(spec: str) -> None:
    shape = (60, 90)
    W = matrix(shape, 3)
    W[:, :4] *= 6
    cut = apply_rule(spec, spectrum(W), shape)
    if cut.threshold is not None:
        assert cut.rank == int((spectrum(W) > cut.threshold).sum())


@pytest.mark.slow
@pytest.mark.parametrize("shape", sampled(SHAPES, 4))
@every_calibrated_rule
def test_pure_noise_keeps_at_most_two(spec: str, shape: tuple[int, int]) -> None:
    kept = [apply_rule(spec, of_noise(shape, seed), shape).rank for seed in range(20)]
    # mp-iqr is the noisy one: an interquartile range of a narrow law (small p / q) says little about its width.
    assert max(kept) <= (min(shape) // 5 if parse_rule(spec)[0].estimator == "iqr" else 2)


def test_laser_rmt_keeps_what_the_field_reports_of_pure_noise() -> None:
    """The documented exception: 24 % of a square matrix and everything at 1:4 (PEERS measured 23.7 and 100 %)."""
    square, wide = spectrum(matrix((512, 512), 0)), spectrum(matrix((256, 1024), 0))
    assert apply_rule("laser-rmt", square, (512, 512)).rank / 512 == pytest.approx(0.237, abs=0.01)
    assert apply_rule("laser-rmt", wide, (256, 1024)).rank == 256


@pytest.mark.slow
def test_tracy_widom_finds_something_in_about_alpha_of_the_draws() -> None:
    shape, draws = (100, 300), 300
    found = sum(apply_rule("tracy-widom:0.1", spectrum(matrix(shape, i)), shape).rank > 0 for i in range(draws))
    # 0.1 +- three standard errors of a binomial, widened by what estimating sigma by the median adds.
    assert 0.03 <= found / draws <= 0.19


@pytest.mark.parametrize("shape", sampled(SHAPES, 4))
@every_calibrated_rule
def test_planted_spikes_are_counted(spec: str, shape: tuple[int, int]) -> None:
    assert apply_rule(spec, of_spikes(shape), shape).rank in (5, 6)


@pytest.mark.parametrize("shape", SHAPES)
def test_sigma_is_recovered_within_four_percent(shape: tuple[int, int]) -> None:
    for seed in range(10):
        s = spectrum(0.02 * matrix(shape, seed))
        assert noise.sigma_median(s, shape) == pytest.approx(0.02, rel=0.04)
        assert noise.sigma_iqr(s, shape) == pytest.approx(0.02, rel=0.15)  # the IQR of 40 values is noisy


def test_thresholds_against_the_formulas_written_out() -> None:
    """The slow obvious reference, with the published constants of square matrices."""
    s = np.linspace(10, 0.1, 100)
    assert apply_rule("gavish-donoho", s, (100, 100)).threshold == pytest.approx(2.858362424 * np.median(s), rel=1e-8)
    low, high = np.percentile(s, 25), np.percentile(s, 75)
    assert apply_rule("laser-rmt", s, (100, 400)).threshold == pytest.approx((high - low) / 1.349 * 1.5)
    sigma = np.median(s) / (0.8079455065990158 * 10)
    assert apply_rule("mp-edge", s, (100, 100)).threshold == pytest.approx(sigma * 20, rel=1e-9)
    assert gavish_donoho_lambda(1.0) == pytest.approx(4 / 3**0.5)


def test_fixed_ranks() -> None:
    s = np.array([4.0, 2.0, 1.0, 1.0])
    assert [apply_rule(f"fraction:{x}", s, (4, 4)).rank for x in (0.1, 0.5, 0.74, 1)] == [1, 2, 2, 4]
    assert [apply_rule(f"rank:{k}", s, (4, 4)).rank for k in (0, 3, 9)] == [0, 3, 4]
    assert [apply_rule(f"energy:{x}", s, (4, 4)).rank for x in (0.5, 16 / 22, 0.73, 1)] == [1, 1, 2, 4]
    assert apply_rule("fraction:0.29", np.ones(100), (100, 100)).rank == 29


def test_signal_to_noise_is_undefined_and_not_infinite() -> None:
    s = np.array([3.0, 2.0, 1.0])
    assert signal_to_noise(s, 1) == 1.0
    assert signal_to_noise(s, 3) is None


@pytest.mark.parametrize(
    "spec, message",
    [
        ("mp", "no rule is called 'mp'"),
        ("data:energy:0.9", "is of values by the data, and those of the weights are shown here; try energy:0.9"),
        ("mp-edge:3", "takes no argument"),
        ("energy", "needs a number in"),
        ("energy:1.5", r"needs a number in \(0, 1\], found '1.5'"),
        ("rank:2.5", "whole number"),
        ("tracy-widom:nan", "level between 0 and 1"),
        ("fraction:x", "try fraction:RHO"),
    ],
)
def test_bad_rules_are_explained(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_rule(spec)


def test_default_argument() -> None:
    assert parse_rule("tracy-widom")[1] == 0.05


def test_a_rule_joins_by_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibrated rule and one with an argument, each added by one row: the laws know how to ask for them."""

    def half(s: NDArray[np.float64], shape: tuple[int, int], share: float) -> Cut:
        return Cut(int(share * len(s)), None, None, "a share of them")

    # The table is where a rule is added.
    monkeypatch.setitem(RULES, "none", Rule(lambda s, shape, _: Cut(0, 2 * s[0], None, "none"), "here"))
    row = Rule(half, "here", argument="X", sample="share:0.5", calibrated=False)
    # As above.
    monkeypatch.setitem(RULES, "share", row)
    assert specs()[-2:] == ["none", "share:0.5"] and specs(calibrated=True)[-1] == "none"
    for spec in ("none", "share:0.5"):
        test_scaling_the_matrix_scales_the_threshold_and_leaves_the_rank(spec)  # pyright: ignore[reportCallIssue]
        test_transposing_changes_nothing_and_rank_is_in_range(spec)  # pyright: ignore[reportCallIssue]
        test_zero_matrix_has_rank_zero(spec)  # pyright: ignore[reportCallIssue]
        test_rank_counts_the_values_above_the_threshold(spec)
    test_pure_noise_keeps_at_most_two("none", SHAPES[0])
    # As above.
    monkeypatch.setitem(RULES, "all", Rule(lambda s, shape, _: Cut(len(s), 1.0, None, "all"), "here"))
    for law in (test_pure_noise_keeps_at_most_two, test_planted_spikes_are_counted):
        with pytest.raises(AssertionError):  # and would tell that this one is not calibrated
            law("all", SHAPES[0])
