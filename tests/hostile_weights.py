"""Pickles, GGUF files and params.json that somebody has changed, through `laser convert` or `laser scan`.

What laser takes, the library of the format takes too, and finds the same numbers in it.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import limits
import numpy as np
import torch
from helpers import tensors_in
from limits import Said

import laser
from laser.checkpoint.safetensors import read_bytes

sys.path.insert(0, str(Path(__file__).parent / "checkpoint"))

COUNTS = [0, 1, 2, 3, 255, 4096, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
LARGE = [*COUNTS, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
Trial = tuple[str, list[tuple[tuple[str, ...], Said]]]


def damage(data: bytes, draw: random.Random, end: int) -> tuple[bytes, str]:
    """Bytes of which one to three things before `end` are changed."""
    found, told = bytearray(data), []
    for _ in range(draw.choice((1, 1, 2, 3))):
        if not found:
            break
        at = draw.randrange(min(end, len(found)))
        what = draw.choice(["bit", "byte", "u32", "u64", "u64", "cut", "zero", "more"])
        told.append(f"{what} at {at}")
        if what == "bit":
            found[at] ^= 1 << draw.randrange(8)
        elif what == "byte":
            found[at] = draw.randrange(256)
        elif what == "u32":
            found[at : at + 4] = struct.pack("<I", draw.choice(COUNTS))
        elif what == "u64":
            found[at : at + 8] = struct.pack("<Q", draw.choice(LARGE))
        elif what == "cut":
            del found[at : at + draw.choice((1, 8, len(found)))]
        elif what == "zero":
            found[at : at + 16] = bytes(16)
        else:
            found[at:at] = draw.randbytes(draw.choice((1, 8, 64)))
    return bytes(found), ", ".join(told)


# --- pickles ----------------------------------------------------------------------------------------------------------


def hash_bomb() -> bytes:
    """A dictionary with a tuple of two of a tuple of two, and so on, as its key."""
    return b"\x80\x02}))\x86q\x00" + b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(64)) + b"Ns."


def rezipped(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return out.getvalue()


def hostile_pickle(path: Path, draw: random.Random) -> str:
    raw = path.read_bytes()
    what = draw.choice(["bytes", "bytes", "pickle", "pickle", "pickle", "packed", "bomb", "expanded", "lazy", "twice"])
    state = torch.load(path, weights_only=True)
    name = draw.choice(sorted(state))
    if what == "bytes":
        # The pickle lies at the start, the zip's directory at the end; in between are weights, which may be anything.
        first, told = damage(raw[:60_000], draw, 20_000)
        last, more = damage(raw[60_000:], draw, 10**9) if draw.random() < 0.3 else (raw[60_000:], "")
        path.write_bytes(first + last)
        return f"{told} {more}"
    if what == "pickle":
        told = ""

        def change(file: str, data: bytes) -> bytes:
            nonlocal told
            if not file.endswith("data.pkl"):
                return data
            data, told = damage(data, draw, len(data))
            return data

        path.write_bytes(rezipped(path, change))
        return f"pickle: {told}"
    if what == "packed":
        path.write_bytes(rezipped(path, lambda _, data: data, zipfile.ZIP_DEFLATED))
    elif what == "bomb":
        path.write_bytes(rezipped(path, lambda file, data: hash_bomb() if file.endswith("data.pkl") else data))
    elif what == "expanded":
        torch.save(state | {name: torch.ones(1).expand(10**6, 10**6)}, path)
    elif what == "lazy":
        torch.save(state | {name: torch.ones(8, 8, dtype=torch.complex64).conj()}, path)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with zipfile.ZipFile(path, "a") as more_files:
                inside = more_files.namelist()
                more_files.writestr(next(x for x in inside if x.endswith("data.pkl")), hash_bomb())
    return what


def as_torch_reads(folder: Path) -> str | None:
    """What laser reads of a pickle otherwise than torch does where it maps nothing."""
    try:
        theirs = torch.load(folder / "p/pytorch_model.bin", weights_only=True, mmap=False)
    except Exception as error:
        return f"torch refuses: {error}"
    ours = laser.open_checkpoint(folder / "p")
    for info in ours.tensors.values():
        (shard,) = [shard for shard in ours.shards if shard.name == info.shard]
        found = bytes(read_bytes(shard, info.start, info.end).numpy())
        if found != bytes(theirs[info.name].contiguous().reshape(-1).view(torch.uint8).numpy()):
            return f"{info.name} is another in torch"
    return None


def pickles(folder: Path) -> Path:
    from pico_language import dense_tensors, make_model

    make_model(folder / "p", "llama")
    for file in (folder / "p").glob("model*.safetensors*"):
        file.unlink()
    torch.save(dense_tensors(), folder / "p/pytorch_model.bin")
    return folder


# --- GGUF -------------------------------------------------------------------------------------------------------------


def ggufs(folder: Path) -> Path:
    from conftest import mixtral_tensors

    write_gguf = import_module("test_gguf").write_gguf

    write_gguf(folder / "g.gguf", mixtral_tensors(), "F16")
    return folder


def as_gguf_reads(folder: Path) -> str | None:
    """What of a converted file is otherwise in the gguf package."""
    from gguf import GGUFReader

    theirs = {t.name: t for t in GGUFReader(folder / "g.gguf").tensors}
    for name, W in tensors_in(folder / "new").items():
        if "v_proj" in name:
            other = theirs[f"blk.{name.split('.')[2]}.attn_v.weight"].data
            if not np.array_equal(W.float().numpy(), other.astype(np.float32), equal_nan=True):
                return f"{name} is another in the gguf package"
    return None


# --- params.json ------------------------------------------------------------------------------------------------------


def params(folder: Path) -> Path:
    from mistral_release import write_release
    from pico_language import make_model

    make_model(folder / "m", "sliding")
    write_release(folder / "m", folder / "r")
    assert not limits.laser("convert", "r", "-o", "right", folder=folder).code
    return folder


def as_before(folder: Path) -> str | None:
    """Weights that are converted otherwise than with the params.json that belongs to them."""
    ours, right = tensors_in(folder / "new"), tensors_in(folder / "right")
    return None if ours.keys() == right.keys() and all(torch.equal(W, right[n]) for n, W in ours.items()) else "others"


def trial(kind: str, source: Path, folder: Path, seed: int) -> Trial:
    """One changed file: what was changed, and what the verb said."""
    from hostile import mutated_config

    draw, work = random.Random(f"{kind} {seed}"), folder / "work"
    shutil.copytree(source, work)
    verb, then = ("convert", {"ggufs": "g.gguf", "params": "r"}.get(kind, ""), "-o", "new"), as_before
    if kind == "pickles":
        what = hostile_pickle(work / "p/pytorch_model.bin", draw)
        verb, then = ("scan", "p", "-o", "new", "--method", "svd"), as_torch_reads
    elif kind == "ggufs":
        raw = (work / "g.gguf").read_bytes()
        data, what = damage(raw, draw, draw.choice((40, 800, 3000)))
        (work / "g.gguf").write_bytes(data)
        then = as_gguf_reads
    else:
        text = mutated_config(draw, json.loads((work / "r/params.json").read_bytes()))
        (work / "r/params.json").write_bytes(text)
        what = text[:300].decode("utf-8", "replace")
    said = limits.laser(*verb, folder=work, then=lambda: then(work))
    shutil.rmtree(work)
    return f"{kind}: {what}", [(verb, said)]
