"""BASE+ADAPTER: seen without being written, it is to the bit what laser rebuild writes; and what it refuses."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, write_checkpoint_directory
from helpers import snapshot, tensors_in
from hub_server import connect, serving
from merges import F32, weights
from models import EXPERTS, HIDDEN, INNER, llama_config, phi, write_mixtral, write_model
from pico_language import TEXT, make_model
from safetensors.torch import load_file, save_file
from test_peft import Q0, write_adapter

import laser
from laser.checkpoint.safetensors import read_bytes, sha256_of
from laser.differences import peft
from laser.differences.opened import open_model
from laser.errors import LaserError
from laser.spectra import Spectra


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base")


def of_all_kinds(tmp_path: Path) -> tuple[Path, Path]:
    """A Mixtral, and an adapter of modules, of a layer's experts, of the embedding, and of a norm trained whole."""
    base, adapter = write_mixtral(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    found, stem = load_file(adapter / "adapter_model.safetensors"), "base_model.model.model.layers.0.mlp.experts"
    found[f"{stem}.lora_A.weight"] = weights(4 * EXPERTS, INNER, 1, F32)
    found[f"{stem}.lora_B.weight"] = weights(HIDDEN, 4 * EXPERTS, 2, F32)
    words = tensors_in(base)["model.embed_tokens.weight"].shape[0]
    found["base_model.model.model.embed_tokens.lora_embedding_A"] = weights(4, words, 3, F32)
    found["base_model.model.model.embed_tokens.lora_embedding_B"] = weights(HIDDEN, 4, 4, F32)
    found["base_model.model.model.norm.weight"] = torch.full((HIDDEN,), 1.25)
    save_file(found, adapter / "adapter_model.safetensors")
    stated = json.loads((adapter / "adapter_config.json").read_text())
    stated |= {"target_parameters": ["mlp.experts.down_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(stated))
    return base, adapter


def of_one_tensor_for_several(tmp_path: Path) -> tuple[Path, Path]:
    """q, k and v in one tensor, as Phi-3 has them, which is cut into three matrices."""
    base = write_checkpoint_directory(tmp_path / "base", phi(), llama_config(model_type="phi3"), 2)
    adapter = write_adapter(tmp_path / "adapter")
    rows = tensors_in(base)["model.layers.0.self_attn.qkv_proj.weight"].shape[0]
    stem = "base_model.model.model.layers.0.self_attn.qkv_proj"
    factors = {f"{stem}.lora_A.weight": weights(4, HIDDEN, 1, F32), f"{stem}.lora_B.weight": weights(rows, 4, 2, F32)}
    save_file(factors, adapter / "adapter_model.safetensors")
    return base, adapter


MAKERS = [of_all_kinds, of_one_tensor_for_several]


@pytest.mark.parametrize("make", MAKERS)
def test_it_is_what_rebuild_writes(make: Callable[[Path], tuple[Path, Path]], run: Run, tmp_path: Path) -> None:
    base, adapter = make(tmp_path)
    assert run("rebuild", base, adapter, "-o", tmp_path / "made")[0] == 0
    seen, made = open_model(f"{base}+{adapter}"), laser.open_checkpoint(tmp_path / "made")
    changed = {name for name, W in tensors_in(base).items() if not torch.equal(W, tensors_in(tmp_path / "made")[name])}
    assert changed  # the adapter does something
    for one, other in zip(seen.shards, made.shards, strict=True):
        assert one.header == other.header and one.size == other.size
        whole = read_bytes(other, 0, other.size)
        assert torch.equal(read_bytes(one, 0, one.size), whole)
        step = one.size // 7  # ranges that begin and end within the header, within tensors, and across several
        for start in range(0, one.size, step):
            end = min(start + 2 * step, one.size)
            assert torch.equal(read_bytes(one, start, end), whole[start:end])
    scanned, written = laser.scan(seen), laser.scan(made)
    assert scanned.values.keys() == written.values.keys()
    assert all(np.array_equal(values, written.values[name]) for name, values in scanned.values.items())


def test_a_run_writes_the_shards_that_it_writes_of_the_rebuilt(run: Run, tmp_path: Path) -> None:
    base, adapter = of_all_kinds(tmp_path)
    both, how = f"{base}+{adapter}", ("--rule", "rank:5", "--no-search", "--roles", "q,w2", "--device", "cpu")
    assert run("rebuild", base, adapter, "-o", tmp_path / "made")[0] == 0
    assert run("run", tmp_path / "made", "-o", tmp_path / "one", *how)[0] == 0
    code, _, err = run("run", both, "-o", tmp_path / "two", *how)
    assert code == 0, err
    one, two = snapshot(tmp_path / "one"), snapshot(tmp_path / "two")
    assert one.keys() == two.keys()
    records = {"laser.json", "README.md", "laser.yaml"}
    for name in one.keys() - records:
        assert one[name] == two[name] or name.startswith("laser/"), name
    assert run("verify", both, tmp_path / "two")[0] == 0
    source = json.loads(two["laser.json"])["plan"]["source"]
    assert source["name"] == "base+adapter"
    assert source["made_of"] == {
        "base": laser.open_checkpoint(base).identity,
        **{f: sha256_of(adapter / f) for f in ("adapter_config.json", "adapter_model.safetensors")},
    }
    card = two["README.md"].decode()
    assert "base+adapter" in card and str(tmp_path) not in card


def test_a_card_names_each_model_as_it_was_given(
    run: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    words = ["run", f"{base}+{adapter}", "-o", str(tmp_path / "out"), "--base", str(base), "--no-search"]
    # The card quotes the command line of the process, which is pytest's here.
    monkeypatch.setattr("sys.argv", ["laser", *words])
    code, _, err = run(*words)
    assert code == 0, err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "laser run base+adapter -o out --base base --no-search\n" in card and str(tmp_path) not in card


def test_a_card_of_a_sum_on_the_hub_has_commands_that_run(
    run: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Owners and all, for by the names alone nobody finds the two; also where no command line was given."""
    adapter, both = write_adapter(tmp_path / "adapter"), "maker/base+maker/adapter"
    with serving() as hub:
        hub.add("maker/base", base)
        hub.add("maker/adapter", adapter)
        connect(hub, tmp_path / "cache", monkeypatch)
        words = ["run", both, "-o", str(tmp_path / "one"), "--rule", "rank:5", "--no-search", "--device", "cpu"]
        # The card quotes the command line of the process, which is pytest's here.
        monkeypatch.setattr("sys.argv", ["laser", *words])
        assert run(*words)[0] == 0
        laser.run(both, tmp_path / "two", "rank:5", device="cpu")
        (tmp_path / "again").mkdir()
        monkeypatch.chdir(tmp_path / "again")
        for name in ("one", "two"):
            card = (tmp_path / name / "README.md").read_text()
            made, checked = (shlex.split(line)[1:] for line in re.findall("^laser .*", card, re.MULTILINE))
            assert made[:4] == ["run", both, "-o", name] and checked == ["verify", both, name]
            for words in (made, checked):
                code, _, err = run(*words)
                assert code == 0, (words, err)
            assert tensors_in(tmp_path / "again" / name).keys() == tensors_in(base).keys()


def test_a_card_of_a_fine_tune_on_the_hub_names_the_owner_of_its_base(
    run: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, made = write_adapter(tmp_path / "adapter"), tmp_path / "made"
    assert run("rebuild", base, adapter, "-o", made)[0] == 0
    with serving() as hub:
        hub.add("maker/base", base)
        hub.add("tuner/tuned", made)
        connect(hub, tmp_path / "cache", monkeypatch)
        laser.run("tuner/tuned", tmp_path / "out", "scale:0.5", base="maker/base", device="cpu")
        for again in (False, True):
            if again:
                assert run("card", tmp_path / "out")[0] == 0
            card = (tmp_path / "out" / "README.md").read_text()
            made_by, checked = (shlex.split(line)[1:] for line in re.findall("^laser .*", card, re.MULTILINE))
            assert made_by[:4] == ["run", "tuner/tuned", "--base", "maker/base"]
            assert checked == ["verify", "tuner/tuned", "out", "--base", "maker/base"]
        monkeypatch.chdir(tmp_path)
        assert run(*checked)[0] == 0


def scaled(adapter: Path) -> None:
    """Another adapter in its place, with a file of the same size."""
    found = load_file(adapter / "adapter_model.safetensors")
    save_file({name: 2 * W for name, W in found.items()}, adapter / "adapter_model.safetensors")


def stated_otherwise(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 9}))


@pytest.mark.parametrize("change", [scaled, stated_otherwise])
def test_another_adapter_or_base_is_another_model(
    change: Callable[[Path], None], run: Run, base: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    both, out, spectra = f"{base}+{adapter}", tmp_path / "out", tmp_path / "s"
    how = ("--rule", "rank:5", "--no-search", "--device", "cpu")
    assert run("run", both, "-o", out, *how)[0] == run("scan", both, "-o", spectra)[0] == 0
    before, data = open_model(both), (adapter / "adapter_model.safetensors").read_bytes()
    change(adapter)
    after = open_model(both)
    assert before.identity != after.identity and before.fingerprint != after.fingerprint
    assert run("plan", spectra, "-o", tmp_path / "p", "--rule", "rank:5")[0] == 0
    for words, told in (
        (("verify", both, out), "made from base+adapter"),
        (("run", both, "-o", out, *how, "--resume"), "made from base+adapter"),
        (("reduce", both, tmp_path / "p", "-o", tmp_path / "o"), "made from base+adapter"),
        (("verify", base, out), "made from base+adapter"),
    ):
        code, _, err = run(*words)
        assert code == 1 and told in err and err.count("\n") == 1, err
    (adapter / "adapter_model.safetensors").write_bytes(data)
    assert run("verify", both, out)[0] == (0 if change is scaled else 1)


def test_an_adapter_that_changes_meanwhile_is_noticed(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    seen = open_model(f"{base}+{adapter}")
    changed: list[Any] = []

    def change(*_: Any) -> None:
        if not changed:
            changed.append(scaled(adapter))

    with pytest.raises(laser.CheckpointError, match=r"adapter_model\.safetensors changed while it was read"):
        laser.scan(seen, tick=change)


def test_a_directory_whose_name_has_a_plus_is_that_directory(run: Run, base: Path, tmp_path: Path) -> None:
    own = tmp_path / "base+adapter"
    shutil.copytree(base, own)
    write_adapter(tmp_path / "adapter")
    assert open_model(own).identity == laser.open_checkpoint(base).identity and open_model(own).on_top is None
    adapter = write_adapter(tmp_path / "a+b")
    found = open_model(f"{own}+{adapter}")
    assert found.name == "base+adapter+a+b" and found.path == own


def test_all_that_reads_a_model_reads_the_sum(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = of_all_kinds(tmp_path)
    assert run("rebuild", base, adapter, "-o", tmp_path / "made")[0] == 0
    # The names are relative to where the command line is.
    monkeypatch.chdir(tmp_path)
    told = json.loads(run("info", "base+adapter", "--json")[1])
    assert told | {"model": "made"} == json.loads(run("info", "made", "--json")[1]) and told["model"] == "base+adapter"
    assert run("delta", "base", "base+adapter", "-o", "d1")[0] == run("delta", "base", "made", "-o", "d2")[0] == 0
    one, two = Spectra.load(Path("d1")), Spectra.load(Path("d2"))
    assert one.values and all(np.array_equal(values, two.values[name]) for name, values in one.values.items())
    assert run("delta", "base+adapter", "made", "-o", "d3")[0] == 0
    delta = Spectra.load(Path("d3")).delta
    assert delta is not None and {change.kind for change in delta.changes.values()} == {"identical"}


@pytest.mark.slow
def test_what_runs_the_model_runs_the_sum(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path / "base", "mixtral")
    (tmp_path / "t.txt").write_text(TEXT)
    adapter, stem = write_adapter(tmp_path / "adapter"), "base_model.model.model.layers.1.self_attn.q_proj.lora"
    m, n = tensors_in(tmp_path / "base")["model.layers.1.self_attn.q_proj.weight"].shape
    factors = {f"{stem}_A.weight": 30 * weights(4, n, 1, F32), f"{stem}_B.weight": 30 * weights(m, 4, 2, F32)}
    save_file(factors, adapter / "adapter_model.safetensors")
    # The names are relative to where the command line is.
    monkeypatch.chdir(tmp_path)
    assert run("rebuild", "base", "adapter", "-o", "made")[0] == 0
    text = ("--text", "t.txt", "--window", "16", "--windows", "4")
    records = []
    for name, model in (("sum", "base+adapter"), ("made", "made"), ("base", "base")):
        assert run("eval", model, *text, "--stream", "-o", f"{name}.json")[0] == 0
        records.append(json.loads(Path(f"{name}.json").read_text()))
    assert records[0]["nll"] == records[1]["nll"] != records[2]["nll"]
    code, out, _ = run("eval", "base+adapter", "made", *text)  # which go through it by layers, and whole
    assert code == 0 and "base+adapter" in out
    for model, file in (("base+adapter", "one"), ("made", "two")):
        assert run("calibrate", model, "-o", file, *text, "--ledoit-wolf")[0] == 0
    assert all(torch.equal(x, load_file("two")[name]) for name, x in load_file("one").items())
    code, _, err = run("leaderboard", "base+adapter", "-o", "b.json")
    assert code == 2 and "make it with laser rebuild" in err
    assert run("search", "base+adapter", "-o", "p.json", "--lowest-snr", "2", *text, "--held-out-windows", "2")[0] == 0


def test_a_hub_id_has_an_adapter_of_the_hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    with serving() as hub:
        hub.add("maker/base", base)
        hub.add("maker/adapter", adapter)
        connect(hub, tmp_path / "cache", monkeypatch)
        found = open_model("maker/base+maker/adapter")
        expected = open_model(f"{base}+{adapter}")
        name = "model.layers.0.self_attn.q_proj.weight"
        assert torch.equal(found.read(name), expected.read(name))
        with pytest.raises(LaserError, match="maker/none"):
            open_model("maker/base+maker/none")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "sets use_dora, which is not merged here; try"),
    ({"bias": "all"}, "bias is 'all', expected 'none'; try"),
    ({"peft_type": "IA3"}, "found an adapter of type 'IA3', expected 'LORA'; try"),
]


@pytest.mark.parametrize(("config", "told"), REFUSED)
def test_what_cannot_be_merged_is_refused(
    config: dict[str, Any], told: str, run: Run, base: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", config)
    code, out, err = run("scan", f"{base}+{adapter}", "-o", tmp_path / "s")
    assert code == 2 and told in err and out == "" and err.count("\n") == 1 and not (tmp_path / "s").exists()


HEAD = "base_model.model.lm_head.weight"


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (float("nan"), f"{HEAD} holds NaN or Inf, expected numbers; download it again"),
        (float("-inf"), f"{HEAD} holds NaN or Inf, expected numbers; download it again"),
        (1e39, f"{HEAD} holds numbers too large for BF16; try a base in float32"),
    ],
)
def test_numbers_that_are_none_in_a_layer_trained_whole_are_refused(
    number: float, told: str, run: Run, base: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    head = laser.open_checkpoint(base).read("lm_head.weight").double()
    save_file(load_file(file) | {HEAD: head}, file)
    assert open_model(f"{base}+{adapter}").read("lm_head.weight").isfinite().all()
    head[-1, 3] = number
    save_file(load_file(file) | {HEAD: head}, file)
    for words in (
        ("scan", f"{base}+{adapter}", "-o", tmp_path / "o"),
        ("rebuild", base, adapter, "-o", tmp_path / "o"),
    ):
        code, out, err = run(*words)
        assert code in (1, 2) and told in err and out == "" and err.count("\n") == 1 and not (tmp_path / "o").exists()


def test_a_target_that_the_base_has_not_is_refused(run: Run, base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    other = {f"{Q0.replace('q_proj', 'z_proj')}.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}
    save_file(other, adapter / "adapter_model.safetensors")
    code, _, err = run("scan", f"{base}+{adapter}", "-o", tmp_path / "s")
    assert code == 1 and "z_proj, which base has not; is that its base?" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("{base}+{tmp}/none", "is no PEFT adapter with adapter_config.json; try BASE+ADAPTER"),
        ("{base}+", "what follows the + is no PEFT adapter"),
        ("{base}+{tmp}/x+{tmp}/y", "names 2 adapters, expected BASE+ADAPTER; merge one with laser rebuild first"),
        ("{tmp}/none+{adapter}", "no such model: "),
        ("{tmp}/pl+us+none", "pl+us+none is no directory, and none is no PEFT adapter"),
        (
            "{tmp}/no+thing+none",
            "/no+thing+none is no directory, and none is called {tmp}/no or {tmp}/no+thing; try BASE",
        ),
        ("maker/a+maker/b+maker/c", "names 2 adapters, expected BASE+ADAPTER"),
        ("{base}+{base}", "is no PEFT adapter with adapter_config.json"),
    ],
)
def test_what_is_no_sum_is_refused(model: str, told: str, run: Run, base: Path, tmp_path: Path) -> None:
    names = {"base": base, "tmp": tmp_path, "adapter": write_adapter(tmp_path / "adapter")}
    (tmp_path / "pl+us").mkdir()
    code, _, err = run("scan", model.format(**names), "-o", tmp_path / "s")
    assert code in (1, 2) and told.format(**names) in err and err.count("\n") == 1, err


def test_what_unmerge_wrote_is_rebuilt_first(run: Run, base: Path, tmp_path: Path) -> None:
    assert run("unmerge", base, base, "-o", tmp_path / "adapter", "--device", "cpu")[0] == 0
    code, _, err = run("scan", f"{base}+{tmp_path / 'adapter'}", "-o", tmp_path / "s")
    assert code == 2 and "it would leave out the remainder; make the fine-tune with laser rebuild" in err


def test_an_output_does_not_lie_in_the_adapter(run: Run, base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    how = ("--rule", "rank:5", "--no-search")
    code, _, err = run("run", f"{base}+{adapter}", "-o", adapter / "out", *how)
    assert code == 1 and "lie in one another" in err and not (adapter / "out").exists()


def test_a_folder_that_was_copied_is_the_same_adapter(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    shutil.copytree(adapter, tmp_path / "moved" / "elsewhere")
    one, other = (open_model(f"{base}+{folder}") for folder in (adapter, tmp_path / "moved" / "elsewhere"))
    assert one.identity == other.identity and (one.name, other.name) == ("base+adapter", "base+elsewhere")


def test_a_merge_of_an_adapter_that_changes_meanwhile_is_refused(
    run: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, other = write_adapter(tmp_path / "adapter"), write_adapter(tmp_path / "other")
    read, reads = peft.tensor_of, list[str]()

    def changing(path: Path, name: str) -> torch.Tensor:
        reads.append(name)
        if len(reads) == 3:
            (other / "adapter_model.safetensors").replace(adapter / "adapter_model.safetensors")
        return read(path, name)

    monkeypatch.setattr(peft, "tensor_of", changing)  # between two reads of one merge nothing else can come
    code, _, err = run("rebuild", base, adapter, "-o", tmp_path / "made")
    assert code != 0 and "changed while it was read" in err and not (tmp_path / "made").exists()
    assert len(reads) > 3


def test_from_python_a_sum_is_a_base_too_and_no_fine_tune_to_unmerge(base: Path, tmp_path: Path) -> None:
    summed, made = f"{base}+{write_adapter(tmp_path / 'adapter')}", tmp_path / "out"
    assert laser.delta(base, summed, device="cpu").delta is not None
    assert laser.delta(summed, base, device="cpu").delta is not None
    assert laser.run(summed, made, base=base, device="cpu").plan.rule == "rounding"
    for pair in ((base, summed), (summed, base)):
        with pytest.raises(laser.UsageError, match="make it with laser rebuild"):
            laser.unmerge(*pair, tmp_path / "adapter-2", device="cpu")
    with pytest.raises(laser.UsageError, match="lowest-snr"):
        laser.search(summed, "rounding", base=base, lowest_snr=3)
