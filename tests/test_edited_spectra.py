"""Spectra files that were changed: refused with a sentence. And matrices at the edges of arithmetic, end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file

import laser
from laser.errors import RecordError
from laser.spectra import Spectra
from laser.spectral.devices import choose_device

NAME = "model.layers.0.self_attn.q_proj.weight"
Header = dict[str, Any]
Vectors = dict[str, np.ndarray]


def row(header: Header) -> dict[str, Any]:
    return next(row for row in header["matrices"] if row["name"] == NAME)


CHANGES: list[tuple[Callable[[Header, Vectors], object], str]] = [
    (lambda h, v: h.update(version=4), "version 4"),
    (lambda h, v: h.update(shiny=True), "has a key 'shiny'"),
    (lambda h, v: h.pop("method"), "has no key 'method'"),
    (lambda h, v: h.update(device=None), "device is null, expected a text"),
    (lambda h, v: h.update(matrices={}), "expected a list"),
    (lambda h, v: h["matrices"].append(7), "is 7, expected an object"),
    (lambda h, v: h["matrices"].append(row(h)), "is in it twice"),
    (lambda h, v: row(h).pop("shape"), f"{NAME}\\) has no key 'shape'"),
    (lambda h, v: row(h).pop("skipped"), "has no key 'skipped'"),
    (lambda h, v: row(h).update(shape="32x32"), 'shape is "32x32", expected a list'),
    (lambda h, v: row(h).update(layer=True), "layer is true, expected a whole number or null"),
    (lambda h, v: row(h).update(kurtosis=float("nan")), "kurtosis is nan, expected a number or null"),
    (lambda h, v: row(h).update(kurtosis="3"), 'kurtosis is "3"'),
    (lambda h, v: row(h).update(colour="red"), "has a key 'colour'"),
    (lambda h, v: row(h).update(shape=[7, 32]), f"{NAME} has float64 values of shape"),
    (lambda h, v: h["source"].pop("identity"), "its source has no key 'identity'"),
    (lambda h, v: h["source"].update(licence="mit"), "has a key 'licence'"),
    (lambda h, v: h.update(data={"seen": {}}), "has no key 'calibration'"),
    (lambda h, v: h.update(data=[1]), "data is"),
    (lambda h, v: v.update(nothing=np.ones(3)), "nothing has singular values and is no matrix of it"),
    (lambda h, v: v.update({NAME: v[NAME].astype(np.float32)}), "expected float64"),
    (lambda h, v: v.update({NAME: v[NAME][::-1].copy()}), "not falling"),
    (lambda h, v: v.update({NAME: -v[NAME]}), "not falling, finite and 0 or more"),
    (lambda h, v: v.update({NAME: v[NAME] * np.nan}), "not falling, finite"),
    (lambda h, v: v.update({"laser.null." + NAME: np.array([np.inf])}), "permutations that are not"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_changed_spectra_are_refused(
    pico: Path, tmp_path: Path, run: Any, change: Callable[[Header, Vectors], object], message: str
) -> None:
    path = tmp_path / "s"
    laser.scan(laser.open_checkpoint(pico), laser.Selection(layers=(0,), roles=("q", "o"))).save(path)
    with safe_open(path, "numpy") as file:
        header, vectors = json.loads(file.metadata()["laser"]), {name: file.get_tensor(name) for name in file.keys()}
    change(header, vectors)
    save_file(vectors, path, {"laser": json.dumps(header)})
    with pytest.raises(RecordError, match=message):
        Spectra.load(path)
    code, _, error = run("plan", path, "-o", tmp_path / "p", "--rule", "mp-edge")
    assert code == 1 and error.startswith("laser: ") and error.count("\n") == 1


def test_spectra_of_an_earlier_version_are_refused_with_the_command(pico: Path, tmp_path: Path) -> None:
    """Without what laser 0.1 did not write: kurtosis, tensor, parameters, and which weights they are of."""
    path = tmp_path / "s"
    laser.scan(laser.open_checkpoint(pico), laser.Selection(layers=(0,), roles=("q",))).save(path)
    with safe_open(path, "numpy") as file:
        header, vectors = json.loads(file.metadata()["laser"]), {name: file.get_tensor(name) for name in file.keys()}
    for one in header["matrices"]:
        del one["kurtosis"], one["tensor"]
    for key in ("parameters", "unindexed", "content", "samples"):
        del header["source"][key]
    save_file(vectors, path, {"laser": json.dumps(header | {"version": 1})})
    with pytest.raises(RecordError, match=r"version 1, expected 'spectra' version 3; .*`laser scan MODEL -o FILE`"):
        Spectra.load(path)


# --- the edges of arithmetic, from scan to verify ---------------------------------------------------------------------


def checkpoint_of(make_pico: Callable[..., Path], matrices: list[torch.Tensor]) -> laser.Checkpoint:
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(len(matrices))]
    tensors = dict(zip(names, matrices, strict=True))
    return laser.open_checkpoint(make_pico(shards=1, tensors=tensors, num_hidden_layers=len(matrices)))


def noise(seed: int, dtype: torch.dtype, scale: float) -> torch.Tensor:
    return (torch.randn(48, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize(
    ("dtype", "scales"),
    [
        (torch.float16, (1e-3, 1e-4, 1e-5, 1e-6, 3e-7)),
        (torch.bfloat16, (1e-20, 1e-24, 1e-37, 1e-39)),
        (torch.float32, (1e-24, 1e-40, 1e30)),
        (torch.float64, (1e-170, 1e-300, 1e170)),
    ],
    ids=["float16", "bfloat16", "float32", "float64"],
)
def test_right_reductions_are_no_problems(
    make_pico: Callable[..., Path], tmp_path: Path, dtype: torch.dtype, scales: tuple[float, ...], precision: str
) -> None:
    checkpoint = checkpoint_of(make_pico, [noise(i, dtype, scale) for i, scale in enumerate(scales)])
    device = choose_device("cpu", precision)
    spectra = laser.scan(checkpoint, device=device)
    plan = laser.make_plan(spectra, "fraction:0.5")
    assert len(plan.reductions) == len(scales)
    outcome = laser.reduce(checkpoint, plan, tmp_path / "out", device=device)
    assert laser.verify(checkpoint, tmp_path / "out", device=device).problems == ()
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, line in plan.reductions.items():
        W = checkpoint.read(name).double()
        largest = float(W.abs().max())
        W, B = W / largest, after[name].double() / largest
        s = torch.linalg.svdvals(W)
        left, best = float(torch.linalg.norm(W - B)), float((s[24:] ** 2).sum().sqrt())
        rounding = 48 * 64 * float(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps) / largest
        assert abs(left - best) <= rounding + 0.01 * best
        assert outcome.matrices[name]["energy_kept"] == pytest.approx(line.energy_kept, abs=1e-5)
        assert 0 < outcome.matrices[name].get("tolerance", 0)


@pytest.mark.parametrize("scale", [1e-170, 1e-24, 1.0, 1e170])
def test_a_wrong_matrix_is_a_problem_at_every_scale(
    make_pico: Callable[..., Path], tmp_path: Path, scale: float
) -> None:
    checkpoint = checkpoint_of(make_pico, [noise(0, torch.float64, scale)])
    laser.reduce(checkpoint, laser.make_plan(laser.scan(checkpoint), "rank:20"), tmp_path / "out")
    outcome = json.loads((tmp_path / "out" / "laser.json").read_text())
    lines = [line for line in outcome["plan"]["lines"] if line["action"] == "reduce"]
    for line in lines:
        line["rank"] = outcome["matrices"][line["name"]]["rank"] = 19
    (tmp_path / "out" / "laser.json").write_text(json.dumps(outcome))
    assert len(laser.verify(checkpoint, tmp_path / "out").problems) == 2


@pytest.mark.slow
def test_one_huge_entry_does_not_end_the_scan(make_pico: Callable[..., Path], tmp_path: Path, run: Any) -> None:
    matrices = [noise(i, torch.float64, 1.0) for i in range(3)]
    for size in (1e80, 1e300, 1.7e308):
        matrices[1][0, 0] = size
        checkpoint = checkpoint_of(lambda size=size, **k: make_pico(f"{size:g}", **k), matrices)
        assert len(laser.scan(checkpoint, null_draws=2).values) == 3
        plan = laser.make_plan(laser.scan(checkpoint), "mp-edge", lowest_snr=2)
        assert plan.lines[1].action == "keep"  # the rest is 0 beside it, and no SNR is to be had
        assert (
            run("run", checkpoint.path, "-o", tmp_path / f"{size:g}-out", "--rule", "laser-rmt", "--no-search")[0] == 0
        )


def test_what_was_cut_once_is_kept_by_the_next_cut(make_pico: Callable[..., Path], tmp_path: Path, run: Any) -> None:
    """In float64 what was cut away is 0 to the Gram matrix, so no SNR is defined."""
    first = checkpoint_of(make_pico, [noise(i, torch.float64, 0.1) for i in range(4)])
    laser.reduce(
        first,
        laser.make_plan(laser.scan(first), "rank:12", laser.Selection(layers=(0, 1))),
        tmp_path / "once",
    )
    again = laser.open_checkpoint(tmp_path / "once")
    spectra = laser.scan(again)
    for lowest in (None, 1, 3, 9):
        for rule in ("laser-rmt", "rank:20", "energy:1", "mp-edge"):
            plan = laser.make_plan(spectra, rule, lowest_snr=lowest)
            assert not {line.layer for line in plan.reductions.values()} & {0, 1}
            assert all(line.snr is not None for line in plan.reductions.values())
    assert "are 0" in laser.make_plan(spectra, "rank:20").lines[0].why.text
    assert set(laser.make_plan(spectra, "rank:11").reductions) == set(spectra.values)  # what is there can be cut
    code, said, _ = run("run", again.path, "-o", tmp_path / "twice", "--rule", "laser-rmt", "--no-search")
    assert code == 0 and "2 to keep" in said


def test_tiny_levels_are_answered_and_those_without_a_quantile_refused(pico: Path) -> None:
    spectra = laser.scan(laser.open_checkpoint(pico), laser.Selection(layers=(0,), roles=("q",)))
    lines = [laser.make_plan(spectra, f"tracy-widom:{alpha}") for alpha in ("1e-3", "1e-17", "1e-300")]
    found = [next(line.threshold for line in plan.lines if line.name == NAME) for plan in lines]
    assert None not in found and found == sorted(found)  # pyright: ignore[reportArgumentType]
    for alpha in ("1e-400", "0", "1", "nan"):
        with pytest.raises(laser.LaserError, match="a level between 0 and 1"):
            laser.make_plan(spectra, f"tracy-widom:{alpha}")


def test_weights_in_the_place_of_spectra_are_refused(tmp_path: Path) -> None:
    weights = {"w": torch.ones(2, 2, dtype=torch.bfloat16)}
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecordError, match="no record of laser, expected 'spectra' version 3; laser scan MODEL -o"):
        Spectra.load(tmp_path / "model.safetensors")
