"""The card's picture is of what was cut: as many values as the matrix has, kept as the plan says, any name as it is."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import Run

import laser
from laser.checkpoint.writer import is_kept
from laser.escape import visible
from laser.flow import records_of
from laser.outcome import Outcome
from laser.plan import Plan, make_plan
from laser.report.picture import HEAD, PANELS, picture_of_cuts
from laser.report.publish import CARD_PICTURE, write_card
from laser.spectra import Spectra

SVG = "{http://www.w3.org/2000/svg}"


def outcome_of(plan: Plan) -> Outcome:
    matrices = {
        line.name: {"rank": line.rank, "full_rank": line.full_rank, "energy_kept": line.energy_kept, "residual": 0.0}
        for line in plan.reductions.values()
    }
    return Outcome(plan, matrices, {}, {}, ())  # pyright: ignore[reportArgumentType]


@pytest.fixture
def spectra(pico: Path) -> Spectra:
    return laser.scan(pico)


def panels(picture: bytes | None) -> list[ElementTree.Element]:
    assert picture is not None
    return ElementTree.fromstring(picture).findall(f"{SVG}g")


def texts(panel: ElementTree.Element) -> list[str]:
    return ["".join(node.itertext()) for node in panel.iter(f"{SVG}text")]


def heights(panel: ElementTree.Element) -> tuple[float, float]:
    """The sums of the bars' heights, of what is cut and of what is kept, in values."""
    found = []
    for path in panel.findall(f"{SVG}path"):
        boxes = re.findall(r"M\S+ (\S+?)V(\S+?)H", path.get("d", ""))
        found.append(sum(float(low) - float(high) for low, high in boxes))
    ground = float(panel.findall(f"{SVG}line")[-1].get("y1", "nan"))
    scale = (ground - HEAD) / float(texts(panel)[4])  # of one value: the highest bar reaches the top
    return found[0] / scale, found[1] / scale


def test_each_role_shows_the_matrix_that_lost_most(spectra: Spectra) -> None:
    plan = make_plan(spectra, "rank:5")
    outcome = outcome_of(plan)
    roles: dict[str, list[tuple[float, str]]] = {}
    for line in plan.reductions.values():
        roles.setdefault(line.role, []).append((line.energy_kept or 0.0, line.name))
    expected = [min(several)[1] for several in roles.values()][:PANELS]
    assert len(roles) > PANELS
    found = panels(picture_of_cuts(spectra, outcome))
    assert [texts(panel)[5] for panel in found] == expected
    for panel, name in zip(found, expected, strict=True):
        p = len(spectra[name])
        assert f"kept 5 of {p}" in texts(panel)[6]
        cut, kept = heights(panel)
        assert kept == pytest.approx(5, abs=0.5) and cut == pytest.approx(p - 5, abs=0.7)


def test_what_is_kept_at_both_ends_is_shown_at_both(spectra: Spectra) -> None:
    plan = make_plan(spectra, "rank:5")
    one = next(iter(plan.reductions.values()))
    lines = tuple(replace(x, below=2) if x.name == one.name else replace(x, action="keep") for x in plan.lines)
    (panel,) = panels(picture_of_cuts(spectra, outcome_of(replace(plan, lines=lines))))
    kept = panel.findall(f"{SVG}path")[1].get("d", "")
    places = [float(x) for x in re.findall(r"M(\S+) ", kept)]
    assert heights(panel)[1] == pytest.approx(5, abs=0.5) and min(places) < 60 < 200 < max(places)


def test_nothing_cut_is_no_picture(spectra: Spectra) -> None:
    plan = make_plan(spectra, "rank:100")  # more than there are
    assert picture_of_cuts(spectra, outcome_of(plan)) is None
    cut = make_plan(spectra, "rank:5")
    assert picture_of_cuts(replace(spectra, values={}), outcome_of(cut)) is None
    scaled = replace(cut, lines=tuple(replace(x, scale=0.5) for x in cut.lines))
    assert picture_of_cuts(spectra, outcome_of(scaled)) is None


@pytest.mark.parametrize("name", ["<script>&\"'", "a\x1b[31mb", "模型", "a" * 300, "\udcff", "]]>"])
def test_any_name_is_shown_as_it_is(spectra: Spectra, name: str) -> None:
    plan = make_plan(spectra, "rank:5")
    first = next(iter(plan.reductions))
    lines = tuple(replace(x, name=name) if x.name == first else replace(x, action="keep") for x in plan.lines)
    picture = picture_of_cuts(replace(spectra, values={name: spectra[first]}, matrices=tuple(
        replace(m, name=name) if m.name == first else m for m in spectra.matrices
    )), outcome_of(replace(plan, lines=lines)))  # fmt: skip
    (panel,) = panels(picture)
    shown = texts(panel)[5]
    assert shown == (visible(name) if len(name) < 300 else "a" * 28 + "..." + "a" * 25)


@pytest.mark.slow
def test_a_run_leaves_the_picture_that_its_card_shows(run: Run, pico: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("run", pico, "-o", out, "--no-search", "--rule", "rank:4", "--roles", "q,w1")[0] == 0
    text, drawn = (out / "README.md").read_text(), (out / CARD_PICTURE).read_bytes()
    assert f"]({CARD_PICTURE})" in text and len(panels(drawn)) == 2
    assert run("verify", pico, out)[0] == 0
    assert is_kept(CARD_PICTURE)  # so that it is pushed, and replaced by --force
    assert run("run", pico, "-o", out, "--no-search", "--rule", "rank:4", "--roles", "q,w1", "--force")[0] == 0
    text = (out / "README.md").read_text()  # which names the command
    write_card(out)
    assert (out / CARD_PICTURE).read_bytes() == drawn and (out / "README.md").read_text() == text
    (out / CARD_PICTURE).write_bytes(drawn + b"\n")  # changed since
    code, told, _ = run("verify", pico, out)
    assert code == 1 and CARD_PICTURE in told
    (out / CARD_PICTURE).unlink()
    assert run("verify", pico, out)[0] == 1
    # Without the spectra there is none, and the card does not speak of it.
    (records_of(out) / "spectra.safetensors").unlink()
    (records_of(out) / "plan.json").unlink()
    assert CARD_PICTURE not in write_card(out).read_text() and not (out / CARD_PICTURE).exists()
    assert run("verify", pico, out)[0] == 0


@pytest.mark.slow
def test_a_card_of_reduce_has_the_picture_where_its_spectra_are_named(run: Run, pico: Path, tmp_path: Path) -> None:
    out, spectra, words = tmp_path / "out", tmp_path / "s", ("--rule", "rank:4", "--roles", "q,w1")
    assert run("scan", pico, "-o", spectra, "--device", "cpu")[0] == 0
    assert run("plan", spectra, "-o", tmp_path / "p", *words)[0] == 0
    assert run("reduce", pico, tmp_path / "p", "-o", out, "--device", "cpu")[0] == run("card", out)[0] == 0
    assert CARD_PICTURE not in (out / "README.md").read_text()
    assert run("card", out, "--spectra", spectra)[0] == 0
    drawn = (out / CARD_PICTURE).read_bytes()
    assert f"]({CARD_PICTURE})" in (out / "README.md").read_text() and len(panels(drawn)) == 2
    assert run("verify", pico, out)[0] == 0
    assert run("card", out)[0] == 0 and (out / CARD_PICTURE).read_bytes() == drawn  # a card written again has it, too
    assert f"]({CARD_PICTURE})" in (out / "README.md").read_text()
    assert run("run", pico, "-o", tmp_path / "run", "--no-search", *words, "--device", "cpu")[0] == 0
    assert (tmp_path / "run" / CARD_PICTURE).read_bytes() == drawn
    before = (out / "README.md").read_bytes()
    assert run("scan", pico, "-o", tmp_path / "k", "--roles", "k")[0] == run("scan", out, "-o", tmp_path / "o")[0] == 0
    for file, code, told in (("k", 2, "measures no matrix that was cut"), ("o", 1, "made from; try the file that the")):
        found, _, err = run("card", out, "--spectra", tmp_path / file)
        assert found == code and told in err and err.count("\n") == 1
    assert (out / "README.md").read_bytes() == before and (out / CARD_PICTURE).read_bytes() == drawn
    (out / CARD_PICTURE).write_bytes(drawn + b"\n")  # changed since: not ours any more
    assert run("card", out)[0] == 0 and not (out / CARD_PICTURE).exists()
    assert CARD_PICTURE not in (out / "README.md").read_text() and run("verify", pico, out)[0] == 0


@pytest.mark.slow
def test_by_the_data_the_values_are_those_of_the_outputs(spectra: Spectra) -> None:
    """No law is drawn over values for which there is none."""
    from laser.moments import Calibration
    from laser.spectra import InData

    name = next(iter(spectra.values))
    values = 7 * spectra[name]
    told = Calibration.__new__(Calibration)  # nobody reads it here
    data = InData(told, {name: 100}, {name: values})
    plan = make_plan(spectra, "rank:5")
    lines = tuple(
        replace(x, metric="data", tokens=9) if x.name == name else replace(x, action="keep") for x in plan.lines
    )
    (panel,) = panels(picture_of_cuts(replace(spectra, data=data), outcome_of(replace(plan, lines=lines))))
    assert not panel.findall(f"{SVG}polyline") and "singular value by the data" in texts(panel)
    assert float(texts(panel)[2]) > 1.1 * spectra[name][0]  # the axis ends where those values do


def test_a_card_of_one_rule_with_several_arguments_names_its_source_once(
    pico: Path, spectra: Spectra, tmp_path: Path
) -> None:
    plan = replace(make_plan(spectra, "rank:4", laser.Selection(roles=("q",))), rule="rank:4,rank:8")
    laser.reduce(pico, plan, tmp_path / "out", device="cpu")
    assert "Rule `rank:4,rank:8` (a fixed rank); selection" in write_card(tmp_path / "out").read_text()
