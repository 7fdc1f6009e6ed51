"""laser unmerge and laser rebuild: the fine-tune's bytes again, every one, or a refusal."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Run, write_checkpoint_directory
from helpers import snapshot, tensors_in
from hub_server import connect, serving
from huggingface_hub import close_session
from merges import BF16, F16, F32, full, merged, update
from models import HIDDEN, WORDS, Change, llama_config, phi, tensors, write_model

from laser.checkpoint.reader import open_checkpoint
from laser.differences.base import Base
from laser.differences.unmerge import peft_config, ranks_in, targets, unmerge_into
from laser.engine.crew import Crew
from laser.pipeline import scan
from laser.spectral.devices import HOST

RANK, Q0 = 3, "model.layers.0.self_attn.q_proj.weight"
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def lora(
    roles: tuple[str, ...], how: str = "delta-first", rank: int = RANK, share: float = 0.02, s: float = 1.0
) -> Change:
    def change(name: str, W: torch.Tensor) -> torch.Tensor:
        if not any(role in name for role in roles):
            return W
        return merged(W, update(W, rank, share / s, seed=len(name)), how, W.dtype, s)

    return change


def undone(run: Run, tmp_path: Path, base: Path, tuned: Path) -> dict[str, object]:
    """The record of the adapter; the rebuilt folder is the tuned one, file by file and byte by byte."""
    adapter, again = tmp_path / "adapter", tmp_path / "again"
    code, out, err = run("unmerge", base, tuned, "-o", adapter, "--json", "--device", "cpu")
    assert code == 0, err
    code, _, err = run("rebuild", base, adapter, "-o", again)
    assert code == 0, err
    assert snapshot(again) == snapshot(tuned)
    assert not adapter.with_name("adapter.partial").exists()
    return json.loads(out)


def made(document: dict[str, object]) -> dict[str, str]:
    return {entry["name"]: entry["how"] for entry in document["entries"]}  # pyright: ignore


def ranks(document: dict[str, object]) -> set[int]:
    return {entry["rank"] for entry in document["entries"] if entry["how"] == "adapter"}  # pyright: ignore


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base")


@pytest.mark.parametrize("how", ["once", "delta-first"])
@pytest.mark.parametrize(
    "roles", [("q_proj", "v_proj"), pytest.param(LINEAR, marks=pytest.mark.slow)], ids=["q v", "all"]
)
def test_a_merged_adapter(run: Run, base: Path, tmp_path: Path, how: str, roles: tuple[str, ...]) -> None:
    tuned = write_model(tmp_path / "tuned", lora(roles, how), shards=3)
    found = undone(run, tmp_path, base, tuned)
    expected = {name: "adapter" if any(role in name for role in roles) else "same" for name in tensors()}
    assert made(found) == expected and ranks(found) == {RANK}
    formulas = {entry["formula"] for entry in found["entries"] if entry["how"] == "adapter"}  # pyright: ignore
    assert formulas == {how}
    assert sum(entry["missed"] or 0 for entry in found["entries"]) < 30  # pyright: ignore


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F16, F32])
def test_other_formats(run: Run, tmp_path: Path, dtype: torch.dtype) -> None:
    base = write_model(tmp_path / "base", dtype=dtype)
    tuned = write_model(tmp_path / "tuned", lora(("q_proj", "v_proj"), "once"), dtype=dtype)
    found = undone(run, tmp_path, base, tuned)
    assert ranks(found) == {RANK} and set(made(found).values()) == {"same", "adapter"}


@pytest.mark.slow
@pytest.mark.parametrize("stored, tuned", [(F32, BF16), (BF16, F32)], ids=["float32 base", "float32 merge"])
def test_a_base_in_another_format(run: Run, tmp_path: Path, stored: torch.dtype, tuned: torch.dtype) -> None:
    """The base in float32 and the merge in bfloat16, or the other way round: everything else is a cast."""

    def change(name: str, W: torch.Tensor) -> torch.Tensor:
        return merged(W, update(W, RANK, 0.02), dtype=tuned) if "q_proj" in name else W.to(tuned)

    base = write_model(tmp_path / "base", dtype=stored)
    found = undone(run, tmp_path, base, write_model(tmp_path / "tuned", change, dtype=stored))
    assert set(made(found).values()) == {"cast", "adapter"} and ranks(found) == {RANK}


@pytest.mark.slow
def test_an_adapter_in_16_bits_with_an_odd_scale(run: Run, base: Path, tmp_path: Path) -> None:
    """alpha 8 of rank 3: its product was rounded before it was scaled."""
    tuned = write_model(tmp_path / "tuned", lora(("q_proj", "v_proj"), "scaled-after", share=0.05, s=8 / 3))
    found = undone(run, tmp_path, base, tuned)
    assert set(made(found).values()) == {"same", "adapter"}


@pytest.mark.slow
def test_what_was_trained_whole(run: Run, base: Path, tmp_path: Path) -> None:
    """Norms, embedding and head beside the adapter, one of them only scaled."""
    low = lora(("q_proj", "v_proj"))

    def change(name: str, W: torch.Tensor) -> torch.Tensor:
        if "embed_tokens" in name or "lm_head" in name:
            return merged(W, full(W, 0.05))
        return W * 1.5 if "norm" in name else low(name, W)

    found = undone(run, tmp_path, base, write_model(tmp_path / "tuned", change))
    assert {name for name, how in made(found).items() if how == "saved"} == {
        name for name in tensors() if "norm" in name or "embed" in name or "lm_head" in name
    }
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "model.norm" in config["modules_to_save"] and "lm_head" in config["modules_to_save"]


@pytest.mark.slow
def test_a_full_fine_tune_is_kept_without_loss_or_refused(run: Run, base: Path, tmp_path: Path) -> None:
    tuned = write_model(tmp_path / "tuned", lambda name, W: merged(W, full(W, 0.01)) if "proj" in name else W)
    found = undone(run, tmp_path, base, tuned)
    assert {how for name, how in made(found).items() if "proj" in name} == {"whole"}
    size = (tmp_path / "adapter" / "remainder.safetensors").stat().st_size
    assert size < 0.8 * sum(path.stat().st_size for path in tuned.glob("*.safetensors"))
    code, _, err = run("unmerge", base, tuned, "-o", tmp_path / "only", "--only-lora", "--device", "cpu")
    assert code == 2 and "is full and no base with an adapter; try without --only-lora" in err
    assert not (tmp_path / "only").exists()


@pytest.mark.slow
def test_a_base_that_was_quantised_first_is_named(run: Run, base: Path, tmp_path: Path) -> None:
    """The adapter was trained on the base in 4 bits: every matrix holds that error, and is kept without loss."""

    def change(name: str, W: torch.Tensor) -> torch.Tensor:
        if not any(role in name for role in LINEAR):
            return W
        step = W.float().abs().amax(1, keepdim=True) / 7
        coarse = (torch.round(W.float() / step) * step).to(BF16)
        return merged(coarse, update(W, RANK, 0.01)) if "q_proj" in name else coarse

    tuned = write_model(tmp_path / "tuned", change)
    assert {how for name, how in made(undone(run, tmp_path, base, tuned)).items() if "proj" in name} == {"whole"}
    words = (base, tuned, "-o", tmp_path / "second", "--device", "cpu")
    code, out, _ = run("unmerge", *words)
    assert code == 0 and "looks as if base had been quantised before it was tuned" in out
    code, _, err = run("unmerge", *words[:3], tmp_path / "only", *words[4:], "--only-lora")
    assert code == 2 and "as of a base that was quantised before it was tuned" in err


@pytest.mark.slow
def test_another_tokenizer_s_words_leave_the_rest_alone(run: Run, base: Path, tmp_path: Path) -> None:
    """A model with other tokens: embedding and head have other rows, in another order; they are stored whole."""
    low = lora(("q_proj",))

    def change(name: str, W: torch.Tensor) -> torch.Tensor:
        if "embed_tokens" in name or "lm_head" in name:
            order = torch.randperm(WORDS, generator=torch.Generator().manual_seed(5))
            return torch.cat((W[order], W[:5] * 0.5))
        return low(name, W)

    found = made(undone(run, tmp_path, base, write_model(tmp_path / "tuned", change, vocab_size=WORDS + 5)))
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"] == "saved" and found[Q0] == "adapter"


def test_another_base_is_refused(run: Run, base: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=1000)
    code, _, err = run("unmerge", other, base, "-o", tmp_path / "adapter", "--device", "cpu")
    assert code == 2 and "other is not the base of base" in err and not (tmp_path / "adapter").exists()


def test_a_model_and_itself(run: Run, base: Path, tmp_path: Path) -> None:
    found = undone(run, tmp_path, base, base)
    assert set(made(found).values()) == {"same"}


@pytest.mark.slow
def test_side_files_and_a_resized_vocabulary(run: Run, base: Path, tmp_path: Path) -> None:
    """All of them lie in the adapter's folder, being small."""
    low = lora(("q_proj",))

    def grow(name: str, W: torch.Tensor) -> torch.Tensor:
        more = torch.ones(8, W.shape[-1], dtype=W.dtype)
        return torch.cat((W, more)) if "embed" in name or "lm_head" in name else low(name, W)

    tuned = write_model(tmp_path / "tuned", grow, vocab_size=WORDS + 8)
    (tuned / "added_tokens.json").write_text('{"<new>": 64}')
    (tuned / "generation_config.json").write_text('{"do_sample": true}\n')
    found = undone(run, tmp_path, base, tuned)
    assert made(found)["lm_head.weight"] == "saved" and made(found)[Q0] == "adapter"
    kept = {path.name for path in (tmp_path / "adapter" / "tuned").iterdir()}
    assert kept == {path.name for path in tuned.iterdir() if path.suffix != ".safetensors"}


@pytest.mark.slow
def test_side_files_in_folders(run: Run, base: Path, tmp_path: Path) -> None:
    """Wherever they lie, below the tuned model or the base, they are made again; a trainer's state is no part of it."""
    for model in (base, tmp_path / "tuned"):
        if model != base:
            write_model(model, lora(("q_proj",)))
        (model / "additional_chat_templates").mkdir()
        (model / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (tmp_path / "tuned" / "additional_chat_templates" / "new.jinja").write_text("{{ new }}")
    undone(run, tmp_path, base, tmp_path / "tuned")
    kept = snapshot(tmp_path / "adapter" / "tuned")
    assert {"additional_chat_templates/new.jinja", "additional_chat_templates/tools.jinja"} <= kept.keys()


@pytest.mark.slow
def test_what_rebuild_does_not_make_is_named(run: Run, base: Path, tmp_path: Path) -> None:
    tuned, words = write_model(tmp_path / "tuned"), ("unmerge", base, tmp_path / "tuned", "--device", "cpu", "-o")
    code, out, _ = run(*words, tmp_path / "first")
    assert code == 0 and "laser rebuild makes no" not in out
    left = ["adapter_config.json", "adapter_model.safetensors", "checkpoint-5/optimizer.pt", "training_args.bin"]
    for name in left:
        (tuned / name).parent.mkdir(exist_ok=True)
        (tuned / name).write_text("{}")
    (tuned / "notes.txt").symlink_to(base / "config.json")
    code, out, err = run(*words, tmp_path / "second")
    assert (
        code == 0 and f"laser rebuild makes no {left[0]}, {left[1]}, {left[2]}, notes.txt (a link) and 1 more:" in out
    )
    code, out, err = run(*words, tmp_path / "third", "--json")
    assert sorted(json.loads(out)["left_out"]) == [*left[:3], "notes.txt (a link)", left[3]], err
    assert run("rebuild", base, tmp_path / "second", "-o", tmp_path / "again")[0] == 0
    gone = {*left, "notes.txt"}
    assert snapshot(tmp_path / "again") == {n: data for n, data in snapshot(tuned).items() if n not in gone}


def test_ids_of_the_hub_and_other_shards(run: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the base, of the tuned one, or of both; each in shards of its own."""
    tuned = write_model(tmp_path / "tuned", lora(("q_proj",)), shards=5)
    with serving() as hub:
        hub.add("maker/base", base)
        hub.add("maker/tuned", tuned)
        connect(hub, tmp_path / "cache", monkeypatch)
        for number, (first, second) in enumerate((("maker/base", "maker/tuned"), (base, "maker/tuned"))):
            adapter, again = tmp_path / f"adapter{number}", tmp_path / f"again{number}"
            code, _, err = run("unmerge", first, second, "-o", adapter, "--device", "cpu")
            assert code == 0, err
            code, _, err = run("rebuild", first, adapter, "-o", again)
            assert code == 0 and snapshot(again) == snapshot(tuned), err
        close_session()
    config = json.loads((tmp_path / "adapter0" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "maker/base"


@pytest.mark.slow
def test_a_fused_module_has_one_adapter(run: Run, tmp_path: Path) -> None:
    """q, k and v of one tensor are one module to PEFT: one A, and B for all of its rows."""
    config = llama_config(model_type="phi3", num_key_value_heads=2, architectures=["Phi3ForCausalLM"])

    def change(name: str, W: torch.Tensor) -> torch.Tensor:
        return merged(W, update(W, RANK, 0.02)) if "qkv_proj" in name else W

    base = write_checkpoint_directory(tmp_path / "phi", phi(), config)
    tensors_of = {name: change(name, W) for name, W in phi().items()}
    found = undone(run, tmp_path, base, write_checkpoint_directory(tmp_path / "tuned", tensors_of, config))
    assert ranks(found) == {RANK} and sum(how == "adapter" for how in made(found).values()) == 6
    shapes = {name: tuple(W.shape) for name, W in tensors_in(tmp_path / "adapter").items() if "lora" in name}
    stem = "base_model.model.model.layers.0.self_attn.qkv_proj"
    assert shapes[f"{stem}.lora_A.weight"] == (RANK, HIDDEN) and len(shapes) == 4
    stated = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stated["target_modules"] == ["qkv_proj"] and stated["target_parameters"] is None


@pytest.mark.slow
def test_fused_against_unfused(run: Run, base: Path, tmp_path: Path) -> None:
    """The base stores q, k and v apart; the tuned one together. PEFT has no name for a part, laser does."""
    config = llama_config(model_type="phi3", num_key_value_heads=2, architectures=["Phi3ForCausalLM"])
    tuned = write_checkpoint_directory(tmp_path / "tuned", phi(lora(("q_proj", "up_proj"))), config)
    found = undone(run, tmp_path, base, tuned)
    adapted = {name for name, how in made(found).items() if how == "adapter"}
    assert adapted == {
        f"model.layers.{layer}.{part}"
        for layer in (0, 1)
        for part in ("self_attn.qkv_proj.weight[q]", "mlp.gate_up_proj.weight[up]")
    }
    assert not any("lora" in name for name in tensors_in(tmp_path / "adapter") if name.startswith("base_model"))


@pytest.mark.slow
def test_eight_bits_and_integers_go_by_their_bytes(run: Run, tmp_path: Path) -> None:
    """Of formats whose rounding is not known here nothing is claimed: equal bytes are the same, others kept whole."""
    more = {"model.rotary.steps": torch.arange(8), "model.wide.weight": torch.ones(4, 4, dtype=torch.float64)}
    more |= {"model.eight.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    changed = more | {"model.wide.weight": torch.full((4, 4), 1 / 3, dtype=torch.float64)}
    base = write_checkpoint_directory(tmp_path / "base", tensors() | more, llama_config())
    low = lora(("q_proj",))
    tuned = write_checkpoint_directory(
        tmp_path / "tuned", {name: low(name, W) for name, W in tensors().items()} | changed, llama_config()
    )
    found = made(undone(run, tmp_path, base, tuned))
    assert [found[name] for name in more] == ["same", "whole", "same"] and found[Q0] == "adapter"


def test_pickles_are_refused(run: Run, base: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    (tuned / "config.json").write_bytes((base / "config.json").read_bytes())
    torch.save(tensors(), tuned / "pytorch_model.bin")
    code, _, err = run("unmerge", base, tuned, "-o", tmp_path / "adapter")
    assert code == 2 and "is not stored as safetensors" in err and not list(tmp_path.glob("adapter*"))


# --- the adapter as others read it ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_adapter_is_one_of_peft_s(run: Run, base: Path, tmp_path: Path) -> None:
    """Merged by the formula of PEFT, written out here, it gives the tuned weights but for some last bits."""
    tuned = write_model(tmp_path / "tuned", lora(("q_proj", "v_proj"), "delta-first"))
    undone(run, tmp_path, base, tuned)
    folder = tmp_path / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", RANK, RANK)
    assert config["target_modules"] == ["q_proj", "v_proj"] and config["rank_pattern"] == {}
    found, source, expected = tensors_in(folder), tensors_in(base), tensors_in(tuned)
    modules = {name.removesuffix(".lora_A.weight") for name in found if name.endswith(".lora_A.weight")}
    assert len(modules) == 4
    for module in modules:
        A, B = found[f"{module}.lora_A.weight"], found[f"{module}.lora_B.weight"]
        name = module.removeprefix("base_model.model.") + ".weight"
        assert A.dtype == B.dtype == F32 and A.shape == (RANK, HIDDEN) and B.shape == (len(source[name]), RANK)
        made = source[name] + ((B @ A) * (config["lora_alpha"] / config["r"])).to(BF16)
        assert (made != expected[name]).double().mean() < 1e-3


def test_targets_are_short_where_all_of_a_kind_are_adapted() -> None:
    modules = [f"layers.{i}.{role}" for i in range(3) for role in ("q_proj", "v_proj")]
    assert targets(dict.fromkeys(modules, 4), modules) == ["q_proj", "v_proj"]
    assert targets({"layers.1.q_proj": 4}, modules) == ["layers.1.q_proj"]


@pytest.mark.slow
def test_ranks_that_differ_are_in_the_pattern(base: Path, tmp_path: Path) -> None:
    def change(name: str, W: torch.Tensor) -> torch.Tensor:
        rank = 5 if "layers.1" in name else 2
        adapted = "q_proj" in name or ("o_proj" in name and "layers.0" in name)
        return merged(W, update(W, rank, 0.03)) if adapted else W

    one, other = open_checkpoint(base), open_checkpoint(write_model(tmp_path / "tuned", change))
    compared = Base.of(one, other)
    delta = scan(other, base=compared, device=HOST).delta
    assert delta
    record = unmerge_into(compared, delta, tmp_path / "adapter", crew=Crew((HOST,), 1))
    ranks = ranks_in(tmp_path / "adapter" / "adapter_model.safetensors", record.entries)
    config = peft_config(compared, record.entries, ranks)
    assert config["r"] == 2 and config["rank_pattern"] == {"model.layers.1.self_attn.q_proj": 5}
    assert config["alpha_pattern"] == config["rank_pattern"]


# --- going on, and refusals -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_goes_on_where_it_was(run: Run, base: Path, tmp_path: Path) -> None:
    """Killed among the matrices and called again, it writes the same bytes, and what was done is not done again."""
    tuned = write_model(tmp_path / "tuned", lora(("q_proj", "v_proj")))
    undone(run, tmp_path, base, tuned)
    one, other = open_checkpoint(base), open_checkpoint(tuned)
    compared = Base.of(one, other)
    from laser.differences.unmerge import all_roles
    from laser.selection import Selection

    delta = scan(other, Selection(roles=all_roles(other)), base=compared, device=HOST).delta
    assert delta
    out, seen = tmp_path / "second", []

    def stop(matrix: object, _: float) -> None:
        seen.append(matrix)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unmerge_into(compared, delta, out, crew=Crew((HOST,), 1), tick=stop)
    assert out.with_name("second.partial").is_dir() and not out.exists()
    done = len(seen)
    unmerge_into(compared, delta, out, crew=Crew((HOST,), 1), tick=lambda m, _: seen.append(m))
    assert len(seen) == len(tensors()) and done == 5
    assert snapshot(out) == snapshot(tmp_path / "adapter")


@pytest.mark.slow
def test_workers_make_no_difference(run: Run, base: Path, tmp_path: Path) -> None:
    tuned = write_model(tmp_path / "tuned", lora(("q_proj", "v_proj")))
    for workers in (1, 3):
        code, _, err = run(
            "unmerge", base, tuned, "-o", tmp_path / f"{workers}", "--device", "cpu", "--workers", workers
        )
        assert code == 0, err
    assert snapshot(tmp_path / "1") == snapshot(tmp_path / "3")


def test_foreign_work_is_left_alone(run: Run, base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter.partial").mkdir()
    (tmp_path / "adapter.partial" / "thesis.txt").write_text("mine")
    code, _, err = run("unmerge", base, base, "-o", tmp_path / "adapter")
    assert code == 1 and "holds thesis.txt, which laser did not write; move it away" in err
    assert (tmp_path / "adapter.partial" / "thesis.txt").read_text() == "mine"
    (tmp_path / "there").mkdir()
    code, _, err = run("unmerge", base, base, "-o", tmp_path / "there")
    assert code == 1 and "there exists; try another -o" in err


def test_a_dry_run_writes_nothing(run: Run, base: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    code, out, err = run("unmerge", base, base, "-o", tmp_path / "adapter", "--dry-run", "--device", "cpu")
    assert code == 0 and "to scan" in out and snapshot(tmp_path) == before, err
    code, out, _ = run("unmerge", base, base, "-o", tmp_path / "adapter", "--dry-run", "--json", "--device", "cpu")
    assert code == 0 and Q0 in json.loads(out)["names"]


@pytest.mark.slow
def test_force_replaces_an_adapter_and_nothing_else(run: Run, base: Path, tmp_path: Path) -> None:
    """An earlier adapter stands until the new one is whole; work of another run beside it is begun anew."""
    words = ("unmerge", base, base, "-o", tmp_path / "adapter", "--device", "cpu")
    assert run(*words)[0] == 0
    first = snapshot(tmp_path / "adapter")
    tuned = write_model(tmp_path / "tuned", lora(("q_proj",)))
    code, _, err = run("unmerge", base, tuned, *words[3:])
    assert code == 1 and "adapter exists; try another -o" in err and snapshot(tmp_path / "adapter") == first
    other = write_model(tmp_path / "other", seed=1000)
    assert run("unmerge", other, tuned, *words[3:], "--force")[0] == 2 and snapshot(tmp_path / "adapter") == first
    code, _, err = run("unmerge", base, tuned, *words[3:], "--force")
    assert code == 0 and snapshot(tmp_path / "adapter") != first, err
    assert run("rebuild", base, tmp_path / "adapter", "-o", tmp_path / "again")[0] == 0
    assert snapshot(tmp_path / "again") == snapshot(tuned) and not (tmp_path / "adapter.partial").exists()
    (tmp_path / "adapter" / "thesis.txt").write_text("mine")
    for out in (tmp_path / "adapter", base):
        before = snapshot(out)
        code, _, err = run("unmerge", base, tuned, "-o", out, "--device", "cpu", "--force")
        assert code == 1 and "--force replaces nothing else" in err and snapshot(out) == before


@pytest.mark.slow
def test_verify_proves_a_rebuild(run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    """By the record alone: neither base nor tuned model is there any more."""
    out = tmp_path / "out"
    assert run("rebuild", base, adapter, "-o", out)[0] == 0
    shutil.rmtree(base)
    shutil.rmtree(tmp_path / "tuned")
    code, said, err = run("verify", adapter, out)
    assert code == 0 and "2 shards and" in said and "0 problems" in said, err
    assert json.loads(run("verify", adapter, out, "--json")[1])["problems"] == []
    shard = next(out.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (out / "LICENSE").unlink()
    (out / "pytorch_model.bin").write_bytes(b"weights of somebody")
    code, said, err = run("verify", adapter, out, "--json")
    found = json.loads(said)["problems"]
    assert code == 1 and len(found) == 3 and shard.name in found[0]
    assert any("LICENSE: No such file" in each for each in found) and "pytorch_model.bin" in found[-1]
    assert run("verify", adapter, tmp_path / "nowhere")[0] == 1


@pytest.fixture
def adapter(run: Run, base: Path, tmp_path: Path) -> Path:
    tuned = write_model(tmp_path / "tuned", lora(("q_proj",)))
    (tuned / "NOTES.md").write_text("of the tuned one")
    assert run("unmerge", base, tuned, "-o", tmp_path / "adapter", "--device", "cpu")[0] == 0
    return tmp_path / "adapter"


def refused(run: Run, base: Path, adapter: Path, message: str) -> None:
    out = adapter.with_name("out")
    code, _, err = run("rebuild", base, adapter, "-o", out)
    assert code == 1 and message in err and "Traceback" not in err
    assert not out.exists() and not out.with_name("out.partial").exists()


def test_rebuild_refuses_another_base(run: Run, adapter: Path, tmp_path: Path) -> None:
    refused(run, write_model(tmp_path / "other", seed=1000), adapter, "the adapter was made from")
    refused(run, tmp_path / "tuned", adapter, "the adapter was made from")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "remainder.safetensors"])
def test_rebuild_refuses_a_changed_part(run: Run, base: Path, adapter: Path, file: str) -> None:
    data = bytearray((adapter / file).read_bytes())
    data[-3] ^= 1
    (adapter / file).write_bytes(data)
    refused(run, base, adapter, f"{file}: found sha256")
    (adapter / file).unlink()
    refused(run, base, adapter, f"{file}: No such file")


def test_rebuild_refuses_a_changed_record(run: Run, base: Path, adapter: Path) -> None:
    document = json.loads((adapter / "laser.json").read_text())
    next(entry for entry in document["entries"] if entry["how"] == "adapter")["rounds"] += 1
    (adapter / "laser.json").write_text(json.dumps(document))
    refused(run, base, adapter, "was changed or damaged since it was written")
    (adapter / "laser.json").unlink()
    refused(run, base, adapter, "no such file")


def test_rebuild_refuses_a_lost_side_file(run: Run, base: Path, adapter: Path) -> None:
    (adapter / "tuned" / "NOTES.md").write_text("of somebody")
    refused(run, base, adapter, "NOTES.md of the tuned checkpoint is another one")
    (adapter / "tuned" / "NOTES.md").unlink()
    refused(run, base, adapter, "NOTES.md of the tuned checkpoint is missing")
