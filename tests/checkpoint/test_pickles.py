"""Pickled weights: the same results as from safetensors, written as safetensors; nothing in a pickle is ever run."""

import json
import os
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import snapshot, tensors_in
from safetensors.torch import load_file

from laser.checkpoint import writer
from laser.checkpoint.matrices import list_matrices
from laser.checkpoint.pickles import PICKLE_INDEX
from laser.checkpoint.reader import INDEX, SINGLE, Checkpoint, open_checkpoint
from laser.checkpoint.writer import prepare_output, write_checkpoint
from laser.errors import CheckpointError
from laser.pipeline import reduce, scan
from laser.plan import empty_plan, make_plan
from laser.selection import Selection
from laser.verification import verify

Q1 = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def pickled(pico: Path, tmp_path: Path) -> Path:
    """pico as it was published before safetensors: three pickles and their index."""
    path = tmp_path / "pickled"
    shutil.copytree(pico, path, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    index = json.loads((pico / INDEX).read_text())
    renamed = {}
    for file in sorted(pico.glob("*.safetensors")):
        name = file.name.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        torch.save(load_file(file), path / name)
        renamed[file.name] = name
    index["weight_map"] = {tensor: renamed[file] for tensor, file in index["weight_map"].items()}
    (path / PICKLE_INDEX).write_text(json.dumps(index, indent=2))
    return path


@pytest.mark.slow
def test_scan_and_reduce_as_from_safetensors(pico: Path, pickled: Path, tmp_path: Path) -> None:
    ours, theirs = open_checkpoint(pickled), open_checkpoint(pico)
    assert ours.tensors.keys() == theirs.tensors.keys()
    spectra, wanted = scan(ours), scan(theirs)
    assert all((spectra.values[name] == s).all() for name, s in wanted.values.items())
    before = snapshot(pickled)
    reduce(ours, make_plan(spectra, "rank:4"), tmp_path / "out")
    reduce(theirs, make_plan(wanted, "rank:4"), tmp_path / "wanted")
    made, expected = tensors_in(tmp_path / "out"), tensors_in(tmp_path / "wanted")
    assert all(torch.equal(made[name], tensor) for name, tensor in expected.items())
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.suffix in (".bin", ".safetensors")) == sorted(
        p.name for p in pico.glob("*.safetensors")
    )
    assert json.loads((tmp_path / "out" / INDEX).read_text()) == json.loads((pico / INDEX).read_text())
    found = verify(ours, tmp_path / "out")
    assert not found.problems and found.touched == len(spectra.values)
    assert snapshot(pickled) == before


@pytest.mark.filterwarnings("ignore::laser.checkpoint.matrices.DoubtWarning")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_one_pickle_with_views_and_mixed_dtypes(make_pico: Callable[..., Path], tmp_path: Path, name: str) -> None:
    path = make_pico(shards=1)
    state: dict[str, torch.Tensor] = load_file(path / SINGLE)
    state["flags"] = torch.tensor([True, False, True])
    state["steps"] = torch.tensor(7)
    state["empty"] = torch.empty(0, 4)
    big = torch.randn(6, 8)
    state["turned"], state["part"] = big.T, big[1:3, 2:5]  # views of one storage
    state["lm_head.weight"] = state["model.embed_tokens.weight"]  # tied: one storage under two names
    (path / SINGLE).unlink()
    torch.save(state, path / name)
    torch.save({"lr": 1.0}, path / "training_args.bin")
    checkpoint = open_checkpoint(path)
    reduce(checkpoint, empty_plan(scan(checkpoint, Selection(roles=("q",)))), tmp_path / "out")
    made = load_file(tmp_path / "out" / SINGLE)
    assert made.keys() == state.keys()
    assert all(torch.equal(made[key], tensor) and made[key].dtype == tensor.dtype for key, tensor in state.items())


def test_killed_and_resumed_is_the_same_to_the_byte(pickled: Path, tmp_path: Path) -> None:
    touched = [Q1, Q1.replace("q_proj", "k_proj"), Q1.replace("1.", "2.", 1)]

    def compute(checkpoint: Checkpoint, stop_at: int | None) -> writer.MakeNew:
        done = 0

        def run(names: list[str]) -> Generator[tuple[str, torch.Tensor, dict[str, Any]], None, None]:
            nonlocal done
            for name in names:
                if done == stop_at:
                    raise KeyboardInterrupt
                done += 1
                yield name, checkpoint.read(name) / 2, {}

        return run

    def write(out: Path, stop_at: int | None) -> None:
        source = open_checkpoint(pickled)
        prepare_output(source, out, resume=True)
        matrices = [m for m in list_matrices(source) if m.name in touched]
        write_checkpoint(source, out, matrices, compute(source, stop_at), lambda r, s: {"m": r, "s": s}, {"kind": "t"})

    write(tmp_path / "whole", None)
    for stop_at in (0, 1, 1):
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "killed", stop_at)
        assert not (tmp_path / "killed" / INDEX).exists()
    write(tmp_path / "killed", None)
    assert snapshot(tmp_path / "killed") == snapshot(tmp_path / "whole")


class Payload:
    """Unpickled in the ordinary way, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_malicious_pickle_is_refused_and_not_run(
    make_pico: Callable[..., Path], tmp_path: Path, run: Callable[..., Any], name: str, zipped: bool
) -> None:
    path, target = make_pico(shards=1), tmp_path / "pwned"
    (path / SINGLE).unlink()
    torch.save({Q1: torch.ones(2, 2), "x": Payload(target)}, path / name, _use_new_zipfile_serialization=zipped)
    torch.load(path / name, weights_only=False)
    assert target.exists()  # the payload is a real one
    target.unlink()
    code, out, err = run("scan", path, "-o", tmp_path / "spectra.safetensors")
    assert (code, out) == (1, "") and len(err.splitlines()) == 1
    assert ("wants " in err and "system" in err) if zipped else "is not a zip file" in err
    assert not target.exists() and not (tmp_path / "spectra.safetensors").exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "legacy": (
        lambda p: torch.save({Q1: torch.ones(2)}, p, _use_new_zipfile_serialization=False),
        "since torch 1.6: an old pickle",
    ),
    "truncated": (truncate, "pytorch_model.bin cannot be read"),
    "empty": (lambda p: p.write_bytes(b""), "is not a zip file"),
    "a list": (lambda p: torch.save([torch.ones(2)], p), "holds a list, expected tensors under names"),
    "nothing": (lambda p: torch.save({}, p), "holds a dict, expected tensors"),
    "a training state": (lambda p: torch.save({"model": {Q1: torch.ones(2)}}, p), "'model' is a dict, expected a"),
    "sparse": (lambda p: torch.save({Q1: torch.eye(3).to_sparse()}, p), "expected a dense tensor"),
    "code": (lambda p: torch.save({Q1: torch.nn.Linear(2, 2)}, p), "wants torch.nn.modules.linear.Linear"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_not_a_plain_state_dict_is_refused(make_pico: Callable[..., Path], what: str) -> None:
    path = make_pico(shards=1)
    (path / "pytorch_model.bin").write_bytes(b"")
    torch.save(load_file(path / SINGLE), path / "pytorch_model.bin")
    (path / SINGLE).unlink()
    attack, message = BROKEN[what]
    attack(path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_a_pickle_that_changes_while_it_is_read(pickled: Path) -> None:
    checkpoint = open_checkpoint(pickled)
    file = checkpoint.shard_of(Q1).path
    os.utime(file, ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        checkpoint.read(Q1)


def test_two_pickles_without_an_index(pickled: Path) -> None:
    (pickled / PICKLE_INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"holds pytorch_model-00001-of-00003.bin, .* and no pytorch_model"):
        open_checkpoint(pickled)
