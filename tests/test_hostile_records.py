"""The fast part of benchmarks/hostile_inputs.py: changed records, pickles and headers of GGUF, in this process."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_records import KINDS, bend, board, change, hostile, seal
from hostile_weights import damage, hash_bomb, rezipped
from pico_language import dense_tensors, make_model

import laser
from laser.checkpoint.gguf import MOST_VALUES, require_counts
from laser.checkpoint.pickles import read_pickle
from laser.errors import CheckpointError, LaserError, RecordError
from laser.evaluation.leaderboard import Leaderboard
from laser.outcome import Outcome
from laser.plan import Plan
from laser.spectra import Spectra
from laser.spectral.probe import Probe

READERS: dict[str, Callable[[Path], Any]] = {
    "spectra": lambda folder: Spectra.load(folder / "s"),
    "plan": lambda folder: Plan.load(folder / "plan.json"),
    "outcome": lambda folder: Outcome.load(folder / "out"),
    "leaderboard": lambda folder: Leaderboard.load(folder / "out/laser/leaderboard.json"),
}
PICO = {kind.name: kind for kind in KINDS if kind.name in READERS}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its spectra, a plan, and an output with a leaderboard's record."""
    folder = tmp_path_factory.mktemp("records")
    model = laser.open_checkpoint(make_model(folder / "m", "llama"))
    spectra = laser.scan(model)
    spectra.save(folder / "s")
    plan = laser.make_plan(spectra, "rank:4")
    plan.save(folder / "plan.json")
    laser.reduce(model, plan, folder / "out")
    (folder / "out/laser").mkdir(exist_ok=True)
    board(laser.open_checkpoint(folder / "out")).save(folder / "out/laser/leaderboard.json")
    shutil.rmtree(folder / "m")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_changed_record_is_refused_in_one_line_or_read(records: Path, name: str, tmp_path: Path) -> None:
    """Not sealed again, it is refused; what the seal hides is well-formed, or refused as well."""
    kind, file, refused = PICO[name], records / PICO[name].file, 0
    before = file.read_bytes()
    try:
        for seed in range(60):
            draw, again = random.Random(seed), bool(seed % 2)
            told = hostile(kind, records, draw, again)
            try:
                READERS[name](records)
                # What is not sealed may only differ where nothing is read, as in the blanks of JSON.
                assert again or name == "plan" or told.startswith(("twice", "flipped", "extra at laser")), told
            except LaserError as error:
                refused += 1
                assert len(str(error).splitlines()) == 1 and len(str(error)) <= 2000, (told, str(error)[:300])
            finally:
                file.write_bytes(before)
    finally:
        file.write_bytes(before)
    assert refused > 30


def test_a_record_deeper_than_any_is_refused_by_every_reader(records: Path) -> None:
    for name in ("plan", "outcome", "leaderboard"):
        file = records / PICO[name].file
        before = file.read_bytes()
        deep: Any = 1
        for _ in range(60):
            deep = [deep]
        file.write_text(json.dumps(seal(json.loads(before) | {"source": deep})))
        with pytest.raises(LaserError, match="nested more than 32 deep"):
            READERS[name](records)
        file.write_bytes(before)


@pytest.mark.parametrize("seed", range(40))
def test_a_changed_probe_is_refused_or_usable(seed: int, tmp_path: Path) -> None:
    draw, path = random.Random(seed), tmp_path / "devices.json"
    one = Probe(
        "cpu float64", "a chip", "2.13", 2, 1e10, {256: 0.01, 1024: 0.5}, {256: 0.02, 1024: 1.5}, measured="now"
    )
    one.save(path)
    if seed % 4 == 0:
        path.write_bytes(bend(path.read_bytes(), draw)[0])
    else:
        path.write_text(json.dumps(change(json.loads(path.read_text()), draw)[0]))
    try:
        found = Probe.load("cpu float64", path)
        assert found is None or 0 <= found.truncate_seconds(300, 700) < float("inf")
    except RecordError as error:
        assert len(str(error).splitlines()) == 1


# --- pickles ----------------------------------------------------------------------------------------------------------


def packed(path: Path) -> None:
    path.write_bytes(rezipped(path, lambda _, data: data, 8))


def bomb(path: Path) -> None:
    path.write_bytes(rezipped(path, lambda name, data: hash_bomb() if name.endswith("data.pkl") else data))


def expanded(path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(10**6, 10**6)}, path)


def conjugate(path: Path) -> None:
    torch.save({"a": torch.ones(2, 2, dtype=torch.complex64).conj()}, path)


def without_bytes(path: Path) -> None:
    torch.save({"a": torch.ones(2, 2, device="meta")}, path)


def other_sum(path: Path) -> None:
    """One bit of the pickle, which torch reads without a look at the zip's checksum."""
    data = bytearray(path.read_bytes())
    data[data.index(b"embed_tokens") + 2] ^= 1
    path.write_bytes(bytes(data))


PICKLES = {
    packed: "compressed",
    bomb: "tuples in tuples without end",
    expanded: "more than the file holds",
    conjugate: "expected a dense tensor",
    without_bytes: "more than the file holds|cannot be read|is not plain data",
    other_sum: "cannot be read .*CRC",
}


@pytest.mark.parametrize(("attack", "words"), PICKLES.items(), ids=[attack.__name__ for attack in PICKLES])
def test_a_pickle_that_torch_would_take_for_another_is_refused(
    attack: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(dense_tensors(), path)
    assert len(read_pickle(path).tensors) == len(dense_tensors())
    attack(path)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_pickle(path)
    assert len(str(caught.value).splitlines()) == 1


# --- GGUF -------------------------------------------------------------------------------------------------------------


def header(tensors: int = 0, pairs: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + rest


def pair(kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", 1) + b"k" + struct.pack("<I", kind) + value


def tensor(shape: list[int], offset: int = 0) -> bytes:
    return struct.pack("<Q1sI", 1, b"t", len(shape)) + struct.pack(f"<{len(shape)}QIQ", *shape, 0, offset)


HEADERS = {
    "tensors without end": header(tensors=2**60),
    "entries without end": header(pairs=2**60),
    "a text without end": header(pairs=1, rest=pair(8, struct.pack("<Q", 2**63))),
    "a list without end": header(pairs=1, rest=pair(9, struct.pack("<IQ", 8, 2**62))),
    "bytes as a list": header(pairs=1, rest=pair(9, struct.pack("<IQ", 0, MOST_VALUES + 1)) + bytes(MOST_VALUES + 99)),
    "lists in lists": header(pairs=1, rest=pair(9, struct.pack("<IQ", 9, 1) * 40) + bytes(99)),
    "no type": header(pairs=1, rest=pair(77, bytes(99))),
    "no dimension": header(tensors=1, rest=tensor([]) + bytes(99)),
    "dimensions without end": header(tensors=1, rest=struct.pack("<Q1sI", 1, b"t", 2**32 - 1) + bytes(99)),
    "a tensor of nothing": header(tensors=1, rest=tensor([0, 2**40]) + bytes(99)),
    "more than 64 bits": header(tensors=1, rest=tensor([2**32, 2**32]) + bytes(99)),
    "behind the end": header(tensors=1, rest=tensor([2, 2], 10**9) + bytes(99)),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_gguf_that_claims_more_than_it_holds_is_refused(what: str, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(HEADERS[what])
    with pytest.raises(CheckpointError, match=r"cannot be read as GGUF: found .* at byte"):
        require_counts(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match=r"x\.gguf"):
        laser.open_checkpoint(tmp_path / "x.gguf")


def test_a_gguf_whose_header_is_changed_is_refused_or_within_its_size(tmp_path: Path) -> None:
    whole = header(
        1, 2, pair(9, struct.pack("<IQ", 8, 2) + struct.pack("<Q1sQ1s", 1, b"a", 1, b"b")) + pair(4, bytes(4))
    )
    whole += tensor([2, 2]) + bytes(64)
    path, refused = tmp_path / "x.gguf", 0
    path.write_bytes(whole)
    require_counts(path)
    for seed in range(300):
        path.write_bytes(damage(whole, random.Random(seed), len(whole) - 64)[0])
        try:
            require_counts(path)
        except CheckpointError:
            refused += 1
    assert refused > 100
