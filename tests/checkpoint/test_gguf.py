"""GGUF files, written here by the gguf package as llama.cpp's converter would: the same logits after laser convert."""

import json
import math
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
    split: int = 0,
    factors: dict[str, list[float]] | None = None,
    **meta: Any,
) -> Path:
    """A GGUF of `tensors` (the Hub's names); matrices of `kind`, vectors in float32; `split`: tensors per part;
    `factors`: of the rotary embedding, by tensor."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
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
        name = f"{architecture}.{key.replace('__', '.')}"
        writer.add_string(name, value) if isinstance(value, str) else writer.add_float32(name, value)
    for name, values in (factors or {}).items():
        writer.add_tensor(f"{name}.weight", np.array(values, dtype=np.float32))
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


@pytest.mark.slow
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
    assert run("convert", file, "-o", tmp_path / "out", "--output-dtype", "float16")[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] and config["torch_dtype"] == "float16" and config["vocab_size"] == VOCABULARY
    assert logits(tmp_path / "out").isfinite().all()
    code, _, err = run("convert", file, "-o", tmp_path / "other", "--output-dtype", "int8")
    assert code == 2 and "try --output-dtype float32, float16, bfloat16" in err


def cut_off(path: Path) -> None:
    path.write_bytes(write_gguf(path, dense_tensors(), experts=0).read_bytes()[:5000])


def other_shapes(path: Path) -> None:
    write_gguf(path, mixtral_tensors() | {"lm_head.weight": torch.ones(7, HIDDEN)})


def scaled_rotary(path: Path) -> None:
    write_gguf(path, dense_tensors(), experts=0, rope__scaling__type="yarn")


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


WIDTH_OF_HEAD = HIDDEN // HEADS


def llama3_factors(factor: float, base: float) -> list[float]:
    """What llama.cpp's converter writes for Llama 3.1's scaling: plain frequencies over transformers' scaled ones."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": base}
    inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](
        LlamaConfig(hidden_size=HIDDEN, num_attention_heads=HEADS, rope_parameters=scaling), None
    )
    plain = base ** -(torch.arange(0, WIDTH_OF_HEAD, 2) / WIDTH_OF_HEAD)
    return (plain / inverse).tolist()


def as_llama_cpp_turns(
    meta: dict[str, Any], freqs: list[float], positions: int, base: float = 10000.0
) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin (positions, width / 2) by llama.cpp's own steps: load_hparams, llama_context, rope_yarn.

    Loops over float64, pair by pair, in the names of its source.
    """
    kind = meta.get("rope__scaling__type", "linear")
    ropescale = meta.get("rope__scaling__factor", meta.get("rope__scale_linear", 0.0))
    freq_scale = 1.0 if ropescale == 0 or kind == "none" else 1 / ropescale
    n_ctx_orig, n_dims = int(meta.get("rope__scaling__original_context_length", 0)) or 128, WIDTH_OF_HEAD
    ext_factor, attn_factor = float(kind == "yarn"), meta.get("rope__scaling__attn_factor", 1.0)
    if ext_factor:
        factor = 1 / freq_scale
        attn_factor *= (1.0 if factor <= 1 else 0.1 * math.log(factor) + 1) / (1 + 0.1 * math.log(factor))

    def corr_dim(n_rot: float) -> float:
        return n_dims * math.log(n_ctx_orig / (n_rot * 2 * math.pi)) / (2 * math.log(base))

    fast, slow = meta.get("rope__scaling__yarn_beta_fast", 32.0), meta.get("rope__scaling__yarn_beta_slow", 1.0)
    low, high = max(0, math.floor(corr_dim(fast))), min(n_dims - 1, math.ceil(corr_dim(slow)))
    cos, sin = np.empty((positions, n_dims // 2)), np.empty((positions, n_dims // 2))
    for p in range(positions):
        for i in range(n_dims // 2):
            theta_extrap = p * base ** (-2 * i / n_dims) / freqs[i]
            theta, mscale = freq_scale * theta_extrap, attn_factor
            if ext_factor:
                ramp_mix = 1 - min(1, max(0, (i - low) / max(0.001, high - low)))
                theta = theta * (1 - ramp_mix) + theta_extrap * ramp_mix
                mscale *= 1 + 0.1 * math.log(1 / freq_scale)
            cos[p, i], sin[p, i] = math.cos(theta) * mscale, math.sin(theta) * mscale
    return cos, sin


SCALED: dict[str, tuple[dict[str, Any], dict[str, list[float]], str | None]] = {
    "nothing": ({}, {}, None),
    "no type is linear": ({"rope__scaling__factor": 4.0}, {}, "linear"),
    "linear": ({"rope__scaling__type": "linear", "rope__scaling__factor": 2.5}, {}, "linear"),
    "the old key": ({"rope__scale_linear": 8.0}, {}, "linear"),
    "the new key before the old": ({"rope__scale_linear": 8.0, "rope__scaling__factor": 2.0}, {}, "linear"),
    "a factor of 0 is none": ({"rope__scale_linear": 8.0, "rope__scaling__factor": 0.0}, {}, None),
    "none": ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, {}, None),
    "yarn": (
        {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 32.0},
        {},
        "yarn",
    ),
    "yarn of the context's length": ({"rope__scaling__type": "yarn", "rope__scaling__factor": 16.0}, {}, "yarn"),
    "yarn of a length of 0": (
        {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 0.0},
        {},
        "yarn",
    ),
    "yarn by 1": ({"rope__scaling__type": "yarn", "rope__scaling__factor": 1.0}, {}, None),
    "yarn with more": (
        {
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 4.0,
            "rope__scaling__attn_factor": 0.75,
            "rope__scaling__yarn_beta_fast": 4.0,
            "rope__scaling__yarn_beta_slow": 2.0,
        },
        {},
        "yarn",
    ),
    "attention alone": ({"rope__scaling__attn_factor": 1.25}, {}, "longrope"),
    "factors": ({}, {"rope_freqs": [1.0, 1.5, 2.0, 7.0]}, "longrope"),
    "factors of 1": ({}, {"rope_freqs": [1.0] * 4}, None),
    "factors, linear": ({"rope__scaling__factor": 2.0}, {"rope_freqs": [1.0, 1.5, 2.0, 7.0]}, "longrope"),
    "Llama 3.1": ({"rope__freq_base": 500000.0}, {"rope_freqs": llama3_factors(8.0, 500000.0)}, "llama3"),
    "Llama 3.2": ({"rope__freq_base": 500000.0}, {"rope_freqs": llama3_factors(32.0, 500000.0)}, "llama3"),
    "longrope": (
        {"rope__scaling__type": "longrope", "rope__scaling__attn_factor": 1.19},
        {"rope_factors_short": [1.0, 1.1, 1.2, 1.3], "rope_factors_long": [1.0, 2.0, 3.0, 4.0]},
        "longrope",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SCALED)
def test_rotary_scaling_turns_as_llama_cpp_does(tmp_path: Path, what: str) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from laser.checkpoint.convert import write_directory

    meta: Any
    meta, factors, kind = SCALED[what]
    base = meta.get("rope__freq_base", 10000.0)
    tensors = dense_tensors()
    file = write_gguf(tmp_path / "x.gguf", tensors, experts=0, factors=factors, **meta)
    seen = open_gguf(file)
    assert (seen.config.get("rope_scaling") or {}).get("rope_type") == kind
    write_directory(seen, tmp_path / "out")
    config: Any = AutoConfig.from_pretrained(tmp_path / "out")
    rotary = LlamaRotaryEmbedding(config)
    freqs = factors.get("rope_freqs") or factors.get("rope_factors_short") or [1.0] * (WIDTH_OF_HEAD // 2)
    cos, sin = as_llama_cpp_turns(meta, freqs, 128, base)
    for found, wanted in zip(rotary(torch.ones(1), torch.arange(128)[None]), (cos, sin), strict=True):
        assert np.allclose(found[0, :, : WIDTH_OF_HEAD // 2].numpy(), wanted, atol=2e-4)
    if kind is not None:
        plain, _ = as_llama_cpp_turns({}, [1.0] * 4, 128, base)
        assert not np.allclose(cos, plain, atol=1e-2)  # or nothing was tested


def test_longrope_changes_with_the_length(tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from laser.checkpoint.convert import write_directory

    factors = SCALED["longrope"][1]
    meta: Any = SCALED["longrope"][0] | {"rope__scaling__original_context_length": 64.0}
    write_directory(
        open_gguf(write_gguf(tmp_path / "x.gguf", dense_tensors(), experts=0, factors=factors, **meta)), tmp_path / "o"
    )
    config: Any = AutoConfig.from_pretrained(tmp_path / "o")
    rotary = LlamaRotaryEmbedding(config)
    for length, name in ((64, "rope_factors_short"), (65, "rope_factors_long")):
        found = rotary(torch.ones(1), torch.arange(length)[None])[0][0, :, :4].numpy()
        assert np.allclose(found, as_llama_cpp_turns(meta, factors[name], length)[0], atol=2e-4)


@pytest.mark.parametrize(
    ("meta", "factors", "message"),
    [
        ({"rope__scaling__type": "longrope"}, {"rope_factors_long": [1.0] * 4}, "needs the tensor rope_factors_short"),
        ({"rope__scaling__type": "longrope"}, {}, "needs the tensor rope_factors_long"),
        ({"rope__scaling__type": "su"}, {}, "rope scaling 'su' is not known"),
        ({"rope__scaling__factor": -2.0}, {}, "rope.scaling.factor is -2.0, expected a positive"),
        ({"rope__scaling__factor": math.nan}, {}, "rope.scaling.factor is nan"),
        ({"rope__scaling__factor": "4"}, {}, "rope.scaling.factor is '4'"),
        ({"rope__scaling__alpha": 3.0}, {}, "rope.scaling.alpha has no translation"),
        ({}, {"rope_freqs": [1.0] * 3}, "rope_freqs.weight has 3 values, expected 4"),
        ({}, {"rope_freqs": [1.0, 0.0, 1.0, 1.0]}, "rope_freqs.weight has 4 values, expected 4 above 0"),
        (
            {"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0},
            {"rope_freqs": [1.0, 2.0, 2.0, 2.0]},
            "'yarn' with rope_freqs.weight beside it has no translation",
        ),
        (
            {"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0, "rope__scaling__yarn_ext_factor": 0.5},
            {},
            "'yarn' with yarn_ext_factor 0.5 has no translation",
        ),
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 0.5}, {}, "'yarn' with a factor of 0.5 has no"),
    ],
)
def test_rotary_scaling_without_a_counterpart(
    tmp_path: Path, meta: dict[str, Any], factors: dict[str, list[float]], message: str
) -> None:
    file = write_gguf(tmp_path / "x.gguf", dense_tensors(), experts=0, factors=factors, **meta)
    with pytest.raises(CheckpointError, match=message):
        open_gguf(file)


def test_a_part_of_a_head_that_is_turned_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    numbers = {"block_count": 1, "context_length": 8, "embedding_length": 32, "feed_forward_length": 48}
    numbers |= {"attention.head_count": 2, "attention.key_length": 16, "rope.dimension_count": 8}
    for key, value in numbers.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.ones((4, 32), dtype=np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(CheckpointError, match="8 of 16 dimensions of a head are turned"):
        open_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.head_count", 0),
        ("attention.head_count", [2, 2]),  # one per layer
        ("attention.head_count_kv", [2, 1]),
        ("block_count", 1.0),
        ("expert_count", "two"),
        ("attention.layer_norm_rms_epsilon", "x"),
        ("attention.layer_norm_rms_epsilon", math.nan),
        ("rope.freq_base", "x"),
        ("rope.freq_base", 0.0),
        ("rope.freq_base", math.inf),
        ("attention.causal", False),
    ],
    ids=repr,
)
def test_metadata_that_are_no_numbers_are_refused_by_their_key(tmp_path: Path, key: str, value: Any) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    numbers: dict[str, Any] = {"block_count": 1, "context_length": 8, "embedding_length": 32}
    numbers |= {"feed_forward_length": 48, "attention.head_count": 2, "attention.layer_norm_rms_epsilon": 1e-5}
    kinds: dict[type, Any] = {
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
        bool: writer.add_bool,
    }
    for name, number in (numbers | {key: value}).items():
        kinds[type(number)](f"llama.{name}", number)
    writer.add_tensor("token_embd.weight", np.ones((4, 32), dtype=np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(CheckpointError, match=rf"llama.{key} is .*, expected a .*; download it again"):
        open_gguf(tmp_path / "x.gguf")


def test_a_name_that_counts_no_part_is_a_whole_file(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "x.gguf", dense_tensors(), experts=0)
    for name in ("x-00000-of-00000.gguf", "x-00003-of-00002.gguf"):
        assert open_gguf(whole.rename(tmp_path / name)).tensors.keys() == dense_tensors().keys()
        whole = tmp_path / name
    writer = gguf.GGUFWriter(tmp_path / "y.gguf", "llama")
    writer.add_string("split.no", "first")
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(CheckpointError, match=r"y\.gguf is part 'first' of 1 by its metadata"):
        open_gguf(tmp_path / "y.gguf")


def test_split_files_are_read_whole_by_any_part(tmp_path: Path, run: Callable[..., Any]) -> None:
    tensors = dense_tensors()
    write_gguf(tmp_path / "s.gguf", tensors, experts=0, split=7)
    parts = sorted(tmp_path.glob("s-*.gguf"))
    assert len(parts) == 5
    for i, part in enumerate((parts[0], parts[3])):
        assert run("convert", part, "-o", tmp_path / f"out{i}")[0] == 0
        made = open_checkpoint(tmp_path / f"out{i}")
        assert made.tensors.keys() == tensors.keys()
        assert all(torch.equal(made.read(name), W) for name, W in tensors.items())
    parts[2].rename(tmp_path / "away")
    code, _, err = run("convert", parts[1], "-o", tmp_path / "other")
    assert code == 1 and f"is one of 5 parts, and {parts[2].name} is missing" in err and "finish the download" in err
    parts[1].rename(parts[2])  # the right names, and one part in another's place
    (tmp_path / "away").rename(parts[1])
    code, _, err = run("convert", parts[0], "-o", tmp_path / "other")
    assert code == 1 and f"{parts[1].name} is part 3 of 5 by its metadata, expected 2 of 5" in err
    parts[0].rename(tmp_path / "whole.gguf")
    code, _, err = run("convert", tmp_path / "whole.gguf", "-o", tmp_path / "other")
    assert code == 1 and "whole.gguf is part 1 of 5 by its metadata, expected 1 of 1" in err


def test_parts_of_two_models_are_told_apart(tmp_path: Path) -> None:
    tensors = dense_tensors()
    write_gguf(tmp_path / "a.gguf", tensors, experts=0, split=14)
    (tmp_path / "b").mkdir()
    less = {name: W for name, W in tensors.items() if "layers.2.mlp.up" not in name}
    write_gguf(tmp_path / "b" / "a.gguf", less, experts=0, split=14)
    first = sorted(tmp_path.glob("a-*.gguf"))
    last = sorted((tmp_path / "b").glob("a-*.gguf"))[-1]
    assert last.name == first[-1].name
    last.replace(first[-1])
    with pytest.raises(CheckpointError, match=rf"found \d+ tensors in {len(first)} parts, .* expected {len(tensors)}"):
        open_gguf(first[0])


def test_a_file_without_a_name_of_its_own_is_known_by_its_first_bytes(tmp_path: Path, run: Callable[..., Any]) -> None:
    tensors = dense_tensors()
    blob = write_gguf(tmp_path / "x.gguf", tensors, experts=0).rename(tmp_path / "sha256-1f2e")
    code, _, err = run("scan", blob, "--dry-run")
    assert code == 1 and f"{blob} is a GGUF file" in err and f"`laser convert {blob} -o {blob}-hub`" in err
    assert run("convert", blob, "-o", f"{blob}-hub")[0] == 0
    assert run("scan", f"{blob}-hub", "--dry-run")[0] == 0
