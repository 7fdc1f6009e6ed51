"""What PEFT calls the modules of a model: every tuned parameter is as tuned once PEFT has merged, or unmerge named it.

And the other way round: what laser rebuild makes of an adapter that PEFT wrote is what PEFT makes of it.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from families import build
from helpers import tensors_in
from merges import update
from models import write_model
from safetensors.torch import save_file

from laser.checkpoint.matrices import Matrix, list_matrices
from laser.checkpoint.reader import open_checkpoint
from laser.differences.in_memory import memory_of
from laser.differences.unmerge import AdapterRecord, How

SHARE = 0.1  # of each matrix's norm


def of_layers(m: Matrix) -> bool:
    return m.is_matrix and m.layer is not None and m.role not in ("embedding", "head", "position")


def around_layers(m: Matrix) -> bool:
    return m.part is None and m.role in ("norm", "embedding", "head")


def written(folder: Path, family: str) -> Any:
    """The class of a family's tiny model, whose weights lie in the folder."""
    model = build(family)
    model.save_pretrained(folder)
    return type(model)


def tune(base: Path, out: Path, chosen: Any, whole: bool = False) -> None:
    """The base with updates of rank 1, or with noise, in the matrices that are chosen."""
    shutil.copytree(base, out)
    tensors = tensors_in(base)
    for i, m in enumerate(list_matrices(open_checkpoint(base, "files"))):
        if not chosen(m):
            continue
        held = tensors[m.tensor].clone()
        W = held if m.part is None else m.part.of(held)
        noise = 0.1 * torch.randn(W.shape, generator=torch.Generator().manual_seed(i))
        X = noise if whole or not m.is_matrix else update(W, 1, SHARE, seed=i)
        held = W + X if m.part is None else held
        if m.part is not None:
            m.part.put(held, W + X)
        tensors[m.tensor] = held.contiguous()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def unmerged(run: Run, tmp_path: Path) -> set[str]:
    """The parameters in memory that PEFT alone does not apply, as unmerge says; base and tuned lie in tmp_path."""
    base, tuned, adapter = (tmp_path / name for name in ("base", "tuned", "adapter"))
    code, out, err = run("unmerge", base, tuned, "-o", adapter, "--device", "cpu")
    assert code == 0, err
    record, memory = AdapterRecord.load(adapter / "laser.json"), memory_of(open_checkpoint(base, "files"))
    assert memory is not None
    beyond = [
        e.name for e in record.entries if e.how in (How.WHOLE, How.SCALED) or (e.how is How.ADAPTER and e.place is None)
    ]
    assert bool(beyond) == ("PEFT alone does not apply" in out + err)
    assert run("rebuild", base, adapter, "-o", tmp_path / "again")[0] == 0
    named = {memory.names[name.partition("[")[0]] for name in beyond}
    return named | {twin for name in named for twin in memory.tied[name]}


def merged_by_peft(kind: Any, base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ties
        model: Any = PeftModel.from_pretrained(kind.from_pretrained(base, dtype=torch.float32), adapter)
        return model.merge_and_unload().state_dict()


def not_as_tuned(kind: Any, tmp_path: Path) -> set[str]:
    """The parameters that PEFT's merge leaves otherwise than they were tuned; at least one was changed."""
    base, tuned = (
        kind.from_pretrained(tmp_path / name, dtype=torch.float32).state_dict() for name in ("base", "tuned")
    )
    assert any(not torch.equal(W, tuned[name]) for name, W in base.items())
    made = merged_by_peft(kind, tmp_path / "base", tmp_path / "adapter")
    return {name for name, W in tuned.items() if (made[name] - W).abs().max() > 1e-4}


ROUTERS = {f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)}
# Family -> what PEFT does not apply, of matrices in its layers.
LAYERS: dict[str, set[str]] = {
    "Mixtral": ROUTERS,
    "DeepSeek-V3": {"model.layers.1.mlp.gate.weight"},
    "Qwen3-Next": ROUTERS | {f"model.layers.{layer}.mlp.shared_expert_gate.weight" for layer in (0, 1)},
    "Qwen2.5-VL": set(),
    "Gemma 3, vision": set(),
    "Falcon-H1": {f"model.layers.{layer}.mamba.out_proj.weight" for layer in (0, 1)},
    "BERT": set(),
}


@pytest.mark.parametrize("family", LAYERS)
def test_layers_as_peft_has_them(run: Run, tmp_path: Path, family: str) -> None:
    pytest.importorskip("peft")
    kind = written(tmp_path / "base", family)
    tune(tmp_path / "base", tmp_path / "tuned", of_layers)
    named = unmerged(run, tmp_path)
    assert not_as_tuned(kind, tmp_path) <= named
    assert {name for name in named if not name.startswith("model.layers.0.linear_attn")} >= LAYERS[family]
    assert family != "Qwen2.5-VL" or not named


def test_experts_that_peft_would_turn_round_have_no_place(run: Run, tmp_path: Path) -> None:
    """Llama 4's lie as (experts, in, out), which PEFT does not see: it wants A of B's size, and B of A's."""
    pytest.importorskip("peft")
    kind = written(tmp_path / "base", "Llama 4")
    tune(tmp_path / "base", tmp_path / "tuned", of_layers)
    named = unmerged(run, tmp_path)
    assert "model.layers.0.feed_forward.experts.gate_up_proj" in named and not_as_tuned(kind, tmp_path) <= named


# Family -> what was trained whole there, and PEFT does not apply.
AROUND: dict[str, set[str]] = {
    "Llama 3": set(),  # tied
    "GPT-NeoX": set(),  # norms with a bias, a head of another name in memory
    "Phi-2": set(),  # a head with a bias
    "Qwen2-VL": set(),
    "BERT": {"bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"},  # tied to a head with a bias
    "T5": {f"{name}.weight" for name in ("shared", "lm_head", "encoder.embed_tokens", "decoder.embed_tokens")},
}


@pytest.mark.parametrize("family", AROUND)
def test_what_was_trained_whole(run: Run, tmp_path: Path, family: str) -> None:
    """Norms, embeddings and heads with all that their modules have, and the head that is the embedding."""
    pytest.importorskip("peft")
    kind = written(tmp_path / "base", family)
    tune(tmp_path / "base", tmp_path / "tuned", around_layers, whole=True)
    named = unmerged(run, tmp_path)
    assert named == AROUND[family] and not_as_tuned(kind, tmp_path) == named


def test_a_bias_that_was_trained(run: Run, tmp_path: Path) -> None:
    """Of a norm PEFT keeps it, with the norm's weight; of a head it would need the whole head, so it is named."""
    pytest.importorskip("peft")
    kind = written(tmp_path / "base", "Phi-2")
    shutil.copytree(tmp_path / "base", tmp_path / "tuned")
    changed = ["model.final_layernorm.bias", "lm_head.bias"]
    tensors = tensors_in(tmp_path / "base")
    save_file(
        tensors | {n: tensors[n] + 1 for n in changed}, tmp_path / "tuned" / "model.safetensors", {"format": "pt"}
    )
    assert unmerged(run, tmp_path) == {"lm_head.bias"} == not_as_tuned(kind, tmp_path)


def test_an_embedding_by_role_that_is_a_layer(run: Run, tmp_path: Path) -> None:
    """OPT's project_in multiplies: PEFT's A and B are those of a layer, not of rows that are looked up."""
    pytest.importorskip("peft")
    kind = written(tmp_path / "base", "OPT")
    tune(tmp_path / "base", tmp_path / "tuned", lambda m: "project_" in m.tensor)
    assert not unmerged(run, tmp_path) and not not_as_tuned(kind, tmp_path)


@pytest.mark.parametrize("family", ["BERT", "T5"])
def test_what_it_is_for(run: Run, tmp_path: Path, family: str) -> None:
    """A model that continues no text has no task of PEFT's, and no word is said of vLLM."""
    written(tmp_path / "base", family)
    tune(tmp_path / "base", tmp_path / "tuned", lambda m: m.role == "q")
    code, out, err = run(
        "unmerge", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "adapter", "--device", "cpu"
    )
    assert code == 0 and "vLLM" not in out + err
    stated = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stated["task_type"] == {"BERT": None, "T5": "SEQ_2_SEQ_LM"}[family]


def test_a_model_that_transformers_does_not_build(run: Run, tmp_path: Path) -> None:
    for name, words in (("base", None), ("tuned", lambda n, W: W + update(W, 2, 0.02) if "q_proj" in n else W)):
        write_model(tmp_path / name, words, model_type="unheard", architectures=["UnheardForCausalLM"])
    code, out, err = run(
        "unmerge", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "adapter", "--device", "cpu"
    )
    assert code == 0 and "whether PEFT finds the modules was not checked" in out + err


def adapter_of_peft(base: Any, folder: Path, **config: Any) -> None:
    """Writes what PEFT trains nothing of, from random A and B."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(base, LoraConfig(r=3, init_lora_weights=False, **config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name and parameter.requires_grad:
                    parameter += 0.1
        model.save_pretrained(folder)


@pytest.mark.parametrize("family", ["Mixtral", "PhiMoE", "Gemma 3n", "OPT", "Qwen2.5-VL", "Qwen2-Audio", "DeepSeek-V3"])
def test_every_layer_that_peft_adapts(run: Run, tmp_path: Path, family: str) -> None:
    """all-linear, as PEFT names it: gates, layers of the role embedding, towers."""
    pytest.importorskip("peft")
    base, out = tmp_path / "base", tmp_path / "out"
    kind = written(base, family)
    adapter_of_peft(kind.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter", target_modules="all-linear")
    code, _, err = run("rebuild", base, tmp_path / "adapter", "-o", out)
    assert code == 0, err
    ours = kind.from_pretrained(out, dtype=torch.float32).state_dict()
    theirs = merged_by_peft(kind, base, tmp_path / "adapter")
    assert all(torch.equal(W, theirs[name]) for name, W in ours.items())


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
)
def test_a_head_that_is_the_embedding(run: Run, tmp_path: Path, config: dict[str, Any]) -> None:
    """Merged where both stay one, refused by its reason where PEFT makes two of them."""
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base, out = write_model(tmp_path / "base", head=False, tie_word_embeddings=True), tmp_path / "out"
    adapter_of_peft(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", **config)
    code, _, err = run("rebuild", base, tmp_path / "adapter", "-o", out)
    if "embed_tokens" not in config.get("modules_to_save", ()):
        assert code == 2 and "ties to model.embed_tokens.weight and stores once; try PEFT's own merge" in err
        return
    assert code == 0, err
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
        theirs = model.merge_and_unload().state_dict()
    made = tensors_in(out)
    assert all(torch.equal(W, theirs[name]) for name, W in made.items())
