"""Search: the rule of acceptance, exact undo, the cache against full passes, kills, grids, tasks and gradients."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrated import windows_of
from conftest import mixtral_config, mixtral_tensors, write_checkpoint_directory
from pico_language import TEXT, make_model, write_tokenizer
from reference import Row, naive_search

from laser.calibration import calibrate
from laser.checkpoint.reader import Checkpoint, open_checkpoint
from laser.cli import main
from laser.errors import NumericalError, RecordError, UsageError
from laser.evaluation.activations import Store
from laser.evaluation.evaluate import evaluate
from laser.evaluation.objective import Accuracy, Loss, Objective, read_task
from laser.evaluation.perplexity import weighted_mean
from laser.evaluation.streaming import LayeredModel, Scores
from laser.evaluation.text import Text, cut_windows, load_tokenizer
from laser.journal import Journal
from laser.moments import Moments
from laser.pipeline import reduce, scan
from laser.plan import Plan
from laser.searching.candidates import candidates_of, cut_of
from laser.searching.runner import best_together
from laser.searching.search import SearchResult, search_plan
from laser.searching.trials import Bench, Variant, accepted
from laser.selection import Selection
from laser.spectral.devices import choose_device

CPU = choose_device("cpu")
RULES = ("fraction:0.8", "fraction:0.3")


def losses_for(path: Path, windows: int = 6) -> tuple[Loss, Loss]:
    """Calibration and held-out windows, of 24 tokens."""
    tokenizer = load_tokenizer(path)
    text = Text("t", TEXT)
    calibration = cut_windows(text, tokenizer, length=24, limit=windows)
    return Loss(calibration), Loss(cut_windows(Text("h", TEXT[::-1]), tokenizer, length=24, limit=4))


def run(path: Path, rules: Sequence[str] = RULES, *, resident: int | None = None, **options: Any) -> SearchResult:
    checkpoint = open_checkpoint(path)
    calibration, held_out = losses_for(path)
    selection = options.pop("selection", Selection(include=r"q_proj|experts\.[01]\.w2"))
    model = LayeredModel(checkpoint, resident=resident)
    spectra = scan(checkpoint, device=CPU)
    return search_plan(model, spectra, rules, calibration, [held_out], selection=selection, device=CPU, **options)


def decisions(result: SearchResult) -> list[tuple[str, str, float | None, bool]]:
    return [(t.label, t.rule, t.d, t.accepted) for t in result.trials]


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    return make_model(tmp_path / "m", "mixtral")


def test_what_is_accepted() -> None:
    table = {  # (d, se): better, no-worse, any-drop
        (-0.2, 0.1): (True, True, True),
        (-0.1, 0.1): (True, True, True),
        (-0.05, 0.1): (False, True, True),
        (0.05, 0.1): (False, True, False),
        (0.2, 0.1): (False, False, False),
        (0.0, 0.0): (False, True, False),  # a change of nothing was not measured: not better
        (math.nan, 0.1): (False, False, False),
        (-math.inf, 0.1): (False, False, False),
        (-0.1, math.nan): (False, False, False),
    }
    for (d, se), expected in table.items():
        assert tuple(accepted(rule, d, se) for rule in ("better", "no-worse", "any-drop")) == expected


def rows(result: SearchResult) -> list[Row]:
    return [(t.label, t.rule, dict(t.ranks), t.alone, t.d, t.se, t.accepted) for t in result.trials]


@dataclass
class Asked:
    """A search, and what the reference makes of it."""

    path: Path
    rules: Sequence[str] = RULES
    accept: str = "any-drop"
    order: str = "layers"
    grid: bool = False
    accuracy: Objective | None = None
    moments: Moments | None = None
    include: str = r"q_proj|experts\.[01]\.w2"
    racing: bool = False
    windows: int = 6
    roles: tuple[str, ...] = ()
    reading: float = 1e4  # times as long as running

    def __post_init__(self) -> None:
        self.checkpoint, (calibration, self.held_out) = open_checkpoint(self.path), losses_for(self.path, self.windows)
        self.objective, self.selection = self.accuracy or calibration, Selection(roles=self.roles, include=self.include)
        self.spectra = scan(self.checkpoint, self.selection if self.roles else None, device=CPU, moments=self.moments)

    @functools.cached_property
    def expected(self) -> tuple[list[Row], dict[str, int], list[float]]:
        model = LayeredModel(self.checkpoint)
        _, found = candidates_of(self.spectra, model, self.rules, self.selection, None, self.grid)
        return naive_search(
            self.checkpoint, found, self.objective, self.accept, self.order, CPU, grid=self.grid, moments=self.moments,
            raced=len(self.objective.weights) // 4 if self.racing else None,
        )  # fmt: skip

    def search(self, **options: Any) -> tuple[SearchResult, LayeredModel, int]:
        """The result, which must agree with the reference to the last bit, its model and how many walks there were."""
        memory = {key: options.pop(key) for key in ("resident", "ahead", "store") if key in options}
        model, walks = LayeredModel(self.checkpoint, **memory), list[int]()
        with pytest.MonkeyPatch.context() as patch:
            walk = Bench.walk
            # Counted where they are made: nothing that is recorded tells of them.
            patch.setattr(Bench, "walk", lambda *a, **k: walks.append(1) or walk(*a, **k))
            # What reading costs beside running is this machine's; it decides how many are measured together.
            patch.setattr(Bench, "reading_to_running", lambda _: self.reading)
            result = search_plan(
                model, self.spectra, self.rules, self.objective, [self.held_out], selection=self.selection,
                accept=self.accept, order=self.order, grid=self.grid, device=CPU, moments=self.moments,
                racing=self.racing, **options,
            )  # fmt: skip
        trials, ranks, values = self.expected
        assert rows(result) == trials
        assert {name: line.rank for name, line in result.plan.reductions.items()} == ranks
        assert result.calibration.after == weighted_mean(values, self.objective.weights)[0]
        return result, model, len(walks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "accept"), [("layers", "better"), ("layers", "any-drop"), ("layers", "no-worse"), ("snr", "any-drop")]
)
def test_one_walk_for_many_is_one_after_the_other(accept: str, order: str, model_path: Path) -> None:
    """Decisions and losses to the last bit, whatever memory there is; and no more walks than wrong guesses."""
    asked = Asked(model_path, accept=accept, order=order)
    lengths = [len(w.tokens) - 1 for w in asked.objective.windows]
    state = sum(lengths) * LayeredModel(asked.checkpoint).width * 4
    held_out = asked.search(resident=None)[0].held_out
    stores = [{"store": Store(count * state)} for count in (3, 6)]
    for memory in ({}, {"ahead": True}, {"resident": 2}, {"store": Store(0)}, *stores):
        asked.reading = 0.3 if "ahead" in memory else 1e4
        result, model, walks = asked.search(**memory)
        assert result.held_out == held_out
        count, kept = len(result.trials), sum(t.accepted for t in result.trials)
        if "resident" in memory or asked.reading < 1:  # in memory one candidate a walk costs no reading
            continue
        if memory and model.store.limit > 6 * state:
            assert walks <= 2 + kept  # one for those that were accepted, one that finds no more, and one to report
            assert model.loads <= (walks + 1) * (model.layers + 4)  # and one to prove the pieces; the rest twice
            assert walks < count
        elif model.store.limit == 0:
            assert walks > count / 2  # one variant at a time, and some are known from the walk before
        if accept == "any-drop":
            assert 0 < kept < count  # or nothing was tested


@pytest.mark.slow
def test_what_is_measured_in_vain_is_weighed_against_reading(model_path: Path) -> None:
    """Four of ten are kept, most against the guess: where reading is cheap little may be run twice for that."""
    asked = Asked(model_path, include="proj|w[123]")
    _, one, _ = asked.search(resident=None)
    forwards, walks = list[int](), list[int]()
    for asked.reading in (0.01, 30.0, 1000.0):
        result, model, count = asked.search(resident=0)
        forwards.append(model.layer_forwards)
        walks.append(count)
    assert sum(t.accepted for t in result.trials) > len(result.trials) / 5
    assert forwards[0] < 1.5 * one.layer_forwards < forwards[2]
    assert forwards == sorted(forwards) and walks == sorted(walks, reverse=True)


def test_a_candidate_of_several_options_is_measured_in_vain_several_times() -> None:
    together = [best_together(60, 12, lambda: 10.0, options) for options in (1, 4, 100)]
    assert together == [10, 5, 1]  # the square root of 2 * 10 * 5, of a fourth of it, and one at the least
    assert [best_together(0, 0, lambda: 10.0, options) for options in (1, 3, 100)] == [15, 5, 1]


@pytest.mark.slow
def test_the_grid_and_accuracy_are_one_after_the_other(model_path: Path, tmp_path: Path) -> None:
    words = TEXT[:60].split()
    questions = [
        {"question": a, "answer": b, "alternatives": [c]} for a, b, c in zip(words, words[1:], words[2:], strict=False)
    ]
    task = read_task(write_task(tmp_path / "task.jsonl", questions), load_tokenizer(model_path))
    for accuracy in (None, task):
        rules, include = ("fraction:0.9", "fraction:0.5", "fraction:0.1"), r"layers\.[12].*(w2|o_proj)"
        asked = Asked(model_path, rules, grid=True, accuracy=accuracy, include=include)
        result, _, walks = asked.search()
        assert accuracy or {t.alone for t in result.trials} == {True, False}
        assert walks <= 2 + sum(t.accepted and not t.alone for t in result.trials)
        asked.search(resident=None)


@pytest.mark.slow
def test_rules_by_the_data_are_one_after_the_other(model_path: Path, tmp_path: Path) -> None:
    calibrate(open_checkpoint(model_path), windows_of(model_path), tmp_path / "m.safetensors")
    moments = Moments.load(tmp_path / "m.safetensors")
    rules = ("fraction:0.8", "data:fraction:0.8", "data:fraction:0.3")
    asked = Asked(model_path, rules, moments=moments, include=r"layers\.[12].*(q_proj|experts\.0\.w1)")
    families = asked.search()[0].families()
    assert families["data"]["trials"] and families["plain"]["trials"]
    asked.search(resident=None)


@pytest.mark.slow
@pytest.mark.parametrize("kind, roles", [("tied", ("embedding", "q")), ("llama", ("embedding", "head", "q"))])
def test_an_embedding_and_a_head_are_one_after_the_other(kind: str, roles: tuple[str, ...], tmp_path: Path) -> None:
    """A tied one is edited in two pieces at once, below all layers and above them."""
    path = make_model(tmp_path / "m", kind)
    asked = Asked(path, ("fraction:0.9", "fraction:0.5"), include=r"embed|lm_head|layers\.[01].*q_proj", roles=roles)
    asked.search()
    asked.search(resident=2, ahead=True)
    assert {t.label.split(".")[-2] for t in asked.search(resident=None)[0].trials} >= {"embed_tokens", "q_proj"}


@pytest.mark.slow
@pytest.mark.parametrize("accept", ["no-worse"])
def test_a_race_ends_early_for_the_worst(accept: str, model_path: Path, tmp_path: Path) -> None:
    """As its reference does, killed and gone on with too; and it runs fewer layers."""
    asked = Asked(model_path, accept=accept, racing=True, windows=16)
    journal = tmp_path / "search.jsonl"
    result, model, _ = asked.search(journal=journal)
    raced = [t for t in result.trials if t.raced is not None]
    assert raced and {t.raced for t in raced} == {4} and not any(t.accepted for t in raced)
    assert "after 4 units" in raced[0].stated()
    assert asked.search(journal=journal)[0].trials == result.trials
    asked.search(resident=None)
    asked.reading = 0.3
    asked.search()
    whole = Asked(model_path, accept=accept, windows=16)
    assert model.layer_forwards < whole.search()[1].layer_forwards
    journal.unlink()
    words = ["search", str(model_path), "-o", str(tmp_path / "plan.json"), "--text", str(write_text(tmp_path))]
    words += ["--window", "24", "--windows", "16", "--held-out-windows", "2", "--rules", ",".join(RULES)]
    assert main([*words, "--racing", "--accept", accept, "--lowest-snr", "all", "--json"]) == 0
    assert Plan.load(tmp_path / "plan.json").selection["racing"] is True
    with pytest.raises(UsageError, match="a race wants 8 at the least"):
        Asked(model_path, racing=True).search()
    with pytest.raises(RecordError, match="racing"):
        whole.search(journal=journal)


@pytest.mark.slow
def test_the_plan_is_what_was_measured(model_path: Path, tmp_path: Path) -> None:
    """Write the plan with `reduce` and measure the files: the same loss as the search reports."""
    result = run(model_path, accept="any-drop")
    assert 0 < len(result.plan.reductions) < len({t.label for t in result.trials})
    reduce(open_checkpoint(model_path), result.plan, tmp_path / "out", device=CPU)
    write_tokenizer(tmp_path / "out")
    calibration, held_out = losses_for(model_path)
    out = open_checkpoint(tmp_path / "out")
    assert evaluate(out, calibration.windows_of_text).nll == pytest.approx(result.calibration.after, abs=1e-6)
    assert evaluate(out, held_out.windows_of_text).nll == pytest.approx(result.held_out[0].after, abs=1e-6)
    source = open_checkpoint(model_path)
    assert evaluate(source, held_out.windows_of_text).nll == pytest.approx(result.held_out[0].before, abs=1e-6)
    result.plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").reductions == result.plan.reductions
    for line in result.plan.lines:
        tried = [t for t in result.trials if t.label == line.name]
        assert line.why.text.startswith(("accepted", "rejected")) == bool(tried)


@pytest.mark.slow
def test_each_decision_against_a_slow_reference(model_path: Path) -> None:
    """Every trial again, as a whole checkpoint's loss with the kept matrices in it; and the best option is kept."""
    result = run(model_path, accept="no-worse")
    checkpoint, (calibration, _) = open_checkpoint(model_path), losses_for(model_path)
    kept: dict[str, torch.Tensor] = {}
    trials = list(result.trials)
    assert [t.rule for t in trials[:2]] == list(RULES)  # mildest first

    def loss(edits: dict[str, torch.Tensor]) -> np.ndarray:
        model = LayeredModel(checkpoint)
        for name, W in edits.items():
            model.edit(name, W)
        return np.array(calibration.values(model.losses(calibration.windows)))

    now = loss({})
    for label in dict.fromkeys(t.label for t in trials):
        options = []
        for trial in (t for t in trials if t.label == label):
            edits = cut_of(checkpoint, trial.rule, trial.ranks, CPU)
            values = loss(kept | edits)
            d = float(np.average(values - now, weights=calibration.weights))
            assert trial.d == pytest.approx(d, abs=1e-7)
            if trial.accepted:
                options.append((d, edits, values, trial))
        assert (label in result.plan.reductions) == bool(options)
        if options:
            _, edits, now, trial = min(options, key=lambda o: o[0])
            assert result.plan.reductions[label].rank == trial.ranks[label]
            kept |= edits


class Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 3, 7])
def test_killed_and_restarted_it_repeats_no_trial(
    after: int, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = run(model_path, accept="any-drop", journal=tmp_path / "a.jsonl")
    count = 0

    def kill(*_: object) -> None:
        nonlocal count
        count += 1
        if count > after:
            raise Killed

    path = tmp_path / "search.jsonl"
    with pytest.raises(Killed):
        run(model_path, accept="any-drop", journal=path, tick=kill)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    finished = {(line["label"], line["rule"]) for line in lines if line.get("entry") == "trial"}
    assert len(finished) == after + 1
    with path.open("a") as file:
        file.write('{"entry": "trial", "lab')  # torn by the kill
    measured = list[tuple[str, str]]()
    walk = Bench.walk

    def counted(self: Bench, variants: Sequence[Variant], *arguments: Any, **options: Any) -> Any:
        measured.extend((name, rule) for variant in variants for name, (rule, _) in variant.items())
        return walk(self, variants, *arguments, **options)

    # `tick` tells of trials from the journal as well; what is measured is counted where it is measured.
    monkeypatch.setattr(Bench, "walk", counted)
    resumed = run(model_path, accept="any-drop", journal=path)
    assert decisions(resumed) == decisions(undisturbed) and resumed.plan == undisturbed.plan
    assert resumed.held_out == undisturbed.held_out
    assert not finished & set(measured)
    measured.clear()
    assert run(model_path, accept="any-drop", journal=path).plan == undisturbed.plan and not measured


@pytest.mark.slow
def test_a_journal_of_another_search_is_refused(model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    run(model_path, journal=path)
    with pytest.raises(RecordError, match="belongs to another run: accept differ"):
        run(model_path, journal=path, accept="no-worse")
    lines = path.read_text().splitlines()
    first, *entries = [{k: v for k, v in json.loads(line).items() if k != "check"} for line in lines]
    entries[2]["rule"] = "fraction:0.9"  # behind the untouched model and what it gives on the held-out text
    path.unlink()
    with Journal(path, first) as journal:  # an entry that stands there in good order, and is of another search
        for entry in entries:
            journal.append(entry)
    with pytest.raises(RecordError, match=r"found an entry of trial .* expected trial .*rule differ"):
        run(model_path, journal=path)
    assert decisions(run(model_path, journal=path, anew=True)) == decisions(run(model_path))  # what --force does
    lines[3] = lines[3].replace('"rule"', '"rulf"')  # altered: it and all later ones are measured again
    path.write_text("\n".join(lines) + "\n")
    assert decisions(run(model_path, journal=path)) == decisions(run(model_path))
    lines[3] = "no JSON"  # damaged: that trial and all later ones are measured again, earlier ones are kept
    path.write_text("\n".join(lines) + "\n")
    assert decisions(run(model_path, journal=path)) == decisions(run(model_path))


@pytest.mark.slow
def test_another_held_out_text_repeats_no_trial(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trials are of the calibration text. Reported on one text, then another, then the first again."""
    tokenizer, path = load_tokenizer(model_path), tmp_path / "search.jsonl"
    calibration, _ = losses_for(model_path)
    checkpoint = open_checkpoint(model_path)
    spectra, walks, walk = scan(checkpoint, device=CPU), [], Bench.walk
    # As above.
    monkeypatch.setattr(Bench, "walk", lambda *a, **k: walks.append(1) or walk(*a, **k))

    def report_on(text: str, journal: Path | None = path) -> SearchResult:
        held_out = Loss(cut_windows(Text("h", text), tokenizer, length=24, limit=4))
        return search_plan(
            LayeredModel(checkpoint, resident=None), spectra, RULES, calibration, [held_out], device=CPU,
            selection=Selection(include=r"q_proj|experts\.[01]\.w2"), accept="any-drop", journal=journal,
        )  # fmt: skip

    first = report_on(TEXT[::-1])
    assert first.plan.reductions and walks
    walks.clear()
    other = report_on(TEXT[7::-1] * 30)
    assert len(walks) == 2  # before and after
    assert decisions(other) == decisions(first) and other.plan == first.plan and other.held_out != first.held_out
    assert other.held_out == report_on(TEXT[7::-1] * 30, journal=None).held_out  # as if measured undisturbed
    walks.clear()
    assert report_on(TEXT[::-1]) == first and report_on(TEXT[7::-1] * 30) == other
    assert not walks


@pytest.mark.slow
def test_a_search_goes_on_only_where_it_is_measured_alike(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after in one report may come from two runs: of another library or dtype they are not like."""
    import laser.searching.search as module

    run(model_path, journal=tmp_path / "search.jsonl")
    # Another release of a library than is installed.
    monkeypatch.setattr(module, "version", lambda name: "0")
    with pytest.raises(RecordError, match="belongs to another run: libraries differ"):
        run(model_path, journal=tmp_path / "search.jsonl")


def test_fewer_windows_than_were_asked_for_are_in_the_report(model_path: Path) -> None:
    tokenizer, (calibration, _) = load_tokenizer(model_path), losses_for(model_path)
    held_out = Loss(cut_windows(Text("h", TEXT[::-1][:60]), tokenizer, length=24, limit=9))
    checkpoint = open_checkpoint(model_path)
    result = search_plan(
        LayeredModel(checkpoint), scan(checkpoint, device=CPU), RULES, calibration, [held_out],
        selection=Selection(include="layers.2.*q_proj"), device=CPU,
    )  # fmt: skip
    assert (result.held_out[0].units, result.held_out[0].asked) == (3, 9)
    assert (result.calibration.units, result.calibration.asked) == (6, 6)


@pytest.mark.slow
def test_nan_rejects_and_later_trials_go_on(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One candidate's truncation overflows: it is rejected, and the next ones are judged against a sane baseline."""
    good = run(model_path, accept="any-drop")
    broken = good.trials[0].label
    import laser.searching.search as module

    def cut(
        checkpoint: Checkpoint, rule: str, ranks: Any, device: Any, moments: Any, base: Any
    ) -> dict[str, torch.Tensor]:
        cuts = cut_of(checkpoint, rule, ranks, device, moments)
        return {n: W * float("nan") if n == broken else W for n, W in cuts.items()}

    # No weights are known whose truncation alone overflows.
    monkeypatch.setattr(module, "cut_of", cut)
    result = run(model_path, accept="no-worse")
    assert [t.d for t in result.trials if t.label == broken] == [None, None]
    assert broken not in result.plan.reductions
    assert all(t.d is not None for t in result.trials if t.label != broken)
    line = next(line for line in result.plan.lines if line.name == broken)
    assert "not finite" in line.why.text


@pytest.mark.slow
def test_requests_that_make_no_sense(model_path: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model_path)
    calibration, held_out = losses_for(model_path)
    spectra = scan(checkpoint, device=CPU)
    model = LayeredModel(checkpoint)

    def attempt(**change: Any) -> SearchResult:
        given = {"rules": RULES, "calibration": calibration, "held_out": [held_out]} | change
        return search_plan(model, spectra, given.pop("rules"), given.pop("calibration"), given.pop("held_out"), **given)

    for change, message in (
        ({"accept": "maybe"}, r"--accept better\|no-worse\|any-drop"),
        ({"order": "random"}, r"--order layers\|snr"),
        ({"rules": ()}, "--rules"),
        ({"rules": ("nonsense",)}, "no rule is called"),
        ({"held_out": [calibration]}, "6 windows of the held-out t are also calibration windows"),
        ({"calibration": losses_for(model_path, 1)[0]}, "no standard error"),
        ({"rules": ("rank:1000",)}, "reduces no selected matrix"),
        ({"shortlist": 0}, "count of 1 or more"),
        ({"shortlist": 5, "grid": True}, "no --grid"),
    ):
        with pytest.raises(UsageError, match=message):
            attempt(**change)
    other = make_model(tmp_path / "other", "mixtral", rope_theta=5.0)
    with pytest.raises(RecordError, match="spectra was made from m"):
        search_plan(LayeredModel(open_checkpoint(other)), spectra, RULES, calibration, [held_out])
    tensors = mixtral_tensors()
    tensors["model.norm.weight"][0] = float("nan")
    broken = write_tokenizer(write_checkpoint_directory(tmp_path / "nan", tensors, mixtral_config()))
    with pytest.raises(NumericalError, match="untouched model is not finite"):
        run(broken)


@pytest.mark.slow
def test_gradients_predict_small_removals(model_path: Path) -> None:
    """Removing the least singular value of each matrix is nearly first order: the orders must agree."""
    names = Selection(roles=("q", "k", "v", "o"))
    result = run(model_path, ("fraction:0.97",), shortlist=100, selection=names, accept="any-drop", order="snr")
    assert len(result.trials) == 12 and result.rank_correlation is not None and result.rank_correlation > 0.7
    alone = [(t.predicted, t.d) for t in result.trials[:1]]
    assert alone[0][0] == pytest.approx(alone[0][1], rel=0.5)
    few = run(model_path, ("fraction:0.97",), shortlist=4, selection=names, accept="any-drop")
    lowest = sorted(result.trials, key=lambda t: t.predicted or 0.0)[:4]
    assert {t.label for t in few.trials} == {t.label for t in lowest}
    reasons = [line.why.text for line in few.plan.lines]
    assert reasons.count("not tried: not on the shortlist") == 8


@pytest.mark.slow
def test_the_grid_tries_cells_alone_and_composes(model_path: Path) -> None:
    rules = ("fraction:0.9", "fraction:0.5", "fraction:0.1")
    result = run(model_path, rules, grid=True, accept="any-drop", selection=Selection(layers=(1, 2), roles=("w2", "o")))
    alone = [t for t in result.trials if t.alone]
    assert len(alone) == 2 * 2 * 3 and {len(t.ranks) for t in alone} == {1, 4}  # o, and the 4 experts of w2
    composed = [t for t in result.trials if not t.alone]
    best = min((t for t in alone if t.accepted), key=lambda t: t.d or 0.0)
    assert composed[0].ranks == best.ranks and composed[0].d == best.d
    assert (result.calibration.d or 0.0) < 0
    for trial in composed:
        if trial.accepted:
            assert all(result.plan.reductions[name].rank == rank for name, rank in trial.ranks.items())


def write_text(folder: Path) -> Path:
    (folder / "text.txt").write_text(TEXT)
    return folder / "text.txt"


def write_task(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_accuracy_of_a_task(model_path: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model_path)
    rows = [
        {"question": "the fox", "answer": "jumps", "alternatives": ["sits", "eats"]},
        {"question": "the dog ", "answer": "is lazy"},
    ]
    task = read_task(write_task(tmp_path / "task.jsonl", rows), tokenizer)
    assert task.groups == (3, 1) and [w.scored for w in task.windows] == [6, 5, 5, 8]
    assert tokenizer.decode(task.windows[0].tokens[-6:]).replace(" ", "") == "jumps"
    right = Scores((1.0, 2.0, 3.0, 9.0), (False, False, False, True))
    assert task.values(right) == [0.0, 0.0]
    assert task.values(Scores((2.0, 2.0, 3.0, 9.0), (True,) * 3 + (False,))) == [1.0, 1.0]  # a tie is not right
    assert math.isnan(task.values(Scores((math.nan, 2.0, 3.0, 9.0), (False,) * 4))[0])
    for bad, message in (
        ({"question": "a"}, "line 1: found question, expected texts"),
        ({"question": "a", "answer": ""}, "expected texts"),
        ({"question": "a", "answer": "b", "alternatives": ["b"]}, "among the alternatives"),
    ):
        with pytest.raises(RecordError, match=message):
            read_task(write_task(tmp_path / "bad.jsonl", [bad]), tokenizer)
    (tmp_path / "list.JSON").write_text(json.dumps(rows))
    assert read_task(tmp_path / "list.JSON", tokenizer).sha256 == task.sha256
    for file, content, message in (
        ("a.jsonl", '{"question": "a", "answer": "\\ud800"}', r"line 1 holds \\ud800 alone"),
        ("a.jsonl", '{"question": "a", "answer": "b", "alternatives": ["\\udfff"]}', r"line 1 holds \\udfff alone"),
        ("a.jsonl", '{"question": "a", "answer": null}', "line 1: found question, answer, expected texts"),
        ("a.jsonl", "[" * 50_000, "line 1 is nested too deep"),
        ("a.json", "[3]", "row 1: found a number, expected an object"),
        ("none.jsonl", None, "no such task"),
    ):
        if content is not None:
            (tmp_path / file).write_text(content)
        with pytest.raises(RecordError, match=message):
            read_task(tmp_path / file, tokenizer)
    (tmp_path / "task.txt").write_text(json.dumps(rows[0]))
    with pytest.raises(UsageError, match=r"--task needs rows of JSON, found task\.txt"):
        read_task(tmp_path / "task.txt", tokenizer)
    for bounds in ({"limit": 0}, {"limit": -1}, {"skip": -1}, {"skip": 2}):
        with pytest.raises(UsageError):
            read_task(tmp_path / "list.JSON", tokenizer, **bounds)


def test_a_search_for_accuracy(model_path: Path, tmp_path: Path) -> None:
    words = TEXT[:60].split()
    rows = [
        {"question": a, "answer": b, "alternatives": [c]} for a, b, c in zip(words, words[1:], words[2:], strict=False)
    ]
    task = read_task(write_task(tmp_path / "task.jsonl", rows), load_tokenizer(model_path))
    assert isinstance(task, Accuracy)
    checkpoint = open_checkpoint(model_path)
    _, held_out = losses_for(model_path)
    options: dict[str, Any] = {"selection": Selection(roles=("w2",)), "grid": True, "accept": "any-drop", "device": CPU}
    model = LayeredModel(checkpoint, resident=None)
    result = search_plan(
        model,
        scan(checkpoint, device=CPU),
        ("fraction:0.3",),
        task,
        [held_out],
        **options,
    )
    before, after = result.calibration.before, result.calibration.after
    assert result.calibration.objective == "accuracy" and before is not None and after is not None
    assert 0 <= after <= before <= 1
    assert result.held_out[0].objective == "loss"
