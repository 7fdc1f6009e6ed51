"""How much of the host's memory this process has taken, and how much it may still take.

That is the least that the system, its containers and its own limits leave. Nothing else in laser reads them.

A container's limit counts with those of all that it lies in. Cached pages of files that nobody has mapped are not
counted as used, since the kernel gives them back before it refuses (Documentation/admin-guide/cgroup-v2.rst, and
cgroup-v1/memory.rst for the older kind).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Files:
    """What one kind of control group calls its files and the entries of its memory.stat."""

    limits: tuple[str, ...]
    used: str
    cached: tuple[str, ...]
    mapped: str


# memory.high is no hard limit, but over it a process is slowed down until it stands still.
VERSION_2 = Files(("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file"), "file_mapped")
VERSION_1 = Files(
    ("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"),
    "total_mapped_file",
)  # fmt: skip


def host_free_bytes(mapped: int = 0, root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take; None where the system does not say.

    mapped: bytes of files that are going to be mapped for this process alone. They cost no memory, but its own limits
    (ulimit -d, ulimit -v) count them. root: where /proc and /sys lie.
    """
    left = [*_of_the_system(root), *_of_groups(root), *(free - mapped for free in _of_the_process(root))]
    return max(min(left), 0) if left else None


def _of_the_system(root: Path) -> Iterator[int]:
    """Bytes that the system would give without swapping."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _system_file(root / "proc/meminfo"), re.M)
    if found:
        yield 1024 * int(found[1])
    elif sys.platform == "darwin":
        yield from _of_a_mac(_output("vm_stat"))
    else:
        try:  # half of what is built in: nobody says how much of it others hold
            yield os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        except (ValueError, OSError, AttributeError):
            return


def _of_a_mac(text: str) -> Iterator[int]:
    """Bytes in pages that are free, or that may be dropped, by the output of vm_stat."""
    size = re.search(r"page size of (\d+) bytes", text)
    pages = re.findall(r"^Pages (?:free|inactive|speculative|purgeable):\s+(\d+)\.", text, re.M)
    if size and pages:
        yield int(size[1]) * sum(map(int, pages))


def _output(command: str) -> str:
    try:
        return subprocess.run([command], capture_output=True, text=True, check=False, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


# --- control groups ---------------------------------------------------------------------------------------------------


def _of_groups(root: Path) -> Iterator[int]:
    """What each group that this process lies in leaves, from its own up to the outermost that can be seen."""
    for mount, inside, files in _memberships(root):
        place = PurePosixPath(inside)
        for group in (place, *place.parents):
            yield from _of_a_group(mount / group.as_posix().lstrip("/"), files)


def _of_a_group(folder: Path, files: Files) -> Iterator[int]:
    used = _number_in(folder / files.used)
    limits = [limit for name in files.limits if (limit := _number_in(folder / name)) is not None]
    if used is None or not limits:
        return
    stat = dict(re.findall(r"^(\w+) (\d+)$", _system_file(folder / "memory.stat"), re.M))
    cached = sum(int(stat.get(name, 0)) for name in files.cached) - int(stat.get(files.mapped, 0))
    yield min(limits) - max(used - max(cached, 0), 0)


def _memberships(root: Path) -> Iterator[tuple[Path, str, Files]]:
    """Where each hierarchy that limits memory is mounted, the path of our group in it, and how its files are called.

    In a container the mount may begin at the container's own group; then paths count from there.
    """
    mine: dict[str, str] = {}
    for line in _system_file(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        for controller in controllers.split(","):
            mine[controller] = path
    for line in _system_file(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or not kind:
            continue
        if kind[0] == "cgroup2":
            files, path = VERSION_2, mine.get("")
        elif kind[0] == "cgroup" and "memory" in kind[-1].split(","):
            files, path = VERSION_1, mine.get("memory")
        else:
            continue
        begins, mount = (re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), field) for field in fields[3:5])
        inside = (path or "/").removeprefix(begins.rstrip("/"))
        if ".." in inside.split("/") or not (root / mount.lstrip("/") / inside.lstrip("/")).is_dir():
            inside = "/"
        yield root / mount.lstrip("/"), inside, files


# --- limits of the process --------------------------------------------------------------------------------------------


def _of_the_process(root: Path) -> Iterator[int]:
    """What RLIMIT_DATA and RLIMIT_AS (ulimit -d and -v) leave, where they are set."""
    try:
        import resource  # not on Windows
    except ImportError:
        return
    status = _system_file(root / "proc/self/status")
    for limit, entry in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        soft, _ = resource.getrlimit(limit)
        used = re.search(rf"^{entry}:\s+(\d+) kB", status, re.M)
        if soft != resource.RLIM_INFINITY and used:
            yield soft - 1024 * int(used[1])


# --- what it has taken ------------------------------------------------------------------------------------------------


def resident_bytes(peak: bool = False) -> int | None:
    """Of this process's memory what is in RAM now, or was at the most; None where the system does not say.

    Not getrusage on Linux: a child inherits its maximum.
    """
    found = re.search(rf"^{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", _system_file(Path("/proc/self/status")), re.M)
    if found:
        return 1024 * int(found[1])
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _number_in(path: Path) -> int | None:
    """What a file holds; None where it is not there or says `max`."""
    text = _system_file(path).strip()
    return int(text) if text.isdecimal() else None


def _system_file(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""
