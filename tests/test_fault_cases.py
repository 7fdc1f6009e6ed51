"""The shared cases of work that is lost, mixed up, or believed without a look, as they stand; each kind has its own
tests beside, made of this suite's inputs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SHARED

REFUSED = r"refused: the plan was made from other weights of a: found .*, expected a "
# Case -> what it prints, a pattern a line that is looked at; and what it must not print.
FOUND: dict[str, tuple[tuple[str, ...], str]] = {
    "other_weights": ((REFUSED, REFUSED), "no error|resumed after"),
    # Whether a shard is finished when the case stops depends on threads: test_faults_at_rest.py waits for one.
    "resume_trusts_bytes": (
        (r"^untouched +(resumed without a word \| 0 problems|refused: )",)
        + (r"^finished .*(resumed without a word \| 0 problems|refused: |not reached)",) * 3,
        r"\| [1-9]|verify says",
    ),
    "stale_partial_in_source": ((r"shard 1 begins: .*__meta.* \| 0 problems",), "half a download"),
    "force_deletes": ((r"-> exit 2", r"before (\d+) after \1$", r"-> exit 1", "still JSON: True"), "Traceback"),
    "two_processes": ((r"\[\((0|1), '.*'\), \((0|1), '.*'\)\] \| 0 problems",), r"\(1, .*\(1, "),
    "symlink_leak": (("in the output: nothing",), "my token"),
    "fifo": (("a FIFO: exit 1",) * 3, "hangs|exit 0"),
    "headers": ((r"laser exit 1 .* safetensors refuses",) * 5, "Traceback|exit 0"),
    "wrong_advice": (
        (
            "name a directory that laser reduce or laser run has finished",
            "merge_and_unload",
            r"try --precision auto\|float64\|float32",
            "try to quote or escape it",
            "RANK 0: 1 of them become ZERO",
            "RANK 0: 14 of them become ZERO",
            "laser scan MODEL -o FILE makes one",
            "--lowest-snr 0 is no count of matrices",
        ),
        "Traceback",
    ),
    "unfrozen_yaml": ((r"axolotl would unfreeze (\d+) ; scripts that read lines \1 of",), "Traceback"),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each case prints."""
    cases = SHARED / "cases"
    if not cases.is_dir():
        pytest.skip("needs the shared cases")
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(cases)])
    done = subprocess.run(
        [sys.executable, str(cases / "faults.py")],
        env=os.environ | {"PYTHONPATH": path, "TMPDIR": str(tmp_path_factory.mktemp("cases"))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    parts = re.split(r"^== (\w+): .*\n", done.stdout, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", FOUND)
def test_a_shared_case_ends_as_it_should(case: str, told: dict[str, str]) -> None:
    patterns, never = FOUND[case]
    text = told[case]
    at = 0
    for pattern in patterns:  # each in a line of its own, in their order
        found = re.compile(pattern, re.M).search(text, at)
        assert found, (pattern, text)
        at = text.find("\n", found.end()) + 1 or len(text)
    assert not re.search(never, text), text


def test_every_shared_case_is_among_them(shared: Path) -> None:
    tree = ast.parse((shared / "cases" / "faults.py").read_text())
    cases = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list}
    assert cases == FOUND.keys()
