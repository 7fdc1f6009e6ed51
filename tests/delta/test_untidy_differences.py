"""Differences of untidy pairs: eight bits, other scales, options that would do nothing, models by name."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Run, write_checkpoint_directory
from models import llama_config, tensors, write_model
from test_delta import Q0, tune

import laser
from laser.checkpoint.packed import as_plain
from laser.checkpoint.quantised import Fp8
from laser.errors import CheckpointError, UsageError
from laser.outcome import Outcome
from laser.plan import Plan
from laser.searching.candidates import grid_candidates
from laser.searching.search import check_request


def eight_bits(path: Path, factor: float) -> Path:
    """A Llama whose matrices are FP8 with a scale per block, and whose norms are 1 in bf16, or `factor`."""
    found: dict[str, torch.Tensor] = {}
    for name, W in tensors().items():
        if "_proj" in name:
            found[name] = (W.float() * factor).to(torch.float8_e4m3fn)
            found[f"{name}_scale_inv"] = torch.ones(-(-W.shape[0] // 128), -(-W.shape[1] // 128))
        else:
            found[name] = W * factor if "norm" in name else W
    section = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return write_checkpoint_directory(path, found, llama_config(quantization_config=section))


def test_what_cannot_be_scaled_is_said_and_not_kept_in_silence(run: Run, tmp_path: Path) -> None:
    base, tuned = eight_bits(tmp_path / "base", 1.0), eight_bits(tmp_path / "tuned", 1.5)
    code, out, err = run("reduce", tuned, "--base", base, "--scale", "0.5", "-o", tmp_path / "half")
    assert code == 0, err
    lines = {line.name: line for line in Outcome.load(tmp_path / "half").plan.lines}
    matrices = [name for name in lines if name.endswith("_proj.weight")]
    assert matrices and all(lines[name].action == "skip" for name in matrices)
    assert "skipped: stored as F8_E4M3, so its difference is not scaled" in out and lines["model.norm.weight"].scale


def test_a_scale_keeps_all_its_digits(run: Run, tmp_path: Path) -> None:
    base, tuned = write_model(tmp_path / "base"), write_model(tmp_path / "tuned", tune)
    code, _, err = run("reduce", tuned, "--base", base, "--scale", "0.333333333", "-o", tmp_path / "third")
    plan = Outcome.load(tmp_path / "third").plan
    assert code == 0 and plan.rule == "scale:0.333333333", err
    assert {line.scale for line in plan.lines if line.action == "reduce"} == {0.333333333}
    words = ["run", tuned, "--base", base, "--no-search", "--rule", "rounding", "-o", tmp_path / "third", "--resume"]
    code, _, err = run(*words)  # its spectra are of no other rule
    assert code == 1 and "third holds the finished output of another run" in err


def test_models_are_compared_by_their_names(tmp_path: Path) -> None:
    base, tuned = write_model(tmp_path / "base"), write_model(tmp_path / "tuned", tune)
    spectra = laser.scan(str(tuned), base=str(base), device="cpu")
    assert spectra.delta is not None and Q0 in spectra.values
    plan = laser.make_plan(spectra, "rounding")
    laser.reduce(str(tuned), plan, str(tmp_path / "out"), base=str(base), device="cpu")
    assert not laser.verify(str(tuned), str(tmp_path / "out"), base=base, device="cpu").problems


@pytest.mark.slow
def test_a_proof_of_a_rebuild_takes_no_other_base(run: Run, tmp_path: Path) -> None:
    base, tuned = write_model(tmp_path / "base"), write_model(tmp_path / "tuned", tune)
    assert run("unmerge", base, tuned, "-o", tmp_path / "a")[0] == 0
    assert run("rebuild", base, tmp_path / "a", "-o", tmp_path / "again")[0] == 0
    for more in (["--base", "nowhere"], ["--moments", "nofile"]):
        code, _, err = run("verify", tmp_path / "a", tmp_path / "again", *more)
        assert code == 2 and "try without --base and --moments" in err


def test_a_search_of_differences_refuses_an_order_by_snr() -> None:
    with pytest.raises(UsageError, match="--order snr is of single matrices"):
        check_request(["rounding"], order="snr", of_difference=True)


def test_a_grid_leaves_out_what_the_model_does_not_run(tmp_path: Path) -> None:
    base, tuned = write_model(tmp_path / "base"), write_model(tmp_path / "tuned", tune)
    spectra = laser.scan(tuned, base=base, device="cpu")
    plan: Plan = laser.make_plan(spectra, "rank:2")
    assert Q0 in plan.reductions
    first = lambda name: pytest.fail("not run") if name == Q0 else 1  # noqa: E731
    model: Any = SimpleNamespace(runs=lambda name: name != Q0, first_piece=first)
    found = grid_candidates({"rank:2": plan}, model)
    assert found and all(Q0 not in ranks for candidate in found for _, ranks in candidate.options)


def test_fp8_of_two_kinds_is_refused(tmp_path: Path) -> None:
    """A view of the one kind would drop the scales of the other, and read its numbers as they are."""
    path = eight_bits(tmp_path / "mixed", 1.0)
    found = laser.open_checkpoint(path)
    assert isinstance(found.fp8, Fp8)
    with pytest.raises(CheckpointError, match="a scale per block beside weights packed otherwise"):
        as_plain(found, [])
