"""What every verb takes, with its help: the arguments and options of all verbs, and which file does their work.

A verb's file is imported when the verb is called. So help and a mistyped option cost no import of torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from laser.choices import OF_DIFFERENCES, ROUNDS, WINDOW
from laser.cli import options
from laser.cli.complete import one_of, several_of
from laser.cli.recipe import follow, packaged
from laser.report.plots import QUANTITIES
from laser.spectral.rules import RULES, TESTED
from laser.start import loading


def info(model: options.Model, *, shown_as: options.Json) -> None:
    """Say what a model holds: layers, experts, roles, shapes, bytes. Reads headers only, also of a model on the Hub."""
    with loading():
        from laser.cli import look
    look.info_verb(model, shown_as=shown_as)


ON_TEXT = options.WindowOptions.title


def scan(
    model: options.Model,
    *,
    output: options.SpectraOut = None,
    which: options.Matrices,
    compute: options.ComputeOptions,
    null: options.NullDraws = 0,
    moments: options.Inputs,
    parts: options.PartOption,
    work: options.WorkOptions,
) -> None:
    """Measure the singular values of every selected matrix and write them to one small file.

    Interrupted, it keeps what it has in OUTPUT.partial; the same command goes on from there.
    """
    with loading():
        from laser.cli import flow
    flow.scan_verb(
        model, output=output, which=which, compute=compute, null=null, moments=moments, parts=parts, work=work
    )


def plan(
    spectra: options.SpectraFile,
    *,
    output: options.Output,
    how: options.RuleOptions,
    lowest: options.Lowest,
    fewest_tokens: Annotated[
        int | None,
        typer.Option("--fewest-tokens", help="Keep a matrix that saw fewer inputs; default: its smaller side."),
    ] = None,
    which: options.Matrices,
    record: options.RecordOptions,
) -> None:
    """Apply a rule to the spectra: a line for every tensor, to reduce or to keep, and why."""
    with loading():
        from laser.cli import flow
    flow.plan_verb(
        spectra, output=output, how=how, lowest=lowest, fewest_tokens=fewest_tokens, which=which, record=record
    )


def reduce(
    model: options.Model,
    plan: Annotated[
        Path | None, typer.Argument(metavar="PLAN", help="File written by laser plan; not needed with --base.")
    ] = None,
    *,
    output: options.Output,
    base: options.FromBase,
    rule: Annotated[
        str | None,
        typer.Option(
            "--rule",
            help="With --base and no PLAN: by which rule; default: rounding.",
            autocompletion=options.a_rule,
        ),
    ] = None,
    scale: Annotated[
        float | None, typer.Option("--scale", help="The same as --rule scale:C: this much of the difference.")
    ] = None,
    compute: options.ComputeOptions,
    moments: options.Inputs,
    fresh: Annotated[
        Path | None, typer.Option("--fresh", help="Moments of another text, to measure what each edit costs there.")
    ] = None,
    evict: Annotated[
        bool, typer.Option("--evict", help="Drop each shard from the Hub's cache once its output is written.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--output-dtype",
            help="bfloat16: an FP8 source without FP8; default: FP8, new scales.",
            autocompletion=one_of(("bfloat16",)),
        ),
    ] = None,
    parts: options.PartOption,
    work: options.Directory,
) -> None:
    """Write the checkpoint that the plan describes. Killed at any moment, --resume goes on without losing a matrix.

    With --base, what is cut or scaled is the difference of a fine-tune from its base. No plan is needed then: every
    matrix is judged as it is visited, by --rule, or multiplied by --scale, as by laser run --no-search.
    """
    with loading():
        from laser.cli import flow
    flow.reduce_verb(
        model,
        plan,
        output=output,
        base=base,
        rule=rule,
        scale=scale,
        compute=compute,
        moments=moments,
        fresh=fresh,
        evict=evict,
        dtype=dtype,
        parts=parts,
        work=work,
    )


def verify(
    model: options.Model,
    output: options.Out,
    *,
    base: options.FromBase,
    where: options.OneDevice,
    moments: options.Inputs,
    shown_as: options.Json,
) -> None:
    """Check on the files that untouched tensors are bit-identical and touched ones are as their plan says.

    With the directory that laser unmerge wrote for MODEL: that OUT is the fine-tune, by the sha256 of every file.
    """
    with loading():
        from laser.cli import flow
    flow.verify_verb(model, output, base=base, where=where, moments=moments, shown_as=shown_as)


def run(
    model: options.Model,
    *,
    output: options.Output,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            is_eager=True,
            callback=follow,
            help=f"{', '.join(packaged())}, or a TOML or YAML file.",
            autocompletion=one_of(packaged()),
        ),
    ] = None,
    base: options.FromBase,
    how: options.RuleOptions,
    moments: options.Inputs,
    lowest: options.Lowest,
    which: options.Matrices,
    search: Annotated[
        bool | None, typer.Option("--search/--no-search", help="Keep only edits that help; default without a recipe.")
    ] = None,
    trials: options.Trials,
    text: options.SearchText,
    stream: options.Stream = None,
    dtype: options.Dtype = "float32",
    leaderboard: Annotated[
        bool | None, typer.Option("--leaderboard/--no-leaderboard", help="Six tasks; default with --search.")
    ] = None,
    rows: options.Rows,
    compute: options.ComputeOptions,
    part: Annotated[str | None, typer.Option("--part", hidden=True)] = None,
    work: options.Directory,
) -> None:
    """Scan, search or plan, reduce, and write the card: by a recipe or by flags, which win over the recipe.

    Without a recipe nothing is cut unmeasured: candidates are tried one at a time and kept only if the model gets
    better. A recipe is followed as it stands. With --search its candidates are tried in the same way, and the six tasks
    of the leaderboard are run on source and result, where lm-eval is installed.
    """
    with loading():
        from laser.cli import run
    run.run_verb(
        model,
        output=output,
        recipe=recipe,
        base=base,
        how=how,
        moments=moments,
        lowest=lowest,
        which=which,
        search=search,
        trials=trials,
        text=text,
        stream=stream,
        dtype=dtype,
        leaderboard=leaderboard,
        rows=rows,
        compute=compute,
        part=part,
        work=work,
    )


def devices(
    *,
    where: options.Precise,
    probe: Annotated[bool, typer.Option("--probe", help="Measure this machine's speed, and keep it.")] = False,
    disk: Annotated[Path, typer.Option("--disk", help="With --probe: a directory on the disk to measure.")] = Path(),
    shown_as: options.Json,
) -> None:
    """Say which device would compute here, in which precision, by which method, and why.

    With --probe, also measure products, eigenvalues, eigenvectors, copies and the disk. The figures are kept in the
    user's cache directory, from where --dry-run takes them. On the host they also choose the routes of eigenproblems,
    which take half a minute to measure.
    """
    with loading():
        from laser.cli import devices
    devices.devices_verb(where=where, probe=probe, disk=disk, shown_as=shown_as)


def eval(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Checkpoint directory, Hub id, BASE+ADAPTER, or its eval.json.")
    ],
    other: Annotated[str | None, typer.Argument(metavar="OTHER", help="Compare this one with MODEL.")] = None,
    *,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The record to write, eval.json.")] = None,
    text: options.WindowOptions,
    mode: Annotated[
        str,
        typer.Option(
            "--mode", help="windows, or rolling as lm-eval does.", autocompletion=one_of(("windows", "rolling"))
        ),
    ] = "windows",
    no_bos: Annotated[
        bool, typer.Option("--no-bos", help="No BOS before a window, nor before a rolling text.")
    ] = False,
    stream: options.Stream = None,
    dtype: options.Dtype = "float32",
    on: options.OneDevice,
    record: options.RecordOptions,
) -> None:
    """Measure perplexity with its standard error; with two models, their paired difference on the same tokens."""
    with loading():
        from laser.cli import measure
    measure.eval_verb(
        model,
        other,
        output=output,
        text=text,
        mode=mode,
        no_bos=no_bos,
        stream=stream,
        dtype=dtype,
        on=on,
        record=record,
    )


def calibrate(
    model: options.Model,
    *,
    output: options.Output,
    text: options.WindowOptions,
    which: options.Matrices,
    diagonal: Annotated[bool, typer.Option("--diagonal", help="Only each input's mean square: cheap, small.")] = False,
    ledoit_wolf: Annotated[bool, typer.Option("--ledoit-wolf", help="Shrink moments of few tokens.")] = False,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Also the gradients at outputs, for laser compensate --bits.")
    ] = False,
    dtype: options.Dtype = "float32",
    on: options.OneDevice,
    record: options.RecordOptions,
) -> None:
    """Run a text through the model layer by layer and keep the second moments of each matrix's inputs.

    One layer's weights are in memory. With --gradients the text is also run back, for which what enters each layer is
    kept, in files beyond 2 GiB. Interrupted, it keeps finished layers in OUTPUT.partial; the same command goes on from
    there.
    """
    with loading():
        from laser.cli import calibrate
    calibrate.calibrate_verb(
        model,
        output=output,
        text=text,
        which=which,
        diagonal=diagonal,
        ledoit_wolf=ledoit_wolf,
        gradients=gradients,
        dtype=dtype,
        on=on,
        record=record,
    )


def search(
    model: options.Model,
    *,
    output: options.Output,
    spectra: Annotated[
        Path | None,
        typer.Option(
            "--spectra", help="File of laser scan, made if absent; default: spectra.safetensors beside the plan."
        ),
    ] = None,
    base: options.FromBase,
    rules: Annotated[
        str | None,
        typer.Option(
            "--rules",
            help=f"One or more, with commas: {', '.join(RULES)}; data:NAME: by --moments. "
            f"Default: laser-rmt; with --base {', '.join(OF_DIFFERENCES)}.",
            autocompletion=several_of(options.SOURCES),
        ),
    ] = None,
    moments: options.Inputs,
    lowest: options.Lowest,
    shortlist: Annotated[
        str | None, typer.Option("--shortlist", metavar="gradient:K", help="The K that a backward pass says help most.")
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option("--grid", metavar="RULE:A,B,..", help="LASER's grid: each of these per layer and role."),
    ] = None,
    trials: options.Trials,
    objective: Annotated[
        str,
        typer.Option("--objective", help="loss, or accuracy on --task.", autocompletion=one_of(("loss", "accuracy"))),
    ] = "loss",
    task: Annotated[
        Path | None, typer.Option("--task", help=".jsonl or .json: question, answer[, alternatives].")
    ] = None,
    text: options.SearchText,
    dataset: options.Dataset,
    which: options.Matrices,
    stream: options.Stream = None,
    dtype: options.Dtype = "float32",
    on: options.Precise,
    journal: Annotated[
        Path | None, typer.Option("--journal", help="Every trial; default: search.jsonl beside the plan.")
    ] = None,
    work: options.WorkOptions,
) -> None:
    """Try to reduce one matrix after another, keep what measurably helps, and write that as a plan.

    With --base a candidate is a role, all its matrices at once, and an edit is a scale or a cut of their differences.

    Interrupted, it keeps every finished trial in the journal; the same command goes on from there. What is reported at
    the end was measured on text that the search did not see.
    """
    with loading():
        from laser.cli import search
    search.search_verb(
        model,
        output=output,
        spectra=spectra,
        base=base,
        rules=rules,
        moments=moments,
        lowest=lowest,
        shortlist=shortlist,
        grid=grid,
        trials=trials,
        objective=objective,
        task=task,
        text=text,
        dataset=dataset,
        which=which,
        stream=stream,
        dtype=dtype,
        on=on,
        journal=journal,
        work=work,
    )


def leaderboard(
    model: options.Model,
    *,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The record to write; for an output of laser, OUT/laser/leaderboard.json."),
    ] = None,
    rows: options.Rows,
    on: options.OneDevice,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            help="auto (as stored), float32, bfloat16 or float16.",
            autocompletion=one_of(("auto", "float32", "bfloat16", "float16")),
        ),
    ] = "auto",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows at a time.")] = 1,
    work: options.WorkOptions,
) -> None:
    """Measure a model on the six tasks of the Open LLM Leaderboard, version 1, through lm-eval.

    Interrupted, it keeps every finished task in OUTPUT.partial; the same command goes on from there.
    """
    with loading():
        from laser.cli import publish
    publish.leaderboard_verb(model, output=output, rows=rows, on=on, dtype=dtype, batch_size=batch_size, work=work)


def card(
    output: options.Out,
    *,
    source: Annotated[
        str | None, typer.Option("--source", help="The model that was reduced: licence, language, id, hashes.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="What the card calls the model; OUT's own name.")] = None,
    base_model: Annotated[str | None, typer.Option("--base-model", help="The source's id on the Hub.")] = None,
    hash_source: Annotated[bool, typer.Option("--hash-source", help="Read the source's shards for sha256.")] = False,
    spectra: options.Scanned = None,
    file: options.RecordOptions,
) -> None:
    """Write OUT/README.md, the model card, from the records in OUT.

    In OUT/laser it looks for eval-source.json and eval.json (laser eval -o), and for leaderboard-source.json and
    leaderboard.json (laser leaderboard -o): what was measured of the source, and of OUT.
    """
    with loading():
        from laser.cli import publish
    publish.card_verb(
        output, source=source, name=name, base_model=base_model, hash_source=hash_source, spectra=spectra, file=file
    )


def push(
    output: options.Out,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="org/name on the Hub, made if it is not there.")],
    *,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="The branch, made if it is not there; default: main.")
    ] = None,
    shown_as: options.Json,
) -> None:
    """Upload a finished output to the Hub, as who `hf auth login` says. Interrupted, the same command goes on.

    It is one commit. Files of others that would be loaded with it are refused; the rest stays, and is named.
    """
    with loading():
        from laser.cli import publish
    publish.push_verb(output, repo, private=private, revision=revision, shown_as=shown_as)


def null(
    model: options.Model,
    *,
    rules: Annotated[
        str,
        typer.Option("--rules", help="Rules to test, with commas between.", autocompletion=several_of(options.SOURCES)),
    ] = ",".join(TESTED),
    permute: Annotated[
        str,
        typer.Option(
            "--permute",
            help="entries, or rows (keeps their variances).",
            autocompletion=one_of(("entries", "rows")),
        ),
    ] = "entries",
    draws: Annotated[int, typer.Option("--draws", help="Permutations of each matrix.")] = 1,
    spectra: options.Scanned = None,
    base: options.FromBase,
    which: options.Matrices,
    on: options.Precise,
    shown_as: options.Json,
) -> None:
    """Permute each matrix's entries, so that no structure is left, and count what each rule still finds: about 0."""
    with loading():
        from laser.cli import look
    look.null_verb(
        model,
        rules=rules,
        permute=permute,
        draws=draws,
        spectra=spectra,
        base=base,
        which=which,
        on=on,
        shown_as=shown_as,
    )


def spectra(
    spectra: options.SpectraFile,
    *,
    rule: Annotated[
        str | None,
        typer.Option(
            "--rule",
            help="Whose cut is shown. Default: mp-edge, and laser-rmt in what others read.",
            autocompletion=options.a_rule,
        ),
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values instead of a table.")] = False,
    snr_json: Annotated[Path | None, typer.Option("--snr-json", help="Write Spectrum's file of scores.")] = None,
    unfrozen: Annotated[
        Path | None, typer.Option("--unfrozen-yaml", help="Write the list of parameters to train, as axolotl reads it.")
    ] = None,
    top_percent: Annotated[float, typer.Option("--top-percent", help="Share of each type in that list.")] = 50.0,
    which: options.Matrices,
    file: options.RecordOptions,
) -> None:
    """List every scanned matrix in numbers: ranks, tail, noise and its fit, what the rule keeps.

    The table ends after 200 matrices; --csv and --json list all.
    """
    with loading():
        from laser.cli import look
    look.spectra_verb(
        spectra,
        rule=rule,
        as_csv=as_csv,
        snr_json=snr_json,
        unfrozen=unfrozen,
        top_percent=top_percent,
        which=which,
        file=file,
    )


def plot(
    spectra: options.SpectraFile,
    *,
    output: options.Output,
    matrix: Annotated[
        str | None, typer.Option("--matrix", help="Histogram of this tensor: a part of its name.")
    ] = None,
    other: Annotated[list[Path] | None, typer.Option("--with", help="Spectra of another model, laid over it.")] = None,
    heat: Annotated[
        str | None,
        typer.Option("--heat", help=f"Heat map of {', '.join(QUANTITIES)}.", autocompletion=one_of(QUANTITIES.keys())),
    ] = None,
    mean: Annotated[bool, typer.Option("--mean", help="Heat map: a column per role, the mean of experts.")] = False,
    rule: options.ShownRule = None,
    which: options.Matrices,
    file: options.Force,
) -> None:
    """Draw a PNG or SVG: a matrix's histogram with the fitted law, two models overlaid, or a heat map of a model."""
    with loading():
        from laser.cli import look
    look.plot_verb(
        spectra, output=output, matrix=matrix, other=other, heat=heat, mean=mean, rule=rule, which=which, file=file
    )


def report(
    spectra: options.SpectraFile,
    *,
    output: options.Output,
    against: Annotated[
        Path | None, typer.Option("--against", help="Spectra of a second model, shown beside: a fine-tune, a result.")
    ] = None,
    rule: options.ShownRule = None,
    which: options.Matrices,
    file: options.Force,
) -> None:
    """Write one HTML page to look at the whole model: heat maps, histograms, table. It needs no network.

    With --against, two models side by side: their maps in one scale, the change, and both histograms of a matrix.
    """
    with loading():
        from laser.cli import look
    look.report_verb(spectra, output=output, against=against, rule=rule, which=which, file=file)


def convert(
    model: Annotated[
        Path, typer.Argument(metavar="SRC", help="Directory in Mistral's release format, or a .gguf file.")
    ],
    *,
    output: options.Output,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--output-dtype",
            help="Of a GGUF file's result: float32, float16, bfloat16; default: its own.",
            autocompletion=one_of(("float32", "float16", "bfloat16")),
        ),
    ] = None,
    shown_as: options.Json,
) -> None:
    """Translate a model into the Hub's format, with the same logits.

    Of one of Mistral's own releases (params.json and consolidated*.safetensors or .pt) the tokenizer files are copied
    byte for byte. A GGUF file is dequantised, and gets the tokenizer that transformers makes of its metadata.
    """
    with loading():
        from laser.cli import convert
    convert.convert_verb(model, output=output, dtype=dtype, shown_as=shown_as)


def delta(
    base: options.BaseModel,
    tuned: options.Tuned,
    *,
    output: options.SpectraOut = None,
    which: options.Matrices,
    compute: options.ComputeOptions,
    null: options.NullDraws = 0,
    work: options.WorkOptions,
) -> None:
    """Say what a fine-tune did to its base: identical, scaled, low rank, full, or not its base; and write the spectra.

    The file holds the spectra of the differences, which spectra, plot, report and plan read. Interrupted, it keeps what
    it has in OUTPUT.partial; the same command goes on from there.
    """
    with loading():
        from laser.cli import delta
    delta.delta_verb(base, tuned, output=output, which=which, compute=compute, null=null, work=work)


def unmerge(
    base: options.BaseModel,
    tuned: options.Tuned,
    *,
    output: options.Output,
    compute: options.ComputeOptions,
    only_lora: Annotated[
        bool,
        typer.Option("--only-lora", help="Refuse what is neither the base's nor an adapter, instead of keeping it."),
    ] = False,
    rounds: Annotated[
        int, typer.Option("--rounds", help="Steps of the solver per matrix and rank, at the most.")
    ] = ROUNDS,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            help="Of the adapter: float32, float16 or bfloat16, and more in the remainder.",
            autocompletion=one_of(("float32", "float16", "bfloat16")),
        ),
    ] = "float32",
    work: options.WorkOptions,
) -> None:
    """Find the adapter that was merged into a fine-tune, so exactly that base and adapter give its bits again.

    What no adapter explains is kept beside it without loss. `laser rebuild` makes the fine-tune again. Interrupted, it
    keeps what it has in OUTPUT.partial; the same command goes on from there.
    """
    with loading():
        from laser.cli import adapters
    adapters.unmerge_verb(
        base, tuned, output=output, compute=compute, only_lora=only_lora, rounds=rounds, dtype=dtype, work=work
    )


def rebuild(
    base: options.BaseModel,
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Directory written by laser unmerge, or of any PEFT LoRA.")
    ],
    *,
    output: options.Output,
    formula: Annotated[
        str | None,
        typer.Option(
            "--formula",
            help="Of another LoRA: once, delta-first or scaled-after; default: as PEFT merges it.",
            autocompletion=one_of(("once", "delta-first", "scaled-after")),
        ),
    ] = None,
    work: options.RecordOptions,
) -> None:
    """Make the fine-tune again from its base and what laser unmerge wrote: every shard byte for byte, or nothing.

    A PEFT LoRA adapter without that record is merged as usual, with one matrix in memory. --force replaces an output
    whose files have the same bytes, or what is left of it.
    """
    with loading():
        from laser.cli import adapters
    adapters.rebuild_verb(base, adapter, output=output, formula=formula, work=work)


def compensate(
    original: options.Original,
    copy: options.Copy,
    *,
    output: options.Output,
    moments: options.Inputs,
    rank: Annotated[int | None, typer.Option("--rank", help="Of every correction; default: 8.")] = None,
    bits: Annotated[
        float | None, typer.Option("--bits", help="Instead: bits per weight in all, spent where they buy most.")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="By the plain norm and no text, for comparison: mostly worse.")
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="File to calibrate on: .txt, .jsonl or .json.", rich_help_panel=ON_TEXT),
    ] = None,
    windows: Annotated[
        int, typer.Option("--windows", help="Windows to calibrate on; 0: all.", rich_help_panel=ON_TEXT)
    ] = 32,
    held_out: Annotated[
        Path | None,
        typer.Option(
            "--held-out", help="Second text, which all three models are measured on.", rich_help_panel=ON_TEXT
        ),
    ] = None,
    held_out_windows: Annotated[
        int, typer.Option("--held-out-windows", help="Windows of it; 0: all.", rich_help_panel=ON_TEXT)
    ] = 32,
    field: Annotated[
        str | None, typer.Option("--field", help="The field of a file of rows.", rich_help_panel=ON_TEXT)
    ] = None,
    window: Annotated[
        int, typer.Option("--window", help="Tokens per window, BOS included.", rich_help_panel=ON_TEXT)
    ] = WINDOW,
    which: options.Matrices,
    dtype: options.Dtype = "float32",
    compute: options.ComputeOptions,
    work: options.WorkOptions,
) -> None:
    """Give back what a smaller copy of a model lost: a LoRA adapter of it, not trained but solved.

    Every matrix gets the best correction of low rank for the inputs that it meets in a text. With --text the original
    is calibrated first. A budget (--bits) goes by the loss's gradients at the outputs: they are made with --text, and
    taken from moments of laser calibrate --gradients. With --held-out the verdict on a second text is part of the
    output. PEFT loads the adapter on COPY. Interrupted, it keeps what it has in OUTPUT.partial; the same command goes
    on from there.
    """
    with loading():
        from laser.cli import compensate
    compensate.compensate_verb(
        original,
        copy,
        output=output,
        moments=moments,
        rank=rank,
        bits=bits,
        plain=plain,
        text=text,
        windows=windows,
        held_out=held_out,
        held_out_windows=held_out_windows,
        field=field,
        window=window,
        which=which,
        dtype=dtype,
        compute=compute,
        work=work,
    )
