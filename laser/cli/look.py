"""The verbs that look: info, null, spectra, plot, report. Each parses, calls and prints or writes one file."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path

from laser.checkpoint.matrices import list_matrices
from laser.cli import common, options
from laser.cli.common import say
from laser.cli.progress import Progress
from laser.differences.opened import open_model
from laser.errors import DoubtWarning, UsageError
from laser.files import write_atomically
from laser.inventory import take_inventory
from laser.null import check_test, null_test
from laser.report import page, plots
from laser.selection import MAIN
from laser.spectra import Spectra
from laser.spectral.rules import parse_rule
from laser.summary import SPECTRUM_RULE, Summary, check_share, summarise

MOST_ROWS = 200  # of the table that `spectra` prints


def info_verb(model: str, *, shown_as: options.Json) -> None:
    """`laser info`, whose arguments and help are in verbs.py."""
    with warnings.catch_warnings():  # what there is to doubt stands in the list
        warnings.simplefilter("ignore", DoubtWarning)
        found = take_inventory(open_model(model))
    if shown_as.as_json:
        return common.print_json(asdict(found))
    parts = [f"{n} layers" + (f" of {stack}" if stack != MAIN else "") for stack, n in found.layers.items()]
    parts += [f"{found.experts} experts"] if found.experts else []
    say(f"{found.model}: {', '.join([f'family {found.family}', *parts])}")
    files = f"{found.tensors} tensors in {found.shards} file{'s' * (found.shards != 1)}"
    say(f"{found.parameters:,} parameters, {found.bytes:,} bytes, {files}")
    if found.tied:
        say("the head is the embedding: it is stored once")
    if found.fp8:
        say(f"{found.fp8} tensors are FP8 with scales, and are read as what they stand for")
    if found.packed:
        say(f"its weights are packed ({found.packed}): they are read as what they stand for, and cannot be reduced")
    what = "measured" if found.packed else "measured and cut"
    rows = [
        (k.stack, k.role, k.count, "x".join(map(str, k.shape)), k.dtype, k.bytes / 1e6, k.why_not or what)
        for k in found.kinds
    ]
    common.print_table(("stack", "role", "count", "shape", "dtype", "MB", "unless asked otherwise"), rows[:MOST_ROWS])
    if len(rows) > MOST_ROWS:
        say(f"... and {len(rows) - MOST_ROWS} more; --json lists all")
    if found.doubts:
        say(found.doubts)


def null_verb(
    model: str,
    *,
    rules: str,
    permute: str,
    draws: int,
    spectra: Path | None,
    base: options.FromBase,
    which: options.Matrices,
    on: options.Precise,
    shown_as: options.Json,
) -> None:
    """`laser null`, whose arguments and help are in verbs.py."""
    tested = [part for part in rules.split(",") if part]
    check_test(tested, permute, draws)
    chosen, where = which.selection(), on.choose()
    checkpoint = open_model(model)
    matrices = [m for m in list_matrices(checkpoint) if chosen.why_not(m) is None]
    with Progress("null", matrices) as bar:
        test = null_test(
            checkpoint,
            chosen,
            rules=tested,
            permutation=permute,
            draws=draws,
            spectra=Spectra.load(spectra) if spectra else None,
            base=base.of(checkpoint),
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
    common.say_first([f"{name}: {why}" for name, why in test.skipped.items()])
    say(f"{draws} permutations of each matrix's {'rows' if permute == 'rows' else 'entries'}; expected: about 0 kept")


def spectra_verb(
    spectra: Path,
    *,
    rule: str | None,
    as_csv: bool,
    snr_json: Path | None,
    unfrozen: Path | None,
    top_percent: float,
    which: options.Matrices,
    file: options.RecordOptions,
) -> None:
    """`laser spectra`, whose arguments and help are in verbs.py."""
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


def plot_verb(
    spectra: Path,
    *,
    output: Path,
    matrix: str | None,
    other: list[Path] | None,
    heat: str | None,
    mean: bool,
    rule: str | None,
    which: options.Matrices,
    file: options.Force,
) -> None:
    """`laser plot`, whose arguments and help are in verbs.py."""
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


def report_verb(
    spectra: Path,
    *,
    output: Path,
    against: Path | None,
    rule: str | None,
    which: options.Matrices,
    file: options.Force,
) -> None:
    """`laser report`, whose arguments and help are in verbs.py."""
    parse_rule(rule or "mp-edge")
    chosen = which.selection()
    file.claim(output)
    record = Spectra.load(spectra)
    other = None if against is None else Spectra.load(against)
    if other and (record.delta is None) != (other.delta is None):
        raise UsageError(
            f"of {spectra} and {against} one holds spectra of weights and one of differences, whose units are not the "
            "same; try two of one kind"
        )
    rule = rule or record.usual_rule
    summary = summarise(record, rule, chosen)
    second, drawn = None, ()
    if other:
        second = summarise(other, rule, chosen)
        shared = {row.name for row in second.rows}
        drawn = (plots.histogram_of(other, r.name, rule) if r.name in shared else None for r in summary.rows)
    histograms = (plots.histogram_of(record, row.name, rule) for row in summary.rows)
    text = page.render_page(summary, histograms, second, drawn)
    write_atomically(output, text.encode())
    say(f"{len(summary.rows)} matrices, {len(text) / 1e6:.1f} MB, written to {output}")


def _print_summary(summary: Summary) -> None:
    common.print_table(
        ("matrix", "rank", "of", "SNR", "sigma", "fit", "level", "alpha", "stable rank", "s_1"),
        [
            (r.name, r.rank, r.full_rank, r.snr, r.sigma, r.fit, r.fit_level, r.alpha, r.stable_rank, r.largest)
            for r in summary.rows[:MOST_ROWS]
        ],
    )
    if len(summary.rows) > MOST_ROWS:
        say(f"... and {len(summary.rows) - MOST_ROWS} more; --csv and --json list all")
    common.say_first([f"{name}: {why}" for name, why in summary.skipped])
    say(f"{len(summary.rows)} matrices of {summary.source.name}, cut by {summary.rule}")
