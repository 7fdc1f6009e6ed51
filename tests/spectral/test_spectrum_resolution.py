"""The same ranks in float64, float32 and by the projector, or a record that says "at the threshold"."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from laser.checkpoint.reader import open_checkpoint
from laser.pipeline import scan
from laser.plan import make_plan
from laser.selection import Selection
from laser.spectral.devices import HOST
from laser.spectral.gram import gram, values_by_gram
from laser.spectral.projector import UNRESOLVED, matrix_sign
from laser.spectral.rules import RULES, Cut, apply_rule
from laser.spectral.spectrum import at_threshold, precision_of, value_errors

SINGLE = replace(HOST, dtype=torch.float32)
EPS = 2.0**-23


def spec_of(name: str) -> str:
    return RULES[name].sample or name


def weights(seed: int, shape: tuple[int, int] = (96, 64), spikes: int = 6) -> torch.Tensor:
    random = np.random.default_rng(seed)
    signal = random.standard_normal((shape[0], spikes)) @ random.standard_normal((spikes, shape[1]))
    return torch.from_numpy(random.standard_normal(shape) + 0.3 * signal).to(torch.bfloat16)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("strength", [0, 1, 10, 80])
def test_errors_stay_within_what_is_stated(seed: int, strength: float) -> None:
    random = np.random.default_rng(seed)
    W = random.standard_normal((160, 96))
    W += strength * 22 * np.outer(random.standard_normal(160), random.standard_normal(96)) / math.sqrt(160 * 96)
    W16 = torch.from_numpy(W).to(torch.bfloat16)
    exact, single = values_by_gram(W16, HOST), values_by_gram(W16, SINGLE)
    assert (np.abs(single - exact) <= value_errors(exact, EPS)).all()
    assert (np.abs(values_by_gram(W16, HOST) - exact) <= value_errors(exact, 2.0**-52)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_a_rank_that_changes_was_said_to_be_near(name: str) -> None:
    """Values moved by the stated errors, each its own way: where the rank changes, the record said so."""
    random, said, changed = np.random.default_rng(0), 0, 0
    for seed in range(30):
        W = weights(seed)
        s, null = values_by_gram(W, SINGLE), np.linspace(12, 19, 19)
        cut = apply_rule(spec_of(name), s, (96, 64), null, 1.0)
        if seed % 2:  # plant a value on the threshold, or one so large that just this share of the energy is met
            if cut.threshold is not None:
                s[cut.rank] = cut.threshold * (1 - 1e-7)
            elif name == "energy":
                s[0] = math.sqrt(9 * (s[9:] ** 2).sum() - (s[1:9] ** 2).sum())
            s = np.sort(s)[::-1]
            cut = apply_rule(spec_of(name), s, (96, 64), null, 1.0)
        near = at_threshold(spec_of(name), s, cut, EPS)
        moved = np.sort(s + 0.5 * value_errors(s, EPS) * random.choice([-1, 1], len(s)))[::-1]
        different = apply_rule(spec_of(name), moved, (96, 64), null, 1.0).rank != cut.rank
        said, changed = said + bool(near), changed + different
        assert near or not different
        assert near == "" or near.startswith("at the threshold: ")
    assert changed <= said < 30 and (said == 0) == (name in ("fraction", "rank"))


def test_an_energy_that_is_just_met_is_near() -> None:
    s = np.array([3.0, 2.0, 2.0, 1.0])
    share = 13 / 18
    assert "rank 2 has the energy" in at_threshold(f"energy:{share}", s, Cut(2, None, None, ""), EPS)
    assert at_threshold("energy:0.9", s, Cut(3, None, None, ""), EPS) == ""
    assert at_threshold("mp-edge", np.zeros(4), Cut(0, 0.0, 0.0, ""), EPS) == ""


def test_precision_of_a_record() -> None:
    assert precision_of("cuda float32", "gram") == precision_of("mps float32", "projector") == EPS
    assert precision_of("cpu float32 values:0=numpy vectors:0=numpy", "gram") == EPS
    assert precision_of("cuda float64", "gram") == precision_of("mps float32", "svd") == 2.0**-52


@pytest.mark.slow
def test_the_pico_model_has_the_same_ranks_everywhere(pico: Path) -> None:
    checkpoint, one = open_checkpoint(pico), Selection(layers=(1,))  # the others are draws of the same kind
    double, single = (scan(checkpoint, one, device=device, null_draws=19) for device in (HOST, SINGLE))
    compared = 0
    for name in (name for name, rule in RULES.items() if not rule.needs_sigma):
        plans = [make_plan(spectra, spec_of(name)) for spectra in (double, single)]
        for exact, rough in zip(plans[0].lines, plans[1].lines, strict=True):
            near = "at the threshold" in rough.why.text
            assert "at the threshold" not in exact.why.text
            assert exact.rank == rough.rank or near
            if exact.threshold and not near and exact.rank is not None:  # the projector counts without an eigensolver
                sign = matrix_sign(gram(checkpoint.read(exact.name), SINGLE), exact.threshold)
                assert abs(sign.unresolved) > UNRESOLVED or round(sign.positive) == exact.rank
                compared += abs(sign.unresolved) <= UNRESOLVED
    assert compared > 35
