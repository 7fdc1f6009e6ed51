"""What every verb shares: option types, tables for people, JSON for programs, progress bars."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from laser.checkpoint.families import Matrix
from laser.checkpoint.files import to_json
from laser.checkpoint.locks import claimed, real, require_led, require_no_mount
from laser.checkpoint.reader import OUTCOME
from laser.checkpoint.replaceable import require_outside_models, require_replaceable
from laser.checkpoint.writer import RECORDS
from laser.errors import OutputError
from laser.moments import Moments
from laser.report.visible import visible
from laser.selection import Selection, parse_layers, parse_roles

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory, or a Hub id, org/name[@revision].")]
Layers = Annotated[
    str | None, typer.Option("--layers", help="Only these layers: 0,4,20-31; of another stack: mtp:0, encoder:all.")
]
Roles = Annotated[str | None, typer.Option("--roles", help="Only these roles: w1,w2,w3,q,k,v,o (gate, down, up too).")]
Include = Annotated[str | None, typer.Option("--include", help="Only tensors whose name matches this expression.")]
Exclude = Annotated[str | None, typer.Option("--exclude", help="No tensor whose name matches this expression.")]
DeviceName = Annotated[str, typer.Option("--device", help="auto, cuda, mps or cpu.")]
DeviceNames = Annotated[
    str, typer.Option("--device", help="auto, cuda, mps or cpu; several: cuda:0,cuda:1, or all, two workers each.")
]
Workers = Annotated[
    int | None, typer.Option("--workers", help="On the cpu, one thread each; default: as cores and memory allow.")
]
Engine = Annotated[
    str, typer.Option("--engine", help="threads (here), ray, or ray://HOST:PORT (pip install 'laser-rmt[ray]').")
]
Precision = Annotated[str, typer.Option("--precision", help="auto, float64 or float32.")]
Method = Annotated[
    str, typer.Option("--method", help="auto, gram (fast), projector (products alone) or svd (reference).")
]
MomentsFile = Annotated[
    Path | None, typer.Option("--moments", help="File of laser calibrate: go by the inputs that matrices meet, too.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an earlier output.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an output that was interrupted.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Read headers only; print what would be done.")]


def selection(layers: str | None, roles: str | None, include: str | None, exclude: str | None) -> Selection:
    return Selection(parse_layers(layers), parse_roles(roles), include, exclude)


def moments_of(path: Path | None) -> Moments | None:
    """The moments at `path`, if one was given."""
    return None if path is None else Moments.load(path)


@dataclass
class Held:
    """What a verb keeps for itself until it ends, the files that it is to write, as they were when it began, and those
    of its options that do nothing as it was called."""

    stack: ExitStack = field(default_factory=ExitStack)
    files: dict[Path, tuple[int, int] | None] = field(default_factory=dict)
    idle: set[str] = field(default_factory=set)

    def written(self) -> dict[Path, bool]:
        """Whether each file is there, whole: they appear by a rename, as another file."""
        return {path: (now := _which(path)) is not None and now != before for path, before in self.files.items()}


def _which(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


_verb: ContextVar[Held | None] = ContextVar("what this verb holds", default=None)


@contextmanager
def one_verb(held: Held | None = None) -> Iterator[None]:
    """Around a verb: what it keeps for itself is given back when it ends."""
    held = held or Held()
    with held.stack:
        token = _verb.set(held)
        try:
            yield
        finally:
            _verb.reset(token)


def keep(path: Path) -> None:
    """Nobody else writes `path` until this verb ends. Raises OutputError where somebody is at work on it."""
    if (held := _verb.get()) is not None:
        held.stack.enter_context(claimed(path))


def to_write(path: Path) -> None:
    """This verb is to write `path`, which appears by a rename: should it be interrupted, it says whether it did."""
    if (held := _verb.get()) is not None:
        held.files[path] = _which(path)


def do_nothing(*options: str) -> None:
    """These options do nothing in this call of the verb: they are not advised."""
    if (held := _verb.get()) is not None:
        held.idle.update(options)


def keep_file(path: Path) -> None:
    """`keep`, of a file. Raises OutputError also where it is none, or its directory is missing or a model's."""
    place = real(path)
    require_led(path)
    records = place.parent.name == RECORDS and (place.parent.parent / OUTCOME).is_file()
    if not place.parent.is_dir() and not records:  # an output's own folder of records is made by whoever is first
        raise OutputError(f"there is no directory {place.parent}; make it, or try another -o")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} exists and is no file; try another name")
    require_outside_models(path)
    keep(path)


def refuse_to_overwrite(path: Path, force: bool, kind: str | None = None) -> None:
    """Keep `path` for this verb alone, until it ends: nobody else writes it meanwhile.

    Raises OutputError if it is there and may not be replaced, if its directory is missing, or if another process is at
    work on it. With `force` a file of the same `kind` that laser made may be replaced.
    """
    keep_file(path)
    if path.exists() and not force:
        raise OutputError(f"{path} exists; try another -o, or --force to replace it")
    if path.exists():
        require_no_mount(path)
        require_replaceable(path, kind)
    to_write(path)


def say(line: str, *, aside: bool = False) -> None:
    """One line for people; all that the verbs print for them goes through here, for names may hold anything.

    aside: on stderr, where there is one, at once.
    """
    stream = sys.stderr if aside else sys.stdout
    if stream is not None:  # `print` would take stdout in the place of a stderr that is closed
        print(visible(line), file=stream, flush=aside)


def print_json(document: Any) -> None:
    print_raw(to_json(document))


def print_raw(data: bytes) -> None:
    """A record in its own format, nothing around it."""
    if sys.stdout is None:
        raise OSError(errno.EBADF, "standard output is closed")
    sys.stdout.write(data.decode())


def print_table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Aligned columns, numbers to the right. Plain text: the same in a terminal, a pipe and a README."""
    cells = [list(headings)] + [[_text(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    right = [bool(rows) and isinstance(rows[0][i], int | float) for i in range(len(headings))]
    for row in cells:
        line = (cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True))
        say("  ".join(line).rstrip())


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else visible(value)


def print_plan(lines: Sequence[Any], limit: int = 40) -> None:
    """One row per reduced matrix (the first `limit`), what becomes zero, then how many were reduced and kept."""
    reduced = [line for line in lines if line.action == "reduce"]
    if reduced:
        print_table(
            ("matrix", "rank", "of", "SNR", "energy removed"),
            [(x.name, x.rank, x.full_rank, x.snr, _removed(x.energy_kept)) for x in reduced[:limit]],
        )
    if len(reduced) > limit:
        say(f"... and {len(reduced) - limit} more")
    if zeroed := [line.name for line in reduced if line.rank == 0]:
        more = f" and {len(zeroed) - 3} more" if len(zeroed) > 3 else ""
        say(f"RANK 0: {len(zeroed)} of them become ZERO, nothing of them is left: {', '.join(zeroed[:3])}{more}")
    kept = sum(line.action == "keep" for line in lines)
    skipped = [line for line in lines if line.action == "skip"]
    say(f"{len(reduced)} to reduce, {kept} to keep, {len(skipped)} skipped, of {len(lines)} tensors")
    for line in skipped[:limit]:
        say(f"  {line.name}: {line.why.text}")


def _removed(kept: float | None) -> str:
    return "-" if kept is None else f"{100 * (1 - kept):.2f} %"


class Checking:
    """A bar while bytes of an earlier run are read again; nothing where there are few, or no terminal."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, so_far: int, total: int) -> None:
        if self._bar is None:
            self._bar = tqdm(total=total, desc="check", unit="B", unit_scale=True, disable=None, leave=False)
        self._bar.total = total
        self._bar.update(so_far - self._bar.n)
        if so_far >= total:
            self.__exit__()

    def __enter__(self) -> Checking:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Progress:
    """A bar on a terminal, nothing elsewhere. Its measure is work (m * n * min(m, n)), so its ETA can be believed."""

    def __init__(self, what: str, matrices: Sequence[Matrix]) -> None:
        shape = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
        self._bar = tqdm(total=sum(m.cost for m in matrices), desc=what, bar_format=shape, disable=None, leave=False)

    def __call__(self, matrix: Matrix, *_: object) -> None:
        self._bar.set_postfix_str(visible(matrix.name), refresh=False)
        self._bar.update(matrix.cost)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
