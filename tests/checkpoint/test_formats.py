"""Folders and files that people bring and that are no checkpoint: each is named, and what it says to do can be done."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import mixtral_tensors

from laser.checkpoint.formats import FORMATS, what_lies_in
from laser.checkpoint.reader import open_checkpoint
from laser.errors import CheckpointError, first_line

LORA = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"})
CONFIG = '{"model_type": "llama"}'
# name -> (files of the folder, with their text where it matters; what must be said)
FOLDERS: dict[str, tuple[dict[str, str], str]] = {
    "peft": (
        {"adapter_config.json": LORA, "adapter_model.safetensors": ""},
        r"is a PEFT adapter \(LORA\) of org/base, .*PeftModel.from_pretrained\(m, '.*'\).merge_and_unload",
    ),
    "peft, as a pickle, with a config": (
        {"adapter_config.json": LORA, "adapter_model.bin": "", "config.json": CONFIG},
        r"is a PEFT adapter \(LORA\) of org/base",
    ),
    "peft without a base": ({"adapter_config.json": "[", "adapter_model.bin": ""}, "of a base that it does not name"),
    "prompt tuning": (
        {"adapter_config.json": LORA.replace("LORA", "PROMPT_TUNING"), "adapter_model.safetensors": ""},
        "changes no weights; give the base itself: org/base",
    ),
    "an adapter of MLX": ({"adapter_config.json": "{}", "adapters.safetensors": ""}, "mlx_lm.fuse --model BASE"),
    "an adapter's weights": ({"adapter_model.safetensors": ""}, "an adapter without its adapter_config.json"),
    "Meta's weights": ({"config.json": CONFIG, "consolidated.00.pth": ""}, "weights in Meta's own format"),
    "a trainer's output": (
        {f"checkpoint-{n}/{file}": CONFIG for n in (90, 500) for file in ("config.json", "model.safetensors")},
        r"is the output of a trainer: .*try \S+/checkpoint-500; there are 1 more",
    ),
    "a trainer's adapters": (
        {"checkpoint-5/adapter_config.json": LORA, "checkpoint-5/adapter_model.safetensors": ""},
        r"checkpoint-5 is a PEFT adapter \(LORA\) of org/base",
    ),
    "DeepSpeed": (
        {"latest": "", "global_step5/mp_rank_00_model_states.pt": "", "config.json": CONFIG},
        r"DeepSpeed: .*`python -m deepspeed.utils.zero_to_fp32 (\S+) \1-hub -t global_step5 --safe_serialization`",
    ),
    "ZeRO in a trainer's folder": (
        {"checkpoint-7/global_step7/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt": "", "config.json": CONFIG},
        r"zero_to_fp32 \S+/checkpoint-7 \S+ -t global_step7",
    ),
    "a folder of ZeRO itself": (
        {"zero_pp_rank_0_mp_rank_00_optim_states.pt": "", "mp_rank_00_model_states.pt": ""},
        r"zero_to_fp32 \S+/\.\. \S+ -t \S+ --safe",
    ),
    "FSDP": (
        {"optimizer_0/__0_0.distcp": "", "pytorch_model_fsdp_0/__0_0.distcp": "", "config.json": CONFIG},
        r"\(FSDP\): .*`accelerate merge-weights (\S+)/pytorch_model_fsdp_0 \1-hub`",
    ),
    "Megatron": ({"iter_0000010/mp_rank_00/model_optim_rng.pt": ""}, "a training state of Megatron-LM"),
    "NeMo 1": ({"llama.nemo": ""}, "a model of NeMo 1: found llama.nemo"),
    "NeMo 2": (
        {"context/model.yaml": "", "weights/__0_0.distcp": ""},
        r"`nemo llm export path=(\S+) target=hf output_path=\1-hub`",
    ),
    "GPT-NeoX": ({"global_step9/layer_00-model_00-model_states.pt": ""}, "convert_neox_to_hf"),
    "a lone shard": (
        {"model-00002-of-00005.safetensors": "", "config.json": CONFIG},
        "holds model-00002-of-00005.safetensors and no model.safetensors.index.json; "
        "4 of 5 shards are missing too, as model-00001-of-00005.safetensors",
    ),
    "a lone pickle of several": (
        {"pytorch_model-00003-of-00003.bin": "", "config.json": CONFIG},
        "no pytorch_model.bin.index.json; 2 of 3 shards are missing",
    ),
    "shards without an index": (
        {f"model-0000{n}-of-00002.safetensors": "" for n in (1, 2)} | {"config.json": CONFIG},
        "and no model.safetensors.index.json; finish",
    ),
    "a variant": (
        {"model.fp16.safetensors": "", "config.json": CONFIG},
        r"a variant only.*M.from_pretrained\('.*', variant='fp16', dtype='auto'\)",
    ),
    "a variant in pickles": ({"pytorch_model.bf16.bin": "", "config.json": CONFIG}, "variant='bf16'"),
    "TensorFlow": ({"tf_model.h5": "", "config.json": CONFIG}, "weights of TensorFlow: .*from_tf=True"),
    "Flax": ({"flax_model.msgpack": "", "config.json": CONFIG}, "weights of Flax: .*from_flax=True"),
    "TensorFlow 1": ({"bert_model.ckpt.index": "", "config.json": CONFIG}, "a checkpoint of TensorFlow"),
    "ONNX": ({"onnx/model.onnx": "", "config.json": CONFIG}, "an export to ONNX: .*start from the PyTorch"),
    "OpenVINO": ({"openvino_model.xml": "", "openvino_model.bin": "", "config.json": CONFIG}, "an export to OpenVINO"),
    "GGUF": ({"q8.gguf": "", "mmproj-f16.gguf": ""}, r"`laser convert (\S+)/q8.gguf -o \1-hub`, and give \1-hub"),
    "GGUF in pieces": ({"q8.gguf-split-a": "", "q8.gguf-split-b": ""}, "cat PIECES > model.gguf"),
    "MLX in NumPy": ({"weights.npz": "", "config.json": CONFIG}, "weights of MLX in NumPy's format"),
    "vLLM's shards": ({"model-rank-0-part-0.safetensors": "", "config.json": CONFIG}, "a sharded state of vLLM"),
    "another name": ({"mine.safetensors": "", "config.json": CONFIG}, r"`mv \S+/mine\.\w+ \S+/model.safetensors`"),
    "a Hub cache's folder": (
        {"snapshots/ab12/config.json": CONFIG, "snapshots/ab12/model.safetensors": "", "blobs/1": ""},
        r"is no checkpoint itself: .*try \S+/snapshots/ab12",
    ),
    "an archive": ({"model.tar.gz": ""}, "an archive: .*unpack it"),
    "packed weights": ({"model.safetensors.gz": "", "config.json": CONFIG}, "weights that are packed: .*gunzip"),
    "a pickle": ({"model.pkl": "", "config.json": CONFIG}, "a pickle, which may run any code"),
    "an unfinished output": ({"laser/journal.jsonl": "", "config.json": CONFIG}, "with --resume"),
    "an unfinished download": ({"model.safetensors.incomplete": "", "config.json": CONFIG}, "that is not finished"),
    "a trainer's state alone": ({"optimizer.bin": "", "config.json": CONFIG}, "holds neither model.safetensors.index"),
    "diffusers": ({"model_index.json": "{}", "unet/x.safetensors": ""}, "a pipeline of diffusers"),
}  # fmt: skip


def folder(path: Path, files: dict[str, str]) -> Path:
    path.mkdir()
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text or "x")
    return path


@pytest.mark.parametrize("what", FOLDERS)
def test_each_kind_of_folder_is_named(tmp_path: Path, what: str) -> None:
    files, message = FOLDERS[what]
    with pytest.raises(CheckpointError, match=message) as told:
        open_checkpoint(folder(tmp_path / "given", files))
    assert "\n" not in str(told.value)


def test_a_path_with_a_blank_and_a_quote_is_quoted_for_the_shell(tmp_path: Path) -> None:
    place = folder(tmp_path / "my model's $x", {"model.fp16.safetensors": "", "config.json": CONFIG})
    told = what_lies_in(place) or ""
    words = shlex.split(told[told.index("`") + 1 : told.rindex("`")])
    assert words[:2] == ["python", "-c"] and len(words) == 3
    assert compile(words[2], "command", "exec").co_consts and repr(str(place)) in words[2]


def test_an_adapters_base_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    hostile = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x\x1b[2J\n'; import os"})
    place = folder(tmp_path / "given", {"adapter_config.json": hostile})
    told = what_lies_in(place) or ""
    assert "\x1b" not in told and "\n" not in told
    command = shlex.split(told[told.index("`") + 1 : told.rindex("`")])[2]
    assert "import os" not in {line.strip() for line in command.split(";")}  # it stays inside a string
    compile(command, "command", "exec")


FILES: dict[str, tuple[bytes, str]] = {
    "config.json": (b"{}", r"is a file, expected a checkpoint directory; try \S+given$"),
    "model-00001-of-00002.safetensors": (b"", "is a file, expected a checkpoint directory"),
    "x.gguf": (b"GGUF", r"is a GGUF file, expected a checkpoint directory; try `laser convert (\S+)\.gguf -o \1`"),
    "x-00002-of-00003.gguf": (b"GGUF", r"`laser convert \S+ -o \S+given/x`, and give \S+given/x$"),
    "sha256-12": (b"GGUF\3\0\0\0", r"is a GGUF file, .*`laser convert (\S+) -o \1-hub`"),
    "last.ckpt": (b"PK", "a training state of Lightning"),
    "llama.nemo": (b"", "a model of NeMo 1"),
    "model.onnx": (b"", "an export to ONNX"),
    "weights.bin": (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS .*`git lfs pull`"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_in_place_of_a_folder(tmp_path: Path, name: str) -> None:
    data, message = FILES[name]
    (folder(tmp_path / "given", {}) / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "given" / name)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_no_damaged_download(make_pico: Callable[..., Path], name: str) -> None:
    path = make_pico(shards=1)
    (path / "model.safetensors").unlink()
    (path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n")
    with pytest.raises(CheckpointError, match=f"{name} is a pointer of Git LFS and not the file itself; run `git lfs"):
        open_checkpoint(path)


@pytest.mark.filterwarnings("ignore::laser.errors.DoubtWarning")  # vLLM would read others, or the name is unusual
def test_weights_by_their_right_names_win_over_what_lies_beside_them(make_pico: Callable[..., Path]) -> None:
    path = make_pico(shards=1)
    for name in ("x.gguf", "tf_model.h5", "adapter_config.json", "model.fp16.safetensors", "model.onnx"):
        (path / name).write_text("x")
    assert open_checkpoint(path).tensors.keys() == mixtral_tensors().keys()
    (path / "config.json").unlink()
    (path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*config.json"):
        open_checkpoint(path)


@pytest.mark.filterwarnings("ignore::laser.errors.DoubtWarning")  # vLLM would read others, or the name is unusual
@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.bin",
        "pytorch_model.fp16.bin",
        "mp_rank_00_model_states.pt",
        "model_optim_rng.pt",
        "optimizer.bin",
    ],
)
def test_a_pickle_that_is_no_model_is_never_read_as_one(make_pico: Callable[..., Path], name: str) -> None:
    path = make_pico(shards=1)
    (path / "model.safetensors").unlink()
    torch.save(mixtral_tensors(), path / name)  # which could be read
    with pytest.raises(CheckpointError):
        open_checkpoint(path)
    (path / name).rename(path / "model.pt")
    assert open_checkpoint(path).tensors.keys() == mixtral_tensors().keys()


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.what)
def test_rows_are_sentences_that_can_be_filled_in(row: Any) -> None:
    places = dict.fromkeys(("path", "name", "at", "parent", "base", "below", "out", "python"), "X")
    assert row.remedy.format(**places) and row.what and not row.remedy.endswith(".")
    compile(row.python.format(path="p", out="o", variant="fp16"), "command", "exec")


def test_messages_of_other_libraries_are_one_line() -> None:
    long = ValueError("\n\nModel type should be one of " + ", ".join(f"Model{n}Config" for n in range(300)) + "\nmore")
    assert first_line(long).startswith("Model type should be one of Model0Config") and len(first_line(long)) < 210
    assert first_line(long).endswith(" ...") and "\n" not in first_line(long)
    assert first_line(OSError()) == "OSError" and first_line(KeyError("short")) == "'short'"
