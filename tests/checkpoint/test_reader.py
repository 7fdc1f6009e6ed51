"""Opening checkpoints: what is right, what the Hub's cache looks like, and every hostile input of DESIGN section 5."""

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import tensors_in
from hostile import HOSTILE, truncated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from laser.checkpoint.reader import open_checkpoint
from laser.checkpoint.safetensors import read_header
from laser.errors import CheckpointError, LaserError


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_every_tensor_as_the_library_does(make_pico: Callable[..., Path], shards: int) -> None:
    path = make_pico(shards=shards)
    checkpoint = open_checkpoint(path)
    wanted = tensors_in(path)
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
    with pytest.raises(CheckpointError, match=r"nor in the Hub cache, .* try `hf download mistralai/Mixtral-8x7B"):
        open_checkpoint("mistralai/Mixtral-8x7B-Instruct-v0.1")


def test_a_file_is_no_directory(pico: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file, expected a checkpoint directory"):
        open_checkpoint(pico / "config.json")


def test_a_shard_that_shrinks_while_it_is_read(pico: Path) -> None:
    checkpoint = open_checkpoint(pico)
    truncated(pico)
    with pytest.raises(CheckpointError, match="ends at byte"):
        checkpoint.read(checkpoint.shards[1].tensors[-1].name)


@pytest.mark.slow
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


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16"])
def test_json_that_only_python_would_read_is_refused(pico: Path, name: str, coding: str) -> None:
    """As PowerShell writes it: transformers loads neither, and an output would have the same file."""
    (pico / name).write_bytes((pico / name).read_text().encode(coding))
    with pytest.raises(CheckpointError, match=rf"{name} is not valid JSON \(.*utf-8"):
        open_checkpoint(pico)
