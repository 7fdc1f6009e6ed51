"""The first and the last moment of the command: imports, interrupts, what is printed, and whose code is run."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import signal
import subprocess
import sys
import textwrap
import time
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from disk_faults import End, forked

from laser import __main__ as command
from laser import cli, start
from laser.cli import main

PACKAGE = Path(__file__).parent.parent / "laser"
LOADERS = {"from_pretrained", "from_config", "load_dataset", "HFLM"}


@pytest.mark.slow
def test_every_loader_is_told_to_run_no_code_of_a_model() -> None:
    calls = 0
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(getattr(node, "func", None), "attr", getattr(getattr(node, "func", None), "id", None))
            if isinstance(node, ast.Call) and name in LOADERS:
                told = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                assert told.get("trust_remote_code") is False, f"{path.name}, line {node.lineno}: {name}"
                calls += 1
    assert calls >= 9


# They take between half a second and three to import, and no page of help or line about a typing error needs them.
HEAVY = ("torch", "scipy", "transformers", "huggingface_hub", "matplotlib", "safetensors", "tqdm", "jinja2", "httpx2")


def imported_by(*words: str, code: str = "from laser.__main__ import main; main()") -> tuple[int, list[str]]:
    """The exit code of a command line, and which of HEAVY it imported; of any other code likewise."""
    told = f"import atexit, sys; atexit.register(lambda: print([n for n in {HEAVY} if n in sys.modules])); {code}"
    done = subprocess.run([sys.executable, "-c", told, *words], capture_output=True, text=True, timeout=60)
    return done.returncode, ast.literal_eval(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["--completion", "bash"], ["scan", "m", "--lyers", "0"], ["scna"], []],
    ids=" ".join,
)
def test_what_needs_no_library_imports_none(words: list[str]) -> None:
    code, heavy = imported_by(*words)
    assert code == (0 if words and words[0].startswith("--") else 2) and heavy == []


@pytest.mark.slow
@pytest.mark.parametrize("verb", [verb.__name__ for verb in cli.VERBS])
def test_the_help_of_a_verb_imports_no_library(verb: str) -> None:
    assert imported_by(verb, "--help") == (0, [])


@pytest.mark.slow
def test_import_laser_imports_a_library_once_it_is_asked_for() -> None:
    assert imported_by(code="import laser; dir(laser)") == (0, [])
    assert (
        "numpy"
        not in subprocess.run(
            [sys.executable, "-c", "import sys, laser; print(*sys.modules)"], capture_output=True, text=True
        ).stdout
    )
    code, heavy = imported_by(code="import laser; laser.open_checkpoint")
    assert code == 0 and "torch" in heavy and "transformers" not in heavy


def test_a_verb_hands_on_all_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by its own name: the file of a verb repeats the names that verbs.py declares."""
    verb: Any
    for verb in cli.VERBS:
        name = f"{verb.__name__}_verb"
        tree = ast.parse(inspect.getsource(verb))
        (file,) = [n.value for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == name]
        module = importlib.import_module(f"laser.cli.{ast.unparse(file)}")
        names = list(inspect.signature(verb).parameters)
        assert names == list(inspect.signature(getattr(module, name)).parameters)
        got: dict[str, Any] = {}
        # It is what the verb calls, by name, and there is nothing that it could be handed instead.
        monkeypatch.setattr(module, name, stand_in(got, names))
        verb(**{name: name.upper() for name in names})
        assert got == {name: name.upper() for name in names}, verb.__name__


def stand_in(got: dict[str, Any], names: list[str]) -> Any:
    return lambda *given, **named: got.update(zip(names, given, strict=False), **named)


def wait_for_handler(process: int) -> None:
    """Until it catches SIGTERM, which laser does before it imports a library; on a busy machine that takes a while."""
    status = Path(f"/proc/{process}/status")
    while status.exists() and not int(status.read_text().split("SigCgt:")[1].split()[0], 16) >> signal.SIGTERM - 1 & 1:
        time.sleep(0.01)


def at_a_terminal() -> None:
    """Also where the tests themselves were started by nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.parametrize(("wait", "number"), [(0.0, signal.SIGTERM), (0.5, signal.SIGINT), (0.2, signal.SIGHUP)])
def test_an_interrupt_while_libraries_are_imported_is_one_line(wait: float, number: signal.Signals) -> None:
    words = [sys.executable, "-m", "laser", "devices"]
    child = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=at_a_terminal)
    wait_for_handler(child.pid)
    time.sleep(wait)
    child.send_signal(number)
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    code = 129 if number == signal.SIGHUP else 130
    assert (child.returncode, err) == (code, b"laser: interrupted; nothing was written\n")


# A scan that waits, and says so, where the first matrix is read.
WAITING = """
import sys, time
from laser.checkpoint.reader import Checkpoint
def wait(*_):
    print("here", flush=True)
    time.sleep(60)
Checkpoint.read = wait
sys.argv = ["laser", "scan", sys.argv[1], "-o", sys.argv[2], "--workers", "1"]
from laser.__main__ import main
main()
"""


@pytest.mark.slow
def test_an_interrupt_at_any_line_round_a_verb_is_one_line(pico: Path, tmp_path: Path) -> None:
    """At every line of the command's own two modules, before, in and behind the verb: it was a traceback at some."""
    assert main(["scan", str(pico), "-o", str(tmp_path / "s"), "--roles", "q"]) == 0
    files = {cli.__file__, command.__file__}

    def interrupted(at: int) -> End:
        def work() -> int:
            left, verb = at, ["plan", "s", "-o", "p", "--rule", "rank:4"]

            def trace(frame: FrameType, event: str, _: object) -> Any:
                nonlocal left
                if frame.f_code.co_filename not in files:
                    return None
                left -= event == "line"
                if left == 0:
                    sys.settrace(None)
                    os.kill(os.getpid(), signal.SIGINT)
                return trace

            start.on_interrupt(start.too_early)  # as `import laser` does
            sys.argv = ["laser", *verb]
            sys.settrace(trace)
            try:
                command.main()
            except SystemExit as end:
                sys.settrace(None)
                return 77 if left > 0 else int(end.code or 0)
            return 96

        (tmp_path / "p").unlink(missing_ok=True)
        return forked(work, tmp_path)

    codes: list[int] = []
    for at in count(1):
        end = interrupted(at)
        if end.code == 77:  # all lines are through
            break
        codes.append(end.code)
        assert end.code in (0, 130) and end.err.count("\n") == (end.code == 130), (at, end)
        assert "nothing was written" not in end.err or not (tmp_path / "p").exists(), (at, end)
    assert len(codes) > 40 and {0, 130} <= set(codes)


INTERRUPTED = "laser: interrupted; nothing was written\n"


def verb_that(does: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, whose verb does this once it is at work."""
    code = f"""
import os, signal, sys, threading, time
sys.argv[0] = "laser"
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from laser import __main__ as command
from laser.start import come_again, loading

def verb():
    with loading():
        pass
{textwrap.indent(does, "    ")}
    return 0

command._main = verb
command.main()
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)


DESTRUCTOR = """
class Late:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.001)  # the handler runs in here, and Python drops what it raises

late = Late()
del late
time.sleep(30)
"""


def test_an_interrupt_in_a_destructor_is_not_lost() -> None:
    """Python drops what is raised there, and would tell of it on stderr: a garbage collection may fall anywhere."""
    done = verb_that(DESTRUCTOR)
    assert (done.returncode, done.stderr) == (130, INTERRUPTED)


LOCKING = """
lock = SimpleNamespace(acquire=print, release=print, __exit__=lambda *_: print("given back", flush=True))
lock.__enter__ = partial(signal.raise_signal, signal.SIGTERM)  # in C: the signal falls into threading's own line
with threading.Condition(lock):
    print("taken", flush=True)
    time.sleep(30)
"""


def test_an_interrupt_leaves_no_lock_taken() -> None:
    """Raised between taking a lock and the block under it, it would let a pool of threads wait for ever."""
    done = verb_that(LOCKING)
    assert (done.returncode, done.stderr) == (130, INTERRUPTED)
    assert done.stdout.endswith("given back\n")  # behind "taken", unless a busy machine lets the hundredth pass before


WAITING_FOR_A_POOL = """
started = time.monotonic()
with ThreadPoolExecutor(1) as pool:
    over = threading.Event()
    try:
        come_again()
        pool.submit(over.wait, 30).result()
    finally:
        print(time.monotonic() - started < 10)
        over.set()
"""


def test_an_interrupt_ends_a_wait_for_a_pool() -> None:
    done = verb_that(WAITING_FOR_A_POOL)
    assert (done.returncode, done.stderr) == (130, INTERRUPTED)
    assert done.stdout == "True\n"


REPLACED = """
import contextlib, signal, sys
from laser import cli
from laser.__main__ import main
from laser.errors import CheckpointError, OutputError
from laser.start import loading

def verb(_):
    with loading():
        pass
    if {cleaning}:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise {error}
    with contextlib.suppress(BaseException):  # as C and Rust do it, without a trace
        signal.raise_signal(signal.SIGTERM)
    raise {error}

cli._run_verb = verb
sys.argv[1:] = ["convert"]
main()
"""


@pytest.mark.parametrize(
    ("error", "cleaning", "told"),
    [
        ("ValueError('could not determine the shape')", False, INTERRUPTED),
        ("CheckpointError('it is damaged; download it again')", False, INTERRUPTED),
        ("MemoryError()", False, INTERRUPTED),
        ("ValueError('could not determine the shape')", True, INTERRUPTED),
        (
            "OutputError('x cannot be removed; remove it yourself')",
            True,
            "laser: x cannot be removed; remove it yourself\n",
        ),
    ],
)
def test_an_interrupt_is_told_where_a_library_puts_an_error_in_its_place(error: str, cleaning: bool, told: str) -> None:
    code = REPLACED.format(error=error, cleaning=cleaning)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, told)


@pytest.mark.slow
@pytest.mark.parametrize("closed", [False, True])
def test_a_closed_terminal_ends_as_an_interrupt(pico: Path, tmp_path: Path, closed: bool) -> None:
    words = [sys.executable, "-c", WAITING.replace("sleep(60)", "sleep(1)"), str(pico), str(tmp_path / "s")]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=at_a_terminal)
    assert child.stdout is not None and child.stderr is not None and child.stdout.readline() == b"here\n"
    if closed:
        child.stderr.close()
    child.send_signal(signal.SIGHUP)
    assert child.wait(timeout=60) == 129
    if not closed:
        told = child.stderr.read()
        assert told == b"laser: interrupted; what is finished is kept, run the same command again\n"
        child.stderr.close()
    child.stdout.close()


@pytest.mark.slow
def test_nohup_is_obeyed(pico: Path, tmp_path: Path) -> None:
    words = 'trap "" HUP; exec "$0" -c "$1" "$2" "$3"'
    code = WAITING.replace("sleep(60)", "sleep(1); sys.stderr.write('on'); sys.stderr.flush(); import os; os._exit(7)")
    command = ["sh", "-c", words, sys.executable, code, str(pico), str(tmp_path / "s")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"here\n"
    child.send_signal(signal.SIGHUP)
    assert child.communicate(timeout=60)[1] == b"on" and child.returncode == 7


@pytest.mark.slow
def test_a_full_disk_behind_stdout_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # so that it shows at the end, when all is flushed
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, which Linux has")
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([sys.executable, "-m", "laser", "scan", "--help"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1 and done.stderr.startswith(b"laser: cannot write: ")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.slow
def test_without_stderr_nothing_is_said_on_stdout() -> None:
    words = f'exec 2>&-; exec "{sys.executable}" -m laser scan nothing-there -o x'
    done = subprocess.run(["sh", "-c", words], stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (1, b"")


def test_a_current_directory_that_is_gone(tmp_path: Path) -> None:
    words = f'cd "{tmp_path}" && mkdir gone && cd gone && rmdir ../gone; exec "{sys.executable}" -m laser devices'
    done = subprocess.run(["sh", "-c", words], capture_output=True)
    told = b"laser: the current directory: No such file or directory; cd to one that is there\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", told)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere such limits are not kept")
@pytest.mark.parametrize(("name", "word"), [("RLIMIT_DATA", "ulimit -d"), ("RLIMIT_AS", "ulimit -v")])
def test_a_limit_that_the_libraries_do_not_fit_into_is_one_line(name: str, word: str) -> None:
    """With 200 MB of data a library waited for ever, at 260 MB there was a traceback, and signals were not heard."""
    import resource

    def limited() -> None:
        resource.setrlimit(getattr(resource, name), (200_000_000, resource.RLIM_INFINITY))

    words = [sys.executable, "-m", "laser", "devices"]
    done = subprocess.run(words, preexec_fn=limited, capture_output=True, text=True, timeout=60)
    start = f"laser: out of memory: {word} allows 0.20 GB, and the libraries alone take 0."
    assert done.returncode == 1 and done.stderr.startswith(start) and done.stderr.endswith("raise that limit\n")
    assert done.stderr.count("\n") == 1


def test_windows_is_told_in_one_line() -> None:
    code = "import sys; sys.platform = 'win32'; import laser"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == 1 and done.stderr == (
        b"laser: Windows is not supported; try it in WSL, where it runs as on Linux\n"
    )


@pytest.mark.parametrize("endpoint", ["http://[::1", "http://127.0.0.1:99999"])
def test_an_endpoint_that_cannot_be_taken_apart_is_one_line(endpoint: str) -> None:
    words = [sys.executable, "-m", "laser", "devices"]
    done = subprocess.run(words, env=os.environ | {"HF_ENDPOINT": endpoint}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        1,
        f"laser: HF_ENDPOINT is {endpoint!r}, which is no address; unset it\n",
    )
