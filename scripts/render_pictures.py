#!/usr/bin/env python3
"""Draw the pictures of README.md and of the pages of concepts into docs/images, as SVG.

python scripts/render_pictures.py [--check]       with --check, fail if one of them is out of date
python scripts/render_pictures.py --values FILE   take the real matrix's values anew, from spectra of the demo's model

One matrix is real: its singular values lie in docs/images/values.json. All else is drawn from fixed seeds.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from laser.spectral import marchenko_pastur as mp
from laser.spectral.noise import bulk_distance, estimate_noise, fit_noise, gaussian_spectrum
from laser.spectral.rules import apply_rule, signal_to_noise

IMAGES = Path(__file__).parent.parent / "docs" / "images"
VALUES = IMAGES / "values.json"
MATRIX = "model.layers.3.block_sparse_moe.experts.0.w1.weight"
RULE = "mp-median"
# Okabe and Ito's colours, which readers with any colour vision tell apart.
BLUE, ORANGE, GREEN, PURPLE, GREY, LIGHT = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#555555", "#cfd8dc"
STYLE: dict[Any, Any] = {"svg.hashsalt": "laser", "svg.fonttype": "path", "font.size": 10, "axes.spines.top": False}
STYLE |= {"axes.spines.right": False, "legend.frameon": False, "path.simplify": False}
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")
CLOSE = 0.75  # points by which a line may lie elsewhere on another machine: last digits differ, and counts by one
Values = NDArray[np.float64]


def real() -> tuple[Values, tuple[int, int]]:
    """Singular values of the real matrix, descending, and its shape."""
    kept = json.loads(VALUES.read_text())
    return np.array(kept["values"]), tuple(kept["shape"])


def planted() -> tuple[Values, tuple[int, int]]:
    """Noise of deviation 1 with five spikes."""
    random, shape = np.random.default_rng(5), (384, 256)
    W = random.standard_normal(shape)
    for spike in (75.0, 65.0, 58.0, 52.0, 46.0):
        u, v = random.standard_normal(384), random.standard_normal(256)
        W += spike * np.outer(u / np.linalg.norm(u), v / np.linalg.norm(v))
    return np.linalg.svd(W, compute_uv=False).astype(np.float64), shape


def axes_of(width: float = 7.2, height: float = 3.2, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def law(axes: Any, sigma: float, shape: tuple[int, int], values: float, width: float, **line: Any) -> None:
    """The law's curve, in values per bin of that width."""
    lower, upper = mp.edges(sigma, shape)
    x = (lower + upper) / 2 - (upper - lower) / 2 * np.cos(np.linspace(0, np.pi, 120))
    _, q, beta = mp.aspect(shape)
    unit = sigma * q**0.5
    axes.plot(x, mp.density(x / unit, beta) / unit * values * width, **{"color": ORANGE, "linewidth": 2} | line)


def bars(axes: Any, s: Values, bins: Values, rank: int) -> None:
    """A histogram of two colours: what is kept over what is cut."""
    below, _ = np.histogram(s[rank:], bins)
    above, _ = np.histogram(s[:rank], bins)
    axes.stairs(below, bins, fill=True, color=LIGHT, label=f"under the cut: {len(s) - rank}")
    axes.stairs(below + above, bins, baseline=below, fill=True, color=BLUE, label=f"over the cut: {rank}")


def histogram() -> Figure:
    """The picture of README: a real matrix, the law of noise that was fitted to it, and the cut."""
    figure, axes = axes_of(height=3.4)
    s, shape = real()
    cut, noise = apply_rule(RULE, s, shape), estimate_noise(s, shape, "median")
    bins = np.linspace(0, s[0] * 1.03, 90)
    bars(axes, s, bins, cut.rank)
    law(axes, noise.sigma, shape, len(s) - cut.rank, bins[1], label="Marchenko-Pastur law, fitted")
    axes.axvline(cut.threshold, color=GREY, linestyle="--", label=f"the cut, by {RULE}")
    axes.plot(s[: cut.rank], np.zeros(cut.rank), "|", color=BLUE, markersize=9, clip_on=False)
    axes.set(xlabel="singular value", ylabel="values per bin", xlim=(0, bins[-1]), ylim=(0, None))
    axes.set_title(f"{MATRIX}  ({shape[0]} x {shape[1]}), SmolLM2-135M as a Mixtral", fontsize=9)
    axes.legend(fontsize=9)
    return figure


def spectrum() -> Figure:
    """A matrix's singular values in order, beside those of noise of the same size."""
    figure, axes = axes_of()
    s, shape = real()
    noise = gaussian_spectrum(min(shape), max(shape), np.random.default_rng(1))
    noise *= np.sqrt(np.sum(s**2) / np.sum(noise**2))
    place = np.arange(1, len(s) + 1)
    axes.plot(place, s, color=BLUE, linewidth=2, label="a trained matrix")
    axes.plot(place, noise, color=ORANGE, linewidth=2, label="noise with the same sum of squares")
    axes.set(xlabel="place i", ylabel="singular value s_i", xlim=(1, len(s)), ylim=(0, None))
    axes.legend()
    return figure


def noise() -> Figure:
    """Pure noise against its law: no value lies beyond the edges but by chance."""
    figure, axes = axes_of()
    shape = (1536, 576)
    s = gaussian_spectrum(576, 1536, np.random.default_rng(2))
    lower, upper = mp.edges(1.0, shape)
    bins = np.linspace(lower - 3, upper + 3, 60)
    bars(axes, s, bins, 0)
    law(axes, 1.0, shape, 576, bins[1] - bins[0], label="Marchenko-Pastur law")
    for x, name in ((lower, "lower edge"), (upper, "upper edge")):
        axes.axvline(x, color=GREY, linestyle=":")
        axes.annotate(name, (x, axes.get_ylim()[1]), (4, -10), textcoords="offset points", fontsize=9)
    axes.set(xlabel="singular value, sigma = 1", ylabel="values per bin", ylim=(0, None))
    axes.legend(["576 values of Gaussian noise, 1536 x 576", "0 over the edge", "Marchenko-Pastur law"], fontsize=9)
    axes.get_legend().get_texts()[1].set_color(GREY)
    return figure


def beta() -> Figure:
    """The law at three ratios of the sides."""
    figure, axes = axes_of()
    for ratio, colour, style in ((0.05, BLUE, "-"), (0.375, ORANGE, "--"), (1.0, GREEN, "-.")):
        x = np.linspace(max(1 - ratio**0.5, 0), 1 + ratio**0.5, 300)
        label = f"beta = {ratio:g}, edges {1 - ratio**0.5:.2f} and {1 + ratio**0.5:.2f}"
        axes.plot(x, mp.density(x, ratio), color=colour, linestyle=style, linewidth=2, label=label)
    axes.set(xlabel="singular value / (sigma sqrt(q))", ylabel="density", xlim=(0, 2.1), ylim=(0, None))
    axes.legend(fontsize=9)
    return figure


def edges() -> Figure:
    """Where rules cut one and the same matrix of noise with five spikes."""
    figure, axes = axes_of()
    s, shape = planted()
    bins = np.linspace(0, s[0] * 1.03, 80)
    bars(axes, s, bins, 5)
    law(axes, estimate_noise(s, shape, "median").sigma, shape, len(s) - 5, bins[1])
    rules = (("laser-rmt", PURPLE, ":"), ("mp-median", GREY, "--"), ("tracy-widom:0.05", GREEN, "-."))
    for rule, colour, style in (*rules, ("gavish-donoho", "black", "-")):
        cut = apply_rule(rule, s, shape)
        axes.axvline(cut.threshold, color=colour, linestyle=style, label=f"{rule} keeps {cut.rank}")
    axes.plot(s[:5], np.zeros(5), "|", color=BLUE, markersize=9, clip_on=False)
    axes.set(xlabel="singular value, sigma = 1", ylabel="values per bin", xlim=(0, bins[-1]), ylim=(0, None))
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[2:], labels[2:], fontsize=9)
    return figure


def level() -> Figure:
    """Two distributions of a bulk against the law: of noise, and of a trained matrix."""
    figure, both = axes_of(7.2, 3.2, columns=2)
    shape = (1536, 576)
    noisy = gaussian_spectrum(576, 1536, np.random.default_rng(2))
    for axes, (s, name) in zip(both, ((noisy, "noise"), (real()[0], "a trained matrix")), strict=True):
        estimated = estimate_noise(s, shape, "median")
        fit = fit_noise(s, shape, "median", estimated)
        bulk = np.sort(s[s <= estimated.upper_edge(shape)])
        axes.plot(bulk, np.arange(1, len(bulk) + 1) / len(bulk), color=BLUE, linewidth=2, label="its bulk")
        axes.plot(bulk, estimated.cdf(bulk, shape), color=ORANGE, linestyle="--", linewidth=2, label="the law")
        distance, _ = bulk_distance(s, shape, estimated)
        axes.set_title(f"{name}: distance {distance:.3f}, level {fit.level:.2g}", fontsize=9)
        axes.set(xlabel="singular value", ylim=(0, 1))
        axes.legend(fontsize=9)
    both[0].set_ylabel("share at or below")
    return figure


def snr() -> Figure:
    """The sum over the cut against the sum under it."""
    figure, axes = axes_of()
    s, shape = real()
    rank = apply_rule(RULE, s, shape).rank
    place = np.arange(len(s) + 1) + 0.5
    for part, colour, label in ((slice(0, rank), BLUE, "over"), (slice(rank, len(s)), LIGHT, "under")):
        heights, at = s[part], place[part.start : part.stop + 1]
        axes.stairs(heights, at, fill=True, color=colour, label=f"{label} the cut: sum {heights.sum():.0f}")
    axes.set(xlabel="place i", ylabel="singular value s_i", xlim=(0.5, len(s) + 0.5), ylim=(0, None))
    axes.set_title(f"SNR = {s[:rank].sum():.0f} / {s[rank:].sum():.0f} = {signal_to_noise(s, rank):.3g}", fontsize=10)
    axes.legend(fontsize=9)
    return figure


def data() -> Figure:
    """One matrix in two metrics: its own values, and those by the data, where few inputs are loud."""
    figure, axes = axes_of()
    random, (m, n) = np.random.default_rng(7), (192, 128)
    W = random.standard_normal((m, n)) + 4 * random.standard_normal((m, 6)) @ random.standard_normal((6, n)) / n**0.5
    loud = np.geomspace(30, 0.02, n)  # second moments of the inputs, channel by channel
    by_data = np.linalg.svd(W * np.sqrt(loud / loud.mean()), compute_uv=False)
    plain = np.linalg.svd(W, compute_uv=False)
    for s, colour, style, label in (
        (plain, BLUE, "-", "plain: what the weights lose"),
        (by_data, ORANGE, "--", "by the data: what the outputs lose"),
    ):
        left = 1 - np.cumsum(s**2) / np.sum(s**2)
        axes.plot(np.arange(1, n + 1), left, color=colour, linestyle=style, linewidth=2, label=label)
    axes.set(xlabel="rank", ylabel="share of squares lost", xlim=(1, n), ylim=(0, 1))
    axes.legend(fontsize=9)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    f.__name__: f for f in (histogram, spectrum, noise, beta, edges, level, snr, data)
}


def drawn(name: str) -> str:
    """The SVG of a picture, the same text each time."""
    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        PICTURES[name]().savefig(text, format="svg", metadata={"Date": None, "Creator": "laser"})
    return re.sub(r"[ \t]+$", "", text.getvalue(), flags=re.MULTILINE)


def same(one: str, other: str) -> bool:
    """Whether two pictures differ in nothing but where a line lies, by less than anybody sees."""
    if NUMBER.sub("", one) != NUMBER.sub("", other):
        return False
    a, b = (np.array(NUMBER.findall(text), dtype=np.float64) for text in (one, other))
    return bool(np.all(np.abs(a - b) <= CLOSE))


def take(path: Path) -> None:
    """Keep the singular values of MATRIX out of a spectra file of the demo's model."""
    from laser.spectra import Spectra

    spectra = Spectra.load(path)
    values = [float(f"{x:.6g}") for x in spectra.values[MATRIX]]
    kept = {"matrix": MATRIX, "shape": list(spectra.by_name[MATRIX].shape), "values": values}
    VALUES.write_text(json.dumps(kept, indent=None) + "\n")


def main() -> None:
    if "--values" in sys.argv:
        take(Path(sys.argv[sys.argv.index("--values") + 1]))
    for name in PICTURES:
        path = IMAGES / f"{name}.svg"
        if "--check" not in sys.argv:
            path.write_text(drawn(name))
        elif not path.exists() or not same(path.read_text(), drawn(name)):
            sys.exit(f"{path.name} is out of date; run python scripts/render_pictures.py")


if __name__ == "__main__":
    main()
