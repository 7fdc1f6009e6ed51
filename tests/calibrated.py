"""What the tests of calibration and of the flow behind it run on."""

from pathlib import Path

from laser.evaluation.text import Text, Windows, cut_windows, load_tokenizer

CONTENT = "the quick brown fox jumps over 13 lazy dogs; " * 40
LAYER = "model.layers.1."


def windows_of(model: Path, limit: int = 6) -> Windows:
    return cut_windows(Text("text", CONTENT), load_tokenizer(model), length=64, limit=limit)
