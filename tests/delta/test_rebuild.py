"""laser rebuild of what laser unmerge recorded: names that lead elsewhere, a base in 8 bits, other records."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, write_checkpoint_directory
from helpers import snapshot, tensors_in
from merges import BF16, F32, merged, update
from models import llama_config, tensors, write_model
from safetensors.torch import load_file, save_file

import laser.differences.rebuild as rebuild
from laser.checkpoint.quantised import dequantise, quantise
from laser.checkpoint.safetensors import sha256_of
from laser.differences.unmerge import REMAINDER, AdapterRecord, is_recorded


@pytest.fixture
def adapter(run: Run, tmp_path: Path) -> Path:
    """Of a model and itself, which are in base/ and whose only other file is there, too."""
    base = write_model(tmp_path / "base", shards=2)
    assert run("unmerge", base, base, "-o", tmp_path / "adapter", "--device", "cpu")[0] == 0
    return tmp_path / "adapter"


def renamed(adapter: Path, names: Sequence[str]) -> None:
    """The record with other names for its shards, and all that goes with them."""
    record = AdapterRecord.load(adapter / "laser.json")
    parts = load_file(adapter / REMAINDER)
    headers = [parts.pop(f"header/{shard.name}") for shard in record.shards]
    save_file(parts | dict(zip((f"header/{name}" for name in names), headers, strict=True)), adapter / REMAINDER)
    shards = tuple(replace(shard, name=name) for shard, name in zip(record.shards, names, strict=True))
    digests = {**record.parts, REMAINDER: sha256_of(adapter / REMAINDER)}
    replace(record, shards=shards, parts=digests).save(adapter / "laser.json")


ELSEWHERE = ["../mine.safetensors", "/no/mine.safetensors", "in/mine.safetensors", "..", "mine.txt", "a\n.safetensors"]


@pytest.mark.parametrize("name", [*ELSEWHERE, "a\\mine.safetensors", ".safetensors", ""])
def test_a_shard_of_another_place_is_refused(run: Run, adapter: Path, tmp_path: Path, name: str) -> None:
    renamed(adapter, [name, "model-2.safetensors"])
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.safetensors").write_text("of the user")
    before = snapshot(tmp_path)
    for words in (
        ("rebuild", tmp_path / "base", adapter, "-o", tmp_path / "sub" / "out"),
        ("verify", adapter, adapter),
    ):
        code, _, err = run(*words)
        assert code == 1 and f"names a shard {name!r}, expected a plain name in .safetensors; make it again" in err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["model-2.safetensors", "side.safetensors"])
def test_two_files_of_one_name_are_refused(run: Run, adapter: Path, tmp_path: Path, name: str) -> None:
    renamed(adapter, [name, "model-2.safetensors"])
    record = AdapterRecord.load(adapter / "laser.json")
    replace(record, files={**record.files, "side.safetensors": "0" * 64}).save(adapter / "laser.json")
    for words in (("rebuild", tmp_path / "base", adapter, "-o", tmp_path / "out"), ("verify", adapter, adapter)):
        code, _, err = run(*words)
        assert code == 1 and f"names {name} twice, expected one file of each name; make it again" in err


def test_other_plain_names_are_as_good(run: Run, adapter: Path, tmp_path: Path) -> None:
    """The law of the two above: it was the name that was refused."""
    record = AdapterRecord.load(adapter / "laser.json")
    renamed(adapter, [shard.name for shard in record.shards])
    assert run("rebuild", tmp_path / "base", adapter, "-o", tmp_path / "out")[0] == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "base")


@pytest.mark.slow
@pytest.mark.parametrize("stored", [F32, BF16])
def test_a_base_in_eight_bits_and_its_values_in_more(run: Run, tmp_path: Path, stored: torch.dtype) -> None:
    """What unmerge finds to be the base's, by its values, rebuild takes by its values; and bytes where those are."""
    eight = {}
    for name, W in tensors().items():
        if ".self_attn." in name:
            eight[name], eight[f"{name}_scale_inv"] = quantise(W.float(), F32)
    plain = {n: dequantise(W, eight[f"{n}_scale_inv"]).to(stored) for n, W in eight.items() if n in tensors()}
    more = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    base = write_checkpoint_directory(tmp_path / "base", tensors() | eight, llama_config(**more))
    for number, tuned in enumerate((plain, eight)):
        model = tensors() | tuned | {"model.norm.weight": tensors()["model.norm.weight"] * 1.5}
        config = llama_config(**(more if tuned is eight else {}))
        there = write_checkpoint_directory(tmp_path / f"tuned{number}", model, config)
        words = ("unmerge", base, there, "-o", tmp_path / f"adapter{number}", "--json", "--device", "cpu")
        code, out, err = run(*words)
        assert code == 0, err
        made = {entry["name"]: entry["how"] for entry in json.loads(out)["entries"]}
        expected = "same" if tuned is eight or stored is F32 else "cast"
        assert {made[name] for name in tuned} == {expected}
        code, _, err = run("rebuild", base, tmp_path / f"adapter{number}", "-o", tmp_path / f"again{number}")
        assert code == 0, err
        assert snapshot(tmp_path / f"again{number}") == snapshot(there)


def test_a_record_of_another_kind_is_none_of_unmerge_s(run: Run, adapter: Path, tmp_path: Path) -> None:
    """laser compensate records its adapter in a file of the same name: that one is merged as any other LoRA."""
    from test_peft import write_adapter

    base, lora = tmp_path / "base", write_adapter(tmp_path / "lora")
    assert run("rebuild", base, lora, "-o", tmp_path / "first")[0] == 0
    (lora / "laser.json").write_text('{"kind": "compensation", "version": 1}')
    assert is_recorded(adapter) and not is_recorded(lora)
    code, _, err = run("rebuild", base, lora, "-o", tmp_path / "second")
    assert code == 0 and snapshot(tmp_path / "second") == snapshot(tmp_path / "first"), err
    assert not all(torch.equal(W, tensors_in(base)[name]) for name, W in tensors_in(tmp_path / "second").items())
    # What says that it is of unmerge, or cannot be read, is not merged without what is missing of it.
    for text in ('{"kind": "adapter"}', "{", "[]"):
        (lora / "laser.json").write_text(text)
        code, _, err = run("rebuild", base, lora, "-o", tmp_path / "third")
        assert is_recorded(lora) and code == 1 and "laser.json" in err and not (tmp_path / "third").exists()


def test_the_record_counts_where_the_remainder_is_gone(run: Run, adapter: Path, tmp_path: Path) -> None:
    shutil.move(adapter / REMAINDER, tmp_path / "elsewhere")
    assert is_recorded(adapter)
    code, _, err = run("rebuild", tmp_path / "base", adapter, "-o", tmp_path / "out")
    assert code == 1 and f"{REMAINDER}: No such file" in err


# --- the base laid out otherwise --------------------------------------------------------------------------------------


def laid_out_otherwise(base: Path, kind: str) -> Path:
    """The same weights elsewhere."""
    found, out = tensors_in(base), base.with_name(f"base {kind}")
    if kind == "pickle":
        out.mkdir()
        shutil.copy(base / "config.json", out)
        torch.save(found, out / "pytorch_model.bin")
        return out
    config = json.loads((base / "config.json").read_text())
    more = {"transformers_version": "9"} if kind == "config" else {}
    return write_checkpoint_directory(out, found, config | more, 2 if kind == "config" else 3)


def test_a_base_laid_out_otherwise_serves(run: Run, tmp_path: Path) -> None:
    """Of whoever has the adapter and no fine-tune: nothing else could be followed."""

    def change(name: str, W: torch.Tensor) -> torch.Tensor:
        return merged(W, update(W, 3, 0.02)) if "q_proj" in name else W * 1.5 if "norm" in name else W

    base, tuned = write_model(tmp_path / "base"), write_model(tmp_path / "tuned", change)
    assert run("unmerge", base, tuned, "-o", tmp_path / "adapter", "--device", "cpu")[0] == 0
    for kind in ("shards", "pickle", "config"):
        out = tmp_path / f"out {kind}"
        code, _, err = run("rebuild", laid_out_otherwise(base, kind), tmp_path / "adapter", "-o", out)
        assert code == 0 and snapshot(out) == snapshot(tuned), err
    # Other weights there are another base, whether all of them or the ones that the adapter changes.
    some = write_model(tmp_path / "some", lambda name, W: W + 1 if "q_proj" in name else W, shards=3)
    for other in (write_model(tmp_path / "other", shards=3, seed=9), some):
        code, _, err = run("rebuild", other, tmp_path / "adapter", "-o", tmp_path / "no")
        assert code == 1 and "the adapter was made from base" in err and not list(tmp_path.glob("no*"))


def test_one_matrix_of_another_base_is_found_as_it_is_made(run: Run, adapter: Path, tmp_path: Path) -> None:
    """Not one of those that are tried first."""
    other = write_model(tmp_path / "other", lambda name, W: W + 1 if "layers.1.mlp.up" in name else W, shards=3)
    code, _, err = run("rebuild", other, adapter, "-o", tmp_path / "out")
    assert code == 1 and "mlp.up_proj.weight cannot be rebuilt to the bit from other" in err
    assert not (tmp_path / "out").exists()


def test_a_base_that_changes_meanwhile_is_refused(
    run: Run, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, write = tmp_path / "base" / "model-00001-of-00002.safetensors", rebuild.write_directory

    def meanwhile(*given: Any, **how: Any) -> None:
        shard.write_bytes(shard.read_bytes())
        write(*given, **how)

    # Between the check of the base and the first byte that is read of it.
    monkeypatch.setattr(rebuild, "write_directory", meanwhile)
    code, _, err = run("rebuild", tmp_path / "base", adapter, "-o", tmp_path / "out")
    assert code == 1 and "changed" in err and not (tmp_path / "out").exists(), err


# --- force ------------------------------------------------------------------------------------------------------------


def test_force_makes_the_same_again_and_replaces_nothing_else(run: Run, adapter: Path, tmp_path: Path) -> None:
    """What was rebuilt is a model like any other: only the same bytes, or what is left of them, may be replaced."""
    out, base = tmp_path / "out", tmp_path / "base"
    words = ("rebuild", base, adapter, "-o", out)
    assert run(*words)[0] == 0
    code, _, err = run(*words)
    assert code == 1 and "out exists; try another -o, or remove it yourself" in err
    made = snapshot(out)
    (out / "model-00002-of-00002.safetensors").unlink()
    for _ in range(2):
        code, _, err = run(*words, "--force")
        assert code == 0 and snapshot(out) == made and not (tmp_path / "out.partial").exists(), err


@pytest.mark.parametrize("spoil", ["another byte", "another file", "a link", "no folder"])
def test_force_keeps_what_is_not_made_again(run: Run, adapter: Path, tmp_path: Path, spoil: str) -> None:
    out, base = tmp_path / "out", tmp_path / "base"
    shutil.copytree(base, out)
    path = out / "config.json"
    if spoil == "another byte":
        path.write_bytes(path.read_bytes() + b" ")
    elif spoil == "another file":
        path = out / "sub" / "thesis.tex"
        path.parent.mkdir()
        path.write_text("mine")
    elif spoil == "a link":
        path.unlink()
        path.symlink_to(base / "config.json")
    else:
        shutil.rmtree(out)
        path = out
        out.write_text("mine")
    before = snapshot(tmp_path)
    code, _, err = run("rebuild", base, adapter, "-o", out, "--force")
    assert code == 1 and f"{path} is not what would be written there, and --force replaces nothing else" in err
    assert snapshot(tmp_path) == before


def test_force_where_the_earlier_one_was_moved_aside(run: Run, adapter: Path, tmp_path: Path) -> None:
    """Killed between two renames, where the system exchanges no names: it is in its place again, and is replaced."""
    out, base = tmp_path / "out", tmp_path / "base"
    shutil.copytree(base, tmp_path / "out.partial" / "old")
    code, _, err = run("rebuild", base, adapter, "-o", out)
    assert code == 1 and "out exists" in err and snapshot(out) == snapshot(base)
    shutil.move(out, tmp_path / "out.partial" / "old")
    code, _, err = run("rebuild", base, adapter, "-o", out, "--force")
    assert code == 0 and snapshot(out) == snapshot(base) and not (tmp_path / "out.partial").exists(), err
