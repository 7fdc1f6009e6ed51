"""What laser did not write stays as it is: through links, under the names that it uses itself, and with --force."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from helpers import snapshot
from safetensors.torch import load_file, save_file

import laser.report.publish
from laser.checkpoint import fingerprint, writer
from laser.checkpoint.push import _require_as_written
from laser.checkpoint.writer import JOURNAL
from laser.errors import RecordError

SHARD = "model-00001-of-00003.safetensors"


@pytest.fixture
def made(pico: Path, tmp_path: Path, run: Run) -> Path:
    """A folder with spectra `s`, a plan `p.json` and a finished output `out` of pico."""
    assert run("scan", pico, "-o", tmp_path / "s", "--roles", "q,w1")[0] == 0
    assert run("plan", tmp_path / "s", "-o", tmp_path / "p.json", "--rule", "rank:4")[0] == 0
    assert run("reduce", pico, tmp_path / "p.json", "-o", tmp_path / "out")[0] == 0
    return tmp_path


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("name", ["config.json", f"{SHARD}.partial"])
def test_an_unfinished_output_with_a_link_in_it(
    pico: Path, made: Path, run: Run, name: str, link: Callable[[Path, Path], None]
) -> None:
    before, out = snapshot(pico), made / "unfinished"
    (out / JOURNAL).parent.mkdir(parents=True)
    (out / JOURNAL).touch()
    link(pico / name.removesuffix(".partial"), out / name)
    code, _, error = run("reduce", pico, made / "p.json", "-o", out, "--resume")
    assert code == 1 and "is a link, and going on would write to what it leads to" in error
    assert snapshot(pico) == before


def test_an_output_of_other_weights_that_the_samples_do_not_tell(
    pico: Path, made: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of a large tensor may miss what differs; going on with an output reads all that was copied."""
    other = tmp_path / "elsewhere" / "pico"
    shutil.copytree(pico, other)
    name = next(p for p in sorted(other.glob("*.safetensors")) if "model.embed_tokens.weight" in load_file(p))
    weights = load_file(name)
    weights["model.embed_tokens.weight"][3] += 1
    save_file(weights, name, metadata={"format": "pt"})
    # Samples that miss what differs: in tensors this small they cannot.
    monkeypatch.setattr(fingerprint, "samples_of", lambda shards: "0" * 64)
    assert run("scan", pico, "-o", tmp_path / "s2")[0] == 0
    assert run("plan", tmp_path / "s2", "-o", tmp_path / "p2.json", "--rule", "rank:4")[0] == 0
    assert run("reduce", pico, tmp_path / "p2.json", "-o", tmp_path / "o2")[0] == 0
    code, _, error = run("reduce", other, tmp_path / "p2.json", "-o", tmp_path / "o2", "--resume")
    assert code == 1 and "not of these weights" in error, error


@pytest.mark.slow
def test_a_refused_run_leaves_a_finished_output_as_it_is(pico: Path, tmp_path: Path, run: Run) -> None:
    words = ("run", pico, "-o", tmp_path / "out", "--no-search")
    assert run(*words, "--rule", "rank:4")[0] == 0
    before = snapshot(tmp_path / "out")
    for other in (("--rule", "rank:5"), ("--rule", "rank:4", "--layers", "1")):
        code, _, error = run(*words, *other, "--resume")
        assert code == 1 and "the finished output of another run" in error
        assert snapshot(tmp_path / "out") == before
    assert run(*words, "--rule", "rank:4", "--resume")[0] == 0


@pytest.mark.parametrize("end", ["new", "old"])
def test_somebody_s_folder_of_a_name_that_an_exchange_uses(pico: Path, made: Path, run: Run, end: str) -> None:
    theirs = made / f".out.{end}" / "thesis.tex"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    code, _, error = run("reduce", pico, made / "p.json", "-o", made / "out", "--force")
    assert code == 1 and "was not made by laser, which needs the name; move it away" in error
    assert theirs.read_text() == "mine"


@pytest.mark.parametrize("kind", ["link", "file"])
def test_somebody_s_file_of_a_lock_s_name(made: Path, run: Run, kind: str) -> None:
    victim, lock = made / "victim.txt", made / ".new.json.lock"
    victim.write_text("mine")
    lock.symlink_to(victim) if kind == "link" else victim.rename(lock)
    code, _, error = run("plan", made / "s", "-o", made / "new.json", "--rule", "rank:4")
    assert code == 1 and ("is a link, expected a lock" if kind == "link" else "is no lock of laser") in error
    assert lock.read_text() == "mine"


@pytest.mark.parametrize("text", ["one line", "one line\n", "a\nb\n", '{"question": "a"}\n{"question": "b"}\n'])
def test_somebody_s_file_is_no_journal(pico: Path, tmp_path: Path, run: Run, text: str) -> None:
    theirs = tmp_path / "x.partial"
    theirs.write_text(text)
    for more in ((), ("--force",)):
        code, _, error = run("scan", pico, "-o", tmp_path / "x", *more)
        assert code == 1 and "is no journal of laser" in error
        assert theirs.read_text() == text


@pytest.mark.parametrize("place", ["thesis.tex", "laser/mycode.py", "notes.partial"])
def test_force_removes_nothing_of_others(pico: Path, made: Path, run: Run, place: str) -> None:
    theirs = made / "out" / place
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("mine")
    code, _, error = run("reduce", pico, made / "p.json", "-o", made / "out", "--force")
    assert code == 1 and f"holds {place}, which laser did not write" in error
    assert theirs.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("y.yaml", "base_model: x\nunfrozen_parameters:\n- a\nlearning_rate: 1\n", ("spectra", "--unfrozen-yaml")),
        ("i.html", "<!doctype html><title>my page</title>", ("report", "-o")),
        ("n.md", 'As {"kind": "plan", "version": 2} ' * 3, ("spectra", "--snr-json")),
    ],
)
def test_force_replaces_no_file_of_others(made: Path, run: Run, name: str, text: str, words: tuple[str, str]) -> None:
    (made / name).write_text(text)
    code, _, error = run(words[0], made / "s", words[1], made / name, "--force")
    assert code == 1 and "--force replaces nothing else" in error
    assert (made / name).read_text() == text


def test_a_card_speaks_of_the_weights_that_are_there(pico: Path, made: Path, run: Run) -> None:
    assert run("plan", made / "s", "-o", made / "q.json", "--rule", "rank:5")[0] == 0
    assert run("reduce", pico, made / "q.json", "-o", made / "other")[0] == 0
    shutil.copy(made / "other" / "laser.json", made / "out" / "laser.json")
    code, _, error = run("card", made / "out", "--source", pico)
    assert code == 1 and "is not the shard that laser.json tells of" in error
    with pytest.raises(RecordError, match="other weights"):
        laser.report.publish.require_shards(made / "out")


def test_a_card_of_nothing_makes_no_directory(tmp_path: Path, run: Run) -> None:
    assert run("card", tmp_path / "nope/deep/out")[0] == 1
    assert not (tmp_path / "nope").exists()


def test_one_file_is_not_two(made: Path, run: Run) -> None:
    both = made / "both.json"
    assert run("spectra", made / "s", "--snr-json", both, "--unfrozen-yaml", both.parent / "." / "x/../both.json")[0]
    assert not both.exists()


@pytest.mark.slow
def test_every_side_file_is_summed(pico: Path, made: Path, run: Run) -> None:
    """Only laser's own locks and temporary files are left out: a model may have a uv.lock."""
    (pico / "uv.lock").write_text("version = 1\n")
    (pico / "1_Pooling").mkdir()
    (pico / "1_Pooling" / "config.json").write_text("{}")
    (pico / "1_Pooling" / "a.tmp").write_text("a\n")
    out = made / "with-lock"
    assert run("reduce", pico, made / "p.json", "-o", out)[0] == 0
    for name in ("uv.lock", "1_Pooling/a.tmp"):
        text = (out / name).read_text()
        (out / name).write_text("altered\n")
        code, told, _ = run("verify", pico, out)
        assert code == 1 and f"{name}: found sha256" in told
        (out / name).write_text(text)
    assert run("verify", pico, out)[0] == 0
    _require_as_written(out, json.loads((out / "laser.json").read_text()))  # nor has push anything against them


@pytest.mark.slow
def test_what_a_desktop_puts_everywhere_is_of_no_concern(pico: Path, made: Path, run: Run) -> None:
    """Finder writes .DS_Store into what is looked at, and ._NAME beside each NAME on a disk of another system."""
    out, names = made / "looked-at", (".DS_Store", "._config.json", f"._{SHARD}", "Thumbs.db", "desktop.ini")
    out.mkdir()
    for folder, text in ((pico, "source"), (out, "empty")):
        for name in names:
            (folder / name).write_text(text)
    assert run("reduce", pico, made / "p.json", "-o", out)[0] == 0
    (out / "laser").mkdir(exist_ok=True)
    for folder in (out, out / "laser"):
        for name in names:
            (folder / name).write_text("output")
    document = json.loads((out / "laser.json").read_text())
    assert not set(names) & document["files"].keys() and not document["left_out"]
    _require_as_written(out, document)
    for words in (
        ("verify", pico, out),
        ("reduce", pico, made / "p.json", "-o", out, "--resume"),
        ("reduce", pico, made / "p.json", "-o", out, "--force"),
    ):
        code, _, error = run(*words)
        assert (code, error) == (0, ""), words


def test_a_model_in_a_folder_of_its_repository(pico: Path, made: Path, run: Run, tmp_path: Path) -> None:
    """In the Hub's cache its files are links into blobs as well, only from further down."""
    repository = tmp_path / "hub" / "models--org--name"
    folder, blobs = repository / "snapshots" / ("a" * 40) / "deep" / "model", repository / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(pico.iterdir())):
        shutil.copy(path, blobs / f"{number:040x}")
        (folder / path.name).symlink_to(f"../../../../blobs/{number:040x}")
    assert run("reduce", folder, made / "p.json", "-o", made / "deep")[0] == 0
    assert run("verify", folder, made / "deep")[0] == 0
    assert snapshot(made / "deep") == snapshot(made / "out")
    outside = tmp_path / "outside.json"
    (pico / "config.json").rename(outside)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(outside)
    code, _, error = run("reduce", folder, made / "p.json", "-o", made / "no")
    assert code == 1 and "what a link leads to is not published" in error


def test_what_of_a_source_cannot_be_read(pico: Path, made: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is named before the work, as the source's; a folder is listed as left out."""
    (pico / "notes").mkdir()
    (pico / "notes" / "a.txt").write_text("a\n")
    opened, access = os.open, os.access

    def refusing(path: str, flags: int, *rest: int, **more: int) -> int:
        if str(path) == str(pico / "tokenizer.json"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refusing)
    monkeypatch.setattr(os, "access", lambda path, mode: path != pico / "notes" and access(path, mode))
    assert run("reduce", pico, made / "p.json", "-o", made / "o")[0] == 0
    assert "notes (a directory that cannot be read)" in json.loads((made / "o" / "laser.json").read_text())["left_out"]
    (pico / "tokenizer.json").write_text("{}")
    for words in (
        ("reduce", pico, made / "p.json", "-o", made / "o2"),
        ("run", pico, "-o", made / "o2", "--no-search", "--rule", "rank:4"),
    ):
        code, _, error = run(*words)
        assert code == 1 and f"cannot read {pico / 'tokenizer.json'}: Permission denied" in error
        assert not (made / "o2").exists()


def during(monkeypatch: pytest.MonkeyPatch, what: Callable[[], object]) -> None:
    """Do this while the third matrix is written."""
    put, calls = writer.put, iter([None, None, what])

    def putting(*arguments: Any) -> str | None:
        if act := next(calls, None):
            act()
        return put(*arguments)

    # A command takes no callback: somebody else is at work while it writes.
    monkeypatch.setattr(writer, "put", putting)


@pytest.mark.parametrize("act", ["altered", "removed"])
def test_a_side_file_that_changes_while_the_output_is_written(
    pico: Path, made: Path, run: Run, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    """What laser.json says of it is what was copied, and nothing unfinished looks whole."""
    out = made / "o"
    file = out / "config.json"
    during(monkeypatch, lambda: file.write_text("{}") if act == "altered" else file.unlink())
    code, _, error = run("reduce", pico, made / "p.json", "-o", out)
    assert code == 1 and "changed meanwhile; run the same command again, with --resume" in error
    assert not (out / "laser.json").exists()
    assert run("reduce", pico, made / "p.json", "-o", out, "--resume")[0] == 0
    assert snapshot(out) == snapshot(made / "out")


def test_what_somebody_puts_into_an_output_is_not_called_laser_s(
    pico: Path, made: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = made / "o"
    during(monkeypatch, lambda: (out / "mine.txt").write_text("mine"))
    assert run("reduce", pico, made / "p.json", "-o", out)[0] == 0
    assert "mine.txt" not in json.loads((out / "laser.json").read_text())["files"]
    assert run("reduce", pico, made / "p.json", "-o", out, "--force")[0] == 1
    assert (out / "mine.txt").read_text() == "mine"


def test_what_somebody_puts_into_an_earlier_output_while_force_is_at_work(
    pico: Path, made: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, before = made / "out", snapshot(made / "out")
    during(monkeypatch, lambda: (out / "mine.txt").write_text("mine"))
    again = ("reduce", pico, made / "p.json", "-o", out, "--force")
    code, _, error = run(*again)
    assert code == 1 and "holds mine.txt, which laser did not write" in error and "with --resume: all is done" in error
    assert snapshot(out) == before | {"mine.txt": b"mine"}
    (out / "mine.txt").rename(made / "mine.txt")
    # A call would fail.
    monkeypatch.setattr(writer, "put", None)  # nothing is left to do
    assert run(*again, "--resume")[0] == 0
    assert snapshot(out) == before and not (made / ".out.new").exists()


@pytest.mark.parametrize("killed", [False, True])
def test_an_earlier_output_that_is_removed_while_force_is_at_work(
    pico: Path, made: Path, run: Run, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """What is done is kept: the new output takes the place, at once or when the command goes on."""
    out, before = made / "out", snapshot(made / "out")

    def remove() -> None:
        shutil.rmtree(out)
        if killed:
            raise KeyboardInterrupt

    during(monkeypatch, remove)
    again = ("reduce", pico, made / "p.json", "-o", out, "--force")
    assert run(*again)[0] == (130 if killed else 0)
    if killed:
        done = sum(b'"matrix"' in line for line in (made / ".out.new" / JOURNAL).read_bytes().splitlines())
        assert done == 2 and run(*again, "--resume")[0] == 0
    assert snapshot(out) == before and not (made / ".out.new").exists()


def test_force_anew_leaves_no_half_behind(pico: Path, made: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    out, before = made / "out", snapshot(made / "out")

    def stop() -> None:
        raise KeyboardInterrupt

    during(monkeypatch, stop)
    again = ("reduce", pico, made / "p.json", "-o", out, "--force")
    assert run(*again)[0] == 130 and (made / ".out.new").is_dir()
    shutil.rmtree(out)
    assert run(*again)[0] == 0
    assert snapshot(out) == before and not (made / ".out.new").exists()
