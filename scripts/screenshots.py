#!/usr/bin/env python3
"""Take pictures of everything that laser draws, to be looked at one by one: report, plots, card and notebooks.

python scripts/screenshots.py [MODEL OUT] [--into .screenshots]
    MODEL and OUT: a source and what `laser run` made of it; default: those of bash scripts/demo.sh

Chromium takes them: the report at three widths, light and dark, of one model and of two.
"""

from __future__ import annotations

import argparse
import html
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome")
HEIGHTS = {1280: 1600, 800: 2000, 400: 2300}  # width of a window -> its height, so that all of the report is in it
STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 860px; margin: 1.5rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; } img, svg { max-width: 100%; }
td, th { border: 1px solid #ccc; padding: .2rem .6rem; } code { background: #f4f5f6; }
pre { background: #f4f5f6; padding: .6rem; overflow-x: auto; }
.in { border-left: 3px solid #0072b2; } .out { background: none; border-left: 3px solid #ccc; }"""


def laser(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "laser", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


class Camera:
    """Chromium without a window."""

    def __init__(self, browser: str, into: Path, work: Path) -> None:
        self._browser, self._into, self._work = browser, into, work

    def take(self, page: Path, name: str, width: int, height: int, *, dark: bool = False) -> None:
        target = self._into / f"{name}.png"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        flags += [f"--user-data-dir={self._work / 'profile'}", f"--window-size={width},{height}"]
        flags += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--screenshot={target}"]
        subprocess.run([self._browser, *flags, page.as_uri()], check=True, capture_output=True, timeout=120)
        print(target)

    def take_html(self, body: str, name: str, height: int, folder: Path | None = None) -> None:
        """A page of that body, whose pictures lie in `folder`."""
        base = "" if folder is None else f'<base href="{folder.resolve().as_uri()}/">'
        page = self._work / f"{name}.html"
        page.write_text(f"<!doctype html><meta charset=utf-8>{base}<style>{STYLE}</style>{body}", encoding="utf-8")
        self.take(page, name, 1000, height)


def markdown(text: str) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(text)


def card_of(out: Path) -> str:
    """The card as the Hub shows it: its metadata, then the text."""
    _, metadata, body = (out / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return f"<details><summary>metadata</summary><pre>{html.escape(metadata)}</pre></details>{markdown(body)}"


def notebook_of(path: Path) -> str:
    """A notebook's cells and their stored outputs."""
    parts = []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            parts.append(markdown(cell.source))
            continue
        parts.append(f'<pre class="in">{html.escape(cell.source)}</pre>')
        parts += [shown(output) for output in cell.get("outputs", ())]
    return "".join(parts)


def shown(output: Any) -> str:
    """An output in the best of the forms that it has."""
    data = output.get("data", {})
    if "text/html" in data or "image/svg+xml" in data:
        return f"<div>{data.get('text/html') or data['image/svg+xml']}</div>"
    if "text/markdown" in data:
        return markdown(data["text/markdown"])
    if "image/png" in data:
        return f'<img src="data:image/png;base64,{data["image/png"]}">'
    text = data.get("text/plain") or output.get("text") or "\n".join(output.get("traceback", ()))
    return f'<pre class="out">{html.escape(text)}</pre>'


def reports(camera: Camera, first: Path, second: Path, work: Path) -> None:
    laser("report", first, "-o", work / "one.html")
    laser("report", first, "--against", second, "-o", work / "two.html")
    for page in ("one", "two"):
        for width, height in HEIGHTS.items():
            for theme in ("light", "dark"):
                more = 1000 if page == "two" and width < 500 else 0
                name = f"report-{page}-{width}-{theme}"
                camera.take(work / f"{page}.html", name, width, height + more, dark=theme == "dark")


def plots(camera: Camera, first: Path, second: Path, out: Path, into: Path) -> None:
    """One of each kind, as PNG; the first also as the SVG that a browser draws."""
    from matplotlib import pyplot

    from laser.outcome import Outcome

    outcome = Outcome.load(out)
    cut = next(iter(outcome.plan.reductions))
    kinds = {
        "plot-histogram": ("--matrix", cut),
        "plot-histogram-none-kept": ("--matrix", cut, "--rule", "rank:0"),
        "plot-overlay-after-a-cut": ("--matrix", cut, "--with", second),
        "plot-heat": ("--heat", "kept"),
        "plot-heat-mean": ("--heat", "snr", "--mean"),
    }
    for name, words in kinds.items():
        laser("plot", first, "-o", into / f"{name}.png", *words, "--force")
        print(into / f"{name}.png")
    for name, record in (("plot-plan", outcome.plan), ("plot-outcome", outcome)):  # a search's is in notebook 5
        record.plot()
        pyplot.savefig(into / f"{name}.png")
        print(into / f"{name}.png")
    laser("plot", first, "-o", into / "plot-histogram.svg", *kinds["plot-histogram"], "--force")
    camera.take(into / "plot-histogram.svg", "plot-histogram-svg", 980, 560)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=ROOT / ".demo" / "mixtral")
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / ".demo" / "reduced")
    parser.add_argument("--into", type=Path, default=ROOT / ".screenshots")
    asked = parser.parse_args()
    browser = next((path for name in NAMES if (path := shutil.which(name))), None)
    if browser is None:
        sys.exit("there is no Chromium to take the pictures; try apt-get install chromium")
    spectra = asked.out / "laser" / "spectra.safetensors"
    if not spectra.exists():
        sys.exit(
            f"there is no {spectra}; try bash scripts/demo.sh first, or name a model and what laser run made of it"
        )
    asked.into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        camera, after = Camera(browser, asked.into.resolve(), work), work / "after.safetensors"
        laser("scan", asked.out, "-o", after)
        reports(camera, spectra, after, work)
        plots(camera, spectra, after, asked.out, asked.into)
        camera.take_html(card_of(asked.out), "card", 5200, asked.out)
        for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
            camera.take_html(notebook_of(path), f"notebook-{path.stem}", 4000)


if __name__ == "__main__":
    main()
