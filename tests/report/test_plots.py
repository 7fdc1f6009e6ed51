"""Pictures hold what they should, come out the same each time, and say what to do when they cannot be made."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import laser
from laser.errors import UsageError
from laser.escape import visible
from laser.pipeline import scan
from laser.searching.runner import Trial
from laser.searching.search import Report, SearchResult
from laser.spectra import Spectra
from laser.summary import Summary, summarise

pytest.importorskip("matplotlib", reason='pictures need the extra: pip install "laser-rmt[plot]"')

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from laser.report import plots

NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def no_figures_left() -> Iterator[None]:
    """pyplot keeps every figure that was shown, and warns of the twentieth; and here it opens no window."""
    pyplot.switch_backend("agg")
    yield
    pyplot.close("all")


@pytest.fixture
def spectra(pico: Path) -> Spectra:
    return scan(laser.open_checkpoint(pico))


@pytest.fixture
def summary(spectra: Spectra) -> Summary:
    return summarise(spectra)


def heights(figure: object) -> list[list[float]]:
    axes = figure.axes[0]  # pyright: ignore[reportAttributeAccessIssue]
    return [[patch.get_height() for patch in container] for container in axes.containers]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["mp-edge", "bema", "gavish-donoho", "rank:5"])
def test_curve_is_a_density_of_the_bulk_between_the_edges(spectra: Spectra, rule: str) -> None:
    drawn = plots.histogram_of(spectra, NAME, rule)
    bulk = np.count_nonzero(drawn.values <= drawn.upper_edge)
    assert np.trapezoid(drawn.curve, drawn.curve_x) == pytest.approx(bulk, rel=0.05)
    assert drawn.curve_x[0] == pytest.approx(drawn.lower_edge) and drawn.curve_x[-1] == pytest.approx(drawn.upper_edge)
    assert (drawn.threshold is None) == rule.startswith("rank")


def test_histogram_shows_every_value_as_cut_or_kept(spectra: Spectra) -> None:
    drawn = plots.histogram_of(spectra, NAME)
    figure = plots.histogram(drawn)
    cut, kept = heights(figure)
    assert (sum(cut), sum(kept)) == (32 - drawn.rank, drawn.rank)
    stacked = [a + b for a, b in zip(cut, kept, strict=True)]  # and none of them touches the frame
    assert max(patch.get_y() + patch.get_height() for patch in figure.axes[0].patches) == max(stacked)  # pyright: ignore
    assert figure.axes[0].get_ylim()[1] > max(stacked)
    words = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]  # pyright: ignore[reportOptionalMemberAccess]
    assert words[:3] == [f"cut: {32 - drawn.rank}", f"kept: {drawn.rank}", "law of noise, fitted"]
    assert "unit of the weights" in figure.axes[0].get_xlabel() and NAME in figure.axes[0].get_title()
    ticks = [line for line in figure.axes[0].lines if line.get_marker() == "|"]
    assert [len(np.atleast_1d(line.get_xdata())) for line in ticks] == [drawn.rank]
    many = replace(drawn, values=np.linspace(9, 1, 200), rank=150)  # they would hide the axis
    assert not [line for line in plots.histogram(many).axes[0].lines if line.get_marker() == "|"]
    levels = [line.get_xdata()[0] for line in figure.axes[0].lines if len(set(np.atleast_1d(line.get_xdata()))) == 1]  # pyright: ignore
    assert {drawn.lower_edge, drawn.upper_edge, drawn.threshold} <= set(levels)


@pytest.mark.slow
def test_in_grey_it_can_still_be_read(spectra: Spectra, summary: Summary) -> None:
    """What is kept is darker than what is cut by a third of the scale, and a heat map's colours rise evenly."""
    axes = plots.histogram(plots.histogram_of(spectra, NAME)).axes[0]
    grey = np.array([0.299, 0.587, 0.114])
    cut, kept = (float(np.dot(bars[0].get_facecolor()[:3], grey)) for bars in axes.containers)  # pyright: ignore
    assert cut - kept > 1 / 3
    image = plots.heat_map(summary).axes[0].images[0]
    steps = np.diff(np.asarray(image.cmap(np.linspace(0, 1, 32)))[:, :3] @ grey)
    assert (steps > 0).all() and steps.max() < 4 * steps.mean()


def test_a_picture_goes_into_axes_of_another_figure(spectra: Spectra, summary: Summary) -> None:
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert laser.plot_spectrum(spectra, NAME, "mp-edge", ax=left) is left and left.get_title().startswith("pico\n")
    assert laser.plot_heat_map(summary, "snr", ax=right) is right and right.images
    assert laser.plot_spectrum(spectra, NAME).get_figure() is not figure


def cells(axes: Axes) -> dict[tuple[str, str], float]:
    """Layer and column of each cell of a map -> its value; empty cells are left out."""
    columns, layers = ([text.get_text() for text in axis.get_ticklabels()] for axis in (axes.xaxis, axes.yaxis))
    grid = np.ma.getdata(axes.images[0].get_array())  # pyright: ignore[reportCallIssue, reportArgumentType]
    found = {(layer, column): grid[n, m] for n, layer in enumerate(layers) for m, column in enumerate(columns)}
    return {key: float(value) for key, value in found.items() if not np.isnan(value)}


def test_spectra_and_summary_draw_themselves(spectra: Spectra, summary: Summary) -> None:
    drawn = spectra.plot(NAME, "rank:5")
    assert [text.get_text() for text in drawn.get_legend().get_texts()][1] == "kept: 5"  # pyright: ignore
    assert spectra.plot(NAME).get_title() == laser.plot_spectrum(spectra, NAME).get_title()
    assert cells(spectra.plot(rule="rank:8"))["2", "q"] == 0.25
    wanted = next(row.stable_rank for row in summary.rows if row.name == NAME)
    assert cells(summary.plot("stable-rank"))["0", "q"] == wanted
    with pytest.raises(UsageError, match="was not scanned"):
        spectra.plot("model.norm.weight")


def test_plan_and_outcome_draw_what_is_kept(pico: Path, spectra: Spectra, tmp_path: Path) -> None:
    """Where it cuts and how deep, and what was then measured; what is left alone keeps all, and a norm has no cell."""
    plan = laser.make_plan(spectra, "rank:4", laser.Selection(layers=(1,), roles=("q", "w1")))
    assert len(plan.reductions) == 5  # four experts
    found, outcome = cells(plan.plot()), laser.reduce(pico, plan, tmp_path / "out", device="cpu")
    measured = cells(outcome.plot())
    cut = {("1", "q"), *(("1", f"w1.{expert}") for expert in range(4))}
    assert found.keys() == measured.keys() and {layer for layer, _ in found} == {"0", "1", "2"}
    assert {key for key, value in found.items() if value != 1} == cut == {k for k, v in measured.items() if v != 1}
    assert all(found[key] == 4 / 32 for key in cut)
    q = "model.layers.1.self_attn.q_proj.weight"
    assert measured["1", "q"] == outcome.matrices[q]["energy_kept"] < 1
    of_experts = [outcome.matrices[n]["energy_kept"] for n in plan.reductions if n != q]
    assert cells(outcome.plot(experts=False))["1", "w1"] == pytest.approx(np.mean(of_experts))
    assert "as measured" in outcome.plot().get_title() and "by the plan" in plan.plot().get_title()
    with pytest.raises(UsageError, match="no matrix to draw"):
        replace(plan, lines=plan.lines[:1]).plot()


def test_a_search_draws_its_trials_in_order_with_their_errors(spectra: Spectra) -> None:
    report = Report("loss", "nats per token", "x", 6, 600, 3.0, 0.1, 2.9, 0.1, -0.1, 0.05)
    one = Trial("q", "rank:4", {}, False, -0.2, 0.05, True, None, 3, 1.0)
    rest = (replace(one, d=0.3, accepted=False), replace(one, d=None, accepted=False))
    trials = (one, *rest, replace(one, d=0.1, accepted=False, raced=2))
    result = SearchResult(laser.make_plan(spectra, "rank:4"), trials, report, (report,), None)
    axes = result.plot()
    words = [text.get_text() for text in axes.get_legend().get_texts()]  # pyright: ignore[reportOptionalMemberAccess]
    assert words == ["accepted: 1", "rejected: 1", "rejected early: 1"]
    marks = [bar.lines[0].get_xydata().tolist() for bar in axes.containers]  # pyright: ignore
    assert marks == [[[-0.2, 0.0]], [[0.3, 1.0]], [[0.1, 3.0]]] and axes.yaxis_inverted()
    (ends,) = axes.containers[0].lines[2][0].get_segments()  # pyright: ignore
    assert ends[:, 0].tolist() == pytest.approx([-0.25, -0.15])
    assert [text.get_text().strip() for text in axes.texts] == ["not finite"] and axes.texts[0].get_position()[1] == 2
    assert axes.get_title() == "pico: trials of the search\nheld-out text: better" and "nats" in axes.get_xlabel()
    many = replace(result, trials=(one,) * 400)
    assert many.plot().get_ylabel() == "trial" and not replace(result, trials=()).plot().containers


def test_every_record_draws_into_axes_that_are_there(pico: Path, spectra: Spectra, tmp_path: Path) -> None:
    plan = laser.make_plan(spectra, "rank:4", laser.Selection(layers=(1,), roles=("q",)))
    report = Report("loss", "nats per token", "x", 6, 600, 3.0, 0.1, 2.9, 0.1, -0.1, 0.05)
    found = SearchResult(plan, (), report, (), None)
    several = (spectra, summarise(spectra), plan, laser.reduce(pico, plan, tmp_path / "out", device="cpu"), found)
    for record, ax in zip(several, Figure().subplots(5), strict=True):
        assert record.plot(ax=ax) is ax and ax.get_title().startswith("pico: ")
        assert record.plot() is not ax  # and else on a figure of pyplot's, which a notebook shows
        assert pyplot.get_fignums() == [1]
        pyplot.close("all")


@pytest.mark.parametrize("rule", ["mp-edge", "rank:4", "fraction:0.5", "rank:0", "rank:32"])
def test_the_cut_is_inside_the_picture_also_where_nothing_is_kept(spectra: Spectra, rule: str) -> None:
    """A line between what is kept and what is cut, of every rule; none where nothing is cut."""
    shown = plots.histogram_of(spectra, NAME, rule)
    outlier = replace(shown, values=np.concatenate([[1e3 * shown.values[0]], shown.values[1:]]))
    high = replace(shown, threshold=3 * float(shown.values[0]), rank=0)
    for each in (shown, outlier, high):
        axes = plots.histogram(each).axes[0]
        drawn = [line.get_xdata()[0] for line in axes.lines if str(line.get_label()).startswith("cut by")]  # pyright: ignore
        assert drawn == ([] if each.cut is None else [each.cut]) and (each.cut is None) == (each.rank == 32)
        if each.cut is not None:
            assert axes.get_xlim()[0] <= each.cut <= axes.get_xlim()[1]
            assert np.count_nonzero(each.values > each.cut) == each.rank
    assert plots.top_of([outlier]) < outlier.values[0] / 10 or outlier.rank == 0


def test_a_small_adapter_does_not_press_the_noise_into_one_bin(spectra: Spectra) -> None:
    """Rank 8 of 192, a thousand times over the rounding: the bulk is what is looked at, the rest is in the last bin."""
    shown = plots.histogram_of(spectra, NAME)
    values = np.concatenate([np.linspace(23_000, 1_200, 8), np.linspace(27, 1, 184)])
    assert plots.top_of([replace(shown, values=values, upper_edge=28.0, threshold=28.0, rank=8)]) < 5 * 28


def test_a_picture_of_nothing_kept_is_as_large_as_any(spectra: Spectra) -> None:
    sizes = []
    for rule in ("rank:4", "rank:0"):
        figure = plots.histogram(plots.histogram_of(spectra, NAME, rule))
        figure.draw_without_rendering()  # which lays it out
        sizes.append(figure.axes[0].get_position().width)
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)


def test_the_titles_name_the_models(spectra: Spectra, summary: Summary) -> None:
    shown = plots.histogram_of(spectra, NAME)
    pair = plots.overlay([shown, replace(shown, model="tuned")])
    for figure, named in (
        (plots.histogram(shown), "pico\n"),
        (pair, "pico, tuned\n"),
        (plots.heat_map(summary), "pico: "),
    ):
        assert figure.axes[0].get_title().startswith(named)


def test_an_overlay_after_a_cut_has_a_log_axis_on_which_the_rest_is_seen(spectra: Spectra) -> None:
    shown = replace(plots.histogram_of(spectra, NAME), values=np.linspace(10, 0.1, 600))
    cut = replace(shown, values=np.where(np.arange(600) < 200, shown.values, 1e-9), model="reduced")
    axes = plots.overlay([shown, cut]).axes[0]
    assert axes.get_yscale() == "log" and axes.get_ylim()[0] == 0.5  # a single value is over the ground
    assert plots.overlay([shown, shown]).axes[0].get_yscale() == "linear"


def test_a_heat_map_over_decades_has_a_log_scale(summary: Summary) -> None:
    def scale(*values: float | None) -> tuple[str, str]:
        rows = [replace(row, snr=value) for row, value in zip(summary.rows, values, strict=False)]
        figure = plots.heat_map(replace(summary, rows=tuple(rows)), "snr")
        return type(figure.axes[0].images[0].norm).__name__, figure.axes[1].get_ylabel()

    unit = plots.QUANTITIES["snr"][1]
    assert scale(0.01, 1.0, 0.5, None) == ("LogNorm", f"{unit}, log scale")
    assert scale(0.0, 0.01, 1.0) == ("LogNorm", f"{unit}, log scale; 0 as the least")
    assert scale(0.02, 1.0) == scale(-0.01, 1.0, 0.5) == scale(0.0, 0.0) == ("Normalize", unit)


def test_every_picture_keeps_to_one_palette(spectra: Spectra) -> None:
    """Okabe and Ito's colours, greys and viridis; nothing of matplotlib's own cycle."""
    from matplotlib.colors import to_hex

    okabe = {"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#ffffff"}
    shown = plots.histogram_of(spectra, NAME)
    for figure in (plots.histogram(shown), plots.overlay([replace(shown, model=name) for name in "abcd"])):
        axes = figure.axes[0]
        found = {to_hex(line.get_color()) for line in axes.lines}
        found |= {to_hex(patch.get_facecolor()) for patch in axes.patches} | {
            to_hex(p.get_edgecolor()) for p in axes.patches
        }
        assert all(colour in okabe or len({colour[1:3], colour[3:5], colour[5:]}) == 1 for colour in found), found


@pytest.mark.slow
@pytest.mark.parametrize("quantity", plots.QUANTITIES)
def test_heat_map_puts_each_matrix_in_its_cell(summary: Summary, quantity: str) -> None:
    value = plots.QUANTITIES[quantity][2]
    columns, layers, grid = plots.grid_of(summary.rows, value)
    assert layers == [0, 1, 2] and len(columns) == 16 and grid.shape == (3, 16)
    for row in summary.rows:
        column = columns.index(row.role if row.expert is None else f"{row.role}.{row.expert}")
        assert grid[layers.index(row.layer), column] == pytest.approx(value(row))
    means, _, coarse = plots.grid_of(summary.rows, value, experts=False)
    assert set(means) == {"w1", "w2", "w3", "q", "k", "v", "o"}
    first = [value(r) for r in summary.rows if r.role == "w1" and r.layer == 0]
    assert coarse[0, means.index("w1")] == pytest.approx(np.mean([v for v in first if v is not None]))


def test_roles_are_apart_and_their_experts_are_not(summary: Summary) -> None:
    labels, _, _ = plots.grid_of(summary.rows, lambda row: 1.0)
    axes = plots.heat_map(summary).axes[0]
    found = [float(np.atleast_1d(line.get_xdata())[0]) for line in axes.lines]
    firsts = [at for at in range(1, len(labels)) if labels[at].partition(".")[0] != labels[at - 1].partition(".")[0]]
    assert found == [at - 0.5 for at in firsts] and len(found) == 6


def test_undefined_cells_are_dashes(summary: Summary) -> None:
    rows = (replace(summary.rows[0], snr=None), *summary.rows[1:])
    figure = plots.heat_map(replace(summary, rows=rows), "snr")
    assert [text.get_text() for text in figure.axes[0].texts] == ["-"]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_same_picture_is_the_same_file(spectra: Spectra, tmp_path: Path, suffix: str) -> None:
    other: plots.Histogram = replace(plots.histogram_of(spectra, NAME), model="other")
    pair = [plots.histogram_of(spectra, NAME), other]
    one, two = (plots.encoded(plots.overlay(pair), (tmp_path / name).with_suffix(suffix)) for name in ("a", "b"))
    assert one == two and one[:4] in (b"\x89PNG", b"<?xm")


STRANGE = ("$x$", "$\\frac{$", "a$b", "\\$a\\$", "\\alpha", "_hidden", "__", "a\nb", "a\x1b[31mb", "a\u202eb", "a\x00b")
STRANGE += ("\udcff", "<b>&amp;", "模型", "é", "😀", "%s {} {0}", "\ufffe", "'\"`|")


LONG = "a" * 300


def texts_of(figure: Figure, path: Path) -> list[str]:
    """The texts of the picture as a reader of its SVG finds them."""
    path.write_bytes(plots.encoded(figure, path))
    nodes = ElementTree.parse(path).getroot().iter("{http://www.w3.org/2000/svg}text")
    return [" ".join((node.text or "").split()) for node in nodes]


@pytest.mark.slow
def test_any_name_is_drawn_as_it_is(spectra: Spectra, summary: Summary, tmp_path: Path) -> None:
    """All that can be seen of a name, and the escapes of what cannot or has no glyph in the font."""
    shown = {name: visible(name) for name in STRANGE} | {"模型": r"\u6a21\u578b", LONG: "a" * 40 + "..." + "a" * 37}
    names, one = list(shown), plots.histogram_of(spectra, NAME)
    for start in range(0, len(names), 4):  # an overlay has four kinds of strokes
        models = names[start : start + 4]
        drawn = [replace(one, name=model, model=model) for model in models]
        found = texts_of(plots.overlay(drawn), tmp_path / "x.svg")
        assert {shown[model] for model in models} | {f"{shown[models[0]]} (32 x 32)"} <= set(found)
    for name in ("$\\frac{$", "_a\x00"):
        found = texts_of(plots.histogram(replace(one, name=name, rule=name)), tmp_path / "x.svg")
        assert {f"{visible(name)} (32 x 32)", f"cut by {visible(name)}"} <= set(found)
        told = replace(summary, source=replace(summary.source, name=name), rule=name)
        found = texts_of(plots.heat_map(told, experts=False), tmp_path / "x.svg")
        assert f"{visible(name)}: singular values kept, rule {visible(name)}" in found
        plots.encoded(plots.heat_map(told, experts=False), tmp_path / "x.png")


def test_what_cannot_be_drawn(
    spectra: Spectra, summary: Summary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="was not scanned"):
        plots.histogram_of(spectra, "model.norm.weight")
    with pytest.raises(UsageError, match="stable-rank"):
        plots.heat_map(summary, "colour")
    with pytest.raises(UsageError, match=r"try -o x\.png"):
        plots.encoded(plots.heat_map(summary), tmp_path / "x.pdf")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"laser-rmt\[plot\]"):
        plots.heat_map(summary)
