"""The verbs that look, as a user types them: null, spectra, plot, report, and the options of scan, plan and run."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

from laser.spectra import Spectra
from laser.spectral.rules import apply_rule
from laser.summary import summarise


@pytest.fixture
def spectra(run: Run, pico: Path, tmp_path: Path) -> Path:
    assert run("scan", pico, "-o", tmp_path / "s", "--null", 19, "--layers", 1)[0] == 0
    return tmp_path / "s"


@pytest.mark.slow
def test_null_prints_rule_by_role(run: Run, pico: Path, spectra: Path) -> None:
    asked = ("null", pico, "--layers", 1, "--roles", "q,w1", "--rules", "laser-rmt,mp-edge,parallel:0.1")
    code, text, _ = run(*asked, "--spectra", spectra)
    lines = [line.split() for line in text.splitlines()]
    assert code == 0 and lines[0][:3] == ["rule", "role", "matrices"]
    rules = ("laser-rmt", "mp-edge", "parallel:0.1")
    assert [line[:3] for line in lines[1:4]] == [[rule, "w1", "4"] for rule in rules]
    document = json.loads(run(*asked, "--permute", "rows", "--draws", 2, "--json")[1])
    assert (document["permutation"], document["draws"], len(document["rows"])) == ("rows", 2, 6)


@pytest.mark.slow
def test_spectra_lists_and_writes_what_others_read(run: Run, spectra: Path, tmp_path: Path) -> None:
    code, text, _ = run("spectra", spectra, "--snr-json", tmp_path / "j", "--unfrozen-yaml", tmp_path / "y")
    assert code == 0 and "16 matrices of pico, cut by mp-edge" in text
    assert len(json.loads((tmp_path / "j").read_text())) == 16
    assert "\nunfrozen_parameters:\n- ^lm_head.weight$\n" in (tmp_path / "y").read_text()
    assert len(list(csv.DictReader(run("spectra", spectra, "--csv", "--roles", "q")[1].splitlines()))) == 1
    assert len(json.loads(run("spectra", spectra, "--json", "--rule", "bema")[1])["rows"]) == 16
    assert run("spectra", spectra, "--snr-json", tmp_path / "j")[0] == 1  # not without --force


@pytest.mark.slow
def test_what_others_read_has_the_scores_of_spectrum_unless_told_otherwise(
    run: Run, spectra: Path, tmp_path: Path
) -> None:
    record = Spectra.load(spectra)
    for asked, rule in (((), "laser-rmt"), (("--rule", "mp-edge"), "mp-edge"), (("--rule", "rank:3"), "rank:3")):
        files = ("--snr-json", tmp_path / "j", "--unfrozen-yaml", tmp_path / "y", "--force")
        code, text, _ = run("spectra", spectra, *files, *asked)
        assert code == 0 and f"written to {tmp_path / 'j'}, by the scores of {rule}\n" in text
        assert f"cut by {rule if asked else 'mp-edge'}\n" in text
        of_rule = summarise(record, rule)
        assert (tmp_path / "j").read_bytes() == of_rule.snr_json()
        assert (tmp_path / "y").read_text() == of_rule.unfrozen_yaml(50)
    # Each score is that of the definition: s over the threshold of laser-rmt, by s under it, by s_1.
    run("spectra", spectra, "--snr-json", tmp_path / "j", "--force")
    for name, entry in json.loads((tmp_path / "j").read_text()).items():
        s = record.values[name + ".weight"]
        shape = next(m.shape for m in record.matrices if m.name == name + ".weight")
        kept = apply_rule("laser-rmt", s, (shape[0], shape[1])).rank
        assert entry["snr"] == pytest.approx(s[:kept].sum() / s[kept:].sum() / s[0])


def test_nothing_is_written_when_a_part_is_refused(run: Run, spectra: Path, tmp_path: Path) -> None:
    files = ("--snr-json", tmp_path / "j", "--unfrozen-yaml", tmp_path / "y")
    assert run("spectra", spectra, *files, "--top-percent", 0)[0] == 2
    assert run("spectra", spectra, "--snr-json", tmp_path / "j", "--unfrozen-yaml", tmp_path / "j")[0] == 2
    assert not (tmp_path / "j").exists() and not (tmp_path / "y").exists()


@pytest.mark.slow
def test_plot_and_report_write_files(run: Run, spectra: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason='pictures need the extra: pip install "laser-rmt[plot]"')
    assert run("plot", spectra, "-o", tmp_path / "a.png", "--matrix", "q_proj")[0] == 0
    assert run("plot", spectra, "-o", tmp_path / "b.svg", "--matrix", "q_proj", "--with", spectra)[0] == 0
    assert run("plot", spectra, "-o", tmp_path / "c.png", "--heat", "snr", "--mean")[0] == 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in (tmp_path / "b.svg").read_text()
    code, text, _ = run("report", spectra, "-o", tmp_path / "r.html")
    assert code == 0 and "16 matrices" in text and "<!doctype html>" in (tmp_path / "r.html").read_text()


@pytest.mark.slow
def test_a_report_of_two_models(run: Run, pico: Path, spectra: Path, tmp_path: Path) -> None:
    assert run("scan", pico, "-o", tmp_path / "q", "--layers", 1, "--roles", "q,k")[0] == 0
    code, text, err = run("report", spectra, "--against", tmp_path / "q", "-o", tmp_path / "r.html")
    assert (code, err) == (0, "") and "16 matrices" in text
    assert '"missing":14' in (tmp_path / "r.html").read_text()
    assert run("delta", pico, pico, "-o", tmp_path / "d")[0] == 0
    code, _, err = run("report", spectra, "--against", tmp_path / "d", "-o", tmp_path / "x.html")
    assert code == 2 and "holds spectra of weights and one of differences" in err and "try two of one kind" in err
    assert not (tmp_path / "x.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["plot", "{s}", "-o", "{tmp}/x.png"], 2, "try --matrix NAME or --heat kept"),
        (["plot", "{s}", "-o", "{tmp}/x.png", "--heat", "kept", "--with", "{s}"], 2, "try --matrix NAME as well"),
        (["plot", "{s}", "-o", "{tmp}/x.png", "--matrix", "w9"], 2, "was not scanned"),
        (["spectra", "{s}", "--top-percent", "0", "--unfrozen-yaml", "{tmp}/u"], 2, "try 50"),
        (["plan", "{s}", "-o", "{tmp}/p", "--rule", "parallel:0.01"], 2, "laser scan --null 99"),
        (["plan", "{s}", "-o", "{tmp}/p", "--rule", "mp-edge", "--shrink", "soft"], 2, "--shrink frobenius"),
        (["report", "{s}", "-o", "{s}"], 1, "exists"),
    ],
)
def test_mistakes_are_explained(
    run: Run, spectra: Path, tmp_path: Path, arguments: Any, code: int, message: str
) -> None:
    found, _, err = run(*(a.format(s=spectra, tmp=tmp_path) for a in arguments))
    assert found == code and message in err and err.count("\n") == 1


@pytest.mark.slow
def test_run_with_a_rule_that_needs_permutations_and_treatments(run: Run, pico: Path, tmp_path: Path) -> None:
    asked = (
        "--no-search",
        "--layers",
        2,
        "--rule",
        "parallel:0.2",
        "--shrink",
        "operator",
        "--two-sided",
        "--require-fit",
        0.01,
    )
    assert run("run", pico, "-o", tmp_path / "out", *asked)[0] == 0
    plan = json.loads((tmp_path / "out" / "laser" / "plan.json").read_text())
    assert {k: plan["selection"][k] for k in ("shrink", "two_sided", "require_fit")} == {
        "shrink": "operator",
        "two_sided": True,
        "require_fit": 0.01,
    }
    assert any(line["shrink"] == "operator" for line in plan["lines"])
    assert run("verify", pico, tmp_path / "out")[1].endswith("0 problems\n")
