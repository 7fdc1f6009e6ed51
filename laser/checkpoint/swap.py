"""Where an output is written: beside an earlier one, whose place it takes when it is whole.

What lies on the disk meanwhile:

    OUT          the earlier output, untouched until the new one is whole
    .OUT.new     the new one, in work; `--force --resume` goes on with it, whole or not
    .OUT.old     the new one, whole, for the moment before the two are exchanged; then the earlier one on its way out
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from laser.checkpoint.packed import require_unpacked
from laser.checkpoint.reader import OUTCOME, Checkpoint
from laser.checkpoint.writer import (
    JOURNAL,
    RECORDS,
    is_ours,
    is_settled,
    prepare_output,
    require_apart,
    require_ours,
    require_room,
    require_side_files,
    require_usable,
)
from laser.errors import OutputError
from laser.files import claimed, disk_errors, real, require_no_mount, short, tidy_up
from laser.parts import journals_there

EXCHANGE, AT_FDCWD = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)  # to the kernel, or to the file system


@contextmanager
def writing(source: Checkpoint, out: Path, *, resume: bool, force: bool) -> Iterator[Path]:
    """The directory in which to write the output `out`, which is there when the body ends without an error.

    With `force`, an earlier output of laser stands until then. Nobody else writes to `out` meanwhile. Raises
    OutputError where `out` may not be written or replaced, or somebody is at work on it.
    """
    require_place(source, out, resume=resume, force=force)
    target, new, old = real(out), _beside(out, "new"), _beside(out, "old")
    with claimed(out):
        with disk_errors(out):
            swapped = _recover(source, target, new, old)
            if force and new.is_dir() and not target.exists():  # the earlier output was removed meanwhile
                _require_own(new)
                if resume:
                    new.rename(target)
                    swapped = True
                else:
                    _remove(new)
        if not force or not target.exists() or (swapped and resume):
            prepare_output(source, out, resume=resume)
            yield out
            return
        require_ours(source, out)
        with disk_errors(new):
            if not resume:
                _require_own(new)
                _remove(new)
        prepare_output(source, new, resume=True)
        try:
            yield new
        except BaseException:
            if not any(p.is_file() and p.name != Path(JOURNAL).name for p in new.rglob("*")):
                shutil.rmtree(new, ignore_errors=True)  # refused before there was any work to keep
            raise
        with disk_errors(out):
            if target.exists():  # again: hours have passed, and whatever somebody has put there would go with it
                try:
                    require_ours(source, out)
                except OutputError as error:
                    raise OutputError(f"{error}, and run the same command again with --resume: all is done") from error
            _exchange(new, target, old)
        tidy_up(old, out, _remove)


def _recover(source: Checkpoint, target: Path, new: Path, old: Path) -> bool:
    """End what a killed process left half done in an exchange; returns whether the new output lies in its place."""
    if not old.is_dir() or old.is_symlink():
        return False
    _require_own(old)
    if not target.exists():  # killed between two renames
        old.rename(target)
        return False
    if not new.exists() and is_settled(source, old) and not _is_later(target, old):  # killed before the exchange
        old.rename(new)
        return False
    _remove(old)
    return True


def require_place(source: Checkpoint, out: Path, *, resume: bool, force: bool) -> Path:
    """The directory in which `writing` would write, perhaps not there yet.

    Raises OutputError where `writing` would, or the disk has no room; makes nothing, so it can come first of all.
    """
    require_unpacked(source)
    new = _beside(out, "new")
    place = new if force and (out.exists() or new.exists()) else out
    require_apart(source, out)
    for folder in (new, _beside(out, "old")):
        _require_own(folder)
    if place == out and not (_beside(out, "old").exists() and not out.exists()):  # else killed between two renames
        require_usable(source, out, resume=resume)
    elif out.exists():
        require_no_mount(out)
        require_ours(source, out)
    require_side_files(source)
    there = {s.name for s in source.shards if resume and (place / s.name).exists()}
    require_room(source, place, there)
    return place


def _beside(out: Path, end: str) -> Path:
    target = real(out)
    return target.with_name(f".{short(target.name)}.{end}")


def _require_own(folder: Path) -> None:
    """Raises OutputError for a directory of the name that an exchange uses, which laser did not make."""
    try:
        foreign = folder.is_dir() and not is_ours(folder) and any(p.name != RECORDS for p in folder.iterdir())
    except FileNotFoundError:  # another process has just removed its own
        return
    if foreign:
        raise OutputError(f"{folder} was not made by laser, which needs the name; move it away")


def _remove(folder: Path) -> None:
    """A directory of laser. The file that says so goes last: what a kill leaves of it is still laser's."""
    if not folder.is_dir() or folder.is_symlink():
        return
    marks = (folder / OUTCOME, folder / JOURNAL, *journals_there(folder / JOURNAL))
    last = next((mark for mark in marks if mark.exists()), marks[0])
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a directory before the directory
        if path.is_symlink() or not path.is_dir():
            if path != last:
                path.unlink()
        elif path not in last.parents:
            path.rmdir()
    shutil.rmtree(folder)


def _is_later(one: Path, other: Path) -> bool:
    """Whether the outcome in one directory was written behind that in the other."""
    return (one / OUTCOME).exists() and (one / OUTCOME).stat().st_mtime_ns > (other / OUTCOME).stat().st_mtime_ns


def _exchange(new: Path, target: Path, old: Path) -> None:
    """`new` in the place of `target`, which becomes `old`: at once where the system can, so that no kill falls
    between. Where it fails, `target` is as it was."""
    if not target.exists():  # removed meanwhile
        new.rename(target)
        return
    if _renameat2() is not None:
        new.rename(old)  # so that what is called `new` is never the earlier one
        try:
            if exchange(old, target):
                return
        except OSError:
            old.rename(new)
            raise
        old.rename(new)
    _in_two_steps(new, target, old)


def take_place(new: Path, out: Path, old: Path) -> None:
    """`new` in the place of `out`; an earlier one is called `new` or `old` then, and its maker removes it.

    Where it fails `out` is as it was. A kill may fall between two renames where the system exchanges no names: see
    `restore_earlier`.
    """
    if not out.exists():
        new.rename(out)
    elif not exchange(new, out):
        if old.exists():  # of an exchange that was done
            shutil.rmtree(old)
        _in_two_steps(new, out, old)


def restore_earlier(out: Path, old: Path) -> None:
    """The earlier output in its place again, where a kill fell between the two renames of `take_place`."""
    if old.is_dir() and not out.exists():
        with disk_errors(out):
            old.rename(out)


def _in_two_steps(new: Path, target: Path, old: Path) -> None:
    """By two renames. Where the second fails the first is taken back."""
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise


def _renameat2() -> Any:
    """The C library's function that exchanges two names, None where it has none."""
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None


def exchange(one: Path, other: Path) -> bool:
    """Two files or directories in each other's places, at once, where the system can; returns whether it could."""
    swap = _renameat2()
    if swap is None:
        return False
    if swap(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) not in NO_EXCHANGE:
        raise OSError(number, os.strerror(number))
    return False
