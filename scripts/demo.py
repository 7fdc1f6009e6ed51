#!/usr/bin/env python3
"""Load two checkpoints with transformers, print the loss of both on a text that every CPython carries, and generate.

python scripts/demo.py SOURCE RESULT
"""

from __future__ import annotations

import sys
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

WINDOWS, LENGTH = 16, 256


def losses(path: str, windows: torch.Tensor) -> torch.Tensor:
    """Mean loss per token (nats) of each window (windows, length), by transformers' own loss, in float32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        return torch.stack([model(w[None], labels=w[None]).loss for w in windows]).double()


def main() -> None:
    logging.disable_progress_bar()
    source, result = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = "\n\n".join(topics[key] for key in sorted(topics))[:100_000]
    windows = torch.tensor(tokenizer(text).input_ids[: WINDOWS * LENGTH]).view(WINDOWS, LENGTH)
    before, after = losses(source, windows), losses(result, windows)
    change = after - before
    print(f"text: pydoc_data.topics, {WINDOWS} windows of {LENGTH} tokens; loss in nats per token, +- standard error")
    for name, values in (("source", before), ("result", after), ("change, paired", change)):
        print(f"  {name:15s} {values.mean():8.4f} +- {values.std() / WINDOWS**0.5:.4f}")
    model = AutoModelForCausalLM.from_pretrained(result)
    prompt = tokenizer("A list comprehension in Python is", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=20, do_sample=False)  # pyright: ignore[reportAttributeAccessIssue]
    print(f"the result, loaded with AutoModelForCausalLM, goes on: {tokenizer.decode(tokens[0])!r}")


if __name__ == "__main__":
    main()
