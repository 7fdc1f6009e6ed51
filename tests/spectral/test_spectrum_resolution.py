"""The same ranks in float64, float32 and by the projector, or a record that says "at the threshold"."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import LIKE_MPS, Accelerator, tensor_cores

from laser.checkpoint.reader import open_checkpoint
from laser.engine.crew import Crew
from laser.flow import run_flow
from laser.pipeline import run_of_scan, scan
from laser.plan import Plan, Treatment, make_plan
from laser.selection import Selection
from laser.spectra import Spectra
from laser.spectral import factorise as factorise_module
from laser.spectral import gram as gram_module
from laser.spectral.devices import HOST, Device, choose_device, products_in_float32
from laser.spectral.factorise import Values, factorise, measure, truncate
from laser.spectral.gram import TENSOR_SIDE, gram, values_by_gram
from laser.spectral.projector import UNRESOLVED, matrix_sign
from laser.spectral.rules import RULES, Cut, apply_rule
from laser.spectral.shrinkage import Gains
from laser.spectral.spectrum import at_threshold, doubt_by, precision_of, squared_error, value_errors

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


@pytest.mark.parametrize("rows", [160, 3000])
@pytest.mark.parametrize("strength", [0, 10, 80])
def test_what_tensor_cores_cut_off_is_little_beside_it(
    monkeypatch: pytest.MonkeyPatch, rows: int, strength: float
) -> None:
    """Their sums are cut off instead of rounded, which adds up in the diagonal, and wherever a spike is."""
    random = np.random.default_rng(rows)
    W = random.standard_normal((rows, 64))
    W += strength * 3 * np.outer(random.standard_normal(rows), random.standard_normal(64)) / math.sqrt(64)
    W16, single = torch.from_numpy(W).to(torch.bfloat16), Accelerator("cpu", torch.float32, False, "with tensor cores")
    exact = gram(W16, HOST).numpy()
    # They are CUDA's.
    monkeypatch.setattr(gram_module, "products_in_float32", lambda device, storage: storage == torch.bfloat16)
    monkeypatch.setattr(torch, "mm", tensor_cores())
    rounded = gram(W16, single).double().numpy()
    # A side that would take minutes here.
    monkeypatch.setattr(gram_module, "TENSOR_SIDE", 64)
    cut = gram(W16, single).double().numpy()
    size = np.linalg.norm(exact, 2)
    assert np.linalg.norm(rounded - exact, 2) < 5e-7 * size and not np.array_equal(cut, rounded)
    assert np.linalg.norm(cut - exact, 2) < squared_error(np.full(TENSOR_SIDE, math.sqrt(size)), EPS) / 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, which is not here")
@pytest.mark.parametrize("strength", [0, 10, 80])
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16])
def test_errors_on_real_tensor_cores_stay_within_it(strength: float, storage: torch.dtype) -> None:
    single, random = choose_device("cuda", "float32"), np.random.default_rng(0)
    assert products_in_float32(single, storage), "this chip or torch has none"
    W = random.standard_normal((4096, 1024))
    W += strength * 12 * np.outer(random.standard_normal(4096), random.standard_normal(1024)) / 64
    W16 = torch.from_numpy(W / 64).to(storage)
    exact, found = values_by_gram(W16, HOST), values_by_gram(W16.to("cuda"), single)
    assert (np.abs(found - exact) <= value_errors(exact, EPS)).all()


# --- what is not sure in float32 is measured again in float64 ---------------------------------------------------------


def settled(W: torch.Tensor, device: Device, rule: str, null: np.ndarray) -> tuple[int, Values]:
    shape = (W.shape[0], W.shape[1])
    found = measure(W, device, "gram", doubt_by((rule,), shape, null))
    return apply_rule(rule, found.singular_values, shape, null).rank, found


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if not rule.needs_sigma])
@pytest.mark.parametrize("device", [SINGLE, LIKE_MPS, Accelerator("cpu", torch.float32, False, "")])
@pytest.mark.slow
def test_the_rank_in_float32_is_that_of_float64(device: Device, name: str) -> None:
    rule, again = spec_of(name), 0
    for seed in range(12):
        W, null = weights(seed, spikes=2 + seed % 5), np.linspace(12, 19, 19)
        exact = values_by_gram(W, HOST)
        rank, found = settled(W, device, rule, null)
        assert rank == apply_rule(rule, exact, (96, 64), null).rank
        if found.note:
            again += 1
            assert found.method == ("gram on the host" if device is LIKE_MPS else "gram float64")
            assert found.note.startswith("gram: at the threshold: ") and np.allclose(found.singular_values, exact)
            assert precision_of("cuda float32", "gram", found.step) == 2.0**-52
        else:
            assert found.method == "gram" and precision_of("cuda float32", "gram", found.step) == EPS
    assert again < 12 or name == "laser-rmt"


def test_a_value_on_the_threshold_sends_a_matrix_to_float64_and_no_other() -> None:
    W = weights(0)
    s = values_by_gram(W, HOST)
    share = float(np.sum(s[:7] ** 2) / np.sum(s**2))
    rank, found = settled(W, SINGLE, f"energy:{share!r}", np.empty(0))
    assert found.method == "gram float64" and "rank 7 has the energy" in found.note
    assert rank == apply_rule(f"energy:{share!r}", s, (96, 64)).rank
    assert settled(W, SINGLE, "energy:0.9", np.empty(0))[1].note == ""
    assert settled(W, HOST, f"energy:{share!r}", np.empty(0))[1].note == ""  # there is nothing beyond float64
    for rule in (f"data:energy:{share!r}", "parallel"):  # of other values; and the plan says what it lacks
        assert doubt_by((rule,), (96, 64), np.empty(0))(s, EPS) == ""


@pytest.mark.parametrize(("off", "slack"), [(0.0, 1), (0.9, 1), (1.5, 2), (3.0, 4), (9.0, 16)])
def test_a_device_whose_eigensolver_loses_more_is_believed_less(
    monkeypatch: pytest.MonkeyPatch, off: float, slack: float
) -> None:
    card, asked = Accelerator("cpu", torch.float32, False, "with a LAPACK of its own"), []

    def eigenvalues(G: torch.Tensor, device: Device) -> np.ndarray:
        exact = np.linalg.eigvalsh(G.double().numpy())
        return exact + off * math.sqrt(len(exact)) * EPS * exact[-1] * (device.dtype == torch.float32)

    def doubt(s: np.ndarray, eps: float) -> str:
        asked.append(eps)
        return ""

    # Another library than the one that is here, and a side that takes no time.
    monkeypatch.setattr(factorise_module, "eigenvalues", eigenvalues)
    monkeypatch.setattr(factorise_module, "SLACK_SIDE", 64)
    factorise_module.eigensolver_slack.cache_clear()
    for device in (card, replace(card, share=1 << 30), SINGLE, LIKE_MPS, replace(card, dtype=torch.float64)):
        measure(weights(0), device, "gram", doubt)
    factorise_module.eigensolver_slack.cache_clear()
    assert asked == [slack * EPS, slack * EPS, EPS, EPS]  # float64 is not asked about


@pytest.mark.parametrize("device", [SINGLE, LIKE_MPS])
@pytest.mark.parametrize("method", ["gram", "projector"])
def test_what_is_not_sure_is_cut_in_float64(device: Device, method: str) -> None:
    W, asked = weights(0), []

    def decide(s: np.ndarray) -> Gains:
        asked.append(s)
        return Gains(3)

    found = factorise(W, decide, device, method, doubt=lambda s, eps: "at the threshold: so it is said").truncation
    exact = truncate(W, 3, HOST).matrix
    assert found is not None and torch.equal(found.matrix, exact) and len(asked) == 1
    assert found.certificate.method == ("gram on the host" if device is LIKE_MPS else "gram float64")
    assert found.certificate.note == f"{method}: at the threshold: so it is said"  # no other step in float32 is tried


def test_a_scan_that_knows_the_rules_leaves_none_at_the_threshold(pico: Path, tmp_path: Path) -> None:
    checkpoint, chosen = open_checkpoint(pico), Selection(layers=(1,), roles=("q", "w1"))
    s = values_by_gram(checkpoint.read("model.layers.1.self_attn.q_proj.weight"), HOST)
    rule = f"energy:{(1 - 1e-9) * float(np.sum(s[:7] ** 2) / np.sum(s**2))!r}"  # met, as float64 can tell
    exact = make_plan(scan(checkpoint, chosen, device=HOST), rule)
    blind, knowing = (scan(checkpoint, chosen, device=SINGLE, rules=rules) for rules in ((), (rule,)))
    near = {line.name for line in make_plan(blind, rule).lines if "at the threshold" in line.why.text}
    assert near and {name for name, note in knowing.notes.items() if "at the threshold" in note} == near
    found = make_plan(knowing, rule)
    assert not any("at the threshold" in line.why.text for line in found.lines)
    assert [line.rank for line in found.lines] == [line.rank for line in exact.lines]
    knowing.save(tmp_path / "spectra")
    assert Spectra.load(tmp_path / "spectra").notes == knowing.notes
    single, double = Crew((SINGLE,)), Crew((HOST,))
    asked, plain = (
        [run_of_scan(checkpoint, chosen, crew, "gram", 0, None, rules) for rules in (("a", "b"), ())]
        for crew in (single, double)
    )
    assert asked[0]["rules"] == ["a", "b"] and "rules" not in asked[1] and plain[0] == plain[1]


def test_one_pass_settles_what_is_not_sure(pico: Path, tmp_path: Path) -> None:
    checkpoint, chosen = open_checkpoint(pico), Selection(layers=(1,), roles=("q", "w1"))
    s = values_by_gram(checkpoint.read("model.layers.1.self_attn.q_proj.weight"), HOST)
    rule = f"energy:{(1 - 1e-9) * float(np.sum(s[:7] ** 2) / np.sum(s**2))!r}"  # met, as float64 can tell

    def planned(spectra: Spectra) -> Plan:
        return make_plan(spectra, rule, chosen)

    made = [
        run_flow(checkpoint, tmp_path / name, chosen, planned, crew=Crew((device,)), treatment=Treatment(rule))
        for name, device in (("double", HOST), ("single", SINGLE))
    ]
    exact, found = ([line.rank for line in each.plan.lines] for each in made)
    assert exact == found
    notes = [record.get("note") or "" for record in made[1].outcome.matrices.values()]
    assert any(note.startswith("gram: at the threshold") for note in notes)
    assert not any("at the threshold" in line.why.text for line in made[1].plan.lines)


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
    assert changed <= said < 30 and (said == 0) == (name in ("fraction", "rank", "scale"))


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
