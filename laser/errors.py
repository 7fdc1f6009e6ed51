"""Everything that `laser` raises on purpose.

    LaserError                 base: one clear message, exit code 1
    ├── UsageError             the request itself cannot be met (no such rule, role or layer); exit code 2
    ├── CheckpointError        the source is not a checkpoint that can be trusted: names the file or tensor
    ├── RecordError            a spectra, plan or outcome file is broken or was made from another checkpoint
    ├── OutputError            the result cannot be written: it exists, the disk is full, the place is wrong
    └── NumericalError         a factorisation failed its certificate; carries the residual that it measured

A message names the file or tensor, shows found and expected, and ends with what to try.
"""

from __future__ import annotations

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


class NumericalError(LaserError):
    """A decomposition missed its certificate on every step of the ladder.

    `residual` is the value that was measured (dimensionless, relative to the matrix's Frobenius norm), or None
    where no factorisation came back at all.
    """

    def __init__(self, message: str, residual: float | None = None) -> None:
        super().__init__(message)
        self.residual = residual
