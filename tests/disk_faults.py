"""A shim over Python's disk calls: the k-th one fails, is cut short, or is the last before a kill or an interrupt.

`forked` runs a piece of work in a child process under one Fault and says how it ended. The shim is put in place in the
child alone, so nothing has to be undone; libraries are imported once, in the parent, and a trial costs what its work
costs. Seen are calls that change a disk, from Python: opening for writing, writing, syncing, renaming, making and
removing, locking, and renameat2 through ctypes. Reading is not counted, nor what a library in C or Rust writes.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import fcntl
import io
import mmap
import os
import signal
import struct
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What is counted. DATA calls say how many bytes they took, and may take fewer; a full disk refuses those of SPENDING.
DATA = ("write", "pwrite", "writev", "pwritev", "sendfile", "copy_file_range")
SPENDING = (*DATA, "create", "truncate", "fallocate", "fsync", "mkdir", "link")
NAMES = (*SPENDING, "rename", "unlink", "rmdir", "flock", "close", "exchange")
LONGEST = 120  # seconds that a child may take
HEAD = struct.Struct("<4q")  # disk calls met, the fault met, units of work kept, whether it hears signals


@dataclass(frozen=True)
class Fault:
    """What happens at the `at`-th disk call, counted from 1.

    kill: SIGKILL before it. torn: SIGKILL behind it, half of its bytes written. full: it takes half of its bytes, and
    from then on the disk is full. error: EACCES for a call that names a path, EIO for one that moves data, once.
    short: it takes half of its bytes. interrupt, terminate: SIGINT, SIGTERM. wait: it goes on when `gate` is closed at
    its other end.
    """

    kind: str
    at: int
    gate: int = -1
    told: int = -1  # with wait: closed when the call is reached


@dataclass(frozen=True)
class End:
    """How a child ended. code: exit code, or minus the signal; calls: the disk calls that it made, in order."""

    code: int
    out: str
    err: str
    calls: tuple[str, ...]
    hit: bool  # whether the fault was met
    units: int  # finished pieces of work that were written down


class Board:
    """What a child tells its parent: memory that both see, whatever becomes of the child."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 1 << 16)

    def get(self, place: int) -> int:
        return HEAD.unpack_from(self.memory)[place]

    def put(self, place: int, value: int) -> None:
        struct.pack_into("<q", self.memory, 8 * place, value)

    def call(self, name: str) -> int:
        """Notes a call; returns how many there were."""
        count = self.get(0) + 1
        if HEAD.size + count < len(self.memory):
            self.memory[HEAD.size + count - 1] = NAMES.index(name) + 1
        self.put(0, count)
        return count

    def calls(self) -> tuple[str, ...]:
        return tuple(NAMES[code - 1] for code in self.memory[HEAD.size : HEAD.size + self.get(0)] if code)


def forked(
    work: Callable[[], int], folder: Path, fault: Fault | None = None, watch: Callable[[Board], None] | None = None
) -> End:
    """`work` in a child process in `folder`, disturbed by `fault`. `watch` may put more in place in the child."""
    started = start(work, folder, fault, watch)
    return started.wait()


@dataclass
class Started:
    """A child at work."""

    pid: int
    board: Board
    outputs: tuple[Any, Any]

    def wait(self) -> End:
        status = os.waitpid(self.pid, 0)[1]
        code = os.waitstatus_to_exitcode(status)
        texts = []
        for file in self.outputs:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        return End(code, texts[0], texts[1], self.board.calls(), bool(self.board.get(1)), self.board.get(2))


def start(
    work: Callable[[], int], folder: Path, fault: Fault | None = None, watch: Callable[[Board], None] | None = None
) -> Started:
    """As `forked`, without waiting for the end."""
    board = Board()
    outputs = tuple(os.fdopen(os.memfd_create(name) if hasattr(os, "memfd_create") else _temporary(), "w+b", 0)
                    for name in ("out", "err"))  # fmt: skip
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, which are asleep
        pid = os.fork()
    if pid == 0:
        try:
            _child(work, folder, fault, watch, board, outputs)
        finally:
            os._exit(99)  # whatever went wrong here
    return Started(pid, board, outputs)  # pyright: ignore[reportArgumentType]


def _temporary() -> int:
    import tempfile

    handle, name = tempfile.mkstemp()
    os.unlink(name)  # noqa: PTH108
    return handle


def _child(
    work: Callable[[], int],
    folder: Path,
    fault: Fault | None,
    watch: Callable[[Board], None] | None,
    board: Board,
    outputs: Sequence[Any],
) -> None:
    for number, file in enumerate(outputs, 1):
        os.dup2(file.fileno(), number)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(LONGEST)
    import torch

    torch.set_num_threads(1)  # the threads of OpenMP's pool stayed in the parent
    os.chdir(folder)
    code = 98
    try:
        if watch is not None:
            watch(board)
        Shim(fault, board).install()
        code = work()
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 97
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Shim:
    """The calls, each counted and then made, or not."""

    def __init__(self, fault: Fault | None, board: Board) -> None:
        self.fault, self.board, self.lock, self.full = fault, board, threading.RLock(), False

    def meet(self, name: str, path: bool = True) -> str:
        """Counts a call before it is made. Raises, dies, or says what is to become of it: "", "half" or "torn"."""
        with self.lock:
            count = self.board.call(name)
            if self.full and name in SPENDING:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fault = self.fault
            if fault is None or count != fault.at:
                return ""
            self.board.put(1, 1)
            if fault.kind == "full":
                self.full = True
                if name in SPENDING and name not in DATA:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return "half" if name in DATA else ""
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.kind == "error":
            number = errno.EACCES if path else errno.EIO
            raise OSError(number, os.strerror(number))
        if fault.kind in ("interrupt", "terminate"):
            os.kill(os.getpid(), signal.SIGINT if fault.kind == "interrupt" else signal.SIGTERM)
            if threading.current_thread() is not threading.main_thread():
                time.sleep(0.05)  # until the main thread has it
        if fault.kind == "wait":
            os.close(fault.told)
            os.read(fault.gate, 1)
        return {"torn": "torn", "short": "half"}.get(fault.kind, "")

    def data(self, name: str, count: int, make: Callable[[int], int]) -> int:
        """A call that moves `count` bytes, or the first half of them."""
        fate = self.meet(name, path=False)
        done = make(count if not fate else max(count // 2, min(count, 1)))
        if fate == "torn":
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    def plain(self, name: str, original: Callable[..., Any], path: bool = True) -> Callable[..., Any]:
        """A call as a whole."""

        def call(*arguments: Any, **options: Any) -> Any:
            fate = self.meet(name, path)
            try:
                return original(*arguments, **options)
            finally:
                if fate == "torn":
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    def install(self) -> None:
        """Put the shim over this process's calls, for good."""
        system: Any = os
        for name, path, functions in (
            ("rename", True, ("rename", "replace")),
            ("unlink", True, ("unlink", "remove")),
            ("rmdir", True, ("rmdir",)),
            ("mkdir", True, ("mkdir",)),
            ("link", True, ("link", "symlink")),
            ("fsync", False, ("fsync", "fdatasync")),
            ("truncate", False, ("truncate", "ftruncate")),
            ("fallocate", False, ("posix_fallocate",)),
        ):
            for function in functions:
                if hasattr(os, function):
                    setattr(system, function, self.plain(name, getattr(os, function), path))
        for locker in ("flock", "lockf"):
            setattr(fcntl, locker, self.plain("flock", getattr(fcntl, locker), False))
        self._writes()
        self._opens()
        self._exchange()

    def _writes(self) -> None:
        system: Any = os
        write, pwrite = os.write, os.pwrite

        def os_write(handle: int, data: Any) -> int:
            if handle < 3:
                return write(handle, data)
            return self.data("write", len(data), lambda n: write(handle, memoryview(data).cast("B")[:n]))

        def os_pwrite(handle: int, data: Any, offset: int) -> int:
            view = memoryview(data).cast("B")
            return self.data("pwrite", len(view), lambda n: pwrite(handle, view[:n], offset))

        system.write, system.pwrite = os_write, os_pwrite
        if hasattr(os, "copy_file_range"):
            copy = os.copy_file_range

            def copy_file_range(src: int, dst: int, count: int, *rest: Any, **named: Any) -> int:
                return self.data("copy_file_range", count, lambda n: copy(src, dst, n, *rest, **named))

            system.copy_file_range = copy_file_range
        if hasattr(os, "sendfile"):
            send = os.sendfile

            def sendfile(out: int, in_: int, offset: Any, count: int, *rest: Any, **named: Any) -> int:
                return self.data("sendfile", count, lambda n: send(out, in_, offset, n, *rest, **named))

            system.sendfile = sendfile

    def _opens(self) -> None:
        shim, system = self, os
        os_open, real = os.open, io.open

        def opened_low(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                return os_open(path, flags, *rest, **named)
            return shim.plain("create", os_open)(path, flags, *rest, **named)

        class Raw(io.FileIO):
            """A file whose writes pass the shim, also those of the buffer above it."""

            def write(self, b: Any) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
                view = memoryview(b).cast("B")
                return shim.data("write", len(view), lambda n: super(Raw, self).write(view[:n]))

            def truncate(self, size: Any = None) -> int:
                return shim.plain("truncate", super().truncate, False)(size)

            def close(self) -> None:
                if self.closed:
                    return
                try:
                    fate = shim.meet("close", path=False)
                finally:
                    super().close()
                if fate == "torn":
                    os.kill(os.getpid(), signal.SIGKILL)

        def opened(
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
            closefd: bool = True,
            opener: Any = None,
        ) -> Any:
            ignored = file in (0, 1, 2, os.devnull) if isinstance(file, int | str) else False
            if not set(mode) & set("wax+") or ignored:
                return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
            if not isinstance(file, int) and opener is None:
                shim.plain("create", lambda: None)()
            raw = Raw(file, "".join(c for c in mode if c not in "bt"), closefd, opener)  # pyright: ignore
            if "b" in mode and buffering == 0:
                return raw
            buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            if "b" in mode:
                return buffer
            return io.TextIOWrapper(buffer, encoding, errors, newline, buffering == 1)

        system.open, io.open, builtins.open = opened_low, opened, opened  # pyright: ignore

    def _exchange(self) -> None:
        library = ctypes.CDLL

        def loaded(name: Any, *arguments: Any, **options: Any) -> Any:
            found = library(name, *arguments, **options)
            if name is not None or not hasattr(found, "renameat2"):
                return found
            return _Library(found, self)

        ctypes.CDLL = loaded  # pyright: ignore[reportAttributeAccessIssue]


class _Library:
    """The C library, whose renameat2 is a disk call."""

    def __init__(self, library: Any, shim: Shim) -> None:
        self._library, self._shim = library, shim

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._library, name)
        if name != "renameat2":
            return found

        def call(*arguments: Any) -> int:
            try:
                return self._shim.plain("exchange", found)(*arguments)
            except OSError as error:
                ctypes.set_errno(error.errno or errno.EIO)
                return -1

        return call
