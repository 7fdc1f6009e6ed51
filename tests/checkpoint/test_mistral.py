"""Mistral's release format: reduced in place it stays what it is, converted it is the Hub's, with the same logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from families import build
from mistral_release import pairs_from_halves, write_release

import laser
from laser.checkpoint import convert, writer
from laser.checkpoint.convert import write_directory
from laser.checkpoint.matrices import list_matrices
from laser.checkpoint.mistral import as_hub, halves_from_pairs
from laser.errors import CheckpointError, LaserError

IDS = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(1))


def logits(path: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def hub(tmp_path: Path) -> Callable[[str], Path]:
    def save(family: str) -> Path:
        build(family).save_pretrained(tmp_path / "hub", max_shard_size="60KB")
        return tmp_path / "hub"

    return save


KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "7B": ("Mistral", {}, "consolidated.safetensors"),
    "8x22B": ("Mixtral", {}, "consolidated.safetensors"),
    "7B, pickled": ("Mistral", {"pickled": True}, "consolidated.safetensors"),
    "8x7B, stacked": ("Mixtral", {"stacked": True, "files": 2}, "consolidated.00.safetensors"),
    "8x7B, stacked, pickled": (
        "Mixtral",
        {"stacked": True, "files": 3, "pickled": True},
        "consolidated.00.safetensors",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_released_reduced_and_converted(kind: str, hub: Callable[[str], Path], tmp_path: Path, run: Run) -> None:
    family, options, expected_file = KINDS[kind]
    source = hub(family)
    release = write_release(source, tmp_path / "release", **options)

    # converted: the Hub's tensors, bit for bit, hence its logits
    code, out, err = run("convert", release, "-o", tmp_path / "converted")
    assert code == 0 and "tensors" in out, err
    converted, original = laser.open_checkpoint(tmp_path / "converted"), laser.open_checkpoint(source)
    assert converted.tensors.keys() == original.tensors.keys()
    assert all(torch.equal(converted.read(name), original.read(name)) for name in original.tensors)
    assert (tmp_path / "converted" / "tokenizer.model").read_bytes() == (release / "tokenizer.model").read_bytes()
    assert torch.equal(logits(tmp_path / "converted"), logits(source))

    # reduced in place: the same format, and the same model as reducing the Hub's
    for name, path in (("release", release), ("hub", source)):
        checkpoint = laser.open_checkpoint(path)
        spectra = laser.scan(checkpoint)
        plan = laser.make_plan(spectra, "rank:4")
        laser.reduce(checkpoint, plan, tmp_path / f"{name}-reduced")
        assert not laser.verify(checkpoint, tmp_path / f"{name}-reduced").problems
        assert plan.coverage["unaccounted"] == 0
    reduced = tmp_path / "release-reduced"
    assert (reduced / expected_file).exists() and not (reduced / "config.json").exists()
    assert (reduced / "params.json").read_bytes() == (release / "params.json").read_bytes()
    assert laser.open_checkpoint(reduced).tensors.keys() == laser.open_checkpoint(release).tensors.keys()
    assert run("convert", reduced, "-o", tmp_path / "reduced-converted")[0] == 0
    found, expected = logits(tmp_path / "reduced-converted"), logits(tmp_path / "hub-reduced")
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)
    assert (expected - logits(source)).abs().max() > 1e-2


def test_the_permutation_is_undone_by_its_inverse() -> None:
    W = torch.randn(24, 5)
    assert torch.equal(halves_from_pairs(pairs_from_halves(W, 8), 8), W)
    assert not torch.equal(halves_from_pairs(W, 8), W)


def test_spectra_are_the_hubs(hub: Callable[[str], Path], tmp_path: Path) -> None:
    """A permutation of rows and a transposition change no singular value."""
    source = hub("Mixtral")
    release = write_release(source, tmp_path / "release", stacked=True)

    def values(path: Path) -> dict[tuple[Any, ...], Any]:
        checkpoint = laser.open_checkpoint(path)
        spectra = laser.scan(checkpoint)
        return {(m.layer, m.role, m.expert, m.shape): spectra.values.get(m.name) for m in list_matrices(checkpoint)}

    ours, theirs = values(release), values(source)
    assert ours.keys() == theirs.keys()
    for key, s in theirs.items():
        assert s is None or torch.allclose(torch.tensor(ours[key]), torch.tensor(s), rtol=1e-10, atol=1e-10)


def edited(path: Path, **changes: Any) -> Path:
    params = json.loads((path / "params.json").read_text())
    (path / "params.json").write_text(json.dumps({k: v for k, v in (params | changes).items() if v is not None}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 3}, "holds no tensor for model.layers.2.input_layernorm.weight"),
        ({"n_layers": 1}, r"layers.1.* has shape .*, expected no such tensor"),
        ({"dim": None}, "found dim None, expected a whole number"),
        ({"hidden_dim": 40}, r"has shape \[48, 32\], expected \[40, 32\] by params.json"),
        ({"vision_encoder": {"hidden_size": 3}}, "vision_encoder has no translation"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, hub: Callable[[str], Path], tmp_path: Path, run: Run
) -> None:
    release = edited(write_release(hub("Mistral"), tmp_path / "release"), **changes)
    code, _, err = run("convert", release, "-o", tmp_path / "out")
    assert code == 1 and not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    with pytest.raises(CheckpointError, match=message):
        raise CheckpointError(err)


def test_other_sources_and_places_are_refused(hub: Callable[[str], Path], tmp_path: Path, run: Run) -> None:
    source = hub("Mistral")
    code, _, err = run("convert", source, "-o", tmp_path / "out")
    assert code == 2 and "in the Hub's format already" in err
    release = write_release(source, tmp_path / "release")
    code, _, err = run("convert", release, "-o", source)
    assert code == 1 and "exists; try another -o" in err
    (tmp_path / "link").symlink_to(release)
    for inside in (release / "out", tmp_path / "link" / "out"):
        code, _, err = run("convert", release, "-o", inside)
        assert code == 1 and "lie in one another; try a directory beside the source" in err and not inside.exists()
    code, _, err = run("eval", release)
    assert code == 2 and f"laser convert {release.name}" in err
    (release / "consolidated.01.safetensors").write_bytes((release / "consolidated.safetensors").read_bytes())
    with pytest.raises(LaserError, match=r"is in more than one file"):
        laser.open_checkpoint(release)
    for file in release.glob("consolidated*"):
        file.unlink()
    with pytest.raises(LaserError, match=r"params.json and no consolidated"):
        laser.open_checkpoint(release)


@pytest.mark.slow
def test_the_card_of_a_release_says_how_to_translate_it(
    hub: Callable[[str], Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_release(hub("Mixtral"), tmp_path / "release", stacked=True, files=2)
    monkeypatch.chdir(tmp_path)
    code, _, err = run("run", "release", "-o", "out", "--recipe", "laser-rmt", "--no-leaderboard")
    assert code == 0, err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "laser convert out -o out-hub" in card
    assert "library_name" not in card and "AutoModelForCausalLM" not in card
    assert run("convert", "out", "-o", "out-hub")[0] == 0


@pytest.mark.slow
def test_killed_between_the_renames_of_its_files_it_is_finished_by_resume(
    hub: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release has no index that could come last: all files are renamed at the end, after laser.json."""
    checkpoint = laser.open_checkpoint(write_release(hub("Mixtral"), tmp_path / "release", files=3))
    plan = laser.make_plan(laser.scan(checkpoint), "rank:4")
    laser.reduce(checkpoint, plan, tmp_path / "whole")
    true_rename, calls = writer._rename, []

    def killed(partial: Path, final: Path) -> None:
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(final)
        true_rename(partial, final)

    with monkeypatch.context() as patch:
        # Between two renames nothing is called that a caller hands in.
        patch.setattr(writer, "_rename", killed)
        with pytest.raises(KeyboardInterrupt):
            laser.reduce(checkpoint, plan, tmp_path / "killed")
    assert len(list((tmp_path / "killed").glob("*.partial"))) == 2
    with pytest.raises(LaserError, match=r"unfinished: consolidated.01.safetensors.partial .*--resume"):
        laser.open_checkpoint(tmp_path / "killed")
    laser.reduce(checkpoint, plan, tmp_path / "killed", resume=True)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes()


def test_an_interrupted_conversion_leaves_nothing_that_looks_whole(
    hub: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = as_hub(laser.open_checkpoint(write_release(hub("Mixtral"), tmp_path / "release")))
    out, tensors = tmp_path / "out", []

    def interrupt(info: object) -> None:
        tensors.append(info)
        if len(tensors) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_directory(seen, out, tick=interrupt)
    assert not out.exists() and not (tmp_path / "out.partial").exists()
    write_directory(seen, out)
    assert not (tmp_path / "out.partial").exists()
    assert laser.open_checkpoint(out).tensors.keys() == seen.tensors.keys()


def test_a_conversion_is_cut_into_shards(
    hub: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = hub("Mixtral")
    # A limit: a shard is really of gigabytes.
    monkeypatch.setattr(convert, "MAX_SHARD", 50_000)
    seen = as_hub(laser.open_checkpoint(write_release(source, tmp_path / "release", stacked=True)))
    write_directory(seen, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) == len(seen.shards) > 3
    assert torch.equal(logits(tmp_path / "out"), logits(source))
