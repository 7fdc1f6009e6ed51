"""Whether vLLM, which serves adapters beside one base, takes an adapter of laser's, and what it has to be told.

Read in its sources (vllm/lora, autumn of 2026) and not run: of adapter_config.json it goes by r, lora_alpha,
target_modules, bias, modules_to_save, use_rslora and use_dora, and passes over the rest, as rank_pattern. Everything is
scaled by lora_alpha / r, which is 1 here, and a module's rank is that of its tensors, up to --max-lora-rank.
"""

from __future__ import annotations

import json
from pathlib import Path

from laser.checkpoint.safetensors import read_header
from laser.differences.unmerge import CONFIG, MODEL

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank can be


def in_vllm(adapter: Path) -> str:
    """A sentence for people, of the directory that `compensate` or `unmerge` wrote; "" for what continues no text."""
    config = json.loads((adapter / CONFIG).read_text())
    if config.get("task_type", "CAUSAL_LM") != "CAUSAL_LM":
        return ""
    modules = {info.name.partition(".lora_")[0] for info in read_header(adapter / MODEL).tensors}
    rank = max(config["r"], *(config["rank_pattern"] or {0: 0}).values())
    most = next((each for each in MAX_LORA_RANKS if each >= rank), None)
    fused = {module.removesuffix(".base_layer") for module in modules if module.endswith((".experts", ".base_layer"))}
    if config["modules_to_save"]:
        why = f"{config['modules_to_save'][0]} was trained whole"
    elif most is None:
        why = f"its largest rank is {rank}, and the most is {MAX_LORA_RANKS[-1]}"
    elif half := sorted(each for each in fused if not {each, f"{each}.base_layer"} <= modules):
        why = f"of {half[0]} only one of gate_up_proj and down_proj has an adapter"
    else:
        experts = " with `--enable-mixed-moe-lora-format`" if fused else ""
        return f"vLLM takes it by `vllm serve --enable-lora --max-lora-rank {most}`{experts}"
    return f"vLLM does not take it: {why}"
