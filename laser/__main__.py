"""`python -m laser` and the `laser` command."""

from __future__ import annotations

import sys

from laser.cli import main as _main


def main() -> None:
    sys.exit(_main())


if __name__ == "__main__":
    main()
