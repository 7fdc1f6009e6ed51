"""What laser writes and prints is what it was: goldens.py says how it is compared, and how it is renewed."""

import importlib.util

import pytest
from goldens import changes, is_of_this_machine, make, plain, read, without_digits


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of this code, on this machine."""
    if importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("accelerate") is None:
        pytest.skip("needs lm-eval: pip install 'laser-rmt[eval]'")
    return make(tmp_path_factory.mktemp("goldens"))


@pytest.mark.slow
def test_nothing_without_digits_changed_unsaid(found: dict[str, str]) -> None:
    """Where a change is meant: python tests/goldens.py --write, and the commit says which golden changed, and why."""
    assert changes(without_digits(found, read()), read()) == ""


@pytest.mark.slow
def test_nothing_else_changed_unsaid(found: dict[str, str]) -> None:
    if not is_of_this_machine():
        pytest.skip("the figures are of a machine whose last digits differ: compare with those of a commit before")
    assert changes(found, read()) == ""


def test_what_changed_is_named_in_one_line() -> None:
    assert changes({"a": "1", "c": "3"}, {"a": "2", "b": "2"}) == "changed: a; gone: b; new: c"
    assert changes({"a": "1"}, {"a": "1"}) == ""


def test_elsewhere_only_what_depends_on_last_digits_may_differ() -> None:
    kept = {"laser --help": "1", "spectra": "1", "pico/m.safetensors": "1", "recipe/m.safetensors": "1", "gone": "1"}
    digits = kept | {"spectra": "2"}
    assert changes(without_digits(digits, kept), kept) == ""
    assert changes(without_digits(digits | {"laser --help": "2"}, kept), kept) == "changed: laser --help"
    reduced = digits | {"recipe/m.safetensors": "2"}
    assert changes(without_digits(reduced, kept), kept) == "changed: recipe/m.safetensors"
    assert changes(without_digits(reduced | {"pico/m.safetensors": "2"}, kept), kept) == ""
    del digits["gone"]
    assert changes(without_digits(digits | {"new": "1"}, kept), kept) == "gone: gone; new: new"


def test_only_what_is_a_machine_s_is_masked_and_rounded() -> None:
    document = {"seconds": 1.5, "s": [0.1234567891, 2], "calibration": {"identity": "a"}, "source": {"identity": "b"}}
    expected = {"seconds": "?", "s": [0.123457, 2], "calibration": {"identity": "?"}, "source": {"identity": "b"}}
    assert plain(document) == expected
    assert plain({"nll": 4.56789, "note": "4.56789"}, measured=True) == {"nll": 4.568, "note": "4.56789"}
