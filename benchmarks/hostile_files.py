#!/usr/bin/env python3
"""Headers and configs changed at random: an error of one line or a right result, in bounded memory and time.

    python benchmarks/hostile_files.py headers [--count 1000] [--seed 14]
    python benchmarks/hostile_files.py configs [--count 200]
    python benchmarks/hostile_files.py --smoke

Each trial is a forked child with at most 1 GB of data beyond what the libraries take, and 20 seconds. Prints how many
ended how, and every trial that ended otherwise; the exit code is 1 where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import conftest
import hostile
import smoke
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import laser
from laser.errors import LaserError

MEMORY, SECONDS = 1 << 30, 20
COUNT = {"headers": 1000, "configs": 200}  # trials
SMALL = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b-0": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
    "none": {"dtype": "I64", "shape": [0], "data_offsets": [24, 24]},
}


def forked(trial: Callable[[], str]) -> str:
    """What `trial` returns in a child of its own; "refused", or how it ended otherwise."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        told = "?"
        try:
            status = Path("/proc/self/status").read_text()
            used = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData")) << 10
            resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, used + MEMORY))
            signal.alarm(SECONDS)
            told = trial()
        except LaserError as error:
            told = "refused" if "\n" not in str(error) else f"FAULT: more than one line: {error!r}"
        except BaseException:
            told = "FAULT: " + traceback.format_exc()[-600:]
        os.write(write, told.encode("utf-8", "replace")[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return told or f"FAULT: ended by signal {os.WTERMSIG(status)}"


def header_trial(draw: random.Random, folder: Path) -> tuple[Callable[[], str], str]:
    text = hostile.mutated_header(draw, {"__metadata__": {"format": "pt"}} | SMALL)
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 24)

    def trial() -> str:
        laser.open_checkpoint(folder)
        try:
            with safe_open(path, framework="pt"):
                return "taken by both"
        except Exception as error:
            return f"FAULT: safetensors refuses: {error}"

    return trial, text.decode("utf-8", "replace")


def config_trial(draw: random.Random, folder: Path) -> tuple[Callable[[], str], str]:
    """config.json, generation_config.json or tokenizer_config.json is changed; then scan, plan, reduce, card."""
    name = draw.choice(["config.json"] * 3 + ["generation_config.json", "tokenizer_config.json"])
    config = conftest.mixtral_config() if name == "config.json" else {"bos_token_id": 1, "chat_template": "x", "a": {}}
    text = hostile.mutated_config(draw, config)
    (folder / "config.json").write_text(json.dumps(conftest.mixtral_config()))
    (folder / name).write_bytes(text)

    def trial() -> str:
        checkpoint = laser.open_checkpoint(folder)
        plan = laser.make_plan(laser.scan(checkpoint), "rank:4")
        laser.reduce(checkpoint, plan, folder.with_name("out"))
        laser.write_card(folder.with_name("out"), checkpoint)
        problems = laser.verify(checkpoint, folder.with_name("out")).problems
        return f"FAULT: {problems[0]}" if problems else "right"

    return trial, f"{name}: {text[:300].decode('utf-8', 'replace')}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COUNT, nargs="+")
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=14)
    options = smoke.parse(parser, lambda _: [*COUNT, "--count", 10])
    torch.set_num_threads(1)
    return sum(faults(what, options.count or COUNT[what], options.seed) for what in options.what) and 1


def faults(what: str, count: int, seed: int) -> int:
    """How many trials ended otherwise than refused or right; each is printed."""
    make = {"headers": header_trial, "configs": config_trial}[what]
    draw, ended = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "model")
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(conftest.mixtral_config()))
        tensors: dict[str, Any] = {
            n: t for n, t in conftest.mixtral_tensors().items() if "layers." not in n or "s.0." in n
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        for number in range(count):
            for other in ("generation_config.json", "tokenizer_config.json"):
                (folder / other).unlink(missing_ok=True)
            shutil.rmtree(Path(root, "out"), ignore_errors=True)
            trial, changed = make(draw, folder)
            told = forked(trial)
            ended[told.partition(":")[0]] += 1
            if told.startswith("FAULT"):
                print(f"trial {number}: {changed[:500]!r}\n{told}\n")
    print(f"{count} {what}, seed {seed}: {dict(ended)}")
    return ended["FAULT"]


if __name__ == "__main__":
    sys.exit(main())
