"""Reasons are data: programs go by their kind, and records of before, which had texts alone, are still read."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save

import laser
from laser.errors import RecordError
from laser.plan import PlanLine, digest_of, empty_plan
from laser.reasons import Kind, Why, earlier_reason, earlier_unseen
from laser.records import sealed
from laser.selection import Selection

TOO_FEW = "met 3 tokens of the calibration, and it has 32 dimensions"
# As laser wrote them when a reason was a text.
TEXTS = {
    "not a matrix: shape [32]": Kind.NOT_A_MATRIX,
    "role router is kept unless asked for": Kind.PROTECTED,
    "stack mtp is kept unless asked for": Kind.PROTECTED,
    "role q not selected": Kind.NOT_SELECTED,
    "layer mtp:3 not selected": Kind.NOT_SELECTED,
    "not included by the expression": Kind.NOT_SELECTED,
    "excluded by the expression": Kind.NOT_SELECTED,
    "not scanned": Kind.NOT_SCANNED,
    "skipped: not finite (1 NaN or Inf of 512)": Kind.FAILED,
    "not calibrated": Kind.NOT_CALIBRATED,
    f"not seen enough: {TOO_FEW}": Kind.UNSEEN,
    "the rule keeps all 32 values; s_3 is at the threshold": Kind.ALL_KEPT,
    "the 3 values under the cut are 0: nothing to remove, and no SNR": Kind.ALL_KEPT,
    "the bulk is not noise at level 0.05: distance 0.1, level 0.01": Kind.NOT_NOISE,
    "SNR 1.13 is not among the 5 lowest": Kind.NOT_LOWEST,
    "no SNR: what it removes is 0, and it is not among the 5 lowest": Kind.NOT_LOWEST,
    "the model that transformers runs does not use it": Kind.UNUSED,
    f"rejected, nats per token +0.1 ± 0.1; not seen enough: {TOO_FEW}": Kind.REJECTED,
    "not tried: not on the shortlist": Kind.NOT_TRIED,
    "empty plan": Kind.EMPTY,
    "because I say so": Kind.OTHER,
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_of_before_has_its_kind(text: str) -> None:
    assert earlier_reason(text) == Why(TEXTS[text], text)
    assert earlier_unseen(text) == (TOO_FEW if TOO_FEW in text else "")


def test_what_was_reduced_was_so_by_its_rule_a_search_or_its_line() -> None:
    above = "above the Marchenko-Pastur edge; SNR 0.9 is number 1 from below"
    assert earlier_reason(above, True).kind is Kind.RULE
    assert earlier_reason("accepted, nats per token -0.1 ± 0.1", True).kind is Kind.ACCEPTED
    assert earlier_reason("rank 3 by its line and not by the rule; figures as measured", True).kind is Kind.MEASURED


def before(plan: laser.Plan) -> dict[str, Any]:
    """A plan as version 2 had it."""
    document = json.loads(plan.to_json()) | {"version": 2}
    for line in document["lines"]:
        line["reason"] = line.pop("why")["text"]
        line.pop("unseen")
    document["digest"] = digest_of(plan.rule, plan.selection, document["lines"])
    return document


def test_a_plan_of_before_is_the_same_plan(pico: Path, tmp_path: Path) -> None:
    spectra = laser.scan(laser.open_checkpoint(pico), Selection(layers=(0, 1)))
    for plan in (
        laser.make_plan(spectra, "mp-edge", lowest_snr=3),
        laser.make_plan(spectra, "rank:32", Selection(roles=("q",))),
        empty_plan(spectra),
    ):
        document, path = before(plan), tmp_path / "plan.json"
        path.write_text(json.dumps(document))
        assert laser.Plan.load(path) == plan and not plan.edited
        document["lines"][0]["reason"] = "because I say so"
        path.write_text(json.dumps(document))
        assert laser.Plan.load(path).edited


@pytest.mark.parametrize(
    ("why", "message"),
    [
        ("a text", ' is "a text", expected an object of kind and text'),
        ({"kind": "rule"}, " has no key 'text', expected kind, text"),
        ({"kind": "whim", "text": ""}, ': kind is "whim", expected one of rule, not a matrix, .*empty plan'),
        ({"kind": "rule", "text": 1}, ": text is 1, expected a text"),
    ],
)
def test_a_reason_that_is_none_is_refused(pico: Path, tmp_path: Path, why: Any, message: str) -> None:
    plan = laser.make_plan(laser.scan(laser.open_checkpoint(pico), Selection(roles=("q",))), "rank:4")
    document = json.loads(plan.to_json())
    document["lines"][0]["why"] = why
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(RecordError, match=rf"line 1 \(.*\): its why{message}"):
        laser.Plan.load(tmp_path / "plan.json")


def test_spectra_of_before_are_the_same_spectra(pico: Path, tmp_path: Path) -> None:
    spectra = laser.scan(laser.open_checkpoint(pico), Selection(roles=("q",)))
    path = tmp_path / "spectra.safetensors"
    spectra.save(path)
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["laser"])
        vectors = {name: file.get_tensor(name) for name in file.keys()}
    for row in header["matrices"]:
        row["skipped"] = row["skipped"] and row["skipped"]["text"]

    def write(version: int) -> None:
        document = sealed(header | {"version": version})
        path.write_bytes(save(vectors, metadata={"laser": json.dumps(document)}))

    write(2)
    loaded = laser.Spectra.load(path)
    assert loaded.skipped == spectra.skipped and all(
        np.array_equal(loaded.values[n], spectra.values[n]) for n in vectors
    )
    write(3)
    with pytest.raises(RecordError, match=r"skipped is .*, expected an object of kind and text"):
        laser.Spectra.load(path)


def test_the_coverage_counts_kinds_however_they_are_worded(pico: Path) -> None:
    plan = laser.make_plan(laser.scan(laser.open_checkpoint(pico)), "mp-edge", lowest_snr=3)
    other = tuple(replace(line, why=Why(line.why.kind, f"{line.name}: other words")) for line in plan.lines)
    assert replace(plan, lines=other).coverage == plan.coverage
    kinds = {row["kind"] for row in plan.coverage["reasons"]}
    assert kinds == {Kind.NOT_A_MATRIX, Kind.PROTECTED, Kind.NOT_LOWEST, Kind.RULE}
    assert all(isinstance(line, PlanLine) and asdict(line)["why"]["text"] for line in plan.lines)
