"""What part of a fine-tune helps: its difference from the base cut or scaled, and the loss against both on other texts.

    python benchmarks/bench_difference.py MODEL TEXT [OTHER ...] [--rates 2e-5,4e-4] [--steps 40] [--rules ...]

MODEL is fine-tuned whole on the first nine tenths of TEXT, AdamW in float32, once for each learning rate: a small one,
and one that overshoots. Each result is stored as MODEL is. Then every rule is applied by laser to the difference, and
the output's loss is compared on the last tenth of TEXT and on each OTHER, window by window, with base and fine-tune. A
rule `A+B` is B on top of A's output.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import smoke
import torch

from laser.checkpoint.reader import Checkpoint, open_checkpoint
from laser.differences.base import Base
from laser.engine.crew import Crew
from laser.evaluation.evaluate import evaluate
from laser.evaluation.perplexity import Perplexity, difference
from laser.evaluation.text import Text, Windows, cut_windows, load_tokenizer, read_text
from laser.flow import run_flow
from laser.plan import Treatment, make_plan
from laser.selection import Selection
from laser.spectral.devices import HOST

RULES = ("scale:0.75", "scale:0.5", "scale:0.25", "rounding", "gavish-donoho", "gavish-donoho+scale:0.5")
TRAINED = 0.9  # share of the first text
SEED = 0


def fine_tuned(source: Path, windows: Windows, out: Path, rate: float, steps: int, batch: int) -> list[float]:
    """The losses of a whole fine-tune of `source`, which is written to `out` in the dtype that its config names."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    whole = (w.tokens for w in windows.windows if len(w.tokens) == windows.length)
    tokens = torch.stack([torch.from_numpy(each.astype("int64")) for each in whole])
    drawn = torch.Generator().manual_seed(SEED)
    losses = []
    for step in range(steps):
        for group in optimiser.param_groups:  # a short warm-up, then flat
            group["lr"] = rate * min(1.0, (step + 1) / 5)
        rows = tokens[torch.randint(len(tokens), (batch,), generator=drawn)]
        loss = model(rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    stored = open_checkpoint(source).config
    model.to(getattr(torch, str(stored.get("dtype") or stored.get("torch_dtype") or "float32"))).save_pretrained(out)
    for file in source.iterdir():
        if not (out / file.name).exists() and file.suffix != ".safetensors" and "index" not in file.name:
            shutil.copy(file, out / file.name)
    return losses


def edited(tuned: Checkpoint, base: Checkpoint, rule: str, out: Path) -> Checkpoint:
    """`tuned` with its difference from `base` as the rule has it, written to `out`."""
    run_flow(
        tuned, out, Selection(), lambda spectra: make_plan(spectra, rule), crew=Crew((HOST,)),
        base=Base.of(base, tuned), treatment=Treatment(rule),
    )  # fmt: skip
    return open_checkpoint(out)


def table(
    base: Checkpoint,
    tuned: Checkpoint,
    before: Sequence[Perplexity],
    texts: Sequence[Windows],
    rules: Sequence[str],
    work: Path,
    device: str,
) -> dict[str, list[tuple[Perplexity, Perplexity]]]:
    """Prints a row per rule and text. Returns what was measured of tuned and edited by rule."""
    whole = [evaluate(tuned, text, device=device) for text in texts]
    heads = ("rule", "text", "loss", "against base", "", "against tuned", "", "s to write")
    print("".join(f"{head:>16}" for head in heads))

    def row(rule: str, found: Sequence[Perplexity], seconds: float) -> None:
        for one, other, now in zip(before, whole, found, strict=True):
            numbers = []
            for reference in (one, other):
                change = difference(reference, now)
                numbers += [f"{change.nll:+16.4f}", f"{f'± {change.standard_error or 0.0:.4f}':>16}"]
            print(f"{rule:>16}{now.text[:15]:>16}{now.nll:16.4f}" + "".join(numbers) + f"{seconds:16.1f}", flush=True)

    row("(base)", before, 0.0)
    row("(tuned)", whole, 0.0)
    measured = {}
    for rule in rules:
        started, now = time.perf_counter(), tuned
        for number, part in enumerate(rule.split("+")):
            now = edited(now, base, part, work / f"{rule} {number}".replace(":", " "))
        seconds = time.perf_counter() - started
        found = [evaluate(now, text, device=device) for text in texts]
        row(rule, found, seconds)
        measured[rule] = list(zip(whole, found, strict=True))
        for path in work.glob(f"{rule.replace(':', ' ')} *"):
            shutil.rmtree(path)
    return measured


def smoke_words(folder: Path) -> list[object]:
    words = [smoke.pico(folder, "llama"), smoke.text(folder), "--rates", "1e-3", "--steps", "3", "--length", "24"]
    return [*words, "--windows", "3", "--rules", "scale:0.5,rounding,rank:1+scale:0.5"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--rates", default="2e-5,4e-4")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--rules", default=",".join(RULES))
    parser.add_argument("--device", default="cpu", help="of the evaluations")
    asked = smoke.parse(parser, smoke_words)
    base, tokenizer = open_checkpoint(asked.model), load_tokenizer(asked.model)
    first = read_text(asked.texts[0])
    at = int(TRAINED * len(first.content))
    learned = cut_windows(Text(first.name, first.content[:at]), tokenizer, length=asked.length)
    others = [Text(f"{first.name} end", first.content[at:])]
    others += [read_text(path, "question" if path.suffix == ".jsonl" else None) for path in asked.texts[1:]]
    texts = [cut_windows(text, tokenizer, length=asked.length, limit=asked.windows) for text in others]
    before = [evaluate(base, text, device=asked.device) for text in texts]
    for rate in map(float, asked.rates.split(",")):
        with tempfile.TemporaryDirectory(prefix="smoke-difference") as folder:
            out, started = Path(folder, "tuned"), time.perf_counter()
            losses = fine_tuned(asked.model, learned, out, rate, asked.steps, asked.batch)
            seconds = time.perf_counter() - started
            ends = (sum(part) / len(part) for part in (losses[:5], losses[-5:]))
            print(
                f"rate {rate:g}, {asked.steps} steps of {asked.batch} x {asked.length} tokens in {seconds:.0f} s: ",
                end="",
            )
            print("training loss of the first and last five {:.3f}, {:.3f}".format(*ends), flush=True)
            found = table(base, open_checkpoint(out), before, texts, asked.rules.split(","), Path(folder), asked.device)
            if asked.smoke:
                assert all(whole.nll != now.nll for pairs in found.values() for whole, now in pairs)
                assert losses[-1] < losses[0]


if __name__ == "__main__":
    main()
