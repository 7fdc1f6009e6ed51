"""What vLLM's published sources ask of an adapter in PEFT's form.

Its loader (vllm/lora: peft_helper.py, lora_model.py, utils.py, model_manager.py) is not run: it needs a GPU.
"""

import json
import re
from pathlib import Path

from safetensors import safe_open

REQUIRED = ("r", "lora_alpha", "target_modules")


def require_vllm_form(folder: Path) -> None:
    """What its loader raises for, or would compute otherwise."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert all(config[key] is not None for key in REQUIRED)
    assert config["bias"] == "none" and not config["use_dora"] and not config["modules_to_save"]
    assert config["lora_alpha"] == config["r"], "every module is scaled by this quotient, whatever alpha_pattern says"
    assert config["rank_pattern"] == config["alpha_pattern"], "so that PEFT scales by 1 as well"
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    modules: dict[str, set[str]] = {}
    for name in shapes:
        match = re.fullmatch(r"base_model\.model\.(.+)\.(lora_A|lora_B)\.weight", name)
        assert match, f"{name} is unsupported LoRA weight"
        modules.setdefault(match[1], set()).add(match[2])
    for module, parts in modules.items():
        stem = f"base_model.model.{module}.lora_"
        assert parts == {"lora_A", "lora_B"} and shapes[f"{stem}A.weight"][0] == shapes[f"{stem}B.weight"][1]
        if module.removesuffix(".base_layer").endswith(".experts"):  # gate_up_proj inside, down_proj outside
            assert {module.removesuffix(".base_layer"), module.removesuffix(".base_layer") + ".base_layer"} <= set(
                modules
            )
        else:
            assert not re.search(r"\.\d+$", module)
