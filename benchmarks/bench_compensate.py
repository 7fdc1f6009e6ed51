"""What an adapter of `laser compensate` gives back on texts that the calibration never saw, at equal bits.

    python benchmarks/bench_compensate.py MODEL --calibrate FILE --texts FILE,FILE [--windows 60] [--bits 4,3]
        [--groups 64,32] [--ranks 4,8,16] [--budgets relative,error] [--nf4]
    python benchmarks/bench_compensate.py --shapes 4096x4096,28672x4096 [--ranks 16]

Copies are made by GPTQ (arXiv 2210.17323) with the moments of laser's own calibration, each group of a row between its
extremes, and by bitsandbytes nf4. Of every copy: alone, with adapters of these ranks, with rank 8's bytes spent over
the whole model by what they take away (relative to each output, or in absolute squares), and with the plain SVD of rank
8. Losses are nats per token against the original's, paired over the windows. The first of the groups is corrected; the
others, and one bit more, are what the bytes could buy instead. --shapes: seconds and memory of a single matrix.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import smoke
import torch
from safetensors.torch import save_file

import laser.compensate.compensate as compensation
from laser.calibration import calibrate
from laser.checkpoint.reader import Checkpoint, open_checkpoint
from laser.compensate.adapted import with_adapter
from laser.compensate.compensate import Line, Request, compensate
from laser.compensate.places import Places, find_places
from laser.engine.workers import choose_crew
from laser.evaluation.evaluate import evaluate
from laser.evaluation.perplexity import Perplexity, difference
from laser.evaluation.text import Windows, cut_windows, load_tokenizer, read_text
from laser.moments import Moments
from laser.selection import Selection
from laser.spectral.correction import correct
from laser.spectral.data_metric import ByData
from laser.spectral.devices import Device, choose_device
from laser.spectral.host_memory import resident_bytes

DAMP = 0.01  # of the mean diagonal, as in GPTQ
BLOCK = 128  # columns whose updates are applied at once to those behind them; a multiple of every group


# --- copies -----------------------------------------------------------------------------------------------------------


def gptq(W: torch.Tensor, C: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """W (m, n) with every entry on the grid of its group, each column's error made up for by those behind it."""
    m, n = W.shape
    C = C + DAMP * C.diagonal().mean() * torch.eye(n, dtype=C.dtype)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(C)), upper=True).float()
    W, Q, most = W.float().clone(), torch.empty(m, n), 2**bits - 1
    scale, zero = torch.ones(m), torch.zeros(m)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        errors = torch.empty(m, stop - start)
        for j in range(start, stop):
            if j % group == 0:
                ahead = W[:, j : min(j + group, stop)]  # as it is now: a block holds whole groups
                low, high = ahead.amin(1).clamp_max(0), ahead.amax(1).clamp_min(0)
                scale = ((high - low) / most).clamp_min(1e-12).half().float()
                zero = torch.round(-low / scale)
            w = W[:, j]
            Q[:, j] = scale * (torch.clamp(torch.round(w / scale) + zero, 0, most) - zero)
            errors[:, j - start] = (w - Q[:, j]) / U[j, j]
            W[:, j + 1 : stop] -= errors[:, j - start, None] * U[j, j + 1 : stop]
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return Q


def nf4(W: torch.Tensor) -> torch.Tensor:
    """W through bitsandbytes' 4-bit normal floats, blocks of 64."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(W.contiguous(), blocksize=64, quant_type="nf4")
    return dequantize_4bit(packed, state).reshape(W.shape)


def write_copy(original: Checkpoint, out: Path, of: Callable[[str, torch.Tensor], torch.Tensor]) -> Checkpoint:
    """A directory of plain safetensors, every selected matrix as `of` makes it."""
    shutil.copytree(original.path, out, ignore=shutil.ignore_patterns("*.safetensors", "laser*"))
    for shard in original.shards:
        tensors = {info.name: of(info.name, original.read(info.name)) for info in shard.tensors}
        save_file({n: W.contiguous() for n, W in tensors.items()}, out / shard.name, metadata={"format": "pt"})
    return open_checkpoint(out)


# --- one matrix -------------------------------------------------------------------------------------------------------


def one_shape(m: int, n: int, rank: int, device: Device) -> None:
    """Seconds and memory to correct a matrix of this shape, by inputs of very different size."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(m, n, generator=generator).bfloat16()
    Q = (W.float() + 0.1 * torch.randn(m, n, generator=generator)).bfloat16()
    wide = torch.randn(n, 64, generator=generator, dtype=torch.float64)
    C = wide @ wide.T + torch.diag(torch.logspace(0, -3, n, dtype=torch.float64))
    before, start, cpu = resident_bytes() or 0, time.perf_counter(), time.process_time()
    found = correct(W, Q, rank, ByData("full", C, 2 * n), device)
    seconds, used = time.perf_counter() - start, time.process_time() - cpu
    peak = ((resident_bytes(peak=True) or 0) - before) / 1e9
    print(
        f"{m} x {n}, rank {found.rank}, {device.label}: {seconds:.1f} s ({used:.1f} s of a core), {peak:.2f} GB more; "
        f"output error {found.measured[0]:.2e} -> {found.measured[-1]:.2e}, residual {found.residual:.1e}"
    )


# --- the table --------------------------------------------------------------------------------------------------------


class Texts:
    """The second texts, and the losses of the original on each."""

    def __init__(self, original: Checkpoint, windows: Sequence[Windows], device: str) -> None:
        self.windows, self.device = windows, device
        self.before = [self.loss(original, each) for each in windows]

    def loss(self, model: Checkpoint, windows: Windows) -> Perplexity:
        return evaluate(model, windows, stream=True, device=self.device)

    def lost(self, model: Checkpoint) -> list[str]:
        found = []
        for before, windows in zip(self.before, self.windows, strict=True):
            change = difference(before, self.loss(model, windows))
            found.append(f"{change.nll:+.3f} ± {change.standard_error or 0:.3f}")
        return found


def absolute(line: Line) -> np.ndarray:
    """s^2 itself: the other weight of a budget."""
    return np.maximum(-np.diff(line["predicted"]), 0.0) * line["outputs"]


def row(*cells: Any) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def corrected(
    original: Checkpoint,
    copy: Checkpoint,
    places: Places,
    moments: Moments | None,
    asked: Request,
    folder: Path,
    texts: Texts,
) -> tuple[float, list[str], float]:
    """Bits per weight of the adapter, losses with it, and seconds to solve."""
    start = time.perf_counter()
    slots: list[Any] = []
    crew = choose_crew(texts.device)
    kept = folder / "adapter"
    shutil.rmtree(kept, ignore_errors=True)
    record = compensate(
        original, copy, places, moments, asked, kept, crew=crew, judge=lambda _, found: slots.extend(found)
    )
    seconds = time.perf_counter() - start
    return record.bits, texts.lost(with_adapter(copy, kept / "adapter_model.safetensors", slots)), seconds


def table(arguments: argparse.Namespace, folder: Path) -> int:
    device = choose_device(arguments.device).name
    original = open_checkpoint(arguments.model)
    tokenizer = load_tokenizer(original.path)

    def cut(path: str, count: int) -> Windows:
        text = read_text(Path(path), "question" if path.endswith(".jsonl") else None)
        return cut_windows(text, tokenizer, length=arguments.window, limit=count)

    moments = calibrate(
        original, cut(arguments.calibrate, arguments.calibration_windows), folder / "moments.safetensors",
        device=device, wide="diagonal",
    )  # fmt: skip
    texts = Texts(original, [cut(path, arguments.windows) for path in arguments.texts.split(",")], device)
    print(f"calibrated on {moments.calibration.tokens} tokens; {texts.windows[0].length} tokens a window")
    row("copy", "bits", "with", "+ bits", *(w.text for w in texts.windows), "seconds to solve")
    row(*["---"] * (5 + len(texts.windows)))
    chosen = set(moments.sites)
    groups, ranks = [int(g) for g in arguments.groups.split(",")], [int(r) for r in arguments.ranks.split(",")]

    def one(name: str, bits: float, of: Callable[[str, torch.Tensor], torch.Tensor], correct: bool) -> list[float]:
        path = folder / "copy"
        shutil.rmtree(path, ignore_errors=True)
        copy = write_copy(original, path, lambda n, W: of(n, W).to(W.dtype) if n in chosen else W)
        row(name, f"{bits:.2f}", "nothing", "0", *texts.lost(copy), "-")
        if not correct:
            return []
        places, spent = find_places(original, copy, Selection()), []
        for rank in ranks:
            extra, lost, seconds = corrected(original, copy, places, moments, Request(rank=rank), folder, texts)
            spent.append(extra)
            row(name, f"{bits:.2f}", f"rank {rank}", f"{extra:.3f}", *lost, f"{seconds:.0f}")
        rank = 8 if 8 in ranks else ranks[-1]
        budget = spent[ranks.index(rank)]
        for by in arguments.budgets.split(","):
            usual = compensation.gains_of
            compensation.gains_of = usual if by == "relative" else absolute
            try:
                extra, lost, seconds = corrected(original, copy, places, moments, Request(bits=budget), folder, texts)
            finally:
                compensation.gains_of = usual
            row(name, f"{bits:.2f}", f"rank {rank}'s bits by {by}", f"{extra:.3f}", *lost, f"{seconds:.0f}")
        extra, lost, seconds = corrected(original, copy, places, None, Request(rank=rank), folder, texts)
        row(name, f"{bits:.2f}", f"plain SVD, rank {rank}", f"{extra:.3f}", *lost, f"{seconds:.0f}")
        return spent

    def by_gptq(bits: int, group: int) -> Callable[[str, torch.Tensor], torch.Tensor]:
        return lambda n, W: gptq(W, moments.metric(n, W).moment, bits, group)

    rows = 0
    for bits in (int(b) for b in arguments.bits.split(",") if b != "none"):
        for number, group in enumerate(groups):
            stored = bits + (16 + bits) / group  # scale and zero of a group
            rows += len(one(f"GPTQ {bits} bits, groups of {group}", stored, by_gptq(bits, group), number == 0))
    if arguments.nf4:
        rows += len(one("bitsandbytes nf4", 4 + 32 / 64, lambda _, W: nf4(W), True))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="checkpoint directory")
    parser.add_argument("--calibrate", help="text to calibrate on")
    parser.add_argument("--calibration-windows", type=int, default=24)
    parser.add_argument("--texts", help="second texts, with commas between")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=60, help="of each second text")
    parser.add_argument("--bits", default="4,3", help="of GPTQ; none for no copy by it")
    parser.add_argument("--groups", default="64,32")
    parser.add_argument("--ranks", default="4,8,16")
    parser.add_argument("--budgets", default="relative,error")
    parser.add_argument("--nf4", action="store_true", help="a copy by bitsandbytes nf4 as well")
    parser.add_argument("--shapes", help="of matrices to time instead, as 4096x4096,28672x4096")
    parser.add_argument("--device", default="auto")
    arguments = smoke.parse(parser, smoke_test)
    ranks = [int(rank) for rank in arguments.ranks.split(",")]
    shapes = arguments.shapes or ("24x16" if arguments.smoke else "")
    for shape in shapes.split(",") if shapes else ():
        m, n = map(int, shape.split("x"))
        one_shape(m, n, ranks[-1], choose_device(arguments.device))
    if arguments.shapes:
        return
    if not (arguments.model and arguments.calibrate and arguments.texts):
        parser.error("MODEL, --calibrate and --texts are needed, or --shapes")
    with tempfile.TemporaryDirectory(prefix="smoke-") as folder:
        rows = table(arguments, Path(folder))
    assert not arguments.smoke or rows == 2, rows


def smoke_test(folder: Path) -> Sequence[object]:
    """GPTQ beats rounding in the metric that it goes by, and the table has a row for every rank."""
    torch.manual_seed(0)
    W, X = torch.randn(32, 48), torch.randn(300, 48) @ torch.randn(48, 48)
    C = (X.T @ X / 300).double()

    def error(Q: torch.Tensor) -> float:
        D = (W - Q).double()
        return float(torch.trace(D @ C @ D.T))

    assert error(gptq(W, C, 3, 16)) < 0.7 * error(gptq(W, torch.eye(48, dtype=torch.float64), 3, 16))
    text = smoke.text(folder)
    return (
        smoke.pico(folder), "--calibrate", text, "--calibration-windows", 6, "--texts", text, "--window", 64,
        "--windows", 2, "--bits", 3, "--groups", 16, "--ranks", "2,4", "--device", "cpu",
    )  # fmt: skip


if __name__ == "__main__":
    main()
