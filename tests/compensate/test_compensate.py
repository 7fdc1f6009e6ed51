"""laser compensate: the adapter is PEFT's, on the copy it gives what laser says, and what is no copy is refused."""

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from copies import refused, rounded, spoiled, write_models
from helpers import killed_before_the_new_one, snapshot, tensors_in
from hub_server import Bytes, Content, Repo, connect, serving
from pico_language import TEXT, write_tokenizer
from vllm_rules import require_vllm_form

import laser.compensate.compensate as compensation
from laser import calibration
from laser.checkpoint.quantised import dequantise, quantise
from laser.checkpoint.reader import open_checkpoint
from laser.compensate.budget import Offer, spend
from laser.differences.serving import in_vllm
from laser.evaluation.evaluate import whole_losses
from laser.evaluation.text import Text, cut_windows, load_tokenizer
from laser.moments import Moments
from laser.spectral.correction import correct
from laser.spectral.devices import HOST

WINDOWS = ("--window", 64, "--windows", 6)
Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama and a Mixtral, a copy of each in 3 bits, and two texts."""
    folder = write_models(tmp_path_factory.mktemp("models"))
    (folder / "held.txt").write_text(TEXT[::-1])
    return folder


def compensated(run: Run, models: Path, out: Path, *words: Any, kind: str = "llama") -> dict[str, Any]:
    texts = () if "--plain" in words else ("--text", models / "text.txt", *WINDOWS)
    code, out_, err = run(
        "compensate", models / kind, models / f"{kind}-3", "-o", out, *texts, *words, "--json", "--device", "cpu"
    )
    assert code == 0, err
    return json.loads(out_)


def loaded(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
# peft 0.21 says so of those of parameters, and goes by them: else their shapes would not fit.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize(
    "kind, amount", [("llama", ("--rank", 4)), ("mixtral", ("--rank", 4)), ("mixtral", ("--bits", 2))]
)
def test_peft_loads_it_on_the_copy_and_the_loss_is_what_laser_says(
    run: Run, models: Path, tmp_path: Path, kind: str, amount: tuple[Any, ...]
) -> None:
    peft = pytest.importorskip("peft")
    found = compensated(
        run, models, tmp_path / "a", *amount, "--held-out", models / "held.txt", "--held-out-windows", 2, kind=kind
    )
    copy = loaded(models / f"{kind}-3")
    before = {name: W.clone() for name, W in copy.named_parameters()}
    model = peft.PeftModel.from_pretrained(copy, tmp_path / "a").eval()
    merged = dict(model.merge_and_unload().named_parameters())
    original = dict(loaded(models / kind).named_parameters())
    nearer = {n for n in merged if not torch.equal(merged[n], before[n])}
    assert nearer == {n for n in merged if "proj" in n and "lm_head" not in n}
    held = cut_windows(Text("held", TEXT[::-1]), load_tokenizer(models / kind), length=64, limit=2)
    model = loaded(models / f"{kind}-3")
    model.load_state_dict(merged, strict=False)
    sums = whole_losses(model, held)
    assert sum(sums) / held.tokens == pytest.approx(found["held_out"]["adapted"]["nll"], abs=1e-5)
    assert open_checkpoint(models / kind).identity == found["original"]["identity"]
    assert original.keys() == merged.keys()
    assert all(
        e["after"] < e["before"] and e["after"] == pytest.approx(e["predicted"], rel=0.05) for e in found["entries"]
    )


@pytest.mark.slow
def test_every_wrong_request_is_one_line(run: Run, models: Path, tmp_path: Path) -> None:
    """Copies of another model, of other shapes, moments of another one, texts too short, nothing to go by."""
    at, llama, copy = ("-o", tmp_path / "a"), models / "llama", models / "llama-3"
    text = ("--text", models / "text.txt", *WINDOWS)
    other = spoiled(
        llama, tmp_path / "other", lambda t: {n: torch.randn_like(W.float()).bfloat16() for n, W in t.items()}
    )
    assert "is no copy of llama: the cosine of their weights is" in refused(run, llama, other, *at, "--plain")
    short = spoiled(llama, tmp_path / "short", lambda t: {n: W[:8] if n == Q0 else W for n, W in t.items()})
    assert f"{Q0} has shape [8, 32], expected [32, 32]" in refused(run, llama, short, *at, "--plain")
    less = spoiled(llama, tmp_path / "less", lambda t: {n: W for n, W in t.items() if n != Q0})
    assert f"less has no {Q0}" in refused(run, llama, less, *at, "--plain")
    assert "has no" in refused(run, llama, models / "mixtral", *at, "--plain")
    itself = spoiled(llama, tmp_path / "itself", lambda t: {n: W.float() for n, W in t.items()})
    for same in (llama, itself):
        assert "lost nothing: all of the 21 weights to correct are those of" in refused(run, llama, same, *at, *text)
    some = spoiled(copy, tmp_path / "some", lambda t: t | {Q0: tensors_in(llama)[Q0]})
    words = (*at, "--plain", "--layers", 0, "--roles", "q")
    assert "lost nothing: all of the 1 weights to correct are those of llama" in refused(run, llama, some, *words)
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.partial").exists()
    moments = tmp_path / "moments"
    assert run("calibrate", other, "-o", moments, *text, "--device", "cpu")[0] == 0
    assert "the moments file was made from" in refused(run, llama, copy, *at, "--moments", moments)
    few = tmp_path / "few"
    words = ("--text", models / "text.txt", "--window", 17, "--windows", 1, "--diagonal", "--device", "cpu")
    assert run("calibrate", llama, "-o", few, *words)[0] == 0
    assert "no matrix met as many inputs as it has dimensions" in refused(run, llama, copy, *at, "--moments", few)
    words = (*text[:2], "--window", 17, "--windows", 1)
    assert "no matrix met as many inputs as it has dimensions, found 16" in refused(run, llama, copy, *at, *words)
    assert "no matrix met as many inputs as it has dimensions, found 8" in refused(
        run, llama, copy, *at, *text[:2], "--window", 9, "--windows", 1
    )
    assert not (tmp_path / "a.partial").exists()
    for words, expected in (
        ((), "a correction goes by the inputs of a text"),
        ((*text, "--held-out", models / "text.txt"), "is the text of the calibration; try --held-out with another"),
        (("--plain", *text), "found several of --moments, --text and --plain"),
        (("--plain", "--rank", 0), "an adapter of rank 0 corrects nothing"),
        (("--plain", "--rank", 2, "--bits", 0.1), "found --rank and --bits, or neither"),
        (("--plain", "--bits", 99), "99.0 bits per weight are no budget"),
        (("--plain", "--bits", 1e-4), "the budget buys no rank of any"),
        (("--plain", "--layers", 9), "the model has no layer 9"),
        (("--plain", "--held-out", tmp_path / "none"), "none"),
        (("--plain", "--force", "-o", models / "llama"), "was not made by laser compensate"),
    ):
        assert expected in refused(run, llama, copy, *at, *words)
    assert not (tmp_path / "a").exists()


def test_an_unknown_packing_is_one_line(run: Run, models: Path, tmp_path: Path) -> None:
    packed = spoiled(
        models / "llama", tmp_path / "p", lambda t: t | {f"{Q0[:-7]}.W_q": torch.zeros(4, 4).to(torch.uint8)}
    )
    assert "holds hqq weights" in refused(run, models / "llama", packed, "-o", tmp_path / "a", "--plain")


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_and_force_replaces(
    run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = tmp_path / "wanted"
    found = compensated(run, models, wanted, "--rank", 3)
    out, solved = tmp_path / "a", []
    solve = compensation.correct

    def interrupted(*arguments: Any) -> Any:
        solved.append(1)
        if len(solved) == 12:
            raise KeyboardInterrupt
        return solve(*arguments)

    # The command makes its own visits.
    monkeypatch.setattr(compensation, "correct", interrupted)
    words = ("compensate", models / "llama", models / "llama-3", "-o", out, "--text", models / "text.txt", *WINDOWS)
    words += ("--rank", 3, "--device", "cpu", "--workers", 1)
    code, _, err = run(*words)
    assert code == 130 and "run the same command again" in err and not out.exists()
    assert run(*words)[0] == 0
    assert 12 + 21 - 11 - 2 <= len(solved) <= 12 + 21 - 9  # what was written down is not solved again
    assert snapshot(out) == snapshot(wanted) and not (tmp_path / "a.partial").exists()
    assert "a exists; try another -o, or --force to replace it" in refused(run, *words[1:-4])
    assert run(*words, "--force", "--rank", 2)[0] == 0
    after = json.loads((out / "laser.json").read_text())
    assert {e["rank"] for e in after["entries"]} == {2} and {e["rank"] for e in found["entries"]} == {3}
    assert not (tmp_path / "a.partial").exists()


@pytest.mark.slow
def test_a_kill_between_two_renames_loses_no_earlier_output(run: Run, models: Path, tmp_path: Path) -> None:
    """Where the system cannot exchange; the same command puts the earlier one back before it does anything."""
    out = tmp_path / "a"
    compensated(run, models, out, "--plain", "--rank", 1)
    first = snapshot(out)
    words = ("compensate", models / "llama", models / "llama-3", "-o", out, "--plain", "--rank", 2, "--device", "cpu")
    with killed_before_the_new_one(tmp_path / "a.partial" / "new"):
        assert run(*words, "--force")[0] == 130 and not out.exists()
    assert "a exists; try another -o, or --force to replace it" in refused(run, *words[1:-2])
    assert snapshot(out) == first
    code, _, err = run(*words, "--force")
    assert code == 0 and snapshot(out) != first and not (tmp_path / "a.partial").exists(), err


@pytest.mark.slow
@pytest.mark.parametrize("where", ["calibrating", "assembling"])
def test_another_run_leaves_what_an_interrupted_one_has(
    run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Its layers' moments, or all of them and what was solved by them: refused, nothing is touched."""
    module, name = (calibration, "_run_layer") if where == "calibrating" else (compensation, "_assemble_output")
    function, called = getattr(module, name), []

    def interrupted(*arguments: Any) -> Any:
        called.append(1)
        if where == "assembling" or len(called) == 2:
            raise KeyboardInterrupt
        return function(*arguments)

    words = ("compensate", models / "llama", models / "llama-3", "-o", tmp_path / "a", *WINDOWS, "--device", "cpu")
    with monkeypatch.context() as patched:  # nothing else stops a run at a chosen place
        patched.setattr(module, name, interrupted)
        assert run(*words, "--text", models / "text.txt")[0] == 130
    partial = tmp_path / "a.partial"
    before = snapshot(partial)
    assert any("moments" in str(name) for name in before)
    assert "holds the work of another run" in refused(run, *words[1:-2], "--text", models / "held.txt")
    assert snapshot(partial) == before
    assert run(*words, "--text", models / "text.txt")[0] == 0
    assert json.loads((tmp_path / "a" / "laser.json").read_text())["calibration"]["text"] == "text.txt"


@pytest.mark.slow
def test_other_moments_of_the_same_windows_are_another_run(
    run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, how in (("one", ()), ("two", ("--ledoit-wolf",))):
        words = ("--text", models / "text.txt", *WINDOWS, *how, "--device", "cpu")
        assert run("calibrate", models / "llama", "-o", tmp_path / name, *words)[0] == 0
    words = (models / "llama", models / "llama-3", "-o", tmp_path / "a", "--moments")

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:  # as above
        patched.setattr(compensation, "_assemble_output", interrupted)
        assert run("compensate", *words, tmp_path / "one", "--device", "cpu")[0] == 130
    assert "holds the work of another run" in refused(run, *words, tmp_path / "two")
    assert run("compensate", *words, tmp_path / "two", "--device", "cpu", "--force")[0] == 0
    assert json.loads((tmp_path / "a" / "laser.json").read_text())["calibration"]["shrink"]


def test_held_out_windows_are_two_and_none_of_the_calibration(run: Run, models: Path, tmp_path: Path) -> None:
    begins = tmp_path / "begins.txt"
    begins.write_text(TEXT + " and more")
    words = (models / "llama", models / "llama-3", "-o", tmp_path / "a")
    by_text, moments = ("--text", models / "text.txt", *WINDOWS), tmp_path / "moments"
    assert run("calibrate", models / "llama", "-o", moments, *by_text, "--device", "cpu")[0] == 0
    error = refused(run, *words, *by_text, "--held-out", begins, "--held-out-windows", 4)
    assert "4 windows of the held-out begins.txt are also calibration windows" in error
    error = refused(run, *words, "--moments", moments, "--window", 32, "--held-out", begins)
    assert "the held-out begins.txt begins with the windows of the calibration" in error
    error = refused(run, *words, *by_text, "--held-out", models / "held.txt", "--held-out-windows", 1)
    assert "held.txt gives one window to judge on" in error
    assert not list(tmp_path.glob("a*"))


@pytest.mark.parametrize(
    "words, idle",
    [
        (("--windows", 3, "--window", 33, "--field", "x", "--held-out-windows", 5), "--windows, --held-out-windows, "
         "--window, --field do nothing"),
        (("--dtype", "bfloat16"), "--dtype does nothing"),
        (("--method", "svd"), "--method does nothing"),
        (("--held-out", "held.txt", "--windows", 3), "--windows does nothing"),
        (("--held-out", "held.txt", "--field", "text"), "--field does nothing"),
    ],
)  # fmt: skip
def test_options_that_do_nothing_are_named(run: Run, models: Path, tmp_path: Path, words: Any, idle: str) -> None:
    asked = [models / word if word == "held.txt" else word for word in words]
    for by in (("--plain",), ("--moments", tmp_path / "none")):
        error = refused(run, models / "llama", models / "llama-3", "-o", tmp_path / "a", *by, *asked)
        assert f"{idle} in this call; try without" in error


@pytest.mark.slow
def test_models_on_the_hub(run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their tokenizer comes with them; a dry run fetches no weights."""
    with serving() as hub:
        connect(hub, tmp_path / "cache", monkeypatch)
        for name in ("llama", "llama-3"):
            files: dict[str, Content] = {p.name: Bytes(p.read_bytes()) for p in (models / name).iterdir()}
            hub.repos[f"o/{name}"] = Repo(files)
        words = ("compensate", "o/llama", "o/llama-3", "-o", tmp_path / "a", "--text", models / "text.txt", *WINDOWS)
        code, _, err = run(*words, "--device", "cpu", "--dry-run")
        assert code == 0, err
        fetched = list((tmp_path / "cache").rglob("*.safetensors"))
        assert not fetched and list((tmp_path / "cache").rglob("tokenizer.json"))
        code, _, err = run(*words, "--device", "cpu")
        assert code == 0, err
        shutil.rmtree(tmp_path / "cache")
        words = ("calibrate", "o/llama", "-o", tmp_path / "moments", "--text", models / "text.txt", *WINDOWS)
        code, _, err = run(*words, "--device", "cpu")
        assert code == 0, err
    compensated(run, models, tmp_path / "here")
    assert tensors_in(tmp_path / "a").keys() == tensors_in(tmp_path / "here").keys()
    for name, W in tensors_in(tmp_path / "a").items():
        assert torch.equal(W, tensors_in(tmp_path / "here")[name])


def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Mixtral's experts as transformers 5 writes them: gate on up, and down, of all experts in one tensor each."""
    made = {name: W for name, W in tensors.items() if ".experts." not in name}
    for name in tensors:
        if name.endswith("experts.0.w1.weight"):
            stem = name.removesuffix("0.w1.weight")
            w1, w2, w3 = (torch.stack([tensors[f"{stem}{e}.w{i}.weight"] for e in range(4)]) for i in (1, 2, 3))
            made |= {f"{stem}gate_up_proj": torch.cat((w1, w3), 1), f"{stem}down_proj": w2}
    return {name.replace("block_sparse_moe", "mlp"): W for name, W in made.items()}


@pytest.mark.slow
def test_fused_experts_get_the_adapter_of_experts_apart(run: Run, models: Path, tmp_path: Path) -> None:
    """Either of the two may be fused: the adapter is the same, and so is the verdict."""
    found = []
    for name in ("mixtral", "mixtral-3"):
        shutil.copytree(models / name, tmp_path / name)
        spoiled(models / name, tmp_path / f"{name}-fused", fused)
    words = ("--text", models / "text.txt", *WINDOWS, "--rank", 2, "--device", "cpu", "--json")
    words += ("--held-out", models / "held.txt", "--held-out-windows", 2)
    for number, (original, copy) in enumerate(itertools.product(("mixtral", "mixtral-fused"), ("-3", "-3-fused"))):
        out = tmp_path / f"a{number}"
        code, told, err = run("compensate", tmp_path / original, tmp_path / f"mixtral{copy}", "-o", out, *words)
        assert code == 0, err
        found.append((json.loads(told), tensors_in(out)))
    (first, tensors), *others = found
    assert len(first["entries"]) == 36
    for other, theirs in others:
        assert theirs.keys() == tensors.keys()
        for name, W in tensors.items():
            assert torch.equal(W, theirs[name]), name
        for model in ("original", "copy", "adapted"):
            assert other["held_out"][model]["nll"] == pytest.approx(first["held_out"][model]["nll"], abs=1e-9)


def test_experts_that_memory_holds_otherwise_are_left_with_the_reason(run: Run, tmp_path: Path) -> None:
    """GPT-OSS: transposed, gate and up column by column."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **sizes, pad_token_id=0))
    for name in ("m", "c"):
        model.save_pretrained(tmp_path / name)
    words = (tmp_path / "m", tmp_path / "c", "-o", tmp_path / "a", "--plain", "--dry-run")
    code, out, err = run("compensate", *words, "--json", "--device", "cpu")
    found = json.loads(out)
    assert code == 0 and found["places"] == 4, err
    assert len(found["left"]) == 6 and all("of three dimensions" in why for why in found["left"].values())
    assert "down_proj[0] cannot be corrected: it lies in a parameter of" in refused(run, *words, "--roles", "w1,w2,w3")


@pytest.mark.slow
def test_what_it_prints_and_what_a_dry_run_says(run: Run, models: Path, tmp_path: Path) -> None:
    words = (
        "compensate",
        models / "mixtral",
        models / "mixtral-3",
        "-o",
        tmp_path / "a",
        "--text",
        models / "text.txt",
    )
    words += (*WINDOWS, "--rank", 2, "--device", "cpu")
    code, out, err = run(*words, "--dry-run")
    assert code == 0 and "36 places of mixtral-3 to correct towards mixtral at a mean rank of 2.0" in out, err
    assert "w1+w3" in out and not list(tmp_path.iterdir())
    code, out, err = run(*words, "--held-out", models / "held.txt", "--held-out-windows", 2)
    assert code == 0 and "output error before" in out and "against the original" in out, err
    assert "survive" in out.lower() and "36 matrices of mixtral-3 corrected" in out
    card = (tmp_path / "a" / "README.md").read_text()
    assert "`mixtral-3`" in card and "held.txt" in card and "text.txt" in card and "PeftModel" in card


@pytest.mark.slow
@pytest.mark.parametrize("window", [72, 40])
def test_few_inputs_are_shrunk_and_none_leave_a_matrix_alone(
    run: Run, models: Path, tmp_path: Path, window: int
) -> None:
    """Experts meet what is routed to them: with a short text fewer than dimensions, of all of a layer, or nothing."""
    found = compensated(run, models, tmp_path / "a", "--window", window, "--windows", 1, "--rank", 2, kind="mixtral")
    shrunk = {e["name"] for e in found["entries"] if e.get("shrunk")}
    assert shrunk and all(".experts." in name or "down" in name for name in shrunk)
    assert all(e["tokens"] < e["shape"][1] for e in found["entries"] if e["name"] in shrunk)
    silent = {name for name, why in found["left"].items() if "met no input" in why}
    assert all(".experts." in name for name in silent)
    whole = {e["name"] for e in found["entries"]}
    assert not whole & silent and all(e["after"] < e["before"] for e in found["entries"])


@pytest.mark.slow
def test_each_expert_is_corrected_by_its_own_inputs(run: Run, models: Path, tmp_path: Path) -> None:
    """What the file holds of an expert is the correction by the moments of what was routed to it, gate on up."""
    moments, adapter = tmp_path / "moments", tmp_path / "a"
    assert run("calibrate", models / "mixtral", "-o", moments, "--text", models / "text.txt", *WINDOWS)[0] == 0
    code, _, err = run(
        "compensate", models / "mixtral", models / "mixtral-3", "-o", adapter, "--moments", moments, "--rank", 3,
        "--roles", "w1,w2,w3",
    )  # fmt: skip
    assert code == 0, err
    known, tensors = Moments.load(moments), tensors_in(adapter)
    original, copy = (open_checkpoint(models / name) for name in ("mixtral", "mixtral-3"))
    for expert in range(4):
        names = [f"model.layers.1.block_sparse_moe.experts.{expert}.{w}.weight" for w in ("w1", "w3")]
        W, Q = (torch.cat([model.read(name) for name in names]) for model in (original, copy))
        metric = known.metric(names[0], original.read(names[0]))
        best = correct(W, Q, 3, metric, HOST)
        stem = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_"
        A = tensors[f"{stem}A.weight"].reshape(4, 3, -1)[expert]
        B = tensors[f"{stem}B.weight"].reshape(len(W), 3, 4)[:, :, expert]
        if metric.tokens >= W.shape[1]:
            assert torch.allclose(B.float() @ A.float(), best.B.float() @ best.A.float(), atol=1e-3)


@pytest.mark.slow
def test_a_budget_is_spent_and_not_overspent(run: Run, models: Path, tmp_path: Path) -> None:
    found = compensated(run, models, tmp_path / "a", "--bits", 1.5)
    ranks = {e["rank"] for e in found["entries"]}
    assert 1.3 < found["bits"] <= 1.5 and len(ranks) > 1
    assert len(found["entries"]) + len(found["left"]) == 21


@pytest.mark.parametrize("seed", range(3))
def test_spending_is_the_best_there_is(seed: int) -> None:
    """Against all ways to spend, at budgets that the greedy choice uses up."""
    draw = np.random.default_rng(seed)
    offers = {str(i): Offer(np.sort(draw.random(3))[::-1], int(draw.integers(1, 5))) for i in range(4)}

    def gain(ranks: dict[str, int]) -> float:
        return sum(float(offers[name].gains[:rank].sum()) for name, rank in ranks.items())

    def cost(ranks: dict[str, int]) -> int:
        return sum(offers[name].cost * rank for name, rank in ranks.items())

    every = [dict(zip(offers, ranks, strict=True)) for ranks in itertools.product(range(4), repeat=4)]
    for bits in range(1, 30):
        ours = spend(offers, bits)
        assert cost(ours) <= bits
        best = max(gain(each) for each in every if cost(each) <= cost(ours))
        assert gain(ours) >= best - max(max(o.gains) for o in offers.values()) * 0.5 - 1e-9
    assert spend(offers, 1e9) == dict.fromkeys(offers, 3)


@pytest.mark.slow
@pytest.mark.parametrize("scales", ["by block", "by row"])
def test_a_copy_in_fp8(run: Run, models: Path, tmp_path: Path, scales: str) -> None:
    """Its verdict is that of the same copy dequantised, with one adapter as with the other."""

    def change(tensors: dict[str, torch.Tensor], packed: bool) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = {}
        for name, W in tensors.items():
            if "proj" not in name:
                made[name] = W
                continue
            if scales == "by block":
                q, scale = quantise(W, torch.float32)
                plain, beside = dequantise(q, scale), {f"{name}_scale_inv": scale}
            else:
                scale = W.float().abs().amax(1, keepdim=True) / 400
                q = (W.float() / scale).to(torch.float8_e4m3fn)
                plain, beside = q.float() * scale, {f"{name}_scale": scale}
            made |= {name: q, **beside} if packed else {name: plain}
        return made

    found = []
    for packed in (True, False):
        copy = spoiled(models / "llama", tmp_path / f"copy{packed}", lambda t, p=packed: change(t, p))
        code, out, err = run(
            "compensate", models / "llama", copy, "-o", tmp_path / f"a{packed}", "--text", models / "text.txt",
            *WINDOWS, "--rank", 4, "--held-out", models / "held.txt", "--held-out-windows", 2, "--json",
        )  # fmt: skip
        assert code == 0, err
        found.append(json.loads(out))
    one, other = found
    assert one["held_out"]["adapted"]["nll"] == pytest.approx(other["held_out"]["adapted"]["nll"], abs=1e-6)
    assert one["held_out"]["copy"]["nll"] == pytest.approx(other["held_out"]["copy"]["nll"], abs=1e-6)
    assert one["bytes"]["copy"] < other["bytes"]["copy"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of peft and transformers
@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_fused_and_transposed_layers(run: Run, tmp_path: Path, family: str) -> None:
    """q, k and v in one layer, gate and up in one, stored (in, out): one adapter each, by the inputs they share."""
    peft = pytest.importorskip("peft")
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    sizes |= {"intermediate_size": 48, "num_key_value_heads": 2} if family == "phi3" else {}
    config = AutoConfig.for_model(family, bos_token_id=1, eos_token_id=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / family)
    write_tokenizer(tmp_path / family)

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        layers = {
            n for n, W in tensors.items() if W.ndim == 2 and "embed" not in n and "wte" not in n and "wpe" not in n
        }
        return {n: rounded(W) if n in layers and "lm_head" not in n else W for n, W in tensors.items()}

    spoiled(tmp_path / family, tmp_path / f"{family}-3", change)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "held.txt").write_text(TEXT[::-1])
    found = compensated(
        run, tmp_path, tmp_path / "a", "--rank", 4, "--held-out", tmp_path / "held.txt", "--held-out-windows", 2,
        kind=family,
    )  # fmt: skip
    assert len(found["entries"]) == 8 and not found["left"]
    model = peft.PeftModel.from_pretrained(loaded(tmp_path / f"{family}-3"), tmp_path / "a").eval()
    held = cut_windows(Text("held", TEXT[::-1]), load_tokenizer(tmp_path / family), length=64, limit=2)
    mean = sum(whole_losses(model, held)) / held.tokens
    assert mean == pytest.approx(found["held_out"]["adapted"]["nll"], abs=1e-5)
    assert abs(found["held_out"]["gain"]) > 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of peft, bitsandbytes and transformers
def test_on_a_model_in_four_bits_peft_gives_the_loss_that_laser_streams(run: Run, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

    torch.manual_seed(0)
    wide = LlamaConfig(  # on the host bitsandbytes multiplies whole blocks of 64, in bfloat16
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, bos_token_id=1, eos_token_id=2, initializer_range=0.08,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "llama")
    models = write_tokenizer(tmp_path / "llama").parent
    (models / "text.txt").write_text(TEXT)
    (models / "held.txt").write_text(TEXT[::-1])
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    packed: Any = AutoModelForCausalLM.from_pretrained(
        models / "llama", quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    path, adapter = tmp_path / "packed", tmp_path / "a"
    packed.save_pretrained(path)
    code, out, err = run(
        "compensate", models / "llama", path, "-o", adapter, "--text", models / "text.txt", *WINDOWS, "--rank", 4,
        "--held-out", models / "held.txt", "--held-out-windows", 2, "--json", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    model = peft.PeftModel.from_pretrained(packed, adapter).eval()
    held = cut_windows(Text("held", TEXT[::-1]), load_tokenizer(models / "llama"), length=64, limit=2)
    found = sum(whole_losses(model, held)) / held.tokens
    assert found == pytest.approx(json.loads(out)["held_out"]["adapted"]["nll"], abs=1e-3)
    # What it multiplies unpacked weights with is rounded to bfloat16; unpacked by its own function, nothing is left.
    packed = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu").dequantize().float()
    exact = sum(whole_losses(peft.PeftModel.from_pretrained(packed, adapter).eval(), held)) / held.tokens
    assert exact == pytest.approx(json.loads(out)["held_out"]["adapted"]["nll"], abs=1e-5)


def scaled_through(tensors: dict[str, torch.Tensor], both: bool = True) -> dict[str, torch.Tensor]:
    """The same function with powers of two moved from norms, and rows of up, into the columns behind, as AWQ does."""
    found = {name: W.clone() for name, W in tensors.items()}

    def powers(n: int, shift: int) -> torch.Tensor:
        return torch.exp2((torch.arange(n) % (4 + shift) - shift).float())

    behind = {
        "input_layernorm": r"self_attn\.[qkv]_proj",
        "post_attention_layernorm": r"mlp\.(gate|up)_proj|block_sparse_moe\.(gate|experts\.\d\.w[13])",
    }
    for name in tensors:
        layer, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind in behind:
            scales = powers(len(found[name]), 1 if kind == "input_layernorm" else 2)
            found[name] /= scales
            for other in tensors:
                if re.fullmatch(rf"{re.escape(layer)}\.({behind[kind]})\.weight", other):
                    found[other] *= scales
        if kind in ("up_proj", "w3") and both:
            rows = powers(len(found[name]), 3)
            found[name] /= rows[:, None]
            found[name.replace("up_proj", "down_proj").replace("w3", "w2")] *= rows
    return found


@pytest.mark.parametrize("kind, both", [("llama", True), ("llama", False), ("mixtral", True)])
def test_scales_that_a_quantiser_moved_into_the_weights_change_nothing(
    run: Run, models: Path, tmp_path: Path, kind: str, both: bool
) -> None:
    spoiled(models / f"{kind}-3", tmp_path / "scaled", lambda tensors: scaled_through(tensors, both))
    words = ("--text", models / "text.txt", *WINDOWS, "--rank", 4, "--held-out", models / "held.txt")
    found = []
    for copy in (models / f"{kind}-3", tmp_path / "scaled"):
        code, out, err = run(
            "compensate", models / kind, copy, "-o", tmp_path / f"a-{copy.name}", *words, "--held-out-windows", 2,
            "--json", "--device", "cpu",
        )  # fmt: skip
        assert code == 0, err
        found.append(json.loads(out))
    plain, scaled = found
    assert scaled["held_out"]["copy"]["nll"] == pytest.approx(plain["held_out"]["copy"]["nll"], abs=1e-5)
    assert scaled["held_out"]["adapted"]["nll"] == pytest.approx(plain["held_out"]["adapted"]["nll"], abs=5e-3)
    for one, other in zip(plain["entries"], scaled["entries"], strict=True):
        fitted = both and ".mlp." in one["name"]
        assert other["before"] == pytest.approx(one["before"], rel=0.4 if fitted else 1e-6), one["name"]


def scaled_rows(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows of up in the columns of down, and every norm as it was."""
    found = {name: W.clone() for name, W in tensors.items()}
    for name in (name for name in tensors if ".up_proj." in name):
        rows = torch.exp2((torch.arange(len(found[name])) % 7 - 3).float())
        found[name] /= rows[:, None]
        found[name.replace("up_proj", "down_proj")] *= rows
    return found


def few_channels(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Two of five channels of one norm, as those do who smooth outliers alone."""
    found = {name: W.clone() for name, W in tensors.items()}
    norm = "model.layers.0.input_layernorm.weight"
    scales = torch.where(torch.arange(len(found[norm])) % 5 < 2, 8.0, 1.0)
    found[norm] /= scales
    for role in "qkv":
        found[f"model.layers.0.self_attn.{role}_proj.weight"] *= scales
    return found


def values(tensors: dict[str, torch.Tensor], order: str = "heads") -> dict[str, torch.Tensor]:
    """Channels of values, each in the columns of both heads that share it; in another order it is another function."""
    found = {name: W.clone() for name, W in tensors.items()}
    for name in (name for name in tensors if ".v_proj." in name):
        rows = torch.exp2((torch.arange(len(found[name])) % 5 - 2).float())
        found[name] /= rows[:, None]
        of_heads = rows.reshape(2, 8).repeat_interleave(2, 0).reshape(-1) if order == "heads" else rows.repeat(2)
        found[name.replace("v_proj", "o_proj")] *= of_heads
    return found


def one_channel(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A single one of both norms of a layer, so little that it is no hundredth of any matrix."""
    found = {name: W.clone() for name, W in tensors.items()}
    for norm, behind in (
        ("input_layernorm", "self_attn.[qkv]_proj"),
        ("post_attention_layernorm", "mlp.(gate|up)_proj"),
    ):
        scales = torch.where(torch.arange(32) == 5, 1.25, 1.0)
        found[f"model.layers.0.{norm}.weight"] /= scales
        for name in tensors:
            if re.search(f"layers.0.{behind}", name):
                found[name] *= scales
    return found


def norms_alike(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Both norms of each layer by the same numbers, so that each explains the weights behind the other."""
    found = {name: W.clone() for name, W in tensors.items()}
    scales = torch.exp2((torch.arange(32) % 4 - 1).float())
    for name in tensors:
        if "layernorm" in name:
            found[name] /= scales
        elif re.search(r"[qkv]_proj|gate_proj|up_proj", name):
            found[name] *= scales
    return found


def without_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `model.model` saves, a head beside it, with scales moved out of the norms."""
    return {name.removeprefix("model."): W for name, W in scaled_through(tensors, False).items()}


def worst_before(run: Run, original: Path, copy: Path, out: Path, *words: Any) -> float:
    """The largest output error of the copy alone that laser finds."""
    code, told, err = run("compensate", original, copy, "-o", out, *words, "--rank", 4, "--json", "--device", "cpu")
    assert code == 0, err
    return max(entry["before"] for entry in json.loads(told)["entries"])


@pytest.mark.parametrize(
    "change", [scaled_rows, few_channels, scaled_through, values, one_channel, norms_alike, without_prefix]
)
@pytest.mark.parametrize("which", [(), ("--roles", "q,k,v,o,gate,up")])
def test_scales_are_seen_wherever_they_went(
    run: Run, models: Path, tmp_path: Path, change: Any, which: tuple[str, ...]
) -> None:
    """Without a changed norm, in few channels, where the weight that makes up for them is not selected, ..."""
    spoiled(models / "llama-3", tmp_path / "scaled", change)
    plain, scaled = (
        worst_before(
            run, models / "llama", copy, tmp_path / f"a-{copy.name}", "--text", models / "text.txt", *WINDOWS, *which
        )
        for copy in (models / "llama-3", tmp_path / "scaled")
    )
    assert scaled < (1.01 if change in (one_channel, norms_alike, without_prefix) else 1.5) * plain


@pytest.mark.slow
def test_scales_that_went_through_fused_layers(run: Run, tmp_path: Path) -> None:
    """Phi-3: rows of v, a part of one layer, in the columns of o; rows of up, a part of another, in those of down."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    sizes |= {"intermediate_size": 48, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("phi3", **sizes)).save_pretrained(tmp_path / "phi3")

    def moved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {name: W.clone() for name, W in tensors.items()}
        for name in tensors:
            if "gate_up_proj" in name:
                rows = torch.exp2((torch.arange(48) % 7 - 3).float())
                found[name][48:] /= rows[:, None]
                found[name.replace("gate_up", "down")] *= rows
            if "qkv_proj" in name:
                rows = torch.exp2((torch.arange(16) % 5 - 2).float())
                found[name][48:] /= rows[:, None]
                found[name.replace("qkv", "o")] *= rows.reshape(2, 8).repeat_interleave(2, 0).reshape(-1)
        return found

    copy = spoiled(
        tmp_path / "phi3", tmp_path / "copy", lambda t: {n: rounded(W) if "proj" in n else W for n, W in t.items()}
    )
    spoiled(copy, tmp_path / "scaled", moved)
    plain, scaled = (
        worst_before(run, tmp_path / "phi3", tmp_path / name, tmp_path / f"a-{name}", "--plain")
        for name in ("copy", "scaled")
    )
    assert scaled < 1.5 * plain


def test_of_two_norms_alike_each_has_weights_that_make_up_for_it(run: Run, models: Path, tmp_path: Path) -> None:
    """Behind the second nothing is scaled: the first one's weights are not counted for both."""
    attention = tensors_in(models / "llama-3")

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: attention[name] if ".mlp." in name else W for name, W in norms_alike(tensors).items()}

    spoiled(models / "llama-3", tmp_path / "odd", change)
    err = refused(run, models / "llama", tmp_path / "odd", "-o", tmp_path / "a", "--plain")
    assert "layers.0.post_attention_layernorm.weight is not that of llama, and no weight makes up for it" in err
    assert not (tmp_path / "a.partial").exists()


def times(*norms: str) -> Any:
    """A change: these norms multiplied, and nothing behind them."""
    return lambda tensors: tensors | {norm: tensors[norm] * 3 for norm in norms}


@pytest.mark.parametrize("norm", ["model.layers.1.input_layernorm.weight", "model.norm.weight"])
def test_a_norm_that_nothing_makes_up_for_is_one_line(run: Run, models: Path, tmp_path: Path, norm: str) -> None:
    spoiled(models / "llama-3", tmp_path / "odd", times(norm))
    err = refused(run, models / "llama", tmp_path / "odd", "-o", tmp_path / "a", "--plain")
    assert f"{norm.removeprefix('model.')} is not that of llama" in err


@pytest.mark.parametrize("order", ["nowhere", "rows"])
def test_scales_that_cannot_be_taken_back_are_refused(run: Run, models: Path, tmp_path: Path, order: str) -> None:
    """Rows of v that nothing makes up for, or not in the order of the heads: no loss that an adapter gives back."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = values(tensors, order)
        return made if order == "rows" else made | {n: W for n, W in tensors.items() if "o_proj" in n}

    spoiled(models / "llama-3", tmp_path / "odd", change)
    err = refused(run, models / "llama", tmp_path / "odd", "-o", tmp_path / "a", "--plain")
    assert re.search(r"layers\.\d\.self_attn\.[vo]_proj", err) and "scales of their own" in err


@pytest.mark.parametrize(
    "kind, amount", [("llama", ("--rank", 4)), ("llama", ("--bits", 2)), ("mixtral", ("--rank", 2))]
)
def test_it_has_the_form_that_vllm_loads(
    run: Run, models: Path, tmp_path: Path, kind: str, amount: tuple[Any, ...]
) -> None:
    compensated(run, models, tmp_path / "a", *amount, kind=kind)
    require_vllm_form(tmp_path / "a")
    assert in_vllm(tmp_path / "a").startswith("vLLM takes it by `vllm serve --enable-lora --max-lora-rank ")
