"""How every input file is opened: a regular file, at once, and no more of it than was meant to be read.

A FIFO waits for ever for somebody to write, /dev/zero has no end, and opening some devices does something. What is no
regular file is an OSError here, as a missing one is, so that whoever opens says which file it was and what to try.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

LARGEST = 100_000_000  # bytes of a config, an index or a record; safetensors has the same limit for headers
LARGEST_TEXT = 2_000_000_000  # bytes of a text, which is held in memory whole, several times over
KINDS = {
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


def read_regular(path: Path, most: float = LARGEST, *, follow: bool = True) -> bytes:
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
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, expected a regular file")
