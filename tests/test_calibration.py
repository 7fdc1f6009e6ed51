"""Calibration against hooks on transformers' own model, and the flow in the data's metric through the command line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import laser
from laser import calibration
from laser.calibration import calibrate
from laser.errors import NumericalError, RecordError, UsageError
from laser.evaluation.evaluate import load_whole
from laser.evaluation.text import Text, Windows, cut_windows, load_tokenizer
from laser.moments import Moments
from laser.plan import Plan
from laser.search.candidates import cut_of
from laser.selection import Selection

Run = Callable[..., tuple[int, str, str]]
CONTENT = "the quick brown fox jumps over 13 lazy dogs; " * 40
LAYER = "model.layers.1."
EXPERT = LAYER + "block_sparse_moe.experts.2."


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(CONTENT)
    return path


def windows_of(model: Path, limit: int = 6) -> Windows:
    return cut_windows(Text("text", CONTENT), load_tokenizer(model), length=64, limit=limit)


def inputs_by_hand(model: Path, windows: Windows) -> dict[str, torch.Tensor]:
    """What q, o and expert 2 of layer 1 meet, by hooks on the whole model; (T, n) each."""
    whole: Any = load_whole(laser.open_checkpoint(model), "float32")
    layer, found = whole.model.layers[1], {}

    def note(name: str, rows: torch.Tensor) -> None:
        found.setdefault(name, []).append(rows.detach().double())

    layer.self_attn.q_proj.register_forward_pre_hook(lambda _, a: note(LAYER + "self_attn.q_proj.weight", a[0][0]))
    layer.self_attn.o_proj.register_forward_pre_hook(lambda _, a: note(LAYER + "self_attn.o_proj.weight", a[0][0]))

    def experts(module: Any, arguments: Any) -> None:
        hidden, index, _ = arguments
        x = hidden.reshape(-1, hidden.shape[-1])[(index == 2).any(-1)]
        gate, up = torch.nn.functional.linear(x, module.gate_up_proj[2]).chunk(2, -1)
        note(EXPERT + "w1.weight", x)
        note(EXPERT + "w2.weight", module.act_fn(gate) * up)

    layer.mlp.experts.register_forward_pre_hook(experts)
    with torch.no_grad():
        for window in windows.windows:
            whole(input_ids=torch.from_numpy(window.tokens[:-1])[None], use_cache=False)
    return {name: torch.cat(rows) for name, rows in found.items()}


@pytest.mark.parametrize("full_side", [4096, 40])  # with 40, w2 (32 x 48) is known by its outputs
def test_moments_are_those_of_the_inputs(speaker: Path, tmp_path: Path, full_side: int) -> None:
    checkpoint, windows = laser.open_checkpoint(speaker), windows_of(speaker)
    path = tmp_path / "moments.safetensors"
    moments = calibrate(checkpoint, windows, path, Selection(layers=(1,)), full_side=full_side)
    assert Moments.load(path) == moments
    assert moments.calibration.tokens == sum(len(w.tokens) - 1 for w in windows.windows)
    for name, X in inputs_by_hand(speaker, windows).items():
        C, metric = X.T @ X / len(X), moments.metric(name)
        assert moments.tokens(name) == metric.tokens == len(X)
        z = X
        if name.endswith("w2.weight") and full_side == 40:
            assert metric.form == "outputs"
            W = checkpoint.read(name).double()
            C, z = W @ C @ W.T, X @ W.T
            assert metric.sketch is not None  # 48 directions of 48: exact
            exact = X.T @ X / len(X)
            assert torch.allclose(metric.sketch @ metric.sketch.T, exact, atol=1e-4 * float(exact.max()))
        assert torch.allclose(metric.moment, C, rtol=1e-4, atol=1e-5 * float(C.diagonal().max()))
        assert metric.fourth == pytest.approx(float(z.square().sum(1).square().mean()), rel=1e-4)
    q, k, gate, up = (moments.sites[n] for n in (
        LAYER + "self_attn.q_proj.weight", LAYER + "self_attn.k_proj.weight", EXPERT + "w1.weight",
        EXPERT + "w3.weight",
    ))  # fmt: skip
    assert q is k and gate is up and q is not moments.sites[LAYER + "self_attn.o_proj.weight"]


def test_tokens_of_the_experts_add_up_and_the_diagonal_is_the_diagonal(speaker: Path, tmp_path: Path) -> None:
    checkpoint, windows = laser.open_checkpoint(speaker), windows_of(speaker)
    full = calibrate(checkpoint, windows, tmp_path / "a.safetensors")
    small = calibrate(checkpoint, windows, tmp_path / "b.safetensors", diagonal=True)
    routed = [s.tokens for n, s in full.sites.items() if n.startswith(LAYER) and n.endswith("w1.weight")]
    assert sum(routed) == 2 * full.calibration.tokens  # top 2
    for name in full.sites:
        if full.tokens(name):
            assert torch.allclose(small.metric(name).moment, full.metric(name).moment.diagonal(), rtol=1e-5)
    assert (tmp_path / "b.safetensors").stat().st_size < (tmp_path / "a.safetensors").stat().st_size / 8
    assert full.calibration.identity != small.calibration.identity


def test_killed_after_any_layer_it_goes_on_and_gives_the_same_bytes(
    speaker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, windows = laser.open_checkpoint(speaker), windows_of(speaker)
    straight, path = tmp_path / "straight.safetensors", tmp_path / "moments.safetensors"
    calibrate(checkpoint, windows, straight)

    class Killed(BaseException):
        pass

    def stop(layer: int) -> None:
        raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            calibrate(checkpoint, windows, path, tick=stop)
        assert not path.exists()
    with pytest.raises(RecordError, match="belongs to another calibration"):
        calibrate(checkpoint, windows_of(speaker, limit=5), path)
    ran: list[int] = []
    original = calibration._run_layer
    monkeypatch.setattr(calibration, "_run_layer", lambda *a: ran.append(a[1]) or original(*a))
    calibrate(checkpoint, windows, path)
    assert ran == [2] and path.read_bytes() == straight.read_bytes()
    assert not path.with_name(path.name + ".partial").exists()


def test_the_flow_in_the_metric_of_the_data(speaker: Path, tmp_path: Path, text: Path, run: Run) -> None:
    moments, other, spectra, plan, out = (tmp_path / n for n in ("m.safetensors", "f.safetensors", "s", "p", "out"))
    windows = ("--text", text, "--window", 64, "--layers", "1-2")
    code, told, error = run("calibrate", speaker, "-o", moments, *windows, "--windows", 6)
    assert code == 0 and "fewest tokens" in told and "384 tokens" not in error
    assert run("calibrate", speaker, "-o", other, *windows, "--windows", 6, "--skip", 6)[0] == 0
    code, _, error = run("scan", speaker, "-o", spectra, "--layers", "1-2", "--moments", moments, "--null", 19)
    assert code == 0, error
    measured = laser.Spectra.load(spectra)
    assert measured.data is not None and measured.data.seen[LAYER + "self_attn.q_proj.weight"] > 300
    assert len(measured.data.nulls[LAYER + "self_attn.q_proj.weight"]) == 19
    made = run("plan", spectra, "-o", plan, "--rule", "fraction:0.5", "--metric", "data", "--fewest-tokens", 1)
    assert made[0] == 0, made[2]
    lines = Plan.load(plan).reductions
    assert lines and all(x.metric == "data" and "in the metric of" in x.reason for x in lines.values())

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
    assert record["residual"] <= record["tolerance"] and 0 < record["fresh_output_error"] < 1
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
    assert "tokens of text.txt (sha256" in page and "tokens met" in page
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
    assert run("plan", spectra, "-o", plan, "--rule", "fraction:0.5", "--metric", "data", *picked)[0] == 0
    assert run("reduce", speaker, plan, "-o", tmp_path / "b", "--moments", moments)[0] == 0
    for name in ("model.safetensors", "laser.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_was_not_seen_enough_is_kept_and_said(speaker: Path, tmp_path: Path, text: Path, run: Run) -> None:
    moments, spectra, plan = (tmp_path / n for n in ("m.safetensors", "s", "p"))
    code, told, _ = run("calibrate", speaker, "-o", moments, "--text", text, "--window", 50, "--windows", 1)
    assert code == 0 and "fewer than its 32 dimensions; kept whole unless asked for" in told
    assert run("scan", speaker, "-o", spectra, "--moments", moments)[0] == 0
    code, _, error = run("plan", spectra, "-o", plan, "--rule", "fraction:0.5", "--metric", "data", "--roles", "w1")
    reasons = [] if code else [line.reason for line in Plan.load(plan).lines if line.role == "w1"]
    assert "as many tokens as it has dimensions" in error or any(r.startswith("not seen enough: met") for r in reasons)
    assert run("report", spectra, "-o", tmp_path / "page.html")[0] == 0
    assert "matrices met fewer tokens than they have dimensions" in (tmp_path / "page.html").read_text()
    code, _, error = run("plan", spectra, "-o", plan, "--rule", "mp-edge", "--metric", "data", "--force")
    assert code == 2 and "in the metric of the data no noise is; try --rule with one of parallel, energy" in error
    code, _, error = run("plan", spectra, "-o", plan, "--force", "--rule", "parallel", "--metric", "data")
    assert code == 2 and "--null 19" in error
    plain = tmp_path / "plain"
    assert run("scan", speaker, "-o", plain, "--roles", "q")[0] == 0
    code, _, error = run("plan", plain, "-o", plan, "--force", "--rule", "rank:3", "--metric", "data")
    assert code == 2 and "scan --moments FILE" in error


def test_bad_input_gets_a_clear_error(
    speaker: Path, make_pico: Callable[..., Path], tmp_path: Path, text: Path, run: Run
) -> None:
    moments = tmp_path / "m.safetensors"
    code, _, error = run("calibrate", speaker, "-o", moments, "--text", text, "--window", 10, "--windows", 1)
    assert code == 2 and "gives 9 tokens, and the smallest of these matrices has 16 dimensions" in error
    assert not moments.exists()
    again = ("calibrate", speaker, "-o", moments, "--text", text, "--window", 10, "--windows", 1, "--shrink")
    assert run(*again, "--roles", "q")[0] == 0
    assert run(*again)[0] == 1  # exists
    code, _, error = run("scan", make_pico("another"), "-o", tmp_path / "s", "--moments", moments)
    assert code == 1 and "the moments was made from speaker" in error
    code, _, error = run("scan", speaker, "-o", tmp_path / "s", "--moments", tmp_path / "none")
    assert code == 1 and "no such file" in error and "laser calibrate" in error
    (tmp_path / "junk").write_bytes(b"junk")
    code, _, error = run("scan", speaker, "-o", tmp_path / "s", "--moments", tmp_path / "junk")
    assert code == 1 and "not a readable moments file" in error


def test_activations_that_are_not_finite_name_the_matrix(speaker: Path, tmp_path: Path) -> None:
    weights = load_file(speaker / "model.safetensors")
    weights[LAYER + "self_attn.q_proj.weight"][:] = float("nan")
    save_file(weights, speaker / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=rf"what {LAYER}self_attn.o_proj.weight meets is not finite"):
        calibrate(laser.open_checkpoint(speaker), windows_of(speaker), tmp_path / "m.safetensors")


def test_a_matrix_in_no_layer_cannot_be_calibrated(speaker: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no matrix of a decoder layer"):
        calibrate(laser.open_checkpoint(speaker), windows_of(speaker), tmp_path / "m", Selection(roles=("embedding",)))


def test_shrunk_moments_make_a_plan_of_few_tokens_possible(speaker: Path, tmp_path: Path) -> None:
    checkpoint, windows = laser.open_checkpoint(speaker), windows_of(speaker, limit=1)
    few = cut_windows(Text("text", CONTENT), load_tokenizer(speaker), length=20, limit=1)
    moments = calibrate(checkpoint, few, tmp_path / "m.safetensors", Selection(roles=("q",)), shrink=True)
    spectra = laser.scan(checkpoint, Selection(roles=("q",)), moments=moments)
    with pytest.raises(UsageError, match="no selected matrix met as many tokens"):
        laser.make_plan(spectra, "fraction:0.9", metric="data")
    plan = laser.make_plan(spectra, "fraction:0.9", metric="data", fewest_tokens=0)
    assert {line.rank for line in plan.reductions.values()} == {28}
    outcome = laser.reduce(checkpoint, plan, tmp_path / "out", moments=moments)
    for name, record in outcome.matrices.items():
        assert record["energy_kept"] == pytest.approx(plan.reductions[name].energy_kept)
    assert len(windows.windows) == 1


def test_a_plan_of_few_tokens_is_verified_as_planned(speaker: Path, tmp_path: Path) -> None:
    """All directions that the data show are kept, so that only rounding is lost: of the moments, not of the weights."""
    checkpoint = laser.open_checkpoint(speaker)
    few = cut_windows(Text("text", CONTENT), load_tokenizer(speaker), length=20, limit=1)
    moments = calibrate(checkpoint, few, tmp_path / "m.safetensors", Selection(layers=(1,)), shrink=False)
    spectra = laser.scan(checkpoint, Selection(layers=(1,)), moments=moments)
    plan = laser.make_plan(spectra, "fraction:0.9", metric="data", fewest_tokens=1)
    assert any("which show" in line.reason for line in plan.reductions.values())
    laser.reduce(checkpoint, plan, tmp_path / "out", moments=moments)
    assert laser.verify(checkpoint, tmp_path / "out", moments=moments).problems == ()


def test_rules_in_the_metric_of_the_data_are_one_more_family(speaker: Path, tmp_path: Path, run: Run) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"the {i * i} brown fox jumps over {i} lazy dogs;" for i in range(99)))
    moments, plan = tmp_path / "m.safetensors", tmp_path / "plan.json"
    picked = ("--roles", "q,o", "--layers", "1-2", "--text", text, "--window", 64)
    assert run("calibrate", speaker, "-o", moments, *picked, "--windows", 6)[0] == 0
    asked = (*picked, "--windows", 6, "--held-out-windows", 4, "--accept", "no-worse", "--lowest-snr", 0)
    rules = ("--rules", "fraction:0.5,data:fraction:0.5,data:parallel:0.25")
    code, _, error = run("search", speaker, "-o", plan, *asked, *rules)
    assert code == 2 and "needs moments, and spectra that were scanned with them" in error
    (tmp_path / "spectra.safetensors").unlink()
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
    assert (kept.calibration is not None) == bool(lines)
    out = tmp_path / "out"
    assert run("reduce", speaker, plan, "-o", out, "--moments", moments)[0] == 0
    checkpoint, written = laser.open_checkpoint(speaker), laser.open_checkpoint(out)
    known = Moments.load(moments)
    for line in lines:
        edit = cut_of(checkpoint, {line.name: line.rank or 0}, laser.choose_device("cpu"), known)
        assert torch.equal(written.read(line.name), edit[line.name])
