"""A record as a notebook shows it: one line, a small table with a sparkline, a DataFrame, a picture."""

from __future__ import annotations

import html
import importlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from laser.errors import UsageError
from laser.escape import shown_value, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

GLANCE_ROWS = 12  # of the small table
WIDTH, HEIGHT = 120, 24  # of a sparkline, in pixels
FrameRows = Sequence[Mapping[str, Any]]


class Shown:
    """What a record has beside its data when people look at it. It says itself what its headline and its rows are."""

    def headline(self) -> str:
        """One line: what this is, of which model, how much."""
        raise NotImplementedError

    def frame_rows(self) -> FrameRows:
        """A row for each matrix, line or trial, all with the same keys."""
        raise NotImplementedError

    def glance(self) -> tuple[FrameRows, Sequence[float]]:
        """FrameRows of the small table, and the values of its sparkline; none: no sparkline."""
        return self.frame_rows(), ()

    def __repr__(self) -> str:
        return f"<{visible(self.headline())}>"

    def _repr_html_(self) -> str:
        rows, line = self.glance()
        more = f"<p>... and {len(rows) - GLANCE_ROWS} more</p>" if len(rows) > GLANCE_ROWS else ""
        return f"<p><b>{_html_text(self.headline())}</b> {sparkline(line)}</p>{_table(rows[:GLANCE_ROWS])}{more}"

    def to_frame(self) -> DataFrame:
        """The rows as a pandas DataFrame, numbers as numbers. Raises UsageError where pandas is not installed."""
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise UsageError("a DataFrame needs pandas; try pip install pandas") from error
        return DataFrame([dict(row) for row in self.frame_rows()])


def drawn(function: str, *given: Any, **options: Any) -> Axes:
    """What a function of `laser.report.plots` draws of a record. It is found by its name when a picture is asked for:
    that room stands above every record and imports them all."""
    return getattr(importlib.import_module("laser.report.plots"), function)(*given, **options)


def _html_text(value: object) -> str:
    return html.escape(visible(value))


def _table(rows: FrameRows) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{_html_text(key)}</th>" for key in rows[0])
    cells = [[html.escape(shown_value(value)) for value in row.values()] for row in rows]
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def sparkline(values: Sequence[float]) -> str:
    """A line without axes as inline SVG, from the lowest value to the highest; nothing for fewer than two."""
    points = [v for v in values if math.isfinite(v)]
    if len(points) < 2:
        return ""
    low, span = min(points), (max(points) - min(points)) or 1.0
    step = WIDTH / (len(points) - 1)
    path = " ".join(f"{i * step:.1f},{HEIGHT - 2 - (v - low) / span * (HEIGHT - 4):.1f}" for i, v in enumerate(points))
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="sparkline">'
        f'<polyline points="{path}" fill="none" stroke="currentColor" stroke-width="1.5"/></svg>'
    )
