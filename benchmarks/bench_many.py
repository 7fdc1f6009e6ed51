#!/usr/bin/env python3
"""Very many small matrices: what every verb takes per matrix, and whether that grows with their number.

    python benchmarks/bench_many.py [--counts 1000,3000,9000,45000] [--verbs scan,plan,...] [--laser DIR]
                                    [--work DIR] [--keep] [--smoke]

The models have DeepSeek-V3's names, N bf16 matrices of 64 x 64 in four shards, noise with three planted spikes each.
Their fine-tunes are adapters of rank 4, merged into attention alone, and into every matrix. push goes to a Hub on the
loopback.
Every verb is a process of its own, measured as the system accounts for it when it has ended: CPU seconds, wall time,
and the peak of its resident memory. Start-up is what the same verb takes of a model of some two dozen matrices. Printed
for each verb and count:

    cpu, wall, peak   of the whole process
    ms, KB            of CPU time and of memory at the peak, above the start-up, per matrix
    growth            of the ms per matrix over the count before: 1 is linear, 3 would be quadratic from 1000 to 3000
    files             bytes of what it wrote, per matrix

--laser names a directory with another version of laser, to measure that one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import smoke

sys.path.insert(0, str(smoke.TESTS))

from hub_server import TOKEN, serving

SIDE, SHARDS, FEWEST = 64, 4, 24
RANK, SHARE = 4, 0.1  # of the adapters, and how much of a matrix's norm they have
GOAL_MS, GOAL_KB = 3.0, 10.0
SEARCHED = (
    "--rules",
    "mp-edge",
    "--window",
    "16",
    "--windows",
    "2",
    "--held-out-windows",
    "2",
    "--stream",
    "--lowest-snr",
    "3",
)
CALIBRATED = ("--window", "16", "--windows", "2", "--diagonal")
# Verb -> its words; those that begin with @ are places in the folder of one model, and a verb needs what stands before.
VERBS: dict[str, tuple[str, ...]] = {
    "info": ("info", "@model"),
    "scan --dry-run": ("scan", "@model", "--dry-run"),
    "scan": ("scan", "@model", "-o", "@spectra"),
    "spectra": ("spectra", "@spectra"),
    "spectra --csv": ("spectra", "@spectra", "--csv"),
    "plot --heat": ("plot", "@spectra", "--heat", "kept", "--mean", "-o", "@heat.png"),
    "plot --matrix": ("plot", "@spectra", "--matrix", "layers.0.mlp.experts.0.gate_proj", "-o", "@matrix.png"),
    "report": ("report", "@spectra", "-o", "@report.html"),
    "plan": ("plan", "@spectra", "--rule", "mp-edge", "-o", "@plan"),
    "reduce --dry-run": ("reduce", "@model", "@plan", "-o", "@out", "--dry-run"),
    "reduce": ("reduce", "@model", "@plan", "-o", "@out"),
    "verify": ("verify", "@model", "@out"),
    "card": ("card", "@out", "--source", "@model", "--force"),
    "run": ("run", "@model", "-o", "@run", "--rule", "mp-edge", "--no-search"),
    "run --resume": ("run", "@model", "-o", "@run", "--rule", "mp-edge", "--no-search", "--resume"),
    "run --dry-run": ("run", "@model", "-o", "@other", "--rule", "mp-edge", "--no-search", "--dry-run"),
    "null": ("null", "@model", "--rules", "mp-edge"),
    "search --dry-run": (*("search", "@model", "-o", "@searched", "--text", "@text", "--dry-run"), *SEARCHED),
    "search": (*("search", "@model", "-o", "@searched", "--spectra", "@spectra", "--text", "@text"), *SEARCHED),
    "calibrate": (*("calibrate", "@model", "-o", "@moments", "--text", "@text"), *CALIBRATED),
    "scan --moments": ("scan", "@model", "-o", "@spectra-data", "--moments", "@moments"),
    "delta": ("delta", "@model", "@out", "-o", "@delta.safetensors"),
    "leaderboard": (*("leaderboard", "@model", "-o", "@scores.json", "--tasks", "arc_challenge"), "--data", "@rows"),
    "eval": ("eval", "@model", "--text", "@text", "--window", "16", "--windows", "2", "--stream"),
    "convert": ("convert", "@release", "-o", "@converted"),
    "push": ("push", "@out", "maker/made"),
    "unmerge": ("unmerge", "@model", "@tuned", "-o", "@adapter"),
    "rebuild": ("rebuild", "@model", "@adapter", "-o", "@rebuilt"),
    "unmerge all": ("unmerge", "@model", "@tuned-all", "-o", "@adapter-all"),
    "rebuild all": ("rebuild", "@model", "@adapter-all", "-o", "@rebuilt-all"),
    "unmerge none": ("unmerge", "@model", "@out", "-o", "@remainder"),
    "rebuild none": ("rebuild", "@model", "@remainder", "-o", "@rebuilt-none"),
}
FILES = {"spectra": "spectra.safetensors", "plan": "plan.json", "text": "text.txt", "searched": "searched.json"}
FILES |= {"moments": "moments.safetensors"}


@dataclass(frozen=True)
class Taken:
    """What a process took: seconds of CPU and of wall time, peak of resident memory and files written, in bytes."""

    cpu: float
    wall: float
    peak: int
    written: int


# --- the models -------------------------------------------------------------------------------------------------------


def layout(count: int) -> tuple[int, int]:
    """Layers, and experts in each, of about `count` matrices; 61 layers of 246 experts for 45,000."""
    layers = max(1, round(61 * (count / 45000) ** 0.5))
    return layers, max(4, count // (3 * layers))


def deepseek(layers: int, experts: int) -> tuple[dict[str, tuple[int, ...]], dict[str, object]]:
    """Names and shapes of a DeepSeek-V3 whose widths are all 64, and its config."""
    half, square = SIDE // 2, (SIDE, SIDE)
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": square}
    for layer in range(layers):
        base = f"model.layers.{layer}"
        found |= {f"{base}.{norm}_layernorm.weight": (SIDE,) for norm in ("input", "post_attention")}
        found |= {f"{base}.self_attn.{x}.weight": square for x in ("q_a_proj", "q_b_proj", "o_proj")}
        found |= {f"{base}.self_attn.kv_a_proj_with_mqa.weight": square}
        found |= {f"{base}.self_attn.kv_b_proj.weight": (half + SIDE, half)}
        found |= {f"{base}.self_attn.q_a_layernorm.weight": (SIDE,), f"{base}.self_attn.kv_a_layernorm.weight": (half,)}
        found |= {f"{base}.mlp.gate.weight": (experts, SIDE), f"{base}.mlp.gate.e_score_correction_bias": (experts,)}
        for part in (*(f"experts.{expert}" for expert in range(experts)), "shared_experts"):
            found |= {f"{base}.mlp.{part}.{x}_proj.weight": square for x in ("gate", "up", "down")}
    found |= {"model.norm.weight": (SIDE,), "lm_head.weight": square}
    config: dict[str, object] = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    config |= {"num_hidden_layers": layers, "hidden_size": SIDE, "intermediate_size": SIDE, "vocab_size": SIDE}
    config |= {"moe_intermediate_size": SIDE, "n_routed_experts": experts, "n_shared_experts": 1, "n_group": 1}
    config |= {"topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 0, "num_attention_heads": 1}
    config |= {"num_key_value_heads": 1, "q_lora_rank": SIDE, "kv_lora_rank": half, "qk_nope_head_dim": half}
    config |= {"qk_rope_head_dim": half, "v_head_dim": SIDE, "max_position_embeddings": 64, "torch_dtype": "bfloat16"}
    return found, config


def mistral(layers: int, experts: int) -> tuple[dict[str, tuple[int, ...]], dict[str, object]]:
    """Names and shapes of a Mixtral in Mistral's own format whose widths are all 64, and its params.json."""
    square = (SIDE, SIDE)
    found: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": square, "norm.weight": (SIDE,)}
    for layer in range(layers):
        found |= {f"layers.{layer}.{norm}_norm.weight": (SIDE,) for norm in ("attention", "ffn")}
        found |= {f"layers.{layer}.attention.w{x}.weight": square for x in "qkvo"}
        found[f"layers.{layer}.feed_forward.gate.weight"] = (experts, SIDE)
        base = f"layers.{layer}.feed_forward.experts"
        found |= {f"{base}.{expert}.{x}.weight": square for expert in range(experts) for x in ("w1", "w2", "w3")}
    params: dict[str, object] = {"dim": SIDE, "hidden_dim": SIDE, "n_layers": layers, "n_heads": 2, "n_kv_heads": 2}
    params |= {"head_dim": SIDE // 2, "vocab_size": SIDE, "norm_eps": 1e-5}
    return found | {"output.weight": square}, params | {"moe": {"num_experts": experts, "num_experts_per_tok": 2}}


def bfloat16(shape: tuple[int, ...], rng: np.random.Generator) -> bytes:
    """Noise of 0.02, and three spikes over it where it is a matrix."""
    W = 0.02 * rng.standard_normal(shape, dtype=np.float32)
    if len(shape) == 2:
        u, v = rng.standard_normal((shape[0], 3), np.float32), rng.standard_normal((3, shape[1]), np.float32)
        W += 0.02 * u @ v
    return (W.reshape(-1).view(np.uint32) >> 16).astype(np.uint16).tobytes()


def merged(data: bytes, shape: tuple[int, ...], rng: np.random.Generator) -> bytes:
    """Of a bf16 matrix W (m, n) what a merge makes: W + B A, rounded to the nearest."""
    W = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    X = rng.standard_normal((shape[0], RANK), np.float32) @ rng.standard_normal((RANK, shape[1]), np.float32)
    bits = (W + X * (SHARE * np.linalg.norm(W) / np.linalg.norm(X))).reshape(-1).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes()


def write_tuned(model: Path, folder: Path, everywhere: bool) -> None:
    """A fine-tune of `model`: an adapter merged into what attention multiplies with, or into the experts as well."""
    shutil.copytree(model, folder)
    rng = np.random.default_rng(1)
    for file in sorted(folder.glob("*.safetensors")):
        data = bytearray(file.read_bytes())
        begin = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:begin]).items():
            if len(entry["shape"]) == 2 and ("self_attn" in name or (everywhere and "_proj" in name)):
                start, end = (begin + at for at in entry["data_offsets"])
                data[start:end] = merged(bytes(data[start:end]), tuple(entry["shape"]), rng)
        file.write_bytes(data)


def write_model(folder: Path, tensors: dict[str, tuple[int, ...]], names: list[str], shards: int) -> dict[str, str]:
    """The files of these names; returns in which of them each tensor is."""
    folder.mkdir(parents=True)
    rng, place, every = np.random.default_rng(0), dict[str, str](), list(tensors.items())
    each = -(-len(every) // shards)
    for number, file in enumerate(names):
        part, header, offset = every[number * each : (number + 1) * each], dict[str, object](), 0
        for name, shape in part:
            end = offset + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
            offset, place[name] = end, file
        text = json.dumps(header, separators=(",", ":")).encode()
        with (folder / file).open("wb") as made:
            made.write(struct.pack("<Q", len(text)) + text)
            for _, shape in part:
                made.write(bfloat16(shape, rng))
    return place


def write_tokenizer(folder: Path) -> None:
    """One token for each of 60 characters, in the file that transformers reads."""
    characters = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJ0123456789.,;:!?'-()"
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(characters)}
    added = [
        {"id": i, "content": word, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for word, i in list(vocabulary.items())[:3]
    ]
    split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    document: dict[str, object] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    document |= {"normalizer": None, "pre_tokenizer": split, "post_processor": None, "decoder": None}
    document["model"] = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"unk_token": "<unk>"}))


def write_all(work: Path, count: int) -> int:
    """The model, the release and a text in `work`; returns how many matrices the model has that a scan visits."""
    layers, experts = layout(count)
    tensors, config = deepseek(layers, experts)
    if not (work / "text.txt").exists():  # written last
        shutil.rmtree(work, ignore_errors=True)
        files = [f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors" for number in range(SHARDS)]
        place = write_model(work / "model", tensors, files, SHARDS)
        index = {"metadata": {}, "weight_map": place}
        (work / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
        write_tokenizer(work / "model")
        (work / "model" / "config.json").write_text(json.dumps(config))
        for name in ("tuned", "tuned-all"):
            write_tuned(work / "model", work / name, everywhere=name == "tuned-all")
        released, params = mistral(layers, experts)
        write_model(work / "release", released, ["consolidated.safetensors"], 1)
        (work / "release" / "params.json").write_text(json.dumps(params))
        (work / "rows").mkdir()
        with (work / "rows" / "arc_challenge.jsonl").open("w") as questions:
            for number in range(30):  # 25 of them are examples
                row: dict[str, object] = {"id": f"{number}", "question": f"2 and {number} is", "answerKey": "B"}
                row["choices"] = {"text": [f"{number + x}" for x in (1, 2, 3, 4)], "label": ["A", "B", "C", "D"]}
                questions.write(json.dumps(row) + "\n")
        (work / "text.txt").write_text(" ".join(f"{number} squared is {number * number}," for number in range(99)))
    return sum("mlp.experts" in name or "shared" in name or "self_attn" in name for name in tensors)


# --- the verbs --------------------------------------------------------------------------------------------------------


def measured(words: tuple[str, ...], work: Path, laser: Path, most: float) -> Taken | None:
    """One verb on what lies in `work`; None where it took longer than `most` seconds."""
    places = {f"@{name}": str(work / file) for name, file in FILES.items()}
    found = [word for word, before in zip(words[1:], words, strict=False) if word.startswith("@") and before != "-o"]
    if missing := [word for word in found if not Path(places.get(word, work / word[1:])).exists()]:
        raise SystemExit(f"{words[0]} needs {missing[0]} in {work}; try the verbs before it in the list as well")
    command = [places.get(word, str(work / word[1:]) if word.startswith("@") else word) for word in words]
    for word, path in zip(words, command, strict=True):  # what an earlier run of this verb made
        if words[words.index(word) - 1] == "-o" and word.startswith("@") and "--resume" not in words:
            shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink(missing_ok=True)
    before, start = size_of(work), time.perf_counter()
    with (work / "output.txt").open("wb") as output, hub_of(words[0]) as variables:
        environment = os.environ | {"PYTHONPATH": str(laser), "HF_HUB_OFFLINE": "1"} | variables
        child = subprocess.Popen(
            [sys.executable, "-m", "laser", *command], stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        while True:
            number, status, usage = os.wait4(child.pid, os.WNOHANG)
            if number:
                break
            if time.perf_counter() - start > most:
                child.kill()
                os.wait4(child.pid, 0)
                child.returncode = -9
                return None
            time.sleep(0.02)
    wall = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"laser {' '.join(command)} failed:\n{(work / 'output.txt').read_text()[-3000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Taken(usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss * unit, size_of(work) - before)


@contextmanager
def hub_of(verb: str) -> Iterator[dict[str, str]]:
    """An empty Hub for a verb that sends there: variables that tell its process where it is."""
    if verb != "push":
        yield {}
        return
    # In a process of its own: what it is sent stays in memory, and a child's peak begins with its parent's size.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=serve_hub, args=(there,))
    server.start()
    try:
        yield {"HF_ENDPOINT": here.recv(), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    finally:
        here.send("that is all")
        server.join()


def serve_hub(other_end: Connection) -> None:
    """Until something is sent, a Hub whose address is told first."""
    with serving() as hub:
        other_end.send(hub.url)
        other_end.recv()


def size_of(work: Path) -> int:
    return sum(path.stat().st_size for path in work.rglob("*") if path.is_file())


def rows(
    counts: list[int], verbs: list[str], work: Path, laser: Path, most: float
) -> Iterator[tuple[str, int, Taken, float, float, float | None]]:
    """(verb, matrices, what it took, ms and KB per matrix above the start-up, growth over the count before)."""
    fewest = write_all(work / "start", FEWEST)
    matrices = {count: write_all(work / str(count), count) for count in counts}
    for verb in verbs:
        words, before = VERBS[verb], None
        start = measured(words, work / "start", laser, most)
        assert start is not None, f"{verb} takes longer than {most} s of {fewest} matrices"
        for count in counts:
            taken = measured(words, work / str(count), laser, most)
            if taken is None:
                print(f"{verb:18s} {matrices[count]:8d}  more than {most:.0f} s", flush=True)
                break
            more = matrices[count] - fewest
            ms, kilobytes = 1e3 * (taken.cpu - start.cpu) / more, (taken.peak - start.peak) / 1e3 / more
            yield verb, matrices[count], taken, ms, kilobytes, before and ms / before
            before = ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="1000,3000,9000,45000")
    parser.add_argument("--verbs", default=",".join(VERBS))
    parser.add_argument("--laser", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--most", type=float, default=3600, help="seconds after which a verb is given up")
    parser.add_argument("--work", type=Path, default=Path(".demo/bench-many"))
    parser.add_argument("--keep", action="store_true")
    arguments = smoke.parse(
        parser,
        lambda folder: [
            *("--counts", 60, "--work", folder / "work"),
            *("--verbs", "scan,report,plan,reduce,verify,convert,push,unmerge,rebuild"),
        ],
    )
    counts, verbs = [int(count) for count in arguments.counts.split(",")], arguments.verbs.split(",")
    if unknown := [verb for verb in verbs if verb not in VERBS]:
        raise SystemExit(f"no verb is called {unknown[0]}; try one of {', '.join(VERBS)}")
    print(f"{'verb':18s} {'matrices':>8s} {'cpu s':>7s} {'wall s':>7s} {'peak MB':>8s}", end="")
    print(f" {'ms':>6s} {'KB':>7s} {'growth':>6s} {'files KB':>9s}")
    over = []
    for verb, matrices, taken, ms, kilobytes, growth in rows(
        counts, verbs, arguments.work, arguments.laser.resolve(), arguments.most
    ):
        print(f"{verb:18s} {matrices:8d} {taken.cpu:7.1f} {taken.wall:7.1f} {taken.peak / 1e6:8.0f}", end="")
        print(f" {ms:6.2f} {kilobytes:7.2f} {'' if growth is None else f'{growth:.2f}':>6s}", end="")
        print(f" {taken.written / 1e3 / matrices:9.2f}", flush=True)
        if ms > GOAL_MS or kilobytes > GOAL_KB:
            over.append(f"{verb} at {matrices}")
    if not arguments.smoke:
        print(f"over {GOAL_MS:g} ms or {GOAL_KB:g} KB: {', '.join(over) or 'none'}")
    if not arguments.keep:
        shutil.rmtree(arguments.work)


if __name__ == "__main__":
    main()
