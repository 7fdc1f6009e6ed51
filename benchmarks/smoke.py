"""What every benchmark shares: `--smoke`, a run of seconds on a pico model that asserts what the benchmark claims."""

from __future__ import annotations

import argparse
import atexit
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"


def parse(parser: argparse.ArgumentParser, smoke: Callable[[Path], Sequence[object]]) -> argparse.Namespace:
    """The arguments of the command line, or with --smoke those of `smoke`, which gets an empty folder to work in.

    The folder is removed when the process ends. Warnings are errors, as they are in the tests. `sys.argv` becomes what
    was chosen, so that a script which starts itself again hands it on.
    """
    parser.add_argument("--smoke", action="store_true", help="a run of seconds on a tiny input, with assertions")
    if "--smoke" not in sys.argv[1:]:
        return parser.parse_args()
    warnings.simplefilter("error")
    folder = Path(tempfile.mkdtemp(prefix="smoke-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sys.argv[1:] = [str(word) for word in smoke(folder)]
    chosen = parser.parse_args()
    chosen.smoke = True
    return chosen


def pico(folder: Path, kind: str = "mixtral") -> Path:
    """A pico model with a tokenizer of single characters, in `folder`: the one of the tests."""
    sys.path.insert(0, str(TESTS))
    from pico_language import make_model

    return make_model(folder / "pico", kind)


def text(folder: Path) -> Path:
    """A text that the tokenizer of the pico model knows every character of."""
    sys.path.insert(0, str(TESTS))
    from pico_language import TEXT

    path = folder / "text.txt"
    path.write_text(TEXT)
    return path
