"""Made once, however many ask at once, and only the last few kept."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from laser.spectral.recent import Recent


def test_the_last_few_are_kept_and_what_is_asked_for_again_stays() -> None:
    made: list[str] = []
    recent: Recent[str] = Recent(2)

    def get(key: str) -> str:
        return recent.get(key, lambda: made.append(key) or key.upper())

    assert [get(key) for key in "abab"] == ["A", "B", "A", "B"] and made == ["a", "b"]
    assert [get(key) for key in "acab"] == ["A", "C", "A", "B"] and made == ["a", "b", "c", "b"]
    recent.clear()
    assert get("b") == "B" and made[-1] == "b" and len(made) == 5


def test_who_asks_meanwhile_waits_and_a_failure_is_not_kept() -> None:
    recent: Recent[int] = Recent(2)
    begun, go, made = threading.Event(), threading.Event(), []

    def make() -> int:
        made.append(1)
        begun.set()
        assert go.wait(60)
        if len(made) == 1:
            raise MemoryError("the first time")
        return 7

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(recent.get, "key", make)
        assert begun.wait(60)
        second = pool.submit(recent.get, "key", make)
        go.set()
        for each in (first, second):  # one made it, both hear of it; or the second came when it was over
            try:
                assert each.result() == 7 and each is second
            except MemoryError:
                pass
        with pytest.raises(MemoryError):
            first.result()
    assert recent.get("key", make) == 7
    count = len(made)
    assert recent.get("key", make) == 7 and len(made) == count
