"""`python -m laser` and the `laser` command."""

from __future__ import annotations

import signal
import sys
from types import FrameType

from laser.cli import main as _main
from laser.start import at_work, code_of, interrupted, on_interrupt, raised_again, too_early


def main() -> None:
    """Run the command line and end the process with its exit code. An interrupt until a verb works is start.py's."""
    signals: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        interrupted(number, frame)

    code: int | None = None
    try:
        raised_again(stop)
        at_work(stop)
        code = _main()
        on_interrupt(signal.SIG_IGN)  # the work is done; only the interpreter has yet to end
    except KeyboardInterrupt:  # beside the verb
        if code is None:
            too_early(signals[0] if signals else 0)
        on_interrupt(signal.SIG_IGN)
    sys.exit(code_of(signals[0]) if signals and code else code)  # also where what is kept could not be said any more


if __name__ == "__main__":
    main()
