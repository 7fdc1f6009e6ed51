"""A Hub checkpoint rewritten as Mistral would have released it: row by row, with nothing taken from laser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

NAMES = {
    r"model\.embed_tokens\.weight": "tok_embeddings.weight",
    r"model\.norm\.weight": "norm.weight",
    r"lm_head\.weight": "output.weight",
    r"model\.layers\.(\d+)\.input_layernorm\.weight": r"layers.\1.attention_norm.weight",
    r"model\.layers\.(\d+)\.post_attention_layernorm\.weight": r"layers.\1.ffn_norm.weight",
    r"model\.layers\.(\d+)\.self_attn\.([qkvo])_proj\.weight": r"layers.\1.attention.w\2.weight",
    r"model\.layers\.(\d+)\.mlp\.gate_proj\.weight": r"layers.\1.feed_forward.w1.weight",
    r"model\.layers\.(\d+)\.mlp\.down_proj\.weight": r"layers.\1.feed_forward.w2.weight",
    r"model\.layers\.(\d+)\.mlp\.up_proj\.weight": r"layers.\1.feed_forward.w3.weight",
    r"model\.layers\.(\d+)\.block_sparse_moe\.gate\.weight": r"layers.\1.feed_forward.gate.weight",
    r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight": (
        r"layers.\1.feed_forward.experts.\2.\3.weight"
    ),
}


def pairs_from_halves(W: torch.Tensor, width: int) -> torch.Tensor:
    """Row i of a head's first half becomes its row 2i, row i of the second half its row 2i + 1."""
    out = torch.empty_like(W)
    for row in range(W.shape[0]):
        head, i = divmod(row, width)
        half, place = divmod(i, width // 2)
        out[head * width + 2 * place + half] = W[row]
    return out


def write_release(source: Path, out: Path, *, stacked: bool = False, files: int = 1, pickled: bool = False) -> Path:
    """`stacked` joins the experts as the first release of 8x7B did, under its params.json's names."""
    config = json.loads((source / "config.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= load_file(file)
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    renamed = {}
    for name, tensor in tensors.items():
        (found,) = [re.sub(pattern, new, name) for pattern, new in NAMES.items() if re.fullmatch(pattern, name)]
        if re.search(r"attention\.w[qk]", found):
            tensor = pairs_from_halves(tensor, width)
        renamed[found] = tensor
    if stacked:
        renamed = _stack(renamed, config)
    out.mkdir(parents=True)
    tied = {"tied_embeddings": True} if config.get("tie_word_embeddings") else {}
    (out / "params.json").write_text(json.dumps(_params(config, width, stacked) | tied))
    names = list(renamed)
    for number in range(files):
        part = {name: renamed[name].contiguous() for name in names[number::files]}
        stem = "consolidated" if files == 1 and not pickled else f"consolidated.{number:02d}"
        if pickled:
            torch.save(part, out / f"{stem}.pt")
        else:
            save_file(part, out / f"{stem}.safetensors", metadata={"format": "pt"})
    (out / "tokenizer.model").write_bytes(b"a sentencepiece model, for all that laser knows")
    return out


def _stack(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    out = {}
    for name, tensor in tensors.items():
        if "experts" not in name:
            out[name.replace("feed_forward.gate", "block_sparse_moe.gate")] = tensor
    for layer in range(config["num_hidden_layers"]):
        for w in ("w1", "w2", "w3"):
            at = f"layers.{layer}.feed_forward.experts."
            experts = [tensors[f"{at}{e}.{w}.weight"] for e in range(config["num_local_experts"])]
            out[f"layers.{layer}.block_sparse_moe.{w}"] = torch.cat([W.T if w == "w2" else W for W in experts])
    return out


def _params(config: dict[str, Any], width: int, stacked: bool) -> dict[str, Any]:
    theta = config["rope_parameters"]["rope_theta"] if "rope_parameters" in config else config["rope_theta"]
    if stacked:
        keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
        keys += ("rms_norm_eps", "vocab_size", "num_local_experts", "num_experts_per_tok")
        return {key: config[key] for key in keys} | {"rope_theta": theta}
    params = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "head_dim": width,
        "hidden_dim": config["intermediate_size"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
        "rope_theta": theta,
    }
    if "num_local_experts" in config:
        params["moe"] = {"num_experts": config["num_local_experts"], "num_experts_per_tok": 2}
    return params
