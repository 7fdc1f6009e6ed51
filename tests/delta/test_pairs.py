"""A base and its fine-tune that are stored unlike: each tensor finds its own, and is scaled or left alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import EXPERTS, LAYERS, Run, mixtral_config, mixtral_tensors, write_checkpoint_directory
from helpers import tensors_in
from hub_server import Hub
from merges import BF16, F16, F32, merged, update
from models import WORDS, tensors, write_model
from test_delta import Q0, tune

from laser.differences.edits import between
from laser.outcome import Outcome
from laser.reasons import Kind

pytestmark = pytest.mark.slow
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def halved(run: Run, tmp_path: Path) -> Callable[[object, object], tuple[dict[str, torch.Tensor], dict[str, str]]]:
    """What `laser reduce --scale 0.5` writes, verified, and why each tensor is as it is; delta tells the same kinds."""

    def call(base: object, tuned: object) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        out = tmp_path / "half"
        code, _, err = run("reduce", tuned, "--base", base, "--scale", "0.5", "-o", out)
        assert code == 0, err
        code, said, _ = run("verify", tuned, out, "--base", base)
        assert code == 0 and " 0 problems" in said
        code, said, _ = run("delta", base, tuned, "-o", tmp_path / "d", "--json")
        kinds = {name: change["kind"] for name, change in json.loads(said)["tensors"].items()}
        plan = Outcome.load(out).plan
        assert code == 0 and kinds.keys() >= {line.name for line in plan.lines}
        for line in plan.lines:
            assert (line.action == "reduce") == (kinds[line.name] in ("low rank", "full", "scaled", "changed", "faint"))
        return tensors_in(out), {line.name: line.why.text for line in plan.lines}

    return call


def adapt(name: str, W: torch.Tensor) -> torch.Tensor:
    return merged(W, update(W, 3, 0.02), dtype=W.dtype) if "q_proj" in name else W


@pytest.mark.parametrize("kinds", [(F32, BF16), (BF16, F32), (F16, BF16)])
def test_other_dtypes(halved: Callable, tmp_path: Path, kinds: tuple[torch.dtype, torch.dtype]) -> None:
    base = write_model(tmp_path / "base", dtype=kinds[0])
    tuned = write_model(tmp_path / "tuned", lambda n, W: adapt(n, W).to(kinds[1]), dtype=kinds[0])
    W, q = tensors_in(base), tensors_in(tuned)
    made, why = halved(base, tuned)
    assert why[EMBEDDING] == "cast: no difference to scale" and torch.equal(made[EMBEDDING], q[EMBEDDING])
    assert torch.equal(made[Q0], between(W[Q0], q[Q0], 0.5)) and made[Q0].dtype == kinds[1]


def test_a_cut_takes_the_base_as_the_merge_did(run: Run, tmp_path: Path) -> None:
    """A base in float32 that was cast before the merge: the cast's own rounding is in no difference."""
    base = write_model(tmp_path / "base", lambda n, W: W.float() * 1.0001, dtype=F32)
    tuned = write_model(tmp_path / "tuned", lambda n, W: adapt(n, (W.float() * 1.0001).to(BF16)), dtype=F32)
    out = tmp_path / "out"
    assert run("reduce", tuned, "--base", base, "-o", out)[0] == 0
    plan = Outcome.load(out).plan
    assert plan.reductions[Q0].rank in (3, 4)
    assert not [line.name for line in plan.lines if line.why.kind is Kind.MEASURED]
    assert run("verify", tuned, out, "--base", base)[0] == 0


def test_a_resized_vocabulary_is_kept(halved: Callable, tmp_path: Path) -> None:
    def grow(name: str, W: torch.Tensor) -> torch.Tensor:
        return torch.cat((W, W[:8])) if name in (EMBEDDING, HEAD) else tune(name, W)

    base, tuned = write_model(tmp_path / "base"), write_model(tmp_path / "tuned", grow, vocab_size=WORDS + 8)
    made, why = halved(base, tuned)
    assert why[HEAD].startswith("skipped: other shape, so its difference is not scaled")
    assert torch.equal(made[HEAD], tensors_in(tuned)[HEAD])
    assert torch.equal(made[Q0], between(tensors_in(base)[Q0], tensors_in(tuned)[Q0], 0.5))


def test_a_head_that_the_base_ties(halved: Callable, tmp_path: Path) -> None:
    """The tuned one's head is compared with the embedding that is the base's head."""
    embedding = tensors()[EMBEDDING]
    base = write_model(tmp_path / "base", head=False, tie_word_embeddings=True)
    head = merged(embedding, update(embedding, 3, 0.02))
    tuned = write_model(tmp_path / "tuned", lambda name, W: head if name == HEAD else W)
    made, _ = halved(base, tuned)
    assert torch.equal(made[HEAD], between(embedding, head, 0.5)) and torch.equal(made[EMBEDDING], embedding)


def fused(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Mixtral as transformers 5 has it in memory."""
    made = {n.replace("block_sparse_moe", "mlp"): W for n, W in found.items() if ".experts." not in n}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}.block_sparse_moe.experts."
        w1, w2, w3 = (torch.stack([found[f"{at}{e}.{w}.weight"] for e in range(EXPERTS)]) for w in ("w1", "w2", "w3"))
        made[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat((w1, w3), 1)
        made[f"model.layers.{layer}.mlp.experts.down_proj"] = w2
    return made


@pytest.mark.parametrize("tuned_fused", [True, False])
def test_fused_experts_against_unfused_ones(halved: Callable, tmp_path: Path, tuned_fused: bool) -> None:
    def tuned_of(name: str, W: torch.Tensor) -> torch.Tensor:
        return (W.float() * 1.1 + 0.01 * W.float().mean()).to(W.dtype) if ".experts." in name else W

    W = mixtral_tensors(0)
    q = {name: tuned_of(name, tensor) for name, tensor in W.items()}
    expected = {name: between(W[name], q[name], 0.5) for name in W}
    base, tuned = (W, fused(q)) if tuned_fused else (fused(W), q)
    config = mixtral_config()
    made, _ = halved(
        write_checkpoint_directory(tmp_path / "base", base, config),
        write_checkpoint_directory(tmp_path / "tuned", tuned, config),
    )
    expected = fused(expected) if tuned_fused else expected
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in made)


@pytest.mark.parametrize("local", ["", "base", "tuned"])
def test_on_the_hub(halved: Callable, hub: Hub, tmp_path: Path, local: str) -> None:
    """By byte ranges, of other shards: both, or one of them while the other is a directory."""
    base, tuned = write_model(tmp_path / "base"), write_model(tmp_path / "tuned", tune, shards=3)
    hub.add("maker/base", base)
    hub.add("maker/tuned", tuned)
    made, _ = halved(base if local == "base" else "maker/base", tuned if local == "tuned" else "maker/tuned")
    W, q = tensors_in(base), tensors_in(tuned)
    assert all(torch.equal(made[name], between(W[name], q[name], 0.5)) for name in q)
    card = (tmp_path / "half" / "README.md").read_text()
    assert ("base_model: maker/tuned" in card) == (local != "tuned")
