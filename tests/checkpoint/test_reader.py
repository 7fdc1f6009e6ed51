"""Opening checkpoints: what is right, what the Hub's cache looks like, and every hostile input of DESIGN section 5."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from laser.checkpoint.reader import INDEX, open_checkpoint, read_header
from laser.errors import CheckpointError, LaserError

SECOND = "model-00002-of-00003.safetensors"


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the JSON header of a shard; the data stays."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def edit_index(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((path / INDEX).read_text())
    change(index)
    (path / INDEX).write_text(json.dumps(index))


def first(header: dict[str, Any]) -> dict[str, Any]:
    return header[next(k for k in header if k != "__metadata__")]


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_every_tensor_as_the_library_does(make_pico: Callable[..., Path], shards: int) -> None:
    path = make_pico(shards=shards)
    checkpoint = open_checkpoint(path)
    wanted = {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}
    assert checkpoint.tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(checkpoint.read(name), tensor)
    assert len(checkpoint.shards) == shards


def test_symlinked_shards_as_in_the_hub_cache(pico: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in pico.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert open_checkpoint(snapshot).identity == open_checkpoint(pico).identity


def test_identity_depends_on_headers_config_and_index_but_not_on_the_place(
    pico: Path, make_pico: Callable[..., Path]
) -> None:
    same, other = open_checkpoint(make_pico("same")), open_checkpoint(make_pico("other", rope_theta=1.0))
    assert open_checkpoint(pico).identity == same.identity != other.identity


def test_every_storage_dtype_is_read(tmp_path: Path, make_pico: Callable[..., Path]) -> None:
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
    tensors = {f"t{i}": torch.randn(3, 5).to(dtype) for i, dtype in enumerate(dtypes)}
    checkpoint = open_checkpoint(make_pico("dtypes", shards=1, tensors=tensors))
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name).view(torch.uint8), tensor.view(torch.uint8))


# --- hostile input: what to break, and what the message must say ------------------------------------------------------


def missing_shard(path: Path) -> None:
    (path / SECOND).unlink()


def path_outside(path: Path) -> None:
    edit_index(path, lambda i: i["weight_map"].update({"lm_head.weight": "../../etc/passwd.safetensors"}))


def absolute_path(path: Path) -> None:
    edit_index(path, lambda i: i["weight_map"].update({"lm_head.weight": "/etc/passwd.safetensors"}))


def tensor_not_in_shard(path: Path) -> None:
    edit_index(path, lambda i: i["weight_map"].update({"not.there": SECOND}))


def truncated(path: Path) -> None:
    raw = (path / SECOND).read_bytes()
    (path / SECOND).write_bytes(raw[:-10])


def longer(path: Path) -> None:
    with (path / SECOND).open("ab") as file:
        file.write(b"more")


def cut_in_header(path: Path) -> None:
    raw = (path / SECOND).read_bytes()
    (path / SECOND).write_bytes(raw[:50])


def empty_shard(path: Path) -> None:
    (path / SECOND).write_bytes(b"")


def endless_header(path: Path) -> None:
    raw = (path / SECOND).read_bytes()
    (path / SECOND).write_bytes(struct.pack("<Q", 2**60) + raw[8:])


def huge_header(path: Path) -> None:
    with (path / SECOND).open("wb") as file:  # sparse: takes no room
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(100_000_100)


def overlapping(path: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        names = [k for k in header if k != "__metadata__"]
        twins = [(a, b) for a in names for b in names if a < b and header[a]["shape"] == header[b]["shape"]]
        a, b = twins[0]
        header[b]["data_offsets"] = header[a]["data_offsets"]

    edit_header(path / SECOND, change)


def out_of_range(path: Path) -> None:
    edit_header(path / SECOND, lambda h: first(h).update(data_offsets=[10**9, 2 * 10**9]))


def falling_offsets(path: Path) -> None:
    edit_header(path / SECOND, lambda h: first(h).update(data_offsets=[20, 10]))


def wrong_size(path: Path) -> None:
    edit_header(path / SECOND, lambda h: first(h)["shape"].append(3))


def negative_shape(path: Path) -> None:
    edit_header(path / SECOND, lambda h: first(h).update(shape=[-1, 4]))


def unknown_dtype(path: Path) -> None:
    edit_header(path / SECOND, lambda h: first(h).update(dtype="BF17"))


def not_json(path: Path) -> None:
    raw = (path / SECOND).read_bytes()
    (path / SECOND).write_bytes(raw[:8] + b"}" + raw[9:])


def list_header(path: Path) -> None:
    (path / SECOND).write_bytes(struct.pack("<Q", 2) + b"[]")


def key_twice(path: Path) -> None:
    (path / SECOND).write_bytes(struct.pack("<Q", 32) + b'{"a":{"dtype":"F32"},"a":{}}    ')


def index_without_map(path: Path) -> None:
    (path / INDEX).write_text("{}")


def broken_index(path: Path) -> None:
    (path / INDEX).write_text("{")


def broken_config(path: Path) -> None:
    (path / "config.json").write_text("[1]")


def no_config(path: Path) -> None:
    (path / "config.json").unlink()


def pickle_in_index(path: Path) -> None:
    edit_index(path, lambda i: i["weight_map"].update({"lm_head.weight": "pytorch_model.bin"}))


def only_pickles(path: Path) -> None:
    for file in (*path.glob("*.safetensors"), path / INDEX):
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")


def nothing_there(path: Path) -> None:
    for file in (*path.glob("*.safetensors"), path / INDEX):
        file.unlink()


HOSTILE: list[tuple[Callable[[Path], None], str]] = [
    (missing_shard, rf"index.json names {SECOND}, which is missing .*finish the download"),
    (path_outside, r"lm_head.weight points to '../../etc/passwd.safetensors', expected the name of a file"),
    (absolute_path, r"lm_head.weight points to '/etc/passwd"),
    (tensor_not_in_shard, rf"says that not.there is in {SECOND}, which does not hold it"),
    (truncated, rf"{SECOND}: .* has offsets .*truncated or damaged; download it again"),
    (longer, rf"{SECOND}: found \d+ bytes, expected \d+ by its header: bytes after the last tensor"),
    (cut_in_header, rf"{SECOND} is truncated: found 50 bytes, expected a header of \d+"),
    (empty_shard, rf"{SECOND} is truncated: found 0 bytes"),
    (endless_header, rf"{SECOND} is truncated: found \d+ bytes, expected a header of {2**60} bytes"),
    (huge_header, rf"{SECOND}: header of 100000001 bytes, expected at most 100000000"),
    (overlapping, rf"{SECOND}: .* (overlaps the tensor|leaves a hole) before it: found offset \d+, expected \d+"),
    (out_of_range, rf"{SECOND}: .* has offsets \[1000000000, 2000000000\]"),
    (falling_offsets, rf"{SECOND}: .* has offsets \[20, 10\], expected two rising numbers"),
    (wrong_size, rf"{SECOND}: .* holds \d+ bytes, expected \d+ for BF16"),
    (negative_shape, rf"{SECOND}: the entry of .* has no valid shape"),
    (unknown_dtype, rf"{SECOND}: .* has dtype 'BF17', expected one of F64"),
    (not_json, rf"{SECOND} is not valid JSON"),
    (list_header, rf"{SECOND}: the header is a list, expected an object"),
    (key_twice, rf"{SECOND} is not valid JSON .*a key stands twice"),
    (index_without_map, "found no weight_map"),
    (broken_index, rf"{INDEX} is not valid JSON"),
    (broken_config, "config.json: found list, expected a JSON object"),
    (no_config, "cannot read .*config.json: No such file"),
    (pickle_in_index, "lm_head.weight is in 'pytorch_model.bin', expected a .safetensors file"),
    (only_pickles, r"holds pickled weights \(pytorch_model.bin\), which are never unpickled"),
    (nothing_there, "holds neither model.safetensors.index.json nor model.safetensors"),
]


@pytest.mark.parametrize("attack, message", HOSTILE, ids=lambda x: x.__name__ if callable(x) else "")
def test_hostile_input_is_refused_with_its_name(pico: Path, attack: Callable[[Path], None], message: str) -> None:
    attack(pico)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(pico)
    assert not (pico / "pwned").exists()


@pytest.mark.parametrize("model", ["nope", "./no/where", "/no/where"])
def test_no_such_model(model: str) -> None:
    with pytest.raises(CheckpointError, match="no such model"):
        open_checkpoint(model)


def test_hub_id_that_is_not_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="nor in the Hub cache; try `hf download mistralai/Mixtral-8x7B"):
        open_checkpoint("mistralai/Mixtral-8x7B-Instruct-v0.1")


def test_a_file_is_no_directory(pico: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file, expected a checkpoint directory"):
        open_checkpoint(pico / "config.json")


def test_a_shard_that_shrinks_while_it_is_read(pico: Path) -> None:
    checkpoint = open_checkpoint(pico)
    truncated(pico)
    with pytest.raises(CheckpointError, match="ends inside"):
        checkpoint.read(checkpoint.shards[1].tensors[-1].name)


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_byte_of_a_header_is_an_error_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    """Fuzz: whatever stands in the first bytes, only our own error comes out, and what passes is consistent."""
    path = tmp_path / "fuzz.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path)
    raw = bytearray(path.read_bytes())
    length = 8 + struct.unpack("<Q", raw[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        shard = read_header(path)
    except LaserError as error:
        assert "fuzz.safetensors" in str(error)
    else:
        assert sum(t.end - t.start for t in shard.tensors) + len(shard.header) == len(raw)
