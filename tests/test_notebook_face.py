"""Records as people meet them in a notebook: one line, a small table, a DataFrame; models and devices by name."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import laser
from laser.notebook import Shown, sparkline

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def spectra(pico: Path) -> laser.Spectra:
    return laser.scan(str(pico), device="cpu")


def shown_of(pico: Path, spectra: laser.Spectra, out: Path) -> list[Shown]:
    plan = laser.make_plan(spectra, "rank:4")
    return [spectra, laser.summarise(spectra), plan, laser.reduce(pico, plan, str(out), device="cpu")]


@pytest.mark.slow
def test_a_record_is_one_line_a_small_table_and_a_frame(pico: Path, spectra: laser.Spectra, tmp_path: Path) -> None:
    pytest.importorskip("pandas", reason="a DataFrame needs pandas")
    for record in shown_of(pico, spectra, tmp_path / "out"):
        assert len(repr(record)) < 200 and "pico" in repr(record) and "\n" not in repr(record)
        page = record._repr_html_()
        ElementTree.fromstring(f"<div>{page}</div>")  # well formed
        assert len(page) < 10_000 and page.count("<tr>") <= 13
        frame = record.to_frame()
        assert len(frame) == len(record.frame_rows()) > 10
        assert "np.float64" not in page + repr(record)
    assert not laser.verify(str(pico), str(tmp_path / "out"), device="cpu").problems


def test_what_a_name_holds_is_no_markup(spectra: laser.Spectra) -> None:
    from dataclasses import replace

    strange = replace(spectra, source=replace(spectra.source, name="<script>\x1b"))
    assert "<script>" not in strange._repr_html_() and "\x1b" not in repr(strange) + strange._repr_html_()


def test_spectra_are_asked_by_name_and_narrowed(pico: Path, spectra: laser.Spectra) -> None:
    assert (spectra[Q] == spectra.values[Q]).all() and (np.diff(spectra[Q]) <= 0).all()
    with pytest.raises(KeyError, match="q_proj' was not measured in pico; try one of model"):
        spectra["q_proj"]
    some = spectra.select(layers="0-1", roles="q,w1")
    again = laser.scan(pico, laser.Selection(layers=(0, 1), roles=("q", "w1")), device="cpu")
    assert some.values.keys() == again.values.keys() and some.skipped == again.skipped
    assert laser.make_plan(some, "mp-edge").lines == laser.make_plan(again, "mp-edge").lines
    assert spectra.select(layers=[0, 1], roles=["q", "w1"]).values.keys() == some.values.keys()
    with pytest.raises(laser.UsageError, match="no layer 7"):
        spectra.select(layers=[7])


def test_without_pandas_it_says_what_to_install(spectra: laser.Spectra, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing but its absence shows what is said then.
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(laser.UsageError, match="pip install pandas"):
        spectra.to_frame()


def test_a_sparkline_goes_from_the_lowest_to_the_highest() -> None:
    drawn = ElementTree.fromstring(sparkline([1.0, 3.0, float("nan"), 2.0]))
    points = [tuple(map(float, p.split(","))) for p in drawn[0].attrib["points"].split()]
    assert [x for x, _ in points] == [0.0, 60.0, 120.0]
    assert points[1][1] < points[2][1] < points[0][1]  # SVG counts downwards
    assert sparkline([1.0]) == sparkline([]) == ""


def test_the_package_knows_its_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", laser.__version__)
