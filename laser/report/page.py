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

from laser.report.plots import QUANTITIES, Histogram, grid_of
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
    """The page as text; `histograms` are those of the summary's rows. The same records give the same bytes."""
    columns = COLUMNS | (IN_DATA if summary.calibration is not None else {})
    drawn = {each.name: _drawing(each) for each in histograms}
    rows = []
    for row in summary.rows:
        rows.append([_rounded(getattr(row, field)) for field in columns])
    maps = []
    for title, unit, value in QUANTITIES.values():
        across, layers, grid = grid_of(summary.rows, value)
        cells = [[None if np.isnan(x) else _rounded(float(x)) for x in line] for line in grid]
        maps.append({"title": title, "unit": unit, "columns": across, "layers": layers, "cells": cells})
    # Which matrix a cell of the maps stands for, so that it can be clicked as well.
    across, layers, _ = grid_of(summary.rows, lambda row: 0.0)
    places: dict[str, str] = {}
    for row in summary.rows:
        column = across.index(row.role if row.expert is None else f"{row.role}.{row.expert}")
        places[f"{layers.index(row.place)},{column}"] = row.name
    data = {
        "model": summary.source.name,
        "identity": summary.source.identity,
        "rule": summary.rule,
        "headings": list(columns.values()),
        "data": None if summary.calibration is None else _metric(summary),
        "rows": rows,
        "maps": maps,
        "places": places,
        "drawings": drawn,
        "skipped": [list(entry) for entry in summary.skipped],
    }
    # In a script element only "</" could end the data early; a tensor's name is not trusted.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    page = (resources.files("laser.report") / "page.html").read_text(encoding="utf-8")
    return page.replace("/*DATA*/null", text)


def _rounded(value: Any) -> Any:
    """Floats to five digits: 928 matrices stay under a megabyte."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _drawing(shown: Histogram) -> dict[str, Any]:
    """What the script draws for one matrix. Counts are per bin, the curve is scaled to them."""
    top = max(float(shown.values[0]), shown.upper_edge, shown.threshold or 0.0) or 1.0
    counts, edges = np.histogram(shown.values, bins=DRAWN_BINS, range=(0.0, top * 1.02))
    kept, _ = np.histogram(shown.values[: shown.rank], bins=edges)
    width = float(edges[1] - edges[0])
    return {
        "shape": [shown.rows, shown.columns],
        "top": _rounded(top * 1.02),
        "counts": counts.tolist(),
        "kept": kept.tolist(),
        "x": [_rounded(float(x)) for x in shown.curve_x[::2]],
        "curve": [_rounded(float(y) * width) for y in shown.curve[::2]],
        "edges": [_rounded(shown.lower_edge), _rounded(shown.upper_edge)],
        "threshold": None if shown.threshold is None else _rounded(shown.threshold),
        "sigma": _rounded(shown.sigma),
        "fit": [_rounded(shown.distance), _rounded(shown.level)],
        "rank": [shown.rank, len(shown.values)],
    }
