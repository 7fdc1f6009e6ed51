"""`python -m laser` and the `laser` command."""

from __future__ import annotations

import signal
import sys

from laser.cli import main as _main
from laser.start import interrupted, on_interrupt


def main() -> None:
    """Run the command line and end the process with its exit code. An interrupt until here is start.py's."""
    on_interrupt(interrupted)
    code = _main()
    on_interrupt(signal.SIG_IGN)  # the work is done; only the interpreter has yet to end
    sys.exit(code)


if __name__ == "__main__":
    main()
