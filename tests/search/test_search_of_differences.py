"""A search whose edits are scales and cuts of a difference, a role at a time: against the naive reference."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, write_checkpoint_directory
from pico_language import TEXT, make_model, write_tokenizer
from reference import naive_search
from test_search import losses_for, rows

from laser.checkpoint.reader import Checkpoint, open_checkpoint
from laser.differences.base import Base
from laser.evaluation.activations import Store
from laser.evaluation.evaluate import evaluate
from laser.evaluation.perplexity import weighted_mean
from laser.evaluation.streaming import LayeredModel
from laser.outcome import Outcome
from laser.pipeline import reduce, scan
from laser.plan import Plan
from laser.reasons import Kind
from laser.report.publish import write_card
from laser.searching.candidates import candidates_of, cut_of
from laser.searching.search import SearchRecord, search_plan
from laser.selection import Selection
from laser.spectral.devices import HOST

ROLES = ("q", "o", "down", "norm", "head")
RULES = ("rank:2", "scale:0.75", "scale:0.25")


@pytest.fixture
def base_path(tmp_path: Path) -> Path:
    return make_model(tmp_path / "base", "llama")


@pytest.fixture
def tuned_path(base_path: Path, tmp_path: Path) -> Path:
    """Every tensor moved, norms too, but the embedding."""
    base, moved = open_checkpoint(base_path), {}
    for seed, name in enumerate(base.tensors):
        W = base.read(name)
        noise = torch.randn(W.shape, generator=torch.Generator().manual_seed(seed))
        change = 0.4 * W.float().std() * noise if W.ndim == 2 else 0.1
        moved[name] = W if "embed" in name else (W.float() + change).to(W.dtype)
    return write_tokenizer(write_checkpoint_directory(tmp_path / "tuned", moved, dict(base.config)))


@pytest.fixture
def pair(base_path: Path, tuned_path: Path) -> tuple[Checkpoint, Base]:
    tuned = open_checkpoint(tuned_path)
    return tuned, Base.of(open_checkpoint(base_path), tuned)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [False, True])
def test_it_is_one_after_the_other(grid: bool, pair: tuple[Checkpoint, Base], tuned_path: Path, tmp_path: Path) -> None:
    tuned, base = pair
    rules, selection = (RULES[1:2], Selection(roles=("q",))) if grid else (RULES, Selection(roles=ROLES))
    spectra = scan(tuned, Selection(), base=base, device=HOST)
    calibration, held_out = losses_for(tuned_path)
    _, found = candidates_of(spectra, LayeredModel(tuned), rules, selection, None, grid)
    expected = naive_search(
        tuned, found, calibration, "any-drop", "layers", HOST, grid=grid, cut=functools.partial(cut_of, base=base)
    )
    memories: tuple[dict[str, Any], ...] = ({}, {"resident": None}, {"store": Store(0)})
    results = [
        search_plan(
            LayeredModel(tuned, **memory), spectra, rules, calibration, [held_out], selection=selection,
            accept="any-drop", device=HOST, base=base, grid=grid,
        )
        for memory in memories
    ]  # fmt: skip
    for result in results:
        assert rows(result) == expected[0]
        assert result.calibration.after == weighted_mean(expected[2], calibration.weights)[0]
        assert {name: line.rank or 0 for name, line in result.plan.reductions.items()} == expected[1]
    if grid:
        return
    result = results[0]
    assert {c.label for c in found} == set(ROLES)
    assert {t.rule for t in result.trials} == set(RULES)
    assert 0 < sum(t.accepted for t in result.trials) < len(result.trials)
    assert {line.scale for line in result.plan.reductions.values()} & {0.75, 0.25}
    # What is written by the plan is what was measured.
    reduce(tuned, result.plan, tmp_path / "out", base=base, device=HOST)
    write_tokenizer(tmp_path / "out")
    out = open_checkpoint(tmp_path / "out")
    assert evaluate(out, calibration.windows_of_text).nll == pytest.approx(result.calibration.after, abs=1e-6)
    (tmp_path / "out" / "laser").mkdir()
    SearchRecord.of(result).save(tmp_path / "out" / "laser" / "search.json")
    card = write_card(tmp_path / "out", tuned).read_text()
    assert "a fine-tune of `base`, with its difference from that base" in card and "scale:0.75" in card


@pytest.mark.slow
def test_the_verbs(run: Run, base_path: Path, tuned_path: Path, tmp_path: Path) -> None:
    """Searched alone and within a run, killed and gone on with; another base is another search."""
    (tmp_path / "text.txt").write_text(TEXT)
    text = ("--text", tmp_path / "text.txt", "--window", "24", "--windows", "6", "--held-out-windows", "2")
    words = (*text, "--accept", "any-drop", "--roles", "q,k,o")
    plan = tmp_path / "plan.json"
    code, said, err = run("search", tuned_path, "--base", base_path, "-o", plan, *words)
    assert code == 0, err
    assert "rounding" in said and "scale:0.25" in said and "held out" in said
    made = Plan.load(plan)
    assert made.pair is not None and made.pair.base.name == "base"
    code, said, err = run("run", tuned_path, "--base", base_path, "-o", tmp_path / "out", *words, "--device", "cpu")
    assert code == 0, err
    outcome = Outcome.load(tmp_path / "out")
    assert {n: (x.rank, x.scale) for n, x in outcome.plan.reductions.items()} == {
        n: (x.rank, x.scale) for n, x in made.reductions.items()
    }
    assert run("verify", tuned_path, tmp_path / "out", "--base", base_path)[0] == 0
    code, said, _ = run("run", tuned_path, "--base", base_path, "-o", tmp_path / "out", *words, "--resume", "--dry-run",
                        "--device", "cpu", "--json")  # fmt: skip
    assert code == 0 and json.loads(said)["search"]["candidates"] == 3
    other = make_model(tmp_path / "other", "tied")
    code, _, err = run("search", tuned_path, "--base", other, "-o", plan, *words, "--force")
    assert code == 1 and "the spectra was made from tuned - base" in err


@pytest.mark.slow
def test_a_plan_of_rejected_scales_is_read_again(run: Run, base_path: Path, tuned_path: Path, tmp_path: Path) -> None:
    """Lines that the first rule would scale and that were rejected keep neither the action nor the scale."""
    (tmp_path / "text.txt").write_text(TEXT)
    words = ("--text", tmp_path / "text.txt", "--window", "24", "--windows", "6", "--held-out-windows", "2")
    words += ("--base", base_path, "-o", tmp_path / "plan.json", "--roles", "q,k,o", "--accept", "better")
    for rules in (("--rules", "scale:0"), ("--grid", "scale:0", "--force")):  # far worse, so rejected
        code, _, err = run("search", tuned_path, *words, *rules)
        assert code == 0, err
        plan = Plan.load(tmp_path / "plan.json")
        kept = [line for line in plan.lines if line.why.kind is Kind.REJECTED]
        assert kept and all((line.action, line.scale) == ("keep", None) for line in kept)


def test_what_a_search_of_differences_refuses(run: Run, base_path: Path, tuned_path: Path, tmp_path: Path) -> None:
    for flags, message in (
        (("--lowest-snr", "3"), "differences are tried by role"),
        (("--shortlist", "gradient:2"), "differences are tried by role"),
        (("--moments", tmp_path / "m"), "the metric of the data is of a model's own matrices"),
        (("--rules", "scale:2"), "from 0, which is the base"),
    ):
        code, _, err = run("search", tuned_path, "--base", base_path, "-o", tmp_path / "p", *flags)
        assert code == 2 and message in err
