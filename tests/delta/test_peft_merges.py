"""Merges that PEFT made: taken apart, made again to the byte, and the adapter loaded by PEFT on the base."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from helpers import tensors_in
from merges import BF16, F16, F32
from models import write_mixtral, write_model

pytest.importorskip("peft")

from peft_merges import adapted, load, merge

RANK = 4
QV = ["q_proj", "v_proj"]
LINEAR = [*QV, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
STORED = {BF16: "bfloat16", F16: "float16", F32: "float32"}


def model(path: Path, dtype: torch.dtype = BF16, **more: Any) -> Path:
    return write_model(path, dtype=dtype, torch_dtype=STORED[dtype], **more)


def tied(path: Path) -> Path:
    return model(path, head=False, tie_word_embeddings=True)


def sha256s(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def undone(run: Run, tmp_path: Path, base: Path, *more: object) -> dict[str, dict[str, Any]]:
    """The entries of the record, the merge in tuned/ having been made again from base and adapter/, byte for byte."""
    code, out, err = run(
        "unmerge", base, tmp_path / "tuned", "-o", tmp_path / "adapter", "--json", "--device", "cpu", *more
    )
    assert code == 0, err
    assert run("rebuild", base, tmp_path / "adapter", "-o", tmp_path / "again")[0] == 0
    assert sha256s(tmp_path / "again") == sha256s(tmp_path / "tuned")
    return {entry["name"]: entry for entry in json.loads(out)["entries"]}


Case = tuple[Callable[[Path], Path], dict[str, Any]]
CASES: dict[str, Case] = {
    "q v": (model, {"target_modules": QV}),
    "all linear": (model, {"target_modules": LINEAR}),
    "rsLoRA": (model, {"target_modules": QV, "r": 8, "use_rslora": True}),
    "scale 8 / 3": (model, {"target_modules": QV, "r": 3}),
    "float16": (lambda path: model(path, F16), {"target_modules": QV}),
    "trained whole": (model, {"target_modules": QV, "modules_to_save": ["norm", "embed_tokens", "lm_head"]}),
    "embedding": (model, {"target_modules": ["q_proj", "embed_tokens"]}),
    "head": (model, {"target_modules": ["q_proj", "lm_head"]}),
    "tied": (tied, {"target_modules": QV}),
    "tied embedding": (tied, {"target_modules": ["q_proj", "embed_tokens"]}),
    "attention of a Mixtral": (write_mixtral, {"target_modules": QV}),
    "experts": (write_mixtral, {"target_modules": QV, "target_parameters": EXPERTS}),
    "down of experts": (write_mixtral, {"target_modules": [], "target_parameters": EXPERTS[1:]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_merge_by_peft(run: Run, tmp_path: Path, case: str) -> None:
    """Every rank, every byte, and on the base PEFT's logits are the merged model's; laser's merge is PEFT's, too."""
    make, config = CASES[case]
    config = {"r": RANK, "lora_alpha": 8} | config
    base = make(tmp_path / "base")
    merge(base, tmp_path / "tuned", adapter=tmp_path / "lora", **config)
    found = undone(run, tmp_path, base)
    adapters = [entry for entry in found.values() if entry["how"] == "adapter"]
    assert adapters and {entry["rank"] for entry in adapters} == {config["r"]}
    assert not [name for name, entry in found.items() if entry["how"] == "whole"]
    assert sum(entry["missed"] for entry in adapters) < 5e-4 * sum(entry["entries"] for entry in adapters)

    mine = adapted(base, tmp_path / "adapter", merged=True)
    reference = load(tmp_path / "tuned")
    state, expected = mine.state_dict(), reference.state_dict()
    differ = sum(int((state[name] != W).sum()) for name, W in expected.items())
    # PEFT multiplies A and B in float32 and knows no remainder: now and then a last bit is another one.
    assert differ <= 2 * sum(entry["missed"] for entry in adapters) + 10
    off, moved = ((logits(x) - logits(reference)).float().abs().mean() for x in (mine, load(base)))
    assert off == 0 if not differ else off < 0.02 * moved

    assert run("rebuild", base, tmp_path / "lora", "-o", tmp_path / "mine")[0] == 0
    made, expected = tensors_in(tmp_path / "mine"), tensors_in(tmp_path / "tuned")
    assert made.keys() == expected.keys() and all(torch.equal(made[name], W) for name, W in expected.items())


@pytest.mark.slow
def test_the_adapter_unmerged_is_the_merged_model_but_for_rounding(run: Run, tmp_path: Path) -> None:
    """PEFT's forward with A and B beside the weights, in float32, where the base is in float32 as well."""
    base = model(tmp_path / "base", F32)
    merge(base, tmp_path / "tuned", r=RANK, lora_alpha=8, target_modules=QV)
    found = undone(run, tmp_path, base)
    assert {entry["rank"] for entry in found.values() if entry["how"] == "adapter"} == {RANK}
    beside = logits(adapted(base, tmp_path / "adapter"))
    assert torch.allclose(beside, logits(load(tmp_path / "tuned")), atol=2e-5)


@pytest.mark.slow
def test_an_adapter_in_16_bits(run: Run, tmp_path: Path) -> None:
    """Told to leave the adapter in bfloat16, PEFT rounds the update first; the formula is found, and is rebuild's."""
    base = model(tmp_path / "base")
    merge(base, tmp_path / "tuned", adapter=tmp_path / "lora", cast=False, r=3, lora_alpha=8, target_modules=QV)
    found = undone(run, tmp_path, base)
    assert {entry["formula"] for entry in found.values() if entry["how"] == "adapter"} == {"delta-first"}
    assert run("rebuild", base, tmp_path / "lora", "-o", tmp_path / "mine", "--formula", "delta-first")[0] == 0
    made, expected = tensors_in(tmp_path / "mine"), tensors_in(tmp_path / "tuned")
    assert all(torch.equal(made[name], W) for name, W in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("stored", [F32, F16])
def test_a_base_that_was_loaded_in_another_format(run: Run, tmp_path: Path, stored: torch.dtype) -> None:
    """transformers casts the base to bfloat16, and PEFT merges into that: the base's own rounding is no change."""
    base = model(tmp_path / "base", stored)
    merge(base, tmp_path / "tuned", dtype=BF16, r=RANK, lora_alpha=8, target_modules=QV)
    found = undone(run, tmp_path, base)
    adapters = [entry for entry in found.values() if entry["how"] == "adapter"]
    assert len(adapters) == 4 and {(e["rank"], e["formula"], e["cast"]) for e in adapters} == {(RANK, "once", True)}
    assert {entry["how"] for entry in found.values()} == {"adapter", "cast"}


@pytest.mark.slow
def test_an_adapter_stored_in_fewer_bits(run: Run, tmp_path: Path) -> None:
    """--dtype: half of the bytes; what that misses is in the remainder, and the shards are the same."""
    base = model(tmp_path / "base")
    merge(base, tmp_path / "tuned", r=RANK, lora_alpha=8, target_modules=QV)
    found = undone(run, tmp_path, base, "--dtype", "bfloat16")
    stored = tensors_in(tmp_path / "adapter")
    assert {W.dtype for name, W in stored.items() if "lora" in name} == {BF16}
    assert {entry["how"] for entry in found.values()} == {"adapter", "same"}
    assert sum(entry["missed"] or 0 for entry in found.values()) > 100


@pytest.mark.slow
def test_dora_is_no_adapter_of_low_rank(run: Run, tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    merge(base, tmp_path / "tuned", r=RANK, lora_alpha=8, target_modules=QV, use_dora=True, share=0.05)
    found = undone(run, tmp_path, base)
    assert {found[name]["how"] for name in found if "q_proj" in name or "v_proj" in name} == {"whole"}
    code, _, err = run("unmerge", base, tmp_path / "tuned", "-o", tmp_path / "only", "--only-lora", "--device", "cpu")
    assert code == 2 and "try without --only-lora" in err


@pytest.mark.slow
def test_two_adapters_one_after_the_other(run: Run, tmp_path: Path) -> None:
    """Of the two only the sum is found; the record says so, and its bits are right by what the remainder holds."""
    base = model(tmp_path / "base")
    merge(base, tmp_path / "first", r=2, lora_alpha=4, target_modules=["q_proj"], share=0.03)
    merge(tmp_path / "first", tmp_path / "tuned", r=2, lora_alpha=4, target_modules=["q_proj"], share=0.03, seed=1)
    found = undone(run, tmp_path, base)
    entries = [found[name] for name in found if "q_proj" in name]
    assert {(e["how"], e["formula"]) for e in entries} == {("adapter", "twice")}
    assert all(e["rank"] in (4, 5) for e in entries)  # of pure noise one value in five matrices passes the bare edge
    assert all(0.1 < e["missed"] / e["entries"] < 0.4 for e in entries)
    sizes = [(tmp_path / name).stat().st_size for name in ("adapter/remainder.safetensors", "tuned/config.json")]
    assert sizes[0] < 0.2 * sum(2 * e["entries"] for e in entries) + 4 * sizes[1]


@pytest.mark.slow
def test_a_full_fine_tune_is_no_adapter(run: Run, tmp_path: Path) -> None:
    """50 steps on random tokens: every matrix changes in all directions; kept without loss, or refused as asked."""
    base = model(tmp_path / "base")
    trained = load(base, F32).train()
    torch.manual_seed(0)
    optimiser = torch.optim.AdamW(trained.parameters(), lr=3e-4)
    for _ in range(50):
        tokens = torch.randint(3, 60, (4, 32))
        trained(tokens, labels=tokens).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    trained.to(BF16).save_pretrained(tmp_path / "tuned")
    found = undone(run, tmp_path, base)
    assert {entry["how"] for entry in found.values()} <= {"whole", "saved", "same"}
    assert sum(entry["how"] == "whole" for entry in found.values()) == 14
    code, _, err = run("unmerge", base, tmp_path / "tuned", "-o", tmp_path / "only", "--only-lora", "--device", "cpu")
    assert code == 2 and "try without --only-lora" in err and not (tmp_path / "only").exists()
