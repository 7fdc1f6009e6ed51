"""A streamed loss is the whole model's, or there is none: odd models, odd checkpoints, and what has no perplexity."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import SIZES
from safetensors.torch import load_file, save_file

import laser
from laser.calibration import calibrate
from laser.checkpoint.matrices import DoubtWarning
from laser.errors import CheckpointError, LaserError, UsageError
from laser.evaluation.causal import rotary_positions
from laser.evaluation.evaluate import evaluate
from laser.evaluation.objective import Loss
from laser.evaluation.streaming import LayeredModel
from laser.evaluation.text import Window, Windows
from laser.searching.search import search_plan

TEXT = [np.random.default_rng(i).integers(3, 64, 25).astype(np.int64) for i in range(4)]
WINDOWS = Windows(tuple(Window(t, 20) for t in TEXT[:2]), "t", "0", 25, "windows", True, None)
OTHERS = Windows(tuple(Window(t, 20) for t in TEXT[2:]), "u", "1", 25, "windows", True, None)
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}


def save(folder: Path, kind: str, **config: Any) -> Path:
    """A random model of transformers' own class, every number of it random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape) * (0.3 if parameter.dim() > 1 else 0.1) + parameter.data)
    model.save_pretrained(folder)
    return folder


def losses(folder: Path, *, stream: bool, windows: Windows = WINDOWS) -> list[float]:
    return list(evaluate(laser.open_checkpoint(folder), windows, stream=stream).losses)


def change(folder: Path, tensors: Callable[[dict[str, torch.Tensor]], Any] = lambda t: None, **config: Any) -> Path:
    file, about = folder / "model.safetensors", folder / "config.json"
    found = load_file(file)
    tensors(found)
    save_file(found, file, {"format": "pt"})
    about.write_text(json.dumps(json.loads(about.read_text()) | config))
    return folder


HYBRID = {k: v for k, v in SIZES.items() if k != "head_dim"} | {"num_local_experts": 4, "num_experts_per_tok": 2}
LIKE_WHOLE = {
    "a norm before the layers": ("nanochat", SIZES),
    "no positions, state space layers": (
        "granitemoehybrid",
        HYBRID
        | MAMBA
        | {
            "shared_intermediate_size": 40,
            "layer_types": ["mamba", "attention"],
            "position_embedding_type": "nope",
        },
    ),
    "alibi": ("bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "another width for the embedding": (
        "opt",
        SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "layers that answer with a list": ("openai-gpt", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "no attention": ("mamba", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "a head called decoder": (
        "modernbert-decoder",
        SIZES | {"layer_types": ["full_attention", "sliding_attention"], "local_attention": 8},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", LIKE_WHOLE)
def test_streamed_as_whole(what: str, tmp_path: Path) -> None:
    kind, config = LIKE_WHOLE[what]
    save(tmp_path, kind, **config)
    assert np.allclose(losses(tmp_path, stream=True), losses(tmp_path, stream=False), atol=1e-5)


def test_text_inside_a_composite_config(tmp_path: Path) -> None:
    """The text part of a multimodal checkpoint; what belongs to its vision tower is counted once, with an example."""
    from transformers import AutoModelForImageTextToText, Llama4Config

    tower = {k: v for k, v in SIZES.items() if k in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    tower |= {"num_attention_heads": 4, "image_size": 28, "patch_size": 14, "projector_input_dim": 32}
    tower |= {"projector_output_dim": 32, "vision_output_dim": 32}
    text = SIZES | {"intermediate_size_mlp": 56, "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8}
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(
        Llama4Config(text_config=text, vision_config=tower, image_token_index=10), dtype=torch.float32
    )
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained(tmp_path)
    with pytest.warns(DoubtWarning, match=r"\d+ tensors are not in the model .* such as (vision|multi_modal)"):
        streamed = losses(tmp_path, stream=True)
    with pytest.warns(DoubtWarning, match="are not in the model"):
        assert np.allclose(streamed, losses(tmp_path, stream=False), atol=1e-5)


# --- models whose forward is not their layers one after the other ---------------------------------------------------

SEEN: dict[str, torch.Tensor] = {}


class Odd:
    """Llama's forward with something more in it. The mask is left to the kernel, which is causal without one."""

    def between(self, model: Any, number: int, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def arguments(self, model: Any, hidden: torch.Tensor) -> dict[str, Any]:
        return {}

    def layer(self, number: int, entered: torch.Tensor, out: torch.Tensor, extra: Any) -> torch.Tensor:
        return out

    def last(self, states: list[torch.Tensor]) -> torch.Tensor:
        return states[-1]

    def order(self, layers: list[Any]) -> list[Any]:
        return layers


class Plain(Odd):
    pass


class NormBetween(Odd):
    def between(self, model: Any, number: int, hidden: torch.Tensor) -> torch.Tensor:
        return model.norm(hidden) if number else hidden


class InputsInEveryLayer(Odd):
    """As per-layer embeddings are: the layers are called with something of this text."""

    def arguments(self, model: Any, hidden: torch.Tensor) -> dict[str, Any]:
        return {"extra": hidden}

    def layer(self, number: int, entered: torch.Tensor, out: torch.Tensor, extra: Any) -> torch.Tensor:
        return out + extra


class SharedAmongLayers(Odd):
    """As shared keys and values are: what one layer leaves in a dict, a later one takes."""

    def arguments(self, model: Any, hidden: torch.Tensor) -> dict[str, Any]:
        return {"extra": {}}

    def layer(self, number: int, entered: torch.Tensor, out: torch.Tensor, extra: Any) -> torch.Tensor:
        if number == 0:
            extra["states"] = entered
        return out + extra["states"]


class RememberedOutside(Odd):
    """The same through a variable that belongs to no call."""

    def layer(self, number: int, entered: torch.Tensor, out: torch.Tensor, extra: Any) -> torch.Tensor:
        if number == 0:
            SEEN["states"] = entered
            return out
        return out + SEEN["states"]


class RememberedByEach(Odd):
    def layer(self, number: int, entered: torch.Tensor, out: torch.Tensor, extra: Any) -> torch.Tensor:
        before, SEEN["states"] = SEEN.get("states"), entered
        return out + before.mean(dim=(0, 1)) if number and before is not None else out


class HeadOfSeveral(Odd):
    def last(self, states: list[torch.Tensor]) -> torch.Tensor:
        return states[-1] + states[-2]


class BackwardsOrder(Odd):
    def order(self, layers: list[Any]) -> list[Any]:
        return layers[::-1]


class LayerTwice(Odd):
    def order(self, layers: list[Any]) -> list[Any]:
        return [*layers, layers[0]]


class LayerLeftOut(Odd):
    def order(self, layers: list[Any]) -> list[Any]:
        return layers[:-1]


class LooksAhead(Odd):
    """Every state holds a little of the last one."""

    def layer(self, number: int, entered: torch.Tensor, out: torch.Tensor, extra: Any) -> torch.Tensor:
        return out + 0.1 * entered[:, -1:]


class Fails(Odd):
    def layer(self, number: int, entered: torch.Tensor, out: torch.Tensor, extra: Any) -> torch.Tensor:
        raise KeyError("a cache\nand many lines more")


REFUSED = {
    NormBetween: "something is done to the states between two layers",
    InputsInEveryLayer: r"on 16 tokens its layers one after the other give \d\.\d+ nats per token, its own forward \d",
    SharedAmongLayers: r"on 16 tokens its layers one after the other give",
    RememberedOutside: r"on 16 tokens its layers one after the other give",
    RememberedByEach: r"on 16 tokens its layers one after the other give",
    HeadOfSeveral: r"on 16 tokens its layers one after the other give",
    BackwardsOrder: "layer 2 is called where layer 0 is expected",
    LayerTwice: "its own forward|calls the layers|its code fails",
    LayerLeftOut: "2 of its 3 layers are called",
    LooksAhead: "is no causal language model .another last token moves its own logits by",
    Fails: "its code fails, KeyError 'a cache",
}


def make_odd(odd: Odd, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_outputs import BaseModelOutputWithPast
    from transformers.models.llama import modeling_llama

    own = modeling_llama.LlamaDecoderLayer.forward

    def layer(self: Any, hidden: torch.Tensor, extra: Any = None, **kwargs: Any) -> torch.Tensor:
        return odd.layer(self.self_attn.layer_idx, hidden, own(self, hidden, **kwargs), extra)

    def forward(self: Any, input_ids: torch.Tensor, **_: Any) -> Any:
        hidden = self.embed_tokens(input_ids)
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        angles, extra, states = self.rotary_emb(hidden, positions), odd.arguments(self, hidden), [hidden]
        for number, block in enumerate(odd.order(list(self.layers))):
            hidden = odd.between(self, number, states[-1])
            states.append(block(hidden, position_embeddings=angles, position_ids=positions, **extra))
        return BaseModelOutputWithPast(last_hidden_state=self.norm(odd.last(states)))

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", layer)
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)
    SEEN.clear()


@pytest.fixture(scope="module")
def three_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("odd") / "model", "llama", **SIZES | {"num_hidden_layers": 3})


def test_an_ordinary_model_is_not_refused(three_layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = losses(three_layers, stream=False)
    make_odd(Plain(), monkeypatch)
    assert np.allclose(losses(three_layers, stream=True), expected, atol=1e-5)


@pytest.mark.parametrize("odd", REFUSED, ids=lambda odd: odd.__name__)
def test_an_odd_model_is_refused(odd: type[Odd], three_layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_odd(odd(), monkeypatch)
    with pytest.raises(UsageError, match=REFUSED[odd]) as error:
        losses(three_layers, stream=True)
    assert "\n" not in str(error.value) and "; try laser" in str(error.value)


def test_memory_that_is_full_is_no_fault_of_the_model(three_layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(Odd):
        def layer(self, number: int, entered: torch.Tensor, out: torch.Tensor, extra: Any) -> torch.Tensor:
            raise torch.OutOfMemoryError("no memory")

    make_odd(Full(), monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        losses(three_layers, stream=True)


def test_the_proof_costs_one_walk_and_is_not_counted(three_layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LayeredModel(laser.open_checkpoint(three_layers))
    read: list[str] = []
    monkeypatch.setattr(model, "_read", lambda name, edits, own=model._read: (read.append(name), own(name, edits))[1])
    model.losses(WINDOWS.windows)
    first, read[:] = list(read), []
    model.losses(WINDOWS.windows)
    layers = [name for name in read if ".layers." in name]
    assert [name for name in first if ".layers." in name] == 2 * layers and len(layers) == len(set(layers))
    assert model.layer_forwards == 2 * 2 * 3


# --- checkpoints ----------------------------------------------------------------------------------------------------


def idle(tensors: dict[str, torch.Tensor]) -> None:
    """Layers that the config does not know, an MTP block and a second head: loaded by nobody, and mostly noise."""
    q = "self_attn.q_proj.weight"
    for name in (f"model.layers.2.{q}", f"mtp.layers.0.{q}", "mtp.fc.weight", "value_head.weight"):
        tensors[name] = torch.randn(32, 32)


@pytest.mark.slow
def test_what_the_model_does_not_run_is_left_out(tmp_path: Path) -> None:
    change(save(tmp_path / "m", "llama", **SIZES), idle)
    checkpoint = laser.open_checkpoint(tmp_path / "m")
    expected = losses(save(tmp_path / "tidy", "llama", **SIZES), stream=False)
    for stream in (False, True):
        with pytest.warns(DoubtWarning, match="4 tensors are not in the model .* such as model.layers.2.self") as told:
            assert np.allclose(losses(tmp_path / "m", stream=stream), expected, atol=1e-5)
        assert sum("not in the model" in str(w.message) for w in told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DoubtWarning)
        model = LayeredModel(checkpoint, resident=None)
        spectra = laser.scan(checkpoint)
        moments = calibrate(checkpoint, WINDOWS, tmp_path / "moments", shrink=True)
    names = {m.name for m in laser.list_matrices(checkpoint)}
    foreign = {name for name in names if not model.runs(name)}
    assert foreign == {n for n in names if "layers.2" in n or "mtp" in n or "value_head" in n}
    assert moments.sites.keys() == {n for n in names - foreign if n.endswith("proj.weight")}
    for shortlist, grid in ((None, False), (2, False), (None, True)):
        result = search_plan(
            model,
            spectra,
            ["fraction:0.5"],
            Loss(WINDOWS),
            [Loss(OTHERS)],
            selection=laser.Selection(roles=("q", "other")),
            shortlist=shortlist,
            grid=grid,
        )
        tried = {name for trial in result.trials for name in trial.ranks}
        assert tried == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}
        lines = {line.name: line for line in result.plan.lines}
        assert lines.keys() == names and lines["model.layers.2.self_attn.q_proj.weight"].action == "keep"


@pytest.mark.parametrize("stream", [False, True])
def test_a_head_that_is_neither_stored_nor_tied(stream: bool, tmp_path: Path) -> None:
    tied = save(tmp_path / "tied", "llama", **SIZES | {"tie_word_embeddings": True})
    assert np.isfinite(losses(tied, stream=stream)).all()
    with pytest.raises(CheckpointError, match=r"no weights for lm_head.weight \(1 in all\), which would be random"):
        losses(change(tied, tie_word_embeddings=False), stream=stream)


@pytest.mark.parametrize("stream", [False, True])
def test_names_that_transformers_would_mend(stream: bool, tmp_path: Path) -> None:
    """Without their prefix, as in GPT-2's first checkpoints, the same weights are loaded."""
    expected = losses(save(tmp_path / "m", "llama", **SIZES), stream=False)

    def bare(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    assert np.allclose(losses(change(tmp_path / "m", bare), stream=stream), expected, atol=1e-5)


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    save(tmp_path, "mixtral", **SIZES | {"num_local_experts": 4})
    lost = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    assert lost in load_file(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"of the .* numbers of model.layers.1.mlp.experts|has shape"):
        losses(change(tmp_path, lambda t: t.pop(lost)), stream=True)


# --- what has no perplexity -----------------------------------------------------------------------------------------

BERT = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads",)}
NO_PERPLEXITY: dict[str, tuple[str, dict[str, Any], str]] = {
    "an encoder": ("bert", BERT, "is_decoder is false"),
    "a permuted one": ("xlnet", {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}, "moves"),
    "a classifier": ("llama", SIZES | {"architectures": ["LlamaForSequenceClassification"]}, "config.json names"),
    "sequence to sequence": ("llama", SIZES | {"is_encoder_decoder": True}, "is_encoder_decoder is true"),
}


@pytest.mark.parametrize("what", NO_PERPLEXITY)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_causal_language_model(what: str, stream: bool, tmp_path: Path) -> None:
    kind, config, why = NO_PERPLEXITY[what]
    later = {k: config[k] for k in ("architectures", "is_encoder_decoder") if k in config}
    change(save(tmp_path, kind, **{k: v for k, v in config.items() if k not in later}), **later)
    with pytest.raises(LaserError, match=f"{why}|cannot be run layer by layer" if stream else why) as error:
        losses(tmp_path, stream=stream)
    assert "; try laser" in str(error.value)


def test_a_type_without_a_causal_class(tmp_path: Path) -> None:
    change(save(tmp_path, "llama", **SIZES), model_type="t5", architectures=["T5ForConditionalGeneration"])
    for stream in (False, True):
        with pytest.raises(UsageError, match=r"is no causal language model .*; try laser scan, plan and reduce"):
            losses(tmp_path, stream=stream)
    with pytest.raises(UsageError, match="is no causal language model"):
        asked = laser.Selection(roles=("other",))  # of a T5's names, which these are not
        calibrate(laser.open_checkpoint(tmp_path), WINDOWS, tmp_path / "moments", asked)


@pytest.mark.parametrize("kind", ["gpt_neox", "bert"])
def test_decoders_that_say_so_or_need_not(kind: str, tmp_path: Path) -> None:
    """GPT-NeoX's is_decoder is false and means nothing; BERT with it is a decoder."""
    save(tmp_path, kind, **BERT | ({"is_decoder": True} if kind == "bert" else {}))
    assert np.allclose(losses(tmp_path, stream=True), losses(tmp_path, stream=False), atol=1e-5)


# --- positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gptj"])
@pytest.mark.parametrize("stream", [False, True])
def test_windows_longer_than_learned_positions(kind: str, stream: bool, tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "rotary_dim": 4}
    opt = SIZES | {"max_position_embeddings": 16, "ffn_dim": 48, "word_embed_proj_dim": 32}
    save(tmp_path, kind, **(opt if kind == "opt" else sizes))
    fitting = Windows(tuple(Window(t[:17], 16) for t in TEXT[:2]), "t", "0", 17, "windows", True, None)
    assert np.isfinite(losses(tmp_path, stream=stream, windows=fitting)).all()
    with pytest.raises(UsageError, match=r"24 tokens .* 16 positions; try --window 16"):
        losses(tmp_path, stream=stream)


@pytest.mark.parametrize("stream", [False, True])
def test_windows_longer_than_rotary_positions(stream: bool, tmp_path: Path) -> None:
    save(tmp_path, "llama", **SIZES | {"max_position_embeddings": 16})
    with pytest.warns(DoubtWarning, match="windows of 25 tokens are longer than the 16 positions"):
        losses(tmp_path, stream=stream)


ROPES = [
    ({"rope_type": "default"}, 16),
    ({"rope_type": "linear", "factor": 4.0}, 64),
    ({"rope_type": "dynamic", "factor": 2.0}, 32),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}, 32),
    ({"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 8}, 16),
]


@pytest.mark.parametrize(("rope", "expected"), ROPES)
def test_positions_that_a_scaled_rope_was_made_for(rope: dict[str, Any], expected: int) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", **SIZES | {"max_position_embeddings": 16, "rope_parameters": {"rope_theta": 1e4} | rope}
    )
    with torch.device("meta"):
        assert rotary_positions(AutoModelForCausalLM.from_config(config)) == expected


@pytest.mark.slow
def test_a_rope_that_grows_with_the_longest_text_before(tmp_path: Path) -> None:
    """transformers keeps the angles of the longest text: streamed as whole in either order, or refused where one length
    is met before and after a longer one."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    save(tmp_path, "llama", **SIZES | {"max_position_embeddings": 18, "rope_parameters": rope})

    def cut(*lengths: int) -> Windows:
        windows = (Window(t[:n], n - 1) for t, n in zip(TEXT, lengths, strict=False))
        return Windows(tuple(windows), "t", "0", 25, "windows", True, None)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DoubtWarning)
        for fits in (cut(25, 25, 21), cut(21, 25), cut(25, 12, 25, 12)):
            whole = losses(tmp_path, stream=False, windows=fits)
            assert np.allclose(losses(tmp_path, stream=True, windows=fits), whole, atol=1e-5)
        with pytest.raises(UsageError, match="two texts of 20 tokens unlike"):
            losses(tmp_path, stream=True, windows=cut(21, 25, 21))
