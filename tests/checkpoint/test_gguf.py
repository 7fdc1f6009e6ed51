"""GGUF files, written here by the gguf package as llama.cpp's converter would: the same logits after laser convert."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import (
    EXPERTS,
    HIDDEN,
    LAYERS,
    VOCABULARY,
    WIDTH,
    mixtral_config,
    mixtral_tensors,
    write_checkpoint_directory,
)

from laser.checkpoint.gguf import open_gguf
from laser.checkpoint.reader import open_checkpoint
from laser.errors import CheckpointError

HEADS, KEY_VALUE = 4, 2
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
WORDS = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}


def pairs_from_halves(W: np.ndarray, heads: int) -> np.ndarray:
    """Row by row, as llama.cpp wants q and k: row i of a head's first half, then row i of its second half."""
    width, rows = W.shape[0] // heads, []
    for head in range(heads):
        for i in range(width // 2):
            rows += [W[head * width + i], W[head * width + width // 2 + i]]
    return np.stack(rows)


def write_gguf(
    path: Path,
    tensors: dict[str, torch.Tensor],
    kind: str = "F32",
    experts: int = EXPERTS,
    architecture: str = "llama",
    **meta: Any,
) -> Path:
    """A GGUF of `tensors` (the Hub's names); matrices of `kind`, vectors in float32."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH if experts else 64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    for key, value in meta.items():
        writer.add_string(f"{architecture}.{key.replace('_', '.')}", value)
    stacks: dict[str, list[np.ndarray]] = {}
    for name, tensor in tensors.items():
        W = tensor.float().numpy()
        if name in TOP:
            add(writer, f"{TOP[name]}.weight", W, kind)
            continue
        _, _, layer, rest = name.removesuffix(".weight").split(".", 3)
        if ".experts." in rest:
            stacks.setdefault(f"blk.{layer}.{WORDS[rest.split('.')[-1]]}.weight", []).append(W)
            continue
        if rest.endswith(("q_proj", "k_proj")):
            W = pairs_from_halves(W, HEADS if rest.endswith("q_proj") else KEY_VALUE)
        add(writer, f"blk.{layer}.{NAMES[rest]}.weight", W, kind)
    for name, matrices in stacks.items():
        add(writer, name, np.stack(matrices), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, name: str, W: np.ndarray, kind: str) -> None:
    if W.ndim < 2 or kind == "F32":
        writer.add_tensor(name, np.ascontiguousarray(W, dtype=np.float32))
    else:
        which = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(W, dtype=np.float32), which), raw_dtype=which)


def dense_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, W in mixtral_tensors(seed, torch.float32).items():
        if "block_sparse_moe.experts" not in name and "gate" not in name:
            made[name] = W
    for layer in range(LAYERS):
        for role, shape in {"gate": (64, HIDDEN), "up": (64, HIDDEN), "down": (HIDDEN, 64)}.items():
            made[f"model.layers.{layer}.mlp.{role}_proj.weight"] = 0.1 * torch.randn(*shape, generator=generator)
    return made


def logits(path: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits[0]


def original(path: Path, tensors: dict[str, torch.Tensor], dense: bool) -> Path:
    config = mixtral_config() | {"torch_dtype": "float32"}
    if dense:
        config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "intermediate_size": 64}
        del config["num_local_experts"], config["num_experts_per_tok"]
    return write_checkpoint_directory(path, tensors, config, shards=1)


@pytest.mark.parametrize("dense", [False, True], ids=["mixtral", "llama"])
def test_float32_gives_the_same_tensors_and_logits(tmp_path: Path, run: Callable[..., Any], dense: bool) -> None:
    tensors = dense_tensors() if dense else mixtral_tensors(dtype=torch.float32)
    source = original(tmp_path / "source", tensors, dense)
    file = write_gguf(tmp_path / "pico.gguf", tensors, experts=0 if dense else EXPERTS)
    code, printed, err = run("convert", file, "-o", tmp_path / "out")
    assert code == 0, err
    assert f"{len(tensors)} tensors" in printed and "no tokenizer could be made" in printed
    made = open_checkpoint(tmp_path / "out")
    assert made.tensors.keys() == tensors.keys()
    assert all(torch.equal(made.read(name), W) for name, W in tensors.items())
    assert torch.equal(logits(tmp_path / "out"), logits(source))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and config["torch_dtype"] == "float32" and not config["tie_word_embeddings"]


@pytest.mark.parametrize(("kind", "near"), [("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 4e-2)])
def test_other_types_come_near(tmp_path: Path, kind: str, near: float) -> None:
    tensors = dense_tensors()
    file = write_gguf(tmp_path / "pico.gguf", tensors, kind, experts=0)
    exact = open_gguf(file, "float32")
    from laser.checkpoint.convert import write_directory

    write_directory(exact, tmp_path / "out")
    wanted = logits(original(tmp_path / "source", tensors, dense=True))
    assert (logits(tmp_path / "out") - wanted).norm() < near * wanted.norm()
    kept = {info.dtype for shard in open_gguf(file).shards for info in shard.tensors}
    assert kept == {kind if kind != "Q8_0" else "BF16"}
    made = open_checkpoint(tmp_path / "out")
    name = "model.layers.1.self_attn.v_proj.weight"
    which = gguf.GGMLQuantizationType[kind]
    there_and_back = gguf.quants.dequantize(gguf.quants.quantize(tensors[name].numpy(), which), which)
    assert np.array_equal(made.read(name).numpy(), there_and_back)


def test_tied_embeddings_and_a_bad_dtype(tmp_path: Path, run: Callable[..., Any]) -> None:
    tensors = dense_tensors()
    del tensors["lm_head.weight"]
    file = write_gguf(tmp_path / "tied.gguf", tensors, experts=0)
    assert run("convert", file, "-o", tmp_path / "out", "--dtype", "float16")[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] and config["torch_dtype"] == "float16" and config["vocab_size"] == VOCABULARY
    assert logits(tmp_path / "out").isfinite().all()
    code, _, err = run("convert", file, "-o", tmp_path / "other", "--dtype", "int8")
    assert code == 2 and "try --dtype float32, float16, bfloat16" in err


def cut_off(path: Path) -> None:
    path.write_bytes(write_gguf(path, dense_tensors(), experts=0).read_bytes()[:5000])


def other_shapes(path: Path) -> None:
    write_gguf(path, mixtral_tensors() | {"lm_head.weight": torch.ones(7, HIDDEN)})


def scaled_rotary(path: Path) -> None:
    write_gguf(path, dense_tensors(), experts=0, rope_scaling_type="yarn")


def strange_tensor(path: Path) -> None:
    tensors = dense_tensors()
    write_gguf(path, {**tensors, "model.layers.0.input_layernorm.bias": torch.ones(HIDDEN)}, experts=0)


NAMES["input_layernorm.bias"] = "attn_sub_norm"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda p: p.write_text("no model"), "is no GGUF file"),
    "empty": (lambda p: p.write_bytes(b""), "is no GGUF file"),
    "cut off": (cut_off, "cannot be read"),
    "another architecture": (lambda p: write_gguf(p, {}, architecture="mamba"), "architecture is 'mamba', expected"),
    "no tensors": (lambda p: write_gguf(p, {}), "holds no token_embd.weight|cannot be read"),
    "a tensor less": (
        lambda p: write_gguf(p, {k: v for k, v in dense_tensors().items() if "1.mlp.up" not in k}, experts=0),
        r"layers.1.mlp.up_proj.weight has shape None, expected \(64, 32\)",
    ),
    "other shapes": (other_shapes, "lm_head.weight has shape"),
    "unknown tensor": (strange_tensor, "attn_sub_norm.weight has no translation"),
    "scaled rotary": (scaled_rotary, "rope scaling 'yarn'"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_translated_is_refused(tmp_path: Path, what: str, run: Callable[..., Any]) -> None:
    attack, message = BROKEN[what]
    attack(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match=message):
        open_gguf(tmp_path / "x.gguf")
    assert run("convert", tmp_path / "x.gguf", "-o", tmp_path / "out")[0] == 1 and not (tmp_path / "out").exists()
