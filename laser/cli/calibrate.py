"""The verb calibrate: parse, call and print."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from laser.calibration import calibrate as calibrate_checkpoint
from laser.checkpoint.matrices import list_matrices
from laser.cli import common, options
from laser.cli.common import say
from laser.cli.measure import fewer
from laser.cli.progress import Bar
from laser.differences.opened import open_model
from laser.evaluation.streaming import require_dtype
from laser.moments import Moments
from laser.records import plain


def calibrate_verb(
    model: str,
    *,
    output: Path,
    text: options.WindowOptions,
    which: options.Matrices,
    diagonal: bool,
    ledoit_wolf: bool,
    gradients: bool,
    dtype: str,
    on: options.OneDevice,
    record: options.RecordOptions,
) -> None:
    """`laser calibrate`, whose arguments and help are in verbs.py."""
    text.check()
    require_dtype(dtype)
    chosen, where = which.selection(), on.choose().torch_device
    record.claim(output, "moments")
    read, checkpoint = text.read(), open_model(model, "weights")
    windows = text.cut(read, checkpoint)
    start = time.perf_counter()
    with Bar("calibrate", unit="layers") as bar:
        moments = calibrate_checkpoint(
            checkpoint,
            windows,
            output,
            chosen,
            diagonal=diagonal,
            shrink=ledoit_wolf,
            gradients=gradients,
            dtype=dtype,
            device=where,
            anew=record.force,
            tick=lambda layer: bar.update(now=f"layer {layer}"),
            expect=bar.expect,
        )
    seconds = time.perf_counter() - start
    shapes = {m.name: m.shape for m in list_matrices(checkpoint)}
    unseen = {n: s.tokens for n, s in moments.sites.items() if s.tokens < min(shapes[n])}
    if record.as_json:
        return common.print_json(
            {
                "output": str(output),
                "source": plain(moments.source),
                "calibration": asdict(moments.calibration),
                "windows_asked": windows.asked,
                "tokens": {name: site.tokens for name, site in moments.sites.items()},
                "unseen": unseen,
                "seconds": seconds,
            }
            | ({"gradients": {name: moments.gradient(name) for name in moments.sites}} if gradients else {})
        )
    _print_moments(moments, {m.name: (m.role, m.shape) for m in list_matrices(checkpoint)})
    for name, tokens in list(unseen.items())[:20]:
        say(f"{name}: {tokens} tokens seen, fewer than its {min(shapes[name])} dimensions; kept whole unless asked for")
    if len(unseen) > 20:
        say(f"... and {len(unseen) - 20} more")
    stated = moments.calibration
    if short := fewer(windows.text, len(windows.windows), windows.asked):
        say(short)
    say(
        f"{stated.tokens} tokens of {stated.text} (sha256 {stated.text_sha256[:12]}) in {seconds:.1f} s, "
        f"written to {output}"
    )


def _print_moments(moments: Moments, matrices: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    by_role: dict[str, list[str]] = {}
    for name in moments.sites:
        by_role.setdefault(matrices[name][0], []).append(name)
    rows = []
    for role, names in by_role.items():
        seen = [moments.sites[name].tokens for name in names]
        shape = matrices[names[0]][1]
        few = sum(t < min(matrices[n][1]) for n, t in zip(names, seen, strict=True))
        form = ",".join(sorted({moments.sites[name].form for name in names}))
        felt = (f"{sum(map(moments.gradient, names)) / len(names):.2e}",) if moments.has_gradients else ()
        rows.append((role, len(names), "x".join(map(str, shape)), form, min(seen), max(seen), few, *felt))
    head = ("role", "matrices", "shape", "moment", "fewest tokens", "most", "under-seen")
    common.print_table((*head, "gradient²") if moments.has_gradients else head, rows)
