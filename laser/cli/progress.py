"""How far a verb is: a bar on a terminal; elsewhere, as under nohup or in a log file, a plain line every 30 seconds."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

from tqdm import tqdm

from laser.cli import common
from laser.escape import visible

if TYPE_CHECKING:
    from laser.checkpoint.matrices import Matrix

EVERY = 30.0  # seconds between two plain lines


class Lines(tqdm):
    """Instead of a bar a line, now and then: what is done, of how much, how long it took, how long it will take."""

    def __init__(self, say: Callable[[str], None], **how: Any) -> None:
        self._say = say
        super().__init__(file=io.StringIO(), mininterval=EVERY, miniters=0, delay=EVERY, **how)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None and self.n:
            self._say(self.line())

    def line(self) -> str:
        found = self.format_dict
        done, total, seconds = found["n"], found["total"], found["elapsed"]
        if found["unit"] == "%":
            told = f"{100 * done / max(total, 1):.0f} %"
        elif found["unit_scale"]:
            told = " of ".join(f"{self.format_sizeof(x)}B" for x in (done, total) if x)
        else:
            told = " ".join([f"{done}", *([f"of {total}"] if total else []), found["unit"]])
        if isinstance(self.postfix, str) and self.postfix:
            told += f", {self.postfix}"
        left = f", about {_clock(seconds * (total - done) / done)} left" if total and done else ""
        return f"laser: {self.desc.removesuffix(': ')}: {told}; {_clock(seconds)}{left}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class Bar:
    """What a verb tells of its way. total: of what `update` counts; None as long as it is not known.

    size: bytes are counted. As a context manager it ends with the work.
    """

    def __init__(
        self, what: str, total: float | None = None, *, unit: str = "steps", size: bool = False, **how: Any
    ) -> None:
        how |= {"desc": what, "total": total, "unit": "B" if size else unit, "unit_scale": size, "leave": False}
        talk, self._shown, self._what = common.talk(), list[tqdm](), what
        self._each = talk.verbose
        if sys.stderr is not None and not talk.quiet and not talk.verbose:
            if sys.stderr.isatty():
                self._shown.append(tqdm(**how))
            else:
                self._shown.append(Lines(lambda line: common.say(line, aside=True, log=False), **how))
        if talk.log is not None and not talk.verbose:  # else it gets a line for each
            self._shown.append(Lines(talk.write, **how))

    def update(self, count: float = 1, now: str = "", total: float | None = None) -> None:
        """So much more is done. now: what of, in words."""
        if now and self._each:
            common.say(f"laser: {self._what}: {now}", aside=True)
        for each in self._shown:
            each.total = total if total is not None else each.total
            if now:
                each.set_postfix_str(visible(now), refresh=False)
            each.update(count)

    @property
    def done(self) -> float:
        return self._shown[0].n if self._shown else 0

    def close(self) -> None:
        for each in self._shown:
            each.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Checking:
    """A bar while bytes of an earlier run are read again; nothing where there are few."""

    def __init__(self) -> None:
        self._bar: Bar | None = None

    def __call__(self, so_far: int, total: int) -> None:
        self._bar = self._bar or Bar("check", total, size=True)
        self._bar.update(so_far - self._bar.done, total=total)
        if so_far >= total:
            self.__exit__()

    def __enter__(self) -> Checking:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Progress(Bar):
    """Of work on matrices. Its measure is m * n * min(m, n), so that the time left can be believed."""

    def __init__(self, what: str, matrices: Sequence[Matrix]) -> None:
        shape = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
        super().__init__(what, sum(m.cost for m in matrices), unit="%", bar_format=shape)

    def __call__(self, matrix: Matrix, *_: object) -> None:
        self.update(matrix.cost, matrix.name)
