"""Everything that `laser` raises on purpose.

    LaserError                 base: one clear message, exit code 1
    ├── UsageError             the request itself cannot be met (no such rule, role or layer); exit code 2
    ├── CheckpointError        the source is not a checkpoint that can be trusted: names the file or tensor
    ├── RecordError            a spectra, plan or outcome file is broken or was made from another checkpoint
    ├── OutputError            the result cannot be written: it exists, the disk is full, the place is wrong
    ├── OutOfMemory            it does not fit into the memory that is free; found before or while it is tried
    └── NumericalError         a factorisation failed its certificate; carries the residual that it measured

A message names the file or tensor, shows found and expected, and ends with what to try.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

LONGEST_MESSAGE = 2000  # characters of one of ours; of a longer one, the beginning and the end, which says what to try
LONGEST = 200  # characters of another library's message that one of ours repeats


def first_line(error: BaseException) -> str:
    """The first line of another library's error, cut at a word: some of them list every model there is.

    The name of its type where it says nothing.
    """
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= LONGEST else line[:LONGEST].rsplit(" ", 1)[0] + " ..."


class DoubtWarning(UserWarning):
    """What a checkpoint holds had to be guessed or chosen; the message says what was taken for what."""


class CrowdWarning(UserWarning):
    """Spikes are so many that a rule takes them for noise; the message lists the matrices."""


class LaserError(Exception):
    """Base of all expected failures; `str(error)` is what the user reads."""

    exit_code = 1

    def __str__(self) -> str:
        text = super().__str__()  # what a file calls its tensors may be as long as the file
        return text if len(text) <= LONGEST_MESSAGE else f"{text[: LONGEST_MESSAGE // 2]} ... {text[-LONGEST:]}"


class UsageError(LaserError):
    """The arguments ask for something that does not exist."""

    exit_code = 2


class CheckpointError(LaserError):
    """A model directory, index, shard or tensor is missing, damaged or not supported."""


class RecordError(LaserError):
    """A record (spectra, plan, outcome, recipe, journal) is damaged or belongs to another checkpoint."""


class OutputError(LaserError):
    """The output cannot be written; nothing that looks whole has been left behind."""


class OutOfMemory(LaserError):
    """What is asked for does not fit into the memory that is free. `why`: the sentence, `advice`: what to try."""

    def __init__(self, why: str, advice: str) -> None:
        super().__init__(f"{why}; {advice}")
        self.why, self.advice = why, advice


# How torch says it in a plain RuntimeError: an accelerator and its libraries, and the host's allocator, which knows no
# other class; and Python where the next thread's stack does not fit.
_OUT_OF_MEMORY = (
    *("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "status_alloc_failed"),
    *("invalid buffer size", "bad_alloc", "bad allocation", "can't start new thread"),
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that memory ran out, on a device or on the host."""
    return out_of_memory_in(error) is not None


def out_of_memory_in(error: BaseException | None) -> BaseException | None:
    """The error that says so: this one, one that it was raised from, or None.

    torch.OutOfMemoryError is a RuntimeError, NumPy's _ArrayMemoryError a MemoryError, and an OSError says ENOMEM. What
    was being handled when an error of laser's own was raised counts only where that says `from`.
    """
    for each in _chain(error):
        if isinstance(each, MemoryError | OutOfMemory) or (isinstance(each, OSError) and each.errno == errno.ENOMEM):
            return each
        message = f"{type(each).__name__}: {each}".lower().replace("outofmemory", "out of memory")
        if isinstance(each, RuntimeError) and any(words in message for words in _OUT_OF_MEMORY):
            return each
    return None


_OF_A_DISK = {getattr(errno, name) for name in "ENOSPC EDQUOT EROFS EACCES EPERM EIO EFBIG EMFILE ENFILE".split()}


def disk_error_in(error: BaseException | None) -> OSError | None:
    """The error of a disk that cannot be written or read: this one, one that it was raised from, or None."""
    found = (each for each in _chain(error) if isinstance(each, OSError) and each.errno in _OF_A_DISK)
    return next(found, None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from."""
    seen: list[BaseException] = []  # an error can be among its own causes
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        implied = None if error.__suppress_context__ or isinstance(error, LaserError) else error.__context__
        error = error.__cause__ or implied


class NumericalError(LaserError):
    """A decomposition missed its certificate on every step of the ladder.

    `residual` is the value that was measured (dimensionless, relative to the matrix's Frobenius norm), or None
    where no factorisation came back at all.
    """

    def __init__(self, message: str, residual: float | None = None) -> None:
        super().__init__(message)
        self.residual = residual


def not_finite(dtype: object, way: str) -> str:
    """What to try where a model that runs in `dtype` gives NaN or Inf. way: how its verb runs in float32."""
    find = "laser scan to find NaN in its weights"
    return f"try {find}" if str(dtype).endswith("float32") else f"try {way}, or {find}"


def remedy(error: OSError) -> str:
    """What to try where a file cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space and run the same command again (reduce and run: with --resume)"
    if error.errno == errno.EFBIG:
        return "files may not be that large here: see ulimit -f, or try another disk"
    return "check the path and its permissions"
