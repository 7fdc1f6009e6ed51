"""laser delta: what became of every tensor, and the spectra of the differences through the verbs that read spectra."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run, write_checkpoint_directory
from merges import BF16, F16, F32, full, merged, update
from models import WORDS, llama_config, tensors, write_model

from laser.checkpoint.reader import open_checkpoint
from laser.checkpoint.source import Source
from laser.differences.base import Base, difference_of
from laser.differences.difference import Change, Verdict
from laser.errors import RecordError
from laser.pipeline import scan
from laser.spectra import Spectra
from laser.spectral.devices import HOST

Q0, UP1 = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
RANK = 3


def tune(name: str, W: torch.Tensor) -> torch.Tensor:
    """An adapter of rank 3 on q and v, one scaled matrix, one changed in all directions, a trained norm."""
    if "q_proj" in name or "v_proj" in name:
        return merged(W, update(W, RANK, 0.02, seed=len(name)), "delta-first", W.dtype)
    if name == UP1:
        return (W.float() * 0.9).to(W.dtype)
    if name == "model.layers.0.mlp.up_proj.weight":
        return merged(W, full(W, 0.02), dtype=W.dtype)
    return W * 1.5 if name == "model.norm.weight" else W


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base")


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tuned", tune, shards=3)


def changes(base: Path, tuned: Path) -> dict[str, Change]:
    one, other = open_checkpoint(base), open_checkpoint(tuned)
    delta = scan(other, base=Base.of(one, other), device=HOST).delta
    assert delta is not None
    return dict(delta.changes)


def expected(name: str) -> Verdict:
    if "q_proj" in name or "v_proj" in name:
        return Verdict.LOW_RANK
    if name in (UP1, "model.norm.weight"):
        return Verdict.SCALED
    return Verdict.FULL if name == "model.layers.0.mlp.up_proj.weight" else Verdict.SAME


def test_every_tensor_is_told(base: Path, tuned: Path) -> None:
    found = changes(base, tuned)
    assert {name: change.kind for name, change in found.items()} == {name: expected(name) for name in tensors()}
    ranks = {change.rank for change in found.values() if change.kind is Verdict.LOW_RANK}
    assert RANK in ranks and ranks <= {RANK, RANK + 1}
    assert found[UP1].scale == pytest.approx(0.9, rel=1e-3)


def test_a_model_and_itself(base: Path) -> None:
    assert {change.kind for change in changes(base, base).values()} == {Verdict.SAME}


def test_shards_make_no_difference(base: Path, tuned: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "one", tune, shards=1)
    assert changes(base, other) == changes(base, tuned)


@pytest.mark.parametrize("kinds", [(F32, BF16), (BF16, F32), (F16, BF16)])
def test_other_formats(tmp_path: Path, kinds: tuple[torch.dtype, torch.dtype]) -> None:
    """The base in one, the merge in the other: the rounding is the tuned one's."""

    def cast(name: str, W: torch.Tensor) -> torch.Tensor:
        X = update(W, RANK, 0.02) if "q_proj" in name else torch.zeros(())
        return (W.float() + X).to(kinds[1])

    base = write_model(tmp_path / "base", dtype=kinds[0])
    found = changes(base, write_model(tmp_path / "tuned", cast, dtype=kinds[0]))
    for name, change in found.items():
        kind = Verdict.LOW_RANK if "q_proj" in name else Verdict.CAST
        assert change.kind is kind and (change.rank in (RANK, RANK + 1) or kind is Verdict.CAST), name


def test_names_may_differ_where_the_family_knows_them(base: Path, tmp_path: Path) -> None:
    """A wrapper's prefix before every name; norms, of which a layer has two, have no other way to be told apart."""
    wrapped = {f"language_model.{name}": W for name, W in tensors().items()}
    other = write_checkpoint_directory(tmp_path / "wrapped", wrapped, llama_config())
    found = changes(base, other)
    kinds = {name: change.kind for name, change in found.items()}
    assert kinds[f"language_model.{Q0}"] is Verdict.SAME
    assert {name for name, kind in kinds.items() if kind is not Verdict.SAME} <= {
        name for name in (*wrapped, *tensors()) if "norm" in name
    }


def test_a_resized_vocabulary(base: Path, tmp_path: Path) -> None:
    def grow(name: str, W: torch.Tensor) -> torch.Tensor:
        more = torch.ones(8, W.shape[-1], dtype=W.dtype)
        return torch.cat((W, more)) if name in ("model.embed_tokens.weight", "lm_head.weight") else tune(name, W)

    found = changes(base, write_model(tmp_path / "grown", grow, vocab_size=WORDS + 8))
    assert found["lm_head.weight"] == Change(Verdict.SHAPE, moved=0.0) and found[Q0].kind is Verdict.LOW_RANK


def test_a_tied_head(tmp_path: Path) -> None:
    """The base's head is its embedding; the tuned one stores both, or the other way round."""
    tied = write_model(tmp_path / "tied", head=False, tie_word_embeddings=True)
    head = tensors()["model.embed_tokens.weight"]
    untied = write_model(tmp_path / "untied", lambda name, W: head if name == "lm_head.weight" else W)
    assert {change.kind for change in changes(tied, untied).values()} == {Verdict.SAME}
    found = changes(untied, tied)
    assert found["lm_head.weight"].kind is Verdict.MISSING


def test_what_is_added_and_missing(base: Path, tmp_path: Path) -> None:
    some = {name: W for name, W in tensors().items() if "layers.1" not in name}
    less = write_checkpoint_directory(tmp_path / "less", some, llama_config(num_hidden_layers=1))
    found = changes(base, less)
    gone = {name for name, change in found.items() if change.kind is Verdict.MISSING}
    assert gone == {name for name in tensors() if "layers.1" in name}
    assert {name for name, change in changes(less, base).items() if change.kind is Verdict.ADDED} == gone


def test_nan_is_told_and_not_factorised(base: Path, tmp_path: Path) -> None:
    def spoil(name: str, W: torch.Tensor) -> torch.Tensor:
        return W * torch.nan if name == Q0 else W

    assert changes(base, write_model(tmp_path / "nan", spoil))[Q0].kind is Verdict.NOT_FINITE


# --- the record -------------------------------------------------------------------------------------------------------


def test_the_record_is_of_both(base: Path, tuned: Path, tmp_path: Path) -> None:
    one, other = open_checkpoint(base), open_checkpoint(tuned)
    spectra = scan(other, base=Base.of(one, other), device=HOST)
    assert spectra.delta and (spectra.delta.base, spectra.delta.tuned) == (Source.of(one), Source.of(other))
    assert spectra.source == difference_of(Source.of(other), Source.of(one))
    for checkpoint in (one, other):
        with pytest.raises(RecordError, match="was made from tuned - base"):
            spectra.source.require(checkpoint, "spectra")
    with pytest.raises(RecordError, match=r"was made from tuned - base .* found base - tuned"):
        Base.of(other, one).require(spectra.source, "spectra")
    Base.of(one, other).require(spectra.source, "spectra")
    path = tmp_path / "d.safetensors"
    spectra.save(path)
    again = Spectra.load(path)
    assert again.delta == spectra.delta and again.source == spectra.source
    assert all(np.array_equal(again.values[name], s) for name, s in spectra.values.items())
    assert not spectra.values["model.layers.0.mlp.down_proj.weight"].any()  # nothing became of it


@pytest.mark.parametrize("edit, message", [
    (lambda d: d["source"].update(name="tuned"), "its source is not the difference of the two"),
    (lambda d: d["delta"]["changes"].pop(Q0), f"nothing says what became of {Q0}"),
    (lambda d: d["delta"]["changes"].update(x={"kind": "full"} | dict.fromkeys(
        ("moved", "share", "cosine", "scale", "rank", "energy", "rest"))), "x is full, and is not in the tuned"),
    (lambda d: d["delta"]["changes"][Q0].update(kind="halved"), "kind"),
])  # fmt: skip
def test_an_edited_record_is_refused(base: Path, tuned: Path, tmp_path: Path, edit: object, message: str) -> None:
    from safetensors.numpy import load_file, save_file

    one, other = open_checkpoint(base), open_checkpoint(tuned)
    path = tmp_path / "d.safetensors"
    scan(other, base=Base.of(one, other), device=HOST).save(path)
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        document = json.loads(file.metadata()["laser"])
    edit(document)  # pyright: ignore[reportCallIssue]
    save_file(load_file(path), path, {"laser": json.dumps(document)})
    with pytest.raises(RecordError, match=message):
        Spectra.load(path)


# --- the verbs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def spectra(run: Run, base: Path, tuned: Path, tmp_path: Path) -> Path:
    path = tmp_path / "delta.safetensors"
    code, out, err = run("delta", base, tuned, "-o", path)
    assert code == 0 and not err
    assert "low rank" in out and "scaled" in out and "full" in out and "IS NOT THE BASE" not in out
    return path


@pytest.mark.slow
def test_the_verbs_that_read_spectra(run: Run, spectra: Path, tuned: Path, base: Path, tmp_path: Path) -> None:
    code, out, _ = run("spectra", spectra, "--json")
    assert code == 0 and json.loads(out)["rule"] == "rounding"
    code, out, _ = run("plan", spectra, "-o", tmp_path / "plan.json", "--json")
    lines = {line["name"]: line for line in json.loads(out)["lines"]}
    assert code == 0 and lines[Q0]["rank"] in (RANK, RANK + 1) and lines[Q0]["sigma"] == 1.0
    assert run("plan", spectra, "-o", tmp_path / "other.json", "--rule", "mp-edge")[0] == 0
    for file, *verb in (("h.svg", "plot", spectra, "--matrix", Q0), ("m.svg", "plot", spectra, "--heat", "kept"),
                        ("r.html", "report", spectra)):  # fmt: skip
        assert run(*verb, "-o", tmp_path / file)[0] == 0
    assert "singular value, unit of the noise" in (tmp_path / "h.svg").read_text()  # whose sigma is 1
    assert '"unit":"unit of the noise"' in (tmp_path / "r.html").read_text()
    code, out, _ = run("null", tuned, "--base", base, "--spectra", spectra, "--roles", "q", "--rules", "mp-edge")
    assert code == 0 and "mp-edge" in out


def test_no_verb_takes_a_difference_for_its_model(
    run: Run, spectra: Path, tuned: Path, base: Path, tmp_path: Path
) -> None:
    run("plan", spectra, "-o", tmp_path / "plan.json")
    for model in (tuned, base):
        code, _, err = run("reduce", model, tmp_path / "plan.json", "-o", tmp_path / "out")
        assert code == 1 and "the plan was made from tuned - base" in err and not (tmp_path / "out").exists()
        code, _, err = run("null", model, "--spectra", spectra)
        assert code == 1 and "the spectra was made from tuned - base" in err


def test_rounding_is_refused_elsewhere(run: Run, tuned: Path, tmp_path: Path) -> None:
    assert run("scan", tuned, "-o", tmp_path / "s")[0] == 0
    for verb in (("plan", tmp_path / "s", "-o", tmp_path / "p", "--rule", "rounding"),
                 ("spectra", tmp_path / "s", "--rule", "rounding"),
                 ("run", tuned, "-o", tmp_path / "out", "--rule", "rounding"),):  # fmt: skip
        code, _, err = run(*verb)
        assert code == 2 and "for differences of two checkpoints" in err
    code, _, err = run("null", tuned, "--rules", "rounding")
    assert code == 2 and "it has no null test" in err
    code, _, err = run("plan", tmp_path / "s", "-o", tmp_path / "p")
    assert code == 2 and "plan needs a rule" in err


def test_another_base_is_said_to_be_none(run: Run, tuned: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=1000)
    code, out, _ = run("delta", other, tuned, "-o", tmp_path / "d")
    assert code == 0 and "other IS NOT THE BASE of tuned" in out and "low rank" not in out
    code, out, _ = run("delta", other, tuned, "-o", tmp_path / "d", "--json", "--force")
    assert code == 0 and json.loads(out)["is_base"] is False


@pytest.mark.slow
def test_it_goes_on_where_it_was(run: Run, base: Path, tuned: Path, tmp_path: Path) -> None:
    """The journal of a killed run holds what is done; of another base it is refused."""
    one, other = open_checkpoint(base), open_checkpoint(tuned)
    path, seen = tmp_path / "d.safetensors", []

    def stop(matrix: object) -> None:
        seen.append(matrix)
        if len(seen) == 9:
            raise KeyboardInterrupt

    from laser.engine.crew import Crew
    from laser.pipeline import scan_into
    from laser.selection import Selection

    with pytest.raises(KeyboardInterrupt):
        scan_into(path, other, Selection(), Crew((HOST,), 1), "gram", stop, base=Base.of(one, other))
    third = write_model(tmp_path / "third", seed=1000)
    code, _, err = run("delta", third, tuned, "-o", path, "--device", "cpu")
    assert code == 1 and "belongs to another run: base differ" in err
    code, out, _ = run("delta", base, tuned, "-o", path, "--device", "cpu", "--json")
    assert code == 0 and not path.with_name(path.name + ".partial").exists()
    assert {name: change["kind"] for name, change in json.loads(out)["tensors"].items()} == {
        name: str(expected(name)) for name in tensors()
    }


def test_dry_run_and_usage(run: Run, base: Path, tuned: Path, tmp_path: Path) -> None:
    code, out, _ = run("delta", base, tuned, "--dry-run")
    assert code == 0 and "matrices on" in out
    assert run("delta", base, tuned)[0] == 2
    (tmp_path / "there").write_text("mine")
    code, _, err = run("delta", base, tuned, "-o", tmp_path / "there")
    assert code == 1 and "exists" in err
