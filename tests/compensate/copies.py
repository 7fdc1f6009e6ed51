"""Copies of a checkpoint as the tests of compensate make them: rounded to a few bits, or spoiled."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from conftest import Run
from pico_language import TEXT, make_model
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


def write_models(folder: Path) -> Path:
    """A Llama and a Mixtral, a copy of each in 3 bits, and a text, in `folder`."""
    for kind in ("llama", "mixtral"):
        write_copy(make_model(folder / kind, kind), folder / f"{kind}-3")
    (folder / "text.txt").write_text(TEXT)
    return folder


def refused(run: Run, *words: Any) -> str:
    code, _, err = run("compensate", *words, "--device", "cpu")
    assert code in (1, 2) and err.count("\n") == 1 and err.startswith("laser: ") and "; " in err, err
    return err


def spoiled(model: Path, path: Path, change: Any) -> Path:
    """The model with what `change` makes of all of its tensors."""
    shutil.copytree(model, path)
    (path / "model.safetensors.index.json").unlink(missing_ok=True)
    tensors = change({name: W for file in sorted(path.glob("*.safetensors")) for name, W in load_file(file).items()})
    for file in path.glob("*.safetensors"):
        file.unlink()
    save_file({n: W.contiguous() for n, W in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"})
    return path
