"""Digests of what laser writes and prints about a pico model: whoever moves code sees what moved with it.

python tests/goldens.py                  which of them differ from tests/goldens.json, in one line
python tests/goldens.py --write          renew that file
python tests/goldens.py --into FOLDER    also keep every document, to compare those of two commits with `diff -r`

What differs between two machines is taken out by its key, see MASKED, or rounded: numbers that float64 made to six
digits, numbers that a model made in float32 to three decimals. A hash over digits cannot be rounded, and is masked. The
bytes of the shards are in bfloat16, where the last digits of a factorisation no longer show.

What is left may still be rounded the other way on another machine. There only what `without_digits` leaves is compared.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import conftest  # first: it sets what the libraries read when they are imported
import numpy as np
import pytest
import torch
from conftest import write_checkpoint_directory
from hub_server import TOKEN, connect, serving
from huggingface_hub import close_session, constants
from mistral_release import write_release
from pico_language import TEXT, dense_tensors, make_model
from safetensors import safe_open
from typer.testing import CliRunner

from laser.cli import app, main
from laser.evaluation.lm_tasks import TASKS

KEPT = Path(__file__).with_name("goldens.json")
# Keys whose values are a machine's: times, memory, versions of libraries, what is installed and free.
MASKED = {"seconds", "scan_seconds", "reduce_seconds", "visit_seconds", "peak_bytes", "basis", "versions", "placed"}
# Errors of rounding, which are nothing but last digits.
MASKED |= {"residual", "orthogonality", "tolerance"}
# Hashes over digits; those of moments and spectra stand under `calibration` and in a file's header.
MASKED |= {"check", "vectors", "digest", "calibration.identity", "run.plan", "run.moments"}
DEVICES = {"available", "reason", "free_bytes", "probe", "exact_products", "routes"}  # of `laser devices`
VERSIONS = ("python", "laser-rmt", "torch", "transformers", "safetensors", "numpy", "lm-eval")  # rows of a card's table
SIGNIFICANT, DECIMALS = 6, 3
MACHINE = "(last digits of the machine)"
# Documents without a measured figure, besides the help pages and `verify`: estimates from shapes, counts and names.
FIGURELESS = {"scan --dry-run --json", "run --dry-run --json", "leaderboard --dry-run --json", "card --json"}
FIGURELESS |= {"push --json", "devices --json", "convert --json"}
SOURCE = "pico/"  # the shards that all others are made of: random numbers, of which few machines draw others
IN_FLOAT64 = ("out-lowest/", "out-treated/", "recipe/", "converted/")  # outputs that no model's float32 decided
HOST = ("--device", "cpu", "--workers", "1")
MEASURE = ("--text", "text.txt", "--window", "32", "--windows", "4", "--device", "cpu")
NULL = ("--rules", "mp-edge,laser-rmt", "--layers", "0", "--roles", "q,w1")
SEARCH = (*MEASURE, "--held-out-windows", "4")


def plain(value: Any, measured: bool = False, masked: frozenset[str] = frozenset(), place: str = "") -> Any:
    """A JSON document without what is a machine's: keys in MASKED and `masked`, and digits beyond those that hold."""
    if isinstance(value, Mapping):
        out = {}
        for key, item in value.items():
            hidden = MASKED | masked
            out[key] = "?" if key in hidden or f"{place}.{key}" in hidden else plain(item, measured, masked, str(key))
        return out
    if isinstance(value, list | tuple):
        return [plain(item, measured, masked, place) for item in value]
    if isinstance(value, float):
        return round(value, DECIMALS) if measured else float(f"{value:.{SIGNIFICANT}g}")
    return value


def text_of(document: Any, **options: Any) -> str:
    return json.dumps(plain(document, **options), indent=1) + "\n"


def record(path: Path, **options: Any) -> str:
    return text_of(json.loads(path.read_text()), **options)


def spectra(path: Path) -> str:
    """A spectra file as JSON: its header, and its vectors by name."""
    with safe_open(path, framework="numpy") as file:
        header = json.loads((file.metadata() or {})["laser"])
        vectors = {name: file.get_tensor(name).tolist() for name in sorted(file.keys())}
    return text_of(header) + text_of(vectors)


def moments(path: Path) -> str:
    """A moments file as JSON: its header, and the dtypes and shapes of its arrays; their digits are a machine's."""
    with safe_open(path, framework="numpy") as file:
        header = json.loads((file.metadata() or {})["laser"])
        arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
    return text_of(header) + text_of({n: [str(a.dtype), list(a.shape), bool(np.any(a))] for n, a in arrays.items()})


def card(path: Path) -> str:
    """A card, its table of versions masked by the row's first cell."""
    rows = path.read_text().splitlines()
    return "\n".join(f"| {name} | ? |" if (name := _first(row)) in VERSIONS else row for row in rows) + "\n"


def _first(row: str) -> str:
    return row.split("|")[1].strip() if row.startswith("|") else ""


@contextmanager
def here(folder: Path) -> Iterator[None]:
    """In `folder`, so that no path of this machine is in a record, as a user with 100 columns and an empty cache."""
    given = {"COLUMNS": "100", "XDG_CACHE_HOME": str(folder / "cache"), "HF_HOME": str(folder / "cache" / "hub")}
    with one_thread(), chdir(folder), patch.dict(os.environ, given):
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums have another order with more, and other last digits; pytest-xdist's processes have one each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def laser(*words: str) -> str:
    """What a verb prints; it must succeed."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "argv", ["laser", *words]):
        code = main()
    assert code == 0, f"laser {' '.join(words)}: {err.getvalue()}"
    return out.getvalue()


def document(*words: str, **options: Any) -> str:
    return text_of(json.loads(laser(*words, "--json")), **options)


def helps() -> Iterator[tuple[str, str]]:
    for verb in ["", *(c.name or c.callback.__name__ for c in app.registered_commands if c.callback)]:
        page = CliRunner().invoke(app, [*verb.split(), "--help"], prog_name="laser", env={"COLUMNS": "100"}).output
        yield f"laser {verb} --help".replace("  ", " "), page


def shards(name: str) -> Iterator[tuple[str, str]]:
    for path in sorted(Path(name).glob("*.safetensors")):
        yield f"{name}/{path.name}", hashlib.sha256(path.read_bytes()).hexdigest() + "\n"


def documents(folder: Path) -> Iterator[tuple[str, str]]:
    """Name -> what it holds, in the order in which one rests on the other."""
    with here(folder):
        yield from helps()
        make_model(Path("pico"), "mixtral")
        Path("text.txt").write_text(TEXT)
        yield from shards("pico")
        yield "calibrate --json", document("calibrate", "pico", "-o", "moments.safetensors", *MEASURE, measured=True)
        yield "moments", moments(Path("moments.safetensors"))
        yield (
            "scan --json",
            document("scan", "pico", "-o", "s", "--moments", "moments.safetensors", "--null", "19", *HOST),
        )
        yield "spectra", spectra(Path("s"))
        yield "scan --dry-run --json", document("scan", "pico", "--dry-run", *HOST)
        yield "spectra --json", document("spectra", "s")
        yield "spectra --unfrozen-yaml", _unfrozen()
        for name, words in PLANS.items():
            yield f"plan {name} --json", document("plan", "s", "-o", f"{name}.json", *words)
            yield f"{name}.json", record(Path(f"{name}.json"))
        for name in ("lowest", "treated", "data"):
            with_moments = ("--moments", "moments.safetensors") if name == "data" else ()
            words = ("reduce", "pico", f"{name}.json", "-o", f"out-{name}", *with_moments, *HOST)
            yield f"reduce {name} --json", document(*words)
            yield f"out-{name}/laser.json", record(Path(f"out-{name}/laser.json"))
            yield from shards(f"out-{name}")
            words = ("verify", "pico", f"out-{name}", "--device", "cpu", *with_moments)
            yield f"verify {name} --json", document(*words)
        words = ("calibrate", "pico", "-o", "felt.safetensors", "--gradients", *MEASURE)
        yield "calibrate --gradients --json", document(*words, measured=True)
        yield "moments with gradients", moments(Path("felt.safetensors"))
        words = ("compensate", "pico", "out-data", "-o", "adapter", "--moments", "felt.safetensors", "--bits", "1")
        yield "compensate --dry-run --json", document(*words, "--dry-run", *HOST)
        yield "compensate --json", document(*words, *HOST)
        yield "adapter/laser.json", record(Path("adapter/laser.json"))
        yield "adapter/README.md", card(Path("adapter/README.md"))
        yield "eval --json", document("eval", "pico", "out-lowest", *MEASURE, measured=True)
        for path in ("pico", "out-lowest"):
            laser("eval", path, "-o", f"eval-{path}.json", *MEASURE)
        yield "eval.json", record(Path("eval-pico.json"), measured=True)
        Path("out-lowest/laser").mkdir(exist_ok=True)
        Path("eval-pico.json").rename("out-lowest/laser/eval-source.json")
        Path("eval-out-lowest.json").rename("out-lowest/laser/eval.json")
        yield "card --json", document("card", "out-lowest", "--source", "pico", "--hash-source")
        yield "out-lowest/README.md", card(Path("out-lowest/README.md"))
        yield "push --json", pushed("out-lowest")
        rules = ("--spectra", "s", "--rules", "mp-edge,data:fraction:0.5", "--lowest-snr", "3")
        words = ("search", "pico", "-o", "search.json", *rules, "--moments", "moments.safetensors", *SEARCH)
        yield "search --json", document(*words, measured=True)
        yield "search.json", record(Path("search.json"))
        words = ("run", "pico", "-o", "recipe", "--recipe", "laser-rmt", *HOST)
        yield "run --dry-run --json", document(*words, "--dry-run")
        yield "run --json", document(*words)
        words = ("run", "pico", "-o", "searched", "--lowest-snr", "3", "--no-leaderboard", *SEARCH, "--workers", "1")
        yield "run --search --json", document(*words)
        for out in ("recipe", "searched"):
            yield f"{out}/laser.json", record(Path(f"{out}/laser.json"))
            yield f"{out}/laser.yaml", Path(f"{out}/laser.yaml").read_text()
            yield f"{out}/laser/plan.json", record(Path(f"{out}/laser/plan.json"))
            yield f"{out}/laser/source.json", record(Path(f"{out}/laser/source.json"))
            yield f"{out}/README.md", card(Path(f"{out}/README.md"))
            yield from shards(out)
        yield "searched/laser/search.json", record(Path("searched/laser/search.json"), measured=True)
        yield "null --json", document("null", "pico", "--device", "cpu", "--spectra", "s", *NULL)
        write_rows(Path("rows"))
        words = (
            "leaderboard",
            "pico",
            "-o",
            "board.json",
            "--data",
            "rows",
            "--tasks",
            "winogrande",
            "--device",
            "cpu",
        )
        yield "leaderboard --dry-run --json", document(*words, "--dry-run")
        yield "leaderboard --json", document(*words, measured=True)
        yield "board.json", record(Path("board.json"), measured=True)
        yield "devices --json", document("devices", "--device", "cpu", masked=frozenset(DEVICES))
        yield "convert --json", _converted()
        yield from shards("converted")


PLANS = {
    "lowest": ("--rule", "mp-edge", "--lowest-snr", "5"),
    "treated": ("--rule", "mp-edge", "--shrink", "frobenius", "--two-sided", "--require-fit", "0.3", "--layers", "0-1"),
    "drawn": ("--rule", "parallel", "--roles", "q,k,w1,router", "--exclude", "experts.3"),
    "data": ("--rule", "data:fraction:0.5"),
}


def pushed(out: str) -> str:
    """To the tests' own Hub; its address has a port that is free by chance, and its commit covers digits."""
    with serving() as hub, pytest.MonkeyPatch.context() as change:
        connect(hub, Path("cache/of-push").resolve(), change)
        change.setenv("HF_TOKEN", TOKEN)
        change.setattr(constants, "HF_HUB_DISABLE_XET", True)
        try:
            return document("push", out, "maker/pico", masked=frozenset({"address", "commit"}))
        finally:
            close_session()


def _unfrozen() -> str:
    laser("spectra", "s", "--unfrozen-yaml", "unfrozen.yaml", "--snr-json", "snr.json")
    return Path("unfrozen.yaml").read_text() + record(Path("snr.json"))


def write_rows(folder: Path) -> None:
    """Five examples of winogrande and three rows that are scored."""
    folder.mkdir()
    rows = [
        {"sentence": f"ann met eve {i} times as _ was late.", "option1": "ann", "option2": "eve", "answer": "12"[i % 2]}
        for i in range(8)
    ]
    (folder / TASKS["winogrande"].file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _converted() -> str:
    config = json.loads(Path("pico/config.json").read_text())
    config = {k: v for k, v in config.items() if "experts" not in k} | {"architectures": ["MistralForCausalLM"]}
    write_checkpoint_directory(Path("dense"), dense_tensors(), config | {"model_type": "mistral"})
    write_release(Path("dense"), Path("release"))
    return document("convert", "release", "-o", "converted")


def make(folder: Path, into: Path | None = None) -> dict[str, str]:
    """Name -> the first 16 digits of the sha256 of what it holds."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, text in documents(folder):
            found[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
            if into is not None:
                (into / name.replace("/", "_")).write_text(text)
    return found


def changes(found: Mapping[str, str], kept: Mapping[str, str]) -> str:
    """One line that names what differs; empty where nothing does."""
    told = {
        "changed": [name for name in kept if name in found and found[name] != kept[name]],
        "gone": [name for name in kept if name not in found],
        "new": [name for name in found if name not in kept],
    }
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in told.items() if names)


def without_digits(found: Mapping[str, str], kept: Mapping[str, str]) -> dict[str, str]:
    """`found` with what depends on a machine's last digits as it is kept, so that only the rest can differ.

    The rest: help pages, documents without figures, and shards of reductions in float64. Those last only where the
    source's own shards are as kept.
    """
    same_source = all(found.get(name) == digest for name, digest in kept.items() if name.startswith(SOURCE))

    def everywhere(name: str) -> bool:
        shard = name.endswith(".safetensors") and name.startswith(IN_FLOAT64)
        plain = name.endswith("--help") or name in FIGURELESS or name.startswith("verify ")
        return plain or (shard and same_source)

    return {name: digest if everywhere(name) else kept.get(name, digest) for name, digest in found.items()}


def read() -> dict[str, str]:
    return {name: digest for name, digest in _kept().items() if name != MACHINE}


def is_of_this_machine() -> bool:
    """Whether the goldens were made where last digits are as here; elsewhere a number may be rounded the other way."""
    return _kept().get(MACHINE) == machine()


@one_thread()
def machine() -> str:
    """What the last digits of products, factorisations and exponentials are here, as a digest."""
    W = torch.randn(96, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    S, x = torch.linalg.svdvals(W), W.float()
    several = (
        W.T @ W,
        S,
        torch.linalg.eigh(W.T @ W)[1],
        x.T @ x,
        torch.softmax(x @ x.T, -1),
        torch.nn.functional.silu(x),
    )
    return hashlib.sha256(b"".join(each.contiguous().numpy().tobytes() for each in several)).hexdigest()[:16]


def _kept() -> dict[str, str]:
    return json.loads(KEPT.read_text()) if KEPT.exists() else {}


if __name__ == "__main__":
    assert conftest.SHARED  # imported for what it sets
    into = Path(sys.argv[sys.argv.index("--into") + 1]).resolve() if "--into" in sys.argv else None
    if into is not None:
        into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        found = make(Path(folder), into)
    different = changes(found, read())
    if "--write" in sys.argv:
        KEPT.write_text(json.dumps({MACHINE: machine()} | found, indent=1) + "\n")
    print(different or f"{len(found)} goldens as they were")
    sys.exit("--write" not in sys.argv and bool(different))
