"""Files are what they seem: only regular ones are opened, headers are those of safetensors, links carry nothing out."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import SECOND, mutated_config, mutated_header
from safetensors import safe_open

import laser
from laser.checkpoint.reader import INDEX
from laser.checkpoint.safetensors import read_header
from laser.checkpoint.side_files import own_file
from laser.cli.recipe import load_recipe
from laser.errors import CheckpointError, DoubtWarning, LaserError, OutputError, RecordError
from laser.evaluation.rows import read_content
from laser.evaluation.text import load_tokenizer
from laser.files import LARGEST_FILE, read_regular
from laser.plan import Plan
from laser.spectra import Spectra


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def full(path: Path) -> None:
    path.symlink_to("/dev/full")


def folder(path: Path) -> None:
    path.mkdir()


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def unix_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path may have no more than 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def huge(path: Path) -> None:
    with path.open("wb") as file:  # sparse: takes no room
        file.truncate(40 * LARGEST_FILE)


STRANGE = (fifo, endless, full, folder, loop, dangling, unix_socket, huge)


@pytest.mark.parametrize("strange", STRANGE)
def test_nothing_but_a_regular_file_is_read(tmp_path: Path, strange: Callable[[Path], None]) -> None:
    strange(tmp_path / "x")
    with pytest.raises(OSError, match=r"regular file|at most|symbolic links|No such file"):
        read_regular(tmp_path / "x")


def test_a_file_that_tells_no_size_is_bounded_too() -> None:
    status = Path("/proc/self/maps")
    if not status.exists():
        pytest.skip("needs the /proc of Linux, whose files tell size 0")
    assert read_regular(status)
    with pytest.raises(OSError, match="more than 10 bytes"):
        read_regular(status, 10)


@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("name", ["config.json", INDEX, SECOND])
def test_a_checkpoint_of_strange_files_is_refused_at_once(pico: Path, name: str, strange: Any) -> None:
    (pico / name).unlink()
    strange(pico / name)
    with pytest.raises(CheckpointError):
        laser.open_checkpoint(pico)


@pytest.mark.parametrize("strange", STRANGE)
def test_texts_records_recipes_and_tokenizers_too(pico: Path, tmp_path: Path, strange: Any) -> None:
    strange(tmp_path / "x.toml")
    readers: list[Callable[[Path], Any]] = [Plan.load, Spectra.load, lambda path: load_recipe(str(path))]
    if strange is not huge:  # texts may be larger
        readers.append(lambda path: read_content(path, "text", "try another"))
    for read in readers:
        with pytest.raises(LaserError):
            read(tmp_path / "x.toml")
    if strange is not dangling:
        strange(pico / "tokenizer.json")
        with pytest.raises(LaserError, match=r"tokenizer"):
            load_tokenizer(pico)


# --- headers ----------------------------------------------------------------------------------------------------------


def taken(path: Path) -> bool:
    try:
        read_header(path)
    except CheckpointError as error:
        assert "\n" not in str(error) and len(str(error)) < 900
        return False
    return True


def taken_by_safetensors(path: Path) -> str | None:
    """None where the library opens a file, or its reason."""
    try:
        with safe_open(path, framework="pt"):
            return None
    except Exception as error:
        return str(error)


# What safetensors takes and laser does not: no writer makes such, and programs read different things from them.
STRICTER = ("stands twice", "is twice", "no valid shape", "within 64 bits", "without end", "is not valid JSON")


@pytest.mark.slow
def test_what_laser_takes_of_mutated_headers_safetensors_takes(tmp_path: Path) -> None:
    path, draw = tmp_path / "x.safetensors", random.Random(14)
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b-0": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
        "none": {"dtype": "I64", "shape": [0], "data_offsets": [24, 24]},
    }
    both = refused = 0
    for _ in range(1000):
        text = mutated_header(draw, header)
        path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 24)
        mine, library = taken(path), taken_by_safetensors(path)
        assert not (mine and library), (library, text[:2000])
        both += mine
        refused += not mine
        if not mine and library is None:
            with pytest.raises(CheckpointError, match="|".join(STRICTER)):
                read_header(path)
    assert both > 30 and refused > 300  # the mutations are neither idle nor deadly


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_link_carries_nothing_into_an_output(pico: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("my token")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inside").write_text("my token")
    (pico / "original").mkdir()
    for name in ("README.md", "LICENSE", "original/notes.txt"):
        (pico / name).unlink(missing_ok=True)
        (pico / name).symlink_to(secret)
    (pico / "docs").symlink_to(tmp_path / "folder", target_is_directory=True)
    os.mkfifo(pico / "pipe")
    checkpoint = laser.open_checkpoint(pico)
    outcome = laser.reduce(checkpoint, laser.make_plan(laser.scan(checkpoint), "rank:4"), tmp_path / "out")
    laser.write_card(tmp_path / "out", checkpoint)
    written = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert not any(p.is_symlink() or b"my token" in p.read_bytes() for p in written)
    named = {"LICENSE", "original/notes.txt", "docs"}
    assert {f"{name} (a link)" for name in named} | {"pipe (no regular file)"} == set(outcome.left_out)


@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer.json", "chat_template.jinja", "modeling_own.py"])
def test_a_config_that_is_a_link_is_read_and_not_written(pico: Path, tmp_path: Path, name: str) -> None:
    if (pico / name).exists():
        (pico / name).rename(tmp_path / "elsewhere")
    else:
        (tmp_path / "elsewhere").write_text("{}")
    (pico / name).symlink_to(tmp_path / "elsewhere")
    checkpoint = laser.open_checkpoint(pico)
    plan = laser.make_plan(laser.scan(checkpoint), "rank:4")
    with pytest.raises(OutputError, match=r"is a link to .*; put a copy in its place"):
        laser.reduce(checkpoint, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_shard_may_lie_on_another_disk(pico: Path, tmp_path: Path) -> None:
    shutil.move(pico / SECOND, tmp_path / "big")
    (pico / SECOND).symlink_to(tmp_path / "big")
    checkpoint = laser.open_checkpoint(pico)
    laser.reduce(checkpoint, laser.make_plan(laser.scan(checkpoint), "rank:4"), tmp_path / "out")
    assert not (tmp_path / "out" / SECOND).is_symlink()
    assert laser.verify(checkpoint, tmp_path / "out").problems == ()


def test_links_of_the_hub_cache_are_followed_into_its_blobs_only(tmp_path: Path) -> None:
    model = tmp_path / "hub/models--org--x"
    snapshot, blobs, store = model / "snapshots/0123", model / "blobs", tmp_path / "hub/blobs/ab"
    for made in (snapshot / "sub", blobs, store):
        made.mkdir(parents=True)
    (blobs / "plain").write_text("1")
    (store / "abcd").write_text("2")
    (blobs / "shared").symlink_to("../../blobs/ab/abcd")
    (tmp_path / "secret").write_text("3")
    (blobs / "hostile").symlink_to(tmp_path / "secret")
    links = {"a": "../../blobs/plain", "b": "../../blobs/shared", "sub/c": "../../../blobs/plain"}
    hostile = {"d": "../../blobs/hostile", "e": "../../../../secret", "f": "../../blobs/../../../secret", "g": "g"}
    for name, target in (links | hostile).items():
        (snapshot / name).symlink_to(target)
    assert [own_file(snapshot, snapshot / name) for name in links] == [blobs / "plain", store / "abcd", blobs / "plain"]
    assert [own_file(snapshot, snapshot / name) for name in hostile] == [None] * 4
    assert own_file(model, model / "snapshots/0123/a") is None  # no snapshot, so no cache


def test_an_index_names_files_and_nothing_else(pico: Path) -> None:
    index = json.loads((pico / INDEX).read_text())
    for name in ("", ".", "..", "../x.safetensors", "/x.safetensors", "a\\b.safetensors", "a\0.safetensors",
                 "a\n.safetensors",
                 "\x1b[2J.safetensors", 3, None, ["x.safetensors"]):  # fmt: skip
        index["weight_map"]["lm_head.weight"] = name
        (pico / INDEX).write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="expected the name of a file in the same directory"):
            laser.open_checkpoint(pico)


def test_a_recipe_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecordError, match="cannot be read"):
        load_recipe(str(tmp_path / "x.toml"))


# --- configs: the long form is benchmarks/hostile_files.py ------------------------------------------------------------


def test_mutated_configs_are_right_or_refused_in_a_line(pico: Path, tmp_path: Path) -> None:
    config, draw = json.loads((pico / "config.json").read_text()), random.Random(5)
    ended = {"right": 0, "refused": 0}
    for _ in range(60):
        (pico / "config.json").write_bytes(mutated_config(draw, config))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DoubtWarning)
                laser.list_matrices(laser.open_checkpoint(pico))
            ended["right"] += 1
        except LaserError as error:
            ended["refused"] += 1
            assert "\n" not in str(error)
    assert min(ended.values()) > 5


@pytest.mark.slow
def test_a_card_of_numbers_without_end_and_of_deep_files(pico: Path, tmp_path: Path) -> None:
    config = json.loads((pico / "config.json").read_text()) | {"time_step_limit": [0.0, float("inf")]}  # as Mamba's
    (pico / "config.json").write_text(json.dumps(config))
    (pico / "tokenizer_config.json").write_text('{"a": ' + "[" * 500 + "]" * 500 + "}")
    checkpoint = laser.open_checkpoint(pico)
    laser.reduce(checkpoint, laser.make_plan(laser.scan(checkpoint), "rank:4"), tmp_path / "out")
    laser.write_card(tmp_path / "out", checkpoint)
    told = json.loads((tmp_path / "out/laser/source.json").read_text())
    assert told["config"]["time_step_limit"] == [0.0, "inf"] and told["tokenizer_config"] == {}
    (pico / "config.json").write_text('{"a": ' + "[" * 500 + "]" * 500 + "}")
    with pytest.raises(CheckpointError, match="nested more than 100 deep"):
        laser.open_checkpoint(pico)
