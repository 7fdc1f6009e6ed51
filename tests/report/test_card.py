"""The card is a pure function of records: valid metadata, no harm hidden, no content that breaks out of its place."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from laser.checkpoint.source import Source
from laser.errors import RecordError
from laser.escape import cell, code, fence, visible
from laser.evaluation.leaderboard import Leaderboard, TaskScore
from laser.evaluation.lm_tasks import TASKS
from laser.evaluation.verdict import UNDECIDED, Direction, Unlike, judge
from laser.moments import Calibration
from laser.outcome import Outcome
from laser.plan import Plan, PlanLine
from laser.reasons import Kind, Why
from laser.report import chat, rendering
from laser.report.card import CardRun, CardSource, base_model, card_text, check_metadata
from laser.report.comparison import LossDocument, Losses, compare, losses_of
from laser.report.source_card import licence_of, read_source_card
from laser.searching.runner import Trial

README = """---
license: apache-2.0
language:
- fr
- it
- no
base_model: mistralai/Mixtral-8x7B-v0.1
tags: [moe]
inference: true
---
# A model
"""
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"


def line(name: str, role: str = "w1", rank: int | None = 10, layer: int = 3) -> PlanLine:
    if rank is None:
        return PlanLine(name, role, layer, None, "keep", Why(Kind.NOT_LOWEST, "not among the lowest"))
    return PlanLine(name, role, layer, 0, "reduce", Why(Kind.RULE, "why"), rank, 48, 1.0, 0.1, 0.7, 0.8)


def outcome_of(*lines: PlanLine, rule: str = "laser-rmt", **selection: Any) -> Outcome:
    lines = lines or (line("a.weight"), line("b.weight", "q", 20), line("c.weight", rank=None))
    chosen = {"layers": [], "roles": [], "include": None, "exclude": None, "lowest_snr": None} | selection
    matrices: Any = {x.name: {"rank": x.rank, "energy_kept": 0.75} for x in lines if x.action == "reduce"}
    run = {"method": "gram", "device": "cpu float64"}
    return Outcome(
        Plan(Source("base", "1" * 64), rule, chosen, lines), matrices, {"model.safetensors": "2" * 64}, run, ()
    )


@pytest.fixture
def source() -> CardSource:
    return CardSource(
        name="base",
        identity="1" * 64,
        hub_id="mistralai/Mixtral-8x7B-Instruct-v0.1",
        revision="abc123",
        readme=README,
        config={"torch_dtype": "bfloat16"},
        tokenizer_config={"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": {"content": "</s>"}},
        parameters=1_000_000_000,
        shards={"model.safetensors": "3" * 64},
        licence_files=("LICENSE",),
    )


def board_of(
    value: float, *, rows: int = 4, limit: int | None = None, names: tuple[str, ...] | None = None
) -> Leaderboard:
    """A board where the first `value` share of the rows of every task is right."""
    scores = []
    for name in names or tuple(TASKS):
        right = round(value * rows)
        values = (1.0,) * right + (0.0,) * (rows - right)
        task = TASKS[name]
        scores.append(TaskScore(name, task.metric, right / rows, 0.05, rows, task.shots, values))
    versions = {"lm-eval": "0.4.13"}
    return Leaderboard("base", "1" * 64, tuple(scores), limit, {}, {}, versions, "laser leaderboard base")


def losses_of_change(change: float, se: float | None = 0.01) -> Losses:
    def loss(nll: float, error: float | None) -> LossDocument:
        return {"nll": nll, "se": error, "tokens": 5120, "windows": 10, "text": "wiki.test"}

    return {"source": loss(3.0, 0.1), "result": loss(3.0 + change, 0.1), "difference": loss(change, se)}


def metadata(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def first_table(text: str) -> str:
    return next(part for part in text.split("\n\n") if part.startswith("|"))


@pytest.mark.slow
def test_metadata_is_inherited_and_valid(source: CardSource) -> None:
    text = card_text("small-laser", outcome_of(), source, after=board_of(0.5))
    found = metadata(text)
    assert found["base_model"] == "mistralai/Mixtral-8x7B-Instruct-v0.1"
    assert found["license"] == "apache-2.0" and found["language"] == ["fr", "it", "no"]
    assert found["library_name"] == "transformers" and found["inference"] is False
    assert found["tags"][0] == "laser-rmt" and found["pipeline_tag"] == "text-generation"
    # Read by the Hub's own library, written again, and read again: nothing is lost on the way.
    once = ModelCard(text)
    assert ModelCard(str(once)).data.to_dict() == once.data.to_dict() == found


@pytest.mark.slow
def test_model_index_has_an_entry_per_task_as_in_the_published_cards(source: CardSource) -> None:
    name, results = model_index_to_eval_results(
        metadata(card_text("m", outcome_of(), source, after=board_of(0.5)))["model-index"]
    )
    assert name == "m"
    assert [(r.dataset_name, r.dataset_type, r.dataset_config, r.dataset_split, r.metric_type) for r in results] == [
        ("AI2 Reasoning Challenge (25-Shot)", "ai2_arc", "ARC-Challenge", "test", "acc_norm"),
        ("HellaSwag (10-Shot)", "hellaswag", None, "validation", "acc_norm"),
        ("MMLU (5-Shot)", "cais/mmlu", "all", "test", "acc"),
        ("TruthfulQA (0-shot)", "truthful_qa", "multiple_choice", "validation", "mc2"),
        ("Winogrande (5-shot)", "winogrande", "winogrande_xl", "validation", "acc"),
        ("GSM8k (5-shot)", "gsm8k", "main", "test", "acc"),
    ]
    assert all(r.task_type == "text-generation" and r.metric_value == 50.0 for r in results)
    assert [r.dataset_args for r in results] == [{"num_few_shot": t.shots} for t in TASKS.values()]
    cut = metadata(card_text("m", outcome_of(), source, after=board_of(0.5, limit=4)))["model-index"][0]["results"]
    assert all(r["dataset"]["args"]["rows_scored"] == 4 for r in cut)


@pytest.mark.slow
def test_without_measurement_nothing_is_claimed(source: CardSource) -> None:
    text = card_text("m", outcome_of(), source)
    assert "model-index" not in metadata(text)
    assert "**Nothing was measured.**" in text and "No effect on quality was measured." in text


def test_a_worse_model_says_so_above_and_in_the_first_table(source: CardSource) -> None:
    text = card_text(
        "m", outcome_of(), source, losses=losses_of_change(0.2), before=board_of(0.5), after=board_of(0.25, rows=4)
    )
    table = first_table(text)
    assert "+0.2000 ± 0.0100 | **worse** |" in table and "-25.00 ± 25.00 %" in table
    assert "**Worse than the source** on: loss on wiki.test" in text
    assert text.index("Worse than the source") < text.index(table) < text.index("## What was done")
    # One row of four lost is one standard error: not called worse. Lost in all six tasks, their average is.
    assert table.count("**worse**") == 3 and table.count(UNDECIDED) == 6
    steady = card_text("m", outcome_of(), source, before=board_of(1, rows=16), after=board_of(0.5, rows=16))
    assert first_table(steady).count("**worse**") == 7  # six tasks and their average


def test_a_better_model_is_called_better_and_an_equal_one_is_not(source: CardSource) -> None:
    better = card_text("m", outcome_of(), source, losses=losses_of_change(-0.2))
    assert "worse" not in first_table(better) and "| better |" in first_table(better)
    same = card_text("m", outcome_of(), source, losses=losses_of_change(0.005))
    assert UNDECIDED in first_table(same) and "no gain was measured" in same


@pytest.mark.parametrize(
    ("change", "se", "lower", "word"),
    [
        (0.2, 0.1, True, "worse"),
        (-0.2, 0.1, True, "better"),
        (0.2, 0.1, False, "better"),
        (0.1, 0.1, True, UNDECIDED),
        (0.0, None, True, "no difference"),
        (0.2, None, True, "worse, by an unknown error (too few rows)"),
        (-1.0, None, False, "worse, by an unknown error (too few rows)"),
    ],
)
def test_judgement(change: float, se: float | None, lower: bool, word: str) -> None:
    assert judge(change, se, lower_is_better=lower) == word


def test_losses_come_from_the_records_of_an_evaluation() -> None:
    @dataclasses.dataclass(frozen=True)
    class Record:
        nll: float
        standard_error: float | None
        tokens: int = 5120
        windows: int = 10

    assert losses_of(Record(3.0, 0.1), Record(3.5, 0.1), Record(0.5, 0.01), "wiki.test") == losses_of_change(0.5)


def test_boards_of_other_rows_are_not_subtracted(source: CardSource) -> None:
    rows = compare(None, board_of(0.5), board_of(0.5, limit=4))
    assert {r.verdict for r in rows} == {"not measured on the same rows"} and not any(r.change for r in rows)
    alone = card_text("m", outcome_of(), source, after=board_of(0.5))
    assert "**Nothing was measured on both models**" in alone
    partly = compare(None, board_of(0.5), board_of(0.5, names=("mmlu",)))
    assert len(partly) == 6 and sum(r.after == "not measured" for r in partly) == 5  # and no average of unlike sets


def test_an_average_has_its_error_where_a_task_did_not_change() -> None:
    """One task -0.05 ± 0.0615 and one that changed on none of its 40 rows: -0.025 ± 0.031, which decides nothing."""

    def board(*rows: float) -> Leaderboard:
        values = [(1.0,) * 20 + (0.0,) * 20, rows]
        scores = [
            TaskScore(name, TASKS[name].metric, sum(r) / 40, 0.08, 40, 5, tuple(r))
            for name, r in zip(("hellaswag", "winogrande"), values, strict=True)
        ]
        return Leaderboard("m", "i", tuple(scores), None, {}, {}, {}, None)

    before, after = [1.0] * 4 + [0.0] * 36, [0.0] * 4 + [1.0] * 2 + [0.0] * 34
    still, moved, average = compare(None, board(*before), board(*after))
    assert (still.change, still.verdict) == ("+0.00 ± 0.00 %", UNDECIDED)
    assert (moved.change, moved.verdict) == ("-5.00 ± 6.15 %", UNDECIDED)
    assert (average.change, average.verdict) == ("-2.50 ± 3.07 %", UNDECIDED)
    # Two of 40 rows worse and the other task untouched: the average's error is half of the task's.
    _, moved, average = compare(None, board(*[1.0] * 40), board(*[0.0] * 2 + [1.0] * 38))
    assert (moved.change, average.change) == ("-5.00 ± 3.49 %", "-2.50 ± 1.74 %")
    assert moved.verdict == average.verdict == "worse"


def test_too_few_rows_are_said_only_of_one_row() -> None:
    names = ("hellaswag", "winogrande")
    few = compare(None, board_of(1, rows=1, names=names), board_of(0, rows=1, names=names))
    assert {row.verdict for row in few} == {"worse, by an unknown error (too few rows)"}
    all_alike = compare(None, board_of(1, rows=2, names=names), board_of(0, rows=2, names=names))
    assert {row.verdict for row in all_alike} == {"worse"}
    for rows in (1, 2, 40):
        same = compare(None, board_of(1, rows=rows, names=names), board_of(1, rows=rows, names=names))
        assert {row.verdict for row in same} == {UNDECIDED}
        assert [row.change for row in same] == ["+0.00 ± 0.00 %"] * 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"settings": {"device": "cuda:0", "dtype": "bfloat16", "batch_size": 1}},
            ("device cpu against cuda, dtype float32 against bfloat16",),
        ),
        ({"settings": {"device": "cpu", "dtype": "float32", "batch_size": 8}}, ("batch_size 1 against 8",)),
        ({"versions": {"lm-eval": "0.4.12"}}, ("lm-eval 0.4.13 against 0.4.12",)),
        ({"versions": {"lm-eval": "0.4.13", "transformers": "6"}}, ("transformers unknown against 6",)),
    ],
)
def test_boards_that_were_measured_otherwise_are_not_judged(
    change: dict[str, Any], told: tuple[str, ...], source: CardSource
) -> None:
    settings = {"device": "cpu", "dtype": "float32", "batch_size": 1}
    before = dataclasses.replace(board_of(1, rows=16), settings=settings)
    after = dataclasses.replace(board_of(0.5, rows=16), settings=settings)
    assert {r.verdict for r in compare(None, before, after)} == {"worse"}
    after = dataclasses.replace(after, **change)
    rows = compare(None, before, after)
    assert len(rows) == 7 and {r.direction for r in rows} == {Direction.NOT_COMPARED}
    assert all(r.verdict.startswith("not like with like: ") and all(t in r.verdict for t in told) for r in rows)
    text = card_text("m", outcome_of(), source, before=before, after=after)
    assert "**Not like with like**: source and this model were measured with" in text
    assert "Worse than the source" not in text and "no gain was measured" not in text
    assert "Nothing was measured on both models" not in text


def test_losses_that_were_measured_otherwise_are_not_judged(source: CardSource) -> None:
    losses = losses_of_change(-0.2)
    losses["unlike"] = (Unlike("dtype", "float32", "bfloat16|<b>"),)
    text = card_text("m", outcome_of(), source, losses=losses)
    table = first_table(text)
    assert table.count("not like with like: dtype float32 against bfloat16\\|&lt;b>") == 2
    assert "better |" not in table and "**Not like with like**" in text
    # Beside lines that are comparable, those are still judged.
    both = card_text(
        "m", outcome_of(), source, losses=losses, before=board_of(1, rows=16), after=board_of(0.5, rows=16)
    )
    assert "**Worse than the source** on: AI2" in both and "**Not like with like**" in both


def test_rows_that_count_0_are_said(source: CardSource) -> None:
    board = board_of(0, names=("truthfulqa_mc2",))
    broken = dataclasses.replace(board, scores=(dataclasses.replace(board.scores[0], undefined=3),))
    text = card_text("m", outcome_of(), source, before=board, after=broken)
    assert "3 of 4 rows of TruthfulQA (0-shot) count 0 for this model: no answer has any probability (0/0)." in text
    assert "for source" not in text


def test_a_cut_run_on_local_rows_is_called_a_smoke_test(source: CardSource) -> None:
    board = dataclasses.replace(board_of(0.5, limit=2), data={"arc_challenge.jsonl": "4" * 64})
    text = card_text("m", outcome_of(), source, before=board, after=board)
    assert "first 2 rows" in text and "not a leaderboard result" in text
    held_out = "examples of AI2 Reasoning Challenge, HellaSwag, MMLU, Winogrande are the first rows"
    assert held_out in text and "4" * 64 in text
    shotless = dataclasses.replace(board_of(0.5, names=("truthfulqa_mc2",)), data={"a.jsonl": "4" * 64})
    assert "few-shot examples" not in card_text("m", outcome_of(), source, after=shotless)


def test_what_was_done(source: CardSource) -> None:
    text = card_text("m", outcome_of(lowest_snr=15), source, run=CardRun(rule_source="somewhere (2024)"))
    assert "Rule `laser-rmt` (somewhere (2024)); selection: the 15 matrices of lowest signal-to-noise ratio." in text
    assert "Of 3 tensors, 3 are matrices; 2 were reduced, 1 were copied byte for byte." in text
    assert "| `a.weight` | 48 | 10 | 25.00 % | 0.7 |" in text
    assert "| w1 | 1 of 2 | 3 | 48 | 10 | 25.0 to 25.0 % |" in text
    many = card_text("m", outcome_of(*(line(f"t{i}.weight") for i in range(41))), source)
    assert "<summary>All 41 reduced matrices</summary>" in many and many.count("`t40.weight`") == 1


def test_what_was_left_as_it_is_is_said_with_its_reason(source: CardSource) -> None:
    kept = [dataclasses.replace(line(f"k{i}", rank=None), why=Why(kind, "")) for i, kind in enumerate(Kind)]
    text = card_text("m", outcome_of(line("a"), *kept, line("z", rank=None), line("y", rank=None)), source)
    left = re.findall(r"^Left as they are: (.*)\.$", text, re.MULTILINE)[0].split("; ")
    assert left[0] == "3 not among the lowest by signal-to-noise ratio" and len(left) == len(Kind)
    assert sum(int(part.partition(" ")[0]) for part in left) == len(kept) + 2
    every = card_text("m", outcome_of(line("a")), source)
    assert "Left as they are" not in every


def test_a_picture_is_shown_where_there_is_one(source: CardSource) -> None:
    text = card_text("m", outcome_of(), source, picture="laser/spectrum.svg")
    assert re.search(r"^!\[Singular values .*\]\(laser/spectrum\.svg\)$", text, re.MULTILINE)
    assert text.index("By role:") < text.index("laser/spectrum.svg") < text.index("| matrix | rank before")
    assert "spectrum.svg" not in card_text("m", outcome_of(), source)


@pytest.mark.slow
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("measured", [True, False])
def test_a_card_never_says_none(known: bool, measured: bool, source: CardSource) -> None:
    """Of what is not known, the card has a word or nothing, and not the language's name for it."""
    bare = CardSource(name="base", identity="1" * 64)
    by_data = dataclasses.replace(line("d"), metric="data", tokens=5, expert=None, layer=None, snr=None)
    unseen = dataclasses.replace(line("u", rank=None), unseen="has seen 1 token", expert=None)
    calibration = Calibration("4" * 64, "t.txt", "4" * 64, "5" * 64, 5, 2, 10, "float32", False, False)
    outcome = outcome_of(line("a"), by_data, unseen, line("s", rank=None))
    for plan in (outcome.plan, dataclasses.replace(outcome.plan, calibration=calibration)):
        text = card_text(
            "m",
            dataclasses.replace(outcome, plan=plan, run={}),
            source if known else bare,
            losses=losses_of_change(0.1, None) if measured else None,
            after=board_of(0.5) if measured else None,
        )
        assert not re.search(r"\b(None|nan|NaN|null)\b", text), re.findall(r".*\bNone\b.*", text)


@pytest.mark.parametrize("count", [40, 41, 200, 201, 1000])
def test_a_long_table_is_folded_and_ends_after_200_rows_with_a_count(count: int, source: CardSource) -> None:
    """Of 45,000 matrices the card was 4 MB."""
    text = card_text("out", outcome_of(*(line(f"layers.{number}.w1") for number in range(count))), source)
    rows = [row for row in text.splitlines() if row.startswith("| `layers.")]
    assert len(rows) == min(count, 200) and f"{count} were reduced" in text
    assert (f"All {count} reduced matrices" in text) == (40 < count <= 200)
    assert (f"The first 200 of {count} reduced matrices" in text) == (count > 200)
    assert (f"And {count - 200} more: all are in `laser.json`." in text) == (count > 200)
    assert text.count("<details>") == text.count("</details>") == (count > 40)


def test_an_empty_plan_says_that_nothing_was_reduced(source: CardSource) -> None:
    text = card_text("m", outcome_of(line("a.weight", rank=None), rule="none"), source)
    assert "**No matrix was reduced: the weights are the source's, byte for byte.**" in text


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("laser-rmt", "it keeps 24 % of the singular values if the matrix is square and up to 100 %"),
        ("mp-edge", "rests on a model of the noise in a matrix"),
        ("mp-edge,laser-rmt", "rests on a model of the noise in a matrix"),
        ("mp-edge,laser-rmt", "it keeps 24 % of the singular values"),
        ("fraction:0.1", "it does not tell signal from noise"),
    ],
)
def test_limits_of_the_rule(rule: str, words: str, source: CardSource) -> None:
    text = card_text("m", outcome_of(rule=rule), source)
    assert words in text[text.index("## Limits") :]


def test_search_trials_are_listed(source: CardSource) -> None:
    def trial(label: str, d: float | None, se: float | None, accepted: bool) -> Trial:
        return Trial(label, "mp-edge", {"a": 10, "b": 12}, False, d, se, accepted, None, 0, 0.0)

    trials = [trial("3.w1", -0.0012, 0.0005, True), trial("2|q", 0.01, None, False), trial("1.v", None, None, False)]
    text = card_text("m", outcome_of(), source, trials=trials)
    assert "3 edits were tried and 1 kept" in text
    assert "| 3.w1 | `mp-edge` | 10 to 12 | -0.00120 ± 0.00050 | kept |" in text
    assert "| 2\\|q | `mp-edge` | 10 to 12 | +0.01000 | undone |" in text
    assert "| 1.v | `mp-edge` | 10 to 12 | not finite | undone |" in text


def test_the_loading_code_compiles_and_names_the_model(source: CardSource) -> None:
    text = card_text('odd "name"', outcome_of(), source)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        ast.parse(block)
    assert all('name = "odd \\"name\\""' in block for block in blocks[:5])
    assert "load_in_8bit" in text and "load_in_4bit" in text and "flash_attention_2" in text
    assert "vllm serve 'odd \"name\"' --dtype bfloat16" in text
    assert "4 GB" in text and "0.5 GB" in text
    half = card_text("m", outcome_of(), dataclasses.replace(source, config={"torch_dtype": "float16"}))
    assert "torch.float16" in half and "torch.bfloat16" not in half


@pytest.mark.slow
def test_the_chat_format_is_the_template_rendered(source: CardSource) -> None:
    text = card_text("m", outcome_of(), source)
    rendered = "<s>[user] {first question}</s>[assistant] {first answer}</s>[user] {second question}</s>"
    assert f"```text\n{rendered}\n```" in text and "apply_chat_template(" in text
    file = card_text("m", outcome_of(), dataclasses.replace(source, chat_template="file: {{ messages[0].content }}"))
    assert "```text\nfile: {first question}\n```" in file  # the file wins, as it does in transformers
    listed = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    several = card_text("m", outcome_of(), dataclasses.replace(source, tokenizer_config={"chat_template": listed}))
    assert "```text\nplain\n```" in several


@pytest.mark.slow
def test_a_template_that_fails_does_not_stop_the_card(source: CardSource) -> None:
    template = "{{ raise_exception('only with a system') }}"
    text = card_text("m", outcome_of(), dataclasses.replace(source, chat_template=template))
    assert "has a chat template that could not be rendered" in text


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('only with a system') }}", "only with a system"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'a' * 10 ** 6 }}", "1000000 characters, expected 100000"),
        ("{{ '\ud800' }}", "UnicodeEncodeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "SecurityError"),
    ],
)
def test_a_template_that_fails_is_told_in_one_line(
    template: str, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, since another takes a second to start: without its limits of time (0: none) and memory."""
    limits = {"seconds": 0, "memory": 1 << 50, "length": chat.LENGTH}
    request = {"template": template, "tokens": {}, "conversation": chat.CONVERSATION, "limits": limits}
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(json.dumps(request).encode())))
    rendering.main()
    text, told = json.loads(capsys.readouterr().out)
    assert text is None and why in told and "\n" not in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "seconds", "why"),
    [
        ("{{ 2 ** (10 ** 9) }}", 1, "took longer than 1 s"),  # one instruction, in which no signal is handled
        ("{{ 'a' * 10 ** 10 }}", 60, "more than 512 MiB"),
    ],
)
def test_a_template_has_limits_of_time_and_memory(
    template: str, seconds: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A limit: the longest is a minute.
    monkeypatch.setattr(chat, "SECONDS", seconds)
    text, told = chat.render_chat(template, {})
    assert text is None and why in told and "\n" not in told


def test_no_template(source: CardSource) -> None:
    text = card_text("m", outcome_of(), dataclasses.replace(source, tokenizer_config=None))
    assert "The source has no chat template" in text and "apply_chat_template(" not in text


@pytest.mark.slow
def test_a_template_cannot_close_its_fence(source: CardSource) -> None:
    text = card_text("m", outcome_of(), dataclasses.replace(source, chat_template="```\n# Not a heading"))
    assert "````text\n```\n# Not a heading\n````" in text


@pytest.mark.parametrize(
    ("changes", "expected", "origin"),
    [
        ({}, "mistralai/Mixtral-8x7B-Instruct-v0.1", "source"),
        ({"hub_id": None}, "mistralai/Mixtral-8x7B-v0.1", "card"),
        ({"hub_id": None, "config": {"_name_or_path": "org/model"}}, "org/model", "config.json"),
        ({"hub_id": None, "config": {"_name_or_path": "/home/me/model"}, "readme": None}, None, ""),
        ({"hub_id": "not an id", "readme": None}, None, ""),
        ({"hub_id": None, "config": {"_name_or_path": "models/llama"}, "readme": None}, None, ""),
        ({"hub_id": None, "config": {"_name_or_path": "Outputs/llama"}, "readme": None}, None, ""),
        ({"hub_id": None, "config": {"_name_or_path": "llama-sft/checkpoint-500"}, "readme": None}, None, ""),
        ({"hub_id": None, "config": {"_name_or_path": "./llama"}, "readme": None}, None, ""),
        ({"hub_id": None, "config": {"_name_or_path": "C:\\models\\llama"}, "readme": None}, None, ""),
        ({"hub_id": None, "config": {"_name_or_path": ["org/model"]}, "readme": None}, None, ""),
        ({"hub_id": None, "readme": "---\nbase_model: [./a, /b/c, models/d, org/e, null]\n---\n"}, "org/e", "card"),
        ({"hub_id": "gpt2", "readme": None}, None, ""),
        ({"hub_id": "a/b--c", "readme": None}, None, ""),
    ],
)
def test_base_model_is_a_hub_id_or_nothing(
    changes: dict[str, Any], expected: str | None, origin: str, source: CardSource
) -> None:
    about = dataclasses.replace(source, **changes)
    assert base_model(about, read_source_card(about.readme).entries) == (expected, origin)
    assert metadata(card_text("m", outcome_of(), about)).get("base_model") == expected


@pytest.mark.parametrize(
    "readme",
    [None, "", "# no metadata", "---\n: [\n---\n", "---\n- a\n---\n", "---\nlicense: 3\nlanguage: {a: b}\n---\n"],
)
def test_a_source_without_usable_metadata_still_gets_a_card(readme: str | None, source: CardSource) -> None:
    text = card_text("m", outcome_of(), dataclasses.replace(source, readme=readme))
    assert not {"license", "language"} & metadata(text).keys()
    assert "names no licence; see `LICENSE`" in text


HEAD = "---\nlicense: mit\nlanguage: [en, no]\n"
READ = {"license": "mit", "language": ["en", "no"]}


@pytest.mark.parametrize(
    "readme",
    [
        HEAD + "---\n",
        HEAD + "---",
        (HEAD + "---\n# A title\n").replace("\n", "\r\n"),
        (HEAD + "---\n# A title\n").replace("\n", "\r"),
        "\n\n" + HEAD + "---\n",
        HEAD + "---  \n---\nlicense: other\n---\n",  # what follows is text
        HEAD + "date: 2024-13-45\n---\n",
        HEAD + "x: !!int foo\n---\n",
        HEAD + "x: !!timestamp foo\n---\n",
        HEAD + "x: !!python/object/apply:os.abort []\n---\n",
        HEAD + "x: !unknown {a: b}\n---\n",
        HEAD + "base_model: ./here\n---\n",
        HEAD + "base_model: null\n? [a, b]\n: c\n---\n",
        HEAD + "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n---\n",
        HEAD + "a: &a [*a]\n---\n",
        HEAD + "license: mit\n---\n",  # twice, and the same
        HEAD + "license_name: !!null x\nlicense_link: ~\n---\n",
    ],
)
def test_odd_metadata_that_can_be_read_are_read(readme: str, source: CardSource) -> None:
    about = dataclasses.replace(source, readme=readme, hub_id=None)
    assert read_source_card(readme).entries.items() >= READ.items()
    text = card_text("m", outcome_of(), about)
    found = metadata(text)
    assert {key: found.get(key) for key in READ} == READ and "base_model" not in found
    assert "The source's README.md" not in text and "The licence is the source's." in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("readme", "why"),
    [
        ("\ufeff" + HEAD + "---\n", "begins with a byte order mark"),
        (HEAD + ": [\n---\n", "are not valid YAML (line "),
        ("\n" + HEAD + "\tx: y\n---\n", "are not valid YAML (line 5)"),
        (HEAD + "x: " + "[" * 5000 + "]" * 5000 + "\n---\n", "are not valid YAML"),
        (HEAD + "x: *nowhere\n---\n", "are not valid YAML (line 4)"),
        (HEAD + "x: \x07\n---\n", "are not valid YAML"),
        ("---\nlicense: mit\n# a title\n", "without a second line of dashes"),
        ("---\n- license: mit\n---\n", "are no list of keys and values"),
        ("---\nmit\n---\n", "are no list of keys and values"),
        (HEAD + "license: apache-2.0\n---\n", "gives two values for license"),
        (HEAD + "x: " + "y" * (1 << 20) + "\n---\n", "has more than 1048576 characters of metadata"),
        ((HEAD + "---\n").encode("utf-16").decode("utf-8", "replace"), "is not UTF-8 text"),
    ],
)
def test_metadata_that_cannot_be_trusted_are_complained_of(readme: str, why: str, source: CardSource) -> None:
    text = card_text("m", outcome_of(), dataclasses.replace(source, readme=readme))
    assert f"The source's README.md {why}" in re.sub(r"has metadata (that )?", "", text)
    if readme.startswith("\ufeff"):
        assert metadata(text).items() >= READ.items()
    else:
        assert not {"license", "language"} & metadata(text).keys() and "names no licence; see `LICENSE`" in text


@pytest.mark.parametrize(
    ("written", "languages"),
    [
        ("no", ["no"]),
        ("'no'", ["no"]),
        ("NO", ["NO"]),
        ("[en, no]", ["en", "no"]),
        ("off", ["off"]),  # not Norwegian
        ("[en, false]", ["en"]),
        ("[True, 'true']", ["true"]),
        ("~", None),
        ("null", None),
        ("None", None),
        ("[~, 'None', '', ' ', 3, 1.5, 2024-01-01, [en], {en: fr}]", None),
        (r'["e\u202en", "f\er", "d\ne", it]', ["it"]),
    ],
)
def test_languages_are_the_words_that_were_written(
    written: str, languages: list[str] | None, source: CardSource
) -> None:
    text = card_text("m", outcome_of(), dataclasses.replace(source, readme=f"---\nlanguage: {written}\n---\n"))
    assert metadata(text).get("language") == languages
    assert not re.search(r"\b(None|null)\b", text)


APACHE = f"""
                                 Apache License
                           Version 2.0, January 2004
                        http://www.apache.org/licenses/

{"terms and conditions " * 440}"""
MIT = f"""MIT License

Copyright (c) 2024 Somebody

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files {"(the Software) to deal " * 36}"""


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        (APACHE, "apache-2.0"),
        ("Copyright 2018- The Team. All rights reserved.\n\n" + APACHE, "apache-2.0"),
        ("Copyright Somebody. For research only.\n" + APACHE, None),
        (MIT, "mit"),
        ("Modified " + MIT, None),
        ("Not for commercial use.\n" + APACHE, None),
        (APACHE + "terms and conditions " * 200, None),
        (MIT + "and one more condition " * 50, None),
        ("as the source says\n", None),
        ("", None),
    ],
)
def test_a_licence_is_told_by_its_whole_text_only(text: str, licence: str | None) -> None:
    assert licence_of(text) == licence and licence_of(text.upper().replace("\n", "\r\n")) == licence


def test_the_licence_is_looked_for_in_the_files_where_the_card_names_none(source: CardSource) -> None:
    silent = dataclasses.replace(source, readme=None, licences={"LICENSE": "apache-2.0"})
    text = card_text("m", outcome_of(), silent)
    assert metadata(text)["license"] == "apache-2.0"
    assert "names no licence; the one above is that whose text it carries: `LICENSE` (apache-2.0)." in text
    named = card_text("m", outcome_of(), dataclasses.replace(silent, readme="---\nlicense: cc-by-nc-4.0\n---\n"))
    assert metadata(named)["license"] == "cc-by-nc-4.0" and "The licence is the source's." in named
    both = dataclasses.replace(silent, licence_files=("A", "B"), licences={"A": "mit", "B": "apache-2.0"})
    text = card_text("m", outcome_of(), both)
    assert "license" not in metadata(text) and "see `A` (mit), `B` (apache-2.0). Ask its authors" in text


def test_a_licence_of_its_own_keeps_its_name_and_link(source: CardSource) -> None:
    own = "---\nlicense: other\nlicense_name: mine\nlicense_link: https://example.com/l\nlanguage: en\n---\n"
    found = metadata(card_text("m", outcome_of(), dataclasses.replace(source, readme=own)))
    assert (found["license"], found["license_name"], found["license_link"]) == (
        "other",
        "mine",
        "https://example.com/l",
    )
    assert found["language"] == ["en"]


def test_reproduction(source: CardSource) -> None:
    chosen = {"lowest_snr": 15, "layers": [1, 2], "roles": ["w1", "q"], "include": "layers.[0-9]+"}
    text = card_text(
        "my out", outcome_of(**chosen), source, run=CardRun(versions={"torch": "2.13"}), after=board_of(0.5)
    )
    command = (
        "laser run mistralai/Mixtral-8x7B-Instruct-v0.1 -o 'my out' --rule laser-rmt --no-search --lowest-snr 15 "
        "--include 'layers.[0-9]+' --layers 1,2 --roles w1,q --device cpu --precision float64 --method gram"
    )
    assert f"```sh\n{command}\nlaser verify " in text and "laser leaderboard base" in text
    for fact in ("abc123", "1" * 64, "2" * 64, "3" * 64, "| torch | 2.13 |", "| lm-eval (tasks) | 0.4.13 |"):
        assert fact in text
    routed = outcome_of()
    routed.run["device"] = "cpu float32 values:0=mkl vectors:0=numpy"  # pyright: ignore[reportIndexIssue]
    assert "--device cpu --precision float32 --method gram" in card_text("m", routed, source)
    told = card_text("m", outcome_of(), source, run=CardRun(commands=("laser reduce base plan.json -o m",)))
    assert "```sh\nlaser reduce base plan.json -o m\nlaser verify" in told


def test_treatments_are_reproduced_too(source: CardSource) -> None:
    text = card_text("m", outcome_of(shrink="frobenius", two_sided=True, require_fit=0.05), source)
    assert "--shrink frobenius --require-fit 0.05 --two-sided --device cpu" in text


def test_an_edited_plan_is_not_said_to_come_from_a_rule(source: CardSource) -> None:
    outcome = outcome_of()
    text = card_text("m", dataclasses.replace(outcome, plan=dataclasses.replace(outcome.plan, edited=True)), source)
    assert "laser reduce mistralai/Mixtral-8x7B-Instruct-v0.1 plan.json -o m  # plan.json: the entry `plan`" in text
    assert "laser run" not in text and "The plan was edited after the rule had made it" in text
    assert "was edited" not in card_text("m", outcome, source)


def test_a_searched_plan_is_not_said_to_come_from_a_rule(source: CardSource) -> None:
    text = card_text("m", outcome_of(rule="laser-rmt,mp-edge", accept="better"), source)
    assert "laser reduce mistralai/Mixtral-8x7B-Instruct-v0.1 plan.json -o m  # plan.json: the entry `plan`" in text
    assert "laser run" not in text and "the edits that a search kept (criterion `better`)" in text


def test_it_is_pure(source: CardSource) -> None:
    arguments: dict[str, Any] = {"losses": losses_of_change(0.1), "before": board_of(0.5), "after": board_of(0.75)}
    assert card_text("m", outcome_of(), source, **arguments) == card_text("m", outcome_of(), source, **arguments)


STRANGE = (
    *("a|b.weight", "a`b", "<script>", "a\n# heading", "a\\|b", "a\\", "a\\\\|", "|", "``", "a\r\n| b |", "\u2028|"),
    *("$x$", "_x_", "__x__", "*x*", "~~x~~", "[x](http://e)", "![x](y)", "&lt;", "&#124;", "# x", "x #", "- x", "<!--"),
    *(
        "a\x1b[31mb",
        "a\u202eb",
        "a\x00b",
        "\udcff",
        "é",
        "模型",
        "😀",
        "--x",
        "a b",
        "@a",
        ":a:",
        "a\u200bb",
        "\ufeffa",
    ),
)


@pytest.mark.parametrize("name", STRANGE)
def test_hostile_names_stay_in_their_cells(name: str, source: CardSource) -> None:
    text = card_text("m", outcome_of(line(name), line("plain.weight")), source)
    tables = [part for part in text.split("\n\n") if part.startswith("| matrix")]
    assert len(tables) == 1
    for row in tables[0].splitlines():
        assert len(re.findall(r"(?<!\\)\|", row)) == 6, row
        # GitHub reads a backslash with what follows it: a bar ends a cell unless an odd number of them stands before.
        assert len([m for m in re.findall(r"(\\*)\|", row) if len(m) % 2 == 0]) == 6, row
    assert "\n# heading" not in text
    assert text.encode() and text.replace("\n", "").isprintable()


@pytest.mark.slow
@pytest.mark.parametrize("name", STRANGE)
def test_a_name_is_read_in_a_heading_a_cell_and_a_program(name: str, source: CardSource) -> None:
    """Markdown is read by a parser of its own, Python by Python, the metadata by the Hub's library."""
    parser = pytest.importorskip("markdown_it", reason="needs pip install markdown-it-py").MarkdownIt(
        "js-default", {"linkify": False, "html": True}
    )

    def shown(text: str) -> str:
        (inline,) = [token for token in parser.parse(text) if token.type == "inline"]
        assert {child.type for child in inline.children} <= {"text", "text_special", "code_inline", "softbreak"}
        return "".join(child.content for child in inline.children)

    plain = visible(" ".join(name.split())).replace("`", "'")
    assert shown(f"# {cell(name)}") == plain and shown(f"x {cell(name)}") == f"x {plain}"
    if "|" not in name:
        assert shown(f"x {code(name)}") == "x " + visible(name).strip().replace("`", "'")
    rows = parser.parse(f"| a | b |\n| --- | --- |\n| {cell(name)} | {code(name)} |")
    assert sum(token.type == "td_open" for token in rows) == 2
    text = card_text(name, outcome_of(), source, after=board_of(0.5))
    (block, *_) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert next(
        ast.literal_eval(node.value) for node in ast.parse(block).body if isinstance(node, ast.Assign)
    ) == name.encode("utf-8", "surrogatepass").decode("utf-8", "surrogatepass")
    assert (
        ModelCard(text).data.to_dict()["model-index"][0]["name"]
        == metadata(text)["model-index"][0]["name"]
        == visible(name)
    )


def test_markdown_pieces() -> None:
    assert cell("a|b\nc <i> `d`") == "a\\|b c &lt;i> 'd'"
    assert code("a`b|c") == "`a'b\\|c`" and code("") == ""
    assert fence("x") == "```\nx\n```" and fence("````").startswith("`````\n")
    assert cell(None) == code(None) == "" and cell(0) == "0"
    assert fence("a\r\n\tb\x1b\u202e\n\n", "sh") == "```sh\na\n\tb\\x1b\\u202e\n```"


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t.replace("license: apache-2.0", "license: mit"),
        lambda t: t.replace("value: 50.0", "value: .nan"),
        lambda t: t.replace("mistralai/Mixtral", "a b/c"),
        lambda t: t.replace("  results:", "  outcomes:"),
        lambda t: t.replace("library_name:", "- library_name:"),
    ],
)
def test_invalid_metadata_is_refused(damage: Callable[[str], str], source: CardSource) -> None:
    text = card_text("m", outcome_of(), source, after=board_of(0.5))
    expected = metadata(text)
    check_metadata(text, expected)
    assert damage(text) != text
    with pytest.raises(RecordError, match="metadata"):
        check_metadata(damage(text), expected)


def test_no_figure_is_nan(source: CardSource) -> None:
    huge = losses_of_change(0.1)
    huge["result"]["nll"] = 5000.0  # its exponential is no float
    single = losses_of_change(0.1, se=None)
    for losses in (huge, single):
        text = card_text("m", outcome_of(), source, losses=losses, before=board_of(0.5), after=board_of(0.5))
        assert not re.search(r"\b(nan|inf|None)\b", text)
    assert "above 5e21" in card_text("m", outcome_of(), source, losses=huge)


def test_only_fences_hold_what_is_not_escaped() -> None:
    text = (resources.files("laser.report") / "card.md.jinja").read_text(encoding="utf-8")
    text = re.sub(r"{#.*?#}|{% filter fence.*?{% endfilter", "", text, flags=re.DOTALL)
    assert "{{ name }}" in text and not re.search(r"\|\s*safe\b", text)


def test_every_section_is_there_in_order(source: CardSource) -> None:
    found = re.findall(r"^## (.*)$", card_text("m", outcome_of(), source, trials=[]), re.MULTILINE)
    assert found == [
        "Measured before and after",
        "What was done",
        "How to load it",
        "Instruction format",
        "Limits",
        "How to reproduce",
    ]


def test_report_holds_no_path_of_this_machine(source: CardSource) -> None:
    assert str(Path.cwd()) not in card_text("m", outcome_of(), source)
