"""A test that puts something else in the place of one of laser's own names says in a comment why nothing else would do.

What a function can be handed (a device with a share of memory, a tick, a crew) is handed to it: a patch names the place
where a name was imported, and breaks when code moves.
"""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CALLS = ("setattr", "setitem", "delattr", "delitem", "patch")


def of_laser(tree: ast.Module) -> set[str]:
    """Names of a file that are laser's: imported ones, and those that a loop gives to them."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "laser":
            names |= {a.asname or a.name for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {(a.asname or a.name).split(".")[0] for a in node.names if a.name.split(".")[0] == "laser"}
    for node in ast.walk(tree):
        if isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple) and isinstance(node.target, ast.Name):
            if any(isinstance(x, ast.Name) and x.id in names for x in node.iter.elts):
                names.add(node.target.id)
    return names


def patches(text: str) -> list[ast.Call]:
    """Where one of laser's own names is replaced; a library's name that laser imports (ranges.time) is not laser's."""
    tree, found = ast.parse(text), []
    names = of_laser(tree)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in CALLS
            and node.args
        ):
            target = ast.unparse(node.args[0])
            named = target.removeprefix("f").strip("'\"").startswith("laser.")
            path = target.split(".")
            if named or (path[0].split("[")[0] in names and path[1:2] not in (["time"], ["sys"])):
                found.append(node)
    return sorted(found, key=lambda node: node.lineno)


def unexplained(text: str) -> list[int]:
    """Lines of patches without a comment: at them, or above them and the patches and headers that they stand under."""
    lines, calls = text.splitlines(), patches(text)
    inside = {n for call in calls for n in range(call.lineno, (call.end_lineno or call.lineno) + 1)}

    def explained(call: ast.Call) -> bool:
        if any("#" in lines[n - 1] for n in range(call.lineno, (call.end_lineno or call.lineno) + 1)):
            return True
        above = call.lineno - 1
        while above in inside or lines[above - 1].lstrip().startswith(("for ", "with ")):
            if "#" in lines[above - 1]:
                return True
            above -= 1
        return lines[above - 1].lstrip().startswith("#")

    return [call.lineno for call in calls if not explained(call)]


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: path.relative_to(TESTS).as_posix())
def test_every_patch_of_laser_s_own_names_says_why(path: Path) -> None:
    found = unexplained(path.read_text())
    assert not found, f"{path.name}, lines {found}: hand it in as an argument, or say in a comment why that cannot be"


def test_the_check_sees_what_is_unexplained() -> None:
    bare = 'from laser import plan\npatch.setattr(plan, "x", 1)\n'
    assert unexplained(bare) == [2] and unexplained('monkeypatch.setattr("laser.plan.x", 1)\n') == [1]
    assert not unexplained(bare.replace("1)\n", "1)  # why\n")) and not unexplained(bare.replace("\np", "\n# why\np"))
    assert not unexplained('import torch\npatch.setattr(torch, "x", 1)\n')
    assert unexplained('from laser import a, b\nfor m in (a, b):\n    patch.setattr(m, "x", 1)\n') == [3]
    assert not unexplained('from laser import a, b\n# why\nfor m in (a, b):\n    patch.setattr(m, "x", 1)\n')
