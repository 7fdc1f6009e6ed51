"""Helpers for the tests of evaluation and search: a character tokenizer of 64 tokens, and pico models of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import HIDDEN, LAYERS, VOCABULARY, WIDTH, mixtral_config, mixtral_tensors, write_checkpoint_directory

CHARACTERS = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJ0123456789.,;:!?'-()\n"
TEXT = "the quick brown fox jumps over the lazy dog, and 42 other animals watch. " * 12


def write_tokenizer(path: Path, *, bos: bool = True, extra: int = 0) -> Path:
    """One token per character; `extra` adds that many tokens past the pico models' vocabulary, used for '!'."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(CHARACTERS)}
    if extra:
        vocabulary["!"] = VOCABULARY + extra - 1
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    names = {"bos_token": "<s>"} if bos else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", **names)
    fast.save_pretrained(path)
    return path


def dense_tensors(seed: int = 0, *, tied: bool = False) -> dict[str, torch.Tensor]:
    """Llama's and Mistral's names: the attention of the pico Mixtral and its first expert as the MLP."""
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    tensors = {}
    for name, tensor in mixtral_tensors(seed).items():
        if ".experts.0." in name:
            before, after = name.split("block_sparse_moe.experts.0.")
            tensors[f"{before}mlp.{names[after.removesuffix('.weight')]}.weight"] = tensor
        elif "block_sparse_moe" not in name and not (tied and name == "lm_head.weight"):
            tensors[name] = tensor
    return tensors


def make_model(path: Path, kind: str, **config: Any) -> Path:
    """`mixtral`, `llama`, `tied` (llama without a head) or `sliding` (mistral that sees 8 tokens), with a tokenizer."""
    base = mixtral_config() | config
    if kind == "mixtral":
        write_checkpoint_directory(path, mixtral_tensors(), base)
    else:
        family = "mistral" if kind == "sliding" else "llama"
        shape = {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS}
        base = {k: v for k, v in base.items() if k not in ("num_local_experts", "num_experts_per_tok", "architectures")}
        base |= shape | {"model_type": family, "architectures": [f"{family.capitalize()}ForCausalLM"]}
        base |= {"tie_word_embeddings": kind == "tied", "sliding_window": 8 if kind == "sliding" else None}
        write_checkpoint_directory(path, dense_tensors(tied=kind == "tied"), base)
    return write_tokenizer(path)
