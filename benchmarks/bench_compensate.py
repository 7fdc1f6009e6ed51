"""What an adapter of `laser compensate` gives back on texts that the calibration never saw, at equal bits.

    python benchmarks/bench_compensate.py MODEL --calibrate FILE --texts FILE,FILE [--windows 60] [--bits 4,3]
        [--groups 64,32] [--ranks 4,8,16] [--budgets relative,error,gradient] [--copies DIR,DIR] [--nf4]
    python benchmarks/bench_compensate.py --shapes 4096x4096,28672x4096 [--ranks 16]

Copies are made by GPTQ (arXiv 2210.17323) with the moments of laser's own calibration, each group of a row between its
extremes, and by bitsandbytes nf4; --copies takes others. Of every copy: alone, with adapters of these ranks, with rank
8's bytes spent over the whole model, and with the plain SVD of rank 8. What a byte buys is the squares that it takes
away: relative to each output's own, plain (error), or by the gradients at the outputs (gradient), as --bits does.
Losses are nats per token against the original's, paired over the windows. The first of the groups is corrected; the
others, and one bit more, are what the bytes could buy instead. --shapes: seconds and memory of a single matrix.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import smoke
import torch
from safetensors.torch import save_file

from laser.calibration import calibrate
from laser.checkpoint.reader import Checkpoint, open_checkpoint
from laser.compensate.adapted import with_adapter
from laser.compensate.budget import BEYOND
from laser.compensate.compensate import Line, Request, Solve, Worth, choose_ranks, worth_by_gradients
from laser.compensate.peft import slots_of, stored_bits, write_adapter
from laser.compensate.places import ParameterPlace, Places, as_matrices, find_places
from laser.compensate.rescaled import Rescaled
from laser.engine.workers import choose_crew, visit_all
from laser.evaluation.perplexity import paired_difference
from laser.evaluation.streaming import LayeredModel
from laser.evaluation.text import Windows, cut_windows, load_tokenizer, read_text
from laser.moments import Moments
from laser.selection import Selection
from laser.spectral.correction import Correction, correct
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
    """The second texts, in one pass, and the losses of the original on each."""

    def __init__(self, original: Checkpoint, texts: Sequence[Windows], dtype: str, device: str) -> None:
        self.texts, self.dtype, self.device = texts, dtype, device
        self.windows = [window for text in texts for window in text.windows]
        self.before = self.losses(original)

    def losses(self, model: Checkpoint) -> np.ndarray:
        """(W,) nats per token of each window."""
        sums = LayeredModel(model, dtype=self.dtype, device=self.device).losses(self.windows).sums
        return np.array(sums) / [window.scored for window in self.windows]

    def lost(self, model: Checkpoint) -> list[str]:
        after, found, start = self.losses(model), [], 0
        for text in self.texts:
            some = slice(start, start + len(text.windows))
            counts = [window.scored for window in text.windows]
            mean, error = paired_difference(self.before[some].tolist(), after[some].tolist(), counts)
            found.append(f"{mean:+.3f} ± {error or 0:.3f}")
            start = some.stop
        return found


def row(*cells: Any) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


@dataclass(frozen=True)
class Solved:
    """Every correction of a copy, up to the highest rank that a row of the table needs: each row cuts them."""

    copy: Checkpoint
    places: Places
    found: Mapping[str, tuple[Line, Correction | None]]
    folder: Path

    @staticmethod
    def of(
        original: Checkpoint, copy: Checkpoint, moments: Moments | None, rank: int, device: str, folder: Path
    ) -> Solved:
        places = find_places(original, copy, Selection())
        seen, matrices = as_matrices(original, places.places)
        work = Solve({place.name: place for place in places.places}, moments, rank, Rescaled(original, copy))
        with closing(visit_all(seen, matrices, work, choose_crew(device))) as visits:
            return Solved(copy, places, {matrix.name: result for matrix, result, _ in visits}, folder)

    def worth(self, by: str, moments: Moments) -> Worth | None:
        """What a budget goes by."""
        lines = {name: line for name, (line, _) in self.found.items()}
        if by == "gradient":
            return worth_by_gradients(lines, moments)
        return (lambda place: lines[place.name]["outputs"] * place.shape[0]) if by == "error" else None

    def adapted(self, asked: Request, worth: Worth | None = None) -> tuple[Checkpoint, float]:
        """The copy with an adapter, and its bits per weight. worth: as `choose_ranks` has it."""
        lines: dict[str, Line] = {}
        for name, (line, _) in self.found.items():
            kept = line["predicted"][: asked.rank + 1] if asked.rank else line["predicted"]
            lines[name] = {**line, "predicted": kept}
        slots = slots_of(self.places.places, choose_ranks(self.places.places, lines, asked, worth))

        def factors(place: ParameterPlace, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
            correction = self.found[place.name][1]
            assert correction is not None
            return correction.A[:rank], correction.B[:, :rank]

        write_adapter(self.folder / "adapter.safetensors", slots, factors)
        weights = sum(place.shape[0] * place.shape[1] for place in self.places.places)
        return with_adapter(self.copy, self.folder / "adapter.safetensors", slots), stored_bits(slots) / weights


def bits_of(copy: Checkpoint, original: Checkpoint, chosen: Collection[str]) -> float:
    """Bits per selected weight as the copy's files have them."""
    stored = copy
    while stored.origin is not None:
        stored = stored.origin
    own = [info for info in stored.tensors.values() if info.name in chosen or info.name not in original.tensors]
    return 8 * sum(info.end - info.start for info in own) / sum(prod(original.tensors[name].shape) for name in chosen)


def table(arguments: argparse.Namespace, folder: Path) -> int:
    device = choose_device(arguments.device).name
    original = open_checkpoint(arguments.model)
    tokenizer = load_tokenizer(original.path)

    def cut(path: str, count: int) -> Windows:
        text = read_text(Path(path), "question" if path.endswith(".jsonl") else None)
        return cut_windows(text, tokenizer, length=arguments.window, limit=count)

    seen = cut(arguments.calibrate, arguments.calibration_windows)
    felt = "gradient" in arguments.budgets
    moments = calibrate(original, seen, folder / "moments", device=device, wide="diagonal", gradients=felt)
    cuts = [cut(path, arguments.windows) for path in arguments.texts.split(",")]
    texts = Texts(original, cuts, arguments.dtype, device)
    lengths = ", ".join(str(len(text.windows)) for text in cuts)
    print(f"calibrated on {moments.calibration.tokens} tokens; {lengths} windows of {arguments.window}")
    row("copy", "bits", "with", "+ bits", *(text.text for text in cuts))
    row(*["---"] * (4 + len(cuts)))
    chosen = set(moments.sites)
    groups, ranks = [int(g) for g in arguments.groups.split(",")], [int(r) for r in arguments.ranks.split(",")]
    same = 8 if 8 in ranks else ranks[-1]  # whose bytes a budget gets

    def one(name: str, copy: Checkpoint, bits: float, correct: bool = True) -> int:
        row(name, f"{bits:.2f}", "nothing", "0", *texts.lost(copy))
        if not correct:
            return 0
        solved = Solved.of(original, copy, moments, max(*ranks, BEYOND * same), device, folder)
        budget = 0.0
        for rank in ranks:
            adapted, extra = solved.adapted(Request(rank=rank))
            budget = extra if rank == same else budget
            row(name, f"{bits:.2f}", f"rank {rank}", f"{extra:.3f}", *texts.lost(adapted))
        for by in arguments.budgets.split(","):
            adapted, extra = solved.adapted(Request(bits=budget), solved.worth(by, moments))
            row(name, f"{bits:.2f}", f"rank {same}'s bits by {by}", f"{extra:.3f}", *texts.lost(adapted))
        adapted, extra = Solved.of(original, copy, None, same, device, folder).adapted(Request(rank=same))
        row(name, f"{bits:.2f}", f"plain SVD, rank {same}", f"{extra:.3f}", *texts.lost(adapted))
        return len(ranks)

    def made(of: Callable[[str, torch.Tensor], torch.Tensor]) -> Checkpoint:
        shutil.rmtree(folder / "copy", ignore_errors=True)
        return write_copy(original, folder / "copy", lambda n, W: of(n, W).to(W.dtype) if n in chosen else W)

    def by_gptq(bits: int, group: int) -> Checkpoint:
        return made(lambda n, W: gptq(W, moments.metric(n, W).moment, bits, group))

    def gptq_row(bits: int, group: int) -> int:
        stored = bits + (16 + bits) / group  # scale and zero of a group
        return one(f"GPTQ {bits} bits, groups of {group}", by_gptq(bits, group), stored, group == groups[0])

    every_bits = [int(b) for b in arguments.bits.split(",") if b != "none"]
    rows = sum(gptq_row(bits, groups[0]) for bits in every_bits)
    for path in arguments.copies.split(",") if arguments.copies else ():
        copy = open_checkpoint(path)
        rows += one(copy.name, copy, bits_of(copy, original, chosen))
    if arguments.nf4:
        rows += one("bitsandbytes nf4", made(lambda _, W: nf4(W)), 4 + 32 / 64)
    return rows + sum(gptq_row(bits, group) for bits in every_bits for group in groups[1:])


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
    parser.add_argument("--budgets", default="relative,error,gradient")
    parser.add_argument("--copies", help="directories of copies made elsewhere, with commas between")
    parser.add_argument("--dtype", default="float32", help="that losses are computed in")
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
        smoke.pico(folder, "llama"), "--calibrate", text, "--calibration-windows", 6, "--texts", text, "--window", 64,
        "--windows", 2, "--bits", 3, "--groups", 16, "--ranks", "2,4", "--device", "cpu",
    )  # fmt: skip


if __name__ == "__main__":
    main()
