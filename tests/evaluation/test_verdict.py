"""Verdicts: one function for all comparisons, and no direction where like is not compared with like."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laser.errors import UsageError
from laser.evaluation.perplexity import Perplexity, difference, weighted_mean
from laser.evaluation.verdict import UNDECIDED, Direction, Unlike, device_class, direction, judge, unlike

UNKNOWN = "by an unknown error (too few rows)"
NUMBERS = st.floats(-10, 10, allow_nan=False)


@pytest.mark.slow
@given(NUMBERS, st.none() | st.floats(0, 10), st.booleans())
def test_the_judgement_against_a_table(change: float, se: float | None, lower: bool) -> None:
    told = judge(change, se, lower_is_better=lower)
    mirrored = judge(-change, se, lower_is_better=not lower)
    assert told == mirrored
    if se is None:
        assert told == ("no difference" if change == 0 else f"{told.partition(',')[0]}, {UNKNOWN}")
    else:
        assert (told == UNDECIDED) == (abs(change) <= se)
    way = direction(change, se, lower_is_better=lower)
    assert (way is Direction.BETTER, way is Direction.WORSE) == (told.startswith("better"), told.startswith("worse"))
    assert told.startswith("better") == ((se is None or abs(change) > se) and change != 0 and (change < 0) == lower)
    odd = judge(change, se, lower_is_better=lower, differences=(Unlike("dtype", "float32", "bfloat16"),))
    assert odd == "not like with like: dtype float32 against bfloat16"


def test_what_is_unlike() -> None:
    assert unlike({"a": 1}, {"a": 1}) == ()
    assert unlike({"a": 1, "b": 2}, {"b": 3, "c": 4}) == (Unlike("a", 1, None), Unlike("b", 2, 3), Unlike("c", None, 4))
    assert str(Unlike("torch", None, "2.9")) == "torch unknown against 2.9"
    assert [device_class(name) for name in ("cpu", "cuda", "cuda:1", "mps")] == ["cpu", "cuda", "cuda", "mps"]


def record(*losses: float, **change: object) -> Perplexity:
    nll, error = weighted_mean(losses, [10] * len(losses))
    whole = Perplexity(
        model="m", identity="i", text="t", text_sha256="x", windows_sha256="y", mode="windows", window=11, bos=True,
        dtype="float32", device="cpu", nll=nll, standard_error=error, tokens=10 * len(losses), windows=len(losses),
        bytes=None, losses=losses, counts=(10,) * len(losses), asked=None, versions={"torch": "1", "transformers": "2"},
    )  # fmt: skip
    return dataclasses.replace(whole, **change)


MOVED = {
    "dtype": ("bfloat16", "dtype float32 against bfloat16"),
    "device": ("cuda:0", "device cpu against cuda"),
    "versions": ({"torch": "1", "transformers": "3"}, "transformers 2 against 3"),
}


@pytest.mark.parametrize("what", MOVED)
def test_what_moves_a_loss_is_named_in_place_of_a_direction(what: str) -> None:
    """Whatever the change is: one of 100 errors, or none at all."""
    value, told = MOVED[what]
    for losses in ((1.0, 1.1, 1.2), (2.0, 2.1, 2.2001)):
        change = difference(record(1.0, 1.1, 1.2), record(*losses, **{what: value}))
        assert change.verdict == f"not like with like: {told}"
        assert [x.what for x in change.unlike] == [told.partition(" ")[0]]
    assert difference(record(1.0, 1.1, 1.2, **{what: value}), record(2.0, 2.1, 2.2001, **{what: value})).unlike == ()


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("text_sha256", "z"),
        ("windows_sha256", "z"),
        ("mode", "rolling"),
        ("window", 12),
        ("bos", False),
        ("tokens", 31),
    ],
)
def test_other_tokens_are_refused(what: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"not measured on the same tokens: {what} is {value}"):
        difference(record(1.0, 1.1, 1.2), record(1.0, 1.1, 1.2, **{what: value}))


def test_what_does_not_move_a_loss_is_not_named() -> None:
    change = difference(
        record(1.0, 1.1, 1.2, device="cuda:0"), record(2.0, 2.1, 2.2001, model="n", asked=9, device="cuda:1")
    )
    assert change.unlike == () and change.verdict == "worse"


def test_one_window_is_too_few() -> None:
    assert difference(record(1.0), record(2.0)).verdict == "worse, by an unknown error (too few windows)"
    assert difference(record(1.0), record(1.0)).verdict == "no difference"
