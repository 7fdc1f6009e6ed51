"""The card's section on loading the model: code for transformers and vLLM, with the memory that the weights take."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from laser.escape import fence, visible
from laser.report import chat

if TYPE_CHECKING:
    from laser.report.card import CardSource


@dataclass(frozen=True)
class Variant:
    """One way to load the weights. {half} in `arguments` stands for the half-precision type of the source."""

    heading: str
    size: float  # bytes per parameter
    arguments: str  # of from_pretrained, after the name
    needs: str = ""
    imports: str = ""  # one more name of transformers


VARIANTS = (
    Variant("Full precision", 4, "dtype=torch.float32"),
    Variant("Half precision", 2, 'dtype=torch.{half}, device_map="auto"', "accelerate"),
    Variant(
        "8 bits",
        1,
        'quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="auto"',
        "accelerate and bitsandbytes",
        ", BitsAndBytesConfig",
    ),
    Variant(
        "4 bits",
        0.5,
        "quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.{half}),\n"
        '    device_map="auto"',
        "accelerate and bitsandbytes",
        ", BitsAndBytesConfig",
    ),
    Variant(
        "FlashAttention 2",
        2,
        'dtype=torch.{half}, attn_implementation="flash_attention_2", device_map="auto"',
        "accelerate, flash-attn and an NVIDIA GPU that it supports",
    ),
)


def is_release(source: CardSource) -> bool:
    """Whether the model is in Mistral's own format: a params.json, which names no model_type."""
    return (source.config or {}).get("model_type") == "mistral_release"


def loading(name: str, source: CardSource) -> str:
    """How to load the model in five ways with transformers, and with vLLM; `name` stands for where it lies."""
    config = source.config or {}
    stored = config.get("dtype") or config.get("torch_dtype")
    half = stored if stored in ("float16", "bfloat16") else "bfloat16"
    where = visible(json.dumps(name, ensure_ascii=False))  # a literal of Python as well
    if is_release(source):
        translate = fence(f"laser convert {shlex.quote(name)} -o {shlex.quote(name + '-hub')}", "sh")
        return (
            "## How to load it\n\nThis directory is in Mistral's own format, for Mistral's own code. For transformers, "
            "translate it first:\n\n" + translate
        )
    parts = [
        "## How to load it",
        "Below, the name stands for this directory, or for its id on the Hub. Memory is that of the weights "
        "alone; in 8 and 4 bits it is a lower bound, since not every tensor is quantised.",
    ]
    for variant in VARIANTS:
        arguments = variant.arguments.format(half=half)
        lines = [
            "import torch" if "torch." in arguments else "",
            f"from transformers import AutoModelForCausalLM, AutoTokenizer{variant.imports}",
            f"\nname = {where}",
            "tokenizer = AutoTokenizer.from_pretrained(name)",
            f"model = AutoModelForCausalLM.from_pretrained(\n    name, {arguments}\n)",
        ]
        memory = f", about {source.parameters * variant.size / 1e9:.3g} GB" if source.parameters else ""
        needs = f" Needs {variant.needs}." if variant.needs else ""
        parts.append(f"**{variant.heading}** with transformers{memory}.{needs}")
        parts.append(fence("\n".join(line for line in lines if line), "python"))
    parts.append("Then, with any of them:")
    if chat.find_template(source.tokenizer_config or {}, source.chat_template):
        prompt = (
            'messages = [{"role": "user", "content": "What is a singular value?"}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n'
            ").to(model.device)"
        )
    else:
        prompt = 'inputs = tokenizer("A singular value is", return_tensors="pt").to(model.device)'
    answer = (
        "output = model.generate(**inputs, max_new_tokens=100)\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))'
    )
    parts.append(fence(f"{prompt}\n{answer}", "python"))
    parts.append("**vLLM**, as a server that speaks OpenAI's protocol:")
    parts.append(fence(f"vllm serve {shlex.quote(name)} --dtype {half}", "sh"))
    parts.append("Of these, laser itself tests full and half precision with transformers.")
    return "\n\n".join(parts)
