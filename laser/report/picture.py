"""The picture in a card: singular values of what was cut. SVG as text, so that no library has to draw it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from xml.sax.saxutils import escape, quoteattr

import numpy as np
from numpy.typing import NDArray

from laser.escape import visible
from laser.outcome import Outcome
from laser.plan import PlanLine
from laser.report.plots import BLUE, ORANGE, histogram_of, top_of
from laser.spectra import Spectra, Vectors

PANELS = 6  # panels
BARS = 60
PANEL_WIDTH, PANEL_HEIGHT, AXIS, HEAD, FOOT = 430, 215, 34, 44, 34  # of a panel, and its margins, in pixels
WIDEST = 56  # characters of a name over a panel
GREY, INK = "#b8bfc6", "#333333"


def picture_of_cuts(spectra: Spectra, outcome: Outcome) -> bytes | None:
    """Of each role the matrix that lost most, at most PANELS of them: what was kept, what was cut, the law of noise.

    None where no matrix was cut to a rank, or none of them is in the spectra.
    """
    lines = [line for line in _chosen(outcome) if line.name in _values(spectra, line)][:PANELS]
    if not lines:
        return None
    across = min(2, len(lines))
    parts = [
        _element(
            "g", *_panel(spectra, line), transform=f"translate({n % across * PANEL_WIDTH} {n // across * PANEL_HEIGHT})"
        )
        for n, line in enumerate(lines)
    ]
    width, height = across * PANEL_WIDTH, math.ceil(len(lines) / across) * PANEL_HEIGHT
    ground = _element("rect", width=width, height=height, fill="#ffffff")
    font = {"font-family": "sans-serif", "font-size": 11, "fill": INK}
    size = {"viewBox": f"0 0 {width} {height}", "width": width, "height": height}
    return _element("svg", ground, *parts, xmlns="http://www.w3.org/2000/svg", **size, **font).encode()


def _chosen(outcome: Outcome) -> Iterator[PlanLine]:
    """What was cut to a rank: of each role of each stack the line that kept the least, the roles in file order."""
    least: dict[tuple[str, str], tuple[float, PlanLine]] = {}
    for line in outcome.plan.reductions.values():
        kept = outcome.matrices[line.name]["energy_kept"]
        if line.rank is None or line.scale is not None:
            continue
        if (line.stack, line.role) not in least or kept < least[line.stack, line.role][0]:
            least[line.stack, line.role] = kept, line
    return (line for _, line in least.values())


def _values(spectra: Spectra, line: PlanLine) -> Vectors:
    """The singular values by name in the metric in which a line was cut."""
    by_metric: dict[str, Vectors] = {"plain": spectra.values, "data": spectra.data.values if spectra.data else {}}
    return by_metric[line.metric]


def _panel(spectra: Spectra, line: PlanLine) -> list[str]:
    """Bars of what is kept over what is cut, the law where the values are those of the weights, and the cut."""
    assert line.rank is not None, "as chosen"
    of_line = replace(spectra, values=_values(spectra, line))
    has_law = of_line.values is spectra.values
    shown = histogram_of(of_line, line.name, f"rank:{line.rank - line.below}")
    top, p = top_of([shown]), len(shown.values)
    values = np.minimum(shown.values, top)
    is_kept = (np.arange(p) < line.rank - line.below) | (np.arange(p) >= p - line.below)
    kept, every = (np.histogram(each, BARS, (0.0, top))[0] for each in (values[is_kept], values))
    law = shown.curve * top / BARS if has_law else np.zeros(0)
    highest = max(1.0, float(every.max()), float(law.max(initial=0.0)))

    def x(value: float) -> str:
        return f"{AXIS + (PANEL_WIDTH - AXIS - 12) * value / top:.1f}"

    def y(count: float) -> str:
        return f"{PANEL_HEIGHT - FOOT - (PANEL_HEIGHT - FOOT - HEAD) * count / highest:.1f}"

    edges = np.linspace(0.0, top, BARS + 1)

    def bars(low: NDArray[np.int64], high: NDArray[np.int64]) -> str:
        boxes = zip(edges, edges[1:], low, high, strict=False)
        return "".join(f"M{x(a)} {y(c)}V{y(d)}H{x(b)}V{y(c)}Z" for a, b, c, d in boxes if d > c)

    upright = {"y1": HEAD, "y2": PANEL_HEIGHT - FOOT}
    parts = [
        _element("path", d=bars(np.zeros_like(every), every - kept), fill=GREY),
        _element("path", d=bars(every - kept, every), fill=BLUE),
    ]
    if len(law):
        points = " ".join(f"{x(a)},{y(b)}" for a, b in zip(shown.curve_x, law, strict=True))
        parts.append(_element("polyline", points=points, fill="none", stroke=ORANGE, stroke_width=2))
    if shown.cut is not None:
        at = {"x1": x(shown.cut), "x2": x(shown.cut)}
        parts.append(_element("line", **at, **upright, stroke="#000000", stroke_dasharray="6 4"))
    ground = {"x1": AXIS, "x2": PANEL_WIDTH - 12, "y1": PANEL_HEIGHT - FOOT, "y2": PANEL_HEIGHT - FOOT}
    parts.append(_element("line", **ground, stroke=INK))
    parts += [_words(f"{value:.3g}", x(value), PANEL_HEIGHT - FOOT + 14, "middle") for value in (0.0, top / 2, top)]
    unit = "singular value" if has_law else "singular value by the data"
    parts += [
        _words(unit, (AXIS + PANEL_WIDTH) / 2, PANEL_HEIGHT - 6, "middle"),
        _words(f"{highest:.0f}", AXIS - 4, HEAD + 4, "end"),
    ]
    beyond = f"; last bar: all beyond, to {shown.values[0]:.3g}" if shown.values[0] > top else ""
    told = f"{shown.rows} x {shown.columns}, kept {line.rank} of {p}{beyond}"
    return [*parts, _words(_cut_to_fit(line.name), AXIS, 18), _words(told, AXIS, 34)]


def _cut_to_fit(name: str) -> str:
    text = visible(name)
    return text if len(text) <= WIDEST else f"{text[: WIDEST // 2]}...{text[-WIDEST // 2 + 3 :]}"


def _words(content: str, x: float | str, y: float, anchor: str = "start") -> str:
    return _element("text", escape(content), x=x, y=y, text_anchor=anchor)


def _element(name: str, *inside: str, **attributes: object) -> str:
    """An element of XML; an underscore in an attribute's name stands for a hyphen."""
    stated = "".join(f" {key.replace('_', '-')}={quoteattr(str(value))}" for key, value in attributes.items())
    return f"<{name}{stated}>{''.join(inside)}</{name}>\n" if inside else f"<{name}{stated}/>\n"
