"""Bytes out: verbatim headers, identical copies, what OUT may be, full disks."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import snapshot, tensors_in

from laser.checkpoint import writer
from laser.checkpoint.matrices import Matrix, list_matrices
from laser.checkpoint.reader import INDEX, OUTCOME, Checkpoint, open_checkpoint
from laser.checkpoint.writer import JOURNAL, prepare_output, write_checkpoint
from laser.errors import LaserError, OutputError, RecordError
from laser.journal import Journal

RUN = {"kind": "test"}
Q1 = "model.layers.1.self_attn.q_proj.weight"
W2 = "model.layers.2.block_sparse_moe.experts.1.w2.weight"


def halve(checkpoint: Checkpoint, calls: list[str] | None = None) -> writer.MakeNew:
    def compute(names: list[str]) -> Generator[writer.New, None, None]:
        for name in names:
            if calls is not None:
                calls.append(name)
            yield name, checkpoint.read(name) / 2, {"halved": True}

    return compute


def describe(records: Mapping[str, Any], shards: dict[str, str | None]) -> dict[str, Any]:
    return {"matrices": dict(records), "shards": shards}


def matrices_of(checkpoint: Checkpoint, names: list[str]) -> list[Matrix]:
    return [m for m in list_matrices(checkpoint) if m.name in names]


def write(source: Path, out: Path, touched: list[str], calls: list[str] | None = None) -> dict[str, Any]:
    checkpoint = open_checkpoint(source)
    prepare_output(checkpoint, out, resume=True)
    return write_checkpoint(checkpoint, out, matrices_of(checkpoint, touched), halve(checkpoint, calls), describe, RUN)


def looks_whole(out: Path) -> bool:
    return (out / INDEX).exists() or (out / "model.safetensors").exists()


@pytest.mark.parametrize("shards", [1, 3])
def test_touching_nothing_copies_every_byte(make_pico: Callable[..., Path], tmp_path: Path, shards: int) -> None:
    source = make_pico(shards=shards)
    before = snapshot(source)
    write(source, tmp_path / "out", [])
    after = snapshot(tmp_path / "out")
    assert {k: v for k, v in after.items() if k != OUTCOME} == {k: v for k, v in before.items() if k != "README.md"}
    assert snapshot(source) == before


@pytest.mark.parametrize("shards", [1, 3])
def test_touched_tensors_change_and_nothing_else(make_pico: Callable[..., Path], tmp_path: Path, shards: int) -> None:
    source, out = make_pico(shards=shards), tmp_path / "out"
    write(source, out, [Q1, W2])
    old, new = open_checkpoint(source), open_checkpoint(out)
    assert [s.header for s in old.shards] == [s.header for s in new.shards]
    for name in old.tensors:
        factor = 2 if name in (Q1, W2) else 1
        assert torch.equal(new.read(name) * factor, old.read(name))


def test_without_copy_file_range(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(pico, tmp_path / "kernel", [Q1])
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    write(pico, tmp_path / "plain", [Q1])
    assert snapshot(tmp_path / "kernel") == snapshot(tmp_path / "plain")


def test_two_file_systems(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, "two file systems")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    write(pico, tmp_path / "out", [])
    assert (tmp_path / "out" / INDEX).read_bytes() == (pico / INDEX).read_bytes()


@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_source_and_output_must_not_lie_in_one_another(pico: Path, place: str) -> None:
    before = snapshot(pico)
    with pytest.raises(OutputError, match="lie in one another"):
        prepare_output(open_checkpoint(pico), pico / place, resume=False)
    assert snapshot(pico) == before


def test_an_output_of_ours_needs_force_or_resume(pico: Path, tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "out", open_checkpoint(pico)
    write(pico, out, [Q1])
    with pytest.raises(OutputError, match="is a finished checkpoint; try --resume"):
        prepare_output(checkpoint, out, resume=False)
    prepare_output(checkpoint, out, resume=True)


def test_what_is_not_ours_is_never_removed(pico: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="was not made by laser"):
        prepare_output(open_checkpoint(pico), tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "thesis.tex").exists()
    with pytest.raises(OutputError, match="is a file"):
        prepare_output(open_checkpoint(pico), tmp_path / "out" / "thesis.tex", resume=True)


def test_weights_in_other_formats_are_left_out_and_named(pico: Path, tmp_path: Path) -> None:
    (pico / "consolidated.00.pth").write_bytes(b"x")
    (pico / "original").mkdir()
    (pico / "original" / "tokenizer.model").write_bytes(b"t")
    (pico / "original" / "consolidated.safetensors").write_bytes(b"x")
    document = write(pico, tmp_path / "out", [])
    assert document["left_out"] == ["consolidated.00.pth", "original/consolidated.safetensors"]
    assert (tmp_path / "out" / "original" / "tokenizer.model").read_bytes() == b"t"


# Files beside the weights. 0_Transformer is a model itself by MODULES, and no small part of one.
STAYS = """
    last.ckpt __0_0.distcp .metadata model.onnx model.onnx_data model.onnx_data_1 model.onnx.data model.npz
    rope.npy llama.nemo model.pkl model.tflite q8.gguf q8.gguf-split-a Q8.GGUF q8.gguf.part1of2
    pytorch_model.bin.gz model.safetensors.gz old.safetensors.bak model.safetensors.partial
    model.safetensors.incomplete model.tar.gz model.zip pytorch_model-00001-of-00002.bin
    pytorch_model.bin.index.json model.safetensors.index.fp16.json model.fp16.safetensors tf_model.h5
    tf_model.h5.index.json flax_model.msgpack rust_model.ot optimizer.pt rng_state_0.pth training_args.bin
    bert_model.ckpt.index bert_model.ckpt.data-00000-of-00001 consolidated.00.pth consolidated.00
    consolidated.safetensors original/consolidated.00.pth onnx/model_q4.onnx adapter_config.json
    adapter_model.safetensors adapter_model.bin ggml-model-q4_0.bin checkpoint-500/config.json
    checkpoint-500/model.safetensors checkpoint-500/trainer_state.json global_step7/mp_rank_00_model_states.pt
    openvino/openvino_model.xml model.safetensors~ model.task model.litertlm model_lite.ptl model.pdiparams model.mnn
    x.mlpackage/Manifest.json x.mlmodelc/coremldata x.zarr/0.0 _METADATA manifest.ocdbt ocdbt.process_0/d/1f
    latest zero_to_fp32.py ema/model.safetensors saved_model.pb variables/variables.index model.llamafile
    lora/optimizer.bin lora/extra.safetensors 0_Transformer/model.safetensors
""".split()
TRAVELS = """
    tokenizer.json tokenizer.model merges.txt chat_template.jinja modeling_x.py special_tokens_map.json
    original/params.json original/tokenizer.model 1_Pooling/config.json 2_Dense/config.json
    2_Dense/model.safetensors 2_Dense/pytorch_model.bin heads/score/model.safetensors modules.json
    lora/adapter_config.json lora/adapter_model.safetensors README.pt.txt images/a.png data.index.txt
    preprocessor_config.json notice.ai 0_Transformer/config.json
""".split()
BESIDE = dict.fromkeys(STAYS, False) | dict.fromkeys(TRAVELS, True)
MODULES = json.dumps(
    [
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"},
        {"idx": 2, "path": "heads/score", "type": "sentence_transformers.models.Dense"},
        {"idx": 3, "path": 7},
        "hostile",
    ]
)


@pytest.mark.filterwarnings("ignore::laser.errors.DoubtWarning")  # vLLM would read others, or the name is unusual
def test_what_lies_beside_the_weights_travels_or_is_named(pico: Path, tmp_path: Path) -> None:
    for name in BESIDE:
        (pico / name).parent.mkdir(parents=True, exist_ok=True)
        (pico / name).write_bytes(name.encode())
    (pico / "modules.json").write_text(MODULES)
    document = write(pico, tmp_path / "out", [])
    assert set(document["left_out"]) == {name for name, travels in BESIDE.items() if not travels}
    for name, travels in BESIDE.items():
        assert (tmp_path / "out" / name).exists() == travels, name
        assert not travels or (tmp_path / "out" / name).read_bytes() == (pico / name).read_bytes()
    assert load_as_transformers_does(tmp_path / "out")


def load_as_transformers_does(path: Path) -> bool:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    return not loaded[1]["missing_keys"] and not loaded[1]["mismatched_keys"]


@pytest.mark.parametrize("text", ["[", "{}", "[1]", '[{"path": "../../etc", "type": "x"}]', '[{"path": null}]', "null"])
def test_a_hostile_modules_json_lets_nothing_travel(pico: Path, tmp_path: Path, text: str) -> None:
    (pico / "modules.json").write_text(text)
    (pico / "copy.safetensors").write_bytes(b"x")
    assert write(pico, tmp_path / "out", [])["left_out"] == ["copy.safetensors"]
    assert {p.name for p in tmp_path.iterdir()} == {"pico", "out"}


@pytest.mark.slow
def test_what_is_left_out_is_printed_and_in_the_card(pico: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    for name in ("pytorch_model.bin.gz", "adapter_config.json", *(f"model-{n}.gguf" for n in range(20))):
        (pico / name).write_bytes(b"{}")
    code, out, err = run("run", pico, "-o", tmp_path / "out", "--no-search", "--rule", "rank:4", "--layers", "0")
    assert code == 0, err
    assert "left out, as other copies of weights, parts of them, or links: adapter_config.json, model-0.gguf" in out
    assert "and 14 more" in out and err.count("adapter_config.json lies beside the weights") == 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not copied from the source" in card and "`pytorch_model.bin.gz`" in card and "`model-19.gguf`" in card
    assert len(json.loads((tmp_path / "out" / "laser.json").read_text())["left_out"]) == 22


def test_pickles_that_were_written_as_safetensors_are_not_called_left_out(
    pico: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    tensors = tensors_in(pico)
    for file in pico.glob("model*"):
        file.unlink()
    torch.save(tensors, pico / "pytorch_model.bin")
    assert write(pico, tmp_path / "out", [])["left_out"] == []
    assert load_as_transformers_does(tmp_path / "out")


def test_too_little_disk_is_said_before_anything_is_written(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # pyright: ignore
    with pytest.raises(OutputError, match=r"found 0.00 GB free, expected .* GB; free some space"):
        write(pico, tmp_path / "out", [])
    assert not looks_whole(tmp_path / "out")


@pytest.mark.parametrize("call", ["copy_file_range", "fsync"])
def test_disk_full_half_way_loses_nothing(
    pico: Path, tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    true, count = getattr(os, call), 0

    def full(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return true(*arguments)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OutputError, match=r"No space left on device; free some space .* --resume"):
            write(pico, out, [Q1, W2], calls)
    assert not looks_whole(out)
    write(pico, out, [Q1, W2], calls)
    assert sorted(calls) == sorted([Q1, W2])
    write(pico, tmp_path / "undisturbed", [Q1, W2])
    assert snapshot(out) == snapshot(tmp_path / "undisturbed")


def test_damaged_partial_is_noticed_and_made_again(pico: Path, tmp_path: Path) -> None:
    """The journal's promise is checked: bytes that a crash of the machine lost are computed again."""
    out, calls, checkpoint = tmp_path / "out", [], open_checkpoint(pico)

    def stop_after_first(names: list[str]) -> Generator[writer.New, None, None]:
        for item in halve(checkpoint, calls)(names):
            if len(calls) > 1:
                raise KeyboardInterrupt
            yield item

    touched = [f"model.layers.1.block_sparse_moe.experts.{e}.w1.weight" for e in range(4)]
    prepare_output(checkpoint, out, resume=False)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(checkpoint, out, matrices_of(checkpoint, touched), stop_after_first, describe, RUN)
    info = checkpoint.tensors[touched[0]]
    with (out / f"{info.shard}.partial").open("r+b") as file:
        file.seek(info.start)
        file.write(b"\0" * 16)
    write(pico, out, touched, calls)
    assert calls.count(touched[0]) == 2
    write(pico, tmp_path / "undisturbed", touched)
    assert snapshot(out) == snapshot(tmp_path / "undisturbed")


def test_finished_output_of_the_same_run_is_returned_and_of_another_refused(pico: Path, tmp_path: Path) -> None:
    first = write(pico, tmp_path / "out", [Q1])
    assert write(pico, tmp_path / "out", [Q1]) == first
    checkpoint = open_checkpoint(pico)
    with pytest.raises(OutputError, match="another run"):
        write_checkpoint(checkpoint, tmp_path / "out", [], halve(checkpoint), describe, {"kind": "other"})


@pytest.mark.parametrize("damage", [b'{"half', b"[1]\n{}\n", b"\xff\xfe\n", b'{"a": 1}'])
def test_journal_forgets_a_torn_tail_and_what_follows(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, RUN) as journal:
        journal.append({"matrix": "a"})
    whole = path.read_bytes()
    path.write_bytes(whole + damage)
    with Journal(path, RUN) as journal:
        assert list(journal.entries) == [{"matrix": "a"}]
        journal.append({"matrix": "b"})
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert all(line.pop("check") for line in lines) and lines == [RUN, {"matrix": "a"}, {"matrix": "b"}]


def test_journal_of_another_run_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "journal.jsonl", {"plan": "a"}).close()
    with pytest.raises(RecordError, match="belongs to another run: plan differ"):
        Journal(tmp_path / "journal.jsonl", {"plan": "b"})


def test_an_interrupted_output_is_not_whole(pico: Path, tmp_path: Path) -> None:
    def interrupt(names: list[str]) -> Generator[writer.New, None, None]:
        raise KeyboardInterrupt
        yield

    out, checkpoint = tmp_path / "out", open_checkpoint(pico)
    prepare_output(checkpoint, out, resume=False)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(checkpoint, out, matrices_of(checkpoint, [W2]), interrupt, describe, RUN)
    assert not looks_whole(out) and (out / JOURNAL).exists()
    with pytest.raises(LaserError):
        open_checkpoint(out)
