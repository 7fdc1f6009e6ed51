"""A command line in a child process with little memory and little time: what it said, and what is wrong with that.

Time is the processor's, so that a busy machine makes no difference; who waits without working is ended, too."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

MEMORY = 1 << 30  # bytes above what the libraries take
SECONDS = 20  # of the processor
WAITED = 300
TRACEBACK = 99


@dataclass(frozen=True)
class Said:
    """code: the exit code, or the negated number of the signal that ended the process."""

    code: int
    out: str
    err: str

    @property
    def wrong(self) -> str | None:
        """Why this is no way to end; None for success, and for one sentence."""
        if self.code in (-signal.SIGALRM, -signal.SIGXCPU):
            return f"not done after {SECONDS} s"
        if self.code < 0:
            return f"killed by {signal.Signals(-self.code).name}"
        if self.code == TRACEBACK or "Traceback" in self.err:
            return f"traceback: {self.err.strip().splitlines()[-1][:200] if self.err.strip() else 'without a word'}"
        lines = [x for x in self.err.splitlines() if x and not x.startswith("laser: warning: ")]
        problems = self.code == 1 and not lines and self.out.rstrip().endswith(" problems")  # verify tells on stdout
        if self.code and not problems and not (len(lines) == 1 and lines[0].startswith("laser: ")):
            return f"exit {self.code} with {len(lines)} lines: {self.err[-200:]!r}"
        if not self.code and lines:
            return f"exit 0 with {self.err[-200:]!r}"
        return None


def forked(work: Callable[[], bool]) -> bool:
    """Whether a child of this process has done its work."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if work() else 1)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def laser(
    *words: object, folder: Path, memory: int | None = MEMORY, then: Callable[[], str | None] | None = None
) -> Said:
    """`laser WORDS` in a fork of this process, in `folder`, within the limits.

    then: after a success, without the limit of memory: says what of the result is wrong, which then is no success.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _run([str(word) for word in words], folder, out.fileno(), err.fileno(), memory, then)
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "surrogateescape"))
    return Said(os.waitstatus_to_exitcode(status), *texts)


def _run(
    words: Sequence[str], folder: Path, out: int, err: int, memory: int | None, then: Callable[[], str | None] | None
) -> None:
    """The child: it never returns."""
    code = TRACEBACK
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        signal.alarm(WAITED)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
        os.chdir(folder)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        if memory is not None:
            used = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_DATA, (used + memory, resource.RLIM_INFINITY))
        from laser.cli import main

        code = main(list(words))
        if not code and then is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            if told := then():
                print(f"silent wrong: {told}", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
