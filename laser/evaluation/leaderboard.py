"""leaderboard: the six tasks of the Open LLM Leaderboard (version 1) through lm-eval, as one record.

The same function measures a source and its reduction. Values are in [0, 1]. Every row's own score is kept, so that two
records of the same rows can be compared row by row, which is far sharper than comparing two averages.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from laser.checkpoint.files import read_json, to_json, write_atomically
from laser.checkpoint.reader import Checkpoint
from laser.errors import CheckpointError, NumericalError, RecordError, UsageError
from laser.evaluation.causal import build_causal
from laser.evaluation.lm_tasks import TASKS, Task, choose_tasks, write_tasks

KIND, VERSION = "leaderboard", 1
SEED = 1234  # lm-eval's own default for drawing few-shot examples


@dataclass(frozen=True)
class TaskScore:
    """One task. value and stderr in [0, 1]; value is the mean of `rows`, one score per row in file order.

    MMLU's subjects count by their size, as in lm-eval's group. stderr is the sample's, over all rows at once. It is
    None for one row, and for rows all alike, where lm-eval says 0: no spread was seen, which does not say that there
    is none.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int  # rows scored
    shots: int
    rows: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """Mean of b - a over the same rows, and its standard error (None where the rows show no spread)."""

    mean: float
    stderr: float | None
    n: int


@dataclass(frozen=True)
class Leaderboard:
    """What lm-eval measured on the model with this identity."""

    model: str
    identity: str
    scores: tuple[TaskScore, ...]
    limit: int | None  # rows per task (per subject for MMLU); None: all
    data: Mapping[str, str]  # local file -> sha256; empty: rows from the Hub
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    command: str | None

    @property
    def average(self) -> float:
        """Unweighted mean over the tasks in `scores`: the leaderboard's own figure when all six are there."""
        return sum(score.value for score in self.scores) / len(self.scores)

    @property
    def average_stderr(self) -> float | None:
        """Standard error of `average`; the tasks' errors are independent. None where a task has none."""
        errors = [score.stderr for score in self.scores]
        known = [e for e in errors if e is not None]
        return math.hypot(*known) / len(known) if len(known) == len(errors) else None

    @property
    def by_task(self) -> dict[str, TaskScore]:
        return {score.task: score for score in self.scores}

    def to_json(self) -> bytes:
        averages = {"average": self.average, "average_stderr": self.average_stderr}
        return to_json({"kind": KIND, "version": VERSION} | averages | asdict(self))

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.to_json())

    @staticmethod
    def load(path: Path) -> Leaderboard:
        """Raises RecordError for a record that is missing, damaged, of another version, or contradicts itself."""
        document = read_json(path, KIND, VERSION)
        averages = {key: document.pop(key, None) for key in ("average", "average_stderr")}
        del document["kind"], document["version"]
        try:
            rows = [score | {"rows": tuple(score["rows"])} for score in document.pop("scores")]
            record = Leaderboard(scores=tuple(TaskScore(**row) for row in rows), **document)
            # A value that is not the mean of its rows was edited by hand.
            agrees = all(_agrees(score) for score in record.scores) and abs(record.average - averages["average"]) < 1e-9
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise RecordError(f"{path} is not a whole record ({error}); run `laser leaderboard` again") from error
        if not agrees:
            raise RecordError(f"{path}: a value is not the mean of its rows; run `laser leaderboard` again")
        return record


def _agrees(score: TaskScore) -> bool:
    finite = all(math.isfinite(x) for x in score.rows)
    return finite and score.task in TASKS and len(score.rows) == score.n and abs(_mean(score.rows) - score.value) < 1e-6


def _mean(rows: Sequence[float]) -> float:
    return math.fsum(rows) / len(rows)


def _stderr(rows: Sequence[float]) -> float | None:
    """Standard error of the mean of `rows`, with the sample's own variance; None where they are one or all alike."""
    if min(rows) == max(rows):
        return None
    mean = _mean(rows)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in rows) / (len(rows) - 1) / len(rows))


def difference(a: TaskScore, b: TaskScore) -> Difference | None:
    """b minus a, paired by row. None where the two were not measured on equally many rows with the same shots."""
    if (a.task, a.n, a.shots) != (b.task, b.n, b.shots):
        return None
    steps = [y - x for x, y in zip(a.rows, b.rows, strict=True)]
    return Difference(_mean(steps), _stderr(steps), len(steps))


def comparable(a: Leaderboard, b: Leaderboard) -> bool:
    """Whether the two were measured on the same rows: the same local files, or both from the Hub; the same limit."""
    return a.data == b.data and a.limit == b.limit


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
    tick: Callable[[TaskScore], None] = lambda _: None,
) -> Leaderboard:
    """Measure a checkpoint on the leaderboard's tasks; the whole model is loaded on `device` in `dtype`.

    data: folder of local rows (see lm_tasks); None takes them from the Hub. limit: the first rows of each task only
    (of each subject for MMLU), for a quick look: such numbers are not the leaderboard's. dtype "auto" is the
    checkpoint's own. No chat template is applied, as on the leaderboard. `tick` is called after each task.
    Raises UsageError without lm-eval or for unknown tasks, NumericalError where the model's likelihoods are not finite.
    """
    build_causal(checkpoint)
    chosen = choose_tasks(tasks)
    if not chosen:
        raise UsageError(f"no task was named; try --tasks {','.join(TASKS)}")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} scores nothing; try --limit 20")
    if data is not None and not data.is_dir():
        raise UsageError(f"--data {data} is not a directory; try the one that holds {chosen[0].file}")
    require_lm_eval()
    packaged = Path(_lm_eval("tasks").__path__[0])
    hashes: dict[str, str] = {}
    scores: list[TaskScore] = []
    with tempfile.TemporaryDirectory(prefix="laser-tasks-") as folder:
        # All task files before the model is loaded: a missing file shows at once and not after hours.
        names: dict[str, list[str]] = {}
        for task in chosen:
            names[task.name], used = write_tasks(task, packaged, Path(folder, task.name), data)
            hashes |= used
        model = _load(checkpoint, device, dtype, batch_size)
        for task in chosen:
            scores.append(_measure(model, task, Path(folder, task.name), names[task.name], limit))
            tick(scores[-1])
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
        versions={name: version(name) for name in ("lm-eval", "transformers", "torch", "datasets")},
        command=command,
    )


NEEDED = ("lm_eval", "accelerate")


def lm_eval_is_here() -> bool:
    """Whether lm-eval and its model backend are installed."""
    return all(importlib.util.find_spec(module) is not None for module in NEEDED)


def require_lm_eval() -> None:
    """Raises UsageError unless lm-eval and its model backend are installed."""
    if not lm_eval_is_here():
        raise UsageError(f"the leaderboard needs {' and '.join(NEEDED)}; try pip install 'laser-rmt[eval]'")


def _lm_eval(module: str) -> Any:
    """A module of lm-eval, imported when met. Untyped: its decorators hide its signatures from a type checker, which
    moreover must pass where lm-eval is not installed."""
    return importlib.import_module(f"lm_eval.{module}")


def _load(checkpoint: Checkpoint, device: str, dtype: str, batch_size: int) -> Any:
    """The checkpoint's weights and tokenizer as lm-eval takes them.

    Loaded here and not by lm-eval, which would let transformers fill a missing tensor with random numbers.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(checkpoint.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
        model, info = loaded
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().partition("\n")[0]
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
    return backend.HFLM(pretrained=model.to(device).eval(), tokenizer=tokenizer, batch_size=batch_size)


def _measure(model: Any, task: Task, folder: Path, names: list[str], limit: int | None) -> TaskScore:
    """Run the task's files in `folder` and pool their rows."""
    # Without the packaged index: reading its thousands of files takes longer than a small task.
    loaded = _lm_eval("tasks").TaskManager(include_path=str(folder), include_defaults=False).load(names)
    for each in loaded["tasks"].values():
        each.set_fewshot_seed(seed=SEED)
    result = _lm_eval("evaluator").evaluate(lm=model, task_dict=loaded, limit=limit, log_samples=True)
    if result is None:
        raise UsageError("lm-eval returned nothing: this is not its first process; run without a launcher")
    metric, _, picked = task.key.partition(",")
    rows: list[float] = []
    for name in names:
        samples = [s for s in result["samples"][name] if s["filter"] == picked]
        for sample in samples:
            _check_finite(sample, name)
        rows += [float(sample[metric]) for sample in samples]
    mean = _mean(rows)
    if len(names) == 1:
        expected = float(result["results"][names[0]][task.key])
        assert abs(expected - mean) < 1e-9, f"{task.name}: the rows average to {mean}, lm-eval says {expected}"
    return TaskScore(task.name, task.metric, mean, _stderr(rows), len(rows), task.shots, tuple(rows))


def _check_finite(sample: Mapping[str, Any], name: str) -> None:
    """NaN likelihoods would be scored like any others: the first choice would simply win."""
    for response in sample["filtered_resps"]:
        if isinstance(response, (tuple, list)) and math.isnan(float(response[0])):
            raise NumericalError(
                f"{name}, row {sample['doc_id']}: the model's log-likelihood is NaN; "
                "try --dtype float32, and `laser verify` on the model"
            )
