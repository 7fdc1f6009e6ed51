"""The verbs that measure: eval and search. Each parses, calls and prints."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from laser.checkpoint.families import list_matrices
from laser.checkpoint.reader import Checkpoint, open_checkpoint
from laser.cli import common
from laser.errors import UsageError
from laser.evaluation.evaluate import check_vocabulary, evaluate
from laser.evaluation.objective import Loss, Objective, read_task
from laser.evaluation.perplexity import Perplexity, difference
from laser.evaluation.streaming import LayeredModel
from laser.evaluation.text import WINDOW, Text, cut_windows, dataset_text, default_text, load_tokenizer, read_text
from laser.flow import scan_into
from laser.search import Report, SearchResult, Trial, result_document
from laser.search import search as search_plan
from laser.spectra import Spectra
from laser.spectral.devices import choose_device
from laser.spectral.rules import RULES
from laser.trials import ACCEPT

TextFile = Annotated[Path | None, typer.Option("--text", help="A .txt or .jsonl file; default: Python's pydoc topics.")]
Field = Annotated[str | None, typer.Option("--field", help="The field of a .jsonl file, or of a dataset.")]
Dataset = Annotated[
    str | None, typer.Option("--dataset", help="NAME[,CONFIG[,SPLIT]] through the library `datasets`; split: test.")
]
WindowLength = Annotated[int, typer.Option("--window", help="Tokens per window, BOS included.")]
Stream = Annotated[bool, typer.Option("--stream", help="Layer by layer from disk: one layer's weights in memory.")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32 or bfloat16, for weights and activations.")]


def eval(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory, Hub id, or its eval.json.")],
    other: Annotated[str | None, typer.Argument(metavar="[OTHER]", help="Compare this one with MODEL.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The record to write, eval.json.")] = None,
    text: TextFile = None,
    field: Field = None,
    dataset: Dataset = None,
    window: WindowLength = WINDOW,
    windows: Annotated[int, typer.Option("--windows", help="How many windows, from the front; 0: all.")] = 32,
    skip: Annotated[int, typer.Option("--skip", help="Leave out the first N windows.")] = 0,
    mode: Annotated[str, typer.Option("--mode", help="windows, or rolling as lm-eval does.")] = "windows",
    no_bos: Annotated[bool, typer.Option("--no-bos", help="No BOS at the start of a window.")] = False,
    stream: Stream = False,
    dtype: Dtype = "float32",
    device: common.DeviceName = "auto",
    force: common.Force = False,
    as_json: common.Json = False,
) -> None:
    """Measure perplexity with its standard error; with two models, their paired difference on the same tokens."""
    if output is not None:
        if other is not None:
            raise UsageError(
                "one record is written per model; try laser eval MODEL -o FILE for each, then compare them"
            )
        common.refuse_to_overwrite(output, force)
    read = _text(text, field, dataset)
    where = choose_device(device).torch_device

    def measure(name: str) -> Perplexity:
        if Path(name).suffix == ".json":
            return Perplexity.load(Path(name))
        checkpoint = open_checkpoint(name)
        cut = cut_windows(
            read,
            load_tokenizer(checkpoint.path),
            length=window,
            limit=windows or None,
            skip=skip,
            bos=False if no_bos else None,
            mode=mode,
        )
        with tqdm(desc=f"eval {checkpoint.name}", disable=None, leave=False) as bar:
            return evaluate(checkpoint, cut, stream=stream, dtype=dtype, device=where, tick=lambda: _advance(bar))

    records = [measure(name) for name in (model, other) if name is not None]
    if output is not None:
        records[0].save(output)
    compared = difference(records[0], records[1]) if len(records) == 2 else None
    if as_json:
        document: dict[str, Any] = {"evaluations": [_document(r) for r in records]}
        return common.print_json(document | ({"difference": asdict(compared)} if compared else {}))
    common.print_table(
        ("model", "perplexity", "±", "nats per token", "±", "bits per byte", "tokens", "windows"),
        [
            (
                r.model,
                r.perplexity,
                None if r.standard_error is None else r.perplexity * r.standard_error,
                _digits(r.nll),
                _digits(r.standard_error),
                r.bits_per_byte,
                r.tokens,
                r.windows,
            )
            for r in records
        ],
    )
    if compared:
        print(
            f"{records[1].model} - {records[0].model}: {compared.nll:+.5f} ± {_digits(compared.standard_error)} nats "
            f"per token, paired over {compared.windows} windows: {compared.verdict}"
        )
    first = records[0]
    bos = "with BOS" if first.bos else "without BOS"
    print(f"{first.text} (sha256 {first.text_sha256[:12]}), {first.mode} of {first.window} tokens {bos}, {first.dtype}")
    if output is not None:
        print(f"written to {output}")


def search(
    model: common.Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="The plan to write.")],
    spectra: Annotated[
        Path | None,
        typer.Option(
            "--spectra", help="File of laser scan, made if absent; default: spectra.safetensors beside the plan."
        ),
    ] = None,
    rules: Annotated[str, typer.Option("--rules", help=f"One or more, with commas: {', '.join(RULES)}.")] = "laser-rmt",
    lowest_snr: Annotated[
        int | None,
        typer.Option("--lowest-snr", help="Try the K matrices of lowest SNR; 0: all. Default: 15, as LaserRMT does."),
    ] = None,
    shortlist: Annotated[
        str | None, typer.Option("--shortlist", help="gradient:K, the K that a backward pass says help most.")
    ] = None,
    grid: Annotated[
        str | None, typer.Option("--grid", help="LASER's grid: RULE:ARGUMENT,ARGUMENT,.. per layer and role.")
    ] = None,
    accept: Annotated[str, typer.Option("--accept", help=f"Which edits to keep: {', '.join(ACCEPT)}.")] = "better",
    order: Annotated[str, typer.Option("--order", help="layers (last first, fast) or snr (as published).")] = "layers",
    objective: Annotated[str, typer.Option("--objective", help="loss, or accuracy on --task.")] = "loss",
    task: Annotated[Path | None, typer.Option("--task", help=".jsonl: question, answer[, alternatives].")] = None,
    text: TextFile = None,
    field: Field = None,
    dataset: Dataset = None,
    held_out: Annotated[
        Path | None, typer.Option("--held-out", help="Text to report on; default: what follows the calibration.")
    ] = None,
    window: WindowLength = WINDOW,
    windows: Annotated[int, typer.Option("--windows", help="Calibration windows, or questions of the task.")] = 16,
    held_out_windows: Annotated[int, typer.Option("--held-out-windows", help="Windows to report on.")] = 16,
    layers: common.Layers = None,
    roles: common.Roles = None,
    include: common.Include = None,
    exclude: common.Exclude = None,
    stream: Stream = False,
    dtype: Dtype = "float32",
    device: common.DeviceName = "auto",
    precision: common.Precision = "auto",
    journal: Annotated[
        Path | None, typer.Option("--journal", help="Every trial; default: search.jsonl beside the plan.")
    ] = None,
    force: common.Force = False,
    as_json: common.Json = False,
) -> None:
    """Try to reduce one matrix after another, keep what measurably helps, and write that as a plan.

    Interrupted, it keeps every finished trial in the journal; the same command goes on from there. What is reported at
    the end was measured on text that the search did not see.
    """
    common.refuse_to_overwrite(output, force)
    journal = journal or output.with_name("search.jsonl")
    if force:
        journal.unlink(missing_ok=True)
    checkpoint, chosen = open_checkpoint(model), common.selection(layers, roles, include, exclude)
    where = choose_device(device, precision)
    wanted = _grid(grid) if grid else [rule for rule in rules.split(",") if rule]
    tokenizer = load_tokenizer(checkpoint.path)
    calibration, reported = _objectives(
        checkpoint, tokenizer, objective, task, _text(text, field, dataset), held_out, field, window, windows,
        held_out_windows,
    )  # fmt: skip
    spectra = spectra or output.with_name("spectra.safetensors")
    if spectra.exists():  # used as it is and never replaced: it may hold more than this search asks for
        measured = Spectra.load(spectra)
    else:
        scanned = [m for m in list_matrices(checkpoint) if chosen.why_not(m) is None]
        with common.Progress("scan", scanned) as bar:
            measured = scan_into(spectra, checkpoint, chosen, where, "gram", bar)
    with tqdm(desc="search", disable=None, leave=False) as bar:

        def tick(trial: Trial, to_come: int) -> None:
            bar.total = bar.n + 1 + to_come
            bar.set_postfix_str(f"{trial.label} {trial.told()} {'kept' if trial.accepted else ''}", refresh=False)
            bar.update()

        result = search_plan(
            LayeredModel(checkpoint, dtype=dtype, device=where.torch_device, resident=not stream),
            measured,
            wanted,
            calibration,
            reported,
            selection=chosen,
            lowest_snr=(15 if lowest_snr is None and not (grid or shortlist) else lowest_snr) or None,
            shortlist=_shortlist(shortlist),
            grid=grid is not None,
            accept=accept,
            order=order,
            device=where,
            journal=journal,
            tick=tick,
        )
    result.plan.save(output)
    if as_json:
        return common.print_json(result_document(result) | {"output": str(output), "journal": str(journal)})
    _print_search(result)
    print(f"written to {output}; every trial is in {journal}")


def _text(path: Path | None, field: str | None, dataset: str | None) -> Text:
    if path is not None and dataset is not None:
        raise UsageError("found both --text and --dataset; try one of them")
    if dataset is not None:
        name, *rest = dataset.split(",")
        config = rest[0] if rest and rest[0] else None
        return dataset_text(name, config, rest[1] if len(rest) > 1 else "test", field or "text")
    return default_text() if path is None else read_text(path, field)


def _objectives(
    checkpoint: Checkpoint,
    tokenizer: Any,
    objective: str,
    task: Path | None,
    text: Text,
    held_out: Path | None,
    field: str | None,
    window: int,
    windows: int,
    held_out_windows: int,
) -> tuple[Objective, list[Objective]]:
    """What is minimised, and what is reported: other text, and for a task its later questions too."""
    if objective not in ("loss", "accuracy") or (objective == "accuracy") != (task is not None):
        raise UsageError(
            f"found --objective {objective} and --task {task}; try --objective accuracy --task FILE.jsonl, or neither"
        )
    calibration = cut_windows(text, tokenizer, length=window, limit=windows)
    check_vocabulary(checkpoint, calibration)
    other = text if held_out is None else read_text(held_out, field if held_out.suffix == ".jsonl" else None)
    skip = windows if held_out is None else 0
    cut = cut_windows(other, tokenizer, length=window, limit=held_out_windows, skip=skip)
    check_vocabulary(checkpoint, cut)
    if task is None:
        return Loss(calibration), [Loss(cut)]
    later = read_task(task, tokenizer, limit=held_out_windows, skip=windows)
    return read_task(task, tokenizer, limit=windows), [later, Loss(cut)]


def _grid(text: str) -> list[str]:
    """`fraction:0.9,0.6` to its rules. Raises UsageError without arguments; rules check the rest."""
    name, _, arguments = text.partition(":")
    found = [f"{name}:{argument}" for argument in arguments.split(",") if argument]
    if not found:
        raise UsageError(f"the grid {text!r} has no cells; try --grid fraction:0.9,0.6,0.2,0.1,0.05,0.01")
    return found


def _shortlist(text: str | None) -> int | None:
    if text is None:
        return None
    name, _, count = text.partition(":")
    if name != "gradient" or not (count or "15").isdecimal():
        raise UsageError(f"no shortlist is called {text!r}; try --shortlist gradient:15")
    return int(count or 15)  # as many as LaserRMT takes by SNR


def _document(record: Perplexity) -> dict[str, Any]:
    perplexity = record.perplexity if record.nll < 709 else None  # strict JSON has no infinity
    return asdict(record) | {"perplexity": perplexity, "bits_per_byte": record.bits_per_byte}


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"


def _advance(bar: Any) -> None:
    bar.update()


def _print_search(result: SearchResult) -> None:
    """The decisions, one row per trial, then what the whole plan did to seen and unseen text."""
    rows = []
    for t in result.trials:
        kept = all(
            name in result.plan.reductions and result.plan.reductions[name].rank == r for name, r in t.ranks.items()
        )
        decision = "rejected" if not t.accepted else "kept" if kept and not t.alone else "accepted"
        rank = next(iter(t.ranks.values()))
        change = "not finite" if t.d is None else f"{t.d:+.5f}"
        rows.append((t.label, t.rule, rank, change, _digits(t.se), decision, f"{t.seconds:.1f}"))
    common.print_table(("candidate", "rule", "rank", "change", "±", "decision", "s"), rows)
    for what, report in (("calibration", result.calibration), *(("held out", r) for r in result.held_out)):
        print(f"{what}: {_told(report)}")
    if result.rank_correlation is not None:
        print(f"gradient's order against the measured one: Spearman {result.rank_correlation:+.2f}")
    if not result.plan.reductions:
        print("nothing was kept: no reduction that was tried makes this model better")


def _told(report: Report) -> str:
    before, after, d = (_digits(x) if x is not None else "not finite" for x in (report.before, report.after, report.d))
    return (
        f"{report.objective} on {report.text}, {report.units} units: {before} ± {_digits(report.before_se)} before, "
        f"{after} ± {_digits(report.after_se)} after, change {d} ± {_digits(report.se)} {report.unit}"
    )
