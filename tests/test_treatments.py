"""Plans that shrink, cut on two sides, demand a fit or rest on permutations: from scan to verified weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import laser
from laser import pipeline
from laser.engine.crew import Crew
from laser.errors import RecordError, UsageError
from laser.pipeline import reduce, scan, scan_into
from laser.plan import Plan, make_plan
from laser.selection import Selection
from laser.spectra import Spectra
from laser.spectral import permutation
from laser.spectral.devices import HOST
from laser.spectral.shrinkage import Gains
from laser.verification import verify

TREATMENTS = {
    "bema": {},
    "parallel:0.1": {},
    "mp-edge": {"shrink": "frobenius"},
    "laser-rmt": {"shrink": "operator", "two_sided": True},
    "rank:4": {"two_sided": True},
    "fraction:1": {"shrink": "nuclear"},  # every value kept by the rule, those in the bulk taken to 0 by the shrinker
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", TREATMENTS)
def test_from_scan_to_verified_weights(pico: Path, tmp_path: Path, rule: str) -> None:
    checkpoint = laser.open_checkpoint(pico)
    scan(checkpoint, Selection(layers=(1,)), null_draws=9).save(tmp_path / "s")
    spectra = Spectra.load(tmp_path / "s")
    plan = make_plan(spectra, rule, Selection(layers=(1,)), **TREATMENTS[rule])
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    outcome = reduce(checkpoint, Plan.load(tmp_path / "plan.json"), tmp_path / "out")
    assert len(plan.reductions) == 16 and verify(checkpoint, tmp_path / "out").problems == ()
    for name, line in plan.reductions.items():
        s = spectra.values[name]
        g = line.gains.of(s, checkpoint.tensors[name].shape[:2])  # pyright: ignore[reportArgumentType]
        assert line.rank == np.count_nonzero(g)
        assert line.energy_kept == pytest.approx(float(np.sum((g * s) ** 2) / np.sum(s**2)))
        assert outcome.matrices[name]["energy_kept"] == pytest.approx(line.energy_kept)
        after = torch.linalg.svdvals(laser.open_checkpoint(tmp_path / "out").read(name).double()).numpy()
        assert np.linalg.norm(after - np.sort(g * s)[::-1]) < 0.01 * np.linalg.norm(s)


def test_verify_tells_a_cut_from_a_shrunk_one(pico: Path, tmp_path: Path) -> None:
    checkpoint = laser.open_checkpoint(pico)
    spectra = scan(checkpoint, Selection(roles=("w2",)))
    reduce(checkpoint, make_plan(spectra, "rank:3"), tmp_path / "cut")
    outcome = json.loads((tmp_path / "cut" / "laser.json").read_text())
    for line in outcome["plan"]["lines"]:
        if line["action"] == "reduce":
            line |= {"shrink": "frobenius", "noise": 0.05}
    (tmp_path / "cut" / "laser.json").write_text(json.dumps(outcome))
    problems = verify(checkpoint, tmp_path / "cut").problems
    assert len(problems) >= 12 and all("for rank 3" in p or "beyond rank 3" in p for p in problems)


def test_two_sided_keeps_what_lies_under_the_lower_edge(make_pico: Callable[..., Path]) -> None:
    random = np.random.default_rng(0)
    U, s, Vh = np.linalg.svd(0.05 * random.standard_normal((32, 96)), full_matrices=False)
    s[0], s[-3:] = 4.0, [0.02, 0.01, 0.005]  # one outlier over the bulk, three under it
    tensors = {"model.layers.0.self_attn.q_proj.weight": torch.from_numpy(((U * s) @ Vh).astype(np.float32))}
    spectra = scan(laser.open_checkpoint(make_pico(tensors=tensors, shards=1)))
    one = make_plan(spectra, "gavish-donoho").lines[0]
    two = make_plan(spectra, "gavish-donoho", two_sided=True).lines[0]
    assert (one.rank, one.below) == (1, 0)
    assert (two.rank, two.below) == (4, 3)
    assert two.gains == Gains(1, 3, None, two.noise) and "3 under the lower edge" in two.why.text


@pytest.mark.slow
def test_a_bulk_that_is_no_noise_is_flagged_and_kept_on_demand(make_pico: Callable[..., Path]) -> None:
    random = np.random.default_rng(1)
    noise = random.standard_normal((96, 160))
    rows = np.geomspace(1, 10, 96)[:, None] ** 0.5
    spikes = 90 * np.outer(random.standard_normal(96), random.standard_normal(160)) / 100
    plain, uneven = noise + spikes, rows * noise + spikes
    name = "model.layers.0.self_attn.{}_proj.weight"
    tensors = {name.format(r): torch.from_numpy(W.astype(np.float32)) for r, W in (("k", plain), ("q", uneven))}
    spectra = scan(laser.open_checkpoint(make_pico(tensors=tensors, shards=1)))
    k, q = make_plan(spectra, "mp-edge").lines
    assert k.fit_level is not None and k.fit_level > 0.05 and "not such noise" not in k.why.text
    assert q.fit_level == 0.005 and q.fit is not None and f"distance {q.fit:.3g}, level 0.005" in q.why.text
    assert [line.action for line in (k, q)] == ["reduce", "reduce"]
    plan = make_plan(spectra, "mp-edge", require_fit=0.05)
    assert [line.action for line in plan.lines] == ["reduce", "keep"]
    assert plan.selection["require_fit"] == 0.05 and "not noise at level 0.05" in plan.lines[1].why.text
    # Rows of unequal variance are what BEMA models: it finds the one spike, and its fit is good.
    bema = make_plan(spectra, "bema", require_fit=0.05).lines[1]
    assert (bema.action, bema.rank) == ("reduce", 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shrink": "soft"}, r"--shrink frobenius\|operator\|nuclear"),
        ({"require_fit": 1.5}, "--require-fit 1.5 is not a level"),
        ({"require_fit": 0.0}, "try 0.05"),
    ],
)
def test_treatments_that_do_not_exist(pico: Path, options: dict[str, object], message: str) -> None:
    spectra = scan(laser.open_checkpoint(pico), Selection(roles=("q",)))
    with pytest.raises(UsageError, match=message):
        make_plan(spectra, "mp-edge", **options)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_nulls_are_measured_stored_and_resumed(pico: Path, tmp_path: Path) -> None:
    checkpoint, chosen, journal = laser.open_checkpoint(pico), Selection(roles=("q", "k")), tmp_path / "journal"
    done = 0

    def interrupt(_: object) -> None:
        nonlocal done
        done += 1
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(checkpoint, chosen, null_draws=4, journal=journal, tick=interrupt)
    resumed = scan(checkpoint, chosen, null_draws=4, journal=journal)
    whole = scan(checkpoint, chosen, null_draws=4)
    resumed.save(tmp_path / "a")
    whole.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = Spectra.load(tmp_path / "a")
    assert loaded.nulls.keys() == loaded.values.keys() and all(len(null) == 4 for null in loaded.nulls.values())
    assert scan(checkpoint, chosen).nulls == {}
    with pytest.raises(RecordError, match="null_draws differ"):
        scan(checkpoint, chosen, null_draws=5, journal=journal)
    with pytest.raises(UsageError, match="try --null 19"):
        scan(checkpoint, chosen, null_draws=-1)


@pytest.mark.slow
def test_permutations_in_another_order_are_read_and_not_mixed(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, chosen, path = laser.open_checkpoint(pico), Selection(roles=("q",)), tmp_path / "spectra"
    crew = Crew((HOST,))
    scan_into(path, checkpoint, chosen, crew, "gram", null_draws=4)
    now = Spectra.load(path)
    assert now.null_order == permutation.NULL_ORDER
    stamp = path.stat().st_mtime_ns
    scan_into(path, checkpoint, chosen, crew, "gram", null_draws=4)
    assert path.stat().st_mtime_ns == stamp  # not measured again
    replace(now, null_order=1).save(path)  # as an earlier version left it: its file does not say
    assert b"null_order" not in path.read_bytes()
    assert Spectra.load(path).null_order == 1
    make_plan(Spectra.load(path), "parallel:0.2")
    assert scan_into(path, checkpoint, chosen, crew, "gram", null_draws=4).null_order == permutation.NULL_ORDER
    journal = tmp_path / "journal"
    # A journal as another version leaves it: of what says so nothing else in it would differ.
    monkeypatch.setattr(pipeline, "NULL_ORDER", 1)
    with pytest.raises(KeyboardInterrupt):
        scan(checkpoint, chosen, null_draws=4, journal=journal, tick=interrupted)
    monkeypatch.undo()
    with pytest.raises(RecordError, match="null_order differ"):
        scan(checkpoint, chosen, null_draws=4, journal=journal)


def interrupted(_: object) -> None:
    raise KeyboardInterrupt


def test_a_plan_line_that_keeps_more_than_it_has_is_refused(pico: Path, tmp_path: Path) -> None:
    plan = make_plan(scan(laser.open_checkpoint(pico), Selection(roles=("q",))), "rank:3")
    at = next(i for i, line in enumerate(plan.lines) if line.action == "reduce")
    broken = replace(plan.lines[at], below=4)
    replace(plan, lines=(*plan.lines[:at], broken, *plan.lines[at + 1 :])).save(tmp_path / "p")
    with pytest.raises(RecordError, match=broken.name):
        Plan.load(tmp_path / "p")


def test_heavy_tails_of_the_entries_are_said_in_the_plan(make_pico: Callable[..., Path]) -> None:
    random = np.random.default_rng(1)
    name = "model.layers.0.self_attn.{}_proj.weight"
    drawn = (("k", random.standard_normal((96, 160))), ("q", random.laplace(size=(96, 160))))
    tensors = {name.format(role): torch.from_numpy(W.astype(np.float32)) for role, W in drawn}
    spectra = scan(laser.open_checkpoint(make_pico(tensors=tensors, shards=1)))
    k, q = make_plan(spectra, "laser-rmt").lines
    assert k.edge_shift is not None and abs(k.edge_shift) < 0.1 and "heavy tails" not in k.why.text
    assert q.edge_shift is not None and q.edge_shift > 0.3
    assert f"heavy tails: excess kurtosis {spectra.kurtosis[q.name]:.3g} moves the edge by" in q.why.text
