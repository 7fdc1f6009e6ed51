"""The verb eval: parse, call and print."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from laser.checkpoint.reader import Checkpoint
from laser.cli import common, memory, options
from laser.cli.common import say
from laser.cli.progress import Bar
from laser.differences.opened import open_model
from laser.errors import UsageError
from laser.evaluation.evaluate import check_evaluation, evaluate
from laser.evaluation.layout import NotByLayers
from laser.evaluation.perplexity import Perplexity, asked_of, difference, require_same_tokens
from laser.evaluation.placement import Placement
from laser.evaluation.streaming import require_dtype
from laser.evaluation.text import Windows


def eval_verb(
    model: str,
    other: str | None,
    *,
    output: Path | None,
    text: options.WindowOptions,
    mode: str,
    no_bos: bool,
    stream: bool | None,
    dtype: str,
    on: options.OneDevice,
    record: options.RecordOptions,
) -> None:
    """`laser eval`, whose arguments and help are in verbs.py."""
    if output is not None:
        if other is not None:
            raise UsageError(
                "one record is written per model; try laser eval MODEL -o FILE for each, then compare them"
            )
        record.claim(output, "eval")
    text.check(mode)
    require_dtype(dtype)
    where, read = on.choose(), text.read()

    def ready(name: str) -> Perplexity | tuple[Checkpoint, Windows]:
        if Path(name).suffix.lower() == ".json":
            return Perplexity.load(Path(name))
        checkpoint = open_model(name, "weights")
        return checkpoint, text.cut(read, checkpoint, bos=False if no_bos else None, mode=mode)

    def measure(checkpoint: Checkpoint, windows: Windows, placed: Placement) -> Perplexity:
        try:
            unit = "layers" if placed.stream or checkpoint.remade else "windows"
            with Bar(f"eval {checkpoint.name}", unit=unit) as bar:
                return evaluate(
                    checkpoint, windows, stream=placed.stream, dtype=dtype, device=where.torch_device,
                    store=placed.store(), tick=lambda: bar.update(), expect=bar.expect,
                )  # fmt: skip
        except NotByLayers as error:
            if stream is None:  # it was memory that asked for it
                raise memory.cannot_stream(checkpoint, windows.windows, where, dtype, error) from error
            raise

    both = [ready(name) for name in (model, other) if name is not None]
    if len(both) == 2:  # before the first is measured
        asked = [(x.model, asked_of(x)) if isinstance(x, Perplexity) else (x[0].name, asked_of(x[1])) for x in both]
        require_same_tokens(*asked)
    todo: list[Perplexity | tuple[Checkpoint, Windows, Placement]] = []
    for x in both:
        if isinstance(x, Perplexity):
            todo.append(x)
        else:
            check_evaluation(*x)
            todo.append((*x, memory.said(memory.for_eval(x[0], x[1].windows, where, dtype, stream))))
    records = [x if isinstance(x, Perplexity) else measure(*x) for x in todo]
    if output is not None:
        records[0].save(output)
    compared = difference(records[0], records[1]) if len(records) == 2 else None
    if record.as_json:
        document: dict[str, Any] = {"evaluations": [_eval_document(r) for r in records]}
        return common.print_json(document | ({"difference": asdict(compared)} if compared else {}))
    common.print_table(
        ("model", "perplexity", "±", "nats per token", "±", "bits per byte", "tokens", "windows"),
        [
            (
                r.model,
                r.perplexity,
                None if r.standard_error is None else r.perplexity * r.standard_error,
                digits(r.nll),
                digits(r.standard_error),
                r.bits_per_byte,
                r.tokens,
                r.windows,
            )
            for r in records
        ],
    )
    if compared:
        say(
            f"{records[1].model} - {records[0].model}: {compared.nll:+.5f} ± {digits(compared.standard_error)} nats "
            f"per token, paired over {compared.windows} windows: {compared.verdict}"
        )
    first = records[0]
    bos = "with BOS" if first.bos else "without BOS"
    say(f"{first.text} (sha256 {first.text_sha256[:12]}), {first.mode} of {first.window} tokens {bos}, {first.dtype}")
    if message := fewer(first.text, first.windows, first.asked):
        say(message)
    if output is not None:
        say(f"written to {output}")


def fewer(text: str, found: int, asked: int | None, what: str = "windows") -> str | None:
    """A line for people where a text gave fewer windows than were asked for, or a task fewer questions."""
    if asked is None or found >= asked:
        return None
    return f"only {found} of the {asked} {what} that were asked for: {text} has no more"


def _eval_document(record: Perplexity) -> dict[str, Any]:
    perplexity = record.perplexity if record.nll < 709 else None  # strict JSON has no infinity
    return asdict(record) | {"perplexity": perplexity, "bits_per_byte": record.bits_per_byte}


def digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"
