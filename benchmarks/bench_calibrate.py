"""What calibration costs: time and memory of laser calibrate against laser eval --stream on the same tokens.

    python benchmarks/bench_calibrate.py MODEL --text FILE [--windows 8] [--window 256] [--repeat 1] [--as-mixtral 2x4]

Each runs in a process of its own, once each way in turn. CPU seconds stand beside wall seconds, for shared machines.
The allowed ratio is 2.5. --as-mixtral
LAYERSxEXPERTS: random weights in the shapes of Mixtral-8x7B, 14336 x 4096, with the tokenizer of MODEL.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import smoke
from synthetic import Sizes, write_synthetic_mixtral


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", default="8")
    parser.add_argument("--window", default="256")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--as-mixtral")
    asked = smoke.parse(
        parser,
        lambda folder: [smoke.pico(folder), "--text", smoke.text(folder), "--windows", 2, "--window", 32],
    )
    cut = ["--text", asked.text, "--windows", asked.windows, "--window", asked.window]
    with tempfile.TemporaryDirectory() as directory:
        out, model = Path(directory) / "moments.safetensors", asked.model
        if asked.as_mixtral:
            model = str(write_mixtral(Path(asked.model), Path(directory) / "model", asked.as_mixtral))
        commands = {
            "eval --stream": ["eval", model, "--stream", *cut],
            "calibrate": ["calibrate", model, "-o", str(out), "--force", *cut],
            "calibrate --diagonal": ["calibrate", model, "-o", str(out), "--force", "--diagonal", *cut],
        }
        weights: dict[str, int] = {}
        print("| command | wall s | CPU s | peak GB | wall, ratio | CPU, ratio | file GB |\n" + "|---" * 7 + "|")
        for _ in range(asked.repeat):
            first: tuple[float, float] | None = None
            for name, words in commands.items():
                wall, cpu, peak = measured([sys.executable, "-m", "laser", *words])
                first = first or (wall, cpu)
                size = f"{out.stat().st_size / 1e9:.3f}" if name != "eval --stream" else ""
                weights[name] = out.stat().st_size if out.exists() else 0
                print(
                    f"| {name} | {wall:.1f} | {cpu:.1f} | {peak / 1e6:.2f} | {wall / first[0]:.2f} | "
                    f"{cpu / first[1]:.2f} | {size} |",
                    flush=True,
                )
        if asked.smoke:
            assert weights["eval --stream"] == 0 < weights["calibrate --diagonal"] < weights["calibrate"], weights


def write_mixtral(source: Path, path: Path, size: str) -> Path:
    """LAYERSxEXPERTS of Mixtral's shapes at `path`, with the vocabulary and tokenizer of `source`."""
    layers, experts = map(int, size.split("x"))
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    write_synthetic_mixtral(path, layers, experts, replace(Sizes(), vocabulary=vocabulary))
    for file in [*source.glob("tokenizer*"), *source.glob("*.jinja")]:
        shutil.copy(file, path)
    return path


def measured(command: list[str]) -> tuple[float, float, int]:
    """Wall seconds, CPU seconds and peak resident KiB of one process."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss


if __name__ == "__main__":
    main()
