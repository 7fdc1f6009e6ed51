"""The first thing that `import laser` does, before any library is imported."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

INTERRUPTED = 130
HANGUP = getattr(signal, "SIGHUP", None)  # the terminal is closed; Windows, which is refused below, has none
# Not where whoever started this said that it should go on without a terminal, as nohup does.
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([HANGUP] if HANGUP and signal.getsignal(HANGUP) != signal.SIG_IGN else []))


def begin_process() -> None:
    """End in one line on Windows, and, where this process is the command `laser`, on an interrupt from now on."""
    if sys.platform == "win32":  # which lacks modules that are imported below
        raise SystemExit("laser: Windows is not supported; try it in WSL, where it runs as on Linux")
    if is_command() and (stated := too_little_memory()):
        raise SystemExit(f"laser: {stated}")
    if is_command() and not is_address(os.environ.get("HF_ENDPOINT", "")):
        raise SystemExit(f"laser: HF_ENDPOINT is {os.environ['HF_ENDPOINT']!r}, which is no address; unset it")
    if is_command():
        try:
            Path.cwd()
        except OSError as error:
            raise SystemExit(f"laser: the current directory: {error.strerror}; cd to one that is there") from error
    if is_command() and threading.current_thread() is threading.main_thread():
        on_interrupt(too_early)


# Limit -> how ulimit calls it, and the bytes that the libraries take once they are imported: by /proc/self/status on
# x86-64 Linux with one core and torch's build without CUDA; others take more. Below that they end in tracebacks, abort,
# or wait for ever.
LIBRARY_BYTES = {"RLIMIT_DATA": ("ulimit -d", 268_000_000), "RLIMIT_AS": ("ulimit -v", 754_000_000)}


def too_little_memory() -> str | None:
    """What to say where a limit of this process leaves no room for the libraries; None elsewhere."""
    if sys.platform != "linux":  # elsewhere such limits are not kept
        return None
    import resource  # which Windows lacks

    for name, (word, needed) in LIBRARY_BYTES.items():
        found = resource.getrlimit(getattr(resource, name))[0]
        if 0 <= found < needed:  # RLIM_INFINITY is negative
            message = f"{word} allows {found / 1e9:.2f} GB, and the libraries alone take {needed / 1e9:.2f} GB"
            return f"out of memory: {message}; raise that limit"
    return None


def on_interrupt(handler: Callable[[int, FrameType | None], Any] | signal.Handlers) -> None:
    """What Ctrl-C does from now on, and being told to end, as by a queue, a container or a terminal that is closed."""
    for number in SIGNALS:
        signal.signal(number, handler)


def code_of(number: int) -> int:
    """The exit code of a process that a signal has ended."""
    return 129 if number == HANGUP else INTERRUPTED


def is_address(endpoint: str) -> bool:
    """Whether the libraries that read HF_ENDPOINT when they are imported get through: they take it apart."""
    try:
        parts = urlsplit(endpoint)
        _ = parts.hostname, parts.port
    except ValueError:
        return False
    return True


def is_command() -> bool:
    """Whether this process was started as `laser` or `python -m laser`."""
    asked = sys.orig_argv
    by_module = any(pair == ("-m", "laser") for pair in pairwise(asked))
    return Path(sys.argv[0] if sys.argv else "").name == "laser" or (by_module and sys.argv[0] == "-m")


def too_early(number: int = 0, _frame: FrameType | None = None) -> None:
    """Interrupted while libraries are imported, some of which would catch an exception and go on."""
    _end(b"laser: interrupted; nothing was written\n", number)


_at_work: list[Callable[[int, FrameType | None], Any]] = []  # what an interrupt calls while a verb works
_raised: list[bool] = []  # whether one was raised since


def at_work(handler: Callable[[int, FrameType | None], Any]) -> None:
    """What an interrupt is to do as soon as a verb has its libraries. Until then it is `too_early`, which raises
    nothing: while a command line is evaluated, Python would end by the signal whoever caught the exception."""
    _at_work[:] = [handler]
    _raised.clear()


@contextmanager
def loading() -> Iterator[None]:
    """While a verb imports its libraries; behind it the verb is at work."""
    mine = bool(_at_work) and threading.current_thread() is threading.main_thread()
    if mine:
        on_interrupt(too_early)
    yield
    if mine:
        on_interrupt(_at_work[0])


def interrupted(_number: int = 0, frame: FrameType | None = None) -> None:
    """Let the verb end and say what it kept: what is computed at the moment is waited for. Once more, and it is not."""
    if is_locking(frame):
        return come_again()
    on_interrupt(again)
    _raised.append(True)
    raise KeyboardInterrupt


def was_interrupted() -> bool:
    """Whether an interrupt was raised since the verb is at work."""
    return bool(_raised)


def is_locking(frame: FrameType | None) -> bool:
    """Whether Python's own threading is about to take or give back a lock, by the frame that a signal falls into.

    An exception there leaves the lock taken for good, and the threads of a pool that is waited for wait for it. A wait
    that has begun is no such place, for it undoes itself: `gotit` is the name that Condition.wait gives to it."""
    if frame is None or frame.f_code.co_filename != threading.__file__:
        return False
    waits = "gotit" in frame.f_locals or frame.f_code.co_name in ("join", "_wait_for_tstate_lock")
    return not waits


def come_again() -> None:
    """Send this process an interrupt a moment from now."""

    def once_more() -> None:
        time.sleep(0.01)  # what must not be interrupted is behind then
        os.kill(os.getpid(), signal.SIGINT)

    _thread.start_new_thread(once_more, ())  # not threading's, whose locks may be held


def raised_again(handler: Callable[[int, FrameType | None], Any]) -> None:
    """An interrupt that falls into a destructor or a callback, where Python drops what is raised, comes once more."""
    tell = sys.unraisablehook

    def dropped(unraisable: sys.UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            return tell(unraisable)
        on_interrupt(handler)
        come_again()

    sys.unraisablehook = dropped


def again(number: int = 0, _frame: FrameType | None = None) -> None:
    """Interrupted while the verb ends: as a kill, which loses nothing that was finished."""
    _end(
        b"laser: interrupted twice, and ended at once; run the same command again (reduce and run: with --resume)\n",
        number,
    )


def _end(line: bytes, number: int) -> None:
    on_interrupt(signal.SIG_IGN)
    with suppress(OSError):
        os.write(2, line)
    os._exit(code_of(number))


begin_process()
