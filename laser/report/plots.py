"""Pictures of spectra, with matplotlib (extra `plot`).

Colours are those of Okabe and Ito, which colour-blind readers tell apart, and viridis, which rises evenly. Shapes and
strokes differ as well, so that a picture can be printed in grey."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from laser.errors import UsageError
from laser.escape import visible
from laser.reasons import Kind
from laser.spectral.noise import DEFAULT_ESTIMATOR, Noise, estimate_noise, fit_noise
from laser.spectral.rules import apply_rule, parse_rule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from laser.outcome import Outcome
    from laser.plan import Plan, PlanLine
    from laser.searching.runner import Trial
    from laser.searching.search import SearchResult
    from laser.spectra import Spectra
    from laser.summary import Summary, SummaryRow

PICTURE_SUFFIXES = (".png", ".svg")
BINS = 70
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
IN_WEIGHTS, IN_NOISE = "unit of the weights", "unit of the noise"  # of values; IN_NOISE: of those of differences
CURVE = 60  # points of the fitted law's curve
WIDEST_TITLE = 80  # characters of a name that fit over a picture
MOST_TICKS = 80  # values kept that are marked one by one
MOST_NAMED = 60  # trials of a search whose names have room
# quantity -> (title, unit, value of a row)
QUANTITIES: dict[str, tuple[str, str, Callable[[SummaryRow], float | None]]] = {
    "kept": ("singular values kept", "share of all", lambda r: r.rank / r.full_rank),
    "snr": ("signal-to-noise ratio", "sum over / sum under the cut", lambda r: r.snr),
    "sigma": ("noise level", "sigma", lambda r: r.sigma),
    "fit": ("distance of the bulk from noise", "Kolmogorov-Smirnov", lambda r: r.fit),
    "alpha": ("exponent of the tail", "alpha", lambda r: r.alpha),
    "stable-rank": ("stable rank", "||W||_F^2 / s_1^2", lambda r: r.stable_rank),
}


@dataclass(frozen=True)
class Histogram:
    """A matrix's spectrum beside the law of noise that was fitted to it. Levels are in its `unit`."""

    model: str
    name: str
    rows: int
    columns: int
    values: NDArray[np.float64]  # (p,), descending
    curve_x: NDArray[np.float64]  # (CURVE,), from the lower edge to the upper
    curve: NDArray[np.float64]  # (CURVE,), values expected per unit of s: its integral is the size of the bulk
    lower_edge: float
    upper_edge: float
    sigma: float
    distance: float  # Kolmogorov-Smirnov, of the bulk from the law
    level: float
    rule: str
    threshold: float | None
    rank: int
    unit: str = IN_WEIGHTS

    @property
    def cut(self) -> float | None:
        """Where a picture draws the cut. Of a rule that fixes a rank, which has no threshold, over the largest value
        that is cut; None where none is."""
        if self.threshold is not None or self.rank == len(self.values):
            return self.threshold
        under = float(self.values[self.rank])
        return min(1.01 * under, (under + float(self.values[self.rank - 1])) / 2) if self.rank else 1.01 * under


def histogram_of(spectra: Spectra, name: str, rule: str = "mp-edge") -> Histogram:
    """What a histogram of matrix `name` shows, computed once for the pictures and the page.

    Raises UsageError for a matrix that was not scanned, with names that were.
    """
    if name not in spectra.values:
        near = [n for n in spectra.values if name in n][:3] or list(spectra.values)[:3]
        raise UsageError(f"{name!r} was not scanned in {spectra.source.name}; try one of {', '.join(near)}")
    matrix = spectra.by_name[name]
    s, shape = spectra.values[name], (matrix.shape[0], matrix.shape[1])
    estimator = parse_rule(rule)[0].estimator or DEFAULT_ESTIMATOR
    cut = apply_rule(rule, s, shape, spectra.nulls.get(name), spectra.sigma)
    noise = cut.noise or (Noise(spectra.sigma) if spectra.sigma is not None else estimate_noise(s, shape, estimator))
    fit = fit_noise(s, shape, estimator, noise)
    lower, upper = noise.lower_edge(shape), noise.upper_edge(shape)
    # Angles, not equal steps: the law rises like a square root at both edges, and at 0 it need not vanish.
    x = (lower + upper) / 2 - (upper - lower) / 2 * np.cos(np.linspace(0, math.pi, CURVE))
    share = noise.cdf(x, shape) if noise.sigma > 0 else np.zeros(CURVE)
    density = np.gradient(share, x) if upper > lower else np.zeros(CURVE)
    return Histogram(
        model=spectra.source.name,
        name=name,
        rows=shape[0],
        columns=shape[1],
        values=s,
        curve_x=x,
        curve=np.maximum(density, 0.0) * fit.bulk,
        lower_edge=lower,
        upper_edge=upper,
        sigma=fit.sigma,
        distance=fit.distance,
        level=fit.level,
        rule=rule,
        threshold=cut.threshold,
        rank=cut.rank,
        unit=IN_WEIGHTS if spectra.delta is None else IN_NOISE,
    )


def label(text: str) -> str:
    """Text that matplotlib draws as it is.

    A dollar sign begins no formula, and a first underscore does not hide the text from the legend. What the font lacks
    or nobody can see is shown as its escape. Of a text that is too long the middle is left out.
    """
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    drawn = "".join(c if font.get_char_index(ord(c)) else ascii(c)[1:-1] for c in visible(text))
    if len(drawn) > WIDEST_TITLE:
        drawn = f"{drawn[: WIDEST_TITLE // 2]}...{drawn[-WIDEST_TITLE // 2 + 3 :]}"
    return (" " if drawn.startswith("_") else "") + drawn.replace("$", r"\$")


def _figure(width: float, height: float, shown: bool = False) -> Figure:
    """A figure that needs no display, or with `shown` one that a notebook shows below its cell, and `plt.show()` in a
    window. Raises UsageError where matplotlib is not installed."""
    try:
        if shown:
            from matplotlib.pyplot import figure
        else:  # the object-oriented interface: no global state, no backend to choose
            from matplotlib.figure import Figure as figure
    except ImportError as error:
        raise UsageError('pictures need matplotlib; try pip install "laser-rmt[plot]"') from error
    return figure(figsize=(width, height), dpi=120, layout="constrained")


def encoded(figure: Figure, path: Path) -> bytes:
    """What a PNG or SVG file of that name holds, the same bytes each time. Raises UsageError for another suffix."""
    check_picture(path)
    from matplotlib import rc_context

    drawn, metadata = (
        io.BytesIO(),
        {"Date": None, "Creator": "laser"} if path.suffix == ".svg" else {"Software": "laser"},
    )
    with rc_context({"svg.hashsalt": "laser", "svg.fonttype": "none"}):
        figure.savefig(drawn, format=path.suffix[1:], metadata=metadata)
    return drawn.getvalue()


def check_picture(path: Path, quantity: str = "kept") -> None:
    """What can be refused of a picture before there is anything to draw. Raises UsageError for another suffix or
    quantity of a heat map."""
    if path.suffix not in PICTURE_SUFFIXES:
        raise UsageError(f"{path} is neither a .png nor a .svg; try -o {path.with_suffix('.png').name}")
    if quantity not in QUANTITIES:
        raise UsageError(f"no heat map shows {quantity!r}; try one of {', '.join(QUANTITIES)}")


def plot_spectrum(spectra: Spectra, name: str, rule: str | None = None, ax: Axes | None = None) -> Axes:
    """Histogram of the matrix `name` with the law of noise and the cut, on `ax` or a figure of its own.

    rule: whose cut; default: mp-edge, of differences `rounding`. Raises UsageError for a matrix that was not scanned.
    """
    axes = ax or _shown_axes(8, 4.5)
    histogram(histogram_of(spectra, name, rule or spectra.usual_rule), axes)
    return axes


def plot_spectra(spectra: Spectra, name: str | None = None, rule: str | None = None, ax: Axes | None = None) -> Axes:
    """`plot_spectrum` of the matrix `name`; without one, a map of what the rule keeps of every matrix."""
    if name is None:
        from laser.summary import summarise  # it brings torch, and the help page has this file's tables

        return plot_heat_map(summarise(spectra, rule or spectra.usual_rule), ax=ax)
    return plot_spectrum(spectra, name, rule, ax)


def plot_heat_map(summary: Summary, quantity: str = "kept", *, experts: bool = True, ax: Axes | None = None) -> Axes:
    """A quantity of every matrix, layer by role, on `ax` or a figure of its own. Raises as `heat_map`."""
    axes = ax or _shown_axes(*_size_of_map(summary.rows, experts))
    heat_map(summary, quantity, experts=experts, axes=axes)
    return axes


def plot_plan(plan: Plan, *, experts: bool = True, ax: Axes | None = None) -> Axes:
    """The share of its singular values that each matrix keeps, or by which it is scaled; what is left alone keeps
    all."""

    def share(line: PlanLine) -> float | None:
        if line.action != "reduce":
            return 1.0
        return line.scale if line.scale is not None else (line.rank or 0) / (line.full_rank or 1)

    title = f"{label(plan.source.name)}: singular values kept by the plan, rule {label(plan.rule)}"
    return _map_of_lines(plan, share, title, "share of all", experts, ax)


def plot_outcome(outcome: Outcome, *, experts: bool = True, ax: Axes | None = None) -> Axes:
    """The share of its squared singular values that each matrix has kept, as measured; of one that was cut by the data,
    of its outputs' mean square. What was left alone has kept all."""

    def left(line: PlanLine) -> float | None:
        return outcome.matrices[line.name]["energy_kept"] if line.action == "reduce" else 1.0

    title = f"{label(outcome.plan.source.name)}: energy kept, as measured, rule {label(outcome.plan.rule)}"
    return _map_of_lines(outcome.plan, left, title, "share of all", experts, ax)


def _map_of_lines(
    plan: Plan,
    value: Callable[[PlanLine], float | None],
    title: str,
    unit: str,
    experts: bool,
    ax: Axes | None,
) -> Axes:
    """A map of what is reduced, and of the layers' other matrices: embeddings and norms are left out."""

    def is_drawn(line: PlanLine) -> bool:
        beside = line.layer is not None and line.why.kind is not Kind.NOT_A_MATRIX
        return line.action == "reduce" or (line.action == "keep" and beside)

    lines = [line for line in plan.lines if is_drawn(line)]
    axes = ax or _shown_axes(*_size_of_map(lines, experts))
    _draw_map(lines, value, title, unit, experts, axes)
    return axes


def plot_search(result: SearchResult, ax: Axes | None = None) -> Axes:
    """The change that each trial measured with its standard error, the first trial on top.

    Filled: accepted. A cross: a race that ended before all was measured.
    """
    trials = result.trials
    axes = ax or _shown_axes(8, min(max(2.5, 0.24 * len(trials) + 1.5), 12))
    looks: dict[str, dict[str, Any]] = {
        "accepted": {"fmt": "o", "color": BLUE},
        "rejected": {"fmt": "o", "color": ORANGE, "markerfacecolor": "white"},
        "rejected early": {"fmt": "x", "color": "0.5"},
    }
    for kind, look in looks.items():
        these = [n for n, trial in enumerate(trials) if trial.d is not None and _fate(trial) == kind]
        changes, errors = [trials[n].d or 0.0 for n in these], [trials[n].se or 0.0 for n in these]
        named = {"label": f"{kind}: {len(these)}", "markersize": 5, "capsize": 2, "linewidth": 1}
        if these:
            axes.errorbar(changes, these, xerr=errors, **named, **look)
    for n, trial in enumerate(trials):
        if trial.d is None:
            axes.text(0, n, " not finite", fontsize=7, va="center")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_ylim(max(len(trials), 1) - 0.5, -0.5)
    if len(trials) <= MOST_NAMED:
        several = len({trial.rule for trial in trials}) > 1
        names = [f"{trial.label}  {trial.rule}" if several else trial.label for trial in trials]
        axes.set_yticks(range(len(trials)), [label(name) for name in names], fontsize=7)
    else:
        axes.set_ylabel("trial")
    verdicts = [f"held-out text: {label(each.verdict)}" for each in result.held_out if each.verdict is not None]
    axes.set_title("\n".join([f"{label(result.plan.source.name)}: trials of the search", *verdicts]), fontsize=10)
    axes.set_xlabel(f"change, {label(result.calibration.unit)}")
    if trials:
        axes.legend(frameon=False, fontsize=9)
    return axes


def _fate(trial: Trial) -> str:
    if trial.accepted:
        return "accepted"
    return "rejected" if trial.raced is None else "rejected early"


def new_axes(width: float, height: float) -> Axes:
    """Axes on a figure of so many inches."""
    return _figure(width, height).subplots()


def _shown_axes(width: float, height: float) -> Axes:
    """The same on a figure that is shown."""
    return _figure(width, height, shown=True).subplots()


def _figure_of(axes: Axes) -> Figure:
    return axes.get_figure(root=True)  # pyright: ignore[reportReturnType]


def histogram(shown: Histogram, axes: Axes | None = None) -> Figure:
    """Singular values of one matrix: what is kept and what is cut, the fitted law, both edges, the threshold."""
    axes = axes or new_axes(8, 4.5)
    edges = _bins([shown])
    values = np.minimum(shown.values, edges[-1])
    kept, cut = values[: shown.rank], values[shown.rank :]
    under, *_ = axes.hist(cut, edges, color="0.85", edgecolor="0.6", linewidth=0.4, label=f"cut: {len(cut)}")
    over: dict[str, Any] = {"color": BLUE, "edgecolor": "white", "hatch": "////", "linewidth": 0.4}
    axes.hist(kept, edges, bottom=under, label=f"kept: {len(kept)}", **over)
    width = edges[1] - edges[0]
    axes.plot(shown.curve_x, shown.curve * width, color=ORANGE, linewidth=1.8, label="law of noise, fitted")
    for x, legend in ((shown.lower_edge, "edges of the law"), (shown.upper_edge, None)):
        axes.axvline(x, color=ORANGE, linestyle=":", linewidth=1.2, label=legend)
    if shown.cut is not None:
        axes.axvline(shown.cut, color="black", linestyle="--", label=f"cut by {label(shown.rule)}")
    axes.set_title(_title([shown], edges), fontsize=10)
    axes.set_xlabel(
        f"singular value, {shown.unit}   (sigma {shown.sigma:.3g}, distance from the law "
        f"{shown.distance:.2g}, level {shown.level:.2g})"
    )
    # Outliers are bars of height one beside a bulk of hundreds: a tick at the foot makes each kept value visible.
    if 0 < len(kept) <= MOST_TICKS:  # of none there would still be room at the corner, and hundreds hide the axis
        axes.plot(kept, np.zeros(len(kept)), "|", color=BLUE, markersize=9, clip_on=False)
    _count_axis(axes, edges)
    axes.legend(frameon=False, fontsize=9)
    return _figure_of(axes)


def overlay(several: Sequence[Histogram], axes: Axes | None = None) -> Figure:
    """The same matrix in several models, as outlines of different stroke: source and result, base and fine-tune.

    After a cut a bin holds all that became 0, and the counts are on a log axis.
    """
    axes = axes or new_axes(8, 4.5)
    edges = _bins(several)
    strokes = (("0.8", "-", True), (BLUE, "-", False), (ORANGE, "--", False), (GREEN, ":", False))
    for shown, (colour, line, filled) in zip(several, strokes, strict=False):
        fill: dict[str, Any] = {"facecolor": colour if filled else "none", "edgecolor": "0.5" if filled else colour}
        axes.hist(
            np.minimum(shown.values, edges[-1]),
            edges,
            histtype="stepfilled",
            linestyle=line,
            linewidth=1.3,
            label=label(shown.model),
            **fill,
        )
    axes.set_title(_title(several, edges), fontsize=10)
    axes.set_xlabel(f"singular value, {several[0].unit}")
    if any(_has_a_spike(np.histogram(np.minimum(p.values, edges[-1]), edges)[0]) for p in several):
        axes.set_yscale("log")
    _count_axis(axes, edges)
    axes.legend(frameon=False, fontsize=9)
    return _figure_of(axes)


def top_of(several: Sequence[Histogram]) -> float:
    """Where a picture ends: at s_1, at most over the bulk and 95 % of the values, for a giant outlier would press the
    rest into one bin. A quarter more is taken where that is all of them. The cut is always inside."""
    top = max(float(p.values[0]) for p in several)
    most = (float(p.values[min(math.ceil(len(p.values) / 20), len(p.values) - 1)]) for p in several)
    span = max(max(4 * p.upper_edge, 1.2 * value) for p, value in zip(several, most, strict=True))
    cuts = max((1.03 * p.cut for p in several if p.cut is not None), default=0.0)
    return max(span if top * 1.02 > 1.25 * span else top * 1.02, cuts) or 1.0


def _bins(several: Sequence[Histogram]) -> list[float]:
    """Equal bins from 0 to the top. What lies beyond is drawn in the last bin, and the title says so."""
    return np.linspace(0.0, top_of(several), BINS + 1).tolist()


def _title(several: Sequence[Histogram], edges: list[float]) -> str:
    first, top = several[0], max(float(p.values[0]) for p in several)
    beyond = f"; last bin: all beyond, to {top:.3g}" if top > edges[-1] else ""
    models = label(", ".join(shown.model for shown in several))
    return f"{models}\n{label(first.name)}  ({first.rows} x {first.columns}){beyond}"


def _has_a_spike(counts: NDArray[np.int64]) -> bool:
    """Whether one bin of hundreds would press all others to the ground, as the zeros of a matrix that was cut."""
    ordered = np.sort(counts)[::-1]
    return bool(ordered[0] > 100 and ordered[0] > 5 * ordered[2])


def _count_axis(axes: Axes, edges: list[float]) -> None:
    axes.set_ylabel("singular values per bin")
    axes.set_xlim(0, edges[-1])
    if axes.get_yscale() == "log":
        axes.set_ylim(bottom=0.5)
    else:  # stated, for bars on top of others would take the margin away
        axes.set_ylim(0, 1.05 * axes.dataLim.y1)


def heat_map(summary: Summary, quantity: str = "kept", *, experts: bool = True, axes: Axes | None = None) -> Figure:
    """Layer by role, experts side by side as columns (else their mean); brighter is more.

    Raises UsageError for an unknown quantity.
    """
    if quantity not in QUANTITIES:
        raise UsageError(f"no heat map shows {quantity!r}; try one of {', '.join(QUANTITIES)}")
    title, unit, value = QUANTITIES[quantity]
    axes = axes or new_axes(*_size_of_map(summary.rows, experts))
    told = f"{label(summary.source.name)}: {title}, rule {label(summary.rule)}"
    return _draw_map(summary.rows, value, told, unit, experts, axes)


class Placed(Protocol):
    """What has a place in a map."""

    @property
    def role(self) -> str: ...
    @property
    def layer(self) -> int | None: ...
    @property
    def expert(self) -> int | None: ...
    @property
    def stack(self) -> str: ...
    @property
    def place(self) -> int | str | None: ...


PlacedRow = TypeVar("PlacedRow", bound=Placed)


def _size_of_map(rows: Sequence[Placed], experts: bool) -> tuple[float, float]:
    """Inches that a map of these needs."""
    columns, layers = cells_of(rows, experts=experts)
    return max(5.0, 0.32 * len(columns) + 2.5), max(3.0, 0.2 * len(layers) + 1.8)


def _draw_map(
    rows: Sequence[PlacedRow],
    value: Callable[[PlacedRow], float | None],
    title: str,
    unit: str,
    experts: bool,
    axes: Axes,
) -> Figure:
    """A value of each of the rows, layer by role."""
    if not rows:
        raise UsageError("there is no matrix to draw; try a scan or a plan of more layers or roles")
    columns, layers, grid = grid_of(rows, value, experts=experts)
    norm, note = _norm(grid)
    values = np.ma.masked_invalid(grid)
    image = axes.imshow(values, cmap="viridis", norm=norm, aspect="auto", interpolation="nearest")
    axes.set_facecolor("white")
    roles = [column for column, _ in cells_of(rows, experts=experts)[0]]
    for at in range(1, len(roles)):
        if roles[at] != roles[at - 1]:
            axes.axvline(at - 0.5, color="white", linewidth=2)
    for at in np.argwhere(np.isnan(grid)):
        axes.text(at[1], at[0], "-", ha="center", va="center", fontsize=7)  # not scanned, or undefined
    axes.set_xticks(
        range(len(columns)), [label(c) for c in columns], rotation=90 if len(columns) > 12 else 0, fontsize=8
    )
    step = max(1, len(layers) // 20)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=8)
    axes.set_xlabel("role, and expert where there are several" if experts else "role, mean over experts")
    axes.set_ylabel("layer")
    axes.set_title(title, fontsize=10)
    figure = _figure_of(axes)
    figure.colorbar(image, ax=axes, label=unit + note)
    return figure


def _norm(grid: np.ndarray) -> tuple[Any, str]:
    """The scale of a map's colours, and what to say of it: logarithmic where what is positive spans two decades and
    nothing is under 0; else matplotlib's own. A 0 has then the colour of the least."""
    from matplotlib.colors import LogNorm

    positive = grid[grid > 0]
    if not positive.size or (grid < 0).any() or positive.max() < 100 * positive.min():
        return None, ""
    zero = "; 0 as the least" if (grid == 0).any() else ""
    return LogNorm(float(positive.min()), float(positive.max()), clip=True), f", log scale{zero}"


def cells_of(
    rows: Sequence[Placed], *, experts: bool = True
) -> tuple[list[tuple[str, int | None]], list[int | str | None]]:
    """(columns, each a role and an expert; layers) of a heat map."""
    roles = {role: number for number, role in enumerate(dict.fromkeys(row.role for row in rows))}
    columns = sorted({(r.role, r.expert if experts else None) for r in rows}, key=lambda k: (roles[k[0]], k[1] or 0))
    layers = sorted({(row.stack, -1 if row.layer is None else row.layer, row.place) for row in rows})
    return columns, [place for _, _, place in layers]


def grid_of(
    rows: Sequence[PlacedRow], value: Callable[[PlacedRow], float | None], *, experts: bool = True
) -> tuple[list[str], list[int | str | None], np.ndarray]:
    """Column labels, layers and the (layers, columns) values: means over what shares a cell, NaN where nothing is."""
    columns, layers = cells_of(rows, experts=experts)
    down = {place: number for number, place in reversed([*enumerate(layers)])}
    across = {key: number for number, key in enumerate(columns)}
    cells: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        if (found := value(row)) is not None:
            cells.setdefault((down[row.place], across[row.role, row.expert if experts else None]), []).append(found)
    grid = np.full((len(layers), len(columns)), np.nan)
    for at, values in cells.items():
        grid[at] = np.mean(values)
    return [role if expert is None else f"{role}.{expert}" for role, expert in columns], layers, grid
