"""Copies of a checkpoint as the tests of compensate make them: rounded to a few bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROUNDED = ("proj", "experts")  # parts of the names of what is rounded


def rounded(W: torch.Tensor, bits: int = 3, group: int = 16) -> torch.Tensor:
    """Each group of a row to 2^bits levels between its extremes."""
    x = W.float().reshape(W.shape[0], -1, group)
    low, high = x.amin(2, keepdim=True), x.amax(2, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return (torch.round((x - low) / step) * step + low).reshape(W.shape).to(W.dtype)


def write_copy(model: Path, path: Path, bits: int = 3) -> Path:
    """A directory beside `model` with every linear layer rounded."""
    shutil.copytree(model, path)
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        made = {n: rounded(W, bits) if any(x in n for x in ROUNDED) else W for n, W in tensors.items()}
        save_file(made, file, metadata={"format": "pt"})
    return path
