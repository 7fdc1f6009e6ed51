"""laser rebuild of a PEFT adapter without a record: the ordinary merge, one matrix in memory, or a refusal by name."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, write_checkpoint_directory
from helpers import snapshot, tensors_in
from merges import BF16, F32, weights
from models import EXPERTS, HIDDEN, INNER, llama_config, tensors, write_mixtral, write_model
from safetensors.torch import save_file

from laser.checkpoint.quantised import quantise
from laser.differences.peft import NARROWING, OTHERWISE, is_adapted, tensor_of

RANK, Q0 = 4, "base_model.model.model.layers.0.self_attn.q_proj"
MODULES = {
    f"model.layers.{i}.self_attn.{role}_proj": rows
    for i in (0, 1)
    for role, rows in (("q", HIDDEN), ("v", HIDDEN // 2))
}


def write_adapter(path: Path, config: dict[str, Any] | None = None, **more: torch.Tensor) -> Path:
    path.mkdir()
    stated = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "bias": "none", "target_modules": ".*"}
    (path / "adapter_config.json").write_text(json.dumps(stated | (config or {})))
    found, ranks = {}, (config or {}).get("rank_pattern", {})
    for seed, (module, rows) in enumerate(MODULES.items()):
        rank = ranks.get(module.partition("layers.")[2], RANK) if isinstance(ranks, dict) else RANK
        found[f"base_model.model.{module}.lora_A.weight"] = weights(rank, HIDDEN, seed, torch.float32)
        found[f"base_model.model.{module}.lora_B.weight"] = weights(rows, rank, seed + 9, torch.float32)
    save_file(found | more, path / "adapter_model.safetensors")
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base")


def expected(adapter: Path, name: str, W: torch.Tensor, scale: float, how: str) -> torch.Tensor:
    found, module = tensors_in(adapter), f"base_model.model.{name.removesuffix('.weight')}"
    if f"{module}.lora_A.weight" not in found:
        return W
    X = (found[f"{module}.lora_B.weight"] @ found[f"{module}.lora_A.weight"]) * scale  # in float32, as PEFT does
    return W + X.to(BF16) if how == "delta-first" else (W.float() + X).to(BF16)


@pytest.mark.parametrize("how", ["once", "delta-first"])
@pytest.mark.parametrize("config, scale", [
    ({}, 2.0), ({"use_rslora": True}, 4.0), ({"lora_alpha": 6}, 1.5), ({"alpha_pattern": {"(q|v)_proj": 8}}, 2.0),
])  # fmt: skip
def test_it_is_the_merge_written_out(
    run: Run, base: Path, tmp_path: Path, how: str, config: dict[str, Any], scale: float
) -> None:
    adapter = write_adapter(tmp_path / "adapter", config)
    code, out, err = run("rebuild", base, adapter, "-o", tmp_path / "out", "--formula", how, "--json")
    assert code == 0 and json.loads(out)["formula"] == how, err
    source, result = tensors_in(base), tensors_in(tmp_path / "out")
    assert list(result) == list(source)
    for name, W in source.items():
        assert torch.equal(result[name], expected(adapter, name, W, scale, how)), name
    others = {name: data for name, data in snapshot(base).items() if not name.endswith((".safetensors", ".md"))}
    assert others.items() <= snapshot(tmp_path / "out").items()


def test_a_rank_of_its_own_and_a_module_trained_whole(run: Run, base: Path, tmp_path: Path) -> None:
    norm = torch.linspace(0.5, 1.5, HIDDEN)
    patterns = {
        "rank_pattern": {"1.self_attn.q_proj": 2},
        "alpha_pattern": {"1.self_attn.q_proj": 2},
        "lora_alpha": RANK,
    }
    adapter = write_adapter(tmp_path / "adapter", patterns, **{"base_model.model.model.norm.weight": norm})
    assert run("rebuild", base, adapter, "-o", tmp_path / "out")[0] == 0
    result = tensors_in(tmp_path / "out")
    assert torch.equal(result["model.norm.weight"], norm.to(BF16))
    for name, W in tensors().items():
        if "norm" not in name:
            assert torch.equal(result[name], expected(adapter, name, W, 1.0, "once")), name


@pytest.mark.parametrize("config, more, message", [
    ({"use_dora": True}, {}, "sets use_dora, which is not merged here"),
    ({"bias": "all"}, {}, "bias is 'all', expected 'none'"),
    ({"peft_type": "LOHA"}, {}, "found an adapter of type 'LOHA', expected 'LORA'"),
    ({"trainable_token_indices": [3]}, {}, "sets trainable_token_indices"),
    ({"init_lora_weights": "pissa"}, {}, "init_lora_weights is 'pissa', expected one of True, False, gaussian"),
    ({"init_lora_weights": "olora"}, {}, "init_lora_weights is 'olora', expected one of"),
    *(({key: {"a": 1}}, {}, f"sets {key}, which is not merged here; try PEFT's own merge") for key in OTHERWISE),
    ({"r": 0}, {}, "r is 0, expected a positive whole number"),
    ({"r": "4"}, {}, "r is '4', expected a positive whole number"),
    ({"r": True}, {}, "r is True, expected a positive whole number"),
    ({"lora_alpha": "8"}, {}, "lora_alpha is '8', expected a positive number"),
    ({"lora_alpha": 10**400}, {}, "expected a positive number; check the adapter"),
    ({"rank_pattern": [["q_proj", 4]]}, {}, "rank_pattern is [['q_proj', 4]], expected an object"),
    ({"rank_pattern": {"*.q_proj": 4}}, {}, "has '*.q_proj', which is no pattern (nothing to repeat at position 8)"),
    ({"rank_pattern": {"q_proj": 0}}, {}, "rank_pattern has 0 for 'q_proj', expected a positive whole number"),
    ({"alpha_pattern": {"q_proj": None}}, {}, "alpha_pattern has None for 'q_proj', expected a positive number"),
    ({"target_parameters": 5}, {}, "target_parameters is 5, expected a list of names"),
    ({"modules_to_save": "norm"}, {}, "modules_to_save is 'norm', expected a list of names"),
    ({"modules_to_save": ["*"]}, {}, "modules_to_save has '*', which is no pattern"),
    ({"target_modules": "*"}, {}, "target_modules has '*', which is no pattern"),
    ({"target_modules": [3]}, {}, "target_modules is [3], expected names or a pattern; check the adapter"),
    ({"layers_to_transform": ["0"]}, {}, "layers_to_transform is ['0'], expected numbers of layers"),
    ({}, {f"{Q0}.lora_A.weight": torch.full((4, HIDDEN), torch.nan)}, f"{Q0}.lora_A.weight holds NaN or Inf"),
    ({}, {f"{Q0}.lora_B.weight": torch.full((HIDDEN, 4), torch.inf)}, f"{Q0}.lora_B.weight holds NaN or Inf"),
    ({}, {f"{Q0}.weight": torch.ones(HIDDEN, HIDDEN)}, "self_attn.q_proj.weight in two ways"),
    ({"r": 8}, {}, "has rank 8 and alpha 8, found 4 in the file"),
    ({}, {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, HIDDEN)}, "which base has not"),
    ({}, {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 63)}, "do not fit model.embed_tokens"),
    ({}, {"base_model.model.model.embed_tokens.lora_magnitude_vector": torch.ones(4)}, "is no part of a plain LoRA"),
    ({}, {"base_model.model.lm_head.base_layer.weight": torch.ones(64, HIDDEN)}, "is not the base's own"),
    ({}, {"base_model.model.model.norm.weight": torch.ones(5)}, r"has shape [5], expected [96]"),
])  # fmt: skip
def test_what_is_no_plain_lora_is_refused(
    run: Run, base: Path, tmp_path: Path, config: dict[str, Any], more: dict[str, torch.Tensor], message: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", config, **more)
    code, _, err = run("rebuild", base, adapter, "-o", tmp_path / "out")
    assert code in (1, 2) and message in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


LISTED = {"target_modules": ["q_proj", "v_proj"]}
NARROWED: list[tuple[dict[str, Any], str | None]] = [  # and a module of the file that is left out
    (LISTED, None),
    ({"target_modules": "all-linear"}, None),
    ({"target_modules": r".*\.(q|v)_proj"}, None),
    (LISTED | {"layers_to_transform": [0, 1], "layers_pattern": "layers"}, None),
    (LISTED | {"layers_to_transform": []}, None),
    (LISTED | {"exclude_modules": ["k_proj"], "modules_to_save": ["norm", "proj"]}, None),
    (LISTED | {"layers_to_transform": [0]}, "layers.1.self_attn.q_proj"),
    (LISTED | {"layers_to_transform": 1, "layers_pattern": ["h", "layers"]}, "layers.0.self_attn.q_proj"),
    (LISTED | {"layers_to_transform": [0, 1], "layers_pattern": "h"}, "layers.0.self_attn.q_proj"),
    (LISTED | {"exclude_modules": ["v_proj"]}, "layers.0.self_attn.v_proj"),
    (LISTED | {"exclude_modules": r".*\.1\..*"}, "layers.1.self_attn.q_proj"),
    (LISTED | {"modules_to_save": ["self_attn"]}, "layers.0.self_attn.q_proj"),
    ({"target_modules": ["q_proj"]}, "layers.0.self_attn.v_proj"),
    ({"target_modules": ["proj"]}, "layers.0.self_attn.q_proj"),
    ({"target_modules": r"layers\.\d\.self_attn\.q_proj"}, "layers.0.self_attn.q_proj"),
    ({"target_modules": None}, "layers.0.self_attn.q_proj"),
]


@pytest.mark.parametrize("config, left_out", NARROWED)
def test_what_the_config_leaves_out_is_not_merged(
    run: Run, base: Path, tmp_path: Path, config: dict[str, Any], left_out: str | None
) -> None:
    """PEFT passes over such factors without a word, so the merge would be another than its."""
    adapter = write_adapter(tmp_path / "adapter", config)
    code, _, err = run("rebuild", base, adapter, "-o", tmp_path / "out", "--formula", "once")
    assert (tmp_path / "out").exists() == (left_out is None)
    if left_out:
        assert code == 2 and f"{left_out}.lora_A.weight is of a layer that adapter_config.json leaves out" in err
        assert "layers_to_transform, layers_pattern, or try PEFT's own merge" in err
    else:
        assert code == 0, err


def test_all_linear_is_neither_of_embedding_nor_of_head(run: Run, base: Path, tmp_path: Path) -> None:
    stem, words = "base_model.model.lm_head.lora_", tensors()["lm_head.weight"].shape[0]
    more = {f"{stem}A.weight": weights(RANK, HIDDEN, 1, F32), f"{stem}B.weight": weights(words, RANK, 2, F32)}
    for number, (named, code) in enumerate((("all-linear", 2), ("lm_head|.*proj", 0))):
        adapter = write_adapter(tmp_path / f"adapter{number}", {"target_modules": named}, **more)
        found, _, err = run("rebuild", base, adapter, "-o", tmp_path / f"out{number}")
        assert found == code and ("lm_head.lora_A.weight is of a layer" in err) == (code == 2), err


@pytest.mark.filterwarnings("ignore")
def test_a_layer_is_adapted_where_peft_adapts_it() -> None:
    """Its own function over many configs: nested numbers, names that are the whole of one, models without a prefix."""
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    at = [
        f"{top}.{i}.{leaf}"
        for top in ("h", "model.layers", "model.h")
        for i in (0, 1, 11)
        for leaf in ("q_proj", "a.q")
    ]
    at += ["q_proj", "model.layers.0.experts.1.q_proj", "layers.1.layers.0.q_proj", "model.norm", "xq_proj", "h.q_proj"]
    named = (["q_proj"], ["h.1.q_proj", "a.q"], ["model.layers.1.a.q"], [], r".*\.q_proj", "h.*")
    narrow = ({}, {"exclude_modules": ["a.q"]}, {"exclude_modules": "h.*"}, {"modules_to_save": ["layers.1", "norm"]})
    layers = (
        {},
        *({"layers_to_transform": n, "layers_pattern": p} for n in ([0], 1, []) for p in (None, "h", ["layers"])),
    )
    told = set()
    for modules, some, these in itertools.product(named, narrow, layers):
        if isinstance(modules, str) and these:
            continue
        config = {"target_modules": modules, **some, **these}
        theirs = peft.LoraConfig(**config)
        for module in at:
            found = check_target_module_exists(theirs, module)
            assert is_adapted(config, module) == bool(found), (config, module)
            told.add(bool(found))
    assert told == {True, False}


@pytest.mark.parametrize("initial", ["gaussian", "Gaussian", "eva", "orthogonal", True, False, None])
def test_where_training_began_is_of_no_account_if_the_base_stayed(
    run: Run, base: Path, tmp_path: Path, initial: object
) -> None:
    adapter = write_adapter(tmp_path / "adapter", {"init_lora_weights": initial, "loftq_config": {}})
    assert run("rebuild", base, adapter, "-o", tmp_path / "out")[0] == 0


def test_every_field_of_peft_s_own_config_is_known() -> None:
    """What a new one means has to be known before an adapter that sets it is merged."""
    peft = pytest.importorskip("peft")
    read = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "init_lora_weights"}
    read |= {"target_parameters", "ensure_weight_tying", *NARROWING}
    of_training = {"lora_dropout", "eva_config", "inference_mode", "runtime_config", "task_type", "qalora_group_size"}
    of_loading = {"base_model_name_or_path", "revision", "auto_mapping", "peft_version", "megatron_config"}
    known = read | of_training | of_loading | {"megatron_core"} | set(OTHERWISE)
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= known


@pytest.mark.parametrize("kind", ["gptq", "awq", "fp8"])
def test_a_packed_base_is_refused(run: Run, tmp_path: Path, kind: str) -> None:
    found, name = tensors(), "model.layers.0.self_attn.q_proj"
    found |= {f"{name}.weight": torch.zeros(HIDDEN, HIDDEN, dtype=torch.float8_e4m3fn)} if kind == "fp8" else {}
    words, one = HIDDEN // 8, torch.ones(1, HIDDEN, dtype=torch.float16)
    parts = {
        "gptq": {"qweight": (words, HIDDEN), "qzeros": (1, words)},
        "awq": {"qweight": (HIDDEN, words), "qzeros": (1, words)},
        "fp8": {},
    }[kind]
    if parts:
        del found[f"{name}.weight"]
    found |= {f"{name}.{part}": torch.zeros(shape, dtype=torch.int32) for part, shape in parts.items()}
    found |= {f"{name}.scales" if parts else f"{name}.weight_scale": one if parts else torch.ones(())}
    how = {"quantization_config": {"quant_method": kind, "bits": 4, "group_size": HIDDEN}} if parts else {}
    base = write_checkpoint_directory(tmp_path / "base", found, llama_config(**how))
    adapter = write_adapter(tmp_path / "adapter")
    code, _, err = run("rebuild", base, adapter, "-o", tmp_path / "out")
    assert code == 2 and "weights, into which no adapter can be merged; try the unquantised model" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("whole", [False, True])
def test_a_weight_in_eight_bits_is_refused(run: Run, tmp_path: Path, whole: bool) -> None:
    """Its scales would stay those of the base."""
    name = "model.layers.0.self_attn.q_proj.weight"
    W, scale = quantise(tensors()[name].float(), F32)
    base = write_checkpoint_directory(
        tmp_path / "base", tensors() | {name: W, f"{name}_scale_inv": scale}, llama_config()
    )
    adapter = write_adapter(tmp_path / "adapter")
    if whole:
        more = {k: v for k, v in tensors_in(adapter).items() if not k.startswith(Q0)}
        save_file(more | {f"{Q0}.weight": torch.ones(W.shape)}, adapter / "adapter_model.safetensors")
    code, _, err = run("rebuild", base, adapter, "-o", tmp_path / "out")
    assert code == 2 and f"{name} is stored as F8_E4M3" in err and "try the unquantised model" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form, advice", [
    (["adapter_model.bin"], "adapter_model.bin is a pickle, expected adapter_model.safetensors; try it by PEFT"),
    (
        [f"adapter_model-0000{n}-of-00002.safetensors" for n in (1, 2)],
        "holds 2 shards as adapter_model-00001-of-00002.safetensors, expected one adapter_model.safetensors; try to",
    ),
])  # fmt: skip
def test_factors_in_another_form_are_named(run: Run, base: Path, tmp_path: Path, form: list[str], advice: str) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    for name in form:
        shutil.copy(adapter / "adapter_model.safetensors", adapter / name)
    (adapter / "adapter_model.safetensors").unlink()
    for words in (("rebuild", base, adapter), ("scan", f"{base}+{adapter}")):
        code, _, err = run(*words, "-o", tmp_path / "out")
        assert (
            code == 2 and advice in " ".join(err.split()) and err.count("\n") == 1 and not (tmp_path / "out").exists()
        )


def test_records_of_the_base_are_not_those_of_the_merge(run: Run, base: Path, tmp_path: Path) -> None:
    (base / "laser.json").write_text('{"kind": "outcome"}')
    assert run("rebuild", base, write_adapter(tmp_path / "adapter"), "-o", tmp_path / "out")[0] == 0
    assert snapshot(base).keys() - snapshot(tmp_path / "out").keys() == {"laser.json", "README.md"}


@pytest.mark.parametrize("leaf", ["experts.0.w1", "experts.3.w2", "gate"])
def test_a_layer_that_transformers_4_held_by_itself(run: Run, tmp_path: Path, leaf: str) -> None:
    """An expert of a Mixtral, or its router, by the name of its tensor: merged as any other layer."""
    base, name = write_mixtral(tmp_path / "base"), f"model.layers.0.block_sparse_moe.{leaf}"
    source = tensors_in(base)
    W = source[f"{name}.weight"]
    A, B = weights(2, W.shape[1], 1, F32), weights(W.shape[0], 2, 2, F32)
    adapter = write_adapter(tmp_path / "adapter", {"r": 2, "lora_alpha": 3})
    factors = {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
    save_file(factors, adapter / "adapter_model.safetensors")
    code, _, err = run("rebuild", base, adapter, "-o", tmp_path / "out")
    assert code == 0, err
    made = tensors_in(tmp_path / "out")
    assert torch.equal(made[f"{name}.weight"], (W.float() + (B @ A) * 1.5).to(BF16))
    assert all(torch.equal(made[other], X) for other, X in source.items() if other != f"{name}.weight")


def test_the_factors_of_all_experts_are_read_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the check, and once for the merge, however many experts there are."""
    base, adapter = write_mixtral(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    stem = "base_model.model.model.layers.0.mlp.experts"
    down = {f"{stem}.lora_A.weight": weights(2 * EXPERTS, INNER, 1, F32)}
    down |= {f"{stem}.lora_B.weight": weights(HIDDEN, 2 * EXPERTS, 2, F32)}
    save_file(down, adapter / "adapter_model.safetensors")
    stated = json.loads((adapter / "adapter_config.json").read_text())
    stated |= {"r": 2, "target_parameters": ["mlp.experts.down_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(stated))
    read: list[str] = []
    # Reads are counted where they are made: what they give is the same.
    monkeypatch.setattr(
        "laser.differences.peft.tensor_of", lambda path, name: read.append(name) or tensor_of(path, name)
    )
    code, _, err = run("rebuild", base, adapter, "-o", tmp_path / "out")
    assert code == 0, err
    assert sorted(read) == sorted(2 * list(down))
    source, made = tensors_in(base), tensors_in(tmp_path / "out")
    assert {name for name, W in source.items() if not torch.equal(W, made[name])} == {
        f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight" for expert in range(EXPERTS)
    }


def test_a_formula_is_for_adapters_without_a_record(run: Run, base: Path, tmp_path: Path) -> None:
    assert run("unmerge", base, base, "-o", tmp_path / "adapter", "--device", "cpu")[0] == 0
    code, _, err = run("rebuild", base, tmp_path / "adapter", "-o", tmp_path / "out", "--formula", "once")
    assert code == 2 and "says itself how it was merged" in err
    code, _, err = run("rebuild", base, base, "-o", tmp_path / "out")
    assert code == 1 and "try the directory of a PEFT adapter" in err
