"""A plan.json edited by hand, at random: refused with its line named, or carried out and reported exactly."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import mixtral_config, mixtral_tensors, write_checkpoint_directory
from hypothesis import event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import laser
from laser.cli import main, options, verbs
from laser.errors import LaserError, RecordError
from laser.report.publish import write_card
from laser.spectral.shrinkage import Gains

Document = dict[str, Any]
PREFIX = "model.layers.0."
TENSORS = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.o_proj.weight", "input_layernorm.weight")
CONFIG = mixtral_config() | {"num_hidden_layers": 1}
TREATMENTS: dict[str, dict[str, Any]] = {
    "fraction:0.5": {},
    "mp-edge": {"shrink": "frobenius", "two_sided": True},
    "laser-rmt": {"lowest_snr": 2},
}
JUNK = st.sampled_from(
    [None, True, False, 0, 1, 2, 3, 16, 31, 32, 33, -1, 1.0, 1.5, 0.3, "", "3", "x", [], {}, 10**30, 1e-3]
) | st.sampled_from([float("nan"), float("inf"), -float("inf")])
GOOD = {
    "action": st.sampled_from(["reduce", "keep", "skip", "melt", "Reduce"]),
    "rank": st.integers(-1, 34),
    "below": st.integers(0, 20),
    "full_rank": st.sampled_from([16, 32]),
    "shrink": st.sampled_from(["frobenius", "operator", "nuclear", "spectral", None]),
    "noise": st.floats(0, 1),
    "metric": st.sampled_from(["plain", "data", "other"]),
    "name": st.sampled_from([PREFIX + n for n in TENSORS] + ["model.layers.0.self_attn.q_proj.weigth"]),
    "role": st.sampled_from(["q", "k", "router"]),
}
FIGURES = st.sampled_from(["snr", "energy_kept", "threshold", "sigma", "fit", "fit_level", "edge_shift"])


def set_key(document: Document, at: int, data: st.DataObject) -> None:
    keys = st.sampled_from(sorted(GOOD)) | st.sampled_from(sorted(document["lines"][at]))
    key = data.draw(keys, label="key")
    document["lines"][at][key] = data.draw(GOOD.get(key, JUNK) | JUNK, label="value")


def set_rank(document: Document, at: int, data: st.DataObject) -> None:
    full = document["lines"][at]["full_rank"] or 8
    document["lines"][at]["rank"] = data.draw(st.integers(0, full), label="rank")


def turn(document: Document, at: int, data: st.DataObject) -> None:
    """A line that reduces is kept, and the other way round."""
    line = document["lines"][at]
    line["action"] = "keep" if line["action"] == "reduce" else "reduce"


def change_figure(document: Document, at: int, data: st.DataObject) -> None:
    document["lines"][at][data.draw(FIGURES, label="figure")] = data.draw(st.floats(0, 1), label="value")


def take_key(document: Document, at: int, data: st.DataObject) -> None:
    del document["lines"][at][data.draw(st.sampled_from(sorted(document["lines"][at])), label="key")]


def add_key(document: Document, at: int, data: st.DataObject) -> None:
    document["lines"][at][data.draw(st.sampled_from(["ranks", "Rank", "note", "rank "]))] = data.draw(JUNK)


def take_line(document: Document, at: int, data: st.DataObject) -> None:
    del document["lines"][at]


def double_line(document: Document, at: int, data: st.DataObject) -> None:
    document["lines"].insert(data.draw(st.integers(0, len(document["lines"]))), copy.deepcopy(document["lines"][at]))


def move_line(document: Document, at: int, data: st.DataObject) -> None:
    document["lines"].append(document["lines"].pop(at))


def break_line(document: Document, at: int, data: st.DataObject) -> None:
    document["lines"][at] = data.draw(JUNK)


EDITS = (
    set_key,
    set_key,
    set_key,
    set_rank,
    set_rank,
    turn,
    change_figure,
    take_key,
    add_key,
    take_line,
    double_line,
    move_line,
    break_line,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Document]]:
    folder = tmp_path_factory.mktemp("edited")
    tensors = {PREFIX + n: t for n, t in mixtral_tensors(dtype=torch.float32).items() for n in [n.removeprefix(PREFIX)]}
    tensors = {name: t for name, t in tensors.items() if name.removeprefix(PREFIX) in TENSORS}
    path = write_checkpoint_directory(folder / "source", tensors, CONFIG, shards=1)
    spectra = laser.scan(laser.open_checkpoint(path))
    return path, {
        rule: json.loads(laser.make_plan(spectra, rule, **more).to_json()) for rule, more in TREATMENTS.items()
    }


def called(*words: object) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main([str(word) for word in words])
    return code, out.getvalue()


@pytest.mark.slow
@settings(max_examples=120)
@given(rule=st.sampled_from(sorted(TREATMENTS)), edit=st.sampled_from(EDITS), data=st.data())
def test_an_edited_plan_is_refused_by_line_or_done_exactly(
    source: tuple[Path, dict[str, Document]], rule: str, edit: Callable[..., None], data: st.DataObject
) -> None:
    path, plans = source
    document = copy.deepcopy(plans[rule])
    at = data.draw(st.integers(0, len(document["lines"]) - 1), label="line")
    name = document["lines"][at]["name"]
    edit(document, at, data)
    with tempfile.TemporaryDirectory() as folder:
        plan, out = Path(folder, "plan.json"), Path(folder, "out")
        plan.write_text(json.dumps(document))
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                # The verb itself: building the command line takes ten times as long.
                verbs.reduce(
                    str(path),
                    plan,
                    output=out,
                    base=options.FromBase(),
                    compute=options.ComputeOptions(),
                    moments=options.Inputs(),
                    parts=options.PartOption(),
                    work=options.Directory(),
                )
        except LaserError as error:
            event(f"refused: {edit.__name__}")
            told = str(error)
            assert isinstance(error, RecordError) and not out.exists() and "\n" not in told
            assert re.search(rf"\bline {at + 1}\b", told) or name in told, told  # by number where its name was broken
            return
        event(f"done: {edit.__name__}")
        check(path, out, document, printed.getvalue(), plans[rule])


def check(path: Path, out: Path, document: Document, told: str, made: Document) -> None:
    before, after = load_file(path / "model.safetensors"), load_file(out / "model.safetensors")
    assert sorted(line["name"] for line in document["lines"]) == sorted(before)
    outcome = json.loads((out / "laser.json").read_text())
    assert laser.verify(laser.open_checkpoint(path), out).problems == ()
    card = write_card(out).read_text()
    same = json.dumps(document["lines"]) == json.dumps(made["lines"])
    assert same == ("laser run " in card) == ("was edited" not in card) == ("was edited" not in told)
    kept = {line["name"]: line for line in outcome["plan"]["lines"]}
    assert set(outcome["matrices"]) == {line["name"] for line in document["lines"] if line["action"] == "reduce"}
    for line in document["lines"]:
        name = line["name"]
        W, B = before[name].double().numpy(), after[name].double().numpy()
        if line["action"] != "reduce":
            assert before[name].numpy().tobytes() == after[name].numpy().tobytes()
            assert f"| `{name}` |" not in card
            continue
        U, s, Vh = np.linalg.svd(W, full_matrices=False)
        gains = Gains(line["rank"] - line["below"], line["below"], line["shrink"], line["noise"]).of(s, W.shape)
        assert np.linalg.norm((U * (s * gains)) @ Vh - B) <= 1e-5 * np.linalg.norm(W)
        rank, energy = int(np.count_nonzero(gains)), float(np.sum((gains * s) ** 2) / np.sum(s**2))
        over = int(line["rank"] - line["below"])
        snr = s[:over].sum() / s[over:].sum() if over < len(s) else None
        assert rank == kept[name]["rank"] == outcome["matrices"][name]["rank"]
        assert kept[name]["energy_kept"] == pytest.approx(energy, abs=2e-4)
        assert outcome["matrices"][name]["energy_kept"] == pytest.approx(energy, abs=1e-6)
        assert kept[name]["snr"] == (None if snr is None else pytest.approx(snr, rel=1e-3, abs=1e-3))
        row = next(row.split() for row in told.splitlines() if row.startswith(name))
        assert row[1:3] == [str(rank), str(len(s))] and abs(float(row[4]) - 100 * (1 - energy)) <= 0.03
        assert row[3] == "-" if snr is None else abs(float(row[3]) - snr) <= 2e-3 * (1 + snr)
        cells = [cell.strip() for cell in next(x for x in card.splitlines() if f"`{name}` |" in x).split("|")]
        assert cells[2:4] == [str(len(s)), str(rank)] and abs(float(cells[4].split()[0]) - 100 * (1 - energy)) <= 0.01
        assert (rank == 0) == (f"RANK 0: 1 of them become ZERO, nothing of them is left: {name}" in told)
        if kept[name]["threshold"] is not None and not line["shrink"]:
            assert np.count_nonzero(s > kept[name]["threshold"]) == over


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(rule="mp-edge"),
        lambda d: d.update(rule="fraction:0.25"),
        lambda d: d["selection"].update(layers=[7]),
        lambda d: d["selection"].update(lowest_snr=1),
        lambda d: d["lines"].reverse(),
    ],
    ids=["rule", "argument", "layers", "number", "order"],
)
def test_a_plan_whose_head_was_edited_is_not_reproduced_by_its_rule(
    source: tuple[Path, dict[str, Document]], tmp_path: Path, change: Callable[[Document], None]
) -> None:
    path, plans = source
    document = copy.deepcopy(plans["fraction:0.5"])
    change(document)
    for folder, text in (("out", json.dumps(document)), ("again", None)):
        plan = tmp_path / "plan.json"
        # The second time from laser.json, as the card says.
        plan.write_text(text or json.dumps(json.loads((tmp_path / "out/laser.json").read_text())["plan"]))
        code, told = called("reduce", path, plan, "-o", tmp_path / folder)
        assert code == 0 and "the plan was edited after the rule had made it" in told
        card = write_card(tmp_path / folder).read_text()
        assert "laser run " not in card and "plan.json: the entry `plan` of laser.json" in card
    one, two = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("out", "again"))
    assert one == two


def first(document: Document) -> Document:
    """The first line that reduces: k (16 x 32) at half rank."""
    return next(line for line in document["lines"] if line["action"] == "reduce")


def edited(source: tuple[Path, dict[str, Document]], tmp_path: Path, change: Callable[[Document], None]) -> str:
    """What reduce says of a plan that is changed so, which it must refuse."""
    path, plans = source
    document = copy.deepcopy(plans["fraction:0.5"])
    change(document)
    (tmp_path / "plan.json").write_text(json.dumps(document))
    code, told = called("reduce", path, tmp_path / "plan.json", "-o", tmp_path / "out")
    assert code == 1 and not (tmp_path / "out").exists()
    return told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: first(d).update(name="model.layers.0.self_attn.q_proj.weigth"), "did you mean"),
        (lambda d: first(d).update(rank=True), "rank is true, expected a whole number or null"),
        (lambda d: first(d).update(rank="3"), 'rank is "3", expected a whole number or null'),
        (lambda d: first(d).update(snr=float("nan")), "snr is nan, expected a number or null"),
        (lambda d: first(d).update(shrink="operator"), "no noise, expected the level to shrink by"),
        (lambda d: first(d).update(action="skip"), "skip is for what could not be measured"),
        (lambda d: first(d).update(below=17), "of these 17 below"),
        (lambda d: first(d).update(layer=1), "layer is 1, expected 0"),
        (lambda d: first(d).update(stack="vision"), 'stack is "vision", expected ""'),
        (lambda d: first(d).pop("metric"), "has no key 'metric'"),
        (lambda d: d.update(lines=None), "lines is null, expected a list"),
        (lambda d: d.update(line=[]), "has a key 'line'"),
        (lambda d: d.update(rule="mp-egde"), "no rule is called 'mp-egde'"),
        (lambda d: d["selection"].update(layers="1"), "selection.layers is"),
        (lambda d: d["source"].update(identity="0" * 64), "was made from"),
        (lambda d: d["source"].update(parameters=7), "the plan's source has parameters 7"),
    ],
)
def test_what_a_refusal_says(
    source: tuple[Path, dict[str, Document]], tmp_path: Path, change: Callable[[Document], None], message: str
) -> None:
    assert message in edited(source, tmp_path, change)


def test_a_key_that_is_twice_in_a_line_is_refused(source: tuple[Path, dict[str, Document]], tmp_path: Path) -> None:
    path, plans = source
    text = json.dumps(plans["fraction:0.5"]).replace('"rank": 8,', '"rank": 8, "rank": 2,')
    (tmp_path / "plan.json").write_text(text)
    code, told = called("reduce", path, tmp_path / "plan.json", "-o", tmp_path / "out")
    assert code == 1 and f"the key 'rank' is twice in the entry of {PREFIX}self_attn.k_proj.weight" in told
    (tmp_path / "plan.json").write_text("[" * 100_000)
    code, told = called("reduce", path, tmp_path / "plan.json", "-o", tmp_path / "out")
    assert code == 1 and "not a readable plan file" in told


@pytest.mark.slow
def test_claims_that_were_not_carried_out_are_problems(
    source: tuple[Path, dict[str, Document]], tmp_path: Path
) -> None:
    path, plans = source
    (tmp_path / "plan.json").write_text(json.dumps(plans["fraction:0.5"]))
    assert called("reduce", path, tmp_path / "plan.json", "-o", tmp_path / "out")[0] == 0
    record = tmp_path / "out" / "laser.json"
    whole = json.loads(record.read_text())
    name = next(iter(whole["matrices"]))
    for change, message in [
        (lambda d: d["matrices"].pop(name), "no record says that it was written"),
        (lambda d: line_of(d, name).update(action="keep"), "no line of the plan does"),
        (lambda d: line_of(d, name).update(rank=3), "found rank 8, expected 3"),
        (lambda d: line_of(d, name).update(name="nothing"), "no such tensor"),
        (lambda d: d["plan"]["lines"].pop(0), "no line is about"),
    ]:
        forged = copy.deepcopy(whole)
        change(forged)
        record.write_text(json.dumps(forged))
        code, told = called("verify", path, tmp_path / "out")
        assert code == 1 and message in told and "0 problems" not in told, told
        if "no line is about" not in message:  # that, the output's own tensors would have to tell
            assert called("card", tmp_path / "out")[0] == 1
    record.write_text(json.dumps(whole | {"matrices": {name: {"rank": "16"}}}))
    with pytest.raises(RecordError, match=r"matrix .* has no key 'full_rank'"):
        laser.verify(laser.open_checkpoint(path), tmp_path / "out")


def line_of(document: Document, name: str) -> Document:
    return next(line for line in document["plan"]["lines"] if line["name"] == name)
