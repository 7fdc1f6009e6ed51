"""The first thing that `import laser` does, before the seconds in which torch is imported."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

INTERRUPTED = 130


def begin() -> None:
    """End in one line on Windows, and, where this process is the command `laser`, on an interrupt from now on."""
    if sys.platform == "win32":  # which lacks modules that are imported below
        raise SystemExit("laser: Windows is not supported; try it in WSL, where it runs as on Linux")
    if is_command() and threading.current_thread() is threading.main_thread():
        on_interrupt(too_early)


def on_interrupt(handler: Callable[[int, FrameType | None], Any] | signal.Handlers) -> None:
    """What Ctrl-C does from now on, and being told to end, as by a queue or a container that is stopped."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def is_command() -> bool:
    """Whether this process was started as `laser` or `python -m laser`."""
    asked = sys.orig_argv
    by_module = any(pair == ("-m", "laser") for pair in pairwise(asked))
    return Path(sys.argv[0] if sys.argv else "").name == "laser" or (by_module and sys.argv[0] == "-m")


def too_early(_number: int = 0, _frame: FrameType | None = None) -> None:
    """Interrupted while libraries are imported, some of which would catch an exception and go on."""
    _end(b"laser: interrupted; nothing was written\n")


def interrupted(_number: int = 0, _frame: FrameType | None = None) -> None:
    """Let the verb end and say what it kept: what is computed at the moment is waited for. Once more, and it is not."""
    on_interrupt(again)
    raise KeyboardInterrupt


def again(_number: int = 0, _frame: FrameType | None = None) -> None:
    """Interrupted while the verb ends: as a kill, which loses nothing that was finished."""
    _end(b"laser: interrupted twice, and ended at once; run the same command again (reduce and run: with --resume)\n")


def _end(line: bytes) -> None:
    on_interrupt(signal.SIG_IGN)
    with suppress(OSError):
        os.write(2, line)
    os._exit(INTERRUPTED)


begin()
