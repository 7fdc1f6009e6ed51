"""Requests that a stranger made: links to themselves, closed streams, FIFOs as records, counts without end."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from disk_faults import forked
from helpers import snapshot

import laser
from laser import journal
from laser.checkpoint import swap, writer
from laser.checkpoint.pickles import read_pickle
from laser.checkpoint.reader import INDEX
from laser.cli import main
from laser.errors import CheckpointError, DoubtWarning
from laser.evaluation.causal import build_causal


@pytest.mark.parametrize(
    "words", ["scan {m} -o {l}", "scan {m} -o {l}/x", "run {m} --no-search -o {l}", "search {m} -o {l}"]
)
def test_a_link_that_leads_to_itself_is_no_output(pico: Path, tmp_path: Path, run: Run, words: str) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    code, _, error = run(*words.format(m=pico, l=loop).split())
    assert code == 1 and "is a link that leads to itself; remove it" in error and error.count("\n") == 1


MOUNTED = """
mkdir "$1/a b" && mount -t tmpfs none "$1/a b" && touch "$1/f" && mount --bind "$1/f" "$1/f" || exit 99
cd "$1" && shift && {laser} reduce m p -o "a b" && {laser} reduce m p -o "a b" --resume || exit 98
{laser} reduce m p -o "a b" --force; {laser} scan m -o f --force; ls -A
"""


@pytest.mark.slow
def test_a_mount_point_is_written_to_and_never_replaced(pico: Path, tmp_path: Path, run: Run) -> None:
    """It was found when all the work was done, and called a matter of permissions."""
    shutil.copytree(pico, tmp_path / "m")
    assert run("scan", tmp_path / "m", "-o", tmp_path / "s", "--roles", "q")[0] == 0
    assert run("plan", tmp_path / "s", "-o", tmp_path / "p", "--rule", "rank:4")[0] == 0
    words = ["unshare", "-rm", "sh", "-c", MOUNTED.format(laser=f"{sys.executable} -m laser"), "sh", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True) if shutil.which("unshare") else None
    if done is None or done.returncode not in (0, 98):
        pytest.skip("needs a namespace of its own to mount in")
    told = "is a mount point, which nothing can replace; try another -o, perhaps inside it"
    assert done.stderr.splitlines() == [f"laser: a b {told}", f"laser: f {told}"], done
    assert done.stdout.split("\n")[-7:] == ["a b", "f", "m", "p", "pico", "s", ""]


@pytest.mark.parametrize("verb", ["eval {} --windows 2", "calibrate {} -o mo --windows 2 --ledoit-wolf"])
def test_a_tokenizer_whose_path_is_no_utf8_is_told(
    speaker: Path, tmp_path: Path, run: Run, text: Path, verb: str
) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/m\xff")
    shutil.copytree(speaker, name)
    words = [name if word == "{}" else word for word in verb.split()]
    code, _, error = run(*words, "--text", text, "--window", 32)
    assert code == 1 and error.endswith(": no tokenizer can be read from a path that is no UTF-8; rename it\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize("target", ["nowhere", "nowhere/below"])
def test_a_link_to_nothing_is_no_output(pico: Path, tmp_path: Path, run: Run, target: str) -> None:
    link, spectra, plan = tmp_path / "link.svg", tmp_path / "s", tmp_path / "p"
    link.symlink_to(target)
    assert run("scan", pico, "-o", spectra, "--roles", "q")[0] == 0
    assert run("plan", spectra, "-o", plan, "--rule", "rank:4")[0] == 0
    for words in (
        ("scan", pico, "-o", link),
        ("plan", spectra, "-o", link, "--rule", "rank:4"),
        ("plot", spectra, "-o", link, "--heat", "kept"),
        ("reduce", pico, plan, "-o", link),
        ("reduce", pico, plan, "-o", link, "--dry-run"),
        ("run", pico, "-o", link, "--no-search", "--rule", "rank:4"),
        ("run", pico, "-o", link, "--no-search", "--rule", "rank:4", "--force"),
        ("convert", pico, "-o", link),
    ):
        code, _, error = run(*words)
        assert code == 1 and f"{link} is a link to {target}, which is not there; remove it" in error, (words, error)
        assert link.is_symlink() and not (tmp_path / "nowhere").exists()


def test_json_without_a_standard_output(pico: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from laser.cli import main

    told = io.StringIO()
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", told)
    assert main(["scan", str(pico), "-o", str(tmp_path / "s"), "--json"]) == 1
    assert "cannot write: standard output is closed" in told.getvalue() and told.getvalue().count("\n") == 1


def test_a_fifo_is_no_missing_record(pico: Path, tmp_path: Path, run: Run) -> None:
    os.mkfifo(tmp_path / "s")
    for words in (
        ("plan", tmp_path / "s", "-o", tmp_path / "p", "--rule", "rank:4"),
        ("scan", pico, "-o", tmp_path / "t", "--moments", tmp_path / "s"),
    ):
        code, _, error = run(*words)
        assert code == 1 and "it is a FIFO, expected a regular file" in error, error


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model-00002-of-00003.safetensors"])
@pytest.mark.parametrize("kind", ["a FIFO", "a device", "a socket", "a directory", "Too many levels of symbolic links"])
def test_weights_that_are_no_file_are_not_missing(pico: Path, run: Run, name: str, kind: str) -> None:
    path = pico / name
    path.unlink()
    with socket.socket(socket.AF_UNIX) as bound:
        if kind == "a FIFO":
            os.mkfifo(path)
        elif kind == "a device":
            path.symlink_to("/dev/zero")
        elif kind == "a socket":
            here = Path.cwd()
            os.chdir(pico)  # an address has no room for a long path
            bound.bind(name)
            os.chdir(here)
        elif kind == "a directory":
            path.mkdir()
        else:
            path.symlink_to(path)
        code, _, error = run("scan", pico, "--dry-run")
    assert code == 1 and f"cannot read {path}: " in error and kind in error and error.count("\n") == 1, error


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_local_experts"])
def test_counts_of_a_config_are_bounded(pico: Path, key: str) -> None:
    config = json.loads((pico / "config.json").read_text())
    (pico / "config.json").write_text(json.dumps(config | {key: 10**9}))
    with pytest.raises(CheckpointError, match=f"{key} is 1000000000, expected at most"):
        build_causal(laser.open_checkpoint(pico))


def test_names_in_a_pickle_are_those_that_torch_looks_for(tmp_path: Path) -> None:
    good, other = tmp_path / "good.bin", tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2, 2)}, good)
    with zipfile.ZipFile(good) as packed, zipfile.ZipFile(other, "w") as made:
        for entry in packed.infolist():
            made.writestr(entry, packed.read(entry))
        made.writestr("good/DATA.PKL", b"more")
    with pytest.raises(CheckpointError, match="two files of one name"):
        read_pickle(other)


@pytest.mark.parametrize("words", [["--method", "nonsense"], ["--null", "-5"], ["--moments", "/nonexistent"]])
def test_a_dry_run_of_a_scan_refuses_what_the_scan_does(pico: Path, tmp_path: Path, run: Run, words: list[str]) -> None:
    real, dry = run("scan", pico, "-o", tmp_path / "s", *words), run("scan", pico, "--dry-run", *words)
    assert real[0] == dry[0] != 0 and real[2] == dry[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--output-dtype", "nonsense"],
        ["--output-dtype", "bfloat16"],  # of a model that is not quantised
        ["--method", "nonsense"],
        ["--evict"],
        ["--moments", "/nonexistent"],
        ["--fresh", "/nonexistent"],
        ["--precision", "float32", "--resume"],  # of a finished output in float64
        [],  # which is there
    ],
)
def test_a_dry_run_of_a_reduction_refuses_what_the_reduction_does(
    pico: Path, tmp_path: Path, run: Run, words: list[str]
) -> None:
    spectra, plan, out = tmp_path / "s", tmp_path / "p", tmp_path / "o"
    assert run("scan", pico, "-o", spectra, "--roles", "q")[0] == 0
    assert run("plan", spectra, "-o", plan, "--rule", "rank:4")[0] == 0
    if not words or "--resume" in words:
        assert run("reduce", pico, plan, "-o", out)[0] == 0
    asked = ("reduce", pico, plan, "-o", out, *words)
    real, dry = run(*asked), run(*asked, "--dry-run")
    assert real[0] == dry[0] != 0 and real[2] == dry[2], (real, dry)
    if "--resume" in words:  # nor of an unfinished one
        (out / "laser.json").unlink()
        real, dry = run(*asked), run(*asked, "--dry-run")
        assert real[0] == dry[0] == 1 and real[2] == dry[2], (real, dry)


PLAIN = ("--no-search", "--rule", "rank:4")
SEARCHED = (
    "--search",
    "--rule",
    "rank:4",
    "--roles",
    "q",
    "--layers",
    "0",
    "--windows",
    "2",
    "--held-out-windows",
    "1",
)


@pytest.mark.slow
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("killed", ["scan", "reduce", "finished"])
@pytest.mark.parametrize(
    ("begun", "asked"),
    [
        (PLAIN, (*PLAIN[:-1], "rank:5")),
        (PLAIN, (*PLAIN, "--roles", "q")),
        ((*PLAIN, "--lowest-snr", "3"), (*PLAIN, "--lowest-snr", "2")),
        (SEARCHED, (*SEARCHED, "--accept", "any-drop")),
        (SEARCHED, (*SEARCHED, "--roles", "k")),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("one_thread")
def test_a_dry_run_that_resumes_refuses_what_the_run_does(
    speaker: Path, tmp_path: Path, text: Path, begun: tuple[str, ...], asked: tuple[str, ...], killed: str, forced: bool
) -> None:
    """What lies there is another run's; of the very run that began it, it is not."""
    words = ["run", str(speaker), "-o", "o", "--device", "cpu"]
    said = ["--text", str(text), "--window", "32"] if begun is SEARCHED else []
    if forced:
        assert forked(lambda: main([*words, "--no-search", "--rule", "rank:3", "--roles", "o"]), tmp_path).code == 0

    def stopped() -> int:
        def die(*_: object, **__: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        if killed == "scan":
            journal.Journal.append = after(journal.Journal.append, die)  # pyright: ignore[reportAttributeAccessIssue]
        elif killed == "reduce":
            writer._copy_side_files = after(writer._copy_side_files, die)
        elif forced:  # all is done but the exchange
            swap._exchange = die
        return main([*words, *begun, *said, *(["--force"] if forced else [])])

    assert forked(stopped, tmp_path).code == (0 if killed == "finished" and not forced else -signal.SIGKILL)
    end = ["--resume", *(["--force"] if forced else [])]
    before = snapshot(tmp_path)
    dry = forked(lambda: main([*words, *asked, *said, *end, "--dry-run"]), tmp_path)
    same = forked(lambda: main([*words, *begun, *said, *end, "--dry-run"]), tmp_path)
    assert snapshot(tmp_path) == before
    real = forked(lambda: main([*words, *asked, *said, *end]), tmp_path)
    assert same.code == 0, same.err
    scanned_alike = killed == "scan" and asked[-2] in ("--lowest-snr", "--accept")
    assert (dry.code, dry.err) == (real.code, real.err) and real.code == int(not scanned_alike), (dry, real)


def after(call: Callable[..., Any], then: Callable[..., None]) -> Callable[..., Any]:
    """The call, and then something else."""

    def both(*arguments: Any, **options: Any) -> None:
        call(*arguments, **options)
        then()

    return both


@pytest.mark.parametrize("words", [["--limit", "3"], ["--tasks", "winogrande"]])
def test_rows_without_a_leaderboard_are_refused(pico: Path, tmp_path: Path, run: Run, words: list[str]) -> None:
    code, _, error = run("run", pico, "-o", tmp_path / "o", "--no-search", *words)
    assert code == 2 and "try --leaderboard" in error


def test_records_have_a_place_in_an_output_without_records(speaker: Path, tmp_path: Path, run: Run, text: Path) -> None:
    """As README says it, right behind a plain reduction, which leaves no folder of records."""
    spectra, plan, out = tmp_path / "s", tmp_path / "p", tmp_path / "o"
    assert run("scan", speaker, "-o", spectra, "--roles", "q")[0] == 0
    assert run("plan", spectra, "-o", plan, "--rule", "rank:4")[0] == 0
    assert run("reduce", speaker, plan, "-o", out)[0] == 0
    assert not (out / "laser").exists()
    words = ("--text", text, "--window", "16", "--windows", "2")
    assert run("eval", speaker, *words, "-o", out / "laser" / "eval-source.json")[0] == 0
    code, _, error = run("eval", speaker, *words, "-o", tmp_path / "laser" / "eval.json")
    assert code == 1 and f"there is no directory {tmp_path / 'laser'}" in error


@pytest.mark.slow
@pytest.mark.parametrize("name", ["\u6f22" * 83, "\u00e9" * 127, "a" * 255, os.fsdecode(b"\xff" * 250)])
def test_the_longest_names(pico: Path, tmp_path: Path, run: Run, name: str) -> None:
    """Names are as long as the system takes, in bytes: what is made beside them is no longer."""
    spectra, plan = tmp_path / "s", tmp_path / name
    try:
        plan.touch()
    except OSError:
        pytest.skip("a file system that takes no such name")
    plan.unlink()
    assert run("scan", pico, "-o", spectra, "--roles", "q", "--layers", "0")[0] == 0
    for force in ([], ["--force"]):
        code, _, error = run("plan", spectra, "-o", plan, "--rule", "rank:4", *force)
        assert code == 0, error
    out = tmp_path / "o" / name
    for force in ([], ["--force"]):
        code, _, error = run("reduce", pico, plan, "-o", out, *force)
        assert code == 0, error
    assert [p.name for p in out.parent.iterdir()] == [name]


def test_bits_that_fill_no_whole_bytes_are_told_as_bits(pico: Path) -> None:
    header = json.dumps({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}).encode()
    path = next(pico.glob("*.safetensors"))
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(CheckpointError, match=r"a holds 1 bytes, expected 12 bits, which fill no whole bytes, for F4"):
        laser.open_checkpoint(pico)


def test_metadata_of_an_index_that_are_a_list(pico: Path) -> None:
    index = json.loads((pico / INDEX).read_text())
    (pico / INDEX).write_text(json.dumps(index | {"metadata": [1]}))
    with pytest.warns(DoubtWarning, match="has metadata that are no object, without which"):
        laser.open_checkpoint(pico)


def test_the_tokenizer_of_a_gguf_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the one of another model whose files lie beside it, which transformers would take first."""
    import transformers

    from laser.checkpoint.gguf import tokenizer_files

    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "tokenizer.json").write_text("{}")
    seen: list[list[str]] = []

    def look(folder: str, **_: object) -> None:
        seen.append(sorted(p.name for p in Path(folder).iterdir()))
        raise ValueError("enough")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", look)
    assert tokenizer_files(tmp_path / "m.gguf") == "ValueError: enough"
    assert seen == [["m.gguf"]]
