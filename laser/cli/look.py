"""The verbs that look: null, spectra, plot, report. Each parses, calls and prints or writes one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from laser.checkpoint.matrices import list_matrices
from laser.checkpoint.reader import open_checkpoint
from laser.cli import common, options
from laser.cli.common import say
from laser.delta.base import Base
from laser.errors import UsageError
from laser.files import write_atomically
from laser.null import TESTED, check_test, null_test
from laser.report import page, plots
from laser.spectra import Spectra
from laser.spectral.rules import parse_rule
from laser.summary import SPECTRUM_RULE, Summary, check_share, summarise


def null(
    model: options.Model,
    *,
    rules: Annotated[str, typer.Option("--rules", help="Rules to test, with commas between.")] = ",".join(TESTED),
    permute: Annotated[str, typer.Option("--permute", help="entries, or rows (keeps their variances).")] = "entries",
    draws: Annotated[int, typer.Option("--draws", help="Permutations of each matrix.")] = 1,
    spectra: Annotated[Path | None, typer.Option("--spectra", help="Show beside it what the model itself has.")] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Permute the differences from this model, as laser delta has them.")
    ] = None,
    which: options.Matrices,
    on: options.Precise,
    shown_as: options.Json,
) -> None:
    """Permute each matrix's entries, so that no structure is left, and count what each rule still finds: about 0."""
    tested = [part for part in rules.split(",") if part]
    check_test(tested, permute, draws)
    chosen, where = which.selection(), on.choose()
    checkpoint = open_checkpoint(model)
    matrices = [m for m in list_matrices(checkpoint) if chosen.why_not(m) is None]
    with common.Progress("null", matrices) as bar:
        test = null_test(
            checkpoint,
            chosen,
            rules=tested,
            permutation=permute,
            draws=draws,
            spectra=Spectra.load(spectra) if spectra else None,
            base=Base.of(open_checkpoint(base), checkpoint) if base else None,
            device=where,
            tick=bar,
        )
    if shown_as.as_json:
        return common.print_raw(test.to_json())
    headings = ["rule", "role", "matrices", "mean kept", "most", "share kept"]
    headings += ["in the model", "share"] if spectra else []
    rows = []
    for r in test.rows:
        found = [r.found, r.found_share] if spectra else []
        rows.append([r.rule, r.role, r.matrices, r.mean_kept, r.most_kept, r.share_kept, *found])
    common.print_table(headings, rows)
    for name, why in test.skipped.items():
        say(f"{name}: {why}")
    say(f"{draws} permutations of each matrix's {'rows' if permute == 'rows' else 'entries'}; expected: about 0 kept")


def spectra(
    spectra: options.SpectraFile,
    *,
    rule: Annotated[
        str | None,
        typer.Option("--rule", help="Whose cut is shown. Default: mp-edge, and laser-rmt in what others read."),
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
    """List every scanned matrix in numbers: ranks, tail, noise and its fit, what the rule keeps."""
    chosen = which.selection()
    parse_rule(rule or "mp-edge")  # before the file is read
    check_share(top_percent)
    if snr_json and unfrozen and snr_json.resolve() == unfrozen.resolve():
        raise UsageError(f"two files cannot both be {snr_json}; try another name for one")
    for path in (snr_json, unfrozen):
        if path is not None:
            file.claim(path)
    record = Spectra.load(spectra)
    summary = summarise(record, rule or record.usual_rule, chosen)
    written: dict[Path, bytes] = {}
    scored = summarise(record, rule or SPECTRUM_RULE, chosen) if snr_json or unfrozen else summary
    if snr_json:
        written[snr_json] = scored.snr_json()
    if unfrozen:
        written[unfrozen] = scored.unfrozen_yaml(top_percent).encode()
    for path, content in written.items():
        write_atomically(path, content)
    if file.as_json:
        return common.print_raw(summary.to_json())
    if as_csv:
        return common.print_raw(summary.to_csv().encode())
    _print_summary(summary)
    for path in written:
        say(f"written to {path}, by the scores of {scored.rule}")


def plot(
    spectra: options.SpectraFile,
    *,
    output: options.Output,
    matrix: Annotated[
        str | None, typer.Option("--matrix", help="Histogram of this tensor: a part of its name.")
    ] = None,
    other: Annotated[list[Path] | None, typer.Option("--with", help="Spectra of another model, laid over it.")] = None,
    heat: Annotated[str | None, typer.Option("--heat", help=f"Heat map of {', '.join(plots.QUANTITIES)}.")] = None,
    mean: Annotated[bool, typer.Option("--mean", help="Heat map: a column per role, the mean of experts.")] = False,
    rule: options.ShownRule = None,
    which: options.Matrices,
    file: options.Force,
) -> None:
    """Draw a PNG or SVG: a matrix's histogram with the fitted law, two models overlaid, or a heat map of a model."""
    if (matrix is None) == (heat is None):
        raise UsageError("plot draws one thing; try --matrix NAME or --heat kept")
    if other and matrix is None:
        raise UsageError("--with lays one matrix over another; try --matrix NAME as well")
    plots.check_picture(output, heat or "kept")
    parse_rule(rule or "mp-edge")
    chosen = which.selection()
    file.claim(output)
    records = [Spectra.load(path) for path in (spectra, *(other or ()))]
    if matrix is None:
        summary = summarise(records[0], rule or records[0].usual_rule, chosen)
        figure = plots.heat_map(summary, heat or "kept", experts=not mean)
    else:
        named = [name for name in records[0].values if matrix in name]
        name = named[0] if len(named) == 1 else matrix
        several = [plots.histogram_of(record, name, rule or record.usual_rule) for record in records]
        figure = plots.overlay(several) if len(several) > 1 else plots.histogram(several[0])
    write_atomically(output, plots.encoded(figure, output))
    say(f"written to {output}")


def report(
    spectra: options.SpectraFile,
    *,
    output: options.Output,
    rule: options.ShownRule = None,
    which: options.Matrices,
    file: options.Force,
) -> None:
    """Write one HTML page to look at the whole model: table, heat maps, histograms. It needs no network."""
    parse_rule(rule or "mp-edge")
    chosen = which.selection()
    file.claim(output)
    record = Spectra.load(spectra)
    rule = rule or record.usual_rule
    summary = summarise(record, rule, chosen)
    text = page.render_page(summary, (plots.histogram_of(record, row.name, rule) for row in summary.rows))
    write_atomically(output, text.encode())
    say(f"{len(summary.rows)} matrices, {len(text) / 1e6:.1f} MB, written to {output}")


def _print_summary(summary: Summary) -> None:
    common.print_table(
        ("matrix", "rank", "of", "SNR", "sigma", "fit", "level", "alpha", "stable rank", "s_1"),
        [
            (r.name, r.rank, r.full_rank, r.snr, r.sigma, r.fit, r.fit_level, r.alpha, r.stable_rank, r.largest)
            for r in summary.rows
        ],
    )
    for name, why in summary.skipped:
        say(f"{name}: {why}")
    say(f"{len(summary.rows)} matrices of {summary.source.name}, cut by {summary.rule}")
