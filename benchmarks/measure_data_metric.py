"""Does the data's metric tell better what may go? One edit at a time, plain against data-aware at equal rank.

    python benchmarks/measure_data_metric.py MODEL --out DIR --calibrate train.txt --text test.txt --text other.txt
        [--layers 2,8,15,22,28] [--roles q,k,v,o,gate,up,down] [--experts 0,1] [--shares 0.75,0.5,0.25,0.1]
        [--rules laser-rmt,mp-edge,data:energy:0.99] [--windows 8] [--skip 0] [--window 256] [--report]

Every measured edit is a line of DIR/edits.jsonl: killed and run again, none is measured twice. --report prints the
tables of what is there, in Markdown, and measures nothing. Changes of the loss are paired, in thousandths of a nat per
token, ± one standard error.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import smoke
import torch

import laser
from laser.calibration import calibrate
from laser.engine.crew import Crew
from laser.evaluation.objective import Loss
from laser.evaluation.perplexity import paired_difference
from laser.evaluation.streaming import LayeredModel
from laser.evaluation.text import Windows, cut_windows, load_tokenizer, read_text
from laser.journal import Journal
from laser.moments import Moments
from laser.pipeline import scan_into
from laser.searching.trials import Bench
from laser.selection import parse_layers, parse_roles
from laser.spectral.data_metric import truncate_in_metric
from laser.spectral.rules import draws_needed


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--calibration-windows", type=int, default=32)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--layers", default="2,8,15,22,28")
    parser.add_argument("--roles", default="q,k,v,o,gate,up,down")
    parser.add_argument("--experts", default="")
    parser.add_argument("--shares", default="0.75,0.5,0.25,0.1")
    parser.add_argument("--rules", default="laser-rmt,mp-edge,data:energy:0.99")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--skip", type=int, default=0, help="windows at the beginning of each text to leave out")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many; run again to go on")
    parser.add_argument("--report", action="store_true")
    return smoke.parse(
        parser,
        lambda folder: [
            *(
                smoke.pico(folder),
                "--out",
                folder / "out",
                "--calibrate",
                smoke.text(folder),
                "--text",
                folder / "text.txt",
            ),
            *("--calibration-windows", 2, "--windows", 2, "--window", 64, "--layers", 0, "--roles", "q,k"),
            *("--shares", "0.5", "--rules", "mp-edge"),
        ],
    )


def main() -> None:
    asked = arguments()
    # What decides a measured change, and the moments beside it; ranks and rules may be added to a run later.
    run = {
        k: [str(x) for x in v] if isinstance(v, list) else str(v)
        for k, v in vars(asked).items()
        if k not in ("out", "shares", "rules", "seconds", "report", "smoke")
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    with Journal(asked.out / "edits.jsonl", {"kind": "data metric"} | run) as journal:
        if not asked.report:
            measure(asked, journal)
        if asked.smoke:
            count = len(journal.entries)
            measure(asked, journal)
            assert len(journal.entries) == count >= 4, "an edit was measured twice"
        if asked.report or asked.smoke:
            report(asked, list(journal.entries))


def measure(asked: argparse.Namespace, journal: Journal) -> None:
    checkpoint, device = laser.open_checkpoint(asked.model), laser.choose_device("cpu")
    tokenizer = load_tokenizer(asked.model)
    experts = asked.experts.replace(",", "|")
    include = rf"experts\.({experts})\.|self_attn" if experts else None
    selection = laser.Selection(parse_layers(asked.layers), parse_roles(asked.roles), include)
    path = asked.out / "moments.safetensors"
    if not path.exists():
        text = cut_windows(read_text(asked.calibrate), tokenizer, length=asked.window, limit=asked.calibration_windows)
        calibrate(checkpoint, text, path, selection)
    moments = Moments.load(path)
    draws = max(draws_needed(rule) for rule in asked.rules.split(","))
    spectra = scan_into(
        asked.out / "spectra.safetensors",
        checkpoint,
        selection,
        Crew((device,)),
        "gram",
        null_draws=draws,
        moments=moments,
    )
    cuts = [
        cut_windows(read_text(text), tokenizer, length=asked.window, limit=asked.windows, skip=asked.skip)
        for text in asked.text
    ]
    together: Windows = replace(cuts[0], windows=tuple(w for cut in cuts for w in cut.windows))
    todo = list(edits(asked, spectra, {(e["name"], e["metric"], e["rank"]) for e in journal.entries}))
    if not todo:
        return
    model = LayeredModel(checkpoint, resident=None)

    def cut(name: str, metric: str, rank: int) -> torch.Tensor:
        W = checkpoint.read(name)
        if metric == "data":
            return truncate_in_metric(W, rank, moments.metric(name, W), device).matrix
        return laser.truncate(W, rank, device).matrix

    bench = Bench(model, Loss(together), cut)
    bench.wanted = {model.first_piece(name) for name, _, _ in todo}
    base, start = bench.walk((), base=True).own, time.monotonic()
    assert base is not None, "it was asked for"
    for number, (name, metric, rank) in enumerate(todo, 1):
        (after,) = bench.walk([{name: (metric, rank)}]).variants
        changes = [float(b - a) for a, b in zip(base.values, after.values, strict=True)]
        journal.append({"name": name, "metric": metric, "rank": rank, "changes": changes})
        print(f"{number} of {len(todo)}: {name} {metric} {rank}: {1000 * np.mean(changes):+.1f}", flush=True)
        if time.monotonic() - start > asked.seconds:
            return


def points(asked: argparse.Namespace, spectra: laser.Spectra) -> dict[str, dict[str, int]]:
    """Matrix -> what names a rank -> that rank. A rule that keeps all or nothing has no point."""
    found: dict[str, dict[str, int]] = {}
    for name, s in spectra.values.items():
        found[name] = {f"{float(x):.0%}": max(1, int(float(x) * len(s))) for x in asked.shares.split(",")}
    for rule in asked.rules.split(","):
        plan = laser.make_plan(spectra, rule)
        for name, line in plan.reductions.items():
            if line.rank:
                found[name][rule] = line.rank
    return found


def edits(
    asked: argparse.Namespace, spectra: laser.Spectra, done: set[tuple[str, str, int]]
) -> Iterable[tuple[str, str, int]]:
    """(name, metric, rank), each once: all matrices at the first share, last layer first, then at the next."""
    layers, told = {m.name: m.layer or 0 for m in spectra.matrices}, set(done)
    found = sorted(points(asked, spectra).items(), key=lambda pair: -layers[pair[0]])
    for by in dict.fromkeys(by for _, ranks in found for by in ranks):
        for name, ranks in found:
            for metric in ("plain", "data"):
                if by in ranks and (name, metric, ranks[by]) not in told:
                    told.add((name, metric, ranks[by]))
                    yield name, metric, ranks[by]


def report(asked: argparse.Namespace, entries: list[dict[str, Any]]) -> None:
    spectra = laser.Spectra.load(asked.out / "spectra.safetensors")
    matrices = {m.name: m for m in spectra.matrices}
    measured = {(e["name"], e["metric"], e["rank"]): np.array(e["changes"]) for e in entries}
    texts = [slice(i * asked.windows, (i + 1) * asked.windows) for i in range(len(asked.text))]
    columns = [f"{what}, {text.name}" for text in asked.text for what in ("plain", "data", "data - plain")]
    head = ["role", "layer", "rank by", "rank", *columns]
    print(f"| {' | '.join(head)} |\n" + "|---" * len(head) + "|")
    pairs: list[tuple[str, str, str, float, float, float]] = []
    order = asked.roles.split(",")
    found = points(asked, spectra)
    for name in sorted(found, key=lambda n: (order.index(matrices[n].role), matrices[n].layer, matrices[n].expert)):
        m = matrices[name]
        for by, rank in sorted(found[name].items(), key=lambda pair: -pair[1]):
            a, b = (measured.get((name, metric, rank)) for metric in ("plain", "data"))
            if a is None or b is None:
                continue
            cells = [m.role if m.expert is None else f"{m.role}.{m.expert}", str(m.layer), by, str(rank)]
            for text, part in zip(asked.text, texts, strict=True):
                cells += [told(a[part] * 0, a[part]), told(a[part] * 0, b[part]), told(a[part], b[part])]
                verdict = sign(*paired_difference(list(a[part]), list(b[part]), [1] * len(a[part])))
                pairs.append((text.name, m.role, by, float(np.mean(a[part])), float(np.mean(b[part])), verdict))
            print(f"| {' | '.join(cells)} |")
    summary(pairs)
    survivors([text.name for text in asked.text], texts, measured)


def survivors(names: list[str], texts: list[slice], measured: dict[tuple[str, str, int], Any]) -> None:
    """Edits that a search on one text would accept (d <= -se), and what another text says of them."""
    print("\n| accepted on | metric | edits | accepted | asked on | better there | worse there |\n" + "|---" * 7 + "|")
    for here, there in ((i, j) for i in range(len(texts)) for j in range(len(texts)) if i != j):
        for metric in ("plain", "data"):
            found = []
            for (_, which, _), changes in measured.items():
                if which == metric:
                    ones = [1] * len(changes[texts[here]])
                    found.append(
                        [
                            paired_difference([0.0] * len(ones), list(changes[t]), ones)
                            for t in (texts[here], texts[there])
                        ]
                    )
            accepted = [other for own, other in found if own[0] < 0 and own[0] <= -(own[1] or 0)]
            better = sum(d < 0 and d <= -(se or 0) for d, se in accepted)
            worse = sum(d > 0 and d >= (se or 0) for d, se in accepted)
            print(
                f"| {names[here]} | {metric} | {len(found)} | {len(accepted)} | {names[there]} | {better} | {worse} |"
            )


def sign(d: float, se: float | None) -> float:
    """-1 where data-aware is better by more than two standard errors, 1 where it is worse, else 0."""
    return 0.0 if se is None or abs(d) <= 2 * se else float(np.sign(d))


def told(before: Any, after: Any) -> str:
    d, se = paired_difference(list(before), list(after), [1] * len(before))
    return f"{1000 * d:+.1f} ± {1000 * (se or 0):.1f}"


def summary(pairs: list[tuple[str, str, str, float, float, float]]) -> None:
    """Means over layers, and how often which metric won by more than two standard errors."""
    print("\n| text | rank by | role | edits | plain, mean | data, mean | data better | worse |\n" + "|---" * 8 + "|")
    keys = dict.fromkeys((text, by, role) for text, role, by, *_ in pairs)
    for text, by, role in [*keys, *dict.fromkeys((text, by, "all") for text, by, _ in keys)]:
        rows = [p for p in pairs if p[0] == text and p[2] == by and role in (p[1], "all")]
        a, b = 1000 * np.mean([p[3] for p in rows]), 1000 * np.mean([p[4] for p in rows])
        better, worse = (sum(p[5] == s for p in rows) for s in (-1, 1))
        print(f"| {text} | {by} | {role} | {len(rows)} | {a:+.1f} | {b:+.1f} | {better} | {worse} |")


if __name__ == "__main__":
    main()
