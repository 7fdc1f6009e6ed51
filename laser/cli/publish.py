"""The verbs after the flow: leaderboard (measure on tasks) and card (describe). Each parses, calls and prints."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from laser.checkpoint.push import push as push_directory
from laser.checkpoint.reader import OUTCOME, Checkpoint, open_checkpoint
from laser.cli import common, memory, options
from laser.cli.common import say
from laser.cli.estimates import board_measuring, measuring_line
from laser.cli.progress import Bar, Checking
from laser.differences.opened import open_model
from laser.errors import RecordError, UsageError
from laser.evaluation.leaderboard import Leaderboard, require_leaderboard, require_request, run_leaderboard
from laser.evaluation.lm_tasks import TASKS
from laser.files import tidy_up, unfinished
from laser.outcome import Outcome
from laser.records import agree, fingerprint_in
from laser.report.comparison import ComparisonRow, leaderboard_rows
from laser.report.publish import CARD, LEADERBOARD, LEADERBOARD_SOURCE, SOURCE_FILE, require_shards, write_card


def leaderboard_verb(
    model: str,
    *,
    output: Path | None,
    rows: options.Rows,
    on: options.OneDevice,
    dtype: str,
    batch_size: int,
    work: options.WorkOptions,
) -> None:
    """`laser leaderboard`, whose arguments and help are in verbs.py."""
    request = rows.request()
    require_request(**request)
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise UsageError(f"unknown --dtype {dtype!r}; try auto, float32, bfloat16 or float16")
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size} holds no row; try 1")
    where = on.choose()
    if output is not None:
        work.claim(output, "leaderboard")
    checkpoint = open_model(model, "files" if work.dry_run else "weights")
    if output is None:
        if not (checkpoint.path / OUTCOME).is_file():
            raise UsageError(
                f"{model} was not written by laser, and a source is never written to; try -o FILE, or "
                "-o OUT/laser/leaderboard-source.json, where the card of OUT looks for it"
            )
        output = checkpoint.path / LEADERBOARD
        work.claim(output, "leaderboard")
    workload = require_leaderboard(checkpoint, **request, counted=work.dry_run)
    placed = memory.for_leaderboard(checkpoint, where, dtype, batch_size)
    if workload is not None:
        estimate = board_measuring(checkpoint, workload, placed, where, models=1)
        return common.print_json({estimate.what: asdict(estimate)}) if work.as_json else say(measuring_line(estimate))
    board = _measure_tasks(
        checkpoint, output, where.name, **request, dtype=dtype, batch_size=batch_size, anew=work.force
    )
    compared = _against_source(checkpoint, output, board)
    if work.as_json:
        against = {"against_source": [asdict(row) for row in compared]} if compared else {}
        common.print_json(_board_document(board) | against | {"output": str(output)})
        return
    common.print_table(
        ("task", "metric", "shots", "rows", "value", "standard error"),
        [(s.task, s.metric, s.shots, s.n, s.value, s.stderr) for s in board.scores]
        + [("average", "", "", "", board.average, board.average_stderr)],
    )
    for s in board.scores:
        if s.undefined:
            say(f"{s.task}: {s.undefined} of {s.n} rows count 0, for no answer has any probability (0/0)")
    if rows.limit is not None:
        say(f"only the first {rows.limit} rows of each task: a smoke test, not a leaderboard result")
    if compared:
        common.print_table(
            ("", "source", "this model", "change", "verdict"),
            [(row.what, row.before, row.after, row.change, row.verdict) for row in compared],
        )
    say(f"written to {output}")


def _against_source(checkpoint: Checkpoint, output: Path, board: Leaderboard) -> list[ComparisonRow]:
    """The lines that the card will have, where the record of an output's source lies beside that of the output."""
    source = checkpoint.path / LEADERBOARD_SOURCE
    if output.resolve() != (checkpoint.path / LEADERBOARD).resolve() or not source.is_file():
        return []
    before = Leaderboard.load(source)
    made_of = Outcome.load(checkpoint.path).plan.model
    if before.identity != made_of.identity or not agree(fingerprint_in(before.weights), made_of.weights):
        return []  # the card refuses it, and says so
    return leaderboard_rows(before, board)


def leaderboards(checkpoint: Checkpoint, out: Path, name: str, device: str, request: Mapping[str, Any]) -> None:
    """Source and result of a run on the same rows, each into its record, where the card looks for them.

    `name` is what the result in `out` will be called; request: of BoardOptions.

    A result in which nothing was reduced has the source's weights, byte for byte, and so its scores: hours of a large
    model are not spent on measuring them twice.
    """
    board = _measure_tasks(checkpoint, out / LEADERBOARD_SOURCE, device, **request, again=True)
    result = open_checkpoint(out)
    if Outcome.load(out).plan.reductions:
        _measure_tasks(result, out / LEADERBOARD, device, **request, name=name, again=True)
    else:
        weights = result.fingerprint.stated()
        replace(board, model=name, identity=result.identity, weights=weights).save(out / LEADERBOARD)


def _measure_tasks(
    checkpoint: Checkpoint,
    output: Path,
    device: str,
    tasks: tuple[str, ...] | None = None,
    limit: int | None = None,
    data: Path | None = None,
    dtype: str = "auto",
    batch_size: int = 1,
    anew: bool = False,
    name: str | None = None,
    again: bool = False,
) -> Leaderboard:
    """Measures, and saves the record in `output`. With `again` a record of the same that lies there is believed."""
    # As it is published, the command names no folder of this machine.
    words = ["laser", "leaderboard", name or checkpoint.name, "-o", output.name, "--device", device]
    given = {
        "--tasks": ",".join(tasks) if tasks else None,
        "--limit": limit,
        "--data": data.resolve().name if data else None,
        "--dtype": dtype if dtype != "auto" else None,
        "--batch-size": batch_size if batch_size != 1 else None,
    }
    for flag, value in given.items():
        words += [flag, str(value)] if value is not None else []
    with Bar(f"leaderboard {checkpoint.name}", len(tasks or TASKS), unit="tasks") as bar:
        board = run_leaderboard(
            checkpoint, tasks=tasks, limit=limit, data=data, device=device, dtype=dtype, batch_size=batch_size,
            command=shlex.join(words), journal=unfinished(output), anew=anew, known=_there(output) if again else None,
            tick=lambda score: bar.update(now=f"{score.task} measured"),
        )  # fmt: skip
    board = replace(board, model=name or board.model)
    board.save(output)
    tidy_up(unfinished(output), output)
    return board


def _there(output: Path) -> Leaderboard | None:
    """The record that an earlier process has left there, if it is whole."""
    try:
        return Leaderboard.load(output)
    except RecordError:
        return None


def push_verb(
    output: Path,
    repo: str,
    *,
    private: bool,
    revision: str | None,
    shown_as: options.Json,
) -> None:
    """`laser push`, whose arguments and help are in verbs.py."""
    pushed = push_directory(output, repo, private=private, revision=revision)
    if shown_as.as_json:
        return common.print_json({"output": str(output), "repo": repo} | asdict(pushed))
    for names, what in (
        (pushed.replaced, "replaced on the Hub"),
        (pushed.beside, "left on the Hub, as they were there"),
    ):
        if names:
            say(f"{what}: {some(names)}")
    say(f"{output} uploaded to {pushed.address}, commit {pushed.commit[:12]}")


def some(names: Sequence[str]) -> str:
    """A few of them, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def card_verb(
    output: Path,
    *,
    source: str | None,
    name: str | None,
    base_model: str | None,
    hash_source: bool,
    spectra: Path | None,
    file: options.RecordOptions,
) -> None:
    """`laser card`, whose arguments and help are in verbs.py."""
    for record in (SOURCE_FILE, CARD):
        common.to_write(output / record)
    with Checking() as check:
        require_shards(output, check)
    written = write_card(
        output,
        open_model(source, "files") if source is not None else None,
        name=name,
        base_model=base_model,
        hash_source=hash_source,
        spectra=spectra,
        force=file.force,
    )
    if file.as_json:
        return common.print_json({"output": str(written)})
    say(f"written to {written}")


def _board_document(board: Leaderboard) -> dict[str, object]:
    """The record without its rows, which are for pairing and not for reading."""
    scores = [
        {key: getattr(s, key) for key in ("task", "metric", "value", "stderr", "n", "shots", "undefined")}
        for s in board.scores
    ]
    return {"model": board.model, "average": board.average, "average_stderr": board.average_stderr, "scores": scores}
