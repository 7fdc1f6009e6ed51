"""Rules whose estimate reads spikes as noise where there are many: they say so, and on pure noise they do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import laser
from laser.checkpoint.matrices import Matrix
from laser.checkpoint.source import Source
from laser.errors import CrowdWarning
from laser.spectra import Spectra
from laser.spectral.noise import gamma_spectrum, gaussian_spectrum
from laser.spectral.rules import apply_rule, crowd
from laser.summary import summarise

SHAPE = (192, 576)
RULES = ("mp-iqr", "bema")


def planted(count: int, seed: int = 0) -> np.ndarray:
    """Singular values of unit noise with `count` spikes, 1.5 to 10 times the unit of the law."""
    random = np.random.default_rng(seed)
    m, n = SHAPE
    U, V = (np.linalg.qr(random.standard_normal((side, max(count, 1))))[0][:, :count] for side in (m, n))
    spikes = (U * (n**0.5 * random.uniform(1.5, 10, count))) @ V.T
    return np.linalg.svd(random.standard_normal(SHAPE) + spikes, compute_uv=False)


@pytest.mark.slow
def test_sixty_spikes_of_192_are_seen_and_said() -> None:
    for seed in range(2):
        s = planted(60, seed)
        for rule in RULES:
            assert apply_rule(rule, s, SHAPE).rank < 40  # wrong,
            found = crowd(rule, s, SHAPE)  # and said to be
            assert found is not None and 50 <= found <= 60
        assert apply_rule("mp-edge", s, SHAPE).rank >= 50 and crowd("mp-edge", s, SHAPE) is None


@pytest.mark.slow
def test_few_spikes_are_found_without_a_word() -> None:
    for count in (0, 5, 20):
        for rule in RULES:
            assert crowd(rule, planted(count), SHAPE) is None
            assert abs(apply_rule(rule, planted(count), SHAPE).rank - count) <= 1


@pytest.mark.parametrize("shape", [(8, 16), (32, 48), (64, 64), SHAPE])
def test_pure_noise_is_never_crowded(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(2)
    assert not any(crowd(rule, gaussian_spectrum(*shape, random), shape) for _ in range(100) for rule in RULES)


@pytest.mark.slow
def test_noise_of_unequal_variances_is_left_to_bema() -> None:
    random = np.random.default_rng(3)
    alarms = sum(crowd("bema", gamma_spectrum(40, 80, 2.0, random), (40, 80)) is not None for _ in range(6))
    assert alarms <= 1  # a fit under the level of 1 in 100


def record(s: np.ndarray) -> Spectra:
    matrix = Matrix("model.layers.0.self_attn.q_proj.weight", "q", 0, None, SHAPE, "F32", "q")
    return Spectra(Source("x", "0", 192 * 576), (matrix,), {matrix.name: s}, {}, "gram", "cpu float64")


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_plan_and_table_say_so(rule: str, tmp_path: Path, run: object) -> None:
    with pytest.warns(CrowdWarning, match="q_proj.weight .* of 192.*try mp-edge in its place"):
        plan = laser.make_plan(record(planted(60)), rule)
    assert "of 192 values stand out, more than this rule can tell from noise" in plan.lines[0].why.text
    with pytest.warns(CrowdWarning, match="try mp-edge in its place"):
        summarise(record(planted(60)), rule)
    record(planted(60)).save(tmp_path / "s")
    for words in (
        ("plan", tmp_path / "s", "-o", tmp_path / "p", "--rule", rule),
        ("spectra", tmp_path / "s", "--rule", rule),
    ):
        code, _, error = run(*words)  # pyright: ignore[reportCallIssue]
        assert code == 0 and f"laser: warning: rule {rule} takes spikes for noise" in error
