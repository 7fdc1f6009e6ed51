"""Records that somebody has changed: every kind, changed at random, as it is or sealed again, through its verbs."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import limits
import numpy as np
from limits import Said
from safetensors import safe_open
from safetensors.numpy import save_file

import laser
from laser.checkpoint.source import Source
from laser.cli import main
from laser.evaluation.leaderboard import Leaderboard, TaskScore
from laser.evaluation.lm_tasks import TASKS
from laser.searching.runner import Trial
from laser.searching.search import Report

Place = tuple[Any, ...]
Document = Any
JUNK: list[Any] = [None, True, False, 0, 1, -1, 2**63, 10**30, 1.5, -0.5, 1e308, "", "3", "x", [], {}, [1], {"a": 1}]
JUNK += [
    float("nan"),
    float("inf"),
    -float("inf"),
    "\x1b[31m\u202ename",
    "a" * 100_000,
    ["a"] * 300,
    "../../etc/passwd",
]
JUNK += ["/dev/zero", "\ud800"]


# --- changes ----------------------------------------------------------------------------------------------------------


def places(document: Document, at: Place = ()) -> Iterator[Place]:
    """Every place inside a document, the document itself not."""
    inside = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in inside:
        yield (*at, key)
        yield from places(value, (*at, key))


def get(document: Document, at: Place) -> Any:
    for key in at:
        document = document[key]
    return document


def nested(depth: int) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = [found]
    return found


def change(document: Document, draw: random.Random) -> tuple[Document, str, Place]:
    """A copy with one thing in it changed, what that is, and where."""
    document = copy.deepcopy(document)
    every = list(places(document))
    # As many changes of what is near the top as of what is deep inside: rows are alike, and there are many.
    depth = draw.choice(sorted({len(at) for at in every}))
    at = draw.choice([at for at in every if len(at) == depth])
    holder, key = get(document, at[:-1]), at[-1]
    what = draw.choice(
        ["missing", "extra", "junk", "junk", "junk", "nested", "other type", "minus", "double", "longer"]
    )
    if what == "missing":
        del holder[key]
    elif what == "extra" and isinstance(holder, dict):
        holder[draw.choice([f"{key} ", "shiny", "\x1b[2J", "__class__"])] = draw.choice(JUNK)
    elif what == "nested":
        holder[key] = nested(draw.choice([2, 40, 400, 900]))
    elif what == "other type":
        held = holder[key]
        others = {bool: int(held) if isinstance(held, bool) else 0, int: str(held), float: str(held), str: 7, list: {}}
        holder[key] = others.get(type(held), [held])
        what = f"{type(held).__name__} becomes {type(holder[key]).__name__}"
    elif what == "minus" and isinstance(holder[key], int | float):
        holder[key] = -holder[key] - 1
    elif what == "double" and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif what == "longer" and isinstance(holder[key], int | float) and type(holder[key]) is not bool:
        holder[key] = holder[key] * 10**6 + 1
    else:
        what = "junk"
        held = holder[key]
        holder[key] = draw.choice([junk for junk in JUNK if not isinstance(junk, type(held)) or junk != held])
        what = f"junk {str(holder[key])[:20]!r}"
    return document, what, at


def bend(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Bytes that are torn, flipped, or something else altogether."""
    at = draw.randrange(max(len(data), 1))
    flipped = bytearray(data)
    flipped[at] ^= 1 << draw.randrange(8)
    bent = {
        "torn": data[:at],
        "empty": b"",
        "flipped": bytes(flipped),
        "UTF-16": b"\xff\xfe" + data.decode("latin-1").encode("utf-16-le"),
        "deep": b"[" * 200_000,
        "no text": bytes(range(256)) * 20,
        "twice": data + data,
        "a list": b"[]",
        "a number": b"1e400",
    }
    what = draw.choice(sorted(bent))
    return bent[what], what


def seal(document: Document) -> Document:
    """Sealed as laser does, whatever is inside."""
    if not isinstance(document, dict):
        return document
    bare = {key: value for key, value in document.items() if key != "check"}
    return bare | {"check": hashlib.sha256((json.dumps(bare, indent=1) + "\n").encode()).hexdigest()}


def seal_lines(lines: list[Document]) -> bytes:
    """A journal as laser writes it, whatever its lines are."""
    written, last = b"", b""
    for line in lines:
        body = json.dumps(line).encode()
        last = hashlib.sha256(last + body).hexdigest()[:16].encode()
        written += body[:-1] + (b", " if line else b"") + b'"check": "' + last + b'"}\n'
    return written


# --- kinds ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of record: where it lies in a directory that is copied for each trial, and the verbs that read it."""

    name: str
    file: str
    verbs: tuple[tuple[str, ...], ...]
    form: str = "json"  # json, lines (a journal), arrays (safetensors with a header of ours), parts (of a calibration)
    sealed: bool = True  # whether what was changed without its seal has to be refused


ON_TEXT = ("--text", "t.txt", "--window", "32", "--windows", "4")
CALIBRATE = ("calibrate", "m", "-o", "c", "--ledoit-wolf", *ON_TEXT)
BACK = ("calibrate", "m", "-o", "g", "--ledoit-wolf", "--gradients", *ON_TEXT)
SEARCH = ("search", "m", "-o", "new", "--spectra", "s", "--lowest-snr", "2", "--held-out-windows", "2")
SEARCH = (*SEARCH, "--accept", "any-drop", *ON_TEXT)
RUN = ("run", "m", "-o", "run", "--rule", "rank:4", "--no-search")
CARD, VERIFY = ("card", "out"), ("verify", "m", "out")
LOOK = (("spectra", "s"), ("report", "s", "-o", "new.html"), ("plot", "s", "--heat", "kept", "-o", "new.png"))
REDUCE = ("reduce", "m", "plan.json", "-o")
KINDS = (
    Kind("spectra", "s", (("plan", "s", "-o", "new"), *LOOK), "arrays"),
    Kind(
        "spectra with data",
        "sd",
        (("plan", "sd", "-o", "new", "--rule", "data:fraction:0.5"), ("spectra", "sd")),
        "arrays",
    ),
    Kind("plan", "plan.json", ((*REDUCE, "new"),), sealed=False),
    Kind("moments", "moments", (("scan", "m", "-o", "new", "--moments", "moments"),), "arrays"),
    Kind("part of a calibration", "c.partial/layer-00000-00000.safetensors", (CALIBRATE,), "parts"),
    Kind("states of a calibration", "c.partial/states.safetensors", (CALIBRATE,), "parts"),
    Kind("gradients of a calibration", "g.partial/gradients.safetensors", (BACK,), "parts"),
    Kind("outcome", "out/laser.json", (VERIFY, CARD, (*REDUCE, "out", "--resume")), sealed=False),
    Kind("eval", "out/laser/eval.json", (("eval", "out/laser/eval.json", "e2.json"), CARD, VERIFY)),
    Kind("leaderboard", "out/laser/leaderboard.json", (CARD, VERIFY)),
    Kind("search", "found/laser/search.json", (("card", "found"),)),
    Kind("source", "out/laser/source.json", (CARD, (*CARD, "--source", "m"))),
    Kind("journal of a scan", "j.partial", (("scan", "m", "-o", "j"),), "lines"),
    Kind("journal of reduce", "half/laser/journal.jsonl", ((*REDUCE, "half", "--resume"),), "lines"),
    Kind("journal of run", "run/laser/journal.jsonl", ((*RUN, "--resume"),), "lines"),
    Kind("journal of a search", "search.jsonl", (SEARCH,), "lines"),
    Kind("recipe", "r.toml", (("run", "m", "-o", "new", "--recipe", "r.toml", "--dry-run"),), "toml", sealed=False),
)


def ruled(verb: tuple[str, ...]) -> tuple[str, ...]:
    """The words of a verb: `plan` asks for a rule."""
    return (*verb, "--rule", "mp-edge") if verb[0] == "plan" and "--rule" not in verb else verb


def arrays_of(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with safe_open(path, "numpy") as file:
        return dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}


def bend_arrays(arrays: dict[str, np.ndarray], draw: random.Random) -> str:
    """Change one array of a file."""
    name = draw.choice(sorted(arrays))
    a = arrays[name]
    changes: dict[str, Callable[[], np.ndarray | None]] = {
        "shorter": lambda: a[:-1].copy(),
        "longer": lambda: np.concatenate([a, a[-1:]]),
        "empty": lambda: a[:0].copy(),
        "NaN": lambda: np.where(np.arange(a.size).reshape(a.shape) == a.size // 2, np.nan, a).astype(a.dtype),
        "Inf": lambda: (a * np.inf).astype(a.dtype),
        "negative": lambda: -a - 1,
        "rising": lambda: a[::-1].copy(),
        "huge": lambda: (a * 1e300).astype(a.dtype),
        "integers": lambda: a.astype(np.int64),
        "half": lambda: a.astype(np.float16),
        "flat": lambda: a.reshape(1, *a.shape),
        "none": lambda: None,
        "another name": lambda: a,
    }
    what = draw.choice(sorted(changes))
    with np.errstate(all="ignore"):
        new = changes[what]()
    if new is None or what == "another name":
        del arrays[name]
    if new is not None:
        arrays["another" if what == "another name" else name] = new
    return f"{what}: {name}"


def digest_of(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, a in sorted(arrays.items()):
        digest.update(f"{name}\0{a.dtype}\0{a.shape}\0".encode() + a.tobytes())
    return digest.hexdigest()


def part_check(held: dict[str, str], arrays: dict[str, np.ndarray]) -> str:
    """Of a part of a calibration."""
    torch_names = {
        "float32": "torch.float32",
        "float64": "torch.float64",
        "float16": "torch.float16",
        "int64": "torch.int64",
    }
    bare = sorted((key, value) for key, value in held.items() if key != "check")
    named = [
        (name, torch_names[str(a.dtype)], list(a.shape), hashlib.sha256(a.tobytes()).hexdigest())
        for name, a in sorted(arrays.items())
    ]
    return hashlib.sha256(json.dumps([bare, named]).encode()).hexdigest()


def hostile(kind: Kind, folder: Path, draw: random.Random, again: bool) -> str:
    """Change the record of this kind in `folder`; `again`: seal it again. Says what was changed."""
    path = folder / kind.file
    raw = path.read_bytes()
    if draw.random() < 0.12:
        data, what = bend(raw, draw)
        path.write_bytes(data)
        return what
    if kind.form == "json":
        document, what, at = change(json.loads(raw), draw)
        path.write_text(json.dumps(seal(document) if again else document, indent=1) + "\n")
    elif kind.form == "lines":
        lines = [{k: v for k, v in json.loads(x).items() if k != "check"} for x in raw.splitlines()]
        lines, what, at = change(lines, draw)
        lines = [x if isinstance(x, dict) else {"entry": x} for x in lines]
        path.write_bytes(seal_lines(lines) if again else "".join(json.dumps(x) + "\n" for x in lines).encode())
    elif kind.form == "toml":
        words = draw.choice(["rule", "accept", "lowest-snr", "require-fit", "layers", "two-sided", "shiny", "include"])
        junk = draw.choice([*JUNK, 5, 0.5, "mp-edge", "x" * 10])
        path.write_bytes(f"{words} = {json.dumps(junk)}\n".replace("NaN", "nan").replace("Infinity", "inf").encode())
        what, at = f"{words} = {str(junk)[:20]!r}", (words,)
    else:
        held, arrays = arrays_of(path)
        at = ("array",)
        ours = {key: json.loads(text) for key, text in held.items() if key != "check"}
        if draw.random() < 0.5:
            what = bend_arrays(arrays, draw)
        else:
            ours, what, at = change(ours, draw)
            what = f"{what} at {'/'.join(map(str, at))[:60]}"
        if again and kind.form == "arrays" and isinstance(ours.get("laser"), dict):
            inside = ours["laser"]
            if "vectors" in inside:
                inside["vectors"] = digest_of(arrays)
            if isinstance(inside.get("hashes"), dict):
                inside["hashes"] |= {name: hashlib.sha256(a.tobytes()).hexdigest() for name, a in arrays.items()}
            ours["laser"] = seal(inside)
        held = {str(key): json.dumps(value) for key, value in ours.items()} | {
            k: v for k, v in held.items() if k == "check"
        }
        if again and kind.form == "parts":
            held["check"] = part_check(held, arrays)
        save_file(arrays, path, held)
        return what
    return f"{what} at {'/'.join(map(str, at))[:60]}"


def made_by(verb: tuple[str, ...], folder: Path) -> dict[str, str]:
    """What a verb has made: sha256 by name of the file after -o, or of the weights and records in the directory."""
    path = folder / (
        verb[verb.index("-o") + 1] if "-o" in verb else f"{verb[1] if verb[0] == 'card' else 'out'}/README.md"
    )
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("laser/plan.json")]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@cache
def right(source: Path, verb: tuple[str, ...]) -> dict[str, str]:
    """What the verb makes of records that nobody has changed."""
    work = source.with_name("right")
    shutil.copytree(source, work)
    said = limits.laser(*ruled(verb), folder=work)
    assert not said.code, (verb, said)
    found = made_by(verb, work)
    shutil.rmtree(work)
    return found


def trial(source: Path, folder: Path, seed: int) -> tuple[str, list[tuple[tuple[str, ...], Said]]]:
    """One changed record through one of the verbs that read it: what was changed, and what the verb said.

    Where the record was not sealed again and the verb succeeds, it made what it makes of the record as it was.
    """
    draw = random.Random(seed)
    kind, again = KINDS[seed % len(KINDS)], bool(seed // len(KINDS) % 2)
    verb, work = kind.verbs[seed // (2 * len(KINDS)) % len(kind.verbs)], folder / "work"
    expected = right(source, verb)
    shutil.copytree(source, work)
    what = f"{kind.name}, {hostile(kind, work, draw, again)}{', sealed again' if again else ''}"

    def wrong() -> str | None:
        return None if again or not kind.sealed or made_by(verb, work) == expected else "not what it makes otherwise"

    said = limits.laser(*ruled(verb), folder=work, then=wrong)
    shutil.rmtree(work)
    return what, [(verb, said)]


# --- what they are made from ------------------------------------------------------------------------------------------


class Stopped(KeyboardInterrupt):
    pass


def stop_after(count: int) -> Callable[..., None]:
    """A callback that interrupts at its `count`-th call."""
    calls = 0

    def call(*_: object, **__: object) -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            raise Stopped

    return call


def build(folder: Path) -> Path:
    """A directory with a model and every kind of record about it.

    Made in a child: torch's threads, once begun, are of no use to the children of their process.
    """
    import transformers.models.llama.modeling_llama as imported_once

    assert imported_once and limits.forked(lambda: bool(_build(folder))) and limits.forked(lambda: _calibrate(folder))
    return folder


def _build(folder: Path) -> Path:
    from pico_language import TEXT, make_model

    make_model(folder / "m", "llama")
    (folder / "t.txt").write_text(TEXT)
    (folder / "r.toml").write_text('rule = "mp-edge"\n')

    def made(*words: str, code: int = 0) -> None:
        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
            assert main(list(words)) == code, words

    made("scan", "m", "-o", "s")
    made("calibrate", "m", "-o", "moments", "--ledoit-wolf", *ON_TEXT)
    made("scan", "m", "-o", "sd", "--moments", "moments")
    made("plan", "s", "-o", "plan.json", "--rule", "rank:4")
    made(*REDUCE, "out")
    (folder / "out/laser").mkdir(exist_ok=True)
    made("eval", "m", "-o", "e2.json", *ON_TEXT)
    made("eval", "out", "-o", "out/laser/eval.json", *ON_TEXT)
    made("eval", "m", "-o", "out/laser/eval-source.json", *ON_TEXT)
    made("card", "out", "--source", "m")
    made(*SEARCH)
    out, m = (laser.open_checkpoint(folder / name) for name in ("out", "m"))
    for name, checkpoint in (("leaderboard.json", out), ("leaderboard-source.json", m)):
        board(checkpoint).save(folder / "out/laser" / name)
    trials = [json.loads(x) for x in (folder / "search.jsonl").read_text().splitlines() if '"trial"' in x]
    made("reduce", "m", "new", "-o", "found")  # a card speaks of a search only beside the output of its plan
    (folder / "found/laser").mkdir(exist_ok=True)
    (folder / "found/laser/search.json").write_text(json.dumps(seal(searched(m, trials)), indent=1) + "\n")
    made("card", "found", "--source", "m")
    (folder / "new").unlink()  # the plan of that search
    # A command takes no callback: it is interrupted where it counts what is done.
    with mock.patch("laser.cli.progress.Progress.__call__", stop_after(5)):
        made("scan", "m", "-o", "j", code=130)
    # A command takes no callback: it is interrupted where it counts what is done.
    with mock.patch("laser.cli.progress.Progress.__call__", stop_after(5)):
        made(*REDUCE, "half", code=130)
    # As above.
    with mock.patch("laser.cli.progress.Progress.__call__", stop_after(9)):
        made(*RUN, code=130)
    return folder


def _calibrate(folder: Path) -> bool:
    """Half of a calibration, in a process of its own: what other verbs did to torch before shows in the last digits."""
    # As above.
    with contextlib.chdir(folder), mock.patch("laser.cli.progress.Bar.update", stop_after(2)):
        if main(list(CALIBRATE)) != 130:
            return False
    # As above, behind the first of three layers on the way back.
    with contextlib.chdir(folder), mock.patch("laser.cli.progress.Bar.update", stop_after(7)):
        return main(list(BACK)) == 130


def board(checkpoint: laser.Checkpoint) -> Leaderboard:
    """As if it had been measured."""
    scores = tuple(
        TaskScore(name, TASKS[name].metric, 0.5, math.sqrt(0.25 / 3), 4, 0, (0.0, 1.0, 1.0, 0.0), rows_sha256="0" * 64)
        for name in ("arc_challenge", "gsm8k")
    )
    settings = {"tasks": ["arc_challenge", "gsm8k"], "device": "cpu", "dtype": "float32", "batch_size": 1}
    weights = checkpoint.fingerprint.stated()
    return Leaderboard(checkpoint.name, checkpoint.identity, scores, 4, {}, settings, {"torch": "2"}, "laser", weights)


def searched(checkpoint: laser.Checkpoint, trials: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of a search that these trials were."""
    names = [field.name for field in fields(Trial)]
    report = Report("loss", "nats per token", "t", 4, 124, 3.0, 0.1, 3.1, 0.1, 0.1, 0.05, None)
    rows = [{"alone": False, "predicted": None} | {k: x for k, x in trial.items() if k in names} for trial in trials]
    told = {"kind": "search", "version": 2, "source": asdict(Source.of(checkpoint)), "trials": rows}
    told |= {"calibration": asdict(report), "held_out": [asdict(report)], "rank_correlation": None}
    return told | {"families": {"plain": {"trials": len(rows), "accepted": 0, "kept": 0, "best": 0}}}
