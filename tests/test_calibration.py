"""Calibration against hooks on transformers' own model, killed, resumed and on bad input."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import CONTENT, LAYER, windows_of
from conftest import Run
from safetensors.torch import load_file, save_file

import laser
from laser import calibration
from laser.calibration import calibrate
from laser.checkpoint.matrices import Matrix
from laser.checkpoint.source import Source
from laser.errors import CheckpointError, DoubtWarning, NumericalError, OutputError, RecordError, UsageError
from laser.evaluation.evaluate import load_whole
from laser.evaluation.gradients import gradients_at_outputs
from laser.evaluation.streaming import LayeredModel
from laser.evaluation.taps import run_one_expert_at_a_time
from laser.evaluation.text import Windows
from laser.moments import Calibration, Moments, MomentsHeader, Site
from laser.selection import Selection

EXPERT = LAYER + "block_sparse_moe.experts.2."


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


@pytest.mark.slow
@pytest.mark.parametrize("full_side", [4096, 40])  # with 40, w2 (32 x 48) is known by its outputs
def test_moments_are_those_of_the_inputs(speaker: Path, tmp_path: Path, full_side: int) -> None:
    checkpoint, windows = laser.open_checkpoint(speaker), windows_of(speaker)
    path = tmp_path / "moments.safetensors"
    moments = calibrate(checkpoint, windows, path, Selection(layers=(1,)), full_side=full_side)
    assert Moments.load(path) == moments
    assert moments.calibration.tokens == sum(len(w.tokens) - 1 for w in windows.windows)
    for name, X in inputs_by_hand(speaker, windows).items():
        C, metric = X.T @ X / len(X), moments.metric(name, checkpoint.read(name))
        assert moments.tokens(name) == metric.tokens == len(X)
        z = X
        if name.endswith("w2.weight") and full_side == 40:
            assert metric.form == "outputs"
            W = checkpoint.read(name).double()
            C, z = W @ C @ W.T, X @ W.T
        assert torch.allclose(metric.moment, C, rtol=1e-4, atol=1e-5 * float(C.diagonal().max()))
        assert metric.fourth == pytest.approx(float(z.square().sum(1).square().mean()), rel=1e-4)
    q, k, gate, up = (moments.sites[n] for n in (
        LAYER + "self_attn.q_proj.weight", LAYER + "self_attn.k_proj.weight", EXPERT + "w1.weight",
        EXPERT + "w3.weight",
    ))  # fmt: skip
    assert q is k and gate is up and q is not moments.sites[LAYER + "self_attn.o_proj.weight"]


@pytest.mark.slow
def test_tokens_of_the_experts_add_up_and_the_diagonal_is_the_diagonal(speaker: Path, tmp_path: Path) -> None:
    checkpoint, windows = laser.open_checkpoint(speaker), windows_of(speaker)
    full = calibrate(checkpoint, windows, tmp_path / "a.safetensors")
    small = calibrate(checkpoint, windows, tmp_path / "b.safetensors", diagonal=True)
    routed = [s.tokens for n, s in full.sites.items() if n.startswith(LAYER) and n.endswith("w1.weight")]
    assert sum(routed) == 2 * full.calibration.tokens  # top 2
    for name in full.sites:
        if full.tokens(name):
            short, whole = (moments.metric(name, checkpoint.read(name)).moment for moments in (small, full))
            assert torch.allclose(short, whole.diagonal(), rtol=1e-5)
    assert (tmp_path / "b.safetensors").stat().st_size < (tmp_path / "a.safetensors").stat().st_size / 8
    assert full.calibration.identity != small.calibration.identity


@pytest.mark.slow
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
    calibrate(checkpoint, windows, path, tick=ran.append)
    assert ran == [2] and path.read_bytes() == straight.read_bytes()
    assert not path.with_name(path.name + ".partial").exists()


def test_what_another_command_left_of_its_first_layer_is_not_joined(
    speaker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, path = laser.open_checkpoint(speaker), tmp_path / "moments.safetensors"

    class Killed(BaseException):
        pass

    def stop(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as killed, pytest.raises(Killed):  # all sites of layer 0 written, and not that they are
        killed.setattr(calibration.Parts, "save_states", stop)
        # A pico model's layer would be one file.
        killed.setattr(calibration, "NUMBERS_IN_A_FILE", 0)
        calibrate(checkpoint, windows_of(speaker), path)
    assert len(list(path.with_name(path.name + ".partial").glob("layer-*"))) > 2
    with pytest.warns(DoubtWarning, match="another calibration.*selection differ; it got no further"):
        moments = calibrate(checkpoint, windows_of(speaker), path, Selection(roles=("q",)))
    assert {name.rpartition("self_attn.")[2] for name in moments.sites} == {"q_proj.weight"}


def begun(speaker: Path, path: Path, layers: int) -> Path:
    """What a calibration keeps that was killed after so many layers."""

    class Killed(BaseException):
        pass

    def stop(layer: int) -> None:
        if layer + 1 == layers:
            raise Killed

    with pytest.raises(Killed):
        calibrate(laser.open_checkpoint(speaker), windows_of(speaker), path, QO, tick=stop)
    return path.with_name(path.name + ".partial")


QO = Selection(roles=("q", "o"))


@pytest.mark.slow
def test_a_calibration_killed_while_it_tidies_up_is_not_done_again(
    speaker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is at its place counts where it is of this very run and every byte is as it was written, and only then."""
    checkpoint, windows, path = laser.open_checkpoint(speaker), windows_of(speaker), tmp_path / "m"
    partial = begun(speaker, path, 2)
    with monkeypatch.context() as killed:
        killed.setattr(calibration, "tidy_up", lambda *_: None)  # as a process that is killed before it tidies up
        straight = calibrate(checkpoint, windows, path, QO)
    whole, ran = path.read_bytes(), list[int]()
    original = calibration._run_layer
    # Only the layers that run say whether work is done again.
    monkeypatch.setattr(calibration, "_run_layer", lambda *a: ran.append(a[1]) or original(*a))
    left = {file.name: file.read_bytes() for file in partial.iterdir()}
    shutil.rmtree(partial)
    for count in (len(left), len(left) // 2, 0):  # how far it got
        partial.mkdir()
        for name in list(left)[:count]:
            (partial / name).write_bytes(left[name])
        assert calibrate(checkpoint, windows, path, QO, anew=True) == straight
        assert not ran and not partial.exists() and path.read_bytes() == whole
    for other in ("damaged", "diagonal", "full_side"):
        ran.clear()
        partial.mkdir()
        if other == "damaged":
            path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        wanted = {"diagonal": {"diagonal": True}, "full_side": {"full_side": 40}}.get(other, {})
        calibrate(checkpoint, windows, path, QO, anew=True, **wanted)
        assert ran == [0, 1, 2] and not partial.exists()
        assert (path.read_bytes() == whole) == (other == "damaged")


@pytest.mark.slow
def test_a_bad_file_of_a_layer_costs_that_layer(speaker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, windows, path = laser.open_checkpoint(speaker), windows_of(speaker), tmp_path / "m"
    calibrate(checkpoint, windows, tmp_path / "straight", QO)
    bad = sorted(begun(speaker, path, 2).glob("layer-00000-*"))[0]
    data = bytearray(bad.read_bytes())
    data[len(data) // 2] ^= 1
    bad.write_bytes(data)
    ran: list[int] = []
    calibrate(checkpoint, windows, path, QO, tick=ran.append)
    assert ran == [0, 2] and path.read_bytes() == (tmp_path / "straight").read_bytes()


@pytest.mark.parametrize("what", ["a file", "a link", "notes", "weights", "a directory", "a link to weights"])
def test_what_is_not_laser_s_in_the_place_of_the_partial_is_left_alone(
    speaker: Path, tmp_path: Path, what: str
) -> None:
    partial, elsewhere, name = tmp_path / "m.partial", tmp_path / "elsewhere", "layer-00000-00000.safetensors"
    elsewhere.mkdir()
    save_file({"a": torch.ones(2)}, elsewhere / "w.safetensors", metadata={"format": "pt"})
    if what == "a file":
        partial.write_text("a partial download")
    elif what == "a link":
        (elsewhere / "w.safetensors").unlink()  # an empty directory, somebody else's
        partial.symlink_to(elsewhere)
    else:
        partial.mkdir()
        if what == "notes":
            (partial / "notes.txt").write_text("mine")
        elif what == "weights":
            shutil.copy(elsewhere / "w.safetensors", partial / name)
        elif what == "a directory":
            (partial / name).mkdir()
        else:
            (partial / name).symlink_to(elsewhere / "w.safetensors")
    before = sorted((p, p.lstat().st_mtime_ns) for p in [*partial.parent.rglob("*")])
    for anew in (False, True):
        with pytest.raises(OutputError, match="move it away"):
            calibrate(laser.open_checkpoint(speaker), windows_of(speaker), tmp_path / "m", QO, anew=anew)
    assert sorted((p, p.lstat().st_mtime_ns) for p in [*partial.parent.rglob("*")]) == before


@pytest.mark.slow
def test_weights_that_change_between_layers_are_refused(speaker: Path, tmp_path: Path) -> None:
    weights, path = speaker / "model.safetensors", tmp_path / "m"
    other = load_file(weights)
    other["model.layers.2.self_attn.q_proj.weight"] *= 2

    def change(layer: int) -> None:
        if layer == 0:
            save_file(other, weights, metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match="changed while it was read"):
        calibrate(laser.open_checkpoint(speaker), windows_of(speaker), path, QO, tick=change)
    assert not path.exists() and not list(path.with_name("m.partial").glob("layer-00001-*"))
    checkpoint = laser.open_checkpoint(speaker)
    with pytest.raises(
        RecordError, match=r"belongs to another calibration.*weights differ; repeat its command, or try"
    ):
        calibrate(checkpoint, windows_of(speaker), path, QO)
    calibrate(checkpoint, windows_of(speaker), path, QO, anew=True)
    calibrate(checkpoint, windows_of(speaker), tmp_path / "straight", QO)
    assert path.read_bytes() == (tmp_path / "straight").read_bytes()


def test_what_another_calibration_got_done_is_not_dropped_where_its_states_are_damaged(
    speaker: Path, tmp_path: Path
) -> None:
    partial = begun(speaker, tmp_path / "m", 2)
    (partial / "states.safetensors").write_bytes(b"damaged")
    before = sorted(p.name for p in partial.glob("layer-*"))
    with pytest.raises(RecordError, match=r"belongs to another calibration.*selection differ.*or try --force"):
        calibrate(laser.open_checkpoint(speaker), windows_of(speaker), tmp_path / "m", Selection(roles=("q",)))
    assert before and sorted(p.name for p in partial.glob("layer-*")) == before


@pytest.mark.slow
def test_two_models_of_the_same_headers_are_told_apart(speaker: Path, tmp_path: Path, run: Run) -> None:
    """As a model and its fine-tuned copy: config, index and headers are equal, the weights are not."""
    other = tmp_path / "other"
    shutil.copytree(speaker, other)
    weights = load_file(other / "model.safetensors")
    weights[EXPERT + "w2.weight"] *= 1.5
    weights["model.layers.0.self_attn.q_proj.weight"] *= 1.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    one, two = laser.open_checkpoint(speaker), laser.open_checkpoint(other)
    assert one.identity == two.identity
    path, windows = tmp_path / "moments.safetensors", windows_of(speaker)
    calibrate(one, windows, path, Selection(layers=(1,)))
    for role in ("q", "w2"):  # whose weights are the same, but not what they meet; and others
        code, _, error = run("scan", other, "-o", tmp_path / role, "--layers", 1, "--roles", role, "--moments", path)
        assert code == 1 and "the moments was made from other weights of speaker: found other" in error
    with pytest.raises(RecordError, match=f"made from other weights of {EXPERT}w2.weight.*try laser calibrate with"):
        Moments.load(path).metric(EXPERT + "w2.weight", two.read(EXPERT + "w2.weight"))

    def stop(layer: int) -> None:
        raise KeyboardInterrupt

    path.unlink()
    with pytest.raises(KeyboardInterrupt):
        calibrate(one, windows, path, tick=stop)
    with pytest.raises(RecordError, match="belongs to another calibration"):
        calibrate(two, windows, path)


@pytest.mark.slow
def test_bad_input_gets_a_clear_error(
    speaker: Path, make_pico: Callable[..., Path], tmp_path: Path, text: Path, run: Run
) -> None:
    moments = tmp_path / "m.safetensors"
    code, _, error = run("calibrate", speaker, "-o", moments, "--text", text, "--window", 10, "--windows", 1)
    assert code == 2 and "gives 9 tokens, and the smallest of these matrices has 16 dimensions" in error
    assert not moments.exists()
    again = ("calibrate", speaker, "-o", moments, "--text", text, "--window", 10, "--windows", 1, "--ledoit-wolf")
    assert run(*again, "--roles", "q")[0] == 0
    assert run(*again)[0] == 1  # exists
    code, _, error = run("calibrate", speaker, "-o", tmp_path / "n", "--text", text, "--window", 40, "--windows", 1)
    assert code == 2 and "no expert of layer 0 has seen as many tokens as it has dimensions, found" in error
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
    with pytest.raises(NumericalError, match=rf"the input of {LAYER}self_attn.o_proj.weight is not finite"):
        calibrate(laser.open_checkpoint(speaker), windows_of(speaker), tmp_path / "m.safetensors")


def test_a_matrix_in_no_layer_cannot_be_calibrated(speaker: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no matrix of a decoder layer"):
        calibrate(laser.open_checkpoint(speaker), windows_of(speaker), tmp_path / "m", Selection(roles=("embedding",)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["calibration"].update(seed=1), "its calibration has a key 'seed'"),
        (lambda d: d["calibration"].pop("shrink"), "its calibration has no key 'shrink'"),
        (lambda d: d["source"].update(identity=None), "its source: identity is null, expected a text"),
        (lambda d: d["sites"][0].pop("fourth"), "site 1 has no key 'fourth'"),
        (lambda d: d["sites"][0].update(tokens="9"), 'site 1: tokens is "9", expected a whole number'),
        (lambda d: d.update(sites=None), "sites is null, expected a list"),
        (lambda d: d.update(more=1), "it has a key 'more'"),
    ],
)
def test_moments_of_another_version_are_refused_with_a_sentence(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    site = Site("layer.0", 0, "diagonal", 9, 3.0, ("a.weight",), ("0",))
    calibration = Calibration("0", "t", "0", "0", 64, 1, 9, "float32", False, True)
    header = MomentsHeader(Source("m", "0"), calibration, {}, (site,), {}).document()
    change(header)
    save_file({"layer.0.diagonal": torch.ones(4)}, tmp_path / "moments", {"laser": json.dumps(header)})
    with pytest.raises(RecordError, match=message):
        Moments.load(tmp_path / "moments")


def test_gradients_stand_beside_moments_that_stay_as_they_were(speaker: Path, tmp_path: Path, run: Run) -> None:
    checkpoint, windows = laser.open_checkpoint(speaker), windows_of(speaker)
    plain = calibrate(checkpoint, windows, tmp_path / "plain", shrink=True)
    felt = calibrate(checkpoint, windows, tmp_path / "felt", shrink=True, gradients=True)
    assert felt.has_gradients and not plain.has_gradients and felt.calibration.identity != plain.calibration.identity
    assert felt.hashes == plain.hashes and b'"gradients"' not in (tmp_path / "plain").read_bytes()
    assert {name: replace(site, gradients=()) for name, site in felt.sites.items()} == plain.sites
    by_layer: dict[int, list[Matrix]] = {}
    for matrix in laser.list_matrices(checkpoint):
        if matrix.name in felt.sites:
            by_layer.setdefault(matrix.layer or 0, []).append(matrix)
    model = LayeredModel(checkpoint)
    run_one_expert_at_a_time(model)
    walk = gradients_at_outputs(model, windows.windows, by_layer, model.room_for(windows.windows))
    expected = {name: square for _, found in walk for name, square in found.items()}
    assert {name: felt.gradient(name) for name in felt.sites if felt.tokens(name)} == expected
    assert all(felt.gradient(name) == 0 for name in felt.sites if not felt.tokens(name))
    (tmp_path / "text.txt").write_text(CONTENT)
    words = ("--text", tmp_path / "text.txt", "--window", 64, "--windows", 6, "--ledoit-wolf", "--gradients")
    code, out, err = run("calibrate", speaker, "-o", tmp_path / "by verb", *words, "--json", "--device", "cpu")
    assert code == 0, err
    assert json.loads(out)["gradients"] == {name: felt.gradient(name) for name in felt.sites}
    header = MomentsHeader.load(tmp_path / "felt")
    some = replace(header, sites=(replace(header.sites[0], gradients=()), *header.sites[1:]))
    some.save(tmp_path / "some")
    with pytest.raises(RecordError, match="some sites have gradients and some have none"):
        Moments.load(tmp_path / "some")


@pytest.mark.parametrize("damaged", [False, True])
def test_killed_on_the_way_back_it_goes_on_and_gives_the_same_bytes(
    speaker: Path, tmp_path: Path, damaged: bool
) -> None:
    """Where what it kept of the way back is damaged, it walks back anew, and makes no moments again."""
    checkpoint, windows, path = laser.open_checkpoint(speaker), windows_of(speaker), tmp_path / "m"
    calibrate(checkpoint, windows, tmp_path / "straight", QO, gradients=True)

    class Killed(BaseException):
        pass

    ran: list[int] = []
    for after in (8, 0):  # forwards 0 1 2 twice, then back; of a walk that goes on, at its first layer forwards

        def stop(layer: int, ran: list[int] = ran, after: int = after) -> None:
            ran.append(layer)
            if len(ran) >= after:
                raise Killed

        with pytest.raises(Killed):
            calibrate(checkpoint, windows, path, QO, gradients=True, tick=stop)
    assert ran == [0, 1, 2, 0, 1, 2, 2, 1, 0] and not path.exists()
    with pytest.raises(RecordError, match=r"belongs to another calibration.*options differ"):
        calibrate(checkpoint, windows, path, QO)
    if damaged:
        kept = tmp_path / "m.partial" / "gradients.safetensors"
        data = bytearray(kept.read_bytes())
        data[-1] ^= 1
        kept.write_bytes(data)
    ran.clear()
    expected: list[int] = []
    calibrate(checkpoint, windows, path, QO, gradients=True, tick=ran.append, expect=expected.append)
    assert ran == ([0, 1, 2, 2, 1, 0] if damaged else [0, 0]) and expected == [len(ran)]
    assert path.read_bytes() == (tmp_path / "straight").read_bytes()
