"""report: one HTML file with everything in it: a sortable table, heat maps, and the histogram of what is clicked.

Nothing is fetched: styles, script and data are inside, so the file can be mailed and opened anywhere, now and later.
The page itself is page.html, plain HTML and script without a library; here its data are put together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import resources
from typing import Any

import numpy as np

from laser.report.plots import CURVE, QUANTITIES, Histogram, grid_of
from laser.summary import Summary

DRAWN_BINS = 64
COLUMNS = {
    # field of Row -> heading
    "name": "matrix",
    "role": "role",
    "place": "layer",
    "expert": "expert",
    "rank": "rank kept",
    "full_rank": "of",
    "snr": "SNR",
    "sigma": "sigma",
    "fit": "fit distance",
    "fit_level": "fit level",
    "alpha": "alpha",
    "stable_rank": "stable rank",
    "effective_rank": "effective rank",
    "largest": "s_1",
}


# ... and these where the scan was given moments
IN_DATA = {
    "tokens": "tokens seen",
    "data_effective_rank": "effective rank in data",
    "data_rank_99": "of outputs: 99 % in",
}


def _metric(summary: Summary) -> str:
    calibration = summary.calibration
    assert calibration is not None, "asked only where there is one"
    text = (
        f"Metric of the data: {calibration.tokens} tokens of {calibration.text} (sha256 {calibration.text_sha256[:12]})"
    )
    if under := len(summary.under_seen):
        text += f"; {under} matrices saw fewer tokens than they have dimensions, and are kept in that metric"
    return text + "."


def render_page(summary: Summary, histograms: Iterable[Histogram]) -> str:
    """The page as text; `histograms` are those of the summary's rows, in their order and by its rule. The same records
    give the same bytes."""
    columns = COLUMNS | (IN_DATA if summary.calibration is not None else {})
    laws: dict[str, int] = {}  # text of a law's curve -> its number: most matrices of one shape share it
    rows, drawings, before = [], [], ""
    for row, shown in zip(summary.rows, histograms, strict=True):
        values = [_rounded(getattr(row, field)) for field in columns]
        values[0], before = _front(row.name, before), row.name
        rows.append(_text(values))
        drawings.append(_text(_drawing(shown, laws)))
    maps = []
    for title, unit, value in QUANTITIES.values():
        _, _, grid = grid_of(summary.rows, value)
        cells = [[None if np.isnan(x) else _rounded(float(x), 3) for x in line] for line in grid]
        maps.append({"title": title, "unit": unit, "cells": cells})
    across, layers, _ = grid_of(summary.rows, lambda row: 0.0)
    data = {
        "model": summary.source.name,
        "identity": summary.source.identity,
        "rule": summary.rule,
        "headings": list(columns.values()),
        "data": None if summary.calibration is None else _metric(summary),
        "columns": across,
        "layers": layers,
        "maps": maps,
        "skipped": [list(entry) for entry in summary.skipped],
        "bins": DRAWN_BINS,
        "angles": [_rounded(x) for x in np.cos(np.linspace(0.0, np.pi, CURVE))[::2].tolist()],
    }
    lists = {"laws": list(laws), "rows": rows, "drawings": drawings}
    parts = [_text(data)[:-1], *(f',"{key}":[{",".join(texts)}]' for key, texts in lists.items()), "}"]
    page = (resources.files("laser.report") / "page.html").read_text(encoding="utf-8")
    return page.replace("/*DATA*/null", "".join(parts))


def _text(value: Any) -> str:
    """JSON for a script element, which only "</" could end early: a tensor's name is not trusted."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _front(name: str, before: str) -> tuple[int, str]:
    """How many characters a name has in common with the one before, and the rest: 20 bytes of 50. Only ASCII counts,
    of which a character is one for script as well."""
    common = 0
    while common < min(len(name), len(before)) and name[common] == before[common] < "\x80":
        common += 1
    return common, name[common:]


def _rounded(value: Any, digits: int = 5) -> Any:
    """Floats to so many digits; three are more than a grey or a pixel can show."""
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def _runs(counts: list[int]) -> list[int]:
    """The counts, and in the place of zeros less than nothing by how many they are, but for the last."""
    found: list[int] = []
    for count in counts:
        if not count and found and found[-1] < 0:
            found[-1] -= 1
        else:
            found.append(count or -1)
    return found[:-1] if found[-1] < 0 else found


def _drawing(shown: Histogram, laws: dict[str, int]) -> list[Any]:
    """What the script draws of a matrix besides its row: shape; values per bin, from 0 to 1.02 times the largest of
    values, edge and threshold; both edges, the threshold, the law's peak per bin, and the law's number."""
    top = max(float(shown.values[0]), shown.upper_edge, shown.threshold or 0.0) or 1.0
    counts, edges = np.histogram(shown.values, bins=DRAWN_BINS, range=(0.0, top * 1.02))
    peak = float(shown.curve.max())
    law = _text([_rounded(y, 3) for y in (shown.curve[::2] / (peak or 1.0)).tolist()])
    levels = (shown.lower_edge, shown.upper_edge, shown.threshold, peak * float(edges[1] - edges[0]))
    drawn = [_rounded(level, 4) for level in levels]
    return [shown.rows, shown.columns, _runs(counts.tolist()), *drawn, laws.setdefault(law, len(laws))]
