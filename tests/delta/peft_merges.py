"""Merges as PEFT itself makes them: adapters of a size that is wanted, put into a base on disk and merged into it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch


def load(folder: Path, dtype: Any = "auto") -> Any:
    """The model in a folder, as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def merge(
    base: Path, out: Path, *, share: float = 0.02, dtype: Any = "auto", seed: int = 0, cast: bool = True,
    adapter: Path | None = None, shard: str = "200KB", **config: Any,
) -> Path:  # fmt: skip
    """Writes `out`, the base with a random LoRA merged by PEFT, and the LoRA itself to `adapter` if that is given.

    share: of every adapted weight's norm, the update's; cast: whether PEFT keeps A and B in float32; config: LoraConfig
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecations inside transformers, of ties
        model = get_peft_model(
            load(base, dtype), LoraConfig(init_lora_weights=False, **config), autocast_adapter_dtype=cast
        )
        with torch.no_grad():
            resize(model, share)
        if adapter is not None:
            model.save_pretrained(adapter)
        model.merge_and_unload().save_pretrained(out, max_shard_size=shard)
    return out


def adapted(base: Path, adapter: Path, merged: bool = False) -> Any:
    """The base with PEFT's layers and the adapter that is in a folder, or with it merged."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(load(base), adapter)
        return model.merge_and_unload() if merged else model


def resize(model: Any, share: float) -> None:
    """Every update set to `share` of its weight's norm; what modules_to_save trains is changed as much."""
    from peft.utils import ModulesToSaveWrapper

    for layer in list(model.modules()):
        if hasattr(layer, "get_delta_weight"):
            names = [name for holder in (layer.lora_B, layer.lora_embedding_B) for name in holder]
            W = layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight
            for name in names:
                B = layer.lora_B[name].weight if name in layer.lora_B else layer.lora_embedding_B[name]
                B *= share * W.float().norm() / layer.get_delta_weight(name).float().norm()
        for trained in layer.modules_to_save.values() if isinstance(layer, ModulesToSaveWrapper) else ():
            W = trained.weight
            W += (share * W.float().abs().mean() * torch.randn(W.shape)).to(W.dtype)
