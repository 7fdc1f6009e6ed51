"""laser unmerge interrupted, forced, asked of what it cannot take, and its adapter as PEFT loads it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, mixtral_config, write_checkpoint_directory
from helpers import killed_before_the_new_one, snapshot
from hub_server import connect, serving
from huggingface_hub import close_session
from merges import BF16, F32, full, merged, update
from models import HIDDEN, INNER, LAYERS, WORDS, llama_config, mixtral, phi, tensors, write_model

import laser.differences.unmerge as module
from laser.checkpoint.reader import open_checkpoint

Q0, W1 = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.block_sparse_moe.experts.0.w1.weight"
CPU = ("--device", "cpu")


def adapted(name: str, W: torch.Tensor) -> torch.Tensor:
    return merged(W, update(W, 3, 0.02)) if "q_proj" in name else W


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base")


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tuned", adapted)


def undone(run: Run, base: Path, tuned: Path) -> dict[str, str]:
    """How each tensor is made, the tuned folder having been made again from base and adapter/, byte for byte."""
    folder, again = tuned.with_name("adapter"), tuned.with_name("again")
    code, out, err = run("unmerge", base, tuned, "-o", folder, "--json", *CPU)
    assert code == 0, err
    code, _, err = run("rebuild", base, folder, "-o", again)
    assert code == 0 and snapshot(again) == snapshot(tuned), err
    return {entry["name"]: entry["how"] for entry in json.loads(out)["entries"]}


# --- packed and in eight bits -----------------------------------------------------------------------------------------


def test_a_packed_fine_tune_is_refused_wherever_it_lies(
    run: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shards as they are read never existed: no sha256 of them is recorded."""
    q = mixtral()[Q0]
    tensors = mixtral() | {Q0: q.to(torch.float8_e4m3fn), f"{Q0}_scale": torch.ones(len(q), 1)}
    packed = write_checkpoint_directory(tmp_path / "packed", tensors, mixtral_config() | SIZES, 2)
    assert open_checkpoint(packed).packed
    with serving() as hub:
        hub.add("maker/packed", packed)
        connect(hub, tmp_path / "cache", monkeypatch)
        for model in (packed, "maker/packed"):
            code, _, err = run("unmerge", base, model, "-o", tmp_path / "adapter", *CPU)
            assert code == 2 and "packed holds FP8 weights, whose packed bytes no adapter makes again" in err
            assert not list(tmp_path.glob("adapter*"))
        close_session()


SIZES = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": WORDS}


def eight_bits(path: Path, norm: float = 1.0) -> Path:
    """A Mixtral whose experts are FP8 with scales of blocks."""
    found: dict[str, torch.Tensor] = {}
    for name, W in mixtral().items():
        if ".experts." in name:
            found |= {name: (W.float() * 8).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.full((1, 1), 0.125)}
        else:
            found[name] = W * norm if name == "model.norm.weight" else W
    how = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    return write_checkpoint_directory(path, found, mixtral_config() | SIZES | how, 2)


def test_experts_in_eight_bits(run: Run, tmp_path: Path) -> None:
    """They go by their bytes, each by itself, though PEFT would adapt gate and up together."""
    found = undone(run, eight_bits(tmp_path / "base"), eight_bits(tmp_path / "tuned", norm=1.5))
    assert {how for name, how in found.items() if ".experts." in name} == {"same"}
    assert found["model.norm.weight"] == "saved"


@pytest.mark.slow
def test_experts_of_which_one_half_is_in_eight_bits(run: Run, tmp_path: Path) -> None:
    base, tuned = dict(mixtral()), dict(mixtral())
    third = W1.replace("w1", "w3")
    for each in (base, tuned):
        each[third] = each[third].to(torch.float8_e4m3fn)
    tuned[W1] = merged(tuned[W1], update(tuned[W1], 3, 0.02))
    found = undone(
        run,
        write_checkpoint_directory(tmp_path / "base", base, mixtral_config() | SIZES, 2),
        write_checkpoint_directory(tmp_path / "tuned", tuned, mixtral_config() | SIZES, 2),
    )
    assert (found[W1], found[third]) == ("adapter", "same")


@pytest.mark.parametrize("dtype, how", [(F32, "same"), (BF16, "cast")])
def test_a_base_in_eight_bits_as_its_values(run: Run, tmp_path: Path, dtype: torch.dtype, how: str) -> None:
    """Dequantised and otherwise untouched: the base's values, though not its bytes."""
    stored = open_checkpoint(eight_bits(tmp_path / "base"))
    plain = {n: stored.read(n) for n in stored.tensors if not n.endswith("_scale_inv")}
    plain = {n: W.to(dtype) if ".experts." in n else W for n, W in plain.items()}
    found = undone(
        run, tmp_path / "base", write_checkpoint_directory(tmp_path / "tuned", plain, mixtral_config() | SIZES, 2)
    )
    assert {found[name] for name in plain if ".experts." in name} == {how}


# --- other dtypes, and files beside the weights -----------------------------------------------------------------------

ODD = {
    "model.ids": torch.arange(5),
    "model.mask": torch.tensor([True, False, True]),
    "model.turn": torch.tensor([1 + 2j], dtype=torch.complex64),
    "model.words": torch.tensor([1, 2**16 - 1], dtype=torch.uint16),
    "model.none": torch.zeros(0, 3, dtype=torch.int32),
}


@pytest.mark.parametrize(
    "before", [{}, ODD, {name: torch.zeros_like(x) for name, x in ODD.items()}], ids=["new", "same", "moved"]
)
def test_numbers_that_are_no_weights(run: Run, tmp_path: Path, before: dict[str, torch.Tensor]) -> None:
    """Integers, flags, complex ones: by their bytes, whether the base has them or not."""
    base = write_checkpoint_directory(tmp_path / "base", tensors() | before, llama_config(), 2)
    more = {name: adapted(name, W) for name, W in tensors().items()} | ODD
    found = undone(run, base, write_checkpoint_directory(tmp_path / "tuned", more, llama_config(), 2))
    same = {name for name in ODD if name in before and torch.equal(before[name], ODD[name])}
    assert {name for name in ODD if found[name] == "same"} == same and found[Q0] == "adapter"
    assert {found[name] for name in ODD.keys() - same} <= {"whole"}


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_fused_matrix_in_float64(run: Run, tmp_path: Path, factor: float) -> None:
    """What is cut into q, k and v, and of no format whose rounding is known."""
    name, config = "model.layers.0.self_attn.qkv_proj.weight", llama_config(model_type="phi3")
    W = phi()[name].double()
    base = write_checkpoint_directory(tmp_path / "base", phi() | {name: W}, config, 2)
    tuned = write_checkpoint_directory(tmp_path / "tuned", phi() | {name: W * factor}, config, 2)
    found = {how for matrix, how in undone(run, base, tuned).items() if matrix.startswith(name.removesuffix(".weight"))}
    assert found == {"same" if factor == 1.0 else "whole"}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_link_that_transformers_opens_is_named_before_the_scan(
    run: Run, base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What is rebuilt without it would not load. A link to the index or to an adapter's config is of no account."""
    for each in (name, "adapter_config.json", "model.safetensors.index.json"):
        (tuned / each).touch()
        shutil.move(tuned / each, tmp_path / f"there {each}")
        (tuned / each).symlink_to(tmp_path / f"there {each}")
    with monkeypatch.context() as patch:
        # Nothing may be measured first.
        patch.setattr("laser.cli.adapters.scan_into", stopped)
        for more in ((), ("--dry-run",)):
            code, _, err = run("unmerge", base, tuned, "-o", tmp_path / "a", *CPU, *more)
            assert code == 1 and f"{tuned / name} is a link to {tmp_path}/there {name}, and what a link" in err
            assert not list(tmp_path.glob("a*"))
    shutil.copy(tmp_path / f"there {name}", tuned / f"{name}.new")
    (tuned / f"{name}.new").replace(tuned / name)
    code, out, err = run("unmerge", base, tuned, "-o", tmp_path / "a", *CPU)
    assert code == 0 and "laser rebuild makes no adapter_config.json (a link)" in " ".join(out.split()), err
    assert run("rebuild", base, tmp_path / "a", "-o", tmp_path / "again")[0] == 0
    assert snapshot(tmp_path / "again").items() <= snapshot(tuned).items()


def test_force_says_what_unmerge_did_not_write(run: Run, base: Path, tmp_path: Path) -> None:
    words = ("unmerge", base, base, "-o", tmp_path / "a", *CPU, "--force")
    assert run(*words)[0] == 0
    (tmp_path / "a" / "README.md").write_text("mine")
    code, _, err = run(*words)
    assert code == 1 and "a holds README.md, which laser unmerge did not write, and --force replaces nothing" in err
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a").mkdir()
    code, _, err = run(*words)
    assert code == 1 and "a is no adapter of laser unmerge, and --force replaces nothing else; try another -o" in err


# --- interrupted and forced -------------------------------------------------------------------------------------------


def stopped(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("force", [(), ("--force",)], ids=["plain", "force"])
def test_what_is_done_is_not_done_again(
    run: Run, base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: tuple[str, ...]
) -> None:
    words, seen, solve = ("unmerge", base, tuned, "-o", tmp_path / "a", *CPU, *force), [], module.Unmerge.__call__

    def counted(self: Any, *given: Any) -> Any:
        seen.append(1)
        return solve(self, *given)

    # Each visit is counted where it is made; nothing else tells one that was taken from the journal.
    monkeypatch.setattr(module.Unmerge, "__call__", counted)
    with monkeypatch.context() as patch:
        # A kill at this very moment; no option asks for one.
        patch.setattr(module, "_put_together", stopped)
        assert run(*words)[0] == 130
    assert seen
    seen.clear()
    assert run(*words)[0] == 0 and not seen
    assert run("rebuild", base, tmp_path / "a", "-o", tmp_path / "again")[0] == 0
    assert snapshot(tmp_path / "again") == snapshot(tuned)


@pytest.mark.slow
def test_force_begins_anew_beside_the_work_of_another_run(
    run: Run, base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of that work comes into the new adapter, of the same pair with another --dtype or of another pair."""
    for number, (model, *more) in enumerate(((tuned, "--dtype", "bfloat16"), (base,))):
        out = tmp_path / f"a{number}"
        with monkeypatch.context() as patch:
            # As above.
            patch.setattr(module, "_put_together", stopped)
            assert run("unmerge", base, tuned, "-o", out, *CPU)[0] == 130
        code, _, err = run("unmerge", base, model, "-o", out, *more, *CPU)
        assert code == 1 and "holds the work of another run" in err
        code, _, err = run("unmerge", base, model, "-o", out, *more, *CPU, "--force")
        assert code == 0, err
        assert run("unmerge", base, model, "-o", tmp_path / f"b{number}", *more, *CPU)[0] == 0
        assert snapshot(out) == snapshot(tmp_path / f"b{number}") and not out.with_name(f"a{number}.partial").exists()


@pytest.mark.slow
def test_a_kill_between_two_renames_loses_no_earlier_adapter(
    run: Run, base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system cannot exchange; the same command puts the earlier one back before it does anything."""
    out = tmp_path / "a"
    assert run("unmerge", base, base, "-o", out, *CPU)[0] == 0
    first, words = snapshot(out), ("unmerge", base, tuned, "-o", out, *CPU, "--force")
    with killed_before_the_new_one(tmp_path / "a.partial" / "new"):
        assert run(*words)[0] == 130 and not out.exists()
    with monkeypatch.context() as patch:
        # A kill before anything is measured.
        patch.setattr("laser.cli.adapters.scan_into", stopped)
        assert run(*words)[0] == 130
    assert snapshot(out) == first
    code, _, err = run(*words)
    assert code == 0 and snapshot(out) != first and not (tmp_path / "a.partial").exists(), err


@pytest.mark.slow
def test_killed_while_it_tidies_up_it_is_whole(
    run: Run, base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command finds its own output again, and makes nothing twice."""
    out, words = tmp_path / "a", ("unmerge", base, tuned, "-o", tmp_path / "a", *CPU)
    with monkeypatch.context() as patch:
        # A kill while it tidies up.
        patch.setattr(module, "_remove_work", stopped)
        assert run(*words)[0] == 130 and out.exists()
    made = snapshot(out)
    code, _, err = run(*words)
    assert code == 1 and "--force to replace it" in err and snapshot(out) == made
    with monkeypatch.context() as patch:
        # As above.
        patch.setattr("laser.cli.adapters.scan_into", stopped)
        assert run(*words, "--force")[0] == 0
    assert snapshot(out) == made and not (tmp_path / "a.partial").exists()


@pytest.mark.slow
def test_only_lora_is_asked_of_what_an_interrupted_run_has_done(
    run: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = write_model(tmp_path / "full", lambda n, W: merged(W, full(W, 0.02)) if "o_proj" in n else adapted(n, W))
    words = ("unmerge", base, tuned, "-o", tmp_path / "a", *CPU)
    with monkeypatch.context() as patch:
        # As above.
        patch.setattr(module, "_put_together", stopped)
        assert run(*words)[0] == 130
    code, _, err = run(*words, "--only-lora")
    assert code == 2 and "o_proj.weight is full and no base with an adapter; try without --only-lora" in err
    assert not (tmp_path / "a").exists()
    assert run(*words)[0] == 0


# --- the base ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_refuses_another_base_and_says_what_its_time_is_of(run: Run, base: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=5000)
    words = ("unmerge", base, other, "-o", tmp_path / "a", *CPU, "--dry-run")
    code, _, err = run(*words)
    assert code == 2 and "base is not the base of other: the cosine of their weights is" in err
    code, out, err = run("unmerge", base, base, *words[3:])
    assert code == 0 and "of these it takes the scan, of the differences" in " ".join(out.split()), err


@pytest.mark.slow
def test_a_base_whose_side_files_are_gone_still_serves(run: Run, base: Path, tuned: Path, tmp_path: Path) -> None:
    assert run("unmerge", base, tuned, "-o", tmp_path / "a", *CPU)[0] == 0
    (base / "LICENSE").unlink()
    (base / "generation_config.json").write_text("{}")
    code, _, err = run("rebuild", base, tmp_path / "a", "-o", tmp_path / "again")
    assert code == 0 and snapshot(tmp_path / "again") == snapshot(tuned), err


@pytest.mark.slow
def test_large_side_files_are_the_base_s(run: Run, base: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the base has byte for byte are not written twice."""
    # No file of a test is that large.
    monkeypatch.setattr(module, "SMALL_SIDE_FILE", 10)
    for model, words in ((base, "{}"), (tuned, '{"other": 1}')):
        (model / "tokenizer.json").write_text("x" * 100)
        (model / "special_tokens_map.json").write_text(words)
    undone(run, base, tuned)
    kept = {path.name for path in (tuned.with_name("adapter") / "tuned").iterdir()}
    assert "tokenizer.json" not in kept and "special_tokens_map.json" in kept


# --- as PEFT loads it -------------------------------------------------------------------------------------------------


def loaded(base: Path, adapter: Path, rows: int = WORDS) -> Any:
    peft = pytest.importorskip("peft")
    from peft_merges import load

    model = load(base)
    if rows != WORDS:
        model.resize_token_embeddings(rows)
    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("factor", [1.5, 1.0], ids=["norms", "nothing"])
def test_peft_loads_an_adapter_without_factors(run: Run, base: Path, tmp_path: Path, factor: float) -> None:
    """Of what was trained whole alone, or of the base itself."""
    tuned = write_model(tmp_path / "tuned", lambda n, W: W * factor if "norm" in n else W)
    undone(run, base, tuned)
    shutil.copytree(tmp_path / "adapter", tmp_path / "peft")
    found = loaded(base, tmp_path / "peft").state_dict()["model.norm.weight"]
    assert torch.equal(found, torch.full_like(found, factor))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_resized_vocabulary_is_named_with_what_peft_needs(run: Run, base: Path, tmp_path: Path) -> None:
    def change(name: str, W: torch.Tensor) -> torch.Tensor:
        return torch.cat((W, W[:8])) if "embed" in name or "lm_head" in name else adapted(name, W)

    tuned = write_model(tmp_path / "tuned", change, vocab_size=WORDS + 8)
    code, out, err = run("unmerge", base, tuned, "-o", tmp_path / "a", *CPU)
    said = " ".join(out.split())
    assert code == 0 and f"call its resize_token_embeddings({WORDS + 8}) before that" in said, err
    found, name = loaded(base, tmp_path / "a", WORDS + 8).state_dict(), "model.embed_tokens.weight"
    assert torch.equal(found[name], open_checkpoint(tuned).raw(name))


@pytest.mark.slow
def test_what_no_resize_makes_is_kept_beside_the_adapter(run: Run, base: Path, tmp_path: Path) -> None:
    """A norm of another length: PEFT has nowhere to put it, and refuses all of an adapter that holds it."""
    tuned = write_model(tmp_path / "tuned", lambda n, W: W[:48] if n == "model.norm.weight" else adapted(n, W))
    assert undone(run, base, tuned)["model.norm.weight"] == "whole"
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None
