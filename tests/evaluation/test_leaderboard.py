"""The leaderboard: rows that are examples are never scored, and lm-eval's figures are what a plain loop computes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from laser.checkpoint.reader import open_checkpoint
from laser.errors import CheckpointError, LaserError, NumericalError, RecordError, UsageError
from laser.evaluation.leaderboard import Leaderboard, TaskScore, comparable, difference, run_leaderboard
from laser.evaluation.lm_tasks import TASKS, choose_tasks, write_tasks

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


@needs_lm_eval
def test_real_rows_of_every_file_can_be_read(speaker: Path, shared: Path) -> None:
    tasks = ("hellaswag", "truthfulqa_mc2", "winogrande")
    board = run_leaderboard(open_checkpoint(speaker), data=shared / "data/lm_eval", tasks=tasks, limit=2)
    assert {s.task: s.n for s in board.scores} == dict.fromkeys(tasks, 2)


@needs_lm_eval
def test_nan_likelihoods_are_an_error_and_not_a_score(speaker: Path, data: Path) -> None:
    tensors = load_file(speaker / "model.safetensors")
    tensors["lm_head.weight"][5] = math.nan
    save_file(tensors, speaker / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=r"laser_winogrande, row 0.*NaN"):
        run_leaderboard(open_checkpoint(speaker), data=data, tasks=("winogrande",))


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
    step = difference(a, b)
    assert step is not None
    # By hand: steps 0, 1, 0, 0 have mean 1/4 and variance (3/16 + 9/16) / 3 = 1/4.
    assert (step.mean, step.stderr, step.n) == (0.25, 0.25, 4)
    same = difference(a, a)
    assert same is not None and (same.mean, same.stderr) == (0, 0)  # no row changed
    one = difference(score(1), score(0))
    assert one is not None and (one.mean, one.stderr) == (-1, None)
    assert difference(a, score(1, 0, 1)) is None
    assert difference(a, dataclasses.replace(b, shots=0)) is None


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
    ],
)
def test_a_damaged_record_is_refused(damage: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    path = tmp_path / "leaderboard.json"
    board_of(score(1, 0, 1)).save(path)
    document = json.loads(path.read_bytes())
    assert Leaderboard.load(path).scores[0].n == 3
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(RecordError, match="leaderboard"):
        Leaderboard.load(path)
