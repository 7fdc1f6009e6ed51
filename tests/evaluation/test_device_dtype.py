"""What runs a model on an accelerator meets no float64 there: Apple MPS has none, and says so by failing.

On CPU tensors, where host and device look alike: what comes out of Tensor.cpu() is the host's, and so is all that is
made of it alone, or as float64 from nothing or NumPy. float64 beside anything else is a mistake.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import laser
from laser.calibration import calibrate
from laser.evaluation.evaluate import load_whole, whole_losses
from laser.evaluation.streaming import LayeredModel
from laser.evaluation.text import Text, Windows, cut_windows, load_tokenizer


class HostOnly(TorchDispatchMode):
    """Raises AssertionError where float64 meets a tensor that is not known to be the host's."""

    def __init__(self) -> None:
        super().__init__()
        self.hosts: list[torch.Tensor] = []  # kept alive: their addresses must not be given to others

    def is_host(self, tensor: torch.Tensor) -> bool:
        return any(tensor.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in self.hosts)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from_numpy = func is torch.ops.aten.lift_fresh.default
        given = [] if from_numpy else [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor)]
        on_host = all(self.is_host(t) or (t.dtype == torch.float64 and t.numel() == 1) for t in given)
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        wide = any(t.dtype == torch.float64 for t in (*given, *made))
        assert on_host or not wide, f"{func} meets float64 on the device"
        if on_host and (given or wide or from_numpy):
            self.hosts += made
        return out


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostOnly]:
    mode = HostOnly()

    def cpu(tensor: torch.Tensor) -> torch.Tensor:
        there = tensor.clone()
        mode.hosts.append(there)
        return there

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    yield mode


def windows_of(model: Path) -> Windows:
    text = Text("text", "the quick brown fox jumps over 13 lazy dogs; " * 12)
    return cut_windows(text, load_tokenizer(model), length=64, limit=2)


@pytest.mark.slow
def test_losses(guard: HostOnly, speaker: Path) -> None:
    checkpoint, windows = laser.open_checkpoint(speaker), windows_of(speaker)
    layered, whole = LayeredModel(checkpoint, dtype="float32"), load_whole(checkpoint, "float32")
    with guard:
        streamed, direct = layered.losses(windows.windows), whole_losses(whole, windows)
    assert list(streamed.sums) == pytest.approx(direct, rel=1e-5) and guard.hosts


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"diagonal": True}, {"full_side": 40}])
def test_calibration(guard: HostOnly, speaker: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    checkpoint, windows = laser.open_checkpoint(speaker), windows_of(speaker)
    with guard:
        moments = calibrate(checkpoint, windows, tmp_path / "m.safetensors", **options)
    assert moments.calibration.tokens and guard.hosts


def test_the_guard_knows_host_from_device(guard: HostOnly) -> None:
    x = torch.ones(3)
    with guard:
        assert (x.cpu().double() + torch.zeros(3, dtype=torch.float64)).sum() == 3
        for mistake in (x.double, lambda: x.sum(dtype=torch.float64)):
            with pytest.raises(AssertionError, match="float64 on the device"):
                mistake()
