"""The command line: verbs of the flow, one file per group of verbs. A package and not one file because the verbs are
many; it holds no logic of its own."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

import typer

from laser.checkpoint.answers import downloads_shown_by
from laser.cli import common, options, verbs
from laser.cli.complete import one_of
from laser.cli.help import command_of
from laser.errors import (
    CrowdWarning,
    DoubtWarning,
    LaserError,
    OutOfMemory,
    UsageError,
    first_line,
    out_of_memory_in,
    remedy,
)
from laser.start import was_interrupted

app = typer.Typer(
    name="laser",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Random-matrix rank reduction for language-model checkpoints, in the memory of one matrix.",
)
VERBS = (
    *(verbs.info, verbs.scan, verbs.plan, verbs.reduce, verbs.verify, verbs.run, verbs.devices),
    *(verbs.eval, verbs.calibrate, verbs.search, verbs.leaderboard, verbs.card, verbs.push),
    *(verbs.null, verbs.spectra, verbs.plot, verbs.report, verbs.convert),
    *(verbs.delta, verbs.unmerge, verbs.rebuild, verbs.compensate),
)
for verb in VERBS:
    command_of(app, verb, options.with_options(verb))


# Verb -> what is left of one that was interrupted. Of the others nothing is: their files appear whole or not at all.
_RESUMED = "what is finished is kept, run the command again with --resume"
_GOES_ON = "what is finished is kept, run the same command again"
_INTERRUPTED: dict[str, str] = dict.fromkeys(("reduce", "run"), _RESUMED)
_INTERRUPTED |= dict.fromkeys(
    ("scan", "delta", "unmerge", "compensate", "search", "calibrate", "leaderboard"), _GOES_ON
)
_INTERRUPTED["push"] = "what is uploaded stays there, run the same command again"


def _going_on(arguments: list[str]) -> str:
    """The verb whose work is kept where it ends early; "" for a dry run, which makes nothing to go on with."""
    return "" if "--dry-run" in arguments else _verb(arguments)


def left_behind(verb: str, written: Mapping[Path, bool]) -> str:
    """What is left of an interrupted verb, and how to go on. written: whether each of its files is there already."""
    there = [str(path) for path, whole in written.items() if whole]
    if there and all(written.values()):
        return f"{' and '.join(there)} is written, whole: there is nothing left to do"
    if there:
        return f"{' and '.join(there)} is written, whole; for the rest run the same command again, with --force"
    return _INTERRUPTED.get(verb, "nothing was written")


@cache
def _click_commands() -> Any:
    """click's commands, made once: typer would make them at every call, and take 0.06 s."""
    if os.environ.get(ASKED):
        _know_shells()
    return typer.main.get_command(app)


SHELLS = ("bash", "zsh", "fish")
ASKED = "_LASER_COMPLETE"  # by which a shell's script asks for completions: so typer calls it


def _know_shells() -> None:
    """Register typer's shells, which it does only where the command also has an option that writes to ~/.bashrc."""
    from typer.completion import get_completion_inspect_parameters

    get_completion_inspect_parameters()


def _show_completion(ctx: typer.Context, shell: str | None) -> None:
    if shell is None or ctx.resilient_parsing:
        return
    if shell not in SHELLS:
        raise UsageError(f"no script completes for {shell!r}; try --completion {', '.join(SHELLS)}")
    from typer.completion import shell_complete

    _know_shells()
    raise typer.Exit(shell_complete(ctx.command, {}, "laser", ASKED, f"source_{shell}"))


def _show_version(ctx: typer.Context, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        from importlib.metadata import PackageNotFoundError, version

        try:
            common.say(f"laser {version('laser-rmt')}")
        except PackageNotFoundError:
            common.say("laser, run from a folder in which it is not installed, and so without a version")
        raise typer.Exit


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    quiet: bool = typer.Option(False, "-q", "--quiet", help="Only the result and errors: no progress, no notes."),
    verbose: bool = typer.Option(False, "-v", "--verbose", help="A line for each step."),
    log_file: Path | None = typer.Option(
        None, "--log-file", metavar="FILE", help="Add all that is said to this file, with its time."
    ),
    completion: str | None = typer.Option(
        None,
        "--completion",
        is_eager=True,
        callback=_show_completion,
        metavar="|".join(SHELLS),
        autocompletion=one_of(SHELLS),
        help='Print a script for tab completion: eval "$(laser --completion bash)".',
    ),
    version: bool = typer.Option(
        False, "--version", is_eager=True, callback=_show_version, help="Print the version and exit."
    ),
) -> None:
    """The options that may stand anywhere; `main` reads them, all but --completion and --version."""


def _tell(otherwise: Callable[..., None]) -> Callable[..., None]:
    """Doubts as a line for people, each once; every other warning as it was."""
    stated: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if issubclass(category, DoubtWarning | CrowdWarning):
            if str(message) not in stated:
                common.say(f"laser: warning: {message}", aside=True)
            stated.add(str(message))
        else:
            otherwise(message, category, *rest)

    return show


def _verb(arguments: list[str]) -> str:
    return next((a for a in arguments if not a.startswith("-")), "")


def _bar_of_download(name: str) -> type:
    from laser.cli.progress import Download

    return Download.of(name)


def _run_verb(arguments: list[str]) -> None:
    """One verb. What it printed has arrived when this ends: where it cannot, that is an OSError and no success."""
    try:
        _click_commands()(arguments, prog_name="laser")
    except SystemExit:  # how typer ends, whatever came of it
        if sys.stdout is not None:
            sys.stdout.flush()
        raise


def _hides_interrupt(error: Exception) -> bool:
    """Whether an interrupt is behind an error: libraries in C or Rust may put an error of their own in its place.

    Not so where an interrupted verb could not clean up, which is worth its own message."""
    cause = error.__context__
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__context__
    return was_interrupted() and not (cause is not None and isinstance(error, LaserError | OSError))


def _interrupted(arguments: list[str], held: common.Held) -> int:
    return _say(f"laser: interrupted; {left_behind(_going_on([*arguments, *held.given]), held.written())}", 130)


def _disk_error(error: OSError) -> int:
    """What is said of a file, or of a stream, that cannot be used."""
    if error.errno == errno.EPIPE:  # who reads has seen enough, as `| head` does
        _forget(sys.stdout)
        return 1
    if error.filename is not None:  # of a file, and not of what is printed
        return _say(f"laser: {error.filename}: {error.strerror}; {remedy(error)}", 1)
    _forget(sys.stdout)
    return _say(f"laser: cannot write: {error.strerror or error}; free some space, or print elsewhere", 1)


# --- out of memory ----------------------------------------------------------------------------------------------------

# Verbs with --device.
DEVICE_VERBS = (
    "scan",
    "delta",
    "unmerge",
    "compensate",
    "reduce",
    "run",
    "verify",
    "null",
    "eval",
    "search",
    "calibrate",
    "leaderboard",
)
ACCELERATORS = ("cuda", "cublas", "hip", "xpu", "mps backend", "invalid buffer size")  # in what they say of themselves


@dataclass(frozen=True)
class Less:
    """What asks for less memory. unless: words of a command line that has it already, or does not take it. where: on
    which side, "host" or "device", it helps; both where that is empty."""

    way: str
    verbs: tuple[str, ...]
    unless: tuple[str, ...] = ()
    where: str = ""

    def changes(self, verb: str, given: str, side: str) -> bool:
        """Whether what this verb has finished is of another run then."""
        import torch

        alone = not (torch.cuda.is_available() or torch.backends.mps.is_available())  # the host is the only device
        same = side == "host" and (alone or "--device cpu" in given)
        return any(option in self.way.split() for option in BOUND.get(verb, ()) if not (same and option == "--device"))


# The mildest first.
LESS = (
    Less("--stream", ("eval", "search", "run"), ("--stream",)),
    Less(
        "--device cpu --workers 1",
        ("scan", "delta", "unmerge", "compensate", "reduce", "run"),
        ("--workers", "--engine"),
        "host",
    ),
    Less("--no-leaderboard", ("run",)),
    Less("--batch-size 1", ("leaderboard",), ("--batch-size 1",)),
    Less("a smaller --window", ("eval", "search", "run", "calibrate", "compensate")),
    Less(
        "--dtype bfloat16", ("eval", "search", "run", "calibrate", "compensate", "leaderboard"), ("--dtype bfloat16",)
    ),
    Less("--device cpu", DEVICE_VERBS, ("--device cpu",), "device"),
)
# Verb -> those of these options that its journal is bound to: what is finished is of no use with another value.
BOUND: dict[str, tuple[str, ...]] = dict.fromkeys(("scan", "delta", "unmerge", "reduce"), ("--device",))
BOUND |= dict.fromkeys(("run", "search"), ("--device", "--window", "--dtype"))
BOUND |= {"calibrate": ("--window", "--dtype"), "leaderboard": ("--device", "--dtype", "--batch-size")}
BOUND |= {"compensate": ("--device", "--window", "--dtype")}


def out_of_memory(error: BaseException, arguments: list[str], idle: Collection[str] = ()) -> str:
    """One line: what failed, what to try that this command line does not have already, and what was kept.

    idle: options that do nothing in it."""
    verb, message = _verb(arguments), first_line(error)
    side = "device" if any(name in message.lower() for name in ACCELERATORS) else "host"
    given = " ".join(arguments).replace("=", " ")
    helps = [
        less
        for less in LESS
        if verb in less.verbs
        and less.where in ("", side)
        and not any(f" {word}" in given for word in less.unless)
        and not any(option in less.way.split() for option in idle)
    ]
    goes_on = _going_on(arguments)
    words = [less.way for less in helps if not goes_on or not less.changes(verb, given, side)]
    anew = [less.way for less in helps if less.way not in words]
    tries = f"try {', or '.join(words)}" if words else "try a machine with more, or end what else runs here"
    kept = f"; {_INTERRUPTED[goes_on]}" if goes_on in _INTERRUPTED else ""
    afresh = f"; or begin anew with --force and {', or '.join(anew)}" if anew else ""
    return f"out of memory ({message}); {tries}{kept}{afresh}"


# --- one command line -------------------------------------------------------------------------------------------------


def _say(line: str, code: int) -> int:
    """A line on stderr, where that takes it, and the exit code."""
    try:
        common.say(line, aside=True)
    except (OSError, ValueError):  # full, or closed since
        if sys.stderr is not None:
            _forget(sys.stderr)
    return code


def _forget(stream: TextIO | None) -> None:
    """Let what a stream still holds go nowhere: Python would print a traceback about it at the end."""
    if stream is None:  # closed from the start
        return
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    held, talk = common.Held(), common.Talk()
    arguments = _without_talk(sys.argv[1:] if arguments is None else arguments, talk)
    try:
        with common.talking(talk), downloads_shown_by(_bar_of_download):
            return _ended(arguments, held)
    except KeyboardInterrupt:  # outside of typer, which makes a SystemExit of it, or while its end is told
        return _interrupted(arguments, held)


def _without_talk(arguments: list[str], talk: common.Talk) -> list[str]:
    """A command line without the options of `talk`, which may stand anywhere in it."""
    left, words = list[str](), iter(arguments)
    for word in words:
        name, _, value = word.partition("=")
        if word in ("-q", "--quiet"):
            talk.quiet = True
        elif word in ("-v", "--verbose"):
            talk.verbose = True
        elif name == "--log-file":
            talk.file = value or next(words, "")
        else:
            left.append(word)
    return left


def _ended(arguments: list[str], held: common.Held) -> int:
    """The exit code of a verb, whatever became of it."""
    debug = "--debug" in arguments
    for stream in (sys.stdout, sys.stderr):  # a path may hold bytes that are no UTF-8
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        common.talk().open()
        with warnings.catch_warnings():
            for kind in (DoubtWarning, CrowdWarning):
                warnings.simplefilter("always", kind)
            warnings.showwarning = _tell(warnings.showwarning)
            with common.one_verb(held):
                _run_verb([a for a in arguments if a != "--debug"])
    except Exception as error:
        if debug:
            raise
        if _hides_interrupt(error):
            return _interrupted(arguments, held)
        full = out_of_memory_in(error)
        if full is not None and not isinstance(full, OutOfMemory):  # also where it was taken for a damaged file
            return _say(f"laser: {out_of_memory(full, [*arguments, *held.given], held.idle)}", 1)
        if isinstance(error, LaserError):
            return _say(f"laser: {error}", error.exit_code)
        if isinstance(error, OSError):
            return _disk_error(error)
        raise
    except SystemExit as end:  # how typer ends: bad usage is 2, an interrupt 130
        if end.code == 130:
            return _interrupted(arguments, held)
        return end.code if isinstance(end.code, int) else 1 if end.code else 0
    return 0
