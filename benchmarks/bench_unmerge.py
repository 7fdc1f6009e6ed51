"""How exactly a merged adapter comes back: rank, error of B A, bits missed and seconds, on merges of real matrices.

    python benchmarks/bench_unmerge.py MODEL [--matrices 4] [--ranks 4,16,32] [--shares 1e-3,2e-3,1e-2] [--refusals 100]
    python benchmarks/bench_unmerge.py MODEL --named layers.3. --ranks 64,128 --shares 2e-3,1e-2
    python benchmarks/bench_unmerge.py MODEL --named layers.3. --ranks 8,16 --shares 2e-3,2e-2 --remainders
    python benchmarks/bench_unmerge.py MODEL --costs 576x576,1536x576,4096x4096
    python benchmarks/bench_unmerge.py MODEL --end-to-end FOLDER [--steps 20] [--experts 2]
    python benchmarks/bench_unmerge.py MODEL --compare ADAPTER MERGED

Adapters are random, flat or with directions that fall by --falls each; merged in bfloat16 by both formulas, in torch's
own types. Beside the error stands what the stored bits allow (`least_error`), and the error of the truncated SVD of the
difference at the true rank, which is what mergekit-extract-lora and PEFT's conversion do. --refusals: changes that are
no adapters, and how many were called one. --remainders: instead, what the remainder takes of merges in float32 and of
two adapters merged one after the other.
--costs: seconds and peak memory of one matrix and of two at once. --compare: an adapter, of any tool, and the one that
was merged: the errors of B A, module by module.
--end-to-end: a LoRA trained and merged by PEFT, taken apart, made again, and loaded by PEFT on the base (needs peft and
transformers).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import re
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import smoke
import torch
from safetensors.torch import load_file

from laser.checkpoint.matrices import list_matrices
from laser.checkpoint.reader import open_checkpoint
from laser.differences.difference import Change, Verdict, compare_tensors, judge_difference, whitened
from laser.differences.formulas import Formula
from laser.differences.packing import pack, pack_some
from laser.differences.places import PEFT
from laser.differences.recover import recover, vote
from laser.differences.solver import wrong_bits
from laser.selection import Selection
from laser.spectral.devices import HOST
from laser.spectral.factorise import singular_values

BF16 = torch.bfloat16
CAVITY_ROUNDS = 12


def low_rank(W: torch.Tensor, rank: int, share: float, seed: int, decay: float) -> torch.Tensor:
    """B A (m, n), float32, of this share of the norm of W."""
    generator = torch.Generator().manual_seed(seed)
    B, A = (torch.randn(shape, generator=generator) for shape in ((W.shape[0], rank), (rank, W.shape[1])))
    X = B @ (A * decay ** torch.arange(rank)[:, None])
    return X * (share * W.float().norm() / X.norm())


def merged(W: torch.Tensor, X: torch.Tensor, how: str) -> torch.Tensor:
    return (W.float() + X).to(BF16) if how == "once" else W + X.to(BF16)


def changed(W: torch.Tensor, q: torch.Tensor) -> Change:
    found = compare_tensors(W, q)
    if found.kind is not Verdict.CHANGED:
        return found
    return judge_difference(found, singular_values(whitened(W, q, HOST), HOST)[0], (q.shape[0], q.shape[1]))


def truncation_error(W: torch.Tensor, q: torch.Tensor, X: torch.Tensor) -> float:
    U, s, Vh = torch.linalg.svd(q.double() - W.double(), full_matrices=False)
    rank = int(torch.linalg.matrix_rank(X.double(), rtol=1e-5))
    return float(((U[:, :rank] * s[:rank]) @ Vh[:rank] - X).norm() / X.norm())


def least_error(W: torch.Tensor, q: torch.Tensor, X: torch.Tensor, rank: int, formula: Formula) -> float:
    """The error of B A that the stored bits leave to the best guess there is, the mean of all that gives them.

    Computed from the true X (m, n) by the cavity method (expectation propagation, Opper and Winther 2005): with V_ij
    the variance of X_ij by all other entries, which the rows of B and the columns of A pass to each other, its error
    is that of a normal law of variance V_ij cut off at the ends of the interval of X_ij. What no bit tells, the choice
    of basis, is r^2 of the r (m + n) unknowns. Exact for large matrices of low rank; where the rank is a fifth of a
    side it is a tenth too much.
    """
    (m, n), (low, high) = X.shape, formula.cell(W, q)
    X = X.double()
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    B, A = U[:, :rank] * s[:rank].sqrt(), Vh[:rank].T * s[:rank].sqrt()
    drawn = torch.randn(m, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    of_B = of_A = torch.full_like(X, float(X.square().mean()) / 20 * rank * (m + n) / (m * n))
    left = torch.zeros(())
    for _ in range(CAVITY_ROUNDS):
        V = of_B + of_A
        left = variance_within(X - V.sqrt() * drawn, V, low, high)
        told = 1 / left - 1 / V
        to_B, to_A = told / (1 + told * of_A), told / (1 + told * of_B)
        x, y = quadratic(A, to_B), quadratic(B, to_A.T).T
        of_B, of_A = x / (1 - (to_B * x).clamp(max=0.95)), y / (1 - (to_A * y).clamp(max=0.95))
    return float((left.sum() * (m + n - rank) / (m + n)).sqrt() / X.norm())


def quadratic(A: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """a_j^T C_i a_j (m, n) for the rows a_j of A (n, r), where C_i is the inverse of A^T diag(weights_i) A."""
    return torch.stack([((A @ torch.linalg.inv((A.T * w) @ A)) * A).sum(1) for w in weights])


def variance_within(mean: torch.Tensor, V: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Of normal laws (m, n) of these means and variances, between low and high."""
    a, b = (low - mean) / V.sqrt(), (high - mean) / V.sqrt()
    a, b = torch.where(a + b > 0, -b, a), torch.where(a + b > 0, -a, b)  # so that the tail is the lower one
    below, above = (torch.special.log_ndtr(x) for x in (a, b))
    mass = above + torch.log1p(-torch.exp((below - above).clamp(max=-1e-12)))
    one, other = (torch.exp(-x * x / 2 - mass) / math.sqrt(2 * math.pi) for x in (a, b))
    return V * (1 + a * one - b * other - (one - other) ** 2).clamp(1e-12, 1 - 1e-12)


def table(
    weights: list[torch.Tensor], ranks: list[int], shares: list[float], falls: list[float], told: bool = False
) -> int:
    """Prints a row per rank, share, fall and formula; returns how many ranks came out wrong.

    told: the rank is that of other matrices, whose spectra prove it; else that of most of these."""
    heads = (
        "rank",
        "|BA|/|W|",
        "fall",
        "formula",
        "edge exact",
        "rank exact",
        "none",
        "error",
        "bound",
        "SVD",
        "missed",
        "rounds",
        "s",
    )
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    off = 0
    for rank, share, decay, how in itertools.product(ranks, shares, falls, ("once", "delta-first")):
        drawn = [low_rank(W, rank, share, seed, decay) for seed, W in enumerate(weights)]
        tuned = [merged(W, X, how) for W, X in zip(weights, drawn, strict=True)]
        changes = [changed(W, q) for W, q in zip(weights, tuned, strict=True)]
        voted, proven = (rank, True) if told else vote(changes)
        found, errors, bounds, others, missed, rounds, seconds = 0, [], [], [], [], [], 0.0
        for W, q, X, change in zip(weights, tuned, drawn, changes, strict=True):
            start = time.perf_counter()
            solution = recover(W, q, change, voted, proven)
            seconds += time.perf_counter() - start
            if solution is None:
                continue
            found += solution.adapter.rank == rank
            off += solution.adapter.rank != rank
            errors.append(float((solution.adapter.rows(0, len(q)) - X).norm() / X.norm()))
            bounds.append(least_error(W, q, X, rank, Formula(how)))
            others.append(truncation_error(W, q, X))
            missed.append(solution.share_wrong)
            rounds.append(solution.rounds)
        exact, none, n = sum(c.rank == rank for c in changes), len(weights) - len(errors), max(len(errors), 1)
        row = (rank, share, decay, how, f"{exact}/{len(weights)}", f"{found}/{len(errors)}", none,
               f"{max(errors, default=0):.4f}", f"{max(bounds, default=0):.4f}", f"{sum(others) / n:.4f}",
               f"{max(missed, default=0):.1e}", f"{sum(rounds) / n:.0f}", f"{seconds / len(weights):.1f}")  # fmt: skip
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    return off


def remainders(weights: list[torch.Tensor], ranks: list[int], shares: list[float]) -> None:
    """Prints what the formula misses, and what that takes: in float32, and of two adapters of half the rank each.

    least: the entropy of which entries are missed, and to which side, by an exact product of the very factors that were
    merged; of two adapters by their sum, where R(W + X + e) for an e that is uniform on a step is a side of X's chance.
    """
    heads = ("merge", "matrix", "rank", "|BA|/|W|", "missed", "remainder", "least", "of the adapter", "of the matrix")
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for kind, rank, share, W in itertools.product(("float32", "twice"), ranks, shares, weights):
        generator = torch.Generator().manual_seed(rank)
        if kind == "float32":  # with all of its digits
            W = W.float() * (1 + 2**-9 * torch.randn(W.shape, generator=generator))
            B, A = (torch.randn(shape, generator=generator) for shape in ((len(W), rank), (rank, W.shape[1])))
            B *= share * W.norm() / (B @ A).norm()
            q = W + B @ A
            missed = float((Formula("once").merge(W, B.double() @ A.double(), q.dtype) != q).double().mean())
            least = (missed - missed * math.log2(missed) - (1 - missed) * math.log2(1 - missed)) / 8
        else:
            one, other = (low_rank(W, rank // 2, share, seed, 1.0) for seed in (1, 2))
            q = merged(merged(W, one, "once"), other, "once")
            least = 1 / (2 * math.log(2)) / 8
        found = recover(W, q, changed(W, q), rank, True)
        row: tuple[object, ...] = (kind, f"{W.shape[0]}x{W.shape[1]}", rank, share)
        if found is None:
            whole = len(pack(q, W))
            print(f"| {' | '.join(map(str, row))} | kept whole | {whole} B | | | {whole / q.nbytes:.1%} |", flush=True)
            continue
        at = wrong_bits(W, q, found.adapter, found.formula)
        made = found.formula.merge(W, found.adapter.rows(0, len(W)), q.dtype).reshape(-1)
        size = len(pack_some(at, q.reshape(-1)[at], made[at]))
        adapter = found.adapter.A.nbytes + found.adapter.B.nbytes
        row += (f"{len(at) / q.numel():.2%}", f"{size} B", f"{least * q.numel():.0f} B", f"{size / adapter:.1%}")
        print(f"| {' | '.join(map(str, (*row, f'{size / q.nbytes:.1%}')))} |", flush=True)


def no_adapters(W: torch.Tensor, number: int) -> tuple[str, torch.Tensor, torch.Tensor]:
    """A change of W that is none of an adapter: what it is, the base, the tuned one."""
    generator = torch.Generator().manual_seed(number)
    share = (3e-4, 1e-3, 2e-3, 3e-3, 1e-2, 3e-2)[number % 6]
    kind = ("random", "power 0.5", "power 0.8", "power 1.1", "quantised base", "all norms")[number // 6 % 6]
    if kind == "quantised base":  # an adapter trained on the base in 4 bits, a scale per row
        step = W.float().abs().amax(1, keepdim=True) / 7
        coarse = (torch.round(W.float() / step) * step).to(BF16)
        return kind, W, merged(coarse, low_rank(W, 8, share, number, 1.0), "once")
    if kind == "all norms":  # as DoRA: the adapter, and then a factor for each row
        norms = 1 + share * torch.randn(len(W), 1, generator=generator)
        return kind, W, ((W.float() + low_rank(W, 8, share, number, 1.0)) * norms).to(BF16)
    X = torch.randn(W.shape, generator=generator)
    if kind != "random":
        U, s, Vh = torch.linalg.svd(X, full_matrices=False)
        X = (U * torch.arange(1, len(s) + 1) ** -float(kind.split()[1])) @ Vh
    return kind, W, merged(W, X * (share * W.float().norm() / X.norm()), "once")


def refusals(weights: list[torch.Tensor], count: int) -> int:
    """How many of so many changes that are no adapters were called one."""
    called: dict[str, list[int]] = {}
    for number in range(count):
        print(f"{number} of {count}", end="\r", file=sys.stderr)
        kind, W, q = no_adapters(weights[number % len(weights)], number)
        counts = called.setdefault(kind, [0, 0])
        counts[0] += 1
        change = changed(W, q)
        told = change.kind in (Verdict.LOW_RANK, Verdict.FAINT)  # as unmerge asks
        counts[1] += told and recover(W, q, change) is not None
    for kind, (tried, wrong) in called.items():
        print(f"{kind}: {wrong} of {tried} called an adapter", flush=True)
    return sum(wrong for _, wrong in called.values())


# --- costs ------------------------------------------------------------------------------------------------------------


def cost(rows: int, columns: int, workers: int) -> None:
    """Prints a row: so many matrices at once, each by a thread, in this process alone."""
    torch.manual_seed(0)
    drawn = [(0.02 * torch.randn(rows, columns)).to(BF16) for _ in range(workers)]
    pairs = [(W, merged(W, low_rank(W, 16, 5e-3, 1, 0.9), "once")) for W in drawn]
    before = peak_rss()

    def one(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float, int]:
        start = time.perf_counter()
        change = changed(*pair)
        told = time.perf_counter()
        found = recover(*pair, change, 16, True, (Formula("once"),))
        assert found is not None
        return told - start, time.perf_counter() - told, found.rounds

    with ThreadPoolExecutor(workers) as pool:
        spectrum, solving, rounds = (max(each) for each in zip(*pool.map(one, pairs), strict=True))
    row = (
        f"{rows}x{columns}",
        workers,
        f"{spectrum:.1f}",
        f"{solving:.1f}",
        rounds,
        f"{(peak_rss() - before) / 1e6:.0f}",
    )
    print("| " + " | ".join(map(str, row)) + " |", flush=True)


def peak_rss() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def costs(shapes: list[str], model: str) -> None:
    print(
        "| matrix | at once | s spectrum | s solving | rounds | MB at the peak |\n|---|---|---|---|---|---|", flush=True
    )
    for shape, workers in itertools.product(shapes, (1, 2)):
        subprocess.run([sys.executable, __file__, model, "--cost", f"{shape}x{workers}"], check=True)


# --- end to end -------------------------------------------------------------------------------------------------------


def end_to_end(base: Path, folder: Path, modules: list[str], steps: int, experts: int) -> None:
    """A LoRA of rank 16 trained and merged by PEFT, taken apart and made again; every figure in a line.

    modules: that are adapted; experts: layers whose experts are adapted as parameters, of a model that has them
    """
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=BF16).eval()

    torch.manual_seed(0)
    model: Any = load(base)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(base))
    sparse = "num_local_experts" in json.loads((base / "config.json").read_text())
    config = LoraConfig(r=16, lora_alpha=32, target_modules=modules)
    if sparse:
        layers = [f"model.layers.{i}.mlp.experts" for i in range(experts)]
        config.target_parameters = [f"{layer}.{p}" for layer in layers for p in ("gate_up_proj", "down_proj")]
    model = get_peft_model(model, config)  # pyright: ignore[reportAssignmentType]
    text = "\n".join(path.read_text() for path in sorted((Path(__file__).parents[1] / "docs" / "log").glob("2026*.md")))
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for step in range(steps):
        window = ids[128 * step : 128 * (step + 1)][None]
        loss = model(window, labels=window).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        print(f"step {step} loss {float(loss):.3f}", end="\r", file=sys.stderr)
    model.eval().save_pretrained(folder / "lora")
    model.merge_and_unload().save_pretrained(folder / "tuned")
    laser = [sys.executable, "-m", "laser"]
    for words in (
        ["unmerge", base, folder / "tuned", "-o", folder / "adapter"],
        ["rebuild", base, folder / "adapter", "-o", folder / "again"],
        ["verify", folder / "adapter", folder / "again"],
        ["rebuild", base, folder / "lora", "-o", folder / "merged"],
    ):
        start = time.perf_counter()
        subprocess.run([*laser, *map(str, words)], check=True)
        print(f"laser {words[0]}: {time.perf_counter() - start:.1f} s", flush=True)
    compare(folder / "adapter", folder / "lora")
    again, tuned = (hashes(folder / name) for name in ("again", "tuned"))
    mine, theirs = (open_checkpoint(folder / name) for name in ("merged", "tuned"))
    off = sum(not torch.equal(mine.raw(name), theirs.raw(name)) for name in theirs.tensors)
    print(f"shards equal by sha256: {again == tuned}; of laser's merge of PEFT's adapter {off} tensors differ")
    merged_by_peft = PeftModel.from_pretrained(load(base), folder / "adapter").merge_and_unload()
    reference, window = load(folder / "tuned"), ids[-128:][None]
    with torch.no_grad():
        mine, theirs, before = (x(window).logits.float() for x in (merged_by_peft, reference, load(base)))
    differ = sum(int((a != b).sum()) for a, b in zip(merged_by_peft.parameters(), reference.parameters(), strict=True))
    off, moved = (float((x - theirs).abs().mean()) for x in (mine, before))
    print(
        f"PEFT's merge of the adapter on the base: {differ} weights differ; logits equal: {torch.equal(mine, theirs)}, "
        f"mean difference {off:.2g}, of the base {moved:.2g}"
    )
    sizes = {
        name: (folder / "adapter" / name).stat().st_size
        for name in ("adapter_model.safetensors", "remainder.safetensors")
    }
    whole = sum(path.stat().st_size for path in (folder / "tuned").glob("*.safetensors"))
    lora = sum(path.stat().st_size for path in (folder / "lora").glob("*.safetensors"))
    print(
        f"MB: tuned {whole / 1e6:.1f}, "
        + ", ".join(f"{n} {s / 1e6:.3f}" for n, s in sizes.items())
        + f", PEFT's own {lora / 1e6:.3f}"
    )


def products(folder: Path) -> dict[str, torch.Tensor]:
    """s B A of every module that a PEFT adapter is of."""
    config, found = json.loads((folder / "adapter_config.json").read_text()), {}
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in (n for n in tensors if n.endswith(".lora_A.weight")):
        module, A = name.removeprefix(PEFT).removesuffix(".lora_A.weight"), tensors[name].double()
        alpha = (config.get("alpha_pattern") or {}).get(module, config["lora_alpha"])
        scale = alpha / (len(A) ** 0.5 if config.get("use_rslora") else len(A))
        found[module] = scale * tensors[name.replace(".lora_A.", ".lora_B.")].double() @ A
    return found


def compare(folder: Path, merged: Path) -> None:
    ours, theirs = products(folder), products(merged)
    errors = sorted(float((ours[m] - X).norm() / X.norm()) for m, X in theirs.items() if m in ours)
    if not errors:
        return print("no module is in both adapters")
    told = ", ".join(f"{errors[int(at * (len(errors) - 1))]:.4f}" for at in (0.5, 0.9, 1.0))
    print(f"error of B A in {len(errors)} of {len(theirs)} modules: median, 90 % and largest {told}")


def hashes(folder: Path) -> set[str]:
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--matrices", type=int, default=4)
    parser.add_argument("--named", default="", help="take the matrices in whose names this expression is found")
    parser.add_argument("--ranks", default="4,16,32")
    parser.add_argument("--shares", default="1e-3,2e-3,1e-2")
    parser.add_argument("--falls", default="1,0.85", help="of each direction to the one before")
    parser.add_argument("--told", action="store_true", help="the rank is known from other matrices")
    parser.add_argument("--remainders", action="store_true")
    parser.add_argument("--refusals", type=int, default=0)
    parser.add_argument("--costs", default="")
    parser.add_argument("--cost", default="", help=argparse.SUPPRESS)
    parser.add_argument("--end-to-end", type=Path)
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("ADAPTER", "MERGED"))
    parser.add_argument("--modules", default="q_proj,k_proj,v_proj,o_proj")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--experts", type=int, default=2)
    asked = smoke.parse(
        parser,
        lambda folder: [smoke.pico(folder), "--matrices", 1, "--ranks", "1", "--shares", "3e-2", "--refusals", 2],
    )
    if asked.cost:
        return cost(*map(int, asked.cost.split("x")))
    if asked.costs:
        return costs(asked.costs.split(","), asked.model)
    if asked.compare:
        return compare(*asked.compare)
    if asked.end_to_end:
        return end_to_end(Path(asked.model), asked.end_to_end, asked.modules.split(","), asked.steps, asked.experts)
    checkpoint = open_checkpoint(asked.model)
    chosen = [m for m in list_matrices(checkpoint) if Selection().why_not(m) is None]
    step = max(len(chosen) // asked.matrices - 1, 1)  # of no whole number of layers: another role each time
    named = [m for m in chosen if asked.named and re.search(asked.named, m.name)]
    chosen = named or chosen[1::step][: asked.matrices]
    weights = [checkpoint.read(m.tensor, m.part).to(BF16) for m in chosen]
    print(", ".join(f"{m.name} {m.shape[0]}x{m.shape[1]}" for m in chosen))
    ranks, (shares, falls) = (
        [int(r) for r in asked.ranks.split(",")],
        ([float(x) for x in each.split(",")] for each in (asked.shares, asked.falls)),
    )
    if asked.remainders:
        return remainders(weights, ranks, shares)
    off = table(weights, ranks, shares, falls, asked.told)
    wrong = refusals(weights, asked.refusals)
    print(f"{off} of the ranks found are wrong; {wrong} of {asked.refusals} other changes were called adapters")


if __name__ == "__main__":
    main()
