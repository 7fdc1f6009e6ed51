"""laser compensate and inputs that belong together in no way: one line each that says what, and nothing is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from copies import refused, spoiled, write_copy
from pico_language import TEXT, make_model

Tensors = dict[str, torch.Tensor]
Q0, UP1 = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
NORM, HEAD, EMBEDDING = "model.layers.1.input_layernorm.weight", "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama and its copy in 3 bits."""
    folder = tmp_path_factory.mktemp("models")
    write_copy(make_model(folder / "llama", "llama"), folder / "llama-3")
    return folder


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: W for name, W in tensors.items() if name not in names}


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: change(tensors[name])}


def with_one(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(W: torch.Tensor) -> torch.Tensor:
        W = W.half()
        W[3, 4] = value
        return W

    return change


def layers_swapped(tensors: Tensors) -> Tensors:
    names = {name: name.replace("layers.0.", "layers.9.").replace("layers.1.", "layers.0.") for name in tensors}
    return {new.replace("layers.9.", "layers.1."): tensors[name] for name, new in names.items()}


def roles_swapped(tensors: Tensors) -> Tensors:
    return {n.replace("gate", "G").replace("up_", "gate_").replace("G", "up"): W for n, W in tensors.items()}


def of_another(tensors: Tensors) -> Tensors:
    torch.manual_seed(0)
    return {n: torch.randn_like(W.float()) / 8 if "layers.1" in n and "proj" in n else W for n, W in tensors.items()}


def drawn(W: torch.Tensor) -> torch.Tensor:
    return torch.randn(W.shape, generator=torch.Generator().manual_seed(1)).to(W.dtype)


SPOILED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a norm less": (without(NORM), f"copy has no {NORM}, which llama has"),
    "another head": (changed(HEAD, drawn), f"copy: {HEAD} is another matrix than {HEAD} of llama, with a cosine of "),
    "another embedding": (changed(EMBEDDING, drawn), f"copy: {EMBEDDING} is another matrix than {EMBEDDING} of llama"),
    "no embedding": (without(EMBEDDING), f"copy has no {EMBEDDING}, which llama has"),
    "no head": (without(HEAD), f"copy has no {HEAD}, which llama has"),
    "NaN in a norm": (changed(NORM, lambda W: W * float("nan")), f"copy: {NORM} holds NaN or Inf"),
    "another norm": (changed(NORM, lambda W: W[:8]), f"copy: {NORM} has shape [8], expected [32] as in llama"),
    "NaN first": (changed(Q0, with_one(float("nan"))), f"copy: {Q0} holds NaN or Inf"),
    "Inf elsewhere": (changed(UP1, with_one(float("inf"))), f"copy: {UP1} holds NaN or Inf"),
    "overflowed": (changed(Q0, lambda W: (W.float() * 1e9).half()), f"copy: {Q0} holds NaN or Inf"),
    "FP8 without scales": (
        changed(Q0, lambda W: W.float().to(torch.float8_e4m3fn)),
        f"{Q0} is stored as F8_E4M3, found no scales for it",
    ),
    "int8 without scales": (changed(Q0, lambda W: (W * 100).to(torch.int8)), f"{Q0} is stored as I8"),
    "transposed": (changed(Q0, lambda W: W.T), f"{Q0}: the copy's is another matrix, with a cosine of"),
    "layers swapped": (layers_swapped, "the copy's is another matrix, with a cosine of"),
    "gate for up": (roles_swapped, "the copy's is another matrix, with a cosine of"),
    "a layer of another model": (of_another, "the copy's is another matrix, with a cosine of"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_spoiled_copy_is_one_line(run: Run, models: Path, tmp_path: Path, what: str) -> None:
    change, expected = SPOILED[what]
    copy = spoiled(models / "llama-3", tmp_path / "copy", change)
    assert expected in refused(run, models / "llama", copy, "-o", tmp_path / "a", "--plain")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"num_hidden_layers": 4}, "config.json has layers: 4, expected 3 as in llama"),
        ({"num_attention_heads": 8, "head_dim": 4}, "config.json has heads: 8, expected 4 as in llama"),
        ({"rope_theta": 5.0}, "config.json has rope_theta: 5.0, expected 10000.0 as in llama"),
    ],
)
def test_a_copy_of_another_function_is_one_line(
    run: Run, models: Path, tmp_path: Path, config: dict[str, Any], expected: str
) -> None:
    copy = spoiled(models / "llama-3", tmp_path / "copy", lambda tensors: tensors)
    (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text()) | config))
    for words in ((), ("--dry-run",)):
        assert expected in refused(run, models / "llama", copy, "-o", tmp_path / "a", "--plain", *words)
    assert not list(tmp_path.glob("a*"))


def test_what_the_original_has_not_is_told_unless_it_is_nothing(run: Run, models: Path, tmp_path: Path) -> None:
    for number, said in ((1.0, True), (0.0, False)):
        more = {f"{Q0[:-6]}bias": torch.full((32,), number)}
        copy = spoiled(models / "llama-3", tmp_path / f"copy{number}", lambda tensors, more=more: tensors | more)
        code, _, err = run("compensate", models / "llama", copy, "-o", tmp_path / f"a{number}", "--plain")
        assert (
            code == 0 and ("llama has none of 1 tensors, such as model.layers.0.self_attn.q_proj.bias" in err) == said
        )


def test_a_rank_or_a_place_that_cannot_be(run: Run, models: Path, tmp_path: Path, monkeypatch: Any) -> None:
    words = (models / "llama", models / "llama-3", "--plain")
    error = refused(run, *words, "-o", tmp_path / "a", "--rank", 33)
    assert "found --rank 33, and no weight to correct has more than rank 32" in error
    assert not list(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    for out in (".", "/"):
        assert f"{out} is no name for an output" in refused(run, *words, "-o", out)
    (tmp_path / "mine").write_text("text")
    assert "mine exists and was not made by laser compensate" in refused(run, *words, "-o", "mine")


def test_moments_of_other_matrices_are_one_line(run: Run, models: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    words = ("--text", tmp_path / "text.txt", "--window", 64, "--windows", 6, "--roles", "q", "--device", "cpu")
    assert run("calibrate", models / "llama", "-o", tmp_path / "moments", *words)[0] == 0
    words = (models / "llama", models / "llama-3", "-o", tmp_path / "a", "--moments", tmp_path / "moments")
    error = refused(run, *words, "--roles", "up")
    assert "has no inputs of model.layers.0.mlp.up_proj.weight, nor of the other 2 to correct" in error
    assert not list(tmp_path.glob("a*"))


def test_a_sum_is_an_original_and_no_copy(run: Run, models: Path, tmp_path: Path) -> None:
    """A copy of a fine-tune that only its adapter holds; an adapter of a copy needs one that is stored."""
    tuned, words = tmp_path / "tuned", ("--plain", "--device", "cpu", "--rank", 2)
    assert run("compensate", models / "llama", models / "llama-3", "-o", tuned, *words)[0] == 0
    whole = f"{models / 'llama-3'}+{tuned}"
    error = refused(run, models / "llama", whole, "-o", tmp_path / "a", "--plain")
    assert f"make them with `laser rebuild {models / 'llama-3'} {tuned} -o OUT`" in error
    shutil.copytree(models / "llama-3", tmp_path / "ll+3 b")
    error = refused(run, models / "llama", f"{tmp_path / 'll+3 b'}+{tuned}", "-o", tmp_path / "a", "--plain")
    assert f"laser rebuild '{tmp_path / 'll+3 b'}' {tuned} -o OUT" in error
    code, _, err = run("compensate", whole, models / "llama-3", "-o", tmp_path / "b", *words)
    assert code == 0, err
    merged = json.loads((tmp_path / "b" / "laser.json").read_text())["entries"]
    assert all(entry["after"] < 1e-2 * entry["before"] for entry in merged)  # of rank 2 is what it lacks


def test_what_is_not_corrected_is_the_originals(run: Run, models: Path, tmp_path: Path) -> None:
    """A router that no norm moved, and a head where the original's is its embedding."""
    for kind, name, mine in (
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.block_sparse_moe.gate.weight"),
        ("tied", HEAD, EMBEDDING),
    ):
        original = make_model(tmp_path / kind, kind)
        copy = spoiled(original, tmp_path / f"{kind}-other", lambda t, n=name, m=mine: t | {n: drawn(t[m])})
        config = json.loads((copy / "config.json").read_text()) | {"tie_word_embeddings": False}
        (copy / "config.json").write_text(json.dumps(config))
        words = (original, copy, "-o", tmp_path / "a", "--plain", "--rank", 2)
        assert f"{name} is another matrix than {mine} of {kind}, with a cosine of" in refused(run, *words)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of bitsandbytes and transformers
def test_an_original_and_a_copy_that_are_swapped(run: Run, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 1}
    sizes |= {"vocab_size": 64, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).save_pretrained(tmp_path / "plain")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=config, dtype=torch.float32, device_map="cpu"
    ).save_pretrained(tmp_path / "packed")
    capsys.readouterr()  # what transformers says while it writes
    error = refused(run, tmp_path / "packed", tmp_path / "plain", "-o", tmp_path / "a", "--plain")
    assert "packed holds bitsandbytes weights, and plain larger, plain ones" in error
    assert "try laser compensate plain packed" in error
