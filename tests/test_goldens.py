"""What laser writes and prints is what it was: goldens.py says how it is compared, and how it is renewed."""

import importlib.util
from pathlib import Path

import pytest
from goldens import changes, is_of_this_machine, make, plain, read


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("accelerate") is None,
    reason="needs lm-eval: pip install 'laser-rmt[eval]'",
)
def test_nothing_changed_unsaid(tmp_path: Path) -> None:
    """Where a change is meant: python tests/goldens.py --write, and the commit says which golden changed, and why."""
    if not is_of_this_machine():
        pytest.skip(
            "the goldens were made on a machine whose last digits differ: compare with those of a commit before"
        )
    assert changes(make(tmp_path), read()) == ""


def test_what_changed_is_named_in_one_line() -> None:
    assert changes({"a": "1", "c": "3"}, {"a": "2", "b": "2"}) == "changed: a; gone: b; new: c"
    assert changes({"a": "1"}, {"a": "1"}) == ""


def test_only_what_is_a_machine_s_is_masked_and_rounded() -> None:
    document = {"seconds": 1.5, "s": [0.1234567891, 2], "calibration": {"identity": "a"}, "source": {"identity": "b"}}
    expected = {"seconds": "?", "s": [0.123457, 2], "calibration": {"identity": "?"}, "source": {"identity": "b"}}
    assert plain(document) == expected
    assert plain({"nll": 4.56789, "note": "4.56789"}, measured=True) == {"nll": 4.568, "note": "4.56789"}
