"""The leaderboard: rows that are examples are never scored, and lm-eval's figures are what a plain loop computes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from safetensors.torch import load_file, save_file

from laser.checkpoint.reader import open_checkpoint
from laser.errors import CheckpointError, LaserError, NumericalError, RecordError, UsageError
from laser.evaluation import leaderboard
from laser.evaluation.leaderboard import (
    LM_EVAL,
    Leaderboard,
    TaskScore,
    circumstances,
    comparable,
    mean_and_error,
    require_leaderboard,
    run_leaderboard,
    task_difference,
)
from laser.evaluation.lm_tasks import TASKS, choose_tasks, write_tasks
from laser.journal import Journal

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("accelerate") is None,
    reason="needs lm-eval: pip install 'laser-rmt[eval]'",
)


def rows_of(task: str, count: int) -> list[dict[str, Any]]:
    """`count` rows in the form that lm-eval's task expects."""
    if task == "arc_challenge":
        return [
            {
                "question": f"which is {i}",
                "choices": {"text": [f"one {i}", f"{i} and two", "three", "a fourth one"], "label": list("ABCD")},
                "answerKey": "ABCD"[i % 4],
            }
            for i in range(count)
        ]
    if task == "hellaswag":
        return [
            {
                "activity_label": "Sport",
                "ctx_a": f"Player {i} runs.",
                "ctx_b": "he",
                "endings": ["falls", "wins it", "stops there", "sings"],
                "label": str(i % 4),
            }
            for i in range(count)
        ]
    if task == "mmlu":
        return [
            {"subject": subject, "question": f"what is {i}?", "choices": ["1", "2", "3", "4"], "answer": i % 4}
            for subject in ("anatomy", "virology")
            for i in range(count)
        ]
    if task == "truthfulqa_mc2":
        targets = {"choices": ["yes, of course", "no", "it depends"], "labels": [1, 0, 0]}
        return [{"question": f"is it {i}?", "mc1_targets": targets, "mc2_targets": targets} for i in range(count)]
    if task == "winogrande":
        return [
            {
                "sentence": f"ann met eve {i} times as _ was late.",
                "option1": "ann",
                "option2": "eve",
                "answer": "12"[i % 2],
            }
            for i in range(count)
        ]
    return [{"question": f"what is 1 + {i}?", "answer": f"1 + {i} is {1 + i}\n#### {1 + i}"} for i in range(count)]


COUNTS = {"arc_challenge": 29, "hellaswag": 13, "mmlu": 7, "truthfulqa_mc2": 3, "winogrande": 9, "gsm8k": 2}
SCORED = {"arc_challenge": 4, "hellaswag": 3, "mmlu": 4, "truthfulqa_mc2": 3, "winogrande": 4, "gsm8k": 2}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of local rows for all six tasks."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, task in TASKS.items():
        write_rows(folder / task.file, rows_of(name, COUNTS[name]))
    write_rows(folder / "gsm8k_train_300.jsonl", rows_of("gsm8k", 12)[2:])
    return folder


@pytest.fixture
def packaged(tmp_path: Path) -> Path:
    """What write_tasks needs of lm-eval's folder: the subjects of MMLU."""
    folder = tmp_path / "packaged"
    (folder / "mmlu/default").mkdir(parents=True)
    for subject in ("anatomy", "virology"):
        (folder / f"mmlu/default/mmlu_{subject}.yaml").write_text("{}")
    return folder


@pytest.mark.parametrize("name", list(TASKS))
def test_examples_are_never_scored(name: str, data: Path, packaged: Path, tmp_path: Path) -> None:
    task = TASKS[name]
    if task.shots and not task.examples:  # a later copy of an example must go too
        rows = rows_of(name, COUNTS[name])
        write_rows(data / task.file, [*rows, rows[0]])
    names, hashes = write_tasks(task, packaged, tmp_path / "tasks", data)
    scored = 0
    for each in names:
        document = json.loads((tmp_path / f"tasks/{each}.yaml").read_text())
        files = {k: Path(v) for k, v in document["dataset_kwargs"]["data_files"].items()}
        test = files["test"].read_text().splitlines()
        examples = files["examples"].read_text().splitlines() if task.shots else []
        assert not set(test) & set(examples)
        assert len(examples) >= task.shots
        assert document["test_split"] == "test" and document["num_fewshot"] == task.shots
        if task.shots:
            assert document["fewshot_split"] == "examples"
        scored += len(test)
    assert scored == SCORED[name]
    assert set(hashes) == {task.file, task.examples} - {None}


def test_from_the_hub_examples_come_from_another_split(packaged: Path, tmp_path: Path) -> None:
    for name, task in TASKS.items():
        names, hashes = write_tasks(task, packaged, tmp_path / name, None)
        document = json.loads((tmp_path / name / f"{names[0]}.yaml").read_text())
        assert document["num_fewshot"] == task.shots and hashes == {} and "dataset_path" not in document
        if task.hub_examples:
            assert document["fewshot_split"] != task.dataset[2]
        assert len(names) == (2 if task.subjects else 1)


@pytest.mark.slow
@needs_lm_eval
def test_all_six_tasks_on_local_rows(speaker: Path, data: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    board = run_leaderboard(open_checkpoint(speaker), data=data, tick=lambda score: seen.append(score.task))
    assert seen == list(TASKS)
    assert {s.task: s.n for s in board.scores} == SCORED
    assert {s.task: s.shots for s in board.scores} == {name: task.shots for name, task in TASKS.items()}
    for score in board.scores:
        assert score.value == pytest.approx(sum(score.rows) / score.n) and 0 <= score.value <= 1
    assert board.average == pytest.approx(sum(s.value for s in board.scores) / 6)
    assert set(board.data) == {t.file for t in TASKS.values()} | {"gsm8k_train_300.jsonl"}
    assert board.identity == open_checkpoint(speaker).identity
    assert board.versions["lm-eval"] and board.settings["dtype"] == "float32" and board.limit is None
    path = tmp_path / "record/leaderboard.json"
    board.save(path)
    assert Leaderboard.load(path) == board
    # A task alone gives the same figures as among others, and the first rows those of all rows.
    alone = run_leaderboard(open_checkpoint(speaker), data=data, tasks=("winogrande", "arc_challenge"), limit=2)
    assert [s.rows for s in alone.scores] == [board.by_task[s.task].rows[:2] for s in alone.scores]
    assert not comparable(board, alone)


@pytest.mark.slow
@needs_lm_eval
def test_a_run_takes_tasks(speaker: Path, data: Path, tmp_path: Path, run: Run) -> None:
    (data / TASKS["gsm8k"].file).unlink()
    words = ("run", speaker, "-o", tmp_path / "out", "--no-search", "--rule", "rank:4", "--roles", "q")
    code, _, error = run(*words, "--leaderboard", "--data", data)
    assert code == 2 and "leave the task out with --tasks" in error
    code, _, error = run(*words, "--leaderboard", "--data", data, "--tasks", "winogrande")
    assert code == 0 and not error  # bars of lm-eval are for terminals
    for record in ("leaderboard-source.json", "leaderboard.json"):
        assert list(Leaderboard.load(tmp_path / "out/laser" / record).by_task) == ["winogrande"]


@pytest.mark.slow
@needs_lm_eval
def test_what_is_counted_beforehand_is_what_the_model_is_asked(
    speaker: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts exactly; tokens from a few rows of each file, which here are alike."""
    checkpoint, asked = open_checkpoint(speaker), {"prompts": 0, "tokens": 0}
    workload = require_leaderboard(checkpoint, data=data, counted=True)
    assert workload is not None and require_leaderboard(checkpoint, data=data) is None
    load = leaderboard._load_model

    def counting(*arguments: Any) -> Any:
        model = load(*arguments)

        def count(name: str) -> None:
            ask = getattr(model, name)

            def counted(requests: list[Any], *rest: Any, **options: Any) -> Any:
                asked["prompts"] += len(requests)
                for request in requests:
                    context, answer = request.args[:2]
                    asked["tokens"] += 256 if isinstance(answer, dict) else len(model.tok_encode(answer))
                    asked["tokens"] += len(model.tok_encode(context))
                return ask(requests, *rest, **options)

            monkeypatch.setattr(model, name, counted)

        count("loglikelihood")
        count("generate_until")
        return model

    # What is asked of a model that the command loads itself.
    monkeypatch.setattr(leaderboard, "_load_model", counting)
    run_leaderboard(checkpoint, data=data, limit=None)
    assert workload.prompts == asked["prompts"] > 50
    assert workload.tokens == pytest.approx(asked["tokens"], rel=0.05)


@pytest.mark.slow
@needs_lm_eval
def test_arc_is_what_a_plain_loop_computes(speaker: Path, data: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(speaker), AutoModelForCausalLM.from_pretrained(speaker)
    rows = rows_of("arc_challenge", COUNTS["arc_challenge"])

    def ask(row: dict[str, Any]) -> str:
        return f"Question: {row['question']}\nAnswer:"

    def answer(row: dict[str, Any]) -> str:
        return row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]

    context = "".join(f"{ask(row)} {answer(row)}\n\n" for row in rows[:25])
    expected = []
    for row in rows[25:]:
        scores = []
        for choice in row["choices"]["text"]:
            before = tokenizer(context + ask(row), return_tensors="pt")["input_ids"]
            whole = tokenizer(context + ask(row) + " " + choice, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logs = model(whole).logits[0].log_softmax(-1)
            places = range(before.shape[1], whole.shape[1])
            scores.append(sum(float(logs[i - 1, whole[0, i]]) for i in places) / len(choice))
        expected.append(float(scores.index(max(scores)) == row["choices"]["label"].index(row["answerKey"])))
    board = run_leaderboard(open_checkpoint(speaker), data=data, tasks=("arc_challenge",))
    assert list(board.scores[0].rows) == expected


@pytest.mark.slow
@needs_lm_eval
def test_real_rows_of_every_file_can_be_read(speaker: Path, shared: Path) -> None:
    tasks = ("hellaswag", "truthfulqa_mc2", "winogrande")
    board = run_leaderboard(open_checkpoint(speaker), data=shared / "data/lm_eval", tasks=tasks, limit=2)
    assert {s.task: s.n for s in board.scores} == dict.fromkeys(tasks, 2)


@pytest.mark.slow
@needs_lm_eval
def test_nan_likelihoods_are_an_error_and_not_a_score(speaker: Path, data: Path) -> None:
    tensors = load_file(speaker / "model.safetensors")
    tensors["lm_head.weight"][5] = math.nan
    save_file(tensors, speaker / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=r"laser_winogrande, row 0.*NaN; try laser scan") as told:
        run_leaderboard(open_checkpoint(speaker), data=data, tasks=("winogrande",))
    assert "--dtype" not in str(told.value)  # it is float32 already
    with pytest.raises(NumericalError, match=r"NaN; try laser leaderboard with --dtype float32"):
        run_leaderboard(open_checkpoint(speaker), data=data, tasks=("winogrande",), dtype="bfloat16")


@pytest.mark.slow
@needs_lm_eval
def test_an_mc2_of_nothing_by_nothing_counts_0(speaker: Path, data: Path) -> None:
    """A model so sure of itself that the probability of every answer underflows."""
    tensors = load_file(speaker / "model.safetensors")
    tensors["lm_head.weight"] *= 1e4
    save_file(tensors, speaker / "model.safetensors", metadata={"format": "pt"})
    board = run_leaderboard(open_checkpoint(speaker), data=data, tasks=("truthfulqa_mc2",))
    assert board.scores[0].rows == (0.0,) * 3 and board.scores[0].value == 0 and board.scores[0].undefined == 3


@pytest.mark.slow
@needs_lm_eval
def test_mmlu_is_the_mean_of_its_subjects(speaker: Path, data: Path) -> None:
    """Unlike lm-eval's group, which counts a subject by its size: 12 rows of one and 2 of the other."""
    rows = rows_of("mmlu", 17)[:17] + rows_of("mmlu", 7)[7:]
    write_rows(data / TASKS["mmlu"].file, rows)
    score = run_leaderboard(open_checkpoint(speaker), data=data, tasks=("mmlu",)).scores[0]
    assert score.subjects == (("anatomy", 12), ("virology", 2))
    parts = score.rows[:12], score.rows[12:]
    means = [sum(part) / len(part) for part in parts]
    assert score.value == pytest.approx(sum(means) / 2)
    errors = [torch.tensor(part).std().item() / len(part) ** 0.5 for part in parts]
    assert score.stderr == pytest.approx(math.hypot(*errors) / 2, rel=1e-6)


class Killed(Exception):
    pass


@pytest.mark.slow
@needs_lm_eval
def test_a_leaderboard_that_was_killed_goes_on(
    speaker: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import laser.evaluation.leaderboard as module

    tasks, path = ("mmlu", "truthfulqa_mc2", "winogrande"), tmp_path / "board.json.partial"
    whole = run_leaderboard(open_checkpoint(speaker), data=data, tasks=tasks)
    measured: list[str] = []
    measure = module._measure_task

    def counted(model: Any, task: Any, *rest: Any) -> TaskScore:
        measured.append(task.name)
        if measured == ["mmlu", "truthfulqa_mc2"]:
            raise Killed
        return measure(model, task, *rest)

    # Killed between two tasks, where nothing is called that a caller hands in.
    monkeypatch.setattr(module, "_measure_task", counted)
    with pytest.raises(Killed):
        run_leaderboard(open_checkpoint(speaker), data=data, tasks=tasks, journal=path)
    with path.open("a") as file:
        file.write('{"task": "truthfulqa_mc2", "met')  # torn
    seen: list[str] = []
    again = run_leaderboard(
        open_checkpoint(speaker), data=data, tasks=tasks, journal=path, tick=lambda score: seen.append(score.task)
    )
    assert measured == ["mmlu", "truthfulqa_mc2", "truthfulqa_mc2", "winogrande"] and seen == list(tasks)
    assert again.scores == whole.scores
    whole_lines = path.read_text()
    first, *entries = [json.loads(line) for line in whole_lines.splitlines()]
    bare = [{key: value for key, value in entry.items() if key != "check"} for entry in (first, *entries)]
    for broken in ({"task": "mmlu"}, bare[1] | {"n": 1000}):  # whole lines, by their checksums
        path.unlink()
        with Journal(path, bare[0]) as kept:
            kept.append(broken)
        with pytest.raises(RecordError, match=r"holds a task that is not whole: .*; start afresh with --force"):
            run_leaderboard(open_checkpoint(speaker), data=data, tasks=tasks, journal=path)
    path.write_text(whole_lines)
    # another measurement does not go on from there: other options, other rows, other weights under the same headers
    with pytest.raises(RecordError, match="belongs to another run: options differ"):
        run_leaderboard(open_checkpoint(speaker), data=data, tasks=tasks, journal=path, limit=1)
    tensors = load_file(speaker / "model.safetensors")
    save_file({n: t + 1 for n, t in tensors.items()}, speaker / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecordError, match="belongs to another run: weights differ"):
        run_leaderboard(open_checkpoint(speaker), data=data, tasks=tasks, journal=path)
    write_rows(data / TASKS["truthfulqa_mc2"].file, rows_of("truthfulqa_mc2", 4))
    with pytest.raises(RecordError, match="belongs to another run: data, weights differ"):
        run_leaderboard(open_checkpoint(speaker), data=data, tasks=tasks, journal=path)


@pytest.mark.slow
@needs_lm_eval
def test_what_was_asked_is_hashed(speaker: Path, data: Path) -> None:
    """Equal for the same rows, and another where a row, its right answer, or an example differs."""

    def asked(task: str = "truthfulqa_mc2") -> str | None:
        return run_leaderboard(open_checkpoint(speaker), data=data, tasks=(task,)).scores[0].rows_sha256

    rows, first = rows_of("truthfulqa_mc2", 3), asked()
    assert first == asked() and first is not None
    rows[1]["mc2_targets"] = rows[1]["mc2_targets"] | {"labels": [0, 1, 0]}
    write_rows(data / TASKS["truthfulqa_mc2"].file, rows)
    assert asked() != first
    before, rows = asked("winogrande"), rows_of("winogrande", 9)
    rows[0]["answer"] = "2"  # of an example, which is not scored
    write_rows(data / TASKS["winogrande"].file, rows)
    assert asked("winogrande") != before


@needs_lm_eval
def test_a_missing_tensor_is_not_scored_as_random_numbers(speaker: Path, data: Path) -> None:
    tensors = load_file(speaker / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, speaker / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no weights for model.layers.1.self_attn.q_proj.weight \(1 in all\)"):
        run_leaderboard(open_checkpoint(speaker), data=data, tasks=("winogrande",))


@needs_lm_eval
def test_a_model_without_tokenizer_says_so(pico: Path, data: Path) -> None:
    with pytest.raises(UsageError, match="tokenizer"):
        run_leaderboard(open_checkpoint(pico), data=data, tasks=("winogrande",))


def test_without_lm_eval_the_extra_is_named(pico: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'laser-rmt\[eval\]'"):
        run_leaderboard(open_checkpoint(pico), data=data)


@needs_lm_eval
@pytest.mark.parametrize("found", ["0.4.11", "0.4.9.2", "0.3.0"])
def test_an_lm_eval_that_fails_on_local_rows_is_refused(
    found: str, pico: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another release of a library than is installed.
    monkeypatch.setattr("laser.evaluation.leaderboard.version", lambda name: found)
    with pytest.raises(UsageError, match=rf"needs lm-eval {LM_EVAL} or later, found {found}; try pip install -U"):
        run_leaderboard(open_checkpoint(pico), data=data)


def test_the_lower_bound_of_lm_eval_is_the_one_in_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert f"lm-eval>={LM_EVAL}" in project["project"]["optional-dependencies"]["eval"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ("arc",)}, "no task is called 'arc'; try --tasks arc_challenge"),
        ({"tasks": ()}, "no task was named"),
        ({"limit": 0}, "--limit 0 scores nothing"),
        ({"data": Path("nowhere")}, "nowhere is not a directory"),
    ],
)
def test_bad_arguments(pico: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run_leaderboard(open_checkpoint(pico), **arguments)


@pytest.mark.parametrize(
    ("task", "content", "error", "message"),
    [
        ("arc_challenge", None, UsageError, "cannot read .*arc_challenge.jsonl"),
        ("arc_challenge", "{}\n" * 25, UsageError, "found 25 rows, expected 25 few-shot examples and at least one"),
        ("winogrande", '{"a": 1}\n{"a":\n', RecordError, "winogrande.jsonl, line 2 is not JSON"),
        ("winogrande", "[1]\n", RecordError, "line 1: found list, expected an object"),
        ("mmlu", '{"subject": "alchemy"}\n', RecordError, "line 1: subject 'alchemy' is not one of MMLU's 2"),
        ("winogrande", '{"a": "\\ud800"}\n', RecordError, r"line 1 holds \\ud800 alone, half a character"),
        ("winogrande", '{"a": [{"b\\udfff": 1}]}\n', RecordError, r"line 1 holds \\udfff alone"),
        ("winogrande", '{"a": ' + "[" * 20_000 + "\n", RecordError, "line 1 is nested too deep"),
        ("winogrande", '{"a": 1}\n\0', RecordError, "winogrande.jsonl is not plain text: byte 9 is NUL"),
        ("mmlu", '{"subject": "anatomy"}\n', UsageError, "found 1 rows of anatomy, expected 5"),
        ("truthfulqa_mc2", "", UsageError, "found 0 rows"),
    ],
)
def test_bad_rows(
    task: str, content: str | None, error: type[LaserError], message: str, data: Path, packaged: Path, tmp_path: Path
) -> None:
    file = data / TASKS[task].file
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(error, match=message):
        write_tasks(TASKS[task], packaged, tmp_path / "tasks", data)


@pytest.mark.parametrize("name", list(TASKS))
@pytest.mark.parametrize("value", [None, ...])
def test_a_row_without_something_to_ask_is_named(
    name: str, value: Any, data: Path, packaged: Path, tmp_path: Path
) -> None:
    """lm-eval would ask about "None". The last row of each file, so that all others are whole."""
    task = TASKS[name]
    for field in task.fields:
        rows = rows_of(name, COUNTS[name])
        rows[-1] = {k: v for k, v in rows[-1].items() if k != field} | ({} if value is ... else {field: value})
        write_rows(data / task.file, rows)
        with pytest.raises(RecordError, match=f"line {len(rows)}: .*{field}"):
            write_tasks(task, packaged, tmp_path / "tasks", data)
    write_rows(data / task.file, rows_of(name, COUNTS[name]))
    write_tasks(task, packaged, tmp_path / "tasks", data)


@needs_lm_eval
def test_rows_that_lm_eval_cannot_score_or_load_are_told(speaker: Path, data: Path) -> None:
    rows = rows_of("arc_challenge", COUNTS["arc_challenge"])
    rows[27]["answerKey"] = "E"  # of four choices
    write_rows(data / TASKS["arc_challenge"].file, rows)
    with pytest.raises(RecordError, match="lm-eval cannot score the rows of arc_challenge"):
        run_leaderboard(open_checkpoint(speaker), data=data, tasks=("arc_challenge",))
    with pytest.raises(UsageError, match=r"the rows of winogrande cannot be loaded .*; try --data FOLDER"):
        run_leaderboard(open_checkpoint(speaker), tasks=("winogrande",))  # no network here


def test_tasks_come_in_the_order_of_the_table() -> None:
    assert [t.name for t in choose_tasks(("gsm8k", "mmlu"))] == ["mmlu", "gsm8k"]
    assert [t.name for t in choose_tasks(None)] == list(TASKS)


def score(*rows: float, task: str = "winogrande") -> TaskScore:
    value = sum(rows) / len(rows)
    return TaskScore(task, TASKS[task].metric, value, 0.1 if len(rows) > 1 else None, len(rows), 5, rows)


def board_of(*scores: TaskScore) -> Leaderboard:
    return Leaderboard("m", "i", scores, None, {}, {}, {}, None)


def test_difference_is_paired() -> None:
    a, b = score(1, 0, 1, 0), score(1, 1, 1, 0)
    step = task_difference(a, b)
    assert step is not None
    # By hand: steps 0, 1, 0, 0 have mean 1/4 and variance (3/16 + 9/16) / 3 = 1/4.
    assert (step.mean, step.stderr, step.n) == (0.25, 0.25, 4)
    same = task_difference(a, a)
    assert same is not None and (same.mean, same.stderr) == (0, 0)  # no row changed
    one = task_difference(score(1), score(0))
    assert one is not None and (one.mean, one.stderr) == (-1, None)
    assert task_difference(a, score(1, 0, 1)) is None
    assert task_difference(a, dataclasses.replace(b, shots=0)) is None


def test_a_difference_needs_the_very_same_questions() -> None:
    a = dataclasses.replace(score(1, 0, 1, 0), rows_sha256="a")
    for change in (
        {"rows_sha256": "b"},
        {"rows_sha256": None},
        {"metric": "acc_norm"},
        {"subjects": (("x", 2), ("y", 2))},
    ):
        assert task_difference(a, dataclasses.replace(a, **change)) is None
    assert task_difference(a, a) is not None


def test_errors_of_steps_that_are_all_alike() -> None:
    """40 rows that did not change have no error; 40 that all got worse are no lack of rows; one row is."""
    still, right, wrong = score(*[1.0] * 40), score(*[1.0] * 40), score(*[0.0] * 40)
    for a, b, expected in ((still, still, (0, 0)), (right, wrong, (-1, 0)), (score(1), score(1), (0, 0))):
        step = task_difference(a, b)
        assert step is not None and (step.mean, step.stderr) == expected
    step = task_difference(score(1), score(0))
    assert step is not None and step.stderr is None


def test_the_error_of_groups_is_that_of_repeated_draws() -> None:
    """Draw the rows of unequal groups many times over: the error must be the spread of the means."""
    generator = np.random.default_rng(0)
    levels, sizes = generator.uniform(0.2, 0.8, 6), (4, 40, 9, 4, 25, 100)
    means, errors = [], []
    for _ in range(1500):
        rows = np.concatenate([generator.random(n) < p for p, n in zip(levels, sizes, strict=True)]).astype(float)
        mean, error = mean_and_error(rows.tolist(), sizes)
        means.append(mean)
        errors.append((error or 0) ** 2)
    assert np.mean(means) == pytest.approx(levels.mean(), abs=0.005)
    assert np.sqrt(np.mean(errors)) == pytest.approx(np.std(means), rel=0.06)
    # One row each, as --limit 1 leaves of MMLU: the plain error of the sample. And a single row has none.
    assert mean_and_error([1, 0, 1, 1], [1] * 4) == mean_and_error([1, 0, 1, 1], [4]) == (0.75, 0.25)
    assert mean_and_error([1], [1]) == (1, None)
    # Equal groups weigh like one.
    assert mean_and_error([1, 0, 1, 1], [2, 2])[0] == 0.75


SETTINGS = {"device": "cpu", "dtype": "float32", "batch_size": 1, "max_length": 2048, "chat_template": False}
VERSIONS = {"lm-eval": "0.4.13", "transformers": "5.23.0", "torch": "2.13"}


def test_what_moves_a_board_and_differs_is_named() -> None:
    a = Leaderboard("m", "i", (score(1, 0),), None, {}, SETTINGS | {"tasks": ["x"]}, VERSIONS, None)
    assert circumstances(a, dataclasses.replace(a, model="other", settings=SETTINGS | {"tasks": ["y"]})) == ()
    for key, value in (("dtype", "bfloat16"), ("batch_size", 8), ("device", "cuda:0"), ("max_length", 512)):
        found = circumstances(a, dataclasses.replace(a, settings=SETTINGS | {key: value}))
        assert [str(x) for x in found] == [f"{key} {SETTINGS[key]} against {str(value).partition(':')[0]}"]
    for name in VERSIONS:
        found = circumstances(a, dataclasses.replace(a, versions=VERSIONS | {name: "9"}))
        assert [(x.what, x.before, x.after) for x in found] == [(name, VERSIONS[name], "9")]
    cards = [dataclasses.replace(a, settings=SETTINGS | {"device": f"cuda:{i}"}) for i in range(2)]
    assert circumstances(*cards) == ()  # the same kind of card


def test_boards_of_other_rows_are_not_comparable() -> None:
    a = Leaderboard("m", "i", (score(1, 0),), None, {"a.jsonl": "1", "b.jsonl": "2"}, {}, {}, None)
    assert comparable(a, a) and comparable(a, dataclasses.replace(a, data={"a.jsonl": "1"}))  # fewer tasks
    for change in ({"data": {"a.jsonl": "3"}}, {"data": {}}, {"limit": 1}):
        assert not comparable(a, dataclasses.replace(a, **change))


def test_average_and_its_error() -> None:
    board = board_of(score(1, 0), score(1, 1, task="hellaswag"))
    assert board.average == 0.75
    assert board.average_stderr == pytest.approx(math.sqrt(0.1**2 + 0.1**2) / 2)
    assert board_of(score(1)).average_stderr is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d["scores"][0].update(value=0.9),
        lambda d: d["scores"][0].update(rows=[1.0]),
        lambda d: d["scores"][0].update(task="other"),
        lambda d: d["scores"][0].pop("n"),
        lambda d: d.update(average=0.1),
        lambda d: d.update(scores=[]),
        lambda d: d.update(version=1),
        lambda d: d.update(version=3),
        lambda d: d.update(surplus=1),
        lambda d: d["scores"][0].pop("subjects"),
        lambda d: d["scores"][0].update(subjects=[["x", 1], ["y", 1]]),
        lambda d: d["scores"][0].update(subjects=3),
        lambda d: d.update(settings=[]),
        lambda d: d.update(settings={"device": 0}),
        lambda d: d.update(versions=None),
        lambda d: d["scores"][0].update(stderr=9.0),
        lambda d: d["scores"][0].update(stderr=None),
        lambda d: d["scores"][0].update(stderr="x"),
        lambda d: d["scores"][0].update(shots="5"),
        lambda d: d["scores"][0].update(metric="acc_norm"),
        lambda d: d["scores"][0].update(undefined=4),
        lambda d: d["scores"][0].update(rows_sha256=5),
        lambda d: d["scores"].append(d["scores"][0]),
        lambda d: d.update(average_stderr=9),
        lambda d: d.update(data=None),
        lambda d: d.update(command=5),
        lambda d: d.update(model=None),
        lambda d: d.update(limit="x"),
        lambda d: d.update(versions={"torch": 5}),
    ],
)
def test_a_damaged_record_is_refused(damage: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    path = tmp_path / "leaderboard.json"
    board_of(dataclasses.replace(score(1, 0, 1), stderr=mean_and_error((1, 0, 1), (3,))[1])).save(path)
    document = json.loads(path.read_bytes())
    assert Leaderboard.load(path).scores[0].n == 3
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(RecordError, match="leaderboard"):
        Leaderboard.load(path)


@needs_lm_eval
def test_a_record_of_the_same_is_not_measured_again(speaker: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed between the two boards of its source and its result, and resumed."""
    checkpoint, options = open_checkpoint(speaker), {"tasks": ("winogrande",), "data": data, "command": "c"}
    board = run_leaderboard(checkpoint, **options, limit=2)
    with monkeypatch.context() as unable:
        # Whoever measures loads a model first: with none to load, it shows.
        unable.delattr("laser.evaluation.leaderboard._load_model")
        assert run_leaderboard(checkpoint, **options, limit=2, known=board) is board
        for other in (replace(board, command="d"), replace(board, data={}), replace(board, weights={})):
            with pytest.raises(NameError):
                run_leaderboard(checkpoint, **options, limit=2, known=other)
    write_rows(data / TASKS["winogrande"].file, rows_of("winogrande", 8))
    assert run_leaderboard(checkpoint, **options, limit=2, known=board).data != board.data
