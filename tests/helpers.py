"""What several test files use: folders and checkpoints as they lie on disk, and the rules."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its name relative to it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with suppress(FileNotFoundError):  # somebody may be at work there
                found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the safetensors files in a folder."""
    return {name: W for file in sorted(folder.glob("*.safetensors")) for name, W in load_file(file).items()}
