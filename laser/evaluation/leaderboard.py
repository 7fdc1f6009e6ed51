"""leaderboard: the Open LLM Leaderboard's six tasks (version 1) through lm-eval, as one record.

The same function measures a source and its reduction. Values are in [0, 1]. Every row's own score is kept, so that two
records of the same rows can be compared row by row, which is far sharper than comparing two averages.

As on the leaderboard, MMLU is the mean of its subjects with equal weight, however many questions each has, and the
average that of the six tasks. Tasks and subjects are independent, so their errors add in squares.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import logging
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.side_files import require_small_files
from laser.checkpoint.source import require_unchanged
from laser.errors import (
    CheckpointError,
    NumericalError,
    OutputError,
    RecordError,
    UsageError,
    disk_error_in,
    first_line,
    is_out_of_memory,
    not_finite,
    remedy,
)
from laser.evaluation.as_stored import as_stored
from laser.evaluation.causal import build_causal
from laser.evaluation.lm_tasks import TASKS, Task, choose_tasks, subject_of, write_tasks
from laser.evaluation.text import load_tokenizer
from laser.evaluation.verdict import LIBRARIES, Unlike, device_class, unlike
from laser.files import disk_errors
from laser.journal import Journal, spoiling
from laser.records import Record, decode, near_enough, under

LM_EVAL = "0.4.12"  # earlier ones fail on local rows
NEEDED = ("lm_eval", "accelerate")
SEED = 1234  # lm-eval's own default for drawing few-shot examples
SAMPLE = 4  # rows of each task file whose prompts are built to estimate the rest
# Of a run, which takes the dtype as stored, too.
IN_FLOAT32 = "laser leaderboard with --dtype float32 and --force (laser run: with --no-leaderboard before it)"


@dataclass(frozen=True)
class TaskScore:
    """One task. value and stderr in [0, 1]; value is the mean of `rows`, one score per row in file order.

    With `subjects`, pairs of a name and how many of the rows are its own, value is the mean of their means. stderr is
    0 for rows that are all alike, as in lm-eval, and None for a single row.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int  # rows scored
    shots: int
    rows: tuple[float, ...]
    subjects: tuple[tuple[str, int], ...] = ()
    rows_sha256: str | None = None  # of every prompt, choice and answer: equal if the very same was asked
    undefined: int = 0  # rows whose score is 0/0 and counts as 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many rows each group of equal weight has."""
        return tuple(count for _, count in self.subjects) or (len(self.rows),)

    def wrong(self) -> str | None:
        if self.task not in TASKS or self.metric != TASKS[self.task].metric:
            return f"no task is called so, with metric {self.metric!r}"
        whole = len(self.rows) == self.n == sum(self.sizes) and min(self.sizes) > 0
        if not whole or not 0 <= self.undefined <= self.n:
            return f"n is {self.n} and undefined {self.undefined}, found {len(self.rows)} rows"
        if self.shots < 0 or not 0 <= min(self.rows) <= max(self.rows) <= 1 + 1e-6:
            return "shots or a row's score is not what it can be, 0 or more, and between 0 and 1"
        mean, error = mean_and_error(self.rows, self.sizes)
        if not near_enough(self.value, mean):
            return "a value is not the mean of its rows"
        return None if near_enough(self.stderr, error) else "a standard error is not that of its rows"


@dataclass(frozen=True)
class TaskDifference:
    """Mean of b - a over the same rows, and its standard error: 0 where no row changed, None for a single row that did.

    unlike: what was not the same in the two measurements and moves their numbers.
    """

    mean: float
    stderr: float | None
    n: int
    unlike: tuple[Unlike, ...] = ()


@dataclass(frozen=True)
class Leaderboard(
    Record,
    kind="leaderboard",
    version=2,
    made_by="laser leaderboard MODEL -o FILE --force",
    derived=("average", "average_stderr"),
):
    """What lm-eval measured on the model with this identity."""

    model: str
    identity: str
    scores: tuple[TaskScore, ...]
    limit: int | None  # rows per task (per subject for MMLU); None: all
    data: Mapping[str, str]  # local file -> sha256; empty: rows from the Hub
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    command: str | None
    weights: Mapping[str, str] = field(default_factory=dict)  # which they were, see Fingerprint.stated

    @property
    def average(self) -> float:
        """Unweighted mean over the tasks in `scores`: the leaderboard's own figure when all six are there."""
        return average([(score.value, score.stderr) for score in self.scores])[0]

    @property
    def average_stderr(self) -> float | None:
        """Standard error of `average`. None where a task has none."""
        return average([(score.value, score.stderr) for score in self.scores])[1]

    @property
    def by_task(self) -> dict[str, TaskScore]:
        return {score.task: score for score in self.scores}

    def wrong(self) -> str | None:
        if not self.scores or not isinstance(self.settings.get("device", ""), str):
            return "a score or the name of a device is wanting"
        names = [score.task for score in self.scores]
        twice = next((name for name in names if names.count(name) > 1), None)
        return f"score {twice} is there twice" if twice else under(self, 1, "limit")

    def save(self, path: Path) -> None:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        super().save(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the bars and notes of lm-eval, `datasets` and transformers inside."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(before)


@contextmanager
def _for_terminals() -> Iterator[None]:
    """Bars of other libraries, which say how far the hours are, where somebody can see them."""
    with nullcontext() if sys.stderr is not None and sys.stderr.isatty() else _quiet():
        yield


def average(parts: Sequence[tuple[float, float | None]]) -> tuple[float, float | None]:
    """Mean of independent figures, each with its standard error, and the error of the mean; None where one has none."""
    mean = math.fsum(value for value, _ in parts) / len(parts)
    known = [error for _, error in parts if error is not None]
    return mean, math.hypot(*known) / len(parts) if len(known) == len(parts) else None


def mean_and_error(rows: Sequence[float], sizes: Sequence[int]) -> tuple[float, float | None]:
    """Mean over groups of equal weight (`sizes` rows each, in order) of their means, and its standard error.

    A group's variance is that of its own rows. A group of one row has none to show: its distance from the mean of all
    groups stands for it (collapsed strata, Cochran 1977, section 5A.12). That counts what groups differ by as error,
    and so is too large rather than too small. None for a single row.
    """
    ends = np.cumsum(sizes).tolist()
    groups = [rows[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    means = [math.fsum(group) / len(group) for group in groups]
    mean = math.fsum(means) / len(means)
    if len(rows) < 2:
        return mean, None
    variances = [
        math.fsum((x - m) ** 2 for x in group) / (len(group) - 1) / len(group)
        if len(group) > 1
        else (m - mean) ** 2 * len(groups) / (len(groups) - 1)
        for group, m in zip(groups, means, strict=True)
    ]
    return mean, math.sqrt(math.fsum(variances)) / len(groups)


def task_difference(a: TaskScore, b: TaskScore, differences: tuple[Unlike, ...] = ()) -> TaskDifference | None:
    """b minus a, paired by row. None where the two were not asked the very same rows with the same shots.

    differences: what else was not the same, see `circumstances`; it is kept in the record.
    """
    if any(getattr(a, key) != getattr(b, key) for key in ("task", "metric", "n", "shots", "subjects", "rows_sha256")):
        return None
    steps = [y - x for x, y in zip(a.rows, b.rows, strict=True)]
    mean, error = mean_and_error(steps, a.sizes)
    return TaskDifference(mean, error if any(steps) else 0.0, len(steps), differences)


def comparable(a: Leaderboard, b: Leaderboard) -> bool:
    """Whether the two were measured on the same rows: both on local files or both from the Hub, files of one name the
    same, and the same limit."""
    shared = a.data.keys() & b.data.keys()
    return bool(a.data) == bool(b.data) and a.limit == b.limit and all(a.data[f] == b.data[f] for f in shared)


def circumstances(a: Leaderboard, b: Leaderboard) -> tuple[Unlike, ...]:
    """What moves the scores of two boards without changing their rows, and is not the same."""

    def conditions(board: Leaderboard) -> dict[str, Any]:
        settings = {key: value for key, value in board.settings.items() if key != "tasks"}
        if "device" in settings:
            settings["device"] = device_class(settings["device"])
        return settings | {name: board.versions.get(name) for name in ("lm-eval", *LIBRARIES)}

    return unlike(conditions(a), conditions(b))


def run_leaderboard(
    checkpoint: Checkpoint,
    *,
    tasks: tuple[str, ...] | None = None,
    limit: int | None = None,
    data: Path | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    batch_size: int = 1,
    command: str | None = None,
    journal: Path | None = None,
    anew: bool = False,
    known: Leaderboard | None = None,
    tick: Callable[[TaskScore], None] = lambda _: None,
) -> Leaderboard:
    """Measure a checkpoint on the leaderboard's tasks; the whole model is loaded on `device` in `dtype`.

    data: folder of local rows (see lm_tasks); None takes them from the Hub
    limit: the first rows of each task only (of each subject for MMLU), for a quick look; not the leaderboard's numbers
    dtype: "auto" is the checkpoint's own

    No chat template is applied, as on the leaderboard. With `journal` each finished task is a line of
    that file, and a leaderboard that was killed measures none again; the caller removes it when the record is saved.
    `anew` drops the journal of another measurement. `known` is returned if it is the record of this one.
    `tick` is called after each task.
    Raises UsageError without lm-eval or for unknown tasks, NumericalError where the model's likelihoods are not finite,
    RecordError for the journal of another measurement.
    """
    chosen = _asked(checkpoint, tasks, limit, data)
    weights = checkpoint.fingerprint.stated()
    packaged = Path(_lm_eval("tasks").__path__[0])
    hashes: dict[str, str] = {}
    scores: list[TaskScore] = []
    with _folder() as folder:
        # All task files before the model is loaded: a missing file shows at once and not after hours.
        names: dict[str, list[str]] = {}
        for task in chosen:
            with disk_errors(Path(folder)):
                names[task.name], used = write_tasks(task, packaged, Path(folder, task.name), data)
            hashes |= used
        versions = {name: version(name) for name in ("lm-eval", "transformers", "torch", "datasets")}
        run = {
            "kind": "leaderboard journal",
            "version": Leaderboard.version,
            "source": checkpoint.identity,
            "model": checkpoint.name,
            **weights,
            "tasks": [task.name for task in chosen],
            "data": hashes,
            "options": {"limit": limit, "device": device, "dtype": dtype, "batch_size": batch_size},
            "versions": versions,
        }
        asked = (checkpoint.identity, weights, limit, hashes, versions, command)
        if known and asked == (known.identity, known.weights, known.limit, known.data, known.versions, known.command):
            return known
        kept = Journal(journal, run, anew=anew) if journal else None
        try:
            finished = _finished_tasks(kept) if kept else {}
            model = _load_model(checkpoint, device, dtype, batch_size)
            for task in chosen:
                score = finished.get(task.name)
                if score is None:
                    score = _measure_task(model, task, Path(folder, task.name), names[task.name], limit)
                    if kept:
                        kept.append(asdict(score))
                scores.append(score)
                tick(score)
            with spoiling(kept):
                require_unchanged(checkpoint)
        finally:
            if kept:
                kept.close()
    return Leaderboard(
        model=checkpoint.name,
        identity=checkpoint.identity,
        scores=tuple(scores),
        limit=limit,
        data=hashes,
        settings={
            "tasks": [task.name for task in chosen],
            "device": device,
            "dtype": str(model.model.dtype).removeprefix("torch."),
            "batch_size": batch_size,
            "max_length": model.max_length,
            "fewshot_seed": SEED,
            "chat_template": False,
        },
        versions=versions,
        command=command,
        weights=weights,
    )


@dataclass(frozen=True)
class Workload:
    """What a leaderboard asks of a model: prompts, and about how many tokens they are."""

    prompts: int
    tokens: int


def require_leaderboard(
    checkpoint: Checkpoint,
    *,
    tasks: tuple[str, ...] | None = None,
    limit: int | None = None,
    data: Path | None = None,
    counted: bool = False,
) -> Workload | None:
    """What `run_leaderboard` refuses, before the hours of work that it stands behind: no model is loaded.

    With `counted` also how much it is, from every row and the prompts of a few; else None. Raises as `run_leaderboard`
    does, for lm-eval, the model's kind, its tokenizer, and rows that are missing.
    """
    if checkpoint.on_top is not None:
        raise UsageError(
            f"{checkpoint.name} is merged as it is read, and lm-eval has to load it; make it with laser rebuild, or "
            "leave the leaderboard out"
        )
    chosen, packaged = _asked(checkpoint, tasks, limit, data), Path(_lm_eval("tasks").__path__[0])
    tokenizer = load_tokenizer(checkpoint.path)
    prompts = tokens = 0.0
    with _folder() as folder:
        for task in chosen:
            with disk_errors(Path(folder)):
                names, _ = write_tasks(task, packaged, Path(folder, task.name), data)
            for each in _load_rows(task, Path(folder, task.name), names)["tasks"].values():
                if counted:
                    one, several = _work_of(each, tokenizer, limit)
                    prompts, tokens = prompts + one, tokens + several
    return Workload(round(prompts), round(tokens)) if counted else None


def _work_of(task: Any, tokenizer: Any, limit: int | None) -> tuple[float, float]:
    """Prompts and tokens of one of lm-eval's tasks; an answer that is generated counts with its longest length."""
    task.set_fewshot_seed(seed=SEED)
    rows = min(len(task.eval_docs), limit or sys.maxsize)
    sample = min(rows, SAMPLE)
    with _quiet():
        task.build_all_requests(limit=sample, rank=0, world_size=1)
    tokens = 0
    for instance in task.instances:
        context, rest = instance.args[:2]
        generated = int(rest.get("max_gen_toks", 256)) if isinstance(rest, dict) else 0  # lm-eval's own default
        text = context if isinstance(rest, dict) else context + rest  # an answer is read with its question
        tokens += len(tokenizer(text, verbose=False)["input_ids"]) + generated
    return len(task.instances) * rows / sample, tokens * rows / sample


@contextmanager
def _folder() -> Iterator[str]:
    """A folder for the tasks' files while lm-eval reads them. What stays in it is no reason to stop."""
    with disk_errors(Path(tempfile.gettempdir())):
        made = tempfile.TemporaryDirectory(prefix="laser-tasks-", ignore_cleanup_errors=True)
    with made as folder:
        yield folder


def _asked(
    checkpoint: Checkpoint, tasks: tuple[str, ...] | None, limit: int | None, data: Path | None
) -> tuple[Task, ...]:
    """The tasks, after everything that needs no row has been looked at."""
    build_causal(checkpoint)
    return require_request(tasks, limit, data)


def require_request(tasks: tuple[str, ...] | None, limit: int | None, data: Path | None) -> tuple[Task, ...]:
    """The tasks, after everything that needs no model has been looked at. Raises UsageError."""
    chosen = choose_tasks(tasks)
    if not chosen:
        raise UsageError(f"no task was named; try --tasks {','.join(TASKS)}")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} scores nothing; try --limit 20")
    if data is not None and not data.is_dir():
        raise UsageError(f"--data {data} is not a directory; try the one that holds {chosen[0].file}")
    require_lm_eval()
    return chosen


def _finished_tasks(journal: Journal) -> dict[str, TaskScore]:
    """The tasks that a journal holds. Raises RecordError for an entry that is not a whole score."""
    where, remedy = f"{journal.path} holds a task that is not whole", "start afresh with --force"
    scores = decode(tuple[TaskScore, ...], list(journal.entries), where, remedy)
    found = {score.task: score for score in scores}
    if len(found) < len(scores):
        raise RecordError(f"{where}: one is there twice; {remedy}")
    return found


def lm_eval_is_here() -> bool:
    """Whether lm-eval and its model backend are installed."""
    return all(importlib.util.find_spec(module) is not None for module in NEEDED)


def require_lm_eval() -> None:
    """Raises UsageError unless lm-eval and its model backend are installed, and recent enough."""
    if not lm_eval_is_here():
        raise UsageError(f"the leaderboard needs {' and '.join(NEEDED)}; try pip install 'laser-rmt[eval]'")
    found = version("lm-eval")
    if _numbers(found) < _numbers(LM_EVAL):
        raise UsageError(
            f"the leaderboard needs lm-eval {LM_EVAL} or later, found {found}; try pip install -U 'laser-rmt[eval]'"
        )


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", release)[:3])


def _lm_eval(module: str) -> Any:
    """A module of lm-eval, imported when needed. Untyped: its decorators hide its signatures from a type checker, which
    moreover must pass where lm-eval is not installed."""
    return importlib.import_module(f"lm_eval.{module}")


@_quiet()
def _load_model(checkpoint: Checkpoint, device: str, dtype: str, batch_size: int) -> Any:
    """The checkpoint's weights and tokenizer as lm-eval takes them.

    Loaded here and not by lm-eval, which would let transformers fill a missing tensor with random numbers.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    require_small_files(checkpoint.path)
    path = str(checkpoint.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **as_stored(checkpoint),
        )
        model, info = loaded
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if is_out_of_memory(error):
            raise
        first = first_line(error)
        raise UsageError(
            f"transformers cannot load {path} ({first}); try a directory that has its tokenizer and config"
        ) from error
    gaps = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    if gaps:
        raise CheckpointError(
            f"{checkpoint.name} has no weights for {gaps[0]} ({len(gaps)} in all), which would be random; "
            "finish the download"
        )
    backend = _lm_eval("models.huggingface")
    return backend.HFLM(
        pretrained=model.to(device).eval(), tokenizer=tokenizer, batch_size=batch_size, trust_remote_code=False
    )


def _load_rows(task: Task, folder: Path, names: list[str]) -> Any:
    """lm-eval's tasks of the files in `folder`, with their rows. Raises UsageError for rows that are not there."""
    try:
        # Without the packaged index: reading its thousands of files takes longer than a small task.
        with _for_terminals():
            return _lm_eval("tasks").TaskManager(include_path=str(folder), include_defaults=False).load(names)
    except Exception as error:  # `datasets` raises its own, huggingface_hub's, pyarrow's and the network's errors
        if is_out_of_memory(error):
            raise
        if (disk := disk_error_in(error)) is not None:
            place = disk.filename or f"{folder} and the cache of Hugging Face's datasets"
            raise OutputError(
                f"the rows of {task.name} cannot be kept in {place}: {disk.strerror}; {remedy(disk)}"
            ) from error
        raise UsageError(
            f"the rows of {task.name} cannot be loaded ({first_line(error)}); try --data FOLDER, or leave the task "
            "out with --tasks"
        ) from error


def _measure_task(model: Any, task: Task, folder: Path, names: list[str], limit: int | None) -> TaskScore:
    """Run the task's files in `folder` and pool their rows."""
    loaded = _load_rows(task, folder, names)
    for each in loaded["tasks"].values():
        each.set_fewshot_seed(seed=SEED)
    try:
        # Without NumPy's word on 0/0, which is dealt with below.
        with np.errstate(divide="ignore", invalid="ignore"), _for_terminals():
            result = _lm_eval("evaluator").evaluate(lm=model, task_dict=loaded, limit=limit, log_samples=True)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise RecordError(
            f"lm-eval cannot score the rows of {task.name} ({type(error).__name__}: {first_line(error)}); compare them "
            f"with those of {task.dataset[0]}, or leave the task out with --tasks"
        ) from error
    if result is None:
        raise UsageError("lm-eval returned nothing: this is not its first process; run without a launcher")
    metric, _, picked = task.key.partition(",")
    rows: list[float] = []
    subjects: list[tuple[str, int]] = []
    asked = hashlib.sha256()
    for name in names:
        samples = [s for s in result["samples"][name] if s["filter"] == picked]
        for sample in samples:
            _check_finite(sample, name, model.model.dtype)
            # The row beside the prompts that were made of it: mc2 reads the right answers from the row alone.
            stated = [sample["doc_hash"], sample["arguments"], sample["target"]]
            asked.update(json.dumps(stated, sort_keys=True, default=str).encode())
        rows += [float(sample[metric]) for sample in samples]
        subjects.append((subject_of(task, name), len(samples)))
    undefined = sum(map(math.isnan, rows))
    if undefined and task.metric != "mc2":
        raise NumericalError(f"{names[0]}: {undefined} scores are NaN; {not_finite(model.model.dtype, IN_FLOAT32)}")
    # mc2 is the share of the right answers in the sum of all answers' probabilities. Where all of them underflow it is
    # 0/0. The leaderboard gave a model with such a row 0 for the task; here the row counts 0, and all rows if all are.
    rows = [0.0 if math.isnan(x) else x for x in rows]
    parts = tuple(subjects) if task.subjects else ()
    mean, error = mean_and_error(rows, [count for _, count in subjects])
    if len(names) == 1 and not undefined:
        expected = float(result["results"][names[0]][task.key])
        assert abs(expected - mean) < 1e-9, f"{task.name}: the rows average to {mean}, lm-eval says {expected}"
    return TaskScore(
        task.name, task.metric, mean, error, len(rows), task.shots, tuple(rows), parts, asked.hexdigest(), undefined
    )


def _check_finite(sample: Mapping[str, Any], name: str, dtype: object) -> None:
    """NaN likelihoods would be scored like any others: the first choice would simply win."""
    for response in sample["filtered_resps"]:
        if isinstance(response, (tuple, list)) and math.isnan(float(response[0])):
            raise NumericalError(
                f"{name}, row {sample['doc_id']}: the model's log-likelihood is NaN; {not_finite(dtype, IN_FLOAT32)}"
            )
