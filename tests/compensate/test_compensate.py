"""laser compensate: the adapter is PEFT's, on the copy it gives what laser says, and what is no copy is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from copies import write_copy
from pico_language import TEXT, make_model

WINDOWS = ("--window", 64, "--windows", 6)
Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama and a Mixtral, a copy of each in 3 bits, and two texts."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("llama", "mixtral"):
        write_copy(make_model(folder / kind, kind), folder / f"{kind}-3")
    (folder / "text.txt").write_text(TEXT)
    (folder / "held.txt").write_text(TEXT[::-1])
    return folder


def compensated(run: Run, models: Path, out: Path, *words: Any, kind: str = "llama") -> dict[str, Any]:
    texts = () if "--plain" in words else ("--text", models / "text.txt", *WINDOWS)
    code, out_, err = run(
        "compensate", models / kind, models / f"{kind}-3", "-o", out, *texts, *words, "--json", "--device", "cpu"
    )
    assert code == 0, err
    return json.loads(out_)


def loaded(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
# peft 0.21 says so of those of parameters, and goes by them: else their shapes would not fit.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize(
    "kind, amount", [("llama", ("--rank", 4)), ("mixtral", ("--rank", 4)), ("mixtral", ("--bits", 2))]
)
def test_peft_loads_it_on_the_copy_and_the_loss_is_what_laser_says(
    run: Run, models: Path, tmp_path: Path, kind: str, amount: tuple[Any, ...]
) -> None:
    peft = pytest.importorskip("peft")
    found = compensated(
        run, models, tmp_path / "a", *amount, "--held-out", models / "held.txt", "--held-out-windows", 2, kind=kind
    )
    copy = loaded(models / f"{kind}-3")
    before = {name: W.clone() for name, W in copy.named_parameters()}
    model = peft.PeftModel.from_pretrained(copy, tmp_path / "a").eval()
    merged = dict(model.merge_and_unload().named_parameters())
    original = dict(loaded(models / kind).named_parameters())
    nearer = {n for n in merged if not torch.equal(merged[n], before[n])}
    assert nearer == {n for n in merged if "proj" in n and "lm_head" not in n}
    from laser.checkpoint.reader import open_checkpoint
    from laser.evaluation.evaluate import whole_losses
    from laser.evaluation.text import Text, cut_windows, load_tokenizer

    held = cut_windows(Text("held", TEXT[::-1]), load_tokenizer(models / kind), length=64, limit=2)
    model = loaded(models / f"{kind}-3")
    model.load_state_dict(merged, strict=False)
    sums = whole_losses(model, held)
    assert sum(sums) / held.tokens == pytest.approx(found["held_out"]["adapted"]["nll"], abs=1e-5)
    assert open_checkpoint(models / kind).identity == found["original"]["identity"]
    assert original.keys() == merged.keys()
    assert all(
        e["after"] < e["before"] and e["after"] == pytest.approx(e["predicted"], rel=0.05) for e in found["entries"]
    )
