"""The flow in the metric of the data: through the command line and as a search's family of rules."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import CONTENT, LAYER, windows_of
from conftest import Run
from safetensors.torch import load_file, save_file

import laser
from laser.calibration import calibrate
from laser.checkpoint.quantised import quantise
from laser.errors import NumericalError, UsageError
from laser.evaluation.text import Text, cut_windows, load_tokenizer
from laser.moments import Moments
from laser.plan import Plan
from laser.searching.candidates import cut_of
from laser.selection import Selection
from laser.spectral.data_metric import ByData


@pytest.mark.slow
def test_the_flow_in_the_metric_of_the_data(speaker: Path, tmp_path: Path, text: Path, run: Run) -> None:
    moments, other, spectra, plan, out = (tmp_path / n for n in ("m.safetensors", "f.safetensors", "s", "p", "out"))
    windows = ("--text", text, "--window", 64, "--layers", "1-2")
    code, told, error = run("calibrate", speaker, "-o", moments, *windows, "--windows", 6)
    assert code == 0 and "fewest tokens" in told, error
    assert run("calibrate", speaker, "-o", other, *windows, "--windows", 6, "--skip", 6)[0] == 0
    code, _, error = run("scan", speaker, "-o", spectra, "--layers", "1-2", "--moments", moments, "--null", 19)
    assert code == 0, error
    measured = laser.Spectra.load(spectra)
    assert measured.data is not None and measured.data.seen[LAYER + "self_attn.q_proj.weight"] > 300
    assert len(measured.nulls[LAYER + "self_attn.q_proj.weight"]) == 19
    made = run("plan", spectra, "-o", plan, "--rule", "data:fraction:0.5", "--fewest-tokens", 1)
    assert made[0] == 0, made[2]
    lines = Plan.load(plan).reductions
    assert lines and all(x.metric == "data" and "in the metric of" in x.why.text for x in lines.values())

    code, _, error = run("reduce", speaker, plan, "-o", out)
    assert code == 2 and "try --moments with the file of laser calibrate on text.txt" in error
    code, _, error = run("reduce", speaker, plan, "-o", out, "--moments", other)
    assert code == 1 and "the plan was made with" in error and not out.exists()
    code, _, error = run("reduce", speaker, plan, "-o", out, "--moments", moments, "--fresh", other)
    assert code == 0, error
    outcome = json.loads((out / "laser.json").read_text())
    record = outcome["matrices"][LAYER + "self_attn.q_proj.weight"]
    line = lines[LAYER + "self_attn.q_proj.weight"]
    assert record["method"] == "data" and record["energy_kept"] == pytest.approx(line.energy_kept, rel=1e-6)
    assert record["residual"] <= record["tolerance"] and 0 < record.get("fresh_output_error", 0) < 1
    assert outcome["plan"]["calibration"]["text"] == "text.txt"
    for more in ((), ("--moments", moments)):
        code, told, _ = run("verify", speaker, out, *more)
        assert code == 0 and f"{len(lines)} as planned, 0 problems" in told
    code, told, error = run("card", out)
    card = (out / "README.md").read_text()
    assert code == 0 and "## By what the outputs lose" in card and "on fresh text" in card, error
    assert outcome["plan"]["calibration"]["text_sha256"] in card and "--moments moments.safetensors" in card
    assert run("report", spectra, "-o", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert "tokens of text.txt (sha256" in page and "tokens seen" in page
    # A plain truncation of the same rank is another matrix, and the check knows.
    weights = load_file(out / "model.safetensors")
    name = LAYER + "self_attn.q_proj.weight"
    W = laser.open_checkpoint(speaker).read(name)
    weights[name] = laser.truncate(W, line.rank or 0, laser.choose_device("cpu")).matrix
    wrong = tmp_path / "wrong"
    shutil.copytree(out, wrong)
    save_file(weights, wrong / "model.safetensors", metadata={"format": "pt"})
    document = json.loads((wrong / "laser.json").read_text())
    document["shards"] = dict.fromkeys(document["shards"])
    (wrong / "laser.json").write_text(json.dumps(document))
    code, told, _ = run("verify", speaker, wrong, "--moments", moments)
    assert code == 1 and "of the outputs' mean square is lost, expected" in told


@pytest.mark.slow
def test_run_goes_by_the_data_as_the_stages_one_by_one_do(speaker: Path, tmp_path: Path, text: Path, run: Run) -> None:
    moments, spectra, plan = (tmp_path / n for n in ("m.safetensors", "s", "p"))
    picked = ("--layers", "1-2", "--roles", "q,o")
    asked = ("--rule", "data:fraction:0.5", "--no-search", *picked)
    assert run("calibrate", speaker, "-o", moments, "--text", text, "--window", 64, "--windows", 6, *picked)[0] == 0
    code, _, error = run("run", speaker, "-o", tmp_path / "a", *asked)
    assert code == 2 and "try --moments with a file of laser calibrate" in error and not (tmp_path / "a").exists()
    code, told, error = run("run", speaker, "-o", tmp_path / "a", *asked, "--moments", moments)
    assert code == 0 and "4 to reduce" in told, error
    assert run("scan", speaker, "-o", spectra, *picked, "--moments", moments)[0] == 0
    assert run("plan", spectra, "-o", plan, "--rule", "data:fraction:0.5", *picked)[0] == 0
    assert run("reduce", speaker, plan, "-o", tmp_path / "b", "--moments", moments)[0] == 0
    for name in ("model.safetensors", "laser.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.slow
def test_what_was_not_seen_enough_is_kept_and_said(speaker: Path, tmp_path: Path, text: Path, run: Run) -> None:
    moments, spectra, plan = (tmp_path / n for n in ("m.safetensors", "s", "p"))
    checkpoint: Any = laser.open_checkpoint(speaker)
    code, told, _ = run("calibrate", speaker, "-o", moments, "--text", text, "--window", 50, "--windows", 1)
    assert code == 0 and "fewer than its 32 dimensions; kept whole unless asked for" in told
    assert run("scan", speaker, "-o", spectra, "--moments", moments)[0] == 0
    code, _, error = run("plan", spectra, "-o", plan, "--rule", "data:fraction:0.5")
    lines = {line.name: line for line in Plan.load(plan).lines}
    data: Any = laser.Spectra.load(spectra).data
    few = [n for n, tokens in data.seen.items() if tokens < min(checkpoint.tensors[n].shape)]
    assert few and len(few) < 36
    for name in few:
        assert lines[name].action != "reduce" and lines[name].why.text.startswith("not seen enough: has seen"), lines[
            name
        ]
    assert run("report", spectra, "-o", tmp_path / "page.html")[0] == 0
    assert "matrices saw fewer tokens than they have dimensions" in (tmp_path / "page.html").read_text()
    code, _, error = run("plan", spectra, "-o", plan, "--rule", "data:mp-edge", "--force")
    assert code == 2 and "in the metric of the data no noise is; try one of energy" in error
    code, _, error = run("plan", spectra, "-o", plan, "--force", "--rule", "data:parallel")
    assert code == 2 and "in the metric of the data no noise is" in error
    plain = tmp_path / "plain"
    assert run("scan", speaker, "-o", plain, "--roles", "q")[0] == 0
    code, _, error = run("plan", plain, "-o", plan, "--force", "--rule", "data:rank:3")
    assert code == 2 and "scan --moments FILE" in error


@pytest.mark.slow
def test_rules_in_the_metric_of_the_data_are_one_more_family(speaker: Path, tmp_path: Path, run: Run) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"the {i * i} brown fox jumps over {i} lazy dogs;" for i in range(99)))
    moments, plan = tmp_path / "m.safetensors", tmp_path / "plan.json"
    picked = ("--roles", "q,o", "--layers", "1-2", "--text", text, "--window", 64)
    assert run("calibrate", speaker, "-o", moments, *picked, "--windows", 6)[0] == 0
    asked = (*picked, "--windows", 6, "--held-out-windows", 4, "--accept", "no-worse", "--lowest-snr", "all")
    rules = ("--rules", "fraction:0.5,data:fraction:0.5,data:energy:0.9")
    code, _, error = run("search", speaker, "-o", plan, *asked, *rules)
    assert code == 2 and "needs moments, and spectra that were scanned with them" in error
    assert not (tmp_path / "spectra.safetensors").exists()  # refused before the scan
    code, told, error = run("search", speaker, "-o", plan, *asked, *rules, "--moments", moments, "--force")
    assert code == 0, error
    assert "metric plain:" in told and "metric data:" in told
    assert laser.Spectra.load(tmp_path / "spectra.safetensors").data is not None
    trials = [json.loads(line) for line in (tmp_path / "search.jsonl").read_text().splitlines()[1:]]
    options = {(t["label"], t["rule"]) for t in trials if t.get("entry") == "trial"}
    q = "model.layers.1.self_attn.q_proj.weight"
    assert {(q, "fraction:0.5"), (q, "data:fraction:0.5")} <= options  # the same rank, and both are tried
    # What the search kept is what reduce writes.
    kept = Plan.load(plan)
    lines = [line for line in kept.reductions.values() if line.metric == "data"]
    assert lines and kept.calibration is not None
    out = tmp_path / "out"
    assert run("reduce", speaker, plan, "-o", out, "--moments", moments)[0] == 0
    checkpoint, written = laser.open_checkpoint(speaker), laser.open_checkpoint(out)
    known = Moments.load(moments)
    for line in lines:
        edit = cut_of(checkpoint, "data:rank:1", {line.name: line.rank or 0}, laser.choose_device("cpu"), known)
        assert torch.equal(written.read(line.name), edit[line.name])


def test_shrunk_moments_make_a_plan_of_few_tokens_possible(speaker: Path, tmp_path: Path) -> None:
    checkpoint = laser.open_checkpoint(speaker)
    few = cut_windows(Text("text", CONTENT), load_tokenizer(speaker), length=20, limit=1)
    moments = calibrate(checkpoint, few, tmp_path / "m.safetensors", Selection(roles=("q",)), shrink=True)
    spectra = laser.scan(checkpoint, Selection(roles=("q",)), moments=moments)
    with pytest.raises(UsageError, match="no selected matrix has seen as many tokens"):
        laser.make_plan(spectra, "data:fraction:0.9")
    plan = laser.make_plan(spectra, "data:fraction:0.9", fewest_tokens=0)
    assert {line.rank for line in plan.reductions.values()} == {28}
    outcome = laser.reduce(checkpoint, plan, tmp_path / "out", moments=moments)
    for name, record in outcome.matrices.items():
        assert record["energy_kept"] == pytest.approx(plan.reductions[name].energy_kept)


def test_a_plan_of_few_tokens_is_verified_as_planned(speaker: Path, tmp_path: Path) -> None:
    """All directions that the data show are kept, so that only rounding is lost: of the moments, not of the weights."""
    checkpoint = laser.open_checkpoint(speaker)
    few = cut_windows(Text("text", CONTENT), load_tokenizer(speaker), length=20, limit=1)
    attention = Selection(layers=(1,), roles=("q", "k", "v", "o"))
    moments = calibrate(checkpoint, few, tmp_path / "m.safetensors", attention, shrink=False)
    spectra = laser.scan(checkpoint, attention, moments=moments)
    plan = laser.make_plan(spectra, "data:fraction:0.9", fewest_tokens=1)
    assert any("which show" in line.why.text for line in plan.reductions.values())
    laser.reduce(checkpoint, plan, tmp_path / "out", moments=moments)
    assert laser.verify(checkpoint, tmp_path / "out", moments=moments).problems == ()


@pytest.mark.slow
def test_wide_inputs_are_known_by_their_outputs_all_the_way(speaker: Path, tmp_path: Path) -> None:
    """w2 (32 x 48) as Mixtral's own (4096 x 14336) are: values, null, plan, reduction, fresh text and check."""
    checkpoint, selection = laser.open_checkpoint(speaker), Selection(roles=("w2",), layers=(1,))
    moments, whole, fresh = (
        calibrate(checkpoint, windows_of(speaker, limit), tmp_path / f"{i}.safetensors", selection, full_side=side)
        for i, (limit, side) in enumerate(((6, 40), (6, 4096), (5, 40)))
    )
    spectra, same = (laser.scan(checkpoint, selection, moments=known) for known in (moments, whole))
    assert spectra.data is not None and same.data is not None and len(spectra.data.values) == 4
    for name in spectra.data.values:
        assert moments.metric(name, checkpoint.read(name)).form == "outputs"
        exact = same.data.values[name]
        assert spectra.data.values[name] == pytest.approx(exact, abs=1e-4 * exact[0])
    plan = laser.make_plan(spectra, "data:rank:12", fewest_tokens=1)
    outcome = laser.reduce(checkpoint, plan, tmp_path / "out", moments=moments, fresh=fresh)
    assert outcome.run["fresh"]["text_sha256"] == fresh.calibration.text_sha256
    assert all(0 < record.get("fresh_output_error", 0) < 1 for record in outcome.matrices.values())
    assert laser.verify(checkpoint, tmp_path / "out", moments=moments).problems == ()
    weights = load_file(tmp_path / "out" / "model.safetensors")
    name = next(iter(plan.reductions))
    weights[name] = laser.truncate(checkpoint.read(name), 12, laser.choose_device("cpu")).matrix
    save_file(weights, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    document = json.loads((tmp_path / "out" / "laser.json").read_text())
    document["shards"] = dict.fromkeys(document["shards"])
    (tmp_path / "out" / "laser.json").write_text(json.dumps(document))
    (problem,) = laser.verify(checkpoint, tmp_path / "out", moments=moments).problems
    assert "of the outputs' mean square is lost, expected" in problem and name in problem


@pytest.mark.slow
def test_fp8_weights_are_verified_by_their_own_rounding(speaker: Path, tmp_path: Path) -> None:
    config = json.loads((speaker / "config.json").read_text())
    quantised, selection = tmp_path / "fp8", Selection(roles=("q",), layers=(1,))
    shutil.copytree(speaker, quantised)
    weights = {}
    for name, W in load_file(speaker / "model.safetensors").items():
        weights[name] = W
        if "self_attn" in name:
            weights[name], weights[f"{name}_scale_inv"] = quantise(W, torch.float32, (16, 16))
    save_file(weights, quantised / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (quantised / "config.json").write_text(json.dumps(config))
    checkpoint = laser.open_checkpoint(quantised)
    assert checkpoint.fp8 is not None
    moments = calibrate(checkpoint, windows_of(quantised), tmp_path / "m.safetensors", selection)
    spectra = laser.scan(checkpoint, selection, moments=moments)
    plan = laser.make_plan(spectra, "data:fraction:0.5")
    laser.reduce(checkpoint, plan, tmp_path / "out", moments=moments)
    assert laser.verify(checkpoint, tmp_path / "out", moments=moments).problems == ()
    laser.reduce(checkpoint, plan, tmp_path / "wide", moments=moments, dtype="bfloat16")
    assert laser.verify(checkpoint, tmp_path / "wide", moments=moments).problems == ()


def test_a_matrix_that_fails_in_the_data_s_metric_keeps_its_plain_spectrum(
    speaker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, selection = laser.open_checkpoint(speaker), Selection(roles=("q", "o"), layers=(1,))
    moments = calibrate(checkpoint, windows_of(speaker), tmp_path / "m.safetensors", selection)

    metric_of = Moments.metric

    def fail(self: Moments, name: str, W: torch.Tensor) -> ByData:
        if "q_proj" in name:
            raise NumericalError("no")
        return metric_of(self, name, W)

    # Moments that load and yet fail for one matrix: files are checked when they are read.
    monkeypatch.setattr(Moments, "metric", fail)
    laser.scan(checkpoint, selection, moments=moments).save(tmp_path / "s")
    spectra, q = laser.Spectra.load(tmp_path / "s"), "model.layers.1.self_attn.q_proj.weight"
    assert laser.make_plan(spectra, "rank:3").reductions.keys() == spectra.values.keys() and len(spectra.values) == 2
    plan = laser.make_plan(spectra, "data:rank:3")
    reasons = {line.name: line.why.text for line in plan.lines}
    assert reasons[q] == "skipped: no" and len(plan.reductions) == 1


@pytest.mark.slow
def test_what_was_not_calibrated_or_not_seen_enough_is_told_apart(speaker: Path, tmp_path: Path, run: Run) -> None:
    checkpoint = laser.open_checkpoint(speaker)
    few = cut_windows(Text("text", CONTENT), load_tokenizer(speaker), length=64, limit=1)
    moments = calibrate(checkpoint, few, tmp_path / "m.safetensors", Selection(roles=("w1", "w3"), layers=(1,)))
    laser.scan(checkpoint, Selection(roles=("w1", "q"), layers=(1,)), moments=moments).save(tmp_path / "s")
    plan = laser.make_plan(laser.Spectra.load(tmp_path / "s"), "data:rank:3")
    reasons = {line.name: line.why.text for line in plan.lines}
    assert reasons["model.layers.1.self_attn.q_proj.weight"] == "not calibrated"
    unseen = {name for name, reason in reasons.items() if reason.startswith("not seen enough: has seen")}
    assert unseen and plan.reductions
    # A search by rules of both kinds says so, too, in its plan and on the card.
    (tmp_path / "text.txt").write_text(" ".join(f"{i * i} foxes jump over {i} dogs;" for i in range(99)))
    asked = ("--roles", "w1", "--layers", 1, "--text", tmp_path / "text.txt", "--window", 64, "--windows", 4)
    asked += ("--held-out-windows", 2, "--lowest-snr", "all", "--spectra", tmp_path / "s", "--accept", "no-worse")
    searched, rules = tmp_path / "plan.json", "fraction:0.5,data:fraction:0.5"
    code, _, error = run(
        "search", speaker, "-o", searched, *asked, "--rules", rules, "--moments", tmp_path / "m.safetensors"
    )
    assert code == 0, error
    lines = {line.name: line for line in Plan.load(searched).lines}
    kept = {name for name in unseen if lines[name].action != "reduce"}
    assert kept and all("; not seen enough: has seen" in lines[name].why.text for name in kept)


def test_a_grid_in_the_metric_of_the_data() -> None:
    from laser.cli.search import _grid

    assert _grid("data:fraction:0.9,0.6") == ["data:fraction:0.9", "data:fraction:0.6"]
    assert _grid("rank:4,2") == ["rank:4", "rank:2"]
