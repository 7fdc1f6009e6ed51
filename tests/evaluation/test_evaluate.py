"""Perplexity and its error bar; whole model, streamed model and transformers' own loss must agree."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, mixtral_config, mixtral_tensors, write_checkpoint_directory
from pico_language import TEXT, make_model, write_tokenizer

from laser.checkpoint.reader import open_checkpoint
from laser.errors import CheckpointError, DoubtWarning, NumericalError, OutputError, RecordError, UsageError
from laser.evaluation.activations import Store
from laser.evaluation.evaluate import evaluate, load_whole
from laser.evaluation.perplexity import Perplexity, difference, weighted_mean
from laser.evaluation.streaming import LayeredModel
from laser.evaluation.text import Text, Windows, cut_windows, load_tokenizer

KINDS = ["mixtral", "llama", "tied", "sliding"]


def windows_for(
    path: Path, text: str = TEXT, length: int = 48, limit: int | None = 4, mode: str = "windows"
) -> Windows:
    return cut_windows(Text("t", text), load_tokenizer(path), length=length, limit=limit, mode=mode)


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_equals_whole_equals_transformers(kind: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / kind, kind))
    windows = windows_for(checkpoint.path)
    whole = evaluate(checkpoint, windows)
    streamed = evaluate(checkpoint, windows, stream=True)
    assert np.allclose(streamed.losses, whole.losses, rtol=0, atol=1e-6)
    model = load_whole(checkpoint, "float32")
    for window, loss in zip(windows.windows, whole.losses, strict=True):
        ids = torch.from_numpy(window.tokens)[None]
        assert float(model(input_ids=ids, labels=ids).loss.detach()) == pytest.approx(loss, abs=1e-5)
    assert whole.nll == pytest.approx(np.average(whole.losses, weights=whole.counts), abs=1e-12)


def test_an_adapter_beside_the_weights_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers puts it on top of them wherever peft is installed; laser measures what it reads, and says so."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the adapter is loaded")

    path = make_model(tmp_path / "llama", "llama")
    plain = evaluate(open_checkpoint(path), windows_for(path))
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    for module in ("models.auto.auto_factory", "integrations.peft"):
        monkeypatch.setattr(f"transformers.{module}.is_peft_available", lambda: True)
    monkeypatch.setattr("transformers.PreTrainedModel.load_adapter", refuse)
    with pytest.warns(DoubtWarning, match="adapter_config.json lies beside the weights"):
        checkpoint = open_checkpoint(path)
    assert evaluate(checkpoint, windows_for(path)).losses == plain.losses


def test_the_sliding_window_matters(tmp_path: Path) -> None:
    """Or the test above could not see a mask that streaming forgot."""
    sliding, full = make_model(tmp_path / "a", "sliding"), make_model(tmp_path / "b", "llama")
    losses = [evaluate(open_checkpoint(p), windows_for(p), stream=True).nll for p in (sliding, full)]
    assert abs(losses[0] - losses[1]) > 1e-4


def test_a_uniform_model_has_the_vocabulary_as_perplexity(tmp_path: Path) -> None:
    tensors = mixtral_tensors() | {"lm_head.weight": torch.zeros(VOCABULARY, 32, dtype=torch.bfloat16)}
    path = write_tokenizer(write_checkpoint_directory(tmp_path / "uniform", tensors, mixtral_config()))
    for stream in (False, True):
        record = evaluate(open_checkpoint(path), windows_for(path), stream=stream)
        assert record.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
        assert record.standard_error == pytest.approx(0, abs=1e-6)
        assert record.bits_per_byte == pytest.approx(math.log2(VOCABULARY), rel=1e-6)  # a byte per token


@pytest.mark.slow
def test_bfloat16_and_spilled_activations(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "m", "mixtral"))
    windows = windows_for(checkpoint.path)
    spilled = evaluate(checkpoint, windows, stream=True, store=Store(limit=0, directory=tmp_path))
    assert spilled.losses == evaluate(checkpoint, windows, stream=True).losses
    assert not list(tmp_path.glob("laser-activations-*"))
    low = evaluate(checkpoint, windows, stream=True, dtype="bfloat16")
    assert low.nll != spilled.nll and low.nll == pytest.approx(spilled.nll, abs=0.05)
    with pytest.raises(OutputError, match="cannot write"):
        evaluate(checkpoint, windows, stream=True, store=Store(limit=0, directory=tmp_path / "absent"))


def test_streaming_frees_every_layer(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "m", "mixtral"))
    model = LayeredModel(checkpoint)
    model.losses(windows_for(checkpoint.path).windows)
    assert all(p.device.type == "meta" for p in model.model.parameters())
    assert model.layer_forwards == 3 * 4 and model.store.used == 0


@pytest.mark.slow
def test_an_edit_is_seen_and_undone_exactly(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "m", "mixtral"))
    windows = windows_for(checkpoint.path).windows
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    W = checkpoint.read(name)
    for resident in (None, 2, 0):
        model = LayeredModel(checkpoint, resident=resident)
        before = model.losses(windows)
        model.edit(name, torch.zeros_like(W))
        edited = model.losses(windows)
        model.edit(name, None)
        assert edited.sums != before.sums and model.losses(windows) == before
    # the same edit on disk, read by transformers itself
    tensors = mixtral_tensors() | {name: torch.zeros_like(W)}
    path = write_tokenizer(write_checkpoint_directory(tmp_path / "edited", tensors, mixtral_config()))
    losses = evaluate(open_checkpoint(path), windows_for(path)).losses
    assert np.allclose(np.array(edited.sums) / [w.scored for w in windows], losses, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["mixtral", "llama"])
def test_gradients_are_autograds_own(kind: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "m", kind))
    windows = windows_for(checkpoint.path).windows
    expert = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    names = ["model.layers.2.self_attn.q_proj.weight", "model.layers.1.self_attn.o_proj.weight"]
    names += [expert] if kind == "mixtral" else ["model.layers.1.mlp.down_proj.weight"]
    model = LayeredModel(checkpoint)
    boundaries = {}
    activations = model.embed(windows)
    for layer in range(model.layers + 1):
        boundaries[layer + 1] = dataclasses.replace(activations, hidden=activations.hidden.clone())
        if layer < model.layers:
            model.run_layer(layer, activations)
    found = dict(model.gradients(windows, boundaries, names))
    whole = load_whole(checkpoint, "float32")
    total = sum(w.scored for w in windows)
    for window in windows:
        ids = torch.from_numpy(window.tokens)[None]
        (whole(input_ids=ids, labels=ids).loss * window.scored / total).backward()
    parameters = dict(whole.named_parameters())
    for name in names:
        if name == expert:
            expected = parameters["model.layers.1.mlp.experts.gate_up_proj"].grad[2, 48:]
        else:
            expected = parameters[name].grad
        assert expected is not None and float(expected.abs().max()) > 0
        assert torch.allclose(found[name], expected, rtol=1e-4, atol=1e-7)


def test_the_standard_error_is_that_of_repeated_texts() -> None:
    """Draw windows of unequal length many times over: the error bar must be the spread of the means."""
    generator = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(2000):
        counts = generator.integers(50, 512, 40)
        mean, error = weighted_mean(generator.normal(3.0, 0.3, 40).tolist(), counts.tolist())
        means.append(mean)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.05)
    assert weighted_mean([3.0], [10]) == (3.0, None)


def test_the_record_is_saved_and_strictly_loaded(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "m", "mixtral"))
    record = evaluate(checkpoint, windows_for(checkpoint.path))
    record.save(tmp_path / "eval.json")
    assert Perplexity.load(tmp_path / "eval.json") == record
    document = json.loads((tmp_path / "eval.json").read_text())
    (tmp_path / "deep.json").write_text('{"kind": ' + "[" * 50_000)
    with pytest.raises(RecordError, match=r"deep\.json is not a readable eval file"):
        Perplexity.load(tmp_path / "deep.json")
    for change, message in (
        ({"version": 1}, "version 1, expected .eval. version 2; .*laser eval MODEL"),
        ({"version": 3}, "version 3"),
        ({"nll": 0.5}, "changed by hand"),
        ({"losses": document["losses"][:-1]}, "not a whole eval file"),
        ({"more": 1}, "not a whole eval file"),
        ({"losses": "x"}, "not a whole eval file"),
        ({"counts": [0] * len(document["counts"])}, "every count 1 or more"),
        ({"standard_error": 9.0}, r"found standard_error 9\.0, expected"),
        ({"standard_error": "x"}, 'standard_error is "x", expected a number or null'),
        ({"bytes": "x"}, 'bytes is "x", expected a whole number or null'),
        ({"bos": 1}, "bos is 1, expected true or false"),
        ({"identity": None}, "identity is null, expected a text"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(document | change))
        with pytest.raises(RecordError, match=message):
            Perplexity.load(tmp_path / "bad.json")


def test_the_paired_difference(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "m", "mixtral"))
    a = evaluate(checkpoint, windows_for(checkpoint.path))
    same = difference(a, a)
    assert (same.nll, same.standard_error) == (0.0, 0.0) and "no difference" in same.verdict
    b = dataclasses.replace(a, losses=tuple(x + 0.1 for x in a.losses), nll=a.nll + 0.1)
    worse = difference(a, b)
    # paired: a shift of every window alike has no error at all, though each loss alone has a large one
    assert worse.nll == pytest.approx(0.1) and worse.standard_error == pytest.approx(0, abs=1e-12)
    assert worse.verdict == "worse" and difference(b, a).verdict == "better" and (a.standard_error or 0) > 1e-3
    with pytest.raises(UsageError, match=r"not measured on the same tokens: windows is 2, expected 4"):
        difference(a, evaluate(checkpoint, windows_for(checkpoint.path, limit=2)))
    with pytest.raises(UsageError, match="text_sha256"):
        difference(a, evaluate(checkpoint, windows_for(checkpoint.path, text="another " + TEXT)))


@pytest.mark.parametrize("stream", [False, True])
def test_bad_models_are_refused(stream: bool, tmp_path: Path) -> None:
    path = make_model(tmp_path / "m", "mixtral")
    write_tokenizer(path, extra=3)
    with pytest.raises(UsageError, match=r"token 66, but m embeds only 64"):
        evaluate(open_checkpoint(path), windows_for(path, text="no! " * 30), stream=stream)
    tensors = mixtral_tensors()
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
    nan = write_tokenizer(write_checkpoint_directory(tmp_path / "nan", tensors, mixtral_config()))
    with pytest.raises(NumericalError, match=r"nan: the loss of window 0 of 4 of t is nan"):
        evaluate(open_checkpoint(nan), windows_for(nan), stream=stream)
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    gap = write_tokenizer(write_checkpoint_directory(tmp_path / "gap", tensors, mixtral_config()))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.o_proj\.weight"):
        evaluate(open_checkpoint(gap), windows_for(gap), stream=stream)
    with pytest.raises(UsageError, match="--dtype"):
        evaluate(open_checkpoint(gap), windows_for(gap), stream=stream, dtype="float8")


def test_a_shape_that_config_does_not_expect_is_not_broadcast(tmp_path: Path) -> None:
    tensors = mixtral_tensors()
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(1, 32, dtype=torch.bfloat16)
    path = write_tokenizer(write_checkpoint_directory(tmp_path / "m", tensors, mixtral_config()))
    for stream in (False, True):
        with pytest.raises(CheckpointError, match=r"q_proj"):
            evaluate(open_checkpoint(path), windows_for(path), stream=stream)


@pytest.mark.slow
def test_it_agrees_with_lm_eval(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval, the extra [eval]")
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    checkpoint = open_checkpoint(make_model(tmp_path / "m", "mixtral"))
    windows = windows_for(checkpoint.path, length=40, limit=None, mode="rolling")
    ours = evaluate(checkpoint, windows)
    options: Any = {"tokenizer": load_tokenizer(checkpoint.path), "max_length": 40, "batch_size": 1}
    harness: Any = HFLM
    theirs = harness(load_whole(checkpoint, "float32"), **options)
    request = Instance("loglikelihood_rolling", {}, (TEXT,), 0)
    total = theirs.loglikelihood_rolling([request], disable_tqdm=True)[0]
    assert -total / ours.tokens == pytest.approx(ours.nll, abs=1e-4)
    assert ours.windows > 3
