"""What a search minimises: the loss on a text, or one minus the accuracy on a task. Both give a value per unit.

A unit is a window (weight: its scored tokens) or a question (weight 1); lower is better for both. A task file (.jsonl,
or .json with a list) has rows with `question`, `answer` and, if it is multiple choice, `alternatives` (the wrong
answers). With alternatives a question counts as right when its answer's log-likelihood is above every alternative's:
summed over its tokens, not divided by their number, as in LASER (arXiv 2312.13558). Without, it is right when each
token of the answer is the model's first choice. The answer follows the question after one space, unless either brings
its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from laser.errors import RecordError, UsageError
from laser.evaluation.rows import TextRow, read_content, require_rows, rows_of
from laser.evaluation.streaming import Scores
from laser.evaluation.text import Window, Windows


class Measure(Protocol):
    """Windows to run and how to read their scores."""

    @property
    def windows(self) -> Sequence[Window]: ...
    def values(self, scores: Scores) -> list[float]: ...


class Objective(Measure, Protocol):
    """A measure with a name: a value per unit, the units' weights, and what text they are of."""

    @property
    def weights(self) -> tuple[int, ...]: ...
    @property
    def name(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def asked(self) -> int | None: ...
    def part(self, start: int, stop: int) -> Objective:
        """Of some of its units."""
        ...


@dataclass(frozen=True)
class Loss:
    """Nats per token of each window."""

    windows_of_text: Windows
    name: str = "loss"
    unit: str = "nats per token"

    @property
    def windows(self) -> Sequence[Window]:
        return self.windows_of_text.windows

    @property
    def weights(self) -> tuple[int, ...]:
        return tuple(w.scored for w in self.windows_of_text.windows)

    @property
    def text(self) -> str:
        return self.windows_of_text.text

    @property
    def sha256(self) -> str:
        return self.windows_of_text.sha256

    @property
    def asked(self) -> int | None:
        return self.windows_of_text.asked

    def values(self, scores: Scores) -> list[float]:
        return [s / n for s, n in zip(scores.sums, self.weights, strict=True)]

    def part(self, start: int, stop: int) -> Loss:
        return replace(self, windows_of_text=replace(self.windows_of_text, windows=self.windows[start:stop]))


@dataclass(frozen=True)
class Accuracy:
    """1 where a question is answered wrongly. `groups[q]` is how many windows question q has, its answer's first."""

    windows: tuple[Window, ...]
    groups: tuple[int, ...]
    text: str
    name: str = "accuracy"
    unit: str = "share of wrong answers"
    asked: int | None = None  # questions that were asked for; None: all

    @property
    def weights(self) -> tuple[int, ...]:
        return (1,) * len(self.groups)

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256(repr(self.groups).encode())
        for window in self.windows:
            digest.update(f"{len(window.tokens)} {window.scored} ".encode() + window.tokens.astype("<i8").tobytes())
        return digest.hexdigest()

    def part(self, start: int, stop: int) -> Accuracy:
        at = sum(self.groups[:start])
        windows = self.windows[at : at + sum(self.groups[start:stop])]
        return replace(self, windows=windows, groups=self.groups[start:stop])

    def values(self, scores: Scores) -> list[float]:
        values, at = [], 0
        for size in self.groups:
            sums = scores.sums[at : at + size]
            if not np.isfinite(sums).all():
                values.append(float("nan"))
            elif size == 1:
                values.append(float(not scores.greedy[at]))
            else:  # not <=: a tie with a wrong answer is no right answer
                values.append(float(not sums[0] < min(sums[1:])))
            at += size
        return values


def read_task(path: str | Path, tokenizer: Any, *, limit: int | None = None, skip: int = 0) -> Accuracy:
    """Questions of a file of JSON rows as windows: BOS where there is one, question, answer; only the answer is scored.

    At most `limit` of them, after the first `skip`; None: all. Raises RecordError for a file or row that is not as the
    module's docstring says, naming the line, and UsageError for another kind of file or where nothing is left.
    """
    path = Path(path)
    if skip < 0 or (limit is not None and limit < 1):
        raise UsageError(f"found skip {skip} and limit {limit}; try a limit of 1 or more, and a skip of 0 or more")
    require_rows(path, "--task")
    rows = rows_of(path, read_content(path, "task", "try --task with a .jsonl file").text)
    chosen = rows[skip : None if limit is None else skip + limit]
    if not chosen:
        raise UsageError(f"{path.name} has {len(rows)} questions; nothing is left after {skip}")
    windows: list[Window] = []
    groups = []
    for row in chosen:
        question, answers = _question(row)
        windows += [_window(question, answer, tokenizer, row.where) for answer in answers]
        groups.append(len(answers))
    return Accuracy(tuple(windows), tuple(groups), path.name, asked=limit)


def _question(row: TextRow) -> tuple[str, list[str]]:
    found = row.entries
    question, answer, others = found.get("question"), found.get("answer"), found.get("alternatives", [])
    texts = isinstance(others, list) and all(isinstance(t, str) and t for t in (question, answer, *others))
    if not texts:
        raise RecordError(
            f"{row.where}: found {', '.join(found) or 'no field'}, expected texts `question` and `answer` and, for "
            "multiple choice, a list of texts `alternatives`, none of them empty; mend the line"
        )
    if answer in others:
        raise RecordError(f"{row.where}: the answer {answer!r} is among the alternatives; remove it there")
    return str(question), [str(answer), *others]


def _window(question: str, answer: str, tokenizer: Any, where: str) -> Window:
    apart = question[-1].isspace() or answer[0].isspace()
    whole = tokenizer(question + ("" if apart else " ") + answer, add_special_tokens=False, verbose=False)["input_ids"]
    # The question alone, without its last space: tokenizers glue a space to the word that follows it.
    before = tokenizer(question.rstrip(), add_special_tokens=False, verbose=False)["input_ids"]
    prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    scored = len(whole) - len(before)
    if scored < 1 or len(prefix) + len(before) < 1:
        raise RecordError(f"{where}: answer {answer!r} adds no token to its question; mend the line")
    return Window(np.asarray(prefix + whole, dtype=np.int64), scored)
