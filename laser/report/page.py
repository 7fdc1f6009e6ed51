"""report: one HTML file with everything in it: heat maps, the histogram of what is clicked, and a sortable table.

Of one model, or of two side by side: a base and its fine-tune, a source and what was made of it.
Nothing is fetched: styles, script and data are inside, so the file can be mailed and opened anywhere, now and later.
The page itself is page.html, plain HTML and script without a library; here its data are put together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from laser.errors import UsageError
from laser.report.plots import CURVE, IN_WEIGHTS, QUANTITIES, Histogram, cells_of, top_of
from laser.summary import Summary

DRAWN_BINS = 64
# field of SummaryRow -> (heading, what it means). The first PLACE are no numbers to compare.
PLACE = 4
COLUMNS = {
    "name": ("matrix", "The tensor's name; an index behind it is a part of one that holds several matrices."),
    "role": ("role", "What the matrix does in its layer, by the names of the model's family."),
    "place": ("layer", "Number of the layer, and before it whose layers are counted where not the language model's."),
    "expert": ("expert", "Number of the expert, where the layer has several."),
    "rank": ("rank kept", "How many singular values lie over the cut of the rule."),
    "full_rank": ("of", "How many there are: the smaller side of the matrix."),
    "snr": ("SNR", "Signal-to-noise ratio: the sum of the singular values over the cut, by the sum of those under it."),
    "sigma": ("sigma", "Noise level of the entries, estimated from the bulk of the singular values."),
    "fit": (
        "fit distance",
        "How far the bulk is from the law of noise, by Kolmogorov and Smirnov: 0 is the law itself.",
    ),
    "fit_level": (
        "fit level",
        "Share of pure noise matrices that are as far off. Near 0, the bulk is more than noise.",
    ),
    "alpha": ("alpha", "Exponent of the tail of the squared singular values; smaller is heavier."),
    "stable_rank": ("stable rank", "Squared singular values by the largest of them: ||W||_F^2 / s_1^2."),
    "effective_rank": ("effective rank", "exp of the entropy of the singular values' shares of their sum."),
    "largest": ("s_1", "The largest singular value, in the unit that stands above."),
}
# ... and these where the scan was given moments
IN_DATA = {
    "tokens": ("tokens seen", "How many inputs the matrix met in the calibration text."),
    "data_effective_rank": ("effective rank in data", "The effective rank by what the outputs hold on that text."),
    "data_rank_99": ("of outputs: 99 % in", "How many directions hold 99 % of the outputs' mean square."),
}
# quantity of QUANTITIES -> the column that has it; `kept` is that one by the next
MAPPED = {
    "kept": "rank", "snr": "snr", "sigma": "sigma", "fit": "fit", "alpha": "alpha", "stable-rank": "stable_rank",
}  # fmt: skip


def _metric(summary: Summary) -> str:
    calibration = summary.calibration
    assert calibration is not None, "asked only where there is one"
    text = (
        f"Metric of the data: {calibration.tokens} tokens of {calibration.text} (sha256 {calibration.text_sha256[:12]})"
    )
    if under := len(summary.under_seen):
        text += f"; {under} matrices saw fewer tokens than they have dimensions, and are kept in that metric"
    return text + "."


def render_page(
    summary: Summary,
    histograms: Iterable[Histogram],
    other: Summary | None = None,
    others: Iterable[Histogram | None] = (),
) -> str:
    """The page as text; `histograms` are those of the summary's rows, in their order and by its rule. The same records
    give the same bytes.

    other: a second model beside the first; others: its histograms of the first's rows, None for what it lacks. Raises
    UsageError where the two have no matrix in common.
    """
    columns = COLUMNS | (IN_DATA if summary.calibration is not None else {})
    laws: dict[str, int] = {}  # text of a law's curve -> its number: most matrices of one shape share it
    rows, drawings, before, unit = [], [], "", IN_WEIGHTS
    second = None if other is None else _Second(summary, other, list(columns)[PLACE:])
    for row, shown, its in zip(summary.rows, histograms, others if other else [None] * len(summary.rows), strict=True):
        values = [_rounded(getattr(row, field)) for field in columns]
        values[0], before = _front(row.name, before), row.name
        rows.append(_text(values))
        unit = shown.unit
        top = _rounded(top_of([shown, its] if its else [shown]))
        drawings.append(_text(_drawing(shown, top, laws)))
        if second:
            second.add(row.name, its, top)
    across, layers = cells_of(summary.rows)
    headings = list(columns)
    quantities = [
        {
            "title": title,
            "unit": unit,
            "meaning": COLUMNS[MAPPED[key]][1] + (" Here as a share of all." if key == "kept" else ""),
            "column": headings.index(MAPPED[key]),
            "over": headings.index("full_rank") if key == "kept" else None,
        }
        for key, (title, unit, _) in QUANTITIES.items()
    ]
    data = {
        "model": summary.source.name,
        "identity": summary.source.identity,
        "rule": summary.rule,
        "unit": unit,
        "headings": list(columns.values()),
        "data": None if summary.calibration is None else _metric(summary),
        "columns": across,
        "layers": layers,
        "quantities": quantities,
        "skipped": [list(entry) for entry in summary.skipped],
        "bins": DRAWN_BINS,
        "angles": [_rounded(x) for x in np.cos(np.linspace(0.0, np.pi, CURVE))[::2].tolist()],
    }
    lists = {"laws": list(laws), "rows": rows, "drawings": drawings}
    parts = [*_members(data, lists), ',"other":', second.text() if second else "null", "}"]
    page = (resources.files("laser.report") / "page.html").read_text(encoding="utf-8")
    return page.replace("/*DATA*/null", "".join(parts))


class _Second:
    """What the page has of the second model: of each row of the first, the same numbers, and the same bins' counts."""

    def __init__(self, first: Summary, other: Summary, fields: Sequence[str]) -> None:
        self._other, self._fields = other, fields
        self._rows = {row.name: row for row in other.rows}
        common = sum(row.name in self._rows for row in first.rows)
        if not common:
            raise UsageError(
                f"no matrix of {first.source.name} is one of {other.source.name}; try two models whose tensors have "
                "the same names"
            )
        self._missing = len(first.rows) + len(other.rows) - 2 * common
        self._values: list[str] = []
        self._counts: list[str] = []

    def add(self, name: str, shown: Histogram | None, top: float) -> None:
        row = self._rows.get(name) if shown else None
        self._values.append(_text(None if row is None else [_rounded(getattr(row, field)) for field in self._fields]))
        self._counts.append(_text(None if shown is None else _runs(_counts(shown, top))))

    def text(self) -> str:
        source = self._other.source
        data = {"model": source.name, "identity": source.identity, "missing": self._missing}
        return "".join([*_members(data, {"rows": self._values, "drawings": self._counts}), "}"])


def _members(data: Mapping[str, Any], lists: Mapping[str, Sequence[str]]) -> list[str]:
    """Pieces of a JSON object that is not closed yet: `data`, and lists of what is text already."""
    return [_text(data)[:-1], *(f',"{key}":[{",".join(texts)}]' for key, texts in lists.items())]


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


def _counts(shown: Histogram, top: float) -> list[int]:
    """Values per bin from 0 to `top`, the last with all that lies beyond."""
    return np.histogram(np.minimum(shown.values, top), bins=DRAWN_BINS, range=(0.0, top))[0].tolist()


def _drawing(shown: Histogram, top: float, laws: dict[str, int]) -> list[Any]:
    """What the script draws of a matrix besides its row: shape; values per bin; both edges, the cut, the law's
    peak per bin, the law's number, and where the bins end."""
    peak = float(shown.curve.max())
    law = _text([_rounded(y, 3) for y in (shown.curve[::2] / (peak or 1.0)).tolist()])
    levels = (shown.lower_edge, shown.upper_edge, shown.cut, peak * top / DRAWN_BINS)
    drawn = [_rounded(level, 4) for level in levels]
    return [shown.rows, shown.columns, _runs(_counts(shown, top)), *drawn, laws.setdefault(law, len(laws)), top]
