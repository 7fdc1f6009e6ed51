"""scripts/words.py on small texts: what is a sentence, how long it is, and what is too long."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "scripts")
    return importlib.import_module("words")


@pytest.mark.parametrize(
    "text",
    [
        "It takes 0.5 s, i.e. Nothing. Then it ends.",
        "Open `config.json` or README.md here. `--resume` goes on.",
        "See Marchenko et al. 1967 and cf. Fig. 3 there. **Here** it ends.",
        "Is it so? (It is not.)",
        "Keep A,B,.. per layer... and go on.\nThen stop.",
    ],
)
def test_two_sentences(words: Any, text: str) -> None:
    assert len(list(words.split(text))) == 2


def test_what_is_counted_and_where_it_stands(words: Any) -> None:
    text = """# A heading

One two three. Four
five six ± |. Seven
eight.

- an item
- another item of
  six words. Its second sentence.

| cell | two words |
|---|---|
| three short words | x |

```console
$ none of this is counted
```

    nor is this

<!-- nor this -->
"""
    found = [(s.place, s.words, s.alone) for s in words.sentences(text, "x.md")]
    assert found == [
        ("x.md:1", 2, True),
        ("x.md:3", 3, False),
        ("x.md:3", 3, False),
        ("x.md:4", 2, False),
        ("x.md:7", 2, False),
        ("x.md:8", 5, False),
        ("x.md:9", 3, False),
        ("x.md:11", 1, True),
        ("x.md:11", 2, True),
        ("x.md:13", 3, True),
        ("x.md:13", 1, True),
    ]


def test_a_long_sentence_is_named_with_its_line_and_a_long_average_is_wrong(words: Any) -> None:
    def faults(text: str) -> list[str]:
        return words.check("x.md", list(words.sentences(text, "x.md")))[1]

    assert faults("word " * 18 + ".") == []
    assert faults("word " * 19 + ".")[0].startswith("x.md: 19.0 words a sentence, over 18")
    assert faults("Short.\n\n" * 9 + "word " * 41 + ".")[0].startswith("x.md:19: 41 words: word word")
    # Cells cannot hide long prose, and can be too long themselves.
    assert len(faults("| a | b |\n|---|---|\n" + "| c | d |\n" * 99 + "\n" + "word " * 19)) == 1
    assert len(faults("| a | b |\n|---|---|\n| c | " + "word " * 41 + "|\n")) == 1


def test_docstrings_and_comments_of_a_module(words: Any, tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text('"""First. Second\none."""\n\n# A comment that\n# goes on.\nx = 1  # Another.\n')
    found = [(s.place, s.text) for s in words.source(tmp_path / "m.py", "m.py")]
    assert found == [
        ("m.py:1", "First."),
        ("m.py:1", "Second one."),
        ("m.py:4", "A comment that goes on."),
        ("m.py:6", "Another."),
    ]


def test_every_help_page_is_among_the_documents(words: Any) -> None:
    places = {s.place for s in words.help_pages()}
    assert {"laser", "laser scan", "laser run --recipe"} <= places
