"""Scales that laser takes for moved leave transformers' model as it is: to the last bit, as they are powers of two."""

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from conftest import Run
from copies import refused, spoiled, write_copy
from pico_language import make_model

from laser.checkpoint.reader import open_checkpoint
from laser.compensate.places import ParameterPlace, find_places
from laser.compensate.rescaled import Rescaled
from laser.errors import UsageError
from laser.selection import Selection

# Of each kind one: gated, a key for all heads or for some, fused in several orders, transposed, with biases, ReLU.
GATED = ("Mixtral", "Qwen2, Qwen2.5", "Phi-3", "Qwen3-Next", "Llama 4")
PLAIN = ("GPT-2", "GPT-NeoX", "GPTBigCode (StarCoder)", "Falcon, grouped", "Apertus")  # what up gives is bent
TAKEN = {name: {"v", "up"} for name in (*GATED, "OPT")} | {name: {"v"} for name in PLAIN}
# Values that are clipped, or normalised, or go through an activation.
TAKEN |= {"DBRX": set(), "Gemma 3n": {"up"}, "MiniMax-M1": {"up"}}
BEHIND = {"v": "o", "up": "down", "w3": "w2"}


def moved(
    state: dict[str, torch.Tensor], places: list[ParameterPlace], heads: int, values: bool, biases: bool = True
) -> int:
    """Rows of v, or of up, in the columns behind, in a model's own parameters; how often."""
    count = 0
    for before in places:
        for matrix in before.matrices:
            if matrix.role not in BEHIND or (matrix.role == "v") != values:
                continue
            rows, role = before.rows_of(matrix), BEHIND[matrix.role]
            behind = [p for p in places if p.matrices[0].role == role and p.expert == before.expert]
            behind = [p for p in behind if p.matrices[0].place == matrix.place and p.name != before.name]
            if len(behind) != 1:
                continue
            scales = torch.exp2((torch.arange(len(rows)) % 5 - 2).float())
            width = behind[0].shape[1] // heads
            each = scales.reshape(-1, width) if values else scales[None]
            channels = each.repeat_interleave(heads // len(each), 0).reshape(-1) if values else scales
            stored(state, before)[rows] /= scales[:, None]
            if (bias := before.parameter.removesuffix("weight") + "bias") in state and biases:
                state[bias][rows] /= scales
            stored(state, behind[0]).mul_(channels)
            count += 1
    return count


def stored(state: dict[str, torch.Tensor], place: ParameterPlace) -> torch.Tensor:
    W = state[place.parameter] if place.expert is None else state[place.parameter][place.expert]
    return W.T if place.transposed else W


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("family", TAKEN)
def test_what_is_taken_for_moved_is_the_same_function(tmp_path: Path, family: str) -> None:
    model = families.build(family)
    model.save_pretrained(tmp_path / "original")
    original = open_checkpoint(tmp_path / "original")
    places = list(find_places(original, original, Selection()).places)
    tokens = torch.arange(3, 27).reshape(2, 12)
    taken = set()
    for role in ("v", "up"):
        other = families.build(family)
        state: dict[str, Any] = other.state_dict()
        if not moved(state, places, model.config.get_text_config().num_attention_heads, role == "v"):
            continue
        other.save_pretrained(tmp_path / role)
        rescaled = Rescaled(original, open_checkpoint(tmp_path / role))
        if any(rescaled.of(place) is not None for place in places):
            taken.add(role)
            with torch.no_grad():
                assert torch.equal(model(tokens).logits, other(tokens).logits)
    assert taken == TAKEN[family]


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_the_bias_of_values_has_to_follow(tmp_path: Path) -> None:
    """Qwen2's: with the old one it is another function, so that no scales are taken for moved."""
    model = families.build("Qwen2, Qwen2.5")
    model.save_pretrained(tmp_path / "original")
    original = open_checkpoint(tmp_path / "original")
    places = list(find_places(original, original, Selection()).places)
    assert moved(model.state_dict(), places, 4, True, biases=False)
    model.save_pretrained(tmp_path / "copy")
    rescaled = Rescaled(original, open_checkpoint(tmp_path / "copy"))
    assert not any(rescaled.of(place) for place in places)


def halved(tensors: dict[str, torch.Tensor], router: bool) -> dict[str, torch.Tensor]:
    """The second norm of a layer by two, and the columns behind it, of the router or not."""
    at = "model.layers.0."
    behind = ("experts", "moe.gate") if router else ("experts",)
    found = dict(tensors)
    for name, W in tensors.items():
        if name == f"{at}post_attention_layernorm.weight":
            found[name] = W / 2
        elif name.startswith(at) and any(part in name for part in behind) and ".w2." not in name:
            found[name] = W * 2
    return found


def test_a_router_has_to_follow_its_norm(run: Run, tmp_path: Path) -> None:
    write_copy(make_model(tmp_path / "mixtral", "mixtral"), tmp_path / "copy")
    words = ("--plain", "--rank", 2, "--device", "cpu")
    for router in (True, False):
        spoiled(tmp_path / "copy", tmp_path / f"copy{router}", lambda tensors, r=router: halved(tensors, r))
    code, _, err = run("compensate", tmp_path / "mixtral", tmp_path / "copyTrue", "-o", tmp_path / "a", *words)
    assert code == 0, err
    error = refused(run, tmp_path / "mixtral", tmp_path / "copyFalse", "-o", tmp_path / "b", "--plain")
    assert "layers.0.block_sparse_moe.gate.weight is not that of mixtral, and no weight makes up for it" in error


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_the_bias_of_a_norm_has_to_follow(tmp_path: Path) -> None:
    """GPT-2's: with the old one it is another function."""
    families.build("GPT-2").save_pretrained(tmp_path / "original")
    norm, fused = "transformer.h.0.ln_1", "transformer.h.0.attn.c_attn"

    def of_norm(tensors: dict[str, torch.Tensor], bias: bool) -> dict[str, torch.Tensor]:
        scales = torch.exp2((torch.arange(32) % 3).float())
        made = {f"{norm}.weight": tensors[f"{norm}.weight"] / scales}
        made |= {f"{fused}.weight": tensors[f"{fused}.weight"] * scales[:, None]}
        return tensors | made | ({f"{norm}.bias": tensors[f"{norm}.bias"] / scales} if bias else {})

    for bias in (True, False):
        path = spoiled(tmp_path / "original", tmp_path / f"copy{bias}", lambda tensors, b=bias: of_norm(tensors, b))
        rescaled = Rescaled(open_checkpoint(tmp_path / "original"), open_checkpoint(path))
        if bias:
            rescaled.require_made_up_for()
        else:
            with pytest.raises(UsageError, match=r"ln_1\.bias is not that of original"):
                rescaled.require_made_up_for()
