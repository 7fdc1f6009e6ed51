"""Each family from transformers' own model to transformers' own logits; the README's table says what is seen here."""

from pathlib import Path

import pytest
import transformers
from families import CONFIGS, END, START, examine, line_of

from laser.checkpoint.family_table import FAMILIES

README = (Path(__file__).parent.parent / "README.md").read_text()
TABLE = README[README.find(START) : README.find(END)]


@pytest.mark.parametrize("family", CONFIGS)
def test_reduced_on_disk_is_reduced_in_memory(family: str, tmp_path: Path) -> None:
    row = examine(family, tmp_path)
    assert row.unaccounted == 0
    assert row.changed and row.verified and row.parameters_equal and row.logits_equal
    if f"transformers {transformers.__version__}," in TABLE:
        assert line_of(row) in TABLE, "run python scripts/render_families.py"


def test_every_family_is_examined() -> None:
    multimodal_twins = {"gemma3": "gemma3_text", "llama4": "llama4_text"}
    examined = {kind for kind, _ in CONFIGS.values()} | {"mistral_release"}
    assert {multimodal_twins.get(family, family) for family in FAMILIES} == examined
