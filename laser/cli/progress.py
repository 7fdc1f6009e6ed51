"""How far a verb is: a bar on a terminal; elsewhere, as under nohup or in a log file, a plain line every 30 seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from threading import Event, RLock, Thread
from typing import TYPE_CHECKING, Any, Self

from tqdm import tqdm

from laser.cli import common
from laser.escape import visible

if TYPE_CHECKING:
    from laser.checkpoint.matrices import Matrix

EVERY = 30.0  # seconds between two plain lines
SOONEST = 1.0  # seconds: how often it is looked whether a line is due, at most
SHAPE = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"  # of a bar whose measure is no number that people know


class Lines:
    """Instead of a bar a line, now and then: what is done, of how much, how long it took, how long it will take.

    Also while one step takes long and nothing is done: a thread looks whether a line is due. say: takes the line;
    begun: what was done before, at no cost of this work; clock: seconds that only rise.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        what: str,
        total: float | None,
        unit: str,
        *,
        begun: float = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.n, self.total, self.now = begun, total, ""
        self._say, self._what, self._unit, self._begun, self._clock = say, what, unit, begun, clock
        self._start = self._last = clock()
        self._lock, self._ended = RLock(), Event()
        Thread(target=self._remind, daemon=True).start()

    def update(self, count: float) -> None:
        with self._lock:
            self.n += count
            self.say_if_due()

    def say_if_due(self) -> None:
        with self._lock:
            if not self._ended.is_set() and self._clock() - self._last >= EVERY:
                self._last = self._clock()
                self._say(self.line())

    def _remind(self) -> None:
        with suppress(OSError, ValueError):  # nobody listens any more: the work itself will say so
            while not self._ended.wait(max(EVERY - (self._clock() - self._last), SOONEST)):
                self.say_if_due()

    def line(self) -> str:
        seconds, done = self._clock() - self._start, self.n - self._begun
        if self._unit == "%":
            told = f"{100 * self.n / max(self.total or 0, 1):.0f} %"
        elif self._unit == "B":
            told = " of ".join(f"{tqdm.format_sizeof(x)}B" for x in (self.n, self.total) if x is not None)
        else:
            told = " ".join([f"{self.n:g}", *([f"of {self.total:g}"] if self.total else []), self._unit])
        told += f", {self.now}" if self.now else ""
        to_come = max((self.total or 0) - self.n, 0)
        left = f", about {_clock(seconds * to_come / done)} left" if self.total and done > 0 else ""
        return f"laser: {self._what}: {told}; {_clock(seconds)}{left}"

    def close(self) -> None:
        self._ended.set()
        with self._lock:  # a line that is being said is said
            pass


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class Bar:
    """What a verb tells of its way. total: of what `update` counts; None as long as it is not known.

    size: bytes are counted; begun: what was done before. As a context manager it ends with the work.
    """

    def __init__(
        self,
        what: str,
        total: float | None = None,
        *,
        unit: str = "steps",
        size: bool = False,
        begun: float = 0,
        shape: str | None = None,
    ) -> None:
        talk, stream, self._what = common.talk(), sys.stderr, what
        self._shown, self._each, unit = list[Any](), talk.verbose, "B" if size else unit

        def say(line: str) -> None:  # where others have taken the place of stderr meanwhile, it is still this one
            common.say(line, aside=True, log=False, where=stream)

        if stream is not None and not talk.quiet and not talk.verbose:
            if stream.isatty():
                how = {"desc": what, "total": total, "initial": begun, "unit": unit, "unit_scale": size}
                self._shown.append(tqdm(**how, bar_format=shape, leave=False))
            else:
                self._shown.append(Lines(say, what, total, unit, begun=begun))
        if talk.log is not None and not talk.verbose:  # else it gets a line for each
            self._shown.append(Lines(talk.write, what, total, unit, begun=begun))

    def expect(self, total: float) -> None:
        """So much will be done in all, as far as is known now."""
        for each in self._shown:
            each.total = total

    def update(self, count: float = 1, now: str = "", to_come: float | None = None) -> None:
        """So much more is done. now: what of, in words; to_come: what is still to be done then."""
        if now and self._each:
            common.say(f"laser: {self._what}: {now}", aside=True)
        if to_come is not None:
            self.expect(self.done + count + to_come)
        for each in self._shown:
            if now and isinstance(each, Lines):
                each.now = visible(now)
            elif now:
                each.set_postfix_str(visible(now), refresh=False)
            each.update(count)

    @property
    def done(self) -> float:
        return self._shown[0].n if self._shown else 0

    def close(self) -> None:
        """Nothing is told any more, whatever is done."""
        while self._shown:
            self._shown.pop().close()

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
        self._bar.update(so_far - self._bar.done, to_come=total - so_far)
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
        super().__init__(what, sum(m.cost for m in matrices), unit="%", shape=SHAPE)
        self._count, self._of = 0, len(matrices)

    def __call__(self, matrix: Matrix, *_: object) -> None:
        self._count += 1
        self.update(matrix.cost, f"{self._count} of {self._of} matrices, {matrix.name}")


class Download(Bar):
    """Of one file from the Hub, whose client asks for what mimics tqdm, by tqdm's names."""

    name = ""

    @classmethod
    def of(cls, name: str) -> type[Download]:
        """The class for a file, which the client knows by a part of its address."""
        return type(cls.__name__, (cls,), {"name": name})

    def __init__(self, *, total: float | None = None, initial: float = 0, **_: Any) -> None:
        super().__init__(f"download {self.name}", total, size=True, begun=initial)
        if self._each:
            common.say(f"laser: {self._what}", aside=True)
        self._total = total

    @property
    def total(self) -> float | None:
        return self._total

    @total.setter
    def total(self, total: float | None) -> None:
        self._total = total
        if total is not None:
            self.expect(total)

    n = Bar.done

    def refresh(self, *_: Any, **__: Any) -> None:
        """What is shown is so at every update."""

    # The client's reports of its speed, and of bytes on their way, which are written to the file a moment later.
    set_postfix_str = update_transfer = set_transfer_postfix_str = refresh
