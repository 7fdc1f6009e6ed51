"""Files on disk: only regular ones are opened, and one is written by one process, whole or not.

A FIFO waits for ever for somebody to write, /dev/zero has no end, and opening some devices does something. What is no
regular file is an OSError here, as a missing one is, so that whoever opens says which file it was and what to try.

The lock is the kernel's (flock) on a small file beside the output, so that it is gone with the process, however that
ends. The file says who holds it, for the message to the second one.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import secrets
import shlex
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_ident
from typing import Any, BinaryIO

from laser.errors import OutputError, remedy

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LARGEST_FILE = 100_000_000  # bytes of a config, an index or a record; safetensors has the same limit for headers
LARGEST_TEXT = 2_000_000_000  # bytes of a text, which is held in memory whole, several times over
FILE_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a directory",
}


def open_regular(path: Path, *, follow: bool = True) -> io.BufferedReader:
    """The file at `path`, open for reading bytes. Raises OSError at once for what is no regular file.

    follow: whether `path` itself may be a link.
    """
    return io.BufferedReader(raw_regular(path, follow=follow))


def raw_regular(path: Path, *, follow: bool = True) -> io.FileIO:
    """The file at `path` as `open_regular` opens it, without a buffer."""

    def opened(name: str, flags: int) -> int:
        _require(path.stat())  # before it is opened, for opening a device may already do something
        handle = os.open(name, flags | os.O_NOCTTY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
        try:
            _require(os.fstat(handle))  # and again: another file may lie there by now
        except BaseException:
            os.close(handle)
            raise
        return handle

    return io.FileIO(str(path), opener=opened)


def read_regular(path: Path, most: float = LARGEST_FILE, *, follow: bool = True) -> bytes:
    """All bytes of the regular file at `path`. Raises OSError for another kind, or one of more than `most` bytes."""
    with raw_regular(path, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size} bytes, expected at most {most}")
        data, left = [], most + 1
        while left and (piece := file.read(int(min(left, max(size + 1, 1 << 16))))):  # it may grow, or tell no size
            data.append(piece)
            left -= len(piece)
        if not left:
            raise OSError(errno.EFBIG, f"it has more than {most} bytes, expected at most {most}")
        return b"".join(data)


def require_regular(path: Path) -> None:
    """Raises OSError for what is no regular file: for a path that another library is about to open."""
    raw_regular(path).close()


def _require(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = FILE_KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, expected a regular file")


# --- one writer at a time ---------------------------------------------------------------------------------------------

# Names of locks and of temporary files, which are gone when whoever works there ends.
PASSING = re.compile(r"\..+\.(lock|[0-9a-f]{8}\.tmp)")
_SAYS = b'{"pid": '  # how a lock of laser begins, unless it is empty
_held: set[tuple[str, int]] = set()  # (lock file, thread): whoever holds it may ask again


class InUse(OutputError):
    """Another process, or another thread, is at work on an output."""


def real(path: Path) -> Path:
    """Where an output lies, through whatever links. Raises OutputError for links that lead round and round."""
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise OutputError(f"{path} is a link that leads to itself; remove it, or try another -o") from error


def require_only(folder: Path, names: re.Pattern[str]) -> None:
    """Raises OutputError where `folder`, which may be removed in the end, holds a file of another name than these."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"{folder} is in the way: a directory of that name is needed; move it away")
    foreign = sorted(p.name for p in folder.iterdir() if not names.fullmatch(p.name)) if folder.exists() else []
    if foreign:
        raise OutputError(f"{folder} holds {foreign[0]}, which laser did not write; move it away")


def require_led(path: Path) -> None:
    """Raises OutputError for a link to what is not there: it would be replaced, or followed, as no one asked."""
    if path.is_symlink() and not path.exists():
        raise OutputError(f"{path} is a link to {path.readlink()}, which is not there; remove it, or try another -o")


def require_no_mount(path: Path) -> None:
    """Raises OutputError for a mount point: no rename puts another file or directory in its place."""
    place = real(path)
    name = re.sub(rb"[\\ \t\n]", lambda found: b"\\%03o" % found[0][0], os.fsencode(place))  # as the kernel lists it
    mounts = b""
    with suppress(OSError):  # Linux alone has it; there `is_mount` misses a folder that is mounted on its own disk
        mounts = Path("/proc/self/mountinfo").read_bytes()
    if place.is_mount() or any(line.split()[4] == name for line in mounts.splitlines()):
        raise OutputError(f"{path} is a mount point, which nothing can replace; try another -o, perhaps inside it")


def short(name: str) -> str:
    """The beginning of a file's name, to which some can be added: systems take 255 bytes, not characters."""
    return os.fsencode(name)[:200].decode(errors="ignore")


def lock_of(path: Path) -> Path:
    """The lock of the output `path`: there while somebody is at work on it, and after a kill."""
    place = real(path)
    return place.with_name(f".{short(place.name)}.lock")


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Nobody else writes the output `path`, a file or a directory, meanwhile. The directory that holds it is made.

    Raises OutputError at once where another process, or another thread, is at work on it, saying which.
    """
    lock = lock_of(path)
    key = (str(lock), get_ident())
    if key in _held:
        yield
        return
    handle = _take(lock, path)
    _held.add(key)
    try:
        yield
    finally:
        _held.discard(key)
        with suppress(OSError):
            lock.unlink()
        os.close(handle)


def _take(lock: Path, path: Path) -> int:
    """The locked file, open."""
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise OutputError(f"{lock} is a link, expected a lock of laser; remove it") from error
            raise OutputError(f"cannot write beside {path}: {error.strerror}; {remedy(error)}") from error
        try:
            if not _lock(handle, path):
                raise InUse(f"{path} is being written by {_holder(lock)}; wait for it, or try another -o")
            regular = stat.S_ISREG(os.fstat(handle).st_mode)
            if not regular or not (os.pread(handle, 8, 0) or _SAYS).startswith(_SAYS):  # under the lock: nobody writes
                raise OutputError(f"{lock} is no lock of laser, which needs the name; move it away")
            if _is_at(handle, lock):  # else its holder has just finished and removed it
                _say_who(handle)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _say_who(handle: int) -> None:
    """For the message to others. The lock holds without it, so a full disk is left to what is to be written."""
    stated = {"pid": os.getpid(), "command": _command(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        os.truncate(handle, 0)
        os.write(handle, json.dumps(stated).encode())
    except OSError:
        with suppress(OSError):
            os.truncate(handle, 0)  # half of it, or whoever held it before, would be named


def _lock(handle: int, path: Path) -> bool:
    """Whether the open file could be locked."""
    if fcntl is None:
        raise OutputError("laser needs the file locks of Linux or macOS, which Windows lacks; try it in WSL")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise OutputError(
            f"the file system of {path} has no locks ({error.strerror}); try -o on another disk"
        ) from error
    return True


def _is_at(handle: int, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), lock.stat())
    except FileNotFoundError:
        return False


def _holder(lock: Path) -> str:
    for _ in range(20):  # it may be about to say who it is
        try:
            stated: Any = json.loads(lock.read_bytes())
            return f"process {stated['pid']} (`{stated['command']}`, since {stated['since']})"
        except (OSError, ValueError, KeyError, TypeError):
            time.sleep(0.01)
    return "another process"


def _command() -> str:
    return shlex.join(["laser", *sys.argv[1:]]) if Path(sys.argv[0]).stem in ("laser", "__main__") else sys.argv[0]


@contextmanager
def replacing(path: Path, sweeping: bool = True) -> Iterator[BinaryIO]:
    """A file to be written, which takes the place of `path` when all of it is on the disk, and not if that fails.

    Its temporary name beside `path` is its own. What a killed process left there is removed; nobody's who is at work.
    That lists the directory: without `sweeping` for one of thousands that are removed together in the end.
    """
    if sweeping:
        sweep(path)
    while True:
        temporary = path.with_name(f".{short(path.name)}.{secrets.token_hex(4)}.tmp")
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        if fcntl is None or (_lock(handle, path) and _is_at(handle, temporary)):
            break
        os.close(handle)  # swept away before it was locked
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def sweep(path: Path) -> None:
    """Remove temporary files of `path` that no living process holds."""
    if fcntl is None:
        return
    ours = re.compile(rf"\.{re.escape(short(path.name))}\.[0-9a-f]{{8}}\.tmp")
    with suppress(OSError):
        left = [p for p in path.parent.iterdir() if ours.fullmatch(p.name)]
        for temporary in left:
            with suppress(OSError):
                handle = os.open(temporary, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    temporary.unlink()
                finally:
                    os.close(handle)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """An OSError while writing `path` as an OutputError that says what to do."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; {remedy(error)}") from error


def write_atomically(path: Path, data: bytes, sweeping: bool = True) -> None:
    """`data` at `path`, or the old file untouched: a temporary file beside it, fsync, rename. sweeping: see above."""
    with disk_errors(path), replacing(path, sweeping) as file:
        file.write(data)


def unfinished(path: Path) -> Path:
    """Where what is done of `path` is kept until all of it is. Raises OutputError for what has no name of its own."""
    if not path.name:
        raise OutputError(f"{path} is no name for an output, expected one in a folder; try -o {path / 'NAME'}")
    return path.with_name(path.name + ".partial")


def tidy_up(work: Path, result: Path, remove: Callable[[Path], None] = shutil.rmtree) -> None:
    """Remove what an unfinished `result` was kept in, a file or a directory, now that the result is whole.

    remove: how a directory goes. Raises OutputError that says so where it cannot be removed.
    """
    try:
        if work.is_dir():
            remove(work)
        else:
            work.unlink(missing_ok=True)
    except OSError as error:
        message = error.strerror or error
        raise OutputError(
            f"{result} is written, but {work} cannot be removed ({message}); remove it yourself"
        ) from error
