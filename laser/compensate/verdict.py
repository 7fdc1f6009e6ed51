"""The verdict: original, copy, and copy with adapter on a text that the calibration never saw, paired."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from laser.checkpoint.reader import Checkpoint
from laser.compensate.adapted import with_adapter
from laser.compensate.peft import Slot
from laser.compensate.record import ErrorsMeasured, HeldOut
from laser.errors import UsageError
from laser.evaluation.evaluate import check_evaluation, evaluate
from laser.evaluation.perplexity import Perplexity, difference
from laser.evaluation.text import Windows
from laser.evaluation.verdict import Direction, direction


def size_of(checkpoint: Checkpoint) -> int:
    """Bytes of its weights as they are stored."""
    while checkpoint.origin is not None:
        checkpoint = checkpoint.origin
    return sum(shard.size for shard in checkpoint.shards)


def check_held_out(original: Checkpoint, copy: Checkpoint, windows: Windows, seen: Windows | None = None) -> None:
    """What can be refused before anything is solved. seen: the calibration's windows, where they are known.

    Raises UsageError for one window, which has no standard error, for windows of the calibration, and as `evaluate`.
    """
    if len(windows.windows) < 2:
        raise UsageError(
            f"{windows.text} gives one window to judge on, so the verdict has no standard error; "
            "try more --held-out-windows, a longer --held-out text or a shorter --window"
        )
    known = {window.tokens.tobytes() for window in seen.windows} if seen is not None else set()
    if shared := sum(window.tokens.tobytes() in known for window in windows.windows):
        raise UsageError(
            f"{shared} windows of the held-out {windows.text} are also calibration windows; try another --held-out text"
        )
    for checkpoint in (original, copy):
        check_evaluation(checkpoint, windows)


def judge_correction(
    original: Checkpoint,
    copy: Checkpoint,
    adapter: Path,
    slots: Sequence[Slot],
    windows: Windows,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    tick: Callable[[], None] = lambda: None,
    expect: Callable[[int], None] = lambda _: None,
) -> HeldOut:
    """All three, a layer's weights in memory at a time. adapter: its safetensors file. Raises as `evaluate`."""
    models = (original, copy, with_adapter(copy, adapter, slots))
    before, worse, after = (
        evaluate(
            model,
            windows,
            stream=True,
            dtype=dtype,
            device=device,
            tick=tick,
            expect=lambda pieces: expect(pieces * len(models)),
        )
        for model in models
    )
    sizes = (size_of(original), size_of(copy), size_of(copy) + adapter.stat().st_size)

    def measured(record: Perplexity, name: str, size: int) -> ErrorsMeasured:
        lost = difference(before, record)
        return ErrorsMeasured(name, size, record.nll, record.standard_error, lost.nll, lost.standard_error)

    first = measured(before, original.name, sizes[0])
    second, third = measured(worse, copy.name, sizes[1]), measured(after, f"{copy.name} + adapter", sizes[2])
    gain = difference(worse, after)
    return HeldOut(
        before.text, before.text_sha256, before.windows_sha256, before.window, before.windows, before.tokens, dtype,
        first, second, third, gain.nll, gain.standard_error,
        direction(gain.nll, gain.standard_error, lower_is_better=True),
    )  # fmt: skip


def sentence(found: HeldOut) -> str:
    """The verdict, for people."""
    gain = f"{found.gain:+.5f} ± {'-' if found.gain_error is None else f'{found.gain_error:.5f}'} nats per token"
    if not found.survives:
        stated = "no difference beyond one standard error" if found.direction is Direction.SAME else found.direction
        return f"THE CORRECTION DOES NOT SURVIVE {found.text}: {gain} against the copy alone, which is {stated}"
    share = 1 - found.adapted.lost / found.copy.lost if found.copy.lost > 0 else 0.0
    back = f", {100 * share:.0f} % of what the copy lost" if found.copy.lost > 0 else ""
    return f"the correction survives {found.text}: {gain} against the copy alone{back}"
