"""Scan and reduce in one visit: the records and shards of two passes, each matrix read once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import mixtral_tensors
from helpers import digits, snapshot

import laser
from laser.checkpoint.writer import JOURNAL
from laser.engine.crew import Crew
from laser.errors import NumericalError
from laser.flow import Result, run_flow
from laser.plan import Plan, Treatment, make_plan
from laser.selection import Selection
from laser.spectra import Spectra
from laser.spectral.devices import HOST, Device
from laser.spectral.metric import Plain
from laser.verification import verify

TWO = Crew((HOST,), 2)


def flow(
    source: Path,
    out: Path,
    rule: str,
    *,
    single: bool,
    nulls: int = 0,
    crew: Crew = TWO,
    on_reduce: Callable[[laser.Matrix, float], None] = lambda *_: None,
    **asked: Any,
) -> Result:
    treatment = Treatment(rule, **asked)

    def choose(spectra: Spectra) -> Plan:
        return make_plan(spectra, rule, Selection(roles=("w1", "q", "v")), **asked)

    return run_flow(
        laser.open_checkpoint(source), out, Selection(roles=("w1", "q", "v")), choose, crew=crew, null_draws=nulls,
        treatment=treatment if single else None, resume=True, on_reduce=on_reduce,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule, nulls, asked",
    [
        ("mp-edge", 0, {}),
        ("fraction:0.3", 0, {}),
        ("parallel:0.5", 3, {}),
        ("mp-median", 0, {"shrink": "frobenius", "two_sided": True}),
        ("mp-edge", 0, {"require_fit": 0.9}),  # keeps nearly everything
    ],
)
def test_one_pass_leaves_what_two_leave(
    device: Device, pico: Path, tmp_path: Path, rule: str, nulls: int, asked: dict[str, Any]
) -> None:
    asked = asked | {"nulls": nulls, "crew": Crew((device,))}
    one, two = (flow(pico, tmp_path / label, rule, single=label == "one", **asked) for label in ("one", "two"))
    assert one.plan.reductions.keys() == two.plan.reductions.keys()
    assert [x.rank for x in one.plan.lines] == [x.rank for x in two.plan.lines]
    for name, s in two.spectra.values.items():
        assert one.spectra.values[name] == pytest.approx(s, abs=digits(device, 1e-7, 1e-3) * s[0])
    assert one.spectra.kurtosis == two.spectra.kurtosis
    assert snapshot(tmp_path / "one").keys() == snapshot(tmp_path / "two").keys()
    assert one.outcome.matrices.keys() == two.outcome.matrices.keys()
    assert {n for n, h in one.outcome.shards.items() if h is None} == {
        n for n, h in two.outcome.shards.items() if h is None
    }
    assert verify(laser.open_checkpoint(pico), tmp_path / "one").problems == ()
    saved = Spectra.load(tmp_path / "one" / "laser" / "spectra.safetensors")
    assert all(np.array_equal(saved.values[k], v) for k, v in one.spectra.values.items())


def test_each_matrix_is_read_and_factorised_once(pico: Path, tmp_path: Path, reads: list[str]) -> None:
    result = flow(pico, tmp_path / "out", "mp-edge", single=True)
    assert sorted(reads) == sorted(result.spectra.values) and len(reads) == 3 * 6


@pytest.mark.slow
def test_interrupted_and_resumed_it_is_byte_identical(pico: Path, tmp_path: Path, reads: list[str]) -> None:
    flow(pico, tmp_path / "undisturbed" / "out", "mp-edge", single=True)
    out, seen = tmp_path / "out", []

    def interrupt(matrix: laser.Matrix, _: float) -> None:
        seen.append(matrix.name)
        if len(seen) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flow(pico, out, "mp-edge", single=True, on_reduce=interrupt)
    lines = [json.loads(line) for line in (out / JOURNAL).read_text().splitlines()]
    promised = {line["matrix"] for line in lines if "matrix" in line}
    assert promised and not (out / "laser.json").exists()
    reads.clear()
    flow(pico, out, "mp-edge", single=True)
    assert not promised & set(reads) and len(promised) + len(reads) == 18
    assert snapshot(out) == snapshot(tmp_path / "undisturbed" / "out")
    reads.clear()
    flow(pico, out, "mp-edge", single=True)  # finished: nothing is done
    assert not reads


@pytest.mark.slow
def test_not_finite_is_skipped_and_the_rest_done(
    device: Device, make_pico: Callable[..., Path], tmp_path: Path
) -> None:
    tensors = mixtral_tensors()
    name = "model.layers.1.self_attn.v_proj.weight"
    tensors[name][3, 4] = float("nan")
    source = make_pico(tensors=tensors)
    result = flow(source, tmp_path / "out", "mp-edge", single=True, crew=Crew((device,)))
    assert result.spectra.skipped[name].text == "skipped: not finite (1 NaN or Inf of 512)"
    assert name not in result.plan.reductions and len(result.spectra.values) == 17
    assert verify(laser.open_checkpoint(source), tmp_path / "out").problems == ()


def test_a_truncation_that_fails_alone_is_an_error(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise NumericalError("certificate missed", 0.5)

    # No matrix is known on which every step of the ladder fails.
    monkeypatch.setattr(Plain, "visit", fail)
    with pytest.raises(NumericalError, match=r"model\.layers\.0\..*: certificate missed"):
        flow(pico, tmp_path / "out", "mp-edge", single=True)
