"""The fast tests with every dependency at the lowest version that pyproject.toml declares.

    python scripts/lower_bounds.py [--folder .lowest] [--torch VERSION] [--install-only] [PYTEST ARGUMENTS]

Makes a virtual environment in the folder and installs the project with its extra `test` there, every `name>=VERSION` of
pyproject.toml as `name==VERSION`. Then it prints what is there, and runs the tests that are not marked slow. Where a
package demands more of another than is declared, pip names both, and the declared bound has to rise. torch comes as
constraints.txt has it unless --torch says otherwise: older builds are large, and few indexes have them for the CPU.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
BOUND = re.compile(r"([A-Za-z0-9_.-]+)(?:\[[^]]*\])?>=([0-9.]+)")


def declared() -> dict[str, str]:
    """The lowest version of each package of pyproject.toml, by name: what laser needs, and what any extra adds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    return {found[1]: found[2] for one in wanted if (found := BOUND.match(one))}


def constrained(name: str) -> str:
    """The version of a package in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines)[name]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".lowest", help="of the virtual environment")
    parser.add_argument("--torch", default=constrained("torch"), help="version of torch (default: %(default)s)")
    parser.add_argument("--install-only", action="store_true", help="install and print, run no test")
    given, tests = parser.parse_known_args()
    bounds = declared()
    pins = given.folder / "lowest.txt"
    python = given.folder / "bin" / "python"
    if not python.exists():
        venv.create(given.folder, with_pip=True)
    pins.write_text("".join(f"{name}=={version}\n" for name, version in {**bounds, "torch": given.torch}.items()))
    install = [python, "-m", "pip", "install", "--constraint", pins, "--editable", ".[test]"]
    if code := subprocess.run(install, cwd=ROOT).returncode:
        return code
    asked = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]), sep='\\n')"
    there = subprocess.run([python, "-c", asked, *bounds], cwd=ROOT, capture_output=True, text=True, check=True)
    for (name, version), found in zip(bounds.items(), there.stdout.split(), strict=True):
        print(f"{name:22} declared {version:10} installed {found}")
    if given.install_only:
        return 0
    env = {**os.environ, "PATH": f"{python.parent.absolute()}{os.pathsep}{os.environ['PATH']}"}
    # An old library calls newer ones by names that they are about to drop: no fault of ours, and no error.
    quiet = ["-W", "ignore::DeprecationWarning", "-W", "ignore::PendingDeprecationWarning"]
    fast = [python, "-m", "pytest", "-m", "not slow", *quiet, "--dist", "loadfile", *(tests or ["-n", "2"])]
    return subprocess.run(fast, cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
