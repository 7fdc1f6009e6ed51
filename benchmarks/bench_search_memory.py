"""What does a search cost that has too little memory? `laser run --search` on a Mixtral made on the spot, under caps.

    python benchmarks/bench_search_memory.py [--layers 40] [--hidden 1024] [--times 0,1.5,3,6] [--window 256]

Each run is a process of its own that may take, above what its libraries hold, the model's bytes in float32 divided by
one of --times (RLIMIT_DATA: anonymous memory, in which weights and states lie); 0 is a run without a cap. Printed are
what was chosen, seconds of the clock and of the processor, how far resident memory rose, and bytes of weights that were
read. All of them must end with the same plan, and those with a cap under it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import smoke
from bench_stream_memory import make

SEARCH = ("--search", "--rule", "rank:8,rank:32", "--accept", "any-drop", "--roles", "q", "--workers", "1")


def child(words: list[str], cap: int) -> None:
    """One command line, and in the last line what it took. cap: bytes that it may take, 0 for all there are."""
    from laser.checkpoint.reader import Checkpoint
    from laser.cli import main
    from laser.engine.cost import Meter

    own, read = Checkpoint.read, [0]

    def counted(*what: Any) -> Any:
        tensor = own(*what)
        read[0] += tensor.nbytes
        return tensor

    setattr(Checkpoint, "read", counted)  # noqa: B010
    if main([*words, "--dry-run"]):  # what is imported and built once is there before the cap counts
        sys.exit(1)
    if cap:
        status = Path("/proc/self/status").read_text()
        held = 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmData:")))
        resource.setrlimit(resource.RLIMIT_DATA, (held + cap, resource.RLIM_INFINITY))
    meter, begun = Meter(), time.process_time()
    code = main(words)
    took = {"seconds": meter.seconds, "cpu": time.process_time() - begun, "peak": meter.peak, "read": read[0]}
    print(json.dumps(took))
    sys.exit(code)


def run(words: list[str], cap: int) -> tuple[dict[str, float], str]:
    """What a run took, and what it said of its memory."""
    # One thread: each thread of each BLAS reserves buffers, which the cap counts and nobody fills.
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--cap", str(cap), "--child", json.dumps(words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet)
    if done.returncode:
        sys.exit(f"under a cap of {cap / 1e6:.0f} MB: exit {done.returncode}\n{done.stderr[-2000:]}")
    told = [line for line in done.stderr.splitlines() if "free: " in line]  # twice: before the cap as well
    return json.loads(done.stdout.splitlines()[-1]), told[-1].partition("free: ")[2] if told else "all of it in memory"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--times", default="0,1.5,3,6", help="how many times the cap the model is")
    parser.add_argument("--every", type=int, default=4, help="one candidate in every N layers")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--cap", type=int, default=0, help=argparse.SUPPRESS)
    tiny = ("--layers", 75, "--hidden", 256, "--times", "0,2", "--every", 40, "--window", 32)
    given = smoke.parse(parser, lambda _: tiny)
    if given.child:
        return child(json.loads(given.child), given.cap)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        model = folder / "model"
        model.mkdir()
        size = 2 * make(model, given.layers, given.hidden)
        text = smoke.text(folder)
        from pico_language import write_tokenizer

        write_tokenizer(model)
        print(f"{size / 1e6:.0f} MB in float32, of {given.layers} layers")
        chosen = ",".join(str(layer) for layer in range(given.layers - 1, -1, -given.every))
        plans, rows = [], []
        for number, times in enumerate(map(float, given.times.split(","))):
            cap, out = int(size / times) if times else 0, folder / str(number)
            words = ["run", str(model), "-o", str(out), "--text", str(text), "--window", str(given.window)]
            words += ["--windows", "2", "--held-out-windows", "1", "--layers", chosen, *SEARCH]
            took, told = run(words, cap)
            rows.append((cap, took))
            plans.append((out / "laser" / "plan.json").read_bytes())
            print(
                f"{f'cap {cap / 1e6:.0f} MB' if cap else 'no cap'}: {told}\n    {took['seconds']:.1f} s, CPU "
                f"{took['cpu']:.1f} s, peak {took['peak'] / 1e6:.0f} MB, {took['read'] / 1e6:.0f} MB read"
            )
    if len(set(plans)) > 1:
        sys.exit("the plans differ")
    if any(cap and took["peak"] > cap for cap, took in rows):
        sys.exit("more memory was taken than was allowed")


if __name__ == "__main__":
    main()
