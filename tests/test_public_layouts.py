"""Public checkpoints as their files lie on the Hub, made small: cut is what transformers loads, or it is refused.

Each layout names the model that it is taken from. The weights are random; names, files and configs are the model's own.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from conftest import sampled
from families import DEEPSEEK, SIZES
from safetensors.torch import load_file, save_file

import laser
from laser.errors import LaserError

Tensors = dict[str, torch.Tensor]
BERT = {key: SIZES[key] for key in SIZES if key not in ("num_key_value_heads", "bos_token_id", "eos_token_id")}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHER = b"the same weights in another format, not reduced"


@cache
def _made(auto: str, kind: str, entries: str) -> tuple[dict[str, Any], Tensors]:
    config = transformers.AutoConfig.for_model(kind, **json.loads(entries))
    torch.manual_seed(0)
    model: Any = getattr(transformers, auto).from_config(config, dtype=torch.float32)
    for x in model.parameters():
        x.data.copy_(torch.randn(x.shape) * 0.3)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return json.loads(Path(folder, "config.json").read_text()), load_file(Path(folder, "model.safetensors"))


def made(kind: str, auto: str = "AutoModelForCausalLM", **entries: Any) -> tuple[dict[str, Any], Tensors]:
    """Config and tensors as transformers' own class saves them, under the Hub's names."""
    config, tensors = _made(auto, kind, json.dumps(entries))
    return dict(config), {name: x.clone() for name, x in tensors.items()}


def M(*shape: int) -> torch.Tensor:
    return 0.3 * torch.randn(*shape)


def lay(path: Path, files: Mapping[str, Any]) -> None:
    """Files under `path`: tensors as safetensors or a pickle by their suffix, texts and bytes as they are, or JSON."""
    for name, content in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif file.suffix == ".safetensors":
            save_file({key: x.contiguous() for key, x in content.items()}, file, {"format": "pt"})
        elif file.suffix in (".bin", ".pt", ".pth"):
            torch.save(content, file)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content))


def sharded(tensors: Tensors, stem: str = "model", suffix: str = "safetensors") -> dict[str, Any]:
    """Two shards and their index."""
    names = list(tensors)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    files = [f"{stem}-{number:05d}-of-00002.{suffix}" for number in (1, 2)]
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": weight_map}
    found: dict[str, Any] = {f: {n: tensors[n] for n in part} for f, part in zip(files, parts, strict=True)}
    return found | {f"{stem}.{suffix}.index.json": index}


@dataclass(frozen=True)
class Layout:
    """files: what lies there. cut: how many matrices are reduced by default, or refused: the words of the refusal.

    auto: transformers' class that loads it; None where transformers cannot, so that nothing is compared.
    left, travels: files that must not and must be in the output. untouched: expressions of names that must stay.
    """

    model: str
    files: Callable[[], dict[str, Any]]
    cut: int = 0
    refused: str = ""
    auto: str | None = "AutoModelForCausalLM"
    left: tuple[str, ...] = ()
    travels: tuple[str, ...] = ()
    untouched: tuple[str, ...] = ()


def llama2() -> dict[str, Any]:
    config, t = made("llama", **SIZES)
    other = {name: x + 1 for name, x in t.items()}
    return {"config.json": config, **sharded(t), **sharded(other, "pytorch_model", "bin"), "USE_POLICY.md": "terms"}


def llama3() -> dict[str, Any]:
    config, t = made("llama", **SIZES)
    original = {
        "original/params.json": {"dim": 32},
        "original/consolidated.00.pth": OTHER,
        "original/tokenizer.model": b"t",
    }
    return {"config.json": config, **sharded(t), **original}


def mistral_v03() -> dict[str, Any]:
    config, t = made("mistral", **SIZES)
    return {
        "config.json": config,
        **sharded(t),
        "params.json": {"dim": 32},
        "consolidated.safetensors": {"x": M(4, 4)},
        "tokenizer.model.v3": b"t",
    }


def gpt2() -> dict[str, Any]:
    config, t = made("gpt2", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    t = {name.removeprefix("transformer."): x for name, x in t.items()}
    t |= {f"h.{i}.attn.bias": torch.tril(torch.ones(1, 1, 64, 64)) for i in range(2)}
    others = ("64.tflite", "flax_model.msgpack", "rust_model.ot", "tf_model.h5", "onnx/decoder_model.onnx")
    return {"config.json": config, "model.safetensors": t, "pytorch_model.bin": t, **dict.fromkeys(others, OTHER)}


def bert() -> dict[str, Any]:
    config, t = made("bert", "AutoModelForMaskedLM", **BERT)
    renamed = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for n, x in t.items()
    }
    renamed["cls.seq_relationship.weight"] = M(2, 32)
    return {
        "config.json": config,
        "model.safetensors": renamed,
        "coreml/fill-mask/float32_model.mlpackage/Data/weight.bin": OTHER,
    }


def minilm() -> dict[str, Any]:
    config, t = made("bert", "AutoModel", **BERT)
    t["embeddings.position_ids"] = torch.arange(64)[None]
    modules = [
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    others = ("onnx/model.onnx", "openvino/openvino_model.bin", "rust_model.ot", "tf_model.h5", "pytorch_model.bin")
    return {
        "config.json": config,
        "model.safetensors": t,
        "modules.json": modules,
        "1_Pooling/config.json": {},
        "data_config.json": [],
        **dict.fromkeys(others, OTHER),
    }


def gemma() -> dict[str, Any]:
    config, t = made("gemma", **SIZES, head_dim=8)
    return {"config.json": config, **sharded(t), "gemma-2b.gguf": OTHER}


def bloom() -> dict[str, Any]:
    config, t = made("bloom", vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    t = {name.removeprefix("transformer."): x for name, x in t.items() if name != "lm_head.weight"}
    return {"config.json": config, "model.safetensors": t, "onnx/decoder_model.onnx_data": OTHER}


def opt() -> dict[str, Any]:
    config, t = made(
        "opt",
        **{
            k: v
            for k, v in SIZES.items()
            if k
            in (
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "max_position_embeddings",
                "pad_token_id",
            )
        },
        ffn_dim=48,
        word_embed_proj_dim=32,
    )
    t = {name.removeprefix("model."): x for name, x in t.items() if name != "lm_head.weight"}
    return {"config.json": config, "pytorch_model.bin": t, "flax_model.msgpack": OTHER, "tf_model.h5": OTHER}


def pythia() -> dict[str, Any]:
    config, t = made("gpt_neox", **{k: v for k, v in SIZES.items() if k != "num_key_value_heads"})
    for layer in range(2):
        at = f"gpt_neox.layers.{layer}.attention."
        t |= {
            at + "bias": torch.ones(1, 1, 64, 64, dtype=torch.bool),
            at + "masked_bias": torch.tensor(-1e9),
            at + "rotary_emb.inv_freq": torch.ones(1),
        }
    return {"config.json": config, "model.safetensors": t, "pytorch_model.bin": OTHER}


def t5() -> dict[str, Any]:
    config, t = made(
        "t5",
        "AutoModelForSeq2SeqLM",
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return {"config.json": config, "model.safetensors": t, "flax_model.msgpack": OTHER, "spiece.model": b"s"}


def whisper() -> dict[str, Any]:
    entries = {
        "vocab_size": 64,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "num_mel_bins": 8,
        "max_source_positions": 16,
        "max_target_positions": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }
    config, t = made("whisper", "AutoModelForSpeechSeq2Seq", **entries)
    fp32 = {f"model.fp32-0000{i}-of-00002.safetensors": OTHER for i in (1, 2)}
    index = {"metadata": {}, "weight_map": dict.fromkeys(t, "model.fp32-00001-of-00002.safetensors")}
    return {
        "config.json": config,
        "model.safetensors": t,
        **fp32,
        "model.safetensors.index.fp32.json": index,
        "pytorch_model.fp32-00001-of-00002.bin": OTHER,
    }


def clip() -> dict[str, Any]:
    text = TOWER | {"vocab_size": 64, "max_position_embeddings": 16, "projection_dim": 32}
    vision = TOWER | {"image_size": 28, "patch_size": 14, "projection_dim": 32}
    config, t = made("clip", "AutoModel", text_config=text, vision_config=vision, projection_dim=32)
    return {"config.json": config, "pytorch_model.bin": t, "tf_model.h5": OTHER}


def llava() -> dict[str, Any]:
    vision = TOWER | {"image_size": 28, "patch_size": 14, "model_type": "clip_vision_model"}
    config, t = made(
        "llava",
        "AutoModelForImageTextToText",
        text_config=SIZES | {"model_type": "llama"},
        vision_config=vision,
        image_token_index=5,
    )
    return {"config.json": config, **sharded(t)}


def e5_mistral() -> dict[str, Any]:
    config, t = made("mistral", "AutoModel", **SIZES)
    lora = {"lora/adapter_config.json": {"base_model_name_or_path": "x"}, "lora/adapter_model.bin": OTHER}
    modules = [{"idx": 0, "path": "", "type": "T"}, {"idx": 1, "path": "1_Pooling", "type": "P"}]
    return {"config.json": config, **sharded(t), **lora, "modules.json": modules, "1_Pooling/config.json": {}}


def bge_m3() -> dict[str, Any]:
    config, t = made("xlm-roberta", "AutoModel", **BERT)
    heads = {"colbert_linear.pt": {"weight": M(32, 32)}, "sparse_linear.pt": {"weight": M(1, 32)}}
    return {
        "config.json": config,
        "pytorch_model.bin": t,
        **heads,
        "onnx/model.onnx": OTHER,
        "onnx/model.onnx_data": OTHER,
        "modules.json": [{"path": "1_Pooling"}],
        "1_Pooling/config.json": {},
    }


def chatglm() -> dict[str, Any]:
    config = {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "num_layers": 2,
        "hidden_size": 32,
        "padded_vocab_size": 64,
        "num_attention_heads": 4,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "kv_channels": 8,
        "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMModel"},
    }
    t = {
        "transformer.embedding.word_embeddings.weight": M(64, 32),
        "transformer.output_layer.weight": M(64, 32),
        "transformer.rotary_pos_emb.inv_freq": M(4),
        "transformer.encoder.final_layernorm.weight": M(32),
    }
    for layer in range(2):
        at = f"transformer.encoder.layers.{layer}."
        t |= {
            at + "self_attention.query_key_value.weight": M(64, 32),
            at + "self_attention.dense.weight": M(32, 32),
            at + "mlp.dense_h_to_4h.weight": M(96, 32),
            at + "mlp.dense_4h_to_h.weight": M(32, 48),
        }
    return {"config.json": config, "model.safetensors": t, "modeling_chatglm.py": "raise SystemExit('never run')"}


def phi4_multimodal() -> dict[str, Any]:
    config = {"model_type": "phi4mm", "architectures": ["Phi4MMForCausalLM"]} | SIZES
    t: Tensors = {
        "model.embed_tokens.weight": M(64, 32),
        "model.norm.weight": M(32),
        "model.embed_tokens_extend.image_embed.img_processor.encoder.layers.0.self_attn.q_proj.weight": M(32, 32),
    }
    for layer in range(2):
        at = f"model.layers.{layer}."
        for name, shape in {"self_attn.o_proj": (32, 32), "mlp.down_proj": (32, 48)}.items():
            t[f"{at}{name}.base_layer.weight"] = M(*shape)
            for modality in ("vision", "speech"):
                t[f"{at}{name}.lora_A.{modality}.weight"], t[f"{at}{name}.lora_B.{modality}.weight"] = (
                    M(4, shape[1]),
                    M(shape[0], 4),
                )
    return {
        "config.json": config,
        **sharded(t),
        "vision-lora/adapter_config.json": {},
        "vision-lora/adapter_model.safetensors": {"x": M(2, 2)},
    }


def mamba_original() -> dict[str, Any]:
    t = {"backbone.embedding.weight": M(64, 32), "backbone.norm_f.weight": M(32), "lm_head.weight": M(64, 32)}
    for layer in range(2):
        at = f"backbone.layers.{layer}.mixer."
        t |= {
            at + "in_proj.weight": M(128, 32),
            at + "conv1d.weight": M(64, 1, 4),
            at + "x_proj.weight": M(18, 64),
            at + "dt_proj.weight": M(64, 2),
            at + "A_log": M(64, 8),
            at + "D": M(64),
            at + "out_proj.weight": M(32, 64),
        }
    return {"config.json": {"d_model": 32, "n_layer": 2, "vocab_size": 64, "ssm_cfg": {}}, "pytorch_model.bin": t}


def mlx() -> dict[str, Any]:
    config, t = made("llama", **SIZES)
    packed: Tensors = {}
    for name, x in t.items():
        if x.dim() == 2:
            packed |= {
                name: torch.zeros(x.shape[0], 4, dtype=torch.uint32),
                name.replace("weight", "scales"): M(x.shape[0], 1),
                name.replace("weight", "biases"): M(x.shape[0], 1),
            }
        else:
            packed[name] = x
    return {"config.json": config | {"quantization": {"group_size": 32, "bits": 4}}, "model.safetensors": packed}


def fp8_dynamic() -> dict[str, Any]:
    config, t = made("llama", **SIZES)
    t = {n: x.to(torch.float8_e4m3fn) if "proj" in n else x for n, x in t.items()}
    t |= {n.replace("weight", "weight_scale"): torch.ones(x.shape[0], 1) for n, x in t.items() if "proj" in n}
    how = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}
    return {"config.json": config | {"quantization_config": how}, **sharded(t), "recipe.yaml": "x: 1\n"}


def sdxl() -> dict[str, Any]:
    return {
        "model_index.json": {"_class_name": "StableDiffusionXLPipeline"},
        "unet/config.json": {},
        "unet/diffusion_pytorch_model.safetensors": {"x": M(4, 4)},
        "sd_xl_base_1.0.safetensors": {"x": M(4, 4)},
    }


def deepseek_v3() -> dict[str, Any]:
    config, t = made("deepseek_v3", **SIZES | DEEPSEEK)
    extra = {name.replace("layers.1.", "layers.2."): x.clone() for name, x in t.items() if "layers.1." in name}
    at = "model.layers.2."
    extra |= {
        at + "eh_proj.weight": M(32, 64),
        at + "enorm.weight": M(32),
        at + "hnorm.weight": M(32),
        at + "shared_head.norm.weight": M(32),
        at + "shared_head.head.weight": M(64, 32),
        at + "embed_tokens.weight": M(64, 32),
    }
    config |= {"num_nextn_predict_layers": 1, "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}
    return {
        "config.json": config,
        **sharded(t | extra),
        "inference/model.py": "x = 1\n",
        "configuration_deepseek.py": "x = 1\n",
    }


def olmo_original() -> dict[str, Any]:
    t = {"model.transformer.wte.weight": M(64, 32), "model.transformer.ff_out.weight": M(64, 32)}
    for layer in range(2):
        at = f"model.transformer.blocks.{layer}."
        t |= {
            at + "att_proj.weight": M(96, 32),
            at + "attn_out.weight": M(32, 32),
            at + "ff_proj.weight": M(96, 32),
            at + "ff_out.weight": M(32, 48),
        }
    config = {"model_type": "hf_olmo", "d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 64}
    return {"config.json": config, "model.safetensors": t}


def trainer_output() -> dict[str, Any]:
    config, t = made("qwen2", **SIZES)
    state = {
        "optimizer.pt": OTHER,
        "scheduler.pt": OTHER,
        "rng_state.pth": OTHER,
        "training_args.bin": OTHER,
        "trainer_state.json": {},
        "checkpoint-500/model.safetensors": t,
        "checkpoint-500/config.json": config,
        "checkpoint-500/optimizer.pt": OTHER,
        "runs/events.out.tfevents.1": OTHER,
    }
    return {"config.json": config, "model.safetensors": t, **state}


def falcon() -> dict[str, Any]:
    config, t = made(
        "falcon",
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        multi_query=True,
        parallel_attn=True,
        new_decoder_architecture=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    code = {"modeling_falcon.py": "raise SystemExit('never run')", "handler.py": "x = 1\n"}
    return {
        "config.json": config,
        **sharded(t),
        **sharded(t, "pytorch_model", "bin"),
        **code,
        "coreml/text.mlpackage/weight.bin": OTHER,
    }


def gtr_t5() -> dict[str, Any]:
    config, t = made(
        "t5", "AutoModelForTextEncoding", vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    )
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    dense = {"2_Dense/config.json": {"in_features": 32}, "2_Dense/pytorch_model.bin": {"linear.weight": M(24, 32)}}
    return {"config.json": config, "model.safetensors": t, "modules.json": modules, **dense, "rust_model.ot": OTHER}


def gptj() -> dict[str, Any]:
    config, t = made("gptj", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
    for layer in range(2):
        at = f"transformer.h.{layer}.attn."
        t |= {at + "bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8), at + "masked_bias": torch.tensor(-1e9)}
    others = dict.fromkeys(("flax_model.msgpack", "tf_model.h5"), OTHER)
    return {"config.json": config, "pytorch_model.bin": t, **others, "merges.txt": "a b"}


def gemma3() -> dict[str, Any]:
    text = SIZES | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    vision = TOWER | {"image_size": 28, "patch_size": 14}
    config, t = made(
        "gemma3", "AutoModelForImageTextToText", text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    return {"config.json": config, **sharded(t), "processor_config.json": {}, "added_tokens.json": {}}


def modernbert() -> dict[str, Any]:
    config, t = made("modernbert", "AutoModelForMaskedLM", **BERT)
    onnx = {f"onnx/model{kind}.onnx": OTHER for kind in ("", "_fp16", "_q4f16")}
    return {"config.json": config, "model.safetensors": t, "pytorch_model.bin": t, **onnx}


def gpt_oss() -> dict[str, Any]:
    t: Tensors = {"model.embed_tokens.weight": M(64, 32), "model.layers.0.self_attn.q_proj.weight": M(32, 32)}
    for name in ("gate_up_proj", "down_proj"):
        at = f"model.layers.0.mlp.experts.{name}"
        t |= {f"{at}_blocks": torch.zeros(4, 32, 1, 16, dtype=torch.uint8), f"{at}_bias": M(4, 32)}
        t[f"{at}_scales"] = torch.zeros(4, 32, 1, dtype=torch.uint8)
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}} | SIZES
    return {"config.json": config, **sharded(t), "original/model.safetensors": {"x": M(4, 4)}, "metal/model.bin": OTHER}


def gguf_only() -> dict[str, Any]:
    files = {f"llama-2-7b.{kind}.gguf": OTHER for kind in ("Q2_K", "Q4_K_M", "Q8_0")}
    return {"config.json": {"model_type": "llama"}, "USE_POLICY.md": "terms", **files}


def qlora() -> dict[str, Any]:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "mistralai/Mistral-7B-v0.1", "r": 16}
    weights = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": M(4, 32)}
    state = {"training_args.bin": OTHER, "trainer_state.json": {}, "runs/events.out.tfevents.1": OTHER}
    return {
        "config.json": {"model_type": "mistral"} | SIZES,
        "adapter_config.json": adapter,
        "adapter_model.safetensors": weights,
        **state,
    }


ENCODER_LAYER = 6  # q, k, v, o and two of the MLP
LLAMA_LAYER = 7
LAYOUTS = (
    Layout(
        "meta-llama/Llama-2-7b-hf: shards and pickled shards",
        llama2,
        2 * LLAMA_LAYER,
        left=("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"),
        travels=("USE_POLICY.md",),
    ),
    Layout(
        "meta-llama/Meta-Llama-3-8B: original/ beside", llama3, 2 * LLAMA_LAYER, left=("original/consolidated.00.pth",)
    ),
    Layout(
        "mistralai/Mistral-7B-Instruct-v0.3: both formats",
        mistral_v03,
        2 * LLAMA_LAYER,
        left=("consolidated.safetensors",),
        travels=("tokenizer.model.v3",),
    ),
    Layout(
        "openai-community/gpt2: no prefix, saved masks, seven formats",
        gpt2,
        2 * 6,
        left=(
            "64.tflite",
            "flax_model.msgpack",
            "rust_model.ot",
            "tf_model.h5",
            "onnx/decoder_model.onnx",
            "pytorch_model.bin",
        ),
    ),
    Layout("google-bert/bert-base-uncased: gamma and beta", bert, 2 * ENCODER_LAYER, auto="AutoModelForMaskedLM"),
    Layout(
        "sentence-transformers/all-MiniLM-L6-v2: modules",
        minilm,
        2 * ENCODER_LAYER,
        auto="AutoModel",
        left=("onnx/model.onnx", "openvino/openvino_model.bin", "tf_model.h5"),
        travels=("modules.json", "1_Pooling/config.json"),
    ),
    Layout("google/gemma-2b: a GGUF beside", gemma, 2 * LLAMA_LAYER, left=("gemma-2b.gguf",)),
    Layout("bigscience/bloom-560m: no prefix, fused heads", bloom, 2 * 6, left=("onnx/decoder_model.onnx_data",)),
    Layout("facebook/opt-125m: a pickle without prefix", opt, 2 * ENCODER_LAYER, left=("flax_model.msgpack",)),
    Layout("EleutherAI/pythia-70m: saved buffers", pythia, 2 * 6, left=("pytorch_model.bin",)),
    Layout(
        "google/flan-t5-small: encoder and decoder",
        t5,
        2 * 7 + 2 * 11,
        auto="AutoModelForSeq2SeqLM",
        travels=("spiece.model",),
        untouched=(r".*relative_attention_bias.*",),
    ),
    Layout(
        "openai/whisper-tiny: fp32 variant beside",
        whisper,
        -1,
        auto="AutoModelForSpeechSeq2Seq",
        left=("model.fp32-00001-of-00002.safetensors", "model.safetensors.index.fp32.json"),
    ),
    Layout("openai/clip-vit-base-patch32: two towers", clip, -1, auto="AutoModel", untouched=(r"vision_model\..*",)),
    Layout(
        "llava-hf/llava-1.5-7b-hf: a vision tower",
        llava,
        2 * LLAMA_LAYER,
        auto="AutoModelForImageTextToText",
        untouched=(r".*vision_tower.*", r".*multi_modal_projector.*"),
    ),
    Layout(
        "intfloat/e5-mistral-7b-instruct: no prefix, no head, an adapter beside",
        e5_mistral,
        2 * LLAMA_LAYER,
        auto="AutoModel",
        travels=("1_Pooling/config.json", "lora/adapter_model.bin", "lora/adapter_config.json"),
    ),
    Layout(
        "BAAI/bge-m3: pickled heads beside",
        bge_m3,
        2 * ENCODER_LAYER,
        auto="AutoModel",
        left=("onnx/model.onnx", "onnx/model.onnx_data", "colbert_linear.pt"),
        travels=("1_Pooling/config.json",),
    ),
    Layout(
        "THUDM/chatglm3-6b: an architecture of its own code",
        chatglm,
        -1,
        auto=None,
        travels=("modeling_chatglm.py",),
        untouched=(r".*(embedding|output_layer).*",),
    ),
    Layout(
        "microsoft/Phi-4-multimodal-instruct: adapters inside",
        phi4_multimodal,
        -1,
        auto=None,
        travels=("vision-lora/adapter_model.safetensors",),
        untouched=(r".*lora_.*", r".*img_processor.*", r".*embed.*"),
    ),
    Layout(
        "state-spaces/mamba-2.8b: no model_type",
        mamba_original,
        -1,
        auto=None,
        untouched=(r".*(dt_proj|x_proj|A_log|conv1d|embedding|lm_head).*",),
    ),
    Layout("mlx-community: packed uint32", mlx, refused="packed"),
    Layout("neuralmagic, FP8 dynamic: scales per row", fp8_dynamic, refused="start from the unquantised model"),
    Layout("stabilityai/stable-diffusion-xl: diffusers", sdxl, refused=r"(?i)diffus"),
    Layout(
        "deepseek-ai/DeepSeek-V3: a layer beyond the last",
        deepseek_v3,
        -1,
        travels=("inference/model.py",),
        untouched=(r"model\.layers\.2\..*",),
    ),
    Layout(
        "allenai/OLMo-7B: names of the first release",
        olmo_original,
        -1,
        auto=None,
        untouched=(r".*(wte|transformer\.ff_out).*",),
    ),
    Layout(
        "a trainer's output folder",
        trainer_output,
        2 * LLAMA_LAYER,
        left=("optimizer.pt", "training_args.bin", "checkpoint-500/model.safetensors", "rng_state.pth"),
    ),
    Layout(
        "tiiuae/falcon-7b: code, pickles and CoreML beside",
        falcon,
        -1,
        left=("coreml/text.mlpackage/weight.bin",),
        travels=("handler.py",),
    ),
    Layout(
        "sentence-transformers/gtr-t5-base: an encoder and a dense module",
        gtr_t5,
        2 * ENCODER_LAYER,
        auto="AutoModelForTextEncoding",
        left=("rust_model.ot",),
        travels=("2_Dense/pytorch_model.bin", "2_Dense/config.json"),
        untouched=(r".*relative_attention_bias.*",),
    ),
    Layout(
        "EleutherAI/gpt-j-6b: a pickle with masks of bytes",
        gptj,
        2 * ENCODER_LAYER,
        left=("flax_model.msgpack", "tf_model.h5"),
        travels=("merges.txt",),
    ),
    Layout(
        "google/gemma-3-4b-it: a text model inside",
        gemma3,
        2 * LLAMA_LAYER,
        auto="AutoModelForImageTextToText",
        travels=("processor_config.json",),
        untouched=(r".*vision_tower.*", r".*multi_modal_projector.*"),
    ),
    Layout(
        "answerdotai/ModernBERT-base: three ONNX files",
        modernbert,
        -1,
        auto="AutoModelForMaskedLM",
        left=("onnx/model_q4f16.onnx", "pytorch_model.bin"),
    ),
    Layout("openai/gpt-oss-20b: MXFP4", gpt_oss, refused="start from the unquantised model"),
    Layout("TheBloke/Llama-2-7B-GGUF: a config and GGUF alone", gguf_only, refused="try `laser convert .*Q2_K.gguf"),
    Layout(
        "alignment-handbook/zephyr-7b-sft-qlora: an adapter with a config",
        qlora,
        refused=r"a PEFT adapter \(LORA\) of mistralai/Mistral-7B-v0.1",
    ),
)


@pytest.mark.parametrize("layout", sampled(LAYOUTS, 20), ids=lambda layout: layout.model.split(":")[0])
def test_public_layout(layout: Layout, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    lay(source, layout.files())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", laser.DoubtWarning)
        if layout.refused:
            with pytest.raises(LaserError, match=layout.refused):
                laser.scan(laser.open_checkpoint(source))
            return
        checkpoint = laser.open_checkpoint(source)
        plan = laser.make_plan(laser.scan(checkpoint), "fraction:0.5")
        laser.reduce(checkpoint, plan, out)
    assert not laser.verify(checkpoint, out).problems and not plan.coverage["unaccounted"]
    assert layout.cut in (-1, len(plan.reductions)) and plan.reductions
    assert not [n for n in plan.reductions for kept in layout.untouched if re.fullmatch(kept, n)]
    there = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert not there & set(layout.left) and set(layout.travels) <= there
    if layout.auto:
        compare(layout.auto, source, out, checkpoint, plan)


def compare(auto: str, source: Path, out: Path, checkpoint: laser.Checkpoint, plan: laser.Plan) -> None:
    """transformers sees every cut, and nothing else is changed: a parameter that is one matrix has the rank of the
    plan, and where parameters have the names of tensors, no other differs from the source."""
    before, after = (
        getattr(transformers, auto).from_pretrained(p, dtype=torch.float32).state_dict() for p in (source, out)
    )
    cut = {m.tensor for m in laser.list_matrices(checkpoint) if m.name in plan.reductions}
    found = {name: t for name in after for t in cut if name.endswith(t) or t.endswith(name)}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and changed >= found.keys()
    for name, tensor in found.items():
        line = plan.reductions.get(tensor)  # None where the tensor holds several matrices
        if line is not None and line.rank is not None:
            assert torch.linalg.matrix_rank(after[name].double(), rtol=1e-4) == line.rank, name
    if len(found) == len(cut):
        assert changed == found.keys()
