"""The six tasks of the Open LLM Leaderboard, version 1, as task files for lm-eval.

Prompts, choices and metrics are lm-eval's own: each task file written here includes the packaged one and sets only
the number of shots and where the rows come from. Shots and metrics are those of the leaderboard's "About" page (the
archived first version) and of lm-eval's group `openllm`.

Rows come from the Hub (through lm-eval, few-shot examples from the train split; MMLU's from its dev split), or from a
folder of JSON lines. There the examples must not be rows that are scored:

    GSM8K           examples from gsm8k_train_300.jsonl, rows from gsm8k_test.jsonl
    MMLU            the first 5 rows of each subject are the examples and are not scored
    ARC, HellaSwag, the first `shots` rows of the file are the examples, in file order, and are not scored; a later row
    Winogrande      equal to one of them is not scored either
    TruthfulQA      no examples
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laser.errors import RecordError, UsageError
from laser.evaluation.rows import TextRow, decode_rows, rows_of
from laser.files import LARGEST_TEXT, read_regular

PREFIX = "laser_"  # so that a task of ours never shadows lm-eval's own


@dataclass(frozen=True)
class Task:
    """One row of the table: how lm-eval runs it, where its rows lie, and what a model card calls it."""

    name: str
    include: str  # packaged task file, relative to lm_eval/tasks; {subject} for MMLU
    shots: int
    metric: str  # as the leaderboard calls it
    key: str  # lm-eval's "metric,filter"
    file: str  # local rows
    fields: tuple[str, ...]  # that each of them has
    title: str
    dataset: tuple[str, str | None, str]  # Hub name, configuration, split that is scored
    examples: str | None = None  # local file of the few-shot examples; None: held out from `file`
    hub_examples: str | None = "train"  # split for the examples where the packaged file names none
    subjects: bool = False


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "arc_challenge",
            "arc/arc_challenge.yaml",
            25,
            "acc_norm",
            "acc_norm,none",
            "arc_challenge.jsonl",
            ("question", "choices", "answerKey"),
            "AI2 Reasoning Challenge (25-Shot)",
            ("ai2_arc", "ARC-Challenge", "test"),
        ),
        Task(
            "hellaswag",
            "hellaswag/hellaswag.yaml",
            10,
            "acc_norm",
            "acc_norm,none",
            "hellaswag.jsonl",
            ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
            "HellaSwag (10-Shot)",
            ("hellaswag", None, "validation"),
        ),
        Task(
            "mmlu",
            "mmlu/default/mmlu_{subject}.yaml",
            5,
            "acc",
            "acc,none",
            "mmlu_20_per_subject.jsonl",
            ("subject", "question", "choices", "answer"),
            "MMLU (5-Shot)",
            ("cais/mmlu", "all", "test"),
            hub_examples=None,  # the packaged file says dev
            subjects=True,
        ),
        Task(
            "truthfulqa_mc2",
            "truthfulqa/truthfulqa_mc2.yaml",
            0,
            "mc2",
            "acc,none",
            "truthfulqa_mc.jsonl",
            ("question", "mc2_targets"),
            "TruthfulQA (0-shot)",
            ("truthful_qa", "multiple_choice", "validation"),
            hub_examples=None,
        ),
        Task(
            "winogrande",
            "winogrande/default.yaml",
            5,
            "acc",
            "acc,none",
            "winogrande.jsonl",
            ("sentence", "option1", "option2", "answer"),
            "Winogrande (5-shot)",
            ("winogrande", "winogrande_xl", "validation"),
        ),
        Task(
            "gsm8k",
            "gsm8k/gsm8k.yaml",
            5,
            "exact_match",
            "exact_match,strict-match",  # "#### number", as the leaderboard's version of the harness asked
            "gsm8k_test.jsonl",
            ("question", "answer"),
            "GSM8k (5-shot)",
            ("gsm8k", "main", "test"),
            examples="gsm8k_train_300.jsonl",
        ),
    )
}


def choose_tasks(names: tuple[str, ...] | None) -> tuple[Task, ...]:
    """The named tasks, in the table's order; all six for None. Raises UsageError with the list of names."""
    for name in names or ():
        if name not in TASKS:
            raise UsageError(f"no task is called {name!r}; try --tasks {','.join(TASKS)}")
    return tuple(task for task in TASKS.values() if names is None or task.name in names)


def write_tasks(task: Task, packaged: Path, folder: Path, data: Path | None) -> tuple[list[str], dict[str, str]]:
    """Write the task files (and split rows) into `folder`; lm-eval's names for them, and sha256 by data file.

    packaged: the folder lm_eval/tasks. More than one name for MMLU, one per subject.
    Raises UsageError where `data` lacks a file or has too few rows, RecordError for rows that cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if data is None:
        names = _subjects(packaged) if task.subjects else [""]
        return [_write_hub(task, packaged, folder, name) for name in names], {}
    found, hashes = _read_rows(data / task.file, task)
    rows = [row.entries for row in found]
    pool: list[dict[str, Any]] | None = None
    if task.examples:
        examples, more = _read_rows(data / task.examples, task)
        _require_fields(task, examples)
        pool, hashes = [row.entries for row in examples], hashes | more
    if not task.subjects:
        names = [_write_local(task, packaged, folder, "", rows, pool, data)]
        _require_fields(task, found)
        return names, hashes
    known = _subjects(packaged)
    by_subject: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        subject = row.entries.get("subject")
        if subject not in known:
            raise RecordError(
                f"{row.where}: subject {subject!r} is not one of MMLU's {len(known)}; expected a name such as "
                f"{known[0]!r}"
            )
        by_subject.setdefault(subject, []).append(row.entries)
    names = [
        _write_local(task, packaged, folder, subject, by_subject[subject], pool, data) for subject in sorted(by_subject)
    ]
    _require_fields(task, found)
    return names, hashes


def _require_fields(task: Task, rows: Sequence[TextRow]) -> None:
    """Raises RecordError for a row without something to ask: lm-eval would ask the text "None"."""
    for row in rows:
        if absent := [field for field in task.fields if row.entries.get(field) is None]:
            raise RecordError(
                f"{row.where}: {absent[0]} is absent or null; a row of {task.name} has "
                f"{', '.join(task.fields)}: mend or remove it"
            )


def _subjects(packaged: Path) -> list[str]:
    return sorted(path.stem.removeprefix("mmlu_") for path in (packaged / "mmlu/default").glob("mmlu_*.yaml"))


def _name(task: Task, subject: str) -> str:
    return PREFIX + task.name + (f"_{subject}" if subject else "")


def subject_of(task: Task, name: str) -> str:
    """The subject that a task file of this name asks about; "" for a task without subjects."""
    return name.removeprefix(PREFIX + task.name).removeprefix("_")


def _write_hub(task: Task, packaged: Path, folder: Path, subject: str) -> str:
    changes: dict[str, Any] = {"fewshot_split": task.hub_examples} if task.hub_examples else {}
    return _write(task, packaged, folder, subject, changes)


def _write_local(
    task: Task,
    packaged: Path,
    folder: Path,
    subject: str,
    rows: list[dict[str, Any]],
    pool: list[dict[str, Any]] | None,
    data: Path,
) -> str:
    """A task on local rows. pool: the examples, where they have a file of their own."""
    held_out = task.shots if pool is None else 0
    examples = rows[:held_out] if pool is None else pool
    scored = [row for row in rows[held_out:] if row not in examples]
    if not scored or len(examples) < task.shots:
        of = f" of {subject}" if subject else ""
        raise UsageError(
            f"{data / task.file}: found {len(rows)} rows{of}, expected {task.shots} few-shot examples and at least "
            f"one row to score; try a longer file, or leave the task out with --tasks"
        )
    name = _name(task, subject)
    files = {"test": folder / f"{name}.test.jsonl"}
    files["test"].write_text("".join(json.dumps(row) + "\n" for row in scored), encoding="utf-8")
    changes: dict[str, Any] = {"test_split": "test", "training_split": None, "validation_split": None}
    if task.shots:
        files["examples"] = folder / f"{name}.examples.jsonl"
        files["examples"].write_text("".join(json.dumps(row) + "\n" for row in examples), encoding="utf-8")
        changes["fewshot_split"] = "examples"
        if pool is None:
            changes["fewshot_config"] = {"sampler": "first_n"}
    changes |= {
        "dataset_path": "json",
        "dataset_name": None,
        # A cache of its own: `datasets` would otherwise keep a copy of every run under the user's home.
        "dataset_kwargs": {
            "data_files": {split: str(path) for split, path in files.items()},
            "cache_dir": str(folder / "cache"),
        },
    }
    return _write(task, packaged, folder, subject, changes)


def _write(task: Task, packaged: Path, folder: Path, subject: str, changes: dict[str, Any]) -> str:
    name = _name(task, subject)
    include = str(packaged / task.include.format(subject=subject))
    document = {"include": include, "task": name, "tag": None, "num_fewshot": task.shots} | changes
    # JSON is YAML, and cannot be misread where a value looks like something else.
    (folder / f"{name}.yaml").write_text(json.dumps(document, indent=1), encoding="utf-8")
    return name


def _read_rows(path: Path, task: Task) -> tuple[list[TextRow], dict[str, str]]:
    """Rows of a JSON-lines file, and {file name: sha256}."""
    try:
        data = read_regular(path, LARGEST_TEXT)
    except OSError as error:
        raise UsageError(
            f"cannot read {path}, the rows of {task.name} ({error.strerror}); "
            f"try another --data, or leave the task out with --tasks"
        ) from error
    content = decode_rows(path.name, data)
    return rows_of(path, content.text), {path.name: content.sha256}
